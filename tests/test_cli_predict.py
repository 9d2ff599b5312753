"""``abft-mlx predict``: lines in, JSON Lines out, and what happens when either end stops."""

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


def ask(content: str | bytes, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=content)


def answers(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return train_run(folder, model, texts, "prompt.max_text_tokens=null")


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


def test_a_seed_that_changes_nothing_is_named(run: Path) -> None:
    result = ask(lines(ASKED[:1]), run, "--seed", 3, "--quiet")
    assert "--seed 3 is not used" in result.stderr


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


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


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
    found = table(output)
    lines_ = answers(ask("", run, source))
    assert list(found[0]) == [*rows[0], "predicted_label", "probability"]
    for row, was, answer in zip(found, rows, lines_, strict=True):
        assert {name: row[name] for name in was} == was
        assert row["predicted_label"] == answer["label"]
        most = max(answer["probabilities"].values())
        assert float(row["probability"]) == pytest.approx(most, abs=1e-6)


def test_lines_become_a_table_and_objects_keep_their_fields(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.csv"
    assert ask(lines(ASKED), run, "-o", output).exit_code == 0
    assert [row["text"] for row in table(output)] == ASKED
    assert list(table(output)[0]) == ["text", "label", "probability"]
    source, kept = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    objects = [{"id": n, "text": text, "more": {"a": [n]}} for n, text in enumerate(ASKED)]
    source.write_text("".join(json.dumps(one) + "\n" for one in objects), encoding="utf-8")
    assert ask("", run, source, "-o", kept).exit_code == 0
    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    expected = answers(ask("", run, source))
    for one, was, answer in zip(found, objects, expected, strict=True):
        assert one == {**was, **answer}
    assert ask("", run, source, "-o", tmp_path / "t.csv").exit_code == 0
    assert [json.loads(row["more"]) for row in table(tmp_path / "t.csv")] == [
        one["more"] for one in objects
    ]


BAD = ["", "caf\xe9", "good bad " * 400]


@pytest.mark.parametrize("first", [True, False])
def test_lines_that_cannot_be_used_can_be_skipped(run: Path, first: bool) -> None:
    bad = "".join(f"{line}\n" for line in BAD).encode("latin-1")
    good = lines(ASKED).encode()
    content = bad + good if first else good + bad
    result = ask(content, run, "--on-error", "skip")
    assert result.exit_code == 0, result.stderr
    assert [one["text"] for one in answers(result)] == ASKED
    assert "cannot be used: 3" in result.stderr
    assert result.stderr.count("standard input line") == 3


def test_rows_that_cannot_be_used_stay_without_a_label(run: Path, tmp_path: Path) -> None:
    texts = [ASKED[0], BAD[0], BAD[1], ASKED[3], BAD[2], ASKED[2]]
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    written = "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts)) + "8\n"
    source.write_bytes(written.encode("latin-1"))
    stopped = ask("", run, source, "-o", output)
    assert stopped.exit_code == 2
    assert not output.exists()
    result = ask("", run, source, "-o", output, "--on-error", "skip", "--json")
    assert result.exit_code == 0, result.stderr
    found = table(output)
    assert [row["id"] for row in found] == ["0", "1", "2", "3", "4", "5", "8"]
    empty = [row["id"] for row in found if not row["label"]]
    assert empty == ["1", "2", "4", "8"]
    assert all(bool(row["probability"]) == bool(row["label"]) for row in found)
    assert (document(result)["texts"], document(result)["skipped"]) == (3, 4)


def test_a_bad_file_is_seen_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "prepare", lambda *_args: pytest.fail("opened"))
    source = tmp_path / "in.csv"
    source.write_text("text\none\n   \n", encoding="utf-8")
    plain = tmp_path / "in.txt"
    plain.write_bytes(b"one\nb\xe9d\n")
    for file in (source, plain):
        assert str(file) in ask("", "demo", file).stderr
    good = tmp_path / "good.txt"
    good.write_text("one\n", encoding="utf-8")
    for output in (good, tmp_path, tmp_path / "x.xlsx", tmp_path / "no" / "x.csv"):
        result = ask("", "demo", good, "-o", output, "--overwrite")
        assert result.exit_code == 2
        assert str(output.parent) in result.stderr
    assert good.read_text(encoding="utf-8") == "one\n"


def test_the_prompt_is_shown_and_nothing_is_asked(run: Path) -> None:
    result = ask("", run, "--show-prompt", "a strange new film")
    assert result.exit_code == 0, result.stderr
    shown = document_of_demonstrations(run)
    assert result.stdout.rstrip().endswith("a strange new film label:")
    for one in shown:
        assert one["text"] in result.stdout
        assert f"label: {one['label'].split()[0]}" in result.stdout


def document_of_demonstrations(run: Path) -> list[dict[str, str]]:
    output = run.parent / "shown.jsonl"
    result = ask("a text\n", run, "-o", output, "--overwrite", "--json")
    return document(result)["demonstrations"]


def test_a_class_without_demonstration_is_a_warning(model: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.csv"
    shown.write_text("text,label\na good one,ham\na bad one,spam\n", encoding="utf-8")
    words = ("--model", model, "--demonstrations", shown, "--labels", "ham,eggs,spam", "--quiet")
    result = ask(lines(ASKED), *words)
    assert result.exit_code == 0, result.stderr
    assert "warning" in result.stderr
    assert "eggs" in result.stderr


def test_label_words_are_shown(model: Path, texts: Path) -> None:
    words = ("--model", model, "--data", texts, "--label-words", "ham=good,not spam=bad")
    result = ask("", *words, "--show-prompt", "x")
    assert result.exit_code == 0, result.stderr
    assert "label: good" in result.stdout or "label: bad" in result.stdout
    assert "ham" not in result.stdout


def test_a_threshold_leaves_doubtful_texts_unsure(run: Path, tmp_path: Path) -> None:
    plain = answers(ask(lines(ASKED), run))
    # The digits printed are rounded.
    middle = sorted(max(one["probabilities"].values()) for one in plain)[2] - 1e-5
    found = answers(ask(lines(ASKED), run, "--threshold", middle))
    assert [one["probabilities"] for one in found] == [one["probabilities"] for one in plain]
    for one, before in zip(found, plain, strict=True):
        sure = max(one["probabilities"].values()) >= middle
        assert one["label"] == (before["label"] if sure else "unsure")
    assert {one["label"] for one in found} > {"unsure"}
    table = tmp_path / "labels.csv"
    assert ask(lines(ASKED), run, "--threshold", 1, "--output", table).exit_code == 0
    with table.open(encoding="utf-8", newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"unsure"}
    assert ask(lines(ASKED), run, "--threshold", 1.5).exit_code == 2
