"""Metrics against scikit-learn, against counting by hand, and StaICC's faults written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from abft_mlx.evaluation import metrics


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
    probabilities = rng.dirichlet([0.3] * labels, size=n)
    gold = rng.integers(0, labels, n)
    predicted = probabilities.argmax(axis=1)
    got = metrics.summary(probabilities, gold)
    names = list(range(labels))
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted))
    want = sk.f1_score(gold, predicted, average="macro", labels=names, zero_division=0)
    assert got["macro_f1"] == pytest.approx(want)
    assert got["confusion"] == sk.confusion_matrix(gold, predicted, labels=names).tolist()


def test_macro_f1_counts_an_absent_label_as_zero():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert metrics.macro_f1(probabilities, np.array([0, 1])) == pytest.approx(2 / 3)


def test_macro_f1_of_many_tables_at_once(case):
    probabilities, gold = case
    halves = [slice(0, 150), slice(150, 400)]
    tables = np.stack([metrics.confusion(probabilities[h], gold[h]) for h in halves])
    want = [metrics.macro_f1(probabilities[h], gold[h]) for h in halves]
    np.testing.assert_allclose(metrics.f1_of_confusion(tables), want)


def test_ties_go_to_the_lowest_label():
    assert metrics.predictions(np.array([[0.5, 0.5], [0.2, 0.8]])).tolist() == [0, 1]


def test_softmax_of_large_values():
    np.testing.assert_allclose(
        metrics.softmax(np.array([[1e4, 1e4 - math.log(3)]])), [[0.75, 0.25]]
    )


def test_calibration_error_by_hand():
    """Confidences .95, .95 (both right), .65 (right), 1.0 (wrong).

    Bin .9-1: three prompts, accuracy 2/3, confidence .9667; bin .6-.7: accuracy 1, confidence .65.
    """
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [1.0, 0.0]])
    gold = np.array([0, 0, 1, 1])
    want = 3 / 4 * abs(2 / 3 - 2.9 / 3) + 1 / 4 * 0.35
    assert metrics.expected_calibration_error(probabilities, gold) == pytest.approx(want)


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


def test_calibration_error_in_every_bin(case):
    probabilities, gold = case
    for labels in (2, 4):
        some = probabilities[:, :labels] / probabilities[:, :labels].sum(axis=1, keepdims=True)
        right = np.minimum(gold, labels - 1)
        want = literal_ece(some, right, last_holds_one=True)
        assert metrics.expected_calibration_error(some, right) == pytest.approx(want)


def test_reliability_equals_scikit_learn_bin_by_bin(case):
    probabilities, gold = case
    # A confidence of 1 belongs to the last bin.
    probabilities[:3] = np.eye(4)[gold[:3]]
    got = metrics.reliability(probabilities, gold)
    right = probabilities.argmax(axis=1) == gold
    accuracy, confidence = calibration_curve(right, probabilities.max(axis=1), n_bins=10)
    filled = [n for n, count in enumerate(got["count"]) if count]
    assert len(filled) == len(accuracy) >= 7
    np.testing.assert_allclose([got["accuracy"][n] for n in filled], accuracy)
    np.testing.assert_allclose([got["confidence"][n] for n in filled], confidence)
    for n in set(range(10)) - set(filled):
        assert got["accuracy"][n] is got["confidence"][n] is None
    assert sum(got["count"]) == len(gold)
    gaps = sum(
        got["count"][n] * abs(got["accuracy"][n] - got["confidence"][n]) for n in filled
    )  # fmt: skip
    assert gaps / len(gold) == pytest.approx(
        metrics.expected_calibration_error(probabilities, gold)
    )
    assert metrics.summary(probabilities, gold)["reliability"] == got


def test_reliability_with_the_faults_of_staicc():
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    got = metrics.reliability(probabilities, np.array([0, 1, 1]), compat=True)
    # Every row sums to exactly 1, so there is no second softmax, and 1.0 is in no bin.
    assert got["count"] == [0] * 10
    got = metrics.reliability(np.array([[0.3, 0.7 + 1e-9]]), np.array([1]), compat=True)
    assert got["count"].index(1) == 5
    assert got["confidence"][5] == pytest.approx(1 / (1 + math.exp(-0.4)))


@pytest.mark.parametrize("edge", range(6, 10))
def test_calibration_bins_at_their_edges(edge):
    """A confidence on an edge belongs above it; the next smaller number, below."""
    on, under = edge / 10, math.nextafter(edge / 10, 0)
    probabilities = np.array([[on, 1 - on], [under, 1 - under]])
    gaps = metrics.calibration_gaps(probabilities, np.array([1, 0]))
    assert np.flatnonzero(gaps[0]).tolist() == [edge]
    assert np.flatnonzero(gaps[1]).tolist() == [edge - 1]
    assert gaps.sum() == pytest.approx(1 - on - under)


def test_true_label_probability(case):
    probabilities, gold = case
    want = np.mean([row[label] for row, label in zip(probabilities, gold, strict=True)])
    assert metrics.true_label_probability(probabilities, gold) == pytest.approx(want)


def again(probabilities):
    """The second softmax, by hand."""
    powers = [[math.exp(value) for value in row] for row in probabilities.tolist()]
    return np.array([[one / sum(row) for one in row] for row in powers])


def test_compat_softmaxes_twice_for_likelihood_and_calibration_only(case):
    probabilities, gold = case
    right, faulty = (metrics.summary(probabilities, gold, compat=flag) for flag in (False, True))
    twice = again(probabilities)
    want = np.mean([row[label] for row, label in zip(twice, gold, strict=True)])
    assert faulty["true_label_probability"] == pytest.approx(want)
    want = literal_ece(twice, gold, last_holds_one=False)
    assert faulty["expected_calibration_error"] == pytest.approx(want)
    for name in ("true_label_probability", "expected_calibration_error"):
        assert abs(faulty[name] - right[name]) > 0.01
    for name in ("accuracy", "macro_f1", "confusion"):
        assert faulty[name] == right[name]


def test_compat_caps_the_confidence_of_two_classes():
    """protocol.md: two-class confidence is capped at 0.731."""
    probabilities = np.array([[1.0, 0.0], [0.3, 0.7 + 1e-9]])
    got = metrics.true_label_probability(probabilities, np.array([0, 1]), compat=True)
    assert got == pytest.approx((1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-0.4))) / 2)


def test_compat_believes_rows_that_sum_to_exactly_one_and_drops_certainty():
    """All rows sum to 1.0, so there is no second softmax, and confidence 1.0 is in no bin."""
    probabilities = np.array([[1.0, 0.0], [1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])
    gold = np.array([0, 1, 1, 0])
    assert metrics.true_label_probability(probabilities, gold, compat=True) == 2.25 / 4
    got = metrics.expected_calibration_error(probabilities, gold, compat=True)
    assert got == pytest.approx((0.25 + 0.5) / 4)
    got = metrics.expected_calibration_error(probabilities, gold)
    assert got == pytest.approx(2 / 4 * 0.5 + (0.25 + 0.5) / 4)


def test_compat_adds_a_row_up_from_left_to_right():
    """NumPy adds eight numbers in another order, and its sum may be 1.0 where Python's is not."""
    rng = np.random.default_rng(0)
    rows = rng.dirichlet([1.0] * 9, size=2000)
    left_to_right = np.zeros(len(rows))
    for column in rows.T:
        left_to_right = left_to_right + column
    differing = rows[(rows.sum(axis=1) == 1.0) & (left_to_right != 1.0)]
    assert len(differing)
    assert not np.array_equal(metrics.as_staicc(differing), differing)


