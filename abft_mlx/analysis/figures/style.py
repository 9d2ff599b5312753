"""How every figure looks and is written: colours, size, caption, the same bytes every time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abft_mlx.analysis.figures import texts
from abft_mlx.files import replacing

# Okabe and Ito's colours, which people with any colour vision tell apart; yellow left out, which
# is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
# Perceived brightness rises evenly from end to end, in grey too.
COLOUR_MAP = "cividis"
# Two ends that people with any colour vision tell apart, white between them.
DIVERGING_MAP = "PuOr"
# Across a page of text, and in one of two columns; how high what is drawn is, if nothing is said.
WIDTHS = {"page": 6.4, "column": 3.3}
HEIGHTS = {"page": 3.1, "column": 2.3}
FORMATS = ("svg", "png", "pdf")
SMALL_POINTS = 7
# What lies beside the axes: tick labels and axis label.
_MARGIN_INCHES = 0.75
_METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None},
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}

Draw = Callable[[Any], Any]


def colour(index: int) -> str:
    """The colour of a series by its number."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of a series by its number; another where a colour comes again."""
    return MARKERS[_shifted(index) % len(MARKERS)]


def hatch(index: int) -> str:
    """The hatching of a bar by its series' number; another where a colour comes again."""
    return HATCHES[_shifted(index) % len(HATCHES)]


def dashes(index: int) -> str:
    """The dashes of a line by its series' number; others where a colour comes again."""
    return DASHES[_shifted(index) % len(DASHES)]


def _shifted(index: int) -> int:
    return index + index // len(COLOURS)


def missing() -> str | None:
    """Why no figure can be drawn here, or None."""
    if find_spec("matplotlib") is None:
        return "no figures: matplotlib is not installed; pip install 'abft-mlx[plots]'"
    return None


def look() -> AbstractContextManager[None]:
    """Matplotlib's settings of this style, for figures of your own: ``with style.look(): …``."""
    from matplotlib import rc_context

    # Neither dates nor random ids: the same numbers make the same bytes. Text stays text.
    return rc_context(
        {
            "svg.hashsalt": "abft-mlx",
            "svg.fonttype": "none",
            "pdf.fonttype": 42,
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.2,
            "hatch.linewidth": 0.6,
        }
    )


def write(
    path: Path,
    draw: Draw,
    caption: str,
    *,
    height: float | None = None,
    width: str = "page",
    formats: Sequence[str] = ("svg", "png"),
) -> list[Path]:
    """Draw one figure and write it.

    Args:
        path: without a suffix.
        draw: draws on the Axes that it is given.
        caption: one line below the figure.
        height: of the Axes in inches; what stands around it comes on top.
        width: of the figure, a key of ``WIDTHS``.
        formats: of ``FORMATS``.

    Returns:
        The files.
    """
    written = []
    with look():
        figure = framed(draw, caption, height=height, width=width)
        for one in formats:
            # A stem may hold dots, as model names do.
            target = path.with_name(f"{path.name}.{one}")
            with replacing(target) as temporary:
                figure.savefig(temporary, metadata=_METADATA[one], dpi=200)
            written.append(target)
    return written


