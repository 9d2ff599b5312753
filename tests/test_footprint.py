"""Estimated memory: against measured peaks, against small graphs done by hand, and in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from cli_support import document, invoke
from mlx.utils import tree_flatten

from abft_mlx import adapters, footprint, loading, runtime
from abft_mlx import recipe as recipes
from abft_mlx.errors import ModelError, UsageError
from abft_mlx.footprint import estimate as estimates
from abft_mlx.footprint.graph import evaluation_order, trace
from abft_mlx.footprint.peak import peak_bytes

MEBIBYTE = 2**20


def lazy(*shape: int) -> mx.array:
    return mx.zeros(shape)


class TestReplay:
    """Graphs whose peak can be told by hand; one array is 4 MiB, and nothing runs ahead."""

    x = staticmethod(lambda: lazy(1024, 1024))

    def peak(self, function: Any, *arguments: mx.array, **options: Any) -> float:
        graph = trace(function, arguments or [self.x()])
        return peak_bytes(graph, **{"ahead": 0} | options) / (4 * MEBIBYTE)

    def test_an_elementwise_chain_stays_in_one_buffer(self) -> None:
        assert self.peak(lambda x: [mx.exp(mx.exp(mx.exp(x)))]) == 1

    def test_a_chain_of_products_needs_two(self) -> None:
        assert self.peak(lambda x: [x @ x @ x @ x]) == 2

    def test_a_backward_pass_keeps_what_it_reads(self) -> None:
        """Six exponentials are kept for their own gradients, with one gradient at a time."""

        def gradient(x: mx.array) -> list[mx.array]:
            def six(x: mx.array) -> mx.array:
                for _ in range(6):
                    x = mx.exp(x)
                return x.sum()

            return [mx.grad(six)(x)]

        assert self.peak(gradient) == pytest.approx(6, abs=1)

    def test_views_are_free_and_copies_are_not(self) -> None:
        assert self.peak(lambda x: [x.T.reshape(1, 1024, 1024)]) == 0
        assert self.peak(lambda x: [x.T.reshape(1024 * 1024)]) == 1

    def test_a_product_of_a_permuted_array_copies_it_meanwhile(self) -> None:
        def heads(x: mx.array) -> list[mx.array]:
            split = x.reshape(1024, 16, 64).transpose(1, 0, 2)
            return [split @ split.swapaxes(1, 2)]

        # The result has 16 times as many numbers; each side is copied once.
        assert self.peak(heads) == pytest.approx(16 + 2)

    def test_work_that_is_ahead_holds_its_inputs(self) -> None:
        """MLX's own peak of a chain of products: two pieces of work each, a hundred ahead."""

        def chain(x: mx.array) -> list[mx.array]:
            y = x
            for _ in range(200):
                y = y @ x
            return [y]

        x = mx.random.normal((512, 512)) * 1e-2
        mx.eval(x)
        runtime.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(chain(x))
        measured = runtime.peak_memory_bytes() - before
        assert peak_bytes(trace(chain, [x])) == pytest.approx(measured, rel=0.15)

    def test_branches_are_evaluated_in_breadth(self) -> None:
        """Sixty large arrays that are summed one by one; MLX makes many before it uses them."""

        def branches(x: mx.array) -> list[mx.array]:
            large = [mx.exp(x * float(n)) @ x for n in range(1, 61)]
            return [mx.stack([one.sum() for one in large])]

        x = mx.random.normal((512, 512)) * 1e-3
        mx.eval(x)
        runtime.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(branches(x))
        measured = runtime.peak_memory_bytes() - before
        graph = trace(branches, [x])
        assert peak_bytes(graph) == pytest.approx(measured, rel=0.15)

    def test_arguments_that_die_count_until_they_are_read(self) -> None:
        assert self.peak(lambda x: [x @ x]) == 1
        assert self.peak(lambda x: [x @ x], dying=(0,)) == 2
        assert self.peak(lambda x: [mx.exp(x)], dying=(0,)) == 1


def test_every_operation_runs_once_after_what_it_reads() -> None:
    graph = trace(lambda x: [mx.grad(lambda y: ((y @ y).exp() @ y).sum())(x)], [lazy(64, 64)])
    order = evaluation_order(graph)
    done = {one.name for one in graph.given}
    for one in order:
        assert done.issuperset(one.inputs)
        done.update(value.name for value in one.outputs)
    assert done.issuperset(graph.results)
    assert len(order) == len({id(one) for one in order})


def estimate(name: str = "llama", *changes: str, length: int = 64, **sizes: Any) -> Any:
    config = tiny_models.config(name, **{"hidden_size": 256, "intermediate_size": 512} | sizes)
    chosen = recipes.resolve(recipes.default(["training.micro_batch_tokens=256", *changes]))
    return footprint.footprint(loading.describe(config, "model"), chosen, length)


