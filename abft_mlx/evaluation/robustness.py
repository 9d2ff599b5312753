"""How often a model keeps to its answer when wording or demonstrations change (StaICC-DIAG).

Letters: R repetitions of a query (9 templates, or 8 sets of demonstrations), Q queries, C labels.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.evaluation._progress import Progress, part
from abft_mlx.evaluation.intervals import bootstrap_interval
from abft_mlx.evaluation.metrics import predictions
from abft_mlx.evaluation.probabilities import label_probabilities
from abft_mlx.evaluation.variants import variant_prompts
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

QUERIES = 128
SETS = 8


def modal_shares(predicted: np.ndarray) -> np.ndarray:
    """For each query the share of its repetitions that give its most frequent prediction.

    Args:
        predicted: (R, Q) label indices.

    Returns:
        (Q,) float64 in [1 / R, 1].
    """
    counts = [(predicted == label).sum(axis=0) for label in range(int(predicted.max()) + 1)]
    return np.max(counts, axis=0) / len(predicted)


def redrawn_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """Eight prompts for each of the first test rows; query q in set r is prompt q + Q · r.

    Args:
        task: 128 of its test rows are asked, or as many as there are.
        section: ``queries`` limits them further; ``seed`` chooses the demonstrations.
    """
    size = {"queries": min(QUERIES, section.queries), "repeats": SETS}
    return task.test_prompts(section.model_copy(update=size))


def robustness(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Consistency of predictions over nine templates and over eight sets of demonstrations.

    Templates: the first 100 test rows with one set of demonstrations each (sampler rows 0-99).
    Demonstrations: the first 128 test rows, query q with sampler rows q, q + 128, ... q + 7 · 128.
    Fewer test rows, or a smaller ``section.queries``: as many as there are.

    Args:
        model: a loaded model, with an adapter or without.
        task: what is asked, and its ``variants``.
        section: seed, batch size, bootstrap samples.
        on_progress: told how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        ``template`` and ``demonstrations``, each with ``consistency`` (mean over queries of the
        modal share), ``accuracy`` of every repetition, ``queries``, and ``interval`` of the
        consistency (resampling queries) unless ``bootstrap_samples`` is 0.
    """
    worded = variant_prompts(task, section)
    redrawn = redrawn_prompts(task, section)
    total = sum(len(prompts) for _, prompts in worded) + len(redrawn)
    measured = [(builder.space, prompts) for builder, prompts in worded]
    measured.append((task.space, redrawn))
    found, done = [], 0
    for space, prompts in measured:
        probabilities = label_probabilities(
            model,
            prompts,
            space,
            batch_tokens=section.batch_tokens,
            on_progress=part(on_progress, done, total),
            ranks=ranks,
        )
        found.append(predictions(probabilities))
        done += len(prompts)
    asked = task.splits.test.labels
    return {
        "template": _part(np.stack(found[:-1]), asked, section),
        "demonstrations": _part(found[-1].reshape(SETS, -1), asked, section),
    }


def _part(
    predicted: np.ndarray, labels: tuple[int, ...], section: EvaluationSection
) -> dict[str, Any]:
    """Consistency and accuracies of (R, Q) predictions for the first Q test rows."""
    queries = predicted.shape[1]
    shares = modal_shares(predicted)
    right = predicted == np.array(labels[:queries])
    made: dict[str, Any] = {
        "consistency": float(shares.mean()),
        "accuracy": [float(share) for share in right.mean(axis=1)],
        "queries": queries,
    }
    if section.bootstrap_samples:
        groups = np.arange(queries)
        interval = bootstrap_interval(shares, groups, section.bootstrap_samples, section.seed)
        made["interval"] = list(interval)
    return made
