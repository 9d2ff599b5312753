"""One number for every head: a map of layers by heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style

NUMBERED_CELLS = 96


def draw(
    axes: Any,
    values: np.ndarray,
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
    bar: bool = True,
) -> Any:
    """A coloured cell for every head, the first layer at the bottom; numbers where they fit.

    Args:
        axes: a matplotlib Axes.
        values: (L, H), NaN where there is no head, which is hatched.
        label: of the colour bar: what the values are, with their unit.
        limits: lowest and highest value of the colours; by default those of the values.
        diverging: colours of two sides around 0, for differences.
        bar: draw the colour bar.

    Returns:
        ``axes``.
    """
    low, high = limits or _limits(values, diverging=diverging)
    image = axes.imshow(
        np.ma.masked_invalid(values), origin="lower", aspect="auto", interpolation="none",
        cmap=style.DIVERGING_MAP if diverging else style.COLOUR_MAP, vmin=low, vmax=high,
    )  # fmt: skip
    # A cell without a head is transparent and shows what lies behind it.
    axes.patch.set(facecolor="#e6e6e6", hatch="////", edgecolor="#999999")
    across, down = style.axes_inches(axes)
    roomy = across > 0.3 * values.shape[1] and down > 0.14 * values.shape[0]
    if values.size <= NUMBERED_CELLS and roomy:
        for layer, head in np.argwhere(~np.isnan(values)):
            value = float(values[layer, head])
            axes.text(
                head, layer, _number(value), ha="center", va="center",
                color=style.over(image, value), fontsize=style.SMALL_POINTS,
            )  # fmt: skip
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if bar:
        style.colour_bar(axes, image, label)
    return axes


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _limits(values: np.ndarray, *, diverging: bool) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    if not known.size:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    if diverging:
        most = max(float(np.abs(known).max()), 1e-9)
        return -most, most
    low, high = float(known.min()), float(known.max())
    return low, max(high, low + 1e-9)
