"""Reading PEFT's LoRA folders as adapters of mlx-lm's models.

A tensor's name is mapped to the model's own layer and turned: PEFT keeps lora_A as (rank, inputs)
and lora_B as (outputs, rank). Ranks and alphas may differ between layers there. mlx-lm has one rank
and one scale for all, so factors are filled up with zeros and carry their part of the scale, which
changes nothing of what they do. What this package cannot do as PEFT would is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx.adapters.files import CONFIG
from abft_mlx.adapters.folder import Folder, shapes_of
from abft_mlx.adapters.peft_names import ending_alike, named
from abft_mlx.adapters.peft_settings import Settings
from abft_mlx.errors import AdapterError
from abft_mlx.ports import port_for

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROBLEMS_SHOWN = 5
_FACTORS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}
# What other kinds of adapter leave in the file, for configurations that do not own up to it.
_FOREIGN = {
    "lora_magnitude_vector": "use_dora",
    "lora_B.bias": "lora_bias",
    "lora_embedding_": "an embedding's LoRA",
    "base_layer": "the weights of an embedding",
}


@dataclass(frozen=True)
class PeftFolder(Folder):
    """A PEFT folder whose tensors are mapped to a model's layers.

    ``shapes`` and ``tensors()`` are as mlx-lm would have them, of one rank and one scale.

    Attributes:
        sources: tensor name to its name in the file.
        factors: layer to what its lora_b is multiplied by.
        rank: of all layers.
    """

    sources: dict[str, str]
    factors: dict[str, float]
    rank: int

    def tensors(self) -> dict[str, mx.array]:
        """Name to tensor, read from the file, turned, and filled up with zeros."""
        loaded: Any = mx.load(str(self.path / WEIGHTS))
        found = {}
        for name, source in self.sources.items():
            path, _, leaf = name.rpartition(".")
            one = loaded[source]
            if leaf != "weight":
                one = one.astype(mx.float32).T
                missing = self.rank - one.shape[1 if leaf == "lora_a" else 0]
                widths = [(0, 0), (0, missing)] if leaf == "lora_a" else [(0, missing), (0, 0)]
                one = mx.pad(one, widths)
            found[name] = one * self.factors[path] if leaf == "lora_b" else one
        mx.eval(found)
        return found


def read(model: nn.Module, folder: Path, written: dict[str, Any]) -> PeftFolder:
    """Read a PEFT folder and map its tensors to a model's layers.

    Args:
        model: a loaded model, with or without an adapter.
        folder: holds ``adapter_model.safetensors``.
        written: its ``adapter_config.json``.

    Raises:
        AdapterError: files that are missing or broken, a kind of adapter that cannot be used, or
            tensors for which the model has no layer; the message names the key or the tensors.
    """
    settings = Settings.parse(written, folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        instead = " but adapter_model.bin, which is not opened because it can run code" * pickled
        raise AdapterError(
            f"{folder} has no {WEIGHTS}{instead}; save the adapter with PEFT's save_pretrained"
        )
    shapes = shapes_of(file)
    sources, names, problems = _mapped(model, shapes)
    heads = {path for path in names if f"{path}.weight" in sources}
    for path, name in names.items():
        problems += _problems(path, name, settings, sources, shapes)
    problems += _absent(model, settings, names)
    lost = [one for one in settings.modules_to_save if not any(
        names[path] == one or names[path].endswith(f".{one}") for path in heads)]  # fmt: skip
    problems += [f"modules_to_save names {one}, which {WEIGHTS} does not hold" for one in lost]
    if problems:
        shown = problems[:PROBLEMS_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise AdapterError(
            f"{folder} cannot be put on this model ({len(problems)} problems): "
            + "; ".join(shown + more)
            + "; use the base model that it was trained on"
        )
    lora = [path for path in names if path not in heads]
    scales = {path: settings.scale(names[path]) for path in lora}
    common = scales[lora[0]] if len(set(scales.values())) == 1 else 1.0
    rank = max((settings.rank(names[path]) for path in lora), default=0)
    fitted = {}
    for name, source in sources.items():
        shape = shapes[source]
        if name.endswith(".lora_a"):
            shape = (shape[1], rank)
        elif name.endswith(".lora_b"):
            shape = (rank, shape[0])
        fitted[name] = shape
    factors = {path: one / common if common else 0.0 for path, one in scales.items()}
    return PeftFolder(
        folder, "lora", common, settings.dropout, (), {WEIGHTS: tuple(shapes)}, fitted,
        sources, factors, rank,
    )  # fmt: skip


def _mapped(
    model: nn.Module, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Our tensor names to the file's, our layers to transformers' names, and what has no place."""
    paths = linear_paths(model)
    known = {name: path for path, name in named(model, paths).items()}
    head = port_for(model).head_path(model)
    sources: dict[str, str] = {}
    names: dict[str, str] = {}
    problems = []
    for source in sorted(shapes):
        foreign = next((what for part, what in _FOREIGN.items() if part in source), None)
        ending = next((one for one in _FACTORS if source.endswith(one)), ".weight")
        name = source.removeprefix(PREFIX).removesuffix(ending)
        path = known.get(name) or ending_alike(name, paths)
        if foreign is not None:
            problems.append(f"{source}: {foreign} is not supported")
        elif path is None:
            problems.append(f"{source}: the model has no linear layer of that name")
        elif not source.endswith(ending) or (ending == ".weight" and path != head):
            problems.append(f"{source}: neither lora_A nor lora_B nor the weight of an LM head")
        elif names.setdefault(path, name) != name:
            problems.append(f"{source}: {names[path]} is the same layer of this model")
        else:
            sources[f"{path}.{_FACTORS.get(ending, 'weight')}"] = source
    return sources, names, problems


