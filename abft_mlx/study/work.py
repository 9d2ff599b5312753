"""One cell: open what it names, train, measure, and say all of it in one document."""

from __future__ import annotations

import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from abft_mlx import adapters, data, experiment, files, runtime
from abft_mlx.errors import RunError
from abft_mlx.experiment import Experiment, RunResult
from abft_mlx.recipe import Recipe
from abft_mlx.study.plan import Cell, cell_id
from abft_mlx.study.store import SCHEMA
from abft_mlx.trainer import Update
from abft_mlx.trainer.run_folder import ADAPTER_FILES

# Enough prompts for a head's mean attention to two digits.
CENSUS_PROMPTS = 128
_CURVE = ("step", "seen_examples", "loss", "punish", "reward", "induction_heads", "A", "seconds")
_MEASURES = ("accuracy", "macro_f1", "expected_calibration_error", "true_label_probability")

Progress = Callable[[int, int], None]


class Watcher(Protocol):
    """Who is told how far a cell is."""

    def training(self, updates: int) -> None:
        """A training of so many updates begins."""

    def update(self, update: Update) -> None:
        """One update is done."""

    def measuring(self) -> None:
        """A measurement begins."""

    def prompts(self, done: int, total: int) -> None:
        """So many prompts of so many are measured, of one measurement at a time."""


class Silent:
    """A watcher that says nothing."""

    def training(self, updates: int) -> None:
        """Say nothing."""

    def update(self, update: Update) -> None:
        """Say nothing."""

    def measuring(self) -> None:
        """Say nothing."""

    def prompts(self, done: int, total: int) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Tools:
    """What a cell is made with; tests put stand-ins here.

    Attributes:
        prepare: opens a recipe.
        train: trains an opened recipe into a run folder.
        measure: gives the parts of eval's JSON for the model as it is now.
        combine: puts several adapters on a model, each at its own strength.
        shift_norms: how far each layer's weights are from the base's.
    """

    prepare: Callable[[Recipe], Experiment] = experiment.prepare
    train: Callable[..., RunResult] = experiment.train
    measure: Callable[[Experiment, Progress], dict[str, Any]] = Experiment.measure_all
    combine: Callable[[Any, Sequence[tuple[Path, float]]], None] = adapters.combine
    shift_norms: Callable[[Any], dict[str, Any]] = adapters.shift_norms


def run_cell(
    cell: Cell,
    scratch: Path,
    *,
    keep: Path | None = None,
    watcher: Watcher | None = None,
    tools: Tools | None = None,
) -> dict[str, Any]:
    """Do one cell.

    Args:
        cell: what to do.
        scratch: a folder of the cell's own for run folders; what lies there is removed first.
        keep: where to copy what was trained, or None.
        watcher: told how far it is.
        tools: what it is made with.

    Returns:
        The cell's document, complete and strict JSON.

    Raises:
        AbftError: the cell cannot be done; the message says why.
    """
    begun = time.perf_counter()
    load_average = _load_average()
    shutil.rmtree(scratch, ignore_errors=True)
    work = _Work(cell, scratch, keep, watcher or Silent(), tools or Tools())
    parts = {
        "predict": work.predict,
        "train": work.train,
        "plane": work.plane,
        "extrapolate": work.extrapolate,
    }[cell.kind]()
    document = {
        **heading(cell),
        "status": "done",
        "error": None,
        "run": None,
        "shift": None,
        "census": None,
        "evaluation": {},
        **parts,
        "seconds": time.perf_counter() - begun,
        "load_average": load_average,
    }
    shutil.rmtree(scratch, ignore_errors=True)
    # The next cell starts with this one's memory given back.
    del work
    gc.collect()
    mx.clear_cache()
    return plain(document)


def heading(cell: Cell) -> dict[str, Any]:
    """What the files of done and failed cells begin with."""
    where = {"versions": runtime.versions(), "device": runtime.device_description()}
    return {"schema": SCHEMA, **cell.facts(), **where}


