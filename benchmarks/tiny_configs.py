"""A tiny random model of every architecture of the installed mlx-lm."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from tiny_settings import CHANGES, COMMON, OWN_TEXT, TEXT, VOCABULARY

from abft_mlx.ports import port_for

# Modules of mlx-lm's models folder that hold parts, not a model.
PARTS = frozenset(
    (
        "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline",
        "rope_utils", "ssm", "switch_layers",
    )
)  # fmt: skip


def architectures() -> list[str]:
    """Every module of mlx-lm's models that holds a model, in order."""
    names = {one.name for one in pkgutil.iter_modules(mlx_lm.models.__path__)}
    return sorted(names - PARTS)


def settings(name: str) -> dict[str, Any]:
    """The tiny configuration of an architecture, as its config.json would hold it."""
    if name in TEXT:
        inner = settings(TEXT[name])
        return {"model_type": name, "text_config": inner, "vocab_size": VOCABULARY}
    module = importlib.import_module(f"mlx_lm.models.{name}")
    described = getattr(module, OWN_TEXT.get(name, "ModelArgs"))
    fields = {one.name for one in dataclasses.fields(described)}
    known = {key: value for key, value in COMMON.items() if key in fields}
    made = {**known, "model_type": name, **CHANGES.get(name, {})}
    return {"model_type": name, "text_config": made} if name in OWN_TEXT else made


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with sharp random weights, in evaluation mode."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(settings(name)))
    parameters = tree_flatten(model.parameters())
    size = sum(value.size for _, value in parameters)
    if size > 8e6:
        raise ValueError(f"the tiny {name} has {size:,} parameters; its configuration is not tiny")
    keys = iter(mx.random.split(mx.random.key(seed), len(parameters)))

    def sharp(_path: str, value: mx.array) -> mx.array:
        noise = mx.random.normal(value.shape, key=next(keys))
        if value.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            return value
        if value.ndim < 2:
            return 0.1 * noise + value.astype(mx.float32)
        return noise / value.shape[-1] ** 0.5

    model.update(tree_map_with_path(sharp, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def tokens(length: int = 24, batch: int = 2, seed: int = 1) -> tuple[mx.array, mx.array]:
    """Right-padded random tokens (B, T), longer than the windows, and last positions (B,)."""
    ids = mx.random.randint(1, VOCABULARY, (batch, length), key=mx.random.key(seed))
    last = mx.array([length - 1 - 5 * n for n in range(batch)])
    return mx.where(mx.arange(length) <= last[:, None], ids, 0), last


def logits(model: nn.Module, ids: mx.array) -> np.ndarray:
    """What mlx-lm itself gives, (B, T, V) float32, as its generation runs the model."""
    cache = make_prompt_cache(model) if port_for(model).needs_cache else None
    return np.array((model(ids) if cache is None else model(ids, cache=cache)).astype(mx.float32))
