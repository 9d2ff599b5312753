"""Which figures a run folder can be drawn as: from its files to arrays, captions and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from abft_mlx.analysis import figures
from abft_mlx.analysis.figures.results import quantities
from abft_mlx.analysis.plots import (
    Plot,
    confusion_heights,
    joined,
    note_on_classes,
    on_axes,
    over_heads,
    unique,
)
from abft_mlx.analysis.run_data import ABFT, Evaluation, Method, RunData
from abft_mlx.induction import Example, Heads, HeadState

AFTER = "after"
# Rows of all states together that a page holds.
ROWS = 48
# Of attention: what shows less than this is noise.
LEAST_SPAN = 0.02
# One number of the census for every head: attribute, its unit, what it is.
MAPS = {
    "magnitude": ("magnitude", "magnitude (share of attention)", "attention on labels"),
    "correctness": ("correctness", "correctness (share of attention)",
                    "attention on right minus wrong labels"),
    "share": ("share", "prompts (share)", "share of prompts in which a head passes the filter"),
    "sink": ("sink", "attention (share)", "attention on the prompt's first token"),
    "head_weights": ("weight", "weight", "weights of heads in the label-attention read-out"),
}  # fmt: skip


@dataclass(frozen=True)
class Drawable:
    """One figure of a run: what to draw, or else what is missing and how to get it."""

    name: str
    plots: tuple[Plot, ...] = ()
    missing: str = ""


def run_figure_names() -> tuple[str, ...]:
    """The figures of a run."""
    return tuple(_MAKERS)


def heads_figure_names() -> tuple[str, ...]:
    """Those of them that ``heads.npz`` alone suffices for."""
    return ("label_attention", "attention", *MAPS, "detectors")


def run_plots(
    run: RunData, beside: Sequence[RunData] = (), only: Sequence[str] | None = None
) -> list[Drawable]:
    """The figures of a run, some with the states of other runs in them.

    Args:
        run: whose figures.
        beside: runs whose states go into the training curves, the attention and the shifts.
        only: names of figures; all of them by default.
    """
    first, *others = named([run, *beside])
    made = []
    for name, maker in _MAKERS.items():
        if only is None or name in only:
            found = maker(first, others)
            missing = isinstance(found, str)
            made.append(
                Drawable(name, missing=found) if missing else Drawable(name, tuple(found))  # type: ignore[arg-type]
            )
    return made


def beside_notes(run: RunData, beside: Sequence[RunData]) -> list[str]:
    """What of the runs beside a run cannot be shown with it, a line each."""
    notes = []
    for other in beside:
        if other.heads is None:
            notes.append(_no_heads(other))
        elif other.run.model.fingerprint != run.run.model.fingerprint:
            notes.append(
                f"{other.folder} was trained from another base than {run.folder}: its heads are "
                "not shown beside"
            )
        elif run.heads is not None and not (
            {example.tokens for example in run.heads.examples}
            & {example.tokens for example in other.heads.examples}
        ):
            notes.append(
                f"{other.folder}/heads.npz has none of the prompts of {run.folder}/heads.npz: its "
                "attention is not shown beside; give both the same data, seeds and prompt settings"
            )
    return notes


def named(runs: Sequence[RunData]) -> list[RunData]:
    """The same runs with names that differ: their objectives, or else their folders."""
    for choice in (
        [run.objective for run in runs],
        [run.folder.resolve().name for run in runs],
        [str(run.folder) for run in runs],
        [f"{run.folder} ({index})" for index, run in enumerate(runs, 1)],
    ):
        if len(set(choice)) == len(runs):
            break
    return [replace(run, name=name) for run, name in zip(runs, choice, strict=True)]


def training(run: RunData, others: Sequence[RunData]) -> list[Plot] | str:
    """Loss, its terms, heads, A and validation accuracy over the prompts seen."""
    if not run.updates:
        return f"{run.folder} holds no metrics.jsonl, or an empty one; finetune writes it"
    runs = [run, *(other for other in others if other.updates)]
    curves = [one.curves() for one in runs]
    size = run.recipe.training.get("prompts_per_update")
    loss = ""
    kinds = {one.objective for one in runs}
    label_losses = " and ".join(sorted(kinds - {ABFT}))
    if label_losses and ABFT in kinds:
        loss = f"the loss of {label_losses} is the cross-entropy of the label, not ABFT's"
    elif label_losses:
        loss = "the loss is the cross-entropy of the label"
    how = f"{len(run.updates)} updates" + (f" of {size} prompts" if size else "")
    draw = partial(
        figures.training_curves, seen=[one.column("seen_examples") for one in runs], curves=curves,
        names=[one.name for one in runs],
    )  # fmt: skip
    height = 0.6 + 0.75 * len(quantities(curves))
    return [Plot("training", draw, _caption(run, how, loss, runs=runs), height)]


def time_to_accuracy(run: RunData, others: Sequence[RunData]) -> list[Plot] | str:
    """Validation accuracy over the seconds spent in updates."""
    points = {}
    for one in (run, *others):
        accuracy = one.column("validation_accuracy")
        known = ~np.isnan(accuracy)
        if known.any():
            points[one.name] = (np.cumsum(one.column("seconds"))[known], accuracy[known])
    if run.name not in points:
        return (
            "no accuracy was validated while training; train with "
            "--set training.validate_every=8 --set data.validation_rows=64, or other numbers"
        )
    validation = run.run.validation
    draw = on_axes(
        figures.time_to_accuracy, seconds=[x for x, _ in points.values()],
        accuracy=[y for _, y in points.values()], names=list(points),
        untrained=validation.get("before"),
    )  # fmt: skip
    n = validation.get("prompts")
    caption = _caption(
        run,
        f"n = {n} validation prompts" if n else "",
        f"seconds on: {run.run.device}" if run.run.device else "",
        runs=[one for one in (run, *others) if one.name in points],
    )
    return [Plot("time-to-accuracy", draw, caption)]


def label_attention(run: RunData, others: Sequence[RunData]) -> list[Plot] | str:
    """Attention on labels in every layer, in each state."""
    if not _has_heads(run.heads):
        return _no_heads(run)
    states, runs = _states(run, others)
    draw = on_axes(
        figures.label_attention,
        on_labels=[over_heads(state.magnitude) for state in states.values()],
        on_gold=[over_heads(state.on_gold) for state in states.values()],
        names=list(states),
    )
    return [Plot("label-attention", draw, _heads_caption(run, "means over heads", runs))]


def attention(run: RunData, others: Sequence[RunData]) -> list[Plot] | str:
    """What heads look at from the last position, prompt by prompt."""
    if run.heads is None or not _has_heads(run.heads):
        return _no_heads(run)
    if not run.heads.examples:
        return (
            f"{run.folder}/heads.npz holds no prompt with its attention; "
            f"abft-mlx heads {run.folder} --overwrite writes it anew"
        )
    made = []
    for number, example in enumerate(run.heads.examples, 1):
        rows, runs = _rows(run, others, example)
        chosen, total = top_heads(rows, example.label_positions)
        if not chosen:
            continue
        draw = partial(
            figures.attention_maps,
            states=[np.stack([row[head] for head in chosen]) for row in rows.values()],
            tokens=example.tokens, label_positions=example.label_positions, right=example.right,
            names=[f"L{layer} H{head}" for layer, head in chosen], state_names=list(rows),
        )  # fmt: skip
        which = "all heads" if len(chosen) == total else (
            f"{len(chosen)} of {total:,} heads: those with the most attention on labels in any "
            "state"
        )  # fmt: skip
        caption = _caption(
            run, f"n = 1 prompt of {len(example.tokens)} tokens",
            f"gold label: {run.heads.labels[example.gold]}", which, "colour by the square root",
            runs=runs,
        )  # fmt: skip
        height = 1.5 + len(rows) * (0.15 + max(0.5, 0.13 * len(chosen)))
        made.append(Plot(f"attention-{number}", draw, caption, height))
    return made or _no_heads(run)


def head_maps(run: RunData, _others: Sequence[RunData], *, name: str) -> list[Plot] | str:
    """One number of the census for every head, in each state, and its change."""
    if run.heads is None or not _has_heads(run.heads):
        return _no_heads(run)
    part, label, what = MAPS[name]
    found = {state: getattr(census, part) for state, census in run.heads.states.items()}
    tables = {state: table for state, table in found.items() if table is not None}
    if not tables:
        return f"{run.folder} has no head weights: its classifier answers with the LM head"
    draw = partial(
        figures.head_maps, states=list(tables.values()), names=list(tables), label=label,
        diverging=part in ("correctness", "weight"), least=LEAST_SPAN,
    )  # fmt: skip
    caption = _heads_caption(run, what)
    return [Plot(part, draw, caption, 2.4, 1.7 * (2 * len(tables) - 1) + 0.3)]


def detectors(run: RunData, _others: Sequence[RunData]) -> list[Plot] | str:
    """The paper's notion of induction head against the classic one, in each state."""
    if run.heads is None or not _has_heads(run.heads):
        return _no_heads(run)
    made = []
    for name, state in run.heads.states.items():
        found = state.detected
        if found is not None:
            draw = on_axes(figures.detectors, magnitude=state.magnitude, induction=found.induction)
            more = (
                f"{name}; a point is a head; {found.sequences} rows of {found.repeated_tokens} "
                "repeated random tokens"
            )
            made.append(Plot(f"detectors-{name}", draw, _heads_caption(run, more)))
    return made or (
        f"{run.folder}/heads.npz holds no scores of the classic detectors; "
        f"abft-mlx heads {run.folder} --overwrite adds them"
    )


