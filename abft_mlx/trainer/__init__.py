"""One training loop: compiled step, metrics, checkpoints, resume."""

from abft_mlx.events import Update
from abft_mlx.stopping import Stop
from abft_mlx.trainer.loop import DivergedError, Progress, Trainer
from abft_mlx.trainer.run_folder import EVALUATION_FILE, SCHEMA, RunFolder, check_schema

__all__ = [
    "EVALUATION_FILE",
    "SCHEMA",
    "DivergedError",
    "Progress",
    "RunFolder",
    "Stop",
    "Trainer",
    "Update",
    "check_schema",
]
