"""What a run was made with: versions, device, fingerprints of model and data, seeds, sizes."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abft_mlx import adapters, data, loading, runtime, trainer
from abft_mlx import recipe as recipes
from abft_mlx.task import Task

# Of run.json and eval.json.
SCHEMA = trainer.SCHEMA


def of_run(
    recipe: recipes.Recipe, loaded: loading.Loaded, task: Task, trained: Sequence[Task]
) -> dict[str, Any]:
    """The facts of ``run.json`` that are known before training.

    The model has its adapter attached; ``task`` is measured, ``trained`` are trained on.
    """
    tasks = [task, *trained]
    facts = {
        "schema": SCHEMA,
        "finished": False,
        "versions": runtime.versions(),
        "platform": platform.platform(),
        "device": runtime.device_description(),
        "model": {
            "source": recipe.model,
            "kind": loading.kind(recipe.model),
            "revision": recipe.revision,
            "fingerprint": loaded.fingerprint,
        },
        "data": {
            "source": recipe.data.source,
            "kind": data.kind(recipe.data.source),
            **_data(task),
        },
        "labels": dict(zip(task.space.names, task.space.words, strict=True)),
        "chat_template": task.chat_template,
        "shortened_texts": shortened_texts(tasks),
        "seeds": {
            "data": recipe.data.seed,
            "training": recipe.training.seed,
            "evaluation": recipe.evaluation.seed,
        },
        "trainable_parameters": adapters.trainable_parameters(loaded.model),
    }
    if recipe.mixture:
        facts["mixture"] = {task.name: _data(task) for task in trained}
    return facts


def shortened_texts(tasks: Sequence[Task]) -> int:
    """How many texts were cut to fit."""
    builders = {id(task.builder): task.builder for task in tasks}
    return sum(builder.shortened for builder in builders.values())


def _data(task: Task) -> dict[str, Any]:
    """What run.json says of a task's texts."""
    return {
        "fingerprint": task.texts.fingerprint(),
        "classes": task.texts.class_counts(),
        "rows": {name: len(rows) for name, rows in task.splits.rows.items()},
    }


def weights_fingerprint(folder: Path) -> str:
    """What an adapter's weights are known by: a hash of its files' bytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def made_with(
    recipe: recipes.Recipe, loaded: loading.Loaded, trained: Sequence[Task]
) -> dict[str, Any]:
    """All that decides what a run computes, by name: settings, model, data, versions."""
    facts = _settings(recipe.model_dump(mode="json"))
    facts["the model's fingerprint"] = loaded.fingerprint
    for number, task in enumerate(trained, 1):
        # By number, too: tasks may share a name, and their order counts.
        facts[f"the fingerprint of task {number}'s texts ({task.name})"] = task.texts.fingerprint()
        facts[f"the chat template of task {number} ({task.name})"] = task.chat_template
    versions = runtime.versions()
    # Not the patch version of Python, nor what only downloads.
    versions["python"] = ".".join(versions["python"].split(".")[:2])
    del versions["huggingface-hub"]
    return facts | {f"the version of {name}": version for name, version in versions.items()}


def _settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_settings(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def digest(values: dict[str, Any]) -> str:
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
