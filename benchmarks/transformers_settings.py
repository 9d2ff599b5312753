"""Where transformers and mlx-lm read a configuration or a checkpoint in different ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ABSENT = "transformers does not have it"


@dataclass(frozen=True)
class Difference:
    """What one architecture needs to be the same model in both.

    Attributes:
        both: settings that replace the tiny configuration's, in both.
        theirs: settings that transformers alone gets.
        ours: settings that mlx-lm alone gets.
        without: settings of the tiny configuration that neither gets.
        model_type: transformers' name, where it is another.
        model_class: the transformers class that makes the model.
        names: parts of weights' names to replace, as hub checkpoints have them.
        why_not: why the two cannot be compared.
    """

    both: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    model_type: str | None = None
    model_class: str = "AutoModelForCausalLM"
    names: tuple[tuple[str, str], ...] = ()
    why_not: str | None = None


DIFFERENCES: dict[str, Difference] = {
    # transformers' Llama has no windows.
    "llama": Difference(without=("layer_types",)),
    "nemotron": Difference(without=("layer_types",)),
    "gpt2": Difference(names=(("transformer.", ""),)),
}
