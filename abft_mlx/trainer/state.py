"""A trainer's state into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Protocol

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from abft_mlx.errors import OutputError
from abft_mlx.objective import PunishController
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import checkpoint, generations
from abft_mlx.trainer.backoff import Backoff
from abft_mlx.trainer.run_folder import RunFolder
from abft_mlx.trainer.step import Step


class Trainer(Protocol):
    """What is kept of a :class:`abft_mlx.trainer.Trainer`, and what is needed to do so."""

    model: nn.Module
    optimizer: optim.Optimizer
    step: Step
    controller: PunishController
    backoff: Backoff
    progress: Any
    best: Any
    fingerprint: str
    made_with: dict[str, Any]
    folder: RunFolder | None
    ranks: Ranks
    on_notice: Callable[[str], None]


def save(trainer: Trainer, folder: RunFolder) -> None:
    """Write a checkpoint of all that the trainer has come to."""
    facts = {
        "progress": asdict(trainer.progress),
        "controller": trainer.controller.state(),
        "rows": trainer.backoff.rows,
        "shapes": sorted(trainer.step.shapes),
        "fingerprint": trainer.fingerprint,
        "made_with": trainer.made_with,
    }
    folder.sync_metrics()
    checkpoint.save(
        folder.checkpoint_path,
        checkpoint.Checkpoint(
            trainable=trainer.model.trainable_parameters(),
            optimizer=trainer.optimizer.state,
            best=trainer.best,
            facts=facts,
        ),
    )


def restore(trainer: Trainer) -> Callable[[], None]:
    """Give a trainer the state of its folder's newest checkpoint that is whole.

    Returns:
        What puts the folder in order, once all ranks have read from it.

    Raises:
        OutputError: there is nothing to resume, or it belongs to another run.
    """
    folder = trainer.folder
    if folder is None:
        raise OutputError("nothing to resume: this run writes no folder")
    found, lies_at, wrong = checkpoint.load(folder.checkpoint_path)
    facts = found.facts
    if facts["fingerprint"] != trainer.fingerprint:
        named = checkpoint.difference(facts.get("made_with", {}), trainer.made_with)
        raise OutputError(
            f"{folder.path}: its checkpoint was made with another recipe, model, data or "
            f"version{f' ({named})' if named else ''}; put that back, or start anew with "
            "--overwrite"
        )
    ours = dict(tree_flatten(trainer.model.trainable_parameters()))
    theirs = dict(tree_flatten(found.trainable))
    if {n: a.shape for n, a in ours.items()} != {n: a.shape for n, a in theirs.items()}:
        raise OutputError(f"{folder.path}: its checkpoint does not fit this model")
    trainer.model.update(found.trainable)
    trainer.optimizer.state = found.optimizer
    trainer.best = found.best
    trainer.controller = PunishController.from_state(facts["controller"])
    # How an update is cut decides its last bits, and the memory left may be another now.
    trainer.backoff.rows = facts["rows"]
    trainer.step.shapes = {tuple(one) for one in facts["shapes"]}
    progress = dict(facts["progress"])
    progress["validations"] = [tuple(one) for one in progress["validations"]]
    trainer.progress = replace(trainer.progress, **progress)
    updates = trainer.progress.updates
    if trainer.ranks.first:
        folder.check_metrics(updates)
        for line in wrong:
            trainer.on_notice(f"{line}; going on from the one before, after update {updates}")

    def settle() -> None:
        generations.settle(folder.checkpoint_path, lies_at)
        folder.keep_metrics(updates)

    return settle
