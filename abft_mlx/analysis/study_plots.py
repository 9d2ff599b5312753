"""Which figures a study ends in: from its facts to arrays, captions and file names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from abft_mlx.analysis import figures
from abft_mlx.analysis.figures.results import mean_and_deviation, quantities
from abft_mlx.analysis.plots import (
    Plot,
    confusion_heights,
    joined,
    note_on_classes,
    on_axes,
    over_heads,
    stem,
    unique,
)
from abft_mlx.analysis.run_data import ABFT, ABFT_ONLY, CURVES
from abft_mlx.analysis.study_data import (
    TABLES,
    Cell,
    Facts,
    Group,
    Measurement,
    means,
    measurements,
    of_task,
    reader,
    rows,
    scored,
    tasks,
)
from abft_mlx.analysis.study_tables import average
from abft_mlx.errors import RecipeError

EXAMPLES = "training.examples"
PUNISH, REWARD = "objective.punish", "objective.reward"
LINES = 8
BANDS = "bands are one standard deviation over tasks and seeds"


def figure_names() -> tuple[str, ...]:
    """The figures that a study may name."""
    return tuple(_MAKERS)


def check(study: Any) -> None:
    """Check that the figures and the published table that a study names exist.

    Args:
        study: anything with ``name``, ``figures`` and ``paper``.

    Raises:
        RecipeError: one does not.
    """
    for figure in study.figures:
        if figure not in _MAKERS:
            raise RecipeError(
                f"study {study.name}: no figure is called {figure}; there are {', '.join(_MAKERS)}"
            )
    for key, table in study.paper.items():
        if key != "table" or table not in TABLES:
            raise RecipeError(
                f"study {study.name}: paper has {key}: {table}; write table: and one of "
                f"{', '.join(TABLES)}"
            )


def study_plots(facts: Facts, wanted: Sequence[str]) -> dict[str, list[Plot]]:
    """What to draw for each named figure; nothing where no cell measured it."""
    found = measurements(facts)
    return {name: _MAKERS[name](facts, found) for name in wanted}


def without(name: str, facts: Facts) -> str:
    """A note on a figure that no cell measured."""
    reason = "no cell that is done measured what it shows"
    if name == "reliability" and scored(measurements(facts)):
        reason = (
            "its cells were made before eval kept the bins of the calibration error; run the study "
            "again"
        )
    return f"figure {name}: {reason}"


def accuracy(facts: Facts, found: Group) -> list[Plot]:
    """Methods by tasks, for each model."""
    made, paper = [], facts.published
    for model, some, groups in _by_model(one for one in scored(found) if not one.cell.sweep):
        columns = tasks(some)
        theirs = [
            [paper.accuracy(_called(facts, group), group[0].method, task) for task in columns]
            for group in groups
        ]
        values, spread = _arrays(
            [[means(of_task(group, task)) for task in columns] for group in groups]
        )
        draw = on_axes(
            figures.accuracy, accuracy=values, spread=spread, paper=_rates(theirs),
            methods=_labels(groups), tasks=[paper.task(task) for task in columns],
        )  # fmt: skip
        made.append(Plot(stem("accuracy", model), draw, _caption(model, some)))
    return made


def consistency(facts: Facts, found: Group) -> list[Plot]:
    """Both consistencies, averaged over tasks, for each model."""
    made, kinds, paper = [], ("template", "demonstrations"), facts.published
    measured = (one for one in found if one.plain and one.cell.evaluation.robustness)
    for model, some, groups in _by_model(measured):
        values, spread = _table(groups, [("robustness", kind, "consistency") for kind in kinds])
        theirs = [
            [paper.consistency(_called(facts, group), kind, group[0].label) for kind in kinds]
            for group in groups
        ]
        draw = on_axes(
            figures.consistency, values=values, spread=spread, paper=_rates(theirs),
            methods=_labels(groups),
        )  # fmt: skip
        made.append(Plot(stem("consistency", model), draw, _caption(model, some)))
    return made


def unseen(facts: Facts, found: Group) -> list[Plot]:
    """Random, unseen and zero-shot accuracy, averaged over tasks, for each model."""
    made, kinds = [], ("random", "unseen", "zero_shot")
    measured = (one for one in found if one.plain and one.cell.evaluation.unseen)
    for model, some, groups in _by_model(measured):
        values, spread = _table(groups, [("unseen", kind, "accuracy") for kind in kinds])
        theirs = np.full((len(groups), 2), np.nan)
        for row, group in enumerate(groups):
            published = facts.published.facts["figure3"].get(_called(facts, group) or "", {})
            if tasks(some) == ["trec"] and group[0].method == "vanilla" and published:
                theirs[row] = [published["trec"][kind]["untrained"] / 100 for kind in kinds[:2]]
        draw = on_axes(
            figures.unseen, values=values[:, :2], spread=spread[:, :2], paper=theirs,
            zero_shot=values[:, 2], methods=_labels(groups),
        )  # fmt: skip
        made.append(Plot(stem("unseen", model), draw, _caption(model, some)))
    return made


def data_efficiency(_facts: Facts, found: Group) -> list[Plot]:
    """Methods over training sizes, for each model."""
    made = []
    for model, some, _ in _by_model(one for one in scored(found) if EXAMPLES in one.cell.sweep):
        sizes = sorted({one.cell.sweep[EXAMPLES] for one in some})
        methods = unique(one.method for one in some)
        table = np.array([
            [_ends([one for one in some if (one.method, one.cell.sweep[EXAMPLES]) == (name, size)])
             for size in sizes]
            for name in methods
        ])  # fmt: skip
        base = [one for one in scored(found) if (one.model, one.method) == (model, "vanilla")]
        draw = on_axes(
            figures.data_efficiency, examples=np.array(sizes, dtype=np.float64),
            accuracy=table[..., 0], ends=np.moveaxis(table[..., 1:], -1, 0), methods=methods,
            untrained=_ends(base)[0] if base else None,
        )  # fmt: skip
        more = "bands are 95% intervals over seeds and prompts"
        made.append(Plot(stem("data-efficiency", model), draw, _caption(model, some, more)))
    return made


def _ends(group: Group) -> tuple[float, float, float]:
    """Mean accuracy and both ends of its interval, NaN where they are not known."""
    whole, mean = average(group), means(group)
    if whole is not None:
        return whole.mean, whole.low, whole.high
    return (mean[0] if mean else np.nan), np.nan, np.nan


def training(_facts: Facts, found: Group) -> list[Plot]:
    """Loss, its terms, heads and A against prompts seen, a line for each method."""
    made = []
    trained = [one for one in found if one.plain and one.cell.run and one.cell.run.curve]
    for model, some, every in _by_model(_unswept(trained)):
        groups = every[:LINES]
        seen, curves, spread = zip(*map(_training_curves, groups), strict=True)
        draw = partial(
            figures.training_curves, seen=seen, curves=curves, names=_labels(groups), spread=spread
        )
        more = joined(
            BANDS,
            len(every) > LINES and f"the first {LINES} of {len(every)} settings",
            any(map(_label_loss, groups))
            and "the loss of methods other than ABFT is the cross-entropy of the label",
        )
        height = 0.9 + 0.75 * len(quantities(curves))
        made.append(Plot(stem("training", model), draw, _caption(model, some, more), height))
    return made


def _training_curves(
    group: Group,
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Prompts seen (U,), and means and spreads (U,) over runs, as far as all runs went."""
    curves = [one.cell.run.curve for one in group if one.cell.run]
    length = min(map(len, curves))
    middle, around = {}, {}
    for name in CURVES:
        if name in ABFT_ONLY and _label_loss(group):
            continue
        if all(name in step for curve in curves for step in curve[:length]):
            runs = [[step[name] for step in curve[:length]] for curve in curves]
            middle[name], around[name] = mean_and_deviation(np.array(runs, dtype=np.float64))
    return _seen(group, length), middle, around


