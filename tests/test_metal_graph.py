"""What Metal lacks is in no graph of training or evaluation: float64, linear algebra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from graph_support import kept, primitives
from mlx.utils import tree_flatten, tree_unflatten
from step_support import prompts, step_of

from abft_mlx import recompute
from abft_mlx.ports import port_for
from abft_mlx.trainer.batches import micro_batches

# MLX's primitives that have no Metal kernel (its mlx/backend/metal/primitives.cpp says NYI), as its
# export names them.
CPU_ALONE = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD", "DistributedSend"}


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def check(function: Callable[..., Sequence[mx.array]], arguments: Sequence[mx.array]) -> None:
    """Assert that a Mac's GPU has everything that a function runs."""
    found = primitives(function, arguments)
    names = {name for name, _ in found}
    assert "Matmul" in names
    assert not names & CPU_ALONE
    types = set().union(*(types for _, types in found))
    assert mx.float64 not in types


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next", "deepseek_v3", "gemma3n"])
def test_training_and_evaluation(
    tiny: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(tiny.build(name))
    monkeypatch.setattr(recompute, "again", kept)
    (batch,) = micro_batches(prompts(), 4)
    arrays = batch.arrays()
    parameters = step.model.trainable_parameters()
    names = [path for path, _ in tree_flatten(parameters)]

    def train(*given: mx.array) -> Sequence[mx.array]:
        tree = tree_unflatten(list(zip(names, given, strict=True)))
        terms, gradients = step.value_and_grad(tree, arrays, mx.array(0.5))
        return [terms, *(one for _, one in tree_flatten(gradients))]

    check(train, [one for _, one in tree_flatten(parameters)])
    step.model.update(parameters)
    check(lambda tokens: [port_for(step.model).hidden(step.model, tokens)], [arrays["tokens"]])


def test_the_check_notices() -> None:
    def wide(x: mx.array) -> list[mx.array]:
        return [(x @ x).astype(mx.float64)]

    def inverse(x: mx.array) -> list[mx.array]:
        return [mx.linalg.inv(x @ x)]

    for function in (wide, inverse):
        with pytest.raises(AssertionError):
            check(function, [mx.array(np.eye(3, dtype=np.float32))])
