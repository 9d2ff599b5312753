"""Progress where there is no terminal: whole lines, few enough for a log."""

from __future__ import annotations

import math
import sys
import threading
import time
from typing import TYPE_CHECKING

from abft_mlx.cli._progress.board import Board
from abft_mlx.cli._progress.rates import Clock, CountRate, Stage, UpdateRate
from abft_mlx.cli._progress.words import amount, cell, facts, left

if TYPE_CHECKING:
    from abft_mlx.trainer import Update

# About this many lines for one thing that is counted, more only where it is slow.
_LINES = 16
_LONGEST_SILENCE_SECONDS = 60.0
# What takes less is not worth a line of its own.
_WORTH_SECONDS = 3.0


class Lines(Board):
    """Plain lines on standard error.

    Of what is counted the first report and the last get a line, and some between. What is not
    counted is named once it has taken a while. Inside trainings and cells, which have lines of
    their own, only a long silence is broken.

    Args:
        clock: seconds.
        worth_seconds: how long something without a count runs before it is named.
    """

    def __init__(
        self, clock: Clock = time.monotonic, worth_seconds: float = _WORTH_SECONDS
    ) -> None:
        self._clock = clock
        self._worth = worth_seconds
        self._timer: threading.Timer | None = None
        self._stage = Stage(clock)
        self._told_at, self._told = clock(), 0
        self._updates: UpdateRate | None = None
        self._silent_seconds = math.inf
        self._in_cell = False
        self._download: tuple[str, CountRate] | None = None
        self._download_told: float | None = None

    def cell(self, name: str, number: int, total: int, seconds_left: float | None = None) -> None:
        """A line for the cell."""
        self.clear()
        self._in_cell = True
        self.note("  ".join(part for part in cell(name, number, total, seconds_left) if part))

    def training(self, updates: int, validate_every: int = 0) -> None:
        """Count updates from now on."""
        self._begin("", "")
        self._updates = UpdateRate(updates, validate_every, self._clock)
        self._silent_seconds = math.inf

    def update(self, update: Update) -> None:
        """A line for every few updates, for the first, the last and every validation."""
        rate = self._updates
        if rate is None:
            return
        self._begin("", "")
        rate.add(update)
        self._silent_seconds += update.seconds
        step, total = update.step, rate.total
        validated = update.validation_accuracy is not None
        due = self._silent_seconds >= _LONGEST_SILENCE_SECONDS
        if update.note:
            self.note(f"update {step}: {update.note}")
        if update.skipped:
            self.note(f"update {step}: left out ({update.skipped})")
        if due or step == total or step % max(1, total // _LINES) == 0 or validated:
            self._silent_seconds = 0.0
            width = len(str(total))
            line = f"update {step:>{width}}/{total}  {facts(update, rate.tokens_per_second)}"
            if step < total:
                line += f"  {left(rate.seconds_left(step))}"
            if validated:
                line += f"  validation {update.validation_accuracy:.1%}"
            self.note(line)
        if step == total:
            self._updates = None

    def stage(self, what: str, unit: str = "prompts") -> None:
        """Name what begins, once it has run for a while and was not counted."""
        self._begin(what, unit)
        if not what:
            return
        seconds = _LONGEST_SILENCE_SECONDS if self._nested else self._worth
        self._timer = threading.Timer(seconds, self.note, [f"{what} …"])
        self._timer.daemon = True
        self._timer.start()

    def count(self, done: int, total: int | None) -> None:
        """A line for the first count, the last, and some between."""
        self._stop_timer()
        first = self._stage.count(done, total)
        rate, now = self._stage.rate, self._clock()
        assert rate is not None
        if first:
            self._told_at, self._told = max(self._told_at, rate.begun), 0
        silent = now - self._told_at
        due = silent >= _LONGEST_SILENCE_SECONDS
        if total and not self._nested:
            share = done - self._told >= total / _LINES
            due = due or first or rate.finished or (share and silent >= self._worth)
        if not due:
            return
        self._told_at, self._told = now, done
        parts = [f"{self._stage.what}: {amount(done, total, self._stage.unit)}"]
        if not rate.finished:
            parts.append(left(rate.seconds_left))
        self.note("  ".join(part for part in parts if part))

    def download(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Lines for a download that takes long, ever farther apart."""
        now = self._clock()
        if self._download is None or self._download[0] != what:
            self._end_download()
            self._download = (what, CountRate(self._clock, now))
            self._told_at = now
        rate = self._download[1]
        rate.add(done_bytes, total_bytes)
        pause = min(max(self._worth, (now - rate.begun) / 4), _LONGEST_SILENCE_SECONDS)
        if now - self._told_at >= pause:
            self._stop_timer()
            self._download_told = self._told_at = now
            parts = [f"downloading {what}: {amount(done_bytes, total_bytes, 'bytes')}"]
            if not rate.finished:
                parts.append(left(rate.seconds_left))
            self.note("  ".join(part for part in parts if part))

    def note(self, line: str) -> None:
        """Leave a line."""
        print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """End all that is counted."""
        self._begin("", "")
        self._updates = None
        self._end_download()

    @property
    def _nested(self) -> bool:
        return self._in_cell or self._updates is not None

    def _begin(self, what: str, unit: str) -> None:
        self._stop_timer()
        self._end_download()
        self._stage.begin(what, unit)

    def _end_download(self) -> None:
        """Say that it is over, if it was spoken of."""
        if self._download is not None and self._download_told is not None:
            what, rate = self._download
            self.note(f"downloaded {what}: {amount(rate.done, None, 'bytes')}")
        self._download = self._download_told = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
