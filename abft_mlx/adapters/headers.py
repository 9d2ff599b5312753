"""Safetensors headers, read without any tensor: names, shapes, and whether the file is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST_HEADER_BYTES = 100_000_000


def read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, checked against the file's size.

    Returns:
        Tensor name to ``dtype``, ``shape`` and ``data_offsets``, without the metadata entry.

    Raises:
        ValueError: the file is not a whole safetensors file; the message says why.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
            raise ValueError(f"its {size} bytes do not start with a safetensors header")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError("its safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its safetensors header is not a table of tensors")
    header.pop("__metadata__", None)
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError("its safetensors header has no tensor offsets") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    return header
