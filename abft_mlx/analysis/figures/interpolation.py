"""Accuracy on the straight line between two fine-tunings of a base (the paper's figure 7)."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    share: np.ndarray,
    accuracy: np.ndarray,
    names: tuple[str, str],
    base: float | None = None,
) -> Any:
    """Mean accuracy over (1 - share) of the first and share of the second, with a band.

    Args:
        axes: a matplotlib Axes.
        share: (P,) of the second fine-tuning; 0 is the first one alone, 1 the second alone.
        accuracy: (R, P) in 0..1, a row for each run; the band is one standard deviation.
        names: of the two fine-tunings.
        base: accuracy of the base in 0..1, or None.

    Returns:
        ``axes``.
    """
    first, second = (texts.short(one, 24) for one in names)
    middle = 100 * accuracy.mean(axis=0)
    around = 100 * accuracy.std(axis=0, ddof=1) if len(accuracy) > 1 else np.zeros(len(share))
    line(axes, 0, share, middle, middle - around, middle + around, "between the two")
    if base is not None:
        axes.axhline(100 * base, color="black", linewidth=1, linestyle=":", label="base")
    for place, mark, name, index in ((0.0, "s", first, 1), (1.0, "^", second, 2)):
        there = np.isclose(share, place)
        axes.plot(
            share[there], middle[there], mark, color=style.colour(index), markersize=7,
            label=texts.name(name), linestyle="none",
        )  # fmt: skip
    axes.set_xlabel(f"share of {second}, the rest {first}")
    axes.set_ylabel("accuracy (%)")
    style.legend(axes)
    return axes
