"""How good a classifier a prompted model is."""

from abft_mlx.evaluation.baselines import bag_of_words, majority, verdict
from abft_mlx.evaluation.forward import (
    Options,
    check_finite,
    label_probabilities,
    label_scores,
    outputs,
    read_out_probabilities,
    vocabulary_logits,
)
from abft_mlx.evaluation.methods import entry, probabilities_of, report
from abft_mlx.evaluation.metrics import (
    against_base,
    coverage,
    intervals,
    mcnemar,
    right_answers,
    right_string,
    softmax,
    summary,
    temperature,
)
from abft_mlx.evaluation.protocols import measure

__all__ = [
    "Options",
    "against_base",
    "bag_of_words",
    "check_finite",
    "coverage",
    "entry",
    "intervals",
    "label_probabilities",
    "label_scores",
    "majority",
    "mcnemar",
    "measure",
    "outputs",
    "probabilities_of",
    "read_out_probabilities",
    "report",
    "right_answers",
    "right_string",
    "softmax",
    "summary",
    "temperature",
    "verdict",
    "vocabulary_logits",
]
