"""The gradient of equation 1 against central differences of the loss, for every architecture.

Values of the loss come from the plain forward pass, so that a wrong gradient of ours, or of MLX,
cannot hide: a missing path, a stopped gradient, an array that one row should not have reached.
Float64 would not help, because MLX computes rotary embeddings and experts in float32 whatever
comes in; five points and steps far above float32's noise do, of which the best one counts. Which
experts a token goes to has no gradient and makes the loss jump: the choices are held as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from step_support import prompts, step_of

from abft_mlx import adapters, attention, ports
from abft_mlx.objective import abft_terms
from abft_mlx.trainer.batches import micro_batches
from abft_mlx.trainer.step import Step

PUNISH = 0.5
STEPS = (0.1, 0.03, 0.01, 0.005)
# Of the gradient's norm. plamo2's is so small that float32's noise is a larger share of it, and
# apertus' activation has a tiny jump at 0.
TOLERANCE = 5e-4
LOOSE = {"plamo2": 5e-3, "apertus": 3e-3}
CHOOSING = ("argpartition", "argmax")
FIRST = [port.architectures[0] for port in ports.PORTS]
OTHERS = [name for port in ports.PORTS for name in port.architectures[1:]]
Numbers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def numbers(tree: Any) -> Numbers:
    return {name: np.array(one, dtype=np.float64) for name, one in tree_flatten(tree)}


def norm(direction: Numbers) -> float:
    return float(np.sqrt(sum((one**2).sum() for one in direction.values())))


def directions(model: Any, gradient: Numbers) -> list[Numbers]:
    """Unit directions: one into every array's own gradient with signs at random, and a random one.

    In a random direction of so many numbers a gradient is only a few hundredths of its length; the
    other sees the gradient of every array in full.
    """
    source = np.random.default_rng(0)
    signed = {
        name: source.choice([-1.0, 1.0]) * one / max(np.sqrt((one**2).sum()), 1e-30)
        for name, one in gradient.items()
    }
    noise = {name: source.normal(size=one.shape) for name, one in gradient.items()}
    tree = tree_unflatten([(name, mx.array(one)) for name, one in noise.items()])
    # What belongs to V in a fused projection never moves.
    masked = numbers(adapters.mask_gradients(model, tree_map(lambda a: a.astype(mx.float32), tree)))
    return [{n: v / norm(one) for n, v in one.items()} for one in (signed, masked)]


def difference(loss: Callable[[float], float], step: float) -> float:
    """The derivative at 0 from five points."""
    near = loss(step) - loss(-step)
    far = loss(2 * step) - loss(-2 * step)
    return (8 * near - far) / (12 * step)


@contextmanager
def choices(held: list[mx.array] | None) -> Iterator[list[mx.array]]:
    """Notes what is chosen, or gives out again what was noted."""
    originals, noted = {name: getattr(mx, name) for name in CHOOSING}, []
    again = iter(held or ())

    def chosen(original: Callable[..., mx.array], *given: Any, **more: Any) -> mx.array:
        noted.append(original(*given, **more) if held is None else next(again))
        return noted[-1]

    for name, original in originals.items():
        setattr(mx, name, partial(chosen, original))
    mx.disable_compile()  # else it is called as something is compiled, once for all
    try:
        yield noted
    finally:
        mx.enable_compile()
        for name, original in originals.items():
            setattr(mx, name, original)


def errors(model: Any, step: Step, *, use_filter: bool = False) -> list[float]:
    """How far the step's derivatives are from differences, in units of the gradient's norm."""
    (batch,) = micro_batches(prompts(), 4)
    arrays = batch.arrays()
    # Adapters of V in fused projections are zero in every run: the trainer masks their gradient.
    model.update(adapters.mask_gradients(model, model.trainable_parameters()))
    start = numbers(model.trainable_parameters())
    gradients, _ = step.gradients([batch], PUNISH)
    gradient = numbers(adapters.mask_gradients(model, gradients))
    assert gradient.keys() == start.keys()

    with choices(None) as held:
        mx.eval(attention.forward(model, arrays["tokens"], arrays["last"])[0])

    def at(direction: Numbers) -> Callable[[float], float]:
        def loss(shift: float) -> float:
            moved = [(n, mx.array((v + shift * direction[n]).astype(np.float32)))
                     for n, v in start.items()]  # fmt: skip
            model.update(tree_unflatten(moved))
            with choices(held):
                rows = attention.forward(model, arrays["tokens"], arrays["last"])[1]
            terms = abft_terms(
                rows,
                arrays["label_positions"],
                arrays["demonstration_labels"],
                arrays["gold"],
                arrays["last"],
                punish_weight=PUNISH,
                reward_weight=1.0,
                use_filter=use_filter,
                prompt_weights=arrays["weights"],
            )
            return float(terms.loss.item())

        return loss

    found = []
    for direction in directions(model, gradient):
        expected = sum(float((gradient[name] * one).sum()) for name, one in direction.items())
        tried = [difference(at(direction), step) for step in STEPS]
        found.append(min(abs(one - expected) for one in tried) / norm(gradient))
    return found


def check(tiny: ModuleType, name: str, **settings: Any) -> None:
    if name not in tiny.architectures():
        pytest.skip(f"the installed mlx-lm has no {name}")
    model = tiny.build(name)
    for one in model.modules():
        if name == "phimoe" and hasattr(one, "jitter_eps"):
            one.jitter_eps = 1e9  # no expert's score is cut off, which would be another choice
    found = errors(model, step_of(model, **settings))
    assert max(found) <= LOOSE.get(name, TOLERANCE), found


@pytest.mark.parametrize("name", FIRST)
def test_the_gradient_of_every_port(tiny: ModuleType, name: str) -> None:
    check(tiny, name)


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_the_gradient_of_every_architecture(tiny: ModuleType, name: str) -> None:
    check(tiny, name)
