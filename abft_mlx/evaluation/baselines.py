"""What a classifier has to beat (majority, bag of words), and the verdict whether it does.

The bag of words is scikit-learn's usual pipeline, ``make_pipeline(TfidfVectorizer(),
LogisticRegression(C=10))``, in NumPy: scikit-learn with SciPy would add over 100 MB to the install.

Letters: N training texts, V words, C classes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from abft_mlx.data import TfIdf, Vectors
from abft_mlx.evaluation.metrics import mcnemar, right_answers, softmax

# scikit-learn's C: the inverse strength of the L2 penalty.
INVERSE_PENALTY = 10.0
# The fit ends when no part of the gradient of the mean loss is larger (scikit-learn: 1e-4).
TOLERANCE, MOST_STEPS = 1e-5, 1000
# Differences with a larger p-value count as none.
SIGNIFICANT = 0.05
BETTER, SAME, WORSE = "better", "no clear difference", "worse"


def majority(labels: Sequence[int]) -> int:
    """The most frequent class, of at least one; of equally frequent ones the first."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def bag_of_words(
    train_texts: Sequence[str],
    train_labels: Sequence[int],
    test_texts: Sequence[str],
    classes: int,
    inverse_penalty: float = INVERSE_PENALTY,
) -> np.ndarray:
    """Label probabilities by TF-IDF vectors of words and L2-penalised logistic regression.

    Of N >= 1 training texts with class numbers below ``classes``, and of M test texts.

    Returns:
        (M, C) float64; a class without training texts has probability 0.
    """
    present, gold = np.unique(train_labels, return_inverse=True)
    probabilities = np.zeros((len(test_texts), classes))
    if len(present) == 1:
        probabilities[:, present] = 1
        return probabilities
    tfidf = TfIdf(train_texts)
    train, test = _Matrix(tfidf.vectors(train_texts)), _Matrix(tfidf.vectors(test_texts))
    count, width = train.shape
    # Of two classes only the second has weights.
    first = 1 if len(present) == 2 else 0
    penalty = np.full((width, 1), 1 / (inverse_penalty * count))
    penalty[-1] = 0  # the intercepts

    def chances(matrix: _Matrix, weights: np.ndarray) -> np.ndarray:
        logits = matrix.times(weights)
        return softmax(np.pad(logits, ((0, 0), (first, 0))))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        errors = chances(train, weights)
        likelihood = np.log(np.maximum(errors[np.arange(count), gold], 1e-300)).mean()
        errors[np.arange(count), gold] -= 1
        gradient = train.transposed_times(errors[:, first:]) / count + penalty * weights
        return (penalty * weights**2).sum() / 2 - likelihood, gradient

    weights = _minimum(loss, np.zeros((width, len(present) - first)))
    probabilities[:, present] = chances(test, weights)
    return probabilities


class _Matrix:
    """A sparse (N, V + 1) matrix: TF-IDF vectors, and a last column of ones."""

    def __init__(self, vectors: Vectors) -> None:
        count, width = vectors.shape
        self.shape = count, width + 1
        rows = np.concatenate([vectors.rows, np.arange(count)])
        columns = np.concatenate([vectors.columns, np.full(count, width)])
        values = np.concatenate([vectors.values, np.ones(count)])
        self._by_row = _sorted(rows, columns, values)
        self._by_column = _sorted(columns, rows, values)

    def times(self, weights: np.ndarray) -> np.ndarray:
        """(N, K) of a (V + 1, K) matrix."""
        return _product(*self._by_row, weights)

    def transposed_times(self, errors: np.ndarray) -> np.ndarray:
        """(V + 1, K) of an (N, K) matrix, where every word occurs."""
        return _product(*self._by_column, errors)


