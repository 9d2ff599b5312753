"""Label words of several tokens: scored and trained as whole forward passes of models say."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from step_support import step_of
from test_sharing import made, mixed

from abft_mlx import evaluation, ports
from abft_mlx.evaluation.metrics import softmax
from abft_mlx.prefix import Prefix
from abft_mlx.prompts import LabelSpace, Prompt
from abft_mlx.trainer.batches import MicroBatch, micro_batches
from abft_mlx.trainer.step import Step

# One token; two; one that begins others, with its end; three that begin alike; one of four.
TARGETS = ((3,), (5, 8), (7, 1), (7, 2, 4), (7, 2, 6), (9, 11, 13, 15), (7, 2, 1))
NAMES = tuple("abcdefg")
SPACE = LabelSpace(NAMES, NAMES, (*TARGETS[:2], (7,), *TARGETS[3:6], (7, 2)), TARGETS)
# Keys and values; windows of 9 tokens; latent keys; recurrent states; soft-caps; never cached.
KINDS = ("llama", "gpt2", "gemma3_text", "deepseek_v3", "qwen3_next", "gemma2", "plamo3")


def log_probability(model: nn.Module, prompt: tuple[int, ...], target: tuple[int, ...]) -> mx.array:
    """Of a target behind a prompt, from one whole forward pass of the model's own code."""
    needed = ports.port_for(model).needs_cache
    tokens = mx.array([(*prompt, *target[:-1])])
    logits = model(tokens, cache=make_prompt_cache(model) if needed else None)[0]
    logits = logits[len(prompt) - 1 :].astype(mx.float32)
    each = logits - mx.logsumexp(logits, axis=1, keepdims=True)
    return each[mx.arange(len(target)), mx.array(target)].sum()


def naive(model: nn.Module, prompts: list[Prompt]) -> np.ndarray:
    """(N, C) scores, one forward pass for each prompt and class."""
    return np.array(
        [[log_probability(model, one.token_ids, t).item() for t in TARGETS] for one in prompts]
    )


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_whole_forward_passes(kind: str, tiny: ModuleType) -> None:
    if kind == "plamo3":
        pytest.importorskip("mlx_lm.models.plamo3", reason="the installed mlx-lm has no plamo3")
    model, prompts = tiny.build(kind), mixed()
    scores = naive(model, prompts)
    expected = softmax(scores)
    told: list[tuple[int, int]] = []
    for batch_tokens in (48, 4096):
        found = evaluation.label_probabilities(
            model,
            prompts,
            SPACE,
            batch_tokens=batch_tokens,
            on_progress=lambda *counts: told.append(counts),
        )
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert told[-1] == (len(prompts), len(prompts))
    # Of the words' log-probabilities nothing is missing but a constant of each prompt.
    found = np.zeros(scores.shape)

    def read(one: evaluation.Outputs) -> None:
        found[one.rows] = evaluation.label_scores(model, one, SPACE)

    evaluation.hidden_states(model, prompts, batch_tokens=300, space=SPACE, each=read)
    assert np.ptp(found - scores, axis=1).max() <= 1e-5 * np.abs(scores).max()
    shared = [made(30, own, own) for own in (1, 2, 3, 3, 8, 40)]
    prefix = Prefix(model, shared[0].token_ids[:30])
    found = evaluation.label_probabilities(model, shared, SPACE, batch_tokens=256, prefix=prefix)
    np.testing.assert_allclose(found, softmax(naive(model, shared)), atol=1e-5)


def test_a_prompt_is_computed_once_for_all_classes(tiny: ModuleType) -> None:
    model, prompt = tiny.build("llama"), made(0, 50, 1)
    tokens = []

    def note(layer: int, hidden: mx.array) -> mx.array:
        if layer == 0:
            tokens.append(hidden.shape[0] * hidden.shape[1])
        return hidden

    with ports.hook_blocks(model, before=note):
        evaluation.label_probabilities(model, [prompt], SPACE, batch_tokens=4096)
    # The prompt, and three rows for (5), (7, 2) and (9, 11, 13).
    assert tokens == [50, 9]


def training_prompts() -> list[Prompt]:
    """Two groups of three whose targets are of one, two and three tokens."""
    source = np.random.default_rng(0)
    prompts = []
    for shared in (14, 15):
        beginning = source.integers(1, 90, shared).tolist()
        for number, (rest, label) in enumerate(((9, 0), (5, 3), (7, 1))):
            tokens = (*beginning, 90 + number, *source.integers(1, 90, rest).tolist())
            prompts.append(Prompt(tokens, (3, 8, 13), (0, 1, 0), label, TARGETS[label]))
    return prompts


def end_to_end(model: nn.Module, **options: object) -> Step:
    settings = {"reward_weight": 0.0, "use_filter": True, "objective": "end_to_end"} | options
    return Step(model, optim.Adam(1e-3), compiled=False, **settings)


def close(found: dict, expected: dict, limit: float = 1e-5) -> None:
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert set(found) == set(expected)
    for path, one in expected.items():
        assert np.abs(np.array(found[path] - one)).max() <= limit, path
    assert max(float(mx.abs(one).max()) for one in expected.values()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3_next"])
def test_loss_and_gradients_are_those_of_whole_forward_passes(kind: str, tiny: ModuleType) -> None:
    prompts = training_prompts()
    model = step_of(tiny.build(kind)).model

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return -sum(log_probability(model, one.token_ids, one.target) for one in prompts)

    parameters = model.trainable_parameters()
    expected, gradients = mx.value_and_grad(loss)(parameters)
    model.update(parameters)
    ways: dict[str, list[MicroBatch]] = {"alone": micro_batches(prompts, 4)}
    if kind != "qwen3_next":  # what it has read is no prefix that prompts can share
        ways["shared"] = micro_batches(prompts, 6, together=3, bucket_tokens=1)
        ways["rounded"] = micro_batches(prompts, 6, together=3, bucket_tokens=8)
    step = end_to_end(model)
    for name, batches in ways.items():
        found, terms = step.gradients(batches, 0.0)
        assert terms[0].item() == pytest.approx(expected.item(), rel=1e-5), name
        close(found, gradients, 2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_answers_change_nothing_of_what_heads_do(tiny: ModuleType, checkpointing: bool) -> None:
    """The rows are those of the last position of the prompt, whatever stands behind it."""
    prompts = training_prompts()
    model = step_of(tiny.build("llama")).model
    whole = end_to_end(model, checkpointing=checkpointing)
    gradients, terms = whole.gradients(micro_batches(prompts, 4), 0.0)
    abft = end_to_end(model, objective="abft")
    _, measured = abft.gradients(micro_batches(prompts, 4), 0.0)
    np.testing.assert_allclose(np.array(terms[1:]), np.array(measured[1:]), rtol=1e-5)
    plain, _ = end_to_end(model).gradients(micro_batches(prompts, 4), 0.0)
    close(gradients, plain)
