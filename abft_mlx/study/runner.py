"""A whole study: which cells are left, one after the other, and the reports at the end."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from abft_mlx.errors import AbftError
from abft_mlx.study.plan import Cell, cells, shard
from abft_mlx.study.sections import Study
from abft_mlx.study.store import DONE, FAILED, Store
from abft_mlx.study.work import Silent, Tools, Watcher, heading, run_cell

Report = Callable[[Path, Study, list[dict[str, Any]]], list[Path]]


class StudyWatcher(Watcher, Protocol):
    """Who is told how far a study is."""

    def planned(self, left: int, held: int, total: int) -> None:
        """So many cells will be run now, so many of all lie there already."""

    def begin(self, number: int, left: int, cell: Cell) -> None:
        """One cell begins, the number-th of those that are left."""

    def end(self, cell: Cell, document: dict[str, Any]) -> None:
        """One cell has its file."""


class SilentStudy(Silent):
    """A watcher that says nothing."""

    def planned(self, left: int, held: int, total: int) -> None:
        """Say nothing."""

    def begin(self, number: int, left: int, cell: Cell) -> None:
        """Say nothing."""

    def end(self, cell: Cell, document: dict[str, Any]) -> None:
        """Say nothing."""


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
    watcher: StudyWatcher | None = None,
    tools: Tools | None = None,
) -> Outcome:
    """Run what is left of a study, and write its reports when nothing is left.

    A cell that is done is never run again; one that failed is, unless told otherwise. Cells that
    failed before, or were begun and not finished, come last: should one of them end the process,
    the others are done by then.

    Args:
        study: the grid.
        output: its folder; the same for every shard.
        part: (i, n): take part i of n, from 1.
        retry_failed: run cells that failed before once more.
        report: writes tables and figures from the documents of all cells.
        watcher: told how far it is.
        tools: what cells are made with.

    Raises:
        RecipeError: a cell's recipe cannot be used.
        OutputError: the folder holds another study, or a cell that was made otherwise.
        RunError: the disk is full.
    """
    store, watcher = Store(Path(output)), watcher or SilentStudy()
    every = cells(study)
    held = store.open(study, every)
    mine = shard(every, *part)
    retried = (FAILED,) if retry_failed else ()
    todo = [cell for cell in mine if cell.id not in held or held[cell.id].get("status") in retried]
    todo.sort(key=lambda cell: cell.id in held or store.scratch(cell).exists())
    watcher.planned(len(todo), len(every) - len(todo), len(every))
    for number, cell in enumerate(todo, 1):
        watcher.begin(number, len(todo), cell)
        document = _attempt(cell, store, study.keep_adapters, watcher, tools)
        store.write(document)
        watcher.end(cell, document)
    return _finish(study, store, every, [cell.id for cell in todo], {c.id for c in mine}, report)


def _attempt(
    cell: Cell, store: Store, keep: bool, watcher: Watcher, tools: Tools | None
) -> dict[str, Any]:
    """The document of one cell, done or failed."""
    begun = time.perf_counter()
    scratch = store.scratch(cell)
    try:
        return run_cell(
            cell,
            scratch,
            keep=store.adapter(cell) if keep else None,
            watcher=watcher,
            tools=tools,
        )
    except KeyboardInterrupt:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    # Whatever goes wrong in one cell must not cost the others.
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        return {
            **heading(cell),
            "status": FAILED,
            "error": _line(error),
            "run": None,
            "shift": None,
            "census": None,
            "evaluation": {},
            "seconds": time.perf_counter() - begun,
        }


def _line(error: Exception) -> str:
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
