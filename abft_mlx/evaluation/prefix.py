"""The beginning that many prompts share, computed once: one more text costs only its own tokens.

It stands on mlx-lm's own prompt caches. The cache of the shared tokens is filled once, by a batch
of one; every batch of prompts goes on from a copy in which its arrays are broadcast over the batch.
Prompts are padded on the right, and that is sound for every kind of cache here: layers of attention
and recurrent ones alike look only backwards, so that nothing behind a prompt's last token reaches
it, and the copy with the padding in it is thrown away.

Letters: B prompts, P tokens of the prefix, T tokens of a prompt behind it.
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


class Prefix:
    """Keys, values and recurrent states of the tokens that prompts begin with.

    Attributes:
        token_ids: the P tokens; empty where this model's prompts must be computed whole.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        """Compute the prefix.

        Args:
            model: a loaded model; a prefix is of its weights as they are now.
            token_ids: the P tokens.
        """
        self._model = model
        self._port = ports.port_for(model)
        self.token_ids: tuple[int, ...] = ()
        self._cache: list[Any] = []
        if token_ids and cacheable(model):
            self.token_ids = tuple(token_ids)
            self._cache = make_prompt_cache(model)
            # Only what the cache holds is computed: not the last layer's output, nor the norm.
            self._port.hidden(model, mx.array([self.token_ids]), self._cache)
            mx.eval(list(_arrays(self._cache)))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(one.nbytes for one in _arrays(self._cache))

    def begins(self, prompt: Prompt) -> bool:
        """Whether a prompt begins with this prefix and has a token of its own."""
        size = len(self.token_ids)
        return bool(size) and size <= prompt.last and prompt.token_ids[:size] == self.token_ids

    def hidden(self, tokens: mx.array) -> mx.array:
        """Hidden states after the final norm, of tokens that stand behind the prefix.

        Args:
            tokens: (B, T) right-padded token ids.

        Returns:
            (B, T, width).
        """
        cache = _spread(self._cache, len(tokens)) if self._cache else None
        return self._port.hidden(self._model, tokens, cache)


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


def _spread(value: Any, size: int) -> Any:
    """A copy of a cache in which every array is broadcast from one prompt to several."""
    if isinstance(value, mx.array):
        return mx.broadcast_to(value, (size, *value.shape[1:]))
    if isinstance(value, (list, tuple)):
        return type(value)(_spread(one, size) for one in value)
    if type(value) is KVCache and value.keys is not None:
        grown = _GrownOnce()
        keys, values = value.keys_and_values()
        grown.keys, grown.values = _spread(keys, size), _spread(values, size)
        grown.offset = value.offset
        return grown
    if hasattr(value, "__dict__"):
        made = copy.copy(value)
        vars(made).update({name: _spread(one, size) for name, one in vars(value).items()})
        return made
    return value
