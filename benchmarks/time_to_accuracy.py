"""Accuracy against seconds of training: our modes, mlx-lm's LoRA and the paper's way in PyTorch.

    python benchmarks/time_to_accuracy.py --output runs/time-to-accuracy
    python benchmarks/time_to_accuracy.py --output runs/time-to-accuracy --summary

The settings are those of the study ``modes``: 32 prompts an update, learning rate 1e-3. All
contenders of a task and a seed train in turns, an update each, in one process, so that what else
the machine does falls on all alike; each has a clock of its own, which runs only inside updates. A
contender that is faster than ``exact`` makes more updates in each turn, until its clock is not
behind, so all can be compared at equal updates and at equal seconds. Test prompts are the same for
all contenders, with demonstrations drawn anew for each seed.

Every pair of task and seed (a cell) is a JSON file in the output folder, written when it is done
and not done again, so a run can be made in pieces (``--tasks``, ``--seeds``). ``--summary`` prints
the table as Markdown and draws the figure from what lies there; it needs the extra ``plots``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import time_contenders as contenders
import time_summary as summary

from abft_mlx import (
    files,
    runtime,
)
from abft_mlx.analysis.figures import style
from abft_mlx.errors import AbftError, OutputError, UsageError

TASKS = tuple(
    f"generated/{name}" for name in ("emotion", "question", "urgency", "subjectivity", "purpose")
)
DEFAULT = ("exact", "full", "local", "shared", "local_shared", "auto", "mlx-lm", "pytorch-paper")
FIGURE = Path("docs/figures/time-to-accuracy")
SCHEMA = 1
# A contender makes at most so many times the updates of the reference.
MOST = 8


def measured_at(update: int, updates: int) -> bool:
    """Whether accuracy is measured after so many updates: powers of two, and where all have been.

    The last update of a contender is measured, too.
    """
    return update == updates or (update > 1 and update & (update - 1) == 0)


def settings(chosen: argparse.Namespace) -> dict[str, Any]:
    """What cells must have in common to be compared."""
    return {
        "base": chosen.base,
        "updates": chosen.updates,
        "queries": chosen.queries,
        "contenders": list(chosen.contenders),
        "set": list(chosen.set),
    }


def cell_path(folder: Path, task: str, seed: int) -> Path:
    """Where a cell lies."""
    return folder / f"{task.removesuffix('.yaml').strip('./').replace('/', '-')}-{seed}.json"


def read(path: Path, wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """A cell's document.

    Args:
        path: its file.
        wanted: settings that it must have, or None.

    Raises:
        OutputError: it cannot be read, or was made with other settings.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        own = found["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: is no cell of this benchmark ({error}); move it away") from None
    for key in wanted or {}:
        if own.get(key) != wanted[key]:
            raise OutputError(
                f"{path}: was made with {key} {own.get(key)}, not {wanted[key]}; choose another "
                "--output, or the same settings"
            )
    return found


