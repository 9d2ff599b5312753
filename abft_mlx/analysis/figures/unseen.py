"""Accuracy where no demonstration carries the gold label (the paper's figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import accuracy as bars
from abft_mlx.analysis.figures import style, texts

KINDS = ("random", "gold label unseen")


def draw(
    axes: Any,
    accuracy: np.ndarray,
    spread: np.ndarray,
    paper: np.ndarray,
    zero_shot: np.ndarray,
    methods: Sequence[str],
) -> Any:
    """Two groups of bars, and a level for each method's zero-shot accuracy.

    Args:
        axes: a matplotlib Axes.
        accuracy: (M, 2) in 0..1, with random demonstrations and with the gold label unseen.
        spread: (M, 2) standard deviations over seeds, NaN for none.
        paper: (M, 2) in 0..1, NaN for none.
        zero_shot: (M,) in 0..1, NaN for none.
        methods: M names.

    Returns:
        ``axes``.
    """
    bars.draw(axes, accuracy, spread, paper, methods, KINDS)
    for index, method in enumerate(methods):
        if not np.isnan(zero_shot[index]):
            axes.axhline(
                100 * zero_shot[index], color=style.colour(index), linestyle="--", linewidth=1,
                label=f"{texts.name(method)}, zero-shot",
            )  # fmt: skip
    style.legend(axes)
    return axes
