"""What MLX says where a model has no gradient, in words for the person who trains it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import metadata
from typing import Any

import mlx.nn as nn

from abft_mlx import ports
from abft_mlx.errors import UnsupportedArchitectureError

_SAID = "Cannot calculate VJP"


def explained(model: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of value and gradient whose refusals are ours.

    Older versions of mlx-lm, the last for Python 3.10 among them, route tokens to experts without
    stopping the gradient there, and MLX has none for indices.

    Args:
        model: whose gradient it computes.
        function: what computes it.

    Returns:
        The same function.

    Raises:
        UnsupportedArchitectureError: from it, where MLX has no gradient of the model.
    """

    @wraps(function)
    def told(*given: Any) -> Any:
        try:
            return function(*given)
        except ValueError as error:
            if _SAID not in str(error):
                raise
            raise UnsupportedArchitectureError(
                f"this {ports.architecture(model)} model has no gradient in the installed mlx-lm "
                f"{metadata.version('mlx-lm')} ({str(error).split('. ')[0]}); install a newer one, "
                "with Python 3.11 or newer, or use another model"
            ) from error

    return told
