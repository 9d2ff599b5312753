"""A run folder's files, read and checked, for what shows a run without opening its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abft_mlx.errors import OutputError, RecipeError
from abft_mlx.files import parse_json
from abft_mlx.induction import HEADS_FILE, Heads, read_heads
from abft_mlx.recipe.files import recipe_map
from abft_mlx.trainer import EVALUATION_FILE, RunFolder, check_schema


@dataclass(frozen=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: the run folder.
        run: ``run.json``.
        recipe: ``recipe.yaml`` as a map, its schema left out; empty where there is none.
        recipe_text: ``recipe.yaml`` as it is.
        metrics: the lines of ``metrics.jsonl`` that are whole.
        heads: ``heads.npz``, or None.
        evaluation: ``eval.json``, or None.
    """

    folder: Path
    run: dict[str, Any]
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    heads: Heads | None
    evaluation: dict[str, Any] | None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "run.json").exists()


def read_files(folder: Path) -> RunFiles:
    """Read what lies in a run folder.

    Raises:
        OutputError: it holds no run, or one of its files is broken.
    """
    run = _object(folder / "run.json")
    if run is None:
        raise OutputError(
            f"{folder}: holds no run (no run.json); name a folder that finetune wrote"
        )
    text, recipe = _recipe(folder / "recipe.yaml")
    heads = folder / HEADS_FILE
    return RunFiles(
        folder=folder,
        run=run,
        recipe=recipe,
        recipe_text=text,
        metrics=_metrics(RunFolder(folder)),
        heads=read_heads(heads) if heads.exists() else None,
        evaluation=_object(folder / EVALUATION_FILE),
    )


def broken(path: Path, reason: str) -> OutputError:
    """What is said of a file that cannot be read."""
    reason = " ".join(reason.split())
    return OutputError(f"{path}: cannot be read ({reason}); make it again or take it away")


def _object(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise broken(path, str(error)) from None
    if not isinstance(content, dict):
        raise broken(path, "it holds no object")
    check_schema(path, content)
    return content


def _recipe(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, recipe_map(text, str(path))
    except FileNotFoundError:
        return "", {}
    except RecipeError as error:
        raise OutputError(str(error)) from None
    except (OSError, ValueError) as error:
        raise broken(path, str(error)) from None


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """The lines that are whole; a run that goes on may be writing the last one."""
    try:
        lines = folder.metrics()
    except (OSError, ValueError) as error:
        raise broken(folder.metrics_path, str(error)) from None
    if not all(isinstance(one, dict) for one in lines):
        raise broken(folder.metrics_path, "a line is no object")
    return lines
