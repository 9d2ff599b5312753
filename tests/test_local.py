"""Local gradients against autodiff of the whole loss with explicit stop-gradients."""

from __future__ import annotations

import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from abft_mlx import adapters, attention, ports
from abft_mlx.objective import abft_terms
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.plan import micro_batches
from abft_mlx.trainer.step import Step

# A hybrid; fused; latent; MLPs with experts; several copies of hidden states; tuples.
KINDS = (
    "llama",
    "qwen3_next",
    "gpt2",
    "deepseek_v2",
    "olmoe",
    "gemma2",
    "falcon_h1",
)


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def prompts() -> list[Prompt]:
    source = np.random.default_rng(0)
    made = []
    for length in (24, 20, 17):
        tokens = tuple(source.integers(1, 90, length).tolist())
        made.append(Prompt(tokens, (3, 8, 13), (0, 1, 0), int(source.integers(0, 2)), (5,)))
    return made


def step_of(model: Any, gradient: Any, layers: list[int] | None = None, **settings: Any) -> Step:
    adapters.attach(model, AdapterSection(kind="lora", rank=4, scale=2.0, layers=layers), seed=0)
    # lora_b starts at 0, and then lora_a has no gradient: move it.
    changed = [
        (name, mx.random.normal(one.shape, key=mx.random.key(3)) * 0.1)
        for name, one in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    return Step(
        model,
        optim.Adam(1e-3),
        reward_weight=1.0,
        use_filter=False,
        gradient=gradient,
        compiled=settings.pop("compiled", False),
        **settings,
    )


def autodiff(
    model: Any, batch: dict[str, mx.array], rows: Callable[[], list[mx.array | None]]
) -> tuple[mx.array, dict[str, np.ndarray]]:
    """The loss of some rows, and its gradients by autodiff of the whole."""
    kept = model.trainable_parameters()

    def loss(parameters: Any) -> Any:
        model.update(parameters)
        return tuple(
            abft_terms(
                rows(),
                batch["label_positions"],
                batch["demonstration_labels"],
                batch["gold"],
                batch["last"],
                punish_weight=0.5,
                reward_weight=1.0,
                use_filter=False,
                prompt_weights=batch["weights"],
            )
        )

    values, gradients = mx.value_and_grad(loss)(kept)
    mx.eval(values, gradients)
    model.update(kept)
    return mx.stack(values), {name: np.array(one) for name, one in tree_flatten(gradients)}


def stopped(model: Any, batch: dict[str, mx.array]) -> tuple[mx.array, dict[str, np.ndarray]]:
    """The whole loss and its gradients, nothing passing from block to block."""

    def rows() -> list[mx.array | None]:
        with ports.hook_blocks(model, before=lambda _, hidden: mx.stop_gradient(hidden)):
            return attention.forward(model, batch["tokens"], batch["last"])[1]

    return autodiff(model, batch, rows)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", KINDS)
def test_local_gradients_are_autodiffs_with_stops(
    tiny: ModuleType, name: str, layers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Activation functions stay MLX's own; tests/test_activations.py compares ours with them.
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    model = tiny.build(name)
    if layers is not None and ports.heads(model)[1] is None:
        layers = [n for n, one in enumerate(ports.heads(model)) if one is not None][:1]
    step = step_of(model, "local", layers)
    (batch,) = micro_batches(prompts(), 4)
    gradients, terms = step.gradients([batch], 0.5)
    found = {name: np.array(one) for name, one in tree_flatten(gradients)}
    expected_terms, expected = stopped(model, batch.arrays())
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        assert np.abs(found[path] - gradient).max() <= 1e-6, path
    assert max(np.abs(one).max() for one in expected.values()) > 1e-4
    if layers is None:
        assert np.allclose(np.array(terms), np.array(expected_terms), rtol=1e-5)


def test_the_top_layer_learns_as_in_the_exact_step(tiny: ModuleType) -> None:
    """Of the layers below, exact gradients hold what layers above add: they differ."""
    (batch,) = micro_batches(prompts(), 4)
    local, _ = step_of(tiny.build("llama"), "local").gradients([batch], 0.5)
    exact, _ = step_of(tiny.build("llama"), "exact").gradients([batch], 0.5)
    ours, whole = dict(tree_flatten(local)), dict(tree_flatten(exact))
    for name, gradient in whole.items():
        same = np.allclose(np.array(ours[name]), np.array(gradient), atol=1e-6)
        assert same == (".layers.2." in name), name


def test_an_update_moves_every_layer(tiny: ModuleType) -> None:
    step = step_of(tiny.build("llama"), "local")
    before = {name: np.array(one) for name, one in tree_flatten(step.model.trainable_parameters())}
    batches = micro_batches(prompts(), 2)
    first = step.update(batches, 0.5)
    for _ in range(5):
        later = step.update(batches, 0.5)
    assert later.loss < first.loss
    for name, one in tree_flatten(step.model.trainable_parameters()):
        assert np.abs(np.array(one) - before[name]).max() > 0
