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
from abft_mlx.experiment import Experiment
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.study.plan import Cell, Study, cell_id, cells, shard
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
    """What a call of :func:`run` came to, by ids of cells.

    ``failed`` has this call's failures with their errors, and once no cell is left the whole
    study's; ``left`` are other shards' cells.
    """

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
        events: progress.
    """
    store, events = Store(Path(output)), events or StudyEvents()
    every = cells(study)
    documents = store.open(study, every)
    mine = shard(every, *part)
    todo = [
        cell
        for cell in mine
        if cell.id not in documents or (retry_failed and documents[cell.id]["status"] == FAILED)
    ]
    todo.sort(key=lambda cell: cell.id in documents or store.scratch(cell).exists())
    events.planned(len(todo), len(every) - len(todo), len(every))
    for number, cell in enumerate(todo, 1):
        events.begin(number, len(todo), cell)
        keep = store.path / "adapters" / cell.id if study.keep_adapters else None
        document = run_cell(cell, store.scratch(cell), keep, events)
        store.write(document)
        events.end(cell, document)
    with contextlib.suppress(OSError):  # another shard may be working in it
        store.running.rmdir()
    # Other shards' cells included.
    documents = store.check(every)
    left = [cell.id for cell in every if cell.id not in documents]
    own = {cell.id for cell in mine}
    failed = {
        name: str(document.get("error"))
        for name, document in documents.items()
        if document["status"] == FAILED and (not left or name in own)
    }
    reports: list[Path] = []
    if not left and report is not None:
        reports = report(store.path, study, [documents[cell.id] for cell in every])
    done = [name for name, document in documents.items() if document["status"] == DONE]
    return Outcome(len(every), [cell.id for cell in todo], done, failed, left, reports)


def run_cell(cell: Cell, scratch: Path, keep: Path | None, events: Events) -> dict[str, Any]:
    """Do one cell; its document is strict JSON, with an error in one line where it fails.

    Run folders are in ``scratch``, which is removed; what was trained is copied to ``keep``.
    """
    begun, load_average = time.perf_counter(), list(os.getloadavg())
    status, error, parts = DONE, None, {}
    work = {"predict": _predict, "train": _train, "plane": _plane, "extrapolate": _extrapolate}
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        parts = work[cell.kind](cell, scratch, keep, events)
    # Whatever goes wrong in one cell must not cost the others.
    except Exception as problem:
        status, error = FAILED, _line(problem)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    # The next cell starts with this one's memory given back.
    gc.collect()
    mx.clear_cache()
    return plain(
        {
            "schema": SCHEMA,
            **cell.facts(),
            "versions": runtime.versions(),
            "device": runtime.device_description(),
            "status": status,
            "error": error,
            "run": None,
            "shift": None,
            "census": None,
            "evaluation": {},
            **parts,
            "seconds": time.perf_counter() - begun,
            "load_average": load_average,
        }
    )


def _line(error: Exception) -> str:
    """An error in one line."""
    message = " ".join(str(error).split())
    if isinstance(error, AbftError):
        return message
    if isinstance(error, MemoryError):
        return f"out of memory: {message or 'the machine has no more'}"
    return f"{type(error).__name__}: {message}"


def plain(value: Any) -> Any:
    """The same as strict JSON holds it: plain lists and numbers, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _predict(cell: Cell, _scratch: Path, _keep: Path | None, events: Events) -> dict[str, Any]:
    """Measure the base by several methods."""
    return _described(experiment.prepare(cell.recipe), events)


def _train(cell: Cell, scratch: Path, keep: Path | None, events: Events) -> dict[str, Any]:
    """Train, then measure."""
    opened, run = _trained(cell.recipe, scratch, keep, events)
    return {
        "run": run,
        "shift": adapters.shift_norms(opened.loaded.model),
        **_described(opened, events),
    }


def _plane(cell: Cell, scratch: Path, keep: Path | None, events: Events) -> dict[str, Any]:
    """Train both axes, then measure at every point of the grid."""
    folders, runs = {}, {}
    for name, recipe in cell.axes.items():
        folders[name] = scratch / cell_id(name)
        copy = keep / cell_id(name) if keep else None
        runs[name] = _trained(recipe, folders[name], copy, events)[1]
        gc.collect()
    opened = experiment.prepare(cell.recipe)
    prompts, factors = opened.test_prompts(), list(cell.factors)
    points = [
        [_at(opened, prompts, zip(folders.values(), (x, y), strict=True), events) for y in factors]
        for x in factors
    ]
    tables = {key: [[point[key] for point in row] for row in points]
              for key in (*_MEASURES, "right")}  # fmt: skip
    plane = {"axes": list(folders), "factors": factors, "prompts": len(prompts), "runs": runs}
    return {"plane": plane | tables, "fingerprints": _fingerprints(opened)}


