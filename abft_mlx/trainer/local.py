"""Gradients block by block: each layer's loss trains its own W_Q and W_K, nothing else.

Equation 1 is a sum over layers. With a stop-gradient at every block's input its gradient falls
apart into one for each block, which is known as soon as that block has run. So a block's gradient
is computed with its output, and then nothing of the block is kept: a step takes the time and the
memory of inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx import attention, ports
from abft_mlx.objective import Terms
from abft_mlx.prefix import PrefixKeys, prefix_caches
from abft_mlx.trainer.below import first_trained

Tree = Any
BlockTerms = Callable[[Sequence[mx.array | None], dict[str, mx.array], mx.array], Terms]
"""A block's part of the loss, of its layers' (B, H, T) pattern rows, a micro-batch and A."""


def value_and_grad(
    model: nn.Module, terms: BlockTerms, settle: Callable[..., None]
) -> Callable[..., tuple[mx.array, Tree]]:
    """A function like ``mx.value_and_grad``'s of the whole loss, evaluated block by block.

    It cannot be compiled: it evaluates as it goes. Keys and values that a layer takes
    from another block are constants to it. Blocks above the last one that trains are not run, nor
    blocks below the first where a micro-batch has its hidden states (``hidden``), and the terms are
    those of the blocks that train.

    Args:
        model: a loaded model with adapters attached.
        terms: gives one block's terms.
        settle: ``mx.eval``, or what notes what would be evaluated.

    Returns:
        From trainable parameters, a micro-batch's arrays and the punish weight to the four terms
        (4,), summed over layers and prompts, and the gradients of all trainable parameters.
    """
    blocks = ports.port_for(model).blocks(model)

    def run(
        parameters: Tree, batch: dict[str, mx.array], punish_weight: mx.array
    ) -> tuple[mx.array, Tree]:
        model.update(parameters)
        top = max(n for n, block in enumerate(blocks) if _trains(block.module))
        known = batch.get("hidden")
        first = 0 if known is None else first_trained(model)
        shared = _Shared(model, batch["prefix"], top, settle) if "prefix" in batch else None
        total = mx.zeros(4)
        gradients: dict[str, mx.array] = {}

        def around(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
            nonlocal total
            here = blocks[number]
            if number < first:
                return hidden
            if known is not None and number == first:
                hidden = known
            if number > top or not _trains(here.module):
                output = block(hidden)
                # Above the top nobody asks for it.
                settle(output if number < top else [])
                return output
            own = here.module.trainable_parameters()

            def loss(parameters: Tree) -> tuple[Any, ...]:
                here.module.update(parameters)
                if shared is not None:
                    with recorder.paused():
                        shared.run_again(number)
                output = block(hidden)
                rows = [recorder.rows[layer] for layer in here.layers]
                return (*terms(rows, batch, punish_weight), output)

            (*values, output), gradient = mx.value_and_grad(loss)(own)
            here.module.update(own)
            for layer in here.layers:
                recorder.rows[layer] = None
            total = total + mx.stack(values)
            # The last block's values and MLP, and all above it, are never asked for.
            settle(total, gradient, output if number < top else [])
            if shared is not None:
                shared.forget(number)
            for name, one in tree_flatten(gradient):
                path = f"{here.path}.{name}"
                # A block that is run twice has two.
                gradients[path] = gradients[path] + one if path in gradients else one
            return output

        with attention.instrument(model) as recorder, ports.wrap_blocks(model, around):
            behind = 0 if shared is None else batch["prefix"].shape[1]
            recorder.last = batch["last"] - behind
            caches = None if shared is None else shared.caches
            ports.port_for(model).hidden(model, batch["tokens"], caches)
        return total, tree_unflatten(list(gradients.items()))

    return run


def _trains(module: nn.Module) -> bool:
    """Whether anything in a module trains."""
    return bool(tree_flatten(module.trainable_parameters()))


class _Shared:
    """A prefix that has been run once, and whose keys can be had again with their gradient.

    Attributes:
        caches: the prefix's keys and values, for the prompts that go on from there.
    """

    def __init__(
        self, model: nn.Module, tokens: mx.array, top: int, settle: Callable[..., None]
    ) -> None:
        first = prefix_caches(model)
        self._blocks: dict[int, tuple[Callable[[], Any], list[int]]] = {}

        def around(number: int, block: Callable[[mx.array], Any], hidden: mx.array) -> Any:
            before = {n for n, cache in enumerate(first) if cache.keys is not None}
            output = block(hidden)
            filled = [
                n for n, cache in enumerate(first) if cache.keys is not None and n not in before
            ]
            self._blocks[number] = (lambda: block(hidden), filled)
            settle(output if number < top else [])
            return output

        with ports.wrap_blocks(model, around):
            ports.port_for(model).hidden(model, tokens, first)
        self._first = first
        self.caches = [PrefixKeys(cache.keys, cache.values) for cache in first]

    def run_again(self, number: int) -> None:
        """Make a block's keys and values anew, from what its parameters are now."""
        again, filled = self._blocks[number]
        for place in filled:
            self._first[place].forget()
        # Of what the block gives, only keys and values are ever asked for.
        again()
        for place in filled:
            self.caches[place].fill(self._first[place].keys, self._first[place].values)

    def forget(self, number: int) -> None:
        """Let go of a block's keys, values and hidden states: nobody comes back to it."""
        _, filled = self._blocks.pop(number)
        for place in filled:
            self._first[place].forget()
            self.caches[place].forget()
