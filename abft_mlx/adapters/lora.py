"""Adapters on a model: put on and taken off, merged, weakened, measured.

An adapter is LoRA layers on W_Q and W_K (mlx-lm's own), or these weights themselves in float32; the
LM head may train, too, and a read-out (:mod:`abft_mlx.read_out`) is part of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import read_out
from abft_mlx.errors import AdapterError
from abft_mlx.ports import Projection, base_linear, head_rows, output_dims, port_for, resolve

if TYPE_CHECKING:
    from abft_mlx.recipe import AdapterSection


@dataclass(frozen=True)
class Original:
    """The base's layer under a :class:`FullLinear`; no module, so that it holds no parameters."""

    module: nn.Module

    @property
    def weight(self) -> mx.array:
        """(outputs, inputs), dequantized if the base is quantized."""
        return head_rows(self.module)


class FullLinear(nn.Linear):
    """A linear layer whose weight trains in float32 and is used in the input's own type.

    Steps of 2e-5 would be rounded away in a bfloat16 weight. Parameter names stay those of
    ``nn.Linear``. An LM head computes in float32: only the last position's logits are ever asked
    for, and the logits of a few tokens, of all tokens and of stock mlx-lm are the same numbers.
    """

    original: Original
    is_head: bool

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer: (..., inputs) to (..., outputs)."""
        x = x.astype(mx.float32) if self.is_head else x
        y = x @ self["weight"].astype(x.dtype).T
        return y + self["bias"] if "bias" in self else y

    def saved_weight(self) -> mx.array:
        """The weight as a file keeps it: as the forward pass used it."""
        return self.weight if self.is_head else self.weight.astype(self.original.weight.dtype)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a dotted path."""
    model.update_modules(tree_unflatten([(path, module)]))


def put_lora(model: nn.Module, path: str, rank: int, scale: float, dropout: float) -> LoRALinear:
    """Wrap one linear layer in mlx-lm's LoRA layer, in evaluation mode."""
    lora = LoRALinear.from_base(resolve(model, path), r=rank, scale=scale, dropout=dropout)
    lora.eval()
    put(model, path, lora)
    return lora


def put_full(model: nn.Module, path: str, *, head: bool = False) -> FullLinear:
    """Make one linear layer's weight trainable in float32; a head's may be quantized."""
    base = resolve(model, path)
    full = FullLinear(1, 1, bias=False)
    full.original, full.is_head = Original(base), head
    full.weight = full.original.weight.astype(mx.float32)
    if "bias" in base:
        full.bias = base.bias
    full.train(base.training)
    full.freeze()
    full.unfreeze(keys=["weight"], recurse=False)
    put(model, path, full)
    return full


def base_of(module: nn.Module) -> nn.Module:
    """The base's layer under an adapter's."""
    return module.linear if isinstance(module, LoRALinear) else module.original.module


def is_quantized(module: nn.Module) -> bool:
    """Whether the base's weight under an adapter's layer is quantized."""
    return "scales" in base_of(module)


def input_dims(module: nn.Module) -> int:
    """Inputs of a linear layer, plain or quantized."""
    linear = base_linear(module)
    packed = int(linear.weight.shape[1])
    return packed * 32 // linear.bits if "scales" in linear else packed


@dataclass(frozen=True)
class Target:
    """One projection that an adapter can train: its layer's index and its full dotted path."""

    layer: int
    path: str
    projection: Projection


def targets(model: nn.Module, layers: list[int] | None = None) -> list[Target]:
    """W_Q and W_K of some layers, or of all, in order.

    Raises:
        AdapterError: a layer number that the model has not, or a layer without softmax attention.
    """
    port = port_for(model)
    projections = {
        n: [Target(n, f"{layer.path}.{part.path}", part) for part in port.layer_projections(layer)]
        for n, layer in enumerate(port.layers(model))
    }
    with_heads = [n for n, parts in projections.items() if parts]
    chosen = with_heads if layers is None else sorted(set(layers))
    unknown = [n for n in chosen if n not in with_heads]
    if unknown or not chosen:
        raise AdapterError(
            f"adapter.layers {unknown or chosen}: this model has attention layers {with_heads[0]} "
            f"to {with_heads[-1]}; name some of those, or leave it out for all"
        )
    return [target for n in chosen for target in projections[n]]


