"""Tiny random models of the five architectures, as checkpoints on disk that stock mlx-lm opens.

``checkpoint`` needs MLX only. ``reference`` makes the same architecture in transformers, with
weights far from their usual start so that patterns are sharp and biases matter, for tests that
compare with it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from abft_mlx import adapters, attention

ARCHITECTURES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
VOCABULARY = 96
LAYERS = 3

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": LAYERS,
        "n_positions": 256,
        "n_ctx": 256,
        "layer_norm_epsilon": 1e-5,
    },
    "llama": _DECODER,
    # Multi-query, a biggest head count, and a head width that is not width / heads.
    "mistral": _DECODER | {"num_key_value_heads": 1, "head_dim": 32},
    "qwen2": _DECODER | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": _DECODER | {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3},
}


def config(name: str, **changes: Any) -> dict[str, Any]:
    """The flat config.json of a tiny model, as hub checkpoints carry it."""
    return {"model_type": name} | CONFIGS[name] | changes


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of VOCABULARY words, w0 w1 w2 ..., split at spaces."""
    words = {f"w{n}": n for n in range(VOCABULARY)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write(folder: Path, settings: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    """Write a checkpoint with a tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_tokenizer(folder)
    return folder


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny mlx-lm model with sharp random weights, not on disk."""
    settings = config(name, **changes)
    module = importlib.import_module(
        f"mlx_lm.models.{'llama' if name == 'mistral' else settings['model_type']}"
    )
    model = module.Model(module.ModelArgs.from_dict(settings))
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))

    def sharp(path: str, value: mx.array) -> mx.array:
        noise = mx.random.normal(value.shape, key=next(keys))
        if value.ndim == 1:
            return 0.3 * noise + (1.0 if path.endswith("weight") else 0.0)
        return noise * 1.5 / value.shape[1] ** 0.5

    model.update(tree_map_with_path(sharp, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def checkpoint(
    folder: Path, name: str, *, bits: int | None = None, seed: int = 0, **changes: Any
) -> Path:
    """Write a tiny random model, quantized if bits are given; returns the folder."""
    model = build(name, seed=seed, **changes)
    settings = config(name, **changes)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
        settings["quantization"] = {"group_size": 64, "bits": bits}
    return write(folder, settings, dict(tree_flatten(model.parameters())))


def torch() -> Any:
    """The torch module, or a skip that says what is missing."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the oracle needs {error.name}: pip install 'abft-mlx[bench]'")
    torch.set_num_threads(1)
    return torch


def reference(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random transformers model with eager attention, float32, in evaluation mode."""
    torch_ = torch()
    import transformers

    settings = CONFIGS[name] | changes
    theta = settings.pop("rope_theta", None)
    if theta is not None:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    if name == "mistral":
        settings.setdefault("sliding_window", None)
    if name == "gpt2":
        settings |= {"bos_token_id": 0, "eos_token_id": 0}
    chosen = transformers.AutoConfig.for_model(name, attn_implementation="eager", **settings)
    model = transformers.AutoModelForCausalLM.from_config(chosen, dtype=torch_.float32)
    generator = torch_.Generator().manual_seed(seed)
    with torch_.no_grad():
        for path, value in model.named_parameters():
            noise = torch_.randn(value.shape, generator=generator)
            if value.ndim == 1:
                value.copy_(0.3 * noise + (1.0 if path.endswith("weight") else 0.0))
            else:
                inputs = value.shape[0] if "c_attn" in path else value.shape[1]
                value.copy_(noise * 1.5 / inputs**0.5)
    return model.eval()


def save_reference(model: Any, folder: Path, name: str, **changes: Any) -> Path:
    """Write a transformers model the way hub checkpoints look, so that mlx-lm reads it."""
    weights = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and (name == "gpt2" or CONFIGS[name]["tie_word_embeddings"]):
            continue
        weights[key.removeprefix("transformer.")] = mx.array(value.detach().numpy())
    return write(folder, config(name, **changes), weights)


def tokens(batch: int = 3, length: int = 24, seed: int = 1) -> tuple[mx.array, mx.array]:
    """A right-padded batch of random tokens: (B, T) and the last positions (B,), all different."""
    lengths = [max(2, length - n * (length // batch)) for n in range(batch)]
    ids = mx.random.randint(1, VOCABULARY, (batch, length), key=mx.random.key(seed))
    last = mx.array(lengths) - 1
    return mx.where(mx.arange(length) <= last[:, None], ids, 0), last


def train(model: nn.Module, *, updates: int = 3, rate: float = 1e-2, masked: bool = True) -> None:
    """A few real Adam updates on a loss of every layer's pattern."""
    ids, last = tokens()
    optimizer = optim.Adam(rate, bias_correction=True)
    optimizer.init(model.trainable_parameters())

    def loss(model: nn.Module, ids: mx.array, last: mx.array) -> mx.array:
        rows = attention.forward(model, ids, last)[1]
        return sum(row[:, :, 1].sum() for row in rows if row is not None)

    def step(ids: mx.array, last: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, ids, last)
        if masked:
            gradients = adapters.mask_gradients(model, gradients)
        optimizer.update(model, gradients)
        return value

    for _ in range(updates):
        mx.eval(step(ids, last), model.trainable_parameters(), optimizer.state)
