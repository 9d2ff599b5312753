"""Ctrl-C and SIGTERM to every command that takes long: one line, the right status, nothing torn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cli_support import train_run

from abft_mlx.trainer import checkpoint

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def heard() -> None:
    """Signals as a terminal's process has them; a job in the background has others."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Command:
    """A command in a process of its own, to which signals are sent."""

    def __init__(self, checkout: Path, words: Sequence[object], folder: Path) -> None:
        self.out, self.err = folder / "said.out", folder / "said.err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(checkout / "cli.py"), *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=folder, preexec_fn=heard,
            )  # fmt: skip

    def until(self, seen: Callable[[], object]) -> None:
        """Wait until something is seen of it."""
        end = time.monotonic() + 300
        while not seen():
            assert self.process.poll() is None, self.out.read_text() + self.err.read_text()
            assert time.monotonic() < end
            time.sleep(0.02)

    def ends(self, number: int) -> tuple[str, str]:
        """Send a signal and see it end as it should; gives what it printed."""
        try:
            self.process.send_signal(number)
            status = self.process.wait(120)
        finally:
            self.process.kill()
        out, err = self.out.read_text(), self.err.read_text()
        assert status == STATUS[signal.Signals(number)], err
        assert err.endswith(f"error: {SAID[signal.Signals(number)]}\n")
        assert err.count("error: ") == 1
        assert "Traceback" not in out + err
        return out, err


@pytest.mark.parametrize("number", STATUS)
def test_demo_finishes_its_update_and_says_how_to_go_on(
    number: int, checkout: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = Command(checkout, ["demo", "--output", folder], tmp_path)
    command.until((folder / "metrics.jsonl").exists)
    out, _ = command.ends(number)
    assert out.endswith(f"to go on: abft-mlx finetune --resume {folder}\n")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held = checkpoint.load(folder / "checkpoint")
    assert held.facts["progress"]["updates"] == len(lines) > 0
    assert not (folder / "run.lock").exists()


MEASURING = [
    ("eval", signal.SIGTERM, ["--output", "x.json", "--set=evaluation.repeats=5000"]),
    ("heads", signal.SIGTERM, ["--output", "x.npz", "--prompts", "100000"]),
]


@pytest.mark.parametrize(("name", "number", "more"), MEASURING)
def test_what_measures_leaves_no_half_of_a_file(
    name: str,
    number: int,
    more: list[str],
    checkout: Path,
    model: Path,
    texts: Path,
    tmp_path: Path,
) -> None:
    run = train_run(tmp_path / "run", model, texts)
    before = {one.name for one in run.iterdir()}
    named = [run] if name == "heads" else ["--adapter", run]
    command = Command(checkout, [name, *named, *more], tmp_path)
    command.until(lambda: (command.out.read_text() + command.err.read_text()).strip())
    command.ends(number)
    assert {one.name for one in run.iterdir()} == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run", "said.err", "said.out"]


def test_predict_leaves_whole_lines(
    checkout: Path, model: Path, texts: Path, tmp_path: Path
) -> None:
    run, output = train_run(tmp_path / "run", model, texts), tmp_path / "answers.jsonl"
    many = tmp_path / "many.csv"
    lines = "".join(f"film number {row} was good\n" for row in range(200_000))
    many.write_text("text\n" + lines, encoding="utf-8")
    words = ["predict", "--adapter", run, many, "--output", output]
    command = Command(checkout, words, tmp_path)
    command.until(lambda: output.exists() and output.stat().st_size > 0)
    command.ends(signal.SIGTERM)
    assert all("label" in json.loads(line) for line in output.read_text().splitlines())
