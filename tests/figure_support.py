"""What stands in a drawn figure: panels, curves, bars, texts, for tests of figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from abft_mlx.analysis import style


def drawn(draw: Callable[[Any], Any]) -> list[Any]:
    """The Axes that a figure function draws on an empty Figure, colour bars left out.

    The figure is laid out and rendered too, as it is when it is written.
    """
    with style.look():
        figure = Figure(figsize=(6.4, 3.2))
        FigureCanvasAgg(figure)
        draw(figure)
        figure.draw_without_rendering()
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def curves(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Points of lines by their label."""
    return {
        line.get_label(): ([*map(float, line.get_xdata())], [*map(float, line.get_ydata())])
        for line in axes.lines
    }


def bars(axes: Any) -> dict[str, list[float]]:
    """Heights of bars by their label."""
    return {
        container.get_label(): [bar.get_height() for bar in container]
        for container in axes.containers
        if hasattr(container, "patches")
    }


def band(axes: Any, index: int, x: float) -> tuple[float, float]:
    """Lowest and highest y of a band at x."""
    points = axes.collections[index].get_paths()[0].vertices
    at = points[np.isclose(points[:, 0], x)][:, 1]
    return float(at.min()), float(at.max())


def image(axes: Any) -> np.ndarray:
    """The one image's numbers, NaN where masked."""
    (shown,) = axes.images
    return np.ma.filled(np.ma.asarray(shown.get_array(), dtype=float), np.nan)


def ticks(axis: Any) -> list[str]:
    """Texts of an axis' ticks."""
    return [tick.label1.get_text() for tick in axis.get_major_ticks() if tick.label1.get_visible()]


def by_label(panels: list[Any]) -> dict[str, Any]:
    """Panels by the label of their y axis."""
    return {panel.get_ylabel().replace("\n", " "): panel for panel in panels}
