"""Putting an adapter on W_Q, W_K and the LM head of a loaded model, and taking it off again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import read_out
from abft_mlx.adapters.layers import FullLinear, put_back, put_full, put_lora
from abft_mlx.errors import AdapterError
from abft_mlx.ports import Projection, base_linear, freeze, output_dims, port_for, resolve

if TYPE_CHECKING:
    from abft_mlx.recipe import AdapterSection


@dataclass(frozen=True)
class Target:
    """One projection that an adapter trains.

    Attributes:
        layer: index of its layer.
        path: full dotted path, as in the weights' names.
        projection: what the port says of it.
    """

    layer: int
    path: str
    projection: Projection


def targets(model: nn.Module, layers: list[int] | None = None) -> list[Target]:
    """W_Q and W_K of the given layers, all layers if None, in order.

    What several layers share counts once, as the first's.

    Raises:
        AdapterError: a layer number that the model has not, or a layer without softmax attention.
    """
    port = port_for(model)
    modules = port.layers(model)
    with_heads = [n for n, m in enumerate(modules) if port.attention_module(m) is not None]
    wanted = with_heads if layers is None else sorted(set(layers))
    unknown = [n for n in wanted if n not in with_heads]
    if unknown or not wanted:
        raise AdapterError(
            f"adapter.layers {unknown or list(wanted)}: this model has attention "
            f"layers {with_heads[0]} to {with_heads[-1]}; name some of those, or leave it out for "
            "all"
        )
    found: dict[str, Target] = {}
    for n in wanted:
        for projection in port.layer_projections(modules[n]):
            path = f"{modules[n].path}.{projection.path}"
            found.setdefault(path, Target(n, path, projection))
    return list(found.values())


def trained_layers(model: nn.Module) -> list[int]:
    """Layers whose W_Q or W_K carries an adapter, in order; all that share a module, if it does."""
    port, changed = port_for(model), adapted(model)
    return [
        n
        for n, layer in enumerate(port.layers(model))
        if port.attention_module(layer) is not None
        and any(f"{layer.path}.{one.path}" in changed for one in port.layer_projections(layer))
    ]


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Full path to module for every layer that carries an adapter, in the model's order.

    These are projections of W_Q and W_K and, where it trains, the LM head.
    """
    return {
        path: module
        for path, module in sorted(model.named_modules(), key=lambda item: _natural(item[0]))
        if isinstance(module, LoRALinear | FullLinear)
    }


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def attach(model: nn.Module, section: AdapterSection, *, seed: int = 0) -> None:
    """Freeze a model and make W_Q and W_K trainable: through LoRA layers, or their weights.

    With ``section.head`` the LM head's own weight trains, too, in float32 whatever the base has.

    The start depends on ``seed`` alone, not on MLX's global random state. LoRA layers start in
    evaluation mode, so that dropout does nothing until :func:`train_mode`.

    Args:
        model: a loaded model without an adapter.
        section: kind, rank, scale, dropout, layers and head.
        seed: of the random ``lora_a``; ``lora_b`` starts at zero.

    Raises:
        AdapterError: the model has an adapter already, kind "full" on a quantized base, layers
            that do not exist, a rank larger than a projection, or a head that is an embedding.
    """
    place(model, section, seed=seed)
    mx.eval(model.trainable_parameters())


def place(model: nn.Module, section: AdapterSection, *, seed: int = 0) -> None:
    """As :func:`attach`, but nothing is evaluated: enough to see shapes, whatever their size."""
    if adapted(model):
        raise AdapterError("this model already carries an adapter; detach() it first")
    if section.layers == "auto":
        raise AdapterError(
            "adapter.layers auto is resolved by the census at the start of a run; give layer "
            "numbers, or None for all"
        )
    chosen = targets(model, section.layers)
    head = _trainable_head(model) if section.head else None
    if section.kind == "full":
        _check_full(model, chosen)
    else:
        _check_rank(model, chosen, section.rank)
    freeze(model)
    if head is not None:
        put_full(model, head, head=True)
    if section.kind == "full":
        for target in chosen:
            put_full(model, target.path)
    else:
        _put_started_lora(model, chosen, section, seed)


def _put_started_lora(
    model: nn.Module, chosen: list[Target], section: AdapterSection, seed: int
) -> None:
    # A layer's start does not depend on which other layers train.
    every = {target.path: n for n, target in enumerate(targets(model))}
    keys = mx.random.split(mx.random.key(seed), len(every))
    for target in chosen:
        lora = put_lora(model, target.path, section.rank, section.scale, section.dropout)
        bound = 1 / math.sqrt(lora.lora_a.shape[0])
        lora.lora_a = mx.random.uniform(
            -bound, bound, lora.lora_a.shape, key=keys[every[target.path]]
        )


def _trainable_head(model: nn.Module) -> str:
    """Path of the LM head, which must be a linear layer of its own."""
    path = port_for(model).head_path(model)
    if not isinstance(resolve(model, path), nn.Linear | nn.QuantizedLinear):
        raise AdapterError(
            f"adapter.head: this model's LM head is its embedding ({path}), so training it would "
            "change the inputs, too; set adapter.head to false"
        )
    return path


def _check_full(model: nn.Module, chosen: list[Target]) -> None:
    for target in chosen:
        module = resolve(model, target.path)
        if "scales" in module:
            raise AdapterError(
                f"{target.path} is quantized, and a quantized base cannot train W_Q and W_K in "
                "full; set adapter.kind to lora, or take the unquantized model"
            )
        if type(module) is not nn.Linear:
            raise AdapterError(
                f"{target.path} is a {type(module).__name__}, which cannot train in full; "
                "set adapter.kind to lora"
            )


def _check_rank(model: nn.Module, chosen: list[Target], rank: int) -> None:
    for target in chosen:
        module = resolve(model, target.path)
        smallest = min(input_dims(module), output_dims(module))
        if not 1 <= rank <= smallest:
            raise AdapterError(
                f"adapter.rank {rank}: {target.path} is {output_dims(module)} x "
                f"{input_dims(module)}; use a rank of 1 to {smallest}"
            )


def input_dims(module: nn.Module) -> int:
    """Inputs of a linear layer, plain or quantized."""
    linear = base_linear(module)
    packed = int(linear.weight.shape[1])
    return packed * 32 // linear.bits if "scales" in linear else packed


def detach(model: nn.Module) -> None:
    """Take the adapter off, a read-out too: the base's own weights are back, and frozen."""
    read_out.detach(model)
    for path, module in adapted(model).items():
        put_back(model, path, module)
    freeze(model)


def train_mode(model: nn.Module, on: bool = True) -> None:
    """Switch the LoRA layers' dropout on or off; no other layer changes its mode.

    With dropout on, a compiled step must have ``mx.random.state`` among its inputs and outputs, or
    every step draws the same mask.
    """
    for module in adapted(model).values():
        if isinstance(module, LoRALinear):
            module.dropout.train(on)
