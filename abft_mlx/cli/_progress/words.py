"""Times, sizes and counts as a person reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abft_mlx.trainer import Update


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours only where there are any: ``1:05``, ``2:00:07``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def left(seconds: float | None) -> str:
    """The time that is left, of work that is not done: at least a second; empty if not known."""
    return "" if seconds is None else f"{duration(max(math.ceil(seconds), 1))} left"


def size(count_bytes: float) -> str:
    """Bytes as a person reads them: ``812 kB``, ``3.4 MB``, ``1.2 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= factor:
            value = count_bytes / factor
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{count_bytes:.0f} B"


def amount(done: int, total: int | None, unit: str) -> str:
    """How much of how much: ``12/64 prompts``, ``1.2 MB of 3.4 GB``, ``7 texts``."""
    if unit == "bytes":
        return size(done) + (f" of {size(total)}" if total else "")
    return (f"{done:,}/{total:,}" if total else f"{done:,}") + f" {unit}"


def cell(name: str, number: int, total: int, seconds_left: float | None) -> tuple[str, str]:
    """A cell of a study and the time that all cells will take."""
    remaining = left(seconds_left)
    return f"cell {number}/{total}  {name}", f"about {remaining}" if remaining else ""


def facts(update: Update, tokens_per_second: float) -> str:
    """What is worth knowing of an update."""
    if update.loss is None or update.induction_heads is None:
        measured = "left out"
    else:
        measured = f"loss {update.loss:.3f}"
        if update.A or update.B:  # both are 0 end to end
            measured += f"  induction heads {update.induction_heads:.1f}  A {update.A:.3f}"
    return f"{measured}  {tokens_per_second:,.0f} tokens/s  {size(update.peak_memory_bytes)}"
