"""What Python programs use: ``abft_mlx.load``, ``prepare``, ``finetune`` and ``evaluate``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abft_mlx import experiment, loading
from abft_mlx import recipe as recipes
from abft_mlx.events import OnUpdate, Update
from abft_mlx.experiment import Experiment, RunResult
from abft_mlx.recipe import Recipe


def load(
    model: str = "demo", adapter: str | Path | None = None, *, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a model of mlx-lm, with an adapter on it if one is given.

    Args:
        model: ``demo`` for the bundled one, a local folder, or a hub id.
        adapter: a run folder, an adapter folder of mlx-lm or PEFT, or a hub id of any of them
            (owner/name@revision).
        revision: branch, tag or commit of a hub model.

    Returns:
        The model and its tokenizer, as ``mlx_lm.load`` gives them.

    Raises:
        UsageError: the model or the adapter cannot be used; the message says why.
    """
    loaded = loading.load_model(model, revision, adapter=adapter)
    return loaded.model, loaded.tokenizer


def prepare(
    recipe: Recipe | str | Path,
    adapter: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Experiment:
    """Open what a recipe names, for a look inside: the model, the texts and their prompts.

    Args:
        recipe: a recipe, the name of one that ships with abft-mlx, a .yaml file or a run folder.
        adapter: as for :func:`load`.
        overrides: ``section.key=value`` each, where ``recipe`` is a name or a file.

    Returns:
        The experiment: ``test_prompts()``, ``example(prompt)``, ``heads(prompts)`` and more.

    Raises:
        AbftError: something cannot be used; the message says why.
    """
    return experiment.prepare(_recipe(recipe, overrides), adapter)


def finetune(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    on_update: Callable[[Update], None] | None = None,
) -> RunResult:
    """Fine-tune and write a run folder.

    Args:
        recipe: a recipe, the name of one that ships with abft-mlx, or a .yaml file.
        output: the run folder; ``runs/NAME-DATE-TIME`` if none is given.
        overrides: ``section.key=value`` each, where ``recipe`` is a name or a file.
        overwrite: replace a run that lies at ``output``.
        on_update: called with every optimizer update.

    Returns:
        The run: its folder, its totals and the fine-tuned model.

    Raises:
        AbftError: the recipe cannot be run; the message says why.
    """
    opened = _recipe(recipe, overrides)
    output = output or default_output(opened)
    return experiment.finetune(opened, output, overwrite=overwrite, events=OnUpdate(on_update))


def evaluate(
    recipe: Recipe | str | Path,
    adapter: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a model on fixed seeded test prompts, without and with an adapter.

    Arguments and errors are those of :func:`prepare`.

    Returns:
        The document that ``abft-mlx eval --json`` prints.
    """
    return experiment.evaluate(_recipe(recipe, overrides), adapter)


def default_output(recipe: Recipe) -> Path:
    """A new folder's name under ``runs``, from the recipe's name or data and the time."""
    name = recipe.name or Path(recipe.data.source).stem
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _recipe(recipe: Recipe | str | Path, overrides: Sequence[str]) -> Recipe:
    """The recipe itself, or the one of that name with the overrides."""
    if isinstance(recipe, Recipe):
        if overrides:
            raise TypeError("overrides belong to a recipe's name or file, not to a Recipe")
        return recipe
    return recipes.load(recipe, overrides)
