"""Turning an adapter's strength up and down, and merging it into the base."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import read_out
from abft_mlx.adapters.attach import adapted
from abft_mlx.adapters.layers import is_quantized, put
from abft_mlx.errors import AdapterError
from abft_mlx.ports import freeze


def scale(model: nn.Module, factor: float) -> None:
    """Multiply the adapter's effect by a factor: 0 is the base, 0.5 half the change, 1 no change.

    Factors multiply: ``scale(model, 0.5)`` twice leaves a quarter. Saving keeps the result.

    Raises:
        AdapterError: the model carries no adapter.
    """
    for module in _some(model).values():
        if isinstance(module, LoRALinear):
            module.scale = module.scale * factor
        else:
            base = module.original.weight.astype(mx.float32)
            module.weight = base + factor * (module.weight - base)


def merge(model: nn.Module, *, dequantize: bool = False) -> None:
    """Put the adapter's change into the weights themselves; the model then carries no adapter.

    A read-out is taken off, too: the LM head answers.

    The sum is rounded to the base's type. Re-quantizing it would lose a small adapter, so a
    quantized base is refused unless what the adapter trains may become full-precision layers.

    Args:
        model: a model with an adapter.
        dequantize: let quantized projections become plain linear layers.

    Raises:
        AdapterError: no adapter, or a quantized base without ``dequantize``.
    """
    modules = _some(model)
    quantized = [path for path, module in modules.items() if is_quantized(module)]
    if quantized and not dequantize:
        raise AdapterError(
            f"{quantized[0]} is quantized, and quantizing the merged weight again would lose part "
            "of the adapter; pass dequantize=True, or keep the adapter beside the base"
        )
    for path, module in modules.items():
        put(model, path, _merged(module))
    read_out.detach(model)
    freeze(model)
    mx.eval(model.parameters())


def _merged(module: nn.Module) -> nn.Module:
    """The plain linear layer that an adapter's layer amounts to."""
    if isinstance(module, LoRALinear):
        return module.fuse(dequantize=True)
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = module.weight.astype(module.original.weight.dtype)
    if "bias" in module:
        plain.bias = module.bias
    return plain


def _some(model: nn.Module) -> dict[str, nn.Module]:
    modules = adapted(model)
    if not modules:
        raise AdapterError("this model carries no adapter; attach() or load() one first")
    return modules
