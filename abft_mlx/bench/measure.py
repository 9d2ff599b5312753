"""Measuring: seconds in turns in one process, and the memory of each contender."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from rich.table import Table

from abft_mlx import runtime
from abft_mlx.bench import sizes
from abft_mlx.bench.contenders import CONTENDERS
from abft_mlx.bench.sizes import Size
from abft_mlx.errors import RunError, UsageError

REPEATS = 5
# A quick look leaves out mlx-lm's step on the keys that are not its default.
QUICK_WITHOUT = ("mlx-lm-qk",)
TORCH, OURS, LIMIT = "pytorch-paper", "ours-exact", "limit"


@dataclass(frozen=True)
class Row:
    """What one contender needs for one update of a size's prompts."""

    name: str
    seconds: float  # median of the repeats
    fastest_seconds: float
    slowest_seconds: float
    examples_per_second: float  # prompts / seconds
    peak_memory_bytes: int | None  # of model and second update, without the other contenders
    flops: int | None = None  # of our exact update and of the limit


def names_without(without: Sequence[str]) -> list[str]:
    """All contenders but some; UsageError if one of those is not known."""
    for name in without:
        if name not in CONTENDERS:
            raise UsageError(f"contender {name!r} is not known; there are {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name not in without]


def compare(
    size: Size,
    names: Sequence[str],
    *,
    dtype: str = "float32",
    repeats: int = REPEATS,
    memory: bool = True,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Row]:
    """Measure contenders side by side, and the limit of the same run.

    The limit is the same matrix products at the rate of one large product.

    Args:
        size: of the model and its prompts.
        names: contenders, of :data:`contenders.CONTENDERS`.
        dtype: of the base.
        repeats: rounds after warm-up; in each, every contender makes one update.
        memory: whether to measure peak memory, too.
        on_stage: called with what is being done.
        on_progress: called with the number of updates made and of all, without warm-up.
    """
    kind = getattr(mx, dtype)
    updates = {}
    peaks: dict[str, int | None] = dict.fromkeys(names)
    for name in names:
        on_stage(f"{size}: {name}, warming up")
        runtime.release_memory()
        held = mx.get_active_memory()
        updates[name] = CONTENDERS[name](size, kind)
        updates[name]()
        if memory and name != TORCH:
            peaks[name] = _second_peak(updates[name]) - held
    rows_of_product = 4096 if mx.default_device() == mx.Device(mx.gpu) else 2048
    left, right = (mx.random.normal((rows_of_product,) * 2).astype(kind) for _ in range(2))
    mx.eval(left, right)
    mx.eval(left @ right)
    flops = sizes.step_flops(size)
    seconds: dict[str, list[float]] = {name: [] for name in (*names, LIMIT)}
    for number in range(repeats):
        on_stage(f"{size}: round {number + 1} of {repeats}")
        start = time.perf_counter()
        mx.eval(left @ right)
        product = time.perf_counter() - start
        seconds[LIMIT].append(product * flops / (2.0 * rows_of_product**3))
        for place, (name, update) in enumerate(updates.items(), 1):
            start = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - start)
            on_progress(number * len(names) + place, repeats * len(names))
    updates.clear()
    mx.clear_cache()
    if memory and TORCH in names:
        on_stage(f"{size}: {TORCH}, memory")
        peaks[TORCH] = _torch_peak(size, dtype)
    peaks[LIMIT] = sizes.weight_bytes(size, kind)
    rows = []
    for name, some in seconds.items():
        middle = statistics.median(some)
        counted = flops if name in (OURS, LIMIT) else None
        rate = size.prompts / middle
        rows.append(Row(name, middle, min(some), max(some), rate, peaks[name], counted))
    return rows


def peak_here(size: Size, name: str, dtype: str) -> int:
    """MLX's peak memory, in bytes, of an update in this process, which holds nothing else."""
    update = CONTENDERS[name](size, getattr(mx, dtype))
    update()
    return _second_peak(update)


def _second_peak(update: Callable[[], float]) -> int:
    """MLX's peak while an update is made that has been made before."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    update()
    return runtime.peak_memory_bytes()


def _torch_peak(size: Size, dtype: str) -> int:
    """As :func:`print_torch_peak`, in a process of its own."""
    program = (
        "import sys; from abft_mlx.bench import measure; measure.print_torch_peak(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(size), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{TORCH} at {size} ended with {done.returncode}: {last}")
    return int(done.stdout.splitlines()[-1])


def print_torch_peak(size: str, dtype: str) -> None:
    """Print the bytes that two updates take; on a CPU, what this process grows by."""
    import torch
    import transformers  # noqa: F401  (its own bytes are not the update's)

    before = runtime.process_peak_bytes()
    update = CONTENDERS[TORCH](sizes.parse(size), getattr(mx, dtype))
    mx.clear_cache()
    runtime.reset_process_peak()
    update()
    update()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(runtime.process_peak_bytes() - before)


def document(measured: Mapping[Size, Sequence[Row]], dtype: str) -> dict[str, Any]:
    """The bench JSON."""
    limit = next(row for row in next(iter(measured.values())) if row.name == LIMIT)
    assert limit.flops is not None
    return {
        "schema": 1,
        "device": runtime.device_description(),
        "versions": runtime.versions(),
        "dtype": dtype,
        "limit": {"flops_per_second": limit.flops / limit.seconds},
        "sizes": [
            asdict(size) | {"rows": [asdict(row) for row in rows]}
            for size, rows in measured.items()
        ],
    }


def table(size: Size, rows: Sequence[Row]) -> Table:
    """Seconds, prompts per second and memory, each also as a multiple of our exact update's."""
    drawn = Table(
        box=None,
        pad_edge=False,
        title=(
            f"{size.layers} layers x {size.width}, {size.vocabulary:,} tokens of vocabulary, "
            f"{size.prompts} prompts of {size.tokens} tokens, k = {size.demonstrations}"
        ),
        title_justify="left",
    )
    for heading in ("", "seconds", "range", "prompts/s", "of exact", "peak", "of exact"):
        drawn.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    seconds, peak = next(
        ((row.seconds, row.peak_memory_bytes) for row in rows if row.name == OURS), (None, None)
    )

    def multiple(value: float | None, of: float | None) -> str:
        return f"{value / of:.2f}x" if value and of else "–"

    for row in rows:
        own = row.peak_memory_bytes
        drawn.add_row(
            row.name,
            f"{row.seconds:.3f}",
            f"{row.fastest_seconds:.2f}–{row.slowest_seconds:.2f}",
            f"{row.examples_per_second:.2f}",
            multiple(row.seconds, seconds),
            "–" if own is None else f"{own / 2**20:,.0f} MiB",
            multiple(own, peak),
        )
    return drawn
