"""The simple classifiers, against scikit-learn's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from abft_mlx.evaluation import bag_of_words, baselines, majority


def made(n: int, classes: int, seed: int) -> tuple[list[str], list[int]]:
    """Texts of made words, some of which a class uses more often."""
    rng = random.Random(seed)
    words = [f"word{number}" for number in range(60)] + ["I", "Ärger", "Don't"]
    labels = [number % classes for number in range(n)]
    rng.shuffle(labels)
    texts = []
    for label in labels:
        own = words[label * 5 : label * 5 + 5]
        texts.append(" ".join([*rng.choices(words, k=8), *rng.choices(own, k=2)]).capitalize())
    return texts, labels


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("inverse_penalty", [1.0, 10.0])
def test_bag_of_words_is_the_pipeline_of_scikit_learn(
    classes: int, inverse_penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, labels = made(150, classes, 1)
    asked, gold = made(100, classes, 2)
    asked = [*asked, "nothing known", "", "word1"]
    regression = LogisticRegression(C=inverse_penalty, tol=1e-8, max_iter=10_000)
    pipeline = make_pipeline(TfidfVectorizer(), regression).fit(texts, labels)
    expected = pipeline.predict_proba(asked)
    roughly = bag_of_words(texts, labels, asked, classes, inverse_penalty)
    np.testing.assert_allclose(roughly, expected, atol=0.02)
    monkeypatch.setattr(baselines, "TOLERANCE", 1e-8)
    found = bag_of_words(texts, labels, asked, classes, inverse_penalty)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    accuracy = (found[:100].argmax(axis=1) == gold).mean()
    assert accuracy == pipeline.score(asked[:100], gold) > 1.5 / classes


def test_a_class_without_training_texts_has_no_probability() -> None:
    texts, labels = made(60, 2, 1)
    found = bag_of_words(texts, [3 * label for label in labels], texts, 5)
    assert found.shape == (60, 5)
    np.testing.assert_allclose(found[:, [0, 3]], bag_of_words(texts, labels, texts, 2))
    assert not found[:, [1, 2, 4]].any()
    assert bag_of_words(["a text"], [1], ["any", "text"], 2).tolist() == [[0, 1], [0, 1]]


def test_texts_without_words_get_the_shares_of_the_classes() -> None:
    found = bag_of_words(["?", "!", "...", ""], [0, 0, 0, 1], ["?!", "some words"], 2)
    np.testing.assert_allclose(found, [[0.75, 0.25]] * 2, atol=1e-3)
    assert bag_of_words(["good one", "bad one"], [0, 1], [], 2).shape == (0, 2)


def test_majority() -> None:
    assert majority([2, 0, 2, 1]) == 2
    assert majority([1, 0, 0, 1]) == 0
