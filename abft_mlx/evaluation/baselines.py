"""What a classifier has to beat: the most frequent class, and a bag of words.

The bag of words is scikit-learn's usual pipeline, ``make_pipeline(TfidfVectorizer(),
LogisticRegression(C=10))``, in NumPy: scikit-learn with SciPy would add over 100 MB to the install.

Letters: N training texts, V words, C classes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from abft_mlx.data import TfIdf, Vectors

# scikit-learn's C: the inverse strength of the L2 penalty.
INVERSE_PENALTY = 10.0
# The fit ends when no part of the gradient of the mean loss is larger (scikit-learn: 1e-4).
TOLERANCE, MOST_STEPS = 1e-5, 1000


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

    Args:
        train_texts: N texts, at least one.
        train_labels: N class numbers.
        test_texts: M texts.
        classes: C; a class without training texts has probability 0.
        inverse_penalty: as scikit-learn's C.

    Returns:
        (M, C) float64.
    """
    found = sorted(set(train_labels))
    probabilities = np.zeros((len(test_texts), classes))
    if len(found) == 1:
        probabilities[:, found] = 1
        return probabilities
    gold = np.searchsorted(found, train_labels)
    tfidf = TfIdf(train_texts)
    train, test = _Matrix(tfidf.vectors(train_texts)), _Matrix(tfidf.vectors(test_texts))
    weights = _fit(train, gold, len(found), inverse_penalty)
    probabilities[:, found] = _probabilities(test, weights)
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


def _probabilities(matrix: _Matrix, weights: np.ndarray) -> np.ndarray:
    """(N, C) label probabilities; of two classes only the second has weights, (V + 1, 1)."""
    logits = matrix.times(weights)
    if weights.shape[1] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _fit(matrix: _Matrix, gold: np.ndarray, classes: int, inverse_penalty: float) -> np.ndarray:
    """The weights (V + 1, C) of least cross-entropy plus penalty; intercepts have no penalty."""
    count, width = matrix.shape
    first = 1 if classes == 2 else 0
    penalty = np.full((width, 1), 1 / (inverse_penalty * count))
    penalty[-1] = 0

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        errors = _probabilities(matrix, weights)
        likelihood = np.log(np.maximum(errors[np.arange(count), gold], 1e-300)).mean()
        errors[np.arange(count), gold] -= 1
        gradient = matrix.transposed_times(errors[:, first:]) / count + penalty * weights
        return (penalty * weights**2).sum() / 2 - likelihood, gradient

    return _minimum(loss, np.zeros((width, classes - first)))


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
            tried = weights + direction / 2**halvings
            new_value, new_gradient = loss(tried)
            if new_value <= value + 1e-4 * slope / 2**halvings:
                break
        else:
            break
        history.append((tried - weights, new_gradient - gradient))
        weights, value, gradient = tried, new_value, new_gradient
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
