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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

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


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """(...) float64 macro-F1 of (..., C, C) counts of gold (row) against predicted (column).

    A label that is neither gold nor predicted anywhere counts as 0, as the protocol has it.
    """
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    either = counts.sum(axis=-2) + counts.sum(axis=-1)
    each = np.divide(2 * right, either, out=np.zeros_like(right), where=either > 0)
    return each.mean(axis=-1)


def as_staicc(probabilities: np.ndarray) -> np.ndarray:
    """(N, C) that StaICC takes for probabilities: themselves, or their softmax (see the module)."""
    # Added up one by one, as Python does: NumPy's sum may round otherwise.
    sums = np.cumsum(probabilities, axis=1)[:, -1]
    return probabilities if np.all(sums == 1.0) else softmax(probabilities)


def _features(probabilities: np.ndarray, gold: np.ndarray, compat: bool) -> np.ndarray:
    """(N, 2 + BINS + C²) float64 whose sums over any prompts give all metrics of these prompts.

    The columns are: right or not; the gold label's probability; right minus confidence, in the bin
    of the confidence; and the place in the confusion table. Bins are [low, high), and the last one
    holds 1.0, too, except with ``compat``.
    """
    N, C = probabilities.shape
    rows, predicted = np.arange(N), predictions(probabilities)
    right = predicted == gold
    counts = np.zeros((N, C * C))
    counts[rows, gold * C + predicted] = 1
    likely = as_staicc(probabilities) if compat else probabilities
    bins, confidence = _bins(likely, compat)
    gaps = np.zeros((N, BINS + 1))
    gaps[rows, bins] = right - confidence
    return np.column_stack([right, likely[rows, gold], gaps[:, :BINS], counts])


def _bins(likely: np.ndarray, compat: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bins of the highest probability, BINS for none, and (N,) that probability."""
    confidence = likely.max(axis=1)
    # Compared with the edges themselves: confidence * 10 can round up over an edge.
    bins = np.searchsorted(np.arange(BINS + 1) / BINS, confidence, side="right") - 1
    return bins if compat else np.minimum(bins, BINS - 1), confidence


def _metrics(sums: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """(S,) values of each metric, from (S, F) sums of features over (S,) numbers of prompts."""
    counts = sums[:, 2 + BINS :]
    labels = math.isqrt(counts.shape[1])
    return {
        "accuracy": sums[:, 0] / sizes,
        "macro_f1": macro_f1(counts.reshape(-1, labels, labels)),
        "expected_calibration_error": np.abs(sums[:, 2 : 2 + BINS]).sum(axis=1) / sizes,
        "true_label_probability": sums[:, 1] / sizes,
    }


def summary(probabilities: np.ndarray, gold: np.ndarray, *, compat: bool = False) -> dict[str, Any]:
    """The metrics of one method, as eval's JSON holds them.

    Returns:
        ``accuracy``, ``macro_f1``, ``expected_calibration_error``, ``true_label_probability``,
        ``confusion`` (gold rows, predicted columns), and ``reliability``, the bins of the
        calibration error: ``count``, and the means ``confidence`` and ``accuracy``, None where a
        bin is empty.
    """
    C = probabilities.shape[1]
    sums = _features(probabilities, gold, compat).sum(axis=0)[None]
    bins, confidence = _bins(as_staicc(probabilities) if compat else probabilities, compat)
    right = predictions(probabilities) == gold
    members = [bins == number for number in range(BINS)]
    reliability = {
        "count": [int(inside.sum()) for inside in members],
        "confidence": [_mean_or_none(confidence[inside]) for inside in members],
        "accuracy": [_mean_or_none(right[inside]) for inside in members],
    }
    return {
        **{name: float(value[0]) for name, value in _metrics(sums, np.array([len(gold)])).items()},
        "confusion": sums[0, 2 + BINS :].astype(int).reshape(C, C).tolist(),
        "reliability": reliability,
    }


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def temperature(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """The temperature at which these labels are most likely (Guo et al., arXiv 1706.04599).

    Nothing may have been trained on the texts. Within TEMPERATURES, by golden-section search over
    the logarithm; 1 for fewer than LEAST_TEMPERATURE_TEXTS texts.
    """
    if len(gold) < LEAST_TEMPERATURE_TEXTS:
        return 1.0
    scores = np.log(np.maximum(probabilities, 1e-300))

    def loss(logarithm: float) -> float:
        likely = softmax(scores / np.exp(logarithm))[np.arange(len(gold)), gold]
        return -float(np.log(np.maximum(likely, 1e-300)).mean())

    low, high = np.log(TEMPERATURES)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def coverage(probabilities: np.ndarray, gold: np.ndarray) -> list[dict[str, Any]]:
    """What is gained by answering only where the highest probability reaches a threshold.

    Returns:
        For each of THRESHOLDS ``threshold``, ``coverage`` (share of texts that are answered) and
        ``accuracy`` of those, None where there are none.
    """
    right, confidence = predictions(probabilities) == gold, probabilities.max(axis=1)
    return [
        {
            "threshold": threshold,
            "coverage": float((confidence >= threshold).mean()),
            "accuracy": _mean_or_none(right[confidence >= threshold]),
        }
        for threshold in THRESHOLDS
    ]


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
    """
    column = np.asarray(values, dtype=np.float64)[:, None]
    drawn = _resampled(column, groups, samples, seed)
    return _ends(np.concatenate([sums[:, 0] / sizes for sums, sizes in drawn]), level)


def intervals(
    probabilities: np.ndarray,
    gold: np.ndarray,
    groups: np.ndarray,
    samples: int,
    seed: int,
    *,
    compat: bool = False,
) -> dict[str, list[float]]:
    """95% intervals of the metrics of one method: low and high end of each.

    ``groups``, ``samples`` and ``seed`` are as for :func:`bootstrap_interval`.
    """
    features = _features(probabilities, gold, compat)
    parts = [_metrics(*drawn) for drawn in _resampled(features, groups, samples, seed)]
    return {name: list(_ends(np.concatenate([part[name] for part in parts]))) for name in parts[0]}


def _resampled(
    table: np.ndarray, groups: np.ndarray, samples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sums of (N, F) and numbers of prompts of resamples, (S, F) and (S,), some at a time."""
    members, inverse = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((len(members), table.shape[1]))
    np.add.at(sums, inverse, table)
    sizes = np.bincount(inverse, minlength=len(members)).astype(np.float64)
    rng = np.random.default_rng(seed)
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        several = min(_SAMPLES_AT_ONCE, samples - start)
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), several)
        yield drawn @ sums, drawn @ sizes


def _ends(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Low and high end of the middle share of some resamples' values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> dict[str, Any]:
    """Exact two-sided McNemar test of two methods, from where each is right, (N,) bool.

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


def right_answers(right: str) -> np.ndarray:
    """Which prompts were answered rightly, (N,) bool, from a method's ``right`` string.

    Raises:
        ValueError: it holds anything but 0 and 1.
    """
    if set(right) - {"0", "1"}:
        raise ValueError(f"answers are written as 0 and 1, not as {right!r:.40}")
    return np.array([answer == "1" for answer in right], dtype=bool)


def right_string(probabilities: np.ndarray, gold: np.ndarray) -> str:
    """N characters, 1 where the likeliest label is the gold one, as `right_answers` reads them."""
    return "".join("1" if right else "0" for right in predictions(probabilities) == gold)


def against_base(
    with_adapter: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """``comparisons`` of eval's JSON: every method against itself without the adapter.

    Both arguments are ``methods`` of eval's JSON, on the same prompts.
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
