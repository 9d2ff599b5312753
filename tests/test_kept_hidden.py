"""Hidden states below what trains: known once, and no result is another for it."""

from __future__ import annotations

import gc
import json
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from test_local import autodiff, prompts, step_of, stopped
from test_trainer import make_prompts, make_recipe, make_trainer, same, trained

from abft_mlx import adapters, attention, experiment, loading, memory_estimate, ports
from abft_mlx import recipe as recipes
from abft_mlx.errors import RecipeError
from abft_mlx.events import OnUpdate
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer import Trainer, below, plan
from abft_mlx.trainer.kept import Store
from abft_mlx.trainer.step import Step

PLENTY = 2**30
# Scaled embeddings and masks of their own for each layer; a hybrid; experts; latent attention.
KINDS = (
    "llama",
    "gpt2",
    "qwen2",
    "gemma2",
    "gemma3_text",
    "qwen3_next",
    "olmoe",
    "deepseek_v2",
)
# More than hidden states crosses from block to block: docs/architectures.md, "Blocks that read
# more than hidden states"; Hunyuan's blocks give tuples.
NOT_ENOUGH = ("gemma3n", "gemma4_text", "hunyuan")


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; each test must leave none."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def top_layer(model: Any) -> int:
    return max(n for n, one in enumerate(ports.heads(model)) if one is not None)


def keeping(step: Step, budget: int = PLENTY, **options: Any) -> Step:
    """The same model's step, which keeps."""
    settings: dict[str, Any] = {"reward_weight": 1.0, "use_filter": False, "compiled": False}
    made = Step(step.model, optim.Adam(1e-3), kept_bytes=budget, **settings | options)
    assert made.kept is not None
    return made


def every_row(model: Any, batch: dict[str, mx.array], layers: list[int] | None = None) -> Any:
    def rows() -> list[mx.array | None]:
        found = attention.capture(model, batch["tokens"], batch["last"])
        return found if layers is None else [found[layer] for layer in layers]

    return autodiff(model, batch, rows)


@pytest.mark.parametrize("way", ["all", "trained", "local"])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_autodiffs_of_the_whole(tiny: ModuleType, name: str, way: str) -> None:
    """Computed anew, and then kept, in a batch of another width."""
    model = tiny.build(name)
    layer = top_layer(model)
    plain = step_of(model, "exact", [layer])
    one = keeping(
        plain, only_trained=way == "trained", gradient="local" if way == "local" else "exact"
    )
    (narrow,) = plan.micro_batches(prompts(), 4, bucket_tokens=1)
    (wide,) = plan.micro_batches(prompts(), 4)
    for batch in (narrow, wide):
        arrays = batch.arrays()
        if way == "local":
            _, expected = stopped(model, arrays)
            block = ports.port_for(model).blocks(model)[below.first_trained(model)]
            whole = every_row(model, arrays, list(block.layers))[0]
        else:
            whole, expected = every_row(model, arrays, [layer] if way == "trained" else None)
        gradients, terms = one.gradients([batch], 0.5)
        np.testing.assert_allclose(np.array(terms), np.array(whole), rtol=1e-5)
        for path, gradient in tree_flatten(gradients):
            np.testing.assert_allclose(np.array(gradient), expected[path], atol=1e-5, err_msg=path)
        assert max(np.abs(each).max() for each in expected.values()) > 1e-3
    assert one.kept is not None
    assert one.kept.computed == len(prompts())


def test_heads_below_count_as_they_would() -> None:
    """With the filter, with weights of A and B, end to end, and for prompts that only fill."""
    model = tiny_models.build("llama")
    plain = step_of(model, "exact", [2])
    batches = plan.micro_batches(make_prompts(5, seed=3), 4)
    assert sum(len(one.batch) - one.prompts for one in batches) == 3
    for objective, use_filter in (("abft", True), ("abft", False), ("end_to_end", False)):
        settings = {"reward_weight": 0.7, "use_filter": use_filter, "objective": objective}
        without = Step(model, optim.Adam(1e-3), compiled=False, **settings)  # type: ignore[arg-type]
        expected, terms = without.gradients(batches, 0.3)
        found, kept_terms = keeping(plain, **settings).gradients(batches, 0.3)
        assert terms[3].item() > 0
        np.testing.assert_allclose(np.array(kept_terms), np.array(terms), rtol=1e-5)
        for (path, one), (_, other) in zip(
            tree_flatten(found), tree_flatten(expected), strict=True
        ):
            np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5, err_msg=path)


