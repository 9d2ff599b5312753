"""Means, spreads, bootstraps and paired tests of a study, against NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from abft_mlx.analysis import statistics


class TestStatistics:
    def test_spread_is_the_sample_standard_deviation(self) -> None:
        values = [0.1, 0.5, 0.4]
        mean, spread = statistics.mean_and_spread(values)
        assert mean == pytest.approx(np.mean(values))
        assert spread == pytest.approx(np.std(values, ddof=1))
        assert statistics.mean_and_spread([0.25]) == (0.25, None)

    def test_shares_group_prompts_by_query(self) -> None:
        # Prompt i has query i modulo Q: here queries 0, 1, 2 asked twice.
        np.testing.assert_array_equal(statistics.share_right("100110", 3), [1, 0.5, 0])
        np.testing.assert_array_equal(statistics.share_right("110", 2), [1, 1, 0])

    def test_one_seed_agrees_with_a_bootstrap_of_scipy(self) -> None:
        shares = np.random.default_rng(0).choice([0, 0.5, 1], size=300, p=[0.2, 0.3, 0.5])
        ours = statistics.bootstrap([shares[None]])
        theirs = stats.bootstrap(
            (shares,), np.mean, n_resamples=4000, method="percentile", rng=1
        ).confidence_interval
        assert ours.mean == pytest.approx(shares.mean())
        assert ours.low == pytest.approx(theirs.low, abs=0.005)
        assert ours.high == pytest.approx(theirs.high, abs=0.005)

    def test_seeds_and_queries_both_widen(self) -> None:
        random_ = np.random.default_rng(3)
        Q, S = 400, 8
        seed_effect, query_effect = random_.normal(0, 0.1, (S, 1)), random_.normal(0, 0.2, (1, Q))
        shares = 0.5 + seed_effect + query_effect
        made = statistics.bootstrap([shares])
        error = np.sqrt(seed_effect.var() / S + query_effect.var() / Q)
        assert (made.high - made.low) / (2 * stats.norm.ppf(0.975)) == pytest.approx(
            error, rel=0.08
        )

    def test_a_difference_cancels_what_both_sides_share(self) -> None:
        shares = np.random.default_rng(4).random((3, 200))
        made = statistics.bootstrap([shares + 0.1], [shares])
        assert (made.low, made.high) == pytest.approx((0.1, 0.1))
        # Against an untrained base only the seeds' own spread cancels not.
        base = shares.mean(axis=0, keepdims=True)
        made = statistics.bootstrap([np.repeat(base, 3, axis=0) + 0.1], [base])
        assert (made.mean, made.low, made.high) == pytest.approx((0.1, 0.1, 0.1))

    def test_tasks_are_averaged_and_not_drawn(self) -> None:
        sure = [np.full((2, 50), value) for value in (0.2, 0.6, 1.0)]
        made = statistics.bootstrap(sure)
        assert (made.mean, made.low, made.high) == pytest.approx((0.6, 0.6, 0.6))

    def test_mcnemar_is_pooled_and_exact(self) -> None:
        first, second = ["1110", "1111"], ["0110", "0101"]
        expected = stats.binomtest(0, 3, 0.5).pvalue
        assert statistics.pooled_mcnemar(first, second) == pytest.approx(expected)
        assert statistics.pooled_mcnemar(first, first) == 1
