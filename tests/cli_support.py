"""A model and a file of labelled texts that are small enough to run whole commands on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx
from made_tokenizers import gpt2
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from typer.testing import CliRunner, Result

from abft_mlx.cli import app

WORDS = {"ham": ("good", "lovely", "music"), "not spam": ("bad", "dull", "weather")}


def invoke(*arguments: object) -> Result:
    """Run a command in this process, as a terminal's shell would."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def document(result: Result) -> dict:
    """The one JSON document on standard output."""
    assert result.stdout.count("\n") == 1, result.stdout
    return json.loads(result.stdout)


def write_model(folder: Path) -> Path:
    """A Llama of two layers with random weights."""
    tokenizer = gpt2()
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    folder.mkdir(parents=True)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return folder


def write_texts(path: Path, rows: int = 80) -> Path:
    """A CSV of texts whose words tell their label."""
    source = random.Random(0)
    lines = ["text,label"]
    for row in range(rows):
        label = tuple(WORDS)[row % 2]
        lines.append(f"the {source.choice(WORDS[label])} film number {row},{label}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train_run(folder: Path, model: Path, texts: Path, *settings: str) -> Path:
    """A run of two updates that change every weight they may, and are kept."""
    result = invoke(
        "finetune", "--model", model, "--data", texts, "--output", folder, "--quiet",
        "--set=objective.filter=false", "--set=training.learning_rate=0.05",
        "--set=training.updates=2", "--set=training.examples=8",
        "--set=training.prompts_per_update=4", "--set=prompt.demonstrations=2",
        "--set=objective.kind=abft", "--set=training.validate_every=0",
        *(f"--set={one}" for one in settings),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder
