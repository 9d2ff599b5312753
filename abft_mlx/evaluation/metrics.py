"""What label probabilities are worth: accuracy, macro-F1, calibration, confusion.

Letters: N prompts, C labels. The values are the protocol's (protocol.md, section 3) without its
known faults: probabilities are used as they are, never put through a second softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10


def predictions(probabilities: np.ndarray) -> np.ndarray:
    """Most probable label of each prompt; the lowest index where several are equal.

    Args:
        probabilities: (N, C).

    Returns:
        (N,) int64.
    """
    return np.argmax(probabilities, axis=1)


def accuracy(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Share of prompts whose most probable label is the gold one.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    return float(np.mean(predictions(probabilities) == gold))


def confusion(probabilities: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Counts of gold label (row) against predicted label (column).

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.

    Returns:
        (C, C) int64.
    """
    labels = probabilities.shape[1]
    counts = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(counts, (gold, predictions(probabilities)), 1)
    return counts


def macro_f1(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Unweighted mean over labels of the harmonic mean of precision and recall.

    A label that is neither gold nor predicted anywhere counts as 0, as the protocol has it.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    counts = confusion(probabilities, gold).astype(np.float64)
    right = np.diag(counts)
    either = counts.sum(axis=0) + counts.sum(axis=1)
    return float(np.mean(np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)))


def true_label_probability(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Mean probability of the gold label.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    return float(np.mean(probabilities[np.arange(len(gold)), gold]))


def expected_calibration_error(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """ECE over ten equal bins of the highest probability, weighted by prompts.

    Bins are [low, high), and the last one holds 1.0 too (the protocol drops it).

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    confidence = probabilities.max(axis=1)
    right = predictions(probabilities) == gold
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    error = 0.0
    for one in np.unique(bins):
        inside = bins == one
        error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


def summary(probabilities: np.ndarray, gold: np.ndarray) -> dict[str, Any]:
    """The metrics of one method, as eval's JSON holds them (DESIGN.md, section 5).

    Args:
        probabilities: (N, C), rows that sum to 1.
        gold: (N,) label indices.
    """
    return {
        "accuracy": accuracy(probabilities, gold),
        "macro_f1": macro_f1(probabilities, gold),
        "expected_calibration_error": expected_calibration_error(probabilities, gold),
        "true_label_probability": true_label_probability(probabilities, gold),
        "confusion": confusion(probabilities, gold).tolist(),
    }
