"""Rows and logits of an architecture against transformers' eager attention, on the same weights.

A random transformers model is made from the tiny configuration, its weights are written as its
hub checkpoints have them, and mlx-lm's own loading code reads them.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny_configs
from mlx.utils import tree_flatten
from transformers_difference import ABSENT, Difference
from transformers_settings import DIFFERENCES

from abft_mlx import attention, ports
from abft_mlx.adapters import peft
from abft_mlx.adapters.peft import linear_paths


def why_not(name: str) -> str | None:
    """Why an architecture cannot be compared with transformers, or None where it can."""
    import transformers

    difference = DIFFERENCES.get(name, Difference())
    kind = difference.model_type or tiny_configs.settings(name)["model_type"]
    if difference.why_not is None and kind not in transformers.CONFIG_MAPPING:
        return ABSENT
    return difference.why_not


def note(name: str) -> str | None:
    """How the two differ with other settings than those that are compared."""
    return DIFFERENCES.get(name, Difference()).note


def reference(name: str) -> tuple[Any, dict[str, Any]]:
    """A random transformers model in float32, and its configuration as mlx-lm reads it."""
    import torch
    import transformers

    difference = DIFFERENCES.get(name, Difference())
    tiny = tiny_configs.settings(name)
    flat = {**tiny.get("text_config", tiny), **difference.both}
    for one in difference.without:
        flat.pop(one, None)
    given = {key: value for key, value in flat.items() if key != "rope_scaling"}
    theta = given.pop("rope_theta", None)
    if theta is not None and "rope_parameters" not in given:
        rope = {"rope_type": "default", "rope_theta": theta}
        if "partial_rotary_factor" in given:
            rope["partial_rotary_factor"] = given["partial_rotary_factor"]
        given["rope_parameters"] = rope
    given |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    del given["model_type"]
    given |= difference.theirs
    kind = difference.model_type or tiny["model_type"]
    if difference.wrapper:
        tied = {"tie_word_embeddings": flat.get("tie_word_embeddings", False)}
        given = {"text_config": given, **tied, **difference.wrapper}
    # transformers changes what it is given.
    given = copy.deepcopy(given)
    config = transformers.AutoConfig.for_model(kind, attn_implementation="eager", **given)
    made = getattr(transformers, difference.model_class)
    if hasattr(made, "from_config"):
        model = made.from_config(config, dtype=torch.float32).eval()
    else:
        model = made(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.1 * noise + 1 if value.ndim == 1 else noise / value.shape[-1] ** 0.5)
            if difference.zero and key.endswith(difference.zero):
                value.zero_()
    text = {**config.get_text_config().to_dict(), **flat, **difference.ours}
    if "text_config" in tiny:
        return model, {**config.to_dict(), **tiny, "text_config": text}
    return model, text


def load(name: str, oracle: Any, settings: dict[str, Any], folder: Path) -> nn.Module:
    """The mlx-lm model of a transformers model's checkpoint."""
    difference = DIFFERENCES.get(name, Difference())
    oracle.save_pretrained(folder, save_original_format=difference.original)
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= dict(mx.load(str(file)).items())
    weights = {key: value for key, value in weights.items() if not key.startswith(difference.drop)}
    for old, new in difference.names:
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    for key in weights:
        if difference.swap and key.endswith(difference.swap):
            weights[key] = weights[key].swapaxes(-1, -2)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    if difference.unused:
        own = dict(tree_flatten(model.parameters()))
        weights |= {key: one for key, one in own.items() if key.startswith(difference.unused)}
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model


def misnamed(oracle: Any, model: nn.Module) -> list[str]:
    """Layers whose name in transformers, as exports to PEFT have it, is another layer's or none."""
    paths = [*linear_paths(model), ports.port_for(model).head_path(model)]
    wrong = []
    modules = dict(oracle.named_modules())
    for path, theirs in peft.named(model, paths).items():
        weight = getattr(modules.get(theirs), "weight", None)
        other = None if weight is None else weight.detach().numpy()
        if other is not None and other.ndim == 2 and peft.transposed(model):
            other = other if "wte" in theirs else other.T
        if other is None or not np.array_equal(np.array(ports.resolve(model, path).weight), other):
            wrong.append(path)
    return wrong


def compare(name: str) -> dict[str, Any]:
    """Largest differences of rows and logits: a right-padded batch, and its prompts one by one."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        oracle, settings = reference(name)
        model = load(name, oracle, settings, Path(folder))
    names = misnamed(oracle, model)
    tokens, last = tiny_configs.tokens()
    ends = np.array(last)
    batches = [(tokens, ends)]
    batches += [(tokens[n : n + 1, : end + 1], np.array([end])) for n, end in enumerate(ends)]
    patterns, logits, largest = 0.0, 0.0, 0.0
    for batch, at in batches:
        ids = torch.tensor(np.array(batch).astype(np.int64))
        mask = (torch.arange(ids.shape[1]) <= torch.tensor(at)[:, None]).long()
        with torch.no_grad():
            output = oracle(
                input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False
            )
        every = np.arange(len(ids))
        expected = [one[every, :, at].numpy() for one in output.attentions if one is not None]
        rows = [one for one in attention.capture(model, batch, mx.array(at)) if one is not None]
        if len(rows) != len(expected):
            raise ValueError(f"{len(rows)} layers have rows, {len(expected)} in transformers")
        for row, one in zip(rows, expected, strict=True):
            # gpt-oss appends its sink as a column.
            patterns = max(patterns, float(np.abs(np.array(row) - one[..., : row.shape[-1]]).max()))
            largest = max(largest, float(one.max()))
        ours = tiny_configs.logits(model, batch)[every, at]
        logits = max(logits, float(np.abs(ours - output.logits[every, at].numpy()).max()))
    return {"pattern": patterns, "logits": logits, "largest": largest, "misnamed": names}


if __name__ == "__main__":
    import sys

    for one in sys.argv[1:]:
        print(json.dumps({one: compare(one)}))