def test_temperature_is_where_scipy_finds_the_labels_most_likely() -> None:
    source = np.random.default_rng(3)
    gold = source.integers(0, 3, 200)
    scores = 3 * (source.normal(size=(200, 3)) + np.eye(3)[gold])

    def loss(temperature: float) -> float:
        return float(-log_softmax(scores / temperature, axis=1)[np.arange(200), gold].mean())

    expected = minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x
    assert 0.5 < expected < 4.5
    assert abs(expected - 1) > 0.2
    assert metrics.temperature(softmax(scores), gold) == pytest.approx(expected, rel=1e-3)
    # Too few texts to know.
    assert metrics.temperature(softmax(scores[:20]), gold[:20]) == 1


def test_coverage_counts_the_texts_above_each_threshold() -> None:
    probabilities = np.array([[0.95, 0.05], [0.2, 0.8], [0.55, 0.45], [0.4, 0.6]])
    found = {
        one["threshold"]: one for one in metrics.coverage(probabilities, np.array([0, 0, 0, 1]))
    }
    assert (found[0.5]["coverage"], found[0.5]["accuracy"]) == (1, 0.75)
    assert (found[0.7]["coverage"], found[0.7]["accuracy"]) == (0.5, 0.5)
    assert (found[0.95]["coverage"], found[0.95]["accuracy"]) == (0.25, 1)
    assert (found[0.99]["coverage"], found[0.99]["accuracy"]) == (0, None)
