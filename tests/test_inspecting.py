"""Looking at heads: both states of a model, prompts as tokens, and a model left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import made_tokenizers
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from heard import Heard
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from abft_mlx import adapters, attention, experiment, loading
from abft_mlx import recipe as recipes
from abft_mlx.experiment import opened as opening
from abft_mlx.induction import read_heads, threshold
from abft_mlx.recipe import AdapterSection

SMALL = (
    "training.examples=24", "training.updates=3", "training.prompts_per_update=8",
    "training.learning_rate=0.01", "training.census_prompts=10", "evaluation.queries=24",
    "evaluation.repeats=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    experiment.finetune(recipes.load("demo", SMALL), folder)
    return folder


def test_a_run_keeps_what_a_fresh_look_at_base_and_adapter_sees(run: Path) -> None:
    kept = read_heads(run / "heads.npz")
    assert list(kept.states) == ["before", "after"]
    assert kept.prompts == 10
    assert kept.labels == ("complaint", "order", "praise")
    assert kept.facts == {"model": "demo", "data": "demo", "seed": 42, "k": 4, "adapter": None}
    recipe = recipes.load(str(run / "recipe.yaml"))
    for name, adapter in (("before", None), ("after", run)):
        opened = experiment.prepare(recipe, adapter)
        chosen = opened.test_prompts()[:10]
        # Loops over single prompts, and no census.
        mass, sink, kept_share = [], [], []
        for prompt in chosen:
            rows = attention.capture(
                opened.loaded.model, np.array([prompt.token_ids]), np.array([prompt.last])
            )
            row = np.stack([np.asarray(one[0]) for one in rows if one is not None])
            mass.append(row[:, :, list(prompt.label_positions)].sum(axis=-1))
            sink.append(row[:, :, 0])
            limit = threshold(4, mx.array([len(prompt.token_ids)])).item()
            kept_share.append(mass[-1] > limit)
        state = kept.states[name]
        np.testing.assert_allclose(state.magnitude, np.mean(mass, axis=0), atol=1e-5)
        np.testing.assert_allclose(state.sink, np.mean(sink, axis=0), atol=1e-5)
        np.testing.assert_allclose(state.share, np.mean(kept_share, axis=0))
        assert state.detected is None
        texts = [opened.loaded.tokenizer.decode(list(one.token_ids)) for one in chosen]
        for example in kept.examples:
            prompt = chosen[texts.index("".join(example.tokens))]
            rows = attention.capture(
                opened.loaded.model, np.array([prompt.token_ids]), np.array([prompt.last])
            )
            for layer, one in enumerate(rows):
                assert one is not None
                np.testing.assert_allclose(
                    example.rows[name][layer], np.asarray(one[0]), rtol=2e-3, atol=1e-6
                )
            words = opened.task.space.words
            for at, label in zip(
                example.label_positions, example.demonstration_labels, strict=True
            ):
                assert example.tokens[at].strip() == words[label].strip()
    difference = kept.states["after"].magnitude - kept.states["before"].magnitude
    assert np.abs(difference).max() > 0.01


def test_examples_show_as_many_classes_as_can_be(run: Path) -> None:
    kept = read_heads(run / "heads.npz")
    assert len(kept.examples) == 3
    opened = experiment.prepare(recipes.load(str(run / "recipe.yaml")))
    able = [one for one in opened.test_prompts()[:10] if one.gold in one.demonstration_labels]
    classes = {one.gold for one in able}
    assert 1 < len(classes) < len(able)
    assert {one.gold for one in kept.examples} == classes
    assert all(one.gold in one.demonstration_labels for one in kept.examples)


def test_looking_leaves_the_model_as_it_was() -> None:
    opened = experiment.prepare(recipes.load("demo", SMALL))
    model = opened.loaded.model
    base = opened.census(opened.test_prompts()[:8])
    adapters.attach(model, AdapterSection(kind="full"), seed=1)
    tiny_models.train(model)
    before = dict(tree_flatten(model.parameters()))
    trainable = [name for name, _ in tree_flatten(model.trainable_parameters())]
    seen = opened.heads(opened.test_prompts()[:8], examples=1)
    after = dict(tree_flatten(model.parameters()))
    assert list(before) == list(after)
    assert all((before[name] == after[name]).all().item() for name in before)
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == trainable
    np.testing.assert_allclose(seen.states["before"].magnitude, base.magnitude, atol=1e-6)
    trained = opened.census(opened.test_prompts()[:8])
    np.testing.assert_allclose(seen.states["after"].magnitude, trained.magnitude, atol=1e-6)
    assert np.abs(trained.magnitude - base.magnitude).max() > 0.01


def test_progress_counts_both_states_to_the_end() -> None:
    opened = experiment.prepare(recipes.load("demo", [*SMALL, "evaluation.batch_tokens=200"]))
    adapters.attach(opened.loaded.model, AdapterSection(), seed=1)
    heard = Heard()
    told = heard.counts
    opened.heads(opened.test_prompts()[:8], events=heard)
    assert told[-1] == (16, 16)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {16}
    told.clear()
    opened.heads(opened.test_prompts()[:8], detectors=True, events=heard)
    assert told[-1] == (272, 272)  # two states of 8 prompts and 128 random rows
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_detectors_fit_the_context(tmp_path: Path) -> None:
    tiny_models.checkpoint(tmp_path / "model", "gpt2", n_positions=31, n_ctx=31)
    opened = experiment.prepare(recipes.load("demo", SMALL))
    small = loading.load_model(str(tmp_path / "model"))
    assert small.context_tokens == 31
    small_one = replace(opened, loaded=small)
    seen = small_one.heads([], detectors=True).states["before"].detected
    assert seen is not None
    assert seen.repeated_tokens == 15


TEXT = "One naïve café — 日本語 and 🦊🦊\n\tTabs,  two spaces <b>&amp;</b> ' praise"


def decoded_whole(tokenizer: TokenizerWrapper, token_ids: list[int]) -> list[str]:
    """What each token adds, by decoding the whole beginning again for every token."""
    texts, shown = [], ""
    for n in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:n])
        if n < len(token_ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        same = min(len(shown), len(text))
        while shown[:same] != text[:same]:
            same -= 1
        texts.append("" if same == len(text) else text[same:])
        shown = shown if same == len(text) else text
    return texts


@pytest.mark.parametrize("maker", ["gpt2", "tekken", "llama2", "llama2_bytes", "gemma", "unigram"])
def test_token_texts_of_long_prompts_are_those_of_the_whole(maker: str, tmp_path: Path) -> None:
    getattr(made_tokenizers, maker)().save_pretrained(tmp_path)
    tokenizer = load(tmp_path)
    text = f"{TEXT} 👩‍👩‍👧‍👦 ᚠᛇᚻ 한국어 don 't . "
    token_ids = tokenizer.encode(text * 3)
    assert len(token_ids) > 100
    assert list(opening.token_texts(tokenizer, token_ids)) == decoded_whole(tokenizer, token_ids)


def test_the_work_for_a_token_text_does_not_grow_with_the_prompt() -> None:
    class Counting:
        decoded = 0

        def decode(self, token_ids: list[int]) -> str:
            self.decoded += len(token_ids)
            return "x" * len(token_ids)

    short, long = Counting(), Counting()
    opening.token_texts(short, range(500))
    opening.token_texts(long, range(2000))
    assert long.decoded < 5 * short.decoded
