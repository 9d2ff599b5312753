"""What label probabilities are worth: accuracy, macro-F1, calibration, and how sure that is.

Bootstrap intervals draw whole groups of prompts: a query is asked several times, with other
demonstrations each time, and its prompts are not independent.

Letters: N prompts, C labels, G groups, S resamples; ``probabilities`` are (N, C) rows that sum to
1, ``gold`` (N,) label indices. The values are those that the StaICC benchmark
describes. ``compat=True`` repeats the two faults of its code, for a comparison with numbers that
were published with them; accuracy, macro-F1 and confusion have none:

- unless every row sums to exactly 1.0 in floating point, which among many prompts practically never
  happens, all rows go through a second softmax before the true label's probability and the
  calibration error are taken from them;
- a confidence of exactly 1.0 falls in no bin of the calibration error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
BINS = 10
LEVEL = 0.95
_SAMPLES_AT_ONCE = 1000
# A temperature outside says that validation texts are too few, or all answered rightly.
TEMPERATURES = (0.2, 5.0)
LEAST_TEMPERATURE_TEXTS = 50
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def softmax(values: np.ndarray) -> np.ndarray:
    """Softmax over the last axis of (..., C), in float64."""
    shifted = np.asarray(values, dtype=np.float64)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def predictions(probabilities: np.ndarray) -> np.ndarray:
    """(N,) int64, the most probable label; the lowest index where several are equal."""
    return np.argmax(probabilities, axis=1)


def accuracy(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Share of prompts whose most probable label is the gold one."""
    return float(np.mean(predictions(probabilities) == gold))


