"""Reporting a run to experiment trackers, through the callbacks that mlx-lm has for them.

``metrics.jsonl`` is written whatever happens here: a tracker that fails is left out from then on,
with a line that says so, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlx_lm.tuner import callbacks

from abft_mlx.errors import RunError, UsageError
from abft_mlx.events import Update
from abft_mlx.recipe import Recipe

PROJECT = "abft-mlx"
# Settings of a recipe that may be a path of this machine, and what files end with.
_PATHS = frozenset({"model", "source", "name"})
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".yaml", ".yml")


def chosen(names: str) -> tuple[str, ...]:
    """The trackers of a list such as ``wandb,swanlab``, each supported by mlx-lm and installed.

    Raises:
        UsageError: one is not supported or not installed, or none is named.
    """
    supported = tuple(callbacks.SUPPORT_CALLBACK)
    trackers = dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip())
    if not trackers:
        raise UsageError(f"--report-to {names!r} names no tracker; give {' or '.join(supported)}")
    for name in trackers:
        if name not in supported:
            raise UsageError(
                f"--report-to {name!r} is no tracker that mlx-lm knows; give "
                f"{' or '.join(supported)}"
            )
        if getattr(callbacks, name, None) is None:
            raise UsageError(
                f"--report-to {name}: {name} is not installed; pip install {name}, or leave it out"
            )
    return tuple(trackers)


def config(value: Any, key: str = "") -> Any:
    """A resolved recipe, or a part of it, as trackers get it: of paths here only the last name."""
    if isinstance(value, Recipe):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: config(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [config(inner, key) for inner in value]
    if key not in _PATHS or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    local = value.startswith((".", "~", "/")) or path.suffix.lower() in _SUFFIXES or path.exists()
    return path.resolve().name if local else value


def report(update: Update) -> dict[str, float]:
    """What trackers get of an update: mlx-lm's names where it has them, ours otherwise."""
    values = {
        "iteration": update.step,
        "train_loss": update.loss,
        "learning_rate": update.learning_rate,
        "iterations_per_second": 1 / update.seconds,
        "tokens_per_second": update.tokens / update.seconds,
        "peak_memory": update.peak_memory_bytes / 1e9,
    }
    own = ("seen_examples", "punish", "reward", "induction_heads", "A", "B", "tokens")
    values |= {name: getattr(update, name) for name in own}
    # An update that was left out has no loss.
    return {name: value for name, value in values.items() if value is not None}


class Tracking:
    """The trackers of one run.

    Args:
        names: from :func:`chosen`.
        project: what they call the project.
        say: called with a line when a tracker fails.

    Attributes:
        lost: for every tracker that failed, when and why.
    """

    def __init__(self, names: Iterable[str], project: str, say: Callable[[str], None]) -> None:
        self.names = tuple(names)
        self.project = project
        self.lost: dict[str, str] = {}
        self._say = say
        self._open: dict[str, Any] = {}

    def start(self, recipe: Recipe, folder: Path) -> None:
        """Open every tracker for a resolved recipe; the run has its folder's name.

        Raises:
            RunError: one cannot start; those that did are closed.
        """
        for name in self.names:
            try:
                self._open[name] = callbacks.get_reporting_callbacks(
                    report_to=name,
                    project_name=self.project,
                    log_dir=str(folder),
                    config=config(recipe),
                )
            except Exception as error:  # trackers have no common one
                self.close(failed=True)
                raise RunError(
                    f"{name} cannot start ({_reason(error)}); nothing was trained: log in to "
                    f"{name}, set it to its offline mode, or leave --report-to out"
                ) from error

    def updated(self, update: Update) -> None:
        """Report an update, and the validation that followed it."""
        for name, callback in tuple(self._open.items()):
            try:
                callback.on_train_loss_report(report(update))
                if update.validation_accuracy is not None:
                    accuracy = update.validation_accuracy
                    callback.on_val_loss_report(
                        {"iteration": update.step, "val_accuracy": accuracy}
                    )
            except Exception as error:
                del self._open[name]
                self._lose(name, f"update {update.step}", error)

    def close(self, *, failed: bool = False) -> None:
        """End what is open, so that all is sent; ``failed`` where the run did not end well."""
        endings: dict[str, dict[str, Any]] = {
            "wandb": {"exit_code": 1},
            "swanlab": {"state": "crashed", "error": "the run did not come to its end"},
        }
        for name in tuple(self._open):
            del self._open[name]
            try:
                getattr(callbacks, name).finish(**(endings.get(name, {}) if failed else {}))
            except Exception as error:
                self._lose(name, "the end", error)

    def _lose(self, name: str, when: str, error: Exception) -> None:
        """Note a tracker that failed, and say so."""
        self.lost[name] = f"{when}: {_reason(error)}"
        self._say(
            f"warning: {name} failed at {when} ({_reason(error)}) and gets nothing more; the run "
            "goes on, and metrics.jsonl has every update"
        )


def _reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)
