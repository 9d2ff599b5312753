"""Metrics, intervals and McNemar against scikit-learn, SciPy and counting by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from abft_mlx.evaluation import metrics
from abft_mlx.evaluation.metrics import bootstrap_interval, intervals, mcnemar, summary

METRICS = ("accuracy", "macro_f1", "expected_calibration_error", "true_label_probability")


@pytest.fixture
def case():
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.4] * 4, size=400)
    gold = np.where(rng.random(400) < 0.6, probabilities.argmax(axis=1), rng.integers(0, 3, 400))
    return probabilities, gold


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 10**6))
def test_accuracy_f1_and_confusion_equal_scikit_learn(labels, n, seed):
    """Few prompts and many labels: some label is often neither gold nor predicted."""
    rng = np.random.default_rng(seed)
    probabilities, gold = rng.dirichlet([0.3] * labels, size=n), rng.integers(0, labels, n)
    predicted, names = probabilities.argmax(axis=1), list(range(labels))
    got = summary(probabilities, gold)
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted))
    want = sk.f1_score(gold, predicted, average="macro", labels=names, zero_division=0)
    assert got["macro_f1"] == pytest.approx(want)
    assert got["confusion"] == sk.confusion_matrix(gold, predicted, labels=names).tolist()
    assert got["true_label_probability"] == pytest.approx(probabilities[np.arange(n), gold].mean())
    right = metrics.right_answers(metrics.right_string(probabilities, gold))
    assert right.tolist() == (predicted == gold).tolist()


def literal_ece(probabilities, gold, *, last_holds_one):
    """protocol.md, section 3, with nothing vectorised."""
    error = 0.0
    for number in range(10):
        low, high = number / 10, (number + 1) / 10
        inside = [
            (max(row), int(np.argmax(row) == label))
            for row, label in zip(probabilities.tolist(), gold, strict=True)
            if low <= max(row) < high or (last_holds_one and number == 9 and max(row) == 1.0)
        ]
        if inside:
            confidence = sum(one for one, _ in inside) / len(inside)
            right = sum(one for _, one in inside) / len(inside)
            error += len(inside) / len(gold) * abs(right - confidence)
    return error


@pytest.mark.parametrize("labels", [2, 4])
def test_calibration_in_every_bin(case, labels):
    """Bins [low, high), on their edges and just below, and a confidence of 1 in the last."""
    probabilities = case[0][:, :labels] / case[0][:, :labels].sum(axis=1, keepdims=True)
    gold = np.minimum(case[1], labels - 1)
    probabilities[:3] = np.eye(labels)[gold[:3]]
    for row, edge in enumerate((0.6, 0.7, 0.8, 0.9)):
        for place, on in enumerate((edge, math.nextafter(edge, 0))):
            probabilities[10 + 2 * row + place] = [on, 1 - on, *[0] * (labels - 2)]
    got = summary(probabilities, gold)
    want = literal_ece(probabilities, gold, last_holds_one=True)
    assert got["expected_calibration_error"] == pytest.approx(want)
    bins, right = got["reliability"], probabilities.argmax(axis=1) == gold
    accuracy, _ = calibration_curve(right, probabilities.max(axis=1), n_bins=10)
    filled = [n for n, count in enumerate(bins["count"]) if count]
    gaps = sum(bins["count"][n] * abs(bins["accuracy"][n] - bins["confidence"][n]) for n in filled)
    assert gaps / len(gold) == pytest.approx(want)
    assert sum(bins["count"]) == len(gold)
    assert all(bins["accuracy"][n] is None for n in set(range(10)) - set(filled))
    assert len(filled) == len(accuracy) >= 5


def test_compat_softmaxes_twice_for_likelihood_and_calibration_only(case):
    probabilities, gold = case
    right, faulty = (summary(probabilities, gold, compat=flag) for flag in (False, True))
    twice = softmax(probabilities, axis=1)
    assert faulty["true_label_probability"] == pytest.approx(twice[np.arange(400), gold].mean())
    want = literal_ece(twice, gold, last_holds_one=False)
    assert faulty["expected_calibration_error"] == pytest.approx(want)
    assert abs(faulty["expected_calibration_error"] - right["expected_calibration_error"]) > 0.01
    for name in ("accuracy", "macro_f1", "confusion"):
        assert faulty[name] == right[name]


def test_compat_believes_rows_that_sum_to_exactly_one_and_drops_certainty():
    """All rows sum to 1.0, so there is no second softmax, and confidence 1.0 is in no bin."""
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    gold = np.array([0, 1, 1, 0])
    got = summary(probabilities, gold, compat=True)
    assert got["true_label_probability"] == 2.25 / 4
    assert got["expected_calibration_error"] == pytest.approx((0.25 + 0.5) / 4)
    assert got["reliability"]["count"] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]
    got = summary(probabilities, gold)
    assert got["expected_calibration_error"] == pytest.approx(2 / 4 * 0.5 + (0.25 + 0.5) / 4)


def test_compat_adds_a_row_up_from_left_to_right():
    """NumPy adds eight numbers in another order, and its sum may be 1.0 where Python's is not."""
    rows = np.random.default_rng(0).dirichlet([1.0] * 9, size=2000)
    left_to_right = sum(rows.T, np.zeros(len(rows)))
    differing = rows[(rows.sum(axis=1) == 1.0) & (left_to_right != 1.0)]
    assert len(differing)
    assert not np.array_equal(metrics.as_staicc(differing), differing)


