"""The tables beside that of accuracy, each only where a study measured what it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from abft_mlx.analysis.measurements import Measurement, of_task, rows, tasks
from abft_mlx.analysis.paper import Paper
from abft_mlx.analysis.special import extrapolations, plane_points, planes
from abft_mlx.analysis.statistics import mean_and_spread
from abft_mlx.analysis.table_csv import heads_of
from abft_mlx.analysis.text import NOTHING, beside, percent, quantity, table


def sections(document: dict[str, Any], found: Sequence[Measurement], paper: Paper) -> list[str]:
    """Titles and tables in order, failures and timings last."""
    plain = [one for one in found if one.plain]
    made: list[str] = []
    for title, part in (
        ("Out of domain", transfer(plain, paper)),
        ("Consistency", consistency(plain, paper)),
        ("Labels that no demonstration carries", unseen(plain)),
        ("Bias", bias(plain)),
        ("Extrapolated adapters", extrapolation(document)),
        ("Between the weights", plane(document)),
        ("Induction heads while training", heads(plain)),
        ("Failed cells", failures(document)),
        ("Cost", cost(plain, paper)),
    ):
        if part:
            made += [f"## {title}", part]
    return made


def means(
    some: Sequence[Measurement], read: Callable[[Measurement], float | None]
) -> tuple[float, float | None] | None:
    """Mean over tasks of a number, and the standard deviation over seeds of such means."""
    by_task = []
    by_seed: dict[int, list[float]] = {}
    for task in tasks(some):
        values = [(one.seed, read(one)) for one in of_task(some, task)]
        known = [(seed, value) for seed, value in values if value is not None]
        if known:
            by_task.append(mean_and_spread([value for _, value in known])[0])
        for seed, value in known:
            by_seed.setdefault(-1 if seed is None else seed, []).append(value)
    if not by_task:
        return None
    whole = [mean_and_spread(one)[0] for one in by_seed.values() if len(one) == len(by_task)]
    return mean_and_spread(by_task)[0], mean_and_spread(whole)[1] if whole else None


def _percent(some: Sequence[Measurement], read: Callable[[Measurement], float | None]) -> str:
    made = means(some, read)
    return NOTHING if made is None else percent(*made)


def reader(*keys: str) -> Callable[[Measurement], float | None]:
    """Reads a number at some depth of a cell's evaluation."""

    def read(one: Measurement) -> float | None:
        value: Any = one.cell["evaluation"]
        for key in keys:
            value = (value or {}).get(key)
        return None if value is None else float(value)

    return read


def transfer(plain: Sequence[Measurement], paper: Paper) -> str:
    """Accuracy on the tuned task and on the others (the paper's table 2)."""
    read = reader("transfer", "accuracy")
    lines = []
    for (model, label), some in rows(plain).items():
        outside = means(some, read)
        if outside is None:
            continue
        row = paper.row(paper.model(model, some[0].source), some[0].method)
        lines.append(
            [
                model,
                label,
                _percent(some, lambda one: one.accuracy if one.values else None),
                percent(*outside),
                beside(outside[0], row.get("transfer")) or NOTHING,
                str(max(_shared(one) for one in some)),
            ]
        )
    header = ["model", "method", "in domain", "out of domain", "paper out of domain",
              "queries left out, at most"]  # fmt: skip
    note = (
        "In domain is the tuned task, out of domain the mean over the study's other tasks, both "
        "averaged over tuned tasks. Queries that a training row equals are left out of the latter."
    )
    return table(header, lines) + "\n\n" + note if lines else ""


def _shared(one: Measurement) -> int:
    tasks_of = (one.part("transfer") or {}).get("tasks") or {}
    return max((int(entry.get("shared_queries") or 0) for entry in tasks_of.values()), default=0)


def consistency(plain: Sequence[Measurement], paper: Paper) -> str:
    """How often the answer stays when wording or demonstrations change (table 3)."""
    kinds = ("template", "demonstrations")
    lines = []
    for (model, label), some in rows(plain).items():
        called = paper.model(model, some[0].source)
        line = [model, label]
        for kind in kinds:
            made = means(some, reader("robustness", kind, "consistency"))
            role = "untrained" if some[0].method == "vanilla" else some[0].method
            theirs = paper.consistency(called, kind, role)
            line += [
                NOTHING if made is None else percent(*made),
                beside(made[0] if made else None, theirs) or NOTHING,
            ]
        if line[2] != NOTHING or line[4] != NOTHING:
            lines.append(line)
    header = ["model", "method", "over templates", "paper", "over demonstrations", "paper"]
    return table(header, lines) if lines else ""


