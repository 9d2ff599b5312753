"""Reading adapter folders, ours, mlx-lm's and PEFT's, and putting them on a model they fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx import read_out
from abft_mlx.adapters import peft_reading
from abft_mlx.adapters.attach import detach, input_dims, train_mode
from abft_mlx.adapters.files import CONFIG, FACTORS, WEIGHTS
from abft_mlx.adapters.folder import Folder, is_peft, settings, shapes_of
from abft_mlx.adapters.layers import put_full, put_lora
from abft_mlx.errors import AdapterError
from abft_mlx.ports import base_linear, has, head_counts, output_dims, port_for, resolve

PROBLEMS_SHOWN = 5


def read(model: nn.Module, folder: str | Path) -> Folder:
    """Read an adapter folder's configuration and tensor names, without loading tensors.

    Args:
        model: whose names are used; a PEFT adapter has those of transformers.
        folder: that this package, mlx-lm or PEFT wrote.

    Raises:
        AdapterError: not an adapter folder, files that are broken, or a kind of adapter that
            cannot be used.
    """
    folder = Path(folder)
    written = settings(folder)
    if is_peft(written):
        return peft_reading.read(model, folder, written)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS}; give a folder that abft-mlx finetune or mlx-lm wrote"
        )
    kind = written.get("fine_tune_type", "lora")
    shapes = shapes_of(folder / WEIGHTS)
    if kind not in ("lora", "full"):
        raise AdapterError(
            f"{folder / CONFIG}: fine_tune_type {kind!r} is not supported; use lora or full"
        )
    files = {WEIGHTS: tuple(shapes)}
    if kind == "full" and (folder / FACTORS).is_file():
        # The weights are for stock mlx-lm; what was trained is the LoRA tensors and the head.
        factors = shapes_of(folder / FACTORS)
        merged = {f"{name.rpartition('.')[0]}.weight" for name in factors}
        files = {
            FACTORS: tuple(factors),
            WEIGHTS: tuple(name for name in shapes if name not in merged),
        }
        shapes = factors | {name: shapes[name] for name in files[WEIGHTS]}
        kind = "lora"
    if kind == "full":
        return Folder(folder, kind, 1.0, 0.0, (), files, shapes)
    parameters: Any = written.get("lora_parameters")
    try:
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
        keys = tuple(map(str, parameters.get("keys") or ()))
        if not (math.isfinite(scale) and 0 <= dropout < 1):
            raise ValueError
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG}: lora_parameters {parameters!r} needs a number scale and a dropout "
            "of 0 up to 1"
        ) from error
    return Folder(folder, kind, scale, dropout, keys, files, shapes)


def fitting(model: nn.Module, folder: str | Path) -> Folder:
    """Read an adapter folder and check every name and shape against a model.

    Raises:
        AdapterError: the folder cannot be read, or tensors do not fit: one message names all.
    """
    adapter = read(model, folder)
    problems = _misfits(model, adapter)
    if problems:
        # Of another model all shapes differ, and one says so.
        shapes = [one for one in problems if ": shape (" in one]
        shown = [one for one in problems if one not in shapes[1:]][:PROBLEMS_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise AdapterError(
            f"{adapter.path} does not fit this model ({len(problems)} mismatches): "
            + "; ".join(shown + more)
            + "; use the base model that it was trained on"
        )
    return adapter


def load(model: nn.Module, folder: str | Path) -> None:
    """Put a saved adapter on a model, in place of any that it carries; ready to use or to train.

    Reads what :func:`save`, mlx-lm's LoRA training and PEFT's LoRA write. A trained LM head takes
    the place of the base's, quantized or not. Nothing changes on an error.

    Args:
        model: a loaded base model.
        folder: an adapter or run folder.

    Raises:
        AdapterError: the folder cannot be read, or tensors do not fit: one message names all.
    """
    adapter = fitting(model, folder)
    loaded = adapter.tensors()
    head_weights = read_out.read(adapter.path, head_counts(model))
    head = port_for(model).head_path(model)
    detach(model)
    for path in adapter.modules:
        if f"{path}.weight" in loaded:
            full = put_full(model, path, head=path == head)
            full.weight = loaded[f"{path}.weight"].astype(mx.float32)
        else:
            rank = adapter.shapes[f"{path}.lora_a"][1]
            lora = put_lora(model, path, rank, adapter.scale, adapter.dropout)
            lora.lora_a = loaded[f"{path}.lora_a"].astype(mx.float32)
            lora.lora_b = loaded[f"{path}.lora_b"].astype(mx.float32)
    if head_weights is not None:
        read_out.attach(model, head_weights)
    train_mode(model, False)


def _misfits(model: nn.Module, adapter: Folder) -> list[str]:
    """Every name and shape of an adapter that the model has no place for."""
    if not adapter.shapes:
        return [f"{WEIGHTS} holds no tensors"]
    head = port_for(model).head_path(model)
    problems = []
    ranks: dict[str, int] = {}
    for name, shape in sorted(adapter.shapes.items()):
        path, _, leaf = name.rpartition(".")
        leaves = ("weight",) if adapter.kind == "full" else ("lora_a", "lora_b")
        module = resolve(model, path) if path and has(model, path) else None
        linear = None if module is None else base_linear(module)
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            problems.append(f"{name}: the model has no linear layer {path!r}")
            continue
        if leaf not in leaves and not (path == head and leaf == "weight"):
            problems.append(f"{name}: not a {adapter.kind} tensor ({' or '.join(leaves)})")
            continue
        if leaf == "weight" and "scales" in linear and path != head:
            problems.append(f"{name}: the model's {path} is quantized")
            continue
        if leaf == "weight" and f"{path}.lora_a" in adapter.shapes:
            problems.append(f"{name}: there are LoRA tensors of {path}, too")
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
        elif ranks.setdefault(path, rank) != rank:
            problems.append(f"{path}: lora_a has rank {ranks[path]}, lora_b {rank}")
    if adapter.kind == "lora":
        problems += _unpaired(adapter)
    return problems


def _unpaired(adapter: Folder) -> list[str]:
    """Tensors that are missing: a half of a pair, or all of a layer that the keys name."""
    paths = {n.rpartition(".")[0] for n in adapter.shapes if not n.endswith(".weight")}
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
