"""Figures of a run's heads, out of its ``heads.npz``: attention by layer, head and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from abft_mlx.analysis.figures import attention_maps, detectors, head_maps, label_attention
from abft_mlx.analysis.plotting import Plot, caption_line
from abft_mlx.analysis.run_facts import RunFacts
from abft_mlx.induction import Example, Heads, HeadState

BEFORE, AFTER = "before", "after"
# Rows of all states together that a page holds.
ROWS = 48
# Of attention: what shows less than this is noise.
LEAST_SPAN = 0.02
PARTS = {
    "magnitude": ("magnitude (share of attention)", "attention on labels"),
    "correctness": ("correctness (share of attention)", "attention on right minus wrong labels"),
    "share": ("prompts (share)", "share of prompts in which a head passes the filter"),
    "sink": ("attention (share)", "attention on the prompt's first token"),
    "weight": ("weight", "weights of heads in the label-attention read-out"),
}


def label_attention_lines(run: RunFacts, others: Sequence[RunFacts]) -> list[Plot] | str:
    """Attention on labels in every layer, in each state."""
    if run.heads is None or not has_heads(run.heads):
        return no_heads(run)
    states, runs = _states(run, others)
    on_labels = [over_heads(one.magnitude) for one in states.values()]
    # Magnitude is right plus wrong, correctness right less wrong.
    on_gold = [
        (mass + over_heads(one.correctness)) / 2
        for mass, one in zip(on_labels, states.values(), strict=True)
    ]
    draw = partial(label_attention.draw, on_labels=on_labels, on_gold=on_gold, names=list(states))
    return [Plot("label-attention", draw, _caption(run, "means over heads", runs=runs))]


def over_heads(table: np.ndarray) -> np.ndarray:
    """(L,) means over the heads that are there; NaN for a layer without heads.

    Args:
        table: (L, H), NaN where there is no head.
    """
    known = (~np.isnan(table)).sum(axis=1)
    total = np.nansum(table, axis=1)
    return np.divide(total, known, out=np.full(len(table), np.nan), where=known > 0)


def maps(run: RunFacts, _others: Sequence[RunFacts], *, part: str) -> list[Plot] | str:
    """One number of the census for every head, in each state, and its change."""
    if run.heads is None or not has_heads(run.heads):
        return no_heads(run)
    label, what = PARTS[part]
    found = {name: getattr(state, part) for name, state in run.heads.states.items()}
    tables = {name: table for name, table in found.items() if table is not None}
    if not tables:
        return f"{run.folder} has no head weights: its classifier answers with the LM head"
    draw = partial(
        head_maps.draw,
        states=list(tables.values()),
        names=list(tables),
        label=label,
        diverging=part in ("correctness", "weight"),
        least=LEAST_SPAN,
    )
    return [
        Plot(
            part, draw, _caption(run, what),
            lambda across: head_maps.height(len(tables), across),
        )
    ]  # fmt: skip


def detector_points(run: RunFacts, _others: Sequence[RunFacts]) -> list[Plot] | str:
    """The two notions of induction head, a point for every head, in each state."""
    if run.heads is None or not has_heads(run.heads):
        return no_heads(run)
    found = {name: one for name, one in run.heads.states.items() if one.detected is not None}
    if not found:
        return (
            f"{run.folder}/heads.npz holds no scores of the classic detectors; "
            f"abft-mlx heads {run.folder} --overwrite adds them"
        )
    made = []
    for name, state in found.items():
        assert state.detected is not None
        draw = partial(
            detectors.draw, magnitude=state.magnitude, induction=state.detected.induction
        )
        more = (
            f"{name}; a point is a head; {state.detected.sequences} rows of "
            f"{state.detected.repeated_tokens} repeated random tokens"
        )
        made.append(Plot(f"detectors-{name}", draw, _caption(run, more)))
    return made


def attention_by_prompt(run: RunFacts, others: Sequence[RunFacts]) -> list[Plot] | str:
    """What heads look at from the last position, prompt by prompt."""
    if run.heads is None or not has_heads(run.heads):
        return no_heads(run)
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
        names = [f"L{layer} H{head}" for layer, head in chosen]
        draw = partial(
            attention_maps.draw,
            states=[
                np.stack([one[layer, head] for layer, head in chosen]) for one in rows.values()
            ],
            tokens=example.tokens,
            label_positions=example.label_positions,
            right=example.demonstration_labels == example.gold,
            names=names,
            state_names=list(rows),
        )
        labels = run.heads.labels
        gold = labels[example.gold] if example.gold < len(labels) else str(example.gold)
        which = "all heads" if len(chosen) == total else (
            f"{len(chosen)} of {total:,} heads: those with the most attention on labels in any "
            "state"
        )  # fmt: skip
        line = caption_line(
            run, f"n = 1 prompt of {len(example.tokens)} tokens", f"gold label: {gold}", which,
            "colour by the square root", runs=runs,
        )  # fmt: skip
        height = partial(_height, heads=len(chosen), states=len(rows))
        made.append(Plot(f"attention-{number}", draw, line, height))
    return made or no_heads(run)


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
    mass = np.max([one[:, :, label_positions].sum(axis=2) for one in rows.values()], axis=0)
    known = np.argwhere(~np.isnan(mass))
    each = max(1, limit // len(rows))
    # The lower head where two are equal, so that the same file gives the same figure.
    order = np.argsort([-mass[layer, head] for layer, head in known], kind="stable")[:each]
    return sorted((int(layer), int(head)) for layer, head in known[order]), len(known)


def _height(_across: float, heads: int, states: int) -> float:
    return attention_maps.height(heads, states)


def has_heads(heads: Heads) -> bool:
    """Whether there is a head in every state."""
    return bool(heads.states) and all(
        not np.isnan(one.magnitude).all() for one in heads.states.values()
    )


def no_heads(run: RunFacts) -> str:
    """What is missing where a run has no census."""
    if run.heads is not None:
        return f"{run.folder}/heads.npz: the model has no attention heads that could be seen"
    return f"{run.folder} holds no heads.npz; abft-mlx heads {run.folder} writes it"


def _states(
    run: RunFacts, others: Sequence[RunFacts]
) -> tuple[dict[str, HeadState], list[RunFacts]]:
    """The run's states, then those of other runs of the same base with as many layers."""
    assert run.heads is not None
    states = {_called(run, name, others): one for name, one in run.heads.states.items()}
    runs = [run]
    for other in comparable(run, others):
        assert other.heads is not None
        if AFTER in other.heads.states:
            states[other.name] = other.heads.states[AFTER]
            runs.append(other)
    return states, runs


