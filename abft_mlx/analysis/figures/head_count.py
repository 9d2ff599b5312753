"""Induction heads while training (the paper's figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    seen: Sequence[np.ndarray],
    heads: Sequence[np.ndarray],
    spread: Sequence[np.ndarray],
    methods: Sequence[str],
) -> Any:
    """A line for each method, with a band of one standard deviation over runs.

    Args:
        axes: a matplotlib Axes.
        seen: for each method (U,) prompts seen so far.
        heads: for each method (U,) mean induction heads in a prompt.
        spread: for each method (U,) standard deviations.
        methods: their names.

    Returns:
        ``axes``.
    """
    for index, method in enumerate(methods):
        middle, around = heads[index], spread[index]
        line(
            axes, index, seen[index], middle, middle - around, middle + around, texts.name(method),
            markers=False,
        )  # fmt: skip
    axes.set_xlabel("training prompts seen")
    axes.set_ylabel("induction heads in a prompt")
    axes.set_ylim(bottom=0)
    style.legend(axes)
    return axes
