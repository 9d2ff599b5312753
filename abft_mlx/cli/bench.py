"""``abft-mlx bench``: one update of ours beside what a user could pick instead."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from abft_mlx.cli import options, progress
from abft_mlx.cli.options import Json, Overwrite, Quiet
from abft_mlx.cli.shell import Shell, dump


class Dtype(str, Enum):
    """Types of the base's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Leave out mlx-lm-qk.",
        ),
    ] = False,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help="Layers x width x vocabulary : prompts x tokens k demonstrations, such as "
            "12x768x32000:8x160k4; may be given several times.",
            show_default="12x768x32000:8x160k4; on a CPU 4 layers",
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave a contender out.", show_default=False),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the base's weights.")] = Dtype.float32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds after warm-up.")] = 5,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the JSON here, too.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure one update side by side: ours, mlx-lm's, the paper's way in PyTorch, the limit.

    All start from the same random weights and prompts, and take turns in one process.
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    # Minutes of measuring must not end in a folder that is not there.
    if output is not None:
        options.check_file(output, overwrite=overwrite)
    with shell.speaking():
        from abft_mlx.bench import measure, sizes

        chosen = [sizes.parse(one) for one in size or []] or [sizes.default()]
        skipped = [*(without or []), *(measure.QUICK_WITHOUT if quick else [])]
        names = measure.names_without(skipped)
        found = {}
        for number, one in enumerate(chosen, 1):
            with progress.board(shell) as board:
                found[one] = measure.compare(
                    one,
                    names,
                    dtype=dtype.value,
                    repeats=repeats,
                    on_stage=_telling(board, f"size {number} of {len(chosen)}"),
                    on_progress=board.count,
                )
            shell.show(measure.table(one, found[one]))
        content = measure.document(found, dtype.value)
        if output is not None:
            output.write_text(dump(content) + "\n", encoding="utf-8")
            shell.say(f"wrote {output}")
    shell.document(content)


def _telling(board: progress.Board, which: str) -> Callable[[str], None]:
    return lambda what: board.stage(f"{which}, {what}", "updates")
