"""One process on a run folder: refused while another lives, free when it is gone, however."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import invoke, train_run

from abft_mlx.errors import OutputError
from abft_mlx.trainer import RunFolder

HOLD = """
import sys
from pathlib import Path
from abft_mlx.trainer import RunFolder
with RunFolder(Path(sys.argv[1])).opened(overwrite=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path)
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_until_its_holder_is_gone(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = RunFolder(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="in use by another process") as caught:
            folder.opened(overwrite=overwrite).__enter__()
        assert "\n" not in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    # What is left of it is no run, and is removed.
    folder.check()
    with folder.opened():
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run")
    with pytest.raises(ValueError, match="no model"), folder.opened():
        raise ValueError("no model")
    assert not list(tmp_path.iterdir())
    with folder.opened():
        (folder.path / "run.json").touch()
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


def test_commands_are_refused_and_reading_is_not(model: Path, texts: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path / "run", model, texts)
    assert not (run / "run.lock").exists()
    again = ("finetune", "--model", model, "--data", texts, "--output", run)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    process = hold(run)
    try:
        for words in ((*again, "--overwrite"), again, ("finetune", "--resume", run)):
            result = invoke(*words)
            assert result.exit_code == 2
            assert f"error: {run}: in use by another process" in result.stderr
            assert result.stderr.count("\n") == 1
        assert invoke("eval", "--adapter", run, "--set=evaluation.queries=4").exit_code == 0
        assert invoke("report", run, "--output", tmp_path / "page.html").exit_code == 0
    finally:
        process.communicate("")
    after = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    assert after == before
