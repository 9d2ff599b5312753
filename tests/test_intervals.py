"""Intervals against SciPy, normal approximations and literal resampling; McNemar against SciPy."""

import numpy as np
import pytest
from scipy import stats

from abft_mlx.evaluation import metrics
from abft_mlx.evaluation.metrics import bootstrap_interval, intervals, mcnemar

METRICS = (
    "accuracy", "macro_f1", "expected_calibration_error", "true_label_probability",
)  # fmt: skip


def width(ends):
    return ends[1] - ends[0]


def test_independent_prompts_give_the_normal_interval():
    values = np.random.default_rng(0).gamma(2.0, size=800)
    low, high = bootstrap_interval(values, np.arange(800), 4000)
    error = 1.96 * values.std() / np.sqrt(800)
    assert low == pytest.approx(values.mean() - error, abs=0.08 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.08 * error)


def test_independent_prompts_give_scipys_interval():
    values = np.random.default_rng(1).exponential(size=60)
    want = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=2, confidence_level=0.8
    ).confidence_interval
    got = bootstrap_interval(values, np.arange(60), 9999, seed=5, level=0.8)
    np.testing.assert_allclose(got, want, atol=0.03 * width(want))


def test_whole_groups_are_drawn():
    """Queries asked twice with the same outcome: the interval is wider by the root of two."""
    rng = np.random.default_rng(2)
    values = np.tile(rng.random(300), 2)
    apart = bootstrap_interval(values, np.arange(600), 4000)
    together = bootstrap_interval(values, np.arange(600) % 300, 4000)
    assert width(together) / width(apart) == pytest.approx(np.sqrt(2), rel=0.06)


def test_groups_that_cancel_leave_no_doubt():
    """The opposite: each query once right and once wrong, so any draw of queries gives a half."""
    values = np.repeat([1.0, 0.0], 50)
    assert bootstrap_interval(values, np.arange(100) % 50, 200) == (0.5, 0.5)
    assert width(bootstrap_interval(values, np.arange(100), 200)) > 0.1


def test_names_of_groups_do_not_matter_and_seeds_do():
    rng = np.random.default_rng(3)
    values, groups = rng.random(90), np.arange(90) % 30
    one = bootstrap_interval(values, groups, 500, seed=1)
    assert bootstrap_interval(values, groups * 7 - 50, 500, seed=1) == one
    assert bootstrap_interval(values, groups, 500, seed=2) != one


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(4)
    probabilities = rng.dirichlet([0.5] * 3, size=240)
    gold = np.where(rng.random(240) < 0.5, probabilities.argmax(axis=1), rng.integers(0, 3, 240))
    # Groups of unlike sizes.
    return probabilities, gold, rng.integers(0, 70, 240)


@pytest.mark.parametrize("compat", [False, True])
def test_every_metrics_interval_by_resampling_prompts(case, compat):
    """The same draws of groups, each resample written out and measured as a set of its own."""
    probabilities, gold, groups = case
    members = np.unique(groups)
    drawn = np.random.default_rng(9).multinomial(
        len(members), np.full(len(members), 1 / len(members)), 150
    )
    found = {name: [] for name in METRICS}
    for times in drawn:
        rows = [
            np.flatnonzero(groups == m)
            for m, t in zip(members, times, strict=True)
            for _ in range(t)
        ]
        rows = np.concatenate(rows)
        one = metrics.summary(probabilities[rows], gold[rows], compat=compat)
        for name in METRICS:
            found[name].append(one[name])
    got = intervals(probabilities, gold, groups, 150, 9, compat=compat)
    assert got.keys() == set(METRICS)
    for name in METRICS:
        want = np.percentile(found[name], [2.5, 97.5])
        np.testing.assert_allclose(got[name], want, atol=1e-12)
        assert isinstance(got[name], list)


def test_intervals_agree_with_the_interval_of_a_mean(case):
    probabilities, gold, groups = case
    right = probabilities.argmax(axis=1) == gold
    # More samples than are computed at once.
    got = intervals(probabilities, gold, groups, 2300, 6)["accuracy"]
    assert tuple(got) == bootstrap_interval(right, groups, 2300, 6)
    assert tuple(got) != bootstrap_interval(right, groups, 2000, 6)


def test_macro_f1s_interval_equals_scipys(case):
    probabilities, gold, _ = case
    predicted = probabilities.argmax(axis=1)

    def f1(some_gold, some_predicted):
        onehot = np.eye(3)[some_predicted]
        return metrics.macro_f1(onehot, some_gold)

    want = stats.bootstrap(
        (gold, predicted), f1, n_resamples=3000, paired=True, vectorized=False,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    got = intervals(probabilities, gold, np.arange(240), 3000, 1)["macro_f1"]
    np.testing.assert_allclose(got, want, atol=0.05 * width(want))


def outcomes(both, only_first, only_second, neither):
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(
    ("only_first", "only_second"),
    [(0, 1), (5, 0), (3, 3), (2, 9), (9, 2), (40, 61), (512, 512), (1800, 1700), (0, 2000)],
)
def test_mcnemar_is_the_two_sided_binomial_test(only_first, only_second):
    got = mcnemar(*outcomes(7, only_first, only_second, 4))
    want = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert (got["only_first"], got["only_second"]) == (only_first, only_second)
    assert got["p_value"] == pytest.approx(want, rel=1e-9)


def test_mcnemar_of_equals_and_of_unlike_lengths():
    assert mcnemar(*outcomes(5, 0, 0, 5)) == {"only_first": 0, "only_second": 0, "p_value": 1.0}
    with pytest.raises(ValueError, match="3 and 4 prompts"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))
