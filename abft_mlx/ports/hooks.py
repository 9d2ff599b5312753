"""Layer hooks: see, or change, the hidden states that go into a layer and come out of it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx.ports.registry import port_for
from abft_mlx.ports.swap import subclass, swapped

Hook = Callable[[int, mx.array], mx.array]
"""Given a layer's number and hidden states, the hidden states to go on with."""


Around = Callable[[int, Callable[[mx.array], Any], mx.array], Any]
"""Given a layer's number, the layer itself as a function of hidden states, and its input: what the
layer shall be taken to give."""


@contextmanager
def wrap_layers(model: nn.Module, around: Around) -> Iterator[None]:
    """Run every layer inside a function while the block runs.

    Only calls from the thread that opened the block are wrapped. Blocks can be nested, and an
    instrumented model can be wrapped.

    Args:
        model: a loaded model.
        around: called in a layer's place; what the layer gives is hidden states, or a tuple that
            begins with them.

    Raises:
        UnsupportedArchitectureError: no port describes this model.
    """
    port = port_for(model)
    thread = threading.get_ident()

    def wrapped(layer: int, kind: Any) -> type:
        original = kind.__call__
        names = list(inspect.signature(original).parameters)[1:]
        # Talkie's layers get the embeddings first.
        name = port.layer_input or names[0]
        place = names.index(name)

        def call(self: nn.Module, *args: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return original(self, *args, **options)
            if name in options:
                hidden = options.pop(name)
                return around(
                    layer, lambda h: original(self, *args, **{name: h}, **options), hidden
                )
            first, rest = args[:place], args[place + 1 :]
            return around(layer, lambda h: original(self, *first, h, *rest, **options), args[place])

        return subclass(kind, __call__=call)

    with swapped(dict(enumerate(port.layers(model))), wrapped):
        yield


@contextmanager
def hook_layers(
    model: nn.Module, before: Hook | None = None, after: Hook | None = None
) -> Iterator[None]:
    """Call a function on every layer's hidden states while the block runs.

    Nothing but what a hook returns is used, and MLX computes what is used alone: a hook that gives
    hidden states that are known already spares the layers below. Differentiable, and usable
    inside ``mx.compile``; otherwise as :func:`wrap_layers`.

    Args:
        model: a loaded model.
        before: gets a layer's number, from 0, and its input, (B, T, width), and returns what the
            layer shall get. Gemma 3n's hidden states come as (copies, B, T, width).
        after: the same for its output. What else a layer gives goes on as it is.

    Raises:
        UnsupportedArchitectureError: no port describes this model.

    Example:
        Each layer's loss trains that layer alone::

            with ports.hook_layers(model, before=lambda layer, hidden: mx.stop_gradient(hidden)):
                rows = attention.forward(model, tokens, last)[1]
    """

    def around(layer: int, run: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        output = run(hidden if before is None else before(layer, hidden))
        if after is None:
            return output
        if isinstance(output, tuple):
            return (after(layer, output[0]), *output[1:])
        return after(layer, output)

    with wrap_layers(model, around):
        yield
