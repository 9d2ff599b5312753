"""Adapter folders: the files that stock mlx-lm, and this package, load.

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

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import read_out
from abft_mlx.adapters.attach import adapted
from abft_mlx.adapters.layers import SplitLoRALinear, is_quantized
from abft_mlx.errors import AdapterError
from abft_mlx.files import array_failure, replacing, write_failure, write_json
from abft_mlx.ports import port_for

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
FACTORS = "lora.safetensors"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """What the adapter consists of: parameter name to tensor, as it is saved."""
    found = {}
    for path, module in adapted(model).items():
        if isinstance(module, LoRALinear):
            found[f"{path}.lora_a"] = module.lora_a.astype(mx.float32)
            found[f"{path}.lora_b"] = module.lora_b.astype(mx.float32)
        else:
            found[f"{path}.weight"] = module.saved_weight()
    return found


def _as_weights(modules: dict[str, nn.Module]) -> bool:
    """Whether stock mlx-lm can only take this adapter as weights, and can: no quantization."""
    lora = [isinstance(module, LoRALinear) for module in modules.values()]
    split = any(isinstance(module, SplitLoRALinear) for module in modules.values())
    mixed = any(lora) and not all(lora)
    return (mixed or split) and not any(map(is_quantized, modules.values()))


def _merged_weights(model: nn.Module) -> dict[str, mx.array]:
    """The adapter as weights: parameter name to tensor."""
    found = {}
    for path, module in adapted(model).items():
        if isinstance(module, LoRALinear):
            weight = module.linear.weight
            change = module.scale * (module.lora_a @ module.lora_b).T
            found[f"{path}.weight"] = (weight.astype(mx.float32) + change).astype(weight.dtype)
        else:
            found[f"{path}.weight"] = module.saved_weight()
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
    lora = {path: one for path, one in modules.items() if isinstance(one, LoRALinear)}
    kind = "full" if not lora or _as_weights(modules) else "lora"
    written: dict[str, Any] = {"fine_tune_type": kind, "num_layers": n_layers}
    if name is not None:
        written["model"] = name
    if not lora:
        return written
    first = next(iter(lora.values()))
    return written | {
        "lora_parameters": {
            "keys": list(lora),
            "rank": first.lora_a.shape[1],
            "scale": first.scale,
            "dropout": round(1 - first.dropout._p_1, 9),
        }
    }


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    whole = tensors(model)
    if _as_weights(modules):
        lora = {name: one for name, one in whole.items() if not name.endswith(".weight")}
        _write(folder / FACTORS, lora)
        _write(folder / WEIGHTS, _merged_weights(model))
    else:
        _write(folder / WEIGHTS, whole)
        try:
            (folder / FACTORS).unlink(missing_ok=True)
        except OSError as error:
            raise write_failure(folder / FACTORS, error) from error
    read_out.save(model, folder)
    write_json(folder / CONFIG, config(model, base_model))


def _write(path: Path, arrays: dict[str, mx.array]) -> None:
    with replacing(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, {"format": "mlx"})
        except RuntimeError as error:
            raise array_failure(path, error) from error
