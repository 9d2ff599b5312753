"""How every figure looks and is written: colours, size, caption, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from abft_mlx.files import replacing

# Okabe and Ito's colours, which people with any colour vision tell apart; yellow left out, which
# is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
# Perceived brightness rises evenly from end to end, in grey too.
COLOUR_MAP = "cividis"
INCHES = (6.4, 4.2)

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


def write(path: Path, draw: Draw, caption: str) -> list[Path]:
    """Draw one figure and write it as SVG and PNG.

    Args:
        path: without a suffix.
        draw: draws on the Axes that it is given.
        caption: one line below the figure.

    Returns:
        The two files.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    # Neither dates nor random ids: the same numbers make the same bytes.
    with rc_context({"svg.hashsalt": "abft-mlx", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        figure.supxlabel(caption, fontsize=7, wrap=True)
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
            target = path.with_suffix(suffix)
            with replacing(target) as temporary:
                figure.savefig(temporary, metadata=metadata, dpi=150)
            written.append(target)
    return written


def legend(axes: Any) -> None:
    """A legend of what is labelled, where it covers least."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=7, frameon=False, loc="best")
