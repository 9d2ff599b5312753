"""How far fine-tuning moved each layer's weights (the paper's appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import texts
from abft_mlx.analysis.figures.lines import line, over_layers


def draw(
    axes: Any, shifts: Sequence[np.ndarray], spread: Sequence[np.ndarray], names: Sequence[str]
) -> Any:
    """A line for each kind of weights over the layers.

    Args:
        axes: a matplotlib Axes.
        shifts: for each name (L,) Frobenius norms of W' - W.
        spread: for each name (L,) standard deviations over runs.
        names: such as ``abft W_Q``.

    Returns:
        ``axes``.
    """
    for index, name in enumerate(names):
        layers = np.arange(len(shifts[index]))
        middle, around = shifts[index], spread[index]
        line(axes, index, layers, middle, middle - around, middle + around, texts.name(name))
    axes.set_ylabel("Frobenius norm of the change")
    return over_layers(axes)
