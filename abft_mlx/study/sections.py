"""The typed study file: which cells there are, and what each of them measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.recipe import Protocol, problems
from abft_mlx.recipe import files as recipe_files
from abft_mlx.recipe.sections import Int, Number
from abft_mlx.study import methods

_SUFFIXES = (".yaml", ".yml")
# What a key of the study sets, and therefore no setting may.
_TAKEN = {"training.seed": "seeds", "model": "models", "revision": "models", "name": "tasks"}

Sweep = dict[str, list[Any]]


def _named(key: str, name: Callable[[str], str] = str) -> BeforeValidator:
    """Let an entry be written as one word, which stands for its ``key``."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            value = {key: value}
        if isinstance(value, dict) and "name" not in value and isinstance(value.get(key), str):
            value = {"name": name(value[key]), **value}
        return value

    return BeforeValidator(expand)


def _model_name(source: str) -> str:
    """A folder's own name, or a hub id as it is."""
    local = source.startswith((".", "/", "~")) or Path(source).is_dir()
    return Path(source).name if local else source


def _task_name(source: str) -> str:
    """A file's own name, or a shipped recipe's as it is."""
    return Path(source).stem if source.endswith(_SUFFIXES) else source


def _setting(text: str) -> str:
    key, equals, _ = text.partition("=")
    _check_key(key.strip())
    if not equals:
        raise ValueError(f"{text!r} is no setting; write section.key=value")
    return text


def _check_key(key: str) -> None:
    if key in _TAKEN:
        raise ValueError(f"{key} is what {_TAKEN[key]} sets; leave it out here")
    if "." not in key:
        raise ValueError(f"{key!r} is no setting; write section.key")


def _swept(values: Sweep) -> Sweep:
    for key, choices in values.items():
        _check_key(key)
        if not choices:
            raise ValueError(f"{key} has no values; give a list of at least one")
        if len({repr(choice) for choice in choices}) < len(choices):
            raise ValueError(f"{key} has a value twice")
    return values


# Pydantic runs the last of them first.
Settings = list[Annotated[str, BeforeValidator(str.strip), BeforeValidator(str)]]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("settings", check_fields=False)
    @classmethod
    def _settings(cls, settings: list[str]) -> list[str]:
        return [_setting(setting) for setting in settings]

    @field_validator("sweep", check_fields=False)
    @classmethod
    def _sweep(cls, sweep: Sweep) -> Sweep:
        return _swept(sweep)


class ModelEntry(_Entry):
    """A model, and the settings that it needs."""

    name: str = Field(min_length=1, description="What reports call the model.")
    model: str = Field(min_length=1, description="demo, a folder, or a model of the hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    settings: Settings = Field(default=[], description="section.key=value, for its cells.")


class TaskEntry(_Entry):
    """A task, by the recipe that describes it."""

    name: str = Field(min_length=1, description="What reports call the task.")
    recipe: str = Field(min_length=1, description="A shipped recipe's name, or a file.")
    settings: Settings = Field(default=[], description="section.key=value, for its cells.")


class MethodEntry(_Entry):
    """A method, as a built-in one with changes."""

    name: str = Field(min_length=1, description="What reports call the method.")
    like: str = Field(description="The built-in method that it is; its name, if not given.")
    settings: Settings = Field(default=[], description="section.key=value, for its cells.")
    sweep: Sweep = Field(default={}, description="As the study's sweep, of this method alone.")
    axes: list[str] = Field(default=[], description="Of plane: the two methods to mix.")
    factors: list[Number] = Field(
        default=[], description="Of plane and extrapolate: the factors to try."
    )

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name == methods.UNTRAINED:
            raise ValueError("that is what the cells without training are called")
        return name

    @field_validator("like")
    @classmethod
    def _known(cls, like: str) -> str:
        known = methods.built_in()
        if like not in known:
            near = problems.closest(like, known)
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"no built-in method; {hint}there are {', '.join(known)}")
        return like

    @model_validator(mode="after")
    def _special(self) -> MethodEntry:
        kind = methods.built_in()[self.like].kind
        if kind == "plane" and len(set(self.axes)) != 2:
            raise ValueError(f"{self.name} needs two axes, as in axes: [abft, end_to_end]")
        if kind != "plane" and self.axes:
            raise ValueError(f"{self.name} is {self.like}, which takes no axes; plane does")
        if kind not in ("plane", "extrapolate") and self.factors:
            raise ValueError(f"{self.name} is {self.like}, which takes no factors")
        return self


