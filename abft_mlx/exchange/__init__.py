"""Adapters for other programs and the hub: mlx-lm, PEFT, merged into a model, with a card."""

from abft_mlx.exchange.export import BITS, Exported, Precision, export

__all__ = ["BITS", "Exported", "Precision", "export"]
