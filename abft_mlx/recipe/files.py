"""Recipes by name or path, with overrides: read as YAML, merged, validated once, saved."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from abft_mlx.errors import RecipeError
from abft_mlx.files import is_path, read_bytes, schema_problem, write_text
from abft_mlx.recipe import problems
from abft_mlx.recipe.sections import Recipe

Overrides = Mapping[str, Any] | Sequence[str]
MOST_BYTES = 4_000_000
# Of a recipe's file; one without a version reads as the first.
SCHEMA = 1
# Of files of texts, which are no recipes.
DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".xlsx")
# What a mixture or a transfer takes from the recipe of a task.
_TASK_PARTS = ("data", "prompt", "variants")
# Settings of data that decide which rows are tested.
_SPLIT = (
    "seed", "holdout", "training_rows", "validation_rows", "demonstration_rows", "test_rows",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars, which refuses a key that occurs twice.

    PyYAML follows YAML 1.1, where an unquoted ``no`` is false, ``1:30`` is 90 and ``1e-5`` is a
    string; class names and learning rates are what recipes hold.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    problem = f"key {key.value!r} occurs twice"
                    raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes every text which YAML 1.1 or the loader above reads otherwise."""


# Unlike YAML 1.2, a number with a leading zero stays a word: it is a class name, not a quantity.
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*|(?=[eE])))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {name: path for name, path in _shipped().items() if not name.startswith("studies/")}


def studies() -> dict[str, Path]:
    """The studies that come with the package, by name without their folder."""
    return {path.stem: path for name, path in _shipped().items() if name.startswith("studies/")}


def _shipped() -> dict[str, Path]:
    """Every .yaml file that comes with the package, in a wheel or in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            paths = sorted(folder.rglob("*.yaml"))
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    return {}


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name, or of a path that ends in .yaml."""
    name, recipes = str(name_or_path), shipped()
    path = recipes.get(name, Path(name).expanduser())
    if path.suffix.lower() in DATA_SUFFIXES:
        raise RecipeError(
            f"{name} is a data file, and a recipe is needed here; give it with --data {name}"
        )
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "recipe.yaml").is_file():
            return path / "recipe.yaml"
        raise RecipeError(f"{name} is a folder, but no run: it has no recipe.yaml")
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{name}: no such file; `abft-mlx recipes list` names those that ship")
    if is_path(name):
        raise RecipeError(f"no such folder: {name}; give a run folder, or a recipe's name or file")
    near = problems.closest(name, recipes)
    hint = f": did you mean {near}?" if near else ";"
    raise RecipeError(
        f"{name!r} is no run folder here and no recipe{hint} `abft-mlx recipes list` names those "
        "that ship, and your own is named by its path, ending in .yaml"
    )


