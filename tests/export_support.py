"""A run of the bundled model that answers otherwise than its base, and how to ask about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from cli_support import document, invoke
from mlx.utils import tree_flatten

from abft_mlx import experiment, loading, recipe

SETTINGS = (
    "training.updates=4",
    "training.examples=32",
    "training.prompts_per_update=8",
    "training.learning_rate=0.003",
    "evaluation.queries=64",
    "evaluation.repeats=1",
)


def train(folder: Path, *settings: str) -> Path:
    """A short run of the demo; returns its folder."""
    chosen = [f"--set={one}" for one in (*SETTINGS, *settings)]
    result = invoke("finetune", "demo", "--output", folder, "--quiet", *chosen)
    assert result.exit_code == 0, result.stderr
    return folder


def export(run: Path, to: str, output: Path, *options: object) -> dict[str, Any]:
    """The JSON document of an export that succeeds."""
    result = invoke("export", run, "--to", to, "--output", output, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return document(result)


def base_folder() -> str:
    """The bundled model's folder."""
    return str(loading.find("demo"))


def asked(run: Path, count: int = 64) -> tuple[list[list[int]], list[int], Any]:
    """Tokens of a run's test texts behind its demonstrations, its label tokens, its tokenizer."""
    opened = experiment.prepare(recipe.load(run))
    task = opened.task
    lines = (run / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shown = [(row["text"], opened.task.space.names.index(row["label"])) for row in rows]
    texts = task.splits.test.pairs()[:count]
    prompts = [task.builder.build(shown, text, gold, where="a test") for text, gold in texts]
    tokens = [list(one.token_ids) for one in prompts]
    return tokens, list(opened.task.space.first_ids), opened.loaded.tokenizer


def answers(model: nn.Module, prompts: list[list[int]]) -> np.ndarray:
    """(N, V) logits after every prompt, each asked alone through the model's own code."""
    return np.stack([np.array(model(mx.array([one]))[0, -1]) for one in prompts])


def stock(model: str | Path, adapter: Path | None = None) -> nn.Module:
    """What stock mlx-lm opens."""
    return mlx_lm.load(str(model), adapter_path=None if adapter is None else str(adapter))[0]


def quantized(folder: Path, bits: int = 4) -> Path:
    """The bundled model as mlx_lm.convert quantizes it."""
    model, tokenizer = mlx_lm.load(base_folder())
    config = mlx_lm.utils.load_config(Path(base_folder()))
    model, config = mlx_lm.utils.quantize_model(model, config, 64, bits)
    mlx_lm.utils.save(folder, base_folder(), model, tokenizer, config)
    return folder


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """Name to array."""
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}
