"""Attention rows against transformers' eager attention and float64 NumPy; models are put back."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from abft_mlx import adapters, attention, ports
from abft_mlx.errors import ModelError, RunError, UnsupportedArchitectureError
from abft_mlx.recipe import AdapterSection

EXACT = 1e-5


def largest_difference(left: Any, right: Any) -> float:
    return float(np.abs(np.asarray(left) - np.asarray(right)).max())


def eager(model: Any, tokens: mx.array, last: mx.array) -> tuple[list[np.ndarray], np.ndarray]:
    """Transformers' last-position rows, (B, H, T) per layer, and its logits (B, T, V)."""
    torch = tiny_models.torch()
    ids = torch.tensor(np.array(tokens).astype(np.int64))
    ends = torch.tensor(np.array(last).astype(np.int64))
    mask = (torch.arange(ids.shape[1]) <= ends[:, None]).long()
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    every = torch.arange(len(ids))
    rows = [layer[every, :, ends].numpy() for layer in output.attentions]
    return rows, output.logits.numpy()


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_rows_equal_transformers_eager_attention(name: str, tmp_path: Path) -> None:
    torch_model = tiny_models.reference(name)
    model, _ = load_model(tiny_models.save_reference(torch_model, tmp_path, name))
    tokens, last = tiny_models.tokens(batch=4, length=40)
    expected, logits = eager(torch_model, tokens, last)
    rows = attention.capture(model, tokens, last)
    errors = [largest_difference(a, b) for a, b in zip(rows, expected, strict=True)]
    print(f"{name}: largest pattern error {max(errors):.1e}")
    assert [row.shape for row in rows if row is not None] == [row.shape for row in expected]
    assert all(row is not None and row.dtype == mx.float32 for row in rows)
    assert max(errors) <= EXACT, f"{name}: largest error per layer {errors}"
    real = np.array(mx.arange(tokens.shape[1]) <= last[:, None])
    assert largest_difference(np.array(model(tokens))[real], logits[real]) <= 2e-5
    # The rows are worth comparing: far from uniform, and different between heads.
    assert all(np.max(row) > 0.3 and np.std(row, axis=1).max() > 0.05 for row in expected)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_columns_after_last_are_exactly_zero(name: str) -> None:
    model = tiny_models.build(name)
    tokens, last = tiny_models.tokens()
    padding = mx.arange(tokens.shape[1]) > last[:, None]
    changed = mx.where(padding, 7, tokens)
    for row, other in zip(
        attention.capture(model, tokens, last), attention.capture(model, changed, last), strict=True
    ):
        assert mx.where(padding[:, None], row, 0).max().item() == 0.0
        assert largest_difference(row.sum(axis=-1), 1.0) <= 1e-6
        assert mx.array_equal(row, other), "what fills the padding changes nothing"


def test_instrumenting_changes_neither_logits_nor_parameter_names() -> None:
    for name in tiny_models.ARCHITECTURES:
        model = tiny_models.build(name)
        tokens, last = tiny_models.tokens()
        names = [key for key, _ in tree_flatten(model.parameters())]
        shown, plain = repr(model), model(tokens)
        mx.eval(plain)
        with attention.instrument(model) as recorder:
            recorder.last = last
            inside = model(tokens)
            assert mx.array_equal(inside, plain)
            assert [key for key, _ in tree_flatten(model.parameters())] == names
            assert repr(model) == shown
            assert all(row is not None for row in recorder.rows)
        assert mx.array_equal(model(tokens), plain)
        assert [key for key, _ in tree_flatten(model.parameters())] == names


def classes(model: nn.Module) -> list[type]:
    port = ports.port_for(model)
    return [type(port.attention_module(layer)) for layer in port.layers(model)]