def plain(value: Any) -> Any:
    """The same as strict JSON holds it: plain lists and numbers, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class _Work:
    """The four kinds of cells."""

    def __init__(
        self, cell: Cell, scratch: Path, keep: Path | None, watcher: Watcher, tools: Tools
    ) -> None:
        self.cell = cell
        self.scratch = scratch
        self.keep = keep
        self.watcher = watcher
        self.tools = tools

    def predict(self) -> dict[str, Any]:
        """Measure the base by several methods."""
        opened = self.tools.prepare(self.cell.recipe)
        return {
            "evaluation": self._measure(opened),
            "census": _census(opened),
            "fingerprints": _fingerprints(opened),
        }

    def train(self) -> dict[str, Any]:
        """Train, then measure."""
        opened, run = self._trained(self.cell.recipe, self.scratch, self.keep)
        return {
            "run": run,
            "evaluation": self._measure(opened),
            "shift": self.tools.shift_norms(opened.loaded.model),
            "census": _census(opened),
            "fingerprints": _fingerprints(opened),
        }

    def plane(self) -> dict[str, Any]:
        """Train both axes, then measure at every point of the grid."""
        names, runs = list(self.cell.axes), {}
        folders = [self.scratch / cell_id(name) for name in names]
        for folder, (name, recipe) in zip(folders, self.cell.axes.items(), strict=True):
            keep = self.keep / folder.name if self.keep else None
            _, runs[name] = self._trained(recipe, folder, keep)
            gc.collect()
        opened = self.tools.prepare(self.cell.recipe)
        chosen = opened.test_prompts()
        factors = list(self.cell.factors)
        tables: dict[str, list[list[Any]]] = {name: [] for name in (*_MEASURES, "right")}
        for first in factors:
            rows = []
            for second in factors:
                strengths = list(zip(folders, (first, second), strict=True))
                rows.append(self._at(opened, chosen, strengths))
            for name, table in tables.items():
                table.append([row[name] for row in rows])
        plane = {"axes": names, "factors": factors, "prompts": len(chosen), "runs": runs, **tables}
        return {"plane": plane, "fingerprints": _fingerprints(opened)}

    def extrapolate(self) -> dict[str, Any]:
        """Train, choose the factor on validation prompts, measure all factors on test prompts."""
        opened, run = self._trained(self.cell.recipe, self.scratch, self.keep)
        _check_splits(opened)
        factors = list(self.cell.factors)
        tables: dict[str, dict[str, Any]] = {}
        for name, chosen in (
            ("validation", opened.validation_prompts()),
            ("test", opened.test_prompts()),
        ):
            rows = [self._at(opened, chosen, [(self.scratch, one)]) for one in factors]
            tables[name] = {"prompts": len(chosen), **{m: [r[m] for r in rows] for m in _MEASURES}}
        factor = _best(factors, tables["validation"]["accuracy"])
        only_accuracy = opened.recipe.evaluation.model_copy(update={"protocols": ["accuracy"]})
        plainly = replace(
            opened, recipe=opened.recipe.model_copy(update={"evaluation": only_accuracy})
        )
        self.tools.combine(opened.loaded.model, [(self.scratch, 1.0)])
        unscaled = self._measure(plainly)
        self.tools.combine(opened.loaded.model, [(self.scratch, factor)])
        return {
            "run": run,
            "evaluation": self._measure(opened),
            "shift": self.tools.shift_norms(opened.loaded.model),
            "census": _census(opened),
            "extrapolation": {
                "factors": factors,
                **tables,
                "chosen": factor,
                "unscaled": unscaled,
            },
            "fingerprints": _fingerprints(opened),
        }

    def _trained(
        self, recipe: Recipe, folder: Path, keep: Path | None
    ) -> tuple[Experiment, dict[str, Any]]:
        # A cell keeps a census of its own.
        training = recipe.training.model_copy(update={"census_prompts": 0})
        opened = self.tools.prepare(recipe.model_copy(update={"training": training}))
        self.watcher.training(recipe.training.updates)
        curve: list[Update] = []

        def updated(update: Update) -> None:
            curve.append(update)
            self.watcher.update(update)

        result = self.tools.train(opened, folder, overwrite=True, on_update=updated)
        if keep is not None:
            _copy_adapter(folder, keep)
        return opened, _run(result, curve)

    def _measure(self, opened: Experiment) -> dict[str, Any]:
        self.watcher.measuring()
        measured = self.tools.measure(opened, self.watcher.prompts)
        return {"labels": list(opened.space.names), **measured}

    def _at(
        self, opened: Experiment, chosen: list[Any], strengths: list[tuple[Path, float]]
    ) -> dict[str, Any]:
        self.tools.combine(opened.loaded.model, strengths)
        self.watcher.measuring()
        return opened.measure(chosen, self.watcher.prompts)


def _run(result: RunResult, curve: list[Update]) -> dict[str, Any]:
    """What training came to; the process's peak is that of every cell it has run so far."""
    progress = result.progress
    return {
        "seconds": progress.seconds,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "process_peak_bytes": runtime.process_peak_bytes(),
        "trainable_parameters": result.trainable_parameters,
        "layers": result.experiment.recipe.adapter.layers,
        "adapter_bytes": result.adapter_bytes,
        "updates": progress.updates,
        "curve": [{name: asdict(one)[name] for name in _CURVE} for one in curve],
    }


def _census(opened: Experiment) -> dict[str, Any]:
    """What every head does with the label tokens, (L, H) each."""
    census = opened.census(opened.test_prompts(CENSUS_PROMPTS)[:CENSUS_PROMPTS])
    return {
        "prompts": census.prompts,
        "magnitude": census.magnitude,
        "correctness": census.correctness,
        "share": census.share,
        "heads_per_prompt": census.heads_per_prompt,
    }


def _fingerprints(opened: Experiment) -> dict[str, str]:
    return {"model": opened.loaded.fingerprint, "data": opened.texts.fingerprint()}


def _best(factors: list[float], accuracy: list[float]) -> float:
    """The factor of the highest accuracy; of equals the one nearest to no change."""
    return min(zip(accuracy, factors, strict=True), key=lambda one: (-one[0], abs(one[1] - 1)))[1]


def _check_splits(opened: Experiment) -> None:
    """See that rows for validation were taken from the training rows alone.

    Raises:
        RunError: the set is so small that the other parts changed, too.
    """
    section = opened.recipe.data
    whole = {
        "training_rows": section.training_rows + section.validation_rows,
        "validation_rows": 0,
    }
    without = data.split(opened.texts, section.model_copy(update=whole), opened.task.demonstrations)
    for part in ("demonstrations", "test"):
        if without.rows[part] != opened.splits.rows[part]:
            raise RunError(
                f"{opened.texts.source} has too few rows ({len(opened.texts)}) to keep validation "
                f"rows apart with the {part} rows unchanged; set data.training_rows and "
                "data.demonstration_rows to what it has"
            )


def _copy_adapter(folder: Path, keep: Path) -> None:
    shutil.rmtree(keep, ignore_errors=True)
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise files.write_failure(keep, error) from error
    for name in (one for one in ADAPTER_FILES if (folder / one).exists()):
        with files.replacing(keep / name) as temporary:
            shutil.copyfile(folder / name, temporary)


def _load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None
