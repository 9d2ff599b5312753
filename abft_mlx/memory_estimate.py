"""Estimating the memory of a run before it starts: a formula on shapes, nothing is computed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx import adapters, loading, ports, prefix, read_out
from abft_mlx import recipe as recipes
from abft_mlx.errors import UsageError
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import batches, memory


def examine(recipe: Recipe, length_tokens: int, limit_bytes: int) -> dict[str, Any]:
    """Return ``memory_estimate`` of ``doctor --json``, from the model's config.json alone.

    Args:
        recipe: a resolved recipe; its model is not loaded.
        length_tokens: the longest prompt; a UsageError if the model takes fewer.
        limit_bytes: what the machine has for MLX.
    """
    model, config = loading.skeleton(recipe.model, recipe.revision)
    most = loading.context_tokens(config)
    if most is not None and length_tokens > most:
        raise UsageError(
            f"--length {length_tokens}: {recipe.model} takes at most {most} tokens; give fewer"
        )
    recipe = recipes.share(recipe, able=prefix.shareable(model))
    parts = estimate(model, recipe, length_tokens)
    bits = (config.get("quantization") or {}).get("bits")
    fits = _peak(parts) <= limit_bytes
    way_out = None if fits else _way_out(recipe, parts, length_tokens, limit_bytes, bits)
    facts = {"model": recipe.model, "number_type": loading.number_type(config), "bits": bits}
    facts |= {"length_tokens": length_tokens, **parts}
    return facts | {"limit_bytes": limit_bytes, "fits": fits, "way_out": way_out}


def _peak(parts: dict[str, int]) -> int:
    """The larger of the two peaks."""
    return max(parts["training_bytes"], parts["evaluation_bytes"])


def _way_out(
    recipe: Recipe, parts: dict[str, int], length_tokens: int, limit_bytes: int, bits: int | None
) -> str:
    """The mildest change that fits: fewer prompts at a time, LoRA, a 4-bit model."""
    rows = [2**power for power in range(12, 0, -1) if 2**power < parts["rows"]] + [1]
    keys = ("training.micro_batch_tokens", "evaluation.batch_tokens")
    fewer = [[f"{key}={count * parts['tokens']}" for key in keys] for count in rows]
    lora = ["adapter.kind=lora"] if recipe.adapter.kind == "full" else []
    tries: list[tuple[list[str], int | None]] = [(changes, None) for changes in fewer]
    for copy in [None] * bool(lora) + [4] * (bits is None):
        tries += [(lora, copy), (lora + fewer[-1], copy)]
    for changes, copy in tries:
        model, _ = loading.skeleton(recipe.model, recipe.revision, bits=copy)
        if _peak(estimate(model, recipes.change(recipe, changes), length_tokens)) <= limit_bytes:
            words = ["a 4-bit copy of the model (mlx_lm.convert -q --q-bits 4)"] * bool(copy)
            return f"fits with {' and '.join(words + [f'--set {change}' for change in changes])}"
    return "nothing that this package can change makes it fit; take a smaller model or machine"


def estimate(model: nn.Module, recipe: Recipe, length_tokens: int) -> dict[str, int]:
    """Peak memory of training and evaluation, and its parts, in bytes as MLX counts them.

    Args:
        model: loaded, or a skeleton, without an adapter; it is left as it was.
        recipe: a resolved recipe; ``adapter.layers`` auto counts as all layers.
        length_tokens: the longest prompt.
    """
    training, evaluation = recipe.training, recipe.evaluation
    base_parameters = loading.parameter_count(model)
    weights = memory.array_bytes(model.parameters())
    layers = None if recipe.adapter.layers == "auto" else recipe.adapter.layers
    adapters.attach(model, recipe.adapter.model_copy(update={"layers": layers}))
    if recipe.objective.kind == "read_out":
        read_out.attach(model, {n: mx.zeros(H) for n, H in ports.head_counts(model).items()})
    tokens = batches.padded_tokens(length_tokens)
    rows = memory.micro_batch_rows(model, recipe, length_tokens)
    micro_batches = -(-training.prompts_per_update // rows)
    trainable = memory.array_bytes(model.trainable_parameters())
    resident = memory.array_bytes(model.parameters()) + memory.originals_bytes(model)
    if training.validate_every and training.keep_best:
        resident += trainable
    gradients = min(micro_batches, 2) * trainable  # one waits while the next is computed
    update, query = memory.activation_bytes(model, recipe, rows, tokens)
    update = max(update, 3 * trainable - gradients)  # averaging, and Adam's step
    count = adapters.trainable_parameters(model)
    adapters.detach(model)
    prompts = evaluation.queries * evaluation.repeats
    batch = max(1, min(evaluation.batch_tokens // tokens, prompts))
    return {
        "parameters": base_parameters,
        "trainable_parameters": count,
        "rows": rows,
        "tokens": tokens,
        "micro_batches": micro_batches,
        "evaluation_rows": batch,
        "weights_bytes": weights,
        "adapter_bytes": resident - weights,
        "moments_bytes": 2 * trainable,
        "gradients_bytes": gradients,
        "activations_bytes": update,
        "training_bytes": resident + 2 * trainable + gradients + update,
        "evaluation_bytes": resident + batch * query,
    }
