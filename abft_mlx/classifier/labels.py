"""Labels as their users write them, and the names that prompts and files know them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from abft_mlx import data
from abft_mlx.errors import DataError


def classes_of(labels: Sequence[Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The classes as their users call them, sorted, and their names in the same order.

    Args:
        labels: words, or whole numbers, or truth values; repeats do no harm.

    Raises:
        DataError: a label that can be none, labels of several kinds, or two with the same name.
    """
    named: dict[str, Any] = {}
    for label in labels:
        known = named.setdefault(data.word(label), label)
        if known != label:
            raise DataError(
                f"labels {known!r} and {label!r} have the same name; make them the same"
            )
    if len({_kind(label) for label in named.values()}) > 1:
        shown = ", ".join(repr(label) for label in list(named.values())[:4])
        raise DataError(f"labels of several kinds ({shown}); make them all words")
    order = sorted(named, key=lambda name: named[name])
    return np.array([named[name] for name in order]), tuple(order)


def _kind(label: Any) -> type:
    return next((kind for kind in (str, bool) if isinstance(label, kind)), int)
