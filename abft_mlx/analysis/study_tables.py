"""``table.md`` and ``table.csv``: what a study measured, with the paper's numbers beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.study_data import (
    Estimate,
    Facts,
    Group,
    Mean,
    bootstrap,
    by_method,
    mean_and_spread,
    means,
    measurements,
    of_task,
    paired,
    paper_model,
    paper_row,
    paper_targets,
    paper_task,
    reader,
    share_right,
    tasks,
)
from abft_mlx.evaluation import mcnemar, right_answers

NOTHING = "–"
EXPLANATION = (
    "Rates are percent; ± is the standard deviation over training seeds, where there are several. "
    "n is the number of prompts of one run. Intervals are 95% percentile bootstraps over seeds and "
    "queries: each of 2,000 resamples draws the seeds again, and the queries again (the same ones "
    "for every seed and for both sides of a difference, each with all its sets of demonstrations); "
    "tasks are not drawn, so an interval speaks of these tasks alone. With one seed it covers the "
    "prompts only. p: exact McNemar test against vanilla on the same prompts, all tasks and seeds "
    "pooled; it takes prompts as independent, which those of one query are not, so read the "
    "interval first. Tasks are averaged plainly."
)
TRANSFER_NOTE = (
    "In domain is the tuned task, out of domain the mean over the study's other tasks, both "
    "averaged over tuned tasks. Queries that a training row equals are left out of the latter."
)
# Columns of the CSV that are numbers of a cell's evaluation, and where they stand in it.
_METRICS = ("macro_f1", "true_label_probability", "expected_calibration_error")
_EVALUATED = {
    "transfer_accuracy": ("transfer", "accuracy"),
    "template_consistency": ("robustness", "template", "consistency"),
    "demonstration_consistency": ("robustness", "demonstrations", "consistency"),
    "contextual_entropy": ("bias", "contextual_entropy"),
    "domain_entropy": ("bias", "domain_entropy"),
    "posterior_kl": ("bias", "posterior_kl"),
    "gler": ("bias", "gler"),
    "random_label_accuracy": ("unseen", "random", "accuracy"),
    "unseen_label_accuracy": ("unseen", "unseen", "accuracy"),
    "zero_shot_accuracy": ("unseen", "zero_shot", "accuracy"),
}
_TRAINED = ("trainable_parameters", "updates", "seconds", "peak_memory_bytes")
COLUMNS = (
    "model", "task", "method", "sweep", "seed", "n", "accuracy", "low", "high", *_METRICS,
    *_EVALUATED, *_TRAINED, "induction_heads_first", "induction_heads_last",
)  # fmt: skip

# A header and lines. A section of the page has a title, and tables and paragraphs.
Table = tuple[list[str], list[list[str]]]
Column = Callable[[Group], str]
Section = tuple[str, list[Table | str]]


def table_md(facts: Facts) -> str:
    """The Markdown page of a study's facts."""
    parts = [f"# {facts.name}", *intro(facts)]
    for title, blocks in sections(facts):
        parts.append(f"## {title}")
        parts += [block if isinstance(block, str) else _markdown(*block) for block in blocks]
    if not facts.cells:
        parts.append("No cell is done.")
    return "\n\n".join(parts) + "\n"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, bars in cells escaped."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    rule = "|" + "---|" * len(header)
    first, *rest = (f"| {' | '.join(line)} |" for line in (header, *cells))
    return "\n".join([first, rule, *rest])