def load(name_or_path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        name_or_path: the name of a shipped recipe, a .yaml file, or a run folder.
        overrides: a map from ``section.key`` to values, or ``section.key=value`` texts, which
            `parse_overrides` reads.
    """
    path = find(name_or_path)
    return loads(read(path), overrides, where=str(path))


def loads(text: str, overrides: Overrides = (), *, where: str = "recipe") -> Recipe:
    """Read a recipe from its text; otherwise as `load`."""
    values = _expand(_recipe_map(text, where), where)
    if not overrides:
        return _validate(values, where)
    try:
        return _merged(values, overrides, "--set")
    except RecipeError:
        _validate(values, where)  # the file may be what is wrong
        raise


def default(overrides: Overrides = ()) -> Recipe:
    """The recipe of nothing but defaults and overrides."""
    return loads("{}", overrides, where="defaults")


def own_data(overrides: Overrides = ()) -> Recipe:
    """The recipe for own texts, your-data, without its name: a run is named after its data."""
    nameless = {"name": None, "description": None}
    return load("your-data", {**nameless, **parse_overrides(overrides)})


def change(recipe: Recipe, overrides: Overrides, where: str = "--set") -> Recipe:
    """A recipe with overrides applied: all are merged in order, then validated once.

    Args:
        recipe: what to change.
        overrides: as for `load`.
        where: what to call an override in an error.
    """
    return _merged(recipe.model_dump(), overrides, where) if overrides else recipe


def override(key: str, value: Any) -> str:
    """``key=value`` as `parse_overrides` reads it."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def parse_overrides(overrides: Overrides, where: str = "--set") -> dict[str, Any]:
    """The map that ``section.key=value`` texts mean; the last one of a key counts.

    A value is read as YAML, but taken as it stands where the setting is a text (quotes in it
    write a line break, or the word null).

    Args:
        overrides: texts; a map stays what it is.
        where: what to call an override in an error.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, raw = text.partition("=")
        key = key.strip()
        path = key.split(".", 2)
        if not equals or not all(path):
            raise RecipeError(
                f"{where} {problems.short(text)}: write section.key=value, e.g. training.updates=16"
            )
        value: Any = None if raw.strip() in ("null", "~") else raw
        if not problems.is_text(path) or raw.lstrip().startswith(("'", '"')):
            try:
                value = _yaml(raw)
            except (yaml.YAMLError, ValueError):
                raise RecipeError(
                    f"{where} {key}: {problems.short(raw)} is not a YAML value; quote it"
                ) from None
        changes.pop(key, None)
        changes[key] = value
    return changes


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML, every setting written out, behind the version of its schema."""
    return to_yaml({"schema": SCHEMA, **recipe.model_dump(mode="json")})


def save(recipe: Recipe, path: str | Path) -> None:
    """Write `dumps` to a file, whole or not at all."""
    write_text(Path(path), dumps(recipe))


def to_yaml(values: dict[str, Any]) -> str:
    """A map as YAML that `parse` reads back, and YAML 1.1 alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read(path: Path) -> str:
    """A YAML file's text."""
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{path}: cannot be read ({reason})") from None


def parse(text: str, where: str, what: str = "a recipe is a map of sections") -> dict[str, Any]:
    """The map that a YAML text holds.

    Args:
        text: one YAML document.
        where: what to call it in an error.
        what: what should have been there.
    """
    try:
        values = _yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: {error.problem or 'not YAML'}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise RecipeError(f"{where}: {what}, this is {problems.short(values)}")
    return values or {}


def _yaml(text: str) -> Any:
    """The value of one YAML document; YAMLError or ValueError if it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _recipe_map(text: str, where: str) -> dict[str, Any]:
    """A recipe's map without the version of its schema, which is checked."""
    values = parse(text, where)
    again = "write it by the settings of: abft-mlx recipes show your-data"
    problem = schema_problem(values.pop("schema", None), SCHEMA, again)
    if problem:
        raise RecipeError(f"{where}: {problem}")
    # A section of which every line is commented out is null in YAML: it means the defaults.
    return {k: {} if v is None and problems.section_of(k) else v for k, v in values.items()}


def _merged(values: dict[str, Any], overrides: Overrides, where: str) -> Recipe:
    """A recipe's map with overrides, validated."""
    changes = parse_overrides(overrides, where)
    values = dict(values)
    for key, value in changes.items():
        *path, last = key.split(".", 2)
        inner = values
        for part in path:
            if part == "data" and isinstance(inner.get(part), list):
                raise RecipeError(
                    f"{where} {key}: data is a list of tasks; set this in the tasks' recipes"
                )
            inner[part] = dict(inner[part]) if isinstance(inner.get(part), dict) else {}
            inner = inner[part]
        inner[last] = value
    recipe = _validate(_expand(values, where), where)
    same = [task for task in recipe.mixture if task.data.source == recipe.data.source]
    for key in changes:
        section, _, name = key.partition(".")
        for task in same if section == "data" and name in _SPLIT else ():
            if getattr(task.data, name) != getattr(recipe.data, name):
                raise RecipeError(
                    f"{where} {key}: the mixture trains on {task.name} with its own "
                    "split, so test rows would be trained on; set it in the tasks' recipes"
                )
    return recipe


def _validate(values: dict[str, Any], where: str) -> Recipe:
    """The recipe of a map."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {problems.describe(error)}") from None


def _expand(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Write out tasks that are named by recipes, and read a list under ``data`` as a mixture."""
    values = dict(values)
    if isinstance(values.get("data"), list):
        tasks = _tasks(values.pop("data"), f"{where}: data")
        if not tasks:
            raise RecipeError(f"{where}: data is an empty list; name at least one task")
        first = {part: tasks[0][part] for part in _TASK_PARTS if part in tasks[0]}
        values = {**first, **values, "mixture": tasks}
    elif isinstance(values.get("mixture"), list):
        values["mixture"] = _tasks(values["mixture"], f"{where}: mixture")
    evaluation = values.get("evaluation")
    if isinstance(evaluation, dict) and isinstance(evaluation.get("transfer"), list):
        tasks = _tasks(evaluation["transfer"], f"{where}: evaluation.transfer")
        values["evaluation"] = {**evaluation, "transfer": tasks}
    return values


def _tasks(entries: list[Any], where: str) -> list[dict[str, Any]]:
    """The maps of tasks, each given as such or by its recipe's name."""
    tasks: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, str):
            try:
                path = find(entry)
                recipe = _recipe_map(read(path), str(path))
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from None
            if not recipe.get("data"):
                raise RecipeError(
                    f"{where}: {path}: names no data, so it is no task to mix in or to measure on"
                )
            parts = {part: recipe[part] for part in _TASK_PARTS if recipe.get(part) is not None}
            tasks.append({"name": entry, **parts})
        elif isinstance(entry, dict):
            source = entry.get("data")
            name = source.get("source") if isinstance(source, dict) else None
            tasks.append({"name": str(name), **entry} if name else entry)
        else:
            raise RecipeError(
                f"{where} has {problems.short(entry)}; name a recipe, or give a map of a task"
            )
    return tasks
