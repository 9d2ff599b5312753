"""The figures of a run folder: from its files to arrays, captions and file names.

A function of a figure gives its plots, or else says what is missing and how to get it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from abft_mlx.analysis import figures
from abft_mlx.analysis.run_data import ABFT, ABFT_ONLY, CURVES, Method, RunData
from abft_mlx.analysis.style import Plot, on_axes

Plots = list[Plot] | str
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


def training(run: RunData) -> Plots:
    """Loss, its terms, heads, A and validation accuracy over the prompts seen."""
    if not run.updates:
        return f"{run.folder} holds no metrics.jsonl, or an empty one; finetune writes it"
    abft = run.objective == ABFT
    names = [key for key in ("seen_examples", *CURVES) if abft or key not in ABFT_ONLY]
    curves = {run.objective: {key: run.column(key) for key in names}}
    size = run.recipe.training.get("prompts_per_update")
    how = f"{len(run.updates)} updates" + (f" of {size} prompts" if size else "")
    loss = "" if abft else "the loss is the cross-entropy of the label"
    draw = partial(figures.training_curves, curves=curves)
    return [Plot("training", draw, caption(run, how, loss), figures.training_height(curves))]


def time_to_accuracy(run: RunData) -> Plots:
    """Validation accuracy over the seconds spent in updates."""
    accuracy = run.column("validation_accuracy")
    known = ~np.isnan(accuracy)
    if not known.any():
        return (
            "no accuracy was validated while training; train with "
            "--set training.validate_every=8 --set data.validation_rows=64, or other numbers"
        )
    seconds = np.cumsum(run.column("seconds"))[known]
    n, device = run.run.validation.get("prompts"), run.run.device
    draw = on_axes(
        figures.lines, series=[(run.objective, seconds, accuracy[known], None)], log_ticks=(),
        x_label="seconds in updates", level=("untrained", run.run.validation.get("before")),
    )  # fmt: skip
    more = (n and f"n = {n} validation prompts", device and f"seconds on: {device}")
    return [Plot("time-to-accuracy", draw, caption(run, *more))]


def label_attention(run: RunData) -> Plots:
    """Attention on labels in every layer, in each state."""
    if run.heads is None or no_heads(run):
        return no_heads(run)
    states = {
        name: (over_heads(state.magnitude), over_heads(state.on_gold))
        for name, state in run.heads.states.items()
    }
    draw = on_axes(figures.label_attention, states=states)
    return [Plot("label-attention", draw, _heads_caption(run, "means over heads"))]


def attention(run: RunData) -> Plots:
    """What heads look at from the last position, prompt by prompt."""
    if run.heads is None or no_heads(run):
        return no_heads(run)
    plots = []
    for number, example in enumerate(run.heads.examples, 1):
        chosen, total = top_heads(example.rows, example.label_positions)
        states = {
            name: np.stack([row[place] for place in chosen]) for name, row in example.rows.items()
        }
        draw = partial(
            figures.attention_maps, states=states, tokens=example.tokens,
            label_positions=example.label_positions, right=example.right,
            names=[f"L{layer} H{head}" for layer, head in chosen],
        )  # fmt: skip
        which = "all heads" if len(chosen) == total else (
            f"{len(chosen)} of {total:,} heads: those with the most attention on labels in any "
            "state"
        )  # fmt: skip
        text = caption(
            run, f"n = 1 prompt of {len(example.tokens)} tokens",
            f"gold label: {run.heads.labels[example.gold]}", which, "colour by the square root",
        )  # fmt: skip
        height = 1.5 + len(states) * (0.15 + max(0.5, 0.13 * len(chosen)))
        plots.append(Plot(f"attention-{number}", draw, text, height))
    return plots or (
        f"{run.folder}/heads.npz holds no prompt with its attention; "
        f"abft-mlx heads {run.folder} --overwrite writes it anew"
    )


def head_maps(run: RunData, name: str) -> Plots:
    """One number of the census for every head, in each state, and its change."""
    if run.heads is None or no_heads(run):
        return no_heads(run)
    part, label, what = MAPS[name]
    tables = {state: getattr(census, part) for state, census in run.heads.states.items()}
    states = {state: table for state, table in tables.items() if table is not None}
    if not states:
        return f"{run.folder} has no head weights: its classifier answers with the LM head"
    draw = partial(
        figures.head_maps, states=states, label=label,
        diverging=part in ("correctness", "weight"), least=LEAST_SPAN,
    )  # fmt: skip
    return [Plot(part, draw, _heads_caption(run, what), 2.4)]


def detectors(run: RunData) -> Plots:
    """The paper's notion of induction head against the classic one, in each state."""
    if run.heads is None or no_heads(run):
        return no_heads(run)
    plots = []
    for name, state in run.heads.states.items():
        scores = state.detected
        if scores is not None:
            draw = on_axes(figures.detectors, magnitude=state.magnitude, induction=scores.induction)
            more = (
                f"{name}; a point is a head; {scores.sequences} rows of {scores.repeated_tokens} "
                "repeated random tokens"
            )
            plots.append(Plot(f"detectors-{name}", draw, _heads_caption(run, more)))
    return plots or (
        f"{run.folder}/heads.npz holds no scores of the classic detectors; "
        f"abft-mlx heads {run.folder} --overwrite adds them"
    )


