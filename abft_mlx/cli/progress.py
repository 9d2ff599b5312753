"""Progress of a command on standard error: bars on a terminal, plain lines elsewhere.

There are four rows at most, from outside in: the cell of a study, the updates of a training, the
stage that runs now, and a download. Rich's Progress keeps the counts and the time left of each.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from abft_mlx.events import Events, Update

if TYPE_CHECKING:
    from rich.progress import Progress, Task

    from abft_mlx.cli.shell import Shell

# A log gets a line for what takes longer than this, then lines ever farther apart.
_FIRST_LINE_SECONDS, _LONGEST_SILENCE_SECONDS = 3.0, 60.0
_UPDATE_LINES = 16
_BAR_COLUMNS, _LEAST_COLUMNS_FOR_BARS = 16, 70

Style = Literal["bars", "lines", "none"]


@contextlib.contextmanager
def board(shell: Shell, *, live: bool = True) -> Iterator[Board]:
    """Show work on standard error while the block runs, downloads included.

    Args:
        shell: of the command; a quiet one shows nothing.
        live: False where bars would mix with results on the same terminal.
    """
    from abft_mlx import hub

    style: Style = "lines"
    if shell.quiet:
        style = "none"
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", ""):
        style = "bars" if live else "none"
    shown = Board(style)
    try:
        with hub.watched(shown.download):
            yield shown
    finally:
        shown.clear()


class Board:
    """Shows the work of a command.

    Args:
        style: bars (a terminal), lines (a log) or none (quiet).
        clock: seconds.
    """

    def __init__(self, style: Style, clock: Callable[[], float] = time.monotonic) -> None:
        self._style = style
        self._clock = clock
        self._rows: dict[str, Task] = {}
        self._timer: threading.Timer | None = None
        self._progress = self._new()

    def cell(self, name: str, number: int, total: int, seconds_left: float | None = None) -> None:
        """A cell of a study begins: number (from 1) of total; seconds_left is a guess for all."""
        self.clear()
        about = "" if seconds_left is None else f"about {left(seconds_left)}"
        task = self._show("cell", f"cell {number}/{total}  {name}", "cells", total)
        self._progress.update(task.id, completed=number - 1, figures=about)
        if self._style == "lines":
            self.note(f"{task.description}  {about}".rstrip())

    def training(self, updates: int) -> None:
        """A training of so many updates begins."""
        self._hide("stage", "download", "training")
        self._show("training", "training", "updates", updates)

    def update(self, update: Update) -> None:
        """One update is done; what matters, and the last update, stay on the screen."""
        task = self._rows.get("training")
        if task is None:
            return
        self._hide("stage", "download")
        step, total, figures = update.step, int(task.total or 0), facts(update)
        what = f"update {step:>{len(str(total))}}/{total}"
        self._progress.update(task.id, completed=step, description=what, figures=figures)
        skipped = update.skipped and f"left out ({update.skipped})"
        for note in filter(None, (update.note, skipped)):
            self.note(f"update {step}: {note}")
        accuracy = update.validation_accuracy
        validated = "" if accuracy is None else f"validation {accuracy:.1%}"
        if self._style == "lines":
            regular = step % max(1, total // _UPDATE_LINES) == 0
            if validated or regular or self._silent(task) >= _LONGEST_SILENCE_SECONDS:
                self._line(task, what, figures, left(task.time_remaining), validated)
        elif step == total or validated:
            self.note(f"{what}  {figures}" if step == total else f"update {step}: {validated}")
        if step == total:
            self._hide("training")

    def stage(self, what: str, unit: str = "prompts") -> None:
        """Something begins, and the stage before it is over; an empty name only ends that."""
        self._hide("stage", "download")
        if not what:
            return
        self._show("stage", what, unit, None)
        if self._style == "lines":
            pause = _LONGEST_SILENCE_SECONDS if self._nested() else _FIRST_LINE_SECONDS
            self._timer = threading.Timer(pause, self.note, [f"{what} …"])
            self._timer.daemon = True
            self._timer.start()

    def progress(self, done: int, total: int | None) -> None:
        """So much of the stage is done."""
        if "stage" in self._rows:
            self._count("stage", done, total)

    def download(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """So much of a download is here; 0 bytes in all if that is not known."""
        task = self._rows.get("download")
        if task is None or task.description != f"downloading {what}":
            self._hide("download")
            self._show("download", f"downloading {what}", "bytes", None)
        self._count("download", done_bytes, total_bytes)

    def note(self, line: str) -> None:
        """Leave a line that stays."""
        if self._style == "bars":
            self._progress.console.print(line, markup=False, soft_wrap=True)
        elif self._style == "lines":
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take away what is shown, so that other things can be printed."""
        self._hide(*self._rows)

    def _new(self) -> Progress:
        """An empty display; rich's cannot start again once it has stopped."""
        from rich import progress
        from rich.console import Console

        console = Console(file=sys.stderr, highlight=False)
        wide = console.width >= _LEAST_COLUMNS_FOR_BARS
        return progress.Progress(
            progress.SpinnerColumn("dots" if console.encoding.startswith("utf") else "line"),
            progress.TextColumn("{task.description}", markup=False),
            *([progress.BarColumn(_BAR_COLUMNS)] if wide else []),
            progress.TextColumn("{task.fields[figures]}", markup=False),
            progress.TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=600,
            get_time=self._clock,
            disable=self._style != "bars",
        )

    def _show(self, row: str, what: str, unit: str, total: int | None) -> Task:
        """Add a row."""
        progress = self._progress
        number = progress.add_task(what, total=total, unit=unit, figures="", said_at=None)
        self._rows[row] = next(task for task in progress.tasks if task.id == number)
        progress.start()
        return self._rows[row]

    def _hide(self, *rows: str) -> None:
        """Remove rows; without any the display ends."""
        if self._timer is not None and "stage" in rows:
            self._timer.cancel()
        for task in [self._rows.pop(row) for row in rows if row in self._rows]:
            self._progress.remove_task(task.id)
            if task.fields["unit"] == "bytes" and task.fields["said_at"] is not None:
                what = task.description.removeprefix("downloading ")
                self.note(f"downloaded {what}: {size(task.completed)}")
        if not self._rows:
            self._progress.stop()
            self._progress = self._new()

    def _nested(self) -> bool:
        """Whether lines about a stage would come between those of a cell or a training."""
        return "cell" in self._rows or "training" in self._rows

    def _count(self, row: str, done: int, total: int | None) -> None:
        """Update a row's count; a log gets a line of it now and then."""
        task = self._rows[row]
        figures = f"{done:,}/{total:,}" if total else f"{done:,}"
        figures += f" {task.fields['unit']}"
        if row == "download":
            figures = size(done) + (f" of {size(total)}" if total else "")
        self._progress.update(task.id, completed=done, total=total or None, figures=figures)
        if self._style != "lines":
            return
        pause = min(max(_FIRST_LINE_SECONDS, (task.elapsed or 0) / 4), _LONGEST_SILENCE_SECONDS)
        if row == "stage" and self._nested():
            pause = _LONGEST_SILENCE_SECONDS
        ended = task.finished and task.fields["said_at"] is not None
        if ended or self._silent(task) >= pause:
            remaining = "" if task.finished else left(task.time_remaining)
            self._line(task, f"{task.description}: {figures}", remaining)

    def _silent(self, task: Task) -> float:
        """Seconds since a row got its last line, or began."""
        began = task.fields["said_at"]
        return self._clock() - began if began is not None else task.elapsed or 0.0

    def _line(self, task: Task, *parts: str) -> None:
        """Print a line of a row."""
        if self._timer is not None:
            self._timer.cancel()
        task.fields["said_at"] = self._clock()
        self.note("  ".join(filter(None, parts)))


