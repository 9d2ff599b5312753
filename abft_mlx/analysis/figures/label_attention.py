"""Attention on label tokens, layer by layer, before and after (the paper's figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures.lines import line, over_layers


def draw(
    axes: Any, on_labels: Sequence[np.ndarray], on_gold: Sequence[np.ndarray], names: Sequence[str]
) -> Any:
    """Two lines for each state of the model, over the layers.

    Args:
        axes: a matplotlib Axes.
        on_labels: for each state (L,) mean over heads of the attention on all label tokens.
        on_gold: for each state (L,) the part of it on labels equal to the gold one.
        names: of the states, such as ``before``.

    Returns:
        ``axes``.
    """
    for index, name in enumerate(names):
        layers = np.arange(len(on_labels[index]))
        line(axes, 2 * index, layers, on_labels[index], None, None, f"{name}, all labels")
        line(axes, 2 * index + 1, layers, on_gold[index], None, None, f"{name}, gold label")
    axes.set_ylabel("attention of the last position (share)")
    return over_layers(axes)