def _seen(group: Group, length: int) -> np.ndarray:
    """(U,) training prompts seen after each update."""
    curve = group[0].cell.run.curve if group[0].cell.run else []
    return np.array([step["seen_examples"] for step in curve[:length]], dtype=np.float64)


def _label_loss(group: Group) -> bool:
    """Whether a method trains on the cross-entropy of the label."""
    return group[0].cell.settings.get("objective") not in (None, ABFT)


def head_count(_facts: Facts, found: Group) -> list[Plot]:
    """Heads against prompts seen, a line for each method, for each model."""
    made = []
    counted = [one for one in found if one.plain and one.cell.heads]
    for model, some, groups in _by_model(_unswept(counted)):
        seen, heads, spread = [], [], []
        for group in groups:
            length = min(len(one.cell.heads) for one in group)
            runs = np.array([one.cell.heads[:length] for one in group])
            middle, around = mean_and_deviation(runs)
            heads.append(middle)
            spread.append(around)
            seen.append(_seen(group, length))
        draw = on_axes(
            figures.head_count, seen=seen, heads=heads, spread=spread, methods=_labels(groups)
        )
        made.append(Plot(stem("head-count", model), draw, _caption(model, some, BANDS)))
    return made


def shift(_facts: Facts, found: Group) -> list[Plot]:
    """Norms of the change of W_Q and W_K in every layer, for each model."""
    made = []
    for model, some, groups in _by_model(one for one in found if one.plain and one.cell.shift):
        norms = {
            f"{group[0].label} W_{part.upper()}": mean_and_deviation(
                np.array([(one.cell.shift or {})[part] for one in group], dtype=np.float64)
            )
            for group in groups
            for part in ("q", "k")
        }
        middle, around = zip(*norms.values(), strict=True)
        draw = on_axes(figures.shift, shifts=middle, spread=around, names=list(norms))
        made.append(Plot(stem("shift", model), draw, _caption(model, some, BANDS)))
    return made


