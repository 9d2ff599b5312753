"""What a claim is, and what a study says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import claim_rules as rules

from abft_mlx.analysis.measurements import Measurement, of_task, tasks

END_TO_END = ("end_to_end", "end_to_end_qk")


@dataclass(frozen=True)
class Study:
    """One base in one study.

    Attributes:
        name: the study's.
        model: the base's.
        document: the study's facts.
        found: measurements of this base.
    """

    name: str
    model: str
    document: dict[str, Any]
    found: list[Measurement]

    def of(self, method: str) -> list[Measurement]:
        """Measurements by one method, nothing swept."""
        return [one for one in self.found if one.method == method and not one.sweep]

    def cells(self, method: str) -> list[dict[str, Any]]:
        """Cells of one method, nothing swept."""
        return [
            cell
            for cell in self.document["cells"]
            if (cell["model"], cell["method"]) == (self.model, method) and not cell["sweep"]
        ]


@dataclass(frozen=True)
class Finding:
    """What one study says of one claim.

    Attributes:
        verdict: one of three.
        figures: the numbers, with their interval.
        scope: tasks, seeds and prompts behind them.
        detail: which of several comparisons of the claim this is.
    """

    verdict: str
    figures: str
    scope: str
    detail: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        statement: in one line.
        rule: how the verdict follows from an interval.
        find: gives the findings of a study; none where it did not measure the claim.
    """

    statement: str
    rule: str
    find: Callable[[Study], list[Finding]]


def scope(names: Sequence[str], runs: int, prompts: int | None = None) -> str:
    """How many tasks, training runs and prompts, in words."""
    task = f"{len(names)} task{'' if len(names) == 1 else 's'}"
    each = f", {runs} run{'' if runs == 1 else 's'}"
    return task + (each if runs else "") + (f", n = {prompts:,} a run" if prompts else "")


def seeded(found: Sequence[Measurement]) -> bool:
    """Whether every task was trained often enough; what is not trained needs no seeds."""
    trained = [one for one in found if one.seed is not None]
    return all(len(of_task(trained, task)) >= rules.FEWEST_SEEDS for task in tasks(trained))
