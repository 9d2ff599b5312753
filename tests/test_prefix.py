"""Prompts that begin alike are cheaper, and nothing else: against whole prompts, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_task
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache
from step_support import step_of

from abft_mlx import attention, evaluation, ports, prefix
from abft_mlx.data import demonstration_rows, training_rows
from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prediction import Predictor
from abft_mlx.prefix import Prefix, cacheable, common_prefix
from abft_mlx.prompts import LabelSpace, Prompt, batches
from abft_mlx.trainer.batches import micro_batches

SPACE = LabelSpace(("a", "b", "c"), ("a", "b", "c"), ((3,), (5,), (8,)))
# Longer than the tiny models' windows of 9; the prompts behind it are shorter and longer.
SHARED = tuple(np.random.default_rng(0).integers(1, 96, 22).tolist())
# In plamo3 mlx-lm gives other hidden states with a cache; Llama 4 has a cache of its own kind.
WHOLE = {"plamo3", "llama4"}
# Fused; windows; latent keys; keys of two attentions in a block; soft-caps; sinks and windows.
TRAINED = ("llama", "gpt2", "gemma3_text", "deepseek_v3", "gemma2", "gpt_oss", "gemma4_text")
# Recurrent states beside these, for prediction alone.
KINDS = ("llama", "gpt2", "gemma3_text", "deepseek_v3", "qwen3_next", "gemma2")
# Label words of one token; two; one that begins others, with its end; ones that begin alike.
TARGETS = ((3,), (5, 8), (7, 1), (7, 2, 4), (7, 2, 6), (9, 11, 13, 15), (7, 2, 1))
NAMES = tuple("abcdefg")
WORDS = LabelSpace(NAMES, NAMES, (*TARGETS[:2], (7,), *TARGETS[3:6], (7, 2)), TARGETS)


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def prompt(own: int, seed: int, shared: tuple[int, ...] = SHARED) -> Prompt:
    ids = np.random.default_rng(seed).integers(1, 96, own).tolist()
    return Prompt((*shared, *ids), (2, max(len(shared) - 1, 0)), (0, 1), 0, (3,))


PROMPTS = [prompt(own, seed) for seed, own in enumerate((12, 1, 3, 2, 9, 30, 1, 2))]


def mixed() -> list[Prompt]:
    """Two groups with the same demonstrations, and prompts that share theirs with too few."""
    beginnings = {n: tuple(np.random.default_rng(n).integers(1, 96, n).tolist()) for n in (30, 21)}
    large = [prompt(own, own, beginnings[30]) for own in (1, 2, 3, 3, 5, 8, 13, 40)]
    small = [prompt(own, own, beginnings[21]) for own in (2, 11, 4, 4)]
    alone = [prompt(own, own, SHARED[:size]) for size, own in ((9, 5), (9, 26), (12, 3))]
    prompts = [*large, *small, *alone, large[2]]
    return [prompts[row] for row in np.random.default_rng(0).permutation(len(prompts))]


def stock(model: nn.Module, tokens: tuple[int, ...]) -> mx.array:
    """(T, V) float32 logits of the model's own code, a whole prompt at a time."""
    needed = ports.port_for(model).needs_cache
    cache = make_prompt_cache(model) if needed else None
    return model(mx.array([tokens]), cache=cache)[0].astype(mx.float32)


def whole(model: nn.Module, prompts: list[Prompt]) -> np.ndarray:
    rows = mx.stack([stock(model, one.token_ids)[-1] for one in prompts])
    return softmax(np.array(rows[:, mx.array(SPACE.first_ids)]))


def log_probability(model: nn.Module, start: tuple[int, ...], target: tuple[int, ...]) -> mx.array:
    """Of a target behind a prompt, from one whole forward pass of the model's own code."""
    logits = stock(model, (*start, *target[:-1]))[len(start) - 1 :]
    each = logits - mx.logsumexp(logits, axis=1, keepdims=True)
    return each[mx.arange(len(target)), mx.array(target)].sum()


