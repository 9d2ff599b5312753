"""The losses: ABFT (arXiv 2505.14233, equation 1) with its PID law, and cross-entropies.

Arrays in, scalars out; no model in sight. Letters: B prompts, H query heads, T tokens,
K demonstrations, V vocabulary, W tokens of a label word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from abft_mlx.induction import head_filter, label_attention


class Terms(NamedTuple):
    """Sums over prompts and kept heads, all scalars; divide by the number of prompts.

    Attributes:
        loss: A · punish + B · reward, or a cross-entropy.
        punish: attention on labels other than the gold one.
        reward: one minus the attention on labels equal to the gold one.
        induction_heads: kept heads.
    """

    loss: mx.array
    punish: mx.array
    reward: mx.array
    induction_heads: mx.array


def abft_terms(
    rows: Sequence[mx.array | None],
    label_positions: mx.array,
    demonstration_labels: mx.array,
    gold: mx.array,
    last: mx.array,
    *,
    punish_weight: mx.array | float,
    reward_weight: mx.array | float,
    use_filter: bool = True,
    prompt_weights: mx.array | None = None,
) -> Terms:
    """Equation 1, summed over layers, heads and prompts, so that micro-batches add up.

    For each kept head: A · Σ_{I-} a_i + B · (1 − Σ_{I+} a_i), where I+ holds the label positions
    whose label equals the gold label and I- the others. A head is kept where its mass on all label
    positions exceeds k / (k + ln n); no gradient passes through that choice. Where I+ is empty the
    reward term is the constant B.

    Args:
        rows: per layer, (B, H, T) float32 pattern rows at the last position, or None for a layer
            without heads. H may differ between layers.
        label_positions: (B, K) positions of the demonstrations' label tokens.
        demonstration_labels: (B, K) their labels.
        gold: (B,) the queries' labels.
        last: (B,) index of each prompt's last token; the prompt's length is one more.
        punish_weight: A.
        reward_weight: B.
        use_filter: False keeps every head (the paper's ablation).
        prompt_weights: (B,) factor of each prompt, 0 for rows that only fill a batch; default 1.
    """
    K = label_positions.shape[1]
    right = (demonstration_labels == gold[:, None]).astype(mx.float32)[:, None, :]
    punish = reward = heads = mx.array(0.0)
    for pattern in rows:
        if pattern is None:
            continue
        attention = label_attention(pattern, label_positions)
        kept = mx.ones(attention.shape[:2])
        if use_filter:
            kept = head_filter(attention.sum(axis=-1), last + 1, K).astype(mx.float32)
        if prompt_weights is not None:
            kept = kept * prompt_weights[:, None]
        punish = punish + (kept * (attention * (1 - right)).sum(axis=-1)).sum()
        reward = reward + (kept * (1 - (attention * right).sum(axis=-1))).sum()
        heads = heads + kept.sum()
    return Terms(punish_weight * punish + reward_weight * reward, punish, reward, heads)


def end_to_end_terms(
    logits: mx.array,
    target: mx.array,
    rows: Sequence[mx.array | None],
    label_positions: mx.array,
    demonstration_labels: mx.array,
    gold: mx.array,
    last: mx.array,
    *,
    prompt_weights: mx.array | None = None,
) -> Terms:
    """Cross-entropy of the gold word's tokens over the whole vocabulary, summed over prompts.

    What the heads do meanwhile is measured as :func:`abft_terms` does, and is no part of the loss.

    Args:
        logits: (B, W, V) float32, those that predict each token of the target, given the ones
            before it. For a read-out (B, 1, C) centred scores of the classes.
        target: (B, W) tokens of each query's gold label, -1 behind shorter ones. For a read-out
            (B, 1) gold classes.
        rows: as :func:`abft_terms`.
        label_positions: (B, K).
        demonstration_labels: (B, K).
        gold: (B,).
        last: (B,).
        prompt_weights: (B,).
    """
    measured = abft_terms(
        rows,
        label_positions,
        demonstration_labels,
        gold,
        last,
        punish_weight=0.0,
        reward_weight=0.0,
        prompt_weights=prompt_weights,
    )
    right = mx.take_along_axis(logits, mx.maximum(target, 0)[..., None], axis=2)[..., 0]
    surprise = mx.logsumexp(logits, axis=2) - right
    surprise = mx.where(target >= 0, surprise, 0.0).sum(axis=1)
    if prompt_weights is not None:
        surprise = surprise * prompt_weights
    return measured._replace(loss=surprise.sum())


@dataclass
class PunishController:
    """The PID law on the punish weight A (paper, section 3).

    From the third update on, with n_t the mean number of induction heads in update t::

        A_t = A_{t-1} + Cp (n_t - n_{t-1}) + Ci (n_t - n_1) + Cd (n_t - 2 n_{t-1} + n_{t-2})

    The integral of the paper telescopes to n_t - n_1. A is clamped at 0. A_t serves update t + 1,
    since n_t is known only after update t has used its own weight.

    Attributes:
        punish_weight: A, to be used in the next update.
        enabled: False leaves A as it is.
        updates: updates seen.
        first_heads: n_1.
        previous_heads: n_{t-1}.
        older_heads: n_{t-2}.
    """

    punish_weight: float
    enabled: bool = True
    cp: float = 0.03
    ci: float = 0.005
    cd: float = 0.005
    updates: int = 0
    first_heads: float = 0.0
    previous_heads: float = 0.0
    older_heads: float = 0.0

    def update(self, induction_heads: float) -> float:
        """Take in n_t, an update's mean head count, and return A of the next update."""
        self.updates += 1
        if self.updates == 1:
            self.first_heads = induction_heads
        elif self.updates > 2 and self.enabled:
            change = induction_heads - self.previous_heads
            since_first = induction_heads - self.first_heads
            bend = induction_heads - 2 * self.previous_heads + self.older_heads
            moved = self.punish_weight + self.cp * change + self.ci * since_first + self.cd * bend
            self.punish_weight = max(0.0, moved)
        self.older_heads, self.previous_heads = self.previous_heads, induction_heads
        return self.punish_weight
