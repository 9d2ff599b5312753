"""What one update comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Totals:
    """One update's sums, each divided by its number of prompts.

    Attributes:
        loss: A · punish + B · reward, or the cross-entropy of the label token.
        punish: attention on wrong labels, summed over kept heads.
        reward: one minus attention on right labels, summed over kept heads.
        induction_heads: kept heads.
        tokens: prompt tokens, padding not counted.
        gradient_norm: L2 norm of the averaged gradient, before any clipping.
    """

    loss: float
    punish: float
    reward: float
    induction_heads: float
    tokens: int
    gradient_norm: float