def table_csv(facts: Facts) -> str:
    """A line for every measurement; rates in 0..1, what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in measurements(facts):
        cell, values = row.cell, row.values
        low, high = (values.interval.get("accuracy") if values else None) or (None, None)
        line: dict[str, Any] = {
            "model": cell.model,
            "task": cell.task,
            "method": row.method,
            "sweep": json.dumps(cell.sweep, sort_keys=True) if cell.sweep else None,
            "seed": cell.seed,
            "n": row.prompts or None,
            "accuracy": values.accuracy if values else None,
            "low": low,
            "high": high,
            **{key: getattr(values, key, None) for key in _METRICS},
        }
        if row.plain:
            heads: list[Any] = [n for n in cell.heads if not math.isnan(n)] or [None]
            line |= {key: reader(*where)(row) for key, where in _EVALUATED.items()}
            line |= {key: cell.run.get(key) for key in _TRAINED}
            line |= {"induction_heads_first": heads[0], "induction_heads_last": heads[-1]}
        writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in line.items()})
    return out.getvalue()


def intro(facts: Facts) -> list[str]:
    """Paragraphs before the tables."""
    count = len(facts.failed)
    failed = (
        f"{count} cell{'' if count == 1 else 's'} failed, listed below; the tables hold the others."
    )
    machines = "Measured on: " + "; ".join(facts.machines) + "."
    lines = (facts.description, count and failed, facts.machines and machines)
    return [line for line in lines if line]


def sections(facts: Facts) -> list[Section]:
    """Titles with their tables, each only where the study measured it; failures and cost last."""
    rows = measurements(facts)
    plain = [row for row in rows if row.plain]
    table = facts.paper.get("table")
    source = [f"The paper's numbers: {paper_targets()['citation']}, {table}."] if table else []
    unseen = [_mean("unseen", kind, "accuracy") for kind in ("random", "unseen", "zero_shot")]
    tables: list[tuple[str, Table, list[str]]] = [
        ("Accuracy", _accuracy([r for r in rows if r.values], facts), [EXPLANATION, *source]),
        ("Out of domain", _transfer(plain, facts), [TRANSFER_NOTE]),
        ("Consistency", _consistency(plain, facts), []),
        ("Labels that no demonstration carries", _by_method(plain, {
            "random demonstrations": unseen[0], "gold label unseen": unseen[1],
            "zero-shot": unseen[2],
        }, needed=(1,)), []),
        ("Bias", _by_method(plain, {
            title: _mean("bias", key, text=_nats)
            for title, key in (
                ("contextual entropy (nats)", "contextual_entropy"),
                ("domain entropy (nats)", "domain_entropy"),
                ("highest entropy (nats)", "maximum_entropy"),
                ("posterior KL (nats)", "posterior_kl"), ("GLER", "gler"),
            )
        }, needed=range(5)), []),
        ("Extrapolated adapters", _extrapolation(facts), []),
        ("Between the weights", _plane(facts), []),
        ("Induction heads while training", _heads(plain), []),
        ("Failed cells", (
            ["cell", "error"],
            [[cell["id"], cell.get("error") or "unknown"] for cell in facts.failed],
        ), []),
        ("Cost", _cost(plain, facts), []),
    ]  # fmt: skip
    return [(title, [_shown(*table), *notes]) for title, table, notes in tables if table[1]]


def _shown(header: list[str], lines: list[list[str]]) -> Table:
    """A table with the paper's columns only where they hold numbers."""
    columns = [
        n
        for n, name in enumerate(header)
        if not name.startswith("paper") or any(line[n] != NOTHING for line in lines)
    ]
    return [header[n] for n in columns], [[line[n] for n in columns] for line in lines]


def _by_method(rows: Group, columns: dict[str, Column], needed: Iterable[int] = (0,)) -> Table:
    """A line for each method for which one of the ``needed`` columns has a number."""
    lines = [
        [model, label, *(text(group) for text in columns.values())]
        for (model, label), group in by_method(rows).items()
    ]
    return ["model", "method", *columns], [
        line for line in lines if any(line[2 + n] != NOTHING for n in needed)
    ]


def _mean(part: str, *keys: str, text: Callable[[Mean | None], str] | None = None) -> Column:
    """A column of means of a number of the evaluation."""
    return lambda group: (text or percent)(means(group, reader(part, *keys)))


def _nats(mean: Mean | None) -> str:
    """An entropy."""
    return NOTHING if mean is None else f"{mean.value:.3f}"


