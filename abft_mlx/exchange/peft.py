"""Adapter folders of PEFT.

LoRA is LoRA in both, turned: lora_A is (rank, inputs), lora_B (outputs, rank), and alpha is scale ·
rank. That holds for fused projections, too, whose V part is zero in lora_B. W_Q and W_K that were
trained in full become factors of full rank, one of them the change itself and the other the
identity, which is exact; a trained LM head is one of ``modules_to_save``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import adapters
from abft_mlx.adapters.peft import PREFIX, WEIGHTS, linear_paths, named, transposed, wraps
from abft_mlx.errors import AdapterError, OutputError
from abft_mlx.files import replacing, write_json
from abft_mlx.ports import architecture, port_for


@dataclass(frozen=True)
class Factors:
    """One layer's change, as PEFT keeps it.

    Attributes:
        a: (rank, inputs) float32.
        b: (outputs, rank) float32.
        alpha: scale times rank.
        dropout: before a.
    """

    a: mx.array
    b: mx.array
    alpha: float
    dropout: float

    @property
    def rank(self) -> int:
        """Rows of a, columns of b."""
        return int(self.a.shape[0])


def check(model: nn.Module) -> dict[str, str]:
    """What transformers calls the layers of a model's adapter.

    Returns:
        Our path to transformers' path.

    Raises:
        AdapterError: that is not known of one of them.
    """
    paths = list(adapters.adapted(model))
    names = named(model, paths)
    unknown = [path for path in paths if path not in names]
    if unknown:
        raise AdapterError(
            f"transformers' name of {unknown[0]} in a {architecture(model)} model, which PEFT "
            "needs, is not known; export --to mlx or --to fused instead"
        )
    return names


def save(model: nn.Module, folder: Path, *, base_model: str | None) -> None:
    """Write a model's adapter so that ``PeftModel.from_pretrained(base, folder)`` gives this model.

    Args:
        model: a model with an adapter.
        folder: where to; it exists.
        base_model: hub id of the base that transformers loads, or None.

    Raises:
        AdapterError: as :func:`check`.
        OutputError: the folder cannot be written.
    """
    names = check(model)
    head = port_for(model).head_path(model)
    modules = adapters.adapted(model)
    tensors: dict[str, mx.array] = {}
    factors: dict[str, Factors] = {}
    saved = []
    for path, module in modules.items():
        if path == head and isinstance(module, adapters.FullLinear):
            saved.append(names[path])
            tensors[f"{PREFIX}{names[path]}.weight"] = module.weight
            continue
        one = _factors(module)
        factors[names[path]] = one
        tensors[f"{PREFIX}{names[path]}.lora_A.weight"] = one.a
        tensors[f"{PREFIX}{names[path]}.lora_B.weight"] = one.b
    # A wrapper's other towers may have layers whose names end alike.
    every = None if wraps(model) else list(named(model, linear_paths(model)).values())
    with replacing(folder / WEIGHTS) as temporary:
        try:
            mx.save_safetensors(str(temporary), tensors, {"format": "pt"})
        except RuntimeError as error:
            raise OutputError(f"{folder}: cannot be written ({error})") from error
    written = _config(factors, saved, every) | {
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": transposed(model),
    }
    write_json(folder / adapters.CONFIG, written)


def _factors(module: nn.Module) -> Factors:
    """What one layer adds to its base, as two factors."""
    if isinstance(module, LoRALinear):
        a, b = module.lora_a.astype(mx.float32).T, module.lora_b.astype(mx.float32).T
        return Factors(a, b, module.scale * a.shape[0], round(1 - module.dropout._p_1, 9))
    change = module.weight.astype(mx.float32) - module.original.weight.astype(mx.float32)
    outputs, inputs = change.shape
    if inputs <= outputs:
        return Factors(mx.eye(inputs), change, float(inputs), 0.0)
    return Factors(change, mx.eye(outputs), float(outputs), 0.0)


def _config(
    factors: dict[str, Factors], saved: list[str], every: list[str] | None
) -> dict[str, Any]:
    """PEFT's LoraConfig.

    Args:
        factors: transformers' name of a layer to its change.
        saved: names of layers that were trained in full.
        every: names of all linear layers of the model; None where not all are known.
    """
    rank, alpha = 8, 8.0
    if factors:
        pairs = Counter((one.rank, one.alpha) for one in factors.values())
        rank, alpha = pairs.most_common(1)[0][0]
    dropouts = {one.dropout for one in factors.values()} or {0.0}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": max(dropouts),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **_targets(list(factors), every),
        "modules_to_save": saved or None,
        "rank_pattern": {name: one.rank for name, one in factors.items() if one.rank != rank},
        "alpha_pattern": {
            name: _plain(one.alpha) for name, one in factors.items() if one.alpha != alpha
        },
        "revision": None,
    }


def _targets(names: list[str], every: list[str] | None) -> dict[str, Any]:
    """The layers that train: by their ends where that says the same, else by their whole names."""
    whole = {"target_modules": sorted(names), "layers_to_transform": None, "layers_pattern": None}
    if every is None:
        return whole
    ends = sorted({name.rpartition(".")[2] for name in names})
    numbers = sorted({number for name in names if (number := _number(name)) is not None})
    alike = [name for name in every if name.rpartition(".")[2] in ends]
    if set(alike) == set(names):
        return whole | {"target_modules": ends}
    within = {name for name in alike if _number(name) in numbers}
    lists = {_list(name) for name in names}
    if within == set(names) and len(lists) == 1 and None not in lists:
        return {
            "target_modules": ends,
            "layers_to_transform": numbers,
            "layers_pattern": lists.pop(),
        }
    return whole


def _number(name: str) -> int | None:
    """The layer's number in a name: its first."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _list(name: str) -> str | None:
    """What stands before the layer's number, such as ``layers`` or ``h``."""
    parts = name.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return parts[first - 1] if first else None


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
