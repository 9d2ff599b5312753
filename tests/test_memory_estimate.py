"""Estimated memory: against measured peaks of small models, its parts, and ``doctor``."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from cli_support import document, invoke
from mlx.utils import tree_flatten

from abft_mlx import adapters, loading, memory_estimate, ports, read_out, runtime
from abft_mlx import recipe as recipes
from abft_mlx.errors import UsageError
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import Trainer
from abft_mlx.trainer.batches import micro_batches

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 1024,
    "n_ctx": 1024, "layer_norm_epsilon": 1e-5, "vocab_size": 2000,
}  # fmt: skip
READ = "objective.kind=read_out"
SHARED = "training.shared_demonstrations=8"
CHECKPOINTING = "training.gradient_checkpointing=true"


def recipe_of(rows: int, tokens: int, settings: tuple[str, ...]) -> recipes.Recipe:
    """A resolved recipe whose micro-batches have so many prompts of so many tokens."""
    changes = [
        f"training.prompts_per_update={rows}",
        f"training.micro_batch_tokens={rows * tokens}",
        f"evaluation.batch_tokens={2 * rows * tokens}",
        *settings,
    ]
    return recipes.resolve(recipes.default(changes))


def peak(work: Callable[[], object]) -> int:
    """The largest of three measured peaks: how far MLX runs ahead varies."""
    peaks = []
    for _ in range(3):
        mx.clear_cache()
        runtime.reset_peak_memory()
        work()
        peaks.append(runtime.peak_memory_bytes())
    return max(peaks)


def measured(
    config: dict[str, Any], recipe: recipes.Recipe, rows: int, tokens: int
) -> tuple[int, int]:
    """Bytes that the second of two updates takes, and a batch of an evaluation."""
    model = loading.describe(config, "model")
    mx.eval(model.parameters())
    adapters.attach(model, recipe.adapter)
    if recipe.objective.kind == "read_out":
        read_out.attach(model, {n: mx.zeros(H) for n, H in ports.head_counts(model).items()})
    together, shared = recipe.training.together, tokens * 4 // 5
    ids = tuple(1 + n % 1000 for n in range(tokens))
    # Four demonstrations are four fifths of a prompt.
    prompts = [
        Prompt(ids[:shared] + (1001 + n % together,) * (tokens - shared), (5, 9, 20, 33),
               (0, 1, 0, 1), 0, (3,))
        for n in range(recipe.training.prompts_per_update)
    ]  # fmt: skip
    trainer = Trainer(model, prompts, recipe)
    assert trainer.rows == rows
    adapters.train_mode(model)

    def update() -> None:
        bucket = 1 if together > 1 else 32
        cut = micro_batches(prompts, rows, together=together, bucket_tokens=bucket)
        trainer.step.update(cut, 0.5)

    update()
    training = peak(update)
    adapters.train_mode(model, False)
    optimizer = sum(one.nbytes for _, one in tree_flatten(trainer.optimizer.state))
    arrays = micro_batches([prompts[0]] * (2 * rows), 2 * rows)[0].arrays()

    def evaluate() -> None:
        hidden = ports.port_for(model).hidden(model, arrays["tokens"])
        mx.eval(mx.take_along_axis(hidden, arrays["last"][:, None, None], axis=1))

    return training, peak(evaluate) - optimizer


@pytest.mark.parametrize(
    ("config", "rows", "tokens", "settings"),
    [
        (LLAMA, 8, 96, ()),
        (LLAMA, 2, 512, ()),
        (LLAMA | {"num_key_value_heads": 1, "num_hidden_layers": 8}, 4, 128, ()),
        (LLAMA | {"vocab_size": 16000}, 8, 64, ("objective.kind=end_to_end", "adapter.head=true")),
        (LLAMA, 8, 96, ("adapter.kind=full",)),
        (LLAMA | {"num_hidden_layers": 8}, 4, 96, (CHECKPOINTING,)),
        (LLAMA, 8, 96, (READ, SHARED)),
        (LLAMA | {"vocab_size": 16000}, 8, 64, (READ, "objective.lm_head=0.5")),
        (LLAMA | {"quantization": {"group_size": 64, "bits": 4}}, 8, 96, ()),
        (LLAMA | {"torch_dtype": "bfloat16"}, 4, 96, ()),
        (LLAMA, 8, 96, ("adapter.layers=[2, 3]",)),
        (LLAMA, 8, 96, ("adapter.layers=[1]", "objective.layers=trained")),
        (GPT2, 8, 96, ()),
        (GPT2, 8, 160, (SHARED,)),
    ],
)  # fmt: skip
def test_estimates_are_within_30_percent_of_measured_peaks(
    config: dict[str, Any], rows: int, tokens: int, settings: tuple[str, ...]
) -> None:
    # What an earlier case left to Python's collector would count.
    gc.collect()
    recipe = recipe_of(rows, tokens, settings)
    parts = memory_estimate.estimate(loading.describe(config, "model"), recipe, tokens)
    training, evaluation = measured(config, recipe, rows, tokens)
    assert 0.7 < parts["training_bytes"] / training < 1.3
    assert 0.7 < parts["evaluation_bytes"] / evaluation < 1.3
    # Weights cannot hide an error.
    stays = parts["weights_bytes"] + parts["adapter_bytes"] + parts["moments_bytes"]
    assert 0.7 < (parts["training_bytes"] - stays) / (training - stays) < 1.35


def estimate(name: str = "llama", *changes: str, length: int = 64, **sizes: Any) -> dict[str, int]:
    config = tiny_models.config(name, **{"hidden_size": 256, "intermediate_size": 512} | sizes)
    chosen = recipes.resolve(recipes.default(["training.micro_batch_tokens=256", *changes]))
    return memory_estimate.estimate(loading.describe(config, "model"), chosen, length)


def test_parts_add_up_and_follow_the_mode() -> None:
    lora, full = estimate(), estimate("llama", "adapter.kind=full")
    assert lora["weights_bytes"] == full["weights_bytes"]
    # In full: the originals stand beside what trains.
    assert full["adapter_bytes"] == 4 * full["trainable_parameters"]
    names = ("weights", "adapter", "moments", "gradients", "activations")
    for parts in (lora, full):
        assert parts["moments_bytes"] == 8 * parts["trainable_parameters"]
        assert parts["training_bytes"] == sum(parts[f"{name}_bytes"] for name in names)
    assert (lora["rows"], lora["micro_batches"]) == (4, 8)
    assert lora["gradients_bytes"] == 2 * 4 * lora["trainable_parameters"]
    single = estimate("llama", "training.prompts_per_update=4")
    trainable = 4 * lora["trainable_parameters"]
    assert lora["training_bytes"] - single["training_bytes"] == trainable
    best = estimate("llama", "training.validate_every=8")
    assert best["training_bytes"] - lora["training_bytes"] == trainable


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_models.build("gpt2")
    before = dict(tree_flatten(model.parameters()))
    chosen = recipes.resolve(recipes.default(["training.micro_batch_tokens=64", READ]))
    memory_estimate.estimate(model, chosen, 32)
    after = dict(tree_flatten(model.parameters()))
    assert not adapters.adapted(model)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)


class TestDoctor:
    def config(self, folder: Path, **changes: Any) -> str:
        settings = tiny_models.config("llama") | {"num_hidden_layers": 2} | changes
        (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        return str(folder)

    def test_needs_no_weights(self, tmp_path: Path) -> None:
        model = self.config(tmp_path, quantization={"group_size": 64, "bits": 4})
        result = invoke("doctor", "--model", model, "--length", "100", "--batch", "4", "--json",
                        "--set", "objective.kind=end_to_end")  # fmt: skip
        assert result.exit_code == 0, result.stderr
        found = document(result)["memory_estimate"]
        assert (found["rows"], found["tokens"], found["bits"]) == (4, 128, 4)
        assert found["fits"]
        assert found["way_out"] is None
        memory = document(result)["memory"]
        assert found["limit_bytes"] == (memory["recommended_bytes"] or memory["machine_bytes"])
        assert "verdict    fits" in result.stderr
        assert "4-bit" in result.stderr

    def test_says_what_would_fit(self, tmp_path: Path) -> None:
        self.config(tmp_path, hidden_size=256)
        chosen = recipes.resolve(
            recipes.default([recipes.override("model", str(tmp_path)), "adapter.rank=4"])
        )

        def examine(limit_bytes: int, *settings: str) -> dict[str, Any]:
            return memory_estimate.examine(recipes.change(chosen, settings), 200, limit_bytes)

        large = examine(2**40)
        assert large["fits"]
        assert large["rows"] > 4
        less = examine(large["training_bytes"] * 3 // 5)
        assert not less["fits"]
        assert less["way_out"].startswith("fits with --set training.micro_batch_tokens=")
        settings = less["way_out"].removeprefix("fits with --set ").split(" and --set ")
        assert examine(less["limit_bytes"], *settings)["fits"]
        twice = [f"{key}={2 * int(value)}" for key, value in (one.split("=") for one in settings)]
        assert not examine(less["limit_bytes"], *twice)["fits"]
        small = ("training.micro_batch_tokens=224", "evaluation.batch_tokens=224")
        needed = examine(2**40, *small)["training_bytes"]
        assert "4-bit copy" in examine(needed - 100_000)["way_out"]
        full = examine(2**40, *small, "adapter.kind=full")["training_bytes"]
        assert "adapter.kind=lora" in examine(full - 1, "adapter.kind=full")["way_out"]
        assert "smaller model" in examine(1000)["way_out"]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model_type": "mamba", "state_size": 4}, "mamba"),
            ({"hidden_size": None}, "cannot be opened as a llama model"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "with bitsandbytes"),
        ],
    )
    def test_what_cannot_be_read_is_one_line(
        self, changes: dict[str, Any], words: str, tmp_path: Path
    ) -> None:
        result = invoke("doctor", "--model", self.config(tmp_path, **changes))
        assert result.exit_code == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")


def test_a_full_adapter_on_a_quantized_base_is_refused() -> None:
    with pytest.raises(UsageError, match="is quantized"):
        estimate("llama", "adapter.kind=full", quantization={"group_size": 64, "bits": 4})
