"""docs/abft_in_one_file.py: the same losses and gradients as the package, and a run of it."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_step_oracle import RANK, SCALE, batch_for, randomize_lora

from abft_mlx import adapters, ports, read_out
from abft_mlx.prompts import PromptBatch
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.batches import MicroBatch
from abft_mlx.trainer.step import Step

CLASSES = 3


@pytest.fixture(scope="module")
def one_file(checkout: Path) -> ModuleType:
    """The file as a module."""
    path = checkout / "docs/abft_in_one_file.py"
    spec = importlib.util.spec_from_file_location("abft_in_one_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def model_with_lora(folder: Path, weights: np.ndarray | None) -> nn.Module:
    """A tiny Llama with random LoRA, and head weights where they are given."""
    model = load_model(folder)[0]
    section = AdapterSection(kind="lora", rank=RANK, scale=SCALE)
    adapters.attach(model, section, seed=0)
    randomize_lora(model)
    if weights is not None:
        read_out.attach(model, read_out.by_layer(weights, ports.head_counts(model)))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("objective", ["abft", "read_out"])
def test_loss_and_gradients_are_the_packages(
    objective: Any, one_file: ModuleType, tmp_path: Path
) -> None:
    tiny_models.checkpoint(tmp_path, "llama")
    read = objective == "read_out"
    weights = np.random.default_rng(0).normal(size=4 * tiny_models.LAYERS) if read else None
    model = model_with_lora(tmp_path, weights)
    batch = batch_for(model)
    together = 4 if read else 1
    step = Step(
        model,
        optim.SGD(0.0),
        reward_weight=1.0,
        use_filter=True,
        objective=objective,
        together=together,
        classes=CLASSES,
    )
    last = np.array(batch.last)
    arrays = {name: np.array(value) for name, value in batch._asdict().items()}
    # Of a group all prompts have the same demonstrations.
    for name in ("label_positions", "demonstration_labels"):
        arrays[name][:] = arrays[name][:1]
    prompt_batch = PromptBatch(
        arrays["tokens"],
        last,
        arrays["label_positions"],
        arrays["demonstration_labels"],
        arrays["gold"],
        np.full((4, 1), -1),
        np.arange(4),
    )
    gradients, terms = step.gradients([MicroBatch(prompt_batch, np.ones(4))], 0.5)
    expected_loss = terms[0].item() / 4
    expected = {name: np.array(value) / 4 for name, value in tree_flatten(gradients)}

    if read:
        # In the one file head weights are one array.
        read_out.detach(model)
        model.head_weights = mx.array(weights)
    theirs = one_file.Batch(
        batch.tokens,
        batch.last,
        mx.array(arrays["label_positions"]),
        mx.array(arrays["demonstration_labels"]),
        batch.gold,
    )
    if read:
        function = nn.value_and_grad(model, partial(one_file.read_out_loss, classes=CLASSES))
        loss, found = function(model, theirs)
    else:
        (loss, heads), found = nn.value_and_grad(model, one_file.abft_loss)(model, theirs, 0.5)
        assert heads.item() == pytest.approx(terms[3].item() / 4)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    flat = {name: np.array(value) for name, value in tree_flatten(found)}
    if read:
        ours = np.concatenate(
            [expected.pop(name) for name in sorted(expected) if "read_out" in name]
        )
        np.testing.assert_allclose(flat.pop("head_weights") * read_out.SPEED, ours, atol=1e-5)
    assert flat.keys() == expected.keys()
    assert any(np.abs(value).max() > 1e-4 for value in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(flat[name], value, rtol=1e-3, atol=1e-6, err_msg=name)


def test_runs_from_texts_to_an_adapter_that_mlx_lm_loads(
    checkout: Path, model: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.csv"
    with texts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"word{n} {label}", label] for n in range(40) for label in ("cat", "dog"))
    script = checkout / "docs/abft_in_one_file.py"
    command = [sys.executable, str(script), "--model", str(model), "--data", str(texts)]
    command += ["--updates", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "accuracy" in done.stdout.splitlines()[-1]
    loaded = mlx_lm.load(str(model), adapter_path=str(tmp_path / "run"))[0]
    names = [name for name, _ in tree_flatten(loaded.parameters()) if name.endswith("lora_b")]
    assert len(names) == 2 * len(loaded.layers)
