"""The parts put together: from a recipe to a trained adapter, to accuracy, to heads."""

from abft_mlx.experiment.finetuning import RunResult, finetune, fit
from abft_mlx.experiment.measuring import (
    HEADS_PROMPTS,
    choose,
    choose_trained,
    document,
    evaluate,
    heads,
)
from abft_mlx.experiment.opened import Experiment, open_texts, prepare

__all__ = [
    "HEADS_PROMPTS",
    "Experiment",
    "RunResult",
    "choose",
    "choose_trained",
    "document",
    "evaluate",
    "finetune",
    "fit",
    "heads",
    "open_texts",
    "prepare",
]
