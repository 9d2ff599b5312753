"""Opening a model: bundled, from a folder, or from the hub, with one clear line for what can fail.

Files are checked before any weight is read: a download cut short is an error, not a crash later.
Model code that a checkpoint brings along is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from abft_mlx import adapters, hub
from abft_mlx.errors import AbftError, ModelError, UnsupportedArchitectureError
from abft_mlx.files import is_path, parse_json, tensor_shapes
from abft_mlx.ports import Port, port_for, supported_in_words

DEMO = "demo"
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
HASHED_WHOLE_BYTES = 1_000_000_000
SAMPLES, SAMPLE_BYTES = 64, 65_536


@dataclass(frozen=True)
class Loaded:
    """A model, ready for use."""

    model: nn.Module  # mlx-lm's, frozen unless an adapter was asked for
    tokenizer: Any  # mlx-lm's tokenizer wrapper
    config: dict[str, Any]  # the checkpoint's config.json
    source: str  # the name it was asked for by
    path: Path  # the folder it was read from
    port: Port
    context_tokens: int | None  # the longest prompt it was made for, if its config says so

    @cached_property
    def fingerprint(self) -> str:
        """What identifies its files, which are read for it; see :func:`fingerprint`."""
        return fingerprint(self.path)


def load_model(
    name: str, revision: str | None = None, adapter: adapters.Named | None = None
) -> Loaded:
    """Open a model and its tokenizer.

    Args:
        name: "demo" for the bundled model, a local folder, or a hub id such as owner/name.
        revision: branch, tag or commit of a hub model.
        adapter: what to put on it: an adapter or run folder, or a hub id.

    Raises:
        ModelError: it cannot be found, fetched or read; one line that says why.
        UnsupportedArchitectureError: mlx-lm or this package does not know its architecture.
        AdapterError: the adapter cannot be found or does not fit it.
        RunError: the adapter is on the hub, which cannot be reached.
    """
    source = None if adapter is None else adapters.find(adapter)
    path = find(name, revision)
    config = _config(path)
    _weight_files(path)  # an error of ours where there are none
    if not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{path} has no tokenizer ({' or '.join(TOKENIZER_FILES[:3])}); copy the tokenizer "
            "files of the model that it was made from"
        )
    model, config = _model(path, config, path)
    port = port_for(model)
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(
            path,
            # Else transformers asks on standard input whether to run a tokenizer's code,
            # and warns of texts that are longer than the context before they are shortened.
            tokenizer_config_extra={"trust_remote_code": False, "model_max_length": 2**40},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # tokenizer libraries raise whatever they meet
        raise ModelError(
            f"the tokenizer in {path} cannot be opened: {type(error).__name__}: "
            f"{hub.first_line(error)}"
        ) from error
    model.freeze()
    if source is not None:
        adapters.load(model, source.folder)
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, config, name, path, port, context_tokens(config))


def find(name: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The local folder of a model; hub models are downloaded once and then read from the cache.

    Args:
        name: as :func:`load_model`.
        revision: branch, tag or commit of a hub model.
        config_only: of a hub model fetch its config.json alone.
    """
    if name == DEMO:
        return Path(str(files("abft_mlx"))) / "assets" / "demo-model"
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise ModelError(f"model {name} is a file; give the folder that it is in")
    if is_path(name) or not hub.is_id(name):
        raise ModelError(
            f"model {name!r}: no such folder; give a folder, a hub id like owner/name, or demo"
        )
    request = hub.Request(
        f"model {name}",
        f"model {name!r} is neither a folder here nor a model on the hub that you may read",
        "give a local folder",
        revision,
    )
    try:
        wanted = ["config.json"] if config_only else HUB_FILES
        return hub.snapshot(name, wanted, revision=revision)
    except Exception as error:
        raise ModelError(hub.explain(error, request).message) from error


def parameter_count(model: nn.Module) -> int:
    """Numbers in a model's weights; those packed by quantization count as what they stand for."""
    total = 0
    for _, module in model.named_modules():
        packed = hasattr(module, "bits")
        for name, array in module.items():
            if isinstance(array, mx.array) and not (packed and name in ("scales", "biases")):
                total += array.size * (32 // module.bits if packed and name == "weight" else 1)
    return total


def kind(name: str) -> str:
    """Where :func:`find` looks for a model: "bundled", "folder" or "hub"."""
    if name == DEMO:
        return "bundled"
    return "folder" if Path(name).expanduser().is_dir() else "hub"


def _config(path: Path) -> dict[str, Any]:
    """The content of a model folder's config.json."""
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"{path} has no config.json; give the folder of a model")
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON: {error}; fetch it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type; give the folder of a model that mlx-lm runs")
    return config


def _weight_files(path: Path) -> list[Path]:
    """Weight files as mlx-lm picks them, each checked to be whole."""
    weights = sorted(path.glob("model*.safetensors"))
    if not weights:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".gguf"))
        instead = f" (found {', '.join(others[:3])})" if others else ""
        raise ModelError(
            f"{path} has no model*.safetensors{instead}; fetch the weights, or convert them with "
            "mlx_lm.convert"
        )
    index = path / "model.safetensors.index.json"
    try:
        names = parse_json(index.read_bytes())["weight_map"].values() if index.is_file() else ()
        missing = sorted({*names} - {file.name for file in weights})
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} cannot be read: {error}; fetch it again") from error
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} of its weight files, {missing[0]:.80} first; "
            "fetch it again"
        )
    for file in weights:
        try:
            tensor_shapes(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} is broken: {error}; fetch it again") from error
    return weights


