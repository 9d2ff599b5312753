"""Metrics against scikit-learn and against counting by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from abft_mlx.evaluation import metrics


@pytest.fixture
def case():
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.4] * 4, size=400)
    gold = np.where(rng.random(400) < 0.6, probabilities.argmax(axis=1), rng.integers(0, 3, 400))
    return probabilities, gold


def test_accuracy_f1_and_confusion_equal_scikit_learn(case):
    probabilities, gold = case
    predicted = probabilities.argmax(axis=1)
    got = metrics.summary(probabilities, gold)
    labels = list(range(4))
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted))
    want = sk.f1_score(gold, predicted, average="macro", labels=labels, zero_division=0)
    assert got["macro_f1"] == pytest.approx(want)
    assert got["confusion"] == sk.confusion_matrix(gold, predicted, labels=labels).tolist()


def test_macro_f1_counts_an_absent_label_as_zero():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert metrics.macro_f1(probabilities, np.array([0, 1])) == pytest.approx(2 / 3)


def test_ties_go_to_the_lowest_label():
    assert metrics.predictions(np.array([[0.5, 0.5], [0.2, 0.8]])).tolist() == [0, 1]


def test_calibration_error_by_hand():
    """Confidences .95, .95 (both right), .65 (right), 1.0 (wrong).

    Bin .9-1: three prompts, accuracy 2/3, confidence .9667; bin .6-.7: accuracy 1, confidence .65.
    """
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [1.0, 0.0]])
    gold = np.array([0, 0, 1, 1])
    want = 3 / 4 * abs(2 / 3 - 2.9 / 3) + 1 / 4 * 0.35
    assert metrics.expected_calibration_error(probabilities, gold) == pytest.approx(want)


def test_true_label_probability(case):
    probabilities, gold = case
    want = np.mean([row[label] for row, label in zip(probabilities, gold, strict=True)])
    assert metrics.true_label_probability(probabilities, gold) == pytest.approx(want)
