"""Kill a run with SIGKILL again and again, and see whether it ends as an undisturbed one.

The bundled demo, cut very small, is fine-tuned in a process of its own. Moments are drawn from a
seed: at random, or as soon as a file appears or changes that marks a phase, and a little later.
After a kill the run is resumed, and killed again, until it ends; then every byte that should be the
same is compared. Run it from a checkout::

    python benchmarks/torture_kill.py --kills 60

Nothing in the package knows of this script: it looks at the run folder from outside. On Linux a
process is forked from one that has imported everything and computed nothing, which saves seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SETTINGS = (
    "training.updates=12",
    "training.examples=32",
    "training.prompts_per_update=8",
    "training.checkpoint_every=2",
    "training.validate_every=3",
    "training.validation_prompts=64",
    "training.census_prompts=16",
    "data.validation_rows=64",
    "adapter.dropout=0.1",
)
# Fields that say how long something took or how much memory it had, not what was computed.
MEASURED = (
    "seconds", "peak_memory_bytes", "process_peak_bytes", "note", "compilations", "kept_hidden",
)  # fmt: skip
# What marks a phase: a file of the run folder, by a pattern, that appears or changes.
PHASES = {
    "set-up": ("run.lock", "run.json", "recipe.yaml", ".recipe.*", ".run.*"),
    "step": ("metrics.jsonl",),
    "checkpoint": ("checkpoint.new", "checkpoint.new/*", "checkpoint", "checkpoint.before"),
    "validation": ("metrics.jsonl",),
    "final save": ("adapters.safetensors", ".adapters.*", "adapter_config.json", "heads.npz"),
}
RANDOM = "any moment"
LOOK_SECONDS = 0.0005
PATIENCE_SECONDS = 300.0


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


PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def start(folder: Path, said: Path, *, resume: bool) -> BaseProcess:
    """Begin the run, or go on with it, in a process of its own."""
    words = ["finetune", "--resume", str(folder)]
    if not resume:
        changes = [part for one in SETTINGS for part in ("--set", one)]
        words = ["finetune", "demo", "--output", str(folder), "--overwrite", *changes]
    process = PROCESSES.Process(target=command, args=([*words, "--quiet"], said))
    process.start()
    return process


def command(words: list[str], said: Path) -> None:
    """Run a command of abft-mlx in this process; what it prints goes to a file."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    from abft_mlx.cli import app

    app(words)


def warm() -> None:
    """Import what a run needs, so that forked processes need not; nothing may be computed here."""
    from abft_mlx import runtime

    runtime.prepare()
    import mlx_lm  # noqa: F401

    from abft_mlx import api, cli, experiment  # noqa: F401


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
    end = time.monotonic() + PATIENCE_SECONDS
    patterns = PHASES[phase]
    known = state(folder, patterns)
    while process.is_alive():
        if time.monotonic() > end:
            raise SystemExit(f"error: the process did not end in {PATIENCE_SECONDS:.0f} s")
        found = state(folder, patterns)
        if found != known:
            known = found
            if skip == 0:
                time.sleep(later)
                return process.is_alive()
            skip -= 1
        time.sleep(LOOK_SECONDS)
    return False


def undisturbed(folder: Path) -> float:
    """Run without a kill; gives its seconds."""
    begun, said = time.monotonic(), folder.with_name("said.txt")
    process = start(folder, said, resume=False)
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: the undisturbed run failed: {said.read_text()}")
    return time.monotonic() - begun


def contents(folder: Path) -> dict[str, Any]:
    """What :func:`content` finds, in a process of its own: nothing may be computed in this one."""
    written = folder.with_name("content.json")
    process = PROCESSES.Process(target=write_content, args=(folder, written))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: {folder} cannot be read")
    return json.loads(written.read_text(encoding="utf-8"))


def write_content(folder: Path, path: Path) -> None:
    """Write what a finished run's folder holds, arrays and files as hashes."""
    path.write_text(json.dumps(content(folder)), encoding="utf-8")


def content(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on kills."""
    from abft_mlx.trainer import checkpoint

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {
        "names": sorted(one.name for one in folder.iterdir()),
        "metrics.jsonl": [_without_measured(json.loads(line)) for line in lines],
        "run.json": _without_measured(json.loads((folder / "run.json").read_text())),
    }
    for name in ("adapters.safetensors", "adapter_config.json", "recipe.yaml"):
        found[name] = _hash((folder / name).read_bytes())
    for name in ("checkpoint", "checkpoint.before"):
        held, at, _ = checkpoint.load(folder / name)
        trees = (held.trainable, held.optimizer, held.best)
        found[name] = [at.name, *(_hashes(one) for one in trees)]
        found[f"{name}, facts"] = _without_measured(held.facts)
    found["heads.npz"] = _npz(folder / "heads.npz")
    return found


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: one for name, one in value.items() if name not in MEASURED}
        return {name: _without_measured(one) for name, one in kept.items()}
    if isinstance(value, list):
        return [_without_measured(one) for one in value]
    return value


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hashes(tree: Any) -> dict[str, str]:
    import numpy as np
    from mlx.utils import tree_flatten

    return {name: _hash(np.array(one).tobytes()) for name, one in tree_flatten(tree or {})}


def _npz(path: Path) -> dict[str, str]:
    import numpy as np

    with np.load(path) as arrays:
        return {name: _hash(arrays[name].tobytes()) for name in arrays.files}


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
        process = start(folder, said, resume=resume)
        if kills > 0:
            phase = chance.choice([RANDOM, *PHASES])
            if phase == RANDOM:
                time.sleep(chance.uniform(0.0, seconds))
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
        process.join(PATIENCE_SECONDS)
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
    warm()
    chance, tally = random.Random(seed), Tally()
    seconds = undisturbed(folder / "undisturbed")
    wanted = contents(folder / "undisturbed")
    while sum(tally.tried.values()) < kills:
        run = folder / "run"
        before = len(tally.lost)
        tortured(run, chance, seconds, tally, kills - sum(tally.tried.values()))
        if len(tally.lost) == before:
            found = contents(run)
            wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
            tally.lost += [f"{name} is not that of the undisturbed run" for name in wrong]
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
