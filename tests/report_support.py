"""Run folders made up for reports: any size of model, any texts, numbers that a test can repeat."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from made_cells import cell, failed, study

from abft_mlx import recipe as recipes
from abft_mlx.analysis import write_study
from abft_mlx.induction import Example, Heads, HeadState, write_heads

# Each of them has broken some page somewhere.
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</script><script>window.owned=1</script>",
    "<img src=x onerror=window.owned=1>",
    '" onmouseover="window.owned=1" x=\'',
    "<!--",
    "]]>",
    "&lt;b&gt;",
    "\x00nul",
    "\u202egnp.exe",
    "\n",
    "\t",
    "\r",
    "",
    "  ",
    "\x1b[31mred",
    "注意力机制",
    "👩‍👩‍👧",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
    "{{constructor}}",
    "`${1}`",
    "javascript:alert(1)",
    "\u2028",
)


def made_heads(
    layers: int = 3,
    heads: int = 2,
    *,
    tokens: int = 24,
    examples: int = 2,
    words: tuple[str, ...] = (" a", " word", " of", " text"),
    labels: tuple[str, ...] = ("spam", "ham"),
    without: tuple[int, ...] = (),
    states: tuple[str, ...] = ("before", "after"),
    seed: int = 0,
) -> Heads:
    """Heads with random attention; layers in ``without`` have none."""
    rng = np.random.default_rng(seed)

    def table() -> np.ndarray:
        values = rng.random((layers, heads))
        values[list(without)] = np.nan
        return values

    def state() -> HeadState:
        magnitude = table()
        return HeadState(magnitude, magnitude * (2 * table() - 1), table(), table() / 3)

    made = []
    for n in range(examples):
        chosen = [words[(n + i) % len(words)] for i in range(tokens)]
        positions = np.array([tokens // 4, tokens // 2, 3 * tokens // 4])
        classes = np.array([0, 1, 0]) if n % 2 == 0 else np.array([1, 0, 1])
        for position, label in zip(positions, classes, strict=True):
            chosen[position] = " " + labels[label]
        rows = {}
        for name in states:
            drawn = rng.exponential(size=(layers, heads, tokens)) ** 3
            drawn /= drawn.sum(axis=-1, keepdims=True)
            drawn[list(without)] = np.nan
            rows[name] = drawn.astype(np.float32)
        made.append(Example(tuple(chosen), positions, classes, n % 2, rows))
    return Heads({name: state() for name in states}, tuple(made), labels, 64, {"model": "made"})


def method(accuracy: float, classes: int = 2) -> dict[str, Any]:
    """One method of eval's JSON."""
    counts = [[40 if row == column else 7 for column in range(classes)] for row in range(classes)]
    return {
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.01,
        "expected_calibration_error": 0.125,
        "true_label_probability": accuracy - 0.1,
        "confusion": counts,
        "reliability": {
            "count": [0, 10, 84],
            "confidence": [None, 0.55, 0.91],
            "accuracy": [None, 0.4, 0.8],
        },
        "interval": {"accuracy": [accuracy - 0.03, accuracy + 0.02]},
    }


def evaluation(labels: tuple[str, ...] = ("spam", "ham")) -> dict[str, Any]:
    """What eval --json prints."""
    return {
        "schema": 1, "model": "made", "adapter": "/home/someone/secret/run", "data": "mails",
        "labels": list(labels), "k": 3, "prompts": 94, "seed": 42,
        "methods": {"vanilla": method(0.8125, len(labels))},
        "comparisons": [
            {"first": "vanilla", "second": "base.vanilla", "only_first": 31, "only_second": 4,
             "p_value": 0.0000123}
        ],
        "base": {"methods": {"vanilla": method(0.5625, len(labels))}},
    }  # fmt: skip


def metrics(updates: int = 12, validate_every: int = 4) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [
        {
            "step": n, "seen_examples": 32 * n, "loss": 3 / n, "punish": 2 / n, "reward": 1.5 / n,
            "induction_heads": 4 + n / 10, "A": 0.5 - n / 1000, "B": 1.0, "learning_rate": 0.001,
            "tokens": 2500, "seconds": 0.1, "peak_memory_bytes": 20_000_000,
        }
        | ({"validation_accuracy": 0.5 + n / 100} if n % validate_every == 0 else {})
        for n in range(1, updates + 1)
    ]  # fmt: skip


def run_json(name: str = "made", layers: int = 3, labels: tuple[str, ...] = ("spam", "ham")) -> Any:
    """run.json of a finished run."""
    return {
        "schema": 1, "finished": True, "versions": {"python": "3.11.7", "mlx": "0.32.4"},
        "platform": "Linux", "device": "CPU, two cores",
        "model": {"source": name, "kind": "local", "revision": None, "fingerprint": "sha256:5d"},
        "data": {"source": "/home/someone/mails.csv", "kind": "local", "fingerprint": "3d",
                 "classes": dict.fromkeys(labels, 500), "rows": {"training": 512}},
        "labels": {one: one for one in labels}, "chat_template": None,
        "seeds": {"data": 42, "training": 43, "evaluation": 42}, "trainable_parameters": 36864,
        "totals": {"updates": 12, "seen_examples": 384, "seconds": 5.657,
                   "peak_memory_bytes": 22017892, "adapter_bytes": 148734},
        "shift": {"q": [1 + n / 7 for n in range(layers)], "k": [2 - n / 40 for n in range(layers)],
                  "head": None},
        "validation": {"prompts": 50, "before": 0.5, "after": 0.62, "best": 0.62,
                       "best_update": 12, "kept_update": 12},
    }  # fmt: skip


def write_run(
    folder: Path,
    heads: Heads | None = None,
    *,
    measured: dict[str, Any] | None = None,
    name: str = "made",
    description: str = "Which mails are unwanted.",
) -> Path:
    """A run folder with what a report reads."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = heads.labels if heads else ("spam", "ham")
    layers = next(iter(heads.states.values())).magnitude.shape[0] if heads else 3
    made = recipes.load("demo", [recipes.override("description", description)])
    recipes.save(made, folder / "recipe.yaml")
    (folder / "run.json").write_text(json.dumps(run_json(name, layers, labels)), encoding="utf-8")
    lines = "".join(json.dumps(one) + "\n" for one in metrics())
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if heads is not None:
        write_heads(folder / "heads.npz", heads)
    if measured is not None:
        (folder / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    return folder


def made_study(folder: Path) -> Path:
    """A study's folder with four cells, one of them failed."""
    cells = [cell("untrained", "0110" * 8)]
    cells += [cell("abft", "0111" * 8, seed=n) for n in (1, 2)]
    broken = failed(error="<script>window.owned=1</script>")
    made = study(name="mails & more", figures=["accuracy", "head_count"])
    write_study(folder, made, [*cells, broken])
    return folder


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of some of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unclosed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unclosed.append(tag)
