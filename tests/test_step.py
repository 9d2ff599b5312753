"""How a step works through its micro-batches: what overlaps, what is compiled, what it leaves."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from step_support import prompts, step_of

from abft_mlx import attention
from abft_mlx.trainer.batches import micro_batches


def test_the_next_micro_batch_is_built_while_one_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not handed to the device before that one is done."""
    step = step_of(tiny_models.build("llama", num_hidden_layers=2))
    calls: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *arrays: (calls.append(name), function(*arrays))[1]

    step.value_and_grad = noting("build", step.value_and_grad)
    monkeypatch.setattr(mx, "eval", noting("wait", mx.eval))
    monkeypatch.setattr(mx, "async_eval", noting("start", mx.async_eval))
    batches = micro_batches(prompts(), 1)
    step.gradients(batches, 0.5)
    assert calls == ["build", "wait", "start"] * len(batches) + ["wait"]


def test_nothing_is_compiled_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of two buckets are two graphs, whatever comes after."""
    step = step_of(tiny_models.build("llama", num_hidden_layers=2), compiled=True)
    longer = [replace(prompt, token_ids=prompt.token_ids * 2) for prompt in prompts()]
    forward, traced = attention.forward, []

    def noting(*arguments: Any, **options: Any) -> Any:
        traced.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(attention, "forward", noting)
    counts = []
    for _ in range(3):
        for some in (prompts()[:2], longer[:2]):
            step.update(micro_batches(some, 2), 0.5)
        counts.append(len(traced))
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True, "only_trained": True}])
def test_a_step_leaves_nothing_behind(settings: dict[str, bool]) -> None:
    """Not even until Python's garbage collector comes round, and not its model."""
    step = step_of(tiny_models.build("llama"), [0, 1], **settings)
    (batch,) = micro_batches(prompts(), 3)
    step.gradients([batch], 0.5)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(3):
            step.gradients([batch], 0.5)
        assert mx.get_active_memory() - before < 4096
    finally:
        gc.enable()
    model = weakref.ref(step.model)
    del step
    gc.collect()
    assert model() is None
