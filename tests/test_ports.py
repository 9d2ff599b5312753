"""Ports: found by architecture, never by looks; heads, projections, hidden states and logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from abft_mlx import attention, ports
from abft_mlx.errors import ModelError, UnsupportedArchitectureError
from abft_mlx.ports import HeadShape

HEADS = {
    "gpt2": HeadShape(4, 4, 16),
    "llama": HeadShape(4, 2, 16),
    "mistral": HeadShape(4, 1, 32),
    "qwen2": HeadShape(4, 4, 16),
    "qwen3": HeadShape(6, 3, 32),
}


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_heads(name: str) -> None:
    assert ports.heads(tiny_models.build(name)) == [HEADS[name]] * tiny_models.LAYERS


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_of_a_quantized_model(bits: int) -> None:
    model = tiny_models.build("qwen3")
    nn.quantize(model, group_size=64, bits=bits)
    assert ports.heads(model) == [HEADS["qwen3"]] * tiny_models.LAYERS


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_logits_of_some_tokens_are_the_models_own(
    name: str, bits: int | None, tmp_path: Path
) -> None:
    model, _ = load_model(tiny_models.checkpoint(tmp_path, name, bits=bits))
    tokens, last = tiny_models.tokens()
    port = ports.port_for(model)
    expected = np.array(model(tokens))
    hidden = port.hidden(model, tokens)
    chosen = [5, 90, 0, 5]
    logits = port.logits(model, hidden, chosen)
    assert logits.dtype == mx.float32
    assert np.abs(np.array(logits) - expected[..., chosen]).max() <= 1e-5
    assert np.array_equal(np.array(port.logits(model, hidden)), expected)
    at_last = hidden[mx.arange(len(tokens)), last]
    assert np.allclose(
        np.array(port.logits(model, at_last, mx.array(chosen))),
        expected[np.arange(len(tokens)), np.array(last)][:, chosen],
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon_h1", {"tie_word_embeddings": True, "lm_head_multiplier": 0.25}),
        ("gear", {"final_logit_softcapping": 2.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("minicpm", {"tie_word_embeddings": False}),
        ("phixtral", {}),
        ("gemma3n", {}),
    ],
)
def test_scales_and_caps_of_logits(
    name: str, changes: dict[str, Any], benchmark: Callable[[str], ModuleType]
) -> None:
    """Settings that the tiny models of the sweep leave out, and models with a head of their own."""
    tiny = benchmark("tiny_configs")
    if not changes:
        model = tiny.build(name)
    else:
        module = pytest.importorskip(f"mlx_lm.models.{name}")
        model = module.Model(module.ModelArgs.from_dict(tiny.settings(name) | changes))
    tokens = mx.array([[3, 7, 11, 2, 9]])
    port = ports.port_for(model)
    expected = model(tokens, cache=make_prompt_cache(model)) if port.needs_cache else model(tokens)
    assert not mx.array_equal(expected, mx.zeros_like(expected))
    hidden = port.hidden(model, tokens)
    assert mx.array_equal(port.logits(model, hidden), expected)
    few = port.logits(model, hidden, [3, 80, 3])
    assert mx.abs(few - expected[..., mx.array([3, 80, 3])]).max().item() <= 1e-5


def test_logits_count_the_heads_bias_and_are_float32_in_a_16_bit_model() -> None:
    model = tiny_models.build("llama")
    model.lm_head = nn.Linear(64, tiny_models.VOCABULARY, bias=True)
    model.lm_head.bias = mx.arange(tiny_models.VOCABULARY).astype(mx.float32)
    model.set_dtype(mx.bfloat16)
    tokens, _ = tiny_models.tokens()
    port = ports.port_for(model)
    expected = model(tokens)[..., mx.array([3, 80])].astype(mx.float32)
    logits = port.logits(model, port.hidden(model, tokens), [3, 80])
    assert logits.dtype == mx.float32
    assert mx.abs(logits - expected).max().item() <= 0.3  # one bfloat16 step at 80 is 0.5


def test_a_fused_projections_query_and_key_outputs_alone_make_the_pattern() -> None:
    tokens, last = tiny_models.tokens()
    model = tiny_models.build("gpt2")
    port = ports.port_for(model)
    layer = port.layers(model)[0]
    projection = port.projections[0]
    outputs = port.qk_outputs(layer, projection)
    assert outputs is not None
    assert outputs.shape == (3 * 64,)
    assert outputs.sum() == 2 * 64
    before = attention.capture(model, tokens, last)[0]
    weight = layer.attention.c_attn.weight
    random = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
    only_v = mx.array(random * ~outputs[:, None])
    layer.attention.c_attn.weight = weight + only_v
    assert mx.array_equal(attention.capture(model, tokens, last)[0], before)
    for part in np.split(np.flatnonzero(outputs), 2):
        moved = np.zeros_like(random)
        moved[part] = random[part]
        layer.attention.c_attn.weight = weight + mx.array(moved)
        assert mx.abs(attention.capture(model, tokens, last)[0] - before).max().item() > 0.01


def test_separate_projections_move_as_a_whole() -> None:
    model = tiny_models.build("qwen2")
    port = ports.port_for(model)
    assert [projection.path for projection in port.projections] == ["q_proj", "k_proj"]
    assert all(port.qk_outputs(port.layers(model)[0], p) is None for p in port.projections)


def test_an_unknown_architecture_is_one_line_that_names_those_known() -> None:
    from mlx_lm.models import mamba

    settings = {"model_type": "mamba", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    settings |= {"intermediate_size": 16, "state_size": 4, "conv_kernel": 4, "use_bias": True}
    settings |= {"use_conv_bias": True, "time_step_rank": 2}
    model = mamba.Model(mamba.ModelArgs.from_dict(settings))
    with pytest.raises(UnsupportedArchitectureError) as caught:
        ports.port_for(model)
    assert "'mamba'" in str(caught.value)
    assert all(name in str(caught.value) for name in ("gpt2", "llama", "qwen2", "qwen3", "Mistral"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [__name__, "llama", "somebody.models.llama"])
def test_a_model_that_only_looks_like_a_llama_is_not_guessed(module: str) -> None:
    """Not mlx-lm's code: its forward pass could be anything."""
    kind = type("Model", (llama.Model,), {"__module__": module})
    model = kind(llama.ModelArgs.from_dict(tiny_models.config("llama")))
    with pytest.raises(UnsupportedArchitectureError, match="is not supported"):
        ports.port_for(model)


def test_a_model_without_an_output_head_is_one_clear_line() -> None:
    model = tiny_models.build("llama")
    del model["lm_head"]
    del model.model["embed_tokens"]
    with pytest.raises(ModelError, match=r"no output head at lm_head or model\.embed"):
        ports.port_for(model).head(model)
