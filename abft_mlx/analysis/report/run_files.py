"""What lies in a run folder, read for its report; no model is opened."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_mlx.errors import OutputError, RecipeError
from abft_mlx.files import parse_json
from abft_mlx.induction import HEADS_FILE, Heads, read_heads
from abft_mlx.recipe.files import parse
from abft_mlx.trainer.run_folder import RunFolder

EVAL_FILE = "eval.json"


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        run: run.json.
        recipe: recipe.yaml as a mapping.
        recipe_text: recipe.yaml as it is.
        metrics: the lines of metrics.jsonl.
        heads: heads.npz, where it is.
        evaluation: eval.json, where it is.
    """

    run: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    heads: Heads | None
    evaluation: dict[str, Any] | None


def read_run(folder: Path) -> RunFiles:
    """Read what a run left.

    Raises:
        OutputError: there is no run, or one of its files is broken.
    """
    of_run = RunFolder(folder)
    run = _mapping(of_run.read_run(), folder / "run.json")
    text, recipe = "", {}
    path = folder / "recipe.yaml"
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8")
            recipe = parse(text, str(path))
        except (OSError, UnicodeDecodeError, RecipeError) as error:
            raise OutputError(f"{path}: cannot be read ({error})") from None
    heads_path = folder / HEADS_FILE
    heads = read_heads(heads_path) if heads_path.exists() else None
    return RunFiles(run, recipe, text, _metrics(of_run), heads, _evaluation(folder / EVAL_FILE))


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        lines = folder.metrics()
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder.metrics_path}: cannot be read ({error})") from None
    if not all(isinstance(one, dict) and number(one, "step") is not None for one in lines):
        raise OutputError(f"{folder.metrics_path}: holds a line that is no update of a run")
    return lines


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = _mapping(parse_json(path.read_text(encoding="utf-8")), path)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
    base = document.get("base", {})
    parts = [document, base] if isinstance(base, dict) else [None]
    good = all(
        isinstance(part, dict)
        and isinstance(part.get("methods", {}), dict)
        and all(
            isinstance(one, dict) and number(one, "accuracy") is not None
            for one in part.get("methods", {}).values()
        )
        for part in parts
    )
    if not good or not isinstance(document.get("labels", []), list):
        raise OutputError(f"{path}: is no document of abft-mlx eval --json")
    return document


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OutputError(f"{path}: is no JSON object")
    return value


def find(document: Any, *keys: str) -> Any:
    """What lies at some depth of a document, or None."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def number(document: Any, *keys: str) -> float | None:
    """A finite number at some depth of a document, or None."""
    value = find(document, *keys)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if abs(value) <= sys.float_info.max else None


def text(document: Any, *keys: str) -> str | None:
    """A text at some depth of a document, or None."""
    value = find(document, *keys)
    return value if isinstance(value, str) and value else None


def short(source: str) -> str:
    """Of a local path its name alone."""
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return source.rstrip("/").rpartition("/")[2] or source
    return source
