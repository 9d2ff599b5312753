"""What a name on the command line means: a run, an adapter, a recipe, a model or a data file.

A folder that exists wins over everything but the name of a shipped recipe. A run folder always
means the model with its adapter. What looks like a path and is not there is a mistake, and never
looked for on the hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from abft_mlx.cli import progress
from abft_mlx.errors import AdapterError, RecipeError, UsageError

if TYPE_CHECKING:
    from abft_mlx.adapters import Source
    from abft_mlx.cli.shell import Shell

_RECIPE, _RUN, _ADAPTER, _MODEL = "recipe.yaml", "run.json", "adapter_config.json", "config.json"


@dataclass(frozen=True)
class Subject:
    """What a command works on.

    Attributes:
        recipe: a recipe's name or file; None where --model and --data say it all.
        adapter: what to put on the model, if anything.
        run: the local run folder that recipe and adapter are both of, if they are.
        model: a model that was named where a recipe could be.
    """

    recipe: str | None
    adapter: Source | None = None
    run: Path | None = None
    model: str | None = None


def subject(
    shell: Shell,
    first: str | None,
    adapter: str | None = None,
    *,
    models: bool = False,
    data: str | None = None,
) -> Subject:
    """What a command's first argument and ``--adapter`` name.

    Args:
        shell: shows what is fetched from the hub.
        first: a run or adapter folder, a recipe, or a model where ``models`` allows it.
        adapter: the value of ``--adapter``: a run or adapter folder, or owner/name of the hub.
        models: whether ``first`` may be a model.
        data: the value of ``--data``: ``demo`` is a model beside it, and a recipe without.

    Raises:
        UsageError: a name is none of these; the message says what it is, or that it is not there.
    """
    if first is not None and is_adapter(first):
        if adapter is not None and Path(adapter).expanduser() != Path(first).expanduser():
            raise UsageError(
                f"{first} is an adapter, and --adapter {adapter} names another; give one of them, "
                f"or {Path(first) / _RECIPE} for the recipe alone"
            )
        first, adapter = None, first
    source = None if adapter is None else find_adapter(shell, adapter)
    own = None
    if source is not None and (source.folder / _RECIPE).is_file():
        own = str(source.folder / _RECIPE)
    if first is None:
        local = source is not None and Path(source.name).expanduser().is_dir()
        run = source.folder if source and own and local and _holds(source.folder, _RUN) else None
        return Subject(own, source, run)
    if models and _is_model(first, data):
        return Subject(own, source, model=first)
    recipe_file(first)
    return Subject(first, source)


def is_adapter(name: str) -> bool:
    """Whether a name is the folder of a run or an adapter; a shipped recipe's name is not."""
    from abft_mlx import recipe

    folder = Path(name).expanduser()
    if name in recipe.shipped() or not folder.is_dir():
        return False
    return any(_holds(folder, one) for one in (_RECIPE, _RUN, _ADAPTER))


def find_adapter(shell: Shell, name: str) -> Source:
    """The adapter of a run folder, an adapter folder or the hub, from where it is fetched.

    Raises:
        AdapterError: it is not there, or is a folder without an adapter.
        RunError: the hub cannot be reached.
    """
    from abft_mlx import adapters

    with progress.board(shell):
        found = adapters.find(name)
    if not _holds(found.folder, _ADAPTER):
        if _holds(found.folder, _RUN):
            raise AdapterError(
                f"run {name} holds no adapter yet (no {_ADAPTER}); "
                f"continue it: abft-mlx finetune --resume {name}"
            )
        raise AdapterError(f"{name} is a folder, but no run and no adapter (no {_ADAPTER})")
    return found


def recipe_file(name: str) -> Path:
    """The file of a recipe, which a run folder is not.

    Raises:
        UsageError: no such recipe; the message says what the name is instead.
    """
    from abft_mlx import hub, recipe

    if is_adapter(name):
        raise UsageError(
            f"{name} is a run folder, which means a model with its adapter; its recipe alone is "
            f"{Path(name) / _RECIPE}, and finetune --resume {name} continues it"
        )
    folder = Path(name).expanduser()
    if name not in recipe.shipped() and folder.is_dir():
        what = "a model: give it with --model" if _holds(folder, _MODEL) else f"no run (no {_RUN})"
        raise RecipeError(f"{name} is {what}")
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
    """Whether a name that may be a model or a recipe is a model.

    Raises:
        UsageError: it looks like a path, and nothing is there.
    """
    from abft_mlx import hub, recipe
    from abft_mlx.files import is_path

    if name == "demo":
        return data is not None
    folder = Path(name).expanduser()
    if name in recipe.shipped() or folder.is_file():
        return False
    if folder.is_dir():
        if not _holds(folder, _MODEL):
            raise UsageError(
                f"{name} is a folder, but no run (no {_RUN}) and no model (no {_MODEL})"
            )
        return True
    return hub.is_id(name) and not is_path(name)


def _holds(folder: Path, name: str) -> bool:
    return (folder / name).is_file()
