"""Accuracy of methods on tasks, the paper's beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts


def draw(
    axes: Any,
    accuracy: np.ndarray,
    spread: np.ndarray,
    paper: np.ndarray,
    methods: Sequence[str],
    tasks: Sequence[str],
) -> Any:
    """Grouped bars; a black line across a bar is the paper's number.

    Args:
        axes: a matplotlib Axes.
        accuracy: (M, J) in 0..1, methods by tasks; NaN where there is none.
        spread: (M, J) standard deviations over seeds, NaN or 0 for none.
        paper: (M, J) in 0..1, NaN where the paper has none.
        methods: M names.
        tasks: J names.

    Returns:
        ``axes``.
    """
    width = 0.8 / len(methods)
    places = np.arange(len(tasks), dtype=np.float64)
    for index, method in enumerate(methods):
        left = places + (index - (len(methods) - 1) / 2) * width
        axes.bar(
            left, 100 * accuracy[index], width, yerr=100 * np.nan_to_num(spread[index]),
            label=texts.name(method), color=style.colour(index), hatch=style.hatch(index),
            edgecolor="white", error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
        known = ~np.isnan(paper[index])
        if known.any():
            axes.hlines(
                100 * paper[index][known], (left - width / 2)[known], (left + width / 2)[known],
                colors="black", linewidth=1.6,
                label="the paper" if not _has_paper(axes) else None,
            )  # fmt: skip
    shown = [texts.short(one, 24) for one in tasks]
    # Side by side if they fit, else slanted, each ending at its group.
    letters = 72 * style.axes_inches(axes)[0] / len(tasks) / (0.6 * 8)
    if max(map(len, shown)) + 1 > letters:
        axes.set_xticks(places, shown, rotation=25, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(places, shown)
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(0, 100)
    style.legend(axes)
    return axes


def _has_paper(axes: Any) -> bool:
    return "the paper" in axes.get_legend_handles_labels()[1]
