"""What a recorder keeps and when it keeps nothing, masks of every form, and what is refused."""

from __future__ import annotations

import re
import threading
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from test_attention import largest_difference, numpy_row

from abft_mlx import attention
from abft_mlx.attention import Recorder
from abft_mlx.errors import ModelError, RunError, UnsupportedArchitectureError

B, H, T, D = 2, 4, 6, 8
LAST = mx.array([5, 3])


def given(seed: int = 0, heads: int = H) -> mx.array:
    return mx.random.normal((B, heads, T, D), key=mx.random.key(seed))


def plain(queries: mx.array, keys: Any, values: Any, *args: Any, **options: Any) -> Any:
    return queries, keys, values, args, options


def test_rows_of_a_call_and_what_the_original_gets() -> None:
    """mlx-lm's signature is (queries, keys, values, cache, scale, mask, sinks)."""
    recorder = Recorder(2)
    assert recorder.rows == [None, None]
    assert recorder.last is None
    hooked = attention.record_attention([recorder], (1,), plain)
    q, k, v = given(), given(1, 2), given(2, 2)
    mask = mx.random.normal((T, T), key=mx.random.key(3))
    sinks = mx.array([0.5, -1.0, 2.0, 0.0])
    assert hooked(q, k, v, None, 0.3, mask) == (q, k, v, (None, 0.3, mask), {})
    assert recorder.rows == [None, None], "nothing is recorded without last"
    recorder.last = LAST
    assert recorder.last is LAST
    added = np.broadcast_to(np.array(mask), (B, H, T, T))
    arrays = np.array(q), np.array(k), np.array(LAST), 0.3
    for args, options, expected in (
        ((), {"scale": 0.3}, {}),
        ((None, 0.3), {}, {}),
        ((None, 0.3, mask), {}, {"added": added}),
        ((None,), {"scale": 0.3, "mask": mask}, {"added": added}),
        ((None, 0.3, mask, sinks), {}, {"added": added, "sinks": np.array(sinks)}),
        ((), {"cache": None, "scale": 0.3, "sinks": sinks}, {"sinks": np.array(sinks)}),
    ):
        recorder.last = LAST
        assert hooked(q, k, v, *args, **options) == (q, k, v, args, options)
        first, row = recorder.rows
        assert first is None
        assert largest_difference(row, numpy_row(*arrays, **expected)) <= 1e-6


def test_another_attention_function_takes_the_place_of_the_original() -> None:
    def attend(original: Any) -> Any:
        return lambda *args, **options: ("instead", original(*args, **options))

    recorder = Recorder(1, attend)
    recorder.last = LAST
    q = given()
    kind, got = attention.record_attention([recorder], (0,), plain)(q, q, q, scale=1.0)
    assert (kind, got) == ("instead", (q, q, q, (), {"scale": 1.0}))
    assert largest_difference(recorder.rows[0].sum(axis=-1), 1.0) <= 1e-6


def test_a_module_of_several_layers_is_called_for_them_in_turn() -> None:
    recorder = Recorder(4)
    shared, other = (
        attention.record_attention([recorder], (0, 2, 3), plain),
        attention.record_attention([recorder], (1,), plain),
    )
    recorder.last = LAST
    queries = [given(seed) for seed in range(4)]
    for layer, hooked in ((0, shared), (1, other), (2, shared), (3, shared)):
        hooked(queries[layer], queries[layer], None, scale=1.0)
    for layer, row in enumerate(recorder.rows):
        alone = attention.last_row(queries[layer], queries[layer], LAST, scale=1.0)
        assert mx.array_equal(row, alone), layer
    # The next call begins with the first layer again, without a word too.
    shared(queries[1], queries[1], None, scale=1.0)
    assert mx.array_equal(recorder.rows[0], recorder.rows[1])
    recorder.last = LAST
    assert recorder.rows == [None] * 4
    shared(queries[1], queries[1], None, scale=1.0)
    assert recorder.rows[0] is not None
    assert recorder.rows[1:] == [None] * 3


