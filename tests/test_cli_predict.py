"""``abft-mlx predict``: lines in, JSON Lines out, and what happens when either end stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_support import document, train_run
from typer.testing import CliRunner, Result

from abft_mlx import prediction
from abft_mlx.cli import app

ASKED = ["the good film", "a dull film, and long", "weather", "the lovely music played on and on"]


def ask(content: str | bytes, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=content)


def answers(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "first", model, texts)


def test_lines_of_standard_input(run: Path) -> None:
    result = ask(lines(ASKED), run)
    assert result.exit_code == 0, result.stderr
    found = answers(result)
    assert [one["text"] for one in found] == ASKED
    for one in found:
        assert list(one) == ["text", "label", "probabilities"]
        assert list(one["probabilities"]) == ["ham", "not spam"]
        assert sum(one["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)
    assert "2 demonstrations in every prompt, from " in result.stderr
    assert "tokens are computed once" in result.stderr
    assert "4 texts in 0:0" in result.stderr
    for same in ((run, "-"), ("--adapter", run), ("--adapter", run, "-"), (run, "-", "--json")):
        assert ask(lines(ASKED), *same).stdout == result.stdout
    quiet = ask(lines(ASKED), run, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")
    # The run's adapter is on the model: without it the answers are others.
    base = answers(ask(lines(ASKED), run / "recipe.yaml"))
    assert base[0]["probabilities"] != found[0]["probabilities"]


def test_a_run_without_its_adapter_is_not_taken_for_its_base(run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    result = ask(lines(ASKED), tmp_path, "--quiet", "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["kind"] == "AdapterError"


def test_files_give_the_same(run: Path, tmp_path: Path) -> None:
    expected = ask(lines(ASKED), run).stdout
    plain = tmp_path / "asked.txt"
    plain.write_text(lines(ASKED), encoding="utf-8")
    rows = tmp_path / "asked.jsonl"
    rows.write_text("".join(json.dumps({"body": one}) + "\n" for one in ASKED), encoding="utf-8")
    assert ask("", run, plain).stdout == expected
    assert ask("", run, rows, "--text-column", "body").stdout == expected
    assert ask("", plain, "--adapter", run).stdout == expected


def test_to_a_file(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    result = ask(lines(ASKED), run, "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found["texts"] == 4
    assert found["output"] == str(output)
    assert found["adapter"] == str(run)
    assert (found["k"], len(found["demonstrations"])) == (2, 2)
    assert found["cached_tokens"] > 0
    assert output.read_text(encoding="utf-8") == ask(lines(ASKED), run).stdout
    again = ask(lines(ASKED), run, "--output", output)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    spoken = ask(lines(ASKED[:1]), run, "--output", output, "--overwrite")
    assert spoken.exit_code == 0
    assert "1 texts in" in spoken.stdout
    assert len(output.read_text(encoding="utf-8").splitlines()) == 1


def test_without_a_recipe(model: Path, texts: Path) -> None:
    drawn = ask(lines(ASKED), "--model", model, "--data", texts, "--seed", 3)
    assert drawn.exit_code == 0, drawn.stderr
    assert len(answers(drawn)) == 4
    other = ask(lines(ASKED), "--model", model, "--data", texts, "--seed", 4)
    assert other.stdout != drawn.stdout


def test_with_nothing_but_demonstrations(model: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.csv"
    shown.write_text("text,label\na good one,ham\na dull one,not spam\n", encoding="utf-8")
    result = ask(lines(ASKED), "--model", model, "--demonstrations", shown, "--batch-tokens", 64)
    assert result.exit_code == 0, result.stderr
    assert len(answers(result)) == 4
    assert f"2 demonstrations in every prompt, from {shown}:" in result.stderr


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\n", "standard input line 3: the text is empty"),
        (b"caf\xe9\n", "standard input line 3 is not UTF-8 (byte 0xe9)"),
        (b"good bad " * 400 + b"\n", "standard input line 3 is "),
    ],
)
def test_a_bad_line_ends_it_and_loses_nothing(bad: bytes, message: str, run: Path) -> None:
    content = lines(ASKED[:2]).encode() + bad + lines(ASKED[2:]).encode()
    result = ask(content, run, "--quiet")
    assert result.exit_code == 2
    assert result.stdout == ask(lines(ASKED[:2]), run).stdout
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    as_json = ask(content, run, "--quiet", "--json")
    *found, last = answers(as_json)
    assert len(found) == 2
    assert set(last["error"]) == {"kind", "message", "problems"}


def test_empty_lines_can_be_dropped_or_kept(run: Path) -> None:
    content = f"{ASKED[0]}\n\n{ASKED[1]}\n"
    dropped = ask(content, run, "--set", "data.empty_texts=drop", "--quiet")
    assert [one["text"] for one in answers(dropped)] == ASKED[:2]
    assert dropped.stderr == "texts left out because they are empty: 1\n"
    kept = ask(content, run, "--set", "data.empty_texts=keep", "--quiet")
    assert [one["text"] for one in answers(kept)] == [ASKED[0], "", ASKED[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model is missing: without a recipe or a run folder"),
        (("--model", "demo"), "--data or --demonstrations is missing"),
        (("asked.txt",), "--model is missing"),
        (("demo", "missing.txt"), "missing.txt: no such file"),
        (("demo", "asked.pdf"), "files ending in '.pdf' are not read"),
        (("dmeo", "-"), "no recipe is called 'dmeo': did you mean demo?"),
        (("demo", "--demonstrations", "missing.csv"), "missing.csv: no such file"),
        (("demo", "--output", "no/such/folder/a.jsonl"), "no such folder: no/such/folder"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = ask("a text\n", *arguments, "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_interrupted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prediction.Predictor.predict

    def interrupt(self: prediction.Predictor, arrivals: Any) -> Any:
        yield next(whole(self, arrivals))
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction.Predictor, "predict", interrupt)
    result = ask(lines(ASKED), run, "--quiet")
    assert result.exit_code == 130
    assert len(answers(result)) == 4
    assert result.stderr == "error: interrupted\n"


def start(checkout: Path, run: Path) -> subprocess.Popen[str]:
    """The command in a process, which is ended where it would keep the test waiting."""
    process = subprocess.Popen(
        [sys.executable, checkout / "cli.py", "predict", run, "-", "--quiet"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    watchdog = threading.Timer(60, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


def test_answers_come_before_the_input_ends(run: Path, checkout: Path) -> None:
    process = start(checkout, run)
    assert process.stdin
    assert process.stdout
    for text in ASKED[:2]:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    rest, errors = process.communicate()
    assert (rest, errors, process.returncode) == ("", "", 0)


def test_a_reader_that_leaves_ends_it_quietly(run: Path, checkout: Path) -> None:
    process = start(checkout, run)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write(f"{ASKED[0]}\n")
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(lines(ASKED * 50))
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 1)
    process.stderr.close()
