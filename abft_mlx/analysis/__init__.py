"""Tables and figures from the cells of a study and the files of a run; nothing is measured here."""

from abft_mlx.analysis.drawing import Figure, Seen, draw, look
from abft_mlx.analysis.plots import check
from abft_mlx.analysis.plots import names as figure_names
from abft_mlx.analysis.run_plots import run_figure_names
from abft_mlx.analysis.writing import Written, write_study

__all__ = [
    "Figure",
    "Seen",
    "Written",
    "check",
    "draw",
    "figure_names",
    "look",
    "run_figure_names",
    "write_study",
]