def framed(draw: Draw, caption: str, *, height: float | None = None, width: str = "page") -> Any:
    """The matplotlib Figure of one figure with its caption; arguments as of :func:`write`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across, down = WIDTHS[width], HEIGHTS[width] if height is None else height
    lines = _wrapped(caption, int((across - 0.2) * 72 / (0.57 * SMALL_POINTS)))
    around, size = 1.0, None
    # Drawn once to see how much room tick labels and legends leave, and again to fit it; other
    # ticks may be longer, so each time there is room to spare at first.
    for passes in (1, 2):
        total = down + around + 1.5
        figure = Figure(figsize=(across, total), layout="constrained")
        FigureCanvasAgg(figure)
        figure._abft_axes_inches = size
        axes = figure.add_subplot()
        draw(axes)
        figure.supxlabel("\n".join(map(texts.plain, lines)), fontsize=SMALL_POINTS)
        for _ in range(passes):
            figure.draw_without_rendering()
            place = axes.get_position()
            size = (place.width * across, down)
            around = (1 - place.height) * total
            total = down + around
            figure.set_size_inches(across, total)
    return figure


def _wrapped(text: str, letters: int) -> list[str]:
    """As few lines as can be, about equally long."""
    lines = textwrap.wrap(text, letters, break_on_hyphens=False)
    for fewer in range(len(text) // max(1, len(lines)), letters):
        even = textwrap.wrap(text, max(1, fewer), break_on_hyphens=False)
        if len(even) <= len(lines):
            return even
    return lines


def axes_inches(axes: Any) -> tuple[float, float]:
    """Width and height of an Axes, as far as they are known before the figure is laid out."""
    across = down = 1.0
    while (parent := getattr(axes, "_abft_parent", None)) is not None:
        across, down = across * axes._abft_share[0], down * axes._abft_share[1]
        axes = parent
    figure = axes.figure
    known = getattr(figure, "_abft_axes_inches", None)
    if known is None:
        grid = axes.get_subplotspec() and axes.get_gridspec()
        columns, rows = (grid.ncols, grid.nrows) if grid else (1, 1)
        width, height = figure.get_size_inches()
        known = max(1.0, width / columns - _MARGIN_INCHES), max(0.5, height / rows - _MARGIN_INCHES)
    return across * known[0], down * known[1]


def panels(
    axes: Any, sizes: Sequence[float], *, across: bool = False, gaps: float | Sequence[float] = 0.15
) -> list[Any]:
    """Divide an Axes into panels inside it, one above the other or side by side.

    Args:
        axes: a matplotlib Axes; its own frame is hidden.
        sizes: heights of the panels (widths, if side by side), in any unit.
        across: side by side.
        gaps: inches between two, one number for all or one for each gap.

    Returns:
        The panels, from the top or from the left; they are ``axes.child_axes``.
    """
    axes.set_axis_off()
    count = len(sizes) - 1
    length = axes_inches(axes)[0 if across else 1]
    between = [one / length for one in ([gaps] * count if isinstance(gaps, float) else gaps)]
    if sum(between) > 0.5:
        between = [0.5 * one / sum(between) for one in between]
    unit = (1 - sum(between)) / sum(sizes)
    made = []
    begin = 0.0
    for size, space in zip(sizes, [*between, 0.0], strict=True):
        extent = unit * size
        box = (begin, 0, extent, 1) if across else (0, 1 - begin - extent, 1, extent)
        panel = axes.inset_axes(box)
        panel._abft_parent, panel._abft_share = axes, box[2:]
        made.append(panel)
        begin += extent + space
    return made


def colour_bar(axes: Any, image: Any, label: str) -> Any:
    """A colour bar at the right of an Axes, which may be a panel."""
    across, down = axes_inches(axes)
    place = axes.inset_axes((1 + 0.08 / across, 0, 0.1 / across, 1))
    bar = axes.figure.colorbar(image, cax=place)
    if hasattr(bar.locator, "set_params"):
        bar.locator.set_params(nbins=5)  # few and short numbers
    lines = textwrap.wrap(label, max(12, int(72 * down / (0.57 * SMALL_POINTS))))
    bar.set_label("\n".join(lines), fontsize=SMALL_POINTS)
    place.tick_params(labelsize=SMALL_POINTS)
    return bar


def over(image: Any, value: float) -> str:
    """Black or white, whichever stands out more on the colour of a value, by the web's measure."""
    red, green, blue = (
        one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4
        for one in image.cmap(image.norm(value))[:3]
    )
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "black"


def legend(axes: Any, handles: Sequence[Any] | None = None) -> None:
    """A legend of what is labelled, above the axes, where it covers nothing."""
    found, labels = axes.get_legend_handles_labels()
    if handles is not None:
        found, labels = list(handles), [one.get_label() for one in handles]
    if not found:
        return
    longest = max(map(len, labels)) * 0.58 * SMALL_POINTS + 3.6 * SMALL_POINTS
    columns = max(1, min(len(labels), math.floor(72 * axes_inches(axes)[0] / longest)))
    axes.legend(
        found, labels, fontsize=SMALL_POINTS, frameon=False, loc="lower left", ncols=columns,
        bbox_to_anchor=(0, 1.01), borderaxespad=0, borderpad=0.2, columnspacing=1.2,
        handlelength=2.2,
    )  # fmt: skip
