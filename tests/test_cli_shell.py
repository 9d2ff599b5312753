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
from abft_mlx.errors import DataError, RecipeError, RunError

HEAVY = ("mlx", "mlx_lm", "numpy", "yaml", "huggingface_hub", "transformers", "torch")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [[], ["finetune"], ["recipes", "list"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    # Typer itself imports pydantic when it reads a command's options, but not for the first page.
    heavy = HEAVY if words else (*HEAVY, "pydantic")
    program = (
        "import sys\n"
        "from abft_mlx.cli import app\n"
        f"try:\n    app({[*words, '--help']!r}, prog_name='abft-mlx')\n"
        "except SystemExit as stop:\n    print('exit', stop.code)\n"
        f"print('heavy', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Usage: abft-mlx" in done.stdout
    assert done.stdout.endswith("exit 0\nheavy []\n"), done.stdout[-200:]
    assert done.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_page_of_help_has_two_examples_and_the_short_options(name: str) -> None:
    page = invoke(name, "--help").stdout
    assert page.count("\n    abft-mlx ") == 2
    for long in ("--output", "--model", "--data"):
        assert f"  {long} " not in page  # its short form stands before it
    assert "(--" not in page


def test_the_first_page_groups_the_commands() -> None:
    lines = invoke("--help").stdout.partition("\nUse:")[2].splitlines()
    parts = [line for line in lines if line.endswith(":")]
    assert parts == ["Look:", "Share:", "Research:", "Check:"]
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == COMMANDS
    assert not [line for line in lines if line.endswith("...")]
    assert "Usage:" in invoke().output


def test_checkout_runs_as_cli_py(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, checkout / "cli.py", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"abft-mlx {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["finetun"], ["'finetun'", "Did you mean 'finetune'?"]),
        (["--modle"], ["--modle", "abft-mlx --help"]),
        (["eval", "--modle", "x"], ["--modle", "eval --help"]),
        (
            ["finetune", "demo", "--updates", "-1"],
            ["--updates", "'-1'", "equal to 0", "finetune --help"],
        ),
        (["finetune", "demo", "--updates", "many"], ["--updates", "'many'", "integer"]),
        (["predict", "demo", "--threshold", "2"], ["--threshold", "'2'", "equal to 1"]),
        (["predict", "demo", "-o", ""], ["--output", "the path is empty"]),
        (["export", "run", "--to", "foo", "-o", "x"], ["--to", "'foo'", "'mlx', 'peft', 'fused'"]),
        (["export", "run", "-o", "x"], ["--to", "export --help"]),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], parts: list[str]) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts), result.stderr
    if len(arguments) > 1:
        error = document(invoke(*arguments, "--json"))["error"]
        assert error["kind"] == "UsageError"
        assert f"error: {error['message']}\n" == result.stderr


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make ``recipes show`` fail in a way of the test's choosing."""

    def arrange(error: BaseException) -> None:
        def fail(_name: object) -> None:
            raise error

        monkeypatch.setattr(recipe, "find", fail)

    return arrange


@pytest.mark.parametrize(
    ("error", "status", "line", "kind"),
    [
        (RunError("the disk\nis full"), 1, "the disk is full", "RunError"),
        (RecipeError("no such key"), 2, "no such key", "RecipeError"),
        (KeyboardInterrupt(), 130, "interrupted", "Interrupted"),
        (
            RuntimeError("[malloc] Unable to allocate 9 bytes."),
            1,
            f"out of memory: [malloc] Unable to allocate 9 bytes.; {shell.WAYS_OUT}",
            "RunError",
        ),
        (OSError(errno.ENOSPC, "No space left"), 1, "No space left", "OSError"),
        (PermissionError(errno.EACCES, "denied", "/x"), 2, "/x: denied", "PermissionError"),
        (OSError(errno.EIO, "Input/output error", "/x"), 1, "/x: Input/output error", "OSError"),
    ],
)
def test_failures_are_one_line(
    failing, error: BaseException, status: int, line: str, kind: str
) -> None:
    failing(error)
    result = invoke("recipes", "show", "x")
    assert (result.exit_code, result.stderr, result.stdout) == (status, f"error: {line}\n", "")
    result = invoke("recipes", "show", "x", "--json")
    assert (result.exit_code, result.stderr) == (status, f"error: {line}\n")
    assert document(result)["error"] == {"kind": kind, "message": line, "problems": []}


def test_five_kinds_of_problems_of_the_data_are_listed(failing) -> None:
    problems = [f"row {row}: the text is empty" for row in range(1, 26)]
    problems += [f"row {row}: label {name!r} is unknown" for row, name in enumerate("abcdef")]
    failing(DataError("x.csv: 31 problems", problems))
    result = invoke("recipes", "show", "x", "--json")
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (2, 7)
    assert lines[0] == "error: x.csv: 31 problems"
    assert "24 more" in lines[1]
    assert "2 more" in lines[6]
    assert document(result)["error"]["problems"] == problems


def test_a_bug_shows_its_traceback_and_a_reader_that_leaves_is_no_error(failing) -> None:
    failing(ZeroDivisionError("a bug"))
    assert isinstance(invoke("recipes", "show", "x").exception, ZeroDivisionError)
    failing(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    result = invoke("recipes", "show", "x")
    assert (result.exit_code, result.stderr) == (1, "")


def test_what_goes_where(capsys: pytest.CaptureFixture[str]) -> None:
    as_json = shell.Shell(as_json=True)
    with as_json.speaking():
        print("a library talks")
        as_json.say("so do we")
    as_json.document({"rate": float("nan"), "name": "é", "rows": (1, 2)})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"rate": None, "name": "é", "rows": [1, 2]}
    assert captured.err == "a library talks\nso do we\n"
    quiet = shell.Shell(as_json=False, quiet=True)
    quiet.say("on the way")
    quiet.tell("there: [not markup]")
    quiet.document({"never": "printed"})
    assert capsys.readouterr().out == "there: [not markup]\n"


@pytest.mark.parametrize(
    ("started", "on_path", "shown"),
    [
        ("{here}/.venv/bin/abft-mlx", None, ".venv/bin/abft-mlx eval 'a run'"),
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
