"""A study's file, and its cells: id, resolved recipe and place in the order."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

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
from abft_mlx.recipe import Method, Protocol, Recipe, TaskSection, problems
from abft_mlx.recipe import files as recipe_files
from abft_mlx.recipe.sections import Int, Number

Kind = Literal["predict", "train", "plane", "extrapolate"]
# The cell that measures a base without training it, by every way of predicting at once.
UNTRAINED = "untrained"
PREDICTING: tuple[str, ...] = get_args(Method)
FACTORS: dict[str, tuple[float, ...]] = {
    "plane": (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    "extrapolate": (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
}
# Rows and prompts that an extrapolation's factor is chosen on.
VALIDATION_ROWS, VALIDATION_PROMPTS = 256, 512
LONGEST_ID = 180
_SUFFIXES = (".yaml", ".yml")
# What a key of the study sets, and therefore no setting may.
_TAKEN = {"training.seed": "seeds", "model": "models", "revision": "models", "name": "tasks"}


class BuiltIn(NamedTuple):
    """A method: its kind, its changes to a recipe, and whether it trains on all other tasks."""

    kind: Kind
    changes: tuple[str, ...] = ()
    mixture: bool = False


_END_TO_END, _NO_PID = "objective.kind=end_to_end", "objective.pid=false"
# The ablations are those of the paper's table 4; end_to_end is its baseline, with the LM head
# trained in full, and end_to_end_qk trains what ABFT trains.
BUILT_IN: dict[str, BuiltIn] = {
    **{name: BuiltIn("predict") for name in PREDICTING},
    "abft": BuiltIn("train", ("objective.kind=abft",)),
    "end_to_end": BuiltIn("train", (_END_TO_END, "adapter.head=true")),
    "end_to_end_qk": BuiltIn("train", (_END_TO_END,)),
    "metaicl": BuiltIn("train", (_END_TO_END, "adapter.head=true"), mixture=True),
    "abft_mixture": BuiltIn("train", ("objective.kind=abft",), mixture=True),
    "no_pid": BuiltIn("train", (_NO_PID,)),
    "no_filter": BuiltIn("train", (_NO_PID, "objective.filter=false")),
    "no_punish": BuiltIn("train", (_NO_PID, "objective.punish=0")),
    "no_reward": BuiltIn("train", (_NO_PID, "objective.reward=0")),
    "plane": BuiltIn("plane"),
    "extrapolate": BuiltIn("extrapolate", ("objective.kind=abft",)),
}


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


def _distinct(values: list[Any]) -> list[Any]:
    """Refuse values, or entries of a name, that occur twice."""
    names = [getattr(value, "name", value) for value in values]
    for n, name in enumerate(names):
        if name in names[:n]:
            raise ValueError(f"{name} occurs twice; give the second another name")
    return values


Settings = list[Annotated[str, BeforeValidator(str.strip), BeforeValidator(str)]]
Sweep = dict[str, list[Any]]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("settings", "sweep", check_fields=False)
    @classmethod
    def _check(cls, settings: Any) -> Any:
        for text in settings:
            key = text.partition("=")[0].strip()
            if key in _TAKEN:
                raise ValueError(f"{key} is what {_TAKEN[key]} sets; leave it out here")
            if "." not in key or (isinstance(settings, list) and "=" not in text):
                raise ValueError(f"{text!r} is no setting; write section.key=value")
            if isinstance(settings, dict) and not settings[text]:
                raise ValueError(f"{text} has no values; give a list of at least one")
            if isinstance(settings, dict):
                _distinct(settings[text])
        return settings


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

    @property
    def method(self) -> BuiltIn:
        """The built-in method."""
        return BUILT_IN[self.like]

    @field_validator("like")
    @classmethod
    def _known(cls, like: str) -> str:
        if like not in BUILT_IN:
            near = problems.closest(like, BUILT_IN)
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"no built-in method; {hint}there are {', '.join(BUILT_IN)}")
        return like

    @model_validator(mode="after")
    def _special(self) -> MethodEntry:
        if self.name == UNTRAINED:
            raise ValueError(f"{UNTRAINED} is what the cells without training are called")
        if self.method.kind == "plane" and len(set(self.axes)) != 2:
            raise ValueError(f"{self.name} needs two axes, as in axes: [abft, end_to_end]")
        if self.method.kind != "plane" and self.axes:
            raise ValueError(f"{self.name} is {self.like}, which takes no axes; plane does")
        if self.method.kind not in FACTORS and self.factors:
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

    @field_validator("models", "tasks", "methods", "seeds", "protocols")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        return _distinct(values)


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped study's name, of a path that ends in .yaml, or of a study's folder."""
    name, shipped = str(name_or_path), recipe_files.studies()
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
    """Read a shipped study by its name, a .yaml file, or the folder of a study.

    Raises:
        RecipeError: no such study, not YAML, an unknown key or a value that cannot be used.
    """
    path = find(name_or_path)
    return loads(recipe_files.read(path), where=str(path), name=path.stem)


