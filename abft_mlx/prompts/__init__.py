"""Few-shot prompts as tokens, with label positions known by construction."""

from abft_mlx.prompts.batching import (
    PromptBatch,
    batches,
    evaluation_prompts,
    pad,
    training_prompts,
)
from abft_mlx.prompts.builder import Prompt, PromptBuilder
from abft_mlx.prompts.template import LabelSpace, Template, label_space

__all__ = [
    "LabelSpace",
    "Prompt",
    "PromptBatch",
    "PromptBuilder",
    "Template",
    "batches",
    "evaluation_prompts",
    "label_space",
    "pad",
    "training_prompts",
]
