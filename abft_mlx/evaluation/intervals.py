"""How sure a measurement is: bootstrap intervals over queries, and a paired test of two methods.

Letters: N prompts, G groups, C labels, S resamples. A query is asked several times, with other
demonstrations each time, and its prompts are not independent: whole groups of prompts are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from abft_mlx.evaluation.metrics import (
    as_staicc,
    calibration_gaps,
    f1_of_confusion,
    predictions,
)

LEVEL = 0.95
_SAMPLES_AT_ONCE = 1000


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
    n = only_first + only_second
    ways = tail = 1
    for i in range(min(only_first, only_second)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    # Whole numbers to the end: 2**n is no float beyond n = 1023.
    p_value = min(1.0, 2 * tail / 2**n)
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


_Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _resampled(
    table: np.ndarray, groups: np.ndarray, samples: int, seed: int, statistic: _Statistic
) -> np.ndarray:
    """A statistic of sums over prompts, in every resample.

    Args:
        table: (N, F) what each prompt adds to the sums.
        groups: (N,).
        samples: S.
        seed: of the resamples.
        statistic: from sums (S, F) and numbers of prompts (S,) to (S,).

    Returns:
        (S,).
    """
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
    return sums[:, 0] / size


def ends(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Low and high end of the middle share of some resamples' values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
