"""A cached prefix changes nothing but the cost: every architecture's answers stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from abft_mlx import evaluation, ports
from abft_mlx.prefix import Prefix, cacheable, common_prefix
from abft_mlx.prompts import LabelSpace, Prompt, batches

Import = Callable[[str], ModuleType]
SPACE = LabelSpace(("a", "b", "c"), ("a", "b", "c"), ((3,), (5,), (8,)))
# Longer than the tiny models' windows of 9; the prompts behind it are shorter and longer.
SHARED = tuple(np.random.default_rng(0).integers(1, 96, 22).tolist())
# mlx-lm gives other hidden states with a cache than without.
DIFFERENT = {"plamo3"}
# Llama 4 has a kind of cache of its own.
WHOLE = DIFFERENT | {"llama4"}


def prompt(own: int, seed: int, shared: tuple[int, ...] = SHARED) -> Prompt:
    ids = np.random.default_rng(seed).integers(1, 96, own).tolist()
    return Prompt((*shared, *ids), (2, 7), (0, 1), 0, (3,))


PROMPTS = [prompt(own, seed) for seed, own in enumerate((12, 1, 3, 2, 9, 30, 1, 2))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", ports.supported())


def whole(model: nn.Module, prompts: list[Prompt]) -> np.ndarray:
    """Stock mlx-lm's logits of the label tokens, a whole prompt at a time, as probabilities."""
    needed = ports.port_for(model).needs_cache
    rows = [
        model(mx.array([one.token_ids]), cache=make_prompt_cache(model) if needed else None)[0, -1]
        for one in prompts
    ]
    labels = mx.stack(rows).astype(mx.float32)[:, mx.array(SPACE.first_ids)]
    return np.array(mx.softmax(labels, axis=-1))


def test_cached_equals_stock_whole_prompts(name: str, benchmark: Import) -> None:
    model = benchmark("tiny_configs").build(name)
    prefix = Prefix(model, SHARED)
    assert len(prefix) == (0 if name in WHOLE else len(SHARED))
    found = evaluation.label_probabilities(model, PROMPTS, SPACE, batch_tokens=256, prefix=prefix)
    np.testing.assert_allclose(found, whole(model, PROMPTS), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3_next"])
def test_hidden_states_of_ragged_batches(kind: str, benchmark: Import) -> None:
    model = benchmark("tiny_configs").build(kind)
    port = ports.port_for(model)
    prefix = Prefix(model, SHARED)
    for longest in (1, 2, 7):
        tokens, _ = benchmark("tiny_configs").tokens(longest, batch=1)
        rows = [tokens[0].tolist()[: max(1, longest - cut)] for cut in (0, 1, 3)]
        padded = mx.array([row + [0] * (longest - len(row)) for row in rows])
        for _ in range(2):  # what a batch adds to the cache is thrown away
            hidden = prefix.hidden(padded)
            for row, own in enumerate(rows):
                expected = port.hidden(model, mx.array([[*SHARED, *own]]))[0, -1]
                difference = mx.abs(hidden[row, len(own) - 1] - expected).max().item()
                assert difference <= 1e-5 * max(1.0, mx.abs(expected).max().item())


@pytest.mark.parametrize("kind", sorted(DIFFERENT))
def test_the_exceptions_are_exceptions(kind: str, benchmark: Import) -> None:
    """If mlx-lm comes to agree with itself here, the port's note can go."""
    model = benchmark("tiny_configs").build(kind)
    port = ports.port_for(model)
    assert not port.same_with_cache
    tokens = mx.array([PROMPTS[0].token_ids])
    cache = make_prompt_cache(model)
    port.hidden(model, tokens[:, :22], cache)
    behind = port.hidden(model, tokens[:, 22:], cache)[:, -1]
    assert mx.abs(behind - port.hidden(model, tokens)[:, -1]).max().item() > 1e-2


def test_only_own_tokens_are_computed(benchmark: Import) -> None:
    model = benchmark("tiny_configs").build("llama")
    prefix = Prefix(model, SHARED)
    seen = []

    def note(_layer: int, hidden: mx.array) -> mx.array:
        seen.append(hidden.shape[:2])
        return hidden

    short = [one for one in PROMPTS if len(one.token_ids) <= len(SHARED) + 8]
    with ports.hook_blocks(model, before=note):
        evaluation.label_probabilities(model, short, SPACE, batch_tokens=1024, prefix=prefix)
    assert set(seen) == {(len(short), 8)}


def test_prompts_that_begin_otherwise_are_computed_whole(benchmark: Import) -> None:
    model = benchmark("tiny_configs").build("llama")
    other = tuple(reversed(SHARED))
    # Whole ones, cached ones and the bare prefix, which leaves no token to go on from, in turn.
    mixed = [*PROMPTS[:2], prompt(4, 8, other), PROMPTS[2], prompt(0, 9), prompt(1, 10, other[:5])]
    prefix = Prefix(model, SHARED)
    assert [prefix.begins(one) for one in mixed] == [True, True, False, True, False, False]
    done: list[tuple[int, int]] = []
    found = evaluation.label_probabilities(
        model, mixed, SPACE, batch_tokens=64, prefix=prefix,
        on_progress=lambda *counts: done.append(counts),
    )  # fmt: skip
    np.testing.assert_allclose(found, whole(model, mixed), atol=1e-5)
    assert done[-1] == (len(mixed), len(mixed))
    assert [one for one, _ in done] == sorted({one for one, _ in done})


def test_a_cache_of_an_unknown_kind_is_not_used(benchmark: Import) -> None:
    model = benchmark("tiny_configs").build("llama")

    class Other(KVCache):
        """Who knows what it does."""

    for kind in (Other, lambda: QuantizedKVCache(group_size=32)):
        model.make_cache = lambda kind=kind: [KVCache(), kind(), KVCache()]
        assert len(Prefix(model, SHARED)) == 0
        assert not cacheable(model)
    model.make_cache = lambda: [KVCache() for _ in range(3)]
    assert cacheable(model)


def test_half_precision_stays_half(benchmark: Import) -> None:
    model = benchmark("tiny_configs").build("llama")
    model.set_dtype(mx.bfloat16)
    prefix = Prefix(model, SHARED)
    assert prefix.hidden(mx.array([[1, 2], [3, 4]])).dtype == mx.bfloat16


def test_common_prefix() -> None:
    assert common_prefix([one.token_ids for one in PROMPTS]) == SHARED
    assert common_prefix([(1, 2)]) == (1, 2)
    assert common_prefix([(1, 2), (1, 2, 3)]) == (1, 2)
    assert common_prefix([(1, 2, 9), (1, 3, 9), (1, 2, 3)]) == (1,)
    assert common_prefix([(1, 2), (2, 2), ()]) == ()


def test_cached_tokens_count_in_a_batch() -> None:
    plain = batches(PROMPTS, max_tokens=256)
    counted = batches(PROMPTS, max_tokens=256, cached_tokens=192)
    assert max(map(len, plain)) > 1
    assert max(map(len, counted)) == 1
