"""Cells of two special methods: the plane between two trained adapters, and extrapolation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from abft_mlx.analysis.statistics import share_right


@dataclass(frozen=True)
class Plane:
    """Accuracy over theta0 + x · (first - theta0) + y · (second - theta0).

    Attributes:
        model: the study's name for the model.
        task: the task's name.
        seed: training.seed of both methods.
        axes: names of the two methods.
        factors: (F,) of both axes.
        accuracy: (F, F) in 0..1, first method's factor by second method's.
        right: (F, F) which prompts were answered rightly, as ``right`` of eval's JSON; None where
            the cell does not say.
        prompts: test prompts behind each number.
        queries: distinct queries among them.
    """

    model: str
    task: str
    seed: int | None
    axes: tuple[str, str]
    factors: np.ndarray
    accuracy: np.ndarray
    right: list[list[str]] | None
    prompts: int
    queries: int

    def at(self, first: float, second: float) -> float | None:
        """Accuracy at a point of the grid; None where it has no such point."""
        point = self._point(first, second)
        return None if point is None else float(self.accuracy[point])

    def shares(self, first: float, second: float) -> np.ndarray | None:
        """(Q,) how often each query was answered rightly there; None where that is not known."""
        point = self._point(first, second)
        if point is None or self.right is None:
            return None
        return share_right(self.right[point[0]][point[1]], self.queries)

    def _point(self, first: float, second: float) -> tuple[int, int] | None:
        row, column = (
            np.flatnonzero(np.isclose(self.factors, wanted)) for wanted in (first, second)
        )
        return (int(row[0]), int(column[0])) if len(row) and len(column) else None

    @property
    def best(self) -> tuple[float, float]:
        """The first of the grid's most accurate points."""
        row, column = np.unravel_index(int(np.argmax(self.accuracy)), self.accuracy.shape)
        return float(self.factors[row]), float(self.factors[column])


def planes(document: dict[str, Any]) -> Iterator[Plane]:
    """Every plane of a study's facts."""
    for cell in document["cells"]:
        made = cell.get("plane")
        if made:
            first, second = made["axes"]
            yield Plane(
                model=cell["model"],
                task=cell["task"],
                seed=cell["seed"],
                axes=(str(first), str(second)),
                factors=np.array(made["factors"], dtype=np.float64),
                accuracy=np.array(made["accuracy"], dtype=np.float64),
                right=made.get("right"),
                prompts=int(made["prompts"]),
                queries=int(made["prompts"]) // max(1, int(cell["repeats"])),
            )


def plane_points(plane: Plane) -> dict[str, float | None]:
    """Accuracy of the base, of either method, of half of each, and the best."""
    return {
        "base": plane.at(0, 0),
        "first": plane.at(1, 0),
        "second": plane.at(0, 1),
        "half": plane.at(0.5, 0.5),
        "best": plane.at(*plane.best),
    }


@dataclass(frozen=True)
class Extrapolation:
    """Accuracy over the factor of one adapter.

    Attributes:
        model: the study's name for the model.
        task: the task's name.
        seed: training.seed.
        factors: (F,) that were tried.
        validation: (F,) accuracy on validation prompts, in 0..1.
        test: (F,) accuracy on test prompts.
        chosen: the factor that the validation prompts chose.
        validation_prompts: prompts that chose it.
        test_prompts: prompts behind ``test``.
    """

    model: str
    task: str
    seed: int | None
    factors: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    chosen: float
    validation_prompts: int
    test_prompts: int

    def at(self, factor: float) -> float | None:
        """Test accuracy at a factor that was tried."""
        near = np.flatnonzero(np.isclose(self.factors, factor))
        return float(self.test[near[0]]) if len(near) else None


def extrapolations(document: dict[str, Any]) -> Iterator[Extrapolation]:
    """Every extrapolation of a study's facts."""
    for cell in document["cells"]:
        made = cell.get("extrapolation")
        if made:
            yield Extrapolation(
                model=cell["model"],
                task=cell["task"],
                seed=cell["seed"],
                factors=np.array(made["factors"], dtype=np.float64),
                validation=np.array(made["validation"]["accuracy"], dtype=np.float64),
                test=np.array(made["test"]["accuracy"], dtype=np.float64),
                chosen=float(made["chosen"]),
                validation_prompts=int(made["validation"]["prompts"]),
                test_prompts=int(made["test"]["prompts"]),
            )
