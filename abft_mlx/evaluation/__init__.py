"""How good a classifier a prompted model is."""

from abft_mlx.evaluation.baselines import bag_of_words, majority
from abft_mlx.evaluation.forward import (
    Outputs,
    check_finite,
    hidden_states,
    label_logits,
    label_probabilities,
    label_scores,
    read_out_probabilities,
    vocabulary_logits,
)
from abft_mlx.evaluation.methods import entry, probabilities_of, report, zero_shot_prompts
from abft_mlx.evaluation.metrics import (
    against_base,
    bootstrap_interval,
    coverage,
    expected_calibration_error,
    intervals,
    mcnemar,
    right_answers,
    right_string,
    softmax,
    summary,
    temperature,
)
from abft_mlx.evaluation.suite import measure
from abft_mlx.evaluation.verdict import verdict

__all__ = [
    "Outputs",
    "against_base",
    "bag_of_words",
    "bootstrap_interval",
    "check_finite",
    "coverage",
    "entry",
    "expected_calibration_error",
    "hidden_states",
    "intervals",
    "label_logits",
    "label_probabilities",
    "label_scores",
    "majority",
    "mcnemar",
    "measure",
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
    "zero_shot_prompts",
]
