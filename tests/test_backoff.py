"""Micro-batches where memory is short: measured, halved, and given up in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_trainer import make_prompts, make_recipe, make_trainer, metrics, same, trained

from abft_mlx import runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation import forward
from abft_mlx.trainer import RunFolder, Trainer, memory

MALLOC = "[malloc] Unable to allocate 123 bytes."
TEXTS = (
    MALLOC,
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
)


def failing(trainer: Trainer, largest: int, text: str = MALLOC) -> list[int]:
    """Let micro-batches above a size fail; gives the list of sizes tried."""
    tried: list[int] = []
    compute = trainer.step.value_and_grad

    def limited(parameters: Any, batch: dict[str, mx.array], weight: mx.array) -> Any:
        found = compute(parameters, batch, weight)
        rows = len(batch["tokens"])
        tried.append(rows)
        if rows > largest or (rows == largest and len(tried) == 2):
            raise RuntimeError(text)
        return found

    trainer.step.value_and_grad = limited
    return tried


@pytest.mark.parametrize("text", TEXTS)
def test_an_update_that_does_not_fit_is_begun_again(text: str, tmp_path: Path) -> None:
    """It fails at 8 rows, then in the middle at 4: the run is that of 2 rows from the start."""
    changes = ("training.updates=2", "adapter.dropout=0.1")
    recipe = make_recipe(*changes)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer = make_trainer(recipe, folder)
    assert trainer.rows == 8
    tried = failing(trainer, 4, text)
    trainer.run()
    assert tried == [8, 4] + [2] * 8
    plain = make_trainer(make_recipe(*changes, "training.micro_batch_tokens=128"))
    assert plain.rows == 2
    plain.run()
    assert same(trained(trainer.model), trained(plain.model))
    notes = [line.get("note") for line in metrics(folder)]
    assert notes == [f"2 prompts in a micro-batch instead of 8: {text}", None]


@pytest.mark.parametrize("shared", [1, 2])
def test_a_prompt_that_does_not_fit_ends_the_run_in_one_line(tmp_path: Path, shared: int) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    settings = [f"training.shared_demonstrations={shared}", "training.checkpoint_every=1"]
    trainer = make_trainer(make_recipe(*settings), folder)
    trainer.recipe = make_recipe(*settings, "training.updates=1")
    trainer.run()
    kept = (folder.checkpoint_path / "state.safetensors").read_bytes()
    before = trained(trainer.model)
    trainer.recipe = make_recipe(*settings)
    failing(trainer, 0)
    with pytest.raises(RunError) as caught:
        trainer.run()
    message = str(caught.value)
    longest = max(len(one.token_ids) for one in trainer.prompts)
    what = "a prompt" if shared == 1 else "2 prompts"
    assert message.startswith(f"{what} of {longest} tokens cannot be trained on in the memory")
    assert MALLOC in message
    assert "set training.gradient_checkpointing to true" in message
    assert "\n" not in message
    assert (folder.checkpoint_path / "state.safetensors").read_bytes() == kept
    assert same(trained(trainer.model), before)


@pytest.mark.parametrize("tokens", ["512", "null"])
def test_a_number_is_kept_to(tokens: str) -> None:
    trainer = make_trainer(make_recipe(f"training.micro_batch_tokens={tokens}"))
    tried = failing(trainer, 2)
    with pytest.raises(RunError, match=r"ran out with 8 prompts .*\.micro_batch_tokens to auto"):
        trainer.run()
    assert tried == [8]


def test_other_errors_are_left_alone() -> None:
    trainer = make_trainer(make_recipe())
    tried = failing(trainer, 2, "[matmul] shapes")
    with pytest.raises(RuntimeError, match=r"^\[matmul"):
        trainer.run()
    assert tried == [8]


@pytest.mark.parametrize(
    ("room", "sizes"),
    [(10**12, [8]), (10**6, [1, 8]), (4 * 10**5, [1, 4, 4])],
)
def test_what_is_in_doubt_is_measured_first(
    monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int]
) -> None:
    trainer = make_trainer(make_recipe("training.updates=1"))
    stays = memory.training_bytes(trainer.model)
    monkeypatch.setattr(runtime, "memory_room_bytes", lambda: stays + room)
    monkeypatch.setattr(memory, "peak_bytes", lambda work: (work(), 60_000)[1])
    tried = failing(trainer, 99)
    trainer.run()
    assert tried == sizes


def test_far_too_little_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_recipe("training.updates=1"))
    stays = memory.training_bytes(trainer.model)
    monkeypatch.setattr(runtime, "memory_room_bytes", lambda: stays + 1000)
    tried = failing(trainer, 8)
    with pytest.raises(RunError, match=r"tokens cannot be trained on .*0\.0 GB of memory are left"):
        trainer.run()
    assert tried == []


def test_an_evaluation_halves_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_trainer(make_recipe()).model, make_prompts()
    expected = np.array(forward.outputs(model, prompts, batch_tokens=2048).hidden)
    compute, tried = forward.hidden_at_last, []

    def limited(tokens: mx.array, *rest: Any) -> mx.array:
        tried.append(len(tokens))
        if len(tokens) > largest:
            raise RuntimeError(MALLOC)
        return compute(tokens, *rest)

    monkeypatch.setattr(forward, "hidden_at_last", limited)
    largest = 7
    found = np.array(forward.outputs(model, prompts, batch_tokens=2048).hidden)
    assert tried == [24, 12, 6, 6, 12, 6, 6]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    largest = 0
    with pytest.raises(RunError, match=r"^a prompt of 64 tokens does not fit into memory \(\[mall"):
        forward.outputs(model, prompts, batch_tokens=2048)
