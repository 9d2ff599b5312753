"""What a run reports while it works. Long functions take one `Events` object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Null in a line whose update was left out.
MEASURES = ("loss", "punish", "reward", "induction_heads")


@dataclass(frozen=True)
class Update:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: optimizer updates done, from 1.
        seen_examples: prompts seen so far, repeats counted.
        loss: averaged over the update's prompts; null where the update was left out, as are the
            three measures after it.
        punish: equation 1's first term without A.
        reward: its second term without B.
        induction_heads: heads above the filter, averaged over the update's prompts.
        A: the punish weight that this update used; A and B are 0 for other objectives than abft.
        B: the reward weight.
        learning_rate: of this update.
        tokens: prompt tokens in this update, padding left out.
        seconds: wall-clock seconds of this update.
        peak_memory_bytes: MLX's peak so far in this run.
        validation_accuracy: in 0..1, where this update was followed by a validation.
        note: what this update changed to fit into memory, where it did.
        skipped: why this update was left out, where it was.
    """

    step: int
    seen_examples: int
    loss: float | None
    punish: float | None
    reward: float | None
    induction_heads: float | None
    A: float
    B: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    validation_accuracy: float | None = None
    note: str | None = None
    skipped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that are known, in order; the measures always."""
        fields = asdict(self).items()
        return {name: value for name, value in fields if value is not None or name in MEASURES}


class Events:
    """Ignores everything. Override the methods that you need."""

    def prepared(self, experiment: Any, trainable: int) -> None:
        """A run is ready to train: its `Experiment`, and how many numbers will be trained."""

    def update(self, update: Update) -> None:
        """One update is done."""

    def stage(self, what: str) -> None:
        """Something begins, and the stage before it is over; "" where nothing begins."""

    def progress(self, done: int, total: int) -> None:
        """So many prompts of so many are done, in this stage."""


class OnUpdate(Events):
    """Calls a function, if there is one, with every update, and ignores the rest."""

    def __init__(self, call: Callable[[Update], None] | None) -> None:
        self._call = call

    def update(self, update: Update) -> None:
        """Call the function."""
        if self._call is not None:
            self._call(update)
