"""Tables and figures from the cells of a study; nothing is trained or measured here."""

from abft_mlx.analysis.plots import check
from abft_mlx.analysis.plots import names as figure_names
from abft_mlx.analysis.writing import Written, write_study

__all__ = ["Written", "check", "figure_names", "write_study"]
