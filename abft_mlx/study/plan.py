"""The cells of a study: each with an id, its resolved recipe and its place in the order."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.recipe import Recipe, TaskSection
from abft_mlx.study import methods
from abft_mlx.study.sections import MethodEntry, ModelEntry, Study, TaskEntry

LONGEST_ID = 180
# Rows and prompts that an extrapolation's factor is chosen on.
VALIDATION_ROWS = 256
VALIDATION_PROMPTS = 512
# Not validated: no study may call a method so.
_UNTRAINED = MethodEntry.model_construct(name=methods.UNTRAINED, like="vanilla")


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
    kind: methods.Kind
    seed: int | None
    sweep: dict[str, Any]
    recipe: Recipe
    axes: dict[str, Recipe] = field(default_factory=dict)
    factors: tuple[float, ...] = ()
    group: int = 0

    def facts(self) -> dict[str, Any]:
        """What the cell's file says of the cell itself."""
        found: dict[str, Any] = {
            "id": self.id,
            "model": self.model,
            "task": self.task,
            "method": self.method,
            "like": self.like,
            "seed": self.seed,
            "sweep": self.sweep,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        if self.axes:
            found["axes"] = {n: recipe.model_dump(mode="json") for n, recipe in self.axes.items()}
        if self.factors:
            found["factors"] = list(self.factors)
        return found


def cells(study: Study) -> list[Cell]:
    """Every cell of a study, by model, method, sweep, seed and task; all recipes are checked.

    Raises:
        RecipeError: a recipe does not exist, a setting cannot be used, or a method lacks what it
            needs; the message names the study's part.
    """
    found = list(_Plan(study).cells())
    seen: dict[str, Cell] = {}
    for cell in found:
        # Some file systems do not tell upper case from lower.
        other = seen.setdefault(cell.id.casefold(), cell)
        if other is not cell:
            raise RecipeError(
                f"study {study.name}: two cells have the id {cell.id}; give the models, tasks or "
                "methods names that differ in more than punctuation"
            )
    return found


def shard(found: Sequence[Cell], number: int, of: int) -> list[Cell]:
    """The cells of one shard, in the order of ``found``.

    Cells that cost about the same lie together in the order that is dealt from, mixed within
    their group, so every shard gets its share of each.

    Args:
        found: all cells.
        number: of the shard, from 1.
        of: shards in all.
    """
    mixed = sorted(found, key=lambda cell: (cell.group, hashlib.sha256(cell.id.encode()).digest()))
    chosen = {cell.id for cell in mixed[number - 1 :: of]}
    return [cell for cell in found if cell.id in chosen]


def cell_id(*parts: object) -> str:
    """Parts joined by ``--``, each with nothing in it that a file name or ``--`` could not hold."""
    safe = (re.sub(r"[^A-Za-z0-9._=+]+", "-", str(part)).strip("-.") or "-" for part in parts)
    whole = "--".join(safe)
    if len(whole) <= LONGEST_ID:
        return whole
    return f"{whole[:LONGEST_ID]}--{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


class _Plan:
    """Makes a study's cells; keeps the recipe of each model and task, which many cells share."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._bases: dict[tuple[str, str], Recipe] = {}

    def cells(self) -> Iterator[Cell]:
        group = itertools.count()
        for model in self.study.models:
            for entry, predicts in self._methods():
                sweep = {**self.study.sweep, **entry.sweep}
                if methods.built_in()[entry.like].kind == "predict":
                    sweep = {k: v for k, v in sweep.items() if not _trains(k)}
                for values in itertools.product(*sweep.values()):
                    swept = dict(zip(sweep, values, strict=True))
                    number = next(group)
                    yield from self._grid(model, entry, predicts, swept, number)

    def _methods(self) -> Iterator[tuple[MethodEntry, list[str]]]:
        """The study's methods; those that only predict, and change nothing, become one."""
        known = methods.built_in()
        plain = [
            entry
            for entry in self.study.methods
            if known[entry.like].kind == "predict"
            and entry == MethodEntry(name=entry.like, like=entry.like)
        ]
        if plain:
            names = dict.fromkeys(["vanilla", *(entry.like for entry in plain)])
            yield _UNTRAINED, list(names)
        for entry in self.study.methods:
            if entry not in plain:
                predicts = known[entry.like].kind == "predict"
                yield entry, list(dict.fromkeys(["vanilla", entry.like])) if predicts else []

    def _grid(
        self,
        model: ModelEntry,
        entry: MethodEntry,
        predicts: list[str],
        swept: dict[str, Any],
        group: int,
    ) -> Iterator[Cell]:
        """The cells of a method with some swept values."""
        kind = methods.built_in()[entry.like].kind
        made = {
            task.name: self._recipes(model, task, entry, predicts, swept)
            for task in self.study.tasks
        }
        for seed in [None] if kind == "predict" else self.study.seeds:
            for task in self.study.tasks:
                seeded = {name: _seed(one, seed) for name, one in made[task.name].items()}
                first, *_ = seeded.values()
                words = [f"{key}={_word(value)}" for key, value in swept.items()]
                last = [] if seed is None else [seed]
                yield Cell(
                    id=cell_id(model.name, task.name, entry.name, *words, *last),
                    model=model.name,
                    task=task.name,
                    method=entry.name,
                    like=methods.UNTRAINED if entry.name == methods.UNTRAINED else entry.like,
                    kind=kind,
                    seed=seed,
                    sweep=swept,
                    recipe=first,
                    axes=seeded if kind == "plane" else {},
                    factors=_factors(entry, kind),
                    group=group,
                )

    def _recipes(
        self,
        model: ModelEntry,
        task: TaskEntry,
        entry: MethodEntry,
        predicts: list[str],
        swept: dict[str, Any],
    ) -> dict[str, Recipe]:
        """The recipe of a cell, by the method's name; of a plane, one for each axis."""
        if not entry.axes:
            return {entry.name: self._recipe(model, task, entry, entry.settings, predicts, swept)}
        found = {}
        for name in entry.axes:
            axis = self._axis(name, entry)
            settings = [*axis.settings, *entry.settings]
            found[name] = self._recipe(model, task, axis, settings, [], swept)
        return found

    def _axis(self, name: str, entry: MethodEntry) -> MethodEntry:
        """A method that trains, by the name that a plane has for it."""
        known = methods.built_in()
        named = {entry.name: entry for entry in self.study.methods}
        if name not in named and name in known:
            named[name] = MethodEntry(name=name, like=name)
        if name not in named or known[named[name].like].kind != "train":
            trained = [one for one, what in known.items() if what.kind == "train"]
            raise self._wrong(
                f"method {entry.name} has the axis {name!r}, which is no method that trains; "
                f"there are {', '.join(trained)}"
            )
        return named[name]

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
        method = methods.built_in()[entry.like]
        changes = [*method.changes, *settings, *(recipes.override(k, v) for k, v in swept.items())]
        if predicts:
            changes = [recipes.override("evaluation.methods", predicts), *changes]
        where = f"study {self.study.name}, task {task.name}, method {entry.name}: setting"
        made = recipes.change(self._base(model, task), changes, where)
        given = [*self.study.settings, *model.settings, *task.settings, *changes]
        if "training.examples" in swept and not _sets("training.updates", given):
            training = made.training
            updates = -(-2 * training.examples // training.prompts_per_update)
            made = recipes.change(made, [f"training.updates={updates}"], where)
        if method.kind == "extrapolate":
            if not made.data.validation_rows:
                made = _carve(made)
            if not _sets("training.validation_prompts", given):
                number = f"training.validation_prompts={VALIDATION_PROMPTS}"
                made = recipes.change(made, [number], where)
        others = [
            self._section(model, other, changes) for other in self.study.tasks if other != task
        ]
        if method.mixture:
            made = made.model_copy(update={"mixture": self._mixture(made, others, entry)})
        if "transfer" in made.evaluation.protocols and others:
            evaluation = made.evaluation.model_copy(update={"transfer": others})
            made = made.model_copy(update={"evaluation": evaluation})
        elif "transfer" in made.evaluation.protocols and not made.evaluation.transfer:
            raise self._wrong(
                "protocol transfer measures on the study's other tasks, and there is only "
                f"{task.name}; name more tasks, or set evaluation.transfer"
            )
        return recipes.share(recipes.resolve(made), able=False)

    def _base(self, model: ModelEntry, task: TaskEntry) -> Recipe:
        """A task's recipe with this model and all settings that are not a method's."""
        key = (model.name, task.name)
        if key not in self._bases:
            study = self.study
            where = f"study {study.name}, model {model.name}, task {task.name}: setting"
            changes = [
                recipes.override("name", task.name),
                recipes.override("model", model.model),
                recipes.override("evaluation.protocols", study.protocols),
                recipes.override("evaluation.methods", ["vanilla"]),
                *study.settings,
                *model.settings,
                *task.settings,
            ]
            try:
                loaded = recipes.load(task.recipe)
            except RecipeError as error:
                raise self._wrong(f"task {task.name}: {error}") from None
            if model.revision or model.model != loaded.model:
                loaded = loaded.model_copy(update={"revision": model.revision})
            self._bases[key] = recipes.change(loaded, changes, where)
        return self._bases[key]

    def _section(self, model: ModelEntry, task: TaskEntry, changes: Sequence[str]) -> TaskSection:
        """Another task of the study, with what a method or a sweep changes of data and prompts."""
        of_tasks = [
            change for change in changes if change.startswith(("data.", "prompt.", "variants."))
        ]
        where = f"study {self.study.name}, task {task.name}: setting"
        return recipes.task(recipes.change(self._base(model, task), of_tasks, where))

    def _mixture(
        self, made: Recipe, others: list[TaskSection], entry: MethodEntry
    ) -> list[TaskSection]:
        """The study's other tasks, checked."""
        if not others:
            raise self._wrong(
                f"method {entry.name} trains on the study's other tasks, and there are none; name "
                "at least two tasks"
            )
        try:
            recipes.check_mixture(made.prompt.demonstrations, others)
        except RecipeError as error:
            raise self._wrong(f"task {made.name}, method {entry.name}: {error}") from None
        return others

    def _wrong(self, message: str) -> RecipeError:
        """An error that names the study."""
        return RecipeError(f"study {self.study.name}: {message}")


def _word(value: Any) -> str:
    """A swept value, for a cell's id."""
    return value if isinstance(value, str) else json.dumps(value)


def _sets(key: str, settings: Sequence[str]) -> bool:
    """Whether settings hold a key."""
    return any(setting.partition("=")[0].strip() == key for setting in settings)


def _trains(key: str) -> bool:
    """Whether a setting does nothing where nothing is trained."""
    return key.startswith(("adapter.", "objective.", "training."))


def _seed(recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with a seed."""
    if seed is None:
        return recipe
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})


def _carve(recipe: Recipe) -> Recipe:
    """Take validation rows out of the training rows.

    The parts are drawn in the order training, validation, demonstrations, test: with the sum of
    the first two unchanged, the demonstrations and test rows stay the protocol's own.
    """
    section = recipe.data
    rows = min(VALIDATION_ROWS, section.training_rows // 4)
    carved = {"training_rows": section.training_rows - rows, "validation_rows": rows}
    return recipe.model_copy(update={"data": section.model_copy(update=carved)})


def _factors(entry: MethodEntry, kind: methods.Kind) -> tuple[float, ...]:
    """The factors that are tried."""
    if entry.factors:
        return tuple(entry.factors)
    return {
        "plane": methods.PLANE_FACTORS,
        "extrapolate": methods.EXTRAPOLATION_FACTORS,
    }.get(kind, ())
