"""Figures: functions from arrays to matplotlib Axes, and the style they share."""

from abft_mlx.analysis.figures import heads, results
from abft_mlx.analysis.figures.heads import *  # noqa: F403
from abft_mlx.analysis.figures.results import *  # noqa: F403

__all__ = [*heads.__all__, *results.__all__]
