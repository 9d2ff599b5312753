"""``abft-mlx doctor``: what this machine offers MLX, how to make it faster, and what fits it."""

from __future__ import annotations

import platform
import sys
from typing import Any

from abft_mlx.cli import options
from abft_mlx.cli.shell import Shell

# An optimised BLAS is tens of times above this on one core, the reference BLAS below it.
_SLOW_FLOPS_PER_SECOND = 15e9
_LENGTH_TOKENS = 256


def doctor(
    recipe: str | None = None,
    *,
    model: str | None = None,
    length: int | None = None,
    batch: int | None = None,
    settings: list[str] | None = None,
    as_json: bool = False,
) -> None:
    """Check this machine; with a model, the memory training needs.

    The estimate reads the model's config.json only; no weights are loaded or fetched. --set
    reaches what it depends on, such as adapter.kind=full or objective.kind=end_to_end.

    Args:
        length (TOKENS): The longest prompt. [min: 8] [default: 256]
        batch (PROMPTS): Prompts of one forward and backward pass; without it as training would
            choose. [min: 1]
    """
    shell = Shell(as_json=as_json)
    with shell.speaking():
        from abft_mlx import memory_estimate, runtime
        from abft_mlx import recipe as recipes
        from abft_mlx.trainer import batches

        estimate = None
        memory = runtime.memory_facts()
        if recipe or model or length or batch or settings:
            name = options.subject(shell, recipe).recipe if recipe else None
            changes = options.overrides(settings, model=model if name or model else "demo")
            tokens = length or _LENGTH_TOKENS
            if batch is not None:
                changes["training.micro_batch_tokens"] = batch * batches.padded_tokens(tokens)
            chosen = recipes.resolve(options.open_recipe(name, changes))
            limit = memory["recommended_bytes"] or memory["machine_bytes"]
            estimate = memory_estimate.examine(chosen, tokens, limit or 0)
        blas = runtime.prepare()
        rates = {
            dtype: runtime.matrix_product_flops(1024 if dtype == "float32" else 512, dtype=dtype)
            for dtype in ("float32", "bfloat16", "float16")
        }
        facts = {
            "schema": 1,
            "versions": runtime.versions(),
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            "device": runtime.device_description(),
            "blas": {"path": blas.path, "note": blas.note},
            "memory": memory,
            "matrix_product_flops_per_second": rates,
            "advice": advice(blas.path, rates),
        }
        if estimate is not None:
            facts["memory_estimate"] = estimate
        shell.say(*describe(facts))
    shell.document(facts)


def advice(blas_path: str | None, rates: dict[str, float]) -> list[str]:
    """What would make MLX faster here; nothing on a Mac, where nothing needs doing."""
    if sys.platform != "linux":
        return []
    lines = []
    if blas_path is None:
        ways = ["apt-get install libopenblas0-pthread (Debian, Ubuntu)"]
        if platform.machine() == "x86_64":
            ways.append("pip install mkl (into this Python environment, no root needed)")
        lines.append("MLX runs on its reference BLAS, which is slow: " + ", or ".join(ways))
    elif rates["float32"] < _SLOW_FLOPS_PER_SECOND:
        lines.append(
            f"{blas_path} is loaded but slow: is the machine busy, or does "
            "OPENBLAS_NUM_THREADS or OMP_NUM_THREADS hold it to one thread?"
        )
    if rates["float32"] > 4 * rates["bfloat16"]:
        lines.append("on this CPU float32 models run much faster than bfloat16 or float16 ones")
    return lines


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts of ``doctor --json`` as lines for a person."""
    memory, blas = facts["memory"], facts["blas"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"versions   {versions}",
        f"platform   {facts['platform']}",
        f"device     {facts['device']}",
        f"memory     {_size(memory['machine_bytes'])} in the machine",
    ]
    if sys.platform == "linux":
        lines.append(f"BLAS       {blas['path'] or 'the slow one of MLX'} ({blas['note']})")
    if memory["recommended_bytes"] is not None:
        lines.append(
            f"wired      up to {_size(memory['recommended_bytes'])}, "
            "as macOS recommends; abft-mlx asks for that much when it runs"
        )
    for dtype, rate in facts["matrix_product_flops_per_second"].items():
        lines.append(f"product    {rate / 1e9:.1f} GFLOP/s in {dtype}")
    lines += [f"advice     {text}" for text in facts["advice"]]
    if "memory_estimate" not in facts:
        return lines
    estimate = facts["memory_estimate"]
    number = f"{estimate['bits']}-bit" if estimate["bits"] else estimate["number_type"]
    kinds = ["weights", "adapter", "moments", "gradients", "activations"]
    parts = [f"{kind.replace('_', ' ')} {_size(estimate[f'{kind}_bytes'])}" for kind in kinds]
    verdict = "fits" if estimate["fits"] else f"does not fit; {estimate['way_out']}"
    return [
        *lines,
        f"model      {estimate['model']}: {estimate['parameters']:,} parameters in {number}, "
        f"{estimate['trainable_parameters']:,} trained",
        f"training   about {_size(estimate['training_bytes'])}: {', '.join(parts)}",
        f"           at a time {estimate['rows']} x {estimate['tokens']} tokens, "
        f"an update {estimate['micro_batches']} x that",
        f"evaluation about {_size(estimate['evaluation_bytes'])}: "
        f"{estimate['evaluation_rows']} x {estimate['tokens']} tokens at a time",
        f"verdict    {verdict} ({_size(estimate['limit_bytes'])} here)",
    ]


def _size(count_bytes: float) -> str:
    """Bytes of memory, in powers of two."""
    gigabytes = count_bytes / 2**30
    return f"{gigabytes:.1f} GiB" if gigabytes >= 1 else f"{count_bytes / 2**20:.1f} MiB"
