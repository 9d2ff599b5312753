"""A small line chart as inline SVG, and the numbers behind it for the page's script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abft_mlx.analysis.report.html import Markup, element, join

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 10, 38
POINTS_SHOWN = 400
_MARKED = 40


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend and the reading.
        x: where.
        y: how much; None or a number that is not finite leaves a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]

    def points(self) -> list[tuple[float, float]]:
        """Those with a finite value."""
        return [
            (float(x), float(y))
            for x, y in zip(self.x, self.y, strict=True)
            if y is not None and math.isfinite(y)
        ]


@dataclass(frozen=True)
class Chart:
    """Some lines over one axis.

    Attributes:
        title: above it.
        x_label: below it, with the unit.
        y_label: what is drawn, with the unit.
        series: at most four.
        percent: whether values are rates, shown in percent.
        unit: what one step of x is called in the reading.
        from_zero: whether the y axis begins at 0 at the latest.
        x_percent: whether x is a rate.
        diagonal: whether to draw where y equals x.
        note: one sentence more below the chart.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    unit: str
    percent: bool = False
    from_zero: bool = False
    x_percent: bool = False
    diagonal: bool = False
    note: str | None = None


def thinned(chart_series: Series) -> Series:
    """Every n-th point and the last, so that no more than a few hundred are drawn."""
    count = len(chart_series.x)
    step = max(1, math.ceil(count / POINTS_SHOWN))
    kept = sorted({*range(0, count, step), count - 1}) if count else []
    return Series(
        chart_series.name, [chart_series.x[n] for n in kept], [chart_series.y[n] for n in kept]
    )


def number(value: float, percent: bool = False) -> str:
    """A number as the page writes it."""
    return f"{100 * value:.1f}%" if percent else f"{value:.4g}"


