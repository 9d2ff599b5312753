"""Labelled texts: reading, checking, and the protocol's seeded splits and samplers."""

from abft_mlx.data.rows import Queries, Query, queries_of
from abft_mlx.data.sampling import (
    Generator,
    Nearest,
    TfIdf,
    Vectors,
    balanced,
    demonstration_rows,
    evaluation_draws,
    training_draws,
    training_rows,
)
from abft_mlx.data.splits import Splits, all_test, split
from abft_mlx.data.texts import (
    LabelledTexts,
    builtin_tasks,
    fold,
    given,
    kind,
    listed,
    load,
    word,
)

__all__ = [
    "Generator",
    "LabelledTexts",
    "Nearest",
    "Queries",
    "Query",
    "Splits",
    "TfIdf",
    "Vectors",
    "all_test",
    "balanced",
    "builtin_tasks",
    "demonstration_rows",
    "evaluation_draws",
    "fold",
    "given",
    "kind",
    "listed",
    "load",
    "queries_of",
    "split",
    "training_draws",
    "training_rows",
    "word",
]
