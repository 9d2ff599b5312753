"""What is cheap to compute and large to keep is computed again in the backward pass.

What automatic differentiation keeps of a block is mostly of two kinds: patterns of attention, and
what an MLP's activation function makes of its input. Neither takes a product of weights. Computed
again, a block keeps little more than what its matrix products give, and patterns stand for a few
queries at a time, never T x T (selective activation recomputation, arXiv 2205.05198). Letters in
shapes: B prompts, H query heads, T tokens, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from abft_mlx.activations import Around, quick

Again = Around
"""Gives a function that is computed again in the backward pass, from one of arrays alone."""

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
    function = quick(function)

    @mx.custom_function
    def recomputed(*arrays: mx.array) -> mx.array:
        return function(*arrays)

    @recomputed.vjp
    def _(arrays: Any, cotangent: mx.array, _output: mx.array) -> Any:
        one = isinstance(arrays, mx.array)
        arrays = mx.depends([arrays] if one else list(arrays), [cotangent])
        _, gradients = mx.vjp(lambda *given: [function(*given)], arrays, [cotangent])
        return gradients[0] if one else tuple(gradients)

    return recomputed


def attending(
    again: Again, queries_at_once: int | None = None
) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    """What :func:`abft_mlx.attention.instrument` puts around a model's attention function.

    Args:
        again: :func:`again`, or what stands for it.
        queries_at_once: queries of a piece; None for what suits the device.
    """
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    size = queries_at_once or (GPU_QUERIES if on_gpu else CPU_QUERIES)

    def around(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def attend(
            queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **options: Any
        ) -> mx.array:
            given = dict(zip(("cache", "scale", "mask", "sinks"), args, strict=False)) | options
            T, S = queries.shape[2], keys.shape[2]
            pieces = []
            starts = range(0, T, size)
            for start, some in zip(starts, mx.split(queries, starts[1:], axis=2), strict=True):
                stop = start + some.shape[2]
                mask = given.get("mask")
                # Whoever attends causally sees no key behind a piece's last query.
                seen = S - T + stop if isinstance(mask, str) and mask == "causal" else S
                own = given | {"mask": _rows(mask, start, stop, T)} if "mask" in given else given
                # Latent attention adds scores of its own as a mask: gradients go there, too.
                learnt = [n for n in ("mask", "sinks") if _differentiable(own.get(n))]
                piece = again(_with_arrays(original, own, learnt))
                pieces.append(
                    piece(some, keys[:, :, :seen], values[:, :, :seen], *(own[n] for n in learnt))
                )
            return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)

        return attend

    return around


def _with_arrays(
    function: Callable[..., mx.array], options: dict[str, Any], names: list[str]
) -> Callable[..., mx.array]:
    """An attention function of queries, keys, values and some of its options."""

    def call(queries: mx.array, keys: mx.array, values: mx.array, *given: mx.array) -> mx.array:
        changed = options | dict(zip(names, given, strict=True))
        return function(queries, keys, values, **changed)

    return call


def _differentiable(option: Any) -> bool:
    return isinstance(option, mx.array) and mx.issubdtype(option.dtype, mx.floating)


def _rows(mask: Any, start: int, stop: int, T: int) -> Any:
    """The mask of some queries; one that says the same of all of them stays."""
    if isinstance(mask, mx.array) and mask.ndim > 1 and mask.shape[-2] == T:
        return mask[..., start:stop, :]
    return mask
