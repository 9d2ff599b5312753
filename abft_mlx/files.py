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


def schema_problem(found: Any, reads: int, again: str) -> str | None:
    """What is wrong with a file's schema version, in words; None where it can be read.

    A file without a version is older than versions are, and reads as the first.

    Args:
        found: the version that the file says it is of; None where it says none.
        reads: the version that is written now, the newest that is read.
        again: how to get the file as this version of the package writes it.
    """
    version = 1 if found is None else found
    if type(version) is int and 1 <= version <= reads:
        return None
    newer = type(version) is int and version > reads
    update = "update abft-mlx (pip install --upgrade abft-mlx), or " if newer else ""
    return f"is of schema {version!s:.40} and this abft-mlx reads {reads}; {update}{again}"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
