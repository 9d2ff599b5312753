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
# Of run.json and eval.json; what an older one lacks is read as absent.
SCHEMA = 1
# Null in a line of metrics.jsonl whose update was left out.
MEASURES = ("loss", "punish", "reward", "induction_heads")
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
        skipped: why this update was left out, where it was; loss, punish, reward and
            induction_heads are null then.
        note: what this update changed to fit into memory, where it did.
        compilations: of the step so far, since the run was begun or resumed, one for each shape of
            a micro-batch; where the step is compiled.
    """

    step: int
    seen_examples: int
    loss: float | None
    punish: float | None
    reward: float | None
    induction_heads: float | None
    A: float
    B: float
    learning_rate: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    validation_accuracy: float | None = None
    note: str | None = None
    skipped: str | None = None
    compilations: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that are known, in order; the measures always."""
        fields = asdict(self).items()
        return {name: one for name, one in fields if one is not None or name in MEASURES}


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
        return [json.loads(line) for line in whole]

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
            OutputError: there is none, it is not JSON, or it is of another schema.
        """
        path = self.path / "run.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise OutputError(f"{self.path}: holds no run (no run.json)") from error
        except (OSError, ValueError) as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error
        if isinstance(facts, dict):
            check_schema(path, facts)
        return facts


def check_schema(path: Path, document: dict[str, Any]) -> None:
    """See whether a ``run.json`` or ``eval.json`` is one that this version reads.

    Raises:
        OutputError: it is of another schema.
    """
    command = "eval" if path.name == EVALUATION_FILE else "finetune"
    again = f"make it again: abft-mlx {command}"
    problem = files.schema_problem(document.get("schema"), SCHEMA, again)
    if problem:
        raise OutputError(f"{path}: {problem}")
