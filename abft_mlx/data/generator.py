"""The protocol's random numbers: a 32-bit linear congruential generator and the draws built on it.

Every split and every choice of demonstrations in the StaICC benchmark, on which the paper
evaluates, comes from this generator with seed 42; any other seed gives a replicate.
"""

from __future__ import annotations

import random

_MULTIPLIER = 1664525
_INCREMENT = 1013904223
_MODULUS = 2**32
# Items of a list that an item is taken out of: out of one long list that is slow.
_BLOCK = 2**13


class Generator:
    """X <- (1664525 X + 1013904223) mod 2**32; each number is X / 2**32."""

    def __init__(self, seed: int = 42) -> None:
        self._state = seed % _MODULUS

    def random(self) -> float:
        """The next number in [0, 1)."""
        self._state = (_MULTIPLIER * self._state + _INCREMENT) % _MODULUS
        return self._state / _MODULUS

    def integers(self, start: int, end: int) -> int:
        """The next whole number in [start, end)."""
        return int(start + (end - start) * self.random())

    def draw(self, n_items: int, n: int, repetition: bool = False) -> list[int]:
        """Draw n indices of range(n_items), without repetition unless told otherwise."""
        if n_items < 1 or (n > n_items and not repetition):
            raise ValueError(f"cannot draw {n} of {n_items} items without repetition")
        if repetition:
            return [int(self.random() * n_items) for _ in range(n)]
        starts = range(0, n_items, _BLOCK)
        blocks = [list(range(start, min(start + _BLOCK, n_items))) for start in starts]
        drawn = []
        for left in range(n_items, n_items - n, -1):
            place = int(self.random() * left)
            for block in blocks:
                if place < len(block):
                    drawn.append(block.pop(place))
                    break
                place -= len(block)
        return drawn


def demonstration_rows(
    n_queries: int, repeats: int, pool: int, k: int, seed: int = 42, *, fixed: bool = False
) -> list[tuple[int, ...]]:
    """Rows of the demonstration pool for every test prompt; as StaICC's sampler.

    Args:
        n_queries: test queries.
        repeats: sets of demonstrations for each query.
        pool: rows to choose from.
        k: demonstrations in a prompt; chosen with repetition only where k > pool.
        seed: 42 is StaICC's.
        fixed: all queries of a repeat have the same row, the sampler's next one; not StaICC's.

    Returns:
        n_queries · repeats rows of k indices; query q in repeat r has row q + n_queries · r.
    """
    generator = Generator(seed)
    together = n_queries if fixed else 1
    draws = n_queries * repeats // together
    drawn = [tuple(generator.draw(pool, k, k > pool)) for _ in range(draws)]
    return [row for row in drawn for _ in range(together)]


def training_rows(
    n_prompts: int, pool: int, k: int, seed: int = 42, together: int = 1
) -> list[tuple[int, ...]]:
    """Rows of the training pool for every training prompt: k demonstrations, then the query.

    Prompt i is reproducible by itself: it depends on seed + i and not on the prompts before it.
    The paper does not say how it draws; a sibling repository of its first author draws like this.
    Where ``together`` prompts share their demonstrations, group i depends on seed + i.
    """
    if k + together > pool:
        what = "a training prompt" if together == 1 else f"a group of {together} training prompts"
        raise ValueError(f"{what} needs {k + together} distinct rows, there are {pool}")
    rows = []
    for group in range(-(-n_prompts // together)):
        drawn = random.Random(seed + group).sample(range(pool), k + together)
        rows += [(*drawn[:k], query) for query in drawn[k:]]
    return rows[:n_prompts]