def _accuracy(rows: Group, facts: Facts) -> Table:
    """Models and methods against tasks."""
    columns = tasks(rows)
    counts = {task: {row.prompts for row in of_task(rows, task) if row.prompts} for task in columns}
    header = [
        "model", "method", "seeds",
        *(f"{paper_task(task)} (n = {_range(counts[task]) or '?'})" for task in columns),
        "mean", "95% interval", "paper's mean", "over vanilla", "p",
    ]  # fmt: skip
    # The paper's mean is over all of its tasks.
    every = {*map(paper_task, columns)} == {*paper_targets()["tasks"].values()}
    lines = []
    for (model, label), group in by_method(rows).items():
        first, paper, cells = group[0], _published(facts, group), []
        for task in columns:
            mean = means(of_task(group, task))
            published = paper.get("accuracy", {}).get(paper_task(task))
            theirs = beside(mean, None if first.cell.sweep else published)
            cells.append(percent(mean) + (f" ({theirs})" if theirs != NOTHING else ""))
        # A mean over fewer tasks than the others' would not be comparable.
        whole = means(group) if NOTHING not in cells else None
        base = [
            row
            for row in rows
            if (row.cell.model, row.method) == (model, "vanilla")
            and row.cell.sweep.items() <= first.cell.sweep.items()
        ]
        gain = (NOTHING, NOTHING) if label == "vanilla" else _gain(group, base, len(columns))
        interval = average(group) if whole else None
        seeds = {len(of_task(group, task)) for task in tasks(group)}
        lines.append(
            [
                model, label,
                NOTHING if all(row.cell.seed is None for row in group) else _range(seeds),
                *cells, percent(whole),
                f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else NOTHING,
                beside(means(group), paper.get("average") if every else None), *gain,
            ]
        )  # fmt: skip
    return header, lines


def average(group: Group) -> Estimate | None:
    """Mean accuracy over tasks with its interval; None where no prompts are known."""
    known = [[row for row in of_task(group, task) if row.right] for task in tasks(group)]
    return bootstrap([share_right(some) for some in known]) if known and all(known) else None


def _gain(first: Group, second: Group, columns: int) -> tuple[str, str]:
    """How much more accurate the first method is, with its interval, and the p value."""
    pairs = paired(first, second)
    if not pairs:
        return NOTHING, NOTHING
    gain = bootstrap(*([share_right(side) for side in sides] for sides in zip(*pairs, strict=True)))
    rights = [
        (row.right, (theirs[0] if len(theirs) == 1 else theirs[n]).right)
        for ours, theirs in pairs
        for n, row in enumerate(ours)
    ]
    text = f"{points(gain.mean)} [{points(gain.low)}, {points(gain.high)}]"
    text += f" on {len(pairs)} of {columns} tasks" if len(pairs) < columns else ""
    # All tasks and seeds together.
    answers = [right_answers("".join(side)) for side in zip(*rights, strict=True)]
    return text, p_value(float(mcnemar(*answers)["p_value"]))


def _range(counts: set[int]) -> str:
    """One number, or the smallest and the largest."""
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def _transfer(plain: Group, facts: Facts) -> Table:
    """Accuracy on the tuned task and on the others (the paper's table 2)."""
    read = reader("transfer", "accuracy")

    def shared(group: Group) -> str:
        others = [row.cell.evaluation.transfer.get("tasks") or {} for row in group]
        counts = (task.get("shared_queries") for one in others for task in one.values())
        return str(max([int(count or 0) for count in counts] or [0]))

    columns: dict[str, Column] = {
        "in domain": lambda group: percent(means(group)),
        "out of domain": lambda group: percent(means(group, read)),
        "paper out of domain": lambda group: beside(
            means(group, read), _published(facts, group).get("transfer")
        ),
        "queries left out, at most": shared,
    }
    return _by_method(plain, columns, needed=(1,))


def _consistency(plain: Group, facts: Facts) -> Table:
    """How often the answer stays when wording or demonstrations change (table 3)."""

    def paper(kind: str) -> Column:
        def text(group: Group) -> str:
            cell, method = group[0].cell, group[0].method
            kinds = paper_row(facts.paper.get("table"), paper_model(cell.model, cell.source), kind)
            theirs = kinds.get("untrained" if method == "vanilla" else method)
            return beside(means(group, reader("robustness", kind, "consistency")), theirs)

        return text

    columns = {}
    for kind in ("template", "demonstrations"):
        title = "over templates" if kind == "template" else "over demonstrations"
        columns[title] = _mean("robustness", kind, "consistency")
        columns[f"paper, {title}"] = paper(kind)
    return _by_method(plain, columns, needed=(0, 2))


