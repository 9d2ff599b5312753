"""Small bases under adapters and optimizer state that stay float32."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from step_support import prompts

from abft_mlx import adapters, ports
from abft_mlx import recipe as recipes
from abft_mlx.trainer import Trainer
from abft_mlx.trainer.batches import micro_batches


def base(kind: str) -> nn.Module:
    model = tiny_models.build("llama")
    if kind == "bfloat16":
        model.set_dtype(mx.bfloat16)
    else:
        # As mlx-lm's conversion leaves a checkpoint: what is not quantized is bfloat16.
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=64, bits=int(kind))
    return model


def types(tree: Any) -> set[mx.Dtype]:
    return {one.dtype for _, one in tree_flatten(tree)}


MODES = ("training.gradient_checkpointing=false", "training.gradient_checkpointing=true")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bfloat16", "4"])
def test_adapters_gradients_and_moments_are_float32(kind: str, mode: str) -> None:
    """On a base that computes in bfloat16; a step that bfloat16 would round away is kept."""
    settings = ["training.learning_rate=1e-6", "objective.filter=false", "adapter.rank=4", mode]
    recipe = recipes.resolve(recipes.default(settings))
    model = base(kind)
    frozen = {name: (one.dtype, np.array(one.astype(mx.float32)))
              for name, one in tree_flatten(model.parameters())}  # fmt: skip
    adapters.attach(model, recipe.adapter, seed=0)
    started = [
        (name, (mx.random.normal(one.shape, key=mx.random.key(3)) * 0.1).astype(one.dtype))
        for name, one in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(started, strict=False)
    adapters.train_mode(model)
    tokens = mx.array([prompts()[0].token_ids])
    assert ports.port_for(model).hidden(model, tokens).dtype == mx.bfloat16
    trainer = Trainer(model, prompts(), recipe)
    before = {n: np.array(one) for n, one in tree_flatten(model.trainable_parameters())}
    batches = micro_batches(prompts(), 2)
    gradients, _ = trainer.step.gradients(batches, 0.5)
    assert types(gradients) == {mx.float32}
    trainer.step.update(batches, 0.5)
    assert types(model.trainable_parameters()) == {mx.float32}
    moments = {name: one for name, one in tree_flatten(trainer.optimizer.state)
               if name.endswith((".m", ".v"))}  # fmt: skip
    assert len(moments) == 2 * len(before)
    assert types(moments) == {mx.float32}
    for name, one in tree_flatten(model.trainable_parameters()):
        moved = np.abs(np.array(one) - before[name])
        assert 0.9e-6 < np.median(moved) < 1.1e-6, name
    for name, one in tree_flatten(model.parameters()):
        if not name.endswith(("lora_a", "lora_b")):
            dtype, value = frozen[name.replace(".linear", "")]
            assert one.dtype == dtype, name
            assert np.array_equal(np.array(one.astype(mx.float32)), value), name
