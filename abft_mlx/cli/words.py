"""Lines, bars and tables about what was prepared and measured."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abft_mlx.cli.shell import table

if TYPE_CHECKING:
    from rich.table import Table

    from abft_mlx.experiment import Experiment

PROGRAM = "abft-mlx"
_CLASSES_SHOWN = 12
# Of eval's table of thresholds, where at least so many texts are answered.
_THRESHOLDS_SHOWN = (0.7, 0.9)
_LEAST_COVERAGE = 0.1
_MEASURES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "expected_calibration_error": "ECE",
    "true_label_probability": "true-label probability",
}


def plan(experiment: Experiment, trainable: int | None, output: object = None) -> list[str]:
    """What a run will work on, as lines for a person.

    Args:
        experiment: opened and checked.
        trainable: numbers that will be trained, if any.
        output: the run folder, if any.
    """
    recipe = experiment.recipe
    texts = experiment.task.texts
    counts = texts.class_counts()
    rows = experiment.task.splits.rows
    parts = [
        f"{len(some):,} for {name}"
        for name, some in rows.items()
        if some and not (name == "demonstrations" and some == rows["training"])
    ]
    lines = [
        f"model     {recipe.model}" + (f" at {recipe.revision}" if recipe.revision else ""),
        f"data      {texts.source}: {len(texts):,} texts: {', '.join(parts)}",
        "labels    " + _labels(counts, experiment.task.space.words),
    ]
    lines += [f"warning   {text}" for text in warnings(experiment)]
    if trainable is not None:
        adapter, training = recipe.adapter, recipe.training
        what = f"LoRA of rank {adapter.rank} on" if adapter.kind == "lora" else "the whole of"
        what += " W_Q and W_K" + (", and the LM head" if adapter.head else "")
        chat = " in chat turns" if recipe.prompt.chat else ""
        shared = f", shared by {training.together} prompts" if training.together > 1 else ""
        how = {"end_to_end": ", end to end", "read_out": ", label-attention read-out"}.get(
            recipe.objective.kind, ""
        )
        if experiment.mixture:
            how += f", on {', '.join(task.name for task in experiment.mixture)}"
        if training.updates:
            lines.append(
                f"training  {trainable:,} parameters, {what}: {training.updates} updates "
                f"of {training.prompts_per_update} prompts with {recipe.prompt.demonstrations} "
                f"demonstrations{chat}{shared}{how}"
            )
            lines.append(f"layers    {_layers(experiment)}")
        else:
            lines.append("training  none: only head weights are fitted, to the model as it is")
    if experiment.task.builder.shortened:
        lines.append(
            f"warning   {experiment.task.builder.shortened:,} texts shortened to "
            f"{recipe.prompt.max_text_tokens} tokens (prompt.max_text_tokens)"
        )
    if output is not None:
        lines.append(f"output    {output}")
    return lines


def _layers(experiment: Experiment) -> str:
    """Which layers train, and why."""
    chosen, found = experiment.recipe.adapter.layers, experiment.window
    if found is not None and not found.heads:
        return f"all train: no induction head was seen in {found.prompts} training prompts"
    if found is not None:
        total = sum(one is not None for one in found.heads_by_layer)
        return (
            f"{_numbers(found.layers)} of {total} train: they hold "
            f"{found.heads_inside / found.heads:.0%} of the {found.heads:.1f} induction heads in a "
            f"prompt, seen in {found.prompts} training prompts"
        )
    if isinstance(chosen, list):
        return f"{_numbers(chosen)} train, as adapter.layers says"
    return "all train, as adapter.layers says (auto chooses those with induction heads)"


def _numbers(layers: Sequence[int]) -> str:
    """Layer numbers in order, runs of three or more as first to last."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def warnings(experiment: Experiment) -> list[str]:
    """What is odd about the data, one line each."""
    return [*experiment.task.texts.warnings, *experiment.task.splits.warnings]


