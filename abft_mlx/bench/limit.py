"""The limit: the same floating-point operations at the rate of a large matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx.bench.contenders import batch_of, our_step
from abft_mlx.bench.models import PUNISH
from abft_mlx.bench.sizes import Size

PRODUCTS = ("Matmul", "AddMM", "QuantizedMatmul")


def product_flops(
    function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]
) -> int:
    """Floating-point operations of a function's matrix products, two for each multiply-add.

    Norms, activations, softmaxes and sums are not counted: a matrix product's rate says nothing
    of them. Nothing is computed: MLX's export names the primitives of the CPU backend's graph.

    Args:
        function: takes arrays and returns a list of arrays.
        arguments: of the right shapes and types; they are not evaluated.
    """
    total = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal total
        if event["type"] == "primitive" and event["name"] in PRODUCTS:
            # Inputs and outputs are triples of name, shape and type.
            total += 2 * event["inputs"][0][1][-1] * math.prod(event["outputs"][0][1])

    with mx.stream(mx.cpu):
        mx.export_function(count, function, *arguments)
    return total


def step_flops(size: Size, dtype: mx.Dtype = mx.float32) -> int:
    """Operations of our exact step's value and gradient, if nothing is computed again."""
    step = our_step(size, dtype)
    step.seams.again = lambda function: function
    batch = batch_of(size).arrays()
    names = [name for name, _ in tree_flatten(step.model.trainable_parameters())]
    kept = step.model.trainable_parameters()

    def function(*arrays: mx.array) -> Sequence[mx.array]:
        parameters = tree_unflatten(list(zip(names, arrays, strict=True)))
        terms, gradients = step.value_and_grad(parameters, batch, mx.array(PUNISH))
        return [terms, *(one for _, one in tree_flatten(gradients))]

    try:
        return product_flops(function, [one for _, one in tree_flatten(kept)])
    finally:
        step.model.update(kept)


def weight_bytes(size: Size, dtype: mx.Dtype) -> int:
    """Bytes of the base's weights: what a step must hold, whatever it does."""
    per_layer = 4 * size.width**2 + 3 * size.width * size.mlp_width + 2 * size.width
    numbers = size.layers * per_layer + size.width + 2 * size.width * size.vocabulary
    return numbers * dtype.size


def product_rate(dtype: mx.Dtype) -> Callable[[], float]:
    """Times one large matrix product; gives floating-point operations per second."""
    import time

    rows = 4096 if mx.default_device() == mx.Device(mx.gpu) else 2048
    left, right = (mx.random.normal((rows, rows)).astype(dtype) for _ in range(2))
    mx.eval(left, right)

    def run() -> float:
        start = time.perf_counter()
        mx.eval(left @ right)
        return 2.0 * rows**3 / (time.perf_counter() - start)

    return run
