"""A study that is small enough to run, and a report that shows every number of its cells."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from abft_mlx import files, study

SETTINGS = (
    "training.examples=8",
    "training.updates=2",
    "training.prompts_per_update=4",
    "evaluation.queries=8",
    "evaluation.repeats=1",
    "evaluation.bootstrap_samples=10",
)


def text(methods: str = "[vanilla, abft]", more: str = "", name: str = "small") -> str:
    """A study file of the bundled model."""
    return (
        f"name: {name}\nmodels: [demo]\ntasks: [generated/emotion, generated/purpose]\n"
        f"methods: {methods}\nsettings: [{', '.join(SETTINGS)}]\n{more}\n"
    )


def report(folder: Path, opened: study.Study, cells: list[dict[str, Any]]) -> list[Path]:
    """Every number of every cell but times and memory, as table.csv."""
    lines = io.StringIO()
    table = csv.writer(lines)
    for cell in cells:
        run = cell["run"] or {}
        curve = [{**one, "seconds": None} for one in run.get("curve", [])]
        rest = {
            key: value
            for key, value in cell.items()
            if key not in ("run", "seconds", "load_average", "versions", "device", "plane")
        }
        table.writerow([opened.name, json.dumps(rest), json.dumps(curve)])
    path = folder / "table.csv"
    files.write_text(path, lines.getvalue())
    return [path]
