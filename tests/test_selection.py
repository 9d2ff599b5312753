"""Which texts a prompt demonstrates: balanced and nearest ones, and that none is its own query."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from made_tokenizers import gpt2
from sklearn.feature_extraction.text import TfidfVectorizer
from test_prompts import builder_for

from abft_mlx.data import (
    LabelledTexts,
    Nearest,
    balanced,
    evaluation_draws,
    fold,
    training_draws,
)
from abft_mlx.errors import DataError, RecipeError
from abft_mlx.prompts import evaluation_prompts, training_prompts

WORDS = (
    "sink", "leaks", "water", "heater", "chair", "paint", "fence", "roof", "door", "garden",
    "light", "wall", "pipe",
)  # fmt: skip


def texts(*counts: int, seed: int = 3) -> LabelledTexts:
    """Made sentences, so many of each class, in random order."""
    rng = random.Random(seed)
    rows = [label for label, count in enumerate(counts) for _ in range(count)]
    rng.shuffle(rows)
    made = tuple(" ".join(rng.choices(WORDS, k=5)) + f" {row}" for row in range(len(rows)))
    names = tuple(f"class {label}" for label in range(len(counts)))
    return LabelledTexts(made, tuple(rows), names, "made.csv")


@pytest.mark.parametrize(
    ("k", "counts"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (6, [3, 2, 1]), (2, [1, 1, 0])]
)
def test_balanced_takes_classes_in_turn_as_far_as_they_go(k: int, counts: list[int]) -> None:
    labels = ["a"] * 20 + ["b"] * 2 + ["c"]
    for seed in range(20):
        rows = balanced(labels, k, random.Random(seed))
        assert len(set(rows)) == k
        found = Counter(labels[row] for row in rows)
        assert sorted((found[name] for name in "abc"), reverse=True) == counts
    assert balanced(labels, k, random.Random(1)) == balanced(labels, k, random.Random(1))


def test_nearest_ranks_as_scikit_learn_does() -> None:
    pool = [*texts(40).texts, "Heater, heater: HEATER!", "a b c", "", "Käse über Zürich"]
    queries = ["the roof leaks Water", "käse in zürich", "pipe " * 4 + "door"]
    vectorizer = TfidfVectorizer()
    known = vectorizer.fit_transform(pool)
    nearest = Nearest(pool)
    for query in queries:
        similarity = (known @ vectorizer.transform([query]).T).toarray()[:, 0].round(9)
        expected = np.argsort(-similarity, kind="stable")[:10]
        assert nearest.rows(query, 10) == tuple(expected[::-1].tolist())
        without = [row for row in np.argsort(-similarity, kind="stable") if row != expected[0]]
        assert nearest.rows(query, 3, exclude=[expected[0]]) == tuple(without[:3][::-1])
    assert len(nearest.rows("", 4)) == 4
    with pytest.raises(DataError, match="too few for 44 demonstrations"):
        nearest.rows("roof", 44, exclude=[1])


@pytest.mark.parametrize("counts", [(8, 7), (5, 5, 5), (4, 4, 4, 3), (12, 2, 1), (300, 200)])
@pytest.mark.parametrize("together", [1, 8])
def test_balanced_groups_share_a_set_that_holds_no_query(
    counts: tuple[int, ...], together: int
) -> None:
    made = texts(*counts)
    k = 2 * len(counts)
    drawn = training_draws(made, 160, k, 7, together, "balanced")
    assert len(drawn) == 160
    for first in range(0, 160, together):
        group = drawn[first : first + together]
        shown = {rows[:k] for rows in group}
        assert len(shown) == 1
        (demonstrations,) = shown
        assert len(set(demonstrations)) == k
        assert not {rows[k] for rows in group} & set(demonstrations)
        labels = Counter(made.labels[row] for row in demonstrations)
        for label, count in enumerate(counts):
            assert labels[label] >= min(1, count - 1)
    assert drawn == training_draws(made, 160, k, 7, together, "balanced")
    assert drawn[0][:k] != drawn[together][:k]
    assert drawn != training_draws(made, 160, k, 8, together, "balanced")


def test_queries_pass_evenly_through_the_training_rows() -> None:
    made = texts(40, 24)
    for selection, together in (("balanced", 8), ("balanced", 1), ("nearest", 1)):
        drawn = training_draws(made, 128, 4, 7, together, selection)
        asked = Counter(rows[-1] for rows in drawn)
        assert set(asked.values()) == {2}
        assert len(asked) == 64
        assert [rows[-1] for rows in drawn[:64]] != sorted(rows[-1] for rows in drawn[:64])


def test_a_copy_of_the_query_is_no_demonstration() -> None:
    made = texts(6, 6)
    copies = tuple(text.upper() + "!" for text in made.texts)
    both = LabelledTexts(made.texts + copies, made.labels * 2, made.names, "made.csv")
    for selection, together in (("balanced", 6), ("nearest", 1)):
        drawn = training_draws(both, 96, 4, 1, together, selection)
        for first in range(0, 96, together):
            group = drawn[first : first + together]
            asked = {fold(both.texts[rows[4]]) for rows in group}
            assert not asked & {fold(both.texts[row]) for row in group[0][:4]}
    (shown,) = evaluation_draws(both, [made.texts[2].title()], 1, 3, 1, selection="nearest")
    assert not {2, 14} & set(shown)
    alike = LabelledTexts(("same",) * 9 + ("one",), (0, 1) * 5, ("a", "b"), "made.csv")
    with pytest.raises(DataError, match="copies"):
        training_draws(alike, 8, 4, 1, 1, "balanced")


def test_nearest_shows_the_most_similar_text_next_to_each_query() -> None:
    made = texts(20, 20)
    nearest = Nearest(made.texts)
    for *shown, query in training_draws(made, 40, 3, 5, 1, "nearest"):
        assert tuple(shown) == nearest.rows(made.texts[query], 3, [query])
    asked = ["the roof leaks", "paint the wall"]
    drawn = evaluation_draws(made, asked, 2, 3, 5, selection="nearest")
    assert drawn == [nearest.rows(text, 3) for text in asked] * 2
    with pytest.raises(RecipeError, match="shared_demonstrations is 8"):
        training_draws(made, 40, 3, 5, 8, "nearest")
    with pytest.raises(RecipeError, match="fixed"):
        evaluation_draws(made, asked, 2, 3, 5, selection="nearest", fixed=True)


def test_balanced_evaluation_draws_anew_for_every_run_of_queries() -> None:
    pool = texts(30, 30, 30)
    asked = [f"text {number}" for number in range(150)]
    drawn = evaluation_draws(pool, asked, 2, 6, 5, selection="balanced")
    assert len(drawn) == 300
    starts = [0, *(n for n in range(1, 300) if drawn[n] != drawn[n - 1])]
    assert starts == [0, 64, 128, 150, 214, 278]
    assert len(set(drawn)) == 6
    fixed = evaluation_draws(pool, asked, 2, 6, 5, selection="balanced", fixed=True)
    assert len(set(fixed[:150])) == len(set(fixed[150:])) == 1
    assert fixed[0] != fixed[150]
    for rows in {*drawn, *fixed}:
        assert Counter(pool.labels[row] for row in rows) == {0: 2, 1: 2, 2: 2}
    # A pool smaller than k is shown whole.
    (few,) = evaluation_draws(texts(2, 1), ["text"], 1, 6, 5, selection="balanced")
    assert sorted(few) == [0, 1, 2]


@pytest.mark.parametrize(("selection", "together"), [("balanced", 2), ("nearest", 1)])
def test_prompts_show_what_was_drawn(selection: str, together: int) -> None:
    made, builder = texts(12, 12), builder_for(gpt2())
    pairs = made.pairs()
    assert list(training_prompts(builder, made, 6, 4, 3, together, selection)) == [
        builder.build([pairs[row] for row in shown], *pairs[query])
        for *shown, query in training_draws(made, 6, 4, 3, together, selection)
    ]
    asked = made.subset(range(3))
    drawn = evaluation_draws(made, asked.texts, 2, 4, 3, selection=selection)
    prompts = evaluation_prompts(builder, made, asked, 9, 2, 4, 3, selection=selection)
    assert list(prompts) == [
        builder.build([pairs[row] for row in rows], *pairs[number % 3])
        for number, rows in enumerate(drawn)
    ]
