"""``abft-mlx demo``: the bundled model before and after ABFT, in less than a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli import options, words
from abft_mlx.cli.finetune import Follow
from abft_mlx.cli.progress import BoardEvents, board, size
from abft_mlx.cli.shell import Shell, alone, plain

if TYPE_CHECKING:
    from abft_mlx.induction import Heads


def demo(
    *,
    output: Path | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """Train the bundled model, and measure it before and after.

    Args:
        output (DIR): The run folder. [default: runs/demo-DATE-TIME]
        seed: training.seed: prompts, their order and lora_a. [min: 0] [default: 42]
    """
    shell = Shell(as_json=as_json, quiet=quiet)
    with shell.speaking():
        alone("demo")
        from abft_mlx import api, experiment, files, runtime, trainer
        from abft_mlx.induction import HEADS_FILE, read_heads

        runtime.use_wired_memory()
        start = time.perf_counter()
        recipe = options.open_recipe("demo", options.overrides(training_seed=seed))
        folder = output or api.default_output(recipe)
        trainer.RunFolder(folder).check(overwrite=overwrite)
        measure = words.command("eval", folder)
        with board(shell) as shown:
            events = BoardEvents(shown)
            opened = experiment.prepare(recipe, events=events)
            shown.stage("making test prompts")
            prompts = len(opened.test_prompts())
            shown.clear()
            shell.say(f"1/3 measuring the bundled model on {prompts:,} held-out prompts …")
            shown.stage("bundled model")
            before = opened.measure_all(events)
            shown.clear()
            shell.say("2/3 fine-tuning its attention …")
            with Follow(shell, shown, folder) as follow:
                result = experiment.finetune(
                    opened, folder, overwrite=overwrite, events=follow, stop=follow.stop
                )
            shown.clear()
            shell.say("3/3 measuring again …")
            shown.stage("with adapter")
            try:
                after = opened.measure_all(events)
            except KeyboardInterrupt:
                shown.clear()
                shell.tell(f"the run is whole; to measure it: {measure}")
                raise
        measured = experiment.document(opened, after, adapter=result.output, base=before)
        files.write_json(result.output / trainer.EVALUATION_FILE, plain(measured))
        peak = max(result.progress.peak_memory_bytes, runtime.peak_memory_bytes())
        document = {
            "before": before["methods"]["vanilla"],
            "after": after["methods"]["vanilla"],
            "prompts": prompts,
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak,
            "adapter_bytes": result.adapter_bytes,
            "output": str(result.output),
        }
        heads = read_heads(result.output / HEADS_FILE)
        shell.tell(*_story(document, heads))
        if not (quiet or as_json):
            from abft_mlx.cli.picture import Picture

            shell.tell("")
            shell.show(Picture(heads))
        copy = words.command("recipes", "copy", "your-data")
        shell.tell("", f"next: {measure}", f"or:   {copy}")
    shell.document(document)


def _story(document: dict[str, Any], heads: Heads) -> list[str]:
    """What changed, as lines for a person."""
    import numpy as np

    was, now = document["before"]["accuracy"], document["after"]["accuracy"]
    before, after = heads.states["before"], heads.states["after"]
    # The head that looks at labels most, before anything was trained.
    strongest = np.unravel_index(np.nanargmax(before.magnitude), before.magnitude.shape)
    layer, head = (int(index) for index in strongest)
    labels, right = (
        (getattr(before, key)[layer, head], getattr(after, key)[layer, head])
        for key in ("magnitude", "correctness")
    )
    return [
        "",
        f"  before  {_bar(was)}  {was:.1%}",
        f"  after   {_bar(now)}  {now:.1%}   {100 * (now - was):+.1f} points, "
        f"n = {document['prompts']:,}",
        "",
        f"  induction heads  {before.heads_per_prompt:.1f} in a prompt before, "
        f"{after.heads_per_prompt:.1f} after",
        f"  strongest head   layer {layer} head {head}: "
        f"{labels[0]:.0%} of its attention on labels before, {labels[1]:.0%} after;",
        "                   on right labels minus on wrong ones "
        f"{right[0]:+.0%} before, {right[1]:+.0%} after",
        f"  cost             {document['seconds']:.0f} s in all, "
        f"{size(document['peak_memory_bytes'])} at the peak",
        f"  adapter          {size(document['adapter_bytes'])} in {document['output']}",
    ]


def _bar(rate: float) -> str:
    """A rate in 0..1 as a bar."""
    filled = round(30 * rate)
    return "█" * filled + "░" * (30 - filled)
