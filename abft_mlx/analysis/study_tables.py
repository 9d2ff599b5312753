"""``table.md`` and ``table.csv``: what a study measured, with the paper's numbers beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from abft_mlx.analysis.statistics import HOW, Estimate, bootstrap, mean_and_spread, pooled_mcnemar
from abft_mlx.analysis.study_data import (
    Facts,
    Group,
    Measurement,
    matrix,
    means,
    measurements,
    of_task,
    paired,
    reader,
    rows,
    scored,
    tasks,
)

NOTHING = "–"
EXPLANATION = (
    "Rates are percent; ± is the standard deviation over training seeds, where there are several. "
    "n is the number of prompts of one run. " + HOW + " p: exact McNemar test against vanilla on "
    "the same prompts, all tasks and seeds pooled; it takes prompts as independent, which those "
    "of one query are not, so read the interval first. Tasks are averaged plainly."
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

# A section of the page: its title, and its tables and paragraphs; a table is a header and lines.
Table = tuple[list[str], list[list[str]]]
Section = tuple[str, list[Table | str]]


def table_md(facts: Facts) -> str:
    """The Markdown page of a study's facts."""
    parts = [f"# {facts.name}", *intro(facts)]
    for title, blocks in sections(facts):
        parts.append(f"## {title}")
        parts += [block if isinstance(block, str) else markdown(*block) for block in blocks]
    if not facts.cells:
        parts.append("No cell is done.")
    return "\n\n".join(parts) + "\n"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, bars in cells escaped."""
    made = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in lines:
        cells = (" ".join(cell.split()).replace("|", "\\|") for cell in line)
        made.append("| " + " | ".join(cells) + " |")
    return "\n".join(made)


def table_csv(facts: Facts) -> str:
    """A line for every measurement; rates in 0..1, what is not known is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for one in measurements(facts):
        line = _csv_line(one)
        writer.writerow(
            {key: f"{value:.7g}" if isinstance(value, float) else value
             for key, value in line.items()}
        )  # fmt: skip
    return out.getvalue()


def _csv_line(one: Measurement) -> dict[str, Any]:
    """The columns of one measurement that are known."""
    cell, values = one.cell, one.values
    low, high = (values.ends("accuracy") if values else None) or (None, None)
    line: dict[str, Any] = {
        "model": cell.model,
        "task": cell.task,
        "method": one.method,
        "sweep": json.dumps(cell.sweep, sort_keys=True) if cell.sweep else None,
        "seed": cell.seed,
        "n": one.prompts or None,
        "accuracy": values.accuracy if values else None,
        "low": low,
        "high": high,
        **{key: getattr(values, key, None) for key in _METRICS},
    }
    if one.plain:
        counted = [heads for heads in cell.heads if not math.isnan(heads)]
        line |= {key: reader(*where)(one) for key, where in _EVALUATED.items()}
        line |= {key: getattr(cell.run, key, None) for key in _TRAINED}
        if counted:
            line |= {"induction_heads_first": counted[0], "induction_heads_last": counted[-1]}
    return line


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
    found = measurements(facts)
    plain = [one for one in found if one.plain]
    made: list[Section] = []
    if scored(found):
        blocks: list[Table | str] = [_table(*accuracy(scored(found), facts)), EXPLANATION]
        if facts.paper.get("table"):
            paper = facts.published
            blocks.append(f"The paper's numbers: {paper.facts['citation']}, {paper.table}.")
        made.append(("Accuracy", blocks))
    for title, (header, lines), notes in (
        ("Out of domain", _transfer(plain, facts), [TRANSFER_NOTE]),
        ("Consistency", _consistency(plain, facts), []),
        ("Labels that no demonstration carries", _unseen(plain), []),
        ("Bias", _bias(plain), []),
        ("Extrapolated adapters", _extrapolation(facts), []),
        ("Between the weights", _plane(facts), []),
        ("Induction heads while training", _heads(plain), []),
        ("Failed cells", _failures(facts), []),
        ("Cost", _cost(plain, facts), []),
    ):
        if lines:
            made.append((title, [_table(header, lines), *notes]))
    return made


def _table(header: list[str], lines: list[list[str]]) -> Table:
    """A table with the paper's columns only where they hold numbers."""
    kept = [
        index
        for index, name in enumerate(header)
        if not name.startswith("paper") or any(line[index] != NOTHING for line in lines)
    ]
    return [header[index] for index in kept], [[line[index] for index in kept] for line in lines]


