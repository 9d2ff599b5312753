"""How every command starts and fails: quick help, exit status, one line, one JSON document."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from cli_support import document, invoke

from abft_mlx import __version__, recipe
from abft_mlx.cli import app, shell, words
from abft_mlx.errors import DataError, OutputError, RecipeError, RunError

HEAVY = ("mlx", "mlx_lm", "numpy", "yaml", "huggingface_hub", "transformers", "torch")
COMMANDS = ("demo", "finetune", "eval", "predict", "study", "recipes", "doctor")


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS), ["recipes", "list"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    # Typer itself imports pydantic when it reads a command's options, but not for the first page.
    heavy = HEAVY if words else (*HEAVY, "pydantic")
    done = python(
        "import sys\n"
        "from abft_mlx.cli import app\n"
        f"try:\n    app({[*words, '--help']!r}, prog_name='abft-mlx')\n"
        "except SystemExit as stop:\n    print('exit', stop.code)\n"
        f"print('heavy', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    assert "Usage: abft-mlx" in done.stdout
    assert done.stdout.endswith("exit 0\nheavy []\n"), done.stdout[-200:]
    assert done.stderr == ""


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))  # type: ignore
def test_every_page_of_help_has_two_examples_and_the_short_options(name: str) -> None:
    page = invoke(name, "--help").stdout
    assert page.count("\n    abft-mlx ") == 2
    for long in ("--output", "--model", "--data"):
        assert f"  {long} " not in page  # its short form stands before it
    assert "<<" not in page
    assert "(--" not in page


def test_the_first_page_groups_the_commands() -> None:
    page = invoke("--help").stdout
    parts = ["Use:", "Look:", "Share:", "Research:", "Check:"]
    assert [line for line in page.splitlines() if line in parts] == parts
    assert not [
        line for line in page.splitlines() if line.startswith("  ") and line.endswith("...")
    ]


def test_nothing_at_all_is_help() -> None:
    result = invoke()
    assert "Usage:" in result.output
    assert result.exit_code == 2


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"abft-mlx {__version__}\n")


def test_checkout_runs_as_cli_py(checkout: object) -> None:
    done = subprocess.run(
        [sys.executable, f"{checkout}/cli.py", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"abft-mlx {__version__}\n")


def test_unknown_command_suggests_one() -> None:
    result = invoke("finetun")
    assert result.exit_code == 2
    assert "No such command 'finetun'. Did you mean 'finetune'?" in result.stderr


def test_unknown_option_as_json() -> None:
    result = invoke("eval", "--json", "--modle", "x")
    assert result.exit_code == 2
    error = document(result)["error"]
    assert error["kind"] == "UsageError"
    assert "--modle" in error["message"]
    assert "--modle" in result.stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make ``recipes show`` fail in a way of the test's choosing."""

    def arrange(error: BaseException) -> None:
        def fail(_name: object) -> None:
            raise error

        monkeypatch.setattr(recipe, "find", fail)

    return arrange


FAILURES = [
    (RunError("the disk\nis full"), 1, "error: the disk is full\n"),
    (RecipeError("no such key"), 2, "error: no such key\n"),
    (OutputError("x exists"), 2, "error: x exists\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (MemoryError(), 1, f"error: out of memory: the machine has no more; {shell.WAYS_OUT}\n"),
    (
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        1,
        f"error: out of memory: [malloc] Unable to allocate 9 bytes.; {shell.WAYS_OUT}\n",
    ),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\n"),
    (
        PermissionError(errno.EACCES, "Permission denied", "/root/x"),
        2,
        "error: /root/x: Permission denied\n",
    ),
    (OSError(errno.EIO, "Input/output error", "/x"), 1, "error: /x: Input/output error\n"),
]


@pytest.mark.parametrize(("error", "status", "line"), FAILURES)
def test_failures_are_one_line(failing, error: BaseException, status: int, line: str) -> None:
    failing(error)
    result = invoke("recipes", "show", "x")
    assert (result.exit_code, result.stderr, result.stdout) == (status, line, "")


@pytest.mark.parametrize(("error", "status", "line"), FAILURES)
def test_failures_as_json(failing, error: BaseException, status: int, line: str) -> None:
    failing(error)
    result = invoke("recipes", "show", "x", "--json")
    assert (result.exit_code, result.stderr) == (status, line)
    found = document(result)["error"]
    assert found["problems"] == []
    assert " ".join(found["message"].split()) == line.removeprefix("error: ").rstrip()
    kinds = {KeyboardInterrupt: "Interrupted", MemoryError: "RunError", RuntimeError: "RunError"}
    assert found["kind"] == kinds.get(type(error), type(error).__name__)


def test_five_kinds_of_problems_of_the_data_are_listed(failing) -> None:
    problems = [f"row {row}: the text is empty" for row in range(1, 26)]
    problems += [f"row {row}: label {name!r} is unknown" for row, name in enumerate("abcdef")]
    failing(DataError("x.csv: 31 problems", problems))
    result = invoke("recipes", "show", "x", "--json")
    lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert lines[0] == "error: x.csv: 31 problems"
    assert len(lines) == 7
    assert "row 1: the text is empty" in lines[1]
    assert "24 more" in lines[1]
    assert "'d'" in lines[5]
    assert "2 more" in lines[6]
    assert json.loads(result.stdout)["error"]["problems"] == problems


def test_a_bug_shows_its_traceback(failing) -> None:
    failing(ZeroDivisionError("a bug"))
    result = invoke("recipes", "show", "x")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_reader_that_stops_reading_is_no_error(failing) -> None:
    failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    result = invoke("recipes", "show", "x")
    assert result.exit_code == 1
    assert result.stderr == ""


def test_stray_prints_do_not_reach_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    said = shell.Shell(as_json=True)
    with said.speaking():
        print("a library talks")
        said.say("so do we")
    said.document({"rate": float("nan"), "name": "é", "rows": (1, 2)})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"rate": None, "name": "é", "rows": [1, 2]}
    assert captured.err == "a library talks\nso do we\n"


def test_quiet_keeps_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    said = shell.Shell(as_json=False, quiet=True)
    said.say("on the way")
    said.tell("there: [not markup]")
    said.document({"never": "printed"})
    assert capsys.readouterr().out == "there: [not markup]\n"


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
    assert words.command("eval", "a run") == shown
