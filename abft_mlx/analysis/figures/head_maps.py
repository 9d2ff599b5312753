"""One number for every head in several states of a model, and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import head_map, style, texts

WIDE_INCHES = 4.0


def draw(
    axes: Any,
    states: Sequence[np.ndarray],
    names: Sequence[str],
    label: str,
    *,
    diverging: bool = False,
) -> Any:
    """A map for each state, with one scale, and of every later state the change from the first.

    Args:
        axes: a matplotlib Axes, which is divided into panels (``axes.child_axes``): side by side
            where it is wide, one above the other in a column.
        states: for each state (L, H), NaN where there is no head.
        names: of the states.
        label: what the values are, with their unit.
        diverging: the values themselves have two signs.

    Returns:
        ``axes``.
    """
    across = style.inches_across(axes) > WIDE_INCHES
    count = 2 * len(states) - 1
    made = style.panels(axes, [1] * count, across=across, gap=0.95 if across else 0.55)
    known = np.concatenate([one[~np.isnan(one)].ravel() for one in states])
    limits = (0.0, 1.0)
    if known.size:
        limits = float(known.min()), max(float(known.max()), float(known.min()) + 1e-9)
    if diverging:
        limits = (-max(map(abs, limits)), max(map(abs, limits)))
    for panel, state, name in zip(made, states, names, strict=False):
        head_map.draw(panel, state, label, limits=limits, diverging=diverging)
        panel.set_title(texts.short(name, 24), fontsize=8)
    for panel, state, name in zip(made[len(states) :], states[1:], names[1:], strict=True):
        head_map.draw(panel, state - states[0], f"change of {label}", diverging=True)
        title = f"{name} − {names[0]}"
        panel.set_title(texts.short(title, 28), fontsize=8)
    return axes
