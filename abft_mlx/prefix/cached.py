"""Beginnings that many prompts share, kept: one more text costs only its own tokens.

It stands on mlx-lm's own prompt caches. The cache of the shared tokens is filled once, a row for
each beginning; every batch of prompts goes on from a copy that has a row for each prompt.
Prompts are padded on the right, and that is sound for every kind of cache here: layers of attention
and recurrent ones alike look only backwards, so that nothing behind a prompt's last token reaches
it, and the copy with the padding in it is thrown away.

Letters: G beginnings of P tokens, B prompts, T tokens of a prompt behind its beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from abft_mlx import attention, ports
from abft_mlx.prompts import Prompt

# Caches that a batch can go on from; with any other, prompts are computed whole.
KNOWN = (KVCache, RotatingKVCache, ArraysCache)


class Prefixes:
    """Keys, values and recurrent states of what groups of prompts begin with.

    Attributes:
        model: whose they are.
        beginnings: G times P tokens; empty where this model's prompts must be computed whole.
    """

    def __init__(self, model: nn.Module, beginnings: Sequence[Sequence[int]]) -> None:
        """Compute the beginnings.

        Args:
            model: a loaded model; what is kept is of its weights as they are now.
            beginnings: G times P tokens.
        """
        self.model = model
        self._port = ports.port_for(model)
        self.beginnings: tuple[tuple[int, ...], ...] = ()
        self._cache: list[Any] = []
        if len(beginnings) and len(beginnings[0]) and cacheable(model):
            self.beginnings = tuple(tuple(tokens) for tokens in beginnings)
            self._cache = make_prompt_cache(model)
            # Only what the cache holds is computed: not the last layer's output, nor the norm.
            self._port.hidden(model, mx.array(self.beginnings), self._cache)
            mx.eval(list(_arrays(self._cache)))

    def __len__(self) -> int:
        return len(self.beginnings[0]) if self.beginnings else 0

    def hidden(self, tokens: mx.array, which: Sequence[int] | None = None) -> mx.array:
        """Hidden states after the final norm, of tokens that stand behind the beginnings.

        Args:
            tokens: (B, T) right-padded token ids.
            which: (B,) the beginning that each prompt has; may be left out where there is one.

        Returns:
            (B, T, width).
        """
        if not self._cache:
            if not self.beginnings:
                return self._port.hidden(self.model, tokens)
            before = mx.array(self.beginnings)[mx.array(which)]
            whole = mx.concatenate([before, tokens.astype(before.dtype)], axis=1)
            return self._port.hidden(self.model, whole)[:, len(self) :]
        rows = None if len(self.beginnings) == 1 else mx.array(which)
        return self._port.hidden(self.model, tokens, _spread(self._cache, len(tokens), rows))

    def extended(self, tokens: mx.array) -> tuple[mx.array, Prefixes]:
        """Run tokens behind the one beginning, or none, and keep both together as beginnings.

        A model whose prompts must be computed whole computes these again in ``hidden``.

        Args:
            tokens: (B, T) token ids without padding.

        Returns:
            (B, width) hidden states of the last tokens, and B beginnings of P + T tokens.
        """
        made = Prefixes(self.model, [])
        (before,) = self.beginnings or ((),)
        made.beginnings = tuple((*before, *row) for row in tokens.tolist())
        if self._cache:
            made._cache = _spread(self._cache, len(tokens), None)
        elif cacheable(self.model):
            made._cache = make_prompt_cache(self.model)
        hidden = self._port.hidden(self.model, tokens, made._cache or None)[:, -1]
        mx.eval(hidden, list(_arrays(made._cache)))
        return hidden, made

    def branches(self, tokens: mx.array, which: Sequence[int]) -> mx.array:
        """Hidden states of the same rows of tokens behind each of several beginnings.

        Where the model's attention allows, keys and values of a beginning are read by all rows
        and repeated for none.

        Args:
            tokens: (R, T) right-padded token ids.
            which: (B,) beginnings.

        Returns:
            (B, R, T, width).
        """
        R, T = tokens.shape
        every = mx.tile(tokens, (len(which), 1))
        rows = mx.repeat(mx.array(which), R)
        if self._cache:
            chosen = mx.array(which)
            cache = [
                _Branching(known, chosen, R)
                if isinstance(known, KVCache)
                else _spread(known, len(rows), rows)
                for known in self._cache
            ]
            with attention.instrument(self.model, _attend_in_parts):
                hidden = self._port.hidden(self.model, every, cache)
        else:
            hidden = self.hidden(every, rows.tolist())
        return hidden.reshape(len(which), R, T, -1)


class Prefix(Prefixes):
    """The one beginning of all prompts, for as long as they come."""

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        """Compute the P tokens."""
        super().__init__(model, [token_ids])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The P tokens; empty where this model's prompts must be computed whole."""
        return self.beginnings[0] if self.beginnings else ()

    def begins(self, prompt: Prompt) -> bool:
        """Whether a prompt begins with this prefix and has a token of its own."""
        size = len(self)
        return bool(size) and size <= prompt.last and prompt.token_ids[:size] == self.token_ids


