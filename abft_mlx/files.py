"""Files that are whole or absent: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abft_mlx.errors import OutputError, RunError

_LEFTOVER = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")


def is_path(name: str) -> bool:
    """Whether a name means a path, so that nobody looks for it on the hub.

    It begins or ends like a path, has more parts than owner/name, or its first part is a folder
    here, or would be: ``runs``.
    """
    first, slash, _ = name.partition("/")
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
        or (bool(slash) and (first == "runs" or Path(first).is_dir()))
    )


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
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether :func:`replacing` left a file of this name behind when its process was ended."""
    return _LEFTOVER.fullmatch(name) is not None


def sync(path: Path) -> None:
    """Have a file's bytes on the disk, or the names in a folder, whatever happens to the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def array_failure(path: Path, error: RuntimeError) -> RunError:
    """The error of ours for a file of arrays that MLX could not write; MLX does not say why."""
    free = shutil.disk_usage(path.parent).free
    return RunError(
        f"{path}: cannot be written ({error}); {free / 1e6:,.0f} MB are free: free some space, or "
        "raise the quota or limit (ulimit -f), and run again"
    )


def write_failure(path: Path, error: OSError) -> OutputError | RunError:
    """The error of ours that says why ``path`` could not be written."""
    ways_out = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space, or have the quota raised,",
        errno.EFBIG: "raise the limit (ulimit -f)",
    }
    if error.errno in ways_out:
        return RunError(f"{path}: {error.strerror}; {ways_out[error.errno]} and run again")
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
    """The content of a file; ValueError if it is longer than it may be."""
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes / 1e6:,.0f} MB")
    return content


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of a safetensors file's tensors, which are not read.

    Raises:
        ValueError: it is no whole safetensors file; the message says why.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def schema_problem(written: Any, reads: int, again: str) -> str | None:
    """What is wrong with a file's schema version, in words; None where it can be read.

    Args:
        written: the version that the file says it is of; None, older than versions are, reads as 1.
        reads: the version that is written now, the newest that is read.
        again: how to get the file as this version of the package writes it.
    """
    version = 1 if written is None else written
    if type(version) is int and 1 <= version <= reads:
        return None
    newer = type(version) is int and version > reads
    update = "update abft-mlx (pip install --upgrade abft-mlx), or " if newer else ""
    return f"is of schema {version!s:.40} and this abft-mlx reads {reads}; {update}{again}"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, arrays: dict[str, Any], form: str = "mlx") -> None:
    """Write a safetensors file of MLX's arrays whole or not at all.

    Args:
        path: ends with ``.safetensors``.
        arrays: name to array.
        form: which program's layout it says that they have, "mlx" or "pt".
    """
    import mlx.core as mx

    with replacing(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, {"format": form})
        except RuntimeError as error:
            raise array_failure(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
