"""Figures over two weights, over the plane of two methods, and over one factor."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import extrapolation, grid, interpolation, plane
from abft_mlx.analysis.measurements import Measurement, scored
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.plotting import Plot, by_model, caption, seeds, stem
from abft_mlx.analysis.special import Extrapolation, Plane, extrapolations, planes
from abft_mlx.analysis.table_parts import means

PUNISH, REWARD = "objective.punish", "objective.reward"


def weights(found: list[Measurement]) -> list[Measurement]:
    """Measurements of which both weights are swept."""
    return [one for one in scored(found) if PUNISH in one.sweep and REWARD in one.sweep]


def accuracy_grid(some: list[Measurement], punish: list[float], reward: list[float]) -> np.ndarray:
    """(A, B) mean accuracy over tasks and seeds; NaN where a pair was not measured."""
    table = np.full((len(punish), len(reward)), np.nan)
    for row, a in enumerate(punish):
        for column, b in enumerate(reward):
            group = [one for one in some if (one.sweep[PUNISH], one.sweep[REWARD]) == (a, b)]
            found = means(group, lambda one: one.accuracy)
            if found is not None:
                table[row, column] = found[0]
    return table


def grids(_document: dict[str, Any], found: list[Measurement], _paper: Paper) -> list[Plot]:
    """One grid for each model and method, one scale of colours for each model."""
    made = []
    for model, some in by_model(weights(found)):
        punish = sorted({one.sweep[PUNISH] for one in some})
        reward = sorted({one.sweep[REWARD] for one in some})
        tables = {
            method: accuracy_grid([one for one in some if one.method == method], punish, reward)
            for method in dict.fromkeys(one.method for one in some)
        }
        every = np.concatenate([table.ravel() for table in tables.values()])
        limits = (float(np.nanmin(every)), float(np.nanmax(every)))
        for method, table in tables.items():
            draw = partial(
                grid.draw,
                accuracy=table,
                punish=np.array(punish, dtype=np.float64),
                reward=np.array(reward, dtype=np.float64),
                limits=limits,
                title=method,
            )
            of = [one for one in some if one.method == method]
            made.append(Plot(stem("grid", model, method), draw, caption(model, of)))
    return made


def plane_contours(document: dict[str, Any], _found: list[Measurement], paper: Paper) -> list[Plot]:
    """One plane for each model, task and pair of methods, averaged over seeds."""
    made = []
    for (model, task, axes, factors), some in _by_axes(document).items():
        draw = partial(
            plane.draw,
            accuracy=np.mean([one.accuracy for one in some], axis=0),
            factors=np.array(factors),
            names=axes,
            paper=_published_plane(document, paper, model, task, axes),
        )
        n = f"n = {some[0].prompts} prompts"
        line = "; ".join((model, task, n, seeds(one.seed for one in some),
                          "dashed: from one method to the other"))  # fmt: skip
        made.append(Plot(stem("plane", model, task, *axes), draw, line))
    return made


def _by_axes(document: dict[str, Any]) -> dict[tuple[Any, ...], list[Plane]]:
    """Planes that differ by their seed alone, by model, task, methods and factors."""
    grouped: dict[tuple[Any, ...], list[Plane]] = {}
    for one in planes(document):
        grouped.setdefault((one.model, one.task, one.axes, tuple(one.factors)), []).append(one)
    return grouped


def interpolation_curves(
    document: dict[str, Any], _found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """The straight line between two methods, where the grid of their plane holds it."""
    made = []
    for (model, task, axes, factors), some in _by_axes(document).items():
        share = np.array([one for one in factors if some[0].at(1 - one, one) is not None])
        if len(share) < 3:
            continue
        base = [one.at(0, 0) for one in some]
        known = [one for one in base if one is not None]
        draw = partial(
            interpolation.draw,
            share=share,
            accuracy=np.array([[one.at(1 - at, at) for at in share] for one in some]),
            names=axes,
            base=float(np.mean(known)) if len(known) == len(base) else None,
        )
        line = "; ".join((model, task, f"n = {some[0].prompts} prompts",
                          seeds(one.seed for one in some),
                          "the band is one standard deviation over seeds"))  # fmt: skip
        made.append(Plot(stem("interpolation", model, task, *axes), draw, line))
    return made


def _published_plane(
    document: dict[str, Any], paper: Paper, model: str, task: str, axes: tuple[str, str]
) -> dict[str, float] | None:
    source = next(cell["source"] for cell in document["cells"] if cell["model"] == model)
    called = paper.model(model, source)
    for figure in ("figure7", "figure9"):
        by_task = paper.facts[figure].get(called, {})
        entry = by_task.get(task) or by_task.get("any")
        # The paper's end-to-end row is comparable with training W_Q and W_K alone, too.
        methods = [axis.removesuffix("_qk") for axis in axes]
        if entry and set(methods) <= set(entry):
            keys = ("untrained", *methods, "mixed")
            named = zip(("base", "first", "second", "best"), keys, strict=True)
            return {role: entry[key] / 100 for role, key in named}
    return None


def extrapolation_curves(
    document: dict[str, Any], _found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """One curve for each model, all its runs averaged, tasks too."""
    grouped: dict[tuple[Any, ...], list[Extrapolation]] = {}
    for one in extrapolations(document):
        grouped.setdefault((one.model, tuple(one.factors)), []).append(one)
    made = []
    for (model, factors), some in grouped.items():
        draw = partial(
            extrapolation.draw,
            factors=np.array(factors),
            validation=np.stack([one.validation for one in some]),
            test=np.stack([one.test for one in some]),
            chosen=np.array([one.chosen for one in some]),
        )
        names = list(dict.fromkeys(one.task for one in some))
        line = "; ".join(
            (
                model,
                names[0] if len(names) == 1 else f"{len(names)} tasks",
                f"n = {some[0].test_prompts} test and {some[0].validation_prompts} validation "
                "prompts",
                seeds(one.seed for one in some),
                "bands are one standard deviation over tasks and seeds",
            )
        )
        made.append(Plot(stem("extrapolation", model), draw, line))
    return made
