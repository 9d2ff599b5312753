"""Gradient checkpointing against the same step without it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from step_support import prompts, step_of

from abft_mlx import recipe, runtime
from abft_mlx.errors import RecipeError, UnsupportedArchitectureError
from abft_mlx.prompts import Prompt
from abft_mlx.trainer.batches import micro_batches
from abft_mlx.trainer.step import Step

# Capped scores; windows; experts; a hybrid; the head inside the stem.
KINDS = (
    "llama", "gpt2", "qwen2", "gemma2", "gemma3_text", "olmoe", "qwen3_next",
    "gpt_neox",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def found(step: Step, batches: list[Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    gradients, terms = step.gradients(batches, 0.5)
    return {name: np.array(one) for name, one in tree_flatten(gradients)}, np.array(terms)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in KINDS),
        *((name, {"only_trained": True}) for name in ("llama", "gpt2")),
        *((name, {"objective": "end_to_end"}) for name in ("llama", "gemma2", "gpt_neox")),
    ],
)
def test_gradients_are_those_without(tiny: ModuleType, name: str, settings: dict[str, Any]) -> None:
    """Of all layers, of the lower ones alone, and of the logits."""
    layers = [0, 1] if "only_trained" in settings else None
    batches = micro_batches(prompts(), 2)
    expected, terms = found(step_of(tiny.build(name), layers, **settings), batches)
    step = step_of(tiny.build(name), layers, checkpointing=True, **settings)
    kinds = [type(one) for _, one in step.model.named_modules()]
    ours, ours_terms = found(step, batches)
    assert ours.keys() == expected.keys()
    largest = max(np.abs(one).max() for one in expected.values())
    assert largest > 1e-4
    for path, one in expected.items():
        assert np.abs(ours[path] - one).max() <= 1e-6 * max(1, largest), path
    assert np.allclose(ours_terms, terms, rtol=1e-6)
    assert [type(one) for _, one in step.model.named_modules()] == kinds
    mx.eval(step.model.parameters())


@pytest.mark.parametrize("name", ["gemma3n", "gemma4_text", "hunyuan"])
def test_blocks_that_share_keys_are_refused(tiny: ModuleType, name: str) -> None:
    step = step_of(tiny.build(name), checkpointing=True)
    with pytest.raises(UnsupportedArchitectureError, match=f"{name} models hand more than hidden"):
        step.gradients(micro_batches(prompts(), 4), 0.5)
    mx.eval(step.model.parameters())


def test_an_update_takes_less_than_half_beside_what_stays() -> None:
    """MLX's own count of twelve layers, beside the weights and all else that stays."""
    tokens = tuple(1 + i % 90 for i in range(96))
    long = [Prompt(tokens, (5, 9, 20, 33), (0, 1, 0, 1), 0, (3,))] * 4

    def peak(**settings: Any) -> int:
        model = tiny_models.build("llama", num_hidden_layers=12, intermediate_size=256)
        step = step_of(model, **settings)
        batches = micro_batches(long, 4)
        step.update(batches, 0.5)
        mx.clear_cache()
        stays = mx.get_active_memory()
        runtime.reset_peak_memory()
        step.update(batches, 0.5)
        return runtime.peak_memory_bytes() - stays

    assert peak(checkpointing=True) < 0.5 * peak()


SETTING = "training.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("training.shared_demonstrations=2", "does not go with shared_demonstrations 2"),
        ("adapter.dropout=0.1", "does not go with adapter.dropout 0.1"),
    ],
)
def test_what_does_not_fit_together_is_one_line(other: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe.default([SETTING, other])
    assert "\n" not in str(caught.value)