def test_temperature_is_where_scipy_finds_the_labels_most_likely():
    source = np.random.default_rng(3)
    gold = source.integers(0, 3, 200)
    scores = 3 * (source.normal(size=(200, 3)) + np.eye(3)[gold])

    def loss(temperature):
        return float(-log_softmax(scores / temperature, axis=1)[np.arange(200), gold].mean())

    expected = minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x
    assert abs(expected - 1) > 0.2
    probabilities = softmax(scores, axis=1)
    assert metrics.temperature(probabilities, gold) == pytest.approx(expected, rel=1e-3)
    # Too few texts to know.
    assert metrics.temperature(probabilities[:20], gold[:20]) == 1


def test_coverage_counts_the_texts_above_each_threshold():
    probabilities = np.array([[0.95, 0.05], [0.2, 0.8], [0.55, 0.45], [0.4, 0.6]])
    rows = metrics.coverage(probabilities, np.array([0, 0, 0, 1]))
    found = {row["threshold"]: (row["coverage"], row["accuracy"]) for row in rows}
    expected = {0.5: (1, 0.75), 0.7: (0.5, 0.5), 0.95: (0.25, 1), 0.99: (0, None)}
    assert {threshold: found[threshold] for threshold in expected} == expected


def test_the_interval_of_a_mean_is_scipys():
    values = np.random.default_rng(1).exponential(size=60)
    want = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=2, confidence_level=0.8
    ).confidence_interval
    got = bootstrap_interval(values, np.arange(60), 9999, seed=5, level=0.8)
    np.testing.assert_allclose(got, want, atol=0.03 * (want[1] - want[0]))


def test_whole_groups_are_drawn():
    """Queries asked twice with the same outcome widen the interval by the root of two."""
    values = np.tile(np.random.default_rng(2).random(300), 2)
    low, high = bootstrap_interval(values, np.arange(600), 4000)
    lowest, highest = bootstrap_interval(values, np.arange(600) % 300, 4000)
    assert (highest - lowest) / (high - low) == pytest.approx(np.sqrt(2), rel=0.06)
    # Each query once right and once wrong: any draw of queries gives a half.
    assert bootstrap_interval(np.repeat([1.0, 0.0], 50), np.arange(100) % 50, 200) == (0.5, 0.5)


@pytest.mark.parametrize("compat", [False, True])
def test_every_metrics_interval_by_resampling_prompts(case, compat):
    """The same draws of groups, each resample written out and measured as a set of its own."""
    probabilities, gold = case
    groups = np.random.default_rng(4).integers(0, 70, 400)  # of unlike sizes
    members = np.unique(groups)
    share = np.full(len(members), 1 / len(members))
    drawn = np.random.default_rng(9).multinomial(len(members), share, 150)
    found = {name: [] for name in METRICS}
    for times in drawn:
        rows = np.repeat(np.arange(400), times[np.searchsorted(members, groups)])
        one = summary(probabilities[rows], gold[rows], compat=compat)
        for name in METRICS:
            found[name].append(one[name])
    got = intervals(probabilities, gold, groups, 150, 9, compat=compat)
    assert got.keys() == set(METRICS)
    for name in METRICS:
        np.testing.assert_allclose(got[name], np.percentile(found[name], [2.5, 97.5]), atol=1e-12)
    # More samples than are computed at once.
    right = probabilities.argmax(axis=1) == gold
    got = intervals(probabilities, gold, groups, 2300, 6)["accuracy"]
    assert tuple(got) == pytest.approx(bootstrap_interval(right, groups, 2300, 6), abs=1e-12)


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 1), (3, 3), (2, 9), (9, 2), (512, 512), (1800, 1700)]
)
def test_mcnemar_is_the_two_sided_binomial_test(only_first, only_second):
    both = [(True, True)] * 7 + [(False, False)] * 4
    pairs = np.array(both + [(True, False)] * only_first + [(False, True)] * only_second)
    got = mcnemar(pairs[:, 0], pairs[:, 1])
    want = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
    assert (got["only_first"], got["only_second"]) == (only_first, only_second)
    assert got["p_value"] == pytest.approx(want, rel=1e-9)
    assert mcnemar(pairs[:5, 0], pairs[:5, 1])["p_value"] == 1
    with pytest.raises(ValueError, match="3 and 4 prompts"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))
