"""Where labelled texts come from: a built-in task, a file, or the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from abft_mlx import recipe
from abft_mlx.data import rows
from abft_mlx.data.rows import Report
from abft_mlx.data.texts import LabelledTexts
from abft_mlx.errors import DataError
from abft_mlx.files import is_path
from abft_mlx.recipe import DataSection

BUILTIN_ROWS = 6000
BUILTIN_SEED = 7
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load(section: DataSection) -> LabelledTexts:
    """Read the labelled texts that a recipe names.

    Raises:
        DataError: they cannot be found, or hold problems; the error carries every one of them.
    """
    return report(section).require()


def report(section: DataSection) -> Report:
    """Read the labelled texts and say everything that is wrong with them.

    Raises:
        DataError: they cannot be found or opened at all.
    """
    source = section.source
    where = kind(source)
    if where == "builtin":
        return _builtin(source, section)
    path = Path(source).expanduser()
    if path.is_file() or path.suffix.lower() in rows.READERS:
        table = rows.read(path, section.text, section.label)
        return rows.check(table, source, section.labels, section.empty_texts)
    if path.is_dir():
        raise DataError(f"{source} is a folder; name a file in it ({', '.join(rows.READERS)})")
    if is_path(source):
        raise DataError(f"{source}: no such file; a path is relative to the current folder")
    if where == "hub":
        from abft_mlx.data import hub

        table = hub.read(section)
        return rows.check(table, hub.title(section), section.labels, section.empty_texts)
    if source in recipe.shipped():
        raise DataError(
            f"Unknown data.source {source!r}. {source} is a recipe: abft-mlx finetune {source}"
        )
    tasks = ["demo", *builtin_tasks()]
    near = difflib.get_close_matches(source, tasks, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise DataError(
        f"Unknown data.source {source!r}. {hint}Use a file ({', '.join(rows.READERS)}), a data "
        f"set of the hub (owner/name) or a built-in task ({', '.join(tasks)})"
    )


def kind(source: str) -> str:
    """Where :func:`report` looks for texts: "builtin", "file" or "hub"."""
    if source == "demo" or source in builtin_tasks():
        return "builtin"
    path = Path(source).expanduser()
    local = path.exists() or path.suffix.lower() in rows.READERS
    return "hub" if not local and _HUB_NAME.fullmatch(source) else "file"


def builtin_tasks() -> dict[str, Any]:
    """The built-in tasks by name."""
    from abft_mlx.data import generated

    return dict(generated.TASKS)


def _builtin(source: str, section: DataSection) -> Report:
    """The texts of a built-in task."""
    from abft_mlx.data import generated

    name = generated.DEMO_TASK if source == "demo" else source
    labels = generated.TASKS[name].labels
    pairs = enumerate(generated.generate(name, BUILTIN_ROWS, BUILTIN_SEED), 1)
    table = rows.Table([rows.Row(f"row {n}", text, labels[label]) for n, (text, label) in pairs])
    return rows.check(table, source, section.labels or labels)
