"""Running a model's own code with something around it, for one instance and for a while.

Blocks are numbered from 0 in the order in which they run.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx.ports.table import port_for

_swap = threading.Lock()

Hook = Callable[[int, mx.array], mx.array]
"""Given a block's number and hidden states, the hidden states to go on with."""

Around = Callable[[int, Callable[[mx.array], Any], mx.array], Any]
"""Given a block's number, the block itself as a function of hidden states, and its input: what the
block shall be taken to give."""


@contextmanager
def wrap_blocks(model: nn.Module, around: Around) -> Iterator[None]:
    """Run every block inside a function while the context is open.

    Only calls from the thread that opened it are wrapped. Contexts can be nested, and an
    instrumented model can be wrapped.

    Args:
        model: a loaded model.
        around: called in a block's place; what the block gives is hidden states, or a tuple that
            begins with them.
    """
    thread = threading.get_ident()
    # Classes live until the garbage collector runs; what `around` holds must not.
    inside = [around]

    def wrapped(number: int, kind: Any) -> type:
        original = kind.__call__
        name = list(inspect.signature(original).parameters)[1]

        @functools.wraps(original)
        def call(self: nn.Module, *args: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return original(self, *args, **options)

            def run(hidden: mx.array) -> Any:
                if args:
                    return original(self, hidden, *args[1:], **options)
                return original(self, **options | {name: hidden})

            return inside[0](number, run, args[0] if args else options[name])

        return subclass(kind, __call__=call)

    blocks = port_for(model).blocks(model)
    try:
        with swapped({n: block.module for n, block in enumerate(blocks)}, wrapped):
            yield
    finally:
        inside.clear()


@contextmanager
def hook_blocks(
    model: nn.Module, before: Hook | None = None, after: Hook | None = None
) -> Iterator[None]:
    """Call a function on every block's hidden states while the context is open.

    Nothing but what a hook returns is used, and MLX computes what is used alone: a hook that gives
    hidden states that are known already spares the blocks below. Differentiable, and usable
    inside ``mx.compile``; otherwise as :func:`wrap_blocks`.

    Args:
        model: a loaded model.
        before: gets a block's number and its input, (B, T, width), and returns what the block
            shall get. Gemma 3n's hidden states come as (copies, B, T, width).
        after: the same for its output. What else a block gives goes on as it is.

    Example:
        Each layer's loss trains that layer alone::

            with ports.hook_blocks(model, before=lambda block, hidden: mx.stop_gradient(hidden)):
                rows = attention.forward(model, tokens, last)[1]
    """

    def around(number: int, run: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        output = run(hidden if before is None else before(number, hidden))
        if after is None:
            return output
        if isinstance(output, tuple):
            return (after(number, output[0]), *output[1:])
        return after(number, output)

    with wrap_blocks(model, around):
        yield


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


def finding(function: FunctionType, names: Mapping[str, Any]) -> FunctionType:
    """The same code, which finds other things under some of its global names."""
    changed = FunctionType(
        function.__code__,
        function.__globals__ | dict(names),
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


@contextmanager
def swapped(modules: Mapping[int, nn.Module], make: Callable[[int, type], type]) -> Iterator[None]:
    """Give modules another class while the block runs; their parameters are not touched.

    Args:
        modules: numbers to modules.
        make: given a number and its module's class, a subclass of that; it may refuse by raising,
            and then no module has changed.
    """
    with _swap:
        classes = {n: (type(module), make(n, type(module))) for n, module in modules.items()}
        for n, module in modules.items():
            module.__class__ = classes[n][1]
    try:
        yield
    finally:
        with _swap:
            for n, module in modules.items():
                module.__class__ = classes[n][0]
