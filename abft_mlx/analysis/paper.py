"""The published numbers, to stand beside ours. All are percent."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

_ASSET = Path(__file__).resolve().parent.parent / "assets" / "paper_targets.json"

TABLES = ("table1", "table2", "table3", "table4")
# What the paper compares with under the name of a checkpoint instead of a method.
_CHECKPOINTS = ("PICL", "MetaICL")


class Paper:
    """The tables of arXiv 2505.14233, by the names that studies use.

    Args:
        table: table1, table2, table3, table4, or None for no table.
    """

    def __init__(self, table: str | None = None) -> None:
        self.table = table

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All of ``assets/paper_targets.json``."""
        return json.loads(_ASSET.read_text(encoding="utf-8"))

    def model(self, name: str, source: str) -> str | None:
        """What the paper calls a model, by the study's name for it or where it comes from."""
        ids = self.facts["model_ids"]
        if name in ids or any(name == f"{one} {end}" for one in ids for end in _CHECKPOINTS):
            return name
        return next((known for known, one in ids.items() if one == source), None)

    def task(self, name: str) -> str:
        """What the paper calls a task, or the name itself."""
        return self.facts["tasks"].get(name, name)

    def task_order(self, name: str) -> tuple[int, str]:
        """Sort key: the paper's order, then others by name."""
        known = list(self.facts["tasks"])
        return (known.index(name) if name in known else len(known), name)

    def model_order(self, name: str, source: str) -> tuple[int, str]:
        """Sort key: the paper's order, then others by name."""
        known = list(self.facts["model_ids"])
        called = self.model(name, source)
        called = next((one for one in known if called and called.startswith(one)), None)
        return (known.index(called) if called else len(known), name)

    def row(self, model: str | None, method: str) -> dict[str, Any]:
        """The table's entry for a model and method; empty where it has none."""
        if self.table is None or model is None:
            return {}
        for checkpoint in _CHECKPOINTS:
            if model.endswith(f" {checkpoint}"):
                model = model.removesuffix(f" {checkpoint}")
                # A published checkpoint, prompted plainly, is the paper's row of that name.
                method = checkpoint.lower() if method == "vanilla" else ""
        return self.facts.get(self.table, {}).get(model, {}).get(method, {})

    def accuracy(self, model: str | None, method: str, task: str) -> float | None:
        """Accuracy on one task."""
        return self.row(model, method).get("accuracy", {}).get(self.task(task))

    def average(self, model: str | None, method: str, tasks: list[str]) -> float | None:
        """Mean accuracy, where our tasks are all of the paper's."""
        if {self.task(one) for one in tasks} != set(self.facts["tasks"].values()):
            return None
        return self.row(model, method).get("average")

    def consistency(self, model: str | None, kind: str, method: str) -> float | None:
        """Table 3: ``kind`` is template or demonstrations, ``method`` untrained or abft."""
        if self.table != "table3" or model is None:
            return None
        return self.facts["table3"].get(model, {}).get(kind, {}).get(method)
