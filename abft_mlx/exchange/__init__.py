"""Adapters in the formats of other programs: mlx-lm, PEFT, and merged into a model of its own."""

from abft_mlx.exchange.comparison import Comparison, compare, last_logits
from abft_mlx.exchange.export import FORMATS, Exported, export
from abft_mlx.exchange.fused import BITS, Precision

__all__ = [
    "BITS",
    "FORMATS",
    "Comparison",
    "Exported",
    "Precision",
    "compare",
    "export",
    "last_logits",
]
