"""One process at a time on a run folder: a file in it that the system keeps locked.

The lock is gone with its process, however that ends. The file says who holds it, and is removed
where the process can still do that; one that was left behind locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from abft_mlx import files
from abft_mlx.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "run.lock"
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs; where the system has no ``flock`` nothing is held.

    Raises:
        OutputError: another process holds it, or its file cannot be written.
    """
    path = folder / FILE_NAME
    if fcntl is None:
        yield
        return
    try:
        descriptor = _locked(path)
    except OSError as error:
        if error.errno in _HELD and path.exists() and os.access(path, os.W_OK):
            raise _in_use(folder) from error
        raise files.write_failure(path, error) from error
    try:
        try:
            _sign(descriptor)
        except OSError as error:
            raise files.write_failure(path, error) from error
        yield
    finally:
        with contextlib.suppress(OSError):  # a folder that can no longer be written
            path.unlink()
        os.close(descriptor)


def check(folder: Path) -> None:
    """See that no process holds a folder.

    Raises:
        OutputError: one does.
    """
    if fcntl is None:
        return
    try:
        descriptor = os.open(folder / FILE_NAME, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise _in_use(folder) from error
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    known = {
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(known).encode() + b"\n")


def _in_use(folder: Path) -> OutputError:
    try:
        known = files.parse_json((folder / FILE_NAME).read_text(encoding="utf-8"))
        who = f"process {known['process']} on {known['machine']}, since {known['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return OutputError(
        f"{folder}: in use by {who}; wait for it, end it, or choose another folder with --output"
    )
