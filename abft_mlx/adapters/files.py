"""Adapter folders: found, read, put on a model, combined, saved.

``adapters.safetensors`` holds only what was trained, under full parameter names, and
``adapter_config.json`` is mlx-lm's. LoRA tensors and the LM head are float32; full W_Q/W_K weights
have the base's own type, which is what the forward pass used. No file holds a local path.

Stock mlx-lm takes LoRA tensors or weights from a folder, never both. LoRA with a trained LM head is
therefore written as weights, LoRA merged in, and the LoRA tensors themselves lie beside them in
``lora.safetensors``, which only this package reads, as it alone reads the head weights of a
read-out. A quantized base has no place for such weights: there the LoRA tensors and the head share
``adapters.safetensors``, this package puts a full-precision head in the quantized one's place, and
stock mlx-lm refuses the folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import hub, read_out
from abft_mlx.adapters import peft
from abft_mlx.adapters.lora import (
    adapted,
    detach,
    input_dims,
    is_quantized,
    put_full,
    put_lora,
    train_mode,
)
from abft_mlx.errors import AdapterError, RunError, first_few
from abft_mlx.files import (
    is_path,
    parse_json,
    tensor_shapes,
    write_arrays,
    write_failure,
    write_json,
)
from abft_mlx.ports import base_linear, has, head_counts, output_dims, port_for, resolve

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
FACTORS = "lora.safetensors"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Exact names, so that nothing else that a repository holds comes along, code least of all.
FETCHED = (
    WEIGHTS, peft.WEIGHTS, CONFIG, FACTORS, read_out.FILE, "recipe.yaml", "run.json",
    "demonstrations.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An adapter that has been found; as text it is the name it was asked for by."""

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name


Named: TypeAlias = str | Path | Source


def find(adapter: Named) -> Source:
    """Find an adapter: a folder that exists wins, then ``owner/name`` or ``owner/name@revision``.

    Raises:
        AdapterError: neither a folder nor an adapter on the hub that may be read.
        RunError: the hub cannot be reached or fails, and the cache has no copy.
    """
    if isinstance(adapter, Source):
        return adapter
    name = str(adapter)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(name, folder)
    if folder.exists():
        raise AdapterError(f"adapter {name} is a file; give the folder that it is in")
    split = hub.split_revision(name)
    if split is None or is_path(name):
        raise AdapterError(
            f"adapter {name!r}: no such folder; give a run folder, or a hub id like owner/name or "
            "owner/name@revision"
        )
    identity, revision = split
    request = hub.Request(
        f"adapter {identity}",
        f"adapter {name!r} is neither a folder here nor a repository of the hub that you may read",
        "give a run folder",
        revision,
    )
    try:
        folder = hub.snapshot(identity, FETCHED, revision=revision)
    except Exception as error:
        failure = hub.explain(error, request)
        raise (AdapterError if failure.refused else RunError)(failure.message) from error
    if not folder.is_dir() or not any(folder.iterdir()):
        raise AdapterError(f"adapter {name}: the repository holds no adapter (no {CONFIG})")
    return Source(name, folder)


def local_folder(adapter: Named) -> Path:
    """The folder of an adapter's files; as :func:`find`."""
    return find(adapter).folder


def base_model(folder: str | Path) -> str | None:
    """The base that an adapter folder's configuration names, or None."""
    written = _config(Path(folder))
    name = written.get("base_model_name_or_path" if "peft_type" in written else "model")
    return name if isinstance(name, str) and name else None


