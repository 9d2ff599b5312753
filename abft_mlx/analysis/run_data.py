"""The files of a run folder, read and checked for figures and reports; no model is opened.

The models hold what is shown; other fields of the files are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from abft_mlx.errors import OutputError
from abft_mlx.files import schema_problem
from abft_mlx.induction import HEADS_FILE, Heads, read_heads

SCHEMA = 1
ABFT = "abft"
# With another objective these are no part of the loss.
ABFT_ONLY = ("punish", "reward", "induction_heads", "A")
CURVES = ("loss", *ABFT_ONLY, "validation_accuracy")


# JSON null is an absent number of a list: NaN in arrays.
Numbers = list[float | None]
# JSON null in place of an object is an absent object.
Object = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class Bins(BaseModel):
    """The bins of the calibration error, equally many of each."""

    count: list[int]
    confidence: Numbers
    accuracy: Numbers


class Method(BaseModel):
    """One way of predicting with one state of a model; rates in 0..1."""

    accuracy: float
    macro_f1: float | None = None
    expected_calibration_error: float | None = None
    true_label_probability: float | None = None
    confusion: list[list[int]] | None = None
    reliability: Bins | None = None
    interval: dict[str, tuple[float, float] | None] | None = None
    right: str = Field("", pattern="^[01]*$")

    def ends(self, key: str) -> tuple[float, float] | None:
        """Both ends of a measure's 95% interval."""
        return (self.interval or {}).get(key)

    def counts(self, classes: int | None = None) -> np.ndarray | None:
        """(C, C) prompts, gold class by answer; None where the file has no such table."""
        table = self.confusion or []
        if not table or {len(row) for row in table} != {classes or len(table)}:
            return None
        return np.array(table, dtype=np.int64)


class Comparison(BaseModel):
    """A paired test of two methods on the same prompts."""

    first: str
    second: str
    only_first: int
    only_second: int
    p_value: float


class Verdict(BaseModel):
    """What a classifier's accuracy means, beside prompting and simple baselines."""

    accuracy: float
    n: int
    sentence: str
    next: str
    interval: tuple[float, float] | None = None
    before: float | None = None
    bag_of_words: float | None = None
    majority: float | None = None
    recall: dict[str, float | None] = {}


class Measured(BaseModel):
    """What eval measured of one state."""

    methods: dict[str, Method] = {}
    robustness: Object = {}
    bias: Object = {}
    unseen: Object = {}
    transfer: Object = {}


class Evaluation(Measured):
    """``eval.json``."""

    adapter: str | None = None
    labels: list[str] = []
    prompts: int | None = None
    k: int | str | None = None
    seed: int | None = None
    comparisons: list[Comparison] = []
    base: Measured | None = None
    baselines: dict[str, dict[str, Any]] = {}
    verdict: Verdict | None = None

    def state(self, name: str) -> Mapping[str, Method]:
        """Methods of ``before``, the base, or ``after``, the model with the adapter."""
        if name == "after":
            return self.methods if self.adapter or self.base else {}
        if self.base is not None:
            return self.base.methods
        # Without an adapter the document itself is the base's.
        return {} if self.adapter else self.methods


class Source(BaseModel):
    """Where a model or texts come from."""

    source: str | None = None
    kind: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    classes: Object = {}
    rows: Object = {}


class RunFile(BaseModel):
    """``run.json``."""

    finished: bool = False
    versions: Object = {}
    device: str | None = None
    platform: str | None = None
    model: Source = Source()
    data: Source = Source()
    labels: Object = {}
    chat_template: str | None = None
    seeds: Object = {}
    trainable_parameters: int | None = None
    totals: Object = {}
    shift: dict[str, Numbers | float | None] | None = None
    validation: Object = {}

    def norms(self, part: str) -> np.ndarray | None:
        """(L,) norms of the change of W_Q (``q``) or W_K (``k``), NaN where none trains."""
        found = (self.shift or {}).get(part)
        return np.array(found, dtype=np.float64) if isinstance(found, list) else None


class Recipe(BaseModel):
    """``recipe.yaml``, as far as figures and reports name its settings."""

    description: str | None = None
    model: str | None = None
    data: Object = {}
    prompt: Object = {}
    adapter: Object = {}
    objective: Object = {}
    training: Object = {}


class Update(BaseModel):
    """A line of ``metrics.jsonl``."""

    step: int
    seen_examples: int
    seconds: float = 0.0
    loss: float | None = None
    punish: float | None = None
    reward: float | None = None
    induction_heads: float | None = None
    A: float | None = None
    validation_accuracy: float | None = None


