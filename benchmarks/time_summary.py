"""From the cells of ``time_to_accuracy.py`` to curves, a table and a figure.

A cell's clock counts seconds inside updates. What an update took more than its contender's median
because it was the first, or had to compile, is warm-up and told apart, and so is a census: on the
time axis such updates count as the median of the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abft_mlx.analysis.figures import style, time_to_accuracy
from abft_mlx.analysis.statistics import Estimate, over_runs
from abft_mlx.analysis.text import table

REFERENCE = "exact"
POINT = 0.01
Cell = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """Accuracy of one contender against what it has spent.

    Attributes:
        updates: (P,) updates done at each measurement, from 0.
        seconds: (P,) inside updates until then, warm-up left out.
        accuracy: (P,) in 0..1.
    """

    updates: np.ndarray
    seconds: np.ndarray
    accuracy: np.ndarray

    def at(self, seconds: float) -> tuple[float, bool]:
        """Accuracy at a time, linear between measurements, and whether the run had ended by then.

        A run that has ended keeps its last accuracy.
        """
        ended = bool(seconds > self.seconds[-1])
        return float(np.interp(seconds, self.seconds, self.accuracy)), ended

    def time_to(self, accuracy: float) -> float | None:
        """Seconds until an accuracy is first reached, linear between measurements, or None."""
        above = np.flatnonzero(self.accuracy >= accuracy)
        if not len(above):
            return None
        first = int(above[0])
        if first == 0:
            return 0.0
        low, high = self.accuracy[first - 1 : first + 1]
        before, after = self.seconds[first - 1 : first + 1]
        return float(before + (after - before) * (accuracy - low) / (high - low))

    def after(self, updates: int) -> float:
        """Accuracy after so many updates, at which it must have been measured."""
        return float(self.accuracy[list(self.updates).index(updates)])


def steady(seconds: Sequence[float], warming_up: Sequence[bool]) -> np.ndarray:
    """Seconds of every update, where those that warmed up count as the median of the others."""
    rest = [one for one, warm in zip(seconds, warming_up, strict=True) if not warm]
    if not rest:
        return np.array(seconds)
    return np.where(warming_up, statistics.median(rest), seconds)


def warm_up_seconds(one: dict[str, Any]) -> float:
    """What a contender of a cell needed beside steady updates: census, compiling, the first."""
    spent = sum(one["seconds"]) - float(steady(one["seconds"], one["warming_up"]).sum())
    return one["setup_seconds"] + spent


def curve(one: dict[str, Any]) -> Curve:
    """The curve of one contender in one cell."""
    clock = np.concatenate([[0.0], np.cumsum(steady(one["seconds"], one["warming_up"]))])
    updates = np.array([int(number) for number in one["accuracy"]])
    return Curve(updates, clock[updates], np.array(list(one["accuracy"].values())))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Means over cells at equal updates, of the time as of the accuracy.

    Only updates that were measured in every cell count: where a run ended may differ.
    """
    common = sorted(set.intersection(*({int(n) for n in one.updates} for one in curves)))
    where = [[list(one.updates).index(n) for n in common] for one in curves]
    pairs = list(zip(curves, where, strict=True))
    return Curve(
        np.array(common),
        np.mean([one.seconds[rows] for one, rows in pairs], axis=0),
        np.mean([one.accuracy[rows] for one, rows in pairs], axis=0),
    )


@dataclass(frozen=True)
class Line:
    """What the table says of one contender.

    Attributes:
        name: of the contender.
        update_seconds: median over steady updates of all cells.
        warm_up_seconds: mean over cells.
        at_updates: accuracy at each of the chosen updates.
        at_seconds: accuracy at the times that the reference took for each of these.
        against: the same minus the reference's, cell by cell.
        ended: for each of these times, whether the run had ended in some cell.
        seconds_to_target: until the mean curve reaches the reference's last accuracy minus a
            point, warm-up left out; None if it does not.
    """

    name: str
    update_seconds: float
    warm_up_seconds: float
    at_updates: list[Estimate]
    at_seconds: list[Estimate]
    against: list[Estimate]
    ended: list[bool]
    seconds_to_target: float | None


