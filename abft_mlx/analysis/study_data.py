"""A study's facts (``study.json``), its measurements, and the paper's numbers.

No texts, wordings or paths are in the facts, only the names of the classes, so that they can be
kept and passed on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from abft_mlx.analysis.run_data import Measured, Method, Numbers, Object, parsed, short
from abft_mlx.analysis.statistics import mean_and_spread, share_right
from abft_mlx.study.methods import PREDICTING, UNTRAINED

SCHEMA = 1
# The order in which methods stand in tables and figures; others follow by name.
METHODS = (
    *PREDICTING, "picl", "metaicl", "end_to_end", "end_to_end_qk", "abft_mixture", "abft",
    "extrapolate", "no_pid", "no_filter", "no_punish", "no_reward", "plane",
)  # fmt: skip
TABLES = ("table1", "table2", "table3", "table4")
_KEPT = ("id", "task", "method", "seed", "error", "run", "shift", "census", "seconds")
_PARTS = ("labels", "methods", "comparisons", "robustness", "bias", "unseen", "transfer",
          "prompts", "base")  # fmt: skip
_PAPER = Path(__file__).resolve().parent.parent / "assets" / "paper_targets.json"
# What the paper compares with under the name of a checkpoint instead of a method.
_CHECKPOINTS = ("PICL", "MetaICL")


class Paper:
    """The published tables of arXiv 2505.14233, in percent, by the names that studies use.

    Args:
        table: of ``TABLES``, or None for no table.
    """

    def __init__(self, table: str | None = None) -> None:
        self.table = table

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All of ``assets/paper_targets.json``."""
        return json.loads(_PAPER.read_text(encoding="utf-8"))

    def model(self, name: str, source: str) -> str | None:
        """What the paper calls a model, by the study's name for it or where it comes from."""
        ids = self.facts["model_ids"]
        if name in ids or any(name == f"{one} {end}" for one in ids for end in _CHECKPOINTS):
            return name
        return next((known for known, one in ids.items() if one == source), None)

    def task(self, name: str) -> str:
        """What the paper calls a task, or the name itself."""
        return self.facts["tasks"].get(name, name)

    def order(self, model: str, source: str, task: str) -> tuple[int, str, int, str]:
        """Sort key of models and tasks: the paper's order, then others by name."""
        models, tasks = list(self.facts["model_ids"]), list(self.facts["tasks"])
        called = self.model(model, source) or ""
        first = next((n for n, one in enumerate(models) if called.startswith(one)), len(models))
        return first, model, tasks.index(task) if task in tasks else len(tasks), task

    def row(self, model: str | None, method: str) -> dict[str, Any]:
        """The table's entry for a model and method; empty where it has none."""
        if self.table is None or model is None:
            return {}
        for checkpoint in _CHECKPOINTS:
            if model.endswith(f" {checkpoint}"):
                model = model.removesuffix(f" {checkpoint}")
                # A published checkpoint, prompted plainly, is the paper's row of that name.
                method = checkpoint.lower() if method == "vanilla" else ""
        return self.facts.get(self.table, {}).get(model, {}).get(method, {})

    def accuracy(self, model: str | None, method: str, task: str) -> float | None:
        """Accuracy on one task."""
        return self.row(model, method).get("accuracy", {}).get(self.task(task))

    def average(self, model: str | None, method: str, tasks: list[str]) -> float | None:
        """Mean accuracy, where our tasks are all of the paper's."""
        if {self.task(one) for one in tasks} != set(self.facts["tasks"].values()):
            return None
        return self.row(model, method).get("average")

    def consistency(self, model: str | None, kind: str, method: str) -> float | None:
        """Table 3: ``kind`` is template or demonstrations; vanilla is the untrained base."""
        if self.table != "table3" or model is None:
            return None
        role = "untrained" if method == "vanilla" else method
        return self.facts["table3"].get(model, {}).get(kind, {}).get(role)