def _problems(
    path: str,
    name: str,
    settings: Settings,
    sources: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
) -> list[str]:
    """What is wrong with the tensors of one layer."""
    if f"{path}.weight" in sources:
        saved = any(name == one or name.endswith(f".{one}") for one in settings.modules_to_save)
        return [] if saved else [f"{name}.weight: modules_to_save does not name it"]
    missing = [kind for kind, leaf in (("lora_A", "lora_a"), ("lora_B", "lora_b"))
               if f"{path}.{leaf}" not in sources]  # fmt: skip
    if missing:
        return [f"{name}.{missing[0]}.weight: missing from {WEIGHTS}"]
    if not settings.targets(name):
        return [f"{name}: {WEIGHTS} has tensors of it, but target_modules does not name it"]
    rank = settings.rank(name)
    left, right = shapes[sources[f"{path}.lora_a"]], shapes[sources[f"{path}.lora_b"]]
    if len(left) != 2 or len(right) != 2 or left[0] != rank or right[1] != rank:
        return [f"{name}: lora_A {left} and lora_B {right} are not of the rank {rank} in {CONFIG}"]
    return []


def _absent(model: nn.Module, settings: Settings, names: dict[str, str]) -> list[str]:
    """Layers that the configuration names and the file does not know."""
    if settings.target_modules == "all-linear":
        return []
    paths = linear_paths(model)
    every = {path: path for path in paths} | named(model, paths)
    return [
        f"{name}: target_modules names it, but {WEIGHTS} has no tensors of it"
        for path, name in every.items()
        if path not in names and settings.targets(name)
    ]


def linear_paths(model: nn.Module) -> list[str]:
    """Full paths of a model's linear layers, those under an adapter by the adapter's path."""
    inner = {f"{path}.linear" for path, one in model.named_modules() if isinstance(one, LoRALinear)}
    kinds = (nn.Linear, nn.QuantizedLinear, LoRALinear)
    return [
        path for path, one in model.named_modules() if isinstance(one, kinds) and path not in inner
    ]