def shapes_through(model: nn.Module, work: Callable[[], Any]) -> list[tuple[int, int]]:
    """(rows, tokens) that pass through the first block for some work."""
    shapes = []

    def note(layer: int, hidden: mx.array) -> mx.array:
        if layer == 0:
            shapes.append(tuple(hidden.shape[:2]))
        return hidden

    with ports.hook_blocks(model, before=note):
        work()
    return shapes


@pytest.mark.parametrize("name", ports.supported())
def test_every_architecture_behind_a_prefix(name: str, tiny: ModuleType) -> None:
    """Label probabilities are stock mlx-lm's, and rows are those of the whole prompts."""
    model = tiny.build(name)
    behind = Prefix(model, SHARED)
    assert len(behind) == (0 if name in WHOLE else len(SHARED))
    found = evaluation.label_probabilities(model, PROMPTS, SPACE, batch_tokens=256, prefix=behind)
    np.testing.assert_allclose(found, whole(model, PROMPTS), atol=1e-5)
    tokens = mx.array([one.token_ids[:25] for one in PROMPTS if len(one.token_ids) >= 25])
    last = np.array([24] * len(tokens))
    rows = behind.rows(tokens[:, len(behind) :], mx.array(last - len(behind)))
    for row, expected in zip(rows, attention.capture(model, tokens, last), strict=True):
        assert (row is None) == (expected is None)
        assert row is None or mx.abs(row - expected).max().item() <= 1e-5


