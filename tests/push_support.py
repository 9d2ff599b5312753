"""Runs to push, small enough to make in seconds."""

from __future__ import annotations

from pathlib import Path

from cli_support import invoke, write_model, write_texts

SIZES = (
    "training.updates=2",
    "training.examples=16",
    "training.prompts_per_update=8",
    "data.training_rows=24",
    "data.demonstration_rows=24",
    "data.validation_rows=8",
    "data.test_rows=12",
    "prompt.demonstrations=2",
    "evaluation.queries=12",
    "evaluation.repeats=1",
    "training.validate_every=1",
    # A base without induction heads changes visibly only so.
    "training.keep_best=false",
    "training.learning_rate=1.0",
    "objective.filter=false",
    "evaluation.bootstrap_samples=20",
)
MODEL, TEXTS = "secret-model", "secret-mails.csv"


def make_run(folder: Path, name: str = "run", *settings: str, seed: int = 42) -> Path:
    """A finished run whose base is a folder and whose texts are a file beside it."""
    model, texts = folder / MODEL, folder / TEXTS
    if not model.exists():
        write_model(model)
        write_texts(texts)
    changes = [part for one in (*SIZES, *settings) for part in ("--set", one)]
    given = ("--model", model, "--data", texts, "--output", folder / name, "--seed", seed)
    done = invoke("finetune", *given, *changes, "-q")
    assert done.exit_code == 0, done.output
    return folder / name
