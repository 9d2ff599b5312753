"""Progress: what a log, a terminal and a quiet command show of the work."""

from __future__ import annotations

import re
import sys

import pytest

from abft_mlx.cli import progress
from abft_mlx.cli.progress import Board
from abft_mlx.cli.shell import Shell
from abft_mlx.trainer import Update


class Clock:
    """Stands still until it is set forward."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def update(step: int, accuracy: float | None = None) -> Update:
    return Update(
        step=step, seen_examples=step * 32, loss=1.5, punish=1.0, reward=1.0, induction_heads=3.25,
        A=0.5, B=1.0, learning_rate=1e-4, tokens=2000, seconds=0.5, peak_memory_bytes=212_000_000,
        validation_accuracy=accuracy,
    )  # fmt: skip


def on_terminal(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "120")


def test_a_log_gets_a_line_for_every_few_updates(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    board = Board("lines", clock)
    board.training(64)
    for step in range(1, 65):
        clock.now += 0.5
        board.update(update(step, accuracy=0.5 if step == 3 else None))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    steps = [int(step) for step in re.findall(r"update +(\d+)/64  loss 1.500", captured.err)]
    assert steps == sorted({3, *range(4, 65, 4)})
    assert lines[0].endswith("validation 50.0%")
    assert lines[1] == (
        "update  4/64  loss 1.500  induction heads 3.2  A 0.500  4,000 tokens/s  212 MB  0:30 left"
    )
    assert "left" not in lines[-1]


def test_a_log_gets_counts_ever_farther_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    board = Board("lines", clock)
    board.stage("base model, test")
    for done in range(1, 1025):
        clock.now += 0.5
        board.progress(done, 1024)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "base model, test: 6/1,024 prompts  8:29 left"
    assert lines[-1] == "base model, test: 1,024/1,024 prompts"
    assert 10 < len(lines) < 25
    board.stage("quick")
    board.progress(2, 2)
    board.clear()
    assert capsys.readouterr().err == ""
    for second in range(400):
        board.download("owner/large", second * 10**6, 400 * 10**6)
        clock.now += 1
    board.clear()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "downloading owner/large: 3.0 MB of 400 MB  6:37 left"
    assert lines[-1] == "downloaded owner/large: 399 MB"


def test_inside_a_cell_only_a_long_silence_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    board = Board("lines", clock)
    board.cell("demo--vanilla", 2, 12, 59.2)
    board.stage("base model")
    for done in range(1, 13):
        clock.now += 10
        board.progress(done, 12)
    board.clear()
    assert capsys.readouterr().err.splitlines() == [
        "cell 2/12  demo--vanilla  about 1:00 left",
        "base model: 6/12 prompts  1:00 left",
        "base model: 12/12 prompts",
    ]


def test_a_stage_without_a_count_is_named_after_a_while(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FIRST_LINE_SECONDS", 0.0)
    board = Board("lines")
    board.stage("reading mails.csv")
    assert board._timer is not None
    board._timer.join(5)
    assert capsys.readouterr().err == "reading mails.csv …\n"


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


@pytest.mark.parametrize(("quiet", "beginning"), [(True, ""), (False, "update 1/4  loss ")])
def test_a_dumb_terminal_gets_lines_and_quiet_nothing(
    quiet: bool,
    beginning: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_terminal(monkeypatch, "dumb")
    with progress.board(Shell(as_json=False, quiet=quiet)) as board:
        board.training(4)
        board.update(update(1))
        board.stage("reading")
        board.progress(1, 2)
    assert capsys.readouterr().err[: len("update 1/4  loss ")] == beginning


def test_durations_and_sizes() -> None:
    assert [progress.duration(s) for s in (0.4, 59.6, 65, 7207)] == [
        "0:00", "1:00", "1:05", "2:00:07",
    ]  # fmt: skip
    assert [progress.size(n) for n in (12, 3_400, 812_345, 1.25e9, 99.96e6)] == [
        "12 B", "3.4 kB", "812 kB", "1.2 GB", "100 MB",
    ]  # fmt: skip
