"""Kill a run with SIGKILL again and again, and see whether it ends as an undisturbed one.

The bundled demo, cut very small, is fine-tuned in a process of its own. Moments are drawn from a
seed: at random, or as soon as a file appears or changes that marks a phase, and a little later.
After a kill the run is resumed, and killed again, until it ends; then every byte that should be the
same is compared. Run it from a checkout::

    python benchmarks/torture_kill.py --kills 60

Nothing in the package knows of this script: it looks at the run folder from outside.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torture_run as runs

# What marks a phase: a file of the run folder, by a pattern, that appears or changes.
PHASES = {
    "set-up": ("run.lock", "run.json", "recipe.yaml", ".recipe.*", ".run.*"),
    "step": ("metrics.jsonl",),
    "checkpoint": ("checkpoint", "checkpoint/*", "checkpoint/.*"),
    "validation": ("metrics.jsonl",),
    "final save": ("adapters.safetensors", ".adapters.*", "adapter_config.json", "heads.npz"),
}
RANDOM = "any moment"
LOOK_SECONDS = 0.0005


@dataclass
class Tally:
    """What came of the kills.

    Attributes:
        tried: kills that found the process alive, by phase.
        lost: what was not as it should be, a line each.
        runs: runs that came to their end.
        begun_again: runs that were killed before they had begun.
    """

    tried: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    runs: int = 0
    begun_again: int = 0


def state(folder: Path, patterns: tuple[str, ...]) -> set[tuple[str, int, int]]:
    """What lies there now under such names, and when and how long it was last written."""
    seen = set()
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                facts = path.stat()
            except OSError:
                continue
            seen.add((path.name, facts.st_mtime_ns, facts.st_size))
    return seen


def wait_for(process: BaseProcess, folder: Path, phase: str, skip: int, later: float) -> bool:
    """Wait for the phase to show itself, ``skip`` times more, and a little; False if it ended."""
    end = time.monotonic() + runs.PATIENCE_SECONDS
    patterns = PHASES[phase]
    known = state(folder, patterns)
    while process.is_alive():
        if time.monotonic() > end:
            raise SystemExit(f"error: the process did not end in {runs.PATIENCE_SECONDS:.0f} s")
        found = state(folder, patterns)
        if found != known:
            known = found
            if skip == 0:
                time.sleep(later)
                return process.is_alive()
            skip -= 1
        time.sleep(LOOK_SECONDS)
    return False


def tortured(folder: Path, chance: random.Random, seconds: float, tally: Tally, left: int) -> None:
    """One run, killed some times, up to its end.

    Args:
        folder: where.
        chance: draws phases and moments.
        seconds: that an undisturbed run takes.
        tally: where what happens is counted.
        left: kills at most.
    """
    kills, said = min(left, chance.randint(2, 6)), folder.with_name("said.txt")
    while True:
        resume = (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file()
        if not resume:
            tally.begun_again += folder.exists()
        process = runs.start(folder, said, resume=resume)
        if kills > 0:
            phase = chance.choice([RANDOM, *PHASES])
            if phase == RANDOM:
                time.sleep(chance.uniform(0.0, 0.7 * seconds))
                alive = process.is_alive()
            else:
                skip = chance.randint(0, 3)
                later = 0.05 if phase == "validation" else 0.003
                alive = wait_for(process, folder, phase, skip, chance.uniform(0.0, later))
            if alive:
                process.kill()
                process.join()
                tally.tried[phase] += 1
                kills -= 1
                continue
        process.join(runs.PATIENCE_SECONDS)
        if process.exitcode != 0:
            process.kill()
            tally.lost.append(f"could not go on ({process.exitcode}): {said.read_text().strip()}")
            return
        if "going on from" in said.read_text():
            tally.lost.append(f"went on with a complaint: {said.read_text().strip()}")
        if kills <= 0 or chance.random() < 0.5:
            tally.runs += 1
            return


def torture(kills: int, seed: int, folder: Path) -> Tally:
    """Kill so many times and compare every run that ends with one that was never killed."""
    runs.warm()
    chance, tally = random.Random(seed), Tally()
    seconds = runs.undisturbed(folder / "undisturbed")
    wanted = runs.contents(folder / "undisturbed")
    while sum(tally.tried.values()) < kills:
        run = folder / "run"
        before = len(tally.lost)
        tortured(run, chance, seconds, tally, kills - sum(tally.tried.values()))
        if len(tally.lost) == before:
            tally.lost += runs.differences(wanted, runs.contents(run))
        print(f"{sum(tally.tried.values())} kills, {tally.runs} runs", file=sys.stderr)
        if run.exists():
            shutil.rmtree(run)
    return tally


def main(arguments: list[str] | None = None) -> int:
    """Torture, and print what was tried, what survived and what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=60, help="SIGKILLs of a living process")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="abft-mlx-kill-") as folder:
        tally = torture(given.kills, given.seed, Path(folder))
    tried, lost = sum(tally.tried.values()), len(tally.lost)
    for line in tally.lost:
        print(f"lost: {line}")
    phases = ", ".join(f"{name} {count}" for name, count in sorted(tally.tried.items()))
    print(f"by moment: {phases}")
    print(
        f"{tally.runs} runs ended, {tally.begun_again} starts found a folder that held no run yet, "
        f"{time.monotonic() - begun:.0f} s, seed {given.seed}"
    )
    print(f"kill: tried {tried}, survived {tried - lost}, lost {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
