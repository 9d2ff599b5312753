"""Attention patterns of a loaded model: the last position's row of every head, exactly.

The model's own code runs unchanged. While :func:`instrument` is open, each attention module of
that one model is an instance of a subclass whose ``__call__`` has the same code object, but finds
another function under the name ``scaled_dot_product_attention``. That function records the row and
calls the original. Parameter names, other models and other threads are untouched, and the classes
are put back on leaving, also after an exception.

Only the last position's row is computed, so memory grows with T, never with T x T. Letters in
shapes: B prompts, H query heads, G key/value heads, T tokens, S key positions (T, plus whatever a
cache holds), D head dim.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.errors import ModelError, RunError, UnsupportedArchitectureError
from abft_mlx.ports import Namespace, architecture, finding, port_for, subclass, swapped

Attend = Callable[[Callable[..., mx.array]], Callable[..., mx.array]]
"""Given a model's attention function, one that gives the same in another way."""

Rows = list[mx.array | None]

SEAM = "scaled_dot_product_attention"


class Recorder:
    """What an instrumented model records, in the thread that made it.

    Attributes:
        last: (B,) last position of each prompt, counted in the tokens of the call; set it before
            calling the model, which starts a new list of rows. While it is None nothing is
            recorded.
        rows: one (B, H, S) float32 pattern row per layer of the latest call, None for a layer
            without heads.
        attend: what runs in place of the model's attention function, if anything.
    """

    def __init__(self, n_layers: int, attend: Attend | None = None) -> None:
        self.attend = attend
        self.rows: Rows = [None] * n_layers
        self._last: mx.array | None = None
        self._thread = threading.get_ident()

    @property
    def last(self) -> mx.array | None:
        """(B,) last positions of the next call, or None."""
        return self._last

    @last.setter
    def last(self, positions: mx.array | None) -> None:
        self._last = positions
        self.rows = [None] * len(self.rows)

    def record(self, layer: int, row: Callable[[mx.array], mx.array]) -> None:
        """Keep the row that a function gives for the last positions; not called without those."""
        if self._last is not None and threading.get_ident() == self._thread:
            self.rows[layer] = row(self._last)

    @contextmanager
    def aside(self, last: mx.array | None) -> Iterator[Rows]:
        """Record into a list of its own while the block runs, nothing if ``last`` is None."""
        before = self._last, self.rows
        self._last, self.rows = last, [None] * len(self.rows)
        try:
            yield self.rows
        finally:
            self._last, self.rows = before


def row_of_scores(scores: mx.array, last: mx.array) -> mx.array:
    """One row of the pattern per prompt and head, (B, H, S) float32, of scores that are masked.

    They are (B, H, T, S), or (B, G, H / G, T, S); ``last`` (B,) says which query's row.
    """
    T, S = scores.shape[-2:]
    whole = scores.reshape(len(last), -1, T, S)
    row = mx.take_along_axis(whole, last[:, None, None, None], axis=2)
    return mx.softmax(row.squeeze(2).astype(mx.float32), axis=-1)


