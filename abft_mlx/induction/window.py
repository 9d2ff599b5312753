"""The layers that hold the induction heads, which ``adapter.layers: auto`` trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abft_mlx.induction.census import HeadCensus

WINDOW_SHARE = 0.9


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
