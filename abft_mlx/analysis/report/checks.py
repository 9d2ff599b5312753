"""What a report needs of a run's files, seen before its page is made."""

from __future__ import annotations

from abft_mlx.analysis.run_files import RunFiles, broken
from abft_mlx.documents import number
from abft_mlx.trainer import EVALUATION_FILE


def check(run: RunFiles) -> None:
    """See that every update has its number and every method its accuracy.

    Raises:
        OutputError: one has not.
    """
    if any(number(one, "step") is None for one in run.metrics):
        raise broken(run.folder / "metrics.jsonl", "a line is no update of a run")
    document = run.evaluation or {}
    path = run.folder / EVALUATION_FILE
    for part in (document, document.get("base", {})):
        methods = part.get("methods", {}) if isinstance(part, dict) else None
        if not isinstance(methods, dict):
            raise broken(path, "it is no document of abft-mlx eval")
        for name, values in methods.items():
            if number(values, "accuracy") is None:
                raise broken(path, f"method {name} has no accuracy")
    if not isinstance(document.get("labels", []), list):
        raise broken(path, "labels is no list")
