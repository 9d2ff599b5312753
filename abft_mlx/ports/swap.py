"""Running a module's own code with something around it, for one instance and for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import mlx.nn as nn

_swap = threading.Lock()


def subclass(kind: type, **members: Any) -> type:
    """A subclass that passes for its parent, with some members of its own."""
    described = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), described | members)


class Namespace:
    """A module under whose names one finds other things."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.original = original
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def finding(function: FunctionType, found: Mapping[str, Any]) -> FunctionType:
    """The same code, which finds other things under some of its global names."""
    made = FunctionType(
        function.__code__,
        function.__globals__ | dict(found),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@contextmanager
def swapped(
    modules: Mapping[int, nn.Module], make: Callable[[int, type], type]
) -> Iterator[list[tuple[type, type]]]:
    """Give modules another class while the block runs; their parameters are not touched.

    Args:
        modules: layer numbers to modules.
        make: given a layer's number and its module's class, a subclass of that; it may refuse by
            raising, and then no module has changed.

    Yields:
        Each module's own class and its class in the block.
    """
    with _swap:
        classes = [(type(module), make(layer, type(module))) for layer, module in modules.items()]
        for module, (_, kind) in zip(modules.values(), classes, strict=True):
            module.__class__ = kind
    try:
        yield classes
    finally:
        with _swap:
            for module, (original, _) in zip(modules.values(), classes, strict=True):
                module.__class__ = original
