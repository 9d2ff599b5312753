"""Running a study: which cells are left, each of them done and written, the reports at the end."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abft_mlx import adapters, data, experiment, files, runtime
from abft_mlx.errors import AbftError, RunError
from abft_mlx.events import Events, Update
from abft_mlx.experiment import Experiment, RunResult
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.study.plan import Cell, cell_id, cells, shard
from abft_mlx.study.sections import Study
from abft_mlx.study.store import DONE, FAILED, SCHEMA, Store
from abft_mlx.trainer.run_folder import ADAPTER_FILES

# Enough prompts for a head's mean attention to two digits.
CENSUS_PROMPTS = 128
_CURVE = ("step", "seen_examples", "loss", "punish", "reward", "induction_heads", "A", "seconds")
_MEASURES = ("accuracy", "macro_f1", "expected_calibration_error", "true_label_probability")

Report = Callable[[Path, Study, list[dict[str, Any]]], list[Path]]


class StudyEvents(Events):
    """What a study reports: that of its cells, and when each of them begins and ends."""

    def planned(self, left: int, held: int, total: int) -> None:
        """So many cells will be run now; so many of all are not left to this call."""

    def begin(self, number: int, left: int, cell: Cell) -> None:
        """One cell begins, the number-th of those that are left."""

    def end(self, cell: Cell, document: dict[str, Any]) -> None:
        """One cell has its file."""


@dataclass(frozen=True)
class Outcome:
    """What a call of :func:`run` came to.

    Attributes:
        output: the study's folder.
        total: cells of the study.
        ran: ids of the cells that this call ran.
        done: ids of all finished cells.
        failed: id and one-line error of the failed cells: of this call, and once no cell is left
            of the whole study.
        left: ids of cells that are neither done nor failed, the other shards'.
        reports: files that were written.
    """

    output: Path
    total: int
    ran: list[str]
    done: list[str]
    failed: dict[str, str]
    left: list[str]
    reports: list[Path] = field(default_factory=list)


def run(
    study: Study,
    output: str | Path,
    *,
    part: tuple[int, int] = (1, 1),
    retry_failed: bool = True,
    report: Report | None = None,
    events: StudyEvents | None = None,
) -> Outcome:
    """Run what is left of a study, and write its reports when nothing is left.

    A cell that is done is never run again; one that failed is, unless ``retry_failed`` is false.
    Cells that failed before, or were begun and not finished, come last: should one of them end the
    process, the others are done by then.

    Args:
        study: the grid.
        output: its folder; the same for every shard.
        part: (i, n): take part i of n, from 1.
        retry_failed: run cells that failed before once more.
        report: writes tables and figures from the documents of all cells.
        events: who hears how far it is.

    Raises:
        RecipeError: a cell's recipe cannot be used.
        OutputError: the folder holds another study, or a cell that was made otherwise.
        RunError: the disk is full.
    """
    store, events = Store(Path(output)), events or StudyEvents()
    every = cells(study)
    held = store.open(study, every)
    mine = shard(every, *part)
    retried = (FAILED,) if retry_failed else ()
    todo = [cell for cell in mine if cell.id not in held or held[cell.id].get("status") in retried]
    todo.sort(key=lambda cell: cell.id in held or store.scratch(cell).exists())
    events.planned(len(todo), len(every) - len(todo), len(every))
    for number, cell in enumerate(todo, 1):
        events.begin(number, len(todo), cell)
        document = _attempt(cell, store, study.keep_adapters, events)
        store.write(document)
        events.end(cell, document)
    return _finish(study, store, every, [cell.id for cell in todo], {c.id for c in mine}, report)


def _attempt(cell: Cell, store: Store, keep: bool, events: Events) -> dict[str, Any]:
    """The document of one cell, done or failed."""
    begun, scratch = time.perf_counter(), store.scratch(cell)
    try:
        return run_cell(cell, scratch, keep=store.adapter(cell) if keep else None, events=events)
    except KeyboardInterrupt:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Whatever goes wrong in one cell must not cost the others.
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        return {
            **_heading(cell),
            "status": FAILED,
            "error": _line(error),
            "run": None,
            "shift": None,
            "census": None,
            "evaluation": {},
            "seconds": time.perf_counter() - begun,
        }


def _line(error: Exception) -> str:
    """An error in one line."""
    message = " ".join(str(error).split())
    if isinstance(error, AbftError):
        return message
    if isinstance(error, MemoryError):
        return f"out of memory: {message or 'the machine has no more'}"
    return f"{type(error).__name__}: {message}"


def _finish(
    study: Study,
    store: Store,
    every: list[Cell],
    ran: list[str],
    mine: set[str],
    report: Report | None,
) -> Outcome:
    """See what lies there now, other shards' cells included."""
    with contextlib.suppress(OSError):  # another shard may be working in it
        store.running.rmdir()
    held = store.check(every)
    left = [cell.id for cell in every if cell.id not in held]
    failed = {
        name: str(document.get("error"))
        for name, document in held.items()
        if document["status"] == FAILED and (not left or name in mine)
    }
    reports: list[Path] = []
    if not left and report is not None:
        reports = report(store.path, study, [held[cell.id] for cell in every])
    done = [name for name, document in held.items() if document["status"] == DONE]
    return Outcome(store.path, len(every), ran, done, failed, left, reports)


