"""Means, spreads and intervals over seeds and prompts.

Letters: S seeds, Q queries, R repeats (sets of demonstrations a query is asked with), N = Q · R
prompts. Prompt i of a measurement has query i modulo Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abft_mlx.evaluation import mcnemar, right_answers
from abft_mlx.evaluation.metrics import ends

SAMPLES = 2000
SEED = 42
Z = 1.959963984540054

HOW = (
    "Intervals are 95% percentile bootstraps over seeds and queries: each of 2,000 resamples draws "
    "the seeds again, and the queries again (the same ones for every seed and for both sides of a "
    "difference, each with all its sets of demonstrations); tasks are not drawn, so an interval "
    "speaks of these tasks alone. With one seed it covers the prompts only."
)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: of the sample.
        low: lower end of the 95% interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def share_right(right: str, queries: int) -> np.ndarray:
    """How often each query was answered rightly.

    Args:
        right: N characters, 1 where a prompt was answered rightly.
        queries: Q; if N is no multiple of it, every prompt counts as a query of its own.

    Returns:
        (Q,) float64 in [0, 1].
    """
    values = right_answers(right)
    if queries < 1 or len(values) % queries:
        queries = len(values)
    return values.reshape(-1, queries).mean(axis=0)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation (n - 1) where there are several."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((one - mean) ** 2 for one in values) / (len(values) - 1))


def bootstrap(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray] | None = None,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Interval of a mean over tasks, or of the difference of two, over seeds and queries.

    Args:
        first: for every task (S, Q), as :func:`share_right` gives rows.
        second: what to subtract, for the same tasks and queries, with as many seeds or one.
        samples: resamples.
        seed: of the resamples.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(samples)
    mean = 0.0
    for index, one in enumerate(first):
        other = None if second is None else second[index]
        mean += float(one.mean()) - (0.0 if other is None else float(other.mean()))
        queries = one.shape[1]
        drawn = random.multinomial(queries, np.full(queries, 1 / queries), size=samples) / queries
        seeds = _seed_weights(random, len(one), samples)
        total += ((drawn @ one.T) * seeds).sum(axis=1)
        if other is not None:
            # The same training seed on both sides is one draw.
            if len(other) != len(one):
                seeds = _seed_weights(random, len(other), samples)
            total -= ((drawn @ other.T) * seeds).sum(axis=1)
    return _percentiles(mean / len(first), total / len(first))


def over_runs(
    values: Sequence[Sequence[float]], samples: int = SAMPLES, seed: int = SEED
) -> Estimate:
    """Interval of a mean over tasks of one number a run, over the runs of each task.

    Args:
        values: for every task, one number for each of its runs.
        samples: resamples.
        seed: of the resamples.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(samples)
    for one in values:
        total += (np.asarray(one)[None, :] * _seed_weights(random, len(one), samples)).sum(axis=1)
    mean = math.fsum(math.fsum(one) / len(one) for one in values) / len(values)
    return _percentiles(mean, total / len(values))


def _seed_weights(random: np.random.Generator, seeds: int, samples: int) -> np.ndarray:
    if seeds == 1:
        return np.ones((samples, 1))
    return random.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds


def _percentiles(mean: float, drawn: np.ndarray) -> Estimate:
    return Estimate(mean, *ends(drawn))


@dataclass(frozen=True)
class Interval:
    """A number with the 95% interval that came with it, of which only the width is used."""

    value: float
    low: float
    high: float

    @property
    def variance(self) -> float:
        """Of the number, as if its interval were a normal one."""
        return ((self.high - self.low) / (2 * Z)) ** 2


def difference(after: Sequence[Sequence[Interval]], before: Sequence[Interval]) -> Estimate:
    """Mean rise over tasks of numbers of which only intervals are known, not the prompts.

    The two sides count as independent, though they share prompts, which makes the interval too wide
    rather than too narrow.

    Args:
        after: for every task, one for each seed.
        before: for every task.
    """
    mean, variance = 0.0, 0.0
    for seeds, start in zip(after, before, strict=True):
        average, spread = mean_and_spread([one.value for one in seeds])
        mean += average - start.value
        variance += start.variance + math.fsum(one.variance for one in seeds) / len(seeds)
        variance += (spread or 0.0) ** 2 / len(seeds)
    mean, error = mean / len(before), math.sqrt(variance) / len(before)
    return Estimate(mean, mean - Z * error, mean + Z * error)


def pooled_mcnemar(first: Sequence[str], second: Sequence[str]) -> float:
    """Exact two-sided McNemar test of pairs of answers, all seeds and tasks together.

    Args:
        first: strings of 0 and 1, one for each seed and task.
        second: the other method's, on the same prompts.

    Returns:
        The p value; 1 where both answer alike.
    """
    right = [right_answers("".join(texts)) for texts in (first, second)]
    return float(mcnemar(*right)["p_value"])
