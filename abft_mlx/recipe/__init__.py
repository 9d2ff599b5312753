"""The typed recipe of a run: the sole home of every default; load, override, save."""

from abft_mlx.recipe.files import (
    change,
    default,
    dumps,
    find,
    load,
    loads,
    override,
    save,
    shipped,
    studies,
)
from abft_mlx.recipe.resolving import resolve, share
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
    task,
)
from abft_mlx.recipe.tasks import check_mixture

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
    "check_mixture",
    "default",
    "dumps",
    "find",
    "load",
    "loads",
    "override",
    "resolve",
    "save",
    "share",
    "shipped",
    "studies",
    "task",
]
