"""Ending a command by Ctrl-C or SIGTERM: at once, or a run after the update that goes on.

MLX may compute for long inside one call, where no handler of Python's can run. So a thread is told
of signals by the system itself: it answers the first, and ends the process at the second. Files
are whole at every moment, so nothing is torn by that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from abft_mlx.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = b"\x1b[?25h\n"
# Seconds in which the main thread would have heard of a signal, were it not inside a long call.
PATIENCE = 0.2


class Stop:
    """Whether somebody asked a command to end.

    Args:
        on_request: told, in a line and by another thread, that an update is being finished.
        on_busy: the same, that the command ends as soon as the call it is in returns.

    Attributes:
        number: the signal that asked, or None.
        watched: whether signals are taken; if so on every rank.
    """

    def __init__(
        self,
        on_request: Callable[[str], None] | None = None,
        on_busy: Callable[[str], None] | None = None,
    ) -> None:
        self.number: int | None = None
        self.watched = False
        self._on_request = on_request
        self._on_busy = on_busy
        self._deferred = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Stop]:
        """Take Ctrl-C and SIGTERM while the block runs; elsewhere than in the main thread nothing.

        A signal that is ignored, as of a job in the background, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        taken = [one for one in SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
        ours, systems = socket.socketpair()
        systems.setblocking(False)
        watch = threading.Thread(target=self._watch, args=(ours, taken), daemon=True)
        before = {one: signal.signal(one, self._handle) for one in taken}
        wakeup = signal.set_wakeup_fd(systems.fileno(), warn_on_full_buffer=False)
        watch.start()
        self.watched = True
        try:
            yield self
        finally:
            self.watched = False
            signal.set_wakeup_fd(wakeup)
            for one, handler in before.items():
                signal.signal(one, handler)
            systems.close()
            watch.join()
            ours.close()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal only sets ``number`` while the block runs; elsewhere it raises StoppedError."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        if not self._deferred:
            raise StoppedError(number)

    def _watch(self, signals: socket.socket, taken: list[signal.Signals]) -> None:
        seen = 0
        while True:
            try:
                number = signals.recv(1)
            except TimeoutError:
                signals.settimeout(None)
                if self.number is None and self._on_busy is not None:
                    self._on_busy("stopping after this batch; press Ctrl-C again to stop now")
                continue
            if not number:
                return
            if number[0] not in taken:
                continue
            seen += 1
            if seen > 1:
                if sys.stderr.isatty():
                    os.write(2, _SHOW_CURSOR)
                os.write(2, f"error: {StoppedError(number[0])} at once\n".encode())
                os._exit(128 + number[0])
            if not self._deferred:
                signals.settimeout(PATIENCE)
            elif self._on_request is not None:
                self._on_request("finishing this update and saving; press Ctrl-C again to stop now")
