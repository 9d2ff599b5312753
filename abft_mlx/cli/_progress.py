"""Progress for a person: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from abft_mlx.cli._shell import Shell

if TYPE_CHECKING:
    from abft_mlx.trainer import Update

# Plain lines fill logs: about this many of them a run, more only where updates are slow.
_PLAIN_LINES = 16
_LONGEST_SILENCE_SECONDS = 60.0
_RECENT_UPDATES = 8
# Narrower terminals get the facts without a bar.
_WIDE_COLUMNS = 104


class Display(Protocol):
    """What can show updates of a run."""

    def update(self, update: Update) -> None:
        """Show one update."""


class _Rates:
    """Recent speed, and the time that is left."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_UPDATES)

    def add(self, update: Update) -> None:
        self._recent.append((update.tokens, update.seconds))

    @property
    def tokens_per_second(self) -> float:
        return sum(t for t, _ in self._recent) / max(sum(s for _, s in self._recent), 1e-9)

    def seconds_left(self, step: int) -> float:
        mean = sum(s for _, s in self._recent) / len(self._recent)
        return mean * max(self._total - step, 0)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours only where there are any: ``1:05``, ``2:00:07``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count_bytes: float) -> str:
    """Bytes as a person reads them: ``812 kB``, ``3.4 MB``, ``1.2 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= factor:
            value = count_bytes / factor
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count_bytes:.0f} B"


def _facts(update: Update, rates: _Rates) -> str:
    return (
        f"loss {update.loss:.3f}  induction heads {update.induction_heads:.1f}  "
        f"A {update.A:.3f}  {rates.tokens_per_second:,.0f} tokens/s  "
        f"{size(update.peak_memory_bytes)}"
    )


class _Lines:
    """One plain line for every few updates, for the first, the last and every validation."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._every = max(1, total // _PLAIN_LINES)
        self._rates = _Rates(total)
        self._silent_seconds = math.inf

    def update(self, update: Update) -> None:
        """Show one update."""
        self._rates.add(update)
        self._silent_seconds += update.seconds
        step = update.step
        validated = update.validation_accuracy is not None
        due = self._silent_seconds >= _LONGEST_SILENCE_SECONDS
        if update.note:
            print(f"update {step}: {update.note}", file=sys.stderr, flush=True)
        if not (due or step == self._total or step % self._every == 0 or validated):
            return
        self._silent_seconds = 0.0
        width = len(str(self._total))
        line = f"update {step:>{width}}/{self._total}  {_facts(update, self._rates)}"
        if step < self._total:
            line += f"  {duration(self._rates.seconds_left(step))} left"
        if validated:
            line += f"  validation {update.validation_accuracy:.1%}"
        print(line, file=sys.stderr, flush=True)


class _Silence:
    """Shows nothing."""

    def update(self, update: Update) -> None:
        """Show nothing of an update."""


@contextlib.contextmanager
def updates(shell: Shell, total: int) -> Iterator[Display]:
    """Show a run's updates on standard error while the block runs.

    Args:
        shell: of the command; a quiet one shows nothing.
        total: updates of the whole run.
    """
    if shell.quiet:
        yield _Silence()
    elif sys.stderr.isatty():
        with _bar(total) as display:
            yield display
    else:
        yield _Lines(total)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Display]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False)
    wide = console.width >= _WIDE_COLUMNS
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"))
    progress = Progress(*((BarColumn(bar_width=16),) if wide else ()), *columns, console=console)
    rates = _Rates(total)
    task = progress.add_task("", total=total)

    class Bar:
        def update(self, update: Update) -> None:
            rates.add(update)
            text = _facts(update, rates) + f"  {duration(rates.seconds_left(update.step))} left"
            if not wide:
                text = text.replace("induction heads", "heads")
            progress.update(task, completed=update.step, description=text)
            if update.note:
                progress.console.print(f"update {update.step}: {update.note}")
            if update.validation_accuracy is not None:
                progress.console.print(
                    f"update {update.step}: validation {update.validation_accuracy:.1%}"
                )

    with progress:
        yield Bar()


@contextlib.contextmanager
def prompts(shell: Shell, what: str) -> Iterator[ProgressCallback]:
    """Count evaluated prompts on a terminal; say nothing elsewhere.

    Args:
        shell: of the command.
        what: what is being measured, for a person.
    """
    if shell.quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(what), BarColumn(bar_width=16), MofNCompleteColumn())
    console = Console(file=sys.stderr, highlight=False)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class ProgressCallback(Protocol):
    """Takes prompts done and prompts in all."""

    def __call__(self, done: int, total: int, /) -> None:
        """Note how far the work is."""
