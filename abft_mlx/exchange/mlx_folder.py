"""Adapter folders of stock mlx-lm."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from abft_mlx import adapters
from abft_mlx.adapters.layers import SplitLoRALinear, is_quantized
from abft_mlx.errors import AdapterError


def check(model: nn.Module) -> None:
    """See whether stock mlx-lm can load a model's adapter.

    Raises:
        AdapterError: it cannot; the message says why, and what can.
    """
    modules = adapters.adapted(model)
    full = [path for path, one in modules.items() if isinstance(one, adapters.FullLinear)]
    split = [path for path, one in modules.items() if isinstance(one, SplitLoRALinear)]
    quantized = any(map(is_quantized, modules.values()))
    if quantized and (full or split):
        raise AdapterError(
            f"stock mlx-lm loads no adapter of {(full or split)[0]} on a quantized base: whole "
            "weights have no place there; export --to fused instead"
        )


def save(model: nn.Module, folder: Path, *, base_model: str | None) -> None:
    """Write a model's adapter as stock mlx-lm loads it.

    Args:
        model: with an adapter that :func:`check` lets pass.
        folder: where to.
        base_model: hub id of the base, or None.
    """
    adapters.save(model, folder, base_model=base_model)
