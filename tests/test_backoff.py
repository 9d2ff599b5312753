"""Micro-batches where memory is short: measured, halved, and given up in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_trainer import make_prompts, make_recipe, make_trainer

from abft_mlx import runtime
from abft_mlx.errors import RunError
from abft_mlx.evaluation import forward
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import RunFolder, Trainer, memory
from abft_mlx.trainer.memory import Backoff

MALLOC = "[malloc] Unable to allocate 123 bytes."
TEXTS = (
    MALLOC,
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
)
WORKER = """
import json, pathlib, resource, sys
from abft_mlx import runtime
runtime.prepare()
import mlx.core as mx
import tiny_models
from mlx.utils import tree_flatten
from abft_mlx import adapters, recipe as recipes
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import Trainer, plan

tokens, extra, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
recipe = recipes.resolve(recipes.default([f"training.micro_batch_tokens={tokens}",
    "training.updates=1", "adapter.rank=4", "objective.filter=false"]))
model = tiny_models.build("llama", hidden_size=256, intermediate_size=1024)
adapters.attach(model, recipe.adapter, seed=0)
prompts = [Prompt(tuple(1 + (i * n + i // 7) % 95 for i in range(100 + n % 29)),
                  (5, 9, 20, 33), (0, 1, 0, 1), n % 2, (3,)) for n in range(32)]
notes = []
trainer = Trainer(model, prompts, recipe, events=OnUpdate(lambda one: notes.append(one.note)))
trainer.step.gradients(plan.micro_batches(prompts[:1], 1), 0.5)
rows = trainer.rows
if extra:
    status = pathlib.Path("/proc/self/status").read_text()
    taken = 1024 * int(status.partition("VmSize:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra, taken + extra))
trainer.run()
mx.save_safetensors(path, dict(tree_flatten(model.trainable_parameters())))
print(json.dumps([rows, trainer.rows, notes]))
"""


def started(folder: Path, tokens: str, extra_bytes: int, path: Path) -> subprocess.CompletedProcess:
    places = os.pathsep.join([str(folder), str(folder / "tests")])
    return subprocess.run(
        [sys.executable, "-c", WORKER, tokens, str(extra_bytes), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": places},
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_run_in_little_memory_ends_as_one_in_plenty(tmp_path: Path, checkout: Path) -> None:
    """MLX's CPU backend crashes where memory runs out, so the same limit kills a run of 32 rows."""
    little = 180 * 2**20
    whole = started(checkout, "auto", 0, tmp_path / "whole.safetensors")
    short = started(checkout, "auto", little, tmp_path / "short.safetensors")
    dead = started(checkout, "4096", little, tmp_path / "dead.safetensors")
    assert dead.returncode == -signal.SIGSEGV
    assert json.loads(whole.stdout) == [32, 32, [None]], whole.stderr
    assert short.returncode == 0, short.stderr
    before, after, (note,) = json.loads(short.stdout)
    assert before == 32
    assert 2 <= after < before
    assert note.startswith(f"{after} prompts in a micro-batch instead of 32: 0.")
    expected, found = (mx.load(str(tmp_path / f"{n}.safetensors")) for n in ("whole", "short"))
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(one), atol=1e-5, err_msg=name)


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


@pytest.mark.parametrize(
    ("text", "mode"),
    [*((text, "adapter.dropout=0.1") for text in TEXTS), (MALLOC, "training.gradient=local")],
)
def test_an_update_that_does_not_fit_is_begun_again(text: str, mode: str, tmp_path: Path) -> None:
    """It fails at 8 rows, then in the middle at 4: the run is that of 2 rows from the start."""
    recipe = make_recipe("training.updates=2", mode)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    trainer = make_trainer(recipe, folder)
    assert trainer.rows == 8
    tried = failing(trainer, 4, text)
    trainer.run()
    assert tried == [8, 4] + [2] * 8
    plain = make_trainer(make_recipe("training.updates=2", mode, "training.micro_batch_tokens=128"))
    assert plain.rows == 2
    plain.run()
    for (name, one), (_, other) in zip(
        tree_flatten(trainer.model.trainable_parameters()),
        tree_flatten(plain.model.trainable_parameters()),
        strict=True,
    ):
        assert np.array_equal(np.array(one), np.array(other)), name
    notes = [one.get("note") for one in folder.metrics()]
    assert notes == [f"2 prompts in a micro-batch instead of 8: {text}", None]


def test_each_rank_backs_off_alone() -> None:
    class Two(Ranks):
        """Another rank that always has the same."""

        exchanges = 0

        def sum(self, arrays: Any) -> list[mx.array]:
            self.exchanges += 1
            return [2 * one for one in arrays]

        def agree(self, text: str, what: str) -> None:
            del text, what

    ranks = Two()
    ranks.size = 2
    trainer = make_trainer(make_recipe("training.updates=3"), ranks=ranks)
    tried = failing(trainer, 2)
    trainer.run()
    assert tried[:3] == [4, 2, 1]
    assert ranks.exchanges == 3


@pytest.mark.parametrize("shared", [1, 2])
def test_a_prompt_that_does_not_fit_ends_the_run_in_one_line(tmp_path: Path, shared: int) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    settings = [f"training.shared_demonstrations={shared}", "training.checkpoint_every=1"]
    trainer = make_trainer(make_recipe(*settings), folder)
    trainer.recipe = make_recipe(*settings, "training.updates=1")
    trainer.run()
    kept = (folder.checkpoint_path / "state.safetensors").read_bytes()
    before = {n: np.array(one) for n, one in tree_flatten(trainer.model.trainable_parameters())}
    trainer.recipe = make_recipe(*settings)
    failing(trainer, 0)
    with pytest.raises(RunError) as caught:
        trainer.run()
    message = str(caught.value)
    longest = max(len(one.token_ids) for one in trainer.prompts)
    what = "a prompt" if shared == 1 else "2 prompts"
    assert message.startswith(f"{what} of {longest} tokens cannot be trained on in the memory")
    assert MALLOC in message
    assert "gradient_checkpointing to true or training.gradient to local" in message
    assert "\n" not in message
    assert (folder.checkpoint_path / "state.safetensors").read_bytes() == kept
    for name, one in tree_flatten(trainer.model.trainable_parameters()):
        assert np.array_equal(np.array(one), before[name]), name


@pytest.mark.parametrize("tokens", ["512", "null"])
def test_a_number_is_kept_to(tokens: str) -> None:
    trainer = make_trainer(make_recipe(f"training.micro_batch_tokens={tokens}"))
    tried = failing(trainer, 2)
    with pytest.raises(RunError, match=r"ran out with 8 prompts .*\.micro_batch_tokens to auto"):
        trainer.run()
    assert tried == [8]


@pytest.mark.parametrize("text", ["[matmul] shapes", "[ring] Connection lost"])
def test_other_errors_are_left_alone(text: str) -> None:
    trainer = make_trainer(make_recipe())
    tried = failing(trainer, 2, text)
    with pytest.raises(RuntimeError, match=r"^\[" + text[1:5]):
        trainer.run()
    assert tried == [8]


def test_what_says_that_memory_ran_out() -> None:
    assert all(runtime.out_of_memory(RuntimeError(text)) for text in TEXTS)
    assert runtime.out_of_memory(MemoryError())
    assert not runtime.out_of_memory(RuntimeError("[malloc_trim] is no allocation"))
    assert not runtime.out_of_memory(ValueError("out of memory"))


def peaks(fixed: int, each: int) -> tuple[Callable[[int], int], list[int]]:
    asked: list[int] = []

    def peak_bytes(rows: int) -> int:
        asked.append(rows)
        return fixed + each * rows

    return peak_bytes, asked


@pytest.mark.parametrize(
    ("room", "rows", "measured"),
    [(1e4, 32, [1, 2]), (1000, 4, [1, 2]), (2000, 8, [1, 2]), (400, 1, [1]), (100, 1, [1])],
)
def test_two_small_measurements_say_how_many_fit(room: int, rows: int, measured: list[int]) -> None:
    """Of a fixed cost of 80 and 150 a prompt, in four fifths of the room."""
    one = Backoff(32, 1, True, 100)
    peak_bytes, asked = peaks(80, 150)
    one.measure(peak_bytes, int(room))
    assert one.rows == rows
    assert asked == measured
    assert (one.news() is None) == (rows == 32)
    assert one.news() is None


def test_plenty_is_not_measured_and_far_too_little_is_not_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(make_recipe("training.updates=1"))
    stays = memory.training_bytes(trainer.model)
    monkeypatch.setattr(runtime, "memory_room_bytes", lambda: stays + 10**5)
    tried = failing(trainer, 8)
    with pytest.raises(RunError, match=r"tokens cannot be trained on .*0\.0 GB are left"):
        trainer.run()
    assert tried == []
    monkeypatch.setattr(runtime, "memory_room_bytes", lambda: 10**12)
    trainer.run()
    assert tried == [8]


def test_the_room_is_what_limits_leave() -> None:
    room = runtime.memory_room_bytes()
    assert 10**7 < room < runtime.machine_memory_bytes()


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
