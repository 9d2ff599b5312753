"""Progress: what a log, a terminal and a quiet command show of a run's updates."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from abft_mlx.cli import _progress, _words
from abft_mlx.cli._shell import Shell
from abft_mlx.trainer import Update


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
    with _progress.updates(shell, total) as display:
        for one in updates:
            display.update(one)


def test_a_log_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Shell(as_json=False), 64, *(update(step) for step in range(1, 65)))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 17
    assert lines[0] == (
        "update  1/64  loss 1.500  induction heads 3.2  A 0.500  4,000 tokens/s  212 MB  0:32 left"
    )
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


def test_quiet_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Shell(as_json=False, quiet=True), 4, update(1), update(4))
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
    assert "4/4" in captured.err
    assert "induction heads 3.2" in captured.err


def test_evaluation_counts_prompts_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with _progress.prompts(Shell(as_json=False), "before") as on_progress:
        on_progress(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with _progress.prompts(Shell(as_json=False), "before") as on_progress:
        on_progress(2, 2)
    assert "2/2" in capsys.readouterr().err


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
