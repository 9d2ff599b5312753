"""``abft-mlx demo``: the bundled model before and after ABFT, in less than a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abft_mlx.cli import _options, _progress, _ranks, _words
from abft_mlx.cli._events import BoardEvents
from abft_mlx.cli._finetune import Follow
from abft_mlx.cli._options import Json, Overwrite, Quiet
from abft_mlx.cli._shell import Shell, plain

if TYPE_CHECKING:
    from abft_mlx.experiment import Experiment, RunResult
    from abft_mlx.induction import Heads, HeadState


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder.",
            show_default="runs/demo-DATE-TIME",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="training.seed: prompts, their order and lora_a.",
            show_default="42",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure the bundled model, fine-tune its attention, measure again."""
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        document, heads = _run(shell, _options.overrides(training=seed), output, overwrite)
        for line in _story(document, heads.states["before"], heads.states["after"]):
            shell.tell(line)
        if not (quiet or as_json):
            from abft_mlx.cli._picture import Picture

            shell.tell("")
            shell.show(Picture(heads))
        for line in _next(document["output"]):
            shell.tell(line)
    shell.document(document)


def _run(
    shell: Shell, changes: list[str], output: Path | None, overwrite: bool
) -> tuple[dict[str, Any], Heads]:
    _ranks.alone("demo")
    from abft_mlx import api, experiment, files, runtime, trainer
    from abft_mlx.induction import HEADS_FILE, read_heads

    runtime.use_wired_memory()
    start = time.perf_counter()
    recipe = _options.open_recipe("demo", changes)
    folder = output or api.default_output(recipe)
    trainer.RunFolder(folder).check(overwrite=overwrite)
    with _progress.board(shell) as board:
        events = BoardEvents(board)
        opened = experiment.prepare(recipe, events=events)
        board.stage("making test prompts")
        chosen = opened.test_prompts()
        board.clear()
        shell.say(f"1/3 measuring the bundled model on {len(chosen):,} held-out prompts …")
        board.stage("bundled model")
        before = opened.measure_all(events)
        board.clear()
        shell.say("2/3 fine-tuning its attention …")
        result = _train(shell, board, opened, folder, overwrite)
        board.clear()
        shell.say("3/3 measuring again …")
        board.stage("with adapter")
        try:
            after = opened.measure_all(events)
        except KeyboardInterrupt:
            board.clear()
            shell.tell(f"the run is whole; to measure it: {_measure(folder)}")
            raise
    measured = experiment.document(opened, after, adapter=result.output, base=before)
    files.write_json(result.output / trainer.EVALUATION_FILE, plain(measured))
    document = {
        "before": before["methods"]["vanilla"],
        "after": after["methods"]["vanilla"],
        "prompts": len(chosen),
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": max(result.progress.peak_memory_bytes, runtime.peak_memory_bytes()),
        "adapter_bytes": result.adapter_bytes,
        "output": str(result.output),
    }
    return document, read_heads(result.output / HEADS_FILE)


def _train(
    shell: Shell, board: _progress.Board, opened: Experiment, folder: Path, overwrite: bool
) -> RunResult:
    """Fine-tune; a signal ends it after the update that goes on, as it ends ``finetune``."""
    from abft_mlx import experiment, trainer

    with (
        trainer.Stop(board.note).watching() as stop,
        Follow(shell, board, folder) as follow,
    ):
        try:
            return experiment.finetune(
                opened, folder, overwrite=overwrite, events=follow, stop=stop
            )
        except KeyboardInterrupt:
            board.clear()
            if follow.begun:
                shell.tell(f"to go on: {_words.command('finetune', '--resume', folder)}")
            raise


def _measure(output: str | Path) -> str:
    return _words.command("eval", "--adapter", output)


def _story(document: dict[str, Any], before: HeadState, after: HeadState) -> list[str]:
    import numpy as np

    was, now = document["before"]["accuracy"], document["after"]["accuracy"]
    # The head that looks at labels most, before anything was trained.
    strongest = np.unravel_index(np.nanargmax(before.magnitude), before.magnitude.shape)
    layer, head = (int(index) for index in strongest)
    return [
        "",
        f"  before  {_words.bar(was)}  {was:.1%}",
        f"  after   {_words.bar(now)}  {now:.1%}   {100 * (now - was):+.1f} points, "
        f"n = {document['prompts']:,}",
        "",
        f"  induction heads  {before.heads_per_prompt:.1f} in a prompt before, "
        f"{after.heads_per_prompt:.1f} after",
        f"  strongest head   layer {layer} head {head}: "
        f"{before.magnitude[layer, head]:.0%} of its attention on labels before, "
        f"{after.magnitude[layer, head]:.0%} after;",
        f"                   on right labels minus on wrong ones "
        f"{before.correctness[layer, head]:+.0%} before, "
        f"{after.correctness[layer, head]:+.0%} after",
        f"  cost             {document['seconds']:.0f} s in all, "
        f"{_progress.size(document['peak_memory_bytes'])} at the peak",
        f"  adapter          {_progress.size(document['adapter_bytes'])} in {document['output']}",
    ]


def _next(output: str) -> list[str]:
    return [
        "",
        f"next: {_measure(output)}",
        f"or:   {_words.command('recipes', 'copy', 'your-data')}",
    ]
