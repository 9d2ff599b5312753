"""Losses, gradients and weights that are not finite: what is made of them, and what is said."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx.errors import RunError
from abft_mlx.trainer.totals import Totals

_LOWER = "lower training.learning_rate, or set training.max_gradient_norm"


class NonFiniteError(RunError):
    """An update's loss or gradient is not finite; nothing of the update was applied.

    Attributes:
        totals: what the update came to.
    """

    def __init__(self, totals: Totals) -> None:
        super().__init__(f"{found(totals)}; the model was left as it was ({_LOWER})")
        self.totals = totals


class DivergedError(RunError):
    """A run stopped because too many updates in a row were not finite.

    The model is as its last finite update left it.
    """


def found(totals: Totals) -> str:
    """What an update came to, in words."""
    return f"loss {totals.loss:g}, gradient norm {totals.gradient_norm:g}: not both finite"


def all_finite(model: nn.Module) -> mx.array:
    """Whether every trainable number is finite; a scalar, not yet evaluated."""
    known = [mx.isfinite(one).all() for _, one in tree_flatten(model.trainable_parameters())]
    return mx.stack(known).all()


def stopped(
    model: nn.Module,
    totals: Totals,
    *,
    update: int,
    in_a_row: int,
    applied: int,
    learning_rate: float,
) -> DivergedError:
    """The end of a run, with all that helps to find out why.

    Args:
        model: as its last finite update left it.
        totals: of the last update.
        update: its number, from 1.
        in_a_row: updates up to it that were not finite.
        applied: updates that were finite.
        learning_rate: of these updates.
    """
    several = f" ({in_a_row} such updates in a row)" if in_a_row > 1 else ""
    kept = f"what the {applied} others trained is kept" if applied else "nothing was trained"
    broken = _broken(model)
    way_out = (
        f"{broken} of the model is not finite: take another copy of it, or another model"
        if broken
        else f"{_LOWER}, or take the model in float32 or bfloat16"
    )
    return DivergedError(
        f"update {update}: {found(totals)}{several}, so the run stops; learning rate "
        f"{learning_rate:g}, largest trained weight {_largest(model)}; no such update was applied, "
        f"and {kept}; {way_out}"
    )


def spoilt(model: nn.Module, totals: Totals, *, learning_rate: float) -> RunError:
    """The end of a run whose weights an update has spoilt, though its gradient was finite."""
    names = [
        name
        for name, one in tree_flatten(model.trainable_parameters())
        if not mx.isfinite(one).all().item()
    ]
    return RunError(
        f"an update of learning rate {learning_rate:g} and gradient norm {totals.gradient_norm:g} "
        f"made {names[0]} and {len(names) - 1} other weights not finite, so the run stops; the "
        f"last checkpoint stays; {_LOWER}, or take the model in float32"
    )


def _largest(model: nn.Module) -> str:
    sizes = {
        name: mx.abs(one.astype(mx.float32)).max().item()
        for name, one in tree_flatten(model.trainable_parameters())
    }
    name = max(sizes, key=lambda one: sizes[one])
    return f"{sizes[name]:.3g} ({name})"


def _broken(model: nn.Module) -> str | None:
    """A parameter of the model with a number that is not finite."""
    for name, one in tree_flatten(model.parameters()):
        if mx.issubdtype(one.dtype, mx.floating) and not mx.isfinite(one).all().item():
            return name
    return None
