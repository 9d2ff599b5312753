"""``abft-mlx bench``: one update of ours beside mlx-lm's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from abft_mlx.cli import options
from abft_mlx.cli.progress import Board, board
from abft_mlx.cli.shell import Shell, dump


def bench(
    *,
    size: list[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    repeats: int = 5,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Time one update of ours and of mlx-lm's LoRA.

    All start from the same random weights and prompts, and take turns in one process.

    Args:
        size (SIZE): Layers x width x vocabulary : prompts x tokens k demonstrations, such as
            12x768x32000:8x160k4; may be given several times.
            Without it 12x768x32000:8x160k4, on a CPU 4 layers.
        dtype: Type of the base's weights.
        repeats: Rounds after warm-up. [min: 1]
        output (FILE): Write the JSON here, too.
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    if output is not None:
        options.check_file(output, overwrite=overwrite)
    with shell.speaking():
        from abft_mlx import bench as benchmarks

        chosen = [benchmarks.parse(text) for text in size or []] or [benchmarks.default()]
        measured = {}
        for number, shape in enumerate(chosen, 1):
            with board(shell) as shown:
                prefix = f"size {number} of {len(chosen)}"
                measured[shape] = benchmarks.compare(
                    shape,
                    dtype=dtype,
                    repeats=repeats,
                    on_stage=partial(_stage, shown, prefix),
                    on_progress=shown.progress,
                )
            shell.show(benchmarks.table(shape, measured[shape]))
        content = benchmarks.document(measured, dtype)
        if output is not None:
            output.write_text(dump(content) + "\n", encoding="utf-8")
            shell.say(f"wrote {output}")
    shell.document(content)


def _stage(shown: Board, size: str, what: str) -> None:
    """Show what is measured now."""
    shown.stage(f"{size}, {what}", "updates")
