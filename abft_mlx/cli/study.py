"""``abft-mlx study``: a grid of models, tasks, methods and seeds, and its table."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from abft_mlx.cli import words
from abft_mlx.cli.progress import Board, BoardEvents, board, duration
from abft_mlx.cli.shell import Shell, join_ranks, table
from abft_mlx.errors import UsageError

if TYPE_CHECKING:
    from abft_mlx.study import Cell, Outcome, Study, StudyEvents


def study(
    name: str,
    *,
    output: Path | None = None,
    shard: str | None = None,
    only_list: bool = False,
    retry_failed: bool = True,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Run a grid of models, tasks, methods and seeds.

    When all cells are done, their table and figures are written. Started again, it goes on where
    it stopped. A cell that fails is reported at the end and does not stop the others. Under
    mlx.launch each process takes its part.

    Args:
        name (STUDY): A study that ships with abft-mlx, or a .yaml file of your own.
        output (DIR): The study's folder: one file for each cell, then table and figures. [default:
            runs/study-NAME]
        shard (I/N): Run part I of N, from 1, e.g. on one of N machines that share DIR.
        only_list (--list): List the cells and what is done of them; run nothing.
        retry_failed: Run cells that failed before once more.
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
    """A study and its folder."""
    from abft_mlx import analysis
    from abft_mlx import study as studies

    opened = studies.load(name)
    analysis.check(opened)
    return opened, output or Path("runs") / f"study-{studies.cell_id(opened.name)}"


def _list(
    shell: Shell, name: str, output: Path | None, part: tuple[int, int] | None
) -> dict[str, Any]:
    """Print the cells; the JSON document of --list."""
    opened, folder = _open(name, output)
    from abft_mlx import study as studies

    cells = studies.cells(opened)
    held = studies.Store(folder).check(cells)
    shown = table("cell", "status", left=2)
    rows = []
    for cell in studies.shard(cells, *(part or (1, 1))):
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
        shown.add_row(cell.id, str(row["status"]))
    if not shell.as_json:
        shell.show(shown)
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
    """Run this process's cells; the outcome and the JSON document."""
    opened, folder = _open(name, output)
    from abft_mlx import runtime, study

    runtime.use_wired_memory()
    part = _part(part)
    begun = time.perf_counter()
    try:
        with board(shell) as shown:
            outcome = study.run(
                opened,
                folder,
                part=part,
                retry_failed=retry_failed,
                report=_write_reports,
                events=_follow(shown),
            )
    except KeyboardInterrupt:
        rest = ["--output", folder] if output else []
        if part != (1, 1) and join_ranks(resumable=True).size == 1:
            rest += ["--shard", f"{part[0]}/{part[1]}"]
        shell.tell(f"to go on: {words.command('study', name, *rest)}")
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


def _part(asked: tuple[int, int] | None) -> tuple[int, int]:
    """This process's part: as asked, or its rank under mlx.launch."""
    joined = join_ranks(resumable=True)
    if joined.size == 1:
        return asked or (1, 1)
    if asked is not None:
        raise UsageError(
            f"--shard {asked[0]}/{asked[1]}: mlx.launch runs {joined.size} processes, each of "
            "which takes its part; leave --shard out"
        )
    return joined.rank + 1, joined.size


def _write_reports(folder: Path, opened: Study, cells: list[dict[str, Any]]) -> list[Path]:
    """Write the table and figures."""
    from abft_mlx import analysis

    return analysis.write_study(folder, opened, cells)


def _tell(shell: Shell, outcome: Outcome) -> None:
    """The table, then what failed."""
    for path in outcome.reports:
        if path.name == "table.md" and not shell.as_json:
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


def _follow(shown: Board) -> StudyEvents:
    """Shows which cell of how many runs, and inside it updates and prompts."""
    from abft_mlx.study import StudyEvents

    class Follow(BoardEvents, StudyEvents):
        """Shows a study on a board."""

        def __init__(self) -> None:
            super().__init__(shown)
            self._begun = time.perf_counter()

        def planned(self, left: int, held: int, total: int) -> None:
            """Say how much there is to do."""
            shown.note(
                f"{total:,} cells: {left:,} to run now, {held:,} done before or left to other "
                "shards"
            )

        def begin(self, number: int, left: int, cell: Cell) -> None:
            """Name the cell, and guess how long it all takes from the cells so far."""
            seconds = None
            if number > 1:
                each = (time.perf_counter() - self._begun) / (number - 1)
                seconds = each * (left - number + 1)
            shown.cell(cell.id, number, left, seconds)
            shown.stage("opening model and data")

        def prepared(self, experiment: Any, trainable: int) -> None:
            """Have updates shown."""
            del trainable
            training = experiment.recipe.training
            shown.training(training.updates)

        def end(self, cell: Cell, document: dict[str, Any]) -> None:
            """Say what the cell came to."""
            del cell
            shown.clear()
            took = duration(document["seconds"])
            if document["error"]:
                shown.note(f"  failed after {took}: {document['error']}")
                return
            method = document["evaluation"].get("methods", {}).get("vanilla")
            accuracy = f", accuracy {method['accuracy']:.1%}" if method else ""
            shown.note(f"  done in {took}{accuracy}")

    return Follow()