def shift(run: RunData) -> Plots:
    """Norms of the change of W_Q and W_K in every layer."""
    if not run.run.shift:
        return f"{run.folder}/run.json holds no shift; train it again with this version"
    norms = {
        f"W_{part.upper()}": (np.array(run.run.shift[part], dtype=np.float64), None)
        for part in ("q", "k")
        if run.run.shift.get(part)
    }
    return [Plot("shift", on_axes(figures.shift, norms=norms), caption(run))]


def confusion(run: RunData) -> Plots:
    """Which classes are taken for which, without and with the adapter."""
    states = {
        state: np.array(method.confusion)
        for state, method in _answers(run).items()
        if method.confusion
    }
    if not states:
        return _no_evaluation(run)
    classes, names = len(next(iter(states.values()))), run.evaluation.labels
    if len(names) != classes:
        names = [str(n) for n in range(classes)]
    some = f"{classes} classes, some of them named" * (classes > figures.NUMBERED_CLASSES)
    draw = partial(figures.confusions, states=states, names=names)
    height = min(4.5, max(2.3, 0.17 * classes + 0.6))
    return [Plot("confusion", draw, _evaluation_caption(run, some), height)]


def reliability(run: RunData) -> Plots:
    """How often answers are right at each confidence, without and with the adapter."""
    states = {
        state: method.reliability.arrays()
        for state, method in _answers(run).items()
        if method.reliability
    }
    if not states:
        return _no_evaluation(run)
    draw = partial(figures.reliability, states=states)
    return [Plot("reliability", draw, _evaluation_caption(run, "10 bins of equal width"), 3.8)]


RUN_FIGURES: dict[str, Callable[[RunData], Plots]] = {
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
# Those of them that heads.npz alone suffices for.
HEADS_FIGURES = ("label_attention", "attention", *MAPS, "detectors")


def top_heads(
    rows: Mapping[str, np.ndarray], label_positions: np.ndarray, limit: int = ROWS
) -> tuple[list[tuple[int, int]], int]:
    """Which heads to show, (layer, head) in order, and how many heads there are.

    Those with the most attention on labels in any state. ``rows`` has (L, H, T) for each state, NaN
    where there is no head; ``limit`` counts the rows of all states together.
    """
    mass = np.max([row[:, :, label_positions].sum(axis=2) for row in rows.values()], axis=0)
    known = ~np.isnan(mass)
    # NaN is sorted last, and the lower head is first where two are equal.
    order = np.argsort(-mass, axis=None, kind="stable")[: max(1, limit // len(rows))]
    places = [divmod(int(place), mass.shape[1]) for place in order]
    return sorted(place for place in places if known[place]), int(known.sum())


def over_heads(table: np.ndarray) -> np.ndarray:
    """(L,) means of (L, H) over the heads that are there; NaN for a layer without heads."""
    known = (~np.isnan(table)).sum(axis=1)
    return np.nansum(table, axis=1) / np.where(known, known, np.nan)


def no_heads(run: RunData) -> str:
    """What is missing where a run has no census, or a state without any head; else empty."""
    if run.heads is None:
        return f"{run.folder} holds no heads.npz; abft-mlx heads {run.folder} writes it"
    if any(np.isnan(state.magnitude).all() for state in run.heads.states.values()):
        return f"{run.folder}/heads.npz: the model has no attention heads that could be seen"
    return ""


def _method(run: RunData) -> str:
    """Whose answers figures show: the classifier's, or else plain predictions."""
    return "classifier" if "classifier" in run.evaluation.methods else "vanilla"


def _answers(run: RunData) -> dict[str, Method]:
    """How the base and the adapter answered."""
    states = {state: run.evaluation.state(state) for state in ("before", "after")}
    name = _method(run)
    return {state: methods[name] for state, methods in states.items() if name in methods}


def _no_evaluation(run: RunData) -> str:
    """What is missing where nothing was measured."""
    return f"{run.folder} holds no eval.json with answers; abft-mlx eval {run.folder} writes it"


def caption(run: RunData, *more: str | None) -> str:
    """Model, data, demonstrations, more, and the training seed."""
    k, seed = run.recipe.prompt.get("demonstrations"), run.run.seeds.get("training")
    parts = [run.title, k and f"k = {k}", *more, None if seed is None else f"training seed {seed}"]
    return "; ".join(part for part in parts if part)


def _heads_caption(run: RunData, more: str) -> str:
    """A caption with the prompts of the census."""
    return caption(run, f"n = {run.heads.prompts} prompts" if run.heads else "", more)


def _evaluation_caption(run: RunData, more: str) -> str:
    """A caption with the prompts of the evaluation."""
    n = run.evaluation.prompts
    method = "the classifier's answers" if _method(run) == "classifier" else ""
    return caption(run, None if n is None else f"n = {n:,} test prompts", method, more)