def adapted(model: nn.Module, *, required: bool = False) -> dict[str, nn.Module]:
    """Full path to module for every layer that carries an adapter, in the model's order.

    These are projections of W_Q and W_K and, where it trains, the LM head. Where they are required
    and there are none, that is an AdapterError.
    """

    def by_number(item: tuple[str, nn.Module]) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in item[0].split(".")]

    modules = {
        path: module
        for path, module in sorted(model.named_modules(), key=by_number)
        if isinstance(module, LoRALinear | FullLinear)
    }
    if required and not modules:
        raise AdapterError("this model carries no adapter; attach() or load() one first")
    return modules


def trained_layers(model: nn.Module) -> list[int]:
    """Layers whose W_Q or W_K carries an adapter, in order."""
    changed = adapted(model)
    return sorted({target.layer for target in targets(model) if target.path in changed})


def attach(model: nn.Module, section: AdapterSection, *, seed: int = 0) -> None:
    """Freeze a model and make W_Q and W_K trainable: through LoRA layers, or their weights.

    With ``section.head`` the LM head's own weight trains, too, in float32 whatever the base has.

    The start depends on ``seed`` alone, not on MLX's global random state. LoRA layers start in
    evaluation mode, so that dropout does nothing until :func:`train_mode`. Nothing is evaluated.

    Args:
        model: a loaded model without an adapter.
        section: kind, rank, scale, dropout, layers and head.
        seed: of the random ``lora_a``; ``lora_b`` starts at zero.

    Raises:
        AdapterError: the model has an adapter already, kind "full" on a quantized base, layers
            that do not exist, a rank larger than a projection, or a head that is an embedding.
    """
    if adapted(model):
        raise AdapterError("this model already carries an adapter; detach() it first")
    if section.layers == "auto":
        raise AdapterError(
            "adapter.layers auto is resolved by the census at the start of a run; give layer "
            "numbers, or None for all"
        )
    chosen = targets(model, section.layers)
    head = port_for(model).head_path(model) if section.head else None
    if head is not None and not isinstance(resolve(model, head), nn.Linear | nn.QuantizedLinear):
        raise AdapterError(
            f"adapter.head: this model's LM head is its embedding ({head}), so training it would "
            "change the inputs, too; set adapter.head to false"
        )
    for target in chosen:
        module = resolve(model, target.path)
        most = min(output_dims(module), input_dims(module))
        if section.kind == "lora" and section.rank > most:
            raise AdapterError(
                f"adapter.rank {section.rank}: {target.path} is {output_dims(module)} x "
                f"{input_dims(module)}; use a rank of 1 to {most}"
            )
        if section.kind == "full" and type(module) is not nn.Linear:
            raise AdapterError(
                f"{target.path} is quantized or no plain linear layer, which cannot train in full; "
                "set adapter.kind to lora, or take the unquantized model"
            )
    # A layer's start does not depend on which other layers train.
    paths = [target.path for target in targets(model)]
    keys = dict(zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True))
    model.freeze()
    if head is not None:
        put_full(model, head, head=True)
    for target in chosen:
        if section.kind == "full":
            put_full(model, target.path)
            continue
        lora = put_lora(model, target.path, section.rank, section.scale, section.dropout)
        shape = lora.lora_a.shape
        bound = 1 / math.sqrt(shape[0])
        lora.lora_a = mx.random.uniform(-bound, bound, shape, key=keys[target.path])


def detach(model: nn.Module) -> None:
    """Take the adapter off, a read-out too: the base's own weights are back, and frozen."""
    read_out.detach(model)
    for path, module in adapted(model).items():
        put(model, path, base_of(module))
    model.freeze()


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """The model as its base while the block runs, read-out included; then the adapter is back."""
    modules, head_weights = adapted(model), read_out.detach(model)
    for path, module in modules.items():
        put(model, path, base_of(module))
    try:
        yield
    finally:
        for path, module in modules.items():
            put(model, path, module)
        if head_weights is not None:
            model.read_out = head_weights


def train_mode(model: nn.Module, on: bool = True) -> None:
    """Switch the LoRA layers' dropout on or off.

    A compiled step must then have ``mx.random.state`` among its inputs and outputs, or every step
    draws the same mask.
    """
    for module in adapted(model).values():
        if isinstance(module, LoRALinear):
            module.dropout.train(on)


