"""Measuring: seconds interleaved in one process, and what each contender takes of memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from abft_mlx import runtime
from abft_mlx.bench import contenders, limit, sizes
from abft_mlx.bench.sizes import Size
from abft_mlx.errors import RunError

REPEATS = 5
# A quick look leaves out mlx-lm's step on the keys that are not its default.
QUICK_WITHOUT = ("mlx-lm-qk",)
# PyTorch's memory on a CPU is what its process grows by, so it needs one of its own.
APART = ("pytorch-paper",)


@dataclass(frozen=True)
class Row:
    """What one contender needs for one update of a size's prompts.

    Attributes:
        name: of the contender.
        seconds: median of the repeats.
        fastest_seconds: the least of them.
        slowest_seconds: the most of them.
        examples_per_second: prompts / seconds.
        peak_memory_bytes: of its model and its second update; MLX's own count, beside what the
            other contenders hold. For PyTorch that of a process of its own: PyTorch's count on a
            GPU, and what the process grew by on a CPU.
        flops: counted operations, where they are.
    """

    name: str
    seconds: float
    fastest_seconds: float
    slowest_seconds: float
    examples_per_second: float
    peak_memory_bytes: int | None
    flops: int | None = None


def compare(
    size: Size,
    names: Sequence[str],
    *,
    dtype: str = "float32",
    repeats: int = REPEATS,
    memory: bool = True,
    tell: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Measure contenders side by side, and the limit of the same run.

    Args:
        size: of the model and its prompts.
        names: contenders, of :data:`contenders.CONTENDERS`.
        dtype: of the base.
        repeats: rounds after warm-up; in each, every contender makes one update.
        memory: whether to measure peak memory, too.
        tell: hears what is being done.
        on_progress: told how many updates of how many are made, of the rounds after warm-up.
    """
    kind = getattr(mx, dtype)
    updates = {}
    peaks: dict[str, int | None] = dict.fromkeys(names)
    for name in names:
        tell(f"{size}: {name}, warming up")
        runtime.release_memory()
        held = mx.get_active_memory()
        updates[name] = contenders.CONTENDERS[name](size, kind)
        updates[name]()
        if memory and name not in APART:
            peaks[name] = second_peak(updates[name]) - held
    rate = limit.product_rate(kind)
    made = on_progress or (lambda _done, _total: None)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for number in range(repeats):
        tell(f"{size}: round {number + 1} of {repeats}")
        rates.append(rate())
        for name, update in updates.items():
            start = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - start)
            made(sum(map(len, seconds.values())), repeats * len(names))
    del updates
    mx.clear_cache()
    flops = limit.step_flops(size, kind)
    for name in names if memory else ():
        if name in APART:
            tell(f"{size}: {name}, memory")
            peaks[name] = peak_apart(size, name, dtype)
    rows = [
        _row(name, size, seconds[name], peaks[name], flops if name == "ours-exact" else None)
        for name in names
    ]
    at_best = [flops / one for one in rates]
    return [*rows, _row("limit", size, at_best, limit.weight_bytes(size, kind), flops)]


def _row(name: str, size: Size, seconds: list[float], peak: int | None, flops: int | None) -> Row:
    middle = statistics.median(seconds)
    return Row(name, middle, min(seconds), max(seconds), size.prompts / middle, peak, flops)


def peak_apart(size: Size, name: str, dtype: str) -> int:
    """Peak memory of one contender alone, in bytes.

    Raises:
        RunError: the process failed, for lack of memory perhaps.
    """
    command = [sys.executable, "-m", "abft_mlx.bench", str(size), name, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{name} at {size} ended with {done.returncode}: {last}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"])


def peak_here(size: Size, name: str, dtype: str) -> int:
    """Peak memory of two updates in this process, which must have done nothing else."""
    if name == "pytorch-paper":
        import torch
        import transformers  # noqa: F401  (its own bytes are not the update's)

        before = runtime.process_peak_bytes()
        update = contenders.CONTENDERS[name](size, getattr(mx, dtype))
        mx.clear_cache()
        runtime.reset_process_peak()
        for _ in range(2):
            update()
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        return runtime.process_peak_bytes() - before
    update = contenders.CONTENDERS[name](size, getattr(mx, dtype))
    update()
    return second_peak(update)


def second_peak(update: Callable[[], float]) -> int:
    """MLX's peak while an update is made that has been made before."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    update()
    return runtime.peak_memory_bytes()


def document(found: dict[Size, list[Row]], dtype: str) -> dict[str, Any]:
    """The bench JSON."""
    reference = next(iter(found.values()))
    rate = next(one for one in reference if one.name == "limit")
    assert rate.flops is not None
    return {
        "schema": 1,
        "device": runtime.device_description(),
        "versions": runtime.versions(),
        "dtype": dtype,
        "limit": {"flops_per_second": rate.flops / rate.seconds},
        "sizes": [
            {
                "layers": size.layers,
                "width": size.width,
                "vocabulary": size.vocabulary,
                "prompts": size.prompts,
                "tokens": size.tokens,
                "demonstrations": size.demonstrations,
                "rows": [asdict(row) for row in rows],
            }
            for size, rows in found.items()
        ],
    }


def reference_names(without: Sequence[str]) -> list[str]:
    """All contenders but some.

    Raises:
        UsageError: one of those is not known.
    """
    sizes.known(without, contenders.CONTENDERS)
    return [name for name in contenders.CONTENDERS if name not in without]
