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
from collections.abc import Iterator, Sequence
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

from abft_mlx import ports
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
            self.beginnings = tuple(tuple(one) for one in beginnings)
            self._cache = make_prompt_cache(model)
            # Only what the cache holds is computed: not the last layer's output, nor the norm.
            self._port.hidden(model, mx.array(self.beginnings), self._cache)
            mx.eval(list(_arrays(self._cache)))

    def __len__(self) -> int:
        return len(self.beginnings[0]) if self.beginnings else 0

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(one.nbytes for one in _arrays(self._cache))

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
        return self._port.hidden(self.model, tokens, self._spread(len(tokens), which))

    def extended(
        self, tokens: mx.array, which: Sequence[int] | None = None
    ) -> tuple[mx.array, Prefixes]:
        """Run tokens behind the beginnings, and keep both together as beginnings of their own.

        A model whose prompts must be computed whole computes these again in ``hidden``.

        Args:
            tokens: (B, T) token ids without padding.
            which: as for ``hidden``.

        Returns:
            (B, width) hidden states of the last tokens, and B beginnings of P + T tokens.
        """
        made = Prefixes(self.model, [])
        own = [tuple(one) for one in tokens.tolist()]
        rows = [0] * len(own) if which is None else which
        known = self.beginnings or ((),)
        made.beginnings = tuple((*known[row], *one) for row, one in zip(rows, own, strict=True))
        if self._cache:
            made._cache = self._spread(len(own), which)
        elif cacheable(self.model):
            made._cache = make_prompt_cache(self.model)
        hidden = self._port.hidden(self.model, tokens, made._cache or None)[:, -1]
        mx.eval(hidden, list(_arrays(made._cache)))
        return hidden, made

    def _spread(self, size: int, which: Sequence[int] | None) -> list[Any]:
        """A copy of the cache with a row for each of so many prompts."""
        rows = None if len(self.beginnings) == 1 else mx.array(which)
        return _spread(self._cache, size, rows)


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


def _known(cache: Any) -> bool:
    if type(cache) is CacheList:
        return all(map(_known, cache.caches))
    return type(cache) in KNOWN


def _arrays(value: Any) -> Iterator[mx.array]:
    """The arrays in a cache, or in a list of caches."""
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _arrays(one)
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
        return type(value)(_spread(one, size, rows) for one in value)
    if type(value) is KVCache and value.keys is not None:
        grown = _GrownOnce()
        # Versions of mlx-lm differ in what they give out; the arrays grow in steps.
        kept = [one[..., : value.offset, :] for one in (value.keys, value.values)]
        grown.keys, grown.values = _spread(kept, size, rows)
        grown.offset = value.offset
        return grown
    if hasattr(value, "__dict__"):
        made = copy.copy(value)
        vars(made).update({name: _spread(one, size, rows) for name, one in vars(value).items()})
        return made
    return value
