"""Accuracy over punish and reward weights (the paper's figure 6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts


def draw(
    axes: Any,
    accuracy: np.ndarray,
    punish: np.ndarray,
    reward: np.ndarray,
    limits: tuple[float, float],
    title: str,
) -> Any:
    """A coloured cell with its number for every pair of weights.

    Args:
        axes: a matplotlib Axes.
        accuracy: (A, B) in 0..1, NaN where there is none.
        punish: (A,) values of the punish weight.
        reward: (B,) values of the reward weight.
        limits: lowest and highest accuracy of the colours, the same for grids to be compared.
        title: the method.

    Returns:
        ``axes``.
    """
    low, high = (100 * one for one in limits)
    image = axes.imshow(
        100 * accuracy, origin="lower", aspect="auto", cmap=style.COLOUR_MAP, vmin=low,
        vmax=max(high, low + 1e-9),
    )  # fmt: skip
    for row, column in np.argwhere(~np.isnan(accuracy)):
        value = 100 * accuracy[row, column]
        axes.text(
            column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
            color=style.over(image, value),
        )  # fmt: skip
    axes.set_xticks(np.arange(len(reward)), [f"{one:g}" for one in reward])
    axes.set_yticks(np.arange(len(punish)), [f"{one:g}" for one in punish])
    axes.set_xlabel("reward weight B")
    axes.set_ylabel("punish weight A at the start")
    axes.set_title(texts.short(title, 40), fontsize=8)
    style.colour_bar(axes, image, "accuracy (%)")
    return axes
