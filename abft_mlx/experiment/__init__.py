"""The rooms put together: from a recipe to a trained adapter or to measured accuracy."""

from abft_mlx.experiment.fitting import fit, open_texts
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.experiment.runs import RunResult, evaluate, finetune, resume, train

__all__ = [
    "Experiment",
    "RunResult",
    "evaluate",
    "finetune",
    "fit",
    "open_texts",
    "prepare",
    "resume",
    "train",
]