@dataclass(frozen=True)
class Folder:
    """An adapter folder's contents as mlx-lm would have them, whichever program wrote it.

    Attributes:
        path: the folder.
        scale: of the LoRA tensors.
        dropout: of the LoRA layers.
        tensors: parameter name to tensor, not evaluated yet.
    """

    path: Path
    scale: float
    dropout: float
    tensors: dict[str, mx.array]

    @property
    def modules(self) -> list[str]:
        """Paths of the layers that the adapter changes, in the files' order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))


def _read(model: nn.Module, folder: Path) -> Folder:
    """Read an adapter folder that abft-mlx, mlx-lm or PEFT wrote; shapes are not checked."""
    written = _config(folder)
    if "peft_type" in written:
        return _read_peft(model, folder, written)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder} has no {WEIGHTS}; give a folder that abft-mlx finetune or mlx-lm wrote"
        )
    kind, tensors = written.get("fine_tune_type", "lora"), _tensors(folder / WEIGHTS)
    if kind not in ("lora", "full"):
        raise AdapterError(
            f"{folder / CONFIG}: fine_tune_type {kind!r} is not supported; use lora or full"
        )
    if kind == "full" and (folder / FACTORS).is_file():
        # The weights are for stock mlx-lm; what was trained is the LoRA tensors and the head.
        factors = _tensors(folder / FACTORS)
        merged = {f"{name.rpartition('.')[0]}.weight" for name in factors}
        tensors = factors | {n: tensor for n, tensor in tensors.items() if n not in merged}
    if all(name.endswith(".weight") for name in tensors):
        return Folder(folder, 1.0, 0.0, tensors)
    parameters: Any = written.get("lora_parameters")
    try:
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
        if not (math.isfinite(scale) and 0 <= dropout < 1):
            raise ValueError
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise AdapterError(
            f"{folder / CONFIG}: lora_parameters {parameters!r} needs a number scale and a dropout "
            "of 0 up to 1"
        ) from error
    return Folder(folder, scale, dropout, tensors)


def _config(folder: Path) -> dict[str, Any]:
    """The content of an adapter folder's ``adapter_config.json``, mlx-lm's or PEFT's."""
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(
            f"{folder} has no {CONFIG}; give a folder that abft-mlx finetune, mlx-lm or PEFT wrote"
        )
    try:
        written = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(written, dict):
        raise AdapterError(f"{path} is not a table; give a folder that mlx-lm or PEFT wrote")
    return written


def _tensors(path: Path) -> dict[str, mx.array]:
    """Tensors of a safetensors file that is whole; they are read when they are used."""
    try:
        tensor_shapes(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is broken: {error}; train or copy it again") from error
    return dict(sorted(mx.load(str(path)).items()))


def _read_peft(model: nn.Module, folder: Path, written: dict[str, Any]) -> Folder:
    """Read a PEFT folder: its tensors mapped to the model's layers, and turned.

    PEFT keeps lora_A as (rank, inputs) and lora_B as (outputs, rank). Ranks and alphas may differ
    between layers there. mlx-lm has one rank and one scale for all, so factors are filled up with
    zeros and carry their part of the scale, which changes nothing of what they do.
    """
    settings, file = peft.Settings.parse(written, folder / CONFIG), folder / peft.WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        instead = " but adapter_model.bin, which is not opened because it can run code" * pickled
        raise AdapterError(
            f"{folder} has no {peft.WEIGHTS}{instead}; save the adapter with PEFT's save_pretrained"
        )
    paths, head = peft.linear_paths(model), port_for(model).head_path(model)
    own_paths = {name: path for path, name in peft.named(model, paths).items()}
    leaves = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".weight": "weight"}
    layers: dict[str, dict[str, mx.array]] = {}
    names: dict[str, str] = {}
    problems = []
    for source, tensor in _tensors(file).items():
        ending = next((leaf for leaf in leaves if source.endswith(leaf)), "")
        name = source.removeprefix(peft.PREFIX).removesuffix(ending)
        path = own_paths.get(name) or peft.ending_alike(name, paths)
        if path is None or not ending or (ending == ".weight" and path != head):
            problems.append(f"{source}: this model has no place for it")
        elif names.setdefault(path, name) != name:
            problems.append(f"{source}: {names[path]} is the same layer of this model")
        else:
            layers.setdefault(path, {})[leaves[ending]] = tensor
    lora: dict[str, tuple[mx.array, mx.array]] = {}
    fitted = {}
    for path, tensors in layers.items():
        rank, a, b = settings.rank(names[path]), tensors.get("lora_a"), tensors.get("lora_b")
        if set(tensors) == {"weight"}:
            fitted[f"{path}.weight"] = tensors["weight"]
        elif len(tensors) == 2 and a is not None and b is not None:
            lora[path] = a, b
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
                problems.append(
                    f"{names[path]}: lora_A {a.shape} and lora_B {b.shape} are not of the rank "
                    f"{rank} in {CONFIG}"
                )
        else:
            problems.append(f"{names[path]}: needs lora_A and lora_B, has {', '.join(tensors)}")
    _refuse(folder, problems)
    scales = {path: settings.scale(names[path]) for path in lora}
    common = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    most = max((settings.rank(names[path]) for path in lora), default=0)
    for path, (a, b) in lora.items():
        missing = most - a.shape[0]
        factor = scales[path] / common if common else 0.0
        fitted[f"{path}.lora_a"] = mx.pad(a.astype(mx.float32).T, [(0, 0), (0, missing)])
        fitted[f"{path}.lora_b"] = mx.pad(b.astype(mx.float32).T, [(0, missing), (0, 0)]) * factor
    return Folder(folder, common, settings.lora_dropout, fitted)


