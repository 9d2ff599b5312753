"""All that a run needs to go on, in one safetensors file that is replaced as a whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx import files
from abft_mlx.errors import OutputError

FILE_NAME = "state.safetensors"
SCHEMA = 1
PARTS = ("trainable", "optimizer", "best")
# Differences that a message names, and the characters of a value that it shows.
_NAMED = 3
_SHORT = 60


@dataclass
class Checkpoint:
    """The state of a run after some number of updates: trees of arrays, and plain values.

    ``best`` has the trainable parameters of the best validation so far, if there was one.
    """

    trainable: Any
    optimizer: Any
    best: Any = None
    facts: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint into ``folder``, in place of the one that lies there.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full or the quota is used up; what lay there stays.
    """
    arrays: dict[str, mx.array] = {}
    for part in PARTS:
        tree = getattr(checkpoint, part) or {}
        arrays.update({f"{part}/{name}": value for name, value in tree_flatten(tree)})
    metadata = {"schema": str(SCHEMA), "facts": json.dumps(checkpoint.facts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(folder, error) from error
    with files.replacing(folder / FILE_NAME) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, metadata=metadata)
        except RuntimeError as error:
            raise files.array_failure(folder, error) from error


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise OutputError(f"{folder.parent}: no checkpoint to resume from; start the run anew")
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        # Arrays are read lazily; this file is about to be replaced.
        mx.eval(arrays)
        facts = files.parse_json(metadata["facts"])
        schema = metadata["schema"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise OutputError(
            f"{path}: not a readable checkpoint ({error}); start anew with --overwrite"
        ) from error
    if schema != str(SCHEMA):
        raise OutputError(f"{path}: checkpoint schema {schema}, this version reads {SCHEMA}")

    trees = []
    for part in PARTS:
        own = [(name.removeprefix(f"{part}/"), array) for name, array in arrays.items()
               if name.startswith(f"{part}/")]  # fmt: skip
        trees.append(tree_unflatten(own) if own else None)
    trainable, optimizer, best = trees
    return Checkpoint(trainable, optimizer, best, facts)


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What two runs were made with that is not the same, in a few words."""

    def short(values: dict[str, Any], name: str) -> str:
        text = json.dumps(values.get(name), ensure_ascii=False)
        return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"

    ours = json.loads(json.dumps(ours))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    more = [f"and {len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join(
        [f"{name} was {short(theirs, name)} and is {short(ours, name)}" for name in names[:_NAMED]]
        + more
    )
