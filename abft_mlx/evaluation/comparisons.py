"""Comparing measurements of the same prompts that were kept as ``right`` strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from abft_mlx.evaluation.intervals import mcnemar
from abft_mlx.evaluation.metrics import predictions


def right_answers(right: str) -> np.ndarray:
    """Which prompts were answered rightly, (N,) bool, from a method's ``right`` string.

    Raises:
        ValueError: it holds anything but 0 and 1.
    """
    if set(right) - {"0", "1"}:
        raise ValueError(f"answers are written as 0 and 1, not as {right!r:.40}")
    return np.frombuffer(right.encode("ascii"), dtype=np.uint8) == ord("1")


def right_string(probabilities: np.ndarray, gold: np.ndarray) -> str:
    """What :func:`right_answers` reads: N characters, 1 where the likeliest label is the gold one.

    Args:
        probabilities: (N, C).
        gold: (N,) label indices.
    """
    return "".join("1" if one else "0" for one in predictions(probabilities) == gold)


def against_base(
    with_adapter: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The paired test of every method against itself without the adapter.

    Args:
        with_adapter: ``methods`` of eval's JSON.
        base: ``base.methods`` of eval's JSON, on the same prompts.

    Returns:
        Entries for ``comparisons``; the second is called ``base.METHOD``.
    """
    return [
        {
            "first": name,
            "second": f"base.{name}",
            **mcnemar(right_answers(method["right"]), right_answers(base[name]["right"])),
        }
        for name, method in with_adapter.items()
        if name in base
    ]