def loads(text: str, *, where: str = "study", name: str = "study") -> Study:
    """Read a study from its text; ``name`` is its name if the text gives none."""
    values = recipe_files.parse(text, where, "a study is a map of keys")
    present = {key: value for key, value in values.items() if value is not None}
    try:
        return Study.model_validate({"name": name, **present})
    except ValidationError as error:
        raise RecipeError(f"{where}: {problems.describe(error, Study)}") from None


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        id: what its file is called; the same for the same model, task, method, seed and sweep.
        model: the model's name in the study.
        task: the task's name.
        method: the method's name, or ``untrained``.
        like: the built-in method that it is; ``untrained`` measures several.
        kind: predict, train, plane or extrapolate.
        seed: ``training.seed``; None where nothing is trained.
        sweep: the swept settings and their values in this cell.
        recipe: everything that the cell does, resolved; of a plane, that of its first axis.
        axes: of a plane, the recipe of each method that it mixes.
        factors: of a plane or an extrapolation, the factors that are tried.
        group: cells of one group cost about the same.
    """

    id: str
    model: str
    task: str
    method: str
    like: str
    kind: Kind
    seed: int | None
    sweep: dict[str, Any]
    recipe: Recipe
    axes: dict[str, Recipe] = field(default_factory=dict)
    factors: tuple[float, ...] = ()
    group: int = 0

    def facts(self) -> dict[str, Any]:
        """What the cell's file says of the cell itself."""
        names = ("id", "model", "task", "method", "like", "seed", "sweep")
        facts = {name: getattr(self, name) for name in names}
        facts["recipe"] = self.recipe.model_dump(mode="json")
        if self.axes:
            facts["axes"] = {n: recipe.model_dump(mode="json") for n, recipe in self.axes.items()}
        if self.factors:
            facts["factors"] = list(self.factors)
        return facts


def cells(study: Study) -> list[Cell]:
    """Every cell of a study, by model, method, sweep, seed and task; all recipes are checked.

    Raises:
        RecipeError: a recipe does not exist, a setting cannot be used, or a method lacks what it
            needs; the message names the study's part.
    """
    every: dict[str, Cell] = {}
    for cell in _cells(study):
        # Some file systems do not tell upper case from lower.
        if every.setdefault(cell.id.casefold(), cell) is not cell:
            raise RecipeError(
                f"study {study.name}: two cells have the id {cell.id}; give the models, tasks or "
                "methods names that differ in more than punctuation"
            )
    return list(every.values())


def shard(every: Sequence[Cell], number: int, of: int) -> list[Cell]:
    """The cells of one shard, counted from 1, in their order.

    Cells that cost about the same lie together in the order that is dealt from, mixed within
    their group, so every shard gets its share of each.
    """
    mixed = sorted(every, key=lambda cell: (cell.group, hashlib.sha256(cell.id.encode()).digest()))
    chosen = {cell.id for cell in mixed[number - 1 :: of]}
    return [cell for cell in every if cell.id in chosen]


