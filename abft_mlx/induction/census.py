"""The census: which heads look at the demonstrations' labels, how much, and how rightly.

Letters: B prompts, L layers, H query heads, T tokens, K demonstrations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from abft_mlx.induction.filter import head_filter, label_attention


@dataclass
class HeadCensus:
    """Running means over prompts of what every head does with the label tokens.

    Feed it batches with :meth:`add`; read ``magnitude``, ``correctness``, ``share`` and ``sink``,
    each (L, H) float64 with NaN for layers without heads.
    """

    prompts: int = 0
    _mass: list[np.ndarray | None] = field(default_factory=list)
    _right_minus_wrong: list[np.ndarray | None] = field(default_factory=list)
    _kept: list[np.ndarray | None] = field(default_factory=list)
    _sink: list[np.ndarray | None] = field(default_factory=list)

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
        if not self._mass:
            self._mass = [None] * len(rows)
            self._right_minus_wrong = [None] * len(rows)
            self._kept = [None] * len(rows)
            self._sink = [None] * len(rows)
        right = (demonstration_labels == gold[:, None]).astype(mx.float32)
        K = label_positions.shape[1]
        for layer, pattern in enumerate(rows):
            if pattern is None:
                continue
            attention = label_attention(pattern, label_positions)
            mass = attention.sum(axis=-1)
            signed = (attention * (2 * right - 1)[:, None, :]).sum(axis=-1)
            kept = head_filter(mass, last + 1, K)
            for store, value in (
                (self._mass, mass),
                (self._right_minus_wrong, signed),
                (self._kept, kept.astype(mx.float32)),
                (self._sink, pattern[..., 0]),
            ):
                total = np.asarray(value.sum(axis=0), dtype=np.float64)
                before = store[layer]
                store[layer] = total if before is None else before + total
        self.prompts += int(gold.shape[0])

    def _mean(self, store: list[np.ndarray | None]) -> np.ndarray:
        width = max((len(heads) for heads in store if heads is not None), default=0)
        table = np.full((len(store), width), math.nan)
        for layer, heads in enumerate(store):
            if heads is not None:
                table[layer, : len(heads)] = heads / max(self.prompts, 1)
        return table

    @property
    def magnitude(self) -> np.ndarray:
        """(L, H) mean attention mass on the label tokens."""
        return self._mean(self._mass)

    @property
    def correctness(self) -> np.ndarray:
        """(L, H) mean of mass on labels equal to the gold label minus mass on the others."""
        return self._mean(self._right_minus_wrong)

    @property
    def share(self) -> np.ndarray:
        """(L, H) share of prompts in which the head passes the filter."""
        return self._mean(self._kept)

    @property
    def sink(self) -> np.ndarray:
        """(L, H) mean attention on the prompt's first token, where attention sinks lie."""
        return self._mean(self._sink)

    @property
    def heads_by_layer(self) -> list[float | None]:
        """Mean number of induction heads in a prompt, None for a layer without heads."""
        count = max(self.prompts, 1)
        return [None if heads is None else float(heads.sum()) / count for heads in self._kept]

    @property
    def heads_per_prompt(self) -> float:
        """Mean number of induction heads in a prompt."""
        return float(np.nansum(self.share))
