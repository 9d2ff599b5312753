"""Which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts, ticks

NUMBERED_CLASSES = 14


def height(classes: int) -> float:
    """Inches that a matrix of so many classes needs."""
    return min(4.8, max(1.8, 0.2 * classes))


def draw(axes: Any, counts: np.ndarray, names: Sequence[str], *, bar: bool = True) -> Any:
    """Gold classes downwards, answers to the right; the colour is the share of the gold class.

    Up to 14 classes the counts stand in the cells; of more classes every n-th is named.

    Args:
        axes: a matplotlib Axes.
        counts: (C, C) prompts, gold class by answer.
        names: of the C classes.
        bar: draw the colour bar.

    Returns:
        ``axes``.
    """
    C = len(names)
    of_class = counts.sum(axis=1, keepdims=True)
    share = np.divide(
        100.0 * counts, of_class, out=np.zeros(counts.shape, dtype=np.float64), where=of_class > 0
    )
    image = axes.imshow(share, cmap=style.COLOUR_MAP, vmin=0, vmax=100, interpolation="none",
                        aspect="auto")  # fmt: skip
    widest = max(len(f"{int(one):,}") for one in counts.ravel())
    if C <= NUMBERED_CLASSES and style.axes_inches(axes)[0] / C > 0.075 * (widest + 0.5):
        for row, column in np.ndindex(counts.shape):
            axes.text(
                column, row, f"{int(counts[row, column]):,}", ha="center", va="center",
                fontsize=style.SMALL_POINTS, color=style.over(image, share[row, column]),
            )  # fmt: skip
    down, right = ticks.every(axes, names, vertical=True), ticks.every(axes, names)
    flat = C * (max(len(one[:16]) for one in names) + 1) * 4.2 < 72 * style.axes_inches(axes)[0]
    axes.set_yticks(down, [texts.short(names[one], 16) for one in down], fontsize=7)
    axes.set_xticks(
        right, [texts.short(names[one], 16) for one in right], fontsize=7,
        rotation=0 if flat else 90,
    )  # fmt: skip
    axes.set_xlabel("answer")
    axes.set_ylabel("gold label")
    if bar:
        style.colour_bar(axes, image, "share of the gold label (%)")
    return axes
