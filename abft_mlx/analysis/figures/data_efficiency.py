"""Accuracy against the number of training examples (the paper's figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    examples: np.ndarray,
    accuracy: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    methods: Sequence[str],
    untrained: float | None,
) -> Any:
    """A line for each method over a logarithmic axis, and a level for the untrained base.

    Args:
        axes: a matplotlib Axes.
        examples: (E,) distinct training prompts.
        accuracy: (M, E) in 0..1.
        low: (M, E) lower ends of the intervals.
        high: (M, E) upper ends.
        methods: M names.
        untrained: accuracy of the base in 0..1, or None.

    Returns:
        ``axes``.
    """
    for index, method in enumerate(methods):
        line(
            axes, index, examples, 100 * accuracy[index], 100 * low[index], 100 * high[index],
            texts.name(method),
        )  # fmt: skip
    if untrained is not None:
        axes.axhline(100 * untrained, color="black", linewidth=1, linestyle=":", label="vanilla")
    axes.set_xscale("log", base=2)
    axes.set_xticks(examples, [f"{one:g}" for one in examples])
    axes.set_xlabel("training examples")
    axes.set_ylabel("accuracy (%)")
    style.legend(axes)
    return axes