def label_attention(_facts: Facts, found: Group) -> list[Plot]:
    """Attention on labels in every layer, for each model and each state of it."""
    made = []
    for model, some, groups in _by_model(one for one in found if one.plain and one.cell.census):
        names, on_labels, on_gold = [], [], []
        for group in groups:
            magnitude, correctness = (
                np.nanmean([over_heads(getattr(one.cell.census, key)) for one in group], axis=0)
                for key in ("magnitude", "correctness")
            )
            names.append("before" if group[0].method == "vanilla" else group[0].label)
            on_labels.append(magnitude)
            # Magnitude is right plus wrong, correctness right less wrong.
            on_gold.append((magnitude + correctness) / 2)
        draw = on_axes(figures.label_attention, on_labels=on_labels, on_gold=on_gold, names=names)
        prompts = some[0].cell.census.prompts if some[0].cell.census else None
        more = f"means over heads and the first {prompts or '?'} prompts"
        made.append(Plot(stem("label-attention", model), draw, _caption(model, some, more)))
    return made


def grid(_facts: Facts, found: Group) -> list[Plot]:
    """One grid over both weights for each model and method, one scale of colours for a model."""
    made = []
    swept = [one for one in scored(found) if {PUNISH, REWARD} <= set(one.cell.sweep)]
    for model, some, _ in _by_model(swept):
        punish, reward = (sorted({one.cell.sweep[key] for one in some}) for key in (PUNISH, REWARD))
        tables = {}
        for method in unique(one.method for one in some):
            at: dict[tuple[float, float], list[Measurement]] = {}
            for one in some:
                pair = (one.cell.sweep[PUNISH], one.cell.sweep[REWARD])
                at.setdefault(pair, []).extend([one] if one.method == method else [])
            tables[method] = _arrays([[means(at.get((a, b), [])) for b in reward] for a in punish])[
                0
            ]
        every = np.stack(list(tables.values()))
        for method, table in tables.items():
            draw = on_axes(
                figures.grid, accuracy=table, title=method, punish=np.array(punish, dtype=float),
                reward=np.array(reward, dtype=float), limits=(np.nanmin(every), np.nanmax(every)),
            )  # fmt: skip
            of = [one for one in some if one.method == method]
            made.append(Plot(stem("grid", model, method), draw, _caption(model, of)))
    return made


def plane(facts: Facts, _found: Group) -> list[Plot]:
    """One plane for each model, task and pair of methods, averaged over seeds."""
    made = []
    for (model, task, axes, factors), cells in _planes(facts).items():
        tables = np.array([cell.plane.accuracy for cell in cells if cell.plane])
        draw = on_axes(
            figures.plane, accuracy=tables.mean(axis=0), factors=np.array(factors), names=axes,
            paper=_published_plane(facts, cells[0], axes),
        )  # fmt: skip
        caption = _plane_caption(cells, "dashed: from one method to the other")
        made.append(Plot(stem("plane", model, task, *axes), draw, caption))
    return made


def interpolation(facts: Facts, _found: Group) -> list[Plot]:
    """The straight line between two methods, where the grid of their plane holds it."""
    made = []
    for (model, task, axes, factors), cells in _planes(facts).items():
        tables = np.array([cell.plane.accuracy for cell in cells if cell.plane])
        place = {factor: index for index, factor in enumerate(factors)}
        share = [factor for factor in factors if 1 - factor in place]
        if len(share) < 3:
            continue
        line = [tables[:, place[1 - factor], place[factor]] for factor in share]
        base = float(tables[:, place[0], place[0]].mean()) if 0 in place else None
        draw = on_axes(
            figures.interpolation, share=np.array(share), accuracy=np.stack(line, axis=1),
            names=axes, base=base,
        )  # fmt: skip
        caption = _plane_caption(cells, "the band is one standard deviation over seeds")
        made.append(Plot(stem("interpolation", model, task, *axes), draw, caption))
    return made


