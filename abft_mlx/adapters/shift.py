"""How far training moved the weights, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.adapters.attach import adapted, targets
from abft_mlx.errors import AdapterError
from abft_mlx.ports import port_for

ROWS_AT_ONCE = 4096


def shift_norms(model: nn.Module) -> dict[str, Any]:
    """Frobenius norms of W' - W, what the adapter changes.

    Queries and keys of a fused projection are counted apart. A LoRA product is never built: its
    norm follows from two rank x rank matrices. All sums are float64. What several layers share
    counts once, as the first's.

    Args:
        model: a model with an adapter.

    Returns:
        ``q`` and ``k``: one float per layer, 0 where the adapter leaves a layer alone; ``head``:
        that of the LM head, None where it was not trained.

    Raises:
        AdapterError: the model carries no adapter.
    """
    modules = adapted(model)
    if not modules:
        raise AdapterError("this model carries no adapter, so nothing has moved; load one first")
    port = port_for(model)
    layers = port.layers(model)
    moved = {"q": [0.0] * len(layers), "k": [0.0] * len(layers)}
    for target in targets(model):
        module = modules.get(target.path)
        if module is None:
            continue
        for part, outputs in port.part_outputs(layers[target.layer], target.projection).items():
            if part in ("q", "k"):
                moved[part][target.layer] += _norm(module, mx.array(outputs)) ** 2
    norms: dict[str, Any] = {
        part: [math.sqrt(one) for one in squares] for part, squares in moved.items()
    }
    norms["head"] = None
    head = modules.get(port.head_path(model))
    if head is not None:
        norms["head"] = _norm(head, slice(None))
    return norms


def _norm(module: nn.Module, outputs: slice | mx.array) -> float:
    """Frobenius norm of the change of some of a layer's outputs."""
    if isinstance(module, LoRALinear):
        a = np.array(module.lora_a.astype(mx.float32), dtype=np.float64)
        b = np.array(module.lora_b[:, outputs].astype(mx.float32), dtype=np.float64)
        # |A B|² = trace(AᵀA BBᵀ); rounding may leave it a hair below zero.
        square = max(0.0, float(((a.T @ a) * (b @ b.T)).sum()))
        return abs(module.scale) * math.sqrt(square)
    weight, base = module.weight[outputs], module.original.weight[outputs]
    square = 0.0
    for start in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        change = _double(weight[rows]) - _double(base[rows])
        square += float((change * change).sum())
    return math.sqrt(square)


def _double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)
