"""The files of a run folder, read and checked for figures and reports; no model is opened.

The models hold what is shown; other fields of the files are ignored.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from abft_mlx import files
from abft_mlx.errors import OutputError
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

    def arrays(self) -> dict[str, np.ndarray]:
        """(bins,) float64 each, NaN for the rates of an empty bin."""
        return {key: np.array(value, dtype=np.float64) for key, value in self}


class Method(BaseModel):
    """One way of predicting with one state of a model; rates in 0..1."""

    accuracy: float
    macro_f1: float | None = None
    expected_calibration_error: float | None = None
    true_label_probability: float | None = None
    confusion: list[list[int]] = []
    reliability: Bins | None = None
    interval: Object = {}
    right: str = Field("", pattern="^[01]*$")


class Measured(BaseModel):
    """What eval measured of one state."""

    methods: dict[str, Method] = {}
    labels: list[str] = []
    prompts: int | None = None
    robustness: Object = {}
    bias: Object = {}
    unseen: Object = {}
    transfer: Object = {}


class Evaluation(Measured):
    """``eval.json``."""

    adapter: str | None = None
    k: int | str | None = None
    seed: int | None = None
    comparisons: list[dict[str, Any]] = []
    base: Measured | None = None
    baselines: dict[str, dict[str, Any]] = {}
    verdict: Object = {}

    def state(self, name: str) -> dict[str, Method]:
        """Methods of ``before``, the base, or ``after``, the model with the adapter."""
        if name == "after":
            return self.methods if self.adapter or self.base else {}
        if self.base is not None:
            return self.base.methods
        # Without an adapter the document itself is the base's.
        return {} if self.adapter else self.methods


class RunFile(BaseModel):
    """``run.json``."""

    finished: bool = False
    versions: Object = {}
    device: str | None = None
    platform: str | None = None
    model: Object = {}
    data: Object = {}
    labels: Object = {}
    chat_template: str | None = None
    seeds: Object = {}
    trainable_parameters: int | None = None
    totals: Object = {}
    shift: dict[str, Numbers | float | None] | None = None
    validation: Object = {}


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
    """The files of a run folder."""

    folder: Path
    run: RunFile
    recipe: Recipe = field(default_factory=Recipe)
    updates: list[Update] = field(default_factory=list)
    heads: Heads | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def objective(self) -> str:
        """The recipe's objective.kind."""
        return str(self.recipe.objective.get("kind", ABFT))

    @property
    def title(self) -> str:
        """Model and data, of paths the last part alone."""
        model = self.run.model.get("source") or self.recipe.model or "a model"
        data = self.run.data.get("source") or self.recipe.data.get("source") or "its data"
        return f"{short(str(model))} on {short(str(data))}"

    def column(self, key: str) -> np.ndarray:
        """(U,) a quantity after each update, NaN where not measured."""
        return np.array([getattr(update, key) for update in self.updates], dtype=np.float64)


def short(source: str) -> str:
    """Of a local path its name alone."""
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        return source.rstrip("/").rpartition("/")[2] or source
    return source


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "run.json").exists()


def read_run(folder: Path) -> RunData:
    """Read a run folder; OutputError where it holds no run, or a broken file."""
    run = read(folder / "run.json", RunFile)
    if run is None:
        raise OutputError(
            f"{folder}: holds no run (no run.json); name a folder that finetune wrote"
        )
    path, heads = folder / "metrics.jsonl", folder / HEADS_FILE
    # A run that goes on may be writing its last line.
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return RunData(
        folder=folder,
        run=run,
        recipe=read(folder / "recipe.yaml", Recipe) or Recipe(),
        updates=[parsed(Update, line, f"{path} line {n}") for n, line in enumerate(lines, 1)],
        heads=read_heads(heads) if heads.exists() else None,
        evaluation=read(folder / "eval.json", Evaluation) or Evaluation(),
    )


def read_heads_file(path: Path) -> RunData:
    """A file of ``abft-mlx heads``, as a run that has nothing else."""
    heads = read_heads(path)
    model, data = ({"source": str(heads.facts.get(key, "?"))} for key in ("model", "data"))
    recipe = Recipe(prompt={"demonstrations": heads.facts.get("k")})
    return RunData(path.parent, RunFile(model=model, data=data), recipe, heads=heads)


_Kind = TypeVar("_Kind", bound=BaseModel)


def read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """A JSON or YAML file, compressed or not, as a model; None where there is none.

    Raises:
        OutputError: it cannot be read, or is of a newer schema.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8")
        values = yaml.safe_load(text) if path.suffix == ".yaml" else files.parse_json(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError, zlib.error, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise OutputError(f"{path}: cannot be read ({reason:.300})") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    problem = files.schema_problem(schema, SCHEMA, "make it again")
    if problem:
        raise OutputError(f"{path}: {problem}")
    return parsed(kind, values, path)


def parsed(kind: type[_Kind], content: Any, where: Path | str) -> _Kind:
    """A document, or its JSON as bytes, as a model; OutputError names the first wrong field."""
    try:
        if isinstance(content, bytes):
            return kind.model_validate_json(content)
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]])
        message = " ".join(message.split())[:300]
        raise OutputError(
            f"{where}: cannot be read ({message}); make it again or remove it"
        ) from None
