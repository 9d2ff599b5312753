"""Which labels a model leans to, and how much it learns from demonstrations' labels (StaICC-DIAG).

Letters: N prompts, C labels, K demonstrations. The values are those that the StaICC
benchmark describes, without the faults of its code; ``compat`` repeats them (docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.data import Generator
from abft_mlx.evaluation.forward import label_probabilities
from abft_mlx.evaluation.methods import domain_queries
from abft_mlx.evaluation.metrics import accuracy, softmax
from abft_mlx.events import Events
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

WORDS = 128
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
# What the benchmark regresses on by mistake: it subtracts the growing rates from one another.
COMPAT_CORRECTNESS = (1.0, 0.75, 0.25, -0.5, -1.5)


def wrong_labels(
    rows: Sequence[tuple[int, ...]], labels: Sequence[int], classes: int, seed: int = 42
) -> list[list[tuple[int, ...]]]:
    """Labels of every prompt's demonstrations at each of the five wrong-label rates.

    At rate r, floor(K · r) demonstrations of each prompt, drawn without repetition, carry the label
    after their own, the last class the first; where a row stands in a prompt twice, both do. As in
    the benchmark's source, one generator runs through all prompts of a rate
    and on into the next: a label that is wrong at one rate need not be wrong at the next.

    Args:
        rows: N rows of K indices into labels, in evaluation order.
        labels: class numbers of the demonstration split.
        classes: C.
        seed: 42 is StaICC's.

    Returns:
        For each rate, N rows of K class numbers.
    """
    generator = Generator(seed)
    made = []
    for rate in RATES:
        shown = []
        for row in rows:
            wrong = {row[i] for i in generator.draw(len(row), int(len(row) * rate))}
            shown.append(tuple((labels[index] + (index in wrong)) % classes for index in row))
        made.append(shown)
    return made


def entropy(mean: np.ndarray, *, compat: bool = False) -> float:
    """Entropy in nats of a (C,) mean probability vector; ln C where no label is favoured.

    With ``compat`` the vector goes through a softmax first unless it sums to exactly 1.0, as in the
    benchmark.
    """
    if compat and float(np.cumsum(mean)[-1]) != 1.0:
        mean = softmax(mean)
    inside = mean[mean > 0]
    return float(-(inside * np.log(inside)).sum())


def posterior_kl(probabilities: np.ndarray, gold: np.ndarray) -> float | None:
    """KL divergence in nats of the mean probabilities from the gold labels' frequencies.

    None where it is infinite: some label is gold nowhere (the protocol has no smoothing).
    """
    mean = probabilities.mean(axis=0)
    frequency = np.bincount(gold, minlength=len(mean)) / len(gold)
    favoured = mean > 0
    if (frequency[favoured] == 0).any():
        return None
    return float((mean[favoured] * np.log(mean[favoured] / frequency[favoured])).sum())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through points (x, y)."""
    away = np.array(x) - np.mean(x)
    return float((away * np.array(y)).sum() / (away**2).sum())


def correctness(demonstrations: int) -> list[float]:
    """Share of right labels among K demonstrations at each wrong-label rate."""
    return [1 - int(demonstrations * rate) / demonstrations for rate in RATES]


def prior_prompts(task: Task, section: EvaluationSection) -> tuple[list[Prompt], list[Prompt]]:
    """N prompts with an empty query, and N with one of random words; gold label 0.

    The demonstrations are those of the test prompts; their split gives the words.
    """
    builder = task.builder_for(allow_empty=True)
    pool = task.splits.demonstrations.pairs()
    sets = [[pool[row] for row in rows] for rows in task.test_rows(section)]
    words = domain_queries(task.splits.demonstrations.texts, len(sets), WORDS, section.seed)
    contextual = [
        builder.build(shown, "", 0, where=f"contextual-bias prompt {i}")
        for i, shown in enumerate(sets)
    ]
    domain = [
        builder.build(shown, query, 0, where=f"domain-bias prompt {i}")
        for i, (shown, query) in enumerate(zip(sets, words, strict=True))
    ]
    return contextual, domain


def wrong_label_prompts(task: Task, section: EvaluationSection) -> list[list[Prompt]]:
    """For each of the five rates of wrong labels the N test prompts; those at rate 0 are plain."""
    rows = task.test_rows(section)
    pool, asked = task.splits.demonstrations, task.splits.test.pairs()
    queries = task.test_queries(section)
    # Fixed demonstrations are wrong for all queries alike.
    each = queries if section.demonstrations == "fixed" else 1
    drawn = wrong_labels(rows[::each], pool.labels, len(task.space), section.seed)
    made = []
    for rate, labels in zip(RATES, drawn, strict=True):
        prompts = []
        for i, chosen in enumerate(rows):
            shown = labels[i // each]
            texts = [(pool.texts[row], label) for row, label in zip(chosen, shown, strict=True)]
            where = f"prompt {i} at wrong-label rate {rate}"
            prompts.append(task.builder.build(texts, *asked[i % queries], where=where))
        made.append(prompts)
    return made


def bias(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    vanilla: np.ndarray,
    gold: np.ndarray,
    events: Events | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Contextual, domain and posterior bias, and what wrong labels of demonstrations do (GLER).

    Args:
        model: a loaded model, with an adapter or without.
        task: what is asked.
        section: size, seed and batch size; ``compat`` for the benchmark's faults.
        vanilla: (N, C) probabilities of the test prompts.
        gold: (N,) their gold labels.
        events: who hears how many prompts of how many are done.
        ranks: the processes that measure together; each gets the same.

    Returns:
        ``contextual_entropy`` (empty query) and ``domain_entropy`` (random words) of the mean
        probabilities, to compare with ``maximum_entropy`` = ln C; ``posterior_kl``; ``gler``, the
        slope of accuracy against the share of right labels; ``gler_accuracy``, the accuracy at each
        rate of wrong labels.
    """
    contextual, domain = prior_prompts(task, section)
    wrong = wrong_label_prompts(task, section)[1:]  # at rate 0 they are the vanilla prompts
    parts = [contextual, domain, *wrong]
    probabilities = label_probabilities(
        model,
        [prompt for prompts in parts for prompt in prompts],
        task.space,
        batch_tokens=section.batch_tokens,
        on_progress=(events or Events()).progress,
        ranks=ranks,
    )
    empty, words, *rates = np.split(probabilities, len(parts))
    accuracies = [accuracy(found, gold) for found in (vanilla, *rates)]
    x = COMPAT_CORRECTNESS if section.compat else correctness(task.demonstrations)
    return {
        "contextual_entropy": entropy(_mean(empty), compat=section.compat),
        "domain_entropy": entropy(_mean(words), compat=section.compat),
        "maximum_entropy": math.log(len(task.space)),
        "posterior_kl": posterior_kl(vanilla, gold),
        "gler": slope(x, accuracies),
        "gler_accuracy": {str(rate): share for rate, share in zip(RATES, accuracies, strict=True)},
    }


def _mean(probabilities: np.ndarray) -> np.ndarray:
    """Mean row of (N, C), added up one by one: compat asks whether it sums to exactly 1."""
    return np.cumsum(probabilities, axis=0)[-1] / len(probabilities)
