"""How seconds and memory grow: exponents fitted to sizes that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from abft_mlx.bench.measure import Row
from abft_mlx.bench.sizes import Size

FEWEST_SIZES = 3


@dataclass(frozen=True)
class Exponent:
    """A power law, fitted by least squares to logarithms.

    Attributes:
        contender: whose.
        quantity: "seconds", or "activation bytes of a prompt": the peak without the weights,
            divided by the prompts.
        of: "prompts" of the same length, or "tokens" of a prompt while a batch's tokens stay alike.
        sizes: what it is fitted to.
        exponent: 1 where the quantity is proportional.
    """

    contender: str
    quantity: str
    of: str
    sizes: tuple[str, ...]
    exponent: float


def fitted(found: Mapping[Size, Sequence[Row]]) -> list[Exponent]:
    """Exponents of every contender, of all sizes that a line can be fitted to.

    Args:
        found: sizes with their rows; the limit's row says what the weights take.
    """
    by_prompts = _alike(found, lambda size: replace(size, prompts=1))
    by_tokens = _alike(
        found, lambda size: (replace(size, prompts=1, tokens=1), size.prompts * size.tokens)
    )
    return [
        *_fit(found, by_prompts, "seconds", "prompts"),
        *_fit(found, by_tokens, "activation bytes of a prompt", "tokens"),
    ]


def _alike(found: Mapping[Size, object], key: Callable[[Size], object]) -> list[list[Size]]:
    groups: dict[object, list[Size]] = {}
    for size in found:
        groups.setdefault(key(size), []).append(size)
    return [group for group in groups.values() if len(group) >= FEWEST_SIZES]


def _fit(
    found: Mapping[Size, Sequence[Row]], groups: Sequence[Sequence[Size]], quantity: str, of: str
) -> list[Exponent]:
    made = []
    for group in groups:
        for name in [row.name for row in found[group[0]] if row.name != "limit"]:
            points = []
            for size in group:
                rows = {row.name: row for row in found[size]}
                value = _value(rows[name], rows["limit"], size, quantity)
                if value is not None:
                    points.append((size, value))
            if len(points) < FEWEST_SIZES:
                continue
            slope = np.polyfit(
                np.log([getattr(size, of) for size, _ in points]),
                np.log([value for _, value in points]),
                1,
            )[0]
            names = tuple(str(size) for size, _ in points)
            made.append(Exponent(name, quantity, of, names, float(slope)))
    return made


def _value(row: Row, limit: Row, size: Size, quantity: str) -> float | None:
    if quantity == "seconds":
        return row.seconds
    if row.peak_memory_bytes is None or limit.peak_memory_bytes is None:
        return None
    beside = row.peak_memory_bytes - limit.peak_memory_bytes
    return beside / size.prompts if beside > 0 else None