def _labels(counts: Mapping[str, int], words: Sequence[str]) -> str:
    named = []
    for (name, count), word in zip(counts.items(), words, strict=True):
        as_word = "" if word.strip() == name else f", in prompts {word.strip()!r}"
        named.append(f"{name} ({count:,}{as_word})")
    more = len(named) - _CLASSES_SHOWN
    return ", ".join(named[:_CLASSES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def bar(rate: float, width: int = 30) -> str:
    """A rate in 0..1 as a bar."""
    filled = round(max(0.0, min(rate, 1.0)) * width)
    return "█" * filled + "░" * (width - filled)


def measures(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each measured model.

    Args:
        rows: a model's name -> one method of eval's JSON.
    """
    headings = list(_MEASURES.values())
    with_interval = any("interval" in method for method in rows.values())
    if with_interval:
        headings.insert(1, "95% interval")
    shown = table("", *headings)
    for name, method in rows.items():
        cells = [f"{method[key]:.1%}" for key in _MEASURES]
        if with_interval:
            low, high = method.get("interval", {}).get("accuracy", (None, None))
            cells.insert(1, "" if low is None else f"{low:.1%}–{high:.1%}")
        shown.add_row(name, *cells)
    return shown


def verdict(document: Mapping[str, Any]) -> list[str]:
    """What a classifier is worth, as lines for a person.

    Args:
        document: eval's JSON with a verdict.
    """
    verdict = document["verdict"]
    low, high = verdict["interval"] or (None, None)
    rows = [
        (
            "with the adapter" if "before" in verdict else "prompting",
            verdict["accuracy"],
            "" if low is None else f"95% interval {low:.1%} to {high:.1%}",
        )
    ]
    if "before" in verdict:
        rows.append(("prompting", verdict["before"], "the same demonstrations, no adapter"))
    if "bag_of_words" in verdict:
        common = document["baselines"]["majority"]["label"]
        rows.append(("bag of words", verdict["bag_of_words"], "logistic regression, no model"))
        rows.append((f"always {common!r}", verdict["majority"], ""))
    width = max(len(name) for name, _, _ in rows)
    # Of other texts than a run's own nobody knows.
    unseen = " that were not trained on" if "bag_of_words" in verdict else ""
    lines = [f"accuracy on {verdict['n']:,} test texts{unseen}:"]
    lines += [f"  {name:<{width}}  {rate:6.1%}  {note}".rstrip() for name, rate, note in rows]
    known = {name: rate for name, rate in verdict["recall"].items() if rate is not None}
    worst = sorted(known, key=known.__getitem__)[:_CLASSES_SHOWN]
    kinds = "recall of each class" if len(worst) == len(known) else "recall of the worst classes"
    lines.append(f"{kinds}: " + ", ".join(f"{name} {known[name]:.0%}" for name in worst))
    useful = [
        f"{level['threshold']:g} answers {level['coverage']:.0%} of the texts, "
        f"{level['accuracy']:.1%} of them rightly"
        for level in document.get("probabilities", {}).get("coverage", [])
        if level["threshold"] in _THRESHOLDS_SHOWN
        and level["coverage"] >= _LEAST_COVERAGE
        and level["accuracy"] > verdict["accuracy"]
    ]
    if useful:
        lines.append(f"predict --threshold {'; '.join(useful)}")
    lines.append(verdict["sentence"])
    # Without an adapter the command line says which command is next.
    return [*lines, f"next: {verdict['next']}"] if "before" in verdict else lines


def confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Table | None:
    """Gold labels down, predicted labels across; None where there are too many to read.

    Args:
        names: the labels.
        counts: (C, C) prompts.
    """
    if len(names) > _CLASSES_SHOWN:
        return None
    rows = table("gold \\ predicted", *names)
    for name, row in zip(names, counts, strict=True):
        rows.add_row(name, *(f"{count:,}" for count in row))
    return rows


def command(*words: object) -> str:
    """A command to copy: its words quoted for a shell, the program as this shell finds it."""
    return shlex.join([_program(), *map(str, words)])


def _program() -> str:
    """``abft-mlx``, or the path that it was started by where PATH does not lead to it."""
    started = Path(sys.argv[0])
    if started.name != PROGRAM or shutil.which(PROGRAM):
        return PROGRAM
    here = Path.cwd()
    return str(started.relative_to(here) if started.is_relative_to(here) else started)
