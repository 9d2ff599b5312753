"""Looking at a model's heads: the census of some prompts, and a few prompts row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx import adapters, attention, ports, prompts, read_out, runtime
from abft_mlx.induction import (
    REPEATED_TOKENS,
    SEQUENCES,
    Detected,
    Example,
    HeadCensus,
    Heads,
    HeadState,
    detect,
)
from abft_mlx.loading import Loaded
from abft_mlx.task import Task

EXAMPLES = 3
# All rows of all examples and states; beyond this fewer examples are kept.
EXAMPLE_BYTES = 16 * 2**20
# At least so many tokens are decoded again for the text of each.
DECODED_TOKENS = 16
BEFORE, AFTER = "before", "after"

Progress = Callable[[int, int], None]


def census(
    model: nn.Module,
    chosen: Sequence[prompts.Prompt],
    *,
    max_tokens: int,
    on_progress: Progress | None = None,
) -> HeadCensus:
    """What every head of a model, as it is now, does with the label tokens of some prompts.

    Args:
        model: a loaded model.
        chosen: the prompts.
        max_tokens: of a batch.
        on_progress: called with the number of prompts done and of all.
    """
    counted = HeadCensus()
    for batch in prompts.batches(chosen, max_tokens=runtime.batch_tokens(max_tokens)):
        last = mx.array(batch.last)
        counted.add(
            attention.capture(model, mx.array(batch.tokens), last),
            mx.array(batch.label_positions),
            mx.array(batch.demonstration_labels),
            mx.array(batch.gold),
            last,
        )
        if on_progress is not None:
            on_progress(counted.prompts, len(chosen))
    return counted


def inspect(
    loaded: Loaded,
    task: Task,
    chosen: Sequence[prompts.Prompt],
    *,
    max_tokens: int,
    detectors: bool = False,
    examples: int = EXAMPLES,
    seed: int = 42,
    facts: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> Heads:
    """What a model's heads do, in the states that it has.

    Args:
        loaded: the model, with or without an adapter; it is left as it was.
        task: whose prompts these are.
        chosen: prompts for the census.
        max_tokens: of a batch.
        detectors: also score every head on repeated random tokens.
        examples: prompts whose rows are kept.
        seed: of the random tokens; kept among the facts.
        facts: more of them.
        on_progress: called with the number of prompts done and of all, over all states; random
            rows are counted, too.

    Returns:
        State ``before`` of the base and, if there is an adapter, ``after`` with it.
    """
    model = loaded.model
    picked = _picked(chosen, examples)
    states: dict[str, HeadState] = {}
    rows: list[dict[str, np.ndarray]] = [{} for _ in picked]
    each = len(chosen) + (SEQUENCES if detectors else 0)
    total = each * (2 if adapters.adapted(model) else 1)

    def counted(before: int) -> Progress:
        return lambda done, _: on_progress(before + done, total) if on_progress else None

    for name in _states(model):
        before = len(states) * each
        census_ = census(model, chosen, max_tokens=max_tokens, on_progress=counted(before))
        found = None
        if detectors:
            found = _detected(loaded, task, seed, counted(before + len(chosen)))
        states[name] = replace(HeadState.of(census_, found), weight=_weights(model))
        for prompt, known in zip(picked, rows, strict=True):
            known[name] = _rows(model, prompt)
    example_bytes = sum(table.nbytes // 2 for table in rows[0].values()) if rows else 0
    kept = min(len(picked), EXAMPLE_BYTES // max(example_bytes, 1))
    return Heads(
        states=states,
        examples=tuple(_example(loaded, prompt, rows[n]) for n, prompt in enumerate(picked[:kept])),
        labels=tuple(task.space.names),
        prompts=len(chosen),
        facts={"model": loaded.source, "data": task.texts.source, "seed": seed, **(facts or {})},
    )


def example(loaded: Loaded, prompt: prompts.Prompt) -> Example:
    """One prompt with every head's last row, in the states that the model has."""
    rows = {name: _rows(loaded.model, prompt) for name in _states(loaded.model)}
    return _example(loaded, prompt, rows)


