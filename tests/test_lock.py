"""One process on a run folder: refused while another lives, free when it is gone, however."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke, train_run

from abft_mlx.errors import OutputError, RunError
from abft_mlx.trainer import RunFolder, lock

HOLD = """
import sys
from pathlib import Path
from abft_mlx.trainer import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_and_told_who_is_first(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = RunFolder(tmp_path)
    for attempt in (folder.check, lambda: folder.check(overwrite=True), folder.held().__enter__):
        with pytest.raises(OutputError, match=f"in use by process {holder.pid} on ") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.FILE_NAME).is_file()
    folder = RunFolder(tmp_path)
    assert folder.check() == []  # what is left of it is no run
    with folder.held():
        known = json.loads((tmp_path / lock.FILE_NAME).read_text())
        assert known["process"] != holder.pid
        with pytest.raises(OutputError, match="in use by process"):
            RunFolder(tmp_path).check()
    assert not list(tmp_path.iterdir())


def test_whoever_opened_a_lock_that_was_then_removed_does_not_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = lock.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:  # its holder ends now, and the next one begins
            (tmp_path / lock.FILE_NAME).unlink()
            (tmp_path / lock.FILE_NAME).touch()
        taken.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with lock.held(tmp_path):
        assert len(taken) == 2
        monkeypatch.undo()
        with pytest.raises(OutputError, match="in use by"):
            lock.check(tmp_path)


@pytest.mark.parametrize(
    ("call", "number", "kind"),
    [
        ("open", errno.EROFS, OutputError),
        ("open", errno.EACCES, OutputError),
        ("write", errno.ENOSPC, RunError),
    ],
)
def test_a_folder_that_takes_no_lock_is_one_line(
    call: str, number: int, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> int:
        del given
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, call, refuse)
    with pytest.raises(kind, match=os.strerror(number)) as caught:
        RunFolder(tmp_path).held().__enter__()
    monkeypatch.undo()
    assert str(tmp_path / lock.FILE_NAME) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_commands_are_refused_and_reading_is_not(model: Path, texts: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path / "run", model, texts)
    assert not (run / lock.FILE_NAME).exists()
    before = sorted((one.name, one.stat().st_mtime_ns) for one in run.iterdir())
    again = ("finetune", "--model", model, "--data", texts, "--output", run)
    with lock.held(run):
        for words in ((*again, "--overwrite"), again, ("finetune", "--resume", run)):
            result = invoke(*words)
            assert result.exit_code == 2
            assert f"error: {run}: in use by process " in result.stderr
            assert result.stderr.count("\n") == 1
        assert invoke("eval", "--adapter", run, "--set=evaluation.queries=4").exit_code == 0
        assert invoke("report", run, "--output", tmp_path / "page.html").exit_code == 0
    after = sorted((one.name, one.stat().st_mtime_ns) for one in run.iterdir())
    assert after == before
