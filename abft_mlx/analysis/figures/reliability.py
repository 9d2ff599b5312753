"""How often answers are right at each confidence: a reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    confidence: np.ndarray,
    accuracy: np.ndarray,
    count: np.ndarray,
    names: Sequence[str],
) -> Any:
    """A line for each state over its bins of confidence, and below it how many prompts are in them.

    Args:
        axes: a matplotlib Axes, which is divided into two panels (``axes.child_axes``).
        confidence: (S, bins) mean of the highest probability, NaN for an empty bin.
        accuracy: (S, bins) share answered rightly, NaN for an empty bin.
        count: (S, bins) prompts.
        names: of the S states.

    Returns:
        ``axes``.
    """
    upper, lower = style.panels(axes, [3, 1], gaps=0.12)
    upper.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle=":", label="calibrated")
    bins = count.shape[1]
    edges = 100 * np.arange(bins) / bins
    width = 0.9 * 100 / bins / len(names)
    for index, name in enumerate(names):
        known = count[index] > 0
        line(
            upper, index, 100 * confidence[index][known], 100 * accuracy[index][known], None, None,
            texts.name(name),
        )  # fmt: skip
        lower.bar(
            edges + 0.05 * 100 / bins + width * (index + 0.5), count[index], width,
            color=style.colour(index), hatch=style.hatch(index), edgecolor="white",
            label=texts.name(name),
        )  # fmt: skip
    for panel in (upper, lower):
        panel.set_xlim(0, 100)
        panel.tick_params(labelsize=style.SMALL_POINTS)
    upper.set_ylim(0, 100)
    upper.tick_params(labelbottom=False)
    upper.set_ylabel("accuracy (%)")
    lower.set_ylabel("prompts")
    lower.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    lower.set_xlabel("confidence of the answer (%)")
    style.legend(upper)
    return axes
