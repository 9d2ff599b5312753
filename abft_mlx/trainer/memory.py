"""How many tokens one micro-batch may hold on this machine, and how much may be kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import adapters, ports, runtime
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import plan

# More tokens than these bring no speed: a CPU's caches are small, a GPU is busy by then.
CPU_TOKENS = 4096
GPU_TOKENS = 16384
SMALLEST_TOKENS = 256
MEMORY_SHARE = 0.5
# Of hidden states that are kept from update to update, beside that.
KEPT_SHARE = 0.25
# Rough estimates are right within this factor, either way.
ROUGHLY = 3


Backward = Literal["kept", "checkpointing", "local"]
"""Whether a backward pass finds what it needs, computes blocks again, or never leaves a block."""


def backward_of(recipe: Recipe) -> Backward:
    """The kind of backward pass that a recipe asks for."""
    if recipe.training.gradient == "local" and recipe.objective.kind == "abft":
        return "local"
    return "checkpointing" if recipe.training.gradient_checkpointing else "kept"


def bytes_per_token(model: nn.Module, backward: Backward = "kept") -> int:
    """Rough bytes that a step keeps per prompt token for the backward pass.

    Per layer: about ten arrays of the model's width, and two of the MLP's (taken as four times the
    width); the rest is computed again (:mod:`abft_mlx.recompute`). With gradient checkpointing
    that of one layer, and of every layer four arrays of the width: its input and what the
    adapter's gradients wait for. With local gradients that of one layer, and its input and output.

    Args:
        model: a loaded model.
        backward: from :func:`backward_of`.
    """
    shapes = [one for one in ports.heads(model) if one is not None]
    width = max(one.n_heads * one.head_dim for one in shapes)
    per_layer = (10 + 8) * width
    if backward == "local":
        return 4 * (per_layer + 4 * width)
    if backward == "checkpointing":
        return 4 * (per_layer + 4 * width * len(shapes))
    return 4 * per_layer * len(shapes)


def bytes_per_prompt(model: nn.Module, objective: str) -> int:
    """Rough bytes that a step keeps per prompt whatever its length.

    End-to-end fine-tuning has logits over the vocabulary at the last position, their exponentials
    and their gradient, all float32.

    Args:
        model: a loaded model.
        objective: "end_to_end" where the LM head takes part.
    """
    if objective != "end_to_end":
        return 0
    return 3 * 4 * ports.output_dims(ports.port_for(model).head(model))


def training_bytes(model: nn.Module) -> int:
    """Bytes that training keeps beside the model's parameters, whatever the batch.

    For every trainable number: Adam's two moments, its gradient, and while an update is worked
    out two more. Weights that train in full stand beside the base's own, which
    :func:`adapters.detach` needs.

    Args:
        model: a loaded model, adapters attached.
    """
    trainable = sum(one.nbytes for _, one in tree_flatten(model.trainable_parameters()))
    return 5 * trainable + kept_originals_bytes(model)


def kept_originals_bytes(model: nn.Module) -> int:
    """Bytes of the base's own weights that an adapter in full stands for.

    Args:
        model: a loaded model, adapters attached.
    """
    return sum(
        one.nbytes
        for layer in adapters.adapted(model).values()
        if isinstance(layer, adapters.FullLinear)
        for _, one in tree_flatten(layer.original.module.parameters())
    )


def micro_batch_tokens(
    model: nn.Module,
    longest_tokens: int,
    objective: str = "abft",
    backward: Backward = "kept",
) -> int:
    """Tokens of one micro-batch that fit beside the weights, padding included.

    Args:
        model: a loaded model, adapters attached.
        longest_tokens: longest prompt of the run.
        objective: "end_to_end" where the LM head takes part.
        backward: from :func:`backward_of`.
    """
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    room = max(0.0, _memory() * MEMORY_SHARE - _resident_bytes(model))
    per_prompt = bytes_per_prompt(model, objective)
    per_token = bytes_per_token(model, backward)
    fitting = int(room / (per_token + per_prompt / longest_tokens))
    return max(SMALLEST_TOKENS, min(fitting, GPU_TOKENS if on_gpu else CPU_TOKENS))


def kept_bytes(model: nn.Module, recipe: Recipe, processes: int = 1) -> int:
    """Bytes of hidden states that may be kept in memory from update to update.

    A share of the machine's memory of their own, less what weights too large for the other share
    take of it.

    Args:
        model: a loaded model, adapters attached.
        recipe: its ``training.keep_hidden_bytes`` goes before what fits this machine.
        processes: that may share the machine.
    """
    given = recipe.training.keep_hidden_bytes
    if given is not None:
        return given
    memory = _memory()
    beyond = max(0.0, _resident_bytes(model) - memory * MEMORY_SHARE)
    return max(0, int(memory * KEPT_SHARE - beyond)) // processes


def _memory() -> int:
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size", runtime.machine_memory_bytes()))


def _resident_bytes(model: nn.Module) -> int:
    weights = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    return weights + training_bytes(model)


def peak_bytes(work: Callable[[], object]) -> int:
    """MLX's peak while some work is done, beside what was held before; counted anew from here."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    held = mx.get_active_memory()
    work()
    return runtime.peak_memory_bytes() - held


def micro_batch_rows(model: nn.Module, recipe: Recipe, longest_tokens: int) -> int:
    """Prompts of one micro-batch, as the trainer cuts its updates.

    Args:
        model: a loaded model, adapters attached.
        recipe: a number of ``training.micro_batch_tokens`` goes before what fits this machine.
        longest_tokens: longest prompt of the run.
    """
    training = recipe.training
    budget = training.micro_batch_tokens
    if not isinstance(budget, int):
        objective = "end_to_end" if recipe.objective.lm_head else recipe.objective.kind
        budget = micro_batch_tokens(model, longest_tokens, objective, backward_of(recipe))
    return plan.rows_within(budget, longest_tokens, training.prompts_per_update, plan.BUCKET_TOKENS)
