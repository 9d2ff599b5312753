"""Tables and figures of studies and runs, from their files; nothing is trained or measured here."""

from abft_mlx.analysis.drawing import Drawing, draw, look, write_study
from abft_mlx.analysis.run_plots import RUN_FIGURES
from abft_mlx.analysis.study_plots import STUDY_FIGURES, check

__all__ = ["RUN_FIGURES", "STUDY_FIGURES", "Drawing", "check", "draw", "look", "write_study"]