def _planes(facts: Facts) -> dict[tuple[str, str, tuple[str, str], tuple[float, ...]], list[Cell]]:
    """Cells of planes that differ by their seed alone, by model, task, methods and factors."""
    grouped: dict[Any, list[Cell]] = {}
    for cell in facts.cells:
        if cell.plane:
            key = (cell.model, cell.task, cell.plane.axes, tuple(cell.plane.factors))
            grouped.setdefault(key, []).append(cell)
    return grouped


def _plane_caption(cells: Sequence[Cell], more: str) -> str:
    """Model, task, n, seeds and more."""
    first = cells[0]
    n = f"n = {first.plane.prompts if first.plane else '?'} prompts"
    return joined(first.model, first.task, n, _seeds(cells), more)


def _published_plane(facts: Facts, cell: Cell, axes: tuple[str, str]) -> dict[str, float] | None:
    """The paper's accuracies of base, both methods and the best mixture."""
    paper = facts.published
    called = paper.model(cell.model, cell.source)
    # The paper's end-to-end row is comparable with training W_Q and W_K alone, too.
    keys = ("untrained", *(axis.removesuffix("_qk") for axis in axes), "mixed")
    for figure in ("figure7", "figure9"):
        by_task = paper.facts[figure].get(called, {})
        entry = by_task.get(cell.task) or by_task.get("any") or {}
        if set(keys[1:3]) <= set(entry):
            roles = ("base", "first", "second", "best")
            return {role: entry[key] / 100 for role, key in zip(roles, keys, strict=True)}
    return None


def extrapolation(facts: Facts, _found: Group) -> list[Plot]:
    """One curve for each model, all its runs averaged, tasks too."""
    grouped: dict[tuple[str, tuple[float, ...]], list[Cell]] = {}
    for cell in facts.cells:
        if cell.extrapolation:
            grouped.setdefault((cell.model, tuple(cell.extrapolation.factors)), []).append(cell)
    made = []
    for (model, factors), cells in grouped.items():
        found = [cell.extrapolation for cell in cells if cell.extrapolation]
        draw = on_axes(
            figures.extrapolation, factors=np.array(factors),
            validation=np.array([one.validation.accuracy for one in found]),
            test=np.array([one.test.accuracy for one in found]),
            chosen=np.array([one.chosen for one in found]),
        )  # fmt: skip
        caption = joined(
            model,
            _tasks(list(dict.fromkeys(cell.task for cell in cells))),
            f"n = {found[0].test.prompts} test and {found[0].validation.prompts} validation "
            "prompts",
            _seeds(cells),
            BANDS,
        )
        made.append(Plot(stem("extrapolation", model), draw, caption))
    return made


def confusion(_facts: Facts, found: Group) -> list[Plot]:
    """The untrained base's and ABFT's, or the first trained method's, for each model and task."""
    made = []
    for model, task, groups in _by_model_and_task(found):
        trained = [name for name in groups if name != "vanilla"]
        first = "abft" if "abft" in trained else next(iter(trained), None)
        counts = {
            name: table
            for name in ("vanilla", first)
            if name in groups and (table := _summed(groups[name])) is not None
        }
        if not counts:
            continue
        classes = len(next(iter(counts.values())))
        known = [one.cell.evaluation.labels for group in groups.values() for one in group]
        names = next((one for one in known if len(one) == classes), map(str, range(classes)))
        draw = partial(
            figures.confusions, counts=list(counts.values()), names=list(names),
            state_names=list(counts),
        )  # fmt: skip
        shown = [one for name in counts for one in groups[name]]
        more = joined("counts are summed over seeds", note_on_classes(classes))
        heights = confusion_heights(classes, len(counts))
        made.append(
            Plot(stem("confusion", model, task), draw, _caption(model, shown, more), *heights)
        )
    return made


def _summed(group: Group) -> np.ndarray | None:
    """(C, C) counts of all seeds; None where they are not of the same classes."""
    tables = [one.values.counts() for one in group if one.values]
    known = [table for table in tables if table is not None]
    return np.sum(known, axis=0) if len({table.shape for table in known}) == 1 else None


