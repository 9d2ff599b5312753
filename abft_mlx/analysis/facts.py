"""A study's cells without what no table, figure or claim needs: the document ``study.json``.

No texts, wordings or paths are in it, only the names of the classes, so that it can be kept and
passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abft_mlx.analysis.paper import Paper
from abft_mlx.study.methods import PREDICTING, UNTRAINED

SCHEMA = 1
METHODS = (
    *PREDICTING,
    "picl",
    "metaicl",
    "end_to_end",
    "end_to_end_qk",
    "abft_mixture",
    "abft",
    "extrapolate",
    "no_pid",
    "no_filter",
    "no_punish",
    "no_reward",
    "plane",
)
"""The order in which methods stand in tables and figures; others follow by name."""

_KEPT = ("id", "task", "method", "seed", "status", "error", "run", "shift", "census", "seconds")
_SPECIAL = ("plane", "extrapolation")
_PARTS = (
    "labels",
    "methods",
    "comparisons",
    "robustness",
    "bias",
    "unseen",
    "transfer",
    "prompts",
    "base",
)


def facts(study: Any, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of a study: its name, and its cells in an order of their own.

    Args:
        study: anything with ``name``, ``description``, ``paper`` and ``figures``.
        cells: cell documents in any order.

    Returns:
        ``{"schema", "name", "description", "paper", "figures", "machines", "cells", "failed"}``.
    """
    paper = Paper()
    done = [compact(cell) for cell in cells if cell.get("status") == "done"]
    failed = [
        {key: cell.get(key) for key in ("id", "model", "task", "method", "seed", "error")}
        for cell in cells
        if cell.get("status") != "done"
    ]

    def order(cell: dict[str, Any]) -> tuple[Any, ...]:
        return (
            paper.model_order(cell["model"], cell["source"]),
            paper.task_order(cell["task"]),
            method_order(cell["method"]),
            sweep_order(cell["sweep"]),
            -1 if cell["seed"] is None else cell["seed"],
            cell["id"],
        )

    return {
        "schema": SCHEMA,
        "name": study.name,
        "description": study.description,
        "paper": dict(study.paper or {}),
        "figures": list(study.figures or []),
        "machines": sorted({str(one["device"]) for one in cells if one.get("device")}),
        "cells": sorted(done, key=order),
        "failed": sorted(failed, key=lambda one: str(one["id"])),
    }


def compact(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell without its recipe, of which the settings that matter here are kept."""
    recipe = cell.get("recipe") or {}
    evaluation = recipe.get("evaluation") or {}
    objective = recipe.get("objective") or {}
    training = recipe.get("training") or {}
    measured = cell.get("evaluation") or {}
    return {
        "model": cell["model"],
        "source": _source(str(recipe.get("model") or cell["model"])),
        "like": cell.get("like") or cell["method"],
        "sweep": dict(cell.get("sweep") or {}),
        **{key: cell.get(key) for key in _KEPT if key != "status"},
        **{key: cell[key] for key in _SPECIAL if cell.get(key)},
        "repeats": evaluation.get("repeats", 1),
        "settings": {
            "objective": objective.get("kind"),
            "adapter": (recipe.get("adapter") or {}).get("kind"),
            "punish": objective.get("punish"),
            "reward": objective.get("reward"),
            "examples": training.get("examples"),
            "updates": training.get("updates"),
            "learning_rate": training.get("learning_rate"),
        },
        "evaluation": {key: measured[key] for key in _PARTS if measured.get(key)},
    }


def _source(model: str) -> str:
    """A hub id or the bundled model's name as it is; of a folder, its own name alone."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        return model.rstrip("/").rpartition("/")[2]
    return model


def method_order(method: str) -> tuple[int, str]:
    """Sort key of a method's name; ``untrained`` comes first."""
    base = method.partition(" + ")[0]
    known = METHODS.index(base) if base in METHODS else len(METHODS)
    return (-1 if base == UNTRAINED else known, method)


def sweep_order(sweep: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of swept settings: numbers by size."""
    return tuple(
        (key, isinstance(value, str), value if isinstance(value, (int, float)) else str(value))
        for key, value in sorted(sweep.items())
    )