def shift(run: RunData, others: Sequence[RunData]) -> list[Plot] | str:
    """Norms of the change of W_Q and W_K in every layer."""
    norms = {}
    for one in (run, *others):
        for part in ("q", "k"):
            values = one.run.norms(part)
            if values is not None:
                norms[one.name, f"W_{part.upper()}"] = values
    runs = [one for one in (run, *others) if (one.name, "W_Q") in norms]
    if run not in runs:
        return (
            f"{run.folder}/run.json holds no shift; a finished run of this version does: train it "
            "again"
        )
    draw = on_axes(
        figures.shift, shifts=list(norms.values()), spread=[0 * one for one in norms.values()],
        names=[f"{name} {part}" if len(runs) > 1 else part for name, part in norms],
    )  # fmt: skip
    return [Plot("shift", draw, _caption(run, runs=runs))]


def confusion(run: RunData, _others: Sequence[RunData]) -> list[Plot] | str:
    """Which classes are taken for which, without and with the adapter."""
    found = {name: method.counts() for name, method in _measured(run).items()}
    counts = {name: table for name, table in found.items() if table is not None}
    if run.evaluation is None or not counts:
        return _no_evaluation(run, "accuracy")
    classes = len(next(iter(counts.values())))
    names = run.evaluation.labels
    draw = partial(
        figures.confusions, counts=list(counts.values()), state_names=list(counts),
        names=names if len(names) == classes else list(map(str, range(classes))),
    )  # fmt: skip
    caption = _evaluation_caption(run, note_on_classes(classes))
    return [Plot("confusion", draw, caption, *confusion_heights(classes, len(counts)))]


