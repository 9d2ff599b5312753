"""Adapter folders: found, read, put on a model, combined, saved.

``adapters.safetensors`` holds only what was trained, under full parameter names, and
``adapter_config.json`` is mlx-lm's. LoRA tensors and the LM head are float32; full W_Q/W_K weights
have the base's own type, which is what the forward pass used. No file holds a local path.

Stock mlx-lm takes LoRA tensors or weights from a folder, never both, and no LoRA tensors of a layer
with several outputs. LoRA with a trained LM head, or on such a layer, is therefore written as
weights, LoRA merged in, and the LoRA tensors themselves lie beside them in
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
    SplitLoRALinear,
    adapted,
    detach,
    input_dims,
    is_quantized,
    put_full,
    put_lora,
    train_mode,
)
from abft_mlx.errors import AdapterError, RunError
from abft_mlx.files import (
    array_failure,
    is_path,
    parse_json,
    replacing,
    tensor_shapes,
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
    WEIGHTS,
    peft.WEIGHTS,
    CONFIG,
    FACTORS,
    "head_weights.safetensors",
    "recipe.yaml",
    "run.json",
    "demonstrations.jsonl",
)
PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """An adapter that has been found; as text it is the name it was asked for by.

    Attributes:
        name: a folder or a hub id.
        folder: where its files are.
    """

    name: str
    folder: Path

    def __str__(self) -> str:
        return self.name


Named: TypeAlias = str | Path | Source


def find(adapter: Named) -> Source:
    """Find an adapter: a folder that exists wins, then ``owner/name`` or ``owner/name@revision``.

    Args:
        adapter: a folder or a hub id; a Source is returned as it is.

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
    asked = hub.Asked(
        f"adapter {identity}",
        f"adapter {name!r} is neither a folder here nor a repository of the hub that you may read",
        "give a run folder",
        revision,
    )
    try:
        folder = hub.snapshot(identity, FETCHED, revision=revision)
    except Exception as error:
        failure = hub.explain(error, asked)
        raise (AdapterError if failure.refused else RunError)(failure.message) from error
    if not folder.is_dir() or not any(folder.iterdir()):
        raise AdapterError(f"adapter {name}: the repository holds no adapter (no {CONFIG})")
    return Source(name, folder)


def local_folder(adapter: Named) -> Path:
    """The folder of an adapter's files; as :func:`find`."""
    return find(adapter).folder


def base_model(folder: str | Path) -> str | None:
    """The base that an adapter folder's configuration names, or None.

    Raises:
        AdapterError: the configuration cannot be read.
    """
    written = _config(Path(folder))
    name = written.get("base_model_name_or_path" if "peft_type" in written else "model")
    return name if isinstance(name, str) and name else None


@dataclass(frozen=True)
class Folder:
    """An adapter folder's contents as mlx-lm would have them, whichever program wrote it.

    Attributes:
        path: the folder.
        kind: "lora" where it holds LoRA tensors, with or without a head, or "full".
        scale: of the LoRA tensors.
        dropout: of the LoRA layers.
        keys: layers that the configuration names.
        tensors: parameter name to tensor, not evaluated yet.
    """

    path: Path
    kind: str
    scale: float
    dropout: float
    keys: tuple[str, ...]
    tensors: dict[str, mx.array]

    @property
    def modules(self) -> list[str]:
        """Paths of the layers that the adapter changes, in the files' order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))


def read(model: nn.Module, folder: str | Path) -> Folder:
    """Read an adapter folder that this package, mlx-lm or PEFT wrote, not yet fitted to the model.

    Args:
        model: whose names are used; a PEFT adapter has those of transformers.
        folder: of the adapter.

    Raises:
        AdapterError: not an adapter folder, broken files, or a kind that cannot be used.
    """
    folder = Path(folder)
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
        kind = "lora"
    if kind == "full":
        return Folder(folder, kind, 1.0, 0.0, (), tensors)
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
    return Folder(folder, kind, scale, dropout, keys, tensors)


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
    layers, names, problems = _mapped(model, _tensors(file))
    for path, tensors in layers.items():
        problems += _peft_problems(names[path], tensors, settings)
    _refuse(folder, problems)
    lora = {path: names[path] for path, tensors in layers.items() if "weight" not in tensors}
    scales = {path: settings.scale(name) for path, name in lora.items()}
    common = next(iter(scales.values())) if len(set(scales.values())) == 1 else 1.0
    rank = max((settings.rank(name) for name in lora.values()), default=0)
    fitted = {}
    for path, tensors in layers.items():
        if path not in lora:
            fitted[f"{path}.weight"] = tensors["weight"]
            continue
        a, b = (tensors[leaf].astype(mx.float32).T for leaf in ("lora_a", "lora_b"))
        missing = rank - a.shape[1]
        factor = scales[path] / common if common else 0.0
        fitted[f"{path}.lora_a"] = mx.pad(a, [(0, 0), (0, missing)])
        fitted[f"{path}.lora_b"] = mx.pad(b, [(0, missing), (0, 0)]) * factor
    return Folder(folder, "lora", common, settings.lora_dropout, (), fitted)


def _mapped(
    model: nn.Module, tensors: dict[str, mx.array]
) -> tuple[dict[str, dict[str, mx.array]], dict[str, str], list[str]]:
    """Layer to its tensors, layer to transformers' name of it, and what has no place."""
    paths, head = peft.linear_paths(model), port_for(model).head_path(model)
    known = {name: path for path, name in peft.named(model, paths).items()}
    leaves = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".weight": "weight"}
    layers: dict[str, dict[str, mx.array]] = {}
    names: dict[str, str] = {}
    problems = []
    for source, tensor in sorted(tensors.items()):
        ending = next((leaf for leaf in leaves if source.endswith(leaf)), "")
        name = source.removeprefix(peft.PREFIX).removesuffix(ending)
        path = known.get(name) or peft.ending_alike(name, paths)
        if path is None:
            problems.append(f"{source}: the model has no linear layer of that name")
        elif not ending or (ending == ".weight" and path != head):
            problems.append(f"{source}: neither lora_A nor lora_B nor the weight of an LM head")
        elif names.setdefault(path, name) != name:
            problems.append(f"{source}: {names[path]} is the same layer of this model")
        else:
            layers.setdefault(path, {})[leaves[ending]] = tensor
    return layers, names, problems


