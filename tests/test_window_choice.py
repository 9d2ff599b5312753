"""Which layers hold the induction heads: the window of a census, without any model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx.induction import HeadCensus, Window, window


@pytest.mark.parametrize(
    ("heads", "found"),
    [
        ([0.0, 0.0, 5.0, 0.0], [2]),
        ([0.1, 4.0, 5.0, 0.2], [1, 2]),
        ([1.0, 1.0, 1.0], [0, 1, 2]),
        # Exactly 90%, though three times 0.3 is a hair less as a float.
        ([0.1, 0.3, 0.3, 0.3], [1, 2, 3]),
        ([1 / 3, 1 / 3, 7 / 3, 0.0], [0, 1, 2]),
        ([9.0, 0.0, 1.0], [0]),
        # Equally short: the one with most heads, and then the lowest.
        ([0.5, 9.0, 0.6, 0.0], [1, 2]),
        ([0.0, 1.0, 8.0, 1.0, 0.0], [1, 2]),
        # Layers without heads do not interrupt a run.
        ([0.0, None, 3.0, None, None, 2.0, None, 0.0], [2, 5]),
        ([4.0, None], [0]),
        ([0.0, None, 0.0], []),
        ([None], []),
    ],
)
def test_the_smallest_run_of_layers(heads: list[float | None], found: list[int]) -> None:
    assert window(heads) == found


def test_the_share_is_what_is_asked_for() -> None:
    assert window([3.0, 5.0, 2.0], 0.5) == [1]
    assert window([3.0, 5.0, 2.0], 0.51) == [0, 1]
    assert window([3.0, 5.0, 2.0], 1.0) == [0, 1, 2]


def census(*heads: int | None, prompts: int = 2) -> HeadCensus:
    """A census of layers of four heads, so many of which look at the one label in all prompts."""
    made = HeadCensus()
    rows = []
    for count in heads:
        row = np.zeros((prompts, 4, 10), dtype=np.float32)
        row[..., 9] = 1.0
        if count is not None:
            row[:, :count] = np.eye(10)[3]
        rows.append(None if count is None else mx.array(row))
    labels, last = mx.zeros((prompts, 1), dtype=mx.int32), mx.full((prompts,), 9)
    made.add(rows, labels + 3, labels, labels[:, 0], last)
    return made


def test_a_census_becomes_a_window() -> None:
    found = Window.of(census(0, None, 1, 3, 0))
    assert found == Window([2, 3], [0.0, None, 1.0, 3.0, 0.0], 2, 0.9)
    assert (found.heads, found.heads_inside) == (4.0, 4.0)
    assert Window.of(census(1, 4, 4, 4)).heads_inside == 12.0


def test_without_heads_all_layers_that_could_have_some() -> None:
    found = Window.of(census(0, None, 0))
    assert (found.layers, found.heads, found.prompts) == ([0, 2], 0.0, 2)


def test_a_window_of_another_share() -> None:
    found = Window.of(census(1, 4, 4, 4), 0.5)
    assert found == Window([1, 2], [1.0, 4.0, 4.0, 4.0], 2, 0.5)
    assert (found.heads, found.heads_inside) == (13.0, 8.0)
    # Headless layers count nothing, also among the chosen ones.
    assert Window([0, 1], [2.0, None, 1.0], 2).heads_inside == 2.0
    assert Window([0, 1], [2.0, None, 1.0], 2).heads == 3.0


def test_all_layers_are_the_last_answer() -> None:
    assert window([1.0, 1.0, 1.0], 0.99) == [0, 1, 2]
    assert window([0.5], 0.1) == [0]
    assert window([2.0, None], 0.0) == [0]
    assert window([], 0.9) == []
