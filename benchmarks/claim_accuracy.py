"""Claims about accuracy and consistency: what one study says of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import claim_rules as rules
import numpy as np
from claim_types import END_TO_END, Finding, Study, scope, seeded

from abft_mlx.analysis.comparison import compare
from abft_mlx.analysis.measurements import Measurement, of_task, tasks
from abft_mlx.analysis.statistics import Estimate, Interval, bootstrap, difference, share_right
from abft_mlx.analysis.text import gain

CALIBRATIONS = ("contextual", "domain", "batch", "hidden", "knn")


def _difference(
    first: Sequence[Measurement],
    second: Sequence[Measurement],
    rule: Callable[[Estimate], str],
    detail: str = "",
) -> list[Finding]:
    """Accuracy of the first less the second."""
    made = compare(first, second)
    if made is None:
        return []
    verdict = rule(made.difference) if seeded([*first, *second]) else rules.UNTOLD
    each = made.prompts // len(made.tasks)
    runs = made.runs if any(one.seed is not None for one in first) else _runs(second)
    return [
        Finding(
            verdict,
            f"{gain(made.difference)} points",
            scope(made.tasks, runs, each),
            detail,
        )
    ]


def _runs(found: Sequence[Measurement]) -> int:
    return sum(one.seed is not None for one in found)


def versus(first: str, second: str) -> Callable[[Study], list[Finding]]:
    """Accuracy of one method less that of another."""

    def find(study: Study) -> list[Finding]:
        ours, theirs = study.of(first), study.of(second)
        if not _runs(ours):
            # A base against a training: as many seeds as the training has.
            made = compare(theirs, ours)
            if made is None:
                return []
            turned = rules.opposite(made.difference)
            verdict = rules.more(turned) if seeded(theirs) else rules.UNTOLD
            of = scope(made.tasks, made.runs, made.prompts // len(made.tasks))
            return [Finding(verdict, f"{gain(turned)} points", of)]
        return _difference(ours, theirs, rules.more)

    return find


def over_vanilla(study: Study) -> list[Finding]:
    """ABFT against the base's own few-shot answers."""
    return _difference(study.of("abft"), study.of("vanilla"), rules.more)


def over_calibration(study: Study) -> list[Finding]:
    """ABFT against every calibration that was measured."""
    return [
        one
        for method in CALIBRATIONS
        for one in _difference(study.of("abft"), study.of(method), rules.no_less, method)
    ]


def in_domain(study: Study) -> list[Finding]:
    """ABFT against both end-to-end trainings, on the tuned task."""
    return [
        one
        for method in END_TO_END
        for one in _difference(study.of("abft"), study.of(method), rules.no_less, method)
    ]


def out_of_domain(study: Study) -> list[Finding]:
    """ABFT against both end-to-end trainings, on all other tasks."""
    made = []
    for method in END_TO_END:
        sides: list[tuple[np.ndarray, np.ndarray]] = []
        names, runs = [], 0
        for task in tasks(study.of("abft")):
            ours, theirs = (
                {one.seed: _outside(one) for one in of_task(study.of(name), task)}
                for name in ("abft", method)
            )
            seeds = [seed for seed in ours if seed in theirs]
            every = [side[seed] for side in (ours, theirs) for seed in seeds]
            others = sorted(set.intersection(*map(set, every))) if every else []
            if others:
                names.append(task)
                runs += len(seeds)
            for other in others:
                first, second = (
                    np.stack([side[seed][other] for seed in seeds]) for side in (ours, theirs)
                )
                sides.append((first, second))
        if sides:
            change = bootstrap([one for one, _ in sides], [one for _, one in sides])
            enough = seeded([*study.of("abft"), *study.of(method)])
            verdict = rules.more(change) if enough else rules.UNTOLD
            made.append(Finding(verdict, f"{gain(change)} points", scope(names, runs), method))
    return made


def _outside(one: Measurement) -> dict[str, np.ndarray]:
    """For every other task (Q,) shares of right answers."""
    found = {}
    for name, entry in ((one.part("transfer") or {}).get("tasks") or {}).items():
        if entry.get("right"):
            queries = len(entry["right"]) // max(1, int(one.cell["repeats"]))
            found[name] = share_right(entry["right"], queries)
    return found


def consistency(kind: str) -> Callable[[Study], list[Finding]]:
    """Consistency of one kind, after less before."""

    def find(study: Study) -> list[Finding]:
        after, before, names = [], [], []
        for task in tasks(study.of("abft")):
            ours = [made for one in of_task(study.of("abft"), task) if (made := _part(one, kind))]
            base = [
                made for one in of_task(study.of("vanilla"), task) if (made := _part(one, kind))
            ]
            if ours and base:
                after.append(ours)
                before.append(base[0])
                names.append(task)
        if not names:
            return []
        change = difference(after, before)
        verdict = rules.more(change) if seeded(study.of("abft")) else rules.UNTOLD
        start = sum(one.value for one in before) / len(before)
        text = f"from {100 * start:.1f}: {gain(change)} points"
        return [Finding(verdict, text, scope(names, sum(map(len, after))))]

    return find


def _part(one: Measurement, kind: str) -> Interval | None:
    entry = (one.part("robustness") or {}).get(kind) or {}
    if "interval" not in entry:
        return None
    low, high = entry["interval"]
    return Interval(float(entry["consistency"]), float(low), float(high))


def unseen(study: Study) -> list[Finding]:
    """Accuracy where the gold label stands in no demonstration, after less before."""
    first, second, names, runs = [], [], [], 0
    for task in tasks(study.of("abft")):
        ours, base = (
            [_unseen_of(one) for one in of_task(study.of(name), task) if _has_unseen(one)]
            for name in ("abft", "vanilla")
        )
        if ours and base:
            first.append(np.stack(ours))
            second.append(np.stack(base[:1]))
            names.append(task)
            runs += len(ours)
    if not names:
        return []
    change = bootstrap(first, second)
    start = float(np.mean([one.mean() for one in second]))
    verdict = rules.more(change) if seeded(study.of("abft")) else rules.UNTOLD
    return [Finding(verdict, f"from {100 * start:.1f}: {gain(change)} points", scope(names, runs))]


def _has_unseen(one: Measurement) -> bool:
    return bool(((one.part("unseen") or {}).get("unseen") or {}).get("right"))


def _unseen_of(one: Measurement) -> np.ndarray:
    right = one.part("unseen")["unseen"]["right"]
    return share_right(right, len(right) // max(1, int(one.cell["repeats"])))
