"""Estimating the memory of a run before it starts: a formula on shapes, nothing is computed.

Within 30% of the peaks that MLX measures on its CPU backend; docs/performance.md has the terms.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import adapters, loading, ports, prefix, read_out
from abft_mlx import recipe as recipes
from abft_mlx.errors import UsageError
from abft_mlx.recipe import Recipe
from abft_mlx.task import LEAST_AUTO
from abft_mlx.trainer import below, memory, plan

# Layers whose arrays are alive although nothing keeps them: MLX allocates ahead of the device.
LAYERS_IN_FLIGHT = 2.2
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")


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
    training, evaluation, objective = recipe.training, recipe.evaluation, recipe.objective
    base_parameters, weights = loading.parameter_count(model), _bytes(model.parameters())
    layers = None if recipe.adapter.layers == "auto" else recipe.adapter.layers
    adapters.attach(model, recipe.adapter.model_copy(update={"layers": layers}))
    if objective.kind == "read_out":
        read_out.attach(model, {n: mx.zeros(H) for n, H in ports.head_counts(model).items()})
    tokens = plan.padded_tokens(length_tokens)
    rows = memory.micro_batch_rows(model, recipe, length_tokens)
    micro_batches = -(-training.prompts_per_update // rows)
    trainable = _bytes(model.trainable_parameters())
    resident = _bytes(model.parameters()) + memory.kept_originals_bytes(model)
    if training.validate_every and training.keep_best:
        resident += trainable
    gradients = min(micro_batches, 2) * trainable  # one waits while the next is computed
    update, query = _activations(model, recipe, rows, tokens)
    if objective.kind == "end_to_end" or objective.lm_head:
        update += rows * memory.bytes_per_prompt(model, "end_to_end")
    update = max(update, 3 * trainable - gradients)  # averaging, and Adam's step
    kept = 0
    if training.keep_hidden and training.together == 1:
        prompts = min(training.examples, training.updates * training.prompts_per_update)
        kept = prompts * below.input_bytes(model, length_tokens)
        kept = min(kept, memory.kept_bytes(model, recipe))
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
        "kept_hidden_bytes": kept,
        "training_bytes": resident + 2 * trainable + gradients + update + kept,
        "evaluation_bytes": resident + batch * query,
    }


def _activations(model: nn.Module, recipe: Recipe, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes beside weights and gradients: of a micro-batch, and of one prompt's evaluation."""
    objective, together = recipe.objective, recipe.training.together
    types = [array.dtype for _, array in tree_flatten(model.parameters())]
    itemsize = min(dtype.size for dtype in types if mx.issubdtype(dtype, mx.floating))
    heads = max(shape.n_heads for shape in ports.heads(model) if shape is not None)
    width = max(shape.n_heads * shape.head_dim for shape in ports.heads(model) if shape is not None)
    # Two arrays of the residual stream; LoRA makes float32 copies of what W_Q and W_K get.
    stream = (6 if recipe.adapter.kind == "lora" and itemsize < 4 else 2) * width
    blocks, layers = ports.port_for(model).blocks(model), []
    args = getattr(model, "args", None)
    experts = max(getattr(args, name, None) or 1 for name in EXPERTS_PER_TOKEN)
    for block in blocks:
        weights = [m.weight for _, m in block.module.named_modules() if "weight" in m]
        outputs = [w.shape[-2] * (1 if w.ndim == 2 else experts) for w in weights if w.ndim > 1]
        layers.append(sum(outputs) + stream)
    trained = set(adapters.trained_layers(model))
    here = [n for n, block in enumerate(blocks) if trained & set(block.layers)]
    only_trained = objective.kind == "abft" and objective.layers == "trained"
    kept = layers[here[0] : here[-1] + 1 if only_trained else None]
    if objective.kind != "end_to_end" and not objective.lm_head:
        kept[-1] = 2 * width + stream  # of the last layer, queries and keys alone are used
    in_flight = LAYERS_IN_FLIGHT * max(layers)
    one_block = max(layers) + 2 * heads * tokens + 1.5 * width * len(kept)
    keeps = {"kept": sum(kept), "checkpointing": one_block, "local": 0}
    every = rows * tokens
    if together > 1:  # shared demonstrations are all of a prompt but one text in k + 1
        k = LEAST_AUTO if recipe.prompt.demonstrations == "auto" else recipe.prompt.demonstrations
        every = max(1, rows // together) * tokens * (k + together) // (k + 1)
    update = every * (in_flight + keeps[memory.backward_of(recipe)])
    return int(update * itemsize), int(tokens * (in_flight + heads * tokens) * itemsize)


def _bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))
