"""Head filter and census against loops in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx.induction import (
    HeadCensus,
    Window,
    head_filter,
    label_attention,
    threshold,
    window,
)


def test_threshold_is_the_papers():
    got = threshold(4, mx.array([83, 188, 1])).tolist()
    assert got == pytest.approx([4 / (4 + math.log(83)), 4 / (4 + math.log(188)), 1.0], rel=1e-6)
    assert 0.43 < got[1] < got[0] < 0.48


def test_label_attention_takes_the_named_positions():
    pattern = mx.arange(2 * 3 * 7).reshape(2, 3, 7).astype(mx.float32)
    got = label_attention(pattern, mx.array([[0, 5], [6, 2]]))
    assert got[0, 1].tolist() == [7.0, 12.0]
    assert got[1, 2].tolist() == [41.0, 37.0]


def test_the_filter_is_strict_and_per_prompt():
    limit = threshold(4, mx.array([50, 500]))
    mass = mx.stack([limit, limit + 1e-4], axis=1)
    assert head_filter(mass, mx.array([50, 500]), 4).tolist() == [[False, True], [False, True]]
    between = mx.array([[0.44], [0.44]])
    assert head_filter(between, mx.array([50, 500]), 4).tolist() == [[False], [True]]


def test_census_equals_loops_over_prompts_in_any_batches():
    rng = np.random.default_rng(5)
    N, K, T, heads = 9, 3, 25, (4, None, 2)
    last = rng.integers(15, T, N)
    positions = np.stack([np.sort(rng.choice(15, K, replace=False)) for _ in range(N)])
    labels, gold = rng.integers(0, 2, (N, K)), rng.integers(0, 2, N)
    rows = [None if h is None else rng.dirichlet([0.2] * T, (N, h)) for h in heads]
    census = HeadCensus()
    for part in (slice(0, 4), slice(4, 9)):
        census.add(
            [None if one is None else mx.array(one[part].astype(np.float32)) for one in rows],
            mx.array(positions[part]),
            mx.array(labels[part]),
            mx.array(gold[part]),
            mx.array(last[part]),
        )
    assert census.magnitude.shape == (3, 4)
    assert np.isnan(census.magnitude[1]).all()
    assert np.isnan(census.magnitude[2, 2:]).all()
    kept = 0
    for layer in (0, 2):
        for h in range(heads[layer]):
            mass, signed, share, first = [], [], [], []
            for b in range(N):
                a = rows[layer][b, h, positions[b]]
                mass.append(a.sum())
                first.append(rows[layer][b, h, 0])
                signed.append(
                    sum(x if y == gold[b] else -x for x, y in zip(a, labels[b], strict=True))
                )
                share.append(a.sum() > K / (K + math.log(last[b] + 1)))
            kept += sum(share)
            assert census.magnitude[layer, h] == pytest.approx(np.mean(mass), rel=1e-5)
            assert census.correctness[layer, h] == pytest.approx(np.mean(signed), abs=1e-6)
            assert census.sink[layer, h] == pytest.approx(np.mean(first), rel=1e-5)
            assert census.share[layer, h] == pytest.approx(np.mean(share))
    assert kept > 0
    assert census.heads_per_prompt == pytest.approx(kept / N)


def counted(rows, labels, gold, positions=(3, 5), last=9, census=None):
    """A census of prompts of ten tokens; rows per layer, (B, H, 10) or None."""
    census = HeadCensus() if census is None else census
    B = len(gold)
    census.add(
        [None if one is None else mx.array(np.asarray(one, dtype=np.float32)) for one in rows],
        mx.array([positions] * B),
        mx.array(labels),
        mx.array(gold),
        mx.full((B,), last),
    )
    return census


def row(**mass):
    """A pattern row with so much on the tokens t0 to t9."""
    made = np.zeros(10)
    for name, value in mass.items():
        made[int(name[1:])] = value
    return made


def test_a_census_by_hand():
    """Two prompts, one head; a mass that is no power of anything on a right and a wrong label."""
    seen = [[row(t0=0.25, t3=0.5, t5=0.25)], [row(t0=0.75, t3=0.25)]]
    census = counted([seen], [[1, 0], [1, 0]], [1, 0])
    assert census.prompts == 2
    assert census.magnitude.tolist() == [[0.5]]
    assert census.correctness.tolist() == [[0.0]]
    assert census.sink.tolist() == [[0.5]]
    # k / (k + ln n) is 0.46 for two labels in ten tokens.
    assert census.share.tolist() == [[0.5]]
    assert census.heads_by_layer == [0.5]
    counted([seen[:1]], [[1, 0]], [1], census=census)
    assert census.prompts == 3
    assert census.correctness.tolist() == [[pytest.approx(0.25 / 3)]]


def test_a_census_counts_a_prompts_length_from_its_last_position():
    """A head between the thresholds of n - 1, n and n + 1 tokens."""
    at, above = (2 / (2 + math.log(n)) for n in (10, 9))
    below = 2 / (2 + math.log(11))
    masses = [(below + at) / 2, (at + above) / 2]
    census = counted([[[row(t3=mass) for mass in masses]]], [[1, 0]], [1])
    assert census.share.tolist() == [[0.0, 1.0]]


def test_a_census_of_nothing_is_empty():
    empty = HeadCensus()
    for table in (empty.magnitude, empty.correctness, empty.share, empty.sink):
        assert table.shape == (0, 0)
    assert (empty.heads_by_layer, empty.heads_per_prompt, empty.prompts) == ([], 0.0, 0)
    headless = counted([None, None], [[1, 0]], [1])
    assert headless.magnitude.shape == (2, 0)
    assert headless.heads_by_layer == [None, None]
    assert (headless.heads_per_prompt, headless.prompts) == (0.0, 1)


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
def test_the_smallest_run_of_layers(heads, found):
    assert window(heads) == found


def test_a_window_of_another_share():
    assert window([3.0, 5.0, 2.0], 0.5) == [1]
    assert window([3.0, 5.0, 2.0], 0.51) == [0, 1]
    assert window([3.0, 5.0, 2.0], 1.0) == [0, 1, 2]


def census(*heads, prompts=2):
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


def test_a_census_becomes_a_window():
    found = Window.of(census(0, None, 1, 3, 0))
    assert found == Window([2, 3], [0.0, None, 1.0, 3.0, 0.0], 2, 0.9)
    assert (found.heads, found.heads_inside) == (4.0, 4.0)
    assert Window.of(census(1, 4, 4, 4)).heads_inside == 12.0


def test_without_heads_all_layers_that_could_have_some():
    found = Window.of(census(0, None, 0))
    assert (found.layers, found.heads, found.prompts) == ([0, 2], 0.0, 2)
