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
