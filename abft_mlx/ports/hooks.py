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


@contextmanager
def hook_layers(
    model: nn.Module, before: Hook | None = None, after: Hook | None = None
) -> Iterator[None]:
    """Call a function on every layer's hidden states while the block runs.

    Nothing but what a hook returns is used, and MLX computes what is used alone: a hook that gives
    hidden states that are known already spares the layers below. Differentiable, and usable
    inside ``mx.compile``. Only calls from the thread that opened the block are hooked. Blocks can
    be nested, and an instrumented model can be hooked.

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
    port = port_for(model)
    thread = threading.get_ident()

    def hooked(layer: int, kind: Any) -> type:
        original = kind.__call__
        names = list(inspect.signature(original).parameters)[1:]
        # Talkie's layers get the embeddings first.
        name = port.layer_input or names[0]
        place = names.index(name)

        def call(self: nn.Module, *args: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return original(self, *args, **options)
            if before is not None:
                if name in options:
                    options[name] = before(layer, options[name])
                else:
                    args = (*args[:place], before(layer, args[place]), *args[place + 1 :])
            output = original(self, *args, **options)
            if after is None:
                return output
            if isinstance(output, tuple):
                return (after(layer, output[0]), *output[1:])
            return after(layer, output)

        return subclass(kind, __call__=call)

    with swapped(dict(enumerate(port.layers(model))), hooked):
        yield