def gradient_mask(model: nn.Module) -> dict[str, mx.array]:
    """Which entries of a trainable tensor may move, for fused projections.

    Returns:
        Parameter name to a bool mask that broadcasts to it: (1, outputs) for ``lora_b``,
        (outputs, 1) for a weight. Tensors that may move as a whole are left out.
    """
    port, modules = port_for(model), adapted(model)
    layers = port.layers(model)
    masks = {}
    for target in targets(model):
        module = modules.get(target.path)
        outputs = port.qk_outputs(layers[target.layer], target.projection)
        if isinstance(module, LoRALinear) and outputs is not None:
            masks[f"{target.path}.lora_b"] = mx.array(outputs)[None, :]
        elif module is not None and outputs is not None:
            masks[f"{target.path}.weight"] = mx.array(outputs)[:, None]
    return masks


def mask_gradients(model: nn.Module, gradients: Any) -> Any:
    """Zero the gradients of the V parts of fused projections, leaving W_Q, W_K and the LM head.

    A zero gradient from the first step on leaves Adam's moments at zero, so the V part stays
    bit-identical. Weight decay would move it.
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


def scale(model: nn.Module, factor: float) -> None:
    """Multiply the adapter's effect by a factor: 0 is the base, 0.5 half the change, 1 no change.

    Factors multiply: ``scale(model, 0.5)`` twice leaves a quarter. Saving keeps the result.
    """
    for module in adapted(model, required=True).values():
        if isinstance(module, LoRALinear):
            module.scale = module.scale * factor
        else:
            base = module.original.weight.astype(mx.float32)
            module.weight = base + factor * (module.weight - base)


def merge(model: nn.Module, *, dequantize: bool = False) -> None:
    """Put the adapter's change into the weights themselves; the model then carries no adapter.

    A read-out is taken off, too: the LM head answers. The sum is rounded to the base's type.

    Over a quantized base it needs ``dequantize``, which lets projections become plain linear
    layers: quantizing the sum again would lose a small adapter.
    """
    modules = adapted(model, required=True)
    quantized = [path for path, module in modules.items() if is_quantized(module)]
    if quantized and not dequantize:
        raise AdapterError(
            f"{quantized[0]} is quantized, and quantizing the merged weight again would lose part "
            "of the adapter; pass dequantize=True, or keep the adapter beside the base"
        )
    for path, module in modules.items():
        if isinstance(module, LoRALinear):
            plain = module.fuse(dequantize=True)
        else:
            plain = nn.Linear(1, 1, bias=False)
            plain.weight = module.weight.astype(module.original.weight.dtype)
            if "bias" in module:
                plain.bias = module.bias
        put(model, path, plain)
    read_out.detach(model)
    model.freeze()
    mx.eval(model.parameters())


def shift_norms(model: nn.Module) -> dict[str, Any]:
    """Frobenius norms of W' - W, what the adapter changes.

    Queries and keys of a fused projection are counted apart. A LoRA product is never built: its
    norm follows from two rank x rank matrices.

    Returns:
        ``q`` and ``k``: one float per layer, 0 where the adapter leaves a layer alone; ``head``:
        that of the LM head, None where it was not trained.
    """
    modules, port = adapted(model, required=True), port_for(model)
    layers = port.layers(model)
    squares = {"q": [0.0] * len(layers), "k": [0.0] * len(layers)}
    for target in targets(model):
        if target.path not in modules:
            continue
        for part, outputs in port.part_outputs(layers[target.layer], target.projection).items():
            if part in squares:
                square = _square(modules[target.path], mx.array(outputs))
                squares[part][target.layer] += square
    head = modules.get(port.head_path(model))
    norms = {part: [math.sqrt(square) for square in row] for part, row in squares.items()}
    return norms | {"head": None if head is None else math.sqrt(_square(head, slice(None)))}


def _square(module: nn.Module, outputs: slice | mx.array) -> float:
    """Squared Frobenius norm of the change of some of a layer's outputs."""
    if isinstance(module, LoRALinear):
        factors = module.lora_a, module.lora_b[:, outputs]
        a, b = (np.array(f.astype(mx.float32), dtype=np.float64) for f in factors)
        # |A B|² = trace(AᵀA BBᵀ); rounding may leave it a hair below zero.
        return max(0.0, float(((a.T @ a) * (b @ b.T)).sum())) * module.scale**2
    change = module.weight[outputs] - module.original.weight[outputs].astype(mx.float32)
    return float(np.array(change.square().sum(axis=1), dtype=np.float64).sum())
