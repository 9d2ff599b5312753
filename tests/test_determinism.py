"""The same run gives the same bytes; how an update is cut or padded moves it within a bound."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from test_trainer import make_prompts, make_recipe, make_trainer

from abft_mlx import adapters
from abft_mlx.events import OnUpdate
from abft_mlx.trainer import Trainer, Update
from abft_mlx.trainer.batches import micro_batches

UNALIKE = ("seconds", "peak_memory_bytes")
SMALL = [
    "--set=objective.filter=false", "--set=training.updates=4", "--set=training.examples=12",
    "--set=training.prompts_per_update=4", "--set=prompt.demonstrations=2",
    "--set=training.learning_rate=0.01", "--set=adapter.dropout=0.1", "--set=data.test_rows=8",
    "--set=training.validate_every=2", "--set=data.validation_rows=8",
    "--set=training.census_prompts=4",
]  # fmt: skip
# How far weights may lie apart after six updates of Adam at 0.01, in all of which they move 0.06.
LONG_UPDATES = 10_000
WARM_UPDATES = 500
GROWTH_BYTES = 16 << 20


def run_of(checkout: Path, model: Path, texts: Path, folder: Path, *more: str) -> Path:
    words = ["finetune", "--model", model, "--data", texts, "--output", folder, "--quiet"]
    # Python's own order of sets must not matter, nor how many threads there are.
    seed = "1" if folder.name == "first" else "2"
    done = subprocess.run(
        [sys.executable, str(checkout / "cli.py"), *map(str, words), *SMALL, *more],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in UNALIKE} for one in lines]


def test_two_processes_write_the_same_bytes(
    checkout: Path, model: Path, texts: Path, tmp_path: Path
) -> None:
    first = run_of(checkout, model, texts, tmp_path / "first")
    second = run_of(checkout, model, texts, tmp_path / "second")
    other = run_of(checkout, model, texts, tmp_path / "other", "--seed", "7")
    for name in ("adapters.safetensors", "adapter_config.json", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert metrics(first) == metrics(second)
    with np.load(first / "heads.npz") as one, np.load(second / "heads.npz") as two:
        assert one.files == two.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    weights = "adapters.safetensors"
    assert (first / weights).read_bytes() != (other / weights).read_bytes()
    assert json.loads((first / "run.json").read_text())["seeds"] == {
        "data": 42, "training": 42, "evaluation": 42,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_hardly_moves_a_gradient(name: str) -> None:
    trainer = make_trainer(make_recipe(), name=name)
    chosen = make_prompts()[:4]
    alone, _ = trainer.step.gradients(micro_batches(chosen, 1, bucket_tokens=1), 0.5)
    padded, _ = trainer.step.gradients(micro_batches(chosen, 4, bucket_tokens=128), 0.5)
    largest = max(float(mx.abs(one).max()) for _, one in tree_flatten(alone))
    assert largest > 1e-3
    for (where, one), (_, other) in zip(tree_flatten(alone), tree_flatten(padded), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * largest, err_msg=where)


def resident_bytes() -> int:
    """What the process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
def test_memory_stays_flat_over_ten_thousand_updates() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads the process's memory from /proc, which this system does not have")
    recipe = make_recipe(
        f"training.updates={LONG_UPDATES}",
        "training.prompts_per_update=1",
        "training.learning_rate=0.0001",
    )
    model = tiny_models.build("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    adapters.attach(model, recipe.adapter, seed=0)
    seen: dict[int, tuple[int, int]] = {}

    def updated(update: Update) -> None:
        if update.step in (WARM_UPDATES, LONG_UPDATES):
            gc.collect()
            mx.clear_cache()
            seen[update.step] = (resident_bytes(), mx.get_active_memory())

    Trainer(model, make_prompts(), recipe, events=OnUpdate(updated)).run()
    (rss, active), (later_rss, later_active) = (seen[n] for n in (WARM_UPDATES, LONG_UPDATES))
    print(f"resident {rss:,} -> {later_rss:,} bytes, MLX {active:,} -> {later_active:,}")
    assert later_active <= active + (64 << 10)
    assert later_rss <= rss + GROWTH_BYTES
