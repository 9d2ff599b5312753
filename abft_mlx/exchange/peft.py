"""Writing adapter folders of PEFT.

LoRA is LoRA in both, turned: lora_A is (rank, inputs), lora_B (outputs, rank), and alpha is scale ·
rank. W_Q and W_K that were trained in full become factors of full rank, one of them the change
itself and the other the identity, which is exact; a trained LM head is one of ``modules_to_save``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import adapters
from abft_mlx.adapters.peft import PREFIX, WEIGHTS, linear_paths, named, transposed, wraps
from abft_mlx.errors import AdapterError
from abft_mlx.files import write_arrays, write_json
from abft_mlx.ports import architecture, port_for


class Factors(NamedTuple):
    """One layer's change, as PEFT keeps it: a (rank, inputs) and b (outputs, rank), float32."""

    a: mx.array
    b: mx.array
    rank: int
    alpha: float  # scale times rank
    dropout: float = 0.0


def check(model: nn.Module) -> dict[str, str]:
    """Our paths of an adapter's layers to transformers'; AdapterError if one is not known."""
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

    ``base_model`` is the hub id of the base that transformers loads, or None.
    """
    names = check(model)
    head = port_for(model).head_path(model)
    tensors: dict[str, mx.array] = {}
    factors: dict[str, Factors] = {}
    saved = []
    for path, module in adapters.adapted(model).items():
        name = names[path]
        if path == head and isinstance(module, adapters.FullLinear):
            saved.append(name)
            tensors[f"{PREFIX}{name}.weight"] = module.weight
            continue
        factors[name] = _factors(module)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors[name].a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors[name].b
    write_arrays(folder / WEIGHTS, tensors, "pt")
    # A wrapper's other towers may have layers whose names end alike.
    every = None if wraps(model) else list(named(model, linear_paths(model)).values())
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": transposed(model),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "target_modules": _targets(list(factors), every),
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }
    write_json(folder / adapters.CONFIG, written | _ranks(factors))


def _factors(module: nn.Module) -> Factors:
    """What one layer adds to its base, as two factors."""
    if isinstance(module, LoRALinear):
        a, b = module.lora_a.astype(mx.float32).T, module.lora_b.astype(mx.float32).T
        rank = a.shape[0]
        return Factors(a, b, rank, module.scale * rank, round(1 - module.dropout._p_1, 9))
    change = module.weight.astype(mx.float32) - module.original.weight.astype(mx.float32)
    rank = min(change.shape)
    a, b = (mx.eye(rank), change) if change.shape[1] == rank else (change, mx.eye(rank))
    return Factors(a, b, rank, float(rank))


def _ranks(factors: dict[str, Factors]) -> dict[str, Any]:
    """The most frequent rank and alpha, and the layers that have others."""
    # Whole numbers are written as such.
    alphas = {n: int(f.alpha) if f.alpha == int(f.alpha) else f.alpha for n, f in factors.items()}
    pairs = Counter((factor.rank, alphas[name]) for name, factor in factors.items())
    rank, alpha = pairs.most_common(1)[0][0] if factors else (8, 8)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((factor.dropout for factor in factors.values()), default=0.0),
        "rank_pattern": {name: f.rank for name, f in factors.items() if f.rank != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
    }


def _targets(names: list[str], every: list[str] | None) -> list[str]:
    """The layers that train: by their ends if no other layer has these, else by whole names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    alike = [name for name in every or () if name.rpartition(".")[2] in ends]
    return ends if set(alike) == set(names) else sorted(names)
