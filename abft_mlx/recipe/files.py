"""Recipes by name or path, with overrides; every mistake becomes one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from abft_mlx.errors import RecipeError
from abft_mlx.files import is_path, read_bytes, schema_problem, write_text
from abft_mlx.recipe import _yaml, problems, tasks
from abft_mlx.recipe.sections import Recipe

MOST_BYTES = 4_000_000
# Of a recipe's file; one without a version reads as the first.
SCHEMA = 1
_STUDIES = "studies/"
_SUFFIXES = (".yaml", ".yml")
# Of files of texts, which are no recipes.
DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".xlsx")
# Settings of data that decide which rows are tested.
_SPLIT = (
    "seed", "holdout", "training_rows", "validation_rows", "demonstration_rows", "test_rows",
)  # fmt: skip


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            found = sorted(folder.rglob("*.yaml"))
            names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
            return {name: path for name, path in names.items() if not name.startswith(_STUDIES)}
    return {}


def studies() -> dict[str, Path]:
    """The studies that come with the package, by name without their folder."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes" / _STUDIES, package.parent / "recipes" / _STUDIES):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or of a path that ends in .yaml.

    Raises:
        RecipeError: neither exists.
    """
    name = str(name_or_path)
    recipes = shipped()
    if name in recipes:
        return recipes[name]
    path = Path(name).expanduser()
    if path.suffix.lower() in DATA_SUFFIXES:
        raise RecipeError(
            f"{name} is a data file, and a recipe is needed here; give it with --data {name}"
        )
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "recipe.yaml"
        if inside.is_file():
            return inside
        raise RecipeError(f"{name} is a folder, but no run: it has no recipe.yaml")
    if path.suffix in _SUFFIXES:
        raise RecipeError(f"{name}: no such file; `abft-mlx recipes list` names those that ship")
    if is_path(name):
        raise RecipeError(f"no such folder: {name}; give a run folder, or a recipe's name or file")
    near = problems.closest(name, recipes)
    hint = f"did you mean {near}? " if near else ""
    raise RecipeError(
        f"no recipe is called {name!r}: {hint}Shipped are {', '.join(recipes) or 'none'}; "
        "your own is named by its path, ending in .yaml; there is no folder of this name either"
    )


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: the name of a shipped recipe, a .yaml file, or a run folder.
        overrides: ``section.key=value`` each; the value is read as YAML, and as it stands where
            the setting is a text (put quotes in it to write a line break, or the word null).

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key or a value that cannot be used.
    """
    path = find(name_or_path)
    return _parse(read(path), str(path), overrides)


def read(path: Path) -> str:
    """A YAML file's text.

    Raises:
        RecipeError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: cannot be read ({reason})") from None


def loads(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Read a recipe from its text; otherwise as `load`."""
    return _parse(text, where, overrides)


