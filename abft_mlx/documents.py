"""Parts of documents from elsewhere, and what is said of one that holds other things."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abft_mlx.errors import OutputError

_MISREAD = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip


@contextmanager
def reading(source: Path | str) -> Iterator[None]:
    """Say of a document in which a part is missing, or is of another kind, that it is so.

    The documents of runs and studies nest deeply, and every figure asks for other parts of them:
    what one of them cannot take is told from where it was met, and kept as the cause.

    Raises:
        OutputError: a part is not what it should be.
    """
    try:
        yield
    except _MISREAD as error:
        found = " ".join(repr(error).split())
        raise OutputError(
            f"{source}: holds a part that cannot be read ({found:.300}); make it again or take it "
            "away"
        ) from error


def find(document: Any, *keys: str) -> Any:
    """What lies at some depth of a document, or None."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def number(document: Any, *keys: str) -> float | None:
    """A finite number at some depth of a document, or None."""
    value = find(document, *keys)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None


def text(document: Any, *keys: str) -> str | None:
    """A text at some depth of a document, or None."""
    value = find(document, *keys)
    return value if isinstance(value, str) and value else None


def short(source: str) -> str:
    """Of a local path its name alone."""
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return source.rstrip("/").rpartition("/")[2] or source
    return source


def section(document: dict[str, Any], key: str) -> dict[str, Any]:
    """An object inside a document; empty where there is none."""
    found = document.get(key)
    return found if isinstance(found, dict) else {}
