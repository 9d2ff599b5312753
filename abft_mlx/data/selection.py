"""Which texts a prompt demonstrates: random ones (the paper's), balanced by class, or nearest.

Rows are numbers in the part of the texts that the demonstrations come from. Two texts that differ
only in case and punctuation count as the same text: neither is shown where the other is asked.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence

import numpy as np

from abft_mlx.data.generator import demonstration_rows, training_rows
from abft_mlx.data.texts import LabelledTexts, fold
from abft_mlx.data.tfidf import TfIdf
from abft_mlx.errors import DataError, RecipeError

# Test queries that show the same balanced demonstrations: prompts with the same beginning are
# cheap, since the beginning is computed once.
QUERIES_TOGETHER = 64


def balanced(
    labels: Sequence[Hashable], k: int, rng: random.Random, exclude: Collection[int] = ()
) -> tuple[int, ...]:
    """K rows, classes in turn, in random order.

    Every class occurs as often as the others, as far as k and the rows allow. The classes that
    occur once more than others, or at all where k is smaller than their number, are random.

    Args:
        labels: the class of every row.
        k: rows to choose.
        rng: random numbers.
        exclude: rows that are not chosen.

    Raises:
        DataError: fewer than k rows.
    """
    left_out = set(exclude)
    rows: dict[Hashable, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        if row not in left_out:
            rows[label].append(row)
    count = sum(map(len, rows.values()))
    if count < k:
        raise DataError(
            f"{count} texts are too few for {k} demonstrations; add texts, or lower "
            "prompt.demonstrations"
        )
    drawn = {label: rng.sample(some, min(k, len(some))) for label, some in rows.items()}
    chosen: list[int] = []
    while len(chosen) < k:
        turn = rng.sample(list(drawn), len(drawn))
        chosen += [drawn[label].pop() for label in turn if drawn[label]][: k - len(chosen)]
    rng.shuffle(chosen)
    return tuple(chosen)


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

        Args:
            query: any text.
            k: rows to choose.
            exclude: rows that are not chosen.

        Raises:
            DataError: fewer than k rows.
        """
        left_out = set(exclude)
        if self._count - len(left_out) < k:
            raise DataError(
                f"{self._count - len(left_out)} texts are too few for {k} demonstrations; add "
                "texts, or lower prompt.demonstrations"
            )
        similarity = np.zeros(self._count)
        vector = self._tfidf.vectors([query])
        for column, value in zip(vector.columns, vector.values, strict=True):
            some = slice(self._starts[column], self._starts[column + 1])
            similarity[self._rows[some]] += value * self._values[some]
        similarity[list(left_out)] = -1
        # Rounded: equal texts stay equal whatever the order of the sum.
        order = np.argsort(-similarity.round(12), kind="stable")
        return tuple(order[:k][::-1].tolist())


def training_draws(
    texts: LabelledTexts, n: int, k: int, seed: int, together: int = 1, selection: str = "random"
) -> list[tuple[int, ...]]:
    """K rows of demonstrations and then the query's row, for each of N training prompts.

    random draws every group of prompts by itself (`training_rows`). With the others the queries
    pass through all rows in random order, again and again.

    Args:
        texts: the training part.
        n: N.
        k: demonstrations.
        seed: of the draw.
        together: this many prompts in a row, a group, share their demonstrations. Where there are
            too few rows for that many different queries, queries repeat within the group.
        selection: random, balanced or nearest. A text that occurs again is neither among its
            demonstrations nor asked twice in a group.

    Raises:
        DataError: too few rows.
        RecipeError: nearest, where prompts share their demonstrations.
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
            asked = {row for query in queries for row in same[query]}
            shown = balanced(texts.labels, k, random.Random(f"{seed}/{group}"), asked)
        drawn += [(*shown, queries[place % len(queries)]) for place in range(together)]
        if len(drawn) >= n:
            break
    return drawn[:n]


def evaluation_draws(
    pool: LabelledTexts,
    asked: Sequence[str],
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

    Args:
        pool: texts to choose from.
        asked: n queries.
        repeats: sets of demonstrations for each query.
        k: demonstrations.
        seed: of the draw.
        selection: random, balanced or nearest.
        fixed: one set for all queries of a repeat.

    Returns:
        n · repeats tuples; query q in repeat r has number q + n · r.

    Raises:
        RecipeError: nearest and fixed.
    """
    if selection == "random":
        return demonstration_rows(len(asked), repeats, len(pool), k, seed, fixed=fixed)
    k = min(k, len(pool))
    if selection == "nearest":
        if fixed:
            raise RecipeError(
                "prompt.selection nearest chooses demonstrations for each query, and "
                "evaluation.demonstrations is fixed: set it to per_query, or select balanced"
            )
        copies, nearest = _copies(pool.texts), Nearest(pool.texts)
        return [nearest.rows(text, k, copies[fold(text)]) for text in asked] * repeats
    together = len(asked) if fixed else QUERIES_TOGETHER
    return [
        shown
        for repeat in range(repeats)
        for first in range(0, len(asked), together)
        for shown in [balanced(pool.labels, k, random.Random(f"{seed}/{repeat}/{first}"))]
        for _ in asked[first : first + together]
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
    different = {(label, same[row][0]) for row, label in enumerate(texts.labels)}
    count = Counter(label for label, _ in different)
    kept = {label: min(-(-k // len(count)), number - 1) for label, number in count.items()}
    rng = random.Random(f"{seed}/queries")
    waiting: list[int] = []
    while True:
        if len(waiting) < len(texts):
            waiting += rng.sample(range(len(texts)), len(texts))
        chosen: list[int] = []
        asked: set[int] = set()
        free = Counter(texts.labels)
        for row in waiting:
            lost = Counter(texts.labels[one] for one in same[row])
            if (
                row not in asked
                and free.total() - lost.total() >= k
                and all(free[label] - lost[label] >= kept[label] for label in lost)
            ):
                chosen.append(row)
                asked.update(same[row])
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
