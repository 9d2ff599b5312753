"""Which classes are taken for which, in several states of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import confusion, style, texts

WIDE_INCHES = 4.0


def height(classes: int, states: int, across: float) -> float:
    """Inches that the matrices of so many classes and states need in a figure so wide."""
    one = min(4.0, max(1.7, 0.17 * classes))
    return one if across > WIDE_INCHES else states * one + 0.3 * (states - 1)


def told(classes: int) -> tuple[str, ...]:
    """What a caption says of matrices of so many classes."""
    if classes <= confusion.NUMBERED_CLASSES:
        return ()
    return (f"{classes} classes, some of them named",)


def draw(
    axes: Any, counts: Sequence[np.ndarray], names: Sequence[str], state_names: Sequence[str]
) -> Any:
    """A matrix for each state: side by side, or one above the other in a column.

    Args:
        axes: a matplotlib Axes, which is divided into panels (``axes.child_axes``).
        counts: for each state (C, C) prompts, gold class by answer.
        names: of the C classes.
        state_names: of the states.

    Returns:
        ``axes``.
    """
    across = style.axes_inches(axes)[0] > WIDE_INCHES
    made = style.panels(axes, [1] * len(counts), across=across, gaps=0.15 if across else 0.3)
    end = made[-1]
    for panel, table, name in zip(made, counts, state_names, strict=True):
        confusion.draw(panel, table, names, bar=not across or panel is end)
        panel.set_title(texts.short(name, 28), fontsize=8)
        if across and panel is not made[0]:
            panel.set_ylabel("")
            panel.tick_params(labelleft=False)
        if not across and panel is not end:
            panel.set_xlabel("")
            panel.tick_params(labelbottom=False)
    return axes
