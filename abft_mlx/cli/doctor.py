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
        estimate = None
        if recipe or model or length or batch or settings:
            name = options.subject(shell, recipe).recipe if recipe else None
            estimate = _estimate(name, model, length or _LENGTH_TOKENS, batch, settings)
        facts = examine()
        if estimate is not None:
            facts["memory_estimate"] = estimate
        shell.say(*describe(facts))
    shell.document(facts)


def _estimate(
    recipe: str | None,
    model: str | None,
    length: int,
    batch: int | None,
    settings: list[str] | None,
) -> dict[str, Any]:
    """The memory of a run, as the JSON document has it."""
    from abft_mlx import memory_estimate, runtime
    from abft_mlx import recipe as recipes
    from abft_mlx.trainer import batches

    changes = options.overrides(settings, model=model if recipe or model else "demo")
    if batch is not None:
        changes["training.micro_batch_tokens"] = batch * batches.padded_tokens(length)
    chosen = recipes.resolve(options.open_recipe(recipe, changes))
    memory = runtime.memory_facts()
    limit = memory["recommended_bytes"] or memory["machine_bytes"]
    assert limit is not None
    return memory_estimate.examine(chosen, length, limit)


def examine() -> dict[str, Any]:
    """Every fact of ``doctor --json``."""
    from abft_mlx import runtime

    blas = runtime.prepare()
    sizes = {"float32": 1024, "bfloat16": 512, "float16": 512}
    rates = {
        dtype: runtime.matrix_product_flops(size, dtype=dtype) for dtype, size in sizes.items()
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
    """The facts as lines for a person.

    Args:
        facts: of :func:`examine`.
    """
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
    return lines + (_estimate_lines(facts["memory_estimate"]) if "memory_estimate" in facts else [])


def _size(count_bytes: float) -> str:
    """Bytes of memory, in powers of two."""
    if count_bytes >= 2**30:
        return f"{count_bytes / 2**30:.1f} GiB"
    return f"{count_bytes / 2**20:.1f} MiB"


def _estimate_lines(estimate: dict[str, Any]) -> list[str]:
    """The memory of a run as lines for a person."""
    kind = f"{estimate['bits']}-bit" if estimate["bits"] else estimate["number_type"]
    parts = ["weights", "adapter", "moments", "gradients", "activations"]
    listed = [f"{part.replace('_', ' ')} {_size(estimate[f'{part}_bytes'])}" for part in parts]
    verdict = "fits" if estimate["fits"] else f"does not fit; {estimate['way_out']}"
    return [
        f"model      {estimate['model']}: {estimate['parameters']:,} parameters in {kind}, "
        f"{estimate['trainable_parameters']:,} trained",
        f"training   about {_size(estimate['training_bytes'])}: {', '.join(listed)}",
        f"           at a time {estimate['rows']} x {estimate['tokens']} tokens, "
        f"an update {estimate['micro_batches']} x that",
        f"evaluation about {_size(estimate['evaluation_bytes'])}: "
        f"{estimate['evaluation_rows']} x {estimate['tokens']} tokens at a time",
        f"verdict    {verdict} ({_size(estimate['limit_bytes'])} here)",
    ]
