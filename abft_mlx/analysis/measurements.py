"""One measurement for each way of predicting that a study has, read from its facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from abft_mlx.analysis.facts import PREDICTING, UNTRAINED, method_order, sweep_order
from abft_mlx.analysis.statistics import share_right


@dataclass(frozen=True)
class Measurement:
    """Label predictions of one model on one task by one method, after one training or none.

    Attributes:
        model: the study's name for the model.
        source: where the model comes from.
        task: the task's name.
        method: how it predicts: vanilla and the calibrations of an untrained base, or what trained
            it (with a calibration behind it: ``abft + contextual``).
        sweep: swept settings and their values.
        seed: training.seed; None for an untrained base.
        values: the metrics of one method of eval's JSON; empty where accuracy was not measured.
        cell: the compact cell that it stands in.
        plain: whether it is the cell's own prediction, to which robustness, bias, unseen labels and
            transfer belong.
    """

    model: str
    source: str
    task: str
    method: str
    sweep: dict[str, Any]
    seed: int | None
    values: dict[str, Any]
    cell: dict[str, Any] = field(repr=False)
    plain: bool

    @property
    def accuracy(self) -> float:
        """In 0..1."""
        return float(self.values["accuracy"])

    @property
    def right(self) -> str:
        """N characters of 0 and 1, or nothing where the cell does not have them."""
        return str(self.values.get("right", ""))

    @property
    def prompts(self) -> int:
        """N."""
        return len(self.right) or int(self.part("prompts") or 0)

    @property
    def queries(self) -> int:
        """Q: every query is asked ``repeats`` times."""
        return self.prompts // max(1, int(self.cell["repeats"]))

    @property
    def shares(self) -> np.ndarray:
        """(Q,) how often each query was answered rightly."""
        return share_right(self.right, self.queries)

    @property
    def label(self) -> str:
        """The method, and what was swept."""
        swept = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.swept)
        return f"{self.method} ({swept})" if swept else self.method

    @property
    def swept(self) -> list[tuple[str, Any]]:
        """Swept settings in the order of their names."""
        return sorted(self.sweep.items())

    def part(self, name: str) -> Any:
        """A part of the cell's evaluation, or None."""
        return self.cell["evaluation"].get(name)


def measurements(document: dict[str, Any]) -> list[Measurement]:
    """Every measurement of a study's facts, in their order."""
    found = []
    for cell in document["cells"]:
        # Other protocols can be measured without accuracy: such a cell has no values.
        for name, values in (cell["evaluation"].get("methods") or {"vanilla": {}}).items():
            method = _method(cell, name)
            if method is not None:
                found.append(
                    Measurement(
                        model=cell["model"],
                        source=cell["source"],
                        task=cell["task"],
                        method=method,
                        sweep=cell["sweep"],
                        seed=cell["seed"],
                        values=values,
                        cell=cell,
                        plain=name == "vanilla",
                    )
                )
    return found


def _method(cell: dict[str, Any], name: str) -> str | None:
    """What to call a way of predicting in a cell; None for the vanilla that comes along with it."""
    if cell["method"] == UNTRAINED:
        return name
    if cell["like"] in PREDICTING:
        return cell["method"] if name == cell["like"] else None
    return cell["method"] if name == "vanilla" else f"{cell['method']} + {name}"


def scored(found: Iterable[Measurement]) -> list[Measurement]:
    """Those whose accuracy was measured."""
    return [one for one in found if one.values]


def rows(found: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Measurements by (model, label), in the order of tables."""
    some = list(found)
    models = list(dict.fromkeys(one.model for one in some))
    some.sort(key=lambda one: (models.index(one.model), method_order(one.method),
                               sweep_order(one.sweep)))  # fmt: skip
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for one in some:
        grouped.setdefault((one.model, one.label), []).append(one)
    return grouped


def of_task(found: Iterable[Measurement], task: str) -> list[Measurement]:
    """Those of one task, by seed."""
    return sorted((one for one in found if one.task == task), key=lambda one: one.seed or 0)


def tasks(found: Sequence[Measurement]) -> list[str]:
    """Names of tasks, in order."""
    return list(dict.fromkeys(one.task for one in found))


def paired(
    first: Sequence[Measurement], second: Sequence[Measurement]
) -> list[tuple[list[Measurement], list[Measurement]]]:
    """Measurements of two methods, task by task, on the same prompts.

    Of each task the training seeds that both have; where the second was not trained, all of the
    first against its one measurement. Tasks that only one has are left out.
    """
    pairs = []
    for task in tasks(first):
        ours, theirs = of_task(first, task), of_task(second, task)
        if ours and theirs and not _untrained(ours) and not _untrained(theirs):
            common = {one.seed for one in ours} & {one.seed for one in theirs}
            ours = [one for one in ours if one.seed in common]
            theirs = [one for one in theirs if one.seed in common]
        ours, theirs = [one for one in ours if one.right], [one for one in theirs if one.right]
        if ours and theirs and len({len(one.right) for one in (*ours, *theirs)}) == 1:
            pairs.append((ours, theirs))
    return pairs


def _untrained(found: Sequence[Measurement]) -> bool:
    return all(one.seed is None for one in found)


def matrix(found: Sequence[Measurement]) -> np.ndarray:
    """(S, Q) shares of right answers of one task's measurements."""
    return np.stack([one.shares for one in found])