@pytest.mark.parametrize("gradient", ["exact", "local"])
def test_blocks_below_are_not_run_again(gradient: str) -> None:
    """Nor could they be: by then their weights are not a number."""
    model = tiny_models.build("llama")
    one = keeping(step_of(model, "exact", [2]), gradient=gradient)
    (batch,) = plan.micro_batches(prompts(), 4)
    expected, terms = one.gradients([batch], 0.5)
    for layer in model.layers[:2]:
        layer.mlp.up_proj.weight = layer.mlp.up_proj.weight * float("nan")
    run: list[int] = []

    def noted(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        run.append(number)
        return block(hidden)

    with ports.wrap_blocks(model, noted):
        again, same_terms = one.gradients([batch], 0.5)
    assert run == [2]
    assert mx.array_equal(terms, same_terms)
    for (path, ours), (_, before) in zip(tree_flatten(again), tree_flatten(expected), strict=True):
        assert mx.array_equal(ours, before), path


@pytest.mark.parametrize("name", NOT_ENOUGH)
def test_where_hidden_states_do_not_suffice_nothing_is_kept(tiny: ModuleType, name: str) -> None:
    model = tiny.build(name)
    adapters.attach(model, AdapterSection(rank=2, layers=[top_layer(model)]))
    assert 0 < below.first_trained(model) < len(ports.port_for(model).blocks(model))
    assert below.boundary(model) is None


def test_where_training_begins() -> None:
    for layers, found in (([2, 1], 1), ([2], 2), ([0, 2], None), (None, None)):
        model = tiny_models.build("llama")
        adapters.attach(model, AdapterSection(rank=2, layers=layers))
        assert below.boundary(model) == found
    model = tiny_models.build("llama")
    adapters.attach(model, AdapterSection(rank=2, layers=[2], head=True))
    assert below.boundary(model) == 2
    model.model.embed_tokens.unfreeze()
    assert below.boundary(model) is None
    model.freeze()
    assert below.first_trained(model) == 3
    assert below.boundary(model) is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_files_hold_the_same_bits(temporary: Path, dtype: mx.Dtype) -> None:
    arrays = {bytes([n]): mx.random.normal((n + 1, 8)).astype(dtype) for n in range(6)}
    size = dtype.size * 8
    store = Store(budget_bytes=4 * size, spare_bytes=0)
    for key, array in arrays.items():
        store.put(key, array)
    # 1 + 2 rows, and then nothing fits beside them: 3 + 4 + 5 + 6 go to files.
    assert store.counts() == {
        "memory_prompts": 2, "memory_bytes": 3 * size, "disk_prompts": 4, "disk_bytes": 18 * size
    }  # fmt: skip
    (folder,) = temporary.iterdir()
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.glob("*.safetensors"))) == 4
    for key, array in arrays.items():
        found = store.get(key)
        assert found is not None
        assert found.dtype == dtype
        assert mx.array_equal(found, array)
    next(folder.glob("*")).unlink()
    assert sum(store.get(key) is None for key in arrays) == 1
    assert store.get(b"unknown") is None
    store.close()