def confusion(probabilities: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """(C, C) int64 counts of gold label (row) against predicted label (column)."""
    labels = probabilities.shape[1]
    counts = np.zeros((labels, labels), dtype=np.int64)
    np.add.at(counts, (gold, predictions(probabilities)), 1)
    return counts


def f1_of_confusion(counts: np.ndarray) -> np.ndarray:
    """(...) float64 macro-F1 of (..., C, C) counts of gold (row) against predicted (column).

    A label that is neither gold nor predicted anywhere counts as 0, as the protocol has it.
    """
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    either = counts.sum(axis=-2) + counts.sum(axis=-1)
    each = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    return each.mean(axis=-1)


def macro_f1(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Unweighted mean over labels of the harmonic mean of precision and recall."""
    return float(f1_of_confusion(confusion(probabilities, gold)))


def as_staicc(probabilities: np.ndarray) -> np.ndarray:
    """(N, C) that StaICC takes for probabilities: themselves, or their softmax (see the module)."""
    # Added up one by one, as Python does: NumPy's sum may round otherwise.
    sums = np.cumsum(probabilities, axis=1)[:, -1]
    return probabilities if np.all(sums == 1.0) else softmax(probabilities)


def true_label_probability(
    probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False
) -> float:
    """Mean probability of the gold label."""
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
    """(N, BINS) by how much each prompt's bin of the calibration error gains from it.

    Right (1 or 0) minus confidence in the bin of the highest probability, 0 elsewhere. Summed over
    prompts, the absolute values of these sums, summed over bins and divided by N, are the
    calibration error; so any resample of the prompts has one without binning them anew.
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

    Returns:
        ``count``, and the means ``confidence`` and ``accuracy`` in 0..1, None where a bin is empty:
        BINS entries each. With ``compat`` 1.0 is in no bin.
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
    """
    gaps = calibration_gaps(probabilities, gold, compat=compat)
    return float(np.abs(gaps.sum(axis=0)).sum() / len(gold))


def summary(probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False) -> dict[str, Any]:
    """The metrics of one method, as eval's JSON holds them."""
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


def bootstrap_interval(
    values: np.ndarray, groups: np.ndarray, samples: int, seed: int = 42, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of a mean, from resamples of whole groups.

    Args:
        values: (N,) one number for each prompt.
        groups: (N,) which prompts belong together; any numbers.
        samples: resamples, at least 1.
        seed: of the resamples; the same seed and groups give the same ones.
        level: share of the resamples inside the interval.

    Returns:
        Low and high end.
    """
    means = _resampled(np.asarray(values, dtype=np.float64)[:, None], groups, samples, seed, _mean)
    return ends(means, level)


def intervals(
    probabilities: np.ndarray,
    gold: np.ndarray,
    groups: np.ndarray,
    samples: int,
    seed: int,
    *,
    compat: bool = False,
) -> dict[str, list[float]]:
    """95% intervals of the metrics of one method.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        groups: (N,) which prompts belong together, such as the number of each one's query.
        samples: resamples, at least 1.
        seed: of the resamples.
        compat: of the metrics that repeat StaICC's faults.

    Returns:
        Low and high end of each metric.
    """
    labels = probabilities.shape[1]
    rows = np.arange(len(gold))
    counts = np.zeros((len(gold), labels * labels))
    counts[rows, gold * labels + predictions(probabilities)] = 1
    seen = as_staicc(probabilities) if compat else probabilities

    def f1(sums: np.ndarray, size: np.ndarray) -> np.ndarray:
        del size
        return f1_of_confusion(sums.reshape(-1, labels, labels))

    def calibration(sums: np.ndarray, size: np.ndarray) -> np.ndarray:
        return np.abs(sums).sum(axis=1) / size

    right = (predictions(probabilities) == gold).astype(np.float64)
    asked: dict[str, tuple[np.ndarray, _Statistic]] = {
        "accuracy": (right[:, None], _mean),
        "macro_f1": (counts, f1),
        "expected_calibration_error": (
            calibration_gaps(probabilities, gold, compat=compat),
            calibration,
        ),
        "true_label_probability": (seen[rows, gold][:, None], _mean),
    }
    return {
        name: list(ends(_resampled(table, groups, samples, seed, statistic)))
        for name, (table, statistic) in asked.items()
    }


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, Any]:
    """Exact McNemar test of two methods on the same prompts.

    Of the prompts that exactly one method has right, either is the one as often, if the methods are
    equally good: the p-value is the two-sided binomial one.

    Args:
        right_a: (N,) bool, where the first method is right.
        right_b: (N,) bool, where the second is.

    Returns:
        ``only_first`` and ``only_second``, prompts that only one has right, and ``p_value``.
    """
    first, second = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} prompts are not the same prompts")
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Whole numbers to the end: 2**n is no float beyond n = 1023.
    p_value = min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def _resampled(
    table: np.ndarray, groups: np.ndarray, samples: int, seed: int, statistic: _Statistic
) -> np.ndarray:
    """(S,) values of a statistic of (S, F) sums and (S,) numbers of prompts, from (N, F)."""
    members, inverse = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(members), table.shape[1]))
    np.add.at(sums, inverse, table)
    sizes = np.bincount(inverse, minlength=len(members)).astype(np.float64)
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        several = min(_SAMPLES_AT_ONCE, samples - start)
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), several)
        weights = drawn.astype(np.float64)
        found.append(statistic(weights @ sums, weights @ sizes))
    return np.concatenate(found)


def _mean(sums: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(S,) means of one value."""
    return sums[:, 0] / size


def ends(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Low and high end of the middle share of some resamples' values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def right_answers(right: str) -> np.ndarray:
    """Which prompts were answered rightly, (N,) bool, from a method's ``right`` string.

    Raises:
        ValueError: it holds anything but 0 and 1.
    """
    if set(right) - {"0", "1"}:
        raise ValueError(f"answers are written as 0 and 1, not as {right!r:.40}")
    return np.frombuffer(right.encode("ascii"), dtype=np.uint8) == ord("1")


def right_string(probabilities: np.ndarray, gold: np.ndarray) -> str:
    """N characters, 1 where the likeliest label is the gold one, as `right_answers` reads them."""
    return "".join("1" if right else "0" for right in predictions(probabilities) == gold)


def against_base(
    with_adapter: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The paired test of every method against itself without the adapter.

    Args:
        with_adapter: ``methods`` of eval's JSON.
        base: ``base.methods`` of eval's JSON, on the same prompts.

    Returns:
        Entries for ``comparisons``; the second is called ``base.METHOD``.
    """
    return [
        {
            "first": name,
            "second": f"base.{name}",
            **mcnemar(right_answers(method["right"]), right_answers(base[name]["right"])),
        }
        for name, method in with_adapter.items()
        if name in base
    ]