def last_row(
    queries: mx.array,
    keys: mx.array,
    last: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """One row of the attention pattern per prompt and head, computed in float32.

    Args:
        queries: (B, H, T, D), normed and rotated.
        keys: (B, G, S, D), normed and rotated, S >= T; the last T belong to the queries.
        last: (B,) which query's row.
        scale: multiplies the scores.
        mask: None, "causal", or an array that broadcasts to (B, H, T, S), boolean (True attends)
            or additive.
        sinks: (H,) scores of a sink that takes attention but is no position.

    Returns:
        (B, H, S) float32. Positions after ``last`` are exactly 0. Rows sum to 1, less what sinks
        take.
    """
    B, H, T, D = queries.shape
    G, S = keys.shape[1], keys.shape[2]
    query = mx.take_along_axis(queries, last[:, None, None, None], axis=2)
    query = query.reshape(B, G, H // G, D).astype(mx.float32) * scale
    scores = (query @ keys.astype(mx.float32).swapaxes(-1, -2)).reshape(B, H, S)
    if isinstance(mask, mx.array):
        row_mask: Any = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if row_mask.shape[2] > 1:
            row_mask = mx.take_along_axis(row_mask, last[:, None, None, None], axis=2)
        row_mask = row_mask.squeeze(2)
        if row_mask.dtype == mx.bool_:
            scores = mx.where(row_mask, scores, -mx.inf)
        else:
            scores = scores + row_mask.astype(mx.float32)
    elif mask not in (None, "causal"):
        raise ModelError(f"attention mask {mask!r} is not known; masks are arrays or 'causal'")
    reachable = mx.arange(S) <= (last + (S - T))[:, None, None]
    scores = mx.where(reachable, scores, -mx.inf)
    if sinks is None:
        return mx.softmax(scores, axis=-1)
    sink = mx.broadcast_to(sinks.astype(mx.float32)[None, :, None], (B, H, 1))
    return mx.softmax(mx.concatenate([scores, sink], axis=-1), axis=-1)[..., :S]


@contextmanager
def instrument(model: nn.Module, attend: Attend | None = None) -> Iterator[Recorder]:
    """Record pattern rows of a model while the block runs; set ``recorder.last`` before each call.

    Only calls from the thread that opened the block are recorded. A model can be instrumented once
    at a time.

    Args:
        model: a loaded model.
        attend: gives what runs in place of the model's attention function
            (:func:`abft_mlx.recompute.attending`), where the model calls one.

    Raises:
        UnsupportedArchitectureError: no port, or attention is computed in another way than it says.
        RunError: the model is already instrumented.
    """
    port = port_for(model)
    layers = port.layers(model)
    modules = {n: port.attention_module(layer) for n, layer in enumerate(layers)}
    # Classes live until the garbage collector runs, rows must not: functions reach them through a
    # list that is emptied on leaving.
    held = [Recorder(len(layers), attend)]
    try:
        with swapped(
            {n: module for n, module in modules.items() if module is not None},
            partial(_recording_class, held, architecture(model), port.by_hand),
        ):
            yield held[0]
    finally:
        held.clear()


def _recording_class(held: list[Recorder], name: str, by_hand: bool, layer: int, kind: Any) -> type:
    """A subclass of an attention class that runs the same code around a recording function."""
    if "_abft_instrumented" in kind.__dict__:
        raise RunError(
            "this model is already instrumented; leave the open instrument(), capture() or "
            "forward() of it first"
        )
    call, seam = kind.__call__, "softmax" if by_hand else SEAM
    if not isinstance(call, FunctionType) or seam not in call.__code__.co_names:
        raise UnsupportedArchitectureError(
            f"architecture {name!r} does not call {seam} in its attention, so its "
            "patterns cannot be read; use another model"
        )
    names = call.__globals__
    if by_hand:
        changed: Any = {"mx": Namespace(names["mx"], softmax=_softmax(held, layer))}
    elif SEAM in names:
        changed = {SEAM: _attention(held, layer, names[SEAM])}
    else:  # it calls MLX's own
        fast = names["mx"].fast
        hook = _attention(held, layer, getattr(fast, SEAM))
        changed = {"mx": Namespace(names["mx"], fast=Namespace(fast, **{SEAM: hook}))}
    return subclass(kind, __call__=finding(call, changed), _abft_instrumented=True)


def _attention(
    held: list[Recorder], layer: int, original: Callable[..., mx.array]
) -> Callable[..., mx.array]:
    """What one layer's module calls instead of its attention function."""

    def recording(
        queries: mx.array, keys: Any, values: Any, *args: Any, **options: Any
    ) -> mx.array:
        named = dict(zip(("cache", "scale", "mask", "sinks"), args, strict=False)) | options

        def row(last: mx.array) -> mx.array:
            if not isinstance(keys, mx.array):
                raise ModelError("patterns cannot be read from a quantized key/value cache")
            more = {name: named.get(name) for name in ("mask", "sinks")}
            return last_row(queries, keys, last, scale=named["scale"], **more)

        (recorder,) = held
        recorder.record(layer, row)
        attend = original if recorder.attend is None else recorder.attend(original)
        return attend(queries, keys, values, *args, **options)

    return recording


def _softmax(held: list[Recorder], layer: int) -> Callable[..., mx.array]:
    """What one layer's module calls instead of ``mx.softmax``."""

    def recording(scores: mx.array, *args: Any, **options: Any) -> mx.array:
        held[0].record(layer, partial(row_of_scores, scores))
        return mx.softmax(scores, *args, **options)

    return recording


def forward(
    model: nn.Module,
    tokens: mx.array,
    last: mx.array,
    attend: Attend | None = None,
) -> tuple[mx.array, Rows]:
    """Run the model up to its final norm and record every layer's pattern row.

    Differentiable in the model's parameters, and usable inside ``mx.compile`` (with ``model.state``
    among its inputs). The output head is not computed, and whatever the caller does not use of the
    result (the last layer's values and MLP, when only the rows are) never is.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) last position of each prompt.
        attend: as for :func:`instrument`.

    Returns:
        (B, T, width) hidden states after the final norm, and one (B, H, T) float32 pattern row per
        layer, None for a layer without heads. Columns after ``last`` are exactly 0.
    """
    with instrument(model, attend) as recorder:
        return run(model, recorder, tokens, last)


def run(
    model: nn.Module, recorder: Recorder, tokens: mx.array, last: mx.array
) -> tuple[mx.array, Rows]:
    """As :func:`forward`, of a model that is instrumented already."""
    recorder.last = last
    port = port_for(model)
    hidden = port.hidden(model, tokens)
    for row, layer in zip(recorder.rows, port.layers(model), strict=True):
        if row is None and port.attention_module(layer) is not None:
            raise UnsupportedArchitectureError(
                f"this {architecture(model)} model computes its attention in another way than "
                f"by {SEAM}, so its patterns cannot be read; use another model"
            )
    return hidden, recorder.rows


def capture(model: nn.Module, tokens: mx.array | np.ndarray, last: mx.array | np.ndarray) -> Rows:
    """Pattern rows of the last position, for every layer and head.

    Args:
        model: a loaded model.
        tokens: (B, T) right-padded token ids.
        last: (B,) last position of each prompt.

    Returns:
        One (B, H, T) float32 array per layer, None for a layer without heads; lazy, as all of MLX.
    """
    length = tokens.shape[-1]
    if isinstance(last, np.ndarray) and not ((last >= 0) & (last < length)).all():
        raise ModelError(f"last positions {last.tolist()} are not all within 0..{length - 1}")
    tokens, last = mx.array(tokens), mx.array(last)
    if tokens.ndim != 2 or last.shape != tokens.shape[:1]:
        raise ModelError(
            f"tokens {tuple(tokens.shape)} and last {tuple(last.shape)} do not fit; "
            "give tokens (B, T) and last (B,)"
        )
    return forward(model, tokens, last)[1]
