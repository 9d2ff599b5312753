"""A study's facts, from its folder or from a file that was kept of it."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from abft_mlx import study as studies
from abft_mlx.analysis.facts import SCHEMA, facts
from abft_mlx.errors import OutputError

FACTS_FILE, STUDY_FILE = "study.json", "study.yaml"


def is_study(path: Path) -> bool:
    """Whether a path is a study's folder or its file, rather than a run's."""
    return path.is_file() or (path / FACTS_FILE).is_file() or (path / "cells").is_dir()


def read_study(path: Path) -> dict[str, Any]:
    """The facts of a study: of its cells where they are, else of the file that was written last.

    Raises:
        OutputError: there are none, or a file is broken.
    """
    if path.is_file():
        return _read(path)
    if (path / "cells").is_dir() and (path / STUDY_FILE).is_file():
        return facts(studies.load(str(path / STUDY_FILE)), studies.read(path))
    return _read(path / FACTS_FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        document = json.loads(content)
    except FileNotFoundError:
        raise OutputError(f"{path}: there is no such file; abft-mlx study makes it") from None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
        raise OutputError(f"{path}: holds no study (abft-mlx study writes study.json)")
    if document.get("schema") != SCHEMA:
        raise OutputError(
            f"{path}: is of schema {document.get('schema')} and this abft-mlx reads {SCHEMA}"
        )
    return document