def cell_id(*parts: object) -> str:
    """Parts joined by ``--``, each with nothing in it that a file name or ``--`` could not hold."""
    safe = (re.sub(r"[^A-Za-z0-9._=+]+", "-", str(part)).strip("-.") or "-" for part in parts)
    whole = "--".join(safe)
    if len(whole) <= LONGEST_ID:
        return whole
    return f"{whole[:LONGEST_ID]}--{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _cells(study: Study) -> Iterator[Cell]:
    plan, group = _Plan(study), itertools.count()
    for model, (entry, predicts) in itertools.product(study.models, _methods(study)):
        kind = entry.method.kind
        sweep = {**study.sweep, **entry.sweep}
        if kind == "predict":
            # These do nothing where nothing is trained.
            idle = ("adapter.", "objective.", "training.")
            sweep = {key: values for key, values in sweep.items() if not key.startswith(idle)}
        for values in itertools.product(*sweep.values()):
            swept, number = dict(zip(sweep, values, strict=True)), next(group)
            made = {t.name: plan.recipes(model, t, entry, predicts, swept) for t in study.tasks}
            seeds = [None] if kind == "predict" else study.seeds
            for seed, task in itertools.product(seeds, study.tasks):
                axes = {n: _changed(r, "training", seed=seed) if seed is not None else r
                        for n, r in made[task.name].items()}  # fmt: skip
                words = [f"{key}={v if isinstance(v, str) else json.dumps(v)}"
                         for key, v in swept.items()]  # fmt: skip
                last = [] if seed is None else [seed]
                yield Cell(
                    id=cell_id(model.name, task.name, entry.name, *words, *last),
                    model=model.name,
                    task=task.name,
                    method=entry.name,
                    like=UNTRAINED if entry.name == UNTRAINED else entry.like,
                    kind=kind,
                    seed=seed,
                    sweep=swept,
                    recipe=next(iter(axes.values())),
                    axes=axes if kind == "plane" else {},
                    factors=tuple(entry.factors) or FACTORS.get(kind, ()),
                    group=number,
                )


def _methods(study: Study) -> list[tuple[MethodEntry, list[str]]]:
    """The methods, and how each predicts; those that only predict and change nothing are one."""
    plain = [
        entry
        for entry in study.methods
        if entry.method.kind == "predict" and entry == MethodEntry(name=entry.like, like=entry.like)
    ]
    methods = []
    if plain:
        # Not validated: no study may call a method so.
        untrained = MethodEntry.model_construct(name=UNTRAINED, like="vanilla")
        methods.append((untrained, list(dict.fromkeys(["vanilla", *(e.like for e in plain)]))))
    for entry in study.methods:
        if entry not in plain:
            predicts = ["vanilla", entry.like] if entry.method.kind == "predict" else []
            methods.append((entry, list(dict.fromkeys(predicts))))
    return methods


