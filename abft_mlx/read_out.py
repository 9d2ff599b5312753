"""The label-attention read-out: the answer, read from the attention on the demonstrations' labels.

For attention head h and class c let m[h, c] be the attention of the last position on the label
positions of class c. The score of the class is ``sum over h of w[h] * log(m[h, c] + EPSILON)``
minus its mean over other queries behind the same demonstrations; the softmax of the scores gives
the probabilities. w has one number for each head, the same for all classes, so a read-out knows no
classes, and label words may be anything. Kin: anchor re-weighting (arXiv 2305.14160) and batch
calibration (arXiv 2309.17249).

Letters: B prompts, N prompts in all, H heads, T tokens, K demonstrations, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.errors import AdapterError
from abft_mlx.files import write_arrays
from abft_mlx.induction import label_attention

FILE = "head_weights.safetensors"
EPSILON = 1e-3
# Strength of the fit's L2 penalty, on weights of features of unit size.
PENALTY = 0.3
# Adam moves every number by about the learning rate; the head weights want some times as much. A
# power of two, so that weights come back from their file exactly.
SPEED = 4.0
# A class that no demonstration has is never the answer; finite, so that gradients stay finite.
NEVER = -1e9


class ReadOut(nn.Module):
    """The head weights of a model, as trainable parameters of it.

    Attributes:
        heads: (H,) weight of each head divided by SPEED, under ``layerN``. A bare number would
            come back from a checkpoint as the index of a list.
    """

    def __init__(self, weights: Mapping[int, np.ndarray | mx.array]) -> None:
        super().__init__()
        self.heads = {
            f"layer{layer}": mx.array(values).astype(mx.float32) / SPEED
            for layer, values in weights.items()
        }

    def weights(self) -> dict[int, np.ndarray]:
        """Layer number to the (H,) weights of its heads."""
        return {_number(name): SPEED * np.array(values) for name, values in self.heads.items()}

    def scores(
        self,
        rows: Sequence[mx.array | None],
        label_positions: mx.array,
        demonstration_labels: mx.array,
        classes: int,
    ) -> mx.array:
        """Scores of the classes, not centred.

        Layers above the last one with weights are not used, so MLX does not compute them.

        Args:
            rows: per layer, (B, H, T) pattern rows at the last position, or None.
            label_positions: (B, K).
            demonstration_labels: (B, K) class numbers.
            classes: C.

        Returns:
            (B, C) float32; NEVER for a class without demonstrations.
        """
        total = mx.zeros((len(label_positions), classes))
        for name, weights in self.heads.items():
            pattern = rows[_number(name)]
            assert pattern is not None
            mass = log_mass(pattern, label_positions, demonstration_labels, classes)
            total = total + SPEED * (weights[:, None] * mass).sum(axis=1)
        shown = (demonstration_labels[:, :, None] == mx.arange(classes)).any(axis=1)
        return mx.where(shown, total, NEVER)


def _number(name: str) -> int:
    return int(name.removeprefix("layer"))


def log_mass(
    pattern: mx.array, label_positions: mx.array, demonstration_labels: mx.array, classes: int
) -> mx.array:
    """(B, H, C) ``log(m + EPSILON)``: each head's attention on the labels of each class.

    Args:
        pattern: (B, H, T) pattern rows of one layer.
        label_positions: (B, K).
        demonstration_labels: (B, K).
        classes: C.
    """
    of_class = demonstration_labels[:, :, None] == mx.arange(classes)
    mass = label_attention(pattern, label_positions) @ of_class.astype(mx.float32)
    return mx.log(mass + EPSILON)


def features_of(
    rows: Iterable[mx.array | None], label_positions: mx.array, labels: mx.array, classes: int
) -> mx.array:
    """(B, H, C) log masses of all layers' heads, in the order of layers."""
    masses = [log_mass(row, label_positions, labels, classes) for row in rows if row is not None]
    return mx.concatenate(masses, axis=1)