def comparable(run: RunFacts, others: Sequence[RunFacts]) -> list[RunFacts]:
    """Those other runs whose heads are the same base's."""
    return [one for one in others if one.heads is not None and one.fingerprint == run.fingerprint]


def same_prompts(run: RunFacts, other: RunFacts) -> bool:
    """Whether two runs looked at a prompt in common."""
    if run.heads is None or other.heads is None:
        return False
    prompts = {one.tokens for one in run.heads.examples}
    return any(one.tokens in prompts for one in other.heads.examples)


def _rows(
    run: RunFacts, others: Sequence[RunFacts], example: Example
) -> tuple[dict[str, np.ndarray], list[RunFacts]]:
    """Each state's rows of a prompt; of other runs where they have looked at the same prompt."""
    rows = {_called(run, name, others): one for name, one in example.rows.items()}
    runs = [run]
    for other in comparable(run, others):
        assert other.heads is not None
        for same in other.heads.examples:
            if same.tokens == example.tokens and AFTER in same.rows:
                rows[other.name] = same.rows[AFTER]
                runs.append(other)
                break
    return rows, runs


def _called(run: RunFacts, state: str, others: Sequence[RunFacts]) -> str:
    return run.name if state == AFTER and others else state


def _caption(run: RunFacts, more: str, runs: Sequence[RunFacts] = ()) -> str:
    assert run.heads is not None
    return caption_line(run, f"n = {run.heads.prompts} prompts", more, runs=runs)