def facts(study: Any, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of a study, its cells in an order of their own.

    Args:
        study: anything with ``name``, ``description``, ``paper`` and ``figures``.
        cells: cell documents in any order.

    Returns:
        ``{"schema", "name", "description", "paper", "figures", "machines", "cells", "failed"}``.
    """
    done = [_compact(cell) for cell in cells if cell.get("status") == "done"]
    failed = [
        {key: cell.get(key) for key in ("id", "model", "task", "method", "seed", "error")}
        for cell in cells
        if cell.get("status") != "done"
    ]
    paper = Paper()
    return {
        "schema": SCHEMA,
        "name": study.name,
        "description": study.description,
        "paper": dict(study.paper or {}),
        "figures": list(study.figures or []),
        "machines": sorted({str(one["device"]) for one in cells if one.get("device")}),
        "cells": sorted(
            done,
            key=lambda cell: (
                paper.order(cell["model"], cell["source"], cell["task"]),
                method_order(cell["method"]),
                sweep_order(cell["sweep"]),
                -1 if cell["seed"] is None else cell["seed"],
                cell["id"],
            ),
        ),
        "failed": sorted(failed, key=lambda one: str(one["id"])),
    }


def _compact(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell without its recipe, of which the settings that matter here are kept."""
    recipe = cell.get("recipe") or {}
    objective, training = recipe.get("objective") or {}, recipe.get("training") or {}
    measured = cell.get("evaluation") or {}
    return {
        "model": cell["model"],
        "source": short(str(recipe.get("model") or cell["model"])),
        "like": cell.get("like") or cell["method"],
        "sweep": dict(cell.get("sweep") or {}),
        **{key: cell.get(key) for key in _KEPT},
        **{key: cell[key] for key in ("plane", "extrapolation") if cell.get(key)},
        "repeats": (recipe.get("evaluation") or {}).get("repeats", 1),
        "settings": {
            "objective": objective.get("kind"),
            "adapter": (recipe.get("adapter") or {}).get("kind"),
            **{key: objective.get(key) for key in ("punish", "reward")},
            **{key: training.get(key) for key in ("examples", "updates", "learning_rate")},
        },
        "evaluation": {key: measured[key] for key in _PARTS if measured.get(key)},
    }


def method_order(method: str) -> tuple[int, str]:
    """Sort key of a method's name; ``untrained`` comes first."""
    base = method.partition(" + ")[0]
    known = METHODS.index(base) if base in METHODS else len(METHODS)
    return (-1 if base == UNTRAINED else known, method)


def sweep_order(sweep: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of swept settings: numbers by size."""
    return tuple(
        (key, isinstance(value, str), value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(sweep.items())
    )


class CellEvaluation(Measured):
    """What a cell measured."""

    labels: list[str] = Field(default_factory=list)
    prompts: int | None = None


class Training(BaseModel):
    """What a cell's training came to."""

    seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    updates: int | None = None
    curve: list[dict[str, float | None]] = []


class Census(BaseModel):
    """(L, H) tables of the heads."""

    prompts: int | None = None
    magnitude: list[Numbers]
    correctness: list[Numbers]


class Grid(BaseModel):
    """Accuracy over the plane of two methods' weights: first factor by second factor."""

    axes: tuple[str, str]
    factors: list[float]
    accuracy: list[list[float]]
    prompts: int


class Side(BaseModel):
    """Accuracy at each factor of an adapter."""

    prompts: int
    accuracy: list[float]


class Extrapolation(BaseModel):
    """Accuracy over the factor of one adapter, and the one that validation chose."""

    factors: list[float]
    validation: Side
    test: Side
    chosen: float


class Cell(BaseModel):
    """A finished cell of a study's facts."""

    id: str
    model: str
    source: str
    task: str
    method: str
    like: str
    sweep: dict[str, Any] = {}
    seed: int | None = None
    repeats: int = 1
    seconds: float | None = None
    run: Training | None = None
    shift: dict[str, Numbers | float | None] | None = None
    census: Census | None = None
    plane: Grid | None = None
    extrapolation: Extrapolation | None = None
    settings: Object = {}
    evaluation: CellEvaluation = CellEvaluation()

    @property
    def heads(self) -> list[float]:
        """Induction heads, update by update, NaN for one left out; empty where none were counted.

        End-to-end training does not look at attention: its zeros are no count.
        """
        steps = self.run.curve if self.run else []
        values = [step["induction_heads"] for step in steps if "induction_heads" in step]
        heads = [math.nan if value is None else value for value in values]
        counted = self.settings.get("objective") != "end_to_end" or any(one > 0 for one in heads)
        return heads if counted else []


class Failure(BaseModel):
    """A cell without a result."""

    id: str
    error: str | None = None


class Facts(BaseModel):
    """``study.json``."""

    name: str = "study"
    description: str | None = None
    paper: dict[str, str] = {}
    figures: list[str] = []
    machines: list[str] = []
    cells: list[Cell]
    failed: list[Failure] = []

    @property
    def published(self) -> Paper:
        """The paper's numbers to stand beside ours."""
        return Paper(self.paper.get("table"))


@dataclass(frozen=True)
class Measurement:
    """Label predictions of one model on one task by one method, after one training or none.

    Attributes:
        cell: where it stands.
        method: how it predicts: vanilla and the calibrations of an untrained base, or what trained
            it (with a calibration behind it: ``abft + contextual``).
        values: the metrics; None where accuracy was not measured.
        plain: whether it is the cell's own prediction, to which robustness, bias, unseen labels and
            transfer belong.
    """

    cell: Cell
    method: str
    values: Method | None
    plain: bool

    @property
    def model(self) -> str:
        """The study's name for the model."""
        return self.cell.model

    @property
    def right(self) -> str:
        """N characters of 0 and 1, or nothing where the cell does not have them."""
        return self.values.right if self.values else ""

    @property
    def prompts(self) -> int:
        """N."""
        return len(self.right) or self.cell.evaluation.prompts or 0

    @property
    def label(self) -> str:
        """The method, and what was swept."""
        swept = ", ".join(
            f"{key.rpartition('.')[2]}={value}" for key, value in sorted(self.cell.sweep.items())
        )
        return f"{self.method} ({swept})" if swept else self.method


def accuracy_of(one: Measurement) -> float | None:
    """Accuracy in 0..1, where it was measured."""
    return one.values.accuracy if one.values else None


def reader(part: str, *keys: str) -> Callable[[Measurement], float | None]:
    """Reads a number at some depth of a part of a cell's evaluation."""

    def read(one: Measurement) -> float | None:
        value: Any = getattr(one.cell.evaluation, part)
        for key in keys:
            value = (value or {}).get(key)
        return None if value is None else float(value)

    return read


def read_facts(document: dict[str, Any], path: Path = Path("study.json")) -> Facts:
    """The facts as they are read for tables and figures.

    Raises:
        OutputError: a part is missing or of another kind.
    """
    return parsed(Facts, document, path)


def measurements(facts: Facts) -> list[Measurement]:
    """Every measurement of a study's facts, in their order."""
    found = []
    for cell in facts.cells:
        # Other protocols can be measured without accuracy: such a cell has no values.
        methods: Mapping[str, Method | None] = cell.evaluation.methods or {"vanilla": None}
        for name, values in methods.items():
            if cell.method == UNTRAINED:
                method = name
            elif cell.like in PREDICTING:
                if name != cell.like:  # the vanilla that comes along with it
                    continue
                method = cell.method
            else:
                method = cell.method if name == "vanilla" else f"{cell.method} + {name}"
            found.append(Measurement(cell, method, values, name == "vanilla"))
    return found


Group = Sequence[Measurement]


def scored(found: Iterable[Measurement]) -> list[Measurement]:
    """Those whose accuracy was measured."""
    return [one for one in found if one.values]


def rows(found: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Measurements by (model, label), in the order of tables."""
    some = list(found)
    models = list(dict.fromkeys(one.model for one in some))
    some.sort(key=lambda one: (models.index(one.model), method_order(one.method),
                               sweep_order(one.cell.sweep)))  # fmt: skip
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for one in some:
        grouped.setdefault((one.model, one.label), []).append(one)
    return grouped


def of_task(found: Iterable[Measurement], task: str) -> list[Measurement]:
    """Those of one task, by seed."""
    return sorted(
        (one for one in found if one.cell.task == task), key=lambda one: one.cell.seed or 0
    )


def tasks(found: Iterable[Measurement]) -> list[str]:
    """Names of tasks, in order."""
    return list(dict.fromkeys(one.cell.task for one in found))


def means(
    some: Group, read: Callable[[Measurement], float | None] = accuracy_of
) -> tuple[float, float | None] | None:
    """Mean over tasks of a number, and the standard deviation over seeds of such means."""
    by_task = []
    by_seed: dict[int, list[float]] = {}
    for task in tasks(some):
        values = [(one.cell.seed, read(one)) for one in of_task(some, task)]
        known = [(seed, value) for seed, value in values if value is not None]
        if known:
            by_task.append(mean_and_spread([value for _, value in known])[0])
        for seed, value in known:
            by_seed.setdefault(-1 if seed is None else seed, []).append(value)
    if not by_task:
        return None
    whole = [mean_and_spread(one)[0] for one in by_seed.values() if len(one) == len(by_task)]
    return mean_and_spread(by_task)[0], mean_and_spread(whole)[1] if whole else None


def paired(first: Group, second: Group) -> list[tuple[list[Measurement], list[Measurement]]]:
    """Measurements of two methods, task by task, on the same prompts.

    Of each task the training seeds that both have; where the second was not trained, all of the
    first against its one measurement. Tasks that only one has are left out.
    """
    pairs = []
    for task in tasks(first):
        ours, theirs = of_task(first, task), of_task(second, task)
        seeds = [{one.cell.seed for one in side} - {None} for side in (ours, theirs)]
        if all(seeds):
            common = seeds[0] & seeds[1]
            ours = [one for one in ours if one.cell.seed in common]
            theirs = [one for one in theirs if one.cell.seed in common]
        ours, theirs = [one for one in ours if one.right], [one for one in theirs if one.right]
        if ours and theirs and len({len(one.right) for one in (*ours, *theirs)}) == 1:
            pairs.append((ours, theirs))
    return pairs


def matrix(found: Group) -> np.ndarray:
    """(S, Q) shares of right answers of one task's measurements; queries are asked repeatedly."""
    return np.stack(
        [share_right(one.right, one.prompts // max(1, one.cell.repeats)) for one in found]
    )
