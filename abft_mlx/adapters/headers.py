"""Safetensors headers, read without any tensor: names, shapes, and whether the file is whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LONGEST_HEADER_BYTES = 100_000_000
MOST_DIMENSIONS = 8
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16,
    "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip


def read_header(path: Path) -> dict[str, Any]:
    """Header of a safetensors file, checked against the file's size.

    Every tensor's bytes must be what its shape and type come to, and together they must fill the
    file without gap or overlap, so that whatever reads the tensors takes no more than the file has.

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
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_table, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its safetensors header is not a table of tensors")
    # MLX writes null where there is none.
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its safetensors header's metadata is no table of texts")
    end = 0
    for start, stop, name in sorted(_span(name, entry) for name, entry in header.items()):
        if start != end:
            raise ValueError(f"its tensor {name!r:.80} starts at {start}, not at {end}")
        end = stop
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    return header


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table whose keys occur once, as other readers of the file may take another one of two."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes start and stop."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError("its safetensors header has no tensor offsets") from error
    if len(entry) != 3:
        raise ValueError(f"its tensor {name!r:.80} has more than a type, a shape and offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"its tensor {name!r:.80} has the type {dtype!r:.40}, which is not known")
    whole = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    if not whole or not all(type(one) is int and 0 <= one < 2**31 for one in shape):
        raise ValueError(f"its tensor {name!r:.80} has the shape {shape!r:.80}")
    if type(start) is not int or type(stop) is not int or start < 0:
        raise ValueError(f"its tensor {name!r:.80} has the offsets {[start, stop]!r:.80}")
    wanted = math.prod(shape) * _BITS[dtype] // 8
    if stop - start != wanted:
        raise ValueError(
            f"its tensor {name!r:.80} of shape {shape} has {stop - start} bytes, not {wanted}"
        )
    return start, stop, name
