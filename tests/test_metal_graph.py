"""What Metal lacks is in no graph of training or evaluation: float64, linear algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from test_local import prompts, step_of

from abft_mlx.evaluation.forward import hidden_at_last
from abft_mlx.footprint.graph import Graph, trace
from abft_mlx.footprint.recomputed import marked, spelled_out
from abft_mlx.trainer.plan import micro_batches

# MLX's primitives that have no Metal kernel (its mlx/backend/metal/primitives.cpp says NYI), as its
# export names them.
CPU_ALONE = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD", "DistributedSend"}


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def check(graph: Graph) -> None:
    names = {one.name for one in graph.operations}
    assert "Matmul" in names
    assert not names & CPU_ALONE
    types = {value.dtype for one in graph.operations for value in one.outputs}
    assert not types & {"float64", "complex128"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next", "deepseek_v3", "gemma3n"])
def test_training_and_evaluation(tiny: ModuleType, name: str) -> None:
    step = step_of(tiny.build(name), "exact")
    step.seams.again = marked
    (batch,) = micro_batches(prompts(), 4)
    arrays = batch.arrays()
    kept = step.model.trainable_parameters()
    names = [path for path, _ in tree_flatten(kept)]

    def train(*parameters: mx.array) -> Sequence[mx.array]:
        tree = tree_unflatten(list(zip(names, parameters, strict=True)))
        terms, gradients = step.value_and_grad(tree, arrays, mx.array(0.5))
        return [terms, *(one for _, one in tree_flatten(gradients))]

    check(spelled_out(trace(train, [one for _, one in tree_flatten(kept)])))
    step.model.update(kept)
    check(
        trace(
            lambda tokens, last: [hidden_at_last(step.model, tokens, last)],
            [arrays["tokens"], arrays["last"]],
        )
    )


def test_the_check_notices() -> None:
    def wide(x: mx.array) -> list[mx.array]:
        return [(x @ x).astype(mx.float64)]

    def inverse(x: mx.array) -> list[mx.array]:
        return [mx.linalg.inv(x @ x)]

    for function in (wide, inverse):
        with pytest.raises(AssertionError):
            check(trace(function, [mx.array(np.eye(3, dtype=np.float32))]))
