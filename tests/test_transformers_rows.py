"""Rows and logits of many architectures against transformers' eager attention, random weights.

The tiny configuration is that of benchmarks/tiny_configs.py, as transformers reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from abft_mlx import attention

CLOSE = 1e-4
NAMES = (
    "afmoe",
    "apertus",
    "cohere",
    "cohere2",
    "dots1",
    "ernie4_5",
    "exaone_moe",
    "falcon_h1",
    "gemma2",
    "gemma4_text",
    "glm4_moe",
    "gpt2",
    "gptj",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "lfm2",
    "llama",
    "mellum",
    "olmo2",
    "olmoe",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def reference(settings: dict[str, Any]) -> Any:
    """A random transformers model of a flat configuration."""
    torch = tiny_models.torch()
    import transformers

    given = {key: value for key, value in settings.items() if key != "rope_scaling"}
    theta = given.pop("rope_theta", None)
    if theta is not None and "rope_parameters" not in given:
        rope = {"rope_type": "default", "rope_theta": theta}
        if "partial_rotary_factor" in given:
            rope["partial_rotary_factor"] = given["partial_rotary_factor"]
        given["rope_parameters"] = rope
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    name = given.pop("model_type")
    chosen = transformers.AutoConfig.for_model(name, attn_implementation="eager", **tokens, **given)
    model = transformers.AutoModelForCausalLM.from_config(chosen, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.1 * noise + 1 if value.ndim == 1 else noise / value.shape[-1] ** 0.5)
    return model


def hub_weights(model: Any, name: str) -> dict[str, mx.array]:
    """The weights under the names of hub checkpoints: one for each expert, no prefix."""
    found: dict[str, mx.array] = {}
    for key, tensor in model.state_dict().items():
        value = mx.array(tensor.detach().numpy())
        stem, _, leaf = key.rpartition(".")
        if leaf == "gate_up_proj" and value.ndim == 3:
            for number, (gate, up) in enumerate(zip(*mx.split(value, 2, axis=1), strict=True)):
                found[f"{stem}.{number}.gate_proj.weight"] = gate
                found[f"{stem}.{number}.up_proj.weight"] = up
        elif leaf == "down_proj" and value.ndim == 3:
            for number, down in enumerate(value):
                found[f"{stem}.{number}.down_proj.weight"] = down
        elif key != "lm_head.weight" or not model.config.tie_word_embeddings:
            found[key.removeprefix("transformer.") if name == "gpt2" else key] = value
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_equal_transformers(tiny: ModuleType, name: str) -> None:
    if name not in tiny.architectures():
        pytest.skip(f"the installed mlx-lm has no {name}")
    torch = tiny_models.torch()
    settings = tiny.settings(name)
    if name == "llama":  # transformers' Llama has no windows
        settings.pop("layer_types")
    oracle = reference(settings)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(oracle.config.to_dict() | settings))
    weights = hub_weights(oracle, name)
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    tokens, last = tiny.tokens()
    ids, ends = torch.tensor(np.array(tokens).astype(np.int64)), np.array(last)
    mask = (torch.arange(ids.shape[1]) <= torch.tensor(ends)[:, None]).long()
    with torch.no_grad():
        output = oracle(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    every = np.arange(len(ids))
    expected = [one[every, :, ends].numpy() for one in output.attentions if one is not None]
    rows = [row for row in attention.capture(model, tokens, last) if row is not None]
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        assert np.abs(np.array(row) - one).max() <= CLOSE
    logits = np.array(model(tokens).astype(mx.float32))[every, ends]
    assert np.abs(logits - output.logits[every, ends].numpy()).max() <= 10 * CLOSE
    # Worth comparing: far from uniform, and different between heads.
    assert max(one.max() for one in expected) > 0.15
