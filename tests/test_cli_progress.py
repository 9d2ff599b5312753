"""Progress: what a log, a terminal and a quiet command show of a run's updates."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from abft_mlx.cli import _progress, _words
from abft_mlx.cli._progress.lines import Lines
from abft_mlx.cli._progress.live import LiveBoard
from abft_mlx.cli._progress.rates import CountRate, Stage
from abft_mlx.cli._shell import Shell
from abft_mlx.trainer import Update


class Time:
    """A clock that stands still until it is told to go on."""

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


def shown(shell: Shell, total: int, *updates: Update) -> None:
    with _progress.board(shell) as board:
        board.training(total)
        for one in updates:
            board.update(one)


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Shell(as_json=False), 64, *(update(step) for step in range(1, 65)))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 17
    assert lines[0] == (
        "update  1/64  loss 1.500  induction heads 3.2  A 0.500  4,000 tokens/s  212 MB  0:32 left"
    )
    assert lines[-2].endswith("0:02 left")
    assert lines[-1].startswith("update 64/64  ")
    assert "left" not in lines[-1]


def test_a_log_gets_every_validation(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Shell(as_json=False), 64, update(1), update(2), update(3, accuracy=0.5))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1].endswith("validation 50.0%")


def test_a_slow_run_is_not_silent_for_long(capsys: pytest.CaptureFixture[str]) -> None:
    slow = [replace(update(step), seconds=25.0) for step in range(1, 10)]
    shown(Shell(as_json=False), 1600, *slow)
    steps = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert steps == ["1/1600", "4/1600", "7/1600"]


def test_the_time_left_counts_validations(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.training(16, validate_every=4)
    for step in range(1, 17):
        clock.now += 0.5 + (30 if step % 4 == 0 else 0)
        lines.update(update(step, accuracy=0.5 if step % 4 == 0 else None))
    found = dict(re.findall(r"update +(\d+)/16 .* (\d:\d\d) left", capsys.readouterr().err))
    # Before the first validation nobody knows what one takes: 15 updates of half a second.
    assert found["1"] == "0:08"
    # Three more validations of 30 s and twelve updates; then two, and seven updates.
    assert found["4"] == "1:36"
    assert found["9"] == "1:04"
    assert "16" not in found


def test_quiet_gets_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _progress.board(Shell(as_json=False, quiet=True)) as board:
        board.cell("name", 1, 2, 3.0)
        board.training(4)
        board.update(update(1))
        board.stage("reading")
        board.count(1, 2)
        board.download("owner/name", 1, 2)
        board.note("said")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown(Shell(as_json=True), 4, update(1), update(2, accuracy=0.5), update(4))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "update 2: validation 50.0%" in captured.err
    assert re.search(r"░ 2/4  loss 1.500  induction heads 3.2  A 0.500 .* 0:01 left", captured.err)
    assert "update 4/4  loss 1.500  induction heads 3.2" in captured.err


def test_a_dumb_terminal_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    shown(Shell(as_json=False), 4, update(1))
    assert capsys.readouterr().err.startswith("update 1/4  loss ")


def test_a_log_gets_the_first_count_the_last_and_some_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.stage("base model, test")
    for done in range(1, 1025):
        clock.now += 0.5
        lines.count(done, 1024)
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 17
    assert found[0] == "base model, test: 1/1,024 prompts  8:32 left"
    assert found[1] == "base model, test: 65/1,024 prompts  8:00 left"
    assert found[-1] == "base model, test: 1,024/1,024 prompts"
    assert all("left" in line for line in found[:-1])


def test_quick_counts_are_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.stage("test")
    for done in (10, 20, 30, 40):
        clock.now += 0.1
        lines.count(done, 40)
    assert capsys.readouterr().err == "test: 10/40 prompts  0:01 left\ntest: 40/40 prompts\n"


def test_slow_counts_break_a_silence_of_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.stage("test")
    for done in range(1, 8):
        clock.now += 25
        lines.count(done, 10_000)
    counts = re.findall(r"test: (\d)/", capsys.readouterr().err)
    assert counts == ["1", "4", "7"]


def test_inside_a_cell_only_a_long_silence_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.cell("demo--vanilla", 2, 12, 59.2)
    lines.stage("base model")
    for done in range(1, 13):
        clock.now += 10
        lines.count(done, 12)
    lines.training(4)
    lines.stage("validation")
    lines.count(1, 2)
    lines.count(2, 2)
    assert capsys.readouterr().err.splitlines() == [
        "cell 2/12  demo--vanilla  about 1:00 left",
        "base model: 6/12 prompts  1:00 left",
        "base model: 12/12 prompts",
    ]


def test_texts_without_an_end_are_counted_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.stage("labelling", "texts")
    for done in range(1, 100):
        clock.now += 1
        lines.count(done, None)
    assert capsys.readouterr().err == "labelling: 60 texts\n"


def test_what_is_not_counted_is_named_after_a_while(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(worth_seconds=0.0)
    lines.stage("reading mails.csv")
    assert lines._timer is not None
    lines._timer.join()
    assert capsys.readouterr().err == "reading mails.csv …\n"
    quick = Lines(worth_seconds=3600.0)
    quick.stage("reading mails.csv")
    timer = quick._timer
    quick.clear()
    assert timer is not None
    timer.join()
    assert capsys.readouterr().err == ""


def test_a_log_hears_of_downloads_ever_more_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    lines = Lines(clock)
    lines.stage("opening owner/large")
    timer = lines._timer
    for second in range(400):
        lines.download("owner/large", second * 10**6, 400 * 10**6)
        clock.now += 1
    lines.stage("making prompts")
    lines.clear()
    found = capsys.readouterr().err.splitlines()
    assert timer is not None
    assert timer.finished.is_set()
    assert found[0] == "downloading owner/large: 3.0 MB of 400 MB  6:37 left"
    assert found[-1] == "downloaded owner/large: 399 MB"
    assert 12 < len(found) < 25
    quick = Lines(clock)
    quick.download("owner/small", 10, 10)
    quick.clear()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [10, 1000])
def test_the_rate_is_of_late(total: int) -> None:
    clock = Time()
    rate = CountRate(clock, clock.now)
    assert rate.seconds_left is None
    for done in range(1, 5):
        clock.now += 100
        rate.add(done, total)
    for done in range(5, 30):
        clock.now += 1
        rate.add(done, total)
    assert rate.seconds_left == pytest.approx(max(total - 29, 0) * 1.0)
    clock.now += 3  # nothing came meanwhile
    assert rate.seconds_left == pytest.approx(max(total - 29 - 3, 0))
    clock.now += 10_000
    assert rate.seconds_left == 0
    assert _progress.left(rate.seconds_left) == "0:01 left"


def test_counts_that_go_on_from_stage_to_stage_share_a_rate() -> None:
    clock = Time()
    stage = Stage(clock)
    stage.begin("contextual", "prompts")
    clock.now += 10
    assert stage.count(10, 110)
    assert not stage.count(10, 110)
    stage.begin("test", "prompts")
    clock.now += 1
    assert stage.count(11, 110)
    assert stage.rate is not None
    assert stage.rate.seconds_left == pytest.approx(99)
    stage.begin("bias", "prompts")
    clock.now += 2
    assert stage.count(20, 40)
    assert stage.rate.seconds_left == pytest.approx(2)
    stage.count(5, 40)  # fewer than before: another measurement
    assert stage.rate.done == 5


def board_of(width: int) -> tuple[LiveBoard, Time]:
    clock = Time()
    console = Console(file=io.StringIO(), width=width, force_terminal=True, _environ={})
    return LiveBoard(console, clock), clock


def test_a_terminal_shows_cell_updates_and_validation_at_once() -> None:
    board, clock = board_of(120)
    board.cell("demo--trec--abft--42", 2, 4, 90.0)
    board.training(10, validate_every=2)
    assert board.lines()[1][1:] == " training  10 updates"
    clock.now += 0.5
    board.update(update(1))
    board.stage("validation")
    clock.now += 2
    board.count(16, 64)
    cell, updates, validation = board.lines()
    assert cell == "cell 2/4  demo--trec--abft--42  about 1:28 left"
    assert updates == (
        "█░░░░░░░░░░░░░░░ 1/10  loss 1.500  induction heads 3.2  A 0.500  4,000 tokens/s  "
        "212 MB  0:03 left"
    )
    assert validation[1:] == " validation  ████░░░░░░░░░░░░  16/64 prompts  0:06 left"
    board.stage("")
    assert board.lines() == [cell, updates]
    board.update(update(10))
    assert len(board.lines()) == 1
    board.training(10)
    board.stage("looking at heads")  # of a run that had no update left
    assert [line.split()[1] for line in board.lines()] == ["2/4", "looking"]
    board.clear()
    assert board.lines() == []


@pytest.mark.parametrize("width", [10, 20, 40, 80, 200])
def test_live_lines_fit_and_keep_the_figures(width: int) -> None:
    board, clock = board_of(width)
    board.cell("a-very-long-name-of-a-model--and-task--and-method--42", 3, 12, 5000.0)
    board.training(32)
    clock.now += 0.5
    board.update(update(12))
    board.stage("looking for layers with induction heads, 你好")
    clock.now += 1
    board.count(12, 64)
    board.download("mlx-community/A-Long-Name-Of-A-Model-4bit", 10**6, 10**9)
    lines = board.lines()
    assert len(lines) == 4
    assert max(map(cell_len, lines)) <= width - 1
    if width >= 40:
        assert "about 1:23:19 left" in lines[0]
        assert "12/32  0:09 left" in lines[1] if width < 100 else lines[1].endswith("0:09 left")
        assert "12/64 prompts  0:05 left" in lines[2]
        assert "1.0 MB of 1.0 GB" in lines[3]
    board.clear()


def test_live_lines_say_how_long_something_without_a_count_has_gone_on() -> None:
    board, clock = board_of(80)
    board.stage("opening mlx-community/model")
    clock.now += 1
    assert board.lines()[0][1:] == " opening mlx-community/model"
    clock.now += 64
    assert board.lines()[0][1:] == " opening mlx-community/model  1:05"
    board.clear()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (65, "1:05"), (7207, "2:00:07")]
)
def test_durations(seconds: float, text: str) -> None:
    assert _progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (3_400, "3.4 kB"), (812_345, "812 kB"), (1.25e9, "1.2 GB"), (99.96e6, "100 MB")],
)
def test_sizes(count: float, text: str) -> None:
    assert _progress.size(count) == text


@pytest.mark.parametrize(
    ("started", "on_path", "shown"),
    [
        ("{here}/.venv/bin/abft-mlx", None, ".venv/bin/abft-mlx eval 'a run'"),
        ("/opt/venv/bin/abft-mlx", None, "/opt/venv/bin/abft-mlx eval 'a run'"),
        ("{here}/.venv/bin/abft-mlx", "/usr/bin/abft-mlx", "abft-mlx eval 'a run'"),
        ("cli.py", None, "abft-mlx eval 'a run'"),
    ],
)
def test_the_next_command_can_be_copied(
    started: str,
    on_path: str | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [started.format(here=tmp_path)])
    monkeypatch.setattr("shutil.which", lambda _name: on_path)
    assert _words.command("eval", "a run") == shown
