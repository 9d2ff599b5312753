"""Made-up cells of studies, as ``abft_mlx.study`` writes them, with numbers a test chooses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


def study(**changes: Any) -> SimpleNamespace:
    """What write_study needs of a study."""
    given = {"name": "made", "description": None, "paper": {}, "figures": [], "seeds": [1, 2]}
    return SimpleNamespace(**{**given, **changes})


def answers(rate: float, prompts: int, seed: int = 0) -> str:
    """A string of 0 and 1 with exactly this share of ones, shuffled."""
    ones = round(rate * prompts)
    values = np.array([1] * ones + [0] * (prompts - ones))
    np.random.default_rng(seed).shuffle(values)
    return "".join(map(str, values))


def summary(right: str, **more: Any) -> dict[str, Any]:
    """One method of eval's JSON."""
    rate = right.count("1") / len(right)
    return {
        "accuracy": rate,
        "macro_f1": rate / 2,
        "expected_calibration_error": 0.125,
        "true_label_probability": 0.25,
        "interval": {"accuracy": [rate - 0.02, rate + 0.02]},
        "right": right,
        **more,
    }


def consistency(template: float, demonstrations: float, width: float = 0.02) -> dict[str, Any]:
    """The robustness part of eval's JSON."""
    return {
        name: {"consistency": value, "interval": [value - width, value + width], "queries": 100}
        for name, value in (("template", template), ("demonstrations", demonstrations))
    }


def curve(heads: list[float]) -> list[dict[str, Any]]:
    """A training's curve."""
    return [
        {
            "step": i + 1,
            "seen_examples": 32 * (i + 1),
            "loss": 1.0,
            "induction_heads": one,
            "A": 0.5,
        }
        for i, one in enumerate(heads)
    ]


def run(heads: list[float] | None = None, **changes: Any) -> dict[str, Any]:
    """What training came to."""
    return {
        "seconds": 10.0,
        "peak_memory_bytes": 50_000_000,
        "process_peak_bytes": 60_000_000,
        "trainable_parameters": 1000,
        "adapter_bytes": 4000,
        "updates": 4,
        "curve": curve(heads or [4.0, 4.0, 3.0, 3.0]),
        **changes,
    }


def cell(
    method: str = "abft",
    right: str | dict[str, str] | None = None,
    *,
    model: str = "demo",
    task: str = "sst2",
    seed: int | None = None,
    sweep: dict[str, Any] | None = None,
    repeats: int = 2,
    source: str | None = None,
    kind: str = "abft",
    evaluation: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A done cell; an untrained one has ``right`` by method."""
    by_method = right if isinstance(right, dict) else {"vanilla": right} if right else {}
    methods = {name: summary(text) for name, text in by_method.items()}
    trained = method != "untrained"
    words = [f"{key}={value}" for key, value in (sweep or {}).items()]
    return {
        "schema": 1,
        "id": "--".join([model, task, method, *words, str(seed)]),
        "model": model,
        "task": task,
        "method": method,
        "like": method,
        "seed": seed,
        "sweep": sweep or {},
        "recipe": {
            "model": source or model,
            "evaluation": {"repeats": repeats, "queries": 4},
            "objective": {"kind": kind, "punish": 0.5, "reward": 1.0},
            "adapter": {"kind": "lora"},
            "training": {"examples": 512, "updates": 32, "learning_rate": 1e-3},
        },
        "status": "done",
        "error": None,
        "run": run() if trained else None,
        "shift": None,
        "census": None,
        "evaluation": {**({"methods": methods} if methods else {}), **(evaluation or {})},
        "seconds": 12.0,
        "device": "a machine",
        **changes,
    }


def failed(identity: str = "demo--trec--abft--1", error: str = "no such file") -> dict[str, Any]:
    """A cell without a result."""
    model, task, method, seed = identity.split("--")
    return {
        "id": identity, "model": model, "task": task, "method": method, "seed": int(seed),
        "status": "failed", "error": error,
    }  # fmt: skip
