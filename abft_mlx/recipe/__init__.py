"""The typed recipe of a run: the sole home of every default; load, override, save."""

from abft_mlx.recipe.files import default, dumps, find, load, loads, save, shipped
from abft_mlx.recipe.sections import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    ObjectiveSection,
    PromptSection,
    Recipe,
    TrainingSection,
    resolve,
)

__all__ = [
    "AdapterSection",
    "DataSection",
    "EvaluationSection",
    "ObjectiveSection",
    "PromptSection",
    "Recipe",
    "TrainingSection",
    "default",
    "dumps",
    "find",
    "load",
    "loads",
    "resolve",
    "save",
    "shipped",
]
