"""What a run takes of memory, before it is begun: the trainer's graph, read and replayed."""

from abft_mlx.footprint.estimate import Footprint, footprint, parameter_count
from abft_mlx.footprint.fit import Fit, examine

__all__ = ["Fit", "Footprint", "examine", "footprint", "parameter_count"]
