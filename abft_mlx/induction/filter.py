"""The head filter: which heads look at the demonstrations' labels enough to count (section 3).

Letters: B prompts, H query heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import mlx.core as mx


def threshold(demonstrations: int, length_tokens: mx.array) -> mx.array:
    """Mass on the label tokens above which a head counts as an induction head (paper, section 3).

    T = k / (k + ln n), with the natural logarithm.

    Args:
        demonstrations: k, at least 1.
        length_tokens: (B,) prompt lengths n in tokens, padding not counted.

    Returns:
        (B,) float32 in (0, 1].
    """
    return demonstrations / (demonstrations + mx.log(length_tokens.astype(mx.float32)))


def label_attention(pattern: mx.array, label_positions: mx.array) -> mx.array:
    """Attention that each head's last row puts on each demonstration's label token.

    Args:
        pattern: (B, H, T) float32, rows after the softmax.
        label_positions: (B, K) token positions.

    Returns:
        (B, H, K) float32.
    """
    B, H, _ = pattern.shape
    K = label_positions.shape[1]
    positions = mx.broadcast_to(label_positions[:, None, :], (B, H, K))
    return mx.take_along_axis(pattern, positions, axis=-1)


def head_filter(mass: mx.array, length_tokens: mx.array, demonstrations: int) -> mx.array:
    """Which heads count as induction heads, prompt by prompt; carries no gradient.

    Args:
        mass: (B, H) attention mass on the label tokens.
        length_tokens: (B,) prompt lengths in tokens.
        demonstrations: k.

    Returns:
        (B, H) bool, True where mass > k / (k + ln n).
    """
    return mx.stop_gradient(mass > threshold(demonstrations, length_tokens)[:, None])
