"""How updates are cut: every prompt once, few shapes, exact weights."""

from random import Random

import numpy as np
import pytest

from abft_mlx.prompts import Prompt
from abft_mlx.trainer.batches import micro_batches, rank_share, update_rows


def prompt(length, gold=0):
    return Prompt(tuple(range(1, length + 1)), (1, 3), (0, 1), gold, (3,))


def test_micro_batches_hold_every_prompt_once_in_one_shape_per_width():
    prompts = [prompt(n, gold=n) for n in (40, 9, 33, 12, 70, 31, 8, 64, 65, 10)]
    cut = micro_batches(prompts, 4, bucket_tokens=32)
    assert [one.shape for one in cut] == [(4, 32), (4, 64), (4, 96)]
    assert sum(one.prompts for one in cut) == 10
    seen = []
    for one in cut:
        for row in np.flatnonzero(one.weights):
            length = one.batch.last[row] + 1
            assert one.batch.tokens[row, :length].tolist() == list(range(1, length + 1))
            assert not one.batch.tokens[row, length:].any()
            assert one.batch.gold[row] == length
            seen.append(int(length))
    assert sorted(seen) == sorted(len(one.token_ids) for one in prompts)
    assert sum(one.tokens for one in cut) == sum(seen)


def test_updates_pass_over_all_examples_in_orders_of_their_own():
    rows = [row for update in range(6) for row in update_rows(10, 4, update, seed=3)]
    first, second = rows[:10], rows[10:20]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != list(range(10))
    assert update_rows(10, 4, 1, seed=3) == rows[4:8]
    assert update_rows(10, 4, 1, seed=4) != rows[4:8]


def test_an_update_may_need_more_than_one_pass():
    rows = update_rows(3, 7, 0, seed=0)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert len(rows) == 7


def groups(lengths, m=4):
    """Groups of m prompts, of which all but the last five tokens are shared, and a little more."""
    made = []
    for length in lengths:
        for number in range(m):
            rest = (900 + number, *range(500, 504 + number % 2))
            made.append(Prompt((*range(1, length - 4), *rest), (1, 3), (0, 1), number, (3,)))
    return made


def test_where_lengths_are_rounded_few_shapes_occur():
    shapes = set()
    for lengths in ((40, 70, 71, 75, 100), (70, 41, 98, 77, 69), (40, 40, 71, 100, 100)):
        prompts = groups(lengths)
        cut = micro_batches(prompts, 32, together=4, bucket_tokens=32)
        assert sum(one.prompts for one in cut) == 20
        assert sum(one.tokens for one in cut) == sum(len(one.token_ids) for one in prompts)
        shapes |= {(one.batch.tokens.shape, one.prefix.shape) for one in cut}
    # Nine micro-batches of two groups, whatever comes together in an update.
    assert shapes == {((8, one), (2, other)) for one in (32, 64) for other in (32, 64)}


def test_where_they_are_not_all_that_is_shared_is_computed_once():
    cut = micro_batches(groups((40, 70, 40, 71, 70)), 8, together=4, bucket_tokens=1)
    assert [one.prefix.shape for one in cut] == [(2, 35), (2, 65), (1, 66)]
    assert all(one.weights.all() for one in cut)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_an_update_evenly(size):
    source = Random(size)
    groups = source.sample(range(100), 11)
    lengths = [source.randrange(20, 40) for _ in groups]
    parts = [rank_share(groups, lengths, rank, size) for rank in range(size)]
    assert sorted(group for part in parts for group in part) == sorted(groups)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    tokens = dict(zip(groups, lengths, strict=True))
    assert [tokens[part[0]] for part in parts] == sorted(lengths)[:size]
