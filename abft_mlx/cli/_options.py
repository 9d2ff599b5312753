"""The options that commands share, and how they override a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _progress
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from abft_mlx.adapters import Source
    from abft_mlx.cli._shell import Shell
    from abft_mlx.recipe import Recipe

RecipeName = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe that ships with abft-mlx (see: abft-mlx recipes list) or a .yaml file.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A model of mlx-lm: a local folder, a hub id, or demo for the bundled one.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Labelled texts: a .csv, .jsonl or .parquet file, a hub id, or a built-in task.",
        show_default=False,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="A run folder, whose recipe is used if none is named; an adapter of mlx-lm or "
        "PEFT; or one on the hub: owner/name, or owner/name@revision.",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="The column that holds the texts.", show_default="text"),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="The column that holds the labels.", show_default="label"),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="The class names: for integer labels the names of 0, 1, …; else the names allowed.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Set any field of the recipe, e.g. training.updates=64. May be given many times.",
        show_default=False,
    ),
]
EvaluationSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="evaluation.seed: the choice of demonstrations, and of all else that is drawn.",
        show_default="42",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON document on standard output; the rest on standard error."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies at the output.")]


def override(key: str, value: Any) -> str:
    """``key=value`` as the recipe reads it; a JSON string is a YAML string whatever it holds."""
    from abft_mlx import recipe

    return recipe.override(key, value)


def overrides(
    *,
    model: str | None = None,
    data: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    settings: Sequence[str] | None = None,
    **seeds: int | None,
) -> list[str]:
    """The recipe fields that flags set, ``--set`` last so that it has the last word.

    Args:
        model: a model's name.
        data: a source of labelled texts.
        text_column: name of the column with the texts.
        label_column: name of the column with the labels.
        labels: class names with commas between them.
        settings: the values of ``--set``.
        seeds: the section whose ``seed`` to set, and to what.
    """
    changes = []
    if model is not None:
        changes.append(override("model", model))
    if data is not None:
        changes.append(override("data.source", data))
    if text_column is not None:
        changes.append(override("data.text", text_column))
    if label_column is not None:
        changes.append(override("data.label", label_column))
    if labels is not None:
        names = [name.strip() for name in labels.split(",")]
        if len(names) < 2 or not all(names):
            raise UsageError(
                f"--labels {labels!r} does not name two classes or more, with commas between them"
            )
        changes.append(override("data.labels", names))
    for section, seed in seeds.items():
        if seed is not None:
            changes.append(override(f"{section}.seed", seed))
    return [*changes, *(settings or ())]


def open_recipe(name: str | None, changes: Sequence[str]) -> Recipe:
    """The named recipe, or the one for own texts where none is named, with the changes applied."""
    from abft_mlx import recipe

    return recipe.own_data(changes) if name is None else recipe.load(name, changes)


def find_adapter(named: str | None, shell: Shell) -> Source | None:
    """The adapter that ``--adapter`` names, fetched if it is on the hub."""
    if named is None:
        return None
    from abft_mlx import adapters

    with _progress.board(shell):
        return adapters.find(named)


def check_file(path: Path, *, overwrite: bool) -> None:
    """See whether ``--output`` may be written, before any long work.

    Raises:
        OutputError: it exists and ``overwrite`` is not set, is a folder, or its folder is missing.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it with --output")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: is no folder; make it, or choose another --output")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give --overwrite to replace it, or another --output")
