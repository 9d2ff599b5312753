"""``abft-mlx predict``: texts in, answers out, and what happens when either end stops."""

from __future__ import annotations

import csv
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
BAD = ["", "caf\xe9", "good bad " * 400]


def ask(content: str | bytes, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=content)


def answers(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return train_run(folder, model, texts, "prompt.max_text_tokens=null")


def test_lines_of_standard_input(run: Path, tmp_path: Path) -> None:
    result = ask(lines(ASKED), run)
    assert result.exit_code == 0, result.stderr
    rows = answers(result)
    assert [row["text"] for row in rows] == ASKED
    for row in rows:
        assert list(row) == ["text", "label", "probabilities"]
        assert list(row["probabilities"]) == ["ham", "not spam"]
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
    assert "2 demonstrations in every prompt, from " in result.stderr
    assert "tokens are computed once" in result.stderr
    assert "4 texts in 0:0" in result.stderr
    quiet = ask(lines(ASKED), "--adapter", run, "-", "--quiet", "--json")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")
    # The run's adapter is on the model: without it the answers are others.
    base = answers(ask(lines(ASKED), run / "recipe.yaml"))
    assert base[0]["probabilities"] != rows[0]["probabilities"]
    plain, objects = tmp_path / "asked.txt", tmp_path / "asked.jsonl"
    plain.write_text(lines(ASKED), encoding="utf-8")
    objects.write_text(lines([json.dumps({"body": text}) for text in ASKED]), encoding="utf-8")
    assert ask("", plain, "--adapter", run).stdout == result.stdout
    assert ask("", run, objects, "--text-column", "body").stdout == result.stdout


def test_to_a_file(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    found = document(ask(lines(ASKED), run, "--output", output, "--json"))
    assert (found["texts"], found["output"], found["adapter"]) == (4, str(output), str(run))
    assert (found["k"], len(found["demonstrations"])) == (2, 2)
    assert found["cached_tokens"] > 0
    assert output.read_text(encoding="utf-8") == ask(lines(ASKED), run).stdout
    again = ask(lines(ASKED), run, "--output", output)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    shown = ask("", run, "--show-prompt", "a strange new film").stdout
    assert shown.endswith("a strange new film label:\n")
    assert all(row["text"] in shown for row in found["demonstrations"])


def test_without_a_recipe(model: Path, texts: Path, tmp_path: Path) -> None:
    drawn = ask(lines(ASKED), "--model", model, "--data", texts, "--seed", 3)
    other = ask(lines(ASKED), "--model", model, "--data", texts, "--seed", 4)
    assert len(answers(drawn)) == len(answers(other)) == 4
    assert other.stdout != drawn.stdout
    shown = tmp_path / "shown.csv"
    shown.write_text("text,label\na good one,ham\na dull one,spam\n", encoding="utf-8")
    words = ("--model", model, "--demonstrations", shown, "--batch-tokens", 64)
    result = ask(lines(ASKED), *words, "--labels", "ham,eggs,spam", "--label-words", "ham=good")
    assert len(answers(result)) == 4, result.stderr
    assert f"2 demonstrations in every prompt, from {shown}:" in result.stderr
    assert "warning: no demonstration has label eggs" in result.stderr
    assert (
        "label: good" in ask("", *words, "--label-words", "ham=good", "--show-prompt", "x").stdout
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"caf\xe9\n", "standard input line 3: the text is not UTF-8 (byte 0xe9)"),
        (b"good bad " * 400 + b"\n", "standard input line 3 is "),
    ],
)
def test_a_bad_line_ends_it_and_loses_nothing(bad: bytes, message: str, run: Path) -> None:
    content = lines(ASKED[:2]).encode() + bad + lines(ASKED[2:]).encode()
    result = ask(content, run, "--quiet", "--json")
    assert result.exit_code == 2
    *rows, last = answers(result)
    assert [row["text"] for row in rows] == ASKED[:2]
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr == f"error: {last['error']['message']}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("asked.txt",), "--model is missing"),
        (("--model", "demo"), "--demonstrations can stand for --data"),
        (("demo", "missing.txt"), "missing.txt: no such file"),
        (("demo", "asked.pdf"), "files ending in '.pdf' are not read"),
        (("demo", "--demonstrations", "missing.csv"), "missing.csv: no such file"),
        (("demo", "--output", "no/such/folder/a.jsonl"), "no such folder: no/such/folder"),
        (("demo", "--output", "a.xlsx"), ".xlsx files are not written"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = ask("a text\n", *arguments, "--quiet")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("leaves", [False, True])
def test_answers_come_before_the_input_ends(run: Path, checkout: Path, leaves: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, checkout / "cli.py", "predict", run, "-", "--quiet"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    watchdog = threading.Timer(300, process.kill)
    watchdog.daemon = True
    watchdog.start()
    assert process.stdin
    assert process.stdout
    assert process.stderr
    for text in ASKED[:2]:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    if leaves:  # the reader of the answers, which is no error
        process.stdout.close()
        process.stdin.write(lines(ASKED * 50))
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() in ((0, 1) if leaves else (0,))
    process.stderr.close()
    process.stdout.close()
    watchdog.cancel()


def test_a_table_keeps_its_columns_and_gets_labels(run: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(7 + n), "text": f'{text}, "quoted"\nand more', "label": "old", "é": "ü"}
        for n, text in enumerate(ASKED)
    ]
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    with source.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    result = ask("", run, source, "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    assert output.read_bytes().startswith(b"\xef\xbb\xbf")  # as it came
    for row, was, answer in zip(table(output), rows, answers(ask("", run, source)), strict=True):
        assert list(row) == [*was, "predicted_label", "probability"]
        assert {name: row[name] for name in was} == was
        assert row["predicted_label"] == answer["label"]
        most = max(answer["probabilities"].values())
        assert float(row["probability"]) == pytest.approx(most, abs=1e-6)


def test_objects_keep_their_fields(run: Path, tmp_path: Path) -> None:
    source, kept, cells = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.csv"))
    objects = [{"id": n, "text": text, "more": {"a": [n]}} for n, text in enumerate(ASKED)]
    source.write_text(lines([json.dumps(row) for row in objects]), encoding="utf-8")
    assert ask("", run, source, "-o", kept).exit_code == 0
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    expected = answers(ask("", run, source))
    assert rows == [{**was, **answer} for was, answer in zip(objects, expected, strict=True)]
    assert ask("", run, source, "-o", cells).exit_code == 0
    assert [json.loads(row["more"]) for row in table(cells)] == [row["more"] for row in objects]


def test_what_cannot_be_used_can_be_skipped(run: Path, tmp_path: Path) -> None:
    content = lines([BAD[2], *ASKED[:1], *BAD[:2], *ASKED[1:]]).encode("latin-1")
    result = ask(content, run, "--on-error", "skip")
    assert [row["text"] for row in answers(result)] == ASKED, result.stderr
    assert "cannot be used: 3" in result.stderr
    assert result.stderr.count("standard input line") == 3
    texts = [ASKED[0], BAD[0], BAD[1], ASKED[3], BAD[2], ASKED[2]]
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    written = "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)) + "8\n"
    source.write_bytes(written.encode("latin-1"))
    assert ask("", run, source, "-o", output).exit_code == 2
    assert not output.exists()
    found = document(ask("", run, source, "-o", output, "--on-error", "skip", "--json"))
    rows = table(output)
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "5", "8"]
    assert [row["id"] for row in rows if not row["label"]] == ["1", "2", "4", "8"]
    assert all(bool(row["probability"]) == bool(row["label"]) for row in rows)
    assert (found["texts"], found["skipped"]) == (3, 4)


def test_a_bad_file_is_seen_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "prepare", lambda *_args: pytest.fail("opened"))
    for name, content in (("in.csv", b"text\none\n   \n"), ("in.txt", b"one\nb\xe9d\n")):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in ask("", "demo", tmp_path / name).stderr
    good = tmp_path / "good.txt"
    good.write_text("one\n", encoding="utf-8")
    for output in (good, tmp_path):
        result = ask("", "demo", good, "-o", output, "--overwrite")
        assert result.exit_code == 2
        assert str(output) in result.stderr
    assert good.read_text(encoding="utf-8") == "one\n"


def test_a_threshold_leaves_doubtful_texts_unsure(run: Path) -> None:
    plain = answers(ask(lines(ASKED), run))
    # The digits printed are rounded.
    middle = sorted(max(row["probabilities"].values()) for row in plain)[2] - 1e-5
    result = ask(lines(ASKED), run, "--threshold", middle, "--seed", 3)
    assert "--seed 3 is not used" in result.stderr
    for row, before in zip(answers(result), plain, strict=True):
        sure = max(row["probabilities"].values()) >= middle
        assert row == before | ({} if sure else {"label": "unsure"})
    assert {row["label"] for row in answers(result)} > {"unsure"}