def fingerprint(path: Path) -> str:
    """What identifies a model's files: equal only if config, tokenizer and weights are equal.

    Up to 1 GB of weights every byte is hashed (``sha256:``). Beyond, each weight file adds its
    size, its whole header and 64 samples of 64 KiB spread over it (``sha256-sampled:``): a changed
    shape, type, name or file is seen, a change of single weights may not be.
    """
    weights = _weight_files(path)
    whole = sum(file.stat().st_size for file in weights) <= HASHED_WHOLE_BYTES
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            content = (path / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    for weight in weights:
        size = weight.stat().st_size
        digest.update(f"{weight.name}\0{size}\0".encode())
        with weight.open("rb") as file:
            if whole:
                while block := file.read(1 << 20):
                    digest.update(block)
                continue
            prefix = file.read(8)
            digest.update(prefix + file.read(int.from_bytes(prefix, "little")))
            for sample in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return f"{'sha256' if whole else 'sha256-sampled'}:{digest.hexdigest()}"


def _model(
    path: Path, config: dict[str, Any], source: str | Path, *, strict: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its weights mapped but not yet read; none need be there unless strict."""
    if config.get("model_file") is not None:  # mlx-lm runs it without asking
        raise ModelError(
            f"{source} brings model code of its own, {config['model_file']!r}, which is never run; "
            "give a model whose architecture mlx-lm knows"
        )
    try:
        return mlx_lm_utils.load_model(path, lazy=True, strict=strict)
    except AbftError:
        raise
    except Exception as error:  # mlx-lm's model classes raise whatever they meet
        text = hub.first_line(error)
        if re.fullmatch(r"Model type \S+ not supported\.", text):
            raise UnsupportedArchitectureError(
                f"{source}: mlx-lm does not know the architecture {config['model_type']!r}; "
                f"{supported_in_words()}"
            ) from error
        raise ModelError(
            f"{source} cannot be opened as a {config['model_type']} model: "
            f"{type(error).__name__}: {text}"
        ) from error


def skeleton(
    name: str, revision: str | None = None, *, bits: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A model as its config.json alone describes it; no weights are read, fetched or made.

    Its parameters have the shapes and types of the real ones and are never to be evaluated.

    Args:
        name: as :func:`load_model`.
        revision: branch, tag or commit of a hub model.
        bits: quantize to this many bits in groups of 64, as ``mlx_lm.convert -q`` does, where
            config.json says nothing of quantization.

    Returns:
        The model, frozen, and its config.
    """
    config = _config(find(name, revision, config_only=True))
    return describe(config, f"model {name}", bits=bits), config


def describe(config: dict[str, Any], source: str, *, bits: int | None = None) -> nn.Module:
    """As :func:`skeleton`, from the content of a config.json; errors call it ``source``."""
    quantization = config.get("quantization")
    if quantization is None and "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method")
        raise ModelError(
            f"{source} is quantized with {method}, which config.json does not describe fully; give "
            "one that mlx_lm.convert made, or the unquantized model"
        )
    plain = {key: value for key, value in config.items() if not key.startswith("quantization")}
    # mlx-lm builds a model only from a folder; this one holds nothing but the config.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        model, _ = _model(Path(folder), plain, source, strict=False)
    port_for(model)
    dtype = getattr(mx, number_type(config), None)
    if not isinstance(dtype, mx.Dtype):
        raise ModelError(
            f"{source}: its config.json names the number type {number_type(config)!r}, which MLX "
            "does not have; give an unquantized model, or one that mlx_lm.convert made"
        )
    model.set_dtype(dtype)
    if quantization is None and bits is not None:
        quantization = {"group_size": 64, "bits": bits}
    if quantization is not None:
        _quantize(model, quantization, source)
    model.freeze()
    return model


def number_type(config: dict[str, Any]) -> str:
    """The type of a checkpoint's floating-point weights; float32 where its config does not say."""
    name = config.get("torch_dtype") or config.get("dtype") or "float32"
    return str(name).removeprefix("torch.")


def _quantize(model: nn.Module, quantization: dict[str, Any], source: str) -> None:
    """Quantize as a config.json says that the checkpoint is."""

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            return quantization[path]
        if not hasattr(module, "to_quantized"):
            return False
        return module.weight.shape[-1] % int(quantization["group_size"]) == 0

    try:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=chosen,
        )
    except Exception as error:  # whatever a foreign config.json makes MLX raise
        raise ModelError(
            f"{source}: its config.json's quantization {quantization} cannot be used: "
            f"{hub.first_line(error)}"
        ) from error


def context_tokens(config: dict[str, Any]) -> int | None:
    """The longest prompt that a checkpoint says it was made for."""
    for section in (config, config.get("text_config") or {}):
        for key in CONTEXT_KEYS:
            if isinstance(section.get(key), int):
                return int(section[key])
    return None