def cell(task: str, seed: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Train all contenders in turns on one task."""
    most = MOST * chosen.updates
    shared = [
        f"model={json.dumps(chosen.base)}",
        f"training.seed={seed}",
        f"training.updates={most}",
        f"evaluation.queries={chosen.queries}",
        f"evaluation.seed={seed}",
        "evaluation.repeats=1",
        *chosen.set,
    ]
    load_average = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    begun = time.perf_counter()
    every = {name: contenders.make(name, task, shared) for name in chosen.contenders}
    first = next(iter(every.values()))
    test = first.opened.test_prompts()
    # Nobody has made an update: the base's accuracy is everybody's.
    base = first.accuracy(test)
    accuracy = {name: {"0": base} for name in every}

    def one_update(name: str) -> None:
        every[name].update()
        made = len(every[name].seconds)
        if measured_at(made, chosen.updates):
            accuracy[name][str(made)] = every[name].accuracy(test)

    for _ in range(chosen.updates):
        for name in every:
            one_update(name)
        for name in behind(every):
            while len(every[name].seconds) < most and name in behind(every):
                one_update(name)
    for name, one in every.items():
        made = str(len(one.seconds))
        if made not in accuracy[name]:
            accuracy[name][made] = one.accuracy(test)
    return {
        "schema": SCHEMA,
        "task": task,
        "seed": seed,
        "settings": settings(chosen),
        "versions": runtime.versions(),
        "device": runtime.device_description(),
        "load_average": load_average,
        "wall_seconds": time.perf_counter() - begun,
        "contenders": {
            name: {
                "layers": one.opened.recipe.adapter.layers,
                "threads": one.threads,
                "setup_seconds": one.setup_seconds,
                "seconds": one.seconds,
                "warming_up": one.warming_up,
                "losses": one.losses,
                "accuracy": accuracy[name],
            }
            for name, one in every.items()
        },
    }


def behind(every: Mapping[str, contenders.Contender]) -> list[str]:
    """Who has trained for less time than the reference, warm-up left out."""
    if summary.REFERENCE not in every:
        return []
    clock = {
        name: float(summary.steady(one.seconds, one.warming_up).sum())
        for name, one in every.items()
    }
    return [name for name in every if clock[name] < clock[summary.REFERENCE]]


def make_folder(path: Path) -> None:
    """Make a folder where there is none.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_failure(path, error) from error


def run(
    chosen: argparse.Namespace,
    make: Callable[[str, int, argparse.Namespace], dict[str, Any]] = cell,
) -> int:
    """Do the cells that are not there yet.

    Args:
        chosen: the command line.
        make: does one.

    Returns:
        How many were done.

    Raises:
        OutputError: a cell of other settings lies there, or the folder cannot be written.
    """
    make_folder(chosen.output)
    wanted = [(task, seed) for seed in chosen.seeds for task in chosen.tasks]
    paths = {one: cell_path(chosen.output, *one) for one in wanted}
    there = [one for one, path in paths.items() if path.exists()]
    for one in there:
        read(paths[one], settings(chosen))
    missing = [one for one in wanted if one not in there]
    for number, (task, seed) in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: {task}, seed {seed}", file=sys.stderr, flush=True)
        files.write_json(paths[task, seed], make(task, seed, chosen))
    return len(missing)


def collected(folder: Path) -> list[dict[str, Any]]:
    """All cells of a folder, by task and seed.

    Raises:
        OutputError: there are none, or they were not all made with the same settings.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise OutputError(f"{folder}: holds no cells; run without --summary first")
    first = read(paths[0])
    return [read(path, first["settings"]) for path in paths]


def summarise(chosen: argparse.Namespace) -> str:
    """The table; the figure is drawn on the way."""
    cells = collected(chosen.output)
    made = cells[0]["settings"]
    if summary.REFERENCE not in made["contenders"]:
        raise UsageError(
            f"{chosen.output}: its cells have no {summary.REFERENCE}, which all are compared with; "
            "run again with it among --contenders"
        )
    if style.missing():
        print(style.missing(), file=sys.stderr)
    else:
        make_folder(chosen.figure.parent)
        for path in summary.figure(chosen.figure, cells):
            print(f"wrote {path}", file=sys.stderr)
    updates = made["updates"]
    quarter = max((n for n in range(updates // 4 + 1) if measured_at(n, updates)), default=updates)
    return summary.markdown(cells, sorted({quarter, updates}))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44, 45])
    parser.add_argument(
        "--contenders", nargs="+", default=list(DEFAULT), help=", ".join(contenders.NAMES)
    )
    parser.add_argument("--updates", type=int, default=32, help="at least (default 32)")
    parser.add_argument(
        "--queries", type=int, default=128, help="test prompts of a task (default 128)"
    )
    parser.add_argument("--base", default="demo", help="model (default demo, the bundled one)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every recipe"
    )
    parser.add_argument("--summary", action="store_true", help="table and figure of what is there")
    parser.add_argument(
        "--figure", type=Path, default=FIGURE, help=f"without a suffix (default {FIGURE})"
    )
    chosen = parser.parse_args(given)
    for flag in ("updates", "queries"):
        if getattr(chosen, flag) < 1:
            raise UsageError(f"--{flag} {getattr(chosen, flag)}: give at least 1")
    if len(chosen.contenders) > len(style.COLOURS):
        raise UsageError(
            f"--contenders: {len(chosen.contenders)} are more than the {len(style.COLOURS)} that "
            "one figure can tell apart; leave some out"
        )
    contenders.check(chosen.contenders)
    return chosen


def main(given: Sequence[str] | None = None) -> None:
    """Do the cells, or say what came of them."""
    try:
        chosen = arguments(given)
        if chosen.summary:
            print(summarise(chosen), end="")
        else:
            done = run(chosen)
            print(f"{done} cells done; --summary makes table and figure", file=sys.stderr)
    except AbftError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None


if __name__ == "__main__":
    main()
