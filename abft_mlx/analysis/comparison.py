"""A method's mean over tasks, and how it stands against another on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abft_mlx.analysis.measurements import Measurement, matrix, of_task, paired, tasks
from abft_mlx.analysis.statistics import Estimate, bootstrap, mean_and_spread, pooled_mcnemar


@dataclass(frozen=True)
class Comparison:
    """One method less another.

    Attributes:
        difference: of accuracy, mean over the tasks that both have.
        p_value: of the pooled exact McNemar test.
        tasks: names of these tasks.
        runs: training runs of the first method.
        prompts: prompts of one run, all tasks together.
    """

    difference: Estimate
    p_value: float
    tasks: tuple[str, ...]
    runs: int
    prompts: int


def average(found: Sequence[Measurement]) -> Estimate | None:
    """Mean accuracy over tasks with its interval; None where no prompts are known."""
    matrices = [
        matrix([one for one in of_task(found, task) if one.right])
        for task in tasks(found)
        if any(one.right for one in of_task(found, task))
    ]
    return bootstrap(matrices) if len(matrices) == len(tasks(found)) > 0 else None


def task_means(found: Sequence[Measurement]) -> dict[str, tuple[float, float | None]]:
    """Mean and spread of accuracy over seeds, by task."""
    return {
        task: mean_and_spread([one.accuracy for one in of_task(found, task)])
        for task in tasks(found)
    }


def compare(first: Sequence[Measurement], second: Sequence[Measurement]) -> Comparison | None:
    """How much more accurate the first method is; None where no task has both."""
    pairs = paired(first, second)
    if not pairs:
        return None
    texts = [
        (one.right, (theirs[0] if len(theirs) == 1 else theirs[index]).right)
        for ours, theirs in pairs
        for index, one in enumerate(ours)
    ]
    return Comparison(
        difference=bootstrap(
            [matrix(ours) for ours, _ in pairs], [matrix(theirs) for _, theirs in pairs]
        ),
        p_value=pooled_mcnemar(*zip(*texts, strict=True)),
        tasks=tuple(ours[0].task for ours, _ in pairs),
        runs=sum(len(ours) for ours, _ in pairs),
        prompts=sum(ours[0].prompts for ours, _ in pairs),
    )
