"""What label probabilities are worth: accuracy, macro-F1, calibration, confusion.

Letters: N prompts, C labels. The values are those that the StaICC benchmark describes.
``compat=True`` repeats the two faults of its code, for a comparison with numbers that were
published with them; accuracy, macro-F1 and confusion have none:

- unless every row sums to exactly 1.0 in floating point, which among many prompts practically never
  happens, all rows go through a second softmax before the true label's probability and the
  calibration error are taken from them;
- a confidence of exactly 1.0 falls in no bin of the calibration error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10
# A temperature outside says that validation texts are too few, or all answered rightly.
TEMPERATURES = (0.2, 5.0)
LEAST_TEMPERATURE_TEXTS = 50
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def softmax(values: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64.

    Args:
        values: (..., C).

    Returns:
        (..., C) float64.
    """
    shifted = np.asarray(values, dtype=np.float64)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


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


def f1_of_confusion(counts: np.ndarray) -> np.ndarray:
    """Macro-F1 of counts of gold label (row) against predicted label (column).

    A label that is neither gold nor predicted anywhere counts as 0, as the protocol has it.

    Args:
        counts: (..., C, C), not negative.

    Returns:
        (...) float64.
    """
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    either = counts.sum(axis=-2) + counts.sum(axis=-1)
    each = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    return each.mean(axis=-1)


def macro_f1(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Unweighted mean over labels of the harmonic mean of precision and recall.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    return float(f1_of_confusion(confusion(probabilities, gold)))


def as_staicc(probabilities: np.ndarray) -> np.ndarray:
    """What StaICC takes probabilities for: themselves, or their softmax (see the module).

    Args:
        probabilities: (N, C).

    Returns:
        (N, C) float64.
    """
    # Added up one by one, as Python does: NumPy's sum may round otherwise.
    sums = np.cumsum(probabilities, axis=1)[:, -1]
    return probabilities if np.all(sums == 1.0) else softmax(probabilities)


def true_label_probability(
    probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False
) -> float:
    """Mean probability of the gold label.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        compat: repeat StaICC's second softmax.
    """
    seen = as_staicc(probabilities) if compat else probabilities
    return float(np.mean(seen[np.arange(len(gold)), gold]))


def _binned(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bins of the highest probability, and (N,) that probability; 1.0 is in bin BINS."""
    confidence = seen.max(axis=1)
    # Compared with the edges themselves: confidence * 10 can round up over an edge.
    bins = np.searchsorted(np.arange(BINS + 1) / BINS, confidence, side="right") - 1
    return bins, confidence


def calibration_gaps(
    probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False
) -> np.ndarray:
    """By how much each prompt's bin of the calibration error gains from it.

    Summed over prompts, the absolute values of these sums, summed over bins and divided by N, are
    the calibration error; so any resample of the prompts has one without binning them anew.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        compat: repeat StaICC's faults.

    Returns:
        (N, BINS) float64: right (1 or 0) minus confidence in the bin of the highest probability,
        0 elsewhere.
    """
    seen = as_staicc(probabilities) if compat else probabilities
    bins, confidence = _binned(seen)
    gaps = np.zeros((len(gold), BINS + 1))
    gaps[np.arange(len(gold)), bins] = (predictions(seen) == gold) - confidence
    if not compat:
        gaps[:, BINS - 1] += gaps[:, BINS]
    return gaps[:, :BINS]


def reliability(
    probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False
) -> dict[str, list[Any]]:
    """The bins of the calibration error, as a reliability diagram draws them.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        compat: repeat StaICC's faults, so that 1.0 is in no bin.

    Returns:
        ``count``, and the means ``confidence`` and ``accuracy`` in 0..1, None where a bin is empty:
        BINS entries each.
    """
    seen = as_staicc(probabilities) if compat else probabilities
    bins, confidence = _binned(seen)
    if not compat:
        bins = np.minimum(bins, BINS - 1)
    right = predictions(seen) == gold
    means = [
        (None, None)
        if not (inside := bins == n).any()
        else (float(confidence[inside].mean()), float(right[inside].mean()))
        for n in range(BINS)
    ]
    return {
        "count": np.bincount(bins, minlength=BINS)[:BINS].tolist(),
        "confidence": [one for one, _ in means],
        "accuracy": [one for _, one in means],
    }


def expected_calibration_error(
    probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False
) -> float:
    """ECE over ten equal bins of the highest probability, weighted by prompts.

    Bins are [low, high), and the last one holds 1.0 too.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        compat: repeat StaICC's faults: a second softmax, and 1.0 in no bin.
    """
    gaps = calibration_gaps(probabilities, gold, compat=compat)
    return float(np.abs(gaps.sum(axis=0)).sum() / len(gold))


def summary(probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False) -> dict[str, Any]:
    """The metrics of one method, as eval's JSON holds them.

    Args:
        probabilities: (N, C), rows that sum to 1.
        gold: (N,) label indices.
        compat: repeat the faults of the StaICC benchmark.
    """
    return {
        "accuracy": accuracy(probabilities, gold),
        "macro_f1": macro_f1(probabilities, gold),
        "expected_calibration_error": expected_calibration_error(
            probabilities, gold, compat=compat
        ),
        "true_label_probability": true_label_probability(probabilities, gold, compat=compat),
        "confusion": confusion(probabilities, gold).tolist(),
        "reliability": reliability(probabilities, gold, compat=compat),
    }


def temperature(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """The temperature at which these labels are most likely (Guo et al., arXiv 1706.04599).

    Args:
        probabilities: (N, C), of texts that nothing was trained on.
        gold: (N,) label indices.

    Returns:
        A number within TEMPERATURES, by golden-section search over its logarithm; 1 for fewer
        than LEAST_TEMPERATURE_TEXTS texts.
    """
    if len(gold) < LEAST_TEMPERATURE_TEXTS:
        return 1.0
    scores = np.log(np.maximum(probabilities, 1e-300))

    def loss(logarithm: float) -> float:
        found = softmax(scores / np.exp(logarithm))[np.arange(len(gold)), gold]
        return -float(np.log(np.maximum(found, 1e-300)).mean())

    low, high = np.log(TEMPERATURES)
    ratio = (np.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(40):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return float(np.exp((low + high) / 2))


def coverage(probabilities: np.ndarray, gold: np.ndarray) -> list[dict[str, Any]]:
    """What is gained by answering only where the highest probability reaches a threshold.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.

    Returns:
        For each of THRESHOLDS ``threshold``, ``coverage`` (share of texts that are answered) and
        ``accuracy`` of those, None where there are none.
    """
    right, confidence = predictions(probabilities) == gold, probabilities.max(axis=1)
    found = []
    for threshold in THRESHOLDS:
        sure = confidence >= threshold
        found.append(
            {
                "threshold": threshold,
                "coverage": float(sure.mean()),
                "accuracy": float(right[sure].mean()) if sure.any() else None,
            }
        )
    return found
