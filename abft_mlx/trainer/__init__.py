"""One training loop: compiled step, metrics, checkpoints, resume."""

from abft_mlx.trainer.loop import Progress, Trainer
from abft_mlx.trainer.run_folder import RunFolder, Update

__all__ = ["Progress", "RunFolder", "Trainer", "Update"]
