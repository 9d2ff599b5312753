"""The lines that several commands print: a classifier's worth, and the next command."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = "abft-mlx"
CLASSES_SHOWN = 12
# Of eval's table of thresholds, where at least so many texts are answered.
_THRESHOLDS_SHOWN = (0.7, 0.9)
_LEAST_COVERAGE = 0.1


def verdict(document: Mapping[str, Any]) -> list[str]:
    """What a classifier is worth, as lines for a person."""
    verdict = document["verdict"]
    trained, own = "before" in verdict, "bag_of_words" in verdict
    low, high = verdict["interval"] or (None, None)
    interval = "" if low is None else f"95% interval {low:.1%} to {high:.1%}"
    rows = [("with the adapter" if trained else "prompting", verdict["accuracy"], interval)]
    if trained:
        rows.append(("prompting", verdict["before"], "the same demonstrations, no adapter"))
    if own:
        common = document["baselines"]["majority"]["label"]
        rows.append(("bag of words", verdict["bag_of_words"], "logistic regression, no model"))
        rows.append((f"always {common!r}", verdict["majority"], ""))
    width = max(len(name) for name, _, _ in rows)
    # Of other texts than a run's own nobody knows whether they were trained on.
    unseen = " that were not trained on" if own else ""
    lines = [f"accuracy on {verdict['n']:,} test texts{unseen}:"]
    lines += [f"  {name:<{width}}  {rate:6.1%}  {note}".rstrip() for name, rate, note in rows]
    recall = {name: rate for name, rate in verdict["recall"].items() if rate is not None}
    worst = sorted(recall, key=recall.__getitem__)[:CLASSES_SHOWN]
    kinds = "recall of each class" if len(worst) == len(recall) else "recall of the worst classes"
    lines.append(f"{kinds}: " + ", ".join(f"{name} {recall[name]:.0%}" for name in worst))
    useful = [
        f"{level['threshold']:g} answers {level['coverage']:.0%} of the texts, "
        f"{level['accuracy']:.1%} of them rightly"
        for level in document.get("probabilities", {}).get("coverage", [])
        if level["threshold"] in _THRESHOLDS_SHOWN
        and level["coverage"] >= _LEAST_COVERAGE
        and level["accuracy"] > verdict["accuracy"]
    ]
    if useful:
        lines.append(f"predict --threshold {'; '.join(useful)}")
    lines.append(verdict["sentence"])
    # Without an adapter the command line says which command is next.
    return [*lines, f"next: {verdict['next']}"] if trained else lines


def command(*words: object) -> str:
    """A command to copy: its words quoted for a shell, the program as this shell finds it."""
    # Where PATH does not lead to the program, it is the path that it was started by.
    started, here = Path(sys.argv[0]), Path.cwd()
    program = PROGRAM
    if started.name == PROGRAM and not shutil.which(PROGRAM):
        program = str(started.relative_to(here) if started.is_relative_to(here) else started)
    return shlex.join([program, *map(str, words)])
