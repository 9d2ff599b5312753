"""Demonstrations that all carry labels other than the query's (the paper's A.4 and figure 3).

A model that only copies labels from its demonstrations gets none of these prompts right. Letters:
N prompts, K demonstrations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
import numpy as np

from abft_mlx.data import Generator
from abft_mlx.errors import DataError
from abft_mlx.evaluation.forward import label_probabilities
from abft_mlx.evaluation.methods import entry, zero_shot_prompts
from abft_mlx.events import Events
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

# The paper's sets need at most 34 draws a row on average. A pool that needs more than this would
# take hours; it is drawn from its other rows straight away, which has the same distribution.
LONGEST_SEARCH = 1000


def unseen_rows(
    labels: Sequence[int], gold: Sequence[int], repeats: int, k: int, seed: int = 42
) -> list[tuple[int, ...]]:
    """Rows of the demonstration pool for every test prompt, none with the query's label.

    As StaICC does it: the sampler's own rows first; then, in ascending order, every row that holds
    its query's label is drawn again, by the same generator, until it does not.

    Args:
        labels: class numbers of the demonstration pool.
        gold: class numbers of the test queries.
        repeats: sets of demonstrations for each query.
        k: demonstrations in a prompt; chosen with repetition only where k > len(labels).
        seed: 42 is StaICC's.

    Returns:
        len(gold) · repeats rows of k indices; query q in repeat r has row q + len(gold) · r.

    Raises:
        ValueError: too few rows without some query's label; its message says how many.
    """
    generator = Generator(seed)
    pool, again = len(labels), k > len(labels)
    rows = [tuple(generator.draw(pool, k, again)) for _ in range(len(gold) * repeats)]
    others = {label: [i for i in range(pool) if labels[i] != label] for label in sorted(set(gold))}
    for i, row in enumerate(rows):
        label = gold[i % len(gold)]
        left = len(others[label])
        if left < (1 if again else k):
            raise ValueError(f"{left} of {pool} rows are not of label {label}")
        tries = (pool / left) ** k if again else math.comb(pool, k) / math.comb(left, k)
        while any(labels[index] == label for index in row):
            if tries > LONGEST_SEARCH:
                row = tuple(others[label][index] for index in generator.draw(left, k, again))
            else:
                row = tuple(generator.draw(pool, k, again))
        rows[i] = row
    return rows


def unseen_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """The test prompts with demonstrations of labels other than the query's."""
    pool = task.splits.demonstrations
    asked = task.splits.test.pairs()[: task.test_queries(section)]
    gold = [label for _, label in asked]
    k = task.demonstrations
    _check(task, gold)
    # Fixed demonstrations are the same for all queries of a label.
    drawn_for = sorted(set(gold)) if section.demonstrations == "fixed" else gold
    drawn = unseen_rows(pool.labels, drawn_for, section.repeats, k, section.seed)
    made = []
    for i in range(len(asked) * section.repeats):
        repeat, query = divmod(i, len(asked))
        place = query if drawn_for is gold else drawn_for.index(gold[query])
        rows = drawn[place + len(drawn_for) * repeat]
        shown = [(pool.texts[row], pool.labels[row]) for row in rows]
        where = f"unseen-label prompt {i}"
        made.append(task.builder.build(shown, *asked[query], where=where))
    return made


def _check(task: Task, gold: Sequence[int]) -> None:
    """See that every query's label leaves enough rows to draw from."""
    pool = task.splits.demonstrations
    k = task.demonstrations
    needed = 1 if k > len(pool) else k
    for label in sorted(set(gold)):
        others = sum(other != label for other in pool.labels)
        if others < needed:
            raise DataError(
                f"{pool.source}: {others} of {len(pool)} demonstration rows have a label other "
                f"than {pool.names[label]!r}, and unseen-label prompts need {needed} of them: add "
                "rows of other labels, lower prompt.demonstrations, or leave unseen out of "
                "evaluation.protocols"
            )


def unseen(
    model: nn.Module,
    task: Task,
    section: EvaluationSection,
    events: Events | None = None,
    vanilla: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Metrics with the protocol's demonstrations, with unseen labels, and with none.

    Args:
        model: a loaded model, with an adapter or without.
        task: what is asked.
        section: size, seed, batch size, bootstrap samples, compat.
        events: who hears how many prompts of how many are done.
        vanilla: (N, C) probabilities of the test prompts, if they are known.
        ranks: the processes that measure together; each gets the same.

    Returns:
        ``random`` (the test prompts), ``unseen`` and ``zero_shot``, each the metrics of N prompts
        in the same order of queries, with ``interval`` unless ``bootstrap_samples`` is 0, and
        ``right``, a character for each prompt.

    Raises:
        DataError: too few demonstration rows without some query's label.
    """
    events = events or Events()
    random = task.test_prompts(section)
    # No batch holds prompts with and without demonstrations.
    shown = [*(random if vanilla is None else ()), *unseen_prompts(task, section)]
    alone = zero_shot_prompts(task, section)

    def measure(prompts: list[Prompt], before: int) -> np.ndarray:
        return label_probabilities(
            model,
            prompts,
            task.space,
            batch_tokens=section.batch_tokens,
            on_progress=lambda done, _: events.progress(before + done, len(shown) + len(alone)),
            ranks=ranks,
        )

    together = measure(shown, 0)
    seen = together[: len(random)] if vanilla is None else vanilla
    other = together[-len(random) :]
    without = np.tile(measure(alone, len(shown)), (section.repeats, 1))
    gold = np.array([prompt.gold for prompt in random])
    groups = np.arange(len(gold)) % len(alone)
    return {
        name: entry(probabilities, gold, groups, section)
        for name, probabilities in (("random", seen), ("unseen", other), ("zero_shot", without))
    }
