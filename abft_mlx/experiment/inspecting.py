"""Looking at a model's heads: the census of some prompts, and a few prompts row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        on_progress: told how many prompts of how many are done.
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
    """What is to be seen of a model's heads, in the states that it has.

    Args:
        loaded: the model, with or without an adapter; it is left as it was.
        task: whose prompts these are.
        chosen: prompts for the census.
        max_tokens: of a batch.
        detectors: also score every head on repeated random tokens.
        examples: prompts whose rows are kept.
        seed: of the random tokens; kept among the facts.
        facts: more of them.
        on_progress: told how many prompts of how many are done, over all states; random rows are
            counted, too.

    Returns:
        State ``before`` of the base and, if there is an adapter, ``after`` with it.
    """
    model, with_adapter = loaded.model, bool(adapters.adapted(loaded.model))
    states: dict[str, HeadState] = {}
    picked = _picked(chosen, examples)
    rows: list[dict[str, np.ndarray]] = [{} for _ in picked]
    each = len(chosen) + (SEQUENCES if detectors else 0)

    def look(name: str) -> None:
        begun = len(states) * each

        def tell(done: int, _all: int) -> None:
            if on_progress is not None:
                on_progress(begun + done, each * (2 if with_adapter else 1))

        counted = census(model, chosen, max_tokens=max_tokens, on_progress=tell)
        begun += len(chosen)
        found = _detected(loaded, task, seed, tell) if detectors else None
        states[name] = replace(HeadState.of(counted, found), weight=_weights(model))
        for n, prompt in enumerate(picked):
            rows[n][name] = _rows(model, prompt)

    if with_adapter:
        with adapters.without(model):
            look(BEFORE)
        look(AFTER)
    else:
        look(BEFORE)
    kept_bytes = sum(one.nbytes // 2 for one in rows[0].values()) if rows else 0
    kept = min(len(picked), EXAMPLE_BYTES // max(kept_bytes, 1))
    return Heads(
        states=states,
        examples=tuple(_example(loaded, prompt, rows[n]) for n, prompt in enumerate(picked[:kept])),
        labels=tuple(task.space.names),
        prompts=len(chosen),
        facts={"model": loaded.source, "data": task.texts.source, "seed": seed, **(facts or {})},
    )


def example(loaded: Loaded, prompt: prompts.Prompt) -> Example:
    """One prompt with every head's last row, in the states that the model has.

    Args:
        loaded: the model, with or without an adapter; it is left as it was.
        prompt: any prompt of its tokenizer.
    """
    rows: dict[str, np.ndarray] = {}
    if adapters.adapted(loaded.model):
        with adapters.without(loaded.model):
            rows[BEFORE] = _rows(loaded.model, prompt)
        rows[AFTER] = _rows(loaded.model, prompt)
    else:
        rows[BEFORE] = _rows(loaded.model, prompt)
    return _example(loaded, prompt, rows)


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text, so that all together are the text.

    A token that ends inside a character adds nothing, and the one that completes it the character.

    Args:
        tokenizer: mlx-lm's tokenizer wrapper.
        token_ids: T tokens.
    """
    ids = [int(one) for one in token_ids]
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
            least = min(len(shown), len(text))
            known = next((at for at, (one, other) in pairs if one != other), least)
            texts.append(text[known:])
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
    told = [one for one in chosen if one.gold in one.demonstration_labels] or list(chosen)
    first = {one.gold: n for n, one in reversed(list(enumerate(told)))}
    order = sorted(range(len(told)), key=lambda n: (first[told[n].gold] != n, n))
    return [told[n] for n in order[:count]]


def _example(loaded: Loaded, prompt: prompts.Prompt, rows: dict[str, np.ndarray]) -> Example:
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
    heads = max((one.shape[1] for one in rows if one is not None), default=0)
    table = np.full((len(rows), heads, tokens.shape[1]), np.nan, dtype=np.float32)
    for layer, one in enumerate(rows):
        if one is not None:
            table[layer, : one.shape[1]] = np.asarray(one[0])
    return table


def _weights(model: nn.Module) -> np.ndarray | None:
    """(L, H) weights of the model's read-out, NaN where there is no head; None without one."""
    found = read_out.of(model)
    if found is None:
        return None
    counts = ports.head_counts(model)
    table = np.full((len(ports.heads(model)), max(counts.values())), np.nan)
    for layer, one in found.weights().items():
        table[layer, : len(one)] = one
    return table


def _detected(
    loaded: Loaded, task: Task, seed: int, on_progress: Progress | None = None
) -> Detected:
    tokenizer = loaded.tokenizer
    special = {int(one) for one in getattr(tokenizer, "all_special_ids", ())}
    size = len(tokenizer.get_vocab())
    vocabulary = np.array([n for n in range(size) if n not in special])
    fitting = min(REPEATED_TOKENS, ((loaded.context_tokens or 2**31) - 1) // 2, len(vocabulary))
    return detect(
        loaded.model,
        vocabulary,
        start=task.builder.start,
        repeated_tokens=fitting,
        seed=seed,
        on_progress=on_progress,
    )
