"""What a function would compute, read from MLX's export; nothing is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx


def primitives(
    function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]
) -> list[tuple[str, set[mx.Dtype]]]:
    """Names of the primitives that a function runs on a CPU, each with its outputs' types."""
    found: list[tuple[str, set[mx.Dtype]]] = []

    def read(event: dict[str, Any]) -> None:
        if event["type"] == "primitive":
            found.append((event["name"], {dtype for _, _, dtype in event["outputs"]}))

    with mx.stream(mx.cpu):
        mx.export_function(read, function, *arguments)
    return found


def kept(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The same function: a step then computes nothing again, which MLX could not export."""
    return function
