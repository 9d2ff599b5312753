"""Ending a command by Ctrl-C or SIGTERM: at once, or a training run after its current update.

The first signal sets a flag, or raises; the second has the system's default action, so it ends the
process even inside a long call of MLX's. Files are whole at every moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from abft_mlx.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = "finishing this update and saving; press Ctrl-C again to stop now"
_SHOW_CURSOR = b"\x1b[?25h"


class Stop:
    """Whether somebody asked a command to end.

    Args:
        on_request: gets the line which says that an update is being finished.

    Attributes:
        number: the signal that asked, or None.
        watched: whether signals are taken; if so on every rank.
    """

    def __init__(self, on_request: Callable[[str], None] | None = None) -> None:
        self.number: int | None = None
        self.watched = False
        self._on_request = on_request
        self._deferred = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Stop]:
        """Take Ctrl-C and SIGTERM while the block runs; elsewhere than in the main thread nothing.

        A signal that is ignored, as of a job in the background, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._handle) for number in watched}
        self.watched = True
        try:
            yield self
        finally:
            self.watched = False
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal only sets ``number`` while the block runs; elsewhere it raises StoppedError."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _frame: object) -> None:
        """Note the first signal, and leave the second to the system."""
        self.number = number
        for watched in SIGNALS:
            if signal.getsignal(watched) == self._handle:
                signal.signal(watched, signal.SIG_DFL)
        if not self._deferred:
            raise StoppedError(number)
        if sys.stderr.isatty():  # a process that is killed leaves the cursor as it is
            os.write(2, _SHOW_CURSOR)
        if self._on_request is not None:
            try:
                self._on_request(NOTE)
            except RuntimeError:  # the signal came in the middle of another line
                os.write(2, f"\n{NOTE}\n".encode())
