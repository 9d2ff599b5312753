"""What an mlx-lm older than the one we are written for cannot do itself, asked of it, not assumed.

Python 3.10 has no newer mlx-lm than 0.31.3. A test that fails there on an architecture with which
that mlx-lm fails alone, without a line of ours, says so and is skipped; other failures stay.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from packaging.version import Version

OURS = Version("0.32.2")  # the lower bound where pip finds it
BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")


def _tiny() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [BENCHMARKS, *sys.path])
        return importlib.import_module("tiny_configs")


@cache
def problem(name: str) -> str | None:
    """What goes wrong with a tiny model of an architecture in mlx-lm alone; None where nothing."""
    tiny = _tiny()
    if importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        return f"has no {name}"
    try:
        model = tiny.build(name)
        tokens, _ = tiny.tokens()
        plain = model(tokens)
        cached = model(tokens, cache=make_prompt_cache(model))
        apart = mx.abs(plain - cached).max().item()
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        return f"cannot run the tiny {name}: {error}"
    if apart > 1e-3:
        return f"computes other logits with a cache than without for {name}, {apart:.1f} apart"
    try:
        nn.value_and_grad(model, lambda: model(tokens).sum())()
    except ValueError as error:
        return f"has no gradient of {name}: {error}"
    return None


def excuse(parameters: dict[str, Any]) -> str | None:
    """Why a failed test of these parameters proves nothing about us; None where it does."""
    if Version(metadata.version("mlx-lm")) >= OURS:
        return None
    for key in ("name", "kind"):
        if isinstance(parameters.get(key), str) and (found := problem(parameters[key])):
            return f"the installed mlx-lm {metadata.version('mlx-lm')} {found}"
    return None
