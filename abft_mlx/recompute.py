"""What is cheap to compute and large to keep is computed again in the backward pass.

What automatic differentiation keeps of a block is mostly of two kinds: patterns of attention, and
what an MLP's activation function makes of its input. Neither takes a product of weights. Computed
again, a block keeps little more than what its matrix products give, and patterns stand for a few
queries at a time, never T x T (selective activation recomputation, arXiv 2205.05198). Letters in
shapes: B prompts, H query heads, T tokens, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx import ports

Again = Callable[[Callable[..., mx.array]], Callable[..., mx.array]]
"""Gives a function that is computed again in the backward pass, from one of arrays alone."""

# Activation functions of mlx.nn and mlx-lm, by the names under which modules find them.
ACTIVATIONS = (
    "gelu", "gelu_approx", "gelu_fast_approx", "precise_swiglu", "relu2", "silu", "swiglu",
    "swiglu_oai",
)  # fmt: skip
# Queries whose patterns stand at a time. A GPU is busy with so many; a CPU saves the half of a
# piece's pattern that is masked.
CPU_QUERIES = 64
GPU_QUERIES = 256


def again(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The same function, of which the backward pass keeps the arguments alone.

    Unlike ``mx.checkpoint`` it waits for the gradient of its result, so nothing is computed again
    before it is needed, and the result is not kept either.

    Args:
        function: of arrays, giving one array; gradients of other arrays that it reads are lost.
    """

    @mx.custom_function
    def recomputed(*arrays: mx.array) -> mx.array:
        return function(*arrays)

    @recomputed.vjp
    def _(arrays: Any, cotangent: mx.array, _output: mx.array) -> Any:
        single = isinstance(arrays, mx.array)
        arrays = mx.depends([arrays] if single else list(arrays), [cotangent])
        _, gradients = mx.vjp(lambda *inputs: [function(*inputs)], arrays, [cotangent])
        return gradients[0] if single else tuple(gradients)

    return recomputed


@contextmanager
def activations_again(model: nn.Module) -> Iterator[None]:
    """Compute this model's activation functions by :func:`again` while the block runs.

    The model's own code runs: its modules find other functions under the names of activation
    functions. Other models are untouched.
    """
    modules = {n: module for n, module in enumerate(model.modules()) if _activations(type(module))}
    classes: dict[type, type] = {}

    def make(_: int, kind: Any) -> type:
        if kind not in classes:
            call = ports.finding(kind.__call__, _activations(kind))
            classes[kind] = ports.subclass(kind, __call__=call)
        return classes[kind]

    with ports.swapped(modules, make):
        yield


def _activations(kind: Any) -> dict[str, Any]:
    """The activation functions among a module's globals, and ``nn`` if it has some, by name."""
    call = kind.__call__
    if not isinstance(call, FunctionType):
        return {}
    names = call.__code__.co_names
    used = [name for name in names if name in ACTIVATIONS]
    own = {name: call.__globals__.get(name) for name in used}
    wrapped: dict[str, Any] = {n: _wrapped(one) for n, one in own.items() if callable(one)}
    inner = {name: _wrapped(getattr(nn, name)) for name in used if hasattr(nn, name)}
    for name in names:
        if inner and call.__globals__.get(name) is nn:
            wrapped[name] = ports.Namespace(nn, **inner)
    return wrapped


def _wrapped(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(*arrays: mx.array, **options: Any) -> mx.array:
        return again(partial(function, **options))(*arrays)

    return call


def attending(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """A model's attention function by :func:`again`, a few queries at a time.

    It is what :func:`abft_mlx.attention.instrument` puts in place of the model's own.
    """
    size = GPU_QUERIES if mx.default_device() == mx.Device(mx.gpu) else CPU_QUERIES

    def attend(
        queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **options: Any
    ) -> mx.array:
        options = dict(zip(("cache", "scale", "mask", "sinks"), args, strict=False)) | options
        T, S = queries.shape[2], keys.shape[2]
        mask = options.get("mask")
        pieces = []
        starts = range(0, T, size)
        for start, some in zip(starts, mx.split(queries, starts[1:], axis=2), strict=True):
            stop = start + some.shape[2]
            # Whoever attends causally sees no key behind a piece's last query.
            reach = S - T + stop if isinstance(mask, str) and mask == "causal" else S
            own = dict(options)
            if isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] == T:
                own["mask"] = mask[..., start:stop, :]
            # Latent attention adds scores of its own as a mask: gradients go there, too.
            learnt = [name for name in ("mask", "sinks") if _differentiable(own.get(name))]

            def piece(*arrays: mx.array, own: dict = own, learnt: list = learnt) -> mx.array:
                return original(*arrays[:3], **own | dict(zip(learnt, arrays[3:], strict=True)))

            arrays = (some, keys[:, :, :reach], values[:, :, :reach])
            pieces.append(again(piece)(*arrays, *(own[name] for name in learnt)))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)

    return attend


def _differentiable(option: Any) -> bool:
    return isinstance(option, mx.array) and mx.issubdtype(option.dtype, mx.floating)
