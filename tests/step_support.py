"""Small prompts, a step on a model with LoRA that moves something, and autodiff of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from abft_mlx import adapters
from abft_mlx.objective import abft_terms
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.step import Step


def prompts() -> list[Prompt]:
    source = np.random.default_rng(0)
    made = []
    for length in (24, 20, 17):
        tokens = tuple(source.integers(1, 90, length).tolist())
        made.append(Prompt(tokens, (3, 8, 13), (0, 1, 0), int(source.integers(0, 2)), (5,)))
    return made


def step_of(model: Any, layers: list[int] | None = None, **settings: Any) -> Step:
    """A step on a model that gets LoRA; lora_b starts at 0, which would hide lora_a: it moves."""
    adapters.attach(model, AdapterSection(kind="lora", rank=4, scale=2.0, layers=layers), seed=0)
    changed = [
        (name, mx.random.normal(value.shape, key=mx.random.key(3)) * 0.1)
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(changed, strict=False)
    defaults = {"reward_weight": 1.0, "use_filter": False, "compiled": False}
    return Step(model, optim.Adam(1e-3), **defaults | settings)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def autodiff(
    model: Any, batch: dict[str, mx.array], rows: Callable[[], list[mx.array | None]]
) -> tuple[mx.array, dict[str, np.ndarray]]:
    """Equation 1 of some rows, and its gradients by autodiff of the whole."""
    kept = model.trainable_parameters()

    def loss(parameters: Any) -> Any:
        model.update(parameters)
        names = ("label_positions", "demonstration_labels", "gold", "last")
        return tuple(
            abft_terms(
                rows(),
                *(batch[name] for name in names),
                punish_weight=0.5,
                reward_weight=1.0,
                use_filter=False,
                prompt_weights=batch["weights"],
            )
        )

    values, gradients = mx.value_and_grad(loss)(kept)
    mx.eval(values, gradients)
    model.update(kept)
    return mx.stack(values), flat(gradients)
