"""Made-up heads and run folders, with numbers a test chooses or draws from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from abft_mlx import recipe as recipes
from abft_mlx.induction import Detected, Example, Heads, HeadState, write_heads

NAN = float("nan")
LABELS = ("ham", "spam", "$ca_t$")
ODD = (
    "message", " of", "\n", "\t", " $x_1$", "$", "_", "<script>", "\"quoted'", "\u202eright", "😀",
    "中文", "", " ", "   ", "an" * 40, "\x00", "é", "\\n", "%", "label:",
)  # fmt: skip
# Each of them has broken some page or terminal somewhere.
HOSTILE = (
    "<script>document.title='owned'</script>", "</script><script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>", '" onmouseover="window.owned=1" x=\'', "<!--", "]]>",
    "&lt;b&gt;", "\x00nul", "\u202egnp.exe", "\n", "\t", "\r", "", "  ", "\x1b[31mred", "\x1b[2J",
    "\x1b]0;title\x07", "[bold]big[/bold]", "[/]", "注意力机制", "👩‍👩‍👧", "a" * 300, "\u2028",
    "{{constructor}}", "`${1}`",
)  # fmt: skip


def state(
    layers: int, heads: int, seed: int = 0, *, without: Sequence[int] = (), detected: bool = False
) -> HeadState:
    """A census of random numbers; layers in ``without`` have no heads."""
    random = np.random.default_rng(seed)
    magnitude = random.random((layers, heads))
    parts = {
        "magnitude": magnitude,
        "correctness": magnitude * random.uniform(-1, 1, (layers, heads)),
        "share": np.where(magnitude > 0.5, random.uniform(0.1, 1, (layers, heads)), 0.0),
        "sink": random.random((layers, heads)) / 3,
    }
    for table in parts.values():
        table[list(without)] = NAN
    scores = Detected(*random.random((3, layers, heads)), sequences=16, repeated_tokens=50)
    return HeadState(**parts, detected=scores if detected else None)


def heads(
    layers: int = 3,
    count: int = 2,
    tokens: int | Sequence[str] = 40,
    *,
    states: Sequence[str] = ("before", "after"),
    examples: int = 1,
    labels: Sequence[str] = LABELS,
    without: Sequence[int] = (),
    detected: bool = False,
    seed: int = 0,
) -> Heads:
    """What was seen of a made-up model: prompts of odd tokens with four demonstrations."""
    random = np.random.default_rng(seed)
    texts = [ODD[n % len(ODD)] for n in range(tokens)] if isinstance(tokens, int) else [*tokens]
    positions = np.array([n * len(texts) // 5 for n in range(1, 5)])
    classes = np.array([0, 1, 2, 1]) % len(labels)
    shown = []
    for n in range(examples):
        rows = {}
        for name in states:
            table = random.dirichlet(np.full(len(texts), 0.1), (layers, count)).astype(np.float32)
            table[list(without)] = NAN
            rows[name] = table
        for position, label in zip(positions, classes, strict=True):
            texts[position] = f" {labels[label]}"
        shown.append(Example(tuple(texts), positions, classes, (n + 1) % 2, rows))
    return Heads(
        states={
            name: state(layers, count, seed + n, without=without, detected=detected)
            for n, name in enumerate(states)
        },
        examples=tuple(shown),
        labels=tuple(labels),
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
        "macro_f1": right - 0.01,
        "expected_calibration_error": 0.125,
        "true_label_probability": right - 0.1,
        "interval": {"accuracy": [right - 0.03, right + 0.02]},
        "confusion": counts,
        "reliability": {
            "count": [0] * 9 + [total],
            "confidence": [*empty, confident],
            "accuracy": [*empty, right],
        },
    }


BEFORE, AFTER = [[2, 2, 0], [1, 3, 0], [0, 4, 0]], [[4, 0, 0], [0, 4, 0], [1, 1, 2]]


def evaluation(
    before: list[list[int]] = BEFORE,
    after: list[list[int]] = AFTER,
    labels: Sequence[str] = LABELS,
) -> dict[str, Any]:
    """What eval prints for an adapter."""
    return {
        "schema": 1, "model": "made", "adapter": "/home/someone/secret/run", "data": "mails",
        "labels": list(labels), "k": 4, "prompts": int(np.sum(after)), "seed": 42,
        "methods": {"vanilla": evaluated(after)},
        "comparisons": [
            {"first": "vanilla", "second": "base.vanilla", "only_first": 31, "only_second": 4,
             "p_value": 0.0000123}
        ],
        "base": {"methods": {"vanilla": evaluated(before)}},
    }  # fmt: skip


def run_json(**changes: Any) -> dict[str, Any]:
    """run.json of a finished run."""
    return {
        "schema": 1, "finished": True, "versions": {"python": "3.11.7", "mlx": "0.32.4"},
        "platform": "Linux", "device": "a machine",
        "model": {"source": "/home/someone/models/tiny", "kind": "local",
                  "fingerprint": "sha256:5d"},
        "data": {"source": "/home/someone/mails.csv", "kind": "local",
                 "classes": dict.fromkeys(LABELS, 500), "rows": {"training": 512}},
        "labels": dict.fromkeys(LABELS, "x"), "chat_template": None,
        "seeds": {"data": 42, "training": 42, "evaluation": 42}, "trainable_parameters": 36864,
        "totals": {"updates": 12, "seen_examples": 384, "seconds": 5.657,
                   "peak_memory_bytes": 22017892, "adapter_bytes": 148734},
        "shift": {"q": [0.25, None, 0.5], "k": [0.125, None, 0.75], "head": None},
        "validation": {"prompts": 64, "before": 0.25, "after": 0.62}, **changes,
    }  # fmt: skip


def write_run(
    folder: Path,
    seen: Heads | None = None,
    *,
    kind: str = "abft",
    updates: list[dict[str, Any]] | None = None,
    measured: dict[str, Any] | None = None,
    description: str = "Which mails are unwanted.",
    **changes: Any,
) -> Path:
    """A run folder with what a test names in it; of None there is no file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run_json(**changes)), encoding="utf-8")
    recipe = yaml.safe_load(recipes.dumps(recipes.load("demo")))
    recipe |= {"description": description, "objective": {"kind": kind}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if updates is not None:
        lines = "".join(json.dumps(line) + "\n" for line in updates)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if seen is not None:
        write_heads(folder / "heads.npz", seen)
    if measured is not None:
        (folder / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    return folder
