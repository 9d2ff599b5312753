"""A folder of files that is replaced as a whole, with a manifest of checksums and the one before.

``NAME/`` is the newest, ``NAME.before/`` the one before it. A new one is written to ``NAME.new/``,
its manifest last, and then renamed: whenever a process or the power ends, one of the three is
whole, and :func:`newest` finds it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abft_mlx import files

MANIFEST = "manifest.json"
SCHEMA = 1
_PIECE_BYTES = 2**20


def names(folder: Path) -> tuple[Path, Path, Path]:
    """The new one, if a process ended before it was renamed; the newest; the one before."""
    return folder.with_name(f"{folder.name}.new"), folder, folder.with_name(f"{folder.name}.before")


def replace(folder: Path, fill: Callable[[Path], None]) -> None:
    """Put what ``fill`` writes in the folder's place, which becomes the one before.

    Args:
        folder: what lies there must be whole; :func:`settle` sees to that.
        fill: writes files into the folder that it is given. If it fails nothing changes.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full or the quota is used up.
    """
    new, _, before = names(folder)
    try:
        _remove(new)
        new.mkdir(parents=True)
        fill(new)
        _write_manifest(new)
        files.sync_folder(new)
        if folder.exists():
            _remove(before)
            folder.rename(before)
        new.rename(folder)
        files.sync_folder(folder.parent)
    except OSError as error:
        raise files.write_failure(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest that is whole, and what is wrong with the ones that it was taken instead of.

    A new one that was not finished is nothing wrong: it had not taken its place.
    """
    wrong: list[str] = []
    new, *placed = names(folder)
    if new.is_dir() and damage(new) is None:
        return new, []
    for one in placed:
        if not one.is_dir():
            continue
        found = damage(one)
        if found is None:
            return one, wrong
        wrong.append(f"{one}: {found}")
    return None, wrong


def settle(folder: Path, chosen: Path) -> None:
    """Put the one that :func:`newest` found in its place, and remove what is damaged.

    Raises:
        OutputError: the folder cannot be written.
    """
    new, _, before = names(folder)
    try:
        if chosen == new and folder.exists() and damage(folder) is None:
            _remove(before)
            folder.rename(before)
        if chosen != folder:
            _remove(folder)
            chosen.rename(folder)
        _remove(new)
        if before.exists() and damage(before) is not None:
            _remove(before)
    except OSError as error:
        raise files.write_failure(folder, error) from error


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, by its manifest; None if it is whole."""
    try:
        manifest = files.parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return f"{MANIFEST} has schema {manifest['schema']}, this version reads {SCHEMA}"
        listed = dict(manifest["files"])
    except FileNotFoundError:
        return f"half-written (no {MANIFEST})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, known in listed.items():
        try:
            if _facts(folder / name) != known:
                return f"damaged ({name} is not what {MANIFEST} says)"
        except OSError as error:
            return f"damaged ({name}: {error.strerror})"
    return None


def _write_manifest(folder: Path) -> None:
    listed = {}
    for path in sorted(folder.iterdir()):
        files.sync(path)
        listed[path.name] = _facts(path)
    files.write_json(folder / MANIFEST, {"schema": SCHEMA, "files": listed})


def _facts(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
