"""Adapter folders: the two files that stock mlx-lm, and this package, load.

``adapters.safetensors`` holds only what was trained, under full parameter names, and
``adapter_config.json`` is mlx-lm's. LoRA tensors are float32; full W_Q/W_K weights have the base's
own type, which is what the forward pass used. Neither file holds a local path.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.adapters.attach import (
    adapted,
    detach,
    input_dims,
    make_full,
    put_lora,
    train_mode,
)
from abft_mlx.adapters.headers import read_header
from abft_mlx.errors import AdapterError, OutputError
from abft_mlx.files import replacing, write_failure, write_json
from abft_mlx.ports import base_linear, has, output_dims, port_for, resolve

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
PROBLEMS_SHOWN = 20


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """What the adapter consists of: parameter name to tensor, as it is saved."""
    found = {}
    for path, module in adapted(model).items():
        if isinstance(module, LoRALinear):
            found[f"{path}.lora_a"] = module.lora_a.astype(mx.float32)
            found[f"{path}.lora_b"] = module.lora_b.astype(mx.float32)
        else:
            found[f"{path}.weight"] = module.weight.astype(module.original.weight.dtype)
    return found


def config(model: nn.Module, base_model: str | None = None) -> dict[str, Any]:
    """The adapter's ``adapter_config.json``, as mlx-lm reads it.

    Args:
        model: a model with an adapter.
        base_model: the base's hub id; anything that is a local path is left out.
    """
    modules = adapted(model)
    n_layers = len(port_for(model).layers(model))
    name = base_model if base_model and _is_hub_name(base_model) else None
    written: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": n_layers}
    if name is not None:
        written["model"] = name
    lora = [module for module in modules.values() if isinstance(module, LoRALinear)]
    if not lora:
        return written | {"fine_tune_type": "full"}
    return written | {
        "lora_parameters": {
            "keys": list(modules),
            "rank": lora[0].lora_a.shape[1],
            "scale": lora[0].scale,
            "dropout": round(1 - lora[0].dropout._p_1, 9),
        }
    }


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def save(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapter so that ``mlx_lm.load(model, adapter_path=folder)`` gives this model.

    Each file is written under a temporary name and renamed.

    Args:
        model: a model with an adapter.
        folder: made if it does not exist.
        base_model: hub id of the base, for people who find the folder; local paths are not kept.

    Raises:
        AdapterError: the model carries no adapter.
        OutputError: the folder cannot be written.
    """
    if not adapted(model):
        raise AdapterError("this model carries no adapter, so there is nothing to save")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    with replacing(folder / WEIGHTS) as temporary:
        try:
            mx.save_safetensors(str(temporary), tensors(model), {"format": "mlx"})
        except RuntimeError as error:
            raise OutputError(
                f"{folder / WEIGHTS}: cannot be written ({error}); choose another folder"
            ) from error
    write_json(folder / CONFIG, config(model, base_model))


@dataclass(frozen=True)
class Folder:
    """An adapter folder's contents, read and understood but not yet fitted to a model."""

    path: Path
    kind: str
    scale: float
    dropout: float
    keys: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


