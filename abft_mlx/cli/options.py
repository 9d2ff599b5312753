"""The options that commands share, what they set in a recipe, and what names mean."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from abft_mlx.cli import progress
from abft_mlx.errors import AdapterError, OutputError, RecipeError, UsageError

if TYPE_CHECKING:
    from abft_mlx.adapters import Source
    from abft_mlx.cli.shell import Shell
    from abft_mlx.recipe import Recipe

_RECIPE, _RUN, _ADAPTER, _MODEL = "recipe.yaml", "run.json", "adapter_config.json", "config.json"


def path(text: str) -> Path:
    """A path as it was typed, which an empty text is not."""
    if not text.strip():
        raise typer.BadParameter("the path is empty")
    return Path(text)


# What the options that several commands have mean; `documented` says how this is read.
SHARED = """
adapter (RUN): A run folder, whose recipe is used if none is named; an adapter of mlx-lm or PEFT; or
    one on the hub: owner/name, or owner/name@revision.
as_json (--json): One JSON document on standard output; the rest on standard error.
data (-d DATA): Labelled texts: a .csv, .jsonl or .parquet file, a hub id, or a built-in task.
demonstrations (K): prompt.demonstrations: labelled texts in a prompt; or auto.
    [default: the recipe's]
label_column: The column of the labels. [default: label]
label_words (LABEL=WORD,…): The word that stands for each label in prompts, such as
    bug=bug,billing=payment; or letters for A, B, C. [default: the labels themselves]
labels (A,B,C): The class names: for integer labels the names of 0, 1, …; else the names allowed.
learning_rate: training.learning_rate. [default: the recipe's]
model (-m MODEL): A model of mlx-lm: a local folder, a hub id, or demo for the bundled one.
overwrite: Replace what is at the output.
quiet (-q): No progress, only the result.
recipe (RECIPE): A recipe that ships with abft-mlx (see: abft-mlx recipes list) or a .yaml file.
run_or_recipe (RUN_OR_RECIPE): A run folder, which means its model with its adapter; or a recipe:
    the name of one that ships, or a .yaml file.
seed: evaluation.seed: the choice of demonstrations, and of all else that is drawn. [min: 0]
    [default: 42]
settings (--set SECTION.KEY=VALUE): Set any field of the recipe, e.g. training.updates=64. May be
    given many times.
text_column: The column of the texts. [default: text]
updates: training.updates: optimizer steps. [min: 0] [default: the recipe's]
"""
# ``name (-n METAVAR): help``
_ENTRY = re.compile(r"(\w+)(?: \(([^)]*)\))?: (.*)")
_BRACKET = re.compile(r" ?\[(default|min|max): ([^\]]*)\]$")


def documented(function: Callable[..., None]) -> Callable[..., None]:
    """Have Typer take the help of a command's parameters from its docstring.

    Positional parameters are arguments, keyword-only ones are options. An entry of Args is
    ``name (-n METAVAR): help [min: 0] [default: what the help shows]``, where all but name and help
    may be left out; one that is missing is that of `SHARED`.
    """
    text, _, own = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:\n")
    lines = re.sub(r"\n +", " ", f"{SHARED}\n{textwrap.dedent(own)}").splitlines()
    entries = {
        match[1]: (match[2] or "", match[3]) for match in map(_ENTRY.fullmatch, lines) if match
    }
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        words, shown = entries[name]
        more: dict[str, Any] = {"show_default": True}
        while match := _BRACKET.search(shown):
            key, value = match.groups()
            more |= {"show_default": value} if key == "default" else {key: int(value)}
            shown = shown[: match.start()]
        if name == "output":
            words, more["parser"] = f"-o {words}", path
        flags = [word for word in words.split() if word.startswith("-")]
        metavar = " ".join(word for word in words.split() if word not in flags) or None
        if parameter.kind is not parameter.KEYWORD_ONLY:
            info = typer.Argument(metavar=metavar, help=shown, **more)
        else:
            long = name.replace("_", "-")
            if not any(flag.startswith("--") for flag in flags):
                flags.insert(
                    0, f"--{long}" + (f"/--no-{long}" if parameter.default is True else "")
                )
            info = typer.Option(*flags, metavar=metavar, help=shown, **more)
        function.__annotations__[name] = Annotated[hints[name], info]
    function.__doc__ = text
    return function


# The recipe field that each option sets.
_FIELDS = {
    "model": "model",
    "data": "data.source",
    "text_column": "data.text",
    "label_column": "data.label",
    "labels": "data.labels",
    "label_words": "prompt.label_words",
    "learning_rate": "training.learning_rate",
    "updates": "training.updates",
    "demonstrations": "prompt.demonstrations",
    "batch_tokens": "evaluation.batch_tokens",
    "training_seed": "training.seed",
    "evaluation_seed": "evaluation.seed",
}


def overrides(
    settings: Sequence[str] | None = None, base: Mapping[str, Any] | None = None, **flags: Any
) -> dict[str, Any]:
    """The recipe fields that options set, as a map from ``section.key`` to values."""
    from abft_mlx import recipe

    readers = {"labels": _labels, "label_words": _label_words}
    changes = dict(base or {})
    for name, value in flags.items():
        if value is not None:
            changes[_FIELDS[name]] = readers[name](value) if name in readers else value
    return changes | recipe.parse_overrides(settings or ())


def names(text: str, flag: str) -> list[str]:
    """The names that an option lists, with commas between them."""
    listed = [name.strip() for name in text.split(",")]
    if not all(listed):
        raise UsageError(
            f"{flag} {text!r} has an empty name in it; write names with commas between"
        )
    return list(dict.fromkeys(listed))


def _labels(text: str) -> list[str]:
    """The value of ``data.labels``."""
    listed = [name.strip() for name in text.split(",")]
    if len(listed) < 2 or not all(listed):
        raise UsageError(
            f"--labels {text!r} does not name two classes or more, with commas between them"
        )
    return listed


def _label_words(text: str) -> str | dict[str, str]:
    """The value of ``prompt.label_words``."""
    if text.strip() in ("letters", "auto"):
        return text.strip()
    words = {}
    for pair in text.split(","):
        label, _, word = (part.strip() for part in pair.partition("="))
        if not (label and word):
            raise UsageError(
                f"--label-words {text!r}: {pair.strip()!r} is no label=word; write "
                "bug=bug,billing=payment, or letters"
            )
        words[label] = word
    return words


def open_recipe(name: str | None, changes: Mapping[str, Any]) -> Recipe:
    """The named recipe, or the one for own texts where none is named, with the changes applied."""
    from abft_mlx import recipe

    return recipe.own_data(changes) if name is None else recipe.load(recipe_file(name), changes)


def both_needed(model: str | None, data: str | None, more: str = "") -> None:
    """Refuse to work without a recipe where --model or --data is missing."""
    if model is None or data is None:
        missing = "--model" if model is None else "--data"
        raise UsageError(
            f"{missing} is missing: without a recipe, or a run folder that holds one, both "
            f"--model and --data are needed{more}"
        )


def check_file(path: Path, *, overwrite: bool) -> None:
    """See whether ``--output`` may be written, before any long work."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it with --output")
    if not path.parent.is_dir():
        raise OutputError(f"no such folder: {path.parent}; make it, or choose another --output")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give --overwrite to replace it, or another --output")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path}: cannot be written (no permission); choose another --output")


@dataclass(frozen=True)
class Subject:
    """What a command works on.

    A folder that exists wins over everything but the name of a shipped recipe. A run folder always
    means the model with its adapter. A name that looks like a path and is not there is a mistake,
    and never looked for on the hub.
    """

    recipe: str | None  # a name or file; None where --model and --data say it all
    adapter: Source | None = None  # what to put on the model
    run: Path | None = None  # the local run folder that recipe and adapter are both of
    model: str | None = None  # one that was named where a recipe could be


def subject(
    shell: Shell,
    first: str | None,
    adapter: str | None = None,
    *,
    models: bool = False,
    data: str | None = None,
) -> Subject:
    """What a command's first argument and ``--adapter`` name."""
    if first is not None and _kind(first) == "adapter":
        if adapter is not None and Path(adapter).expanduser() != Path(first).expanduser():
            raise UsageError(
                f"{first} is an adapter, and --adapter {adapter} names another; give one of them, "
                f"or {Path(first) / _RECIPE} for the recipe alone"
            )
        first, adapter = None, first
    source = None if adapter is None else find_adapter(shell, adapter)
    folder = source.folder if source and (source.folder / _RECIPE).is_file() else None
    own = str(folder / _RECIPE) if folder else None
    if first is None:
        local = source is not None and Path(source.name).expanduser().is_dir()
        return Subject(
            own, source, folder if folder and local and (folder / _RUN).is_file() else None
        )
    if models and _is_model(first, data):
        return Subject(own, source, model=first)
    recipe_file(first)
    return Subject(first, source)


def _kind(name: str) -> str:
    """What a name is here: recipe (a shipped one's name), adapter, model, folder, file or ""."""
    from abft_mlx import recipe

    path = Path(name).expanduser()
    if name in recipe.shipped():
        return "recipe"
    if any((path / file).is_file() for file in (_RECIPE, _RUN, _ADAPTER)):
        return "adapter"
    if path.is_dir():
        return "model" if (path / _MODEL).is_file() else "folder"
    return "file" if path.is_file() else ""


def find_adapter(shell: Shell, name: str) -> Source:
    """The adapter of a run folder, an adapter folder or the hub, from where it is fetched."""
    from abft_mlx import adapters

    with progress.board(shell):
        source = adapters.find(name)
    if (source.folder / _ADAPTER).is_file():
        return source
    if (source.folder / _RUN).is_file():
        raise AdapterError(
            f"run {name} holds no adapter yet (no {_ADAPTER}); "
            f"continue it: abft-mlx finetune --resume {name}"
        )
    raise AdapterError(f"{name} is a folder, but no run and no adapter (no {_ADAPTER})")


def recipe_file(name: str) -> Path:
    """The file of a recipe; an error says what the name is instead."""
    from abft_mlx import hub, recipe

    kind = _kind(name)
    if kind == "adapter":
        raise UsageError(
            f"{name} is a run folder, which means a model with its adapter; its recipe alone is "
            f"{Path(name) / _RECIPE}, and finetune --resume {name} continues it"
        )
    if kind in ("model", "folder"):
        model = kind == "model"
        raise RecipeError(
            f"{name} is {'a model: give it with --model' if model else f'no run (no {_RUN})'}"
        )
    try:
        return recipe.find(name)
    except RecipeError as error:
        if hub.split_revision(name) is None or "no such" in str(error):
            raise
        raise RecipeError(
            f"{name} is no folder here and no recipe; what is on the hub is named with --model "
            "or --adapter"
        ) from None


def _is_model(name: str, data: str | None) -> bool:
    """Whether a name that may be a model or a recipe is a model."""
    from abft_mlx import hub
    from abft_mlx.files import is_path

    if name == "demo":
        return data is not None
    kind = _kind(name)
    if kind == "folder":
        raise UsageError(f"{name} is a folder, but no run (no {_RUN}) and no model (no {_MODEL})")
    return kind == "model" or (not kind and hub.is_id(name) and not is_path(name))
