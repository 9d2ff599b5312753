"""Every architecture on a tiny random model: the first of each port, and all with ``-m slow``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import support_checks as checks
import tiny_configs as tiny
import tiny_models
from mlx_lm.models import llama
from mlx_lm.utils import load_model

from abft_mlx import adapters, attention, ports
from abft_mlx.errors import ModelError, UnsupportedArchitectureError
from abft_mlx.recipe import AdapterSection

EXACT = 1e-5
FIRST = {port.architectures[0] for port in ports.PORTS}
EVERY = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
    for port in ports.PORTS
    for name in port.architectures
]
# Their blocks read more than the hidden states of the block below, which hooks cannot replace.
READ_MORE = {"gemma3n", "gemma4", "gemma4_text", "kimi_k3"}


def test_no_architecture_has_two_ports() -> None:
    names = [name for port in ports.PORTS for name in port.architectures]
    assert len(names) == len(set(names)) >= 105


@pytest.mark.parametrize("name", EVERY)
def test_architecture(name: str, tmp_path: Path) -> None:
    if name not in tiny.architectures():
        pytest.skip(f"the installed mlx-lm has no {name}")
    model = tiny.build(name)
    assert checks.logit_error(model) <= EXACT
    assert max(checks.pattern_error(model)) <= EXACT
    assert checks.padding_error(model) <= EXACT
    moved, kept = checks.train(model)
    assert moved > 1e-4
    assert kept == 0
    with_heads = [n for n, shape in enumerate(ports.heads(model)) if shape is not None]
    assert adapters.trained_layers(model) == with_heads
    assert (checks.hook_error(tiny.build(name)) is None) == (name in READ_MORE)
    assert checks.reload_error(model, name, tmp_path) <= EXACT
    quantized = tiny.build(name)
    checks.quantize(quantized)
    moved, kept = checks.train(quantized)
    assert moved > 1e-4
    assert kept == 0


@pytest.mark.parametrize("name", ["gpt_neox", "internlm2", "qwen3_next", "deepseek_v2", "gpt2"])
def test_the_outputs_that_train_make_the_pattern_and_the_others_do_not(name: str) -> None:
    """Of the first layer: what comes after it changes with the values."""
    model = tiny.build(name)
    port = ports.port_for(model)
    tokens, last = tiny.tokens()
    layers = port.layers(model)
    number = next(n for n, layer in enumerate(layers) if port.attention_module(layer))
    layer = layers[number]
    before = np.array(attention.capture(model, tokens, last)[number])

    def moved(path: str, outputs: np.ndarray) -> float:
        linear = ports.resolve(port.attention_module(layer), path)
        weight = linear.weight
        noise = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
        linear.weight = weight + mx.array(noise * outputs[:, None])
        after = np.array(attention.capture(model, tokens, last)[number])
        linear.weight = weight
        return float(np.abs(after - before).max())

    fused = [projection for projection in port.layer_projections(layer) if projection.parts]
    assert fused
    for projection in fused:
        outputs, parts = port.qk_outputs(layer, projection), port.part_outputs(layer, projection)
        assert outputs is not None
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(outputs)))
        for role, indices in parts.items():
            chosen = np.isin(np.arange(len(outputs)), indices)
            if role in ("q", "k"):
                assert moved(projection.path, chosen) > 0.01
            elif role == "gate" or not projection.path.startswith("kv_a"):
                # The latent of kv_a_proj_with_mqa makes keys as well as values.
                assert moved(projection.path, chosen) == 0


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gpt2", (4, 4, 16)), ("mistral", (4, 1, 32)), ("qwen3", (6, 3, 32))],
)
def test_heads(name: str, shape: tuple[int, int, int]) -> None:
    model = tiny_models.build(name)
    assert ports.heads(model) == [ports.HeadShape(*shape)] * tiny_models.LAYERS
    nn.quantize(model, group_size=64, bits=4)
    assert ports.heads(model) == [ports.HeadShape(*shape)] * tiny_models.LAYERS
    assert ports.head_counts(tiny.build("nemotron_h")) == {1: 4}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("falcon_h1", {"tie_word_embeddings": True, "lm_head_multiplier": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("minicpm", {"tie_word_embeddings": False}),
        ("cohere", {}),
    ],
)
def test_scales_and_caps_of_logits(name: str, changes: dict[str, Any]) -> None:
    """Left out, logits differ; settings that the tiny models of the sweep leave out, too."""
    module = __import__(f"mlx_lm.models.{name}", fromlist=["Model"])
    model = module.Model(module.ModelArgs.from_dict(tiny.settings(name) | changes))
    port, tokens = ports.port_for(model), mx.array([[3, 7, 11, 2, 9]])
    expected, hidden = model(tokens), port.hidden(model, tokens)
    assert mx.array_equal(port.logits(model, hidden), expected)
    few = port.logits(model, hidden, [3, 80, 3])
    assert mx.abs(few - expected[..., mx.array([3, 80, 3])]).max().item() <= EXACT
    bare = hidden @ ports.head_rows(port.head(model)).T
    assert mx.abs(bare - expected).max().item() > 0.01


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_logits_of_some_tokens_are_the_models_own(
    name: str, bits: int | None, tmp_path: Path
) -> None:
    model, _ = load_model(tiny_models.checkpoint(tmp_path, name, bits=bits))
    tokens, _ = tiny_models.tokens()
    port, chosen = ports.port_for(model), [5, 90, 0, 5]
    expected, hidden = np.array(model(tokens)), port.hidden(model, tokens)
    logits = port.logits(model, hidden, chosen)
    assert np.abs(np.array(logits) - expected[..., chosen]).max() <= EXACT
    assert np.array_equal(np.array(port.logits(model, hidden)), expected)


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


def test_chunks_and_shared_keys() -> None:
    """Llama 4 attends in chunks but for every fourth layer; Hunyuan reuses keys of another."""
    tokens, last = tiny.tokens()
    rows = [np.array(row) for row in attention.capture(tiny.build("llama4"), tokens, last)]
    chunk = int(last[0]) // 9 * 9
    assert [bool((row[0, :, :chunk] == 0).all()) for row in rows] == [True] * 3 + [False]
    model = tiny.build("hunyuan")
    adapters.attach(model, AdapterSection(rank=4))
    keys = [path.split(".")[2] for path in adapters.adapted(model) if path.endswith("k_proj")]
    assert keys == ["0", "2"]


def test_an_unknown_architecture_is_one_line_that_names_those_known() -> None:
    from mlx_lm.models import mamba

    settings = {"model_type": "mamba", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    settings |= {"intermediate_size": 16, "state_size": 4, "conv_kernel": 4, "use_bias": True}
    settings |= {"use_conv_bias": True, "time_step_rank": 2}
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba'.*llama.*Mistral.*qwen3"):
        ports.port_for(mamba.Model(mamba.ModelArgs.from_dict(settings)))
    # It only looks like a Llama: its forward pass could be anything.
    for module in (__name__, "llama", "somebody.models.llama"):
        kind = type("Model", (llama.Model,), {"__module__": module})
        with pytest.raises(UnsupportedArchitectureError, match="is not supported"):
            ports.port_for(kind(llama.ModelArgs.from_dict(tiny_models.config("llama"))))
    model = tiny_models.build("llama")
    del model["lm_head"]
    del model.model["embed_tokens"]
    with pytest.raises(ModelError, match=r"no output head at lm_head or model\.embed"):
        ports.port_for(model).head(model)
