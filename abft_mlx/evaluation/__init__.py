"""How good a classifier a prompted model is."""

from abft_mlx.evaluation.metrics import summary
from abft_mlx.evaluation.probabilities import label_logits, label_probabilities

__all__ = ["label_logits", "label_probabilities", "summary"]