def _states(model: nn.Module) -> Iterator[str]:
    """The names of the model's states, the model in each of them meanwhile."""
    if adapters.adapted(model):
        with adapters.without(model):
            yield BEFORE
        yield AFTER
    else:
        yield BEFORE


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """What each of T tokens adds to the text, so that all together are the text.

    A token that ends inside a character adds nothing, and the one that completes it the character.
    """
    ids = [int(token) for token in token_ids]
    texts: list[str] = []
    # Only the last tokens are decoded, from a place where a character ends: a decoder may take
    # back characters until their bytes end, and spaces that are cleaned up.
    start, whole, shown = 0, 0, ""
    for n in range(len(ids)):
        text = tokenizer.decode(ids[start : n + 1])
        ends = not text.endswith("\N{REPLACEMENT CHARACTER}")
        if n + 1 < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if shown.startswith(text):
            texts.append("")
        else:
            pairs = enumerate(zip(shown, text, strict=False))
            alike = min(len(shown), len(text))
            texts.append(text[next((at for at, (a, b) in pairs if a != b), alike) :])
            shown = text
        if ends and n + 1 - whole >= DECODED_TOKENS:
            # What was a whole character one window ago begins the next.
            if whole > start:
                start = whole
                shown = tokenizer.decode(ids[start : n + 1])
            whole = n + 1
    return tuple(texts)


def _picked(chosen: Sequence[prompts.Prompt], count: int) -> list[prompts.Prompt]:
    """Prompts of as many classes as can be, each with a demonstration that has its label."""
    able = [prompt for prompt in chosen if prompt.gold in prompt.demonstration_labels] or list(
        chosen
    )
    first = {prompt.gold: n for n, prompt in reversed(list(enumerate(able)))}
    order = sorted(range(len(able)), key=lambda n: (first[able[n].gold] != n, n))
    return [able[n] for n in order[:count]]


def _example(loaded: Loaded, prompt: prompts.Prompt, rows: dict[str, np.ndarray]) -> Example:
    """A prompt as heads.npz keeps it."""
    return Example(
        token_texts(loaded.tokenizer, prompt.token_ids),
        np.array(prompt.label_positions),
        np.array(prompt.demonstration_labels),
        prompt.gold,
        rows,
    )


def _rows(model: nn.Module, prompt: prompts.Prompt) -> np.ndarray:
    """(L, H, T) float32, NaN for layers without heads."""
    tokens = np.array([prompt.token_ids], dtype=np.int32)
    rows = attention.capture(model, tokens, np.array([prompt.last]))
    heads = max((row.shape[1] for row in rows if row is not None), default=0)
    table = np.full((len(rows), heads, tokens.shape[1]), np.nan, dtype=np.float32)
    for layer, row in enumerate(rows):
        if row is not None:
            table[layer, : row.shape[1]] = np.asarray(row[0])
    return table


def _weights(model: nn.Module) -> np.ndarray | None:
    """(L, H) weights of the model's read-out, NaN where there is no head; None without one."""
    weights = read_out.of(model)
    if weights is None:
        return None
    counts = ports.head_counts(model)
    table = np.full((len(ports.heads(model)), max(counts.values())), np.nan)
    for layer, values in weights.weights().items():
        table[layer, : len(values)] = values
    return table


def _detected(
    loaded: Loaded, task: Task, seed: int, on_progress: Progress | None = None
) -> Detected:
    """The scores of the classic detectors, on repeated random tokens."""
    tokenizer = loaded.tokenizer
    special = {int(token) for token in getattr(tokenizer, "all_special_ids", ())}
    vocabulary = np.array([n for n in range(len(tokenizer.get_vocab())) if n not in special])
    fitting = min(REPEATED_TOKENS, ((loaded.context_tokens or 2**31) - 1) // 2, len(vocabulary))
    return detect(
        loaded.model,
        vocabulary,
        start=task.builder.start,
        repeated_tokens=fitting,
        seed=seed,
        on_progress=on_progress,
    )