def run_cell(
    cell: Cell, scratch: Path, *, keep: Path | None = None, events: Events | None = None
) -> dict[str, Any]:
    """Do one cell.

    Args:
        cell: what to do.
        scratch: a folder of the cell's own for run folders; what lies there is removed first.
        keep: where to copy what was trained, or None.
        events: who hears how far it is.

    Returns:
        The cell's document, complete and strict JSON.

    Raises:
        AbftError: the cell cannot be done; the message says why.
    """
    begun, load_average = time.perf_counter(), list(os.getloadavg())
    shutil.rmtree(scratch, ignore_errors=True)
    work = _Work(cell, scratch, keep, events or Events())
    parts = {
        "predict": work.predict,
        "train": work.train,
        "plane": work.plane,
        "extrapolate": work.extrapolate,
    }[cell.kind]()
    document = {
        **_heading(cell),
        "status": DONE,
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


def _heading(cell: Cell) -> dict[str, Any]:
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


class _Curve(Events):
    """Passes everything on, and keeps the updates."""

    def __init__(self, events: Events) -> None:
        self.updates: list[Update] = []
        self._events = events
        self.stage, self.progress = events.stage, events.progress  # type: ignore[method-assign]
        self.prepared = events.prepared  # type: ignore[method-assign]

    def update(self, update: Update) -> None:
        """Keep it."""
        self.updates.append(update)
        self._events.update(update)


class _Work:
    """The four kinds of cells."""

    def __init__(self, cell: Cell, scratch: Path, keep: Path | None, events: Events) -> None:
        self.cell = cell
        self.scratch = scratch
        self.keep = keep
        self.events = events

    def predict(self) -> dict[str, Any]:
        """Measure the base by several methods."""
        return self._described(experiment.prepare(self.cell.recipe))

    def train(self) -> dict[str, Any]:
        """Train, then measure."""
        opened, run = self._trained(self.cell.recipe, self.scratch, self.keep)
        shift = adapters.shift_norms(opened.loaded.model)
        return {"run": run, "shift": shift, **self._described(opened)}

    def plane(self) -> dict[str, Any]:
        """Train both axes, then measure at every point of the grid."""
        names, runs = list(self.cell.axes), {}
        folders = [self.scratch / cell_id(name) for name in names]
        for folder, (name, recipe) in zip(folders, self.cell.axes.items(), strict=True):
            keep = self.keep / folder.name if self.keep else None
            _, runs[name] = self._trained(recipe, folder, keep)
            gc.collect()
        opened = experiment.prepare(self.cell.recipe)
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
        model = opened.loaded.model
        _check_splits(opened)
        factors = list(self.cell.factors)
        tables: dict[str, dict[str, Any]] = {}
        for name, chosen in (
            ("validation", opened.validation_prompts()),
            ("test", opened.test_prompts()),
        ):
            rows = [self._at(opened, chosen, [(self.scratch, factor)]) for factor in factors]
            tables[name] = {"prompts": len(chosen), **{m: [r[m] for r in rows] for m in _MEASURES}}
        factor = _best(factors, tables["validation"]["accuracy"])
        only_accuracy = opened.recipe.evaluation.model_copy(update={"protocols": ["accuracy"]})
        recipe = opened.recipe.model_copy(update={"evaluation": only_accuracy})
        adapters.combine(model, [(self.scratch, 1.0)])
        unscaled = self._measured(replace(opened, recipe=recipe))
        adapters.combine(model, [(self.scratch, factor)])
        found = {"factors": factors, **tables, "chosen": factor, "unscaled": unscaled}
        return {
            "run": run,
            "shift": adapters.shift_norms(model),
            **self._described(opened),
            "extrapolation": found,
        }

    def _trained(
        self, recipe: Recipe, folder: Path, keep: Path | None
    ) -> tuple[Experiment, dict[str, Any]]:
        """Train into a run folder."""
        # A cell keeps a census of its own.
        training = recipe.training.model_copy(update={"census_prompts": 0})
        opened = experiment.prepare(recipe.model_copy(update={"training": training}))
        curve = _Curve(self.events)
        result = experiment.finetune(opened, folder, overwrite=True, events=curve)
        if keep is not None:
            _copy_adapter(folder, keep)
        return opened, _run(result, curve.updates)

    def _described(self, opened: Experiment) -> dict[str, Any]:
        """What is measured of a model as it is now, and of its heads."""
        return {
            "evaluation": self._measured(opened),
            "census": _census(opened),
            "fingerprints": _fingerprints(opened),
        }

    def _measured(self, opened: Experiment) -> dict[str, Any]:
        """The parts of eval's JSON for the model as it is now."""
        self.events.stage("measuring")
        return {"labels": list(opened.task.space.names), **opened.measure_all(self.events)}

    def _at(
        self, opened: Experiment, chosen: Sequence[Prompt], strengths: list[tuple[Path, float]]
    ) -> dict[str, Any]:
        """The measures with several adapters on the model, each at its own strength."""
        adapters.combine(opened.loaded.model, strengths)
        self.events.stage("measuring")
        return opened.measure(chosen, self.events)


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
        "curve": [{name: asdict(update)[name] for name in _CURVE} for update in curve],
    }


