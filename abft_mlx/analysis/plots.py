"""What a figure consists of before it is drawn: arrays in a draw function, caption, file name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        stem: its files' name without a suffix.
        draw: draws on an empty matplotlib Figure.
        caption: one line below it: what of, n, seeds.
        height: inches of the figure without its caption.
        column_height: the same in a column, where its panels stand above one another.
    """

    stem: str
    draw: Callable[[Any], Any]
    caption: str
    height: float = style.HEIGHT
    column_height: float | None = None

    def write(self, folder: Path, formats: tuple[str, ...], width: str = "page") -> list[Path]:
        """Draw and write it; arguments as of :func:`style.write`."""
        height = self.column_height if width == "column" else None
        return style.write(
            folder / self.stem, self.draw, self.caption, height=height or self.height, width=width,
            formats=formats,
        )  # fmt: skip


def on_axes(function: Callable[..., Any], **arguments: Any) -> Callable[[Any], Any]:
    """A figure function that takes one Axes, as one that takes a Figure."""
    return lambda figure: function(figure.subplots(), **arguments)


def stem(*parts: str) -> str:
    """A file name of several words."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)


def joined(*parts: Any) -> str:
    """The parts of a caption that are not empty."""
    return "; ".join(part for part in parts if part)


def confusion_heights(classes: int, states: int) -> tuple[float, float]:
    """Inches of confusion matrices across a page, and in a column."""
    height = min(4.5, max(2.3, 0.17 * classes + 0.6))
    return height, states * height


def note_on_classes(classes: int) -> str:
    """What a caption says where not all classes are named."""
    return "" if classes <= 14 else f"{classes} classes, some of them named"


def over_heads(table: Any) -> np.ndarray:
    """(L,) means of (L, H) over the heads that are there; NaN for a layer without heads."""
    values = np.array(table, dtype=np.float64)
    known = (~np.isnan(values)).sum(axis=1)
    total = np.nansum(values, axis=1)
    return np.divide(total, known, out=np.full(len(values), np.nan), where=known > 0)


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))
