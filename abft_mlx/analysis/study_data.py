"""A study's facts (``study.json``), its measurements, and the paper's numbers.

No texts, wordings or paths are in the facts, only the names of the classes, so that they can be
kept and passed on. Letters: S seeds, Q queries, N prompts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel

from abft_mlx.analysis.run_data import Measured, Method, Numbers, Object, short
from abft_mlx.evaluation import right_answers
from abft_mlx.study import PREDICTING, UNTRAINED

SCHEMA = 1
# The order in which methods stand in tables and figures; others follow by name.
METHODS = (
    UNTRAINED, *PREDICTING, "picl", "metaicl", "end_to_end", "end_to_end_qk", "abft_mixture",
    "abft", "extrapolate", "no_pid", "no_filter", "no_punish", "no_reward", "plane",
)  # fmt: skip
TABLES = ("table1", "table2", "table3", "table4")
_COPIED = ("id", "model", "task", "method", "seed", "error", "run", "shift", "census", "seconds")
_PARTS = ("labels", "methods", "comparisons", "robustness", "bias", "unseen", "transfer",
          "prompts", "base")  # fmt: skip
_PAPER = Path(__file__).resolve().parent.parent / "assets" / "paper_targets.json"
# What the paper compares with under the name of a checkpoint instead of a method.
_CHECKPOINTS = ("PICL", "MetaICL")
SAMPLES = 2000


@cache
def paper_targets() -> dict[str, Any]:
    """``assets/paper_targets.json``: the published numbers of arXiv 2505.14233."""
    return json.loads(_PAPER.read_text(encoding="utf-8"))


def paper_model(name: str, source: str) -> str | None:
    """What the paper calls a model, by the study's name for it or where it comes from."""
    ids = paper_targets()["model_ids"]
    if name in ids or any(name == f"{title} {end}" for title in ids for end in _CHECKPOINTS):
        return name
    return next((title for title, id_ in ids.items() if id_ == source), None)


def paper_task(name: str) -> str:
    """What the paper calls a task, or the name itself."""
    return paper_targets()["tasks"].get(name, name)


def paper_row(table: str | None, model: str | None, method: str) -> dict[str, Any]:
    """What a table of the paper has for a model and a method, in percent; empty for nothing."""
    for checkpoint in _CHECKPOINTS:
        if model and model.endswith(f" {checkpoint}"):
            model = model.removesuffix(f" {checkpoint}")
            # A published checkpoint, prompted plainly, is the paper's row of that name.
            method = checkpoint.lower() if method == "vanilla" else ""
    return paper_targets().get(table or "", {}).get(model, {}).get(method, {})


