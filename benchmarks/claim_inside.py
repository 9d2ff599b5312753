"""Claims about what happens inside: heads, weights, layers."""

from __future__ import annotations

import claim_rules as rules
import numpy as np
from claim_types import END_TO_END, Finding, Study, scope

from abft_mlx.analysis.special import planes
from abft_mlx.analysis.statistics import over_runs
from abft_mlx.analysis.table_csv import heads_of
from abft_mlx.analysis.text import gain


def holds_heads(study: Study) -> list[Finding]:
    """Drift of the head count without the controller less that with it."""
    by_task: dict[str, list[float]] = {}
    drifts: dict[str, list[float]] = {"abft": [], "no_pid": []}
    curves = {
        (method, cell["task"], cell["seed"]): heads_of(cell)
        for method in drifts
        for cell in study.cells(method)
    }
    for (method, task, seed), heads in curves.items():
        other = curves.get(("no_pid", task, seed))
        if method == "abft" and heads and other:
            pair = rules.drift(heads), rules.drift(other)
            drifts["abft"].append(pair[0])
            drifts["no_pid"].append(pair[1])
            by_task.setdefault(task, []).append(pair[1] - pair[0])
    if not by_task:
        return []
    change = over_runs(list(by_task.values()))
    enough = all(len(one) >= rules.FEWEST_SEEDS for one in by_task.values())
    held, without = (100 * float(np.mean(drifts[one])) for one in ("abft", "no_pid"))
    text = f"drift {without:.1f}% without, {held:.1f}% with: {gain(change)} points"
    runs = len(drifts["abft"])
    return [Finding(rules.more(change) if enough else rules.UNTOLD, text,
                    scope(list(by_task), runs))]  # fmt: skip


def flattens(study: Study) -> list[Finding]:
    """Spread of accuracy over a grid of weights, without the controller less with it."""
    swept = ("objective.punish", "objective.reward")
    of_grid = [one for one in study.found if set(swept) <= set(one.sweep) and one.values]
    without, held = (
        [one for one in of_grid if one.method == method] for method in ("no_pid", "abft")
    )
    made = rules.sensitivity(without, held)
    if made is None:
        return []
    seeds = len({one.seed for one in held})
    verdict = rules.more(made.difference) if seeds >= rules.FEWEST_SEEDS else rules.UNTOLD
    text = (
        f"standard deviation {100 * made.without:.1f} points without, {100 * made.held:.1f} with: "
        f"{gain(made.difference)}"
    )
    of = f"{made.points} pairs of weights"
    return [Finding(verdict, text, f"{scope(made.tasks, 0)}, {seeds} training seeds, {of}")]


def basin(study: Study) -> list[Finding]:
    """The barrier between ABFT's weights and end-to-end's."""
    found = []
    for method in END_TO_END:
        some = [
            one
            for one in planes(study.document)
            if one.model == study.model and one.axes == ("abft", method)
        ]
        made = rules.barrier(some) if some else None
        if made is not None:
            depth, t = made
            names = list(dict.fromkeys(one.task for one in some))
            text = f"barrier {gain(depth)} points, at {1 - t:g} ABFT + {t:g} end-to-end"
            of = scope(names, len(some), some[0].prompts)
            found.append(Finding(rules.one_basin(depth), text, of, method))
    return found


def layers(study: Study) -> list[Finding]:
    """The layer of the largest change."""
    by_task: dict[str, list[float]] = {}
    norms = []
    for cell in study.cells("abft"):
        if cell.get("shift"):
            by_task.setdefault(cell["task"], []).append(rules.peak_depth(cell["shift"]))
            norms.append(np.array(cell["shift"]["q"]) + np.array(cell["shift"]["k"]))
    if not by_task:
        return []
    depth, count = over_runs(list(by_task.values())), len(norms[0])
    shown = ", ".join(f"{one:.2f}" for one in np.mean(norms, axis=0))
    text = f"depth {depth.mean:.2f} [{depth.low:.2f}, {depth.high:.2f}] of {count} layers"
    if count < rules.FEWEST_LAYERS:
        text += f" (too few to tell: {rules.FEWEST_LAYERS} are needed)"
    if count <= 12:
        text += f"; mean change by layer {shown}"
    verdict = rules.middle_to_late(depth, count)
    return [Finding(verdict, text, scope(list(by_task), len(norms)))]
