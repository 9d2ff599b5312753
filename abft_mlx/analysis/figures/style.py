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
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
# Perceived brightness rises evenly from end to end, in grey too.
COLOUR_MAP = "cividis"
# Two ends that people with any colour vision tell apart, white between them.
DIVERGING_MAP = "PuOr"
INCHES = (6.4, 4.2)
# Across a page of text, and in one of two columns.
WIDTHS = {"page": 6.4, "column": 3.3}
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
    """The marker of a series by its number."""
    return MARKERS[index % len(MARKERS)]


def hatch(index: int) -> str:
    """The hatching of a bar by its series' number."""
    return HATCHES[index % len(HATCHES)]


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
    height: float = INCHES[1],
    width: str = "page",
    formats: Sequence[str] = ("svg", "png"),
) -> list[Path]:
    """Draw one figure and write it.

    Args:
        path: without a suffix.
        draw: draws on the Axes that it is given.
        caption: one line below the figure.
        height: in inches, caption included.
        width: a key of ``WIDTHS``.
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


def framed(draw: Draw, caption: str, *, height: float = INCHES[1], width: str = "page") -> Any:
    """The matplotlib Figure of one figure with its caption; arguments as of :func:`write`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inches = WIDTHS[width]
    lines = textwrap.wrap(caption, int((inches - 0.2) * 72 / (0.57 * SMALL_POINTS)))
    figure = Figure(figsize=(inches, height + 0.11 * (len(lines) - 1)), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    figure.supxlabel("\n".join(map(texts.plain, lines)), fontsize=SMALL_POINTS)
    return figure


def inches_across(axes: Any) -> float:
    """How wide an Axes is, as far as that is known before the figure is laid out."""
    share = 1.0
    while (parent := getattr(axes, "_abft_parent", None)) is not None:
        share *= axes._abft_share
        axes = parent
    figure = axes.figure
    columns = 1 if axes.get_subplotspec() is None else axes.get_gridspec().ncols
    return max(0.5, share * (figure.get_figwidth() / columns - _MARGIN_INCHES))


def panels(
    axes: Any, heights: Sequence[float], *, across: bool = False, gap: float = 0.15
) -> list[Any]:
    """Divide an Axes into panels inside it, one above the other or side by side.

    Args:
        axes: a matplotlib Axes; its own frame is hidden.
        heights: of the panels (widths, if side by side), in any unit.
        across: side by side.
        gap: inches between two.

    Returns:
        The panels, from the top or from the left; they are ``axes.child_axes``.
    """
    axes.set_axis_off()
    length = inches_across(axes) if across else 0.75 * axes.figure.get_figheight()
    space = min(gap / length, 0.5 / len(heights))
    unit = (1 - space * (len(heights) - 1)) / sum(heights)
    made = []
    begin = 0.0
    for height in heights:
        extent = unit * height
        box = (begin, 0, extent, 1) if across else (0, 1 - begin - extent, 1, extent)
        panel = axes.inset_axes(box)
        panel._abft_parent, panel._abft_share = axes, box[2]
        made.append(panel)
        begin += extent + space
    return made


def colour_bar(axes: Any, image: Any, label: str) -> Any:
    """A colour bar at the right of an Axes, which may be a panel."""
    place = axes.inset_axes((1 + 0.08 / inches_across(axes), 0, 0.1 / inches_across(axes), 1))
    bar = axes.figure.colorbar(image, cax=place)
    bar.set_label(label, fontsize=SMALL_POINTS)
    place.tick_params(labelsize=SMALL_POINTS)
    return bar


def over(image: Any, value: float) -> str:
    """Black or white, whichever is easier to read on the colour of a value."""
    red, green, blue = image.cmap(image.norm(value))[:3]
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def legend(axes: Any, handles: Sequence[Any] | None = None) -> None:
    """A legend of what is labelled, above the axes, where it covers nothing."""
    found, labels = axes.get_legend_handles_labels()
    if handles is not None:
        found, labels = list(handles), [one.get_label() for one in handles]
    if not found:
        return
    longest = max(map(len, labels)) * 0.58 * SMALL_POINTS + 3.6 * SMALL_POINTS
    columns = max(1, min(len(labels), math.floor(72 * inches_across(axes) / longest)))
    axes.legend(
        found, labels, fontsize=SMALL_POINTS, frameon=False, loc="lower left", ncols=columns,
        bbox_to_anchor=(0, 1.01), borderaxespad=0, borderpad=0.2, columnspacing=1.2,
        handlelength=2.2,
    )  # fmt: skip