def _census(opened: Experiment) -> dict[str, Any]:
    """What every head does with the label tokens, (L, H) each."""
    census = opened.census(opened.test_prompts()[:CENSUS_PROMPTS])
    return {
        "prompts": census.prompts,
        "magnitude": census.magnitude,
        "correctness": census.correctness,
        "share": census.share,
        "heads_per_prompt": census.heads_per_prompt,
    }


def _fingerprints(opened: Experiment) -> dict[str, str]:
    """What model and texts are known by."""
    return {"model": opened.loaded.fingerprint, "data": opened.task.texts.fingerprint()}


def _best(factors: list[float], accuracy: list[float]) -> float:
    """The factor of the highest accuracy; of equals the one nearest to no change."""
    pairs = zip(accuracy, factors, strict=True)
    return min(pairs, key=lambda pair: (-pair[0], abs(pair[1] - 1)))[1]


def _check_splits(opened: Experiment) -> None:
    """See that rows for validation were taken from the training rows alone."""
    section, task = opened.recipe.data, opened.task
    whole = {
        "training_rows": section.training_rows + section.validation_rows,
        "validation_rows": 0,
    }
    without = data.split(task.texts, section.model_copy(update=whole), task.demonstrations)
    for part in ("demonstrations", "test"):
        if without.rows[part] != task.splits.rows[part]:
            raise RunError(
                f"{task.texts.source} has too few rows ({len(task.texts)}) to keep validation "
                f"rows apart with the {part} rows unchanged; set data.training_rows and "
                "data.demonstration_rows to what it has"
            )


def _copy_adapter(folder: Path, keep: Path) -> None:
    """Copy a run's adapter."""
    shutil.rmtree(keep, ignore_errors=True)
    try:
        keep.mkdir(parents=True)
    except OSError as error:
        raise files.write_failure(keep, error) from error
    for name in (file for file in ADAPTER_FILES if (folder / file).exists()):
        with files.replacing(keep / name) as temporary:
            shutil.copyfile(folder / name, temporary)
