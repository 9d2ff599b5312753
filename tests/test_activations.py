"""Activation functions: wrapped for one model alone, and the quick ones the same as MLX's own."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations as own
from mlx_lm.models import llama
from scipy.special import expit

from abft_mlx import activations, recompute

# The last mlx-lm for Python 3.10 has none here.
CLIPPED = [one for one in [getattr(own, "swiglu_oai", None)] if one is not None]


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 processor's exponentials, whatever this is."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("MLX's default device here is a GPU, where nothing is replaced")


class TestReplaced:
    def test_are_wrapped_for_one_model_and_put_back(self, tiny: ModuleType) -> None:
        model, other = tiny.build("llama"), tiny.build("llama")
        calls = []

        def again(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
            def call(*arrays: mx.array) -> mx.array:
                calls.append(len(arrays))
                return function(*arrays)

            return call

        tokens = mx.array([[1, 2, 3]])
        plain = model(tokens)
        own = llama.swiglu

        def use() -> None:
            with activations.replaced(model, again):
                assert mx.array_equal(model(tokens), plain)
                assert calls == [2] * len(model.layers)
                other(tokens)
                assert len(calls) == len(model.layers)
                assert llama.swiglu is own
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            use()
        model(tokens)
        assert len(calls) == len(model.layers)
        assert type(model.layers[0].mlp) is llama.MLP

    def test_found_in_mlx_nn_too(self, tiny: ModuleType) -> None:
        seen = []

        def again(function: Any) -> Any:
            seen.append(function.func)
            return function

        model = tiny.build("gpt2")
        with activations.replaced(model, again):
            model(mx.array([[1, 2, 3]]))
        assert set(seen) <= {nn.gelu, nn.gelu_approx}
        assert len(seen) == len(model.layers)


def numbers(seed: int) -> mx.array:
    """Of every size, where sigmoids are 0 and 1, too."""
    drawn = np.random.default_rng(seed).normal(size=(40, 25)) * 6
    drawn[0, :6] = [0.0, 89.0, -89.0, 200.0, -200.0, -1e30]
    return mx.array(drawn.astype("float32"))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(
    "function",
    [
        nn.silu,
        nn.gelu_approx,
        nn.gelu_fast_approx,
        own.swiglu,
        *CLIPPED,
        *(partial(one, alpha=1.2, limit=3.0) for one in CLIPPED),
    ],
)
def test_quick_ones_are_mlxs_own(function: Callable[..., mx.array]) -> None:
    """Values and gradients, in float32, where they are computed again."""
    two = getattr(function, "func", function) in (own.swiglu, *CLIPPED)
    # MLX's swiglu_oai clips what it multiplies, as do these numbers, or products overflow.
    given = [numbers(0), mx.clip(numbers(1), -9, 9)] if two else [numbers(0)]
    if function is nn.gelu_approx:
        given = [mx.clip(given[0], -1e6, 1e6)]
    other = activations.quick(function)
    assert other is not function

    def outputs(one: Callable[..., mx.array]) -> list[mx.array]:
        names = tuple(range(len(given)))
        gradients = mx.grad(lambda *some: (one(*some) * mx.cos(numbers(2))).sum(), names)(*given)
        return [one(*given), *gradients]

    for plain, quick in zip(outputs(function), outputs(recompute.again(function)), strict=True):
        np.testing.assert_allclose(np.array(quick), np.array(plain), rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("slow")
def test_quick_sigmoids_are_scipys() -> None:
    x = np.linspace(-100, 100, 4001, dtype="float32")
    ours = np.array(activations.quick(nn.silu)(mx.array(x)))
    np.testing.assert_allclose(ours, x * expit(x.astype("float64")), rtol=2e-6, atol=1e-30)


class TestOnlyWhere:
    def test_exponentials_are_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        assert activations.quick(nn.silu) is nn.silu

    @pytest.mark.usefixtures("slow")
    def test_a_function_is_known(self) -> None:
        assert activations.quick(nn.relu2) is nn.relu2

    @pytest.mark.usefixtures("slow")
    def test_numbers_are_float32(self) -> None:
        x = numbers(0).astype(mx.bfloat16)
        ours = activations.quick(nn.silu)(x)
        assert ours.dtype == mx.bfloat16
        assert mx.array_equal(ours, nn.silu(x))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "gemma3_text"])
def test_a_model_gives_what_it_gave(name: str, tiny: ModuleType) -> None:
    model, tokens = tiny.build(name), mx.array([[1, 2, 3, 4, 5]])
    plain = model(tokens)
    with activations.quickly(model):
        quick = model(tokens)
    assert not mx.array_equal(quick, plain) or name == "gpt_oss"
    np.testing.assert_allclose(np.array(quick), np.array(plain), rtol=1e-4, atol=1e-5)