def cacheable(model: nn.Module) -> bool:
    """Whether a model computes the same behind a cached prefix as in one piece.

    Where its kinds of cache are not all known, or mlx-lm's code does not do the same with them,
    it does not.
    """
    cache = make_prompt_cache(model)
    return ports.port_for(model).same_with_cache and all(map(_known, cache))


class _GrownOnce(KVCache):
    """A KVCache that makes room for what comes, not for 256 tokens: it is used once."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All keys and values, (B, G, P + T, D) each."""
        known_keys, known_values = self.state[:2]
        self.keys = mx.concatenate([known_keys, keys], axis=2)
        self.values = mx.concatenate([known_values, values], axis=2)
        self.offset += keys.shape[2]
        return self.keys, self.values


class _Branching(_GrownOnce):
    """Keys and values of B beginnings, and apart from them those of R rows behind each."""

    def __init__(self, known: KVCache, which: mx.array, rows: int) -> None:
        super().__init__()
        self.offset = known.offset
        self.rows = rows
        self.shared = [array[which][..., : known.offset, :] for array in (known.keys, known.values)]
        self.own: tuple[mx.array, ...] = ()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Those of the rows in one piece, (B · R, G, P + T, D); lazy, and mostly not needed."""
        self.own = (keys, values)
        self.keys, self.values = (
            mx.concatenate([mx.repeat(shared, self.rows, axis=0), own], axis=2)
            for shared, own in zip(self.shared, self.own, strict=True)
        )
        self.offset += keys.shape[2]
        return self.keys, self.values

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Causal attention of the rows, (B · R, H, T, D), in float32 scores."""
        (keys, values), (own_keys, own_values) = self.shared, self.own
        R, (B, G, P, D) = self.rows, keys.shape
        H, T = queries.shape[1:3]
        # (B, G, H / G, R, T, D)
        asked = (queries * scale).reshape(B, R, G, H // G, T, D).transpose(0, 2, 3, 1, 4, 5)
        there = asked.reshape(B, G, -1, D) @ keys.swapaxes(-1, -2)

        def by_row(one: mx.array) -> mx.array:
            return one.reshape(B, R, G, 1, T, -1).transpose(0, 2, 3, 1, 4, 5)

        here = asked @ by_row(own_keys).swapaxes(-1, -2)
        here = mx.where(mx.tri(T, dtype=mx.bool_), here, -mx.inf)
        scores = mx.concatenate([there.reshape(*asked.shape[:-1], P), here], axis=-1)
        pattern = mx.softmax(scores.astype(mx.float32), axis=-1).astype(values.dtype)
        found = (pattern[..., :P].reshape(B, G, -1, P) @ values).reshape(*asked.shape[:-1], -1)
        found = found + pattern[..., P:] @ by_row(own_values)
        return found.transpose(0, 3, 1, 2, 4, 5).reshape(B * R, H, T, -1)


def _attend_in_parts(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An attention function that reads a `_Branching` in parts where nothing else is asked."""

    def attend(
        queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **options: Any
    ) -> mx.array:
        given = dict(zip(("cache", "scale", "mask", "sinks"), args, strict=False)) | options
        cache, mask = given.get("cache"), given.get("mask")
        # Keys that a model changes on their way, windows and sinks go the model's own way.
        if (
            isinstance(cache, _Branching)
            and keys is cache.keys
            and values is cache.values
            and (mask is None or (isinstance(mask, str) and mask == "causal"))
            and given.get("sinks") is None
        ):
            return cache.attend(queries, given["scale"])
        return original(queries, keys, values, *args, **options)

    return attend


def _known(cache: Any) -> bool:
    """Whether a batch can go on from a cache of this kind."""
    if type(cache) is CacheList:
        return all(map(_known, cache.caches))
    return type(cache) in KNOWN


def _arrays(value: Any) -> Iterator[mx.array]:
    """The arrays in a cache, or in a list of caches."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _arrays(inner)
    elif hasattr(value, "__dict__"):
        yield from _arrays(list(vars(value).values()))


def _spread(value: Any, size: int, rows: mx.array | None) -> Any:
    """A copy of a cache in which every array has a row for each prompt.

    Args:
        value: a cache of G rows, or what is in it.
        size: B prompts.
        rows: (B,) the row of each; None where there is one, which is broadcast.
    """
    if isinstance(value, mx.array):
        return mx.broadcast_to(value, (size, *value.shape[1:])) if rows is None else value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(_spread(inner, size, rows) for inner in value)
    if type(value) is KVCache and value.keys is not None:
        grown = _GrownOnce()
        # Versions of mlx-lm differ in what they give out; the arrays grow in steps.
        kept = [array[..., : value.offset, :] for array in (value.keys, value.values)]
        grown.keys, grown.values = _spread(kept, size, rows)
        grown.offset = value.offset
        return grown
    if hasattr(value, "__dict__"):
        made = copy.copy(value)
        vars(made).update({name: _spread(one, size, rows) for name, one in vars(value).items()})
        return made
    return value