def facts(study: Any, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of a study, made from cell documents in any order."""
    failed = [
        {key: cell.get(key) for key in ("id", "model", "task", "method", "seed", "error")}
        for cell in cells
        if cell.get("status") != "done"
    ]
    return {
        "schema": SCHEMA,
        "name": study.name,
        "description": study.description,
        "paper": dict(study.paper or {}),
        "figures": list(study.figures or []),
        "machines": sorted({str(cell["device"]) for cell in cells if cell.get("device")}),
        "cells": sorted((_compact(c) for c in cells if c.get("status") == "done"), key=_order),
        "failed": sorted(failed, key=lambda cell: str(cell["id"])),
    }


def _compact(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell without its recipe, of which the settings that matter here are kept."""
    recipe, measured = cell.get("recipe") or {}, cell.get("evaluation") or {}
    sections = {key: recipe.get(key) or {} for key in ("objective", "training", "adapter")}
    objective, training = sections["objective"], sections["training"]
    return {
        "source": short(str(recipe.get("model") or cell["model"])),
        "like": cell.get("like") or cell["method"],
        "sweep": dict(cell.get("sweep") or {}),
        **{key: cell.get(key) for key in _COPIED},
        **{key: cell[key] for key in ("plane", "extrapolation") if cell.get(key)},
        "repeats": (recipe.get("evaluation") or {}).get("repeats", 1),
        "settings": {
            "objective": objective.get("kind"),
            "adapter": sections["adapter"].get("kind"),
            **{key: objective.get(key) for key in ("punish", "reward")},
            **{key: training.get(key) for key in ("examples", "updates", "learning_rate")},
        },
        "evaluation": {key: measured[key] for key in _PARTS if measured.get(key)},
    }


def _order(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of cells: models and tasks as in the paper, then others by name."""
    models, tasks = (list(paper_targets()[key]) for key in ("model_ids", "tasks"))
    title = paper_model(cell["model"], cell["source"]) or ""
    model = next((n for n, name in enumerate(models) if title.startswith(name)), len(models))
    task = tasks.index(cell["task"]) if cell["task"] in tasks else len(tasks)
    seed = -1 if cell["seed"] is None else cell["seed"]
    return (model, cell["model"], task, cell["task"], method_order(cell["method"]),
            sweep_order(cell["sweep"]), seed, cell["id"])  # fmt: skip


def method_order(method: str) -> tuple[int, str]:
    """Sort key of a method's name; ``untrained`` comes first."""
    base = method.partition(" + ")[0]
    return METHODS.index(base) if base in METHODS else len(METHODS), method


def sweep_order(sweep: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of swept settings: numbers by size."""
    return tuple(
        (key, isinstance(value, str), value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(sweep.items())
    )


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
    run: Object = {}
    shift: dict[str, Numbers | float | None] | None = None
    census: Object = {}
    plane: Object = {}
    extrapolation: Object = {}
    settings: Object = {}
    evaluation: Measured = Measured()

    @property
    def curve(self) -> list[dict[str, float | None]]:
        """The updates of its training; empty where nothing was trained."""
        return self.run.get("curve", [])

    @property
    def heads(self) -> list[float]:
        """Induction heads, update by update, NaN for one left out; empty where none were counted.

        End-to-end training does not look at attention: its zeros are no count.
        """
        values = [step["induction_heads"] for step in self.curve if "induction_heads" in step]
        heads = [math.nan if value is None else value for value in values]
        counted = self.settings.get("objective") != "end_to_end" or any(one > 0 for one in heads)
        return heads if counted else []


class Facts(BaseModel):
    """``study.json``."""

    name: str = "study"
    description: str | None = None
    paper: dict[str, str] = {}
    figures: list[str] = []
    machines: list[str] = []
    cells: list[Cell]
    failed: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Measurement:
    """Label predictions of one model on one task by one method, after one training or none.

    Attributes:
        cell: where it is stored.
        method: vanilla and the calibrations of an untrained base, or what trained it (with a
            calibration behind it: ``abft + contextual``).
        values: the metrics; None where accuracy was not measured.
        plain: whether the other protocols of the cell belong to it.
    """

    cell: Cell
    method: str
    values: Method | None
    plain: bool

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


Group = Sequence[Measurement]
Read = Callable[[Measurement], float | None]


def measurements(facts: Facts) -> list[Measurement]:
    """Every measurement of a study's facts, in their order."""
    rows = []
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
            rows.append(Measurement(cell, method, values, name == "vanilla"))
    return rows


def accuracy_of(row: Measurement) -> float | None:
    """Accuracy in 0..1, where it was measured."""
    return row.values.accuracy if row.values else None


def reader(part: str, *keys: str) -> Read:
    """Reads a number at some depth of a part of a cell's evaluation."""

    def read(row: Measurement) -> float | None:
        value: Any = getattr(row.cell.evaluation, part)
        for key in keys:
            value = (value or {}).get(key)
        return None if value is None else float(value)

    return read


def by_method(group: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Measurements by (model, label), in the order of tables."""
    rows = list(group)
    models = list(dict.fromkeys(row.cell.model for row in rows))
    rows.sort(key=lambda row: (models.index(row.cell.model), method_order(row.method),
                               sweep_order(row.cell.sweep)))  # fmt: skip
    grouped: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        grouped.setdefault((row.cell.model, row.label), []).append(row)
    return grouped


def of_task(group: Iterable[Measurement], task: str) -> list[Measurement]:
    """Those of one task, by seed."""
    return sorted((row for row in group if row.cell.task == task), key=lambda r: r.cell.seed or 0)


def tasks(group: Iterable[Measurement]) -> list[str]:
    """Names of tasks, in order."""
    return list(dict.fromkeys(row.cell.task for row in group))


class Mean(NamedTuple):
    """A mean, and the standard deviation (n - 1) where there are several values."""

    value: float
    spread: float | None


class Estimate(NamedTuple):
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float


def mean_and_spread(values: Sequence[float]) -> Mean:
    """Mean and standard deviation of values."""
    return Mean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def means(group: Group, read: Read = accuracy_of) -> Mean | None:
    """Mean over tasks of a number, and the standard deviation over seeds of such means."""
    by_task: dict[str, list[float]] = {}
    by_seed: dict[int | None, list[float]] = {}
    for row in group:
        value = read(row)
        if value is not None:
            by_task.setdefault(row.cell.task, []).append(value)
            by_seed.setdefault(row.cell.seed, []).append(value)
    if not by_task:
        return None
    whole = [statistics.fmean(one) for one in by_seed.values() if len(one) == len(by_task)]
    spread = statistics.stdev(whole) if len(whole) > 1 else None
    return Mean(statistics.fmean(map(statistics.fmean, by_task.values())), spread)


def paired(first: Group, second: Group) -> list[tuple[list[Measurement], list[Measurement]]]:
    """Measurements of two methods, task by task, on the same prompts.

    Of each task the training seeds that both have; where the second was not trained, all of the
    first against its one measurement. Tasks that only one has are left out.
    """
    pairs = []
    for task in tasks(first):
        sides = [[row for row in of_task(side, task) if row.right] for side in (first, second)]
        seeds = [{row.cell.seed for row in side} - {None} for side in sides]
        if all(seeds):
            common = seeds[0] & seeds[1]
            sides = [[row for row in side if row.cell.seed in common] for side in sides]
        if all(sides) and len({len(row.right) for side in sides for row in side}) == 1:
            pairs.append((sides[0], sides[1]))
    return pairs


def share_right(group: Group) -> np.ndarray:
    """(S, Q) how often each query of one task was answered rightly.

    Prompt i has query i modulo Q; where N is no multiple of it, every prompt counts as a query.
    """
    rows = []
    for row in group:
        values, queries = right_answers(row.right), row.prompts // max(1, row.cell.repeats)
        if queries < 1 or len(values) % queries:
            queries = len(values)
        rows.append(values.reshape(-1, queries).mean(axis=0))
    return np.stack(rows)


def bootstrap(first: Sequence[np.ndarray], second: Sequence[np.ndarray] | None = None) -> Estimate:
    """Interval of a mean over tasks, or of the difference of two, over seeds and queries.

    Args:
        first: for every task (S, Q), as :func:`share_right` gives them.
        second: what to subtract, for the same tasks and queries, with as many seeds or one.
    """
    random = np.random.default_rng(42)

    def weights(count: int) -> np.ndarray:
        """(SAMPLES, count) how often each of so many is drawn, as shares."""
        return random.multinomial(count, np.full(count, 1 / count), size=SAMPLES) / count

    total, mean = np.zeros(SAMPLES), 0.0
    for index, ours in enumerate(first):
        queries, seeds = weights(ours.shape[1]), weights(len(ours))
        mean += float(ours.mean())
        total += ((queries @ ours.T) * seeds).sum(axis=1)
        if second is not None:
            theirs = second[index]
            # The same training seed on both sides is one draw.
            seeds = seeds if len(theirs) == len(ours) else weights(len(theirs))
            mean -= float(theirs.mean())
            total -= ((queries @ theirs.T) * seeds).sum(axis=1)
    low, high = np.percentile(total / len(first), (2.5, 97.5))
    return Estimate(mean / len(first), float(low), float(high))
