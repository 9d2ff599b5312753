"""Several adapters on one model at once, each with a factor: a point in the space of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from abft_mlx.adapters.attach import detach
from abft_mlx.adapters.folder import Folder
from abft_mlx.adapters.layers import put_full, put_lora
from abft_mlx.adapters.reading import fitting
from abft_mlx.errors import AdapterError
from abft_mlx.ports import port_for


def combine(model: nn.Module, adapters: Sequence[tuple[str | Path, float]]) -> None:
    """Give a model the weights θ0 + Σ factor · (θ - θ0), where θ are those that an adapter gives.

    W_Q and W_K stay LoRA layers where all adapters that change them are LoRA: their ranks are
    laid side by side, which is exact. Elsewhere, and in the LM head, the weights themselves are
    added up in float32. Takes the place of any adapter that the model carries; nothing changes on
    an error. The result can be saved, scaled and merged as any adapter.

    Args:
        model: a loaded base model.
        adapters: adapter or run folders, each with its factor: 0 leaves it out, 1 is the adapter
            as it was trained, others lie between, beyond or on the far side of the base.

    Raises:
        AdapterError: no adapters, a factor that is not a finite number, or a folder that cannot be
            read or does not fit.
    """
    if not adapters:
        raise AdapterError("no adapters to combine; give at least one folder with its factor")
    for path, factor in adapters:
        if not math.isfinite(factor):
            raise AdapterError(f"factor {factor} of {path}: give a finite number, such as 0.5")
    parts = [_Part(fitting(model, path), factor) for path, factor in adapters]
    detach(model)
    head = port_for(model).head_path(model)
    paths = list(dict.fromkeys(path for part in parts for path in part.folder.modules))
    lora = [path for path in paths if not any(part.has(path, "weight") for part in parts)]
    # One rank everywhere: mlx-lm's configuration has room for one only.
    rank = max((sum(part.rank(path) for part in parts) for path in lora), default=0)
    for path in paths:
        if path in lora:
            _put_side_by_side(model, path, [one for one in parts if one.rank(path)], rank)
            continue
        full = put_full(model, path, head=path == head)
        base = full.weight
        full.weight = base + sum(part.change(path, base) for part in parts)
    mx.eval(model.parameters())


class _Part:
    """One adapter of a combination.

    Attributes:
        folder: what was read of it.
        factor: how much of it is wanted.
    """

    def __init__(self, folder: Folder, factor: float) -> None:
        self.folder = folder
        self.factor = factor
        self._tensors = folder.tensors()

    def has(self, path: str, leaf: str) -> bool:
        return f"{path}.{leaf}" in self._tensors

    def rank(self, path: str) -> int:
        """Rank of its LoRA there, 0 without one."""
        return int(self[path, "lora_a"].shape[1]) if self.has(path, "lora_a") else 0

    def __getitem__(self, key: tuple[str, str]) -> mx.array:
        return self._tensors[".".join(key)].astype(mx.float32)

    def change(self, path: str, base: mx.array) -> mx.array | float:
        """The change of one layer, its factor in it: (outputs, inputs), 0 where it has none."""
        if self.has(path, "weight"):
            return self.factor * (self[path, "weight"] - base)
        if self.has(path, "lora_a"):
            product = self[path, "lora_a"] @ self[path, "lora_b"]
            return (self.factor * self.folder.scale) * product.T
        return 0.0


def _put_side_by_side(model: nn.Module, path: str, parts: list[_Part], rank: int) -> None:
    """One LoRA layer of scale 1 that does what several do, filled up with zeros to a rank."""
    lora = put_lora(model, path, rank, 1.0, 0.0)
    inputs, outputs = lora.lora_a.shape[0], lora.lora_b.shape[1]
    left = [part[path, "lora_a"] for part in parts]
    right = [(part.factor * part.folder.scale) * part[path, "lora_b"] for part in parts]
    missing = rank - sum(one.shape[1] for one in left)
    lora.lora_a = mx.concatenate([*left, mx.zeros((inputs, missing))], axis=1)
    lora.lora_b = mx.concatenate([*right, mx.zeros((missing, outputs))], axis=0)
