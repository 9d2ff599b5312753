"""Where training begins in a model, and running the blocks below and above that point apart.

Below the first block that trains nothing ever changes, so the hidden states that go into that block
are constants of a prompt. Letters in shapes: B prompts, H query heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError

# Any vocabulary has these.
_SOME_TOKENS = 16

Rows = list[mx.array | None]


def first_trained(model: nn.Module) -> int:
    """Number of the first block that trains, or of blocks where none does."""
    blocks = ports.port_for(model).blocks(model)
    trained = [bool(tree_flatten(block.module.trainable_parameters())) for block in blocks]
    return trained.index(True) if True in trained else len(blocks)


def input_bytes(model: nn.Module, length_tokens: int) -> int:
    """Bytes for one prompt of what goes into the first block that trains, from shapes alone.

    0 where no block lies below, or blocks are run piece by piece. Not asked is whether hidden
    states suffice.
    """
    first = first_trained(model)
    if first in (0, len(ports.port_for(model).blocks(model))):
        return 0
    tokens = mx.zeros((1, length_tokens), dtype=mx.int32)
    try:
        return int(run_below(model, first, tokens, mx.array([length_tokens - 1]))[0].nbytes)
    except UnsupportedArchitectureError:
        return 0


def boundary(model: nn.Module) -> int | None:
    """The first block that trains, if a run may begin there with known hidden states.

    That is tried: a run on some tokens whose block gets the hidden states of a run on others must
    give what those gave, bit for bit. It does not where more crosses the boundary: keys and values
    of other blocks, embeddings of the tokens for each block, whatever blocks give beside hidden
    states. Nothing may be below it that trains.

    Args:
        model: a loaded model with adapters attached, dropout off.

    Returns:
        Its number; None where hidden states do not suffice, or no block lies below.
    """
    first = first_trained(model)
    port = ports.port_for(model)
    blocks = port.blocks(model)
    if first in (0, len(blocks)):
        return None
    above = [f"{block.path}." for block in blocks[first:]] + [f"{port.head_path(model)}."]
    trained = [path for path, _ in tree_flatten(model.trainable_parameters())]
    if not all(path.startswith(tuple(above)) for path in trained):
        return None
    several = False
    inputs: list[mx.array] = []

    def noting(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        nonlocal several
        if number == first:
            inputs.append(hidden)
        output = block(hidden)
        several = several or not isinstance(output, mx.array)
        return output

    def given(number: int, hidden: mx.array) -> mx.array:
        return inputs[0] if number == first else hidden

    tokens = mx.arange(_SOME_TOKENS)[None]
    try:
        with ports.wrap_blocks(model, noting):
            expected = port.hidden(model, tokens)
        with ports.hook_blocks(model, before=given):
            found = port.hidden(model, tokens[:, ::-1])
    except UnsupportedArchitectureError:
        return None  # blocks that are run piece by piece cannot be begun in the middle
    return first if not several and mx.array_equal(found, expected).item() else None


def run_below(
    model: nn.Module, first: int, tokens: mx.array, last: mx.array
) -> tuple[mx.array, Rows]:
    """Run the blocks below a block, from :func:`boundary`, and none from there on.

    Returns:
        (B, T, width) hidden states that go into that block, and a (B, H, T) pattern row for each
        layer below it, None for the other layers. Lazy: rows that nobody uses are not computed.
    """
    inputs: list[mx.array] = []

    def around(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        if number < first:
            return block(hidden)
        if number == first:
            inputs.append(hidden)
        return hidden

    with attention.instrument(model) as recorder, ports.wrap_blocks(model, around):
        recorder.last = last
        ports.port_for(model).hidden(model, tokens)
        return inputs[0], recorder.rows


@contextmanager
def beginning(model: nn.Module, first: int, known: mx.array) -> Iterator[None]:
    """Let runs begin at a block, with the (B, T, width) known hidden states that go into it.

    No block below it is run while the context is open.
    """

    def around(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        if number < first:
            return hidden
        return block(known if number == first else hidden)

    with ports.wrap_blocks(model, around):
        yield
