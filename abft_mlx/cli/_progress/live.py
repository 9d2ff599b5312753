"""Progress on a terminal: a few lines, drawn again and again, and gone when work is done."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from abft_mlx.cli._progress.board import Board
from abft_mlx.cli._progress.rates import Clock, CountRate, Stage, UpdateRate
from abft_mlx.cli._progress.words import amount, cell, duration, facts, left

if TYPE_CHECKING:
    from abft_mlx.trainer import Update

_BAR_COLUMNS = 16
_SPINNER, _SPINNER_ASCII = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"
_FRAMES_PER_SECOND = 8
# A stage that is not counted says how long it has gone on, once that is worth saying.
_WORTH_SECONDS = 3.0


class LiveBoard(Board):
    """Live lines on standard error.

    Args:
        console: where to; standard error where it is left out.
        clock: seconds.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._clock = clock
        self._ascii = not self._console.encoding.startswith("utf")
        self._live: Live | None = None
        self._cell: tuple[str, int, int] | None = None
        self._cells_end: float | None = None
        self._updates: UpdateRate | None = None
        self._update: Update | None = None
        self._stage = Stage(clock)
        self._download: tuple[str, CountRate] | None = None

    def cell(self, name: str, number: int, total: int, seconds_left: float | None = None) -> None:
        """Show the cell above all that goes on in it."""
        self._end()
        self._cell = (name, number, total)
        self._cells_end = None if seconds_left is None else self._clock() + seconds_left
        self._show()

    def training(self, updates: int, validate_every: int = 0) -> None:
        """Show a bar of updates."""
        self._begin("", "")
        self._updates, self._update = UpdateRate(updates, validate_every, self._clock), None
        self._show()

    def update(self, update: Update) -> None:
        """Show one update; what should not be missed, and the last one, stay."""
        rate = self._updates
        if rate is None:
            return
        self._begin("", "")
        rate.add(update)
        first, self._update = self._update is None, update
        if update.note:
            self.note(f"update {update.step}: {update.note}")
        if update.skipped:
            self.note(f"update {update.step}: left out ({update.skipped})")
        if update.validation_accuracy is not None:
            self.note(f"update {update.step}: validation {update.validation_accuracy:.1%}")
        if update.step == rate.total:
            speed = rate.tokens_per_second
            self.note(f"update {update.step}/{rate.total}  {facts(update, speed)}")
            self._updates = self._update = None
            self._show()
        elif first:
            self._show()

    def stage(self, what: str, unit: str = "prompts") -> None:
        """Show what begins."""
        self._begin(what, unit)
        self._show()

    def count(self, done: int, total: int | None) -> None:
        """Show how far the stage is."""
        if self._stage.count(done, total):
            self._show()

    def download(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Show how far a download is."""
        begins = self._download is None or self._download[0] != what
        if self._download is None or begins:
            self._download = (what, CountRate(self._clock, self._clock()))
        self._download[1].add(done_bytes, total_bytes)
        if begins:
            self._show()

    def note(self, line: str) -> None:
        """Leave a line above the live ones."""
        if self._live is not None:
            self._live.refresh()  # what is drawn below it would be as old as the last frame
        self._console.print(line, markup=False, soft_wrap=True)

    def clear(self) -> None:
        """Take the live lines away."""
        self._end()
        self._cell = None
        self._show()

    def lines(self) -> list[str]:
        """What is shown now, each line as wide as the terminal at most."""
        width = max(self._console.width - 1, 1)
        made = []
        # Each is read once: a thread draws, and another may have ended the work by then.
        shown, updates, download = self._cell, self._updates, self._download
        if shown is not None:
            end = self._cells_end
            what, remaining = cell(*shown, None if end is None else end - self._clock())
            made.append(fitted(what, "", remaining, width))
        update = self._update
        if updates is not None and update is not None:
            made.append(self._updates_line(updates, update, width))
        elif updates is not None and not self._stage.what:
            # A run that goes on does not begin at 0, and one that was finished has none to make.
            made.append(fitted(f"{self._spin()} training", "", f"{updates.total} updates", width))
        if self._stage.what:
            made.append(self._counted(self._stage.what, self._stage.unit, self._stage.rate, width))
        if download is not None:
            what, rate = download
            made.append(self._counted(f"downloading {what}", "bytes", rate, width))
        return made

    def _counted(self, what: str, unit: str, rate: CountRate | None, width: int) -> str:
        head = f"{self._spin()} {what}"
        if rate is None:
            took = self._clock() - self._stage.begun
            return fitted(head, "", duration(took) if took >= _WORTH_SECONDS else "", width)
        counted = amount(rate.done, rate.total, unit)
        remaining = "" if rate.finished else left(rate.seconds_left)
        if remaining:
            counted += f"  {remaining}"
        return fitted(head, self._bar(rate.done, rate.total), counted, width)

    def _updates_line(self, rate: UpdateRate, update: Update, width: int) -> str:
        step = update.step
        known = facts(update, rate.tokens_per_second)
        remaining = left(rate.seconds_left(step))
        line = f"{self._bar(step, rate.total)} {step}/{rate.total}  {known}  {remaining}"
        if cell_len(line) <= width:
            return line
        # What is cut off at the end is what a person needs least.
        known = known.replace("induction heads", "heads")
        return fitted(f"{step}/{rate.total}  {remaining}  {known}", "", "", width)

    def _spin(self) -> str:
        frames = _SPINNER_ASCII if self._ascii else _SPINNER
        return frames[int(self._clock() * _FRAMES_PER_SECOND) % len(frames)]

    def _bar(self, done: float, total: float) -> str:
        if not total:
            return ""
        filled = int(_BAR_COLUMNS * min(done / total, 1.0))
        full, empty = "#-" if self._ascii else "█░"
        return full * filled + empty * (_BAR_COLUMNS - filled)

    def _begin(self, what: str, unit: str) -> None:
        self._download = None
        self._stage.begin(what, unit)

    def _end(self) -> None:
        self._begin("", "")
        self._updates = self._update = None

    def _show(self) -> None:
        """Draw the live lines now, not at the next frame; where there are none, end the drawing."""
        if not self.lines():
            if self._live is not None:
                live, self._live = self._live, None
                live.stop()
        elif self._live is not None:
            self._live.refresh()
        else:
            self._live = Live(
                console=self._console,
                get_renderable=self._drawn,
                refresh_per_second=_FRAMES_PER_SECOND,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start(refresh=True)

    def _drawn(self) -> Group:
        return Group(*(Text(line, no_wrap=True, overflow="crop") for line in self.lines()))


def fitted(what: str, bar: str, rest: str, width: int) -> str:
    """One line of a name, a bar and figures: without the bar, or the name cut, if need be."""
    for parts in ((what, bar, rest), (what, rest)):
        line = "  ".join(part for part in parts if part)
        if cell_len(line) <= width:
            return line
    room = width - cell_len(rest) - (2 if rest else 0)
    if room < 2:
        return set_cell_size(rest, width) if rest else set_cell_size(what, width)
    cut = set_cell_size(what, room - 1) + "…"
    return "  ".join(part for part in (cut, rest) if part)
