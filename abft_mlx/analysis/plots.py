"""Which figures a study ends in: from its facts to arrays, captions and file names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis import plot_answers, plot_grids, plot_heads, plot_training
from abft_mlx.analysis.comparison import average
from abft_mlx.analysis.figures import accuracy, consistency, data_efficiency, unseen
from abft_mlx.analysis.measurements import Measurement, measurements, of_task, rows, scored, tasks
from abft_mlx.analysis.paper import TABLES, Paper
from abft_mlx.analysis.plotting import Plot, by_model, caption, stem
from abft_mlx.analysis.statistics import mean_and_spread
from abft_mlx.analysis.table_parts import means, reader
from abft_mlx.errors import RecipeError

EXAMPLES = "training.examples"


def names() -> tuple[str, ...]:
    """The figures that a study may name."""
    return tuple(_makers())


def check(study: Any) -> None:
    """See that the figures and the published table that a study names exist.

    Args:
        study: anything with ``name``, ``figures`` and ``paper``.

    Raises:
        RecipeError: one does not.
    """
    for figure in study.figures:
        if figure not in names():
            raise RecipeError(
                f"study {study.name}: no figure is called {figure}; there are {', '.join(names())}"
            )
    for key, table in study.paper.items():
        if key != "table" or table not in TABLES:
            raise RecipeError(
                f"study {study.name}: paper has {key}: {table}; write table: and one of "
                f"{', '.join(TABLES)}"
            )


def plots(
    document: dict[str, Any], only: Sequence[str] | None = None
) -> tuple[list[Plot], list[str]]:
    """The figures that a study's facts name.

    Args:
        document: the study's facts.
        only: names of figures, instead of those.

    Returns:
        What to draw, and a line for each figure that cannot be drawn.
    """
    made, notes = [], []
    for name, some in by_name(document, document["figures"] if only is None else only).items():
        if not some:
            notes.append(without(name, document))
        made += some
    return made, notes


def without(name: str, document: dict[str, Any]) -> str:
    """What to say of a figure that no cell measured."""
    reason = "no cell that is done measured what it shows"
    if name == "reliability" and scored(measurements(document)):
        reason = (
            "its cells were made before eval kept the bins of the calibration error; run the study "
            "again"
        )
    return f"figure {name}: {reason}"


def by_name(document: dict[str, Any], wanted: Sequence[str]) -> dict[str, list[Plot]]:
    """What to draw for each named figure; nothing where no cell measured it."""
    found = measurements(document)
    paper = Paper(document["paper"].get("table"))
    return {name: _makers()[name](document, found, paper) for name in wanted}


_Maker = Callable[[dict[str, Any], list[Measurement], Paper], list[Plot]]


def _makers() -> dict[str, _Maker]:
    return {
        "accuracy": accuracy_bars,
        "data_efficiency": data_efficiency_lines,
        "head_count": plot_heads.head_count,
        "grid": plot_grids.grids,
        "plane": plot_grids.plane_contours,
        "extrapolation": plot_grids.extrapolation_curves,
        "consistency": consistency_bars,
        "shift": plot_heads.shifts,
        "label_attention": plot_heads.label_attention_lines,
        "unseen": unseen_bars,
        "training": plot_training.training,
        "interpolation": plot_grids.interpolation_curves,
        "confusion": plot_answers.confusion_matrices,
        "reliability": plot_answers.reliability_diagrams,
    }


def accuracy_bars(_document: dict[str, Any], found: list[Measurement], paper: Paper) -> list[Plot]:
    """Methods by tasks, for each model."""
    made = []
    for model, some in by_model(one for one in scored(found) if not one.sweep):
        grouped, columns = list(rows(some).values()), tasks(some)
        shape = (len(grouped), len(columns))
        values, spread, theirs = (np.full(shape, np.nan) for _ in range(3))
        for row, group in enumerate(grouped):
            called = paper.model(model, group[0].source)
            for column, task in enumerate(columns):
                of = [one.accuracy for one in of_task(group, task)]
                if of:
                    values[row, column], spread[row, column] = _pair(mean_and_spread(of))
                    theirs[row, column] = _rate(paper.accuracy(called, group[0].method, task))
        draw = partial(
            accuracy.draw,
            accuracy=values,
            spread=spread,
            paper=theirs,
            methods=[group[0].label for group in grouped],
            tasks=[paper.task(task) for task in columns],
        )
        made.append(Plot(stem("accuracy", model), draw, caption(model, some)))
    return made


def consistency_bars(
    _document: dict[str, Any], found: list[Measurement], paper: Paper
) -> list[Plot]:
    """Both consistencies, averaged over tasks, for each model."""
    made = []
    kinds = ("template", "demonstrations")
    for model, some in by_model(one for one in found if one.plain and one.part("robustness")):
        grouped = list(rows(some).values())
        values, spread = _table(grouped, [("robustness", kind, "consistency") for kind in kinds])
        theirs = np.full(values.shape, np.nan)
        for row, group in enumerate(grouped):
            called = paper.model(model, group[0].source)
            role = "untrained" if group[0].method == "vanilla" else group[0].label
            theirs[row] = [_rate(paper.consistency(called, kind, role)) for kind in kinds]
        draw = partial(
            consistency.draw,
            consistency=values,
            spread=spread,
            paper=theirs,
            methods=[group[0].label for group in grouped],
        )
        made.append(Plot(stem("consistency", model), draw, caption(model, some)))
    return made


def unseen_bars(_document: dict[str, Any], found: list[Measurement], paper: Paper) -> list[Plot]:
    """Random, unseen and zero-shot accuracy, averaged over tasks, for each model."""
    made = []
    for model, some in by_model(one for one in found if one.plain and one.part("unseen")):
        grouped, names_of = list(rows(some).values()), tasks(some)
        values, spread = _table(
            grouped, [("unseen", kind, "accuracy") for kind in ("random", "unseen", "zero_shot")]
        )
        theirs = np.full((len(grouped), 2), np.nan)
        for row, group in enumerate(grouped):
            called = paper.model(model, group[0].source) or ""
            published = paper.facts["figure3"].get(called, {})
            if names_of == ["trec"] and group[0].method == "vanilla" and published:
                entry = published["trec"]
                theirs[row] = [_rate(entry[kind]["untrained"]) for kind in ("random", "unseen")]
        draw = partial(
            unseen.draw,
            accuracy=values[:, :2],
            spread=spread[:, :2],
            paper=theirs,
            zero_shot=values[:, 2],
            methods=[group[0].label for group in grouped],
        )
        made.append(Plot(stem("unseen", model), draw, caption(model, some)))
    return made


def data_efficiency_lines(
    _document: dict[str, Any], found: list[Measurement], _paper: Paper
) -> list[Plot]:
    """Methods over training sizes, for each model."""
    made = []
    for model, some in by_model(scored(found)):
        swept = [one for one in some if EXAMPLES in one.sweep]
        if not swept:
            continue
        sizes = sorted({one.sweep[EXAMPLES] for one in swept})
        methods = list(dict.fromkeys(one.method for one in swept))
        table = np.full((3, len(methods), len(sizes)), np.nan)
        for row, method in enumerate(methods):
            for column, size in enumerate(sizes):
                group = [
                    one for one in swept
                    if one.method == method and one.sweep[EXAMPLES] == size
                ]  # fmt: skip
                if group:
                    table[:, row, column] = _ends(group)
        base = [one for one in some if one.method == "vanilla"]
        draw = partial(
            data_efficiency.draw,
            examples=np.array(sizes, dtype=np.float64),
            accuracy=table[0],
            low=table[1],
            high=table[2],
            methods=methods,
            untrained=_ends(base)[0] if base else None,
        )
        more = "bands are 95% intervals over seeds and prompts"
        made.append(Plot(stem("data-efficiency", model), draw, caption(model, swept, more)))
    return made


def _ends(group: Sequence[Measurement]) -> tuple[float, float, float]:
    whole = average(group)
    if whole is not None:
        return whole.mean, whole.low, whole.high
    mean = means(group, lambda one: one.accuracy)
    return (mean[0] if mean else np.nan), np.nan, np.nan


def _table(
    grouped: Sequence[Sequence[Measurement]], keys: Sequence[tuple[str, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    values, spread = (np.full((len(grouped), len(keys)), np.nan) for _ in range(2))
    for row, group in enumerate(grouped):
        for column, path in enumerate(keys):
            found = means(group, reader(*path))
            if found is not None:
                values[row, column], spread[row, column] = _pair(found)
    return values, spread


def _pair(made: tuple[float, float | None]) -> tuple[float, float]:
    return made[0], np.nan if made[1] is None else made[1]


def _rate(published: float | None) -> float:
    return np.nan if published is None else published / 100