def _refuse(folder: Path, problems: list[str]) -> None:
    """Raise an error that shows a few of the problems, if there are any."""
    if problems:
        raise AdapterError(
            f"{folder} does not fit this model ({len(problems)} mismatches): "
            f"{first_few(problems, '; ')}; use the base model that it was trained on"
        )


def _fitting(model: nn.Module, folder: str | Path) -> Folder:
    """Read an adapter folder and check every name and shape against a model."""
    adapter = _read(model, Path(folder))
    head = port_for(model).head_path(model)
    problems = [] if adapter.tensors else [f"{WEIGHTS} holds no tensors"]
    for path in sorted(adapter.modules):
        shapes = {
            name.rpartition(".")[2]: tensor.shape
            for name, tensor in adapter.tensors.items()
            if name.rpartition(".")[0] == path
        }
        linear = base_linear(resolve(model, path)) if path and has(model, path) else None
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            problems.append(f"the model has no linear layer {path!r}")
            continue
        outputs, inputs = output_dims(linear), input_dims(linear)
        rank = (shapes.get("lora_a") or (0,))[-1]
        fits: dict[str, tuple[int, ...]] = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
        if "weight" in shapes:
            fits = {"weight": (outputs, inputs)}
        if shapes != fits:
            problems.append(f"{path}: shapes {shapes}, the model needs {fits}")
        elif "weight" in shapes and "scales" in linear and path != head:
            problems.append(f"{path}: a weight, but the model's is quantized")
    _refuse(adapter.path, problems)
    mx.eval(adapter.tensors)
    return adapter


