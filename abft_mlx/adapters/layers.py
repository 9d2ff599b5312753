"""The layers that an adapter puts into a model, each beside what it replaced."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.ports import head_rows, output_dims, resolve


@dataclass(frozen=True)
class Original:
    """A layer as it was before training.

    Attributes:
        module: holds the base's weight, and is what the model gets back.
    """

    module: nn.Module

    @property
    def quantized(self) -> bool:
        """Whether the base's weight is quantized."""
        return "scales" in self.module

    @property
    def weight(self) -> mx.array:
        """(outputs, inputs), dequantized where it has to be."""
        return head_rows(self.module)


class FullLinear(nn.Linear):
    """A linear layer whose weight trains in float32 and is used in the input's own type.

    Steps of 2e-5 would be rounded away in a bfloat16 weight. Parameter names stay those of
    ``nn.Linear``. ``original`` is no parameter: it is what :func:`put_back` puts back.
    """

    original: Original

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer: (..., inputs) to (..., outputs)."""
        y = x @ self["weight"].astype(x.dtype).T
        return y + self["bias"] if "bias" in self else y

    def saved_weight(self) -> mx.array:
        """The weight as a file keeps it: in the base's type, which the forward pass used."""
        return self.weight.astype(self.original.weight.dtype)


class HeadLinear(FullLinear):
    """The LM head in full precision: a float32 weight gives float32 logits.

    Only the last position's logits are ever computed, so the precision costs little, and the
    logits of a few tokens, of all tokens and of stock mlx-lm are the same numbers.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the head: (..., width) to (..., V) float32."""
        y = x.astype(mx.float32) @ self["weight"].T
        return y + self["bias"] if "bias" in self else y

    def saved_weight(self) -> mx.array:
        """The weight as a file keeps it: float32."""
        return self.weight


class SplitLoRALinear(LoRALinear):
    """LoRA around a linear layer that gives its outputs in several arrays, as AFM 7's does.

    mlx-lm has a LoRA layer for it, whose tensors its own loader refuses.
    """

    def __call__(self, x: mx.array) -> tuple[mx.array, ...]:
        """Apply the layer: (..., inputs) to one (..., outputs) each."""
        change = self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)
        parts = change.astype(x.dtype).split(self.linear.indices, axis=-1)
        return tuple(base + part for base, part in zip(self.linear(x), parts, strict=True))

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The layer that it amounts to, of the base's own kind."""
        own = self.linear.to_lora(r=1, scale=self.scale)
        own.lora_b = self.lora_b.split(self.linear.indices, axis=-1)
        own.lora_a = [self.lora_a] * len(own.lora_b)
        return own.fuse(dequantize)


def is_split(module: nn.Module) -> bool:
    """Whether a linear layer gives its outputs in several arrays."""
    return hasattr(module, "indices")


def is_quantized(module: nn.Module) -> bool:
    """Whether the base's weight under an adapter's layer is quantized."""
    if isinstance(module, LoRALinear):
        return "scales" in module.linear
    return isinstance(module, FullLinear) and module.original.quantized


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a dotted path."""
    model.update_modules(tree_unflatten([(path, module)]))


def put_lora(model: nn.Module, path: str, rank: int, scale: float, dropout: float) -> LoRALinear:
    """Wrap one linear layer in mlx-lm's LoRA layer, in evaluation mode."""
    base = resolve(model, path)
    if is_split(base):
        lora = SplitLoRALinear(base.input_dims, output_dims(base), rank, dropout, scale)
        lora.linear = base
    else:
        lora = LoRALinear.from_base(base, r=rank, scale=scale, dropout=dropout)
    lora.eval()
    put(model, path, lora)
    return lora


def put_full(model: nn.Module, path: str, *, head: bool = False) -> FullLinear:
    """Make one linear layer's weight trainable, in float32.

    Args:
        model: the model.
        path: of a plain linear layer; a head's may be quantized, and is dequantized.
        head: whether it is the LM head.
    """
    base = resolve(model, path)
    full = (HeadLinear if head else FullLinear)(1, 1, bias=False)
    full.original = Original(base)
    full.weight = full.original.weight.astype(mx.float32)
    if "bias" in base:
        full.bias = base.bias
    full.train(base.training)
    full.freeze()
    full.unfreeze(keys=["weight"], recurse=False)
    put(model, path, full)
    return full


def put_back(model: nn.Module, path: str, module: nn.Module) -> None:
    """Give the model back the layer that an adapter's layer stands for."""
    put(model, path, module.linear if isinstance(module, LoRALinear) else module.original.module)
