"""Head filter and census against loops in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx.induction import HeadCensus, head_filter, label_attention, threshold


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


def test_a_census_keeps_its_sums_in_float64():
    census = HeadCensus()
    value = np.float32(0.7)
    for _ in range(1000):
        counted([[[row(t0=0.1, t3=value)]]], [[1, 0]], [1], census=census)
    assert census.magnitude.dtype == np.float64
    assert census.magnitude[0, 0] == pytest.approx(float(value), rel=1e-12)
    assert census.sink[0, 0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_a_census_of_nothing_is_empty():
    empty = HeadCensus()
    for table in (empty.magnitude, empty.correctness, empty.share, empty.sink):
        assert table.shape == (0, 0)
    assert (empty.heads_by_layer, empty.heads_per_prompt, empty.prompts) == ([], 0.0, 0)
    headless = counted([None, None], [[1, 0]], [1])
    assert headless.magnitude.shape == (2, 0)
    assert headless.heads_by_layer == [None, None]
    assert (headless.heads_per_prompt, headless.prompts) == (0.0, 1)
