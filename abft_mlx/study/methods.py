"""The built-in methods of a study, each as changes to a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from abft_mlx.recipe import Method

Kind = Literal["predict", "train", "plane", "extrapolate"]

# The cell that measures a base without training it, by every way of predicting at once.
UNTRAINED = "untrained"
PREDICTING: tuple[str, ...] = get_args(Method)

PLANE_FACTORS = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
EXTRAPOLATION_FACTORS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class BuiltIn:
    """What a method does to the recipe of its task.

    Attributes:
        kind: predict (nothing is trained), train, plane or extrapolate.
        changes: ``section.key=value`` each.
        mixture: train on all other tasks of the study instead of the cell's own.
    """

    kind: Kind
    changes: tuple[str, ...] = ()
    mixture: bool = False


def built_in() -> dict[str, BuiltIn]:
    """Every built-in method by name.

    The ablations are those of the paper's table 4; ``end_to_end`` is its baseline, with the LM
    head trained in full, and ``end_to_end_qk`` trains what ABFT trains.
    """
    end_to_end = "objective.kind=end_to_end"
    held = "objective.pid=false"
    return {
        **{name: BuiltIn("predict") for name in PREDICTING},
        "abft": BuiltIn("train", ("objective.kind=abft",)),
        "end_to_end": BuiltIn("train", (end_to_end, "adapter.head=true")),
        "end_to_end_qk": BuiltIn("train", (end_to_end,)),
        "metaicl": BuiltIn("train", (end_to_end, "adapter.head=true"), mixture=True),
        "abft_mixture": BuiltIn("train", ("objective.kind=abft",), mixture=True),
        "no_pid": BuiltIn("train", (held,)),
        "no_filter": BuiltIn("train", (held, "objective.filter=false")),
        "no_punish": BuiltIn("train", (held, "objective.punish=0")),
        "no_reward": BuiltIn("train", (held, "objective.reward=0")),
        "plane": BuiltIn("plane"),
        "extrapolate": BuiltIn("extrapolate", ("objective.kind=abft",)),
    }
