"""``abft-mlx study``: a grid of models, tasks, methods and seeds, and its table."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _progress, _words
from abft_mlx.cli._events import BoardEvents
from abft_mlx.cli._options import Json, Quiet
from abft_mlx.cli._shell import Shell
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.study import Cell, Outcome, Study, StudyEvents


def study(
    name: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="A study that ships with abft-mlx, or a .yaml file of your own."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The study's folder: one file for each cell, then table and figures.",
            show_default="runs/study-NAME",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Run part I of N, from 1, e.g. on one of N machines that share DIR.",
            show_default=False,
        ),
    ] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="List the cells and what is done of them; run nothing.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed/--no-retry-failed", help="Run cells that failed before once more."
        ),
    ] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run what is left of a study; when nothing is, write its table and figures.

    Started again, it goes on where it stopped. A cell that fails is reported at the end and does
    not stop the others. Under mlx.launch each process takes its part.
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    part = None if shard is None else parse_shard(shard)
    with shell.speaking():
        if only_list:
            document = _list(shell, name, output, part)
        else:
            outcome, document = _run(shell, name, output, part, retry_failed=retry_failed)
            _tell(shell, outcome)
    shell.document(document)
    if not only_list and document["failed"]:
        raise typer.Exit(1)


def parse_shard(text: str) -> tuple[int, int]:
    """The two numbers of ``I/N``.

    Raises:
        UsageError: they are not numbers with 1 <= I <= N.
    """
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: write I/N with I from 1 to N, e.g. 2/3")
    return int(match[1]), int(match[2])


def _open(name: str, output: Path | None) -> tuple[Study, Path]:
    from abft_mlx import analysis
    from abft_mlx import study as studies

    opened = studies.load(name)
    analysis.check(opened)
    return opened, output or Path("runs") / f"study-{studies.cell_id(opened.name)}"


def _list(
    shell: Shell, name: str, output: Path | None, part: tuple[int, int] | None
) -> dict[str, Any]:
    from rich.table import Table

    opened, folder = _open(name, output)
    from abft_mlx import study as studies

    found = studies.cells(opened)
    held = studies.Store(folder).check(found)
    table = Table(box=None, pad_edge=False)
    for heading in ("cell", "status"):
        table.add_column(heading, overflow="fold")
    rows = []
    for cell in studies.shard(found, *(part or (1, 1))):
        document = held.get(cell.id, {})
        row = {
            "id": cell.id,
            "model": cell.model,
            "task": cell.task,
            "method": cell.method,
            "seed": cell.seed,
            "sweep": cell.sweep,
            "status": document.get("status", "left"),
        }
        if document.get("error"):
            row["error"] = document["error"]
        rows.append(row)
        table.add_row(cell.id, str(row["status"]))
    if not shell.as_json:
        shell.show(table)
        done = sum(row["status"] == "done" for row in rows)
        shell.say("", f"{len(rows):,} cells, {done:,} of them done in {folder}")
    return {"schema": 1, "study": opened.name, "output": str(folder), "cells": rows}


def _run(
    shell: Shell,
    name: str,
    output: Path | None,
    part: tuple[int, int] | None,
    *,
    retry_failed: bool,
) -> tuple[Outcome, dict[str, Any]]:
    opened, folder = _open(name, output)
    from abft_mlx import runtime, study

    runtime.use_wired_memory()
    part = _part(part)
    begun = time.perf_counter()
    try:
        with _progress.board(shell) as board:
            follow = _follow(board)
            outcome = study.run(
                opened,
                folder,
                part=part,
                retry_failed=retry_failed,
                report=_write_reports,
                events=follow,
            )
    except KeyboardInterrupt:
        words = ["--output", folder] if output else []
        if part != (1, 1) and not _launched():
            words += ["--shard", f"{part[0]}/{part[1]}"]
        shell.tell(f"to go on: {_words.command('study', name, *words)}")
        raise
    document = {
        "schema": 1,
        "study": opened.name,
        "output": str(folder),
        "shard": list(part),
        "cells": outcome.total,
        "ran": outcome.ran,
        "done": len(outcome.done),
        "failed": [{"id": key, "error": error} for key, error in outcome.failed.items()],
        "left": len(outcome.left),
        "reports": [str(path) for path in outcome.reports],
        "seconds": time.perf_counter() - begun,
    }
    return outcome, document


def _part(given: tuple[int, int] | None) -> tuple[int, int]:
    """This process's part: as given, or its rank under mlx.launch."""
    from abft_mlx import ranks

    joined = ranks.join()
    if joined.size == 1:
        return given or (1, 1)
    if given is not None:
        raise UsageError(
            f"--shard {given[0]}/{given[1]}: mlx.launch runs {joined.size} processes, each of "
            "which takes its part; leave --shard out"
        )
    return joined.rank + 1, joined.size


def _launched() -> bool:
    from abft_mlx import ranks

    return ranks.join().size > 1


def _write_reports(folder: Path, opened: Study, cells: list[dict[str, Any]]) -> list[Path]:
    from abft_mlx import analysis

    return analysis.write_study(folder, opened, cells)


def _tell(shell: Shell, outcome: Outcome) -> None:
    """The table, then what failed."""
    tables = [path for path in outcome.reports if path.name == "table.md"]
    if not shell.as_json:
        for path in tables:
            shell.tell("", path.read_text(encoding="utf-8").rstrip("\n"), "")
    for path in outcome.reports:
        shell.say(f"wrote {path}")
    for note in getattr(outcome.reports, "notes", ()):
        shell.say(f"note: {note}")
    if outcome.left:
        shell.say(
            f"{len(outcome.left):,} of {outcome.total:,} cells are left to other shards; the call "
            "that finds all of them done writes the table"
        )
    for name, error in outcome.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if outcome.failed:
        print(
            f"error: {len(outcome.failed):,} of {outcome.total:,} cells failed; the same command "
            "runs them again",
            file=sys.stderr,
        )


def _follow(board: _progress.Board) -> StudyEvents:
    """Shows which cell of how many runs, and inside it updates and prompts."""
    from abft_mlx.study import StudyEvents

    class Follow(BoardEvents, StudyEvents):
        """Shows a study on a board."""

        def __init__(self) -> None:
            super().__init__(board)
            self._begun = time.perf_counter()

        def planned(self, left: int, held: int, total: int) -> None:
            """Say how much there is to do."""
            board.note(
                f"{total:,} cells: {left:,} to run now, {held:,} done before or left to other "
                "shards"
            )

        def begin(self, number: int, left: int, cell: Cell) -> None:
            """Name the cell, and guess how long it all takes from the cells so far."""
            seconds = None
            if number > 1:
                each = (time.perf_counter() - self._begun) / (number - 1)
                seconds = each * (left - number + 1)
            board.cell(cell.id, number, left, seconds)
            board.stage("opening model and data")

        def prepared(self, experiment: Any, trainable: int) -> None:
            """Have updates shown."""
            del trainable
            training = experiment.recipe.training
            board.training(training.updates, training.validate_every)

        def end(self, cell: Cell, document: dict[str, Any]) -> None:
            """Say what the cell came to."""
            del cell
            board.clear()
            took = _progress.duration(document["seconds"])
            if document["error"]:
                board.note(f"  failed after {took}: {document['error']}")
                return
            method = document["evaluation"].get("methods", {}).get("vanilla")
            accuracy = f", accuracy {method['accuracy']:.1%}" if method else ""
            board.note(f"  done in {took}{accuracy}")

    return Follow()
