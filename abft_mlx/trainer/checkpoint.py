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
# Differences that a message names, and the characters of a value that it shows.
_NAMED = 3
_SHORT = 60


@dataclass
class Checkpoint:
    """The state of a run after some number of updates.

    Attributes:
        trainable: the model's trainable parameters, as a tree.
        optimizer: the optimizer's state, as a tree.
        best: trainable parameters of the best validation so far, or None.
        facts: plain values: updates done, the controller, the best validation, totals, and a
            fingerprint of what is being trained.
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
    for part in ("trainable", "optimizer", "best"):
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

    def part(prefix: str) -> Any:
        start = len(prefix) + 1
        found = [(n[start:], a) for n, a in arrays.items() if n.startswith(f"{prefix}/")]
        return tree_unflatten(found) if found else None

    return Checkpoint(part("trainable"), part("optimizer"), part("best"), facts)


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What two runs were made with that is not the same, in a few words."""
    theirs, ours = (json.loads(json.dumps(values)) for values in (theirs, ours))
    different = [
        f"{name} was {_short(theirs.get(name))} and is {_short(ours.get(name))}"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    more = [f"and {len(different) - _NAMED} more"] if len(different) > _NAMED else []
    return ", ".join([*different[:_NAMED], *more])


def _short(value: Any) -> str:
    """A value as JSON, cut to fit into a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
