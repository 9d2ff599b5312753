"""Studies: models x tasks x methods x seeds, one file for each cell, resumed where they stopped."""

from abft_mlx.study.methods import UNTRAINED, built_in
from abft_mlx.study.plan import Cell, cell_id, cells, shard
from abft_mlx.study.running import Outcome, StudyEvents, run
from abft_mlx.study.sections import MethodEntry, ModelEntry, Study, TaskEntry, find, load, loads
from abft_mlx.study.store import Store, read

__all__ = [
    "UNTRAINED",
    "Cell",
    "MethodEntry",
    "ModelEntry",
    "Outcome",
    "Store",
    "Study",
    "StudyEvents",
    "TaskEntry",
    "built_in",
    "cell_id",
    "cells",
    "find",
    "load",
    "loads",
    "read",
    "run",
    "shard",
]
