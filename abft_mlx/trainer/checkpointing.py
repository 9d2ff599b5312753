"""Gradient checkpointing: the backward pass runs a block again instead of keeping what it computed.

Between the passes only each block's input is kept, for the time of about one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError

Tree = Any
Forward = Callable[..., tuple[mx.array, list[mx.array | None]]]
"""Hidden states and pattern rows of a model, tokens and last positions, as
:func:`abft_mlx.attention.forward` gives them."""


@contextmanager
def checkpointed(
    model: nn.Module, counting: set[int] | None = None, attend: attention.Attend | None = None
) -> Iterator[Forward]:
    """A forward pass of one model whose blocks are run again for their gradients.

    The context must stay open until the gradients are known, for that is when blocks run again.
    Nothing of it remains in the model, and no other model has a part in it.

    Args:
        model: a loaded model with adapters attached, none of which drops numbers at random: a block
            that is run again would draw others.
        counting: layers whose rows are used; None for all, and the hidden states too. The last
            block that is used is not run again: its turn comes at once.
        attend: as for :func:`abft_mlx.attention.instrument`.

    Yields:
        What to call instead of :func:`abft_mlx.attention.forward`, on this model.

    Raises:
        UnsupportedArchitectureError: blocks hand each other more than hidden states.
    """
    blocks = ports.port_for(model).blocks(model)
    used = [n for n, block in enumerate(blocks) if counting is None or counting & set(block.layers)]

    def around(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
        last = recorder.last
        if last is None:
            return block(hidden)
        here = blocks[number]

        # Gradients reach arguments alone, and rows go out as results, or have none.
        def run(parameters: Tree, hidden: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            before = here.module.trainable_parameters()
            here.module.update(parameters)
            try:
                with recorder.aside(last) as rows:
                    output = block(hidden)
            finally:
                here.module.update(before)
            found = {str(n): row for n, row in enumerate(rows) if row is not None}
            # A cache of keys that other blocks see would have grown by being filled twice.
            grown = any(row.shape[-1] != hidden.shape[-2] for row in found.values())
            if grown or not isinstance(output, mx.array):
                raise _refusal(model)
            return output, found

        once_more = mx.checkpoint(run) if number < used[-1] else run
        output, rows = once_more(here.module.trainable_parameters(), hidden)
        for layer, row in rows.items():
            recorder.rows[int(layer)] = row
        return output

    def forward(
        _: nn.Module, tokens: mx.array, last: mx.array
    ) -> tuple[mx.array, list[mx.array | None]]:
        try:
            return attention.run(model, recorder, tokens, last)
        finally:
            # Some models run their blocks once more, for nothing, to come to their logits.
            recorder.last = None

    with attention.instrument(model, attend) as recorder, ports.wrap_blocks(model, around):
        yield forward


def _refusal(model: nn.Module) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{ports.architecture(model)} models hand more than hidden states from block to block, "
        "which would lose gradients; set training.gradient_checkpointing to false"
    )
