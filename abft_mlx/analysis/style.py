"""How every figure looks and is written: colours, sizes, caption, the same bytes every time."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.files import replacing

# Okabe and Ito's colours, which people with any colour vision tell apart; yellow left out, which
# is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
# Perceived brightness rises evenly from end to end, in grey too; of the other, white is 0.
COLOUR_MAP, DIVERGING_MAP = "cividis", "PuOr"
FORMATS = ("svg", "png", "pdf")
# Inches: across a page of text.
WIDTH, HEIGHT = 6.4, 3.2
SMALL_POINTS = 7
# No dates and no versions: the same numbers make the same bytes.
_METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}


@dataclass(frozen=True)
class Plot:
    """One figure before it is drawn.

    Attributes:
        stem: its files' name without a suffix.
        draw: draws on an empty matplotlib Figure.
        caption: one line below it: what of, n, seeds.
        height: inches of the figure without its caption.
    """

    stem: str
    draw: Callable[[Any], Any]
    caption: str
    height: float = HEIGHT

    def figure(self, *, caption: bool = True) -> Any:
        """The drawn matplotlib Figure."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = textwrap.wrap(plain(self.caption), int(WIDTH * 17)) if caption else []
        figure = Figure(figsize=(WIDTH, self.height + 0.13 * len(lines)))
        FigureCanvasAgg(figure)
        self.draw(figure)
        figure.supxlabel("\n".join(lines), fontsize=SMALL_POINTS)
        return figure

    def write(self, folder: Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
        """Draw it and write a file for each of the ``FORMATS`` that are wanted."""
        # A stem may hold dots, as model names do.
        paths = [folder / f"{self.stem}.{kind}" for kind in formats]
        with look():
            figure = self.figure()
            for kind, path in zip(formats, paths, strict=True):
                with replacing(path) as temporary:
                    figure.savefig(temporary, metadata=_METADATA[kind], dpi=200)
        return paths

    def svg(self) -> str:
        """An ``svg`` element without the caption, whose ids are its own in a page."""
        out = io.StringIO()
        with look(self.stem):
            self.figure(caption=False).savefig(out, format="svg", metadata=_METADATA["svg"])
        element = out.getvalue()[out.getvalue().index("<svg") :]
        # A style element would be one for the whole page; ids of groups and images may come again.
        element = re.sub(r"<(metadata|style)\b.*?</\1>", "", element, flags=re.DOTALL)
        return re.sub(r'(<(?:g|svg|image)\b[^>]*?) id="[^"]*"', r"\1", element)


def on_axes(function: Callable[..., Any], **arguments: Any) -> Callable[[Any], Any]:
    """A figure function that takes one Axes, as one that takes a Figure."""
    return lambda figure: function(figure.subplots(), **arguments)


def missing() -> str | None:
    """Why no figure can be drawn here, or None."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed; pip install 'abft-mlx[plots]'"
    return None


@contextmanager
def look(salt: str = "abft-mlx") -> Iterator[None]:
    """Matplotlib's settings of this style, for figures of your own: ``with style.look(): …``.

    Args:
        salt: makes the ids inside an SVG; two SVGs of one page need different ones.
    """
    from matplotlib import rc_context

    settings = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",  # text stays text
        "pdf.fonttype": 42,
        "text.parse_math": False,  # tokens and class names may hold dollar signs
        "figure.constrained_layout.use": True,
        "font.size": 8,
        "xtick.labelsize": SMALL_POINTS,
        "ytick.labelsize": SMALL_POINTS,
        "legend.fontsize": SMALL_POINTS,
        "legend.frameon": False,
        "axes.titlesize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "hatch.linewidth": 0.6,
    }
    with rc_context(settings), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def colour(index: int) -> str:
    """The colour of a series by its number."""
    return COLOURS[index % len(COLOURS)]


def cycled(choices: Sequence[str], index: int) -> str:
    """A marker, hatch or dash of a series by its number; another where a colour comes again."""
    return choices[(index + index // len(COLOURS)) % len(choices)]


def cell_inches(axes: Any, count: int, *, vertical: bool = False) -> float:
    """About how many inches each of ``count`` places along an axis has."""
    grid = axes.get_subplotspec().get_gridspec()
    length = axes.figure.get_size_inches()[int(vertical)] / (grid.nrows if vertical else grid.ncols)
    return float(max(0.5, length - (0.4 if vertical else 0.8))) / count


def colour_bar(axes: Any, image: Any, label: str) -> Any:
    """A colour bar at the right of an Axes, with few and short numbers."""
    from matplotlib.ticker import MaxNLocator

    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, ticks=MaxNLocator(5))
    bar.set_label("\n".join(textwrap.wrap(label, 26)), fontsize=SMALL_POINTS)
    return bar


def number(axes: Any, image: Any, row: int, column: int, value: float, text: str) -> None:
    """A number in a cell of an image, black or white, whichever stands out more (WCAG)."""
    levels = np.array(image.cmap(image.norm(value))[:3])
    linear = np.where(levels <= 0.03928, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    shade = "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "black"
    axes.text(column, row, text, ha="center", va="center", color=shade, fontsize=SMALL_POINTS)


def legend(axes: Any) -> None:
    """A legend of what is labelled, above the figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        letters = axes.figure.get_figwidth() * 72 / (0.58 * SMALL_POINTS)
        columns = max(1, min(len(labels), int(letters / (max(map(len, labels)) + 8))))
        axes.figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def line(
    axes: Any,
    index: int,
    x: Any,
    y: np.ndarray,
    label: str,
    spread: np.ndarray | None = None,
    *,
    markers: bool = True,
    dashes: int | None = None,
    hollow: bool = False,
) -> None:
    """One series; its number chooses colour, marker and dashes, unless ``dashes`` does.

    ``x`` and ``y`` are (X,); ``spread`` is (X,) half the height of a band, or (2, X) its ends.
    """
    axes.plot(
        x, y, color=colour(index), marker=cycled(MARKERS, index) if markers else None,
        linestyle=cycled(DASHES, index if dashes is None else dashes), label=name(label),
        markerfacecolor="white" if hollow else colour(index),
    )  # fmt: skip
    if spread is not None:
        low, high = spread if np.ndim(spread) == 2 else (y - spread, y + spread)
        axes.fill_between(x, low, high, color=colour(index), alpha=0.18, linewidth=0)


def plain(text: str, letters: int | None = None) -> str:
    """A text in one line: what cannot be seen as in Python, the middle of a long one left out."""
    if letters is not None and len(text) > letters:
        end = (letters - 1) // 3
        text = f"{text[: letters - 1 - end]}…{text[len(text) - end :]}"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def name(text: str, letters: int = 40) -> str:
    """The name of a series; matplotlib would leave one that begins with _ out of the legend."""
    shown = plain(text, letters)
    return f" {shown}" if shown.startswith("_") else shown
