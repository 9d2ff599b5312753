"""Numbers and tables as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from abft_mlx.analysis.statistics import Estimate

NOTHING = "–"


def percent(value: float | None, spread: float | None = None) -> str:
    """A rate of 0..1 in percent, with the standard deviation where there is one."""
    if value is None:
        return NOTHING
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def points(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text.replace("+0.0", "0.0").replace("−0.0", "0.0")


def interval(one: Estimate | None) -> str:
    """Both ends in percent."""
    return NOTHING if one is None else f"{100 * one.low:.1f} to {100 * one.high:.1f}"


def gain(one: Estimate | None) -> str:
    """A difference with its interval."""
    if one is None:
        return NOTHING
    return f"{points(one.mean)} [{points(one.low)}, {points(one.high)}]"


def beside(ours: float | None, published: float | None) -> str:
    """The published percentage and what ours, a rate, is above it."""
    if published is None or ours is None:
        return ""
    return f"paper {published:.1f}, {points(ours - published / 100)}"


def p_value(value: float | None) -> str:
    """A p value, or that it is small."""
    if value is None:
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def quantity(value: float | None, digits: int = 3) -> str:
    """Any number."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, bars in cells escaped; the paper's columns only where they hold numbers."""
    lines = list(lines)
    kept = [
        index
        for index, name in enumerate(header)
        if not name.startswith("paper") or any(line[index] != NOTHING for line in lines)
    ]
    header = [header[index] for index in kept]
    lines = [[line[index] for index in kept] for line in lines]
    made = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in lines:
        cells = (" ".join(str(one).split()).replace("|", "\\|") for one in line)
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made)


def comma_separated(columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> str:
    """CSV with a header; what a line lacks is empty, and floats have seven digits at most."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow([_plain(line.get(name)) for name in columns])
    return out.getvalue()


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else value
