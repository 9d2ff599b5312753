"""The layers that an adapter puts into a model, one by one, against NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import adapters
from abft_mlx.adapters.lora import SplitLoRALinear, is_quantized, put, put_full, put_lora
from abft_mlx.ports import resolve
from abft_mlx.recipe import AdapterSection

PATH = "model.layers.1.self_attn.q_proj"


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_trains(bias: bool, dtype: mx.Dtype, head: bool) -> None:
    model = tiny_models.build("llama")
    base = nn.Linear(64, 48, bias=bias)
    base.set_dtype(dtype)
    model.layers[1].self_attn.q_proj = base
    for training in (True, False):
        base.train(training)
        full = put_full(model, PATH, head=head)
        assert full.training == training
        assert model.layers[1].self_attn.q_proj is full
        assert isinstance(full, adapters.FullLinear)
        assert [name for name, _ in tree_flatten(full.trainable_parameters())] == ["weight"]
        assert full.weight.dtype == mx.float32
        assert full.original.module is base
        x = random(3, 64, dtype=dtype)
        y = full(x)
        assert y.dtype == (mx.float32 if head else dtype)
        wanted = double(x) @ double(base.weight).T + (double(base.bias) if bias else 0)
        np.testing.assert_allclose(double(y), wanted, atol=0.03 if y.dtype != mx.float32 else 1e-5)
        full.weight = full.weight + 2e-5
        assert full.saved_weight().dtype == (mx.float32 if head else dtype)
        model.layers[1].self_attn.q_proj = base


def test_what_is_quantized_underneath() -> None:
    for bits in (None, 4):
        for section in (AdapterSection(rank=2, head=True), AdapterSection(kind="full")):
            if bits and section.kind == "full":
                continue
            model = tiny_models.build("llama")
            if bits:
                nn.quantize(model, group_size=64, bits=bits)
            adapters.attach(model, section)
            found = {is_quantized(one) for one in adapters.adapted(model).values()}
            assert found == {bits is not None}
    assert not is_quantized(nn.QuantizedLinear(64, 64))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_lora_layer_is_as_asked(dropout: float) -> None:
    model = tiny_models.build("llama")
    base = model.layers[1].self_attn.q_proj
    model.train()
    lora = put_lora(model, PATH, 3, 0.75, dropout)
    assert type(lora) is LoRALinear
    assert model.layers[1].self_attn.q_proj is lora
    assert lora.linear is base
    assert (lora.lora_a.shape, lora.lora_b.shape, lora.scale) == ((64, 3), (3, 64), 0.75)
    assert not lora.training
    assert not lora.dropout.training
    lora.lora_b = random(3, 64)
    x = random(2, 64)
    change = 0.75 * double(x) @ double(lora.lora_a) @ double(lora.lora_b)
    np.testing.assert_allclose(double(lora(x) - base(x)), change, atol=1e-4)
    lora.train()
    assert mx.allclose(lora(x) - base(x), mx.array(change), atol=1e-4).item() == (dropout == 0)


@pytest.fixture
def split(benchmark: Callable[[str], ModuleType]) -> tuple[nn.Module, str]:
    """A model with a layer that gives queries, keys and values apart, and the layer's path."""
    model = benchmark("tiny_configs").build("afm7")
    (path,) = [
        name
        for name, one in model.named_modules()
        if hasattr(one, "indices") and "layers.0" in name
    ]
    return model, path


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_lora_on_several_outputs(split: tuple[nn.Module, str], dtype: mx.Dtype) -> None:
    model, path = split
    model.set_dtype(dtype)
    lora = put_lora(model, path, 3, 0.75, 0.5)
    assert type(lora) is SplitLoRALinear
    assert not lora.training
    base = lora.linear
    outputs = base.weight.shape[0]
    assert (lora.lora_a.shape, lora.lora_b.shape) == ((64, 3), (3, outputs))
    assert np.abs(double(lora.lora_a)).max() <= 1 / 8
    x = random(2, 5, 64, dtype=dtype)
    for part, plain in zip(lora(x), base(x), strict=True):
        assert mx.array_equal(part, plain)
    lora.lora_b = random(3, outputs)
    got = lora(x)
    assert [one.dtype for one in got] == [dtype] * 3
    change = 0.75 * (double(x) @ double(lora.lora_a)) @ double(lora.lora_b)
    wanted = double(x) @ double(base.weight).T + change
    tolerance = 1e-4 if dtype == mx.float32 else 0.1
    np.testing.assert_allclose(
        np.concatenate([double(one) for one in got], axis=-1), wanted, atol=tolerance
    )
    for dequantize in (False, True):
        merged = lora.fuse(dequantize)
        assert type(merged) is type(base)
        np.testing.assert_allclose(
            double(merged.weight),
            double(base.weight) + 0.75 * (double(lora.lora_a) @ double(lora.lora_b)).T,
            atol=1e-5 if dtype == mx.float32 else 0.02,
        )
    lora.train()
    assert not mx.array_equal(lora(x)[0], got[0])


def test_stock_mlx_lm_gets_several_outputs_as_weights(
    split: tuple[nn.Module, str], tmp_path: Path
) -> None:
    model, path = split
    put_lora(model, path, 3, 0.75, 0.0)
    adapters.save(model, tmp_path)
    found = json.loads((tmp_path / adapters.CONFIG).read_text(encoding="utf-8"))
    assert found["fine_tune_type"] == "full"
    assert list(mx.load(str(tmp_path / adapters.WEIGHTS))) == [f"{path}.weight"]
    assert set(mx.load(str(tmp_path / adapters.FACTORS))) == set(adapters.tensors(model))


def test_several_outputs_that_are_quantized(split: tuple[nn.Module, str]) -> None:
    model, path = split
    put(model, path, resolve(model, path).to_quantized(64, 4))
    lora = put_lora(model, path, 3, 0.75, 0.0)
    lora.lora_b = random(*lora.lora_b.shape)
    assert "scales" in lora.fuse()
    assert "scales" in lora.fuse(False)
    merged = lora.fuse(dequantize=True)
    assert "scales" not in merged
    x = random(2, 64)
    for part, one in zip(lora(x), merged(x), strict=True):
        assert mx.abs(part - one).max().item() <= 1e-4