def read(folder: str | Path) -> Folder:
    """Read an adapter folder's configuration and tensor names, without loading tensors.

    Raises:
        AdapterError: not an adapter folder, files that are broken, or another program's format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder} has no {name}; give a folder that abft-mlx finetune or mlx-lm wrote"
            )
    try:
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read as JSON: {error}") from error
    if not isinstance(written, dict) or "peft_type" in written:
        what = "a PEFT adapter" if isinstance(written, dict) else "not a table"
        raise AdapterError(f"{folder / CONFIG} is {what}; give an mlx-lm adapter folder")
    try:
        header = read_header(folder / WEIGHTS)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / WEIGHTS} is broken: {error}; train or copy it again"
        ) from error
    kind = written.get("fine_tune_type", "lora")
    if kind not in ("lora", "full"):
        raise AdapterError(
            f"{folder / CONFIG}: fine_tune_type {kind!r} is not supported; use lora or full"
        )
    if kind == "full":
        return Folder(folder, kind, 1.0, 0.0, (), shapes)
    parameters: Any = written.get("lora_parameters")
    try:
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
        keys = tuple(map(str, parameters.get("keys") or ()))
        if not (math.isfinite(scale) and 0 <= dropout < 1):
            raise ValueError
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG}: lora_parameters {parameters!r} needs a number scale and a dropout "
            "of 0 up to 1"
        ) from error
    return Folder(folder, kind, scale, dropout, keys, shapes)


def load(model: nn.Module, folder: str | Path) -> None:
    """Put a saved adapter on a model, in place of any that it carries; ready to use or to train.

    Reads what :func:`save` and mlx-lm's LoRA training write. Nothing changes on an error.

    Args:
        model: a loaded base model.
        folder: an adapter or run folder.

    Raises:
        AdapterError: the folder cannot be read, or tensors do not fit: one message names all.
    """
    adapter = read(folder)
    problems = _misfits(model, adapter)
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise AdapterError(
            f"{adapter.path} does not fit this model ({len(problems)} mismatches): "
            + "; ".join(shown + more)
            + "; use the base model that it was trained on"
        )
    loaded: Any = mx.load(str(adapter.path / WEIGHTS))
    mx.eval(loaded)
    detach(model)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in adapter.shapes):
        if adapter.kind == "full":
            module = resolve(model, path)
            make_full(module)
            module.weight = loaded[f"{path}.weight"].astype(mx.float32)
        else:
            rank = adapter.shapes[f"{path}.lora_a"][1]
            lora = put_lora(model, path, rank, adapter.scale, adapter.dropout)
            lora.lora_a = loaded[f"{path}.lora_a"].astype(mx.float32)
            lora.lora_b = loaded[f"{path}.lora_b"].astype(mx.float32)
    train_mode(model, False)


def _misfits(model: nn.Module, adapter: Folder) -> list[str]:
    """Every name and shape of an adapter that the model has no place for."""
    if not adapter.shapes:
        return [f"{WEIGHTS} holds no tensors"]
    leaves = ("weight",) if adapter.kind == "full" else ("lora_a", "lora_b")
    problems = []
    ranks: dict[str, int] = {}
    for name, shape in sorted(adapter.shapes.items()):
        path, _, leaf = name.rpartition(".")
        module = resolve(model, path) if path and has(model, path) else None
        linear = None if module is None else base_linear(module)
        if leaf not in leaves:
            problems.append(f"{name}: not a {adapter.kind} tensor ({' or '.join(leaves)})")
            continue
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            problems.append(f"{name}: the model has no linear layer {path!r}")
            continue
        if leaf == "weight" and "scales" in linear:
            problems.append(f"{name}: the model's {path} is quantized")
            continue
        outputs, inputs = output_dims(linear), input_dims(linear)
        rank = shape[1 if leaf == "lora_a" else 0] if len(shape) == 2 else 0
        expected = {
            "weight": (outputs, inputs),
            "lora_a": (inputs, rank),
            "lora_b": (rank, outputs),
        }[leaf]
        if tuple(shape) != expected:
            problems.append(f"{name}: shape {tuple(shape)}, the model needs {expected}")
        elif leaf != "weight" and ranks.setdefault(path, rank) != rank:
            problems.append(f"{path}: lora_a has rank {ranks[path]}, lora_b {rank}")
    if adapter.kind == "lora":
        problems += _unpaired(adapter)
    return problems


def _unpaired(adapter: Folder) -> list[str]:
    """Tensors that are missing: a half of a pair, or all of a layer that the keys name."""
    paths = {name.rpartition(".")[0] for name in adapter.shapes}
    missing = [
        f"{path}.{leaf}: missing from {WEIGHTS}"
        for path in sorted(paths)
        for leaf in ("lora_a", "lora_b")
        if f"{path}.{leaf}" not in adapter.shapes
    ]
    return missing + [
        f"{key}: named in {CONFIG}, but {WEIGHTS} has no tensors for it"
        for key in adapter.keys
        if key not in paths and not any(path.endswith(f".{key}") for path in paths)
    ]
