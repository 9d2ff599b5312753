"""Which token sequences begin alike, and where it pays to compute their beginning once.

Letters: N sequences, P tokens of what a group of n of them shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A group pays if sharing spares this part of its tokens; a pass over the beginnings costs, too.
WORTH = 1 / 4


@dataclass(frozen=True)
class Group:
    """Sequences that share a beginning.

    Attributes:
        size: P tokens that all of them begin with, and none of them ends with.
        rows: where they are in what was grouped.
    """

    size: int
    rows: tuple[int, ...]


def common_prefix(tokens: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all of some sequences, at least one, begin with."""
    first, last = min(tokens), max(tokens)
    pairs = enumerate(zip(first, last, strict=False))
    parting = next((place for place, (one, other) in pairs if one != other), None)
    return first if parting is None else first[:parting]


def groups(tokens: Sequence[tuple[int, ...]]) -> list[Group]:
    """Part sequences so that many tokens, n · P - P of a group, need not be computed again.

    In lexicographic order what begins alike is adjacent. Neighbours are joined, those that share
    most first, and groups are joined to a larger one where that spares more than they do apart.

    Args:
        tokens: N sequences of at least one token.

    Returns:
        The groups that are worth it, in lexicographic order; other sequences are in none.
    """
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    inner = range(len(order) - 1)
    sizes = [_shared(tokens[order[i]], tokens[order[i + 1]]) for i in inner]
    before = np.cumsum([0, *(len(tokens[row]) for row in order)]).tolist()
    # Of the run of neighbours that begins, or ends, at a place: its other end, and what it spares.
    start, end, spared = [*range(len(order))], [*range(len(order))], [0] * len(order)
    joined = np.zeros(len(order), dtype=bool)  # to the next one
    for place in sorted(inner, key=lambda i: -sizes[i]):
        first, last = start[place], end[place + 1]
        apart = spared[first] + spared[place + 1]
        together = (last - first) * sizes[place]
        if together > apart and together >= WORTH * (before[last + 1] - before[first]):
            joined[first:last] = True
            apart = together
        spared[first] = apart
        start[last], end[first] = first, last
    found, first = [], 0
    for place in range(len(order)):
        if joined[place]:
            continue
        if place > first:
            found.append(Group(min(sizes[first:place]), tuple(order[first : place + 1])))
        first = place + 1
    return found


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens that two sequences share at their beginning; each keeps a token of its own."""
    return min(len(common_prefix((one, other))), len(one) - 1, len(other) - 1)
