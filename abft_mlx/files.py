"""Files that are whole or absent: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abft_mlx.errors import OutputError, RunError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to ``path`` when the block ends well.

    The temporary name keeps the target's suffix, because MLX chooses a format by it.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full or the quota is used up.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_failure(path: Path, error: OSError) -> OutputError | RunError:
    """The error of ours that says why ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: {error.strerror}; free some space and run again")
    reason = error.strerror or str(error)
    return OutputError(f"{path}: cannot be written ({reason}); choose another folder")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON document from elsewhere.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a text that UTF-8 cannot write.
    """
    try:
        value = json.loads(text)
        escape = "\\ud" if isinstance(text, str) else b"\\ud"
        if escape in text.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file that is not longer than it may be.

    Raises:
        ValueError: it is longer.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes / 1e6:,.0f} MB")
    return content


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
