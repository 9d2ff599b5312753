"""Lists of tasks in a recipe, where each may be named by the recipe that describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from abft_mlx.errors import RecipeError
from abft_mlx.recipe.sections import TaskSection

PARTS = ("data", "prompt", "variants")


def expand(
    values: dict[str, Any], describe: Callable[[str], dict[str, Any]], where: str
) -> dict[str, Any]:
    """Write out tasks that are named, and read a list under ``data`` as a mixture.

    Args:
        values: a recipe as read.
        describe: gives the map of a named recipe's task.
        where: what to call the recipe in an error.

    Raises:
        RecipeError: an empty list, or an entry that is neither a name nor a map.
    """
    values = dict(values)
    if isinstance(values.get("data"), list):
        listed = _tasks(values.pop("data"), describe, f"{where}: data")
        if not listed:
            raise RecipeError(f"{where}: data is an empty list; name at least one task")
        first = listed[0]
        values = {**{k: first[k] for k in PARTS if k in first}, **values, "mixture": listed}
    elif isinstance(values.get("mixture"), list):
        values["mixture"] = _tasks(values["mixture"], describe, f"{where}: mixture")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("transfer"), list):
        listed = _tasks(evaluation["transfer"], describe, f"{where}: evaluation.transfer")
        values["evaluation"] = {**evaluation, "transfer": listed}
    return values


def check_mixture(demonstrations: int | str, mixed: Sequence[TaskSection]) -> None:
    """See that prompts of a mixture's tasks can share a batch.

    Args:
        demonstrations: k of the recipe.
        mixed: the tasks that are trained on at once.

    Raises:
        RecipeError: one has another number of demonstrations.
    """
    for task in mixed:
        if task.prompt.demonstrations != demonstrations:
            raise RecipeError(
                f"mixture: {task.name} has {task.prompt.demonstrations} demonstrations, the "
                f"recipe {demonstrations}; give all tasks of a mixture the same "
                "prompt.demonstrations"
            )


def _tasks(
    entries: list[Any], describe: Callable[[str], dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    found = []
    for entry in entries:
        if isinstance(entry, str):
            try:
                found.append(describe(entry))
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from None
        elif isinstance(entry, dict):
            source = entry.get("data")
            named = source.get("source") if isinstance(source, dict) else None
            found.append({"name": str(named), **entry} if named else entry)
        else:
            raise RecipeError(f"{where} has {entry!r:.60}; name a recipe, or give a map of a task")
    return found
