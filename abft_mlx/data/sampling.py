"""Seeded draws: the protocol's random numbers, and which texts a prompt demonstrates.

Every split and every choice of demonstrations in the StaICC benchmark, on which the paper
evaluates, comes from a 32-bit linear congruential generator with seed 42; any other seed makes a
replicate. Texts are chosen at random (the paper's way), balanced by class, or nearest to the query.

Rows are numbers in the part of the texts that the demonstrations come from. Two texts that differ
only in case and punctuation count as the same text: neither is shown where the other is asked.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from abft_mlx.data.texts import LabelledTexts, fold
from abft_mlx.errors import DataError, RecipeError

_MULTIPLIER, _INCREMENT, _MODULUS = 1664525, 1013904223, 2**32
# Items of a list that an item is taken out of: out of one long list that is slow.
_BLOCK = 2**13
# Test queries that show the same balanced demonstrations: prompts with the same beginning are
# cheap, since the beginning is computed once.
QUERIES_TOGETHER = 64
# Words of two characters or more, as scikit-learn's TfidfVectorizer finds them.
_WORD = re.compile(r"\b\w\w+\b")


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
        """Draw n indices of range(n_items), without repetition by default."""
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
        pool: rows to choose from, with repetition only where k > pool.
        k: demonstrations in a prompt.
        seed: 42 is StaICC's.
        fixed: all queries of a repeat have the same row; not StaICC's.

    Returns:
        n_queries · repeats rows of k indices; query q in repeat r has row q + n_queries · r.
    """
    generator = Generator(seed)
    together = n_queries if fixed else 1
    draws = range(n_queries * repeats // together)
    drawn = [tuple(generator.draw(pool, k, k > pool)) for _ in draws]
    return [row for row in drawn for _ in range(together)]


def training_rows(
    n_prompts: int, pool: int, k: int, seed: int = 42, together: int = 1
) -> list[tuple[int, ...]]:
    """Rows of the training pool for every training prompt: k demonstrations, then the query.

    Prompt i is reproducible by itself: it depends on seed + i and not on the prompts before it.
    The paper does not say how it draws; a sibling repository of its first author draws like this.
    Where ``together`` prompts share their demonstrations, group i depends on seed + i.
    """
    rows = []
    for group in range(-(-n_prompts // together)):
        drawn = random.Random(seed + group).sample(range(pool), k + together)
        rows += [(*drawn[:k], query) for query in drawn[k:]]
    return rows[:n_prompts]


@dataclass(frozen=True)
class Vectors:
    """N sparse vectors of length 1 over V words (of length 0 where no word is known).

    Attributes:
        rows: (n,) int64, ascending: the vector of each entry that is not zero.
        columns: (n,) int64, its word.
        values: (n,) float64.
        shape: N and V.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]


class TfIdf:
    """TF-IDF of words by scikit-learn's formula: a word has weight ln((1 + N) / (1 + n)) + 1.

    Args:
        texts: N texts, n of which have the word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(word for text in texts for word in set(_words(text)))
        self._columns = {word: column for column, word in enumerate(sorted(counts))}
        having = np.array([counts[word] for word in self._columns], dtype=np.float64)
        self._weights = np.log((1 + len(texts)) / (1 + having)) + 1

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Word counts times weights, each vector divided by its Euclidean length.

        Args:
            texts: N texts; words that the texts of the constructor lack are left out.
        """
        entries = [
            (row, self._columns[word], count)
            for row, text in enumerate(texts)
            for word, count in Counter(_words(text)).items()
            if word in self._columns
        ]
        rows, columns, counts = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        values = counts * self._weights[columns]
        lengths = np.sqrt(np.bincount(rows, values**2, len(texts)))
        return Vectors(rows, columns, values / lengths[rows], (len(texts), len(self._columns)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def balanced(
    labels: Sequence[Hashable], k: int, rng: random.Random, exclude: Collection[int] = ()
) -> tuple[int, ...]:
    """K rows, classes in turn, in random order.

    Every class occurs as often as the others, as far as k and the rows allow. The classes that
    occur once more than others, or at all where k is smaller than their number, are random.
    """
    left_out = set(exclude)
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        if row not in left_out:
            rows[label].append(row)
    _enough(sum(map(len, rows.values())), k)
    drawn = {label: rng.sample(some, min(k, len(some))) for label, some in rows.items()}
    chosen: list[int] = []
    while len(chosen) < k:
        turn = rng.sample(list(drawn), len(drawn))
        chosen += [drawn[label].pop() for label in turn if drawn[label]][: k - len(chosen)]
    rng.shuffle(chosen)
    return tuple(chosen)


def _enough(count: int, k: int) -> None:
    """Refuse to choose more texts than there are."""
    if count < k:
        raise DataError(
            f"{count} texts are too few for {k} demonstrations; add texts, or lower "
            "prompt.demonstrations"
        )


class Nearest:
    """The texts most similar to a query, by the cosine of TF-IDF vectors of words.

    Args:
        texts: N texts to choose from.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._tfidf = TfIdf(texts)
        vectors = self._tfidf.vectors(texts)
        order = np.argsort(vectors.columns, kind="stable")
        self._rows, self._values = vectors.rows[order], vectors.values[order]
        self._starts = np.searchsorted(vectors.columns[order], np.arange(vectors.shape[1] + 1))
        self._count = len(texts)

    def rows(self, query: str, k: int, exclude: Collection[int] = ()) -> tuple[int, ...]:
        """K rows, the most similar one last: next to the query in a prompt.

        Of texts that are equally similar the earlier one counts as nearer.
        """
        left_out = list(set(exclude))
        _enough(self._count - len(left_out), k)
        similarity = np.zeros(self._count)
        vector = self._tfidf.vectors([query])
        for column, value in zip(vector.columns, vector.values, strict=True):
            some = slice(self._starts[column], self._starts[column + 1])
            similarity[self._rows[some]] += value * self._values[some]
        similarity[left_out] = -1
        # Rounded: equal texts stay equal whatever the order of the sum.
        order = np.argsort(-similarity.round(12), kind="stable")
        return tuple(order[:k][::-1].tolist())


def training_draws(
    texts: LabelledTexts, n: int, k: int, seed: int, together: int = 1, selection: str = "random"
) -> list[tuple[int, ...]]:
    """K rows of demonstrations and then the query's row, for each of N training prompts.

    random draws every group of prompts by itself (`training_rows`). With balanced and nearest the
    queries pass through all rows in random order, again and again, and a text that occurs again is
    neither among its demonstrations nor asked twice in a group: this many prompts (``together``)
    in a row, which share their demonstrations. Where there are too few rows for that many different
    queries, queries repeat within the group.
    """
    if selection == "nearest" and together > 1:
        raise RecipeError(
            f"prompt.selection nearest chooses demonstrations for each query, and "
            f"training.shared_demonstrations is {together}: set it to 1, or select balanced"
        )
    least = k + (together if selection == "random" else 1)
    if len(texts) < least:
        wanted = "a query" if least == k + 1 else f"{together} queries"
        raise DataError(
            f"{texts.source}: {len(texts)} training rows are too few for {k} demonstrations and "
            f"{wanted}; add rows or lower prompt.demonstrations"
            + (" or training.shared_demonstrations" if least > k + 1 else "")
        )
    if selection == "random":
        return training_rows(n, len(texts), k, seed, together)
    copies = _copies(texts.texts)
    same = [copies[fold(text)] for text in texts.texts]
    nearest = Nearest(texts.texts) if selection == "nearest" else None
    drawn: list[tuple[int, ...]] = []
    for group, queries in enumerate(_queries(texts, same, k, seed, together)):
        if nearest is not None:
            shown = nearest.rows(texts.texts[queries[0]], k, same[queries[0]])
        else:
            taken = {row for query in queries for row in same[query]}
            shown = balanced(texts.labels, k, random.Random(f"{seed}/{group}"), taken)
        drawn += [(*shown, queries[place % len(queries)]) for place in range(together)]
        if len(drawn) >= n:
            break
    return drawn[:n]


def evaluation_draws(
    pool: LabelledTexts,
    queries: Sequence[str],
    repeats: int,
    k: int,
    seed: int,
    *,
    selection: str = "random",
    fixed: bool = False,
) -> list[tuple[int, ...]]:
    """Rows of the pool that each test prompt demonstrates.

    random is the protocol's (`demonstration_rows`): a set for every prompt, or one for a repeat
    with ``fixed``. balanced draws a set for every 64 queries in a row, so that their common
    beginning is computed once, or one for a repeat with ``fixed``. nearest is the same in every
    repeat. The last two show all of a pool that is smaller than k.

    Returns:
        n · repeats tuples, for n queries; query q in repeat r has number q + n · r.
    """
    if selection == "random":
        return demonstration_rows(len(queries), repeats, len(pool), k, seed, fixed=fixed)
    k = min(k, len(pool))
    if selection == "nearest":
        if fixed:
            raise RecipeError(
                "prompt.selection nearest chooses demonstrations for each query, and "
                "evaluation.demonstrations is fixed: set it to per_query, or select balanced"
            )
        copies, nearest = _copies(pool.texts), Nearest(pool.texts)
        return [nearest.rows(text, k, copies[fold(text)]) for text in queries] * repeats
    together = len(queries) if fixed else QUERIES_TOGETHER
    return [
        shown
        for repeat in range(repeats)
        for first in range(0, len(queries), together)
        for shown in [balanced(pool.labels, k, random.Random(f"{seed}/{repeat}/{first}"))]
        for _ in queries[first : first + together]
    ]


def _copies(texts: Sequence[str]) -> dict[str, list[int]]:
    """The rows of every text, by its folded form; none for any other text."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(texts):
        rows[fold(text)].append(row)
    return rows


def _queries(
    texts: LabelledTexts, same: Sequence[list[int]], k: int, seed: int, together: int
) -> Iterator[list[int]]:
    """The query rows of one group after another: at most `together` different texts.

    ``same`` has for every row the rows with its text. A row waits for a later group where the
    classes would have too few other rows to demonstrate.
    """
    # Rows that a class keeps for demonstrations; the only text of a class may still be asked.
    different = Counter(label for label, _ in {(x, same[i][0]) for i, x in enumerate(texts.labels)})
    kept = {label: min(-(-k // len(different)), n - 1) for label, n in different.items()}
    rng = random.Random(f"{seed}/queries")
    waiting: list[int] = []
    while True:
        if len(waiting) < len(texts):
            waiting += rng.sample(range(len(texts)), len(texts))
        chosen: list[int] = []
        taken: set[int] = set()
        free = Counter(texts.labels)
        for row in waiting:
            lost = Counter(texts.labels[copy] for copy in same[row])
            if (
                row not in taken
                and free.total() - lost.total() >= k
                and all(free[label] - lost[label] >= kept[label] for label in lost)
            ):
                chosen.append(row)
                taken.update(same[row])
                free -= lost
            if len(chosen) == together:
                break
        if not chosen:
            raise DataError(
                f"{texts.source}: without the copies of a query too few training rows are left "
                f"for {k} demonstrations; add rows or lower prompt.demonstrations"
            )
        for row in chosen:
            waiting.remove(row)
        yield chosen