def reliability(run: RunData, _others: Sequence[RunData]) -> list[Plot] | str:
    """How often answers are right at each confidence, without and with the adapter."""
    bins = {
        name: method.reliability for name, method in _measured(run).items() if method.reliability
    }
    if not bins:
        return _no_evaluation(run, "the bins of the calibration error")
    parts = {
        key: np.array([getattr(one, key) for one in bins.values()], dtype=np.float64)
        for key in ("confidence", "accuracy", "count")
    }
    draw = partial(figures.reliability, names=list(bins), **parts)
    return [Plot("reliability", draw, _evaluation_caption(run, "10 bins of equal width"), 3.8)]


_MAKERS: dict[str, Callable[[RunData, Sequence[RunData]], list[Plot] | str]] = {
    "training": training,
    "time_to_accuracy": time_to_accuracy,
    "label_attention": label_attention,
    "attention": attention,
    **{name: partial(head_maps, name=name) for name in MAPS},
    "detectors": detectors,
    "shift": shift,
    "confusion": confusion,
    "reliability": reliability,
}


def top_heads(
    rows: Mapping[str, np.ndarray], label_positions: np.ndarray, limit: int = ROWS
) -> tuple[list[tuple[int, int]], int]:
    """Which heads to show of many: those with the most attention on labels in any state.

    Args:
        rows: for each state (L, H, T), NaN where there is no head.
        label_positions: (K,).
        limit: rows of all states together.

    Returns:
        (layer, head) in order, and how many heads there are.
    """
    mass = np.max([row[:, :, label_positions].sum(axis=2) for row in rows.values()], axis=0)
    known = np.argwhere(~np.isnan(mass))
    # The lower head where two are equal, so that the same file gives the same figure.
    order = np.argsort([-mass[layer, head] for layer, head in known], kind="stable")
    best = known[order[: max(1, limit // len(rows))]] if len(known) else known
    return sorted((int(layer), int(head)) for layer, head in best), len(known)


def _has_heads(heads: Heads | None) -> bool:
    """Whether there is a head in every state."""
    return heads is not None and all(
        not np.isnan(state.magnitude).all() for state in heads.states.values()
    )


def _no_heads(run: RunData) -> str:
    """What is missing where a run has no census."""
    if run.heads is not None:
        return f"{run.folder}/heads.npz: the model has no attention heads that could be seen"
    return f"{run.folder} holds no heads.npz; abft-mlx heads {run.folder} writes it"


def _comparable(run: RunData, others: Sequence[RunData]) -> list[tuple[RunData, Heads]]:
    """Those other runs whose heads are the same base's."""
    base = run.run.model.fingerprint
    return [
        (other, other.heads)
        for other in others
        if other.heads is not None and other.run.model.fingerprint == base
    ]


def _states(run: RunData, others: Sequence[RunData]) -> tuple[dict[str, HeadState], list[RunData]]:
    """The run's states, then those of other runs of the same base, and the runs shown."""
    assert run.heads is not None
    states = {_called(run, name, others): state for name, state in run.heads.states.items()}
    runs = [run]
    for other, heads in _comparable(run, others):
        if AFTER in heads.states:
            states[other.name] = heads.states[AFTER]
            runs.append(other)
    return states, runs


def _rows(
    run: RunData, others: Sequence[RunData], example: Example
) -> tuple[dict[str, np.ndarray], list[RunData]]:
    """Each state's rows of a prompt; of other runs where they have looked at the same prompt."""
    rows = {_called(run, name, others): row for name, row in example.rows.items()}
    runs = [run]
    for other, heads in _comparable(run, others):
        same = [one for one in heads.examples if one.tokens == example.tokens and AFTER in one.rows]
        if same:
            rows[other.name] = same[0].rows[AFTER]
            runs.append(other)
    return rows, runs


def _called(run: RunData, state: str, others: Sequence[RunData]) -> str:
    """A state's name in a figure: the run's own where other runs stand beside it."""
    return run.name if state == AFTER and others else state


def _measured(run: RunData) -> dict[str, Method]:
    """The classifier's answers, or else plain predictions, of the base and with the adapter."""
    name = _method(run)
    states = (
        {state: run.evaluation.state(state) for state in ("before", "after")}
        if run.evaluation
        else {}
    )
    return {state: methods[name] for state, methods in states.items() if name in methods}


def _method(run: RunData) -> str:
    """What the figures of answers show."""
    return "classifier" if "classifier" in (run.evaluation or Evaluation()).methods else "vanilla"


def _no_evaluation(run: RunData, what: str) -> str:
    """What is missing where nothing was measured."""
    if run.evaluation is None:
        return f"{run.folder} holds no eval.json; abft-mlx eval {run.folder} writes it"
    return (
        f"{run.folder}/eval.json does not hold {what} of plain predictions; "
        f"abft-mlx eval {run.folder} writes it anew"
    )


def _caption(run: RunData, *more: str, runs: Sequence[RunData] = ()) -> str:
    """Model, data, demonstrations, more, and the training seeds of all runs shown."""
    k = run.recipe.prompt.get("demonstrations")
    found = [one.run.seeds.get("training") for one in runs or [run]]
    seeds = unique(str(seed) for seed in found if seed is not None)
    seed = f"training seed{'' if len(seeds) == 1 else 's'} {', '.join(seeds)}"
    return joined(run.title, k and f"k = {k}", *more, seed if seeds else "")


def _heads_caption(run: RunData, more: str, runs: Sequence[RunData] = ()) -> str:
    """A caption with the prompts of the census."""
    assert run.heads is not None
    return _caption(run, f"n = {run.heads.prompts} prompts", more, runs=runs)


def _evaluation_caption(run: RunData, more: str) -> str:
    """A caption with the prompts of the evaluation."""
    n = run.evaluation.prompts if run.evaluation else None
    method = "" if _method(run) == "vanilla" else "the classifier's answers"
    return _caption(run, "" if n is None else f"n = {n:,} test prompts", method, more)
