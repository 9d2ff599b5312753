"""One number for every head in several states of a model, and what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import head_map, style, texts

WIDE_INCHES = 4.0


def height(states: int, across: float) -> float:
    """Inches that the maps of so many states need in a figure so wide."""
    return 2.0 if across > WIDE_INCHES else 1.6 * (2 * states - 1)


def draw(
    axes: Any,
    states: Sequence[np.ndarray],
    names: Sequence[str],
    label: str,
    *,
    diverging: bool = False,
    least: float = 1e-9,
) -> Any:
    """A map for each state, with one scale, and of every later state the change from the first.

    Args:
        axes: a matplotlib Axes, which is divided into panels (``axes.child_axes``): side by side
            where it is wide, one above the other in a column.
        states: for each state (L, H), NaN where there is no head.
        names: of the states.
        label: what the values are, with their unit.
        diverging: the values themselves have two signs.
        least: what a scale spans at the least, so that differences that mean nothing look like it.

    Returns:
        ``axes``.
    """
    count = 2 * len(states) - 1
    across = style.axes_inches(axes)[0] > WIDE_INCHES
    # Those behind the last state have a colour bar at their left.
    gaps = [0.15] * (len(states) - 1) + [0.75] * (len(states) - 1) if across else 0.42
    made = style.panels(axes, [1] * count, across=across, gaps=gaps)
    limits = _limits(states, diverging=diverging, least=least)
    for index, (panel, state, name) in enumerate(zip(made, states, names, strict=False)):
        # One scale, so one colour bar is enough where they stand in a row.
        head_map.draw(
            panel, state, label, limits=limits, diverging=diverging,
            bar=not across or index == len(states) - 1,
        )  # fmt: skip
        panel.set_title(texts.short(name, 24), fontsize=8)
    for panel, state, name in zip(made[len(states) :], states[1:], names[1:], strict=True):
        change = state - states[0]
        scale = _limits([change], diverging=True, least=least)
        head_map.draw(panel, change, "change", limits=scale, diverging=True)
        panel.set_title(texts.short(f"{name} − {names[0]}", 28), fontsize=8)
    for panel in made[1:] if across else made[:-1]:
        if across:
            panel.set_ylabel("")
            panel.tick_params(labelleft=False)
        else:
            panel.set_xlabel("")
    return axes


def _limits(states: Sequence[np.ndarray], *, diverging: bool, least: float) -> tuple[float, float]:
    known = np.concatenate([one[~np.isnan(one)].ravel() for one in states])
    if not known.size:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    if diverging:
        most = max(abs(low), abs(high), least)
        return -most, most
    return low, max(high, low + least)
