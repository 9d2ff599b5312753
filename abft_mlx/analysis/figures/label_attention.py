"""Attention on label tokens, layer by layer, before and after (the paper's figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import texts
from abft_mlx.analysis.figures.lines import line, over_layers


def draw(
    axes: Any, on_labels: Sequence[np.ndarray], on_gold: Sequence[np.ndarray], names: Sequence[str]
) -> Any:
    """Two lines for each state of the model, over the layers; the gold label's is dashed.

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
        state = texts.name(name, 28)
        line(axes, index, layers, on_labels[index], None, None, f"{state}, all labels", dashes=0)
        line(
            axes, index, layers, on_gold[index], None, None, f"{state}, gold label", dashes=1,
            hollow=True,
        )  # fmt: skip
    axes.set_ylabel("attention of the last position (share)")
    return over_layers(axes)
