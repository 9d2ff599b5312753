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
from test_prefix import SPACE, whole

from abft_mlx import evaluation, ports
from abft_mlx.data import demonstration_rows
from abft_mlx.evaluation import bias, unseen
from abft_mlx.prediction import Predictor
from abft_mlx.prompts import Prompt

FIXED = "evaluation.demonstrations=fixed"
# Keys and values, windows of 9 tokens, latent keys, recurrent states, soft-caps.
KINDS = ("llama", "gpt2", "qwen2", "gemma3_text", "deepseek_v3", "qwen3_next", "gemma2")


def made(beginning: int, own: int, seed: int) -> Prompt:
    """A prompt whose demonstrations hang on their length alone."""
    shared = np.random.default_rng(beginning).integers(1, 96, beginning).tolist()
    rest = np.random.default_rng(100 + seed).integers(1, 96, own).tolist()
    return Prompt((*shared, *rest), (2, beginning - 1), (0, 1), 0, (3,))


def mixed() -> list[Prompt]:
    """Two groups with the same demonstrations, and prompts that share theirs with too few."""
    large = [made(30, own, own) for own in (1, 2, 3, 3, 5, 8, 13, 40)]
    small = [made(21, own, own) for own in (2, 11, 4, 4)]
    alone = [made(size, own, 7 * own) for size, own in ((9, 5), (9, 26), (12, 3))]
    prompts = [*large, *small, *alone, large[2]]
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
    # The demonstrations of both groups, once, and a long prompt that does not pad the others.
    assert sum(shape in ((1, 30), (1, 21)) for shape in seen) == 2
    assert {(1, 30), (1, 21), (1, 40)} <= set(seen)


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
    assert made[0] == list(task.test_prompts(section))
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