def _peft_problems(name: str, tensors: dict[str, mx.array], settings: peft.Settings) -> list[str]:
    """What is wrong with the tensors of one layer."""
    if "weight" in tensors:
        alone = len(tensors) == 1
        return [] if alone else [f"{name}.weight: there are LoRA tensors of it, too"]
    if len(tensors) < 2:
        missing = "lora_A" if "lora_b" in tensors else "lora_B"
        return [f"{name}.{missing}.weight: missing from {peft.WEIGHTS}"]
    rank, a, b = settings.rank(name), tensors["lora_a"].shape, tensors["lora_b"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return [f"{name}: lora_A {a} and lora_B {b} are not of the rank {rank} in {CONFIG}"]
    return []


def _refuse(folder: Path, problems: list[str]) -> None:
    """Raise an error that shows a few of the problems, if there are any."""
    if problems:
        # Of another model all shapes differ, and one says so.
        shapes = [problem for problem in problems if ": shape (" in problem]
        shown = [problem for problem in problems if problem not in shapes[1:]][:PROBLEMS_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise AdapterError(
            f"{folder} does not fit this model ({len(problems)} mismatches): "
            + "; ".join(shown + more)
            + "; use the base model that it was trained on"
        )


def fitting(model: nn.Module, folder: str | Path) -> Folder:
    """Read an adapter folder and check every name and shape against a model.

    Raises:
        AdapterError: the folder cannot be read, or tensors do not fit: one message names all.
    """
    adapter = read(model, folder)
    _refuse(adapter.path, _misfits(model, adapter))
    mx.eval(adapter.tensors)
    return adapter


def _misfits(model: nn.Module, adapter: Folder) -> list[str]:
    """Every name and shape of an adapter that the model has no place for."""
    if not adapter.tensors:
        return [f"{WEIGHTS} holds no tensors"]
    head = port_for(model).head_path(model)
    leaves = ("weight",) if adapter.kind == "full" else ("lora_a", "lora_b")
    problems = []
    ranks: dict[str, int] = {}
    for name, tensor in sorted(adapter.tensors.items()):
        path, _, leaf = name.rpartition(".")
        linear = base_linear(resolve(model, path)) if path and has(model, path) else None
        problem = None
        if not isinstance(linear, nn.Linear | nn.QuantizedLinear):
            problem = f"the model has no linear layer {path!r}"
        elif leaf not in leaves and not (path == head and leaf == "weight"):
            problem = f"not a {adapter.kind} tensor ({' or '.join(leaves)})"
        elif leaf == "weight" and "scales" in linear and path != head:
            problem = f"the model's {path} is quantized"
        elif leaf == "weight" and f"{path}.lora_a" in adapter.tensors:
            problem = f"there are LoRA tensors of {path}, too"
        else:
            outputs, inputs, shape = output_dims(linear), input_dims(linear), tensor.shape
            rank = shape[leaf == "lora_a"] if len(shape) == 2 else 0
            sizes = {"weight": (outputs, inputs), "lora_a": (inputs, rank)}
            needed = sizes.get(leaf, (rank, outputs))
            if shape != needed:
                problem = f"shape {shape}, the model needs {needed}"
            elif ranks.setdefault(path, rank) != rank:
                problem = f"rank {rank}, lora_a has {ranks[path]}"
        if problem:
            problems.append(f"{name}: {problem}")
    if adapter.kind == "full":
        return problems
    # A half of a pair, or all of a layer that the keys name, may be missing.
    paths = {n.rpartition(".")[0] for n in adapter.tensors if not n.endswith(".weight")}
    problems += [
        f"{path}.{leaf}: missing from {WEIGHTS}"
        for path in sorted(paths)
        for leaf in leaves
        if f"{path}.{leaf}" not in adapter.tensors
    ]
    return problems + [
        f"{key}: named in {CONFIG}, but {WEIGHTS} has no tensors for it"
        for key in adapter.keys
        if key not in paths and not any(path.endswith(f".{key}") for path in paths)
    ]


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
    if not adapters:
        raise AdapterError("no adapters to combine; give at least one folder with its factor")
    for folder, factor in adapters:
        if not math.isfinite(factor):
            raise AdapterError(f"factor {factor} of {folder}: give a finite number, such as 0.5")
    parts = [(fitting(model, folder), factor) for folder, factor in adapters]
    detach(model)
    head = port_for(model).head_path(model)

    def pairs(path: str) -> list[tuple[mx.array, mx.array]]:
        """lora_a of every adapter, and lora_b with its scale and factor."""
        return [
            (part.tensors[f"{path}.lora_a"], factor * part.scale * part.tensors[f"{path}.lora_b"])
            for part, factor in parts
            if f"{path}.lora_a" in part.tensors
        ]

    paths = list(dict.fromkeys(path for part, _ in parts for path in part.modules))
    full = {path for path in paths if any(f"{path}.weight" in part.tensors for part, _ in parts)}
    # One rank everywhere: mlx-lm's configuration has room for one only.
    rank = max((sum(a.shape[1] for a, _ in pairs(p)) for p in paths if p not in full), default=0)
    for path in paths:
        some = [(a.astype(mx.float32), b.astype(mx.float32)) for a, b in pairs(path)]
        if path in full:
            layer = put_full(model, path, head=path == head)
            weights = [(part.tensors.get(f"{path}.weight"), factor) for part, factor in parts]
            changes = [factor * (w - layer.weight) for w, factor in weights if w is not None]
            layer.weight = layer.weight + sum(changes + [(a @ b).T for a, b in some])
            continue
        lora = put_lora(model, path, rank, 1.0, 0.0)
        missing = rank - sum(a.shape[1] for a, _ in some)
        none = (
            mx.zeros((lora.lora_a.shape[0], missing)),
            mx.zeros((missing, lora.lora_b.shape[1])),
        )
        lora.lora_a = mx.concatenate([a for a, _ in [*some, none]], axis=1)
        lora.lora_b = mx.concatenate([b for _, b in [*some, none]], axis=0)
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
    modules = adapted(model)
    if not modules:
        raise AdapterError("this model carries no adapter, so there is nothing to save")
    folder = Path(folder)
    as_weights = _as_weights(modules)
    lora = {path: layer for path, layer in modules.items() if isinstance(layer, LoRALinear)}
    whole = tensors(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    if as_weights:
        _write(folder / FACTORS, {n: t for n, t in whole.items() if not n.endswith(".weight")})
        whole = {n: t for n, t in whole.items() if n.endswith(".weight")}
        for path, layer in lora.items():
            base = layer.linear.weight
            change = layer.scale * (layer.lora_a @ layer.lora_b).T
            whole[f"{path}.weight"] = (base.astype(mx.float32) + change).astype(base.dtype)
    _write(folder / WEIGHTS, whole)
    if not as_weights:
        (folder / FACTORS).unlink(missing_ok=True)
    read_out.save(model, folder)
    written: dict[str, Any] = {
        "fine_tune_type": "full" if as_weights or not lora else "lora",
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


def _as_weights(modules: dict[str, nn.Module]) -> bool:
    """Whether stock mlx-lm can only take this adapter as weights, and can: no quantization."""
    mixed = len({isinstance(module, LoRALinear) for module in modules.values()}) > 1
    split = any(isinstance(module, SplitLoRALinear) for module in modules.values())
    return (mixed or split) and not any(map(is_quantized, modules.values()))


def _write(path: Path, arrays: dict[str, mx.array]) -> None:
    """Write a safetensors file, whole or not at all."""
    with replacing(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, {"format": "mlx"})
        except RuntimeError as error:
            raise array_failure(path, error) from error
