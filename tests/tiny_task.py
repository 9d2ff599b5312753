"""A task of made-up texts and a tiny random model that reads its vocabulary."""

from __future__ import annotations

from typing import Any

import made_tokenizers
import mlx.nn as nn
import numpy as np
import tiny_models

from abft_mlx import recipe as recipes
from abft_mlx.data import LabelledTexts
from abft_mlx.task import Task, open_task

NOUNS = ("film", "meal", "weather", "story", "music", "café")
WORDS = ("good", "bad", "lovely", "dull", "spambot", "hamlet")
NAMES = ("positive", "negative", "spam")
SIZES = (
    "data.training_rows=40",
    "data.demonstration_rows=30",
    "data.test_rows=12",
    "prompt.demonstrations=3",
    "evaluation.queries=10",
    "evaluation.repeats=2",
)


def texts(n: int = 90, seed: int = 0) -> LabelledTexts:
    """Made-up sentences of two to nine words."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(n):
        words = rng.choice(WORDS, size=rng.integers(1, 9)).tolist()
        made.append(f"{NOUNS[number % len(NOUNS)]} {' '.join(words)}")
    return LabelledTexts(tuple(made), tuple(rng.integers(0, 3, n).tolist()), NAMES, "made-up")


def recipe(*changes: str) -> recipes.Recipe:
    """The recipe of the task, with changes."""
    return recipes.default([*SIZES, *changes])


def task(*changes: str, tokenizer: Any = None, context_tokens: int | None = None) -> Task:
    """The task itself; gpt2's kind of tokenizer unless another is given."""
    section = recipes.task(recipe(*changes))
    return open_task(section, texts(), tokenizer or made_tokenizers.gpt2(), context_tokens)


def model(name: str = "llama", **changes: Any) -> nn.Module:
    """A tiny random model of that tokenizer's vocabulary."""
    size = len(made_tokenizers.gpt2())
    changes = {"vocab_size": size, "max_position_embeddings": 1024} | changes
    if name == "gpt2":
        changes |= {"n_positions": 1024, "n_ctx": 1024}
    return tiny_models.build(name, **changes)
