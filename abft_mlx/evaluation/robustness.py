"""How often a model keeps to its answer when wording or demonstrations change (StaICC-DIAG).

Four pieces of a prompt have three levels each: the prompt's own and the two of ``variants``. The
rows of the orthogonal table L9 combine them so that every two levels of two pieces meet once.

StaICC writes a label prefix with the space that follows it ("sentiment: "), and applying one of its
templates undoes the form in which that space belongs to the label. Here the label always brings its
space, so a prefix has none ("sentiment:") and all nine prompts keep that form.

Letters: R repetitions of a query (9 templates, or 8 sets of demonstrations), Q queries, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.errors import PromptError
from abft_mlx.evaluation.forward import label_probabilities
from abft_mlx.evaluation.metrics import bootstrap_interval, predictions
from abft_mlx.events import Events
from abft_mlx.prompts import Prompt, PromptBuilder, Template
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection, TaskSection
from abft_mlx.task import Task

TEMPLATE_QUERIES = 100
QUERIES = 128
SETS = 8
FACTORS = ("instruction", "input_prefix", "label_prefix", "label_affix")
L9 = (
    (0, 0, 0, 0),
    (0, 1, 1, 1),
    (0, 2, 2, 2),
    (1, 0, 1, 2),
    (1, 1, 2, 0),
    (1, 2, 0, 1),
    (2, 0, 2, 1),
    (2, 1, 0, 2),
    (2, 2, 1, 0),
)


def modal_shares(predicted: np.ndarray) -> np.ndarray:
    """(Q,) float64: the share of each query's (R, Q) predictions that are its most frequent one."""
    counts = [(predicted == label).sum(axis=0) for label in range(int(predicted.max()) + 1)]
    return np.max(counts, axis=0) / len(predicted)


def templates(section: TaskSection) -> tuple[Template, ...]:
    """The nine templates of a task; the first is the prompt's own."""
    own = Template.from_section(section.prompt)
    levels = {f: (getattr(own, f), *getattr(section.variants, f)) for f in FACTORS}
    return tuple(
        replace(own, **{f: levels[f][level] for f, level in zip(FACTORS, row, strict=True)})
        for row in L9
    )


def variant_prompts(
    task: Task, section: EvaluationSection
) -> list[tuple[PromptBuilder, list[Prompt]]]:
    """For each template its builder and the prompts of the first test rows.

    Query q has the demonstrations of sampler row q in every template.

    Args:
        task: 100 of its test rows are asked, or as many as there are.
        section: ``queries`` limits them further; ``seed`` chooses the demonstrations.

    Raises:
        PromptError: a template makes no usable prompt; the message says which, and its wording.
    """
    size = {"queries": min(TEMPLATE_QUERIES, section.queries), "repeats": 1}
    asked = section.model_copy(update=size)
    made = []
    for number, template in enumerate(templates(task.section)):
        try:
            builder = task.builder_for(template)
            prompts = list(replace(task, builder=builder).test_prompts(asked))
        except PromptError as error:
            message = f"template {number} of variants ({_differing(number, template)}): {error}"
            raise PromptError(message) from error
        made.append((builder, prompts))
    return made


def _differing(number: int, template: Template) -> str:
    """The pieces in which a template differs from the prompt's own."""
    differing = [f for f, level in zip(FACTORS, L9[number], strict=True) if level]
    return ", ".join(f"{f} {getattr(template, f)!r}" for f in differing) or "the prompt's own"


def redrawn_prompts(task: Task, section: EvaluationSection) -> Sequence[Prompt]:
    """Eight prompts for each of the first test rows; query q in set r is prompt q + Q · r."""
    size = {"queries": min(QUERIES, section.queries), "repeats": SETS}
    return task.test_prompts(section.model_copy(update=size))


def robustness(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    events: Events | None = None,
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
        events: who hears how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        ``template`` and ``demonstrations``, each with ``consistency`` (mean over queries of the
        modal share), ``accuracy`` of every repetition, ``queries``, and ``interval`` of the
        consistency (resampling queries) unless ``bootstrap_samples`` is 0.
    """
    worded = variant_prompts(task, section)
    redrawn = redrawn_prompts(task, section)
    total = sum(len(prompts) for _, prompts in worded) + len(redrawn)
    measured = [*((builder.space, prompts) for builder, prompts in worded), (task.space, redrawn)]
    events, found, done = events or Events(), [], 0
    for space, prompts in measured:

        def progress(more: int, _: int, done: int = done) -> None:
            events.progress(done + more, total)

        probabilities = label_probabilities(
            model,
            prompts,
            space,
            batch_tokens=section.batch_tokens,
            on_progress=progress,
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
