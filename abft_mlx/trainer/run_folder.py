"""The run folder: what ``finetune --output DIR`` leaves behind (DESIGN.md, section 5)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abft_mlx import files
from abft_mlx.errors import OutputError
from abft_mlx.induction import HEADS_FILE

ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json", "lora.safetensors")
OWN_FILES = ("recipe.yaml", "metrics.jsonl", "run.json", "checkpoint")
# What is seen of a run afterwards: heads, an evaluation, figures and a report.
EVALUATION_FILE = "eval.json"
SEEN_FILES = (HEADS_FILE, EVALUATION_FILE, "figures", "report.html")
# What trackers keep in the run's folder.
TRACKER_FILES = ("wandb", "swanlog")


@dataclass(frozen=True)
class Update:
    """One line of ``metrics.jsonl``, and what progress displays are told.

    Attributes:
        step: optimizer updates done, from 1.
        seen_examples: prompts seen so far, repeats counted.
        loss: equation 1, averaged over the update's prompts; end to end, the cross-entropy of the
            label token.
        punish: equation 1's first term without A.
        reward: its second term without B.
        induction_heads: heads above the filter, averaged over the update's prompts.
        A: the punish weight that this update used; 0 end to end.
        B: the reward weight; 0 end to end.
        learning_rate: of this update.
        tokens: prompt tokens in this update, padding left out.
        seconds: wall-clock seconds of this update.
        peak_memory_bytes: MLX's peak so far in this run.
        validation_accuracy: in 0..1, where this update was followed by a validation.
        note: what this update changed to fit into memory, where it did.
        compilations: of the step so far, since the run was begun or resumed, one for each shape of
            a micro-batch; where the step is compiled.
    """

    step: int
    seen_examples: int
    loss: float
    punish: float
    reward: float
    induction_heads: float
    A: float
    B: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    validation_accuracy: float | None = None
    note: str | None = None
    compilations: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that are known, in order."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class RunFolder:
    """A folder that belongs to one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint_path = path / "checkpoint"
        self.metrics_path = path / "metrics.jsonl"

    def check(self, *, overwrite: bool = False) -> list[str]:
        """See whether a run may be written here, before any long work.

        Returns:
            Names of what an earlier run left here.

        Raises:
            OutputError: it holds a run already and ``overwrite`` is not set, or holds files that no
                run of ours wrote, or is a file, or cannot be read.
        """
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; choose a folder with --output")
        try:
            found = sorted(one.name for one in self.path.iterdir())
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        known = ADAPTER_FILES + OWN_FILES + SEEN_FILES + TRACKER_FILES
        foreign = [name for name in found if name not in known]
        if foreign:
            raise OutputError(
                f"{self.path}: holds {foreign[0]}, which no run wrote; choose another folder"
            )
        if found and not overwrite:
            raise OutputError(
                f"{self.path}: holds a run already; use --resume to continue it, --overwrite to "
                "replace it, or another --output"
            )
        return found

    def create(self, *, overwrite: bool = False) -> None:
        """Make the folder, or clear what an earlier run left in it.

        Raises:
            OutputError: as :meth:`check`, or the folder cannot be written.
        """
        found = self.check(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        for name in found:
            self._remove(self.path / name)

    def discard(self) -> None:
        """Remove a run that has trained nothing, so that its folder can be used again.

        Raises:
            OutputError: something here cannot be removed.
        """
        self.create(overwrite=True)
        self.path.rmdir()

    def _remove(self, path: Path) -> None:
        try:
            if path.is_dir() and not path.is_symlink():
                for one in path.iterdir():
                    self._remove(one)
                path.rmdir()
            else:
                path.unlink()
        except OSError as error:
            raise files.write_failure(path, error) from error

    def add_metrics(self, update: Update) -> None:
        """Append one line to ``metrics.jsonl``."""
        try:
            with self.metrics_path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(update.as_dict()) + "\n")
        except OSError as error:
            raise files.write_failure(self.metrics_path, error) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that are whole."""
        if not self.metrics_path.is_file():
            return []
        whole = self.metrics_path.read_text(encoding="utf-8").split("\n")[:-1]
        return [files.parse_json(line) for line in whole]

    def keep_metrics(self, steps: int) -> None:
        """Drop the lines of updates after ``steps``, which a resumed run will do again."""
        kept = [one for one in self.metrics() if one["step"] <= steps]
        files.write_text(self.metrics_path, "".join(json.dumps(one) + "\n" for one in kept))

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write ``run.json``."""
        files.write_json(self.path / "run.json", facts)

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            OutputError: there is none, or it is not JSON.
        """
        path = self.path / "run.json"
        try:
            return files.parse_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise OutputError(f"{self.path}: holds no run (no run.json)") from error
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error
