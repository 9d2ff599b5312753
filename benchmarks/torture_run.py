"""A very small run of the bundled demo in a process of its own, and all that must not change.

What the harnesses that kill and fill disks stand on. On Linux a process is forked from one that has
imported everything and computed nothing, which saves seconds.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
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
PATIENCE_SECONDS = 300.0
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def start(
    folder: Path,
    said: Path,
    *,
    resume: bool,
    file_bytes: int | None = None,
) -> BaseProcess:
    """Begin the run, or go on with it, in a process of its own.

    Args:
        folder: the run folder.
        said: a file for what it prints.
        resume: whether to go on.
        file_bytes: the longest file that it may write (``ulimit -f``).
    """
    words = ["finetune", "--resume", str(folder)]
    if not resume:
        changes = [part for one in SETTINGS for part in ("--set", one)]
        words = ["finetune", "demo", "--output", str(folder), "--overwrite", *changes]
    process = PROCESSES.Process(target=command, args=([*words, "--quiet"], said, file_bytes))
    process.start()
    return process


def command(words: list[str], said: Path, file_bytes: int | None = None) -> None:
    """Run a command of abft-mlx in this process; what it prints goes to a file."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    from abft_mlx.cli import app

    app(words)


def warm() -> None:
    """Import what a run needs, so that forked processes need not; nothing may be computed here."""
    import mlx_lm  # noqa: F401

    from abft_mlx import api, cli, experiment  # noqa: F401


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
    held = checkpoint.load(folder / "checkpoint")
    found["checkpoint"] = [_hashes(one) for one in (held.trainable, held.optimizer, held.best)]
    found["checkpoint, facts"] = _without_measured(held.facts)
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


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What of a run is not that of the undisturbed one, a line each."""
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    return [f"{name} is not that of the undisturbed run" for name in wrong]