def _extrapolate(cell: Cell, scratch: Path, keep: Path | None, events: Events) -> dict[str, Any]:
    """Train, choose the factor on validation prompts, measure all factors on test prompts."""
    opened, run = _trained(cell.recipe, scratch, keep, events)
    check_splits(opened)
    model, factors = opened.loaded.model, list(cell.factors)
    tables: dict[str, dict[str, Any]] = {}
    for name, prompts in (
        ("validation", opened.validation_prompts()),
        ("test", opened.test_prompts()),
    ):
        points = [_at(opened, prompts, [(scratch, factor)], events) for factor in factors]
        tables[name] = {key: [point[key] for point in points] for key in _MEASURES}
        tables[name]["prompts"] = len(prompts)
    chosen = best_factor(factors, tables["validation"]["accuracy"])
    evaluation = opened.recipe.evaluation.model_copy(update={"protocols": ["accuracy"]})
    recipe = opened.recipe.model_copy(update={"evaluation": evaluation})
    adapters.combine(model, [(scratch, 1.0)])
    unscaled = _measured(replace(opened, recipe=recipe), events)
    adapters.combine(model, [(scratch, chosen)])
    return {
        "run": run,
        "shift": adapters.shift_norms(model),
        **_described(opened, events),
        "extrapolation": {"factors": factors, **tables, "chosen": chosen, "unscaled": unscaled},
    }


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


def _trained(
    recipe: Recipe, folder: Path, keep: Path | None, events: Events
) -> tuple[Experiment, dict[str, Any]]:
    """Train into a run folder, and copy the adapter; what training came to."""
    # A cell keeps a census of its own.
    training = recipe.training.model_copy(update={"census_prompts": 0})
    opened = experiment.prepare(recipe.model_copy(update={"training": training}))
    curve = _Curve(events)
    result = experiment.finetune(opened, folder, overwrite=True, events=curve)
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
        try:
            keep.mkdir(parents=True)
        except OSError as error:
            raise files.write_failure(keep, error) from error
        for name in ADAPTER_FILES:
            if (folder / name).exists():
                with files.replacing(keep / name) as temporary:
                    shutil.copyfile(folder / name, temporary)
    return opened, {
        "seconds": result.progress.seconds,
        "peak_memory_bytes": result.progress.peak_memory_bytes,
        # That of every cell so far.
        "process_peak_bytes": runtime.process_peak_bytes(),
        "trainable_parameters": result.trainable_parameters,
        "layers": result.experiment.recipe.adapter.layers,
        "adapter_bytes": result.adapter_bytes,
        "updates": result.progress.updates,
        "curve": [{name: asdict(update)[name] for name in _CURVE} for update in curve.updates],
    }


def _described(opened: Experiment, events: Events) -> dict[str, Any]:
    """What is measured of a model as it is now, and of its heads: (L, H) tables."""
    evaluation = _measured(opened, events)
    census = opened.census(opened.test_prompts()[:CENSUS_PROMPTS])
    keys = ("prompts", "magnitude", "correctness", "share", "heads_per_prompt")
    return {
        "evaluation": evaluation,
        "census": {key: getattr(census, key) for key in keys},
        "fingerprints": _fingerprints(opened),
    }


def _measured(opened: Experiment, events: Events) -> dict[str, Any]:
    """The parts of eval's JSON for the model as it is now."""
    events.stage("measuring")
    return {"labels": list(opened.task.space.names), **opened.measure_all(events)}


def _at(
    opened: Experiment, prompts: Sequence[Prompt], strengths: Any, events: Events
) -> dict[str, Any]:
    """The measures with several adapters on the model, each folder at its own strength."""
    adapters.combine(opened.loaded.model, list(strengths))
    events.stage("measuring")
    return opened.measure(prompts, events)


def _fingerprints(opened: Experiment) -> dict[str, str]:
    """What model and texts are known by."""
    return {"model": opened.loaded.fingerprint, "data": opened.task.texts.fingerprint()}


def best_factor(factors: list[float], accuracy: list[float]) -> float:
    """The factor of the highest accuracy; of equals the one nearest to no change."""
    pairs = zip(accuracy, factors, strict=True)
    return min(pairs, key=lambda pair: (-pair[0], abs(pair[1] - 1)))[1]


def check_splits(opened: Experiment) -> None:
    """See that rows for validation were taken from the training rows alone."""
    section, task = opened.recipe.data, opened.task
    rows = section.training_rows + section.validation_rows
    whole = section.model_copy(update={"training_rows": rows, "validation_rows": 0})
    without = data.split(task.texts, whole, task.demonstrations)
    for part in ("demonstrations", "test"):
        if without.rows[part] != task.splits.rows[part]:
            raise RunError(
                f"{task.texts.source} has too few rows ({len(task.texts)}) to keep validation "
                f"rows apart with the {part} rows unchanged; set data.training_rows and "
                "data.demonstration_rows to what it has"
            )
