"""What a study's models answer: confusion matrices and reliability diagrams."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import confusions, reliability
from abft_mlx.analysis.measurements import Measurement, of_task, rows, scored, tasks
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.plotting import Plot, by_model, caption, stem
from abft_mlx.analysis.run_facts import Method, method

_FILE = Path("study.json")


def confusion_matrices(
    document: dict[str, Any], found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """The untrained base's and the first trained method's, for each model and task.

    Counts are summed over seeds; ABFT is the trained method where the study has it.
    """
    made = []
    plain = [one for one in scored(found) if one.plain and not one.sweep]
    for model, some in by_model(plain):
        for task in tasks(some):
            groups = {key[1]: group for key, group in rows(of_task(some, task)).items()}
            trained = [name for name in groups if name != "vanilla"]
            first = "abft" if "abft" in trained else next(iter(trained), None)
            counts = {
                name: summed
                for name in ("vanilla", first)
                if name in groups and (summed := _counts(groups[name])) is not None
            }
            if not counts:
                continue
            classes = len(next(iter(counts.values())))
            draw = partial(
                confusions.draw,
                counts=list(counts.values()),
                names=_labels(document, groups, classes),
                state_names=list(counts),
            )
            shown = [one for name in counts for one in groups[name]]
            line = caption(
                model, shown, "; ".join(("counts are summed over seeds", *confusions.told(classes)))
            )
            height = partial(_height, classes=classes, states=len(counts))
            made.append(Plot(stem("confusion", model, task), draw, line, height))
    return made


def _height(across: float, classes: int, states: int) -> float:
    return confusions.height(classes, states, across)


def _counts(group: list[Measurement]) -> np.ndarray | None:
    tables = [table for one in group if (table := _read(one).confusion) is not None]
    if not tables or len({one.shape for one in tables}) > 1:
        return None
    return np.sum(tables, axis=0)


def _labels(
    _document: dict[str, Any], groups: dict[str, list[Measurement]], classes: int
) -> list[str]:
    """Names of the classes where cells have them, or else their numbers."""
    for group in groups.values():
        for one in group:
            names = one.part("labels") or ()
            if len(names) == classes:
                return [str(name) for name in names]
    return [str(n) for n in range(classes)]


def reliability_diagrams(
    _document: dict[str, Any], found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """A line for each method, for each model and task; bins are averaged over seeds by count."""
    made = []
    plain = [one for one in scored(found) if one.plain and not one.sweep]
    for model, some in by_model(plain):
        for task in tasks(some):
            pooled = {
                key[1]: bins
                for key, group in rows(of_task(some, task)).items()
                if (bins := _pooled(group)) is not None
            }
            if not pooled:
                continue
            confidence, accuracy, count = (np.stack(part) for part in zip(*pooled.values(),
                                                                          strict=True))  # fmt: skip
            draw = partial(
                reliability.draw,
                confidence=confidence,
                accuracy=accuracy,
                count=count,
                names=list(pooled),
            )
            shown = [one for one in of_task(some, task) if one.label in pooled]
            line = caption(model, shown, "all seeds' prompts in 10 bins of equal width")
            made.append(Plot(stem("reliability", model, task), draw, line))
    return made


def _pooled(group: list[Measurement]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Mean confidence, share right and prompts (bins,) each, of all seeds together."""
    read = [_read(one) for one in group]
    parts = [
        (one.confidence, one.accuracy, one.count)
        for one in read
        if one.confidence is not None and one.accuracy is not None and one.count is not None
    ]
    if not parts or len({count.shape for _, _, count in parts}) > 1:
        return None
    count = np.sum([one for _, _, one in parts], axis=0)
    sums = [
        np.sum([np.nan_to_num(part[index]) * part[2] for part in parts], axis=0) for index in (0, 1)
    ]
    confidence, accuracy = (
        np.divide(one, count, out=np.full(len(count), np.nan), where=count > 0) for one in sums
    )
    return confidence, accuracy, count


def _read(one: Measurement) -> Method:
    return method(one.values, _FILE)
