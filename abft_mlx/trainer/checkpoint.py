"""All that a run needs to go on: a safetensors file, its checksum, and the one before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx.errors import OutputError
from abft_mlx.files import array_failure, parse_json
from abft_mlx.trainer import generations

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
    """Write the checkpoint into ``folder``; the one that lay there stays as the one before.

    Raises:
        OutputError: the folder cannot be written.
        RunError: the disk is full or the quota is used up; what lay there stays.
    """
    arrays: dict[str, mx.array] = {}
    for prefix, tree in (
        ("trainable", checkpoint.trainable),
        ("optimizer", checkpoint.optimizer),
        ("best", checkpoint.best or {}),
    ):
        arrays.update({f"{prefix}/{name}": value for name, value in tree_flatten(tree)})
    metadata = {"schema": str(SCHEMA), "facts": json.dumps(checkpoint.facts)}

    def fill(new: Path) -> None:
        try:
            mx.save_safetensors(str(new / FILE_NAME), arrays, metadata=metadata)
        except RuntimeError as error:
            raise array_failure(folder, error) from error

    generations.replace(folder, fill)


def exists(folder: Path) -> bool:
    """Whether there is anything that a run could go on from, damaged or not."""
    new, *placed = generations.names(folder)
    return any(one.is_dir() for one in placed) or (new.is_dir() and generations.damage(new) is None)


def load(folder: Path) -> tuple[Checkpoint, Path, list[str]]:
    """Read the newest checkpoint that is whole.

    Returns:
        The checkpoint, where it lies, and what is wrong with newer ones.

    Raises:
        OutputError: there is none, or none can be read.
    """
    if not exists(folder):
        raise OutputError(f"{folder.parent}: no checkpoint to resume from; start the run anew")
    chosen, wrong = generations.newest(folder)
    if chosen is None:
        raise OutputError(f"no checkpoint can be used: {'; '.join(wrong)}; start the run anew")
    return _read(chosen / FILE_NAME), chosen, wrong


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What two runs were made with that is not the same, in a few words."""
    theirs, ours = (json.loads(json.dumps(one)) for one in (theirs, ours))
    said = [
        f"{name} was {_short(theirs.get(name))} and is {_short(ours.get(name))}"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]
    more = [f"and {len(said) - _NAMED} more"] if len(said) > _NAMED else []
    return ", ".join([*said[:_NAMED], *more])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def _read(path: Path) -> Checkpoint:
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        # Arrays are read lazily; this file is about to be replaced.
        mx.eval(arrays)
        facts = parse_json(metadata["facts"])
        schema = metadata["schema"]
    except (RuntimeError, KeyError, ValueError) as error:
        raise OutputError(f"{path}: not a readable checkpoint ({error}); start anew") from error
    if schema != str(SCHEMA):
        raise OutputError(f"{path}: checkpoint schema {schema}, this version reads {SCHEMA}")

    def part(prefix: str) -> Any:
        start = len(prefix) + 1
        found = [(n[start:], a) for n, a in arrays.items() if n.startswith(f"{prefix}/")]
        return tree_unflatten(found) if found else None

    return Checkpoint(
        trainable=part("trainable"),
        optimizer=part("optimizer"),
        best=part("best"),
        facts=facts,
    )
