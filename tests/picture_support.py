"""What was seen of made-up heads: any shape, hybrids, prompts with odd tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from abft_mlx.induction import Example, Heads, HeadState

LABELS = ("ham", "spam", "eggs")


def made_state(source: np.random.Generator, layers: int, heads: int) -> HeadState:
    """A census of one state."""
    magnitude = source.uniform(0, 1, (layers, heads))
    correctness = magnitude * source.uniform(-1, 1, (layers, heads))
    share = np.where(magnitude > 0.5, source.uniform(0.1, 1, (layers, heads)), 0.0)
    return HeadState(magnitude, correctness, share, source.uniform(0, 1, (layers, heads)))


def without(state: HeadState, layers: Sequence[int]) -> HeadState:
    """The same of a hybrid, which has no heads in some layers."""
    parts = []
    for one in (state.magnitude, state.correctness, state.share, state.sink):
        copied = one.copy()
        copied[list(layers)] = np.nan
        parts.append(copied)
    return HeadState(*parts)


def made_prompt(demonstrations: int = 4, words: int = 10) -> tuple[list[str], list[int]]:
    """Tokens of a prompt, and where its labels are."""
    tokens, places = [], []
    for n in range(demonstrations):
        tokens += ["text", ":", *(f" word{n}{i}" for i in range(words)), "\n", "label", ":"]
        places.append(len(tokens))
        tokens += [f" {LABELS[n % 3]}", "\n"]
    tokens += ["text", ":", *(f" asked{i}" for i in range(words)), "\n", "label", ":"]
    return tokens, places


def made_heads(
    layers: int = 3,
    heads: int = 4,
    *,
    states: Sequence[str] = ("before", "after"),
    tokens: Sequence[str] | None = None,
    label_positions: Sequence[int] = (),
    examples: int = 2,
    none_in: Sequence[int] = (),
    labels: Sequence[str] = LABELS,
    seed: int = 0,
) -> Heads:
    """States and examples with random numbers in them; rows sum to 1."""
    source = np.random.default_rng(seed)
    if tokens is None:
        tokens, label_positions = made_prompt()
    made = {name: without(made_state(source, layers, heads), none_in) for name in states}
    shown = []
    for n in range(examples):
        rows = {}
        for name in states:
            one = source.dirichlet(np.full(len(tokens), 0.1), (layers, heads)).astype(np.float32)
            one[list(none_in)] = np.nan
            rows[name] = one
        classes = (np.arange(len(label_positions)) + n) % len(labels)
        shown.append(Example(tuple(tokens), np.array(label_positions, int), classes, 0, rows))
    return Heads(made, tuple(shown), tuple(labels), 64)
