"""A small task of made-up texts with a random tiny model, and that model asked prompt by prompt."""

from __future__ import annotations

from typing import Any

import made_tokenizers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny_models

from abft_mlx.data import LabelledTexts
from abft_mlx.prompts import Prompt, Template
from abft_mlx.recipe import EvaluationSection, TaskSection
from abft_mlx.task import Task, open_task

NAMES = ("positive", "negative", "spam")
WORDS = ("good", "bad", "lovely", "dull", "film", "meal", "story", "music", "weather")
MULTIPLIER, INCREMENT, MODULUS = 1664525, 1013904223, 2**32


class HandGenerator:
    """The protocol's generator once more, written down here."""

    def __init__(self, state: int = 42) -> None:
        self.state = state

    def below(self, n: int) -> int:
        self.state = (MULTIPLIER * self.state + INCREMENT) % MODULUS
        return n * self.state // MODULUS

    def draw(self, items: list[Any], n: int) -> list[Any]:
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(n)]


def texts(rows: int = 60, names: tuple[str, ...] = NAMES) -> LabelledTexts:
    made = tuple(f"the {WORDS[i % 9]} was {WORDS[(i * i + 3) % 9]}" for i in range(rows))
    labels = tuple((i * i + i // 3) % len(names) for i in range(rows))
    return LabelledTexts(made, labels, names, "made.csv")


def task(rows: int = 60, *, whole: LabelledTexts | None = None, **changes: dict[str, Any]) -> Task:
    """A task of 12 test rows, 20 demonstration rows and k = 2, unless changed."""
    data = {"training_rows": 16, "demonstration_rows": 20, "test_rows": 12}
    values: dict[str, Any] = {"name": "small", "data": data, "prompt": {"demonstrations": 2}}
    for section, inner in changes.items():
        values[section] = {**values.get(section, {}), **inner}
    section = TaskSection.model_validate(values)
    return open_task(section, whole or texts(rows), made_tokenizers.gpt2())


def model(seed: int = 12) -> nn.Module:
    return tiny_models.build("llama", seed=seed, vocab_size=len(made_tokenizers.gpt2()))


def settings(**changes: Any) -> EvaluationSection:
    return EvaluationSection(**{"queries": 12, "repeats": 2, "bootstrap_samples": 50, **changes})


def written(template: Template, shown: list[tuple[str, int]], query: str) -> str:
    """A prompt put together piece by piece."""
    made = template.instruction
    for text, label in shown:
        made += template.input_prefix + text + template.input_affix
        made += template.label_prefix + " " + NAMES[label] + template.label_affix
    made += template.query_prefix + template.input_prefix + query
    return made + template.input_affix + template.label_prefix


def asked(model: nn.Module, text: str) -> np.ndarray:
    """(C,) label probabilities after one prompt, from the model's whole output, in float64."""
    tokenizer = made_tokenizers.gpt2()
    ids = tokenizer.encode(text, add_special_tokens=False)
    labels = [tokenizer.encode(f"label: {name}", add_special_tokens=False)[-1] for name in NAMES]
    logits = np.array(model(mx.array([ids]))[0, -1].astype(mx.float32), dtype=np.float64)[labels]
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def always(answer: Any) -> Any:
    """In place of label_probabilities: certain of whatever answer(prompt) is."""

    def probabilities(
        model: Any, prompts: list[Prompt], space: Any, *, batch_tokens: int, **others: Any
    ) -> np.ndarray:
        del model, batch_tokens
        if (on_progress := others.get("on_progress")) is not None:
            on_progress(len(prompts), len(prompts))
        return np.eye(len(space))[[answer(prompt) for prompt in prompts]]

    return probabilities
