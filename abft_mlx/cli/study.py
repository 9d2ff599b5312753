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
    from abft_mlx.study import Cell, Study, StudyEvents


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
    part = None if shard is None else _shard(shard)
    with shell.speaking():
        from abft_mlx import analysis, study

        opened = study.load(name)
        analysis.check(opened)
        folder = output or Path("runs") / f"study-{study.cell_id(opened.name)}"
        heading = {"schema": 1, "study": opened.name, "output": str(folder)}
        if only_list:
            document = heading | {"cells": _list(shell, opened, folder, part or (1, 1))}
        else:
            part = _part(part)
            command = words.command(
                "study", name, *(["--output", folder] if output else []),
                *(["--shard", f"{part[0]}/{part[1]}"] if shard else []),
            )  # fmt: skip
            document = heading | _run(shell, opened, folder, part, retry_failed, command)
    shell.document(document)
    if document.get("failed"):
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    """The two numbers of ``I/N``."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: write I/N with I from 1 to N, e.g. 2/3")
    return int(match[1]), int(match[2])


def _part(part: tuple[int, int] | None) -> tuple[int, int]:
    """This process's part: that of --shard, or its rank under mlx.launch."""
    ranks = join_ranks(resumable=True)
    if ranks.size == 1:
        return part or (1, 1)
    if part is not None:
        raise UsageError(
            f"--shard {part[0]}/{part[1]}: mlx.launch runs {ranks.size} processes, each of "
            "which takes its part; leave --shard out"
        )
    return ranks.rank + 1, ranks.size


def _list(shell: Shell, opened: Study, folder: Path, part: tuple[int, int]) -> list[dict[str, Any]]:
    """Print the cells, and what is done of them."""
    from abft_mlx import study

    cells = study.cells(opened)
    documents = study.Store(folder).check(cells)
    shown, rows = table("cell", "status", left=2), []
    for cell in study.shard(cells, *part):
        document = documents.get(cell.id, {})
        keys = ("id", "model", "task", "method", "seed", "sweep")
        row = {key: getattr(cell, key) for key in keys} | {"status": document.get("status", "left")}
        if document.get("error"):
            row["error"] = document["error"]
        rows.append(row)
        shown.add_row(cell.id, row["status"])
    if not shell.as_json:
        shell.show(shown)
        done = sum(row["status"] == "done" for row in rows)
        shell.say("", f"{len(rows):,} cells, {done:,} of them done in {folder}")
    return rows


def _run(
    shell: Shell,
    opened: Study,
    folder: Path,
    part: tuple[int, int],
    retry_failed: bool,
    command: str,
) -> dict[str, Any]:
    """Run this process's cells, and print the table and what failed."""
    from abft_mlx import analysis, runtime, study

    runtime.use_wired_memory()
    begun = time.perf_counter()
    try:
        with board(shell) as shown:
            outcome = study.run(
                opened, folder, part=part, retry_failed=retry_failed, report=analysis.write_study,
                events=_events(shown),
            )  # fmt: skip
    except KeyboardInterrupt:
        shell.tell(f"to go on: {command}")
        raise
    for path in outcome.reports:
        if path.name == "table.md" and not shell.as_json:
            shell.tell("", path.read_text(encoding="utf-8").rstrip("\n"), "")
    shell.say(*(f"wrote {path}" for path in outcome.reports))
    shell.say(*(f"note: {note}" for note in getattr(outcome.reports, "notes", ())))
    if outcome.left:
        shell.say(
            f"{len(outcome.left):,} of {outcome.total:,} cells are left to other shards; the call "
            "that finds all of them done writes the table"
        )
    for cell, error in outcome.failed.items():
        print(f"failed: {cell}: {error}", file=sys.stderr)
    if outcome.failed:
        print(
            f"error: {len(outcome.failed):,} of {outcome.total:,} cells failed; the same command "
            "runs them again",
            file=sys.stderr,
        )
    return {
        "shard": list(part),
        "cells": outcome.total,
        "ran": outcome.ran,
        "done": len(outcome.done),
        "failed": [{"id": key, "error": error} for key, error in outcome.failed.items()],
        "left": len(outcome.left),
        "reports": [str(path) for path in outcome.reports],
        "seconds": time.perf_counter() - begun,
    }


def _events(shown: Board) -> StudyEvents:
    """Shows which cell of how many runs, and inside it updates and prompts."""
    from abft_mlx.study import StudyEvents

    begun = time.perf_counter()

    class Follow(BoardEvents, StudyEvents):
        """Shows a study on a board."""

        def planned(self, left: int, held: int, total: int) -> None:
            """Say how much there is to do."""
            shown.note(
                f"{total:,} cells: {left:,} to run now, {held:,} done before or left to other "
                "shards"
            )

        def begin(self, number: int, left: int, cell: Cell) -> None:
            """Name the cell, and guess how long it all takes from the cells so far."""
            each = (time.perf_counter() - begun) / max(1, number - 1)
            shown.cell(cell.id, number, left, each * (left - number + 1) if number > 1 else None)
            shown.stage("opening model and data")

        def prepared(self, experiment: Any, trainable: int) -> None:
            """Have updates shown."""
            del trainable
            shown.training(experiment.recipe.training.updates)

        def end(self, cell: Cell, document: dict[str, Any]) -> None:
            """Say what the cell came to."""
            del cell
            shown.clear()
            took = duration(document["seconds"])
            method = document["evaluation"].get("methods", {}).get("vanilla")
            accuracy = f", accuracy {method['accuracy']:.1%}" if method else ""
            failed = f"failed after {took}: {document['error']}"
            shown.note(f"  {failed if document['error'] else f'done in {took}{accuracy}'}")

    return Follow(shown)
