"""Accuracy on tasks other than the trained one, without sentences that training has seen.

The paper's AccOD (table 2). Data sets share sentences (SST2, SST5, rotten tomatoes, subjective):
a test query whose text, case and punctuation aside, lies in a training part is left out and
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.data import fold
from abft_mlx.evaluation import methods
from abft_mlx.evaluation.forward import label_probabilities
from abft_mlx.events import Events
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task


def seen_texts(trained: Sequence[Task]) -> set[str]:
    """Folded texts that training may have used: training and validation parts."""
    return {
        fold(text)
        for task in trained
        for part in (task.splits.training, task.splits.validation)
        for text in part.texts
    }


def transfer(
    model: nn.Module,
    others: Sequence[Task],
    trained: Sequence[Task],
    section: EvaluationSection,
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model on tasks that it was not trained on.

    Args:
        model: a loaded model, with an adapter or without.
        others: the tasks to measure on.
        trained: the tasks that the adapter was, or would be, trained on.
        section: the evaluation's size; the test prompts are those of the protocol, less the ones
            whose query was seen in training.
        events: who hears which task is measured, and how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        ``accuracy``, the plain mean over tasks (None where nothing is left), and ``tasks``: for
        each the metrics of one method, its ``interval``, ``right``, the ``prompts`` counted, the
        ``shared_queries`` left out, and ``shared_demonstrations``, the counted prompts that show a
        text seen in training.
    """
    events, seen = events or Events(), seen_texts(trained)
    found: dict[str, Any] = {}
    for task in others:
        events.stage(f"transfer to {task.name}")
        prompts = task.test_prompts(section)
        queries = task.test_queries(section)
        shared = [fold(text) in seen for text in task.splits.test.texts[:queries]]
        kept = [i for i in range(len(prompts)) if not shared[i % queries]]
        entry: dict[str, Any] = {
            "prompts": len(kept),
            "shared_queries": sum(shared),
            "shared_demonstrations": _showing(task, kept, seen, section),
        }
        if kept:
            chosen = [prompts[i] for i in kept]
            gold = np.array([prompt.gold for prompt in chosen])
            groups = np.array([i % queries for i in kept])
            probabilities = label_probabilities(
                model,
                chosen,
                task.space,
                batch_tokens=section.batch_tokens,
                on_progress=events.progress,
                ranks=ranks,
            )
            entry |= methods.entry(probabilities, gold, groups, section)
        found[task.name] = entry
    measured = [entry["accuracy"] for entry in found.values() if "accuracy" in entry]
    return {"accuracy": float(np.mean(measured)) if measured else None, "tasks": found}


def _showing(task: Task, kept: list[int], seen: set[str], section: EvaluationSection) -> int:
    """How many of the kept prompts show a demonstration that was seen in training."""
    pool = [fold(text) in seen for text in task.splits.demonstrations.texts]
    if not any(pool):
        return 0
    rows = task.test_rows(section)
    return sum(any(pool[row] for row in rows[i]) for i in kept)
