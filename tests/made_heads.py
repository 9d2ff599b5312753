"""Made-up heads and run folders, with numbers a test chooses or draws from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from abft_mlx.induction import Detected, Example, Heads, HeadState, write_heads

NAN = float("nan")
ODD = (
    "message", " of", "\n", "\t", " $x_1$", "$", "_", "<script>", "\"quoted'", "\u202eright", "😀",
    "中文", "", " ", "   ", "an" * 40, "\x00", "é", "\\n", "%", "label:",
)  # fmt: skip


def state(layers: int, heads: int, seed: int = 0, *, detected: bool = False) -> HeadState:
    """A census of random numbers; the second layer of three or more has no heads."""
    random = np.random.default_rng(seed)
    parts = {name: random.random((layers, heads)) for name in ("magnitude", "share", "sink")}
    parts["correctness"] = random.uniform(-1, 1, (layers, heads))
    if layers >= 3:
        for one in parts.values():
            one[1] = NAN
    found = None
    if detected:
        found = Detected(*random.random((3, layers, heads)), sequences=16, repeated_tokens=50)
    return HeadState(**parts, detected=found)


def example(
    layers: int, heads: int, tokens: int, states: tuple[str, ...], seed: int = 0, gold: int = 1
) -> Example:
    """A prompt of odd tokens with random rows."""
    random = np.random.default_rng(seed)
    rows = {}
    for name in states:
        made = random.dirichlet(np.full(tokens, 0.1), (layers, heads)).astype(np.float32)
        if layers >= 3:
            made[1] = NAN
        rows[name] = made
    return Example(
        tokens=tuple(ODD[n % len(ODD)] for n in range(tokens)),
        label_positions=np.array([tokens // 5, 2 * tokens // 5, 3 * tokens // 5, 4 * tokens // 5]),
        demonstration_labels=np.array([0, 1, 2, 1]),
        gold=gold,
        rows=rows,
    )


def heads(
    layers: int = 3,
    count: int = 2,
    tokens: int = 40,
    *,
    states: tuple[str, ...] = ("before", "after"),
    examples: int = 1,
    detected: bool = False,
    seed: int = 0,
) -> Heads:
    """What was seen of a made-up model."""
    return Heads(
        states={
            name: state(layers, count, seed + n, detected=detected) for n, name in enumerate(states)
        },
        examples=tuple(example(layers, count, tokens, states, seed + n) for n in range(examples)),
        labels=("ham", "spam", "$ca_t$"),
        prompts=64,
        facts={"model": "demo"},
    )


def update(step: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": step, "seen_examples": 32 * step, "loss": 3.0 / step, "punish": 2.0 / step,
        "reward": 2.5 / step, "induction_heads": 4.0 - 0.25 * step, "A": 0.5 - 0.01 * step,
        "B": 1.0, "learning_rate": 1e-3, "tokens": 2500, "seconds": 0.5,
        "peak_memory_bytes": 1000, **changes,
    }  # fmt: skip


def evaluated(counts: list[list[int]], confident: float = 0.95) -> dict[str, Any]:
    """One method of eval's JSON, all its prompts in the last bin."""
    total = int(np.sum(counts))
    right = float(np.trace(counts)) / total
    empty: list[Any] = [None] * 9
    return {
        "accuracy": right,
        "confusion": counts,
        "reliability": {
            "count": [0] * 9 + [total],
            "confidence": [*empty, confident],
            "accuracy": [*empty, right],
        },
    }


def evaluation(before: list[list[int]], after: list[list[int]]) -> dict[str, Any]:
    """The document of eval with an adapter."""
    return {
        "schema": 1,
        "adapter": "run",
        "labels": ["ham", "spam", "$ca_t$"],
        "prompts": int(np.sum(after)),
        "methods": {"vanilla": evaluated(after)},
        "base": {"methods": {"vanilla": evaluated(before)}},
    }


def write_run(
    folder: Path,
    *,
    kind: str = "abft",
    updates: list[dict[str, Any]] | None = None,
    seen: Heads | None = None,
    measured: dict[str, Any] | None = None,
    seed: int = 42,
    fingerprint: str = "sha256:0",
    **changes: Any,
) -> Path:
    """A run folder with what is given in it; of None there is no file."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "schema": 1,
        "finished": True,
        "device": "a machine",
        "model": {"source": "/home/me/models/tiny", "fingerprint": fingerprint},
        "data": {"source": "mails.csv"},
        "seeds": {"data": 42, "training": seed, "evaluation": 42},
        "shift": {"q": [0.25, None, 0.5], "k": [0.125, None, 0.75], "head": None},
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    recipe = {
        "name": "made",
        "prompt": {"demonstrations": 4},
        "objective": {"kind": kind},
        "training": {"prompts_per_update": 32},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if updates is not None:
        lines = "".join(json.dumps(one) + "\n" for one in updates)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if seen is not None:
        write_heads(folder / "heads.npz", seen)
    if measured is not None:
        (folder / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    return folder
