"""From hidden states to logits by the model's own code, its output head narrowed to a few tokens.

What comes between the final hidden state and the logits (a scale, a soft-cap, a multiplier) differs
between architectures and is nowhere written down but in their code. So that code runs: the model's
own ``__call__``, on an object that stands in for the model and differs in two places. Where the
model would compute its hidden states it gets those that are known already, and where it looks for
its head it finds one that knows a few tokens only. The model itself is not touched.

Letters in shapes: N hidden states, C tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx.errors import ModelError
from abft_mlx.ports.weights import head_rows, resolve


class NarrowHead:
    """An output head that gives the logits of a few tokens, in float32.

    Args:
        head: a linear layer, an embedding that is used as one, or their weights alone.
        token_ids: (C,).
    """

    def __init__(self, head: nn.Module | mx.array, token_ids: mx.array) -> None:
        self._head = head
        self._ids = token_ids

    def __call__(self, hidden: mx.array) -> mx.array:
        """(..., width) to (..., C) float32."""
        if "lora_a" in self._head:
            return self._head(hidden).astype(mx.float32)[..., self._ids]
        picked = hidden.astype(mx.float32) @ self.T
        bias = self._head.get("bias")
        return picked if bias is None else picked + bias[self._ids].astype(mx.float32)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The same, under the name that embeddings give it."""
        return self(hidden)

    @property
    def weight(self) -> mx.array:
        """(C, width) float32, for models that multiply by it themselves."""
        return head_rows(self._head, self._ids).astype(mx.float32)

    @property
    def T(self) -> mx.array:  # noqa: N802
        """(width, C) float32, for models whose head is an array."""
        return self.weight.T


class _StandIn:
    """A module with some of its attributes replaced: runs the module's own code on itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._replaced: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)

    def __contains__(self, name: str) -> bool:
        return name in self._module

    def __call__(self, *args: Any, **options: Any) -> Any:
        return type(self._module).__call__(self, *args, **options)

    def put(self, path: str, value: Any) -> None:
        """Replace what is found at a dotted path."""
        found: Any = self
        *parents, name = path.split(".")
        for one in parents:
            if one not in found._replaced:
                found._replaced[one] = _StandIn(getattr(found._module, one))
            found = found._replaced[one]
        found._replaced[name] = value


class _FoundError(Exception):
    """Carries hidden states out of a model's code: what would come next is not wanted."""

    def __init__(self, hidden: mx.array) -> None:
        super().__init__()
        self.hidden = hidden


class _Stem(_StandIn):
    """Gives hidden states that are known already, or computes them and goes no further."""

    def __init__(self, module: nn.Module, hidden: mx.array | None = None) -> None:
        super().__init__(module)
        self._hidden = hidden

    def __call__(self, *args: Any, **options: Any) -> mx.array:
        if self._hidden is None:
            raise _FoundError(self._module(*args, **options))
        return self._hidden


class _Head:
    """A head inside the stem: answers what it was made with, or goes no further.

    An embedding that is a head, too, still embeds.
    """

    def __init__(self, own: Any, answer: mx.array | None = None) -> None:
        self._own = own
        self._answer = answer

    def __call__(self, given: mx.array) -> mx.array:
        return self._own(given) if hasattr(self._own, "as_linear") else self.as_linear(given)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The answer, whatever the hidden states."""
        if self._answer is None:
            raise _FoundError(hidden)
        return self._answer


def hidden_of(
    model: nn.Module, tokens: mx.array, stem: str | None, head: str, cache: list[Any] | None = None
) -> mx.array:
    """A model's final hidden states, its own code being run as far as that.

    Args:
        model: a loaded model.
        tokens: (B, T) token ids.
        stem: path of the module that gives hidden states; None where the head is within it.
        head: path of the output head.
        cache: mlx-lm's prompt cache, one of its objects a layer, which the model's code reads and
            goes on with.

    Returns:
        (B, T, width): what the stem gives, or what a head within it is given.

    Raises:
        ModelError: the model never comes there.
    """
    standing = _StandIn(model)
    if stem is None:
        standing.put(head, _Head(resolve(model, head)))
    else:
        standing.put(stem, _Stem(resolve(model, stem)))
    try:
        if cache is None:
            standing(tokens)
        else:
            standing(tokens, cache=cache)
    except _FoundError as found:
        return found.hidden
    raise ModelError(
        f"this model's code does not use {stem or head}, so its hidden states cannot be had; "
        "use another model"
    )


def logits_of(
    model: nn.Module,
    hidden: mx.array,
    stem: str | None,
    head: str,
    narrow: NarrowHead | None = None,
) -> mx.array:
    """What a model makes of hidden states.

    Args:
        model: a loaded model.
        hidden: (..., width), as :func:`hidden_of` gives them.
        stem: path of the module that gives hidden states; None where the head is within it.
        head: path of the output head.
        narrow: what to put in the head's place; None leaves it.

    Returns:
        (..., C), or (..., V), in the type that the model gives.
    """
    states = hidden.reshape(1, -1, hidden.shape[-1])
    standing = _StandIn(model)
    if stem is None:
        own = resolve(model, head)
        # Of the layers below, nothing is computed: nobody asks for what they give.
        whole = own.as_linear if hasattr(own, "as_linear") else own
        standing.put(head, _Head(own, (narrow or whole)(states)))
    else:
        standing.put(stem, _Stem(resolve(model, stem), states))
        if narrow is not None:
            standing.put(head, narrow)
    made = standing(mx.zeros(states.shape[:2], dtype=mx.int32))
    return made.reshape(*hidden.shape[:-1], made.shape[-1])