def lines(cells: Sequence[Cell], chosen: Sequence[int]) -> list[Line]:
    """What came of every contender.

    Args:
        cells: of the same settings.
        chosen: updates of the reference that equal updates and equal seconds are taken at.
    """
    names = list(cells[0]["contenders"])
    curves = {name: [curve(cell["contenders"][name]) for cell in cells] for name in names}
    clocks = [
        [float(one.seconds[list(one.updates).index(n)]) for one in curves[REFERENCE]]
        for n in chosen
    ]
    target = float(mean_curve(curves[REFERENCE]).accuracy[-1]) - POINT
    made = []
    for name in names:
        at = [[one.at(t) for one, t in zip(curves[name], clock, strict=True)] for clock in clocks]
        reference = [
            [one.at(t)[0] for one, t in zip(curves[REFERENCE], clock, strict=True)]
            for clock in clocks
        ]
        values = [[value for value, _ in row] for row in at]
        against = [list(np.subtract(*pair)) for pair in zip(values, reference, strict=True)]
        contenders = [cell["contenders"][name] for cell in cells]
        made.append(
            Line(
                name,
                statistics.median(
                    second
                    for one in contenders
                    for second in steady(one["seconds"], one["warming_up"])
                ),
                statistics.mean(warm_up_seconds(one) for one in contenders),
                [_over(cells, [one.after(n) for one in curves[name]]) for n in chosen],
                [_over(cells, row) for row in values],
                [_over(cells, row) for row in against],
                [any(ended for _, ended in row) for row in at],
                mean_curve(curves[name]).time_to(target),
            )
        )
    return made


def _over(cells: Sequence[Cell], values: Sequence[float]) -> Estimate:
    """Mean over tasks, with its interval over the runs of each."""
    by_task: dict[str, list[float]] = {}
    for cell, value in zip(cells, values, strict=True):
        by_task.setdefault(cell["task"], []).append(value)
    return over_runs(list(by_task.values()))


def markdown(cells: Sequence[Cell], chosen: Sequence[int]) -> str:
    """The table and what its columns mean."""
    found = lines(cells, chosen)
    reference = next(one for one in found if one.name == REFERENCE)
    header = ["way", "s an update", f"of {REFERENCE}", "warm-up s"]
    header += [f"after {n} updates" for n in chosen]
    for n in chosen:
        header += [f"at {REFERENCE}'s {n} updates' time", "against it"]
    header += ["s to target", "with warm-up"]
    rows = []
    for one in found:
        row = [
            one.name,
            f"{one.update_seconds:.3f}",
            f"{one.update_seconds / reference.update_seconds:.2f} ×",
            f"{one.warm_up_seconds:.2f}",
            *map(_percent, one.at_updates),
        ]
        for there, gap, ended in zip(one.at_seconds, one.against, one.ended, strict=True):
            mark = "†" if ended else ""
            row += [_percent(there) + mark, "" if one is reference else _points(gap) + mark]
        reached = one.seconds_to_target
        row += ["–"] * 2 if reached is None else [
            f"{reached:.1f}", f"{reached + one.warm_up_seconds:.1f}"
        ]  # fmt: skip
        rows.append(row)
    base = mean_curve([curve(cell["contenders"][REFERENCE]) for cell in cells]).accuracy[0]
    notes = (
        f"{caption(cells)}. Before training: {100 * base:.1f}. Accuracy in percent, differences "
        "in points, with 95% bootstrap intervals over the training seeds of each task. Seconds are "
        "those inside updates; warm-up is a census, compiling, and what the first update takes "
        "more than the others. † some runs had ended before that time and keep their last "
        f"accuracy. The target is {REFERENCE}'s last accuracy minus a point."
    )
    return f"{table(header, rows).rstrip()}\n\n{notes}\n"


def _percent(one: Estimate) -> str:
    return f"{100 * one.mean:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _points(one: Estimate) -> str:
    return f"{100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def caption(cells: Sequence[Cell]) -> str:
    """Base, tasks, n, seeds and length of the runs in one line."""
    settings = cells[0]["settings"]
    tasks, seeds = {cell["task"] for cell in cells}, {cell["seed"] for cell in cells}
    return (
        f"{settings['base']}; {len(tasks)} task{'s' * (len(tasks) > 1)}; "
        f"n = {settings['queries']} prompts a task; {len(seeds)} training "
        f"seed{'s' * (len(seeds) > 1)}; {settings['updates']} updates or more; {len(cells)} "
        f"run{'s' * (len(cells) > 1)} each"
    )


def figure(path: Path, cells: Sequence[Cell]) -> list[Path]:
    """Mean accuracy against mean seconds, a line for each contender.

    Args:
        path: of the figure, without a suffix.
        cells: of the same settings.

    Returns:
        The files written.
    """
    names = list(cells[0]["contenders"])
    means = [mean_curve([curve(cell["contenders"][name]) for cell in cells]) for name in names]

    def draw(axes: Any) -> Any:
        time_to_accuracy.draw(
            axes,
            [one.seconds[1:] for one in means],
            [one.accuracy[1:] for one in means],
            names,
            float(means[0].accuracy[0]),
        )
        axes.set_xlabel("seconds in updates, warm-up left out")
        axes.set_ylabel("mean accuracy (%)")
        return axes

    return style.write(path, draw, caption(cells))
