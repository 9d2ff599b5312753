"""``table.csv``: a line for every measurement."""

from __future__ import annotations

import json
import math
from typing import Any

from abft_mlx.analysis.measurements import Measurement, measurements
from abft_mlx.analysis.text import comma_separated

COLUMNS = (
    "model",
    "task",
    "method",
    "sweep",
    "seed",
    "n",
    "accuracy",
    "low",
    "high",
    "macro_f1",
    "true_label_probability",
    "expected_calibration_error",
    "transfer_accuracy",
    "template_consistency",
    "demonstration_consistency",
    "contextual_entropy",
    "domain_entropy",
    "posterior_kl",
    "gler",
    "random_label_accuracy",
    "unseen_label_accuracy",
    "zero_shot_accuracy",
    "trainable_parameters",
    "updates",
    "seconds",
    "peak_memory_bytes",
    "induction_heads_first",
    "induction_heads_last",
)


def table_csv(document: dict[str, Any]) -> str:
    """All measurements of a study's facts; rates in 0..1."""
    return comma_separated(COLUMNS, [line(one) for one in measurements(document)])


def line(one: Measurement) -> dict[str, Any]:
    """The columns of one measurement that are known."""
    low, high = (one.values.get("interval") or {}).get("accuracy") or (None, None)
    made: dict[str, Any] = {
        "model": one.model,
        "task": one.task,
        "method": one.method,
        "sweep": json.dumps(one.sweep, sort_keys=True) if one.sweep else None,
        "seed": one.seed,
        "n": one.prompts or None,
        "accuracy": one.values.get("accuracy"),
        "low": low,
        "high": high,
        **{key: one.values.get(key) for key in COLUMNS[9:12]},
    }
    if one.plain:
        made |= _parts(one)
    return made


def _parts(one: Measurement) -> dict[str, Any]:
    robustness = one.part("robustness") or {}
    bias, unseen = one.part("bias") or {}, one.part("unseen") or {}
    run = one.cell.get("run") or {}
    counted = [heads for heads in heads_of(one.cell) if not math.isnan(heads)]
    return {
        "transfer_accuracy": (one.part("transfer") or {}).get("accuracy"),
        "template_consistency": (robustness.get("template") or {}).get("consistency"),
        "demonstration_consistency": (robustness.get("demonstrations") or {}).get("consistency"),
        **{key: bias.get(key) for key in COLUMNS[15:19]},
        **{
            column: (unseen.get(kind) or {}).get("accuracy")
            for column, kind in zip(COLUMNS[19:22], ("random", "unseen", "zero_shot"), strict=True)
        },
        **{
            key: run.get(key)
            for key in ("trainable_parameters", "updates", "seconds", "peak_memory_bytes")
        },
        "induction_heads_first": counted[0] if counted else None,
        "induction_heads_last": counted[-1] if counted else None,
    }


def heads_of(cell: dict[str, Any]) -> list[float]:
    """Induction heads of a run, update by update; empty where nothing was trained with them.

    NaN stands for an update that was left out because it was not finite.
    """
    curve = (cell.get("run") or {}).get("curve") or []
    known = [step["induction_heads"] for step in curve if "induction_heads" in step]
    heads = [math.nan if one is None else float(one) for one in known]
    # End-to-end training does not look at attention: its zeros are no count.
    counted = (cell.get("settings") or {}).get("objective") != "end_to_end" or any(
        one > 0 for one in heads
    )
    return heads if counted else []