def default(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of nothing but defaults and overrides."""
    return _parse("{}", "defaults", overrides)


def own_data(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe for own texts, your-data, without its name: a run is named after its data.

    Args:
        overrides: as for `load`.
    """
    return load("your-data", ["name=null", "description=null", *overrides])


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML, every setting written out, behind the version of its schema."""
    return to_yaml({"schema": SCHEMA, **recipe.model_dump(mode="json")})


def to_yaml(values: dict[str, Any]) -> str:
    """A map as YAML that `parse` reads back, and YAML 1.1 alike."""
    return _yaml.write(values)


def save(recipe: Recipe, path: str | Path) -> None:
    """Write `dumps` to a file, whole or not at all.

    Raises:
        OutputError: the file cannot be written.
        RunError: the disk is full.
    """
    write_text(Path(path), dumps(recipe))


def parse(text: str, where: str, what: str = "a recipe is a map of sections") -> dict[str, Any]:
    """The map that a YAML text holds.

    Args:
        text: one YAML document.
        where: what to call it in an error.
        what: what should have been there.

    Raises:
        RecipeError: not YAML, or not a map.
    """
    try:
        values = _yaml.parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: {what}, this is {values!r:.60}")
    return values


def _parse(text: str, where: str, overrides: Sequence[str]) -> Recipe:
    values = recipe_map(text, where)
    # A section of which every line is commented out is null in YAML: it means the defaults.
    values = {
        key: {} if value is None and key in problems.sections() else value
        for key, value in values.items()
    }
    return change(_validate(values, where), overrides)


def recipe_map(text: str, where: str) -> dict[str, Any]:
    """A recipe's map without the version of its schema, which is seen to be one that is read.

    Raises:
        RecipeError: not YAML, not a map, or of another schema.
    """
    values = parse(text, where)
    again = "write it by the settings of: abft-mlx recipes show your-data"
    problem = schema_problem(values.pop("schema", None), SCHEMA, again)
    if problem:
        raise RecipeError(f"{where}: {problem}")
    return values


def override(key: str, value: Any) -> str:
    """``key=value`` as overrides are read; a JSON string is a YAML string whatever it holds."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def change(recipe: Recipe, overrides: Sequence[str], where: str = "--set") -> Recipe:
    """A recipe with overrides applied: all are merged in order, then validated once.

    Args:
        recipe: what to change.
        overrides: as for `load`.
        where: what to call an override in an error.

    Raises:
        RecipeError: an override cannot be read, or sets an unknown key or a value of no use.
    """
    if not overrides:
        return recipe
    values = recipe.model_dump()
    paths = []
    for override in overrides:
        path, value = _override(override, where)
        if path[0] == "data" and len(path) > 1 and isinstance(values["data"], list):
            raise RecipeError(
                f"{where} {'.'.join(path)}: data is a list of tasks; set this in the tasks' recipes"
            )
        _put(values, path, value)
        paths.append(path)
    try:
        changed = _validate(values, where)
    except RecipeError as error:
        said = str(error).removeprefix(f"{where}: ")
        keys = [".".join(path) for path in paths]
        guilty = sorted((key for key in keys if key in said), key=said.index)
        guilty = guilty if len(keys) > 1 else keys
        raise RecipeError(f"{' '.join([where, *guilty[:1]])}: {said}") from None
    _check_splits(changed, paths, where)
    return changed


def _check_splits(recipe: Recipe, paths: Sequence[Sequence[str]], where: str) -> None:
    """Refuse a split of the measured task that a mixture's copy of the same task does not have."""
    for path in paths:
        if path[0] != "data" or path[-1] not in _SPLIT:
            continue
        for task in recipe.mixture:
            same = task.data.source == recipe.data.source
            if same and getattr(task.data, path[-1]) != getattr(recipe.data, path[-1]):
                raise RecipeError(
                    f"{where} {'.'.join(path)}: the mixture trains on {task.name} with its own "
                    "split, so test rows would be trained on; set it in the tasks' recipes"
                )


def _validate(values: dict[str, Any], where: str) -> Recipe:
    values = tasks.expand(values, _task_map, where)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {problems.describe(error)}") from None


def _task_map(name: str) -> dict[str, Any]:
    """What a recipe says of its task: the parts that a mixture or a transfer takes from it."""
    path = find(name)
    values = recipe_map(read(path), str(path))
    if not values.get("data"):
        raise RecipeError(f"{path}: names no data, so it is no task to mix in or to measure on")
    return {"name": name, **{k: values[k] for k in tasks.PARTS if values.get(k) is not None}}


def _override(text: str, where: str) -> tuple[list[str], Any]:
    """The path of a setting and its value."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    path = key.split(".", 2)
    if not equals or not all(path):
        raise RecipeError(
            f"{where} {problems.short(text)}: write section.key=value, e.g. training.updates=16"
        )
    if problems.is_text(path) and not raw.lstrip().startswith(("'", '"')):
        return path, None if raw.strip() in ("null", "~") else raw
    try:
        return path, _yaml.parse(raw)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(
            f"{where} {key}: {problems.short(raw)} is not a YAML value; quote it"
        ) from None


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a value in nested maps, which are made where there are none."""
    inner = values
    for key in path[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    inner[path[-1]] = value
