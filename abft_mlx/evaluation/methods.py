"""Ways to predict labels with one model, side by side on the same prompts.

Letters: N prompts, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.evaluation import calibration
from abft_mlx.evaluation._progress import OnStage, Progress, part
from abft_mlx.evaluation.comparisons import right_string
from abft_mlx.evaluation.continuations import vocabulary_logits
from abft_mlx.evaluation.intervals import intervals, mcnemar
from abft_mlx.evaluation.metrics import predictions, softmax, summary
from abft_mlx.evaluation.outputs import Outputs, hidden_states
from abft_mlx.evaluation.probabilities import label_probabilities, label_scores
from abft_mlx.prompts import Prompt
from abft_mlx.ranks import Ranks
from abft_mlx.recipe import EvaluationSection
from abft_mlx.task import Task

BASE = "vanilla"
_ANCHORED = ("hidden", "knn")


def zero_shot_prompts(task: Task, section: EvaluationSection) -> list[Prompt]:
    """The test queries without demonstrations, one prompt each.

    Args:
        task: its test split is asked.
        section: how many queries.

    Raises:
        PromptError: a prompt cannot be built.
    """
    asked = task.splits.test.pairs()[: task.test_queries(section)]
    return [
        task.builder.build([], *query, where=f"zero-shot prompt {number}")
        for number, query in enumerate(asked)
    ]


def probabilities_of(
    model: nn.Module,
    task: Task,
    prompts: Sequence[Prompt],
    section: EvaluationSection,
    on_progress: Progress | None = None,
    ranks: Ranks | None = None,
    on_stage: OnStage | None = None,
) -> dict[str, np.ndarray]:
    """Label probabilities of the test prompts by every method of a section.

    All methods but zero_shot look at the same forward pass over ``prompts``.

    Args:
        model: a loaded model.
        task: what the prompts are of.
        prompts: N test prompts of the task, in the order of evaluation; prompt i has query i modulo
            the number of queries.
        section: methods and sizes.
        on_progress: told how many prompts of how many are done, calibration prompts included.
        ranks: the processes that measure together; each gets the same.
        on_stage: told what the prompts are that are asked.

    Returns:
        For each method (N, C) float64.

    Raises:
        PromptError: a calibration prompt cannot be built.
    """
    names = list(dict.fromkeys(section.methods))
    # All prompts first: one that cannot be built shows before the model works.
    extra = _extra_prompts(task, names, section)
    together = [*extra.values(), prompts] if set(names) - {"zero_shot"} else [*extra.values()]
    passes = _Passes(model, task, section, sum(map(len, together)), on_progress, ranks, on_stage)
    found: dict[str, np.ndarray] = {}
    if "zero_shot" in names:
        each = passes.probabilities(extra["zero_shot"], "zero_shot")
        found["zero_shot"] = each[np.arange(len(prompts)) % len(each)]
    if set(names) - {"zero_shot"}:
        found |= _demonstrated(passes, names, extra, prompts)
    return {name: found[name] for name in names}


def entry(
    probabilities: np.ndarray, gold: np.ndarray, groups: np.ndarray, section: EvaluationSection
) -> dict[str, Any]:
    """One method of eval's JSON.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
        groups: (N,) which prompts belong together: the number of each one's query.
        section: bootstrap samples, seed and compat.

    Returns:
        The metrics; ``interval``, low and high end of each, unless bootstrap_samples is 0; and
        ``right``, N characters 0 or 1, with which any two measurements can be compared.
    """
    compat = section.compat
    made = summary(probabilities, gold, compat=compat)
    if section.bootstrap_samples:
        made["interval"] = intervals(
            probabilities, gold, groups, section.bootstrap_samples, section.seed, compat=compat
        )
    return made | {"right": right_string(probabilities, gold)}


def report(
    probabilities: Mapping[str, np.ndarray],
    gold: np.ndarray,
    groups: np.ndarray,
    section: EvaluationSection,
) -> dict[str, Any]:
    """What several methods are worth, and how they compare.

    Args:
        probabilities: for each method (N, C), of the same prompts.
        gold: (N,) label indices.
        groups: (N,) which prompts belong together: the number of each one's query.
        section: bootstrap samples, seed and compat.

    Returns:
        ``methods``, an `entry` for each, and ``comparisons``: exact McNemar tests of every other
        method against vanilla, where that was measured.
    """
    right = {name: predictions(one) == gold for name, one in probabilities.items()}
    return {
        "methods": {name: entry(one, gold, groups, section) for name, one in probabilities.items()},
        "comparisons": [
            {"first": name, "second": BASE} | mcnemar(right[name], right[BASE])
            for name in right
            if BASE in right and name != BASE
        ],
    }


def _extra_prompts(
    task: Task, names: Sequence[str], section: EvaluationSection
) -> dict[str, list[Prompt]]:
    """The prompts that methods need besides the test prompts."""
    made = {}
    if "zero_shot" in names:
        made["zero_shot"] = zero_shot_prompts(task, section)
    if "contextual" in names:
        made["contextual"] = calibration.contextual_prompts(
            task, section.calibration_prompts, section.seed
        )
    if "domain" in names:
        made["domain"] = calibration.domain_prompts(task, section.calibration_prompts, section.seed)
    if set(names) & set(_ANCHORED):
        made["anchors"] = calibration.anchor_prompts(task, section.anchor_prompts, section.seed)
    return made


def _demonstrated(
    passes: _Passes,
    names: Sequence[str],
    extra: Mapping[str, Sequence[Prompt]],
    prompts: Sequence[Prompt],
) -> dict[str, np.ndarray]:
    """The methods that look at prompts with demonstrations."""
    found = {}
    reference = {
        name: passes.probabilities(extra[name], name)
        for name in ("contextual", "domain")
        if name in extra
    }
    if "anchors" in extra:
        _, anchors = passes.probabilities_and_hidden(extra["anchors"], "anchors")
        anchor_gold = np.array([one.gold for one in extra["anchors"]])
        found[BASE], hidden = passes.probabilities_and_hidden(prompts, BASE)
    else:
        found[BASE] = passes.probabilities(prompts, BASE)
    for name, one in reference.items():
        found[name] = calibration.divided(found[BASE], one)
    if "batch" in names:
        found["batch"] = calibration.batch(found[BASE])
    if "hidden" in names:
        found["hidden"] = calibration.nearest_centroid(found[BASE], hidden, anchors, anchor_gold)
    if "knn" in names:
        found["knn"] = calibration.neighbour_votes(
            vocabulary_logits(passes.model, hidden),
            vocabulary_logits(passes.model, anchors),
            anchor_gold,
            found[BASE].shape[1],
        )
    return found


class _Passes:
    """Forward passes that report their progress as one."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        section: EvaluationSection,
        total: int,
        on_progress: Progress | None,
        ranks: Ranks | None,
        on_stage: OnStage | None,
    ) -> None:
        self.model = model
        self.space = task.space
        self.batch_tokens = section.batch_tokens
        self.total = total
        self.done = 0
        self.on_progress = on_progress
        self.ranks = ranks
        self.on_stage = on_stage

    def probabilities(self, prompts: Sequence[Prompt], name: str) -> np.ndarray:
        """Label probabilities (N, C) of prompts that are made for a method, or of its anchors."""
        self._tell(name)
        found = label_probabilities(
            self.model,
            prompts,
            self.space,
            batch_tokens=self.batch_tokens,
            on_progress=part(self.on_progress, self.done, self.total),
            ranks=self.ranks,
        )
        self.done += len(prompts)
        return found

    def probabilities_and_hidden(
        self, prompts: Sequence[Prompt], name: str
    ) -> tuple[np.ndarray, mx.array]:
        """Label probabilities (N, C) and hidden states (N, width) of one pass."""
        self._tell(name)
        found = np.zeros((len(prompts), len(self.space)))

        def read(one: Outputs) -> None:
            found[one.rows] = softmax(label_scores(self.model, one, self.space))

        states = hidden_states(
            self.model,
            prompts,
            space=self.space,
            batch_tokens=self.batch_tokens,
            each=read,
            on_progress=part(self.on_progress, self.done, self.total),
            ranks=self.ranks,
        )
        self.done += len(prompts)
        return found, states

    def _tell(self, name: str) -> None:
        if self.on_stage is not None:
            self.on_stage("test" if name == BASE else name.replace("_", "-"))
