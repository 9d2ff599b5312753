"""All that a run needs to go on, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx.errors import OutputError, RunError
from abft_mlx.files import replacing, write_failure

FILE_NAME = "state.safetensors"
SCHEMA = 1


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
    """Write the checkpoint into ``folder``, replacing an older one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error
    arrays: dict[str, mx.array] = {}
    for prefix, tree in (
        ("trainable", checkpoint.trainable),
        ("optimizer", checkpoint.optimizer),
        ("best", checkpoint.best or {}),
    ):
        arrays.update({f"{prefix}/{name}": value for name, value in tree_flatten(tree)})
    metadata = {"schema": str(SCHEMA), "facts": json.dumps(checkpoint.facts)}
    path = folder / FILE_NAME
    with replacing(path) as temporary:
        try:
            mx.save_safetensors(str(temporary), arrays, metadata=metadata)
        except RuntimeError as error:
            raise RunError(f"{path}: cannot be written ({error}); the last one stays") from error


def load(folder: Path) -> Checkpoint:
    """Read the checkpoint that :func:`save` wrote.

    Raises:
        OutputError: there is none, or it cannot be read.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise OutputError(f"{path.parent}: no checkpoint to resume from; start the run anew")
    try:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        # Arrays are read lazily; this file is about to be replaced.
        mx.eval(arrays)
        facts = json.loads(metadata["facts"])
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
