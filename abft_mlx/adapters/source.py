"""Where an adapter is: a folder, or a repository of the hub that is fetched to one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from abft_mlx import hub
from abft_mlx.errors import AdapterError, RunError
from abft_mlx.files import is_path

# Exact names, so that nothing else that a repository holds comes along, code least of all.
FETCHED = (
    "adapters.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "lora.safetensors",
    "head_weights.safetensors",
    "recipe.yaml",
    "run.json",
    "demonstrations.jsonl",
)


@dataclass(frozen=True)
class Source:
    """An adapter that has been found; as text it is the name it was asked for by.

    Attributes:
        name: a folder or a hub id, as given.
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
        found = hub.snapshot(identity, FETCHED, revision=revision)
    except Exception as error:
        failure = hub.explain(error, asked)
        raise (AdapterError if failure.refused else RunError)(failure.message) from error
    if not found.is_dir() or not any(found.iterdir()):
        raise AdapterError(f"adapter {name}: the repository holds no adapter (no {FETCHED[2]})")
    return Source(name, found)


def local_folder(adapter: Named) -> Path:
    """The folder of an adapter's files; as :func:`find`."""
    return find(adapter).folder
