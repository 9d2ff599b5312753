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
# Settings of a recipe that may hold a path of this machine.
_PLACES = frozenset({"model", "source", "name"})
_FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".yaml", ".yml")


def chosen(names: str) -> tuple[str, ...]:
    """The trackers that are asked for, each known to mlx-lm and installed.

    Args:
        names: as ``wandb,swanlab``.

    Raises:
        UsageError: one is not known or not installed, or none is named.
    """
    known = tuple(callbacks.SUPPORT_CALLBACK)
    wanted = dict.fromkeys(name.strip().lower() for name in names.split(",") if name.strip())
    if not wanted:
        raise UsageError(f"--report-to {names!r} names no tracker; give {' or '.join(known)}")
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"--report-to {name!r} is no tracker that mlx-lm knows; give {' or '.join(known)}"
            )
        if getattr(callbacks, name, None) is None:
            raise UsageError(
                f"--report-to {name}: {name} is not installed; pip install {name}, or leave it out"
            )
    return tuple(wanted)


def config(recipe: Recipe) -> dict[str, Any]:
    """A resolved recipe as trackers are told it: of files and folders here only their names."""
    return _shown(recipe.model_dump(mode="json"))


def report(update: Update) -> dict[str, float]:
    """What trackers are told of an update: mlx-lm's names where it has them, ours otherwise."""
    told = {
        "iteration": update.step,
        "train_loss": update.loss,
        "learning_rate": update.learning_rate,
        "iterations_per_second": 1 / update.seconds,
        "tokens_per_second": update.tokens / update.seconds,
        "peak_memory": update.peak_memory_bytes / 1e9,
    }
    own = ("seen_examples", "punish", "reward", "induction_heads", "A", "B", "tokens")
    told |= {name: getattr(update, name) for name in own}
    # An update that was left out has no loss.
    return {name: value for name, value in told.items() if value is not None}


class Tracking:
    """The trackers of one run.

    Args:
        names: from :func:`chosen`.
        project: what they call the project.
        say: told a line when a tracker is lost.

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
        """Open every tracker, before the first update.

        Args:
            recipe: resolved; the run's configuration.
            folder: of the run, whose name the run gets and where trackers keep their files.

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
        when = f"update {update.step}"
        self._each(when, lambda one: one.on_train_loss_report(report(update)))
        if update.validation_accuracy is not None:
            told = {"iteration": update.step, "val_accuracy": update.validation_accuracy}
            self._each(when, lambda one: one.on_val_loss_report(told))

    def close(self, *, failed: bool = False) -> None:
        """End what is open, so that all is sent and nothing is printed later.

        Args:
            failed: the run did not come to its end.
        """
        for name in tuple(self._open):
            del self._open[name]
            module = getattr(callbacks, name)
            try:
                if failed and name == "wandb":
                    module.finish(exit_code=1)
                elif failed and name == "swanlab":
                    module.finish(state="crashed", error="the run did not come to its end")
                else:
                    module.finish()
            except Exception as error:
                self._lose(name, "the end", error)

    def _each(self, when: str, tell: Callable[[Any], None]) -> None:
        """Report to each tracker; those that fail are left out from then on."""
        for name, callback in tuple(self._open.items()):
            try:
                tell(callback)
            except Exception as error:
                del self._open[name]
                self._lose(name, when, error)

    def _lose(self, name: str, when: str, error: Exception) -> None:
        """Note a tracker that failed, and say so."""
        self.lost[name] = f"{when}: {_reason(error)}"
        self._say(
            f"warning: {name} failed at {when} ({_reason(error)}) and is told nothing more; the "
            "run goes on, and metrics.jsonl has every update"
        )


def _reason(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def _shown(value: Any, key: str = "") -> Any:
    """Values without paths of this machine."""
    if isinstance(value, dict):
        return {name: _shown(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner, key) for inner in value]
    if key in _PLACES and isinstance(value, str) and _is_place(value):
        return Path(value).expanduser().resolve().name
    return value


def _is_place(value: str) -> bool:
    """Whether a name is of a file or folder here and not of something on the hub."""
    path = Path(value).expanduser()
    return (
        path.is_absolute()
        or value.startswith((".", "~"))
        or path.suffix.lower() in _FILES
        or path.exists()
    )