def test_classes_are_put_back_even_on_an_exception() -> None:
    model = tiny_models.build("llama")
    before = classes(model)

    def fail() -> None:
        with attention.instrument(model):
            assert not set(classes(model)) & set(before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert classes(model) == before
    with pytest.raises(ValueError, match="broadcast"):
        attention.forward(model, mx.zeros((2, 5), dtype=mx.int32), mx.zeros((3,), dtype=mx.int32))
    assert classes(model) == before


def test_a_second_instrument_is_an_error_and_leaves_the_first_alone() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    before, expected = classes(model), attention.capture(model, tokens, last)
    with attention.instrument(model) as recorder:
        with pytest.raises(RunError, match="already instrumented"):
            attention.capture(model, tokens, last)
        recorder.last = last
        model(tokens)
        assert mx.array_equal(recorder.rows[2], expected[2])
    assert classes(model) == before


def test_rows_are_freed_without_the_garbage_collector() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    gc.disable()
    try:
        with attention.instrument(model) as recorder:
            recorder.last = last
            mx.eval(model(tokens), recorder.rows)
        seen = weakref.ref(recorder)
        del recorder
        assert seen() is None
    finally:
        gc.enable()


def test_another_thread_is_untouched() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    expected = np.array(model(tokens))
    seen: list[np.ndarray] = []

    def elsewhere() -> None:
        with mx.stream(mx.cpu):
            seen.append(np.array(model(tokens)))

    with attention.instrument(model) as recorder:
        recorder.last = last
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert recorder.rows == [None] * tiny_models.LAYERS
    assert largest_difference(seen[0], expected) <= 1e-6


def test_a_training_step_compiles_with_the_model_as_state() -> None:
    """One layer: on a CPU each compiled kernel costs a second of C++ compiler, once a machine."""
    tokens, last = tiny_models.tokens()

    def mass(model: nn.Module, tokens: mx.array, last: mx.array) -> mx.array:
        return attention.forward(model, tokens, last)[1][0][:, :, 1].sum()

    def trained(compiled: bool) -> tuple[list[float], mx.array]:
        model = tiny_models.build("llama", num_hidden_layers=1)
        adapters.attach(model, AdapterSection(rank=2))
        optimizer = optim.SGD(1.0)
        state = [model.state, optimizer.state]

        def step(tokens: mx.array, last: mx.array) -> mx.array:
            value, gradients = nn.value_and_grad(model, mass)(model, tokens, last)
            optimizer.update(model, gradients)
            return value

        run = mx.compile(step, inputs=state, outputs=state) if compiled else step
        losses = [run(tokens, last).item() for _ in range(3)]
        return losses, model.layers[0].self_attn.k_proj.lora_b

    losses, lora_b = trained(compiled=True)
    expected, expected_lora_b = trained(compiled=False)
    assert losses[2] < losses[1] < losses[0]
    assert np.allclose(losses, expected, rtol=1e-5)
    assert largest_difference(lora_b, expected_lora_b) <= 1e-5


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_softmax_is_float32_in_a_16_bit_model(dtype: mx.Dtype) -> None:
    keys = [mx.random.key(n) for n in range(2)]
    queries = mx.random.normal((2, 4, 64, 16), key=keys[0]).astype(dtype)
    key_states = mx.random.normal((2, 2, 64, 16), key=keys[1]).astype(dtype)
    last = mx.array([63, 40])
    row = attention.last_row(queries, key_states, last, scale=0.25, mask="causal")
    assert row.dtype == mx.float32
    expected = numpy_row(
        np.array(queries.astype(mx.float32)),
        np.array(key_states.astype(mx.float32)),
        np.array(last),
        0.25,
    )
    assert largest_difference(row, expected) <= 1e-6


def numpy_row(
    queries: np.ndarray,
    keys: np.ndarray,
    last: np.ndarray,
    scale: float,
    allowed: np.ndarray | None = None,
    added: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """The definition, slowly, in float64: (B, H, T, D), (B, G, S, D) to (B, H, S)."""
    B, H, T, _ = queries.shape
    G, S = keys.shape[1:3]
    rows = np.zeros((B, H, S))
    for b in range(B):
        for h in range(H):
            query = queries[b, h, last[b]].astype(np.float64)
            scores = keys[b, h * G // H].astype(np.float64) @ query * scale
            if added is not None:
                scores = scores + added[b, h, last[b]]
            visible = np.arange(S) <= last[b] + S - T
            if allowed is not None:
                visible &= allowed[b, h, last[b]]
            weights = np.where(visible, np.exp(scores - scores.max()), 0)
            sink = 0.0 if sinks is None else np.exp(sinks[h] - scores.max())
            rows[b, h] = weights / (weights.sum() + sink)
    return rows


@pytest.mark.parametrize("form", ["(T,S)", "(1,S)", "(B,1,T,S)", "(B,H,T,S)", "(H,T,S)"])
@pytest.mark.parametrize(("kind", "cached"), [("bool", 3), ("additive", 0)])
def test_masks_of_every_form(form: str, kind: str, cached: int) -> None:
    B, H, G, T, D = 3, 4, 2, 12, 8
    random = np.random.default_rng(0)
    queries = random.normal(size=(B, H, T, D)).astype(np.float32)
    keys = random.normal(size=(B, G, T + cached, D)).astype(np.float32)
    last = np.array([11, 7, 4])
    sizes = {"B": B, "H": H, "T": T, "S": T + cached, "1": 1}
    shape = tuple(sizes[letter] for letter in form.strip("()").split(","))
    window = np.abs(np.arange(T)[:, None] + cached - np.arange(T + cached)[None]) < 6
    if kind == "bool":
        mask = (random.random(shape) < 0.7) & window | np.eye(T, T + cached, cached, dtype=bool)
        expected = numpy_row(
            queries, keys, last, 0.3, allowed=np.broadcast_to(mask, (B, H, T, T + cached))
        )
    else:
        mask = random.normal(size=shape).astype(np.float32)
        expected = numpy_row(
            queries, keys, last, 0.3, added=np.broadcast_to(mask, (B, H, T, T + cached))
        )
    row = attention.last_row(
        mx.array(queries), mx.array(keys), mx.array(last), scale=0.3, mask=mx.array(mask)
    )
    assert largest_difference(row, expected) <= 1e-6


def test_sinks_take_attention() -> None:
    random = np.random.default_rng(0)
    queries = random.normal(size=(2, 4, 6, 8)).astype(np.float32)
    keys = random.normal(size=(2, 2, 6, 8)).astype(np.float32)
    last, sinks = np.array([5, 3]), np.array([0.5, -1.0, 2.0, 0.0], dtype=np.float32)
    row = attention.last_row(
        mx.array(queries), mx.array(keys), mx.array(last), scale=1.0, sinks=mx.array(sinks)
    )
    assert largest_difference(row, numpy_row(queries, keys, last, 1.0, sinks=sinks)) <= 1e-6
    assert row.sum(axis=-1).max().item() < 1


def test_rows_with_a_prompt_cache_cover_the_cached_positions() -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_models.build("llama")
    tokens, _ = tiny_models.tokens(batch=1, length=20)
    whole = attention.capture(model, tokens, mx.array([19]))
    cache = make_prompt_cache(model)
    mx.eval(model(tokens[:, :12], cache=cache))
    with attention.instrument(model) as recorder:
        recorder.last = mx.array([7])
        model(tokens[:, 12:], cache=cache)
    for row, expected in zip(recorder.rows, whole, strict=True):
        assert largest_difference(row, expected) <= 2e-6


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 2, 2, 6, 9)])
def test_rows_of_scores_that_are_masked_already(shape: tuple[int, ...]) -> None:
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    last = np.array([5, 3])
    flat = scores.reshape(2, -1, *shape[-2:]).astype(np.float64)
    expected = np.exp(flat[np.arange(2), :, last])
    row = attention.row_of_scores(mx.array(scores), mx.array(last))
    assert row.dtype == mx.float32
    assert largest_difference(row, expected / expected.sum(axis=-1, keepdims=True)) <= 1e-6


