"""Two models, or one with and without an adapter, asked the same prompts: how far apart they are.

Letters: N prompts, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.evaluation import hidden_states, vocabulary_logits
from abft_mlx.prompts import Prompt

# Below the first a part of the adapter is lost, below the second the adapter.
KEPT_WHOLE, KEPT_AT_LEAST = 0.9, 0.5


def last_logits(
    model: nn.Module,
    prompts: Sequence[Prompt],
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Logits of the whole vocabulary at every prompt's last position.

    Args:
        model: a loaded model.
        prompts: N prompts.
        batch_tokens: tokens in one forward pass.
        on_progress: told how many prompts of how many are asked.

    Returns:
        (N, V) float32.
    """
    states = hidden_states(model, prompts, batch_tokens=batch_tokens, on_progress=on_progress)
    return np.concatenate([np.array(one) for one in vocabulary_logits(model, states)])


@dataclass(frozen=True)
class Distance:
    """How far two sets of logits are apart.

    Attributes:
        vocabulary_max: largest absolute difference of any token.
        vocabulary_mean: mean absolute difference over all tokens.
        labels_max: the same over the label tokens alone.
        labels_mean: likewise.
        agreement: prompts of which both give the same label.
    """

    vocabulary_max: float
    vocabulary_mean: float
    labels_max: float
    labels_mean: float
    agreement: int

    @classmethod
    def between(cls, left: np.ndarray, right: np.ndarray, labels: Sequence[int]) -> Distance:
        """From two (N, V) arrays and the C label tokens."""
        whole = np.abs(left - right)
        few = whole[:, list(labels)]
        same = left[:, list(labels)].argmax(axis=1) == right[:, list(labels)].argmax(axis=1)
        return cls(
            vocabulary_max=float(whole.max()),
            vocabulary_mean=float(whole.mean(dtype=np.float64)),
            labels_max=float(few.max()),
            labels_mean=float(few.mean(dtype=np.float64)),
            agreement=int(same.sum()),
        )


@dataclass(frozen=True)
class Comparison:
    """What an export came to, measured.

    Attributes:
        prompts: N.
        result: from base + adapter to what was written.
        base: from base + adapter to the base alone: the adapter's own effect.
    """

    prompts: int
    result: Distance
    base: Distance

    @property
    def kept(self) -> float | None:
        """Share of the adapter's effect on the labels' logits that is left: 1 is all of it.

        One minus the result's mean distance in parts of the base's, so that noise counts as loss;
        below 0 the result is further off than the base. None where the adapter does nothing.
        """
        if self.base.labels_mean == 0:
            return None
        return 1 - self.result.labels_mean / self.base.labels_mean

    @property
    def lost(self) -> bool:
        """Whether less than half of the effect is left, or the base's labels are nearer."""
        if self.kept is None:
            return False
        return self.kept < KEPT_AT_LEAST or self.result.agreement < self.base.agreement

    @property
    def weakened(self) -> bool:
        """Whether more than a tenth of the effect is gone."""
        return self.kept is not None and self.kept < KEPT_WHOLE

    def as_dict(self) -> dict[str, Any]:
        """What the JSON document holds of it."""
        return {
            "prompts": self.prompts,
            "result": asdict(self.result),
            "base": asdict(self.base),
            "kept": self.kept,
            "lost": self.lost,
        }


def compare(
    base: np.ndarray, adapted: np.ndarray, result: np.ndarray, labels: Sequence[int]
) -> Comparison:
    """Compare what was written with base + adapter.

    Args:
        base: (N, V) logits of the base alone.
        adapted: (N, V) of base + adapter.
        result: (N, V) of what was written.
        labels: (C,) the label tokens.
    """
    return Comparison(
        prompts=len(adapted),
        result=Distance.between(adapted, result, labels),
        base=Distance.between(adapted, base, labels),
    )
