"""Prompts that share their demonstrations, against the same prompts one by one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from step_support import step_of

from abft_mlx import attention, prefix
from abft_mlx.data import training_rows
from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.prompts import Prompt
from abft_mlx.trainer.batches import micro_batches

# Fused; windows; latent keys; keys of two attentions in a block; soft-caps; sinks and windows.
KINDS = ("llama", "gpt2", "gemma3_text", "deepseek_v3", "gemma2", "gpt_oss", "gemma4_text")


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def prompts() -> list[Prompt]:
    """Two groups of three, whose beginnings are 14 and 15 tokens long."""
    source = np.random.default_rng(0)
    made = []
    for shared in (14, 15):
        beginning = source.integers(1, 90, shared).tolist()
        for number, rest in enumerate((9, 5, 7)):
            tokens = (*beginning, 90 + number, *source.integers(1, 90, rest).tolist())
            made.append(Prompt(tokens, (3, 8, 13), (0, 1, 0), int(source.integers(0, 2)), (5,)))
    return made


def rows_of(model: Any, batch: Any) -> list[np.ndarray]:
    arrays = batch.arrays()
    behind = arrays["last"] - arrays["prefix"].shape[1]
    _, rows = prefix.forward(model, arrays["prefix"], arrays["tokens"], behind)
    return [np.array(one) for one in rows if one is not None]


@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_of_whole_prompts(tiny: ModuleType, name: str, bucket: int) -> None:
    model = tiny.build(name)
    given = prompts()
    batches = micro_batches(given, 6, together=3, bucket_tokens=bucket)
    assert [one.prefix.shape for one in batches if one.prefix is not None] == (
        [(1, 14), (1, 15)] if bucket == 1 else [(2, 8)]
    )
    for number, batch in enumerate(batches):
        found = rows_of(model, batch)
        here = given[3 * number : 3 * number + 3] if bucket == 1 else given
        for place, prompt in enumerate(here):
            n = len(prompt.token_ids)
            whole = attention.capture(model, np.array([prompt.token_ids]), np.array([n - 1]))
            for ours, row in zip(found, [one for one in whole if one is not None], strict=True):
                assert np.abs(ours[place, :, :n] - np.array(row)[0]).max() <= 1e-5
                assert not ours[place, :, n:].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "deepseek_v2"])
def test_gradients_are_those_of_whole_prompts(tiny: ModuleType, name: str) -> None:
    given = prompts()
    step = step_of(tiny.build(name))
    whole, whole_terms = step.gradients(micro_batches(given, 6), 0.5)
    # Of 8 tokens with a third group that only fills the shape.
    thrice = [*given, *given[:3]]
    cut = micro_batches(thrice, 6, together=3, bucket_tokens=8)
    assert [(one.prompts, one.shape[0], len(one.prefix)) for one in cut] == [(6, 6, 2), (3, 6, 2)]
    both, _ = step.gradients(cut, 0.5)
    twice, _ = step.gradients(micro_batches(thrice, 9), 0.5)
    for (path, one), (_, other) in zip(tree_flatten(both), tree_flatten(twice), strict=True):
        assert np.abs(np.array(one - other)).max() <= 2e-5, path
    for bucket in (1, 8):
        batches = micro_batches(given, 6, together=3, bucket_tokens=bucket)
        shared, terms = step.gradients(batches, 0.5)
        assert np.allclose(np.array(terms), np.array(whole_terms), rtol=1e-5)
        ours = dict(tree_flatten(shared))
        for path, one in tree_flatten(whole):
            assert np.abs(np.array(ours[path] - one)).max() <= 1e-5, path
            assert float(mx.abs(one).max()) > 1e-4


def test_end_to_end_shares_too(tiny: ModuleType) -> None:
    import mlx.optimizers as optim

    from abft_mlx.trainer.step import Step

    given = prompts()
    model = step_of(tiny.build("llama")).model
    step = Step(
        model,
        optim.Adam(1e-3),
        reward_weight=0.0,
        use_filter=True,
        objective="end_to_end",
        compiled=False,
    )
    whole, terms = step.gradients(micro_batches(given, 6), 0.0)
    shared, shared_terms = step.gradients(micro_batches(given, 6, together=3, bucket_tokens=1), 0.0)
    assert np.allclose(np.array(terms), np.array(shared_terms), rtol=1e-5)
    ours = dict(tree_flatten(shared))
    for path, one in tree_flatten(whole):
        assert np.abs(np.array(ours[path] - one)).max() <= 1e-5, path


def test_prompts_that_share_nothing_go_as_they_are() -> None:
    one, other = prompts()[0], prompts()[3]
    (batch,) = micro_batches([one, other], 2, together=2, bucket_tokens=8)
    assert batch.prefix is None
    assert batch.tokens == len(one.token_ids) + len(other.token_ids)


def test_what_cannot_be_shared_is_refused_in_one_line(tiny: ModuleType) -> None:
    for name, said in {"qwen3_next": "ArraysCache", "gemma3n": "another layer's cache"}.items():
        model = tiny.build(name)
        (batch,) = micro_batches(prompts()[:3], 3, together=3, bucket_tokens=1)
        with pytest.raises(UnsupportedArchitectureError, match=said) as raised:
            rows_of(model, batch)
        assert "training.shared_demonstrations to 1" in str(raised.value)


def test_groups_of_rows() -> None:
    plain = training_rows(6, 50, 4)
    assert training_rows(6, 50, 4, together=1) == plain
    rows = training_rows(8, 50, 4, together=3)
    assert len(rows) == 8
    for start in (0, 3, 6):
        group = rows[start : start + 3]
        assert len({one[:4] for one in group}) == 1
        assert len({*group[0][:4], *(one[4] for one in group)}) == 4 + len(group)
    assert rows[0][:4] != rows[3][:4]
    with pytest.raises(ValueError, match="needs 7 distinct rows"):
        training_rows(3, 6, 4, together=3)


def test_a_prompt_that_begins_another_keeps_its_last_token() -> None:
    whole = prompts()[0]
    shorter = Prompt(whole.token_ids[:18], (3, 8, 13), (0, 1, 0), 0, (5,))
    (batch,) = micro_batches([whole, shorter], 2, together=2, bucket_tokens=1)
    assert batch.prefix is not None
    assert batch.prefix.shape == (1, 17)
    assert batch.batch.last.tolist() == [len(whole.token_ids) - 1, 17]