def unseen(plain: Sequence[Measurement]) -> str:
    """Accuracy where the gold label stands in no demonstration (figure 3)."""
    kinds = ("random", "unseen", "zero_shot")
    lines = [
        [model, label, *(_percent(some, reader("unseen", kind, "accuracy")) for kind in kinds)]
        for (model, label), some in rows(plain).items()
        if means(some, reader("unseen", "unseen", "accuracy"))
    ]
    header = ["model", "method", "random demonstrations", "gold label unseen", "zero-shot"]
    return table(header, lines) if lines else ""


def bias(plain: Sequence[Measurement]) -> str:
    """Entropies, divergence and GLER, averaged over tasks."""
    kinds = ("contextual_entropy", "domain_entropy", "maximum_entropy", "posterior_kl", "gler")
    lines = []
    for (model, label), some in rows(plain).items():
        values = [means(some, reader("bias", kind)) for kind in kinds]
        if any(values):
            lines.append([model, label, *(quantity(one[0] if one else None) for one in values)])
    header = ["model", "method", "contextual entropy (nats)", "domain entropy (nats)",
              "highest entropy (nats)", "posterior KL (nats)", "GLER"]  # fmt: skip
    return table(header, lines) if lines else ""


def extrapolation(document: dict[str, Any]) -> str:
    """What a factor on the adapter, chosen on validation prompts, does on test prompts."""
    lines = [
        [
            one.model, one.task, str(one.seed), f"{one.chosen:g}", str(one.validation_prompts),
            percent(one.at(1.0)), percent(one.at(one.chosen)),
        ]
        for one in extrapolations(document)
    ]  # fmt: skip
    header = ["model", "task", "seed", "chosen factor", "on prompts", "test at 1",
              "test at chosen"]  # fmt: skip
    return table(header, lines) if lines else ""


def plane(document: dict[str, Any]) -> str:
    """Accuracy at the corners of the plane of two methods' weights, and its best point."""
    lines = []
    for one in planes(document):
        points = plane_points(one)
        lines.append(
            [
                one.model, one.task, str(one.seed), *(percent(points[key]) for key in points),
                f"{one.axes[0]} {one.best[0]:g}, {one.axes[1]} {one.best[1]:g}",
            ]
        )  # fmt: skip
    if not lines:
        return ""
    header = ["model", "task", "seed", "base", "first method", "second method",
              "half of each", "best", "best at"]  # fmt: skip
    return table(header, lines)


def heads(plain: Sequence[Measurement]) -> str:
    """Induction heads in the first and in the last update."""
    lines = []
    for (model, label), some in rows(plain).items():
        known = ([n for n in heads_of(one.cell) if not math.isnan(n)] for one in some)
        curves = [curve for curve in known if curve]
        if curves:
            first = mean_and_spread([curve[0] for curve in curves])[0]
            last, spread = mean_and_spread([curve[-1] for curve in curves])
            lines.append(
                [model, label, str(len(curves)), f"{first:.2f}",
                 f"{last:.2f}" + ("" if spread is None else f" ± {spread:.2f}")]
            )  # fmt: skip
    header = ["model", "method", "runs", "first update", "last update"]
    return table(header, lines) if lines else ""


def failures(document: dict[str, Any]) -> str:
    """Cells without a result, and why."""
    lines = [[str(one["id"]), str(one["error"] or "unknown")] for one in document["failed"]]
    return table(["cell", "error"], lines) if lines else ""


def cost(plain: Sequence[Measurement], paper: Paper) -> str:
    """Seconds, memory and size of training: the only numbers that a second run changes."""
    lines = []
    grouped = rows(plain)
    for (model, label), some in grouped.items():
        runs = [one.cell["run"] for one in some if one.cell.get("run")]
        if not runs:
            continue
        seconds = mean_and_spread([run["seconds"] for run in runs])
        abft = [one.cell["run"]["seconds"] for one in grouped.get((model, "abft"), [])
                if one.cell.get("run")]  # fmt: skip
        row = paper.row(paper.model(model, some[0].source), some[0].method)
        lines.append(
            [
                model,
                label,
                f"{runs[0]['trainable_parameters']:,}",
                str(row.get("trainable_parameters", NOTHING)),
                f"{seconds[0]:.1f}" + ("" if seconds[1] is None else f" ± {seconds[1]:.1f}"),
                f"{seconds[0] / mean_and_spread(abft)[0]:.2f}" if abft else NOTHING,
                quantity(row.get("relative_time"), 1),
                f"{max(run['peak_memory_bytes'] for run in runs) / 1e6:,.0f}",
            ]
        )
    header = ["model", "method", "trained numbers", "paper", "seconds", "of ABFT's", "paper",
              "peak MB"]  # fmt: skip
    return table(header, lines) if lines else ""
