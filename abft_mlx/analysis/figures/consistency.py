"""Consistency before and after fine-tuning (the paper's table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import accuracy as bars
from abft_mlx.analysis.figures import style

KINDS = ("over templates", "over demonstrations")


def draw(
    axes: Any,
    consistency: np.ndarray,
    spread: np.ndarray,
    paper: np.ndarray,
    methods: Sequence[str],
) -> Any:
    """Two groups of bars; a black line across a bar is the paper's number.

    Args:
        axes: a matplotlib Axes.
        consistency: (M, 2) in 0..1, over templates and over demonstrations; NaN for none.
        spread: (M, 2) standard deviations over seeds, NaN for none.
        paper: (M, 2) in 0..1, NaN for none.
        methods: M names.

    Returns:
        ``axes``.
    """
    bars.draw(axes, consistency, spread, paper, methods, KINDS)
    axes.set_ylabel("consistency of answers (%)")
    style.legend(axes)
    return axes
