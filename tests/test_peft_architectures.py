"""Exports to PEFT of architectures whose layers have other names, or are fused, in transformers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import peft_support
import pytest

from abft_mlx import adapters
from abft_mlx.exchange import peft
from abft_mlx.recipe import AdapterSection

TOLERANCE = 1e-4
NAMES = ("gemma3", "gpt_neox", "gptj", "phi3", "qwen3_moe", "qwen3_vl")


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_logits(
    benchmark: Callable[[str], ModuleType], name: str, tmp_path: Path
) -> None:
    theirs = peft_support.peft()
    import torch

    oracle, tiny = benchmark("transformers_oracle"), benchmark("tiny_configs")
    with warnings.catch_warnings():
        # What transformers says of tiny configurations.
        warnings.simplefilter("ignore")
        reference, settings = oracle.reference(name)
        model = oracle.load(name, reference, settings, tmp_path)
    tokens, _ = tiny.tokens()
    base = tiny.logits(model, tokens)
    adapters.attach(model, AdapterSection(rank=3, scale=2.0, layers=[0, 2]))
    masks = adapters.gradient_mask(model)
    for n, (path, module) in enumerate(adapters.adapted(model).items()):
        random = mx.random.normal(module.lora_b.shape, key=mx.random.key(n))
        module.lora_b = random * masks.get(f"{path}.lora_b", 1)
    ours = tiny.logits(model, tokens)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    peft.save(model, adapter, base_model=None)
    with peft_support.strict():
        changed = theirs.PeftModel.from_pretrained(reference, adapter).eval()
    with torch.no_grad():
        found = changed(input_ids=torch.tensor(np.array(tokens).astype(np.int64)), use_cache=False)
    assert np.abs(ours - base).max() > 1e-2
    assert np.abs(found.logits.numpy() - ours).max() <= TOLERANCE
    adapters.detach(model)
    adapters.load(model, adapter)
    assert np.abs(tiny.logits(model, tokens) - ours).max() <= TOLERANCE
