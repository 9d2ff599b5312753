"""``adapter.layers: auto``: the window, its loss, and whole runs with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny_models
from cli_support import document, invoke, write_model, write_texts
from graph_support import kept, primitives
from mlx.utils import tree_flatten, tree_unflatten
from step_support import autodiff, prompts, step_of

from abft_mlx import (
    attention,
    experiment,
    loading,
    ports,
    recompute,
)
from abft_mlx import recipe as recipes
from abft_mlx.events import OnUpdate
from abft_mlx.induction import Window, window
from abft_mlx.trainer.batches import micro_batches
from abft_mlx.trainer.step import Step


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def restricted(
    model: Any, layers: list[int], batch: dict[str, mx.array]
) -> tuple[mx.array, dict[str, np.ndarray]]:
    """The loss of some layers' rows, and its gradients by autodiff."""

    def rows() -> list[mx.array | None]:
        every = attention.capture(model, batch["tokens"], batch["last"])
        return [every[layer] for layer in layers]

    return autodiff(model, batch, rows)


def only(step: Step) -> Step:
    """The same model's step with the rows of trained layers alone."""
    return Step(
        step.model,
        optim.Adam(1e-3),
        reward_weight=1.0,
        use_filter=False,
        only_trained=True,
        compiled=False,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next", "deepseek_v2", "olmoe", "gemma3n"])
def test_gradients_are_those_of_the_layers_rows(tiny: ModuleType, name: str) -> None:
    model = tiny.build(name)
    with_heads = [n for n, one in enumerate(ports.heads(model)) if one is not None]
    layers = with_heads[:2]
    whole = step_of(model, layers)
    (batch,) = micro_batches(prompts(), 4)
    gradients, terms = only(whole).gradients([batch], 0.5)
    expected_terms, expected = restricted(model, layers, batch.arrays())
    np.testing.assert_allclose(np.array(terms), np.array(expected_terms), rtol=1e-5)
    found = dict(tree_flatten(gradients))
    assert found.keys() == expected.keys()
    for path, one in expected.items():
        np.testing.assert_allclose(np.array(found[path]), np.array(one), atol=1e-6, err_msg=path)
    assert max(mx.abs(one).max().item() for one in expected.values()) > 1e-4
    if len(with_heads) > len(layers):
        everything, all_terms = whole.gradients([batch], 0.5)
        assert all_terms[3].item() > terms[3].item()
        assert any(
            mx.abs(one - found[path]).max().item() > 1e-5 for path, one in tree_flatten(everything)
        )


def graph(layers: list[int] | None, only_trained: bool, depth: int) -> list[str]:
    """Names of the primitives of an exact step."""
    model = tiny_models.build("llama", num_hidden_layers=depth)
    step = step_of(model, layers)
    step = only(step) if only_trained else step
    (batch,) = micro_batches(prompts(), 4)
    names, parameters = zip(*tree_flatten(model.trainable_parameters()), strict=True)

    def train(*given: mx.array) -> Sequence[mx.array]:
        tree = tree_unflatten(list(zip(names, given, strict=True)))
        terms, gradients = step.value_and_grad(tree, batch.arrays(), mx.array(0.5))
        return [terms, *(one for _, one in tree_flatten(gradients))]

    return sorted(name for name, _ in primitives(train, parameters))


def test_nothing_above_the_window_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of five layers of which two train costs what one of two layers does."""
    monkeypatch.setattr(recompute, "again", kept)
    kinds = graph([0, 1], True, 5)
    assert kinds == graph(None, False, 2)
    assert len(graph([0, 1], False, 5)) > len(kinds)


AUTO = "adapter.layers=auto"
SMALL = (
    "training.examples=40",
    "training.updates=3",
    "training.prompts_per_update=8",
    "training.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> experiment.RunResult:
    folder = tmp_path_factory.mktemp("runs") / "auto"
    return experiment.finetune(recipes.load("demo", [*SMALL, AUTO]), folder)


def test_the_run_trains_where_the_heads_are(run: experiment.RunResult) -> None:
    """Oracle: heads counted prompt by prompt, in float64, on the base model."""
    base = loading.load_model("demo", None).model
    counts = np.zeros(3)
    chosen = run.experiment.training_prompts()[:32]
    for one in chosen:
        tokens = mx.array([one.token_ids])
        rows = attention.capture(base, tokens, mx.array([len(one.token_ids) - 1]))
        k = len(one.label_positions)
        limit = k / (k + math.log(len(one.token_ids)))
        for layer, row in enumerate(rows):
            mass = np.array(row[0], dtype=np.float64)[:, list(one.label_positions)].sum(axis=1)
            counts[layer] += (mass > limit).sum()
    saved = recipes.load(str(run.output))
    layers = saved.adapter.layers
    assert layers == run.experiment.recipe.adapter.layers == window(list(counts))
    assert 0 < len(layers) < 3
    assert saved.objective.layers == "trained"
    facts = json.loads((run.output / "run.json").read_text())
    np.testing.assert_allclose(facts["window"].pop("heads_by_layer"), counts / 32)
    assert facts["window"] == {"layers": layers, "prompts": 32, "share": 0.9}
    names = mx.load(str(run.output / "adapters.safetensors"))
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(layers)


class StopHereError(Exception):
    pass


def test_a_resumed_run_takes_no_census(
    run: experiment.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(update: Any) -> None:
        if update.step == 2:
            raise StopHereError

    folder = tmp_path / "cut"
    with pytest.raises(StopHereError):
        experiment.finetune(recipes.load("demo", [*SMALL, AUTO]), folder, events=OnUpdate(stop))

    def census(*_: object) -> None:
        raise AssertionError("a census")

    monkeypatch.setattr(Window, "of", census)
    resumed = experiment.finetune(None, folder)
    for name in ("adapters.safetensors", "recipe.yaml"):
        assert (folder / name).read_bytes() == (run.output / name).read_bytes()
    assert resumed.experiment.window == run.experiment.window
    ours, theirs = (json.loads((one / "run.json").read_text()) for one in (folder, run.output))
    assert ours["window"] == theirs["window"]


def said(*words: object) -> str:
    """The line on layers that finetune prints."""
    small = [f"--set={one}" for one in SMALL]
    result = invoke("finetune", *words, *small)
    assert result.exit_code == 0, result.stderr
    (line,) = [one for one in result.stdout.splitlines() if one.startswith("layers ")]
    return " ".join(line.split())


def test_the_command_says_which_layers_train_and_why(tmp_path: Path) -> None:
    def output(number: int) -> str:
        return f"--output={tmp_path / str(number)}"

    found = said("demo", output(0), f"--set={AUTO}")
    assert found == (
        "layers 1, 2 of 3 train: they hold 100% of the 3.8 induction heads in a prompt, "
        "seen in 32 training prompts"
    )
    assert "all train, as adapter.layers says" in said("demo", output(1))
    listed = said("demo", output(2), "--set=adapter.layers=[2, 0]")
    assert listed == "layers 0, 2 train, as adapter.layers says"
    result = invoke(
        "finetune", "demo", output(3), f"--set={AUTO}", *[f"--set={one}" for one in SMALL], "--json"
    )
    assert document(result)["layers"] == [1, 2]


def test_no_heads_and_it_is_said(tmp_path: Path) -> None:
    model, texts = write_model(tmp_path / "model"), write_texts(tmp_path / "texts.csv")
    output = tmp_path / "run"
    line = said("--model", model, "--data", texts, "--output", output, f"--set={AUTO}")
    assert line == "layers all train: no induction head was seen in 32 training prompts"
    assert recipes.load(str(output)).adapter.layers == [0, 1]


@pytest.mark.parametrize(
    ("changes", "objective"),
    [
        ([], "all"),
        (["adapter.layers=[1]"], "all"),
        ([AUTO], "trained"),
        ([AUTO, "objective.layers=all"], "all"),
        (["objective.layers=trained"], "trained"),
    ],
)
def test_whose_heads_count(changes: list[str], objective: str) -> None:
    assert recipes.resolve(recipes.default(changes)).objective.layers == objective
