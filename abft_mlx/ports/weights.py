"""Finding modules by their dotted paths, and the weights of linear layers of every kind."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def resolve(module: nn.Module, path: str) -> Any:
    """The submodule or attribute at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


def has(module: nn.Module, path: str) -> bool:
    """Whether a dotted path leads somewhere."""
    try:
        return resolve(module, path) is not None
    except (AttributeError, IndexError, KeyError):
        return False


def freeze(model: nn.Module) -> None:
    """Freeze all of a model, whose class may have left its base uninitialised, as RecurrentGemma's.

    Such a model keeps no account of what is frozen until then.
    """
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)
        model.eval()
    model.freeze()


def base_linear(projection: nn.Module) -> nn.Module:
    """The linear layer itself, without a LoRA layer around it."""
    return projection.linear if "linear" in projection else projection


def output_dims(projection: nn.Module | mx.array) -> int:
    """Outputs of a linear layer, plain, quantized or under LoRA, or of its weights alone."""
    if isinstance(projection, mx.array):
        return int(projection.shape[0])
    return int(base_linear(projection).weight.shape[0])


def head_rows(head: nn.Module | mx.array, token_ids: mx.array | None = None) -> mx.array:
    """The head's weights for some tokens.

    Args:
        head: a linear layer or embedding, plain or quantized, or its weights alone.
        token_ids: (C,) rows wanted; None for all.

    Returns:
        (C, width), or (V, width).
    """

    def chosen(array: mx.array) -> mx.array:
        return array if token_ids is None else array[token_ids]

    if isinstance(head, mx.array):
        return chosen(head)
    if "scales" not in head:
        return chosen(head.weight)
    biases = head.get("biases")
    return mx.dequantize(
        chosen(head.weight),
        scales=chosen(head.scales),
        biases=None if biases is None else chosen(biases),
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
    )