def _sorted(
    to: np.ndarray, of: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries of a sparse matrix in order of ``to``, and where each of its numbers begins."""
    order = np.argsort(to, kind="stable")
    return np.unique(to[order], return_index=True)[1], of[order], values[order]


def _product(
    starts: np.ndarray, of: np.ndarray, values: np.ndarray, matrix: np.ndarray
) -> np.ndarray:
    """A sparse matrix times another, column by column, which is fastest."""
    columns = np.ascontiguousarray(matrix.T)
    return np.stack([np.add.reduceat(values * column[of], starts) for column in columns], axis=1)


def _minimum(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], weights: np.ndarray
) -> np.ndarray:
    """Where a convex function with its gradient is least: L-BFGS that halves its steps."""
    value, gradient = loss(weights)
    history: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=10)
    for _ in range(MOST_STEPS):
        if np.abs(gradient).max() < TOLERANCE:
            break
        direction = -_inverse_hessian_times(gradient, history)
        slope = (gradient * direction).sum()
        for halvings in range(30):
            candidate = weights + direction / 2**halvings
            new_value, new_gradient = loss(candidate)
            if new_value <= value + 1e-4 * slope / 2**halvings:
                break
        else:
            break
        history.append((candidate - weights, new_gradient - gradient))
        weights, value, gradient = candidate, new_value, new_gradient
    return weights


def _inverse_hessian_times(
    vector: np.ndarray, history: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """L-BFGS's two loops over the last steps and what they changed in the gradient."""
    vector = vector.copy()
    amounts = []
    for step, change in reversed(history):
        amounts.append((step * vector).sum() / (step * change).sum())
        vector -= amounts[-1] * change
    if history:
        step, change = history[-1]
        vector *= (step * change).sum() / (change**2).sum()
    for (step, change), amount in zip(history, reversed(amounts), strict=True):
        vector += step * (amount - (change * vector).sum() / (step * change).sum())
    return vector


def verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict on a classifier: better than prompting, better than a simple baseline?

    Args:
        document: eval's JSON with ``methods.classifier``, and ``base`` and ``baselines`` where
            there is an adapter and training texts.

    Returns:
        ``accuracy``, ``interval``, ``n``; ``before``, ``majority``, ``bag_of_words`` and the
        comparisons ``against_prompting`` and ``against_bag_of_words`` where they were measured;
        ``recall`` of each class, None for one without texts; ``sentence`` and ``next`` for a
        person.
    """
    method = document["methods"]["classifier"]
    result: dict[str, Any] = {
        "accuracy": method["accuracy"],
        "interval": method.get("interval", {}).get("accuracy"),
        "n": document["prompts"],
        "recall": {
            name: row[number] / sum(row) if sum(row) else None
            for number, (name, row) in enumerate(
                zip(document["labels"], method["confusion"], strict=True)
            )
        },
    }
    base = document.get("base", {}).get("methods", {}).get("classifier")
    if base is not None:
        result["before"] = base["accuracy"]
        result["against_prompting"] = compare(method["right"], base["right"])
    baselines = document.get("baselines", {})
    if "bag_of_words" in baselines:
        simple = baselines["bag_of_words"]
        result["majority"] = baselines["majority"]["accuracy"]
        result["bag_of_words"] = simple["accuracy"]
        result["against_bag_of_words"] = compare(method["right"], simple["right"])
    return result | {"sentence": _sentence(result), "next": _next(result)}


def compare(right: str, other: str) -> str:
    """BETTER, SAME or WORSE by the exact McNemar test of two ``right`` strings."""
    result = mcnemar(right_answers(right), right_answers(other))
    if result["p_value"] >= SIGNIFICANT:
        return SAME
    return BETTER if result["only_first"] > result["only_second"] else WORSE


def _sentence(result: Mapping[str, Any]) -> str:
    """The verdict in a sentence."""
    words = {BETTER: "better than", SAME: "not clearly different from", WORSE: "worse than"}
    others = (
        ("before", "against_prompting", "prompting"),
        ("bag_of_words", "against_bag_of_words", "bag of words"),
    )
    parts = [
        f"{words[result[against]]} {name} ({result[rate]:.1%})"
        for rate, against, name in others
        if rate in result
    ]
    what = "fine-tuned" if "before" in result else "prompted"
    joined = " and ".join(parts) or "measured without a comparison"
    return f"The {what} classifier ({result['accuracy']:.1%}) is {joined}."


def _next(result: Mapping[str, Any]) -> str:
    """What to do next."""
    more = "label more texts, or take a larger model"
    if result["n"] < 100:
        more = f"label more texts: {result['n']} test texts say little"
    if "before" not in result:
        return "Fine-tune it: abft-mlx finetune."
    if result.get("against_bag_of_words") == WORSE:
        return f"Bag of words with logistic regression is the better choice here; or {more}."
    if result["against_prompting"] == WORSE:
        return f"Use the model without the adapter; or {more}."
    if result["against_prompting"] == SAME:
        return f"To gain more, train longer (--updates 128), or {more}."
    return "Label texts with it: abft-mlx predict."