def load(model: nn.Module, folder: str | Path) -> None:
    """Put a saved adapter on a model, in place of any that it carries; ready to use or to train.

    Reads what :func:`save`, mlx-lm's LoRA training and PEFT's LoRA write. A trained LM head takes
    the place of the base's, quantized or not. Nothing changes on an error.

    Raises:
        AdapterError: the folder cannot be read, or tensors do not fit: one message names all.
    """
    adapter = _fitting(model, folder)
    head_weights = read_out.read(adapter.path, head_counts(model))
    head = port_for(model).head_path(model)
    detach(model)
    tensors = {name: tensor.astype(mx.float32) for name, tensor in adapter.tensors.items()}
    for path in adapter.modules:
        if f"{path}.weight" in tensors:
            put_full(model, path, head=path == head).weight = tensors[f"{path}.weight"]
            continue
        a = tensors[f"{path}.lora_a"]
        lora = put_lora(model, path, a.shape[1], adapter.scale, adapter.dropout)
        lora.lora_a, lora.lora_b = a, tensors[f"{path}.lora_b"]
    if head_weights is not None:
        read_out.attach(model, head_weights)
    train_mode(model, False)


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
    if not adapters or not all(math.isfinite(factor) for _, factor in adapters):
        raise AdapterError("give at least one adapter folder, each with a finite factor")
    parts = [(_fitting(model, folder), factor) for folder, factor in adapters]
    detach(model)
    head = port_for(model).head_path(model)
    # lora_a of every adapter, and lora_b with its scale and factor.
    pairs: dict[str, list[tuple[mx.array, mx.array]]] = {}
    weights: dict[str, list[tuple[mx.array, float]]] = {}
    for part, factor in parts:
        for path in part.modules:
            if f"{path}.weight" in part.tensors:
                weights.setdefault(path, []).append((part.tensors[f"{path}.weight"], factor))
                continue
            a, b = (
                part.tensors[f"{path}.{leaf}"].astype(mx.float32) for leaf in ("lora_a", "lora_b")
            )
            pairs.setdefault(path, []).append((a, factor * part.scale * b))
    # One rank everywhere: mlx-lm's configuration has room for one only.
    ranks = {path: sum(a.shape[1] for a, _ in pairs[path]) for path in pairs if path not in weights}
    for path in {**pairs, **weights}:
        factors = pairs.get(path, [])
        if path in weights:
            layer = put_full(model, path, head=path == head)
            changes = [factor * (weight - layer.weight) for weight, factor in weights[path]]
            layer.weight = layer.weight + sum(changes + [(a @ b).T for a, b in factors])
            continue
        lora = put_lora(model, path, max(ranks.values()), 1.0, 0.0)
        missing = max(ranks.values()) - ranks[path]
        a, b = mx.concatenate([a for a, _ in factors], 1), mx.concatenate([b for _, b in factors])
        lora.lora_a, lora.lora_b = (
            mx.pad(a, [(0, 0), (0, missing)]),
            mx.pad(b, [(0, missing), (0, 0)]),
        )
    mx.eval(model.parameters())


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """What the adapter consists of: parameter name to tensor, as it is saved."""
    tensors = {}
    for path, module in adapted(model).items():
        if isinstance(module, LoRALinear):
            tensors[f"{path}.lora_a"] = module.lora_a.astype(mx.float32)
            tensors[f"{path}.lora_b"] = module.lora_b.astype(mx.float32)
        else:
            tensors[f"{path}.weight"] = module.saved_weight()
    return tensors


def save(model: nn.Module, folder: str | Path, *, base_model: str | None = None) -> None:
    """Write the adapter so that ``mlx_lm.load(model, adapter_path=folder)`` gives this model.

    The exception is a trained LM head over a quantized base, which only :func:`load` can put on.
    Each file is written under a temporary name and renamed.

    Args:
        model: a model with an adapter.
        folder: made if it does not exist.
        base_model: hub id of the base, for people who find the folder; local paths are not kept.

    Raises:
        AdapterError: the model carries no adapter.
        OutputError: the folder cannot be written.
    """
    modules, folder = adapted(model, required=True), Path(folder)
    lora = {path: layer for path, layer in modules.items() if isinstance(layer, LoRALinear)}
    # Stock mlx-lm can only take a mixture as weights, and only without quantization.
    mixed = 0 < len(lora) < len(modules) and not any(map(is_quantized, modules.values()))
    whole = tensors(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    if mixed:
        weights = {n: tensor for n, tensor in whole.items() if n.endswith(".weight")}
        write_arrays(folder / FACTORS, {n: t for n, t in whole.items() if n not in weights})
        whole = weights
        for path, layer in lora.items():
            base = layer.linear.weight
            change = layer.scale * (layer.lora_a @ layer.lora_b).T
            whole[f"{path}.weight"] = (base.astype(mx.float32) + change).astype(base.dtype)
    write_arrays(folder / WEIGHTS, whole)
    if not mixed:
        (folder / FACTORS).unlink(missing_ok=True)
    read_out.save(model, folder)
    written: dict[str, Any] = {
        "fine_tune_type": "full" if mixed or not lora else "lora",
        "num_layers": len(port_for(model).layers(model)),
    }
    if base_model and HUB_NAME.fullmatch(base_model) and not Path(base_model).exists():
        written["model"] = base_model
    if lora:
        first = next(iter(lora.values()))
        written["lora_parameters"] = {
            "keys": list(lora),
            "rank": first.lora_a.shape[1],
            "scale": first.scale,
            "dropout": round(1 - first.dropout._p_1, 9),
        }
    write_json(folder / CONFIG, written)
