"""What there is to say where transformers and mlx-lm read a configuration in different ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ABSENT = "transformers does not have it"


@dataclass(frozen=True)
class Difference:
    """What one architecture needs to be the same model in both.

    Attributes:
        both: settings that replace the tiny configuration's, in both.
            A wrapper's both, theirs, ours and without are its text model's.
        theirs: settings that transformers alone gets.
        ours: settings that mlx-lm alone gets.
        without: settings of the tiny configuration that neither gets.
        wrapper: what transformers' wrapper gets beside its text model's settings; without it the
            transformers model is the text model alone.
        model_type: transformers' name, where it is another.
        model_class: the transformers class that makes the model.
        original: whether to write the checkpoint's first format, with one weight for each expert.
        drop: beginnings of weights' names that mlx-lm is not given, such as a vision tower's.
        names: patterns in weights' names and what replaces them, as hub checkpoints have them.
        zero: ends of the names of parameters that stay 0, since mlx-lm does not use them.
        swap: ends of weights' names whose last two axes to swap.
        unused: beginnings of names of mlx-lm's parameters that transformers does without.
        note: how the two differ for some checkpoints, for which the settings here are not.
        why_not: why the two cannot be compared.
    """

    both: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    wrapper: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    model_class: str = "AutoModelForCausalLM"
    original: bool = True
    drop: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    zero: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    note: str | None = None
    why_not: str | None = None
