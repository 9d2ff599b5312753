"""What a window of layers saves, and what keeping the hidden states below it saves beyond that.

    python benchmarks/window_gain.py
    python benchmarks/window_gain.py --layers 24 --windows 24 12 4 1 --output gain.json

One Llama of random weights and one update's prompts. For each window, LoRA on W_Q and W_K of its
layers alone, the rows of other layers left out (`objective.layers: trained`), with exact and with
local gradients; a third of the layers that do not train lie above the window, the rest below.
Each is timed with the hidden states computed in every update and with them kept, after all prompts
have been seen once; all in turns, medians. Memory is what an update takes beside weights, adapter
and what is kept. Prints a Markdown table, and with --output writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from abft_mlx import (
    adapters,
    runtime,
)
from abft_mlx.bench.models import PUNISH, REWARD, random_model, random_prompts
from abft_mlx.bench.sizes import Size
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.plan import micro_batches
from abft_mlx.trainer.step import Step

RANK, SCALE, LEARNING_RATE = 16, 2.0, 1e-4
PLENTY = 2**40
MEBIBYTE = 2**20


@dataclass
class Contender:
    """One way to make an update.

    Attributes:
        layers: those that train.
        gradient: "exact" or "local".
        keeps: whether hidden states below them are kept.
        step: makes the update.
        first_seconds: of the first update, which computes what is kept.
        seconds: of each later one.
        peak_bytes: the most that an update took beside what was there before it.
    """

    layers: list[int]
    gradient: str
    keeps: bool
    step: Step
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def row(self) -> dict[str, Any]:
        """As JSON."""
        kept = self.step.kept
        return {
            "layers": self.layers,
            "gradient": self.gradient,
            "kept": self.keeps,
            "seconds": statistics.median(self.seconds),
            "fastest_seconds": min(self.seconds),
            "slowest_seconds": max(self.seconds),
            "first_seconds": self.first_seconds,
            "peak_bytes": self.peak_bytes,
            "kept_bytes": 0 if kept is None else kept.counts()["memory_bytes"],
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="+", default=[12, 9, 6, 3, 1], metavar="N")
    parser.add_argument("--output", type=Path, help="write JSON here")
    for flag, value, what in (
        ("--layers", 12, "layers of the Llama"),
        ("--width", 512, "its width, a multiple of 64"),
        ("--vocabulary", 4000, "tokens that it knows"),
        ("--prompts", 8, "prompts of an update"),
        ("--tokens", 160, "tokens of a prompt"),
        ("--repeats", 5, "timed updates of each way"),
    ):
        parser.add_argument(flag, type=int, default=value, help=f"{what} (default {value})")
    chosen = parser.parse_args()
    if not all(1 <= one <= chosen.layers for one in chosen.windows):
        parser.error(f"--windows {chosen.windows}: each has 1 to {chosen.layers} layers")
    return chosen


def window(layers: int, number: int) -> list[int]:
    """So many of a model's layers, a third of the others above them."""
    first = layers - number - (layers - number + 1) // 3
    return list(range(first, first + number))


def contenders(size: Size, windows: list[int]) -> list[Contender]:
    """All ways, on models that share their base's weights."""
    base = random_model(size, mx.float32).parameters()
    found = []
    for number in windows:
        layers = window(size.layers, number)
        for gradient in ("exact", "local"):
            model = random_model(size, mx.float32)
            model.update(base)
            section = AdapterSection(kind="lora", rank=RANK, scale=SCALE, layers=layers)
            adapters.attach(model, section, seed=0)
            for keeps in (False, True) if layers[0] else (False,):
                step = Step(
                    model,
                    optim.Adam(LEARNING_RATE, bias_correction=True),
                    reward_weight=REWARD,
                    use_filter=True,
                    only_trained=True,
                    gradient=gradient,
                    kept_bytes=PLENTY if keeps else None,
                )
                found.append(Contender(layers, gradient, keeps, step))
    return found


def measure(ways: list[Contender], size: Size, repeats: int) -> None:
    """Time all in turns, and then the memory of each."""
    prompts = random_prompts(size, size.prompts)
    batches = micro_batches(prompts, size.prompts, bucket_tokens=1)
    for one in ways:
        start = time.perf_counter()
        one.step.update(batches, PUNISH)
        one.first_seconds = time.perf_counter() - start
        one.step.update(batches, PUNISH)
    for _ in range(repeats):
        for one in ways:
            start = time.perf_counter()
            one.step.update(batches, PUNISH)
            one.seconds.append(time.perf_counter() - start)
    for one in ways:
        mx.clear_cache()
        before = mx.get_active_memory()
        runtime.reset_peak_memory()
        one.step.update(batches, PUNISH)
        one.peak_bytes = runtime.peak_memory_bytes() - before


def table(rows: list[dict[str, Any]], size: Size) -> str:
    """The rows as Markdown, a window and its gradient in each."""
    lines = [
        "| layers that train | share | gradient | computed, s | kept, s | kept is "
        "| of all layers | first update, s | computed, MiB | kept, MiB | 512 prompts keep, MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    plain = [one for one in rows if not one["kept"]]
    kept = {(*one["layers"], one["gradient"]): one for one in rows if one["kept"]}
    whole = {one["gradient"]: one["seconds"] for one in plain if len(one["layers"]) == size.layers}
    for one in plain:
        layers, gradient = one["layers"], one["gradient"]
        other = kept.get((*layers, gradient), one)
        parts = [
            f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0]),
            f"{len(layers) / size.layers:.0%}",
            gradient,
            f"{one['seconds']:.3f}",
            f"{other['seconds']:.3f}" if other["kept"] else "–",
            f"{one['seconds'] / other['seconds']:.2f} ×" if other["kept"] else "–",
            f"{other['seconds'] / whole[gradient]:.2f}" if gradient in whole else "–",
            f"{other['first_seconds']:.2f}",
            f"{one['peak_bytes'] / MEBIBYTE:.0f}",
            f"{other['peak_bytes'] / MEBIBYTE:.0f}" if other["kept"] else "–",
            f"{512 / size.prompts * other['kept_bytes'] / MEBIBYTE:.0f}" if other["kept"] else "–",
        ]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    chosen = arguments()
    size = Size(chosen.layers, chosen.width, chosen.vocabulary, chosen.prompts, chosen.tokens)
    ways = contenders(size, chosen.windows)
    measure(ways, size, chosen.repeats)
    rows = [one.row() for one in ways]
    print(f"{runtime.device_description()}, {size}, medians of {chosen.repeats}\n")
    print(table(rows, size))
    if chosen.output:
        document = {
            "schema": 1,
            "device": runtime.device_description(),
            "versions": runtime.versions(),
            "size": str(size),
            "repeats": chosen.repeats,
            "rows": rows,
        }
        chosen.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
