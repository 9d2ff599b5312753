"""The adapter merged into its base: a model folder of its own, which stock mlx-lm loads.

Over a quantized base the merged weights have to be quantized again, or stay in floating point. What
that does to a small adapter is not known beforehand, so the result is measured elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tuner.lora import LoRALinear

from abft_mlx import adapters
from abft_mlx.adapters.files import HUB_NAME
from abft_mlx.adapters.lora import is_quantized, put
from abft_mlx.errors import AdapterError, ModelError, OutputError, UsageError
from abft_mlx.files import write_json
from abft_mlx.loading import Loaded
from abft_mlx.ports import resolve

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
# What a merged model takes over from its base as it is.
COPIED_FILES = (
    "generation_config.json", "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "chat_template.*", "*.py",
)  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """In what precision the merged model is written. At most one of these; none is the base's own.

    Attributes:
        dequantize: all of a quantized base becomes floating point.
        float_merged: what the adapter changes stays in floating point, the rest as it is.
        bits: quantize to these: a float base as a whole, of a quantized one what was merged.
    """

    dequantize: bool = False
    float_merged: bool = False
    bits: int | None = None

    def check(self, quantized: bool) -> None:
        """Raise UsageError for two at once, unknown bits, or a base that is not quantized."""
        flags = {
            "--dequantize": self.dequantize,
            "--float-merged": self.float_merged,
            "--quantize": self.bits is not None,
        }
        wanted = [flag for flag, value in flags.items() if value]
        if len(wanted) > 1:
            raise UsageError(f"{wanted[0]} and {wanted[1]} exclude each other; give one of them")
        if self.bits is not None and self.bits not in BITS:
            raise UsageError(
                f"--quantize {self.bits}: MLX quantizes to {', '.join(map(str, BITS))} bits"
            )
        if not quantized and wanted and self.bits is None:
            raise UsageError(f"{wanted[0]}: the base is not quantized, so leave it out")

    def in_words(self, quantized: bool) -> str:
        """What the written model will be."""
        if self.dequantize:
            return "floating point, dequantized"
        if self.float_merged:
            return "as the base, what was merged in floating point"
        if self.bits is not None:
            return ("as the base, what was merged in " if quantized else "") + f"{self.bits} bits"
        return "quantized again as the base" if quantized else "floating point, as the base"


def quantized_base(loaded: Loaded) -> bool:
    """Whether what the adapter changes is quantized in the base, or anything else is."""
    modules = adapters.adapted(loaded.model)
    return "quantization" in loaded.config or any(map(is_quantized, modules.values()))


def fuse(loaded: Loaded, precision: Precision) -> dict[str, Any]:
    """Merge the adapter into the model, in place.

    Args:
        loaded: with an adapter on its model.
        precision: what the merged layers become.

    Returns:
        The config.json of the merged model.

    Raises:
        UsageError: the precision is not possible for this base.
        ModelError: the base is quantized, but not by MLX.
        AdapterError: a merged layer cannot be quantized.
    """
    config = copy.deepcopy(loaded.config)
    quantized = quantized_base(loaded)
    precision.check(quantized)
    if not quantized and "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise ModelError(
            f"{loaded.source} is quantized with {method}, which cannot be merged into; take the "
            "unquantized model"
        )
    model = loaded.model
    own = {path: _quantization(module) for path, module in adapters.adapted(model).items()}
    adapters.merge(model, dequantize=True)
    if precision.dequantize:
        mlx_lm_utils.dequantize_model(model)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    elif quantized:
        _quantize_merged(model, own, precision, config["quantization"])
    elif precision.bits is not None:
        # It prints what it did, which the command says itself.
        with contextlib.redirect_stdout(io.StringIO()):
            _, config = mlx_lm_utils.quantize_model(model, config, GROUP_SIZE, precision.bits)
        if not any("scales" in module for _, module in model.named_modules()):
            raise UsageError(
                f"--quantize {precision.bits}: no layer of this model is as wide as a multiple of "
                f"{GROUP_SIZE}, so none can be quantized; leave it out"
            )
    mx.eval(model.parameters())
    return config


def _quantization(module: nn.Module) -> dict[str, Any] | None:
    """How the base's layer under an adapter's is quantized."""
    base = module.linear if isinstance(module, LoRALinear) else module.original.module
    if "scales" not in base:
        return None
    return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}


def _quantize_merged(
    model: nn.Module,
    own: dict[str, dict[str, Any] | None],
    precision: Precision,
    written: dict[str, Any],
) -> None:
    """Quantize merged layers again, and note in the configuration which differ from the rest."""
    for path, before in own.items():
        if before is None:
            continue
        if precision.float_merged:
            written.pop(path, None)
            continue
        wanted = before
        if precision.bits is not None and precision.bits != before["bits"]:
            wanted = {"group_size": before["group_size"], "bits": precision.bits, "mode": "affine"}
            if before["mode"] != "affine":
                wanted["group_size"] = GROUP_SIZE
            written[path] = wanted
        merged = resolve(model, path)
        if not hasattr(merged, "to_quantized") or merged.weight.shape[-1] % wanted["group_size"]:
            raise AdapterError(
                f"{path} cannot be quantized again in groups of {wanted['group_size']}; give "
                "--float-merged to leave it in floating point"
            )
        put(model, path, merged.to_quantized(**wanted))


def save(loaded: Loaded, config: dict[str, Any], folder: Path) -> None:
    """Write a merged model: weights, config.json (from :func:`fuse`), the base's tokenizer.

    Raises:
        OutputError: the folder cannot be written.
    """
    model = loaded.model
    try:
        mlx_lm_utils.save_model(folder, model, donate_model=False)
    except RuntimeError as error:
        raise OutputError(f"{folder}: cannot be written ({error})") from error
    vision = "vision_tower" in getattr(model, "model", {})
    options = {"keep_vision_config": True} if vision else {}
    mlx_lm_utils.save_config(config, config_path=folder / "config.json", **options)
    for file in sorted(loaded.path.iterdir()):
        if not file.is_file() or not any(file.match(pattern) for pattern in COPIED_FILES):
            continue
        shutil.copyfile(file, folder / file.name)
        if file.name == "tokenizer_config.json":
            # It may remember a folder of this machine.
            settings = json.loads(file.read_text(encoding="utf-8"))
            name = settings.get("name_or_path")
            if isinstance(name, str) and HUB_NAME.fullmatch(name) is None:
                del settings["name_or_path"]
                write_json(folder / file.name, settings)