def centred(scores: mx.array, group: int) -> mx.array:
    """(B, C) scores minus their mean over each ``group`` prompts with the same demonstrations."""
    B, C = scores.shape
    grouped = scores.reshape(B // group, group, C)
    return (grouped - grouped.mean(axis=1, keepdims=True)).reshape(B, C)


def of(model: nn.Module) -> ReadOut | None:
    """The model's read-out, or None."""
    module = model.get("read_out")
    return module if isinstance(module, ReadOut) else None


def attach(model: nn.Module, weights: Mapping[int, np.ndarray | mx.array]) -> None:
    """Give a model head weights, layer number to (H,), which answer instead of its LM head."""
    model.read_out = ReadOut(weights)


def detach(model: nn.Module) -> ReadOut | None:
    """Take a model's read-out off, and return it."""
    module = of(model)
    if module is not None:
        del model["read_out"]
    return module


def save(model: nn.Module, folder: Path) -> None:
    """Write the head weights, ``layerN`` (H,) float32; without a read-out remove the file."""
    module, path = of(model), folder / FILE
    if module is None:
        path.unlink(missing_ok=True)
        return
    arrays = {f"layer{layer}": mx.array(one) for layer, one in module.weights().items()}
    write_arrays(path, arrays)


def read(folder: Path, heads: Mapping[int, int]) -> dict[int, mx.array] | None:
    """Read the head weights of a run folder; None where it has none.

    Args:
        folder: a run folder.
        heads: layer number to its number of heads, of the model that they are for.

    Raises:
        AdapterError: the file is broken, or is of another model.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        arrays: Any = mx.load(str(path))
        weights = {_number(name): values for name, values in arrays.items()}
    except (RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} is broken: {error}; train or copy it again") from error
    for layer, values in weights.items():
        if values.shape != (heads.get(layer),):
            raise AdapterError(
                f"{path}: {tuple(values.shape)} weights for layer {layer}, the model has "
                f"{heads.get(layer, 0)} heads there; use the base model that it was trained on"
            )
    return weights


def fit(
    features: np.ndarray, gold: np.ndarray, groups: np.ndarray, penalty: float = PENALTY
) -> np.ndarray:
    """(H,) float64 head weights by logistic regression on the attention of a model as it is.

    Minimises by Newton's method the mean cross-entropy plus ``penalty`` times the squared weights
    of features that are divided by their root mean square.

    Args:
        features: (N, H, C) from :func:`log_mass`.
        gold: (N,) class numbers.
        groups: (N,) prompts with the same number have the same demonstrations.
        penalty: of the weights.
    """
    f = features.astype(np.float64)
    f -= f.mean(axis=2, keepdims=True)
    for group in np.unique(groups):
        f[groups == group] -= f[groups == group].mean(axis=0)
    size = np.sqrt((f**2).mean(axis=(0, 2))) + EPSILON
    f /= size[:, None]
    N, H, C = f.shape
    right = np.eye(C)[gold]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = np.einsum("nhc,h->nc", f, weights)
        scores -= scores.max(axis=1, keepdims=True)
        powers = np.exp(scores)
        sums = powers.sum(axis=1, keepdims=True)
        value = np.log(sums[:, 0]).mean() - (scores * right).sum() / N
        return value + penalty * weights @ weights, powers / sums

    weights = np.zeros(H)
    value, p = loss(weights)
    for _ in range(50):
        gradient = np.einsum("nhc,nc->h", f, p - right) / N + 2 * penalty * weights
        if np.abs(gradient).max() < 1e-8:
            break
        # Of each prompt the covariance of its features under p.
        spread = (f - np.einsum("nhc,nc->nh", f, p)[:, :, None]) * np.sqrt(p)[:, None, :]
        spread = spread.transpose(1, 0, 2).reshape(H, -1)
        step = np.linalg.solve(spread @ spread.T / N + 2 * penalty * np.eye(H), gradient)
        for halving in range(30):
            trial = weights - step / 2**halving
            trial_value, p = loss(trial)
            if trial_value <= value:
                break
        weights, value = trial, trial_value
    return weights / size


def by_layer(flat: np.ndarray, heads: Mapping[int, int]) -> dict[int, np.ndarray]:
    """(H,) weights of all heads to those of each layer; ``heads`` has the layers in order."""
    ends = np.cumsum(list(heads.values()))[:-1]
    return dict(zip(heads, np.split(flat, ends), strict=True))
