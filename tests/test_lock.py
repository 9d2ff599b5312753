"""One process on a run folder: refused while another lives, free when it is gone, however."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
