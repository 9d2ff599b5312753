"""Keeping the V part of a fused projection still, and counting what trains."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.adapters.attach import adapted, targets
from abft_mlx.ports import port_for


def gradient_mask(model: nn.Module) -> dict[str, mx.array]:
    """Which entries of a trainable tensor may move, for fused projections.

    Returns:
        Parameter name to a bool mask that broadcasts to it: (1, outputs) for ``lora_b``,
        (outputs, 1) for a weight. Tensors that may move as a whole are left out.
    """
    port = port_for(model)
    layers = port.layers(model)
    modules = adapted(model)
    masks = {}
    for target in targets(model):
        module = modules.get(target.path)
        outputs = port.qk_outputs(layers[target.layer], target.projection)
        if module is None or outputs is None:
            continue
        if isinstance(module, LoRALinear):
            masks[f"{target.path}.lora_b"] = mx.array(outputs)[None, :]
        else:
            masks[f"{target.path}.weight"] = mx.array(outputs)[:, None]
    return masks


def mask_gradients(model: nn.Module, gradients: Any) -> Any:
    """Zero the gradients of the V parts of fused projections, leaving W_Q, W_K and the LM head.

    A zero gradient from the first step on leaves Adam's moments at zero, so the V part stays
    bit-identical. Weight decay would move it.

    Args:
        model: a model with an adapter.
        gradients: tree of gradients, as ``nn.value_and_grad`` gives them.

    Returns:
        The same tree with the V parts exactly zero.
    """
    masks = gradient_mask(model)
    if not masks:
        return gradients
    return tree_map_with_path(
        lambda path, g: mx.where(masks[path], g, mx.zeros_like(g)) if path in masks else g,
        gradients,
    )


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training can change, the masked V parts not counted."""
    masks = gradient_mask(model)
    total = 0
    for name, tensor in tree_flatten(model.trainable_parameters()):
        mask = masks.get(name)
        total += tensor.size if mask is None else int(mask.sum()) * (tensor.size // mask.size)
    return total