def reliability(_facts: Facts, found: Group) -> list[Plot]:
    """A line for each method, for each model and task; bins are averaged over seeds by count."""
    made = []
    for model, task, groups in _by_model_and_task(found):
        pooled = {name: bins for name, group in groups.items() if (bins := _pooled(group))}
        if not pooled:
            continue
        confidence, accuracy, count = map(np.stack, zip(*pooled.values(), strict=True))
        draw = partial(
            figures.reliability, confidence=confidence, accuracy=accuracy, count=count,
            names=list(pooled),
        )  # fmt: skip
        shown = [one for name in pooled for one in groups[name]]
        caption = _caption(model, shown, "all seeds' prompts in 10 bins of equal width")
        made.append(Plot(stem("reliability", model, task), draw, caption, 3.8))
    return made


def _pooled(group: Group) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Mean confidence, share right and prompts (bins,) each, of all seeds together."""
    bins = [one.values.reliability for one in group if one.values and one.values.reliability]
    if not bins or len({len(one.count) for one in bins}) > 1:
        return None
    counts = np.array([one.count for one in bins], dtype=np.float64)
    count = counts.sum(axis=0)
    sums = [
        (np.nan_to_num(np.array([getattr(one, key) for one in bins], dtype=float)) * counts).sum(0)
        for key in ("confidence", "accuracy")
    ]
    empty = np.full(len(count), np.nan)
    confidence, accuracy = (
        np.divide(one, count, out=empty.copy(), where=count > 0) for one in sums
    )
    return confidence, accuracy, count


_MAKERS: dict[str, Callable[[Facts, Group], list[Plot]]] = {
    "accuracy": accuracy,
    "data_efficiency": data_efficiency,
    "head_count": head_count,
    "grid": grid,
    "plane": plane,
    "extrapolation": extrapolation,
    "consistency": consistency,
    "shift": shift,
    "label_attention": label_attention,
    "unseen": unseen,
    "training": training,
    "interpolation": interpolation,
    "confusion": confusion,
    "reliability": reliability,
}


def _by_model(
    found: Iterable[Measurement],
) -> list[tuple[str, list[Measurement], list[list[Measurement]]]]:
    """Measurements of each model in order: all of them, and those of each method."""
    some = list(found)
    made = []
    for model in unique(one.model for one in some):
        own = [one for one in some if one.model == model]
        made.append((model, own, list(rows(own).values())))
    return made


def _by_model_and_task(found: Group) -> list[tuple[str, str, dict[str, list[Measurement]]]]:
    """Plain predictions of each model on each task, by the method's label."""
    plain = [one for one in scored(found) if one.plain and not one.cell.sweep]
    return [
        (model, task, {key[1]: group for key, group in rows(of_task(some, task)).items()})
        for model, some, _ in _by_model(plain)
        for task in tasks(some)
    ]


def _unswept(found: Group) -> Group:
    """Beside a grid of settings the plain methods are the figure; alone, the grid is."""
    return [one for one in found if not one.cell.sweep] or found


def _labels(groups: Iterable[Group]) -> list[str]:
    """Names of lines or bars."""
    return [group[0].label for group in groups]


def _called(facts: Facts, group: Group) -> str | None:
    """What the paper calls a model."""
    return facts.published.model(group[0].model, group[0].cell.source)


def _arrays(
    cells: Sequence[Sequence[tuple[float, float | None] | None]],
) -> tuple[np.ndarray, np.ndarray]:
    """Means and spreads of a table, NaN for none."""
    pairs = [[made or (None, None) for made in line] for line in cells]
    table = np.array(pairs, dtype=np.float64)
    return table[..., 0], table[..., 1]


def _table(
    groups: Sequence[Group], keys: Sequence[tuple[str, str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Means over tasks of numbers of the evaluation, and their spreads: methods by numbers."""
    return _arrays([[means(group, reader(*key)) for key in keys] for group in groups])


def _rates(published: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Percentages as rates in 0..1, NaN for none."""
    return np.array(published, dtype=np.float64) / 100


def _caption(model: str, some: Group, more: str = "") -> str:
    """Model, tasks, n, training seeds and more."""
    prompts = sorted({one.prompts for one in some if one.prompts})
    n = " to ".join(map(str, dict.fromkeys((prompts[0], prompts[-1])))) if prompts else ""
    cells = [one.cell for one in some]
    return joined(model, _tasks(tasks(some)), n and f"n = {n} prompts", _seeds(cells), more)


def _tasks(names: Sequence[str]) -> str:
    """The name of one task, or how many there are."""
    return names[0] if len(names) == 1 else f"{len(names)} tasks"


def _seeds(cells: Iterable[Cell]) -> str:
    """How many training seeds."""
    count = len({cell.seed for cell in cells} - {None})
    return f"{count} training seed{'' if count == 1 else 's'}" if count else "not trained"
