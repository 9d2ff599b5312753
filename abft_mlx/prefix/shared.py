"""A batch of prompts behind their shared beginnings, computed in one go and with its gradient.

Letters in shapes: G groups of m prompts, P tokens of a group's prefix, Q tokens of the rest of each
prompt, B = G · m prompts, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from abft_mlx import attention
from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports import architecture, port_for


def common_prefix(tokens: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens that all of some sequences, at least one, begin with."""
    first, last = min(tokens), max(tokens)
    pairs = enumerate(zip(first, last, strict=False))
    parting = next((place for place, (one, other) in pairs if one != other), None)
    return first if parting is None else first[:parting]


class PrefixKeys(KVCache):
    """Keys and values of a prefix, to which those of a batch's prompts are added in passing.

    Unlike mlx-lm's own cache it writes into no buffer, so gradients pass through it, and what a
    call adds is not kept.

    Args:
        keys: (G, heads, P, width), or None for a prefix that is yet to be run.
        values: likewise.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.offset = 0 if keys is None else keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Those of the prefix, repeated for its prompts, and then the new ones."""
        if self.keys is None:
            self.keys, self.values = keys, values
            return keys, values
        times = keys.shape[0] // self.keys.shape[0]
        return (
            mx.concatenate([mx.repeat(self.keys, times, axis=0), keys], axis=2),
            mx.concatenate([mx.repeat(self.values, times, axis=0), values], axis=2),
        )

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Not to be had: those of the prompts are not kept."""
        raise UnsupportedArchitectureError(
            "this model attends to another layer's cache, so its prompts cannot share a beginning; "
            "set training.shared_demonstrations to 1"
        )

    @property
    def state(self) -> tuple[mx.array, mx.array, int]:
        """As :meth:`keys_and_values`."""
        return (*self.keys_and_values(), self.offset)

    @state.setter
    def state(self, _: Any) -> None:
        self.keys_and_values()

    def fill(self, keys: mx.array, values: mx.array) -> None:
        """Take other keys and values, of the same shapes."""
        self.keys, self.values = keys, values

    def forget(self) -> None:
        """Be as before the prefix was run."""
        self.keys = self.values = None


class AttendedPrefix:
    """A beginning that all prompts share, computed once, behind which pattern rows are read.

    Attributes:
        token_ids: its P tokens; empty where this model's prompts must be computed whole.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        """Compute the beginning.

        Args:
            model: a loaded model, which is not to change from now on.
            token_ids: P tokens, which every prompt goes on from.
        """
        self.model = model
        self.token_ids: tuple[int, ...] = ()
        self._caches: list[PrefixKeys] = []
        if token_ids and shareable(model):
            self.token_ids = tuple(token_ids)
            self._caches = prefix_caches(model)
            port_for(model).hidden(model, mx.array([self.token_ids]), self._caches)
            mx.eval([(cache.keys, cache.values) for cache in self._caches])

    def __len__(self) -> int:
        return len(self.token_ids)

    def rows(self, tokens: mx.array, last: mx.array) -> list[mx.array | None]:
        """Pattern rows of whole prompts.

        Args:
            tokens: (B, T) right-padded tokens behind the beginning.
            last: (B,) last position of each prompt among them.

        Returns:
            One (B, H, P + T) float32 row per layer, None for a layer without heads; lazy.
        """
        if not self._caches:
            return attention.forward(self.model, tokens, last)[1]
        caches = [PrefixKeys(cache.keys, cache.values) for cache in self._caches]
        with attention.instrument(self.model) as recorder:
            recorder.last = last
            port_for(self.model).hidden(self.model, tokens, caches)
            return recorder.rows


def prefix_caches(model: nn.Module) -> list[PrefixKeys]:
    """One empty cache for each that the model uses.

    Raises:
        UnsupportedArchitectureError: the model keeps something else than keys and values.
    """
    kinds = {type(cache) for cache in make_prompt_cache(model)}
    # A window's cache only saves memory: the window itself is in the mask.
    if kinds - {KVCache, RotatingKVCache}:
        others = ", ".join(sorted(kind.__name__ for kind in kinds - {KVCache, RotatingKVCache}))
        raise UnsupportedArchitectureError(
            f"architecture {architecture(model)!r} keeps {others} of what it has read, which "
            "prompts cannot share; set training.shared_demonstrations to 1"
        )
    return [PrefixKeys() for _ in make_prompt_cache(model)]


def shareable(model: nn.Module) -> bool:
    """Whether prompts can share a beginning in this model's forward pass.

    A few tokens are put through it to see, and nothing is evaluated.
    """
    try:
        forward(model, mx.zeros((1, 2), mx.int32), mx.zeros((2, 1), mx.int32), mx.array([0, 0]))
    except UnsupportedArchitectureError:
        return False
    return True


def forward(
    model: nn.Module,
    prefix: mx.array,
    tokens: mx.array,
    last: mx.array,
    attend: attention.Attend | None = None,
) -> tuple[mx.array, list[mx.array | None]]:
    """Run prompts that share their beginnings, and record every layer's pattern row.

    Args:
        model: a loaded model.
        prefix: (G, P) the shared beginnings, without padding.
        tokens: (B, Q) right-padded, the rest of each prompt; a group's prompts follow each other.
        last: (B,) last position of each prompt among ``tokens``.
        attend: as for :func:`abft_mlx.attention.instrument`.

    Returns:
        (B, Q, width) hidden states of ``tokens`` after the final norm, and one (B, H, P + Q)
        float32 row per layer, None for a layer without heads; as :func:`abft_mlx.attention.forward`
        gives them for the whole prompts, and like those differentiable.

    Raises:
        UnsupportedArchitectureError: the model keeps something else than keys and values.
    """
    port, caches = port_for(model), prefix_caches(model)
    with attention.instrument(model, attend) as recorder:
        port.hidden(model, prefix, caches)
        recorder.last = last
        hidden = port.hidden(
            model, tokens, [PrefixKeys(cache.keys, cache.values) for cache in caches]
        )
        return hidden, recorder.rows
