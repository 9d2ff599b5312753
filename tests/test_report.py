"""A run's report without a browser: what is written, from what, and what is said."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from made_cells import cell, failed, study
from made_runs import HOSTILE, evaluation, heads, run_json, update, write_run

from abft_mlx.analysis import write_study
from abft_mlx.analysis.report import LEVELS, visible, write_report
from abft_mlx.evaluation import verdict
from abft_mlx.induction import read_heads

UPDATES = [update(n) for n in range(1, 13)]


class Parsed(HTMLParser):
    """Elements with their attributes, and tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", heads(examples=2), updates=UPDATES, measured=evaluation())


def page(folder: Path, **options: Any) -> str:
    """A report's text, without charts by default."""
    path = write_report(folder, **{"figures": False, **options}).path
    return path.read_text(encoding="utf-8")


def words_of(text: str) -> str:
    """What a reader reads."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text.partition("<body>")[2])).split())


def data_of(text: str) -> Any:
    """The numbers in a page."""
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text)
    assert found
    return json.loads(found[1])


def test_the_page_stands_alone(run: Path, tmp_path: Path) -> None:
    report = write_report(run, figures=False)
    text = report.path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert parsed.open == []
    assert (report.path, report.kind, report.missing) == (run / "report.html", "run", [])
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert name not in ("src", "action", "srcdoc"), (tag, name)
            assert not name.startswith("on")
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for t, a in parsed.elements if "http-equiv" in a and t == "meta"]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    sheet = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in sheet
    assert "@import" not in sheet
    assert page(run, output=tmp_path / "other.html") == text, "the same files, the same bytes"


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    labels = ("</script><script>alert(1)", "<!--")
    seen = heads(tokens=HOSTILE * 3, labels=labels)
    folder = write_run(
        tmp_path / "run", seen, measured=evaluation([[1, 1], [1, 1]], [[2, 0], [0, 2]], labels),
        model={"source": "<svg onload=alert(1)>"},
    )  # fmt: skip
    text = page(folder)
    parsed = Parsed(text)
    assert parsed.open == []
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert "<!--" not in text.partition("<body>")[2]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ud800-\udfff]", text)
    assert visible("a\x00b\x1b\u202ec\ud800\r\x85") == (
        "a[U+0000]b[U+001B][U+202E]c\ufffd[U+000D][U+0085]"
    )
    assert visible("a\n\tb é 注意 👩‍👩") == "a\n\tb é 注意 👩‍👩"


@pytest.mark.parametrize("without", [(0, 1, 2), (0, 2)])
def test_models_without_heads_in_some_layer_or_any(
    tmp_path: Path, without: tuple[int, ...]
) -> None:
    folder = write_run(tmp_path / "run", heads(without=without))
    report = write_report(folder, figures=False)
    nowhere = len(without) == 3
    assert any("the model has no attention heads" in one for one in report.missing) == nowhere
    text = report.path.read_text(encoding="utf-8")
    assert ('id="attention-panel"' in text) != nowhere


def test_the_command_and_its_document(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    result = invoke("report", run, "--output", target, "--json", "--no-figures")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert found.pop("sections")[:3] == ["Result", "Attention over the prompts", "Training"]
    assert found == {
        "schema": 1, "kind": "run", "output": str(target), "bytes": target.stat().st_size,
        "missing": [],
    }  # fmt: skip
    (run / "heads.npz").unlink()
    loud, quiet = (invoke("report", run, "--no-figures", *more) for more in ([], ["--quiet"]))
    note = "note: not in the report: RUN holds no heads.npz; abft-mlx heads RUN writes it"
    assert note in loud.stdout
    assert re.fullmatch(rf"wrote {re.escape(str(run))}/report.html \([\d.]+ kB\)\n", quiet.stdout)


def test_where_a_report_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.html").write_text("dear all", encoding="utf-8")
    for source, output, message in (
        (tmp_path / "nowhere", None, "there is no such run or study"),
        (tmp_path, None, "holds neither a run"),
        (run, tmp_path, "cannot be written"),
        (run, tmp_path / "letter.html", "is no report of abft-mlx"),
        (run, tmp_path / "nowhere" / "page.html", "cannot be written"),
        (run / "heads.npz", None, "cannot be read"),
    ):
        result = invoke("report", source, "--no-figures", *(["--output", output] if output else []))
        assert result.exit_code == 2, (source, output, result.stderr)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "letter.html").read_text(encoding="utf-8") == "dear all"


def test_what_was_trained_and_what_came_of_it(run: Path) -> None:
    text = page(run)
    words = words_of(text)
    for sentence in (
        "Which mails are unwanted.",
        "ABFT trained 36,864 parameters, LoRA of rank 16 on W_Q and W_K, in the model tiny on "
        "mails.csv (3 labels), prompts of 4 demonstrations.",
        "12 updates of 384 prompts in all took 5.66 s, with 22.0 MB of MLX's memory at the peak "
        "(a machine); the adapter is 148.7 kB.",
        "Accuracy (vanilla) 41.7% → 83.3% , +41.7 points (95% interval with the adapter 80.3% to "
        "85.3%, n = 12).",
        "n = 12 prompts; 4 demonstrations each; test prompts and demonstrations drawn with seed 42;"
        " one training, with seed 42",
        "On the same prompts, the adapter (vanilla) is right 31 times where the base (vanilla) is "
        "wrong, and wrong 4 times where that is right (exact McNemar test, p < 0.001).",
        "$ca_t$ taken for ham: 1",
        "python 3.11.7, mlx 0.32.4",
        "data 42, training 42, evaluation 42",
        "sha256:5d",
        "abft-mlx finetune recipe.yaml --output NEW",
    ):
        assert sentence in words, sentence
    assert (run / "recipe.yaml").read_text().splitlines()[1].strip() in words
    assert "secret" not in text, "the path of eval.json's adapter"
    assert "/home/someone" not in text


def test_a_verdict_stands_beside_the_baselines(run: Path) -> None:
    measured = evaluation()
    for side, right in ((measured, "101010101011"), (measured["base"], "000000000000")):
        side["methods"]["classifier"] = {**side["methods"]["vanilla"], "right": right}
    measured["baselines"] = {
        "majority": {"label": "<ham>", "accuracy": 0.5},
        "bag_of_words": {"accuracy": 0.75, "right": "01" * 6},
    }
    measured["verdict"] = verdict(measured)
    (run / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    text = page(run)
    words = words_of(text)
    assert measured["verdict"]["sentence"] in words
    for row in ("with the adapter 83.3%", "prompting 41.7%", "bag of words 75.0%"):
        assert row in words
    assert "always &lt;ham&gt;" in text
    assert "Recall of each label: ham 100.0%" in words
    assert measured["verdict"]["next"] in words


def test_the_numbers_are_those_of_the_file(run: Path, tmp_path: Path) -> None:
    seen = read_heads(run / "heads.npz")
    panel = data_of(page(run))
    assert (panel["layers"], panel["heads"], panel["prompts"]) == (3, 2, 64)
    assert list(panel["measures"]) == ["magnitude", "correctness", "share", "sink"]
    for measure, known in panel["measures"].items():
        for name, state in seen.states.items():
            table = getattr(state, measure).ravel()
            np.testing.assert_allclose(known["values"][name], table, atol=5e-6)
    change = np.abs(seen.states["after"].correctness - seen.states["before"].correctness)
    assert panel["start"] == change.argmax()
    for example, packed in zip(seen.examples, panel["examples"], strict=True):
        assert packed["labels"] == example.label_positions.tolist()
        for name, rows in example.rows.items():
            part = packed["states"][name]
            levels = np.frombuffer(zlib.decompress(base64.b64decode(part["rows"])), np.uint8)
            values = levels.reshape(rows.shape) * np.reshape(part["scales"], (3, 2, 1))
            assert np.abs(values - rows).max() <= 0.5 / LEVELS * rows.max() + 1e-6
            on_right = rows[:, :, example.label_positions[example.right]].sum(axis=-1)
            np.testing.assert_allclose(part["right"], on_right.ravel(), atol=6e-6)
    # Head weights, and the classic detectors where all states have them.
    seen = heads(detected=True)
    weight = np.arange(6.0).reshape(3, 2)
    states = {**seen.states, "after": replace(seen.states["after"], weight=weight)}
    measures = data_of(page(write_run(tmp_path / "w", replace(seen, states=states))))["measures"]
    assert measures["weight"]["values"]["after"] == weight.ravel().tolist()
    for key in ("previous_token", "duplicate_token", "induction"):
        for name, state in seen.states.items():
            table = getattr(state.detected, key).ravel()
            np.testing.assert_allclose(measures[key]["values"][name], table, atol=5e-6)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", shift=None, validation=None, finished=False)
    report = write_report(folder, figures=False)
    text = report.path.read_text(encoding="utf-8")
    for command in ("abft-mlx eval RUN", "abft-mlx heads RUN"):
        assert any(command in reason for reason in report.missing)
        assert command in text
    assert any("metrics.jsonl" in reason for reason in report.missing)
    assert str(tmp_path) not in text
    assert "This run is not finished." in text
    assert 'id="attention-panel"' not in text
    validation = run_json()["validation"]
    text = page(write_run(tmp_path / "validated", validation=validation))
    assert "Validation accuracy <strong>25.0% → 62.0%</strong> (n = 64)." in text


def test_a_base_alone_and_a_read_out(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", heads(states=("before",)), kind="read_out", updates=UPDATES
    )
    text = page(folder, figures=True)
    assert "the loss is the cross-entropy of the label" in text
    assert "The label-attention read-out trained" in text
    assert ">punish" not in text
    assert 'name="state"' not in text


def test_charts_are_drawn_and_their_ids_differ(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    text = page(run, figures=True, tell=told.append)
    names = ["confusion", "reliability", "attention-1", "attention-2", "training",
             "label-attention", "shift"]  # fmt: skip
    assert told == [f"drawing {name}" for name in names]
    assert re.findall(r'<figure class="panel drawn" id="figure-([^"]+)"', text) == names
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert {*links} <= set(ids)
    assert re.search(r"<text[^>]*>induction heads</text>", text)
    assert text.count("<style") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = write_report(run, tmp_path / "without.html")
    (note,) = report.missing
    assert note == "figures: matplotlib is not installed; pip install 'abft-mlx[plots]'"


@pytest.fixture
def studied(tmp_path: Path) -> Path:
    cells = [
        cell("untrained", "0110" * 8),
        *(cell("abft", "0111" * 8, seed=n) for n in (1, 2)),
        cell("own <method>", "0101" * 8, seed=1, like="abft"),
        failed(error="it | broke"),
    ]
    folder = tmp_path / "study"
    write_study(folder, study(name="mails", figures=["accuracy", "shift"]), cells)
    return folder


def test_a_study_from_its_folder_and_from_its_file(studied: Path, tmp_path: Path) -> None:
    report = write_report(studied)
    text = report.path.read_text(encoding="utf-8")
    assert report.kind == "study"
    assert report.missing == ["shift: not drawn: no cell that is done measured what it shows"]
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress((studied / "study.json").read_bytes()))
    again = write_report(packed)
    assert again.path == tmp_path / "packed.html"
    assert again.path.read_text(encoding="utf-8") == text
    assert Parsed(text).open == []
    assert "own &lt;method&gt;" in text
    assert '<td class="words">it | broke</td>' in text
    for row in (studied / "table.md").read_text(encoding="utf-8").splitlines():
        if row.startswith("| demo "):
            assert all(html.escape(one.strip()) in text for one in row.strip("|").split("|"))


def test_a_broken_study_is_one_line(studied: Path) -> None:
    facts = json.loads((studied / "study.json").read_text(encoding="utf-8"))
    for change, message in (
        ({"schema": 7}, "is of schema 7 and this abft-mlx reads 1"),
        ({"cells": [{"id": "a"}]}, "study.json: cannot be read (cells.0.model: Field required)"),
        ({"failed": [3]}, "study.json: cannot be read (failed.0"),
    ):
        (studied / "study.json").write_text(json.dumps({**facts, **change}), encoding="utf-8")
        result = invoke("report", studied, "--no-figures")
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