class _Plan:
    """The recipes of a study's cells; keeps those of each model and task, which many share."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._base = cache(self._load)

    def recipes(
        self,
        model: ModelEntry,
        task: TaskEntry,
        entry: MethodEntry,
        predicts: list[str],
        swept: dict[str, Any],
    ) -> dict[str, Recipe]:
        """The recipe of a cell, by the method's name; of a plane, one for each axis."""
        named = {name: MethodEntry(name=name, like=name) for name, one in BUILT_IN.items()
                 if one.kind == "train"}  # fmt: skip
        named |= {one.name: one for one in self.study.methods}
        made = {}
        for name in entry.axes or [entry.name]:
            axis = entry
            if entry.axes:
                if name not in named or named[name].method.kind != "train":
                    trained = [key for key, one in BUILT_IN.items() if one.kind == "train"]
                    raise self._wrong(
                        f"method {entry.name} has the axis {name!r}, which is no method that "
                        f"trains; there are {', '.join(trained)}"
                    )
                axis = named[name]
            settings = [*axis.settings, *entry.settings] if entry.axes else entry.settings
            made[name] = self._recipe(model, task, axis, settings, predicts, swept)
        return made

    def _recipe(
        self,
        model: ModelEntry,
        task: TaskEntry,
        entry: MethodEntry,
        settings: Sequence[str],
        predicts: list[str],
        swept: dict[str, Any],
    ) -> Recipe:
        """The resolved recipe of a cell."""
        study, method = self.study, entry.method
        changes = [*method.changes, *settings, *(recipes.override(k, v) for k, v in swept.items())]
        if predicts:
            changes = [recipes.override("evaluation.methods", predicts), *changes]
        where = f"study {study.name}, task {task.name}, method {entry.name}: setting"
        recipe = recipes.change(self._base(model.name, task.name), changes, where)
        every = [*study.settings, *model.settings, *task.settings, *changes]
        keys = {setting.partition("=")[0].strip() for setting in every}
        if "training.examples" in swept and "training.updates" not in keys:
            # Twice over the examples.
            training = recipe.training
            updates = -(-2 * training.examples // training.prompts_per_update)
            recipe = _changed(recipe, "training", updates=updates)
        if method.kind == "extrapolate":
            rows = recipe.data.training_rows
            if not recipe.data.validation_rows:
                # Parts are drawn in the order training, validation, demonstrations, test: with the
                # sum of the first two unchanged, the others stay the protocol's own.
                carved = min(VALIDATION_ROWS, rows // 4)
                rows -= carved
                recipe = _changed(recipe, "data", training_rows=rows, validation_rows=carved)
            if "training.validation_prompts" not in keys:
                recipe = _changed(recipe, "training", validation_prompts=VALIDATION_PROMPTS)
        others = [self._section(model, one, changes) for one in study.tasks if one != task]
        if method.mixture:
            recipe = recipe.model_copy(update={"mixture": self._mixture(recipe, others, entry)})
        if "transfer" in recipe.evaluation.protocols and others:
            recipe = _changed(recipe, "evaluation", transfer=others)
        elif "transfer" in recipe.evaluation.protocols and not recipe.evaluation.transfer:
            raise self._wrong(
                "protocol transfer measures on the study's other tasks, and there is only "
                f"{task.name}; name more tasks, or set evaluation.transfer"
            )
        return recipes.share(recipes.resolve(recipe), able=False)

    def _load(self, model_name: str, task_name: str) -> Recipe:
        """A task's recipe with this model and all settings that are not a method's."""
        study = self.study
        model = next(entry for entry in study.models if entry.name == model_name)
        task = next(entry for entry in study.tasks if entry.name == task_name)
        try:
            recipe = recipes.load(task.recipe)
        except RecipeError as error:
            raise self._wrong(f"task {task.name}: {error}") from None
        if model.revision or model.model != recipe.model:
            recipe = recipe.model_copy(update={"revision": model.revision})
        changes = [
            recipes.override("name", task.name),
            recipes.override("model", model.model),
            recipes.override("evaluation.protocols", study.protocols),
            recipes.override("evaluation.methods", ["vanilla"]),
            *study.settings, *model.settings, *task.settings,
        ]  # fmt: skip
        where = f"study {study.name}, model {model.name}, task {task.name}: setting"
        return recipes.change(recipe, changes, where)

    def _section(self, model: ModelEntry, task: TaskEntry, changes: Sequence[str]) -> TaskSection:
        """Another task of the study, with what a method or a sweep changes of data and prompts."""
        own = [one for one in changes if one.startswith(("data.", "prompt.", "variants."))]
        where = f"study {self.study.name}, task {task.name}: setting"
        return recipes.task(recipes.change(self._base(model.name, task.name), own, where))

    def _mixture(
        self, recipe: Recipe, others: list[TaskSection], entry: MethodEntry
    ) -> list[TaskSection]:
        """The study's other tasks, checked."""
        if not others:
            raise self._wrong(
                f"method {entry.name} trains on the study's other tasks, and there are none; name "
                "at least two tasks"
            )
        try:
            recipes.check_mixture(recipe.prompt.demonstrations, others)
        except RecipeError as error:
            raise self._wrong(f"task {recipe.name}, method {entry.name}: {error}") from None
        return others

    def _wrong(self, message: str) -> RecipeError:
        """An error that names the study."""
        return RecipeError(f"study {self.study.name}: {message}")


def _changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    """A recipe with other values in a section, which are not validated again."""
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
