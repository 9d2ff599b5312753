"""What the bench compares: each makes one optimizer update from the same weights and prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from abft_mlx import adapters, attention
from abft_mlx.bench.sizes import PUNISH, RANK, REWARD, SCALE, Size, random_model, random_prompts
from abft_mlx.bench.torch_way import paper_update
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.batches import MicroBatch, micro_batches
from abft_mlx.trainer.step import Step

LEARNING_RATE = 1e-4
# Prompts that share demonstrations, where they do.
SHARED = 8

Update = Callable[[], float]
"""Makes one update of all of a size's prompts, waits for it, and gives its loss."""


def batch_of(size: Size) -> MicroBatch:
    """The prompts of one update, unpadded."""
    (batch,) = micro_batches(random_prompts(size), size.prompts, bucket_tokens=1)
    return batch


def our_step(size: Size, dtype: mx.Dtype) -> Step:
    """Our step on a random model with LoRA on W_Q and W_K."""
    model = random_model(size, dtype)
    adapters.attach(model, AdapterSection(kind="lora", rank=RANK, scale=SCALE), seed=0)
    return Step(
        model,
        optim.Adam(LEARNING_RATE, bias_correction=True),
        reward_weight=REWARD,
        use_filter=True,
    )


def ours(size: Size, dtype: mx.Dtype, *, together: int = 1) -> Update:
    """Equation 1 by our step, with so many prompts that share their demonstrations."""
    step = our_step(size, dtype)
    if together == 1:
        batches = [batch_of(size)]
    else:
        together = math.gcd(together, size.prompts)
        prompts = random_prompts(size, together)
        batches = micro_batches(prompts, size.prompts, together=together, bucket_tokens=1)
    return lambda: step.update(batches, PUNISH).loss


def forward_only(size: Size, dtype: mx.Dtype) -> Update:
    """The pattern rows of all layers, as a census reads them: no gradient, no update."""
    step, batch = our_step(size, dtype), batch_of(size).arrays()

    def run() -> float:
        mx.eval(attention.capture(step.model, batch["tokens"], batch["last"]))
        return 0.0

    return run


def mlx_lm(size: Size, dtype: mx.Dtype, *, keys: list[str] | None = None) -> Update:
    """mlx-lm's LoRA trainer on the cross-entropy of the label token.

    Its loss, its LoRA layers, and value, gradient and update compiled as one, as its loop has it.

    Args:
        size: of the model and the batch.
        dtype: of the base.
        keys: which linear layers of a block get LoRA; None for mlx-lm's default.
    """
    model = random_model(size, dtype)
    model.freeze()
    settings = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    linear_to_lora_layers(model, size.layers, settings | ({"keys": keys} if keys else {}))
    optimizer = optim.Adam(LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]
    batch = batch_of(size).batch
    tokens = mx.concatenate([mx.array(batch.tokens), mx.array(batch.target)], axis=1)
    # The first and the last counted position of each row, as mlx-lm's batches have them.
    counted = mx.array([[size.tokens, size.tokens + 1]] * size.prompts)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, counted: mx.array) -> Any:
        (value, _), gradients = value_and_grad(model, tokens, counted)
        optimizer.update(model, gradients)
        return value

    model.train()

    def run() -> float:
        value = step(tokens, counted)
        mx.eval(state, value)
        return float(value.item())

    return run


CONTENDERS: dict[str, Callable[[Size, mx.Dtype], Update]] = {
    "ours-exact": ours,
    "ours-shared": partial(ours, together=SHARED),
    "forward": forward_only,
    "mlx-lm-qk": partial(mlx_lm, keys=["self_attn.q_proj", "self_attn.k_proj"]),
    "mlx-lm-default": mlx_lm,
    "pytorch-paper": paper_update,
}