def test_a_call_aside_has_rows_of_its_own() -> None:
    recorder = Recorder(2)
    hooked = attention.record_attention([recorder], (0, 1), plain)
    recorder.last = LAST
    hooked(given(), given(), None, scale=1.0)
    kept = list(recorder.rows)
    other = mx.array([0, 0])
    with pytest.raises(ZeroDivisionError), recorder.aside(other) as rows:  # noqa: PT012
        assert recorder.last is other
        assert rows == [None, None]
        hooked(given(1), given(1), None, scale=1.0)
        assert rows[0] is not None
        assert rows[1] is None
        raise ZeroDivisionError
    assert recorder.last is LAST
    assert recorder.rows == kept
    # It goes on where it was: with the second layer.
    hooked(given(1), given(1), None, scale=1.0)
    assert recorder.rows[0] is kept[0]
    assert recorder.rows[1] is not None


def test_a_quantized_cache_has_no_pattern_to_read() -> None:
    recorder = Recorder(1)
    hooked = attention.record_attention([recorder], (0,), plain)
    packed = (mx.zeros((1,)),) * 3
    assert hooked(given(), packed, packed, scale=1.0)[1] is packed
    recorder.last = LAST
    with pytest.raises(ModelError) as caught:
        hooked(given(), packed, packed, scale=1.0)
    assert str(caught.value) == "patterns cannot be read from a quantized key/value cache"


def test_a_softmax_by_hand_is_recorded_and_passed_on() -> None:
    calls: list[tuple[Any, ...]] = []

    def softmax(scores: mx.array, *args: Any, **options: Any) -> str:
        assert scores.shape == (B, H, T, T)
        calls.append((args, options))
        return "done"

    recorder = Recorder(2)
    found = attention.record_softmax([recorder], (1,), SimpleNamespace(softmax=softmax, exp=mx.exp))
    assert found.exp is mx.exp
    scores = mx.random.normal((B, H, T, T), key=mx.random.key(0))
    assert found.softmax(scores, -1, precise=True) == "done"
    assert calls == [((-1,), {"precise": True})]
    assert recorder.rows == [None, None]
    recorder.last = LAST
    thread = threading.Thread(target=found.softmax, args=(scores,))
    thread.start()
    thread.join()
    assert recorder.rows == [None, None], "another thread"
    assert found.softmax(scores, axis=-1) == "done"
    assert calls[1:] == [((), {}), ((), {"axis": -1})]
    assert recorder.rows[0] is None
    assert largest_difference(recorder.rows[1], attention.row_of_scores(scores, LAST)) == 0


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 2, 2, 6, 6), (1, 1, 6, 6), (2, 1, 1, 6, 9)])
def test_rows_of_scores_in_either_form(shape: tuple[int, ...]) -> None:
    scores = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    last = np.array([5, 3])[: shape[0]]
    flat = scores.reshape(shape[0], -1, *shape[-2:]).astype(np.float64)
    wanted = np.exp(flat[np.arange(shape[0]), :, last])
    row = attention.row_of_scores(mx.array(scores), mx.array(last))
    assert row.dtype == mx.float32
    assert row.shape == (shape[0], int(np.prod(shape[1:-2])), shape[-1])
    assert largest_difference(row, wanted / wanted.sum(axis=-1, keepdims=True)) <= 1e-6


@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 1, 1, 9), (1, 4, 1, 9), (6, 1), (2, 1, 6, 1)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_that_broadcast(shape: tuple[int, ...], kind: str) -> None:
    random = np.random.default_rng(1)
    queries = random.normal(size=(2, 4, 6, 8)).astype(np.float32)
    keys = random.normal(size=(2, 2, 9, 8)).astype(np.float32)
    if kind == "bool":
        mask = random.random(shape) < 0.6
        mask[..., :1] = True
        wanted = {"allowed": np.broadcast_to(mask, (2, 4, 6, 9))}
    else:
        mask = random.normal(size=shape).astype(np.float16)
        wanted = {"added": np.broadcast_to(mask, (2, 4, 6, 9))}
    row = attention.last_row(
        mx.array(queries), mx.array(keys), LAST, scale=0.3, mask=mx.array(mask)
    )
    assert row.dtype == mx.float32
    expected = numpy_row(queries, keys, np.array(LAST), 0.3, **wanted)
    assert largest_difference(row, expected) <= 1e-6


def test_one_prompt_of_one_head_keeps_its_shape() -> None:
    one = mx.random.normal((1, 1, 3, 8), key=mx.random.key(0))
    for mask in (None, "causal", mx.zeros((1, 1, 3, 3))):
        row = attention.last_row(one, one, mx.array([1]), scale=1.0, mask=mask)
        assert row.shape == (1, 1, 3)
        expected = numpy_row(np.array(one), np.array(one), np.array([1]), 1.0)
        assert largest_difference(row, expected) <= 1e-6


