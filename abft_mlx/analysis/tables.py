"""``table.md``: what a study measured, with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abft_mlx.analysis import table_parts
from abft_mlx.analysis.comparison import Comparison, average, compare, task_means
from abft_mlx.analysis.measurements import (
    Measurement,
    measurements,
    of_task,
    rows,
    scored,
    tasks,
)
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.statistics import HOW, mean_and_spread
from abft_mlx.analysis.text import (
    NOTHING,
    beside,
    gain,
    interval,
    p_value,
    percent,
    table,
)

EXPLANATION = (
    "Rates are percent; ± is the standard deviation over training seeds, where there are several. "
    "n is the number of prompts of one run. " + HOW + " p: exact McNemar test against vanilla on "
    "the same prompts, all tasks and seeds pooled; it takes prompts as independent, which those "
    "of one query are not, so read the interval first. Tasks are averaged plainly."
)


def table_md(document: dict[str, Any]) -> str:
    """The Markdown page of a study's facts.

    Args:
        document: from :func:`abft_mlx.analysis.facts.facts`.
    """
    found = measurements(document)
    paper = Paper(document["paper"].get("table"))
    parts = [f"# {document['name']}"]
    if document["description"]:
        parts.append(document["description"])
    if document["failed"]:
        count = len(document["failed"])
        parts.append(
            f"{count} cell{'' if count == 1 else 's'} failed, listed below; the tables hold the "
            "others."
        )
    if document["machines"]:
        parts.append("Measured on: " + "; ".join(document["machines"]) + ".")
    if scored(found):
        parts += ["## Accuracy", accuracy(scored(found), paper), EXPLANATION]
        if document["paper"].get("table"):
            parts.append(f"The paper's numbers: {paper.facts['citation']}, {paper.table}.")
    parts += table_parts.sections(document, found, paper)
    if not document["cells"]:
        parts.append("No cell is done.")
    return "\n\n".join(parts) + "\n"


def accuracy(found: Sequence[Measurement], paper: Paper) -> str:
    """Models and methods against tasks."""
    columns = tasks(found)
    header = [
        "model",
        "method",
        "seeds",
        *(f"{paper.task(task)} (n = {_prompts(found, task)})" for task in columns),
        "mean",
        "95% interval",
        "paper's mean",
        "over vanilla",
        "p",
    ]
    lines = []
    grouped = rows(found)
    for (model, label), some in grouped.items():
        first = some[0]
        called = paper.model(model, first.source)
        means = task_means(some)
        # A mean over fewer tasks than the others' would not be comparable.
        mean = mean_and_spread([one for one, _ in means.values()])[0]
        complete = list(means) == [task for task in columns if task in means] == columns
        against = None if label == "vanilla" else compare(some, _vanilla(grouped, first))
        lines.append(
            [
                model,
                label,
                _seeds(some),
                *(_task_cell(some, means, task, paper, called) for task in columns),
                percent(mean, _spread(some)) if complete else NOTHING,
                interval(average(some)) if complete else NOTHING,
                beside(mean, paper.average(called, first.method, columns)) or NOTHING,
                _against(against, len(columns)),
                p_value(against.p_value) if against else NOTHING,
            ]
        )
    return table(header, lines)


def _against(against: Comparison | None, columns: int) -> str:
    if against is None:
        return NOTHING
    some = len(against.tasks)
    return gain(against.difference) + (f" on {some} of {columns} tasks" if some < columns else "")


def _vanilla(
    grouped: dict[tuple[str, str], list[Measurement]], like: Measurement
) -> list[Measurement]:
    """The untrained base, with the same swept settings where they matter to it."""
    of_model = [one for (model, _), some in grouped.items() if model == like.model for one in some]
    plain = [one for one in of_model if one.method == "vanilla"]
    return [one for one in plain if one.sweep.items() <= like.sweep.items()]


def _task_cell(
    some: Sequence[Measurement],
    means: dict[str, tuple[float, float | None]],
    task: str,
    paper: Paper,
    called: str | None,
) -> str:
    if task not in means:
        return NOTHING
    mean, spread = means[task]
    published = None if some[0].sweep else paper.accuracy(called, some[0].method, task)
    theirs = beside(mean, published)
    return percent(mean, spread) + (f" ({theirs})" if theirs else "")


def _spread(some: Sequence[Measurement]) -> float | None:
    """Standard deviation over seeds of the mean over tasks, of seeds that have all tasks."""
    names = tasks(some)
    seeds = sorted({one.seed for one in some if one.seed is not None})
    means = []
    for seed in seeds:
        of_seed = [one.accuracy for one in some if one.seed == seed]
        if len(of_seed) == len(names):
            means.append(mean_and_spread(of_seed)[0])
    return mean_and_spread(means)[1] if means else None


def _seeds(some: Sequence[Measurement]) -> str:
    counts = sorted({len(of_task(some, task)) for task in tasks(some)})
    if all(one.seed is None for one in some):
        return NOTHING
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _prompts(found: Sequence[Measurement], task: str) -> str:
    counts = sorted({one.prompts for one in found if one.task == task and one.prompts})
    if not counts:
        return "?"
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
