"""Two models, or one with and without an adapter, asked the same prompts: how far apart they are.

Letters: N prompts, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.evaluation import check_finite, hidden_states, vocabulary_logits
from abft_mlx.evaluation.forward import Outputs
from abft_mlx.prompts import LabelSpace, Prompt

# Below the first a part of the adapter is lost, below the second the adapter.
KEPT_WHOLE, KEPT_AT_LEAST = 0.9, 0.5


@dataclass(frozen=True)
class Answers:
    """What a model makes of some prompts.

    Attributes:
        vocabulary: (N, V) float32 logits of the whole vocabulary at the last position.
        labels: (N, C) scores of the classes: logits where every label word is one token.
    """

    vocabulary: np.ndarray
    labels: np.ndarray


def answers(
    model: nn.Module,
    prompts: Sequence[Prompt],
    space: LabelSpace,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Ask a model.

    Args:
        model: a loaded model.
        prompts: N prompts.
        space: the labels.
        batch_tokens: tokens in one forward pass.
        on_progress: told how many prompts of how many are asked.

    Raises:
        RunError: scores are not finite.
    """
    later = np.zeros((len(prompts), len(space)))

    def read(one: Outputs) -> None:
        if one.later is not None:
            later[one.rows] = one.later

    states = hidden_states(
        model, prompts, batch_tokens=batch_tokens, space=space, each=read, on_progress=on_progress
    )
    logits = np.concatenate([np.array(one) for one in vocabulary_logits(model, states)])
    first = logits[:, list(space.first_ids)]
    labels = first if space.single else first + later
    check_finite(labels)
    return Answers(logits, labels)


@dataclass(frozen=True)
class Distance:
    """How far the answers of two models are apart.

    Attributes:
        vocabulary_max: largest absolute difference of any token's logit.
        vocabulary_mean: mean absolute difference over all tokens.
        labels_max: the same over the scores of the classes.
        labels_mean: likewise.
        agreement: prompts of which both give the same label.
    """

    vocabulary_max: float
    vocabulary_mean: float
    labels_max: float
    labels_mean: float
    agreement: int

    @classmethod
    def between(cls, left: Answers, right: Answers) -> Distance:
        """From the answers of two models to the same prompts."""
        whole = np.abs(left.vocabulary - right.vocabulary)
        few = np.abs(left.labels - right.labels)
        same = left.labels.argmax(axis=1) == right.labels.argmax(axis=1)
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
        """Share of the adapter's effect on the labels' scores that is left: 1 is all of it.

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


def compare(base: Answers, adapted: Answers, result: Answers) -> Comparison:
    """Compare what was written with base + adapter.

    Args:
        base: of the base alone.
        adapted: of base + adapter.
        result: of what was written.
    """
    return Comparison(
        prompts=len(adapted.labels),
        result=Distance.between(adapted, result),
        base=Distance.between(adapted, base),
    )