def draw(chart: Chart) -> tuple[Markup, dict[str, Any]]:
    """The figure, and what the script reads values from.

    Returns:
        A ``figure`` element, and ``{"unit", "series", ...}``; the element's place among the page's
        charts is its number in the page's data.
    """
    lines = [thinned(one) for one in chart.series]
    every = [point for one in lines for point in one.points()]
    across = _range([x for x, _ in every], chart.x_percent or chart.diagonal)
    up = _range([y for _, y in every], chart.from_zero or chart.percent)
    if chart.diagonal:
        across = up = (0.0, 1.0)
    across_ticks, up_ticks = ticks(*across, whole=not chart.x_percent), ticks(*up)
    up = (min(up[0], up_ticks[0]), max(up[1], up_ticks[-1]))

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - up[0]) / (up[1] - up[0]) * (HEIGHT - TOP - BOTTOM),
        )

    grid = [_axis(tick, at(across[0], tick), chart.percent, up_ticks) for tick in up_ticks]
    below = [
        element(
            "text", _tick(tick, chart.x_percent, across_ticks), x=_n(at(tick, up[0])[0]),
            y=HEIGHT - BOTTOM + 15, text_anchor="middle",
        )
        for tick in across_ticks
    ]  # fmt: skip
    labels = [
        element("text", chart.x_label, x=_n((LEFT + WIDTH - RIGHT) / 2), y=HEIGHT - 5,
                text_anchor="middle", class_="axis"),
    ]  # fmt: skip
    diagonal = None
    if chart.diagonal:
        (x1, y1), (x2, y2) = at(0, 0), at(1, 1)
        diagonal = element("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_="diagonal")
    drawn = [_line(n, one, at) for n, one in enumerate(lines)]
    summary = "; ".join(_summary(one, chart) for one in lines)
    picture = element(
        "svg", *grid, *below, *labels, diagonal, *drawn,
        element("line", class_="cursor", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, hidden=True),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="chart", role="img", tabindex="0",
        aria_label=f"{chart.title}: {summary}",
    )  # fmt: skip
    title = element("figcaption", element("b", chart.title), f" ({chart.y_label})")
    figure = element(
        "figure",
        title,
        _legend(lines) if len(lines) > 1 else None,
        picture,
        element("output", summary, class_="reading", data_rest=summary),
        None if chart.note is None else element("p", chart.note, class_="note"),
        class_="panel",
    )
    data = {
        "unit": chart.unit,
        "percent": chart.percent,
        "across": list(across),
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "x_percent": chart.x_percent,
        "series": [
            {"name": one.name, "x": [x for x, _ in one.points()], "y": [y for _, y in one.points()]}
            for one in lines
        ],
    }
    return figure, data


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers from low to high."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * one for one in (1, 2, 5, 10) if size * one >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)] or [low]


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(high) / 10 or 0.5
        low, high = (0.0, high + room) if from_zero and high >= 0 else (low - room, high + room)
    return low, high


def _n(value: float) -> str:
    return f"{value:.1f}"


def _tick(value: float, percent: bool, all_ticks: Sequence[float]) -> str:
    step = all_ticks[1] - all_ticks[0] if len(all_ticks) > 1 else abs(all_ticks[0]) or 1.0
    scale = 100.0 if percent else 1.0
    if not percent and (step < 1e-3 or step >= 1e6):
        return f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    text = f"{value * scale:,.{digits}f}"
    return text.replace("-0", "0") + "%" if percent and value == 0 else text + "%" * percent


def _axis(
    tick: float, left: tuple[float, float], percent: bool, all_ticks: Sequence[float]
) -> Markup:
    x, y = left
    return join(
        element("line", x1=_n(x), x2=WIDTH - RIGHT, y1=_n(y), y2=_n(y), class_="grid"),
        element("text", _tick(tick, percent, all_ticks), x=_n(x - 7), y=_n(y + 4),
                text_anchor="end"),
    )  # fmt: skip


def _line(index: int, one: Series, at: Any) -> Markup:
    found = [at(x, y) for x, y in one.points()]
    # Gaps are kept as gaps: the path begins anew behind each.
    pieces, open_ = [], False
    for x, y in zip(one.x, one.y, strict=True):
        good = y is not None and math.isfinite(y)
        if good:
            px, py = at(float(x), float(y or 0.0))
            pieces.append(f"{'L' if open_ else 'M'}{px:.1f} {py:.1f}")
        open_ = good
    path = element("path", d=" ".join(pieces), class_=f"line s{index}")
    if len(found) > _MARKED:
        return path
    return join(path, *(_mark(index, x, y) for x, y in found))


def _mark(index: int, x: float, y: float) -> Markup:
    if index % 2:
        return element("rect", x=_n(x - 3), y=_n(y - 3), width=6, height=6, class_=f"mark s{index}")
    return element("circle", cx=_n(x), cy=_n(y), r="3.2", class_=f"mark s{index}")


def _legend(lines: Sequence[Series]) -> Markup:
    entries = []
    for n, one in enumerate(lines):
        sample = element(
            "svg", element("path", d="M0 7 L26 7", class_=f"line s{n}"), _mark(n, 13, 7),
            viewBox="0 0 26 14", class_="sample", aria_hidden="true",
        )  # fmt: skip
        entries.append(element("li", sample, element("span", one.name)))
    return element("ul", *entries, class_="legend")


def _summary(one: Series, chart: Chart) -> str:
    found = [y for _, y in one.points()]
    if not found:
        return f"{one.name}: no values"
    if chart.diagonal:
        return f"{one.name}: {len(found)} bins"
    if chart.unit == "layer":
        x, y = max(one.points(), key=lambda point: point[1])
        return f"{one.name} most in layer {x:.0f}: {number(y, chart.percent)}"
    if len(found) == 1:
        return f"{one.name} {number(found[0], chart.percent)}"
    first, last = number(found[0], chart.percent), number(found[-1], chart.percent)
    return f"{one.name} {first} → {last}"
