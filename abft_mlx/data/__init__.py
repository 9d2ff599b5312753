"""Labelled texts: reading, checking, and the protocol's seeded splits and samplers."""

from abft_mlx.data._check import Report
from abft_mlx.data.generator import Generator, demonstration_rows, training_rows
from abft_mlx.data.loading import builtin_tasks, builtin_template, kind, load, report
from abft_mlx.data.queries import Queries, Query
from abft_mlx.data.texts import LabelledTexts, Splits, fold, split

__all__ = [
    "Generator",
    "LabelledTexts",
    "Queries",
    "Query",
    "Report",
    "Splits",
    "builtin_tasks",
    "builtin_template",
    "demonstration_rows",
    "fold",
    "kind",
    "load",
    "report",
    "split",
    "training_rows",
]
