"""The figures of a study: from its facts to arrays, captions and file names.

A function of a figure gives a plot for each model; none where no cell that is done measured it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis import figures
from abft_mlx.analysis.figures import mean_and_deviation
from abft_mlx.analysis.run_data import ABFT, ABFT_ONLY, CURVES
from abft_mlx.analysis.run_plots import over_heads
from abft_mlx.analysis.study_data import (
    TABLES,
    Cell,
    Facts,
    Group,
    Mean,
    Measurement,
    by_method,
    means,
    measurements,
    of_task,
    reader,
    tasks,
)
from abft_mlx.analysis.study_tables import average
from abft_mlx.analysis.style import Plot, on_axes
from abft_mlx.errors import RecipeError

EXAMPLES = "training.examples"
PUNISH, REWARD = "objective.punish", "objective.reward"
LINES = 8
BANDS = "bands are one standard deviation over tasks and seeds"
Plots = Iterator[Plot]


def check(study: Any) -> None:
    """Check that the figures and the published table that a study names exist.

    Raises:
        RecipeError: one does not.
    """
    for figure in study.figures:
        if figure not in STUDY_FIGURES:
            raise RecipeError(
                f"study {study.name}: no figure is called {figure}; there are "
                f"{', '.join(STUDY_FIGURES)}"
            )
    for key, table in study.paper.items():
        if key != "table" or table not in TABLES:
            raise RecipeError(
                f"study {study.name}: paper has {key}: {table}; write table: and one of "
                f"{', '.join(TABLES)}"
            )


def study_plots(facts: Facts, name: str) -> list[Plot]:
    """The plots of one figure."""
    return list(STUDY_FIGURES[name](measurements(facts)))


def accuracy(rows: Group) -> Plots:
    """Methods by tasks, for each model."""
    for model, shown, groups in _by_model(row for row in _scored(rows) if not row.cell.sweep):
        columns = tasks(shown)
        table = [[means(of_task(group, task)) for task in columns] for group in groups.values()]
        yield _bars("accuracy", model, shown, groups, table, columns)


def consistency(rows: Group) -> Plots:
    """Both consistencies, averaged over tasks, for each model (the paper's table 3)."""
    kinds = ("template", "demonstrations")
    reads = [reader("robustness", kind, "consistency") for kind in kinds]
    for model, shown, groups in _by_model(_measured(rows, "robustness")):
        table = [[means(group, read) for read in reads] for group in groups.values()]
        columns, label = ["over templates", "over demonstrations"], "consistency of answers (%)"
        yield _bars("consistency", model, shown, groups, table, columns, label=label)


def unseen(rows: Group) -> Plots:
    """Random, unseen and zero-shot accuracy, averaged over tasks (the paper's figure 3)."""
    reads = [reader("unseen", kind, "accuracy") for kind in ("random", "unseen", "zero_shot")]
    for model, shown, groups in _by_model(_measured(rows, "unseen")):
        table = [[means(group, read) for read in reads] for group in groups.values()]
        levels = [np.nan if line[2] is None else line[2].value for line in table]
        table, columns = [line[:2] for line in table], ["random", "gold label unseen"]
        yield _bars("unseen", model, shown, groups, table, columns, zero_shot=levels)


def _bars(
    name: str,
    model: str,
    shown: Group,
    groups: dict[str, Group],
    table: list[list[Mean | None]],
    columns: list[str],
    **more: Any,
) -> Plot:
    """Bars of methods, a group of them for each column."""
    pairs = np.array([[mean or (None, None) for mean in line] for line in table], dtype=np.float64)
    draw = on_axes(
        figures.bars, methods=list(groups), values=pairs[..., 0], spread=pairs[..., 1],
        columns=columns, **more,
    )  # fmt: skip
    return Plot(_stem(name, model), draw, _caption(shown))


def data_efficiency(rows: Group) -> Plots:
    """Methods over training sizes, for each model (the paper's figure 2)."""
    for model, shown, _ in _by_model(row for row in _scored(rows) if EXAMPLES in row.cell.sweep):
        sizes = sorted({row.cell.sweep[EXAMPLES] for row in shown})
        series = []
        for method in dict.fromkeys(row.method for row in shown):
            own = [row for row in shown if row.method == method]
            ends = np.array(
                [_ends([row for row in own if row.cell.sweep[EXAMPLES] == n]) for n in sizes]
            )
            series.append((method, sizes, ends[:, 0], ends[:, 1:].T))
        base = [row for row in _scored(rows) if (row.cell.model, row.method) == (model, "vanilla")]
        draw = on_axes(
            figures.lines, series=series, x_label="training examples", log_ticks=sizes,
            level=("vanilla", _ends(base)[0] if base else None),
        )  # fmt: skip
        caption = _caption(shown, "bands are 95% intervals over seeds and prompts")
        yield Plot(_stem("data-efficiency", model), draw, caption)


def _ends(group: Group) -> tuple[float, float, float]:
    """Mean accuracy and both ends of its interval, NaN where they are not known."""
    mean = means(group)
    return average(group) or (mean.value if mean else np.nan, np.nan, np.nan)


def training(rows: Group, names: tuple[str, ...] = CURVES, stem: str = "training") -> Plots:
    """Loss, its terms, heads and A against prompts seen, a line for each method."""
    trained = [row for row in rows if row.plain and row.cell.curve]
    # Beside a grid of settings the plain methods are the figure; alone, the grid is.
    plain = [row for row in trained if not row.cell.sweep]
    for model, shown, every in _by_model(plain or trained):
        curves, spread = {}, {}
        for label, group in list(every.items())[:LINES]:
            middle, around = _training_curves(group, names)
            if len(middle) > 1:
                curves[label], spread[label] = middle, around
        if not curves:
            continue
        note = "the loss of methods other than ABFT is the cross-entropy of the label"
        caption = _caption(
            shown, BANDS,
            f"the first {LINES} of {len(every)} settings" * (len(every) > LINES),
            note * ("loss" in names and any(map(_label_loss, every.values()))),
        )  # fmt: skip
        draw = partial(figures.training_curves, curves=curves, spread=spread)
        yield Plot(_stem(stem, model), draw, caption, figures.training_height(curves))


def _training_curves(
    group: Group, names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(U,) means and spreads over runs, as far as all runs went."""
    length = min(len(row.cell.curve) for row in group)
    curves = [row.cell.curve[:length] for row in group]
    middle, around = {}, {}
    for name in ("seen_examples", *names):
        unused = name in ABFT_ONLY and _label_loss(group)
        if not unused and all(name in step for curve in curves for step in curve):
            runs = [[step[name] for step in curve] for curve in curves]
            middle[name], around[name] = mean_and_deviation(np.array(runs, dtype=np.float64))
    return middle, around


def _label_loss(group: Group) -> bool:
    """Whether a method trains on the cross-entropy of the label."""
    return group[0].cell.settings.get("objective") not in (None, ABFT)


def shift(rows: Group) -> Plots:
    """Norms of the change of W_Q and W_K in every layer, for each model."""
    for model, shown, groups in _by_model(row for row in rows if row.plain and row.cell.shift):
        norms = {
            f"{label} W_{part.upper()}": mean_and_deviation(
                np.array([(row.cell.shift or {})[part] for row in group], dtype=np.float64)
            )
            for label, group in groups.items()
            for part in ("q", "k")
        }
        draw = on_axes(figures.shift, norms=norms)
        yield Plot(_stem("shift", model), draw, _caption(shown, BANDS))


def label_attention(rows: Group) -> Plots:
    """Attention on labels in every layer, for each model and each state of it."""
    for model, shown, groups in _by_model(row for row in rows if row.plain and row.cell.census):
        states = {}
        for label, group in groups.items():
            magnitude, correctness = (
                np.nanmean(
                    [over_heads(np.array(row.cell.census[key], float)) for row in group], axis=0
                )
                for key in ("magnitude", "correctness")
            )
            # Magnitude is right plus wrong, correctness right less wrong.
            name = "before" if group[0].method == "vanilla" else label
            states[name] = (magnitude, (magnitude + correctness) / 2)
        more = f"means over heads and the first {shown[0].cell.census.get('prompts', '?')} prompts"
        draw = on_axes(figures.label_attention, states=states)
        yield Plot(_stem("label-attention", model), draw, _caption(shown, more))


def grid(rows: Group) -> Plots:
    """One grid over both weights for each model and method, one scale of colours for a model."""
    swept = (row for row in _scored(rows) if {PUNISH, REWARD} <= set(row.cell.sweep))
    for model, shown, _ in _by_model(swept):
        punish, reward = (
            sorted({row.cell.sweep[key] for row in shown}) for key in (PUNISH, REWARD)
        )
        groups = {name: [row for row in shown if row.method == name]
                  for name in dict.fromkeys(row.method for row in shown)}  # fmt: skip
        tables = {name: np.full((len(punish), len(reward)), np.nan) for name in groups}
        for name, table in tables.items():
            for a, b in np.ndindex(table.shape):
                weights = {PUNISH: punish[a], REWARD: reward[b]}.items()
                mean = means([row for row in groups[name] if weights <= row.cell.sweep.items()])
                table[a, b] = mean.value if mean else np.nan
        limits = (np.nanmin(list(tables.values())), np.nanmax(list(tables.values())))
        for name, table in tables.items():
            draw = on_axes(
                figures.grid, accuracy=table, title=name, punish=punish, reward=reward,
                limits=limits,
            )  # fmt: skip
            yield Plot(_stem("grid", model, name), draw, _caption(groups[name]))


def plane(rows: Group) -> Plots:
    """One plane for each model, task and pair of methods, averaged over seeds."""
    grouped: dict[Any, list[Cell]] = {}
    for row in rows:
        part = row.cell.plane
        if part:
            key = (row.cell.model, row.cell.task, tuple(part["axes"]), tuple(part["factors"]))
            grouped.setdefault(key, []).append(row.cell)
    for (model, task, axes, factors), cells in grouped.items():
        table = np.mean([cell.plane["accuracy"] for cell in cells], axis=0)
        draw = on_axes(figures.plane, accuracy=table, factors=np.array(factors), names=axes)
        n = f"n = {cells[0].plane['prompts']} prompts"
        caption = _cells_caption(cells, n, "dashed: from one method to the other")
        yield Plot(_stem("plane", model, task, *axes), draw, caption)


def extrapolation(rows: Group) -> Plots:
    """One curve for each model, all its runs averaged, tasks too."""
    grouped: dict[Any, list[Cell]] = {}
    for row in rows:
        if row.cell.extrapolation and row.plain:
            key = (row.cell.model, tuple(row.cell.extrapolation["factors"]))
            grouped.setdefault(key, []).append(row.cell)
    for (model, factors), cells in grouped.items():
        parts = [cell.extrapolation for cell in cells]
        draw = on_axes(
            figures.extrapolation, factors=np.array(factors),
            validation=np.array([part["validation"]["accuracy"] for part in parts]),
            test=np.array([part["test"]["accuracy"] for part in parts]),
            chosen=np.array([part["chosen"] for part in parts]),
        )  # fmt: skip
        test, validation = (parts[0][side]["prompts"] for side in ("test", "validation"))
        n = f"n = {test} test and {validation} validation prompts"
        yield Plot(_stem("extrapolation", model), draw, _cells_caption(cells, n, BANDS))


STUDY_FIGURES: dict[str, Callable[[Group], Plots]] = {
    "accuracy": accuracy,
    "data_efficiency": data_efficiency,
    "head_count": partial(training, names=("induction_heads",), stem="head-count"),
    "grid": grid,
    "plane": plane,
    "extrapolation": extrapolation,
    "consistency": consistency,
    "shift": shift,
    "label_attention": label_attention,
    "unseen": unseen,
    "training": training,
}


def _scored(rows: Group) -> list[Measurement]:
    """Those whose accuracy was measured."""
    return [row for row in rows if row.values]


def _measured(rows: Group, part: str) -> list[Measurement]:
    """Those of which a protocol was measured."""
    return [row for row in rows if row.plain and getattr(row.cell.evaluation, part)]


def _by_model(
    rows: Iterable[Measurement],
) -> Iterator[tuple[str, list[Measurement], dict[str, Group]]]:
    """Measurements of each model in order: all of them, and those of each method's label."""
    every = list(rows)
    for model in dict.fromkeys(row.cell.model for row in every):
        own = [row for row in every if row.cell.model == model]
        yield model, own, {label: group for (_, label), group in by_method(own).items()}


def _caption(rows: Group, *more: str) -> str:
    """Model, tasks, n, training seeds and more."""
    counts = sorted({row.prompts for row in rows if row.prompts})
    n = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1])))) if counts else ""
    return _cells_caption([row.cell for row in rows], n and f"n = {n} prompts", *more)


def _cells_caption(cells: list[Cell], n: str, *more: str) -> str:
    """Model, tasks, n, training seeds and more."""
    names = list(dict.fromkeys(cell.task for cell in cells))
    task = names[0] if len(names) == 1 else f"{len(names)} tasks"
    seeds = len({cell.seed for cell in cells} - {None})
    trained = f"{seeds} training seed{'' if seeds == 1 else 's'}" if seeds else "not trained"
    return "; ".join(filter(None, [cells[0].model, task, n, trained, *more]))


def _stem(*parts: str) -> str:
    """A file name of several words."""
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in parts)
