"""Accuracy before and after ABFT: models x tasks x seeds, one JSON file a cell, one table.

    python benchmarks/accuracy_table.py --output runs/table --tasks intent emotion --seeds 0 1 2
    python benchmarks/accuracy_table.py --output runs/real --data ../shared/data --tasks trec sst2

A task is a generated one, or a recipe that ships with the package, read from ``--data``. Cells
that lie in the output folder are not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from abft_mlx import experiment, recipe
from abft_mlx.data.generated import TASKS

# The paper's way, unless --set says otherwise: every prompt has its own demonstrations.
ALONE = "training.shared_demonstrations=1"


def changes(task: str, model: str, seed: int, data: Path | None) -> tuple[str, list[str]]:
    """The recipe of a task, and what to change in it."""
    common = [f"model={json.dumps(model)}", f"training.seed={seed}"]
    if task in TASKS:
        one = TASKS[task]
        return "demo", [
            *common,
            f"data.source={task}",
            f"prompt.input_prefix={json.dumps(one.input_prefix)}",
            f"prompt.label_prefix={json.dumps(one.label_prefix)}",
        ]
    if data is None:
        raise SystemExit(f"{task} is no generated task; give the folder of its texts with --data")
    source = json.dumps(str(data / f"{task}.jsonl"))
    return task, [*common, f"data.source={source}", "data.text=text", "data.label=label"]


def cell(task: str, model: str, seed: int, data: Path | None, settings: list[str]) -> dict:
    """Measure, fine-tune, measure again."""
    name, overrides = changes(task, model, seed, data)
    opened = experiment.prepare(recipe.load(name, [ALONE, *overrides, *settings]))
    prompts = opened.test_prompts()
    before = opened.measure(prompts)
    heads_before = opened.census(prompts[:128]).heads_per_prompt
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = experiment.train(opened, Path(folder) / "run")
        seconds = time.perf_counter() - start
    return {
        "task": task,
        "model": model,
        "seed": seed,
        "labels": len(opened.space.names),
        "prompts": len(prompts),
        "vanilla": before,
        "abft": opened.measure(prompts),
        "heads_before": heads_before,
        "heads_after": opened.census(prompts[:128]).heads_per_prompt,
        "seconds": seconds,
        "peak_memory_bytes": result.progress.peak_memory_bytes,
        "trainable_parameters": result.trainable_parameters,
        "recipe": recipe.dumps(opened.recipe),
    }


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation where there are several, in percent."""
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown, one line for each model and task."""
    lines = [
        "| model | task | classes | n | vanilla | ABFT | gain | heads | seconds | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, task in dict.fromkeys((one["model"], one["task"]) for one in cells):
        some = [one for one in cells if (one["model"], one["task"]) == (model, task)]
        before = [one["vanilla"]["accuracy"] for one in some]
        after = [one["abft"]["accuracy"] for one in some]
        gain = 100 * (statistics.mean(after) - statistics.mean(before))
        heads = [
            statistics.mean(one[f"heads_{when}"] for one in some) for when in ("before", "after")
        ]
        lines.append(
            f"| {Path(model).name} | {task} | {some[0]['labels']} | {some[0]['prompts']} "
            f"| {100 * statistics.mean(before):.1f} | {spread(after)} | {gain:+.1f} "
            f"| {heads[0]:.1f} → {heads[1]:.1f} "
            f"| {statistics.mean(one['seconds'] for one in some):.1f} "
            f"| {max(one['peak_memory_bytes'] for one in some) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the grid, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--tasks", nargs="+", default=[n for n, t in TASKS.items() if t.held_out])
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="folder of TASK.jsonl files")
    parser.add_argument("--set", nargs="+", default=[], help="section.key=value for every cell")
    chosen = parser.parse_args()
    chosen.output.mkdir(parents=True, exist_ok=True)
    cells = []
    for model in chosen.models:
        for task in chosen.tasks:
            for seed in chosen.seeds:
                path = chosen.output / f"{Path(model).name}-{task}-{seed}.json"
                if not path.is_file():
                    done = cell(task, model, seed, chosen.data, chosen.set)
                    path.write_text(json.dumps(done, indent=1) + "\n")
                cells.append(json.loads(path.read_text()))
                one = cells[-1]
                print(
                    f"{path.stem}: {one['vanilla']['accuracy']:.3f} "
                    f"-> {one['abft']['accuracy']:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    text = table(cells)
    (chosen.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