@pytest.mark.parametrize("batch_tokens", [48, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_with_the_same_demonstrations_are_computed_behind_them(
    kind: str, batch_tokens: int, tiny: ModuleType
) -> None:
    model, given = tiny.build(kind), mixed()
    done: list[tuple[int, int]] = []

    def work() -> None:
        found = evaluation.label_probabilities(
            model, given, SPACE, batch_tokens=batch_tokens, on_progress=lambda *n: done.append(n)
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)

    expected = whole(model, given)
    shapes = shapes_through(model, work)
    # The demonstrations of both groups, once, and a long prompt that does not pad the others.
    assert sum(shape in ((1, 30), (1, 21)) for shape in shapes) == 2
    assert (1, 40) in shapes
    assert done[-1] == (len(given), len(given))
    assert all(one < other for (one, _), (other, _) in pairwise(done))
    result = evaluation.outputs(model, given, batch_tokens=100)
    for state, one in zip(result.hidden, given, strict=True):
        expected = ports.port_for(model).hidden(model, mx.array([one.token_ids]))[0, -1]
        assert mx.abs(state - expected).max().item() <= 1e-5 * max(1, mx.abs(expected).max().item())


@pytest.mark.parametrize("kind", [*KINDS, "plamo3"])
def test_label_words_are_scored_as_whole_forward_passes_say(kind: str, tiny: ModuleType) -> None:
    if kind == "plamo3":
        pytest.importorskip("mlx_lm.models.plamo3", reason="the installed mlx-lm has no plamo3")
    model, prompts = tiny.build(kind), mixed()
    scores = np.array(
        [[log_probability(model, one.token_ids, t).item() for t in TARGETS] for one in prompts]
    )
    for batch_tokens in (48, 4096):
        result = evaluation.outputs(model, prompts, batch_tokens=batch_tokens, space=WORDS)
        found = evaluation.label_scores(model, result, WORDS)
        # Nothing is missing but a constant of each prompt.
        assert np.ptp(found - scores, axis=1).max() <= 1e-5 * np.abs(scores).max()
    rows = [row for row, one in enumerate(prompts) if one.label_positions[-1] == 29]
    behind, some = Prefix(model, prompts[rows[0]].token_ids[:30]), [prompts[row] for row in rows]
    found = evaluation.label_probabilities(model, some, WORDS, batch_tokens=256, prefix=behind)
    np.testing.assert_allclose(found, softmax(scores[rows]), atol=1e-5)


def test_a_prompt_is_computed_once_for_all_classes(tiny: ModuleType) -> None:
    model, one = tiny.build("llama"), prompt(50, 1, ())

    def work() -> None:
        evaluation.label_probabilities(model, [one], WORDS, batch_tokens=4096)

    # The prompt, and rows for (5), (7), (7, 2) and (9, 11, 13).
    assert shapes_through(model, work) == [(1, 50), (4, 3)]


def test_a_cache_of_an_unknown_kind_is_not_used(tiny: ModuleType) -> None:
    model = tiny.build("llama")

    class Other(KVCache):
        """Who knows what it does."""

    for kind in (Other, lambda: QuantizedKVCache(group_size=32)):
        model.make_cache = lambda kind=kind: [KVCache(), kind(), KVCache()]
        assert len(Prefix(model, SHARED)) == 0
        assert not cacheable(model)


def test_half_precision_stays_half(tiny: ModuleType) -> None:
    model = tiny.build("llama")
    model.set_dtype(mx.bfloat16)
    assert Prefix(model, SHARED).hidden(mx.array([[1, 2], [3, 4]])).dtype == mx.bfloat16


def test_common_prefix() -> None:
    assert common_prefix([one.token_ids for one in PROMPTS]) == SHARED
    assert common_prefix([(1, 2), (1, 2, 3)]) == (1, 2)
    assert common_prefix([(1, 2, 9), (1, 3, 9), (1, 2, 3)]) == (1,)
    assert common_prefix([(1, 2), (2, 2), ()]) == ()


def test_cached_tokens_count_in_a_batch() -> None:
    assert max(map(len, batches(PROMPTS, max_tokens=256))) > 1
    assert max(map(len, batches(PROMPTS, max_tokens=256, cached_tokens=192))) == 1


def test_fixed_demonstrations_are_those_of_predict() -> None:
    task = tiny_task.task()
    section = tiny_task.recipe("evaluation.demonstrations=fixed").evaluation
    prompts, model = task.test_prompts(section), tiny_task.model()
    found = evaluation.label_probabilities(model, prompts, task.space, batch_tokens=4096)
    pool = task.splits.demonstrations.pairs()
    pairs = [pool[row] for row in demonstration_rows(1, 1, len(pool), 3)[0]]
    answers = Predictor(model, task.builder, pairs, 4096).probabilities(prompts[:10])
    np.testing.assert_allclose(answers, found[:10], atol=1e-5)
    drawn = demonstration_rows(5, 3, 30, 4, seed=7)
    fixed = demonstration_rows(5, 3, 30, 4, seed=7, fixed=True)
    assert fixed == [row for row in drawn[:3] for _ in range(5)]


# Training


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


def training_prompts() -> list[Prompt]:
    """The same, with targets of one to three tokens."""
    labels = (0, 3, 1, 0, 3, 1)
    return [
        replace(one, gold=label, target=TARGETS[label])
        for one, label in zip(prompts(), labels, strict=True)
    ]


def rows_of(model: Any, batch: Any) -> list[np.ndarray]:
    arrays = batch.arrays()
    behind = arrays["last"] - arrays["prefix"].shape[1]
    _, rows = prefix.forward(model, arrays["prefix"], arrays["tokens"], behind)
    return [np.array(one) for one in rows if one is not None]


def close(found: Any, expected: Any, limit: float = 1e-5) -> None:
    ours = dict(tree_flatten(found))
    for path, one in tree_flatten(expected):
        assert np.abs(np.array(ours[path] - one)).max() <= limit, path
        assert float(mx.abs(one).max()) > 1e-5


@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("name", TRAINED)
def test_rows_are_those_of_whole_prompts(tiny: ModuleType, name: str, bucket: int) -> None:
    model, given = tiny.build(name), training_prompts()
    cut = micro_batches(given, 6, together=3, bucket_tokens=bucket)
    shapes = [one.prefix.shape for one in cut if one.prefix is not None]
    assert shapes == ([(1, 14), (1, 15)] if bucket == 1 else [(2, 8)])
    for number, batch in enumerate(cut):
        found = rows_of(model, batch)
        here = given[3 * number : 3 * number + 3] if bucket == 1 else given
        for place, one in enumerate(here):
            n = len(one.token_ids)
            expected = attention.capture(model, np.array([one.token_ids]), np.array([n - 1]))
            for ours, row in zip(found, [r for r in expected if r is not None], strict=True):
                assert np.abs(ours[place, :, :n] - np.array(row)[0]).max() <= 1e-5
                assert not ours[place, :, n:].any()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "deepseek_v2"])
