"""Looking at heads from Python: what ``abft_mlx.prepare`` opens, and one prompt row by row."""

from __future__ import annotations

import numpy as np
import pytest

import abft_mlx
from abft_mlx import recipe as recipes
from abft_mlx.experiment import Experiment, RunResult

SMALL = (
    "training.examples=16",
    "training.updates=2",
    "training.prompts_per_update=8",
    "training.census_prompts=0",
    "data.test_rows=12",
    "evaluation.queries=8",
    "evaluation.repeats=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return abft_mlx.finetune("demo", tmp_path_factory.mktemp("runs") / "run", overrides=SMALL)


@pytest.fixture(scope="module")
def opened(run: RunResult) -> Experiment:
    return abft_mlx.prepare(run.output, run.output)


def test_an_example_is_told_in_texts_and_right_labels(opened: Experiment) -> None:
    shown = [("the parcel broke", 0), ("send two lamps", 1), ("what a fine lamp", 2)]
    prompt = opened.task.builder.build(shown, "the lamp broke", 0)
    example = opened.example(prompt)
    assert "".join(example.tokens) == opened.task.builder.text(shown, "the lamp broke")
    words = [example.tokens[at].strip() for at in example.label_positions]
    assert words == [opened.task.space.words[label] for _, label in shown]
    assert example.right.tolist() == [True, False, False]


def test_attention_on_the_gold_label_is_that_of_the_rows(opened: Experiment) -> None:
    chosen = opened.test_prompts()
    examples = [opened.example(prompt) for prompt in chosen]
    seen = opened.heads(chosen)
    for name, state in seen.states.items():
        want = np.zeros_like(state.magnitude)
        for one in examples:
            for at, right in zip(one.label_positions, one.right, strict=True):
                want += one.rows[name][:, :, at] * right / len(examples)
        np.testing.assert_allclose(state.on_gold, want, atol=1e-5)


def test_without_an_adapter_there_is_one_state() -> None:
    opened = abft_mlx.prepare("demo", overrides=SMALL)
    prompts = opened.test_prompts()
    assert len(prompts) == 8
    assert list(opened.example(prompts[0]).rows) == ["before"]


def test_overrides_belong_to_names() -> None:
    with pytest.raises(TypeError, match="overrides"):
        abft_mlx.prepare(recipes.load("demo"), overrides=SMALL)
