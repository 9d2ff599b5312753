"""Everything that a recipe asks to be measured of a model, in one document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.evaluation import methods
from abft_mlx.evaluation.bias import bias
from abft_mlx.evaluation.robustness import robustness
from abft_mlx.evaluation.transfer import transfer
from abft_mlx.evaluation.unseen import unseen
from abft_mlx.events import Events
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task


def measure(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    *,
    trained: Sequence[Task] = (),
    others: Sequence[Task] = (),
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Measure a model as it is now.

    Args:
        model: a loaded model, with an adapter or without.
        task: what it is measured on.
        section: protocols, methods and sizes.
        trained: the tasks whose training texts transfer must not ask for; ``task`` if none.
        others: the tasks that the transfer protocol measures on.
        events: who hears what is measured, and how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        The parts of eval's JSON that describe the model, one for each protocol asked for:
        ``methods`` and ``comparisons`` (accuracy), ``robustness``, ``bias``, ``unseen``,
        ``transfer``.
    """
    document: dict[str, Any] = {}
    vanilla, events = None, events or Events()
    wanted = set(section.protocols)
    if wanted & {"accuracy", "bias"}:
        asked = section
        if "accuracy" not in wanted:
            asked = section.model_copy(update={"methods": ["vanilla"]})
        elif "bias" in wanted and "vanilla" not in section.methods:
            asked = section.model_copy(update={"methods": ["vanilla", *section.methods]})
        events.stage("making test prompts")
        prompts = list(task.test_prompts(section))
        gold = np.array([prompt.gold for prompt in prompts])
        groups = np.arange(len(prompts)) % task.test_queries(section)
        found = methods.probabilities_of(model, task, prompts, asked, events, ranks)
        vanilla = found.get("vanilla")
        if "accuracy" in wanted:
            document |= methods.report(found, gold, groups, section)
        if "bias" in wanted:
            events.stage("bias")
            document["bias"] = bias(model, task, section, found["vanilla"], gold, events, ranks)
    if "robustness" in wanted:
        events.stage("robustness")
        document["robustness"] = robustness(model, task, section, events, ranks)
    if "unseen" in wanted:
        events.stage("unseen labels")
        document["unseen"] = unseen(model, task, section, events, vanilla, ranks)
    if "transfer" in wanted:
        document["transfer"] = transfer(model, others, trained or (task,), section, events, ranks)
    return document