def test_gradients_are_those_of_whole_prompts(tiny: ModuleType, name: str) -> None:
    given = training_prompts()
    step = step_of(tiny.build(name))
    expected, terms = step.gradients(micro_batches(given, 6), 0.5)
    for bucket in (1, 8):
        found, same = step.gradients(micro_batches(given, 6, together=3, bucket_tokens=bucket), 0.5)
        assert np.allclose(np.array(same), np.array(terms), rtol=1e-5)
        close(found, expected)
    # Of 8 tokens with a third group that only fills the shape.
    thrice = [*given, *given[:3]]
    both, _ = step.gradients(micro_batches(thrice, 6, together=3, bucket_tokens=8), 0.5)
    close(both, step.gradients(micro_batches(thrice, 9), 0.5)[0], 2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3_next"])
def test_answers_of_several_tokens_are_trained_as_whole_forward_passes_say(
    kind: str, tiny: ModuleType
) -> None:
    import mlx.optimizers as optim

    from abft_mlx.trainer.step import Step

    prompts, model = training_prompts(), step_of(tiny.build(kind)).model

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return -sum(log_probability(model, one.token_ids, one.target) for one in prompts)

    parameters = model.trainable_parameters()
    expected, gradients = mx.value_and_grad(loss)(parameters)
    model.update(parameters)
    ways = [micro_batches(prompts, 4)]
    if kind != "qwen3_next":  # what it has read is no prefix that prompts can share
        ways += [micro_batches(prompts, 6, together=3, bucket_tokens=bucket) for bucket in (1, 8)]
    settings = {"reward_weight": 0.0, "use_filter": True, "compiled": False}
    step = Step(model, optim.Adam(1e-3), objective="end_to_end", **settings)
    _, abft = Step(model, optim.Adam(1e-3), objective="abft", **settings).gradients(ways[0], 0.0)
    for cut in ways:
        found, terms = step.gradients(cut, 0.0)
        assert terms[0].item() == pytest.approx(expected.item(), rel=1e-5)
        close(found, gradients, 5e-5)
        # The rows are those of the last position of the prompt, whatever stands behind it.
        np.testing.assert_allclose(np.array(terms[1:]), np.array(abft[1:]), rtol=1e-5)


def test_what_cannot_be_shared(tiny: ModuleType) -> None:
    for name, said in {"qwen3_next": "ArraysCache", "gemma3n": "another layer's cache"}.items():
        model = tiny.build(name)
        (batch,) = micro_batches(training_prompts()[:3], 3, together=3, bucket_tokens=1)
        with pytest.raises(UnsupportedArchitectureError, match=said) as raised:
            rows_of(model, batch)
        assert "training.shared_demonstrations to 1" in str(raised.value)
    one, other = training_prompts()[::3]
    (batch,) = micro_batches([one, other], 2, together=2, bucket_tokens=8)
    assert batch.prefix is None
    assert batch.tokens == len(one.token_ids) + len(other.token_ids)
    # A prompt that begins another keeps its last token.
    shorter = Prompt(one.token_ids[:18], (3, 8, 13), (0, 1, 0), 0, (5,))
    (batch,) = micro_batches([one, shorter], 2, together=2, bucket_tokens=1)
    assert batch.prefix is not None
    assert batch.prefix.shape == (1, 17)


def test_groups_of_rows() -> None:
    assert training_rows(6, 50, 4, together=1) == training_rows(6, 50, 4)
    rows = training_rows(8, 50, 4, together=3)
    for start in (0, 3, 6):
        group = rows[start : start + 3]
        assert len({one[:4] for one in group}) == 1
        assert len({*group[0][:4], *(one[4] for one in group)}) == 4 + len(group)
    assert rows[0][:4] != rows[3][:4]
