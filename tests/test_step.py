"""How a step works through its micro-batches: what overlaps, and what is compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
import tiny_models
from test_local import prompts

from abft_mlx import adapters
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.plan import micro_batches
from abft_mlx.trainer.step import Step


def step_of(compiled: bool) -> Step:
    model = tiny_models.build("llama", num_hidden_layers=2)
    adapters.attach(model, AdapterSection(rank=2))
    return Step(model, optim.Adam(1e-3), reward_weight=1.0, use_filter=False, compiled=compiled)


def test_the_next_micro_batch_is_built_while_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not handed to the device before that one is done."""
    step = step_of(compiled=False)
    told: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *arrays: (told.append(name), function(*arrays))[1]

    step.value_and_grad = noting("build", step.value_and_grad)
    monkeypatch.setattr(mx, "eval", noting("wait", mx.eval))
    monkeypatch.setattr(mx, "async_eval", noting("start", mx.async_eval))
    batches = micro_batches(prompts(), 1)
    step.gradients(batches, 0.5)
    assert told == ["build", "wait", "start"] * len(batches) + ["wait"]


@pytest.mark.parametrize(("compiled", "expected"), [(True, [2, 2, 2]), (False, [0, 0, 0])])
def test_nothing_is_compiled_after_warm_up(compiled: bool, expected: list[int]) -> None:
    """Lengths of two buckets are two graphs, whatever comes after; uncompiled there are none."""
    step = step_of(compiled)
    longer = [replace(one, token_ids=one.token_ids * 2) for one in prompts()]
    seen = []
    for _ in range(3):
        for some in (prompts()[:2], longer[:2]):
            step.update(micro_batches(some, 2), 0.5)
        seen.append(step.compilations.count)
    assert seen == expected
