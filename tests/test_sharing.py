"""Prompts of an evaluation that begin alike: cheaper, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_task
from cli_support import document, invoke
from hypothesis import given
from hypothesis import strategies as st
from test_prefix import SPACE, whole

from abft_mlx import evaluation, ports
from abft_mlx.data import demonstration_rows
from abft_mlx.evaluation import bias, unseen
from abft_mlx.evaluation.sharing import parts
from abft_mlx.prediction import Predictor
from abft_mlx.prefix import Group, groups
from abft_mlx.prompts import Prompt

FIXED = "evaluation.demonstrations=fixed"
# Keys and values, windows of 9 tokens, latent keys, recurrent states, soft-caps.
KINDS = ("llama", "gpt2", "qwen2", "gemma3_text", "deepseek_v3", "qwen3_next", "gemma2")


def made(beginning: int, own: int, seed: int) -> Prompt:
    """A prompt whose first tokens hang on their number alone."""
    shared = np.random.default_rng(beginning).integers(1, 96, beginning).tolist()
    rest = np.random.default_rng(100 + seed).integers(1, 96, own).tolist()
    return Prompt((*shared, *rest), (2, 7), (0, 1), 0, (3,))


def mixed() -> list[Prompt]:
    """A large group; pairs whose beginnings are of nearly one length; alone ones; twins."""
    large = [made(30, own, own) for own in (1, 2, 3, 3, 5, 8, 13, 40)]
    pairs = [made(size, own, size + own) for size in (21, 22, 23) for own in (2, 11)]
    alone = [made(0, own, 7 * own) for own in (5, 26)]
    prompts = [*large, *pairs, *alone, large[2], alone[1]]
    return [prompts[row] for row in np.random.default_rng(0).permutation(len(prompts))]


def passed(model: nn.Module, work: Callable[[], np.ndarray]) -> tuple[np.ndarray, list]:
    """What some work gives, and the shapes that pass through the first block for it."""
    seen = []

    def note(layer: int, hidden: mx.array) -> mx.array:
        if layer == 0:
            seen.append(tuple(hidden.shape[:2]))
        return hidden

    with ports.hook_blocks(model, before=note):
        return work(), seen


@pytest.mark.parametrize("batch_tokens", [48, 400, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_beginnings_equal_stock_whole_prompts(
    kind: str, batch_tokens: int, benchmark: Callable[[str], ModuleType]
) -> None:
    model, prompts = benchmark("tiny_configs").build(kind), mixed()
    found, seen = passed(
        model,
        lambda: evaluation.label_probabilities(model, prompts, SPACE, batch_tokens=batch_tokens),
    )
    expected = whole(model, prompts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.argmax(axis=1).tolist() == expected.argmax(axis=1).tolist()
    # The large group's; with room for them the twins' and two pairs', cut to 22; another pair's.
    beginnings = {(1, 30), (3, 22), (1, 21)} if batch_tokens == 4096 else {(1, 30)}
    # A long one does not pad the others of its group.
    assert beginnings | {(1, 40)} <= set(seen)


def test_hidden_states_keep_their_order(benchmark: Callable[[str], ModuleType]) -> None:
    model, prompts = benchmark("tiny_configs").build("llama"), mixed()
    told: list[tuple[int, int]] = []
    found = evaluation.hidden_states(
        model, prompts, batch_tokens=100, on_progress=lambda *counts: told.append(counts)
    )
    port = ports.port_for(model)
    for one, prompt in zip(found, prompts, strict=True):
        expected = port.hidden(model, mx.array([prompt.token_ids]))[0, -1]
        assert mx.abs(one - expected).max().item() <= 1e-5 * mx.abs(expected).max().item()
    assert told[-1] == (len(prompts), len(prompts))
    assert all(one < other for (one, _), (other, _) in pairwise(told))


def test_models_without_a_cache_that_fits_go_the_old_way(
    benchmark: Callable[[str], ModuleType],
) -> None:
    pytest.importorskip("mlx_lm.models.plamo3", reason="the installed mlx-lm has no plamo3")
    model, prompts = benchmark("tiny_configs").build("plamo3"), mixed()
    (only,) = parts(model, prompts, 4096)
    assert only.prefix is None
    found = evaluation.label_probabilities(model, prompts, SPACE, batch_tokens=4096)
    np.testing.assert_allclose(found, whole(model, prompts), atol=1e-5)


def test_kept_beginnings_are_few_and_let_go_of(benchmark: Callable[[str], ModuleType]) -> None:
    model = benchmark("tiny_configs").build("llama")
    prompts = [made(size, own, size + own) for size in range(40, 44) for own in (1, 2)]
    for batch_tokens, together in ((8 * 159, [3, 1]), (8 * 43, [1, 1, 1, 1]), (8 * 200, [4])):
        found = [one.prefix for one in parts(model, prompts, batch_tokens)]
        assert [len(one.beginnings) for one in found if one is not None] == together
    apart = [made(size, own, size + own) for size in (20, 40) for own in (1, 2)]
    assert [len(one.prefix) for one in parts(model, apart, 8 * 200)] == [40, 20]


def test_groups() -> None:
    a, b, c = (1, 1, 1, 1), (2, 2, 2, 2), (1, 1, 1, 9, 9, 9, 9)
    assert groups([]) == groups([a]) == groups([(1,), (1,)]) == []
    # Two pairs that share four and seven spare more than four that share three.
    tokens = [(*a, 5), (*c, 6), (*b, 7), (*c, 8), (*a, 6)]
    assert groups(tokens) == [Group(4, (0, 4)), Group(7, (1, 3))]
    # Of the twins each keeps its last token.
    assert groups([a, b, a]) == [Group(3, (0, 2))]
    # Two tokens of twenty are not worth a pass of their own, ten are.
    long = tuple(range(10, 28))
    assert groups([(1, 2, *long), (1, 2, *reversed(long))]) == []
    half = (*a, *a, 1, 1)
    assert groups([(*half, *long[:10]), (*half, *long[8:])]) == [Group(10, (0, 1))]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), max_size=9))
def test_groups_are_what_they_say(tokens: list[tuple[int, ...]]) -> None:
    found = groups(tokens)
    rows = [row for one in found for row in one.rows]
    assert len(rows) == len(set(rows))
    for one in found:
        chosen = [tokens[row] for row in one.rows]
        assert len({tokens[: one.size] for tokens in chosen}) == 1
        assert all(len(tokens) > one.size > 0 for tokens in chosen)
        assert 4 * one.size * (len(chosen) - 1) >= sum(map(len, chosen))


def test_fixed_rows() -> None:
    drawn = demonstration_rows(5, 3, 30, 4, seed=7)
    assert demonstration_rows(5, 3, 30, 4, seed=7, fixed=True) == [
        row for row in drawn[:3] for _ in range(5)
    ]


def test_fixed_demonstrations_are_computed_once_a_repeat() -> None:
    task, section = tiny_task.task(), tiny_task.recipe(FIXED).evaluation
    prompts, model = task.test_prompts(section), tiny_task.model()
    found, seen = passed(
        model,
        lambda: evaluation.label_probabilities(model, prompts, task.space, batch_tokens=4096),
    )
    whole = sum(len(one.token_ids) for one in prompts)
    assert sum(rows * tokens for rows, tokens in seen) < whole / 2
    for one, row in zip(prompts, found, strict=True):
        logits = model(mx.array([one.token_ids]))[0, -1][mx.array(task.space.first_ids)]
        np.testing.assert_allclose(row, np.array(mx.softmax(logits)), atol=1e-5)
    # The first repeat's are those of predict, whose answers are the same.
    shown = [one.demonstration_labels for one in prompts]
    assert len(set(shown[:10])) == len(set(shown[10:])) == 1
    pool = task.splits.demonstrations.pairs()
    pairs = [pool[row] for row in demonstration_rows(1, 1, len(pool), 3)[0]]
    answers = Predictor(model, task.builder, pairs, 4096).probabilities(prompts[:10])
    np.testing.assert_allclose(answers, found[:10], atol=1e-5)


def test_fixed_wrong_labels_are_wrong_for_all_queries() -> None:
    task, section = tiny_task.task(), tiny_task.recipe(FIXED).evaluation
    made = bias.wrong_label_prompts(task, section)
    assert made[0] == task.test_prompts(section)
    for prompts in made:
        shown = [one.demonstration_labels for one in prompts]
        assert len(set(shown[:10])) == len(set(shown[10:])) == 1
    right, wrong = made[0][0].demonstration_labels, made[-1][0].demonstration_labels
    assert [(one - other) % 3 for one, other in zip(wrong, right, strict=True)] == [1, 1, 1]


def test_fixed_unseen_labels_are_the_same_for_all_queries_of_a_label() -> None:
    task, section = tiny_task.task(), tiny_task.recipe(FIXED).evaluation
    prompts = unseen.unseen_prompts(task, section)
    plain = task.test_prompts(section)
    assert [one.gold for one in prompts] == [one.gold for one in plain]
    sets: dict[tuple[int, int], set] = {}
    for place, one in enumerate(prompts):
        assert one.gold not in one.demonstration_labels
        shown = one.token_ids[: one.label_positions[-1] + 1]
        sets.setdefault((place // 10, one.gold), set()).add(shown)
    assert {len(one) for one in sets.values()} == {1}
    assert len(set.union(*sets.values())) > 2


def test_eval_says_that_demonstrations_are_fixed() -> None:
    small = ("--set", "evaluation.queries=6", "--set", FIXED)
    assert "12 prompts with 4 fixed demonstrations" in invoke("eval", "demo", *small).stdout
    plain = document(invoke("eval", "demo", *small[:2], "--json"))
    assert plain["demonstrations"] == "per_query"
