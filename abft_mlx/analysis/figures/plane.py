"""Accuracy on the plane of a base and two fine-tunings of it (the paper's figures 7 and 9)."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts

LEVELS = 12


def draw(
    axes: Any,
    accuracy: np.ndarray,
    factors: np.ndarray,
    names: tuple[str, str],
    paper: dict[str, float] | None = None,
) -> Any:
    """Filled contours, with base, both methods and the best point marked.

    Args:
        axes: a matplotlib Axes.
        accuracy: (F, F) in 0..1, first method's factor by second method's.
        factors: (F,) of both.
        names: the two methods; the first one is the horizontal axis.
        paper: the paper's accuracies in 0..1 of base, first, second and best, for the labels.

    Returns:
        ``axes``.
    """
    from matplotlib.ticker import MaxNLocator

    values = 100 * accuracy.T
    top, bottom = float(values.max()), float(values.min())
    levels = np.linspace(bottom, max(top, bottom + 1e-6), LEVELS)
    filled = axes.contourf(factors, factors, values, levels=levels, cmap=style.COLOUR_MAP)
    best = np.unravel_index(int(np.argmax(accuracy)), accuracy.shape)
    marks = (
        ("base", 0.0, 0.0, "o"),
        (names[0], 1.0, 0.0, "s"),
        (names[1], 0.0, 1.0, "^"),
        ("best", float(factors[best[0]]), float(factors[best[1]]), "*"),
    )
    for key, (name, x, y, mark) in zip(("base", "first", "second", "best"), marks, strict=True):
        theirs = "" if not paper or key not in paper else f"; paper {100 * paper[key]:.0f}"
        at = _at(accuracy, factors, x, y)
        shown = texts.name(name)
        axes.plot(
            [x], [y], mark, color="white", markeredgecolor="black", markersize=8,
            label=shown if at is None else f"{shown} ({100 * at:.1f}{theirs})",
        )  # fmt: skip
    axes.plot([1, 0], [0, 1], color="white", linestyle="--", linewidth=1)
    axes.set_xlabel(f"factor of {texts.short(names[0], 24)}")
    axes.set_ylabel(f"factor of {texts.short(names[1], 24)}")
    bar = style.colour_bar(axes, filled, "accuracy (%)")
    even = MaxNLocator(6).tick_values(bottom, top)
    bar.set_ticks(even[(even >= bottom) & (even <= top)])
    style.legend(axes)
    return axes


def _at(accuracy: np.ndarray, factors: np.ndarray, x: float, y: float) -> float | None:
    column, row = (np.flatnonzero(np.isclose(factors, one)) for one in (x, y))
    return float(accuracy[column[0], row[0]]) if len(column) and len(row) else None