def test_parts_add_up_and_follow_the_mode() -> None:
    lora, full = estimate(), estimate("llama", "adapter.kind=full")
    assert lora.weights_bytes == full.weights_bytes
    # In full: the originals stand beside what trains.
    assert full.adapter_bytes == 4 * full.trainable_parameters
    assert full.moments_bytes == pytest.approx(8 * full.trainable_parameters, rel=1e-4)
    for one in (lora, full):
        assert one.training_bytes == (
            one.weights_bytes + one.adapter_bytes + one.moments_bytes + one.gradients_bytes
            + one.activations_bytes
        )  # fmt: skip
    assert (lora.rows, lora.micro_batches) == (4, 8)
    assert lora.gradients_bytes == 2 * 4 * lora.trainable_parameters
    single = estimate("llama", "training.prompts_per_update=4")
    assert lora.training_bytes - single.training_bytes == 4 * lora.trainable_parameters
    assert lora.activations_bytes == single.activations_bytes
    best = estimate("llama", "training.validate_every=8")
    assert best.training_bytes - lora.training_bytes == 4 * lora.trainable_parameters


def test_what_stays_is_beside_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = 2**40
    plain = estimate()
    stays = plain.weights_bytes + plain.adapter_bytes
    trainable = 4 * plain.trainable_parameters
    with monkeypatch.context() as patch:
        patch.setattr(estimates, "_gradients_peak", lambda *_: huge)
        assert estimate().training_bytes == stays + plain.moments_bytes + trainable + huge
    with monkeypatch.context() as patch:
        patch.setattr(estimates, "_update_peaks", lambda *_: (huge, 0))
        assert estimate().training_bytes == stays + plain.moments_bytes + huge
        patch.setattr(estimates, "_update_peaks", lambda *_: (0, huge))
        assert estimate().training_bytes == stays + huge


def test_end_to_end_and_length_cost_what_they_should() -> None:
    abft = estimate()
    end = estimate("llama", "objective.kind=end_to_end")
    assert end.activations_bytes > abft.activations_bytes
    longer = estimate("llama", "training.micro_batch_tokens=512", length=128)
    assert longer.rows == abft.rows
    assert 1.8 < longer.activations_bytes / abft.activations_bytes < 3


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_models.build("gpt2")
    before = dict(tree_flatten(model.parameters()))
    chosen = recipes.resolve(recipes.default(["training.micro_batch_tokens=64"]))
    footprint.footprint(model, chosen, 32)
    after = dict(tree_flatten(model.parameters()))
    assert not adapters.adapted(model)
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    mx.eval(mx.random.normal((2,)))


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
        large = footprint.examine(chosen, 200, 2**40)
        assert large.fits
        assert large.footprint.rows > 4
        less = footprint.examine(chosen, 200, large.footprint.training_bytes * 3 // 5)
        assert not less.fits
        assert less.way_out is not None
        assert less.way_out.startswith("fits with --set training.micro_batch_tokens=")
        settings = less.way_out.removeprefix("fits with --set ").split(" and --set ")
        assert footprint.examine(recipes.change(chosen, settings), 200, less.limit_bytes).fits
        pairs = [setting.split("=") for setting in settings]
        twice = recipes.change(chosen, [f"{key}={2 * int(value)}" for key, value in pairs])
        assert not footprint.examine(twice, 200, less.limit_bytes).fits
        one = recipes.change(chosen, ["training.micro_batch_tokens=224"])
        one = recipes.change(one, ["evaluation.batch_tokens=224"])
        needed = footprint.examine(one, 200, 2**40).footprint.training_bytes
        quantized = footprint.examine(chosen, 200, needed - 100_000).way_out
        assert quantized is not None
        assert "4-bit copy" in quantized
        nothing = footprint.examine(chosen, 200, 1000).way_out
        assert nothing is not None
        assert "smaller model" in nothing

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"model_type": "mamba", "state_size": 4}, "mamba"),
            ({"model_type": "nosuch"}, "mlx-lm does not know the architecture 'nosuch'"),
            ({"hidden_size": None}, "cannot be opened as a llama model"),
            ({"torch_dtype": "float8_e4m3fn"}, "names the number type 'float8_e4m3fn'"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "with bitsandbytes"),
            ({"quantization": {"group_size": 64, "bits": 99}}, "'bits': 99} cannot be used"),
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

    def test_prompts_longer_than_the_model_allows(self, tmp_path: Path) -> None:
        result = invoke("doctor", "--model", self.config(tmp_path), "--length", "300")
        assert result.exit_code == 2
        assert "--length 300" in result.stderr
        assert "256 tokens" in result.stderr

    def test_no_such_folder(self, tmp_path: Path) -> None:
        result = invoke("doctor", "--model", str(tmp_path / "none"))
        assert (result.exit_code, result.stdout) == (2, "")


def test_a_full_adapter_on_a_quantized_base_is_refused() -> None:
    with pytest.raises(UsageError, match="is quantized"):
        estimate("llama", "adapter.kind=full", quantization={"group_size": 64, "bits": 4})


def test_a_config_with_code_of_its_own_is_refused() -> None:
    config = tiny_models.config("llama") | {"model_file": "model.py"}
    with pytest.raises(ModelError, match=r"'model\.py', which is never run"):
        loading.describe(config, "model x")
