"""Limits on a process's memory, seen before MLX's CPU backend meets them: it does not survive them.

Where the system gives it no memory, that backend crashes, waits for ever for work that has died,
or keeps the system busy for ever, as if OpenBLAS asked for its buffers again and again (seen from
outside, not proved). So there is a look at what is left before anything large is begun,
and a watch that ends a process which waits and has next to nothing left. Without a limit
(``ulimit -v``, ``ulimit -d``) all of this does nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from abft_mlx.errors import RunError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Address space that libraries and threads reserve as a model is opened, beside its weights.
OPENING_BYTES = 512_000_000
THREAD_BYTES = 192_000_000
MOST_THREADS = 8
# What one more batch may ask of the system, roughly.
BATCH_BYTES = 64_000_000
# With less left than this, what fails fails for memory, whatever it calls itself.
TIGHT_BYTES = 256_000_000
PATIENCE_SECONDS = 30.0
BUSY_SHARE = 0.05
WAYS_OUT = (
    "raise the limit (ulimit -v), lower training.micro_batch_tokens, set "
    "training.gradient_checkpointing to true, or take a 4-bit copy of the model"
)


def room_bytes() -> int | None:
    """Bytes that the process's own limits leave it; None where there is no limit."""
    if resource is None or sys.platform != "linux":
        return None
    rooms = []
    for limit, column in ((resource.RLIMIT_AS, 0), (resource.RLIMIT_DATA, 5)):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[column])
            rooms.append(max(0, most - pages * resource.getpagesize()))
    return min(rooms, default=None)


def is_tight() -> bool:
    """Whether there is a limit and next to nothing left under it."""
    try:
        room = room_bytes()
    except (OSError, MemoryError):  # no memory for the answer is one, too
        return True
    return room is not None and room < TIGHT_BYTES


def check_opening(weights_bytes: int, what: str) -> None:
    """See that a model can be opened and used.

    Args:
        weights_bytes: of its files.
        what: the model, for the message.

    Raises:
        RunError: the limit leaves too little.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    _check(weights_bytes + OPENING_BYTES + threads * THREAD_BYTES, f"opening {what}")


def check_batch(held_bytes: int = 0) -> None:
    """See that one more batch can be computed.

    Args:
        held_bytes: what MLX has freed and keeps for the next.

    Raises:
        RunError: the limit leaves too little.
    """
    _check(max(0, BATCH_BYTES - held_bytes), "the next batch")


def _check(needed: int, what: str) -> None:
    room = room_bytes()
    if room is not None and room < needed:
        raise RunError(
            f"memory ran out: the process's limit leaves it {room / 1e6:,.0f} MB and {what} may "
            f"take {needed / 1e6:,.0f} MB; {WAYS_OUT}"
        )


@contextlib.contextmanager
def watching(on_stuck: Callable[[str], None]) -> Iterator[None]:
    """End the process with status 1 where it waits for memory that will not come.

    It is taken to do so when it has computed next to nothing for ``PATIENCE_SECONDS``, but perhaps
    kept the system busy, and is tight. Without a limit nothing is watched.

    Args:
        on_stuck: told why, in a line and by another thread, just before the end.

    Raises:
        RunError: there is no memory left for the watch itself.
    """
    if room_bytes() is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, on_stuck), daemon=True)
    try:
        watch.start()
    except RuntimeError as error:
        raise RunError(f"memory ran out ({error}); {WAYS_OUT}") from error
    try:
        yield
    finally:
        ended.set()


def computes(user: float, system: float, whole: float) -> bool:
    """Whether a process that took so many seconds of so many does work of its own.

    One that waits does not, nor one for which the system works, as if OpenBLAS asked for
    its buffers again and again.
    """
    return user > max(whole * BUSY_SHARE, system / 3)


def _watch(ended: threading.Event, on_stuck: Callable[[str], None]) -> None:
    every = PATIENCE_SECONDS / 10
    before, quiet = os.times(), 0
    while not ended.wait(every):
        now = os.times()
        busy = computes(now.user - before.user, now.system - before.system, every)
        quiet = quiet + 1 if not busy and is_tight() else 0
        before = now
        if quiet >= 10:
            on_stuck(f"memory ran out, and MLX waits for it without end; {WAYS_OUT}")
            os._exit(1)
