"""What stands in a drawn figure: its texts with their places, for tests of figures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def axes() -> Any:
    """Empty Axes."""
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def every_axes(figure: Any) -> Iterator[Any]:
    """All Axes of a figure, panels and colour bars too."""
    waiting = list(figure.axes)
    while waiting:
        one = waiting.pop(0)
        yield one
        waiting += one.child_axes


def ticks(axis: Any) -> list[tuple[float, str]]:
    """Places and texts of an axis' ticks that can be seen."""
    return [
        (label.get_position()[0 if axis.axis_name == "x" else 1], label.get_text())
        for label in _tick_labels(axis)
    ]


def _tick_labels(axis: Any) -> list[Any]:
    low, high = sorted(axis.get_view_interval())
    room = 1e-6 * (high - low)
    return [
        tick.label1
        for tick in axis.get_major_ticks()
        if tick.label1.get_visible() and low - room <= tick.get_loc() <= high + room
    ]


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Every text that is drawn, and its box in pixels; slanted ones are left out."""
    return [(text, box) for text, box, _ in _owned(figure)]


def _owned(figure: Any) -> list[tuple[str, Any, Any]]:
    """The same, and the Axes that each belongs to; None for the caption."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    found = [] if figure._supxlabel is None else [(figure._supxlabel, None)]
    for one in every_axes(figure):
        if not one.get_visible():
            continue
        its = [*one.texts, one._left_title, one.title, one._right_title]
        if one.axison:
            for axis in (one.xaxis, one.yaxis):
                its += [*_tick_labels(axis), axis.label]
        if one.get_legend() is not None:
            its += one.get_legend().get_texts()
        found += [(text, one) for text in its]
    return [
        (one.get_text(), one.get_window_extent(renderer), owner)
        for one, owner in found
        if one.get_text().strip() and one.get_visible() and one.get_rotation() % 90 == 0
    ]


def covering(figure: Any) -> list[str]:
    """Texts that lie upon Axes which are not theirs, such as a neighbour's map."""
    owned = _owned(figure)
    frames = [(one, one.get_window_extent()) for one in every_axes(figure) if one.axison]
    return [
        text
        for text, box, owner in owned
        for one, frame in frames
        if one is not owner and _common(box, frame)
    ]


def _common(one: Any, other: Any) -> bool:
    """Whether two boxes have more than a pixel in common."""
    return bool(
        min(one.x1, other.x1) - max(one.x0, other.x0) > 1
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    )


def outside(figure: Any, drawn: list[tuple[str, Any]] | None = None) -> list[str]:
    """Texts that are cut by the edge of the figure; ``drawn`` as of :func:`texts`."""
    width, height = figure.canvas.get_width_height()
    return [
        text
        for text, box in drawn or texts(figure)
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


def overlapping(figure: Any, drawn: list[tuple[str, Any]] | None = None) -> list[tuple[str, str]]:
    """Pairs of texts that lie upon each other by more than a pixel."""
    return [
        (first, second)
        for (first, one), (second, other) in itertools.combinations(drawn or texts(figure), 2)
        if _common(one, other)
    ]
