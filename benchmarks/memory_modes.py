"""Peak memory and seconds of one update: number types of the base by ways to the gradients.

    python benchmarks/memory_modes.py
    python benchmarks/memory_modes.py --bases float32 4-bit --output modes.json

Each cell runs in a process of its own: a Llama of random weights, LoRA of rank 16 in float32 on W_Q
and W_K, one update to warm up unless ``--cold``, then ``--repeats`` updates; seconds are their
median, the peak is MLX's own count. Quantized bases have groups of 64 and compute in float32. Cells
that ``--output`` holds already are not measured again, so a run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from abft_mlx import runtime
from abft_mlx.errors import UsageError

BASES = ("float32", "bfloat16", "8-bit", "4-bit")
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "checkpointing": {"checkpointing": True},
    "local": {"gradient": "local"},
}
MEBIBYTE = 2**20


def measure(size_text: str, base: str, mode: str, repeats: int, warm: bool) -> dict[str, Any]:
    """One cell, in this process, which must have done nothing else."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_flatten

    from abft_mlx import adapters
    from abft_mlx.bench import contenders, models, sizes
    from abft_mlx.recipe import AdapterSection
    from abft_mlx.trainer.step import Step

    size = sizes.parse(size_text)
    model = models.random_model(size, mx.bfloat16 if base == "bfloat16" else mx.float32)
    if base.endswith("-bit"):
        nn.quantize(model, group_size=64, bits=int(base.removesuffix("-bit")))
    mx.eval(model.parameters())
    weights = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    adapters.attach(model, AdapterSection(rank=contenders.RANK, scale=contenders.SCALE), seed=0)
    step = Step(
        model,
        optim.Adam(contenders.LEARNING_RATE, bias_correction=True),
        reward_weight=models.REWARD,
        use_filter=True,
        **MODES[mode],
    )
    batches = [contenders.batch_of(size)]
    if warm:
        step.update(batches, models.PUNISH)
    mx.clear_cache()
    runtime.reset_peak_memory()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step.update(batches, models.PUNISH)
        seconds.append(time.perf_counter() - start)
    return {
        "base": base,
        "mode": mode,
        "seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "repeats": repeats,
        "warm": warm,
        "peak_memory_bytes": runtime.peak_memory_bytes(),
        "weights_bytes": weights,
    }


def apart(chosen: argparse.Namespace, base: str, mode: str) -> dict[str, Any]:
    """One cell in a process of its own."""
    command = [sys.executable, __file__, "--size", chosen.size, "--cell", base, mode]
    command += ["--repeats", str(chosen.repeats), *(["--cold"] if chosen.cold else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"{base}, {mode} ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def table(cells: list[dict[str, Any]]) -> str:
    """A Markdown table; ratios are to the same base's exact step."""
    exact = {one["base"]: one for one in cells if one["mode"] == "exact"}
    lines = [
        "| base | gradients | weights, MiB | peak, MiB | of exact | seconds | of exact |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in cells:
        beside = exact.get(one["base"])
        sizes = [f"{one[key] / MEBIBYTE:,.0f}" for key in ("weights_bytes", "peak_memory_bytes")]
        ratios = ["–" if beside is None else f"{one[key] / beside[key]:.2f} ×"
                  for key in ("peak_memory_bytes", "seconds")]  # fmt: skip
        seconds = f"{one['seconds']:.2f}"
        row = [one["base"], one["mode"], *sizes, ratios[0], seconds, ratios[1]]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure every cell that is not known yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="12x768x32000:8x160k4", help="as abft-mlx bench has it")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed")
    parser.add_argument("--cold", action="store_true", help="no update to warm up")
    parser.add_argument("--output", type=Path, help="JSON of all cells, added to if it is there")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.repeats < 1:
        parser.error(f"--repeats {chosen.repeats}: must be at least 1")
    if chosen.cell is not None:
        base, mode = chosen.cell
        print(json.dumps(measure(chosen.size, base, mode, chosen.repeats, not chosen.cold)))
        return 0
    from abft_mlx.bench import sizes

    try:
        size = str(sizes.parse(chosen.size))
    except UsageError as error:
        parser.error(f"--size: {error}")
    document: dict[str, Any] = {"schema": 1, "size": size, "cells": []}
    if chosen.output is not None and chosen.output.exists():
        document = json.loads(chosen.output.read_text(encoding="utf-8"))
        if document["size"] != size:
            parser.error(f"--output {chosen.output}: holds {document['size']}; name another file")
    document |= {"device": runtime.device_description(), "versions": runtime.versions()}
    cells = {(one["base"], one["mode"]): one for one in document["cells"]}
    for base in chosen.bases:
        for mode in chosen.modes:
            if (base, mode) in cells:
                continue
            print(f"{size}: {base}, {mode}", file=sys.stderr, flush=True)
            cells[base, mode] = apart(chosen, base, mode)
            order = [(b, m) for b in BASES for m in MODES if (b, m) in cells]
            document["cells"] = [cells[one] for one in order]
            if chosen.output is not None:
                chosen.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document["cells"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