def test_a_call_aside_has_rows_of_its_own_and_a_pause_has_none() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    with attention.instrument(model) as recorder:
        recorder.last = last
        model(tokens)
        before = list(recorder.rows)
        with recorder.aside(mx.array([0, 0, 0])) as rows:
            model(tokens)
            assert all(row is not None and row[0, 0, 0].item() == 1 for row in rows)
        with recorder.aside(None):
            model(tokens)
        assert recorder.last is last
        assert all(a is b for a, b in zip(recorder.rows, before, strict=True))


def test_a_quantized_cache_and_an_unknown_mask_are_refused() -> None:
    from mlx_lm.models.cache import QuantizedKVCache

    model = tiny_models.build("llama", head_dim=64)
    tokens, last = tiny_models.tokens()
    caches = [QuantizedKVCache(group_size=64) for _ in model.layers]
    with attention.instrument(model) as recorder:
        recorder.last = last
        with pytest.raises(ModelError, match="quantized key/value cache"):
            model(tokens, cache=caches)
    states = mx.zeros((1, 1, 2, 8))
    with pytest.raises(ModelError, match="mask 'window' is not known"):
        attention.last_row(states, states, mx.array([1]), scale=1.0, mask="window")


def test_a_model_that_computes_attention_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    before, kind = classes(model), type(model.layers[0].self_attn)
    for otherwise in (lambda self, x, **_: self.o_proj(self.q_proj(x)), partial(kind.__call__)):
        monkeypatch.setattr(kind, "__call__", otherwise)
        with pytest.raises(UnsupportedArchitectureError, match="does not call scaled_dot"):
            attention.capture(model, tokens, last)
        assert classes(model) == before
        monkeypatch.undo()
    block = model.layers[0]
    block.__class__ = type("Passing", (type(block),), {"__call__": lambda _, x, *__, **___: x})
    with pytest.raises(UnsupportedArchitectureError, match="in another way"):
        attention.forward(model, tokens, last)


def test_bad_input_is_one_clear_line() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    for positions in ([24, 1, 1], [0, -1, 5]):
        with pytest.raises(ModelError, match=r"not all within 0\.\.23"):
            attention.capture(model, np.array(tokens), np.array(positions))
    for wrong in (last[:2], last[:, None]):
        with pytest.raises(ModelError, match="do not fit"):
            attention.capture(model, tokens, wrong)
    with pytest.raises(UnsupportedArchitectureError, match=r"'mlx\.nn\.layers\.linear'"):
        attention.capture(nn.Linear(2, 2), tokens, last)
