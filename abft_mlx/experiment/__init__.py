"""The rooms put together: from a recipe to a trained adapter, to accuracy, to heads."""

from abft_mlx.experiment.fitting import fit, open_texts
from abft_mlx.experiment.opened import Experiment, prepare
from abft_mlx.experiment.runs import HEADS_PROMPTS, document, evaluate, heads
from abft_mlx.experiment.shipping import choose
from abft_mlx.experiment.training import RunResult, finetune, resume, train

__all__ = [
    "HEADS_PROMPTS",
    "Experiment",
    "RunResult",
    "choose",
    "document",
    "evaluate",
    "finetune",
    "fit",
    "heads",
    "open_texts",
    "prepare",
    "resume",
    "train",
]
