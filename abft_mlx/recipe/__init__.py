"""The typed recipe of a run: the sole home of every default; load, override, save."""

from abft_mlx.recipe.files import change, default, dumps, find, load, loads, save, shipped, studies
from abft_mlx.recipe.sections import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    Method,
    ObjectiveSection,
    PromptSection,
    Protocol,
    Recipe,
    TaskSection,
    TrainingSection,
    VariantsSection,
    resolve,
    task,
)

__all__ = [
    "AdapterSection",
    "DataSection",
    "EvaluationSection",
    "Method",
    "ObjectiveSection",
    "PromptSection",
    "Protocol",
    "Recipe",
    "TaskSection",
    "TrainingSection",
    "VariantsSection",
    "change",
    "default",
    "dumps",
    "find",
    "load",
    "loads",
    "resolve",
    "save",
    "shipped",
    "studies",
    "task",
]
