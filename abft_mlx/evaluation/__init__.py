"""How good a classifier a prompted model is."""

from abft_mlx.evaluation.intervals import bootstrap_interval, intervals, mcnemar
from abft_mlx.evaluation.methods import entry, probabilities_of, report, zero_shot_prompts
from abft_mlx.evaluation.metrics import summary
from abft_mlx.evaluation.outputs import hidden_states, vocabulary_logits
from abft_mlx.evaluation.probabilities import label_logits, label_probabilities

__all__ = [
    "bootstrap_interval",
    "entry",
    "hidden_states",
    "intervals",
    "label_logits",
    "label_probabilities",
    "mcnemar",
    "probabilities_of",
    "report",
    "summary",
    "vocabulary_logits",
    "zero_shot_prompts",
]