@dataclass(frozen=True)
class RunData:
    """What lies in a run folder.

    Attributes:
        folder: the run folder.
        name: what to call the run in figures that show several.
        run: ``run.json``.
        recipe: ``recipe.yaml``, and its text as it is; empty where there is none.
        updates: of ``metrics.jsonl``.
        heads: ``heads.npz``, or None.
        evaluation: ``eval.json``, or None.
    """

    folder: Path
    name: str
    run: RunFile
    recipe: Recipe = field(default_factory=Recipe)
    recipe_text: str = ""
    updates: list[Update] = field(default_factory=list)
    heads: Heads | None = None
    evaluation: Evaluation | None = None

    @property
    def objective(self) -> str:
        """The recipe's objective.kind."""
        return str(self.recipe.objective.get("kind", ABFT))

    @property
    def title(self) -> str:
        """Model and data, of paths the last part alone."""
        model, data = self.run.model.source, self.run.data.source
        model, data = model or self.recipe.model, data or self.recipe.data.get("source")
        return f"{short(model or 'a model')} on {short(str(data or 'its data'))}"

    def column(self, key: str) -> np.ndarray:
        """(U,) a quantity after each update, NaN where not measured."""
        return np.array([getattr(update, key) for update in self.updates], dtype=np.float64)

    def curves(self) -> dict[str, np.ndarray]:
        """(U,) arrays of what the objective uses."""
        used = [key for key in CURVES if self.objective == ABFT or key not in ABFT_ONLY]
        return {key: self.column(key) for key in used}


def short(source: str) -> str:
    """Of a local path its name alone."""
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return source.rstrip("/").rpartition("/")[2] or source
    return source


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "run.json").exists()


def read_run(folder: Path) -> RunData:
    """Read what lies in a run folder.

    Raises:
        OutputError: it holds no run, or one of its files is broken.
    """
    run = _read(folder / "run.json", RunFile)
    if run is None:
        raise OutputError(
            f"{folder}: holds no run (no run.json); name a folder that finetune wrote"
        )
    text, recipe = _recipe(folder / "recipe.yaml")
    path = folder / "metrics.jsonl"
    # A run that goes on may be writing its last line.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    heads = folder / HEADS_FILE
    return RunData(
        folder=folder,
        name=str(recipe.objective.get("kind", ABFT)),
        run=run,
        recipe=recipe,
        recipe_text=text,
        updates=[parsed(Update, line, path, n) for n, line in enumerate(lines, 1)],
        heads=read_heads(heads) if heads.exists() else None,
        evaluation=_read(folder / "eval.json", Evaluation),
    )


def of_heads(path: Path) -> RunData:
    """What a file of ``abft-mlx heads`` holds, as a run that has nothing else.

    Raises:
        OutputError: it is no such file.
    """
    heads = read_heads(path)
    known = {key: {"source": str(heads.facts.get(key, "?"))} for key in ("model", "data")}
    recipe = Recipe(prompt={"demonstrations": heads.facts.get("k")})
    return RunData(path.parent, path.stem, RunFile.model_validate(known), recipe, heads=heads)


_Kind = TypeVar("_Kind", bound=BaseModel)


def parsed(kind: type[_Kind], content: Any, path: Path, line: int | None = None) -> _Kind:
    """A document, or its JSON as bytes, as a model of its fields.

    Raises:
        OutputError: a field is missing or of another kind; names the first one.
    """
    try:
        if isinstance(content, bytes):
            return kind.model_validate_json(content)
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        at = "" if line is None else f" line {line}"
        message = re.sub(r"\s+", " ", f"{where}: {first['msg']}".removeprefix(": "))
        raise OutputError(
            f"{path}{at}: cannot be read ({message:.300}); make it again or remove it"
        ) from None


class _Versioned(BaseModel):
    schema_: Any = Field(None, alias="schema")


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """A JSON file of a run; None where there is none."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error})") from None
    problem = schema_problem(parsed(_Versioned, content, path).schema_, SCHEMA, "make it again")
    if problem:
        raise OutputError(f"{path}: {problem}")
    return parsed(kind, content, path)


def _recipe(path: Path) -> tuple[str, Recipe]:
    """The text of a recipe, and its settings."""
    if not path.exists():
        return "", Recipe()
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        message = " ".join(str(error).split())
        raise OutputError(f"{path}: cannot be read ({message:.300})") from None
    recipe = parsed(Recipe, values, path)
    problem = schema_problem(values.get("schema"), SCHEMA, "train again")
    if problem:
        raise OutputError(f"{path}: {problem}")
    return text, recipe