class BoardEvents(Events):
    """Shows stages, prompts and updates of a run on a board."""

    def __init__(self, shown: Board) -> None:
        self._board = shown

    def update(self, update: Update) -> None:
        """Show one update."""
        self._board.update(update)

    def stage(self, what: str) -> None:
        """Show what begins."""
        self._board.stage(what)

    def progress(self, done: int, total: int) -> None:
        """Show how many prompts are done."""
        self._board.progress(done, total)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours only where there are any: ``1:05``, ``2:00:07``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def left(seconds: float | None) -> str:
    """The time left; empty if it is not known, or nothing is left."""
    return f"{duration(math.ceil(seconds))} left" if seconds else ""


def size(count_bytes: float) -> str:
    """Bytes as a person reads them: ``812 kB``, ``3.4 MB``, ``1.2 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= factor:
            value = count_bytes / factor
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count_bytes:.0f} B"


def facts(update: Update) -> str:
    """What is worth knowing of an update."""
    measured = "left out"
    if update.loss is not None and update.induction_heads is not None:
        measured = f"loss {update.loss:.3f}"
        if update.A or update.B:  # both are 0 end to end
            measured += f"  induction heads {update.induction_heads:.1f}  A {update.A:.3f}"
    speed = update.tokens / max(update.seconds, 1e-9)
    return f"{measured}  {speed:,.0f} tokens/s  {size(update.peak_memory_bytes)}"
