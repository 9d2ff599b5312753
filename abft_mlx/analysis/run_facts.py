"""What a run folder's files hold, as arrays for figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.analysis.run_files import broken, read_files
from abft_mlx.documents import section, short
from abft_mlx.induction import Heads, read_heads

CURVES = ("loss", "punish", "reward", "induction_heads", "A", "validation_accuracy")
# With another objective these are no part of the loss.
ABFT_ONLY = ("punish", "reward", "induction_heads", "A")
ABFT = "abft"


@dataclass(frozen=True)
class Method:
    """One way of predicting with one state of a model, from ``eval.json``.

    Attributes:
        confusion: (C, C) prompts, gold class by answer; None where the file has none.
        confidence: (bins,) mean confidence, NaN for an empty bin; None where the file has none.
        accuracy: (bins,) share answered rightly, likewise.
        count: (bins,) prompts, likewise.
    """

    confusion: np.ndarray | None
    confidence: np.ndarray | None
    accuracy: np.ndarray | None
    count: np.ndarray | None


@dataclass(frozen=True)
class RunFacts:
    """What lies in a run folder.

    Attributes:
        folder: the run folder.
        name: what to call the run in figures: its objective, or its folder where others share that.
        run: ``run.json``.
        recipe: ``recipe.yaml``; empty where there is none.
        seen: (U,) training prompts seen after each update, of ``metrics.jsonl``.
        seconds: (U,) seconds in updates until then.
        curves: (U,) arrays by the names of ``CURVES``, NaN where not measured.
        shift: (L,) norms of the change of W_Q and W_K, by ``q`` and ``k``; NaN where none trains.
        heads: ``heads.npz``, or None.
        evaluation: ``eval.json``, or None.
    """

    folder: Path
    name: str
    run: dict[str, Any]
    recipe: dict[str, Any]
    seen: np.ndarray
    seconds: np.ndarray
    curves: dict[str, np.ndarray]
    shift: dict[str, np.ndarray]
    heads: Heads | None
    evaluation: dict[str, Any] | None

    @property
    def model(self) -> str:
        """Where the base comes from; of a path, its last part alone."""
        return short(str(section(self.run, "model").get("source", "?")))

    @property
    def data(self) -> str:
        """Where the texts come from; of a path, its last part alone."""
        return short(str(section(self.run, "data").get("source", "?")))

    @property
    def seed(self) -> Any:
        """training.seed; None where nothing is known of a training."""
        return section(self.run, "seeds").get("training")

    @property
    def fingerprint(self) -> Any:
        """Of the base's weights."""
        return section(self.run, "model").get("fingerprint")

    @property
    def objective(self) -> str:
        """The recipe's objective.kind."""
        return str(section(self.recipe, "objective").get("kind", "abft"))

    def method(self, part: str, name: str = "vanilla") -> Method | None:
        """One method of ``eval.json``.

        Args:
            part: ``before`` is the base, ``after`` the model with the adapter.
            name: of the method.

        Raises:
            OutputError: what lies there is not what eval writes.
        """
        found = self.evaluation or {}
        if part == "before":
            # Without an adapter the document itself is the base's.
            found = section(found, "base") or ({} if found.get("adapter") else found)
        elif not found.get("adapter"):
            found = {}
        values = section(found, "methods").get(name)
        return None if values is None else method(values, self.folder / "eval.json")


def read_run(folder: Path) -> RunFacts:
    """Read what lies in a run folder.

    Raises:
        OutputError: it holds no run, or one of its files is broken.
    """
    found = read_files(folder)
    run, recipe, updates = found.run, found.recipe, found.metrics
    kind = str(section(recipe, "objective").get("kind", "abft"))
    curves = {
        key: _column(updates, key, folder / "metrics.jsonl")
        for key in CURVES
        if kind == ABFT or key not in ABFT_ONLY
    }
    seen = _column(updates, "seen_examples", folder / "metrics.jsonl")
    if np.isnan(seen).any():
        raise broken(folder / "metrics.jsonl", "a line has no seen_examples")
    return RunFacts(
        folder=folder,
        name=kind,
        run=run,
        recipe=recipe,
        seen=seen,
        seconds=np.cumsum(_column(updates, "seconds", folder / "metrics.jsonl")),
        curves=curves,
        shift=_shift(run.get("shift"), folder / "run.json"),
        heads=found.heads,
        evaluation=found.evaluation,
    )


def of_heads(path: Path) -> RunFacts:
    """What a file of ``abft-mlx heads`` holds, as a run that has nothing else.

    Raises:
        OutputError: it is no such file.
    """
    heads = read_heads(path)
    known = {key: {"source": heads.facts.get(key, "?")} for key in ("model", "data")}
    return RunFacts(
        folder=path.parent,
        name=path.stem,
        run=known,
        recipe={"prompt": {"demonstrations": heads.facts.get("k")}},
        seen=np.zeros(0),
        seconds=np.zeros(0),
        curves={},
        shift={},
        heads=heads,
        evaluation=None,
    )


def method(values: Any, path: Path) -> Method:
    """Read one method of eval's JSON.

    Raises:
        OutputError: it is not what eval writes.
    """
    if not isinstance(values, dict):
        raise broken(path, "a method is no object")
    counts = None
    if "confusion" in values:
        counts = _array(values["confusion"], path, "confusion", dimensions=2)
        if counts.shape[0] != counts.shape[1]:
            raise broken(path, "confusion is no square table")
    bins = values.get("reliability")
    if bins is None:
        return Method(counts, None, None, None)
    if not isinstance(bins, dict):
        raise broken(path, "reliability is no object")
    parts = [_array(bins.get(key), path, f"reliability.{key}") for key in
             ("confidence", "accuracy", "count")]  # fmt: skip
    if len({one.shape for one in parts}) != 1:
        raise broken(path, "the bins of reliability are not equally many")
    return Method(counts, *parts)


def _column(updates: Sequence[dict[str, Any]], key: str, path: Path) -> np.ndarray:
    return _array([one.get(key) for one in updates], path, key)


def _shift(found: Any, path: Path) -> dict[str, np.ndarray]:
    if not isinstance(found, dict):
        return {}
    return {key: _array(found[key], path, f"shift.{key}") for key in ("q", "k") if key in found}


def _array(values: Any, path: Path, what: str, *, dimensions: int = 1) -> np.ndarray:
    """Numbers as float64; null, and what is not finite, is NaN."""
    try:
        made = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise broken(path, f"{what} is not made of numbers") from None
    if made.ndim != dimensions:
        raise broken(path, f"{what} is no {'list' if dimensions == 1 else 'square table'}")
    return np.where(np.isfinite(made), made, math.nan)
