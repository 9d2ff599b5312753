"""Progress: what a log, a terminal and a quiet command show of the work."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from abft_mlx.cli import progress
from abft_mlx.cli.progress import Board
from abft_mlx.cli.shell import Shell
from abft_mlx.trainer import Update


class Time:
    """A clock that stands still until it is set forward."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def update(step: int, accuracy: float | None = None) -> Update:
    return Update(
        step=step,
        seen_examples=step * 32,
        loss=1.5,
        punish=1.0,
        reward=1.0,
        induction_heads=3.25,
        A=0.5,
        B=1.0,
        learning_rate=1e-4,
        tokens=2000,
        seconds=0.5,
        peak_memory_bytes=212_000_000,
        validation_accuracy=accuracy,
    )


def on_terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "120")


def test_a_log_gets_a_line_for_every_few_updates(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Board("lines", clock)
    lines.training(64)
    for step in range(1, 65):
        clock.now += 0.5
        lines.update(update(step, accuracy=0.5 if step == 3 else None))
    captured = capsys.readouterr()
    found = captured.err.splitlines()
    assert captured.out == ""
    steps = [int(one) for one in re.findall(r"update +(\d+)/64  loss 1.500", captured.err)]
    assert steps == sorted({3, *range(4, 65, 4)})
    assert found[0].endswith("validation 50.0%")
    assert found[1] == (
        "update  4/64  loss 1.500  induction heads 3.2  A 0.500  4,000 tokens/s  212 MB  0:30 left"
    )
    assert "left" not in found[-1]


def test_a_slow_run_is_not_silent_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Board("lines", clock)
    lines.training(1600)
    for step in range(1, 10):
        clock.now += 25
        lines.update(replace(update(step), note="out of memory" if step == 2 else ""))
    err = capsys.readouterr().err
    assert re.findall(r"update +(\d)/1600", err) == ["3", "6", "9"]
    assert "update 2: out of memory\n" in err


def test_a_log_gets_counts_ever_farther_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Board("lines", clock)
    lines.stage("base model, test")
    for done in range(1, 1025):
        clock.now += 0.5
        lines.progress(done, 1024)
    found = capsys.readouterr().err.splitlines()
    assert found[0] == "base model, test: 6/1,024 prompts  8:29 left"
    assert found[-1] == "base model, test: 1,024/1,024 prompts"
    assert 10 < len(found) < 25
    lines.stage("quick")
    for done in (1, 2):
        lines.progress(done, 2)
    lines.clear()
    assert capsys.readouterr().err == ""


def test_inside_a_cell_only_a_long_silence_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Board("lines", clock)
    lines.cell("demo--vanilla", 2, 12, 59.2)
    lines.stage("base model")
    for done in range(1, 13):
        clock.now += 10
        lines.progress(done, 12)
    lines.clear()
    assert capsys.readouterr().err.splitlines() == [
        "cell 2/12  demo--vanilla  about 1:00 left",
        "base model: 6/12 prompts  1:00 left",
        "base model: 12/12 prompts",
    ]


def test_a_stage_without_a_count_is_named_after_a_while(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE_SECONDS", 0.0)
    lines = Board("lines")
    lines.stage("reading mails.csv")
    assert lines._timer is not None
    lines._timer.join(5)
    assert capsys.readouterr().err == "reading mails.csv …\n"
    monkeypatch.setattr(progress, "_FIRST_LINE_SECONDS", 3600.0)
    lines.stage("reading again")
    timer = lines._timer
    lines.clear()
    assert timer.finished.is_set()


def test_a_log_hears_of_downloads(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Board("lines", clock)
    lines.stage("opening owner/large")
    for second in range(400):
        lines.download("owner/large", second * 10**6, 400 * 10**6)
        clock.now += 1
    lines.stage("making prompts")
    lines.clear()
    found = capsys.readouterr().err.splitlines()
    assert found[0] == "downloading owner/large: 3.0 MB of 400 MB  6:37 left"
    assert found[-1] == "downloaded owner/large: 399 MB"
    assert 10 < len(found) < 25


def test_quiet_gets_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch)
    with progress.board(Shell(as_json=False, quiet=True)) as board:
        board.cell("name", 1, 2, 3.0)
        board.training(4)
        board.update(update(1))
        board.stage("reading")
        board.progress(1, 2)
        board.download("owner/name", 1, 2)
        board.note("said")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_rows_of_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch)
    with progress.board(Shell(as_json=True)) as board:
        board.cell("trec--abft", 2, 4, 90.0)
        board.training(4)
        board.update(update(1))
        board.update(update(2, accuracy=0.5))
        board.stage("validation [bold]")
        board.progress(16, 64)
        board._progress.refresh()
        board.stage("")
        board.update(update(4))
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("cell 2/4  trec--abft", "about 1:30 left", "validation [bold]", "16/64 prompts"):
        assert part in captured.err, part
    assert "update 2: validation 50.0%\n" in captured.err
    assert "update 4/4  loss 1.500  induction heads 3.2" in captured.err


def test_a_dumb_terminal_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, "dumb")
    with progress.board(Shell(as_json=False)) as board:
        board.training(4)
        board.update(update(1))
    assert capsys.readouterr().err.startswith("update 1/4  loss ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (65, "1:05"), (7207, "2:00:07")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (3_400, "3.4 kB"), (812_345, "812 kB"), (1.25e9, "1.2 GB"), (99.96e6, "100 MB")],
)
def test_sizes(count: float, text: str) -> None:
    assert progress.size(count) == text
