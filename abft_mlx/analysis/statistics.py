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

SAMPLES = 2000
SEED = 42

HOW = (
    "Intervals are 95% percentile bootstraps over seeds and queries: each of 2,000 resamples draws "
    "the seeds again, and the queries again (the same ones for every seed and for both sides of a "
    "difference, each with all its sets of demonstrations); tasks are not drawn, so an interval "
    "speaks of these tasks alone. With one seed it covers the prompts only."
)


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its 95% interval."""

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
    for index, ours in enumerate(first):
        theirs = None if second is None else second[index]
        mean += float(ours.mean()) - (0.0 if theirs is None else float(theirs.mean()))
        queries = ours.shape[1]
        drawn = random.multinomial(queries, np.full(queries, 1 / queries), size=samples) / queries
        seeds = _seed_weights(random, len(ours), samples)
        total += ((drawn @ ours.T) * seeds).sum(axis=1)
        if theirs is not None:
            # The same training seed on both sides is one draw.
            if len(theirs) != len(ours):
                seeds = _seed_weights(random, len(theirs), samples)
            total -= ((drawn @ theirs.T) * seeds).sum(axis=1)
    low, high = np.percentile(total / len(first), (2.5, 97.5))
    return Estimate(mean / len(first), float(low), float(high))


def _seed_weights(random: np.random.Generator, seeds: int, samples: int) -> np.ndarray:
    """(samples, S) how often each seed is drawn, as shares."""
    if seeds == 1:
        return np.ones((samples, 1))
    return random.multinomial(seeds, np.full(seeds, 1 / seeds), size=samples) / seeds


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