def test_masks_that_are_not_known_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        attention.last_row(given(), given(), LAST, scale=1.0, mask="window")
    assert str(caught.value) == (
        "attention mask 'window' is not known; masks are arrays or 'causal'"
    )


def test_a_second_instrument_says_what_to_leave() -> None:
    model = tiny_models.build("llama")
    with attention.instrument(model), pytest.raises(RunError) as caught:
        attention.capture(model, *tiny_models.tokens())
    assert str(caught.value) == (
        "this model is already instrumented; leave the open instrument(), capture() or forward() "
        "of it first"
    )


OTHERWISE = "so its patterns cannot be read; use another model"


def test_a_model_that_computes_attention_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_models.build("llama")
    kind = type(model.layers[0].self_attn)
    before = [type(layer.self_attn) for layer in model.layers]

    def otherwise(self: Any, x: mx.array, **_: Any) -> mx.array:
        return self.o_proj(self.q_proj(x))

    monkeypatch.setattr(kind, "__call__", otherwise)
    with pytest.raises(UnsupportedArchitectureError) as caught:
        attention.capture(model, *tiny_models.tokens())
    assert str(caught.value) == (
        "architecture 'llama' does not call scaled_dot_product_attention in its attention, "
        + OTHERWISE
    )
    assert [type(layer.self_attn) for layer in model.layers] == before


def test_a_layer_that_records_nothing_is_refused() -> None:
    model = tiny_models.build("llama")
    recorder = Recorder(tiny_models.LAYERS)
    tokens, last = tiny_models.tokens()
    line = (
        "this llama model computes its attention in another way than by "
        f"scaled_dot_product_attention, {OTHERWISE}"
    )
    # Never instrumented: no layer records.
    with pytest.raises(UnsupportedArchitectureError, match=f"^{re.escape(line)}$"):
        attention.run(model, recorder, tokens, last)


def test_forward_may_attend_in_another_way() -> None:
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    calls: list[int] = []

    def attend(original: Any) -> Any:
        def counted(*args: Any, **options: Any) -> mx.array:
            calls.append(len(args))
            return original(*args, **options)

        return counted

    hidden, rows = attention.forward(model, tokens, last, attend)
    assert len(calls) == tiny_models.LAYERS
    plain_hidden, plain_rows = attention.forward(model, tokens, last)
    assert len(calls) == tiny_models.LAYERS
    assert mx.array_equal(hidden, plain_hidden)
    assert all(mx.array_equal(*pair) for pair in zip(rows, plain_rows, strict=True))


@pytest.mark.parametrize("last", [[24, 1, 1], [0, -1, 5]])
def test_positions_outside_the_prompts_are_refused(last: list[int]) -> None:
    model = tiny_models.build("llama")
    tokens, _ = tiny_models.tokens()
    assert tokens.shape == (3, 24)
    with pytest.raises(ModelError) as caught:
        attention.capture(model, np.array(tokens), np.array(last))
    assert str(caught.value) == f"last positions {last} are not all within 0..23"
    rows = attention.capture(model, np.array(tokens), np.array([23, 0, 5]))
    whole = attention.capture(model, tokens, mx.array([23, 0, 5]))
    assert all(mx.array_equal(*pair) for pair in zip(rows, whole, strict=True))


@pytest.mark.parametrize(
    ("tokens", "last", "shown"),
    [
        ((3, 24), (2,), "tokens (3, 24) and last (2,)"),
        ((3, 24), (3, 1), "tokens (3, 24) and last (3, 1)"),
        ((24,), (24,), "tokens (24,) and last (24,)"),
        ((2, 3, 4), (2,), "tokens (2, 3, 4) and last (2,)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    tokens: tuple[int, ...], last: tuple[int, ...], shown: str
) -> None:
    model = tiny_models.build("llama")
    for positions in (mx.zeros(last, dtype=mx.int32), np.zeros(last, dtype=np.int32)):
        with pytest.raises(ModelError) as caught:
            attention.capture(model, mx.zeros(tokens, dtype=mx.int32), positions)
        assert str(caught.value) == f"{shown} do not fit; give tokens (B, T) and last (B,)"
