"""Hooks on blocks' hidden states, on tiny random models of several kinds."""

from __future__ import annotations

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_configs as tiny
from mlx.utils import tree_flatten

from abft_mlx import attention, ports


# Hidden states first; by keyword; in a tuple with keys and values; several copies of them.
@pytest.mark.parametrize("name", ["llama", "gptj", "hunyuan", "gemma3n", "qwen3_next"])
def test_what_goes_in_and_out_can_be_changed(name: str) -> None:
    model = tiny.build(name)
    tokens, last = tiny.tokens()
    plain = np.array(model(tokens).astype(mx.float32))
    calls: list[tuple[str, int]] = []

    def noted(side: str, changed: int | None = None) -> ports.Hook:
        def hook(block: int, hidden: mx.array) -> mx.array:
            calls.append((side, block))
            noise = mx.random.normal(hidden.shape, key=mx.random.key(0))
            return hidden + noise if block == changed else hidden

        return hook

    with ports.hook_blocks(model, noted("before"), noted("after")):
        hooked = np.array(model(tokens).astype(mx.float32))
    assert np.array_equal(hooked, plain)
    n_blocks = len(ports.port_for(model).blocks(model))
    assert calls == [(side, block) for block in range(n_blocks) for side in ("before", "after")]
    rows = attention.capture(model, tokens, last)
    for side, first in {"before": 1, "after": 2}.items():
        with ports.hook_blocks(model, **{side: noted(side, 1)}):
            changed = attention.capture(model, tokens, last)
        for layer, (row, other) in enumerate(zip(rows, changed, strict=True)):
            if row is not None and other is not None:
                assert mx.array_equal(row, other).item() == (layer < first)
    assert np.array_equal(np.array(model(tokens).astype(mx.float32)), plain)


def test_a_stopped_gradient_leaves_each_layer_its_own() -> None:
    model = tiny.build("llama")
    tokens, last = tiny.tokens()

    def gradients() -> dict[str, np.ndarray]:
        def loss(model: nn.Module) -> mx.array:
            row = attention.forward(model, tokens, last)[1][2]
            assert row is not None
            return (row * mx.arange(row.shape[-1])).sum()

        found = tree_flatten(nn.value_and_grad(model, loss)(model)[1])
        return {name: np.array(value) for name, value in found if "q_proj" in name}

    whole = gradients()
    with ports.hook_blocks(model, before=lambda _, hidden: mx.stop_gradient(hidden)):
        local = gradients()
    for name, gradient in whole.items():
        assert np.abs(gradient).max() > 1e-4
        assert np.allclose(local[name], gradient, atol=1e-6) == (".2." in name)
        assert (np.abs(local[name]).max() == 0) != (".2." in name)


def test_known_hidden_states_spare_the_layers_below() -> None:
    """Layers below get weights that are not a number: were they computed, it would show."""
    model = tiny.build("llama")
    tokens, last = tiny.tokens()
    inputs: dict[int, mx.array] = {}
    with ports.hook_blocks(model, before=lambda n, hidden: inputs.setdefault(n, hidden)):
        expected = attention.capture(model, tokens, last)
    mx.eval(inputs, expected)
    layer = ports.port_for(model).blocks(model)[0].module
    layer.self_attn.q_proj.weight = layer.self_attn.q_proj.weight * float("nan")
    with ports.hook_blocks(model, before=lambda n, hidden: inputs[2] if n == 2 else hidden):
        rows = attention.capture(model, tokens, last)
    assert mx.array_equal(rows[2], expected[2])
    assert np.isnan(np.array(rows[0])).any()


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_hooks_nest_and_compile_and_other_threads_see_none(name: str) -> None:
    model = tiny.build(name)
    tokens, _ = tiny.tokens()
    plain = np.array(model(tokens))
    order: list[str] = []

    def named(name: str) -> ports.Hook:
        def hook(_: int, hidden: mx.array) -> mx.array:
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
        results: list[np.ndarray] = []

        def elsewhere() -> None:
            with mx.stream(mx.new_stream(mx.default_device())):
                results.append(np.array(model(tokens)))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert order == []
        assert np.allclose(results[0], plain, atol=1e-5)


def test_an_exception_in_a_hook_leaves_the_model_as_it_was() -> None:
    model = tiny.build("llama")
    tokens, _ = tiny.tokens()
    plain, kinds = np.array(model(tokens)), [type(layer) for layer in model.layers]
    with (
        pytest.raises(ZeroDivisionError),
        ports.hook_blocks(model, after=lambda n, h: h / (1 // n)),
    ):
        mx.eval(model(tokens))
    assert [type(layer) for layer in model.layers] == kinds
    assert np.array_equal(np.array(model(tokens)), plain)
