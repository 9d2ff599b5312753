"""The options that commands share, and how they override a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import resolve
from abft_mlx.errors import OutputError, UsageError

if TYPE_CHECKING:
    from abft_mlx.recipe import Recipe


def path(text: str) -> Path:
    """A path as it was typed, which an empty text is not."""
    if not text.strip():
        raise typer.BadParameter("the path is empty")
    return Path(text)


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
LabelWords = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL=WORD,…",
        help="The word that stands for each label in prompts, such as bug=bug,billing=payment; or "
        "letters for A, B, C.",
        show_default="the labels themselves",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="training.learning_rate.", show_default="the recipe's"),
]
Updates = Annotated[
    int | None,
    typer.Option(min=0, help="training.updates: optimizer steps.", show_default="the recipe's"),
]
Demonstrations = Annotated[
    str | None,
    typer.Option(
        metavar="K",
        help="prompt.demonstrations: labelled texts in a prompt; or auto.",
        show_default="the recipe's",
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
    label_words: str | None = None,
    learning_rate: float | None = None,
    updates: int | None = None,
    demonstrations: str | None = None,
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
        label_words: ``label=word`` pairs with commas between them, letters, or auto.
        learning_rate: of the optimizer.
        updates: optimizer steps.
        demonstrations: in a prompt; a number or auto.
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
    if label_words is not None:
        changes.append(override("prompt.label_words", _label_words(label_words)))
    for key, value in (
        ("training.learning_rate", learning_rate),
        ("training.updates", updates),
    ):
        if value is not None:
            changes.append(override(key, value))
    if demonstrations is not None:
        changes.append(f"prompt.demonstrations={demonstrations}")
    for section, seed in seeds.items():
        if seed is not None:
            changes.append(override(f"{section}.seed", seed))
    return [*changes, *(settings or ())]


def _label_words(text: str) -> str | dict[str, str]:
    """The value of ``prompt.label_words`` that a flag names."""
    if text.strip() in ("letters", "auto"):
        return text.strip()
    words = {}
    for pair in text.split(","):
        label, equals, word = (part.strip() for part in pair.partition("="))
        if not (label and equals and word):
            raise UsageError(
                f"--label-words {text!r}: {pair.strip()!r} is no label=word; write "
                "bug=bug,billing=payment, or letters"
            )
        words[label] = word
    return words


def open_recipe(name: str | None, changes: Sequence[str]) -> Recipe:
    """The named recipe, or the one for own texts where none is named, with the changes applied.

    Args:
        name: a recipe's name or file; a run folder is refused.
        changes: ``section.key=value`` each.

    Raises:
        RecipeError: no such recipe, or a change that cannot be used.
        UsageError: a run folder.
    """
    from abft_mlx import recipe

    if name is None:
        return recipe.own_data(changes)
    return recipe.load(resolve.recipe_file(name), changes)


def check_file(path: Path, *, overwrite: bool) -> None:
    """See whether ``--output`` may be written, before any long work.

    Raises:
        OutputError: it exists and ``overwrite`` is not set, is a folder, or its folder is missing
            or may not be written.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it with --output")
    if not path.parent.is_dir():
        raise OutputError(f"no such folder: {path.parent}; make it, or choose another --output")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give --overwrite to replace it, or another --output")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path}: cannot be written (no permission); choose another --output")
