"""Hooks on layers' hidden states, on tiny random models of several kinds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError

# Hidden states first; by keyword; second; in a tuple with keys and values; several copies;
# two lists of blocks; two attentions in a block.
KINDS = (
    "llama", "gptj", "talkie", "hunyuan", "gemma4_text", "gemma3n", "qwen3_next", "afm7",
    "longcat_flash",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


@pytest.mark.parametrize("name", KINDS)
def test_what_goes_in_and_out_can_be_changed(tiny: ModuleType, name: str) -> None:
    model = tiny.build(name)
    tokens, _ = tiny.tokens()
    plain = np.array(model(tokens).astype(mx.float32))
    seen: list[tuple[str, int]] = []

    def noted(side: str, changed: int | None = None) -> ports.Hook:
        def hook(block: int, hidden: mx.array) -> mx.array:
            seen.append((side, block))
            noise = mx.random.normal(hidden.shape, key=mx.random.key(0))
            return hidden + noise if block == changed else hidden

        return hook

    with ports.hook_blocks(model, noted("before"), noted("after")):
        hooked = np.array(model(tokens).astype(mx.float32))
    assert np.array_equal(hooked, plain)
    blocks = ports.port_for(model).blocks(model)
    every = [(side, block) for block in range(len(blocks)) for side in ("before", "after")]
    assert seen == every
    assert [n for block in blocks for n in block.layers] == list(range(len(ports.heads(model))))
    rows = attention.capture(model, *tiny.tokens())
    for side, first in {"before": 1, "after": 2}.items():
        with ports.hook_blocks(model, **{side: noted(side, 1)}):
            changed = attention.capture(model, *tiny.tokens())
            assert not np.array_equal(np.array(model(tokens).astype(mx.float32)), plain)
        for layer, (one, other) in enumerate(zip(rows, changed, strict=True)):
            if one is not None:
                untouched = layer < blocks[first].layers[0]
                assert np.array_equal(np.array(one), np.array(other)) == untouched
    assert np.array_equal(np.array(model(tokens).astype(mx.float32)), plain)


def test_a_stopped_gradient_leaves_each_layer_its_own(tiny: ModuleType) -> None:
    model = tiny.build("llama")
    tokens, last = tiny.tokens()

    def gradients(layer: int) -> dict[str, np.ndarray]:
        def loss(model: nn.Module) -> mx.array:
            row = attention.forward(model, tokens, last)[1][layer]
            assert row is not None
            return (row * mx.arange(row.shape[-1])).sum()

        return {
            name: np.array(value)
            for name, value in tree_flatten(nn.value_and_grad(model, loss)(model)[1])
            if "q_proj" in name
        }

    whole = gradients(2)
    with ports.hook_blocks(model, before=lambda _, hidden: mx.stop_gradient(hidden)):
        local = gradients(2)
    for name, gradient in whole.items():
        assert np.abs(gradient).max() > 1e-4
        own = ".2." in name
        assert np.allclose(local[name], gradient, atol=1e-6) == own
        assert (np.abs(local[name]).max() == 0) != own


def test_known_hidden_states_spare_the_layers_below(tiny: ModuleType) -> None:
    """Layers below get weights that are not a number: were they computed, it would show."""
    model = tiny.build("llama")
    tokens, last = tiny.tokens()
    kept: dict[int, mx.array] = {}

    def keep(layer: int, hidden: mx.array) -> mx.array:
        kept[layer] = hidden
        return hidden

    with ports.hook_blocks(model, before=keep):
        expected = [np.array(row) for row in attention.capture(model, tokens, last)]
    mx.eval(kept)
    layer = ports.port_for(model).blocks(model)[0].module
    layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * float("nan")
    with ports.hook_blocks(model, before=lambda n, h: kept[2] if n == 2 else h):
        rows = attention.capture(model, tokens, last)
        assert np.array_equal(np.array(rows[2]), expected[2])
    assert np.isnan(np.array(rows[0])).any()


def test_hooks_nest_and_compile_and_other_threads_see_none(tiny: ModuleType) -> None:
    model = tiny.build("llama")
    tokens, _ = tiny.tokens()
    plain = np.array(model(tokens))
    order: list[str] = []

    def named(name: str) -> ports.Hook:
        def hook(_layer: int, hidden: mx.array) -> mx.array:
            order.append(name)
            return hidden * 2

        return hook

    with ports.hook_blocks(model, before=named("outer")):
        doubled = np.array(model(tokens))
        assert np.abs(doubled - plain).max() > 1e-3
        compiled = mx.compile(model, inputs=[model.state])
        assert np.allclose(np.array(compiled(tokens)), doubled, atol=1e-4)
        order.clear()
        with ports.hook_blocks(model, before=named("inner")):
            mx.eval(model(tokens))
        assert order == ["inner", "outer"] * 3
        order.clear()
        found: list[Any] = []

        def elsewhere() -> None:
            with mx.stream(mx.new_stream(mx.default_device())):
                found.append(np.array(model(tokens)))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert order == []
        assert np.allclose(found[0], plain, atol=1e-5)


def test_an_exception_in_a_hook_leaves_the_model_as_it_was(tiny: ModuleType) -> None:
    model = tiny.build("llama")
    tokens, _ = tiny.tokens()
    plain, kinds = np.array(model(tokens)), [type(one) for one in model.layers]
    with (
        pytest.raises(ZeroDivisionError),
        ports.hook_blocks(model, after=lambda n, h: h / (1 // n)),
    ):
        mx.eval(model(tokens))
    assert [type(one) for one in model.layers] == kinds
    assert np.array_equal(np.array(model(tokens)), plain)


def test_blocks_that_are_run_piece_by_piece_are_refused_in_one_line(tiny: ModuleType) -> None:
    model = tiny.build("iquestloopcoder")
    blocks = ports.port_for(model).blocks(model)
    assert len(blocks) == 6
    assert blocks[0].module is blocks[3].module
    with (
        pytest.raises(UnsupportedArchitectureError, match="piece by piece"),
        ports.hook_blocks(model),
    ):
        pass
