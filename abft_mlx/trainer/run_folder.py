"""The run folder: what ``finetune --output DIR`` leaves behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abft_mlx import files, read_out
from abft_mlx.errors import OutputError
from abft_mlx.induction import HEADS_FILE
from abft_mlx.trainer import checkpoint, lock

ADAPTER_FILES = (
    "adapters.safetensors", "adapter_config.json", "lora.safetensors", read_out.FILE,
)  # fmt: skip
# A recipe is written last and removed first: a run has begun where there is one.
RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
OWN_FILES = (
    RECIPE_FILE, "metrics.jsonl", RUN_FILE, "demonstrations.jsonl",
    "checkpoint", "checkpoint.before", "checkpoint.new",
)  # fmt: skip
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
        self.recipe_path = path / RECIPE_FILE
        self._held = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing here while the block runs; the folder is made.

        Raises:
            OutputError: one does, or the folder cannot be written.
        """
        if self._held:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        with lock.held(self.path):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from, damaged or not."""
        return checkpoint.exists(self.checkpoint_path)

    def check(self, *, overwrite: bool = False) -> list[str]:
        """See whether a run may be written here, before any long work.

        Returns:
            Names of what an earlier run left here.

        Raises:
            OutputError: it holds a run already and ``overwrite`` is not set, or holds files that no
                run of ours wrote, or is a file, or cannot be read, or a run is writing to it.
        """
        if self.path.is_dir() and not self._held:
            lock.check(self.path)
        return self._lying(overwrite=overwrite)

    def _lying(self, *, overwrite: bool) -> list[str]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; choose a folder with --output")
        try:
            found = sorted(one.name for one in self.path.iterdir())
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        found = [name for name in found if name != lock.FILE_NAME]
        known = ADAPTER_FILES + OWN_FILES + SEEN_FILES + TRACKER_FILES
        left = {name for name in found if files.is_leftover(name)}
        foreign = [name for name in found if name not in known and name not in left]
        if foreign:
            raise OutputError(
                f"{self.path}: holds {foreign[0]}, which no run wrote; choose another folder"
            )
        if set(found) - left and not overwrite:
            raise OutputError(
                f"{self.path}: holds a run already; use --resume to continue it, --overwrite to "
                "replace it, or another --output"
            )
        return found

    def create(self, *, overwrite: bool = False, again: bool = False) -> None:
        """Make the folder, or clear what an earlier run left in it.

        Args:
            overwrite: whether there may be an earlier run.
            again: the same run begins again: what says so stays until it is written anew.

        Raises:
            OutputError: as :meth:`check`, or the folder cannot be written.
        """
        found = self.check(overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise files.write_failure(self.path, error) from error
        kept = (RECIPE_FILE, RUN_FILE) if again else ()
        for name in sorted(found, key=lambda name: name != RECIPE_FILE):
            if name not in kept:
                self._remove(self.path / name)

    def remove_leftovers(self) -> None:
        """Remove half-written files of a process that was ended; the folder must be held."""
        for path in self.path.iterdir():
            if files.is_leftover(path.name):
                self._remove(path)

    def discard(self) -> None:
        """Remove a run that has trained nothing, so that its folder can be used again.

        Whoever asks holds the folder.

        Raises:
            OutputError: something here cannot be removed.
        """
        self._lying(overwrite=True)
        self._remove(self.path)

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

    def sync_metrics(self) -> None:
        """Have the lines on the disk, before a checkpoint that counts on them."""
        try:
            files.sync(self.metrics_path)
        except OSError as error:
            raise files.write_failure(self.metrics_path, error) from error

    def check_metrics(self, steps: int) -> list[bytes]:
        """The lines of the updates up to ``steps``, one of each.

        What follows, a torn line among it, belongs to updates that a resumed run does again.

        Raises:
            OutputError: they are not all there.
        """
        try:
            lines = self.metrics_path.read_bytes().split(b"\n")[:-1][:steps]
        except OSError as error:
            raise OutputError(f"{self.metrics_path}: cannot be read ({error})") from error
        for number in range(1, steps + 1):
            if number > len(lines) or _step(lines[number - 1]) != number:
                raise OutputError(
                    f"{self.metrics_path}: line {number} is not that of update {number}, which the "
                    "checkpoint holds; put the file back as the run left it, or start anew"
                )
        return lines

    def keep_metrics(self, steps: int) -> None:
        """Drop the lines of updates after ``steps``, which a resumed run will do again."""
        kept = self.check_metrics(steps)
        with files.replacing(self.metrics_path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in kept))

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write ``run.json``."""
        files.write_json(self.path / RUN_FILE, facts)

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            OutputError: there is none, it is no JSON object, or it is of another schema.
        """
        path = self.path / RUN_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.path}: holds no run (no run.json); name a folder that finetune wrote"
            ) from error
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error
        return self.parse_run(content)

    def parse_run(self, content: bytes) -> dict[str, Any]:
        """As :meth:`read_run`, of a content that was read already."""
        path = self.path / RUN_FILE
        try:
            facts = files.parse_json(content.decode())
        except ValueError as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error
        if not isinstance(facts, dict):
            raise OutputError(f"{path}: holds no JSON object; put back the run's own file")
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


def _step(line: bytes) -> object:
    try:
        return files.parse_json(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