def accuracy(found: Group, facts: Facts) -> Table:
    """Models and methods against tasks."""
    columns, paper = tasks(found), facts.published
    header = [
        "model", "method", "seeds",
        *(f"{paper.task(task)} (n = {_range(_prompts(found, task)) or '?'})" for task in columns),
        "mean", "95% interval", "paper's mean", "over vanilla", "p",
    ]  # fmt: skip
    lines = []
    grouped = rows(found)
    for (model, label), some in grouped.items():
        first = some[0]
        called = paper.model(model, first.cell.source)
        cells = []
        for task in columns:
            mean = means(of_task(some, task))
            published = None if first.cell.sweep else paper.accuracy(called, first.method, task)
            theirs = beside(mean, published)
            cells.append(percent(mean) + (f" ({theirs})" if theirs != NOTHING else ""))
        # A mean over fewer tasks than the others' would not be comparable.
        whole = means(some) if NOTHING not in cells else None
        base = [
            one
            for one in found
            if one.model == model
            and one.method == "vanilla"
            and one.cell.sweep.items() <= first.cell.sweep.items()
        ]
        gain, p = (NOTHING, NOTHING) if label == "vanilla" else _against(some, base, len(columns))
        interval = average(some) if whole else None
        seeds = {len(of_task(some, task)) for task in tasks(some)}
        lines.append(
            [
                model, label,
                NOTHING if all(one.cell.seed is None for one in some) else _range(seeds),
                *cells, percent(whole),
                f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else NOTHING,
                beside(means(some), paper.average(called, first.method, columns)), gain, p,
            ]
        )  # fmt: skip
    return header, lines


def average(found: Group) -> Estimate | None:
    """Mean accuracy over tasks with its interval; None where no prompts are known."""
    known = [[one for one in of_task(found, task) if one.right] for task in tasks(found)]
    return bootstrap([matrix(some) for some in known]) if known and all(known) else None


def _against(first: Group, second: Group, columns: int) -> tuple[str, str]:
    """How much more accurate the first method is, with its interval, and the p value."""
    pairs = paired(first, second)
    if not pairs:
        return NOTHING, NOTHING
    one = bootstrap([matrix(ours) for ours, _ in pairs], [matrix(theirs) for _, theirs in pairs])
    rights = [
        (measured.right, (theirs[0] if len(theirs) == 1 else theirs[index]).right)
        for ours, theirs in pairs
        for index, measured in enumerate(ours)
    ]
    text = f"{points(one.mean)} [{points(one.low)}, {points(one.high)}]"
    text += f" on {len(pairs)} of {columns} tasks" if len(pairs) < columns else ""
    return text, p_value(pooled_mcnemar(*zip(*rights, strict=True)))


def _prompts(found: Group, task: str) -> set[int]:
    """Numbers of prompts that a task was measured on."""
    return {one.prompts for one in of_task(found, task) if one.prompts}


def _range(counts: set[int]) -> str:
    """One number, or the smallest and the largest."""
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else ""


def _measured(
    plain: Group, keys: Sequence[Callable[[Measurement], float | None]], text: Callable[..., str]
) -> list[list[str]]:
    """A line for each method for which one of some numbers was measured."""
    lines = []
    for (model, label), some in rows(plain).items():
        values = [means(some, read) for read in keys]
        if any(values):
            lines.append([model, label, *map(text, values)])
    return lines


def _transfer(plain: Group, facts: Facts) -> Table:
    """Accuracy on the tuned task and on the others (the paper's table 2)."""
    lines = []
    for (model, label), some in rows(plain).items():
        outside = means(some, reader("transfer", "accuracy"))
        if outside is None:
            continue
        others = [one.cell.evaluation.transfer.get("tasks") or {} for one in some]
        shared = [int(entry.get("shared_queries") or 0) for one in others for entry in one.values()]
        theirs = beside(outside, _published(facts, some).get("transfer"))
        lines.append(
            [model, label, percent(means(some)), percent(outside), theirs, str(max(shared or [0]))]
        )
    return ["model", "method", "in domain", "out of domain", "paper out of domain",
            "queries left out, at most"], lines  # fmt: skip


def _consistency(plain: Group, facts: Facts) -> Table:
    """How often the answer stays when wording or demonstrations change (table 3)."""
    lines, paper = [], facts.published
    for (model, label), some in rows(plain).items():
        line = [model, label]
        for kind in ("template", "demonstrations"):
            ours = means(some, reader("robustness", kind, "consistency"))
            called = paper.model(model, some[0].cell.source)
            theirs = beside(ours, paper.consistency(called, kind, some[0].method))
            line += [percent(ours), theirs]
        if {line[2], line[4]} != {NOTHING}:
            lines.append(line)
    return ["model", "method", "over templates", "paper", "over demonstrations", "paper"], lines


def _unseen(plain: Group) -> Table:
    """Accuracy where the gold label stands in no demonstration (figure 3)."""
    kinds = [reader("unseen", kind, "accuracy") for kind in ("random", "unseen", "zero_shot")]
    header = ["model", "method", "random demonstrations", "gold label unseen", "zero-shot"]
    return header, [line for line in _measured(plain, kinds, percent) if line[3] != NOTHING]


