"""The base under an adapter, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from abft_mlx import read_out
from abft_mlx.adapters.attach import adapted
from abft_mlx.adapters.layers import put, put_back


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """The model as its base while the block runs; then the adapter is back, its numbers untouched.

    The read-out, if there is one, is a part of the adapter.

    Args:
        model: a model with an adapter; one without stays as it is.
    """
    modules = adapted(model)
    head_weights = read_out.detach(model)
    for path, module in modules.items():
        put_back(model, path, module)
    try:
        yield
    finally:
        for path, module in modules.items():
            put(model, path, module)
        if head_weights is not None:
            model.read_out = head_weights
