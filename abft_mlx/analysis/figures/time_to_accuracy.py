"""Accuracy against the seconds that training took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, texts
from abft_mlx.analysis.figures.lines import line


def draw(
    axes: Any,
    seconds: Sequence[np.ndarray],
    accuracy: Sequence[np.ndarray],
    names: Sequence[str],
    untrained: float | None = None,
) -> Any:
    """A line for each way of training, over a logarithmic axis.

    Args:
        axes: a matplotlib Axes.
        seconds: for each (P,), above 0.
        accuracy: for each (P,) in 0..1.
        names: of the ways.
        untrained: accuracy before training in 0..1, or None.

    Returns:
        ``axes``.
    """
    from matplotlib.ticker import LogLocator

    for index, name in enumerate(names):
        line(axes, index, seconds[index], 100 * accuracy[index], None, None, texts.name(name))
    if untrained is not None:
        axes.axhline(100 * untrained, color="black", linewidth=1, linestyle=":", label="untrained")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("seconds in updates")
    axes.set_ylabel("accuracy (%)")
    style.legend(axes)
    return axes