class Study(_Entry):
    """A grid of cells: models x tasks x methods x seeds, times what is swept."""

    name: str = Field(min_length=1, description="A short name for reports.")
    description: str | None = Field(default=None, description="One line for people.")
    models: list[Annotated[ModelEntry, _named("model", _model_name)]] = Field(
        min_length=1, description="Names; or maps with name, model and settings."
    )
    tasks: list[Annotated[TaskEntry, _named("recipe", _task_name)]] = Field(
        min_length=1, description="Recipes; or maps with name, recipe and settings."
    )
    methods: list[Annotated[MethodEntry, _named("like")]] = Field(
        min_length=1, description="Built-in names; or maps with name, like and settings."
    )
    seeds: list[Int] = Field(default=[42], min_length=1, description="training.seed of each cell.")
    protocols: list[Protocol] = Field(
        default=["accuracy"], min_length=1, description="What each cell measures."
    )
    settings: Settings = Field(default=[], description="section.key=value, for every cell.")
    sweep: Sweep = Field(
        default={}, description="section.key: [values]; multiplies the cells by these values."
    )
    keep_adapters: bool = Field(default=False, description="Keep what each cell trained.")
    paper: dict[str, Any] = Field(
        default={}, description="Which published numbers stand beside ours."
    )
    figures: list[str] = Field(default=[], description="Which figures the study ends in.")

    @field_validator("models", "tasks", "methods")
    @classmethod
    def _distinct(cls, entries: list[Any]) -> list[Any]:
        _refuse_twice([entry.name for entry in entries])
        return entries

    @field_validator("seeds", "protocols")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        _refuse_twice(values)
        return values


def _refuse_twice(values: Sequence[Any]) -> None:
    twice = [one for n, one in enumerate(values) if one in values[:n]]
    if twice:
        raise ValueError(f"{twice[0]} occurs twice; give the second another name")


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped study's name, of a path that ends in .yaml, or of a study's folder.

    Raises:
        RecipeError: neither exists.
    """
    name = str(name_or_path)
    shipped = recipe_files.studies()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_dir() and (path / "study.yaml").is_file():
        path = path / "study.yaml"
    if path.is_file():
        return path
    if path.suffix in _SUFFIXES:
        raise RecipeError(f"{name}: no such file")
    near = problems.closest(name, shipped)
    hint = f"did you mean {near}? " if near else ""
    if name in recipes.shipped():
        hint = f"{name} is a recipe, for abft-mlx finetune; "
    raise RecipeError(
        f"no study is called {name!r}: {hint}Shipped are {', '.join(shipped) or 'none'}; "
        "your own is named by its path, ending in .yaml"
    )


def load(name_or_path: str | Path) -> Study:
    """Read a study.

    Args:
        name_or_path: the name of a shipped study, a .yaml file, or the folder of a study.

    Raises:
        RecipeError: no such study, not YAML, an unknown key or a value that cannot be used.
    """
    path = find(name_or_path)
    return loads(recipe_files.read(path), where=str(path), name=path.stem)


def loads(text: str, *, where: str = "study", name: str = "study") -> Study:
    """Read a study from its text; otherwise as `load`.

    Args:
        text: one YAML document.
        where: what to call it in an error.
        name: the study's name, if the text gives none.
    """
    values = recipe_files.parse(text, where, "a study is a map of keys")
    given = {key: value for key, value in values.items() if value is not None}
    try:
        return Study.model_validate({"name": name, **given})
    except ValidationError as error:
        raise RecipeError(f"{where}: {problems.describe(error, Study)}") from None