def _bias(plain: Group) -> Table:
    """Entropies, divergence and GLER, averaged over tasks."""
    kinds = ("contextual_entropy", "domain_entropy", "maximum_entropy", "posterior_kl", "gler")
    header = ["model", "method", "contextual entropy (nats)", "domain entropy (nats)",
              "highest entropy (nats)", "posterior KL (nats)", "GLER"]  # fmt: skip
    return header, _measured(
        plain,
        [reader("bias", kind) for kind in kinds],
        lambda value: NOTHING if value is None else f"{value[0]:.3f}",
    )


def _extrapolation(facts: Facts) -> Table:
    """What a factor on the adapter, chosen on validation prompts, does on test prompts."""
    lines = []
    for cell in facts.cells:
        found = cell.extrapolation
        if found:
            test = dict(zip(found.factors, found.test.accuracy, strict=True))
            lines.append(
                [cell.model, cell.task, str(cell.seed), f"{found.chosen:g}",
                 str(found.validation.prompts), rate(test.get(1.0)), rate(test.get(found.chosen))]
            )  # fmt: skip
    return ["model", "task", "seed", "chosen factor", "on prompts", "test at 1",
            "test at chosen"], lines  # fmt: skip


def _plane(facts: Facts) -> Table:
    """Accuracy at the corners of the plane of two methods' weights, and its best point."""
    lines = []
    for cell in facts.cells:
        if cell.plane:
            factors, table = cell.plane.factors, np.array(cell.plane.accuracy)
            at = {(x, y): table[i, j] for i, x in enumerate(factors) for j, y in enumerate(factors)}
            best = max(at, key=at.__getitem__)
            corners = [at.get(point) for point in ((0, 0), (1, 0), (0, 1), (0.5, 0.5), best)]
            where = ", ".join(
                f"{name} {x:g}" for name, x in zip(cell.plane.axes, best, strict=True)
            )
            lines.append([cell.model, cell.task, str(cell.seed), *map(rate, corners), where])
    return ["model", "task", "seed", "base", "first method", "second method", "half of each",
            "best", "best at"], lines  # fmt: skip


def _heads(plain: Group) -> Table:
    """Induction heads in the first and in the last update."""
    lines = []
    for (model, label), some in rows(plain).items():
        known = ([heads for heads in one.cell.heads if not math.isnan(heads)] for one in some)
        curves = [curve for curve in known if curve]
        if curves:
            first = mean_and_spread([curve[0] for curve in curves])[0]
            last = _amount([curve[-1] for curve in curves], 2)
            lines.append([model, label, str(len(curves)), f"{first:.2f}", last])
    return ["model", "method", "runs", "first update", "last update"], lines


def _failures(facts: Facts) -> Table:
    """Cells without a result, and why."""
    return ["cell", "error"], [[one.id, one.error or "unknown"] for one in facts.failed]


def _cost(plain: Group, facts: Facts) -> Table:
    """Seconds, memory and size of training: the only numbers that a second run changes."""
    lines = []
    grouped = rows(plain)
    for (model, label), some in grouped.items():
        runs = [one.cell.run for one in some if one.cell.run]
        if not runs:
            continue
        seconds = [run.seconds for run in runs]
        abft = [one.cell.run.seconds for one in grouped.get((model, "abft"), []) if one.cell.run]
        ratio = mean_and_spread(seconds)[0] / mean_and_spread(abft)[0] if abft else None
        published = _published(facts, some)
        time = published.get("relative_time")
        lines.append(
            [
                model, label, f"{runs[0].trainable_parameters:,}",
                str(published.get("trainable_parameters", NOTHING)), _amount(seconds, 1),
                NOTHING if ratio is None else f"{ratio:.2f}",
                NOTHING if time is None else f"{time:.1f}",
                f"{max(run.peak_memory_bytes for run in runs) / 1e6:,.0f}",
            ]
        )  # fmt: skip
    return ["model", "method", "trained numbers", "paper", "seconds", "of ABFT's", "paper",
            "peak MB"], lines  # fmt: skip


def _published(facts: Facts, some: Group) -> dict[str, Any]:
    """The paper's entry for a model and method."""
    paper, first = facts.published, some[0]
    return paper.row(paper.model(first.model, first.cell.source), first.method)


def rate(value: float | None) -> str:
    """A rate of 0..1 in percent."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def percent(made: tuple[float, float | None] | None) -> str:
    """A mean rate in percent, with the standard deviation where there is one."""
    if made is None:
        return NOTHING
    return rate(made[0]) + ("" if made[1] is None else f" ± {100 * made[1]:.1f}")


def _amount(values: Sequence[float], digits: int) -> str:
    """A mean, with the standard deviation where there are several."""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def points(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return text.replace("+0.0", "0.0").replace("−0.0", "0.0")


def beside(ours: tuple[float, float | None] | None, published: float | None) -> str:
    """The published percentage and what ours, a rate, is above it."""
    if published is None or ours is None:
        return NOTHING
    return f"paper {published:.1f}, {points(ours[0] - published / 100)}"


def p_value(value: float) -> str:
    """A p value, or that it is small."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
