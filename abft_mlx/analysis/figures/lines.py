"""Lines with bands, which several figures are."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style


def line(
    axes: Any,
    index: int,
    x: np.ndarray,
    y: np.ndarray,
    low: np.ndarray | None,
    high: np.ndarray | None,
    label: str,
    *,
    markers: bool = True,
    dashes: int | None = None,
    hollow: bool = False,
) -> None:
    """One series, with a band where it has both ends.

    Args:
        axes: a matplotlib Axes.
        index: number of the series, which chooses colour, marker and dashes.
        x: (X,).
        y: (X,).
        low: (X,) lower ends, or None.
        high: (X,) upper ends, or None.
        label: for the legend.
        markers: mark every point.
        dashes: number of the dashes, where another than ``index`` chooses them.
        hollow: leave the markers white inside.
    """
    colour = style.colour(index)
    axes.plot(
        x, y, color=colour, marker=style.marker(index) if markers else None, markersize=4,
        linestyle=style.dashes(index if dashes is None else dashes), label=label,
        markerfacecolor="white" if hollow else colour,
    )  # fmt: skip
    if low is not None and high is not None:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def over_layers(axes: Any) -> Any:
    """Finish a figure whose x axis is the layer and whose lines start at 0 or above."""
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    style.legend(axes)
    return axes
