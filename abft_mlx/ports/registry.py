"""The architectures that are known, and how a loaded model finds its port."""

from __future__ import annotations

import mlx.nn as nn

from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports.port import HeadShape, Port
from abft_mlx.ports.table import PORTS

MODELS_PACKAGE = "mlx_lm.models."


def architecture(model: nn.Module) -> str:
    """Name of the mlx-lm model module that runs this model; it decides the port.

    A model's own ``model_type`` may be another: mlx-lm runs ``mistral`` checkpoints as ``llama``.
    """
    return type(model).__module__.removeprefix(MODELS_PACKAGE)


def supported() -> tuple[str, ...]:
    """The mlx-lm model modules that have a port, in alphabetical order."""
    return tuple(sorted(name for port in PORTS for name in port.architectures))


def supported_in_words() -> str:
    """The end of a message to somebody whose model has no port."""
    return (
        f"{len(supported())} of mlx-lm's are, among them gpt2, llama (Mistral models run as it), "
        "qwen2, qwen3, gemma3 and phi3; docs/architectures.md has them all"
    )


def port_for(model: nn.Module) -> Port:
    """The port of a loaded model; never guessed from how the model looks.

    Raises:
        UnsupportedArchitectureError: no port names this model's architecture.
    """
    module = type(model).__module__
    name = architecture(model)
    for port in PORTS:
        if module.startswith(MODELS_PACKAGE) and name in port.architectures:
            return port
    raise UnsupportedArchitectureError(
        f"architecture {name!r} is not supported; {supported_in_words()}"
    )


def head_counts(model: nn.Module) -> dict[int, int]:
    """Layer number to its number of query heads, for layers with softmax attention."""
    return {n: one.n_heads for n, one in enumerate(heads(model)) if one is not None}


def heads(model: nn.Module) -> list[HeadShape | None]:
    """Heads of every layer, None for a layer without softmax attention."""
    port = port_for(model)
    return [port.head_shape(layer) for layer in port.layers(model)]
