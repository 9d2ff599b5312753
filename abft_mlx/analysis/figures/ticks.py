"""Which of many positions get a text on an axis, so that no two texts touch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from abft_mlx.analysis.figures import style


def room(axes: Any, *, vertical: bool = False) -> int:
    """How many texts fit side by side (each a line high) along an axis."""
    length = style.axes_inches(axes)[1 if vertical else 0]
    return max(2, int(72 * length / (1.18 * style.SMALL_POINTS)))


def chosen(count: int, fitting: int, first: Iterable[int] = ()) -> list[int]:
    """Positions that get a text, in order.

    Args:
        count: T positions.
        fitting: how many texts fit along all of them.
        first: positions that are to have one, the most important first; where two are too close,
            the earlier one has it.
    """
    gap = count / fitting
    if gap <= 1:
        return list(range(count))
    taken: list[int] = []
    step = max(1, -(-count // fitting))
    for place in (*first, *range(0, count, step)):
        if all(abs(place - other) >= gap for other in taken):
            taken.append(place)
    return sorted(taken)


def every(axes: Any, names: Sequence[str], *, vertical: bool = False) -> list[int]:
    """Positions of those names that have room on an axis on which all are evenly spread."""
    return chosen(len(names), room(axes, vertical=vertical))
