"""Gradients layer by layer: each layer's loss trains its own W_Q and W_K, nothing else.

Equation 1 is a sum over layers. With a stop-gradient at every layer's input its gradient falls
apart into one for each layer, which is known as soon as that layer has run. So a layer's gradient
is computed with its output, and then nothing of the layer is kept: a step takes the time and the
memory of inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx import attention, ports
from abft_mlx.objective import Terms

Tree = Any
LayerTerms = Callable[[mx.array, dict[str, mx.array], mx.array], Terms]
"""One layer's part of the loss, of its (B, H, T) pattern rows, a micro-batch and A."""


def value_and_grad(model: nn.Module, terms: LayerTerms) -> Callable[..., tuple[mx.array, Tree]]:
    """A function like ``mx.value_and_grad``'s of the whole loss, evaluated layer by layer.

    It cannot be compiled or exported: it evaluates as it goes. Keys and values that a layer takes
    from another one are constants to it.

    Args:
        model: a loaded model with adapters attached.
        terms: gives one layer's terms.

    Returns:
        From trainable parameters, a micro-batch's arrays and the punish weight to the four terms
        (4,), summed over layers and prompts, and the gradients of all trainable parameters.
    """
    port = ports.port_for(model)

    def run(
        parameters: Tree, batch: dict[str, mx.array], punish_weight: mx.array
    ) -> tuple[mx.array, Tree]:
        model.update(parameters)
        layers = port.layers(model)
        training = [n for n, one in enumerate(layers) if tree_flatten(one.trainable_parameters())]
        top = training[-1]
        total = mx.zeros(4)
        gradients: dict[str, mx.array] = {}

        def around(number: int, layer: Callable[[mx.array], Any], hidden: mx.array) -> Any:
            nonlocal total
            if number > top:
                return hidden
            module = layers[number]
            own = module.trainable_parameters()

            def loss(parameters: Tree) -> tuple[Any, ...]:
                module.update(parameters)
                output = layer(hidden)
                row = recorder.rows[number]
                assert row is not None
                return (*terms(row, batch, punish_weight), output)

            if number not in training:
                output = layer(hidden)
                mx.eval(output)
                return output
            (*values, output), gradient = mx.value_and_grad(loss)(own)
            module.update(own)
            recorder.rows[number] = None
            total = total + mx.stack(values)
            # The last layer's values and MLP, and all above it, are never asked for.
            mx.eval(total, gradient, *([output] if number < top else []))
            prefix = f"{port.layer_list}.{number}."
            gradients.update({prefix + name: one for name, one in tree_flatten(gradient)})
            return output

        with attention.instrument(model) as recorder, ports.wrap_layers(model, around):
            recorder.last = batch["last"]
            port.hidden(model, batch["tokens"])
        return total, tree_unflatten(list(gradients.items()))

    return run
