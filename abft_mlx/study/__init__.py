"""Studies: models x tasks x methods x seeds, one file for each cell, resumed where they stopped."""

from abft_mlx.study.plan import (
    PREDICTING,
    UNTRAINED,
    Cell,
    Study,
    cell_id,
    cells,
    find,
    load,
    loads,
    shard,
)
from abft_mlx.study.running import Outcome, StudyEvents, run
from abft_mlx.study.store import Store, read

__all__ = [
    "PREDICTING",
    "UNTRAINED",
    "Cell",
    "Outcome",
    "Store",
    "Study",
    "StudyEvents",
    "cell_id",
    "cells",
    "find",
    "load",
    "loads",
    "read",
    "run",
    "shard",
]
