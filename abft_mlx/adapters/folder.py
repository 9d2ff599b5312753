"""What an adapter folder holds, read but not yet put on a model, whichever program wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from abft_mlx.adapters.files import CONFIG
from abft_mlx.adapters.headers import read_header
from abft_mlx.errors import AdapterError
from abft_mlx.files import parse_json


@dataclass(frozen=True)
class Folder:
    """An adapter folder's contents, read and understood but not yet fitted to a model.

    Attributes:
        path: the folder.
        kind: "lora" where it holds LoRA tensors, with or without a head, or "full".
        scale: of the LoRA tensors.
        dropout: of the LoRA layers.
        keys: layers that the configuration names.
        files: where its tensors are: file to the names taken from it.
        shapes: tensor name to shape.
    """

    path: Path
    kind: str
    scale: float
    dropout: float
    keys: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def modules(self) -> list[str]:
        """Paths of the layers that the adapter changes, in the files' order."""
        return list(dict.fromkeys(name.rpartition(".")[0] for name in self.shapes))

    def tensors(self) -> dict[str, mx.array]:
        """Name to tensor, read from the files."""
        found: dict[str, mx.array] = {}
        for file, names in self.files.items():
            loaded: Any = mx.load(str(self.path / file))
            found.update({name: loaded[name] for name in names})
        mx.eval(found)
        return found


def settings(folder: Path) -> dict[str, Any]:
    """The content of an adapter folder's ``adapter_config.json``.

    Raises:
        AdapterError: it is not there, or is no JSON table.
    """
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


def is_peft(written: dict[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is PEFT's: mlx-lm's has the same name."""
    return "peft_type" in written


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name to shape, of a safetensors file that is whole.

    Raises:
        AdapterError: it is not.
    """
    try:
        return {name: tuple(entry["shape"]) for name, entry in read_header(path).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is broken: {error}; train or copy it again") from error


def base_model(folder: str | Path) -> str | None:
    """The base that an adapter folder's configuration names, or None.

    Raises:
        AdapterError: the configuration cannot be read.
    """
    written = settings(Path(folder))
    name = written.get("base_model_name_or_path" if is_peft(written) else "model")
    return name if isinstance(name, str) and name else None
