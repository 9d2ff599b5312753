"""Few-shot prompts as tokens, with label positions known by construction."""

from abft_mlx.prompts.batching import (
    NO_TOKEN,
    PADDING_TOKEN,
    PromptBatch,
    Prompts,
    batches,
    evaluation_prompts,
    pad,
    training_prompts,
)
from abft_mlx.prompts.builder import Prompt, PromptBuilder
from abft_mlx.prompts.template import (
    ChatTemplate,
    LabelSpace,
    Template,
    Wording,
    label_space,
    words_of,
)

__all__ = [
    "NO_TOKEN",
    "PADDING_TOKEN",
    "ChatTemplate",
    "LabelSpace",
    "Prompt",
    "PromptBatch",
    "PromptBuilder",
    "Prompts",
    "Template",
    "Wording",
    "batches",
    "evaluation_prompts",
    "label_space",
    "pad",
    "training_prompts",
    "words_of",
]
