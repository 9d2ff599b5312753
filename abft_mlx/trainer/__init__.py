"""One training loop: compiled step, metrics, checkpoints, resume."""

from abft_mlx.stopping import Stop
from abft_mlx.trainer.finite import DivergedError
from abft_mlx.trainer.loop import Progress, Trainer
from abft_mlx.trainer.run_folder import EVALUATION_FILE, SCHEMA, RunFolder, Update, check_schema

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
