"""``abft-mlx doctor``: what this machine offers MLX, and how to make it faster."""

from __future__ import annotations

import platform
import sys
from typing import Any

from abft_mlx.cli._options import Json
from abft_mlx.cli._shell import Shell

# An optimised BLAS is tens of times above this on one core, the reference BLAS below it.
_SLOW_FLOPS_PER_SECOND = 15e9


def doctor(as_json: Json = False) -> None:
    """Say which device, BLAS and versions are in use, and measure a matrix product."""
    shell = Shell(as_json=as_json)
    with shell.speaking():
        facts = examine()
        for line in describe(facts):
            shell.say(line)
    shell.document(facts)


def examine() -> dict[str, Any]:
    """Every fact of ``doctor --json``."""
    from abft_mlx import runtime

    blas = runtime.prepare()
    rates = {
        "float32": runtime.matrix_product_flops(1024, dtype="float32"),
        "bfloat16": runtime.matrix_product_flops(512, dtype="bfloat16"),
        "float16": runtime.matrix_product_flops(512, dtype="float16"),
    }
    return {
        "schema": 1,
        "versions": runtime.versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": runtime.device_description(),
        "blas": {"path": blas.path, "note": blas.note},
        "memory": runtime.memory_facts(),
        "matrix_product_flops_per_second": rates,
        "advice": advice(blas.path, rates),
    }


def advice(blas_path: str | None, rates: dict[str, float]) -> list[str]:
    """What would make MLX faster here; nothing on a Mac, where nothing needs doing.

    Args:
        blas_path: the optimised BLAS in use, if any.
        rates: measured floating-point operations per second by type.
    """
    if sys.platform != "linux":
        return []
    found = []
    if blas_path is None:
        ways = ["apt-get install libopenblas0-pthread (Debian, Ubuntu)"]
        if platform.machine() == "x86_64":
            ways.append("pip install mkl (into this Python environment, no root needed)")
        found.append("MLX runs on its reference BLAS, which is slow: " + ", or ".join(ways))
    elif rates["float32"] < _SLOW_FLOPS_PER_SECOND:
        found.append(
            f"{blas_path} is loaded but slow: is the machine busy, or does "
            "OPENBLAS_NUM_THREADS or OMP_NUM_THREADS hold it to one thread?"
        )
    if rates["float32"] > 4 * rates["bfloat16"]:
        found.append("on this CPU float32 models run much faster than bfloat16 or float16 ones")
    return found


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a person.

    Args:
        facts: what :func:`examine` found.
    """
    gibibyte = 2**30
    memory = facts["memory"]
    blas = facts["blas"]
    lines = [
        "versions   "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"platform   {facts['platform']}",
        f"device     {facts['device']}",
        f"memory     {memory['machine_bytes'] / gibibyte:.1f} GiB in the machine",
    ]
    if sys.platform == "linux":
        lines.append(f"BLAS       {blas['path'] or 'the slow one of MLX'} ({blas['note']})")
    if memory["recommended_bytes"] is not None:
        lines.append(
            f"wired      up to {memory['recommended_bytes'] / gibibyte:.1f} GiB, "
            "as macOS recommends; abft-mlx asks for that much when it runs"
        )
    for dtype, rate in facts["matrix_product_flops_per_second"].items():
        lines.append(f"product    {rate / 1e9:.1f} GFLOP/s in {dtype}")
    return [*lines, *(f"advice     {text}" for text in facts["advice"])]
