"""Putting an adapter on W_Q and W_K of a loaded model, and taking it off again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.errors import AdapterError
from abft_mlx.ports import Projection, base_linear, output_dims, port_for, resolve

if TYPE_CHECKING:
    from abft_mlx.recipe import AdapterSection


@dataclass(frozen=True)
class Original:
    """A projection's weight as it was before training, (outputs, inputs)."""

    weight: mx.array


class FullLinear(nn.Linear):
    """A linear layer whose weight trains in float32 and is used in the input's own type.

    Steps of 2e-5 would be rounded away in a bfloat16 weight. Parameter names stay those of
    ``nn.Linear``. ``original`` is no parameter: it is what :func:`detach` puts back.
    """

    original: Original

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer: (..., inputs) to (..., outputs)."""
        y = x @ self["weight"].astype(x.dtype).T
        return y + self["bias"] if "bias" in self else y


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
    return [
        Target(n, f"{port.attention_path(n)}.{projection.path}", projection)
        for n in wanted
        for projection in port.projections
    ]


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Full path to module for every projection that carries an adapter, in the model's order."""
    return {
        path: module
        for path, module in sorted(model.named_modules(), key=lambda item: _natural(item[0]))
        if isinstance(module, LoRALinear | FullLinear)
    }


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def attach(model: nn.Module, section: AdapterSection, *, seed: int = 0) -> None:
    """Freeze a model and make W_Q and W_K trainable: through LoRA layers, or their weights.

    The start depends on ``seed`` alone, not on MLX's global random state. LoRA layers start in
    evaluation mode, so that dropout does nothing until :func:`train_mode`.

    Args:
        model: a loaded model without an adapter.
        section: kind, rank, scale, dropout and layers.
        seed: of the random ``lora_a``; ``lora_b`` starts at zero.

    Raises:
        AdapterError: the model has an adapter already, kind "full" on a quantized base, layers
            that do not exist, or a rank larger than a projection.
    """
    if adapted(model):
        raise AdapterError("this model already carries an adapter; detach() it first")
    chosen = targets(model, None if section.layers is None else list(section.layers))
    if section.kind == "full":
        _check_full(model, chosen)
        model.freeze()
        for target in chosen:
            make_full(resolve(model, target.path))
        return
    _check_rank(model, chosen, section.rank)
    model.freeze()
    every = {target.path: n for n, target in enumerate(targets(model))}
    keys = mx.random.split(mx.random.key(seed), len(every))
    for target in chosen:
        lora = put_lora(model, target.path, section.rank, section.scale, section.dropout)
        bound = 1 / math.sqrt(lora.lora_a.shape[0])
        lora.lora_a = mx.random.uniform(
            -bound, bound, lora.lora_a.shape, key=keys[every[target.path]]
        )
    mx.eval(model.trainable_parameters())


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


def put_lora(model: nn.Module, path: str, rank: int, scale: float, dropout: float) -> LoRALinear:
    """Wrap one linear layer in mlx-lm's LoRA layer, in evaluation mode."""
    lora = LoRALinear.from_base(resolve(model, path), r=rank, scale=scale, dropout=dropout)
    lora.eval()
    model.update_modules(tree_unflatten([(path, lora)]))
    return lora


def make_full(linear: nn.Linear) -> None:
    """Make one plain linear layer's weight trainable, in float32."""
    linear.__class__ = FullLinear
    linear.original = Original(linear.weight)
    linear.weight = linear.weight.astype(mx.float32)
    linear.unfreeze(keys=["weight"], recurse=False)


def detach(model: nn.Module) -> None:
    """Take the adapter off: the base's own weights are back, and everything is frozen."""
    for path, module in adapted(model).items():
        if isinstance(module, LoRALinear):
            model.update_modules(tree_unflatten([(path, module.linear)]))
        else:
            module.weight = module.original.weight
            module.__class__ = nn.Linear
            del module.original
    model.freeze()


def train_mode(model: nn.Module, on: bool = True) -> None:
    """Switch the LoRA layers' dropout on or off; no other layer changes its mode.

    With dropout on, a compiled step must have ``mx.random.state`` among its inputs and outputs, or
    every step draws the same mask.
    """
    for module in adapted(model).values():
        if isinstance(module, LoRALinear):
            module.dropout.train(on)