def test_a_full_disk_means_computing_again(temporary: Path) -> None:
    arrays = {bytes([n]): mx.zeros((1000,)) for n in range(3)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = Store(budget_bytes=0, spare_bytes=0)
    store.put(b"first", mx.zeros((10,)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for key, array in arrays.items():
            store.put(key, array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.put(b"later", mx.zeros((10,)))
    assert store.counts()["disk_prompts"] == 1
    assert [len(list(one.iterdir())) for one in temporary.iterdir()] == [1]
    store.close()
    spared = Store(budget_bytes=0, spare_bytes=2**62)
    spared.put(b"first", mx.zeros((10,)))
    assert spared.counts()["disk_prompts"] == 0
    spared.close()


def test_no_more_than_the_budget_is_held() -> None:
    """As MLX counts it: nothing that was cut from something larger holds on to that."""
    model = tiny_models.build("llama", hidden_size=256)
    each = 4 * 64 * 256
    one = keeping(step_of(model, "exact", [2]), 5 * each)
    made = [Prompt((*range(1, 60), n), (3, 8, 13), (0, 1, 0), 0, (5,)) for n in range(64)]
    assert one.kept is not None
    gc.collect()  # of other tests' models
    mx.synchronize()
    before = mx.get_active_memory()
    for batch in plan.micro_batches(made, 16):
        one.kept.arrays(batch)
    mx.synchronize()
    held = mx.get_active_memory() - before
    assert one.kept.counts()["memory_bytes"] == 5 * 4 * 60 * 256 <= held <= 5 * each
    assert one.kept.counts()["disk_prompts"] == 59
    one.kept.close()


WINDOW = ("adapter.layers=[2]", "objective.filter=true", "training.micro_batch_tokens=256")


def run(*changes: str, name: str = "llama", **options: Any) -> Trainer:
    trainer = make_trainer(make_recipe(*WINDOW, *changes), name=name, **options)
    trainer.run()
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("objective.layers=trained",),
        ("training.gradient=local",),
        ("adapter.dropout=0.3",),
        ("training.gradient_checkpointing=true", "adapter.layers=[1, 2]"),
    ],
)
def test_whole_runs_give_the_same_adapter(changes: tuple[str, ...]) -> None:
    without = run("training.keep_hidden=false", *changes)
    memory = run(*changes)
    assert without.kept_hidden is None
    assert memory.kept_hidden is not None
    # 6 updates of 8 are two passes over 24 prompts.
    assert memory.kept_hidden["memory_prompts"] == 24
    assert memory.kept_hidden["recomputed"] == 0
    for path, one in trained(without.model).items():
        np.testing.assert_allclose(trained(memory.model)[path], one, atol=1e-5, err_msg=path)
    files = run("training.keep_hidden_bytes=20000", *changes)
    assert files.kept_hidden is not None
    assert files.kept_hidden["memory_prompts"] + files.kept_hidden["disk_prompts"] == 24
    assert 0 < files.kept_hidden["memory_bytes"] <= 20000 < files.kept_hidden["disk_bytes"]
    assert same(trained(files.model), trained(memory.model))


def test_neither_memory_nor_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run()
    monkeypatch.setattr(Store, "_spill", lambda *_: None)
    again = run("training.keep_hidden_bytes=0")
    assert again.kept_hidden is not None
    assert again.kept_hidden["recomputed"] == 24
    assert same(trained(again.model), trained(expected.model))


def test_files_are_gone_after_an_exception(temporary: Path) -> None:
    seen: list[int] = []

    def stop(_: Any) -> None:
        seen.extend(len(list(one.iterdir())) for one in temporary.iterdir())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run("training.keep_hidden_bytes=0", events=OnUpdate(stop))
    assert seen == [8]
    assert not list(temporary.iterdir())


def test_a_compiled_step_keeps_too() -> None:
    (batch,) = plan.micro_batches(prompts(), 4)
    plain = step_of(tiny_models.build("llama"), "exact", [2])
    expected, terms = keeping(plain).gradients([batch], 0.5)
    compiled = keeping(plain, compiled=True)
    for _ in range(2):
        found, others = compiled.gradients([batch], 0.5)
        np.testing.assert_allclose(np.array(others), np.array(terms), rtol=1e-5)
        for path, one in tree_flatten(expected):
            np.testing.assert_allclose(np.array(dict(tree_flatten(found))[path]), one, atol=1e-6)


def test_shared_demonstrations_keep_nothing() -> None:
    recipe = make_recipe("adapter.layers=[2]", "training.shared_demonstrations=2")
    assert make_trainer(recipe).step.kept is None
    assert make_trainer(make_recipe("adapter.layers=[2]")).step.kept is not None


def test_a_run_says_what_was_kept_where(tmp_path: Path) -> None:
    changes = (
        "training.examples=16",
        "training.updates=3",
        "training.prompts_per_update=8",
        "adapter.layers=[1, 2]",
    )
    found = experiment.finetune(recipes.load("demo", changes), tmp_path / "run")
    totals = json.loads((found.output / "run.json").read_text())["totals"]
    tokens = sum(len(one.token_ids) for one in found.experiment.training_prompts())
    width = found.experiment.loaded.model.args.hidden_size
    assert totals["kept_hidden"] == {
        "below_block": 1, "memory_prompts": 16, "memory_bytes": 4 * tokens * width,
        "disk_prompts": 0, "disk_bytes": 0, "recomputed": 0,
    }  # fmt: skip


def estimate(*changes: str) -> Any:
    recipe = recipes.resolve(
        recipes.default(
            ["training.micro_batch_tokens=256", "training.examples=48", "adapter.rank=4", *changes]
        )
    )
    model = loading.describe(tiny_models.config("llama"), "model")
    return memory_estimate.estimate(model, recipe, 64)


def test_an_estimate_counts_what_is_kept() -> None:
    window = "adapter.layers=[2]"
    plain = estimate(window, "training.keep_hidden=false")
    assert plain["kept_hidden_bytes"] == estimate()["kept_hidden_bytes"] == 0
    assert estimate(window)["kept_hidden_bytes"] == 48 * 64 * 64 * 4
    few = estimate(window, "training.updates=1", "training.prompts_per_update=8")
    assert few["kept_hidden_bytes"] == 8 * 64 * 64 * 4
    assert estimate(window, "training.keep_hidden_bytes=999")["kept_hidden_bytes"] == 999
    assert estimate(window, "training.shared_demonstrations=2")["kept_hidden_bytes"] == 0
    assert estimate(window)["training_bytes"] == plain["training_bytes"] + 48 * 64 * 64 * 4


def test_bytes_that_nobody_uses_are_refused() -> None:
    line = "training: keep_hidden_bytes 5 has no use where keep_hidden is false"
    with pytest.raises(RecipeError, match=line) as caught:
        recipes.loads("training: {keep_hidden: false, keep_hidden_bytes: 5}")
    assert "\n" not in str(caught.value)
