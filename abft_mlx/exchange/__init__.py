"""Adapters for other programs and the hub: mlx-lm, PEFT, merged into a model, with a card."""

from abft_mlx.exchange.export import FORMATS, Answers, Comparison, Exported, answers, export
from abft_mlx.exchange.fused import BITS, Precision

__all__ = [
    "BITS",
    "FORMATS",
    "Answers",
    "Comparison",
    "Exported",
    "Precision",
    "answers",
    "export",
]
