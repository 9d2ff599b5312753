"""What the backward pass computes again: the same gradients, less memory, the model as before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from graph_support import kept
from mlx_lm.models import llama
from step_support import flat, prompts, step_of

from abft_mlx import bench, loading, recompute, runtime
from abft_mlx.trainer.batches import micro_batches

SCALE = 0.3


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


class TestAgain:
    def test_gradients_are_autodiffs(self) -> None:
        x, y, c = normal(4, 5), normal(4, 5, seed=1), normal(5)

        def gated(x: mx.array, y: mx.array) -> mx.array:
            return nn.silu(x) * y + c

        for function, given in ((gated, (x, y)), (nn.gelu, (x,))):
            numbers = tuple(range(len(given)))
            plain = mx.grad(lambda *one, f=function: (f(*one) ** 2).sum(), numbers)(*given)
            again = recompute.again(function)
            ours = mx.grad(lambda *one, f=again: (f(*one) ** 2).sum(), numbers)(*given)
            for one, other in zip(plain, ours, strict=True):
                assert mx.abs(one - other).max().item() < 1e-6

    def test_keeps_its_arguments_alone(self) -> None:
        """Plain, three arrays of each of sixty functions are kept; an array is 256 KiB."""
        weights = normal(256, 256) * 0.05

        def peak(again: recompute.Again) -> int:
            def loss(x: mx.array) -> mx.array:
                for _ in range(60):
                    x = again(lambda y: mx.exp(mx.sin(mx.tanh(y))))(x @ weights)
                return x.sum()

            x = normal(256, 256)
            mx.eval(x, weights)
            mx.clear_cache()
            runtime.reset_peak_memory()
            mx.eval(mx.grad(loss)(x))
            return runtime.peak_memory_bytes()

        assert peak(recompute.again) < 0.6 * peak(kept)


@pytest.mark.parametrize(
    ("mask", "S"),
    [
        (None, 7),
        ("causal", 7),
        ("causal", 12),
        (np.tril(np.ones((7, 7), dtype=bool)), 7),
        (np.random.default_rng(0).normal(size=(2, 4, 7, 12)).astype("float32"), 12),
        (np.ones((2, 1, 1, 7), dtype=bool), 7),
    ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_in_pieces_is_attention(
    mask: Any, S: int, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients against MLX's own attention, three queries at a time."""
    queries, keys, values = normal(2, 4, 7, 8), normal(2, 2, S, 8, seed=1), normal(2, 2, S, 8)
    given = mx.array(mask) if isinstance(mask, np.ndarray) else mask
    options = {"sinks": normal(4)} if sinks else {}
    learnt = isinstance(given, mx.array) and given.dtype == mx.float32
    sizes_seen = []

    def original(q: mx.array, k: mx.array, v: mx.array, cache: Any, **more: Any) -> mx.array:
        assert cache is None
        sizes_seen.append(q.shape[2])
        return mx.fast.scaled_dot_product_attention(q, k, v, **more)

    def outputs(attend: Any) -> list[mx.array]:
        def loss(*arrays: mx.array) -> mx.array:
            masked = arrays[3] if learnt else given
            out = attend(*arrays[:3], None, scale=SCALE, mask=masked, **options)
            return (out * mx.arange(7.0)[:, None]).square().sum()

        arrays = [queries, keys, values, *([given] if learnt else [])]
        value, gradients = mx.value_and_grad(loss, tuple(range(len(arrays))))(*arrays)
        return [value, *gradients]

    plain = outputs(original)
    sizes_seen.clear()
    monkeypatch.setattr(recompute, "CPU_QUERIES", 3)
    pieces = outputs(recompute.attending(original))
    assert set(sizes_seen) == {3, 1}
    for one, other in zip(plain, pieces, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gemma2", "olmoe", "qwen3_next", "gpt_oss", "deepseek_v3"],
)
def test_a_step_is_the_same(name: str, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "CPU_QUERIES", 5)
    step = step_of(tiny.build(name))
    (batch,) = micro_batches(prompts(), 3, bucket_tokens=1)
    wrapped, again = [], recompute.again

    def counting(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        wrapped.append(function)
        return again(function)

    monkeypatch.setattr(recompute, "again", kept)
    plain, terms = step.gradients([batch], 0.5)
    monkeypatch.setattr(recompute, "again", counting)
    recomputed, recomputed_terms = step.gradients([batch], 0.5)
    assert len(wrapped) > 2
    np.testing.assert_allclose(np.array(terms), np.array(recomputed_terms), rtol=1e-6)
    ours = flat(recomputed)
    for path, value in flat(plain).items():
        scale = max(1.0, float(np.abs(value).max()))
        assert np.abs(value - ours[path]).max() < 2e-6 * scale, path


def test_another_model_has_no_part(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny.build("llama"), tiny.build("llama")
    calls = []
    monkeypatch.setattr(recompute, "again", lambda f: lambda *a: (calls.append(1), f(*a))[1])
    tokens = mx.array([[1, 2, 3]])
    plain = model(tokens)
    with recompute.activations_again(model):
        assert mx.array_equal(model(tokens), plain)
        assert len(calls) == len(model.layers)
        other(tokens)
        assert len(calls) == len(model.layers)
    model(tokens)
    assert len(calls) == len(model.layers)
    assert type(model.layers[0].mlp) is llama.MLP


def weights(size: bench.Size) -> int:
    """Numbers in the model of a size."""
    return loading.parameter_count(bench.random_model(size, mx.float32))


def test_no_array_of_all_scores_and_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of 4,096 tokens: scores are 64 MiB a layer, logits would be 125 MiB."""
    size = bench.parse("2x64x8000:1x4096k4")

    def peak() -> int:
        return bench.peak_here(size, "ours-exact", "float32")

    ours = peak() - 4 * weights(size)
    assert ours < 125 * 2**20
    monkeypatch.setattr(recompute, "CPU_QUERIES", size.tokens)
    assert peak() - 4 * weights(size) - ours > 128 * 2**20
