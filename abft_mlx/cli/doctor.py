"""``abft-mlx doctor``: what this machine offers MLX, how to make it faster, and what fits it."""

from __future__ import annotations

import platform
import sys
from typing import Annotated, Any

import typer

from abft_mlx.cli import options, resolve
from abft_mlx.cli.options import Json
from abft_mlx.cli.shell import Shell

# An optimised BLAS is tens of times above this on one core, the reference BLAS below it.
_SLOW_FLOPS_PER_SECOND = 15e9


_LENGTH_TOKENS = 256


def doctor(
    recipe: options.RecipeName = None,
    model: options.Model = None,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", min=8, help="The longest prompt.", show_default=str(_LENGTH_TOKENS)
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="PROMPTS",
            min=1,
            help="Prompts of one forward and backward pass; without it as training would choose.",
            show_default=False,
        ),
    ] = None,
    settings: options.Set = None,
    as_json: Json = False,
) -> None:
    """Say what is in use and how fast it is; with a model, what training it takes of memory.

    The estimate reads the model's config.json only; no weights are loaded or fetched. --set
    reaches what it depends on, such as adapter.kind=full or objective.kind=end_to_end.
    """
    shell = Shell(as_json=as_json)
    with shell.speaking():
        estimate = None
        if recipe or model or length or batch or settings:
            named = resolve.subject(shell, recipe).recipe if recipe else None
            estimate = _estimate(named, model, length or _LENGTH_TOKENS, batch, settings)
        facts = examine()
        if estimate is not None:
            facts["memory_estimate"] = estimate
        for line in describe(facts):
            shell.say(line)
    shell.document(facts)


def _estimate(
    recipe: str | None,
    model: str | None,
    length: int,
    batch: int | None,
    settings: list[str] | None,
) -> dict[str, Any]:
    from abft_mlx import memory_estimate, runtime
    from abft_mlx import recipe as recipes
    from abft_mlx.trainer import plan

    base = model if recipe or model else "demo"
    changes = options.overrides(model=base, settings=settings)
    if batch is not None:
        tokens = batch * plan.padded_tokens(length)
        changes.append(options.override("training.micro_batch_tokens", tokens))
    chosen = recipes.resolve(options.open_recipe(recipe, changes))
    memory = runtime.memory_facts()
    limit = memory["recommended_bytes"] or memory["machine_bytes"]
    assert limit is not None
    return memory_estimate.examine(chosen, length, limit)


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
    lines += [f"advice     {text}" for text in facts["advice"]]
    estimate = facts.get("memory_estimate")
    return lines if estimate is None else [*lines, *describe_estimate(estimate)]


def describe_estimate(estimate: dict[str, Any]) -> list[str]:
    """The memory of a run as lines for a person.

    Args:
        estimate: ``memory_estimate`` of the facts.
    """

    def size(name: str) -> str:
        value = estimate[name]
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"

    kind = f"{estimate['bits']}-bit" if estimate["bits"] else estimate["number_type"]
    parts = ["weights", "adapter", "moments", "gradients", "activations"]
    parts += ["kept_hidden"] if estimate["kept_hidden_bytes"] else []
    lines = [
        f"model      {estimate['model']}: {estimate['parameters']:,} parameters in {kind}, "
        f"{estimate['trainable_parameters']:,} trained",
        f"training   about {size('training_bytes')}: "
        + ", ".join(f"{part.replace('_', ' ')} {size(part + '_bytes')}" for part in parts),
        f"           at a time {estimate['rows']} x {estimate['tokens']} tokens, "
        f"an update {estimate['micro_batches']} x that",
        f"evaluation about {size('evaluation_bytes')}: "
        f"{estimate['evaluation_rows']} x {estimate['tokens']} tokens at a time",
    ]
    verdict = "fits" if estimate["fits"] else f"does not fit; {estimate['way_out']}"
    return [*lines, f"verdict    {verdict} ({size('limit_bytes')} here)"]
