"""Batches and the prompts of a run: order, widths, kinds of numbers, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from made_tokenizers import gpt2
from test_prompts import builder_for, made, prompt

from abft_mlx.data import LabelledTexts, demonstration_rows, training_rows
from abft_mlx.errors import DataError, PromptError
from abft_mlx.prompts import Prompt, batches, evaluation_prompts, pad, training_prompts


def prompts_of(*lengths: int) -> list[Prompt]:
    """Prompts whose tokens, labels and targets tell them apart."""
    return [
        Prompt(
            tuple(range(100 * n, 100 * n + length)),
            (n % 3, n % 3 + 1),
            (n % 2, 1 - n % 2),
            n,
            tuple(range(50, 50 + n)),
        )
        for n, length in enumerate(lengths, start=1)
    ]


def test_a_batch_holds_int32_of_every_kind_behind_zeros() -> None:
    made = pad(prompts_of(3, 5), [1, 0, 1], 6)
    assert {one.name: getattr(made, one.name).tolist() for one in fields(made)} == {
        "tokens": [
            [200, 201, 202, 203, 204, 0],
            [100, 101, 102, 0, 0, 0],
            [200, 201, 202, 203, 204, 0],
        ],
        "last": [4, 2, 4],
        "label_positions": [[2, 3], [1, 2], [2, 3]],
        "demonstration_labels": [[0, 1], [1, 0], [0, 1]],
        "gold": [2, 1, 2],
        "target": [[50, 51], [50, -1], [50, 51]],
        "rows": [1, 0, 1],
    }
    assert {getattr(made, one.name).dtype for one in fields(made)} == {np.dtype(np.int32)}
    assert len(made) == 3


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_halves_are_the_same_prompts_in_order_and_no_wider(count: int) -> None:
    whole = pad(prompts_of(*range(3, 3 + count)), list(range(count)), 16)
    halves = whole.halves()
    assert [len(half) for half in halves] == [count // 2, count - count // 2]
    for one in fields(whole):
        parts = [getattr(half, one.name) for half in halves]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, one.name))


def test_longest_first_and_equal_ones_in_their_order() -> None:
    lengths = (9, 33, 12, 33, 9, 64)
    found = batches(prompts_of(*lengths), max_tokens=128)
    # T is a multiple of 32 unless another is asked for.
    assert [batch.tokens.shape for batch in found] == [(2, 64), (2, 64), (2, 32)]
    assert [batch.rows.tolist() for batch in found] == [[5, 1], [3, 2], [0, 4]]
    narrow = batches(prompts_of(*lengths), max_tokens=128, bucket_tokens=1)
    assert [batch.tokens.shape for batch in narrow] == [(2, 64), (3, 33), (1, 9)]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"max_tokens": 96}, [3, 2]),
        ({"max_tokens": 95}, [2, 2, 1]),
        # 32 cached tokens before each: only half as many.
        ({"max_tokens": 128, "cached_tokens": 32}, [2, 2, 1]),
        ({"max_tokens": 127, "cached_tokens": 32}, [1] * 5),
        # Longer than a batch may be: one of its own.
        ({"max_tokens": 1}, [1] * 5),
        ({"max_tokens": 999, "max_prompts": 4}, [4, 1]),
        ({"max_tokens": 999, "max_prompts": 1}, [1] * 5),
        ({"max_tokens": 999}, [5]),
    ],
)
def test_how_many_prompts_a_batch_has(options: dict[str, int], sizes: list[int]) -> None:
    found = batches(prompts_of(*[20] * 5), **options)
    assert [len(batch) for batch in found] == sizes


def test_prompts_of_unlike_demonstrations_share_no_batch() -> None:
    with pytest.raises(PromptError) as caught:
        batches([prompt(5, 2), prompt(5, 3)], max_tokens=10)
    assert str(caught.value) == "prompts with different numbers of demonstrations share no batch"


@pytest.mark.parametrize(
    ("rows", "together", "line"),
    [
        (
            4,
            1,
            "made.csv: 4 training rows are too few for 4 demonstrations and a query; add rows or "
            "lower prompt.demonstrations",
        ),
        (
            5,
            2,
            "made.csv: 5 training rows are too few for 4 demonstrations and 2 queries; add rows or "
            "lower prompt.demonstrations or training.shared_demonstrations",
        ),
        (
            6,
            3,
            "made.csv: 6 training rows are too few for 4 demonstrations and 3 queries; add rows or "
            "lower prompt.demonstrations or training.shared_demonstrations",
        ),
    ],
)
def test_too_few_training_rows_say_how_many_and_what_to_lower(
    rows: int, together: int, line: str
) -> None:
    builder = builder_for(gpt2())
    with pytest.raises(DataError) as caught:
        training_prompts(builder, made(rows), 2, 4, together=together)
    assert str(caught.value) == line
    assert len(training_prompts(builder, made(rows + 1), 2, 4, together=together)) == 2


def test_training_prompts_may_share_their_demonstrations() -> None:
    texts, builder = made(20), builder_for(gpt2())
    found = list(training_prompts(builder, texts, 5, 3, seed=8, together=2))
    drawn = training_rows(5, 20, 3, 8, 2)
    pairs = texts.pairs()
    assert found == [
        builder.build([pairs[row] for row in shown], *pairs[query]) for *shown, query in drawn
    ]
    assert drawn[0][:3] == drawn[1][:3] != drawn[2][:3]
    # The protocol's seed, and a query of its own for every prompt, unless others are asked for.
    assert list(training_prompts(builder, texts, 4, 3)) == [
        builder.build([pairs[row] for row in shown], *pairs[query])
        for *shown, query in training_rows(4, 20, 3, 42, 1)
    ]


def test_evaluation_prompts_may_be_fixed_and_begin_with_the_protocols_seed() -> None:
    shown, asked, builder = made(30), made(3), builder_for(gpt2())

    def drawn(**options: Any) -> list[Prompt]:
        rows = demonstration_rows(3, 2, 30, 4, 42, **options)
        return [
            builder.build([shown.pairs()[row] for row in one], *asked.pairs()[n % 3])
            for n, one in enumerate(rows)
        ]

    assert list(evaluation_prompts(builder, shown, asked, 3, 2, 4)) == drawn()
    fixed = evaluation_prompts(builder, shown, asked, 3, 2, 4, fixed=True)
    assert list(fixed) == drawn(fixed=True)
    assert drawn() != drawn(fixed=True)


@pytest.mark.parametrize(("shown", "asked"), [(0, 3), (4, 0)])
def test_an_evaluation_needs_demonstrations_and_queries(shown: int, asked: int) -> None:
    with pytest.raises(DataError) as caught:
        evaluation_prompts(builder_for(gpt2()), made(shown), made(asked), 2, 1, 2)
    assert str(caught.value) == (
        f"made.csv: {shown} demonstration rows and {asked} test rows; evaluation needs both"
    )


def test_a_prompt_that_cannot_be_is_named_by_its_number_and_rows() -> None:
    good = tuple(f"the film was {n}" for n in range(19))
    empty = LabelledTexts((*good, " "), (0,) * 20, ("positive", "negative"), "made.csv")
    drawn = training_rows(40, 20, 2, 42)
    first = next(number for number, rows in enumerate(drawn) if 19 in rows)
    assert first > 0
    with pytest.raises(PromptError) as caught:
        list(training_prompts(builder_for(gpt2()), empty, 40, 2))
    rows = ", ".join(f"row {row + 1}" for row in drawn[first])
    assert str(caught.value).startswith(f"training prompt {first} ({rows}): a text is empty")
    asked = LabelledTexts(("good", " "), (0, 1), ("positive", "negative"), "made.csv")
    with pytest.raises(PromptError, match=r"^evaluation prompt 1 \(test row 1\): a text is empty"):
        list(evaluation_prompts(builder_for(gpt2()), made(9), asked, 2, 2, 2))
    # The second repeat counts on, and its test rows begin again.
    second = next(
        seed
        for seed in range(200)
        if [1 in rows for rows in demonstration_rows(3, 2, 2, 1, seed)][:5] == [False] * 4 + [True]
    )
    with pytest.raises(PromptError, match=r"^evaluation prompt 4 \(test row 1\): a text is empty"):
        list(evaluation_prompts(builder_for(gpt2()), asked, made(3), 3, 2, 1, seed=second))
