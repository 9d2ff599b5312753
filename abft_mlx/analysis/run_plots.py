"""Which figures a run folder can be drawn as: from its files to arrays, captions and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from abft_mlx.analysis import run_heads
from abft_mlx.analysis.figures import (
    confusions,
    reliability,
    shift,
    time_to_accuracy,
    training_curves,
)
from abft_mlx.analysis.plotting import Plot, caption_line
from abft_mlx.analysis.run_facts import ABFT, Method, RunFacts
from abft_mlx.documents import section


@dataclass(frozen=True)
class Drawable:
    """What became of one figure that was asked for.

    Attributes:
        name: of the figure.
        plots: what to draw; empty where something is missing.
        missing: what, and how to get it; empty where nothing is.
    """

    name: str
    plots: tuple[Plot, ...] = ()
    missing: str = ""


_Maker = Callable[[RunFacts, Sequence[RunFacts]], "list[Plot] | str"]


def run_figure_names() -> tuple[str, ...]:
    """The figures of a run."""
    return tuple(_makers())


def run_plots(
    run: RunFacts, beside: Sequence[RunFacts] = (), only: Sequence[str] | None = None
) -> list[Drawable]:
    """The figures of a run, some with the states of other runs in them.

    Args:
        run: whose figures.
        beside: runs whose states go into the training curves, the attention and the shifts.
        only: names of figures; all of them by default.
    """
    first, *others = named([run, *beside])
    made = []
    for name, maker in _makers().items():
        if only is None or name in only:
            found = maker(first, others)
            if isinstance(found, str):
                made.append(Drawable(name, missing=found))
            else:
                made.append(Drawable(name, tuple(found)))
    return made


def heads_figure_names() -> tuple[str, ...]:
    """Those of them that ``heads.npz`` alone suffices for."""
    return ("label_attention", "attention", *run_heads.PARTS, "detectors")


def beside_notes(run: RunFacts, beside: Sequence[RunFacts]) -> list[str]:
    """What of the runs beside a run cannot be shown with it, a line each."""
    notes = []
    for one in beside:
        if one.heads is None:
            notes.append(run_heads.no_heads(one))
        elif one.fingerprint != run.fingerprint:
            notes.append(
                f"{one.folder} was trained from another base than {run.folder}: its heads are not "
                "shown beside"
            )
        elif run.heads is not None and not run_heads.same_prompts(run, one):
            notes.append(
                f"{one.folder}/heads.npz has none of the prompts of {run.folder}/heads.npz: its "
                "attention is not shown beside; give both the same data, seeds and prompt settings"
            )
    return notes


def named(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """The same runs with names that differ: their objectives, or else their folders."""
    names = [one.objective for one in runs]
    if len(set(names)) < len(names):
        names = [one.folder.resolve().name for one in runs]
    if len(set(names)) < len(names):
        names = [str(one.folder) for one in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({index})" for index, name in enumerate(names, 1)]
    return [replace(one, name=name) for one, name in zip(runs, names, strict=True)]


def _makers() -> dict[str, _Maker]:
    return {
        "training": training,
        "time_to_accuracy": validation_over_time,
        "label_attention": run_heads.label_attention_lines,
        "attention": run_heads.attention_by_prompt,
        "magnitude": partial(run_heads.maps, part="magnitude"),
        "correctness": partial(run_heads.maps, part="correctness"),
        "share": partial(run_heads.maps, part="share"),
        "sink": partial(run_heads.maps, part="sink"),
        "head_weights": partial(run_heads.maps, part="weight"),
        "detectors": run_heads.detector_points,
        "shift": shifts,
        "confusion": confusion_matrices,
        "reliability": reliability_diagram,
    }


def training(run: RunFacts, others: Sequence[RunFacts]) -> list[Plot] | str:
    """Loss, its terms, heads, A and validation accuracy over the prompts seen."""
    if not len(run.seen):
        return f"{run.folder} holds no metrics.jsonl, or an empty one; finetune writes it"
    runs = [run, *(one for one in others if len(one.seen))]
    curves = [one.curves for one in runs]
    per_update = section(run.recipe, "training").get("prompts_per_update")
    how = f"{len(run.seen)} updates" + (f" of {per_update} prompts" if per_update else "")
    more = [how]
    kinds = {one.objective for one in runs}
    label_losses = sorted(kinds - {ABFT})
    if label_losses:
        mixed = ABFT in kinds
        of = f"of {' and '.join(label_losses)} " if mixed else ""
        rest = ", not ABFT's" if mixed else ""
        more.append(f"the loss {of}is the cross-entropy of the label{rest}")
    draw = partial(
        training_curves.draw,
        seen=[one.seen for one in runs],
        curves=curves,
        names=[one.name for one in runs],
    )
    return [
        Plot(
            "training", draw, caption_line(run, *more, runs=runs),
            lambda _across: training_curves.height(curves),
        )
    ]  # fmt: skip


def validation_over_time(run: RunFacts, others: Sequence[RunFacts]) -> list[Plot] | str:
    """Validation accuracy over the seconds spent in updates."""
    runs = [one for one in (run, *others) if _validated(one).any()]
    if run not in runs:
        return (
            "no accuracy was validated while training; train with "
            "--set training.validate_every=8 --set data.validation_rows=64, or other numbers"
        )
    validation = section(run.run, "validation")
    before = validation.get("before")
    draw = partial(
        time_to_accuracy.draw,
        seconds=[one.seconds[_validated(one)] for one in runs],
        accuracy=[one.curves["validation_accuracy"][_validated(one)] for one in runs],
        names=[one.name for one in runs],
        untrained=before if isinstance(before, float) else None,
    )
    n = validation.get("prompts")
    more = [f"n = {n} validation prompts"] if n else []
    device = run.run.get("device")
    more += [f"seconds on: {device}"] if device else []
    return [Plot("time-to-accuracy", draw, caption_line(run, *more, runs=runs))]


def _validated(run: RunFacts) -> np.ndarray:
    """(U,) updates that a validation followed."""
    return ~np.isnan(run.curves["validation_accuracy"])


def shifts(run: RunFacts, others: Sequence[RunFacts]) -> list[Plot] | str:
    """Norms of the change of W_Q and W_K in every layer."""
    runs = [one for one in (run, *others) if one.shift]
    if run not in runs:
        return (
            f"{run.folder}/run.json holds no shift; a finished run of this version does: train it "
            "again"
        )
    names, norms = [], []
    for one in runs:
        for part, values in one.shift.items():
            names.append((f"{one.name} " if len(runs) > 1 else "") + f"W_{part.upper()}")
            norms.append(values)
    draw = partial(
        shift.draw, shifts=norms, spread=[np.zeros(len(one)) for one in norms], names=names
    )
    return [Plot("shift", draw, caption_line(run, runs=runs))]


def confusion_matrices(run: RunFacts, _others: Sequence[RunFacts]) -> list[Plot] | str:
    """Which classes are taken for which, without and with the adapter."""
    found = {name: one.confusion for name, one in _measured(run).items()}
    counts = {name: one for name, one in found.items() if one is not None}
    if not counts:
        return _no_evaluation(run)
    classes = len(next(iter(counts.values())))
    given = (run.evaluation or {}).get("labels")
    names = [str(one) for one in given] if isinstance(given, list) else []
    if len(names) != classes:
        names = [str(n) for n in range(classes)]
    draw = partial(
        confusions.draw,
        counts=list(counts.values()),
        names=names,
        state_names=list(counts),
    )
    return [
        Plot(
            "confusion", draw, _evaluation_caption(run, *confusions.told(classes)),
            lambda across: confusions.height(classes, len(counts), across),
        )
    ]  # fmt: skip


def reliability_diagram(run: RunFacts, _others: Sequence[RunFacts]) -> list[Plot] | str:
    """How often answers are right at each confidence, without and with the adapter."""
    found = {name: one for name, one in _measured(run).items() if one.count is not None}
    if not found:
        return _no_evaluation(run, "the bins of the calibration error")
    draw = partial(
        reliability.draw,
        confidence=np.stack([_known(one.confidence) for one in found.values()]),
        accuracy=np.stack([_known(one.accuracy) for one in found.values()]),
        count=np.stack([_known(one.count) for one in found.values()]),
        names=list(found),
    )
    return [Plot("reliability", draw, _evaluation_caption(run, "10 bins of equal width"))]


def _measured(run: RunFacts) -> dict[str, Method]:
    states = {name: run.method(name) for name in ("before", "after")}
    return {name: one for name, one in states.items() if one is not None}


def _known(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values


def _no_evaluation(run: RunFacts, what: str = "accuracy") -> str:
    if run.evaluation is None:
        return f"{run.folder} holds no eval.json; abft-mlx eval --adapter {run.folder} writes it"
    return (
        f"{run.folder}/eval.json does not hold {what} of plain predictions; "
        f"abft-mlx eval --adapter {run.folder} writes it anew"
    )


def _evaluation_caption(run: RunFacts, *more: str) -> str:
    n = (run.evaluation or {}).get("prompts")
    return caption_line(run, *([f"n = {n:,} test prompts"] if isinstance(n, int) else []), *more)
