"""Which heads look at the demonstrations' labels, how much and how rightly, and in which layers.

Letters: B prompts, L layers, H query heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

WINDOW_SHARE = 0.9


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
    """(B, H, K) attention that each head's last row puts on each demonstration's label token.

    Args:
        pattern: (B, H, T) float32, rows after the softmax.
        label_positions: (B, K) token positions.
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


@dataclass
class HeadCensus:
    """Running means over prompts of what every head does with the label tokens.

    Feed it batches with :meth:`add`; read ``magnitude``, ``correctness``, ``share`` and ``sink``,
    each (L, H) float64 with NaN for layers without heads.
    """

    prompts: int = 0
    # Of each layer (4, H) sums over prompts, one row for each of the means.
    _sums: list[np.ndarray | None] = field(default_factory=list)

    def add(
        self,
        rows: Sequence[mx.array | None],
        label_positions: mx.array,
        demonstration_labels: mx.array,
        gold: mx.array,
        last: mx.array,
    ) -> None:
        """Count one batch.

        Args:
            rows: per layer, (B, H, T) pattern rows at the last position, or None.
            label_positions: (B, K).
            demonstration_labels: (B, K) label of each demonstration.
            gold: (B,) label of each query.
            last: (B,) index of each prompt's last token.
        """
        self._sums = self._sums or [None] * len(rows)
        sign = 2 * (demonstration_labels == gold[:, None]).astype(mx.float32) - 1
        K = label_positions.shape[1]
        for layer, pattern in enumerate(rows):
            if pattern is None:
                continue
            attention = label_attention(pattern, label_positions)
            mass = attention.sum(axis=-1)
            values = (
                mass,
                (attention * sign[:, None, :]).sum(axis=-1),
                head_filter(mass, last + 1, K).astype(mx.float32),
                pattern[..., 0],
            )
            # Sums of many batches need more digits than float32 has.
            sums = np.stack([np.asarray(one.sum(axis=0), dtype=np.float64) for one in values])
            before = self._sums[layer]
            self._sums[layer] = sums if before is None else before + sums
        self.prompts += int(gold.shape[0])

    def _mean(self, number: int) -> np.ndarray:
        width = max((sums.shape[1] for sums in self._sums if sums is not None), default=0)
        table = np.full((len(self._sums), width), math.nan)
        for layer, sums in enumerate(self._sums):
            if sums is not None:
                table[layer, : sums.shape[1]] = sums[number] / max(self.prompts, 1)
        return table

    @property
    def magnitude(self) -> np.ndarray:
        """(L, H) mean attention mass on the label tokens."""
        return self._mean(0)

    @property
    def correctness(self) -> np.ndarray:
        """(L, H) mean of mass on labels equal to the gold label minus mass on the others."""
        return self._mean(1)

    @property
    def share(self) -> np.ndarray:
        """(L, H) share of prompts in which the head passes the filter."""
        return self._mean(2)

    @property
    def sink(self) -> np.ndarray:
        """(L, H) mean attention on the prompt's first token, where attention sinks lie."""
        return self._mean(3)

    @property
    def heads_by_layer(self) -> list[float | None]:
        """Mean number of induction heads in a prompt, None for a layer without heads."""
        count = max(self.prompts, 1)
        return [None if sums is None else float(sums[2].sum()) / count for sums in self._sums]

    @property
    def heads_per_prompt(self) -> float:
        """Mean number of induction heads in a prompt."""
        return float(np.nansum(self.share))


@dataclass(frozen=True)
class Window:
    """The layers that ``adapter.layers: auto`` chooses, and the census that it chose them by.

    Attributes:
        layers: numbers of the layers that train; all with heads where no induction head was seen.
        heads_by_layer: induction heads in a prompt, None for a layer without heads.
        prompts: prompts that were looked at.
        share: of the heads, in 0..1, that the layers had to hold.
    """

    layers: list[int]
    heads_by_layer: list[float | None]
    prompts: int
    share: float = WINDOW_SHARE

    @classmethod
    def of(cls, census: HeadCensus, share: float = WINDOW_SHARE) -> Window:
        """The smallest window of a census."""
        heads = census.heads_by_layer
        layers = window(heads, share) or [n for n, count in enumerate(heads) if count is not None]
        return cls(layers, heads, census.prompts, share)

    @property
    def heads(self) -> float:
        """Induction heads in a prompt."""
        return sum(count or 0.0 for count in self.heads_by_layer)

    @property
    def heads_inside(self) -> float:
        """Those of them that the chosen layers hold."""
        return sum(self.heads_by_layer[layer] or 0.0 for layer in self.layers)


def window(heads_by_layer: Sequence[float | None], share: float = WINDOW_SHARE) -> list[int]:
    """The fewest consecutive layers that hold a share of the induction heads.

    Layers without heads do not interrupt a run and are never part of it. Of equally short runs the
    one with most heads is taken, and of those the lowest: above it nothing need be computed.

    Args:
        heads_by_layer: induction heads in a prompt, or None for a layer without heads.
        share: of all heads, in 0..1.

    Returns:
        Layer numbers in order; empty where no head was seen.
    """
    layers = [n for n, count in enumerate(heads_by_layer) if count is not None]
    counts = [count for count in heads_by_layer if count is not None]
    # Sums of means: a run that holds exactly the share must not fail by a rounding.
    needed = share * sum(counts) * (1 - 1e-9)
    if not sum(counts):
        return []
    for length in range(1, len(layers)):
        starts = range(len(layers) - length + 1)
        held = {start: sum(counts[start : start + length]) for start in starts}
        best = max(starts, key=lambda start: (held[start], -start))
        if held[best] >= needed:
            return layers[best : best + length]
    return layers
