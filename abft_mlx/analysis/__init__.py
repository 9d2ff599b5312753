"""Tables and figures of studies and runs, from their files; nothing is trained or measured here."""

from abft_mlx.analysis.drawing import Figure, Seen, Written, draw, look, write_study
from abft_mlx.analysis.run_plots import run_figure_names
from abft_mlx.analysis.study_plots import check, figure_names

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