def _extrapolation(facts: Facts) -> Table:
    """What a factor on the adapter, chosen on validation prompts, does on test prompts."""
    lines = []
    for cell in facts.cells:
        part = cell.extrapolation
        if part:
            test = dict(zip(part["factors"], part["test"]["accuracy"], strict=True))
            chosen, prompts = part["chosen"], part["validation"]["prompts"]
            lines.append([cell.model, cell.task, str(cell.seed), f"{chosen:g}", str(prompts),
                          rate(test.get(1.0)), rate(test.get(chosen))])  # fmt: skip
    return ["model", "task", "seed", "chosen factor", "on prompts", "test at 1",
            "test at chosen"], lines  # fmt: skip


def _plane(facts: Facts) -> Table:
    """Accuracy at the corners of the plane of two methods' weights, and its best point."""
    lines = []
    for cell in facts.cells:
        if cell.plane:
            factors, table = cell.plane["factors"], np.array(cell.plane["accuracy"])
            at = {(x, y): table[i, j] for i, x in enumerate(factors) for j, y in enumerate(factors)}
            best = max(at, key=at.__getitem__)
            corners = [at.get(point) for point in ((0, 0), (1, 0), (0, 1), (0.5, 0.5), best)]
            where = ", ".join(
                f"{name} {x:g}" for name, x in zip(cell.plane["axes"], best, strict=True)
            )
            lines.append([cell.model, cell.task, str(cell.seed), *map(rate, corners), where])
    return ["model", "task", "seed", "base", "first method", "second method", "half of each",
            "best", "best at"], lines  # fmt: skip


def _heads(plain: Group) -> Table:
    """Induction heads in the first and in the last update."""
    counted = [row for row in plain if not all(map(math.isnan, row.cell.heads))]

    def column(place: int, digits: int) -> Column:
        return lambda group: _amount(
            [[count for count in row.cell.heads if not math.isnan(count)][place] for row in group],
            digits,
        )

    return _by_method(
        counted,
        {"runs": lambda group: str(len(group)), "first update": column(0, 2),
         "last update": column(-1, 2)},
    )  # fmt: skip


def _cost(plain: Group, facts: Facts) -> Table:
    """Seconds, memory and size of training: the only numbers that a second run changes."""
    trained = [row for row in plain if row.cell.run]
    seconds = {
        key: mean_and_spread([row.cell.run["seconds"] for row in group]).value
        for key, group in by_method(trained).items()
    }

    def relative(group: Group) -> str:
        abft = seconds.get((group[0].cell.model, "abft"))
        ours = seconds[group[0].cell.model, group[0].label]
        return f"{ours / abft:.2f}" if abft else NOTHING

    def published(key: str) -> Column:
        return lambda group: str(_published(facts, group).get(key, NOTHING))

    columns: dict[str, Column] = {
        "trained numbers": lambda group: f"{group[0].cell.run['trainable_parameters']:,}",
        "paper": published("trainable_parameters"),
        "seconds": lambda group: _amount([row.cell.run["seconds"] for row in group], 1),
        "of ABFT's": relative,
        "paper, of ABFT's": published("relative_time"),
        "peak MB": lambda group: (
            f"{max(row.cell.run['peak_memory_bytes'] for row in group) / 1e6:,.0f}"
        ),
    }
    return _by_method(trained, columns)


def _published(facts: Facts, group: Group) -> dict[str, Any]:
    """The paper's entry for a model and method."""
    cell = group[0].cell
    model = paper_model(cell.model, cell.source)
    return paper_row(facts.paper.get("table"), model, group[0].method)


def rate(value: float | None) -> str:
    """A rate of 0..1 in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def percent(mean: Mean | None) -> str:
    """A mean rate in percent, with the standard deviation where there is one."""
    if mean is None:
        return NOTHING
    return rate(mean.value) + ("" if mean.spread is None else f" ± {100 * mean.spread:.1f}")


def _amount(values: Sequence[float], digits: int) -> str:
    """A mean, with the standard deviation where there are several."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def points(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text.replace("+0.0", "0.0").replace("−0.0", "0.0")


def beside(ours: Mean | None, published: float | None) -> str:
    """The published percentage and what ours, a rate, is above it."""
    if published is None or ours is None:
        return NOTHING
    return f"paper {published:.1f}, {points(ours.value - published / 100)}"


def p_value(value: float) -> str:
    """A p value, or that it is small."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
