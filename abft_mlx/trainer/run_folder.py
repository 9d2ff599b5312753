"""The run folder: what ``finetune --output DIR`` leaves behind."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from abft_mlx import files, read_out
from abft_mlx import recipe as recipes
from abft_mlx.errors import OutputError
from abft_mlx.events import Update
from abft_mlx.induction import HEADS_FILE
from abft_mlx.trainer import checkpoint

ADAPTER_FILES = (
    "adapters.safetensors", "adapter_config.json", "lora.safetensors", read_out.FILE,
)  # fmt: skip
# A recipe is written last and removed first: a run has begun where there is one.
RECIPE_FILE = "recipe.yaml"
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
# Earlier versions wrote the last two.
OWN_FILES = (
    RECIPE_FILE, "metrics.jsonl", RUN_FILE, LOCK_FILE, "demonstrations.jsonl",
    "checkpoint", "checkpoint.before", "checkpoint.new",
)  # fmt: skip
# What is made of a run afterwards: heads, an evaluation, figures and a report.
EVALUATION_FILE = "eval.json"
SEEN_FILES = (HEADS_FILE, EVALUATION_FILE, "figures", "report.html")
# Of run.json and eval.json; what an older one lacks is read as absent.
SCHEMA = 1
# Of runs before 2026-12 that a tracker followed.
TRACKER_FILES = ("wandb", "swanlog")


class RunFolder:
    """A folder that belongs to one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint_path = path / "checkpoint"
        self.metrics_path = path / "metrics.jsonl"
        self.recipe_path = path / RECIPE_FILE

    @contextlib.contextmanager
    def opened(self, *, overwrite: bool = False, resume: bool = False) -> Iterator[None]:
        """Keep other processes from writing here while the block runs; the folder is made.

        Args:
            overwrite: whether there may be an earlier run.
            resume: there must be one, and half-written files are removed.

        Raises:
            OutputError: as `check` and `read_run`; another process holds the folder, or it cannot
                be written.
        """
        if resume:
            self.read_run()
        self._content()
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        lock = filelock.FileLock(self.path / LOCK_FILE, timeout=0)
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise OutputError(
                    f"{self.path}: in use by another process; wait for it, end it, or choose "
                    "another folder with --output"
                ) from None
        try:
            if resume:
                self._remove(*(name for name in self._content() if files.is_leftover(name)))
            else:
                self.check(overwrite=overwrite)
            yield
        finally:
            with contextlib.suppress(OSError):  # it may be gone, or can no longer be written
                (self.path / LOCK_FILE).unlink()
            lock.release()
            with contextlib.suppress(OSError):  # it holds a run
                for path in made:
                    path.rmdir()

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return (self.checkpoint_path / checkpoint.FILE_NAME).is_file()

    def check(self, *, overwrite: bool = False) -> None:
        """See whether a run may be written here, before any long work.

        Raises:
            OutputError: it holds a run already and ``overwrite`` is not set, or holds files that no
                run of ours wrote, or is a file, or cannot be read.
        """
        if not overwrite and not all(map(files.is_leftover, self._content())):
            raise OutputError(
                f"{self.path}: holds a run already; use --resume to continue it, --overwrite to "
                "replace it, or another --output"
            )

    def _content(self) -> list[str]:
        """Names of what lies here, the lock left out; refuses a folder that no run of ours made."""
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            raise OutputError(f"{self.path}: is a file; choose a folder with --output")
        with _writing(self.path):
            names = sorted(path.name for path in self.path.iterdir() if path.name != LOCK_FILE)
        ours = ADAPTER_FILES + OWN_FILES + SEEN_FILES + TRACKER_FILES
        for name in names:
            if name not in ours and not files.is_leftover(name):
                raise OutputError(
                    f"{self.path}: holds {name}, which no run wrote; choose another folder"
                )
        return names

    def create(self, *, keep: bool = False) -> None:
        """Make the folder, or clear what an earlier run left in it.

        Args:
            keep: the same run begins again; what says so stays until it is written anew.

        Raises:
            OutputError: the folder cannot be written.
        """
        kept = (RECIPE_FILE, RUN_FILE) if keep else ()
        names = sorted(self._content(), key=lambda name: name != RECIPE_FILE)
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._remove(*(name for name in names if name not in kept))

    def _remove(self, *names: str) -> None:
        """Remove files and folders."""
        for path in (self.path / name for name in names):
            with _writing(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def add_metrics(self, update: Update) -> None:
        """Append one line to ``metrics.jsonl``."""
        with _writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(update.as_dict()) + "\n")

    def keep_metrics(self, steps: int) -> None:
        """Drop the lines of updates after ``steps``, which a resumed run does again.

        Raises:
            OutputError: the lines up to there are not all there; nothing is changed then.
        """
        try:
            lines = self.metrics_path.read_bytes().split(b"\n")[:-1][:steps]
        except OSError as error:
            raise OutputError(f"{self.metrics_path}: cannot be read ({error})") from error
        for number in range(1, steps + 1):
            try:
                step = files.parse_json(lines[number - 1])["step"]
            except (ValueError, LookupError, TypeError):
                step = None
            if step != number:
                raise OutputError(
                    f"{self.metrics_path}: line {number} is not that of update {number}, which the "
                    "checkpoint holds; put the file back as the run left it, or start anew"
                )
        with files.replacing(self.metrics_path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))

    def save_checkpoint(self, state: checkpoint.Checkpoint) -> None:
        """Write a checkpoint; the lines of metrics that it counts on are on the disk by then."""
        with _writing(self.metrics_path):
            files.sync(self.metrics_path)
        checkpoint.save(self.checkpoint_path, state)

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write ``run.json``."""
        files.write_json(self.path / RUN_FILE, facts)

    def read_begun(self) -> tuple[dict[str, Any], recipes.Recipe]:
        """``run.json`` and the recipe of a run that had begun.

        Raises:
            OutputError: as `read_run`, or there is no recipe.
            RecipeError: the recipe cannot be used.
        """
        facts = self.read_run()
        if not self.recipe_path.is_file():
            raise OutputError(f"{self.path}: no run had begun (no recipe.yaml); start it anew")
        return facts, recipes.load(str(self.recipe_path))

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            OutputError: there is none, it is no JSON object, or it is of another schema.
        """
        path = self.path / RUN_FILE
        try:
            return self.parse_run(path.read_bytes())
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.path}: holds no run (no run.json); name a folder that finetune wrote"
            ) from error
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error

    def parse_run(self, content: bytes) -> dict[str, Any]:
        """As `read_run`, of a content that was read already."""
        path = self.path / RUN_FILE
        try:
            facts = files.parse_json(content.decode())
        except ValueError as error:
            raise OutputError(f"{path}: cannot be read ({error})") from error
        if not isinstance(facts, dict):
            raise OutputError(f"{path}: holds no JSON object; put back the run's own file")
        check_schema(path, facts)
        return facts


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing here into an error of ours."""
    try:
        yield
    except OSError as error:
        raise files.write_failure(path, error) from error


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
