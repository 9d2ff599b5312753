"""A run's report without a browser: what is written, from what, and what is said."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from made_cells import cell, failed, study
from report_support import HOSTILE, Parsed, evaluation, made_heads, run_json, write_run

from abft_mlx.analysis import report, write_study
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.report import write_report
from abft_mlx.analysis.report.attention import LEVELS
from abft_mlx.evaluation import verdict
from abft_mlx.induction import read_heads


def data_of(text: str) -> Any:
    """The numbers in a page."""
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text)
    assert found
    return json.loads(found[1])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", made_heads(), measured=evaluation())


def test_the_page_stands_alone(run: Path) -> None:
    report = write_report(run, figures=False)
    text = report.path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert (parsed.unclosed, parsed.open) == ([], [])
    assert (report.path, report.kind, report.missing) == (run / "report.html", "run", ())
    assert report.size_bytes == len(text.encode())
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert name not in ("src", "action", "srcdoc"), (tag, name)
            assert not name.startswith("on")
            if name in ("href", "xlink:href"):
                assert value
                assert value.startswith("#")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [a["content"] for t, a in parsed.elements if "http-equiv" in a and t == "meta"]
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'", "img-src": "data:",
        "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    style_sheet = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style_sheet
    assert "@import" not in style_sheet


def test_classic_detectors_are_in_the_map_where_all_states_have_them(tmp_path: Path) -> None:
    heads = made_heads(detected=True)
    folder = write_run(tmp_path / "run", heads)
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    measures = data_of(text)["measures"]
    for key in ("previous_token", "duplicate_token", "induction"):
        assert f'name="measure" value="{key}"' in text
        for name, state in heads.states.items():
            table = getattr(state.detected, key).ravel()
            np.testing.assert_allclose(measures[key]["values"][name], table, atol=5e-6)
    states = {**heads.states, "before": made_heads().states["before"]}
    write_run(folder, type(heads)(states, heads.examples, heads.labels, 64))
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    assert list(data_of(text)["measures"]) == [
        "magnitude", "correctness", "share", "sink",
    ]  # fmt: skip


def test_the_same_files_make_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run, figures=False).path.read_bytes()
    assert write_report(run, figures=False).path.read_bytes() == first
    other = tmp_path / "elsewhere" / "other.html"
    other.parent.mkdir()
    assert write_report(run, other, figures=False).path.read_bytes() == first


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    labels = ("</script><script>alert(1)", "<!--")
    heads = made_heads(words=HOSTILE, labels=labels, tokens=60)
    folder = write_run(
        tmp_path / "run", heads, measured=evaluation(labels), name="<svg onload=alert(1)>"
    )
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert (parsed.unclosed, parsed.open) == ([], [])
    assert [tag for tag, _ in parsed.elements].count("script") == 2
    assert "<!--" not in text.partition("<body>")[2]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028\ud800-\udfff]", text)


def test_heads_that_do_not_fit_together_are_refused(run: Path) -> None:
    heads = made_heads()
    example = heads.examples[0]
    wrong = type(example)(
        example.tokens[:-1], example.label_positions, example.demonstration_labels, example.gold,
        example.rows,
    )  # fmt: skip
    write_run(run, type(heads)(heads.states, (wrong,), heads.labels, 64))
    result = invoke("report", run)
    assert result.exit_code == 2
    assert "do not fit together" in result.stderr


@pytest.mark.parametrize("without", [(0, 1, 2), (0, 2)])
def test_models_without_heads_in_some_layer_or_any(tmp_path: Path, without: tuple) -> None:
    folder = write_run(tmp_path / "run", made_heads(without=without))
    report = write_report(folder, figures=False)
    text = report.path.read_text(encoding="utf-8")
    nowhere = len(without) == 3
    assert any("the model has no attention heads" in one for one in report.missing) == nowhere
    assert ('id="attention-panel"' in text) != nowhere


def test_the_command_and_its_document(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    result = invoke("report", run, "--output", target, "--json", "--no-figures")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    sections = found.pop("sections")
    assert sections[:3] == ["Result", "Attention over the prompts", "Training"]
    assert found == {
        "schema": 1, "kind": "run", "output": str(target), "bytes": target.stat().st_size,
        "missing": [],
    }  # fmt: skip
    (run / "heads.npz").unlink()
    loud, quiet = (invoke("report", run, "--no-figures", *more) for more in ([], ["--quiet"]))
    assert (
        "note: not in the report: RUN holds no heads.npz; abft-mlx heads RUN writes it"
        in loud.stdout
    )
    assert re.fullmatch(rf"wrote {re.escape(str(run))}/report.html \([\d.]+ kB\)\n", quiet.stdout)


def test_where_a_report_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.html").write_text("dear all", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    for source, output, said in (
        (tmp_path / "nowhere", None, "there is no such run or study"),
        (tmp_path / "bare", None, "holds neither a run"),
        (run, tmp_path, "is a folder; name a file"),
        (run, tmp_path / "letter.html", "is no report of abft-mlx"),
        (run, tmp_path / "nowhere" / "page.html", "cannot be written"),
        (run, run / "run.json" / "page.html", "cannot be written"),
        (run / "run.json", None, "is no study's facts"),
        (run / "heads.npz", None, "cannot be read"),
    ):
        words = ["--output", output] if output else []
        result = invoke("report", source, *words)
        assert result.exit_code == 2, (source, output, result.stderr)
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "letter.html").read_text(encoding="utf-8") == "dear all"


def test_it_says_what_was_trained_and_what_came_of_it(run: Path) -> None:
    text = write_report(run, figures=False).path.read_text(encoding="utf-8")
    words = html.unescape(re.sub(r"<[^>]+>", "", text.partition("<body>")[2]))
    for said in (
        "Which mails are unwanted.",
        "ABFT trained 36,864 parameters, LoRA of rank 16 on W_Q and W_K, in the model made on "
        "mails.csv (2 labels), prompts of 4 demonstrations.",
        "12 updates of 384 prompts in all took 5.66 s, with 22 MB of MLX's memory at the peak "
        "(CPU, two cores); the adapter is 149 kB.",
        "Accuracy (vanilla) 56.2% → 81.2%, +25.0 points (95% interval with the adapter 78.2% to "
        "83.2%, n = 94).",
        "n = 94 prompts; 3 demonstrations each; test prompts and demonstrations drawn with seed 42;"
        " one training, with seed 42",
        "On the same prompts, the adapter (vanilla) is right 31 times where the base (vanilla) is "
        "wrong, and wrong 4 times where that is right (exact McNemar test, p < 0.001).",
        "spam taken for ham: 7",
        "python 3.11.7, mlx 0.32.4",
        "data 42, training 43, evaluation 42",
        "sha256:5d",
        "abft-mlx finetune recipe.yaml --output NEW",
    ):
        assert said in words, said
    assert (run / "recipe.yaml").read_text().splitlines()[5] in words
    assert "secret" not in text, "the path of eval.json's adapter"
    assert "/home/someone" not in text


def test_a_verdict_stands_beside_the_baselines(run: Path) -> None:
    measured = evaluation()
    measured["methods"]["classifier"] = {**measured["methods"]["vanilla"], "right": "10" * 47}
    measured["base"]["methods"]["classifier"] = measured["base"]["methods"]["vanilla"] | {
        "right": "00" * 47
    }
    measured["baselines"] = {
        "majority": {"label": "<ham>", "accuracy": 0.5},
        "bag_of_words": {"accuracy": 0.75, "right": "01" * 47},
    }
    measured["verdict"] = verdict(measured)
    (run / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    text = write_report(run, figures=False).path.read_text(encoding="utf-8")
    words = html.unescape(re.sub(r"<[^>]+>", " ", text))
    assert "The fine-tuned classifier (81.2%) is better than prompting (56.2%)" in words
    for row in ("with the adapter 81.2%", "prompting 56.2%", "bag of words 75.0%"):
        assert row in " ".join(words.split())
    assert "always &lt;ham&gt;" in text
    assert "Recall of each label: spam 85.1%, ham 85.1%." in words
    assert measured["verdict"]["next"] in words


def test_the_numbers_are_those_of_the_file(run: Path) -> None:
    heads = read_heads(run / "heads.npz")
    panel = data_of(write_report(run, figures=False).path.read_text(encoding="utf-8"))
    assert (panel["layers"], panel["heads"], panel["prompts"]) == (3, 2, 64)
    for measure, known in panel["measures"].items():
        for name, state in heads.states.items():
            table = getattr(state, measure).ravel()
            np.testing.assert_allclose(known["values"][name], table, atol=5e-6)
    change = np.abs(heads.states["after"].correctness - heads.states["before"].correctness)
    assert tuple(panel["start"]) == np.unravel_index(change.argmax(), change.shape)
    for example, packed in zip(heads.examples, panel["examples"], strict=True):
        assert packed["labels"] == example.label_positions.tolist()
        for name, rows in example.rows.items():
            part = packed["states"][name]
            levels = np.frombuffer(zlib.decompress(base64.b64decode(part["rows"])), np.uint8)
            values = levels.reshape(rows.shape) * np.reshape(part["scales"], (3, 2, 1))
            assert np.abs(values - rows).max() <= 0.5 / LEVELS * rows.max() + 1e-6
            on_right = rows[:, :, example.label_positions[example.right]].sum(axis=-1)
            np.testing.assert_allclose(part["right"], on_right.ravel(), atol=6e-6)


def test_head_weights_are_in_the_map(tmp_path: Path) -> None:
    heads = made_heads()
    weight = np.arange(6.0).reshape(3, 2)
    states = {**heads.states, "after": replace(heads.states["after"], weight=weight)}
    folder = write_run(tmp_path / "run", replace(heads, states=states))
    panel = data_of(write_report(folder, figures=False).path.read_text(encoding="utf-8"))
    assert panel["measures"]["weight"]["values"]["after"] == weight.ravel().tolist()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare")
    (folder / "metrics.jsonl").unlink()
    facts = run_json()
    del facts["shift"], facts["validation"]
    facts["finished"] = False
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    report = write_report(folder, figures=False)
    text = report.path.read_text(encoding="utf-8")
    assert len(report.missing) == 4
    for command in ("abft-mlx eval RUN", "abft-mlx heads RUN"):
        assert any(command in one for one in report.missing)
        assert command in text
    assert str(tmp_path) not in text
    assert "This run is not finished." in text
    assert 'id="attention-panel"' not in text
    facts["validation"] = run_json()["validation"]
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    assert "Validation accuracy <strong>50.0% → 62.0%</strong> (n = 50)." in text


def test_a_base_alone_and_a_read_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_heads(states=("before",)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kind: abft", "kind: read_out"))
    text = write_report(folder).path.read_text(encoding="utf-8")
    assert "the loss is the cross-entropy of the label" in text
    assert "The label-attention read-out trained" in text
    assert ">punish" not in text
    assert 'name="state"' not in text


def test_what_no_reader_could_see_is_made_visible() -> None:
    assert report.visible("a\x00b\x1b\u202ec\ud800\r\x85") == (
        "a[U+0000]b[U+001B][U+202E]c\ufffd[U+000D][U+0085]"
    )
    assert report.visible("a\n\tb é 注意 👩‍👩") == "a\n\tb é 注意 👩‍👩"


def test_charts_are_drawn_and_their_ids_differ(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    made = write_report(run, tell=told.append)
    text = made.path.read_text(encoding="utf-8")
    names = ["confusion", "reliability", "training", "time-to-accuracy", "label-attention", "shift",
             "attention-1", "attention-2"]  # fmt: skip
    assert told == [f"drawing {name}" for name in names]
    assert re.findall(r'<figure class="panel drawn" id="figure-([^"]+)"', text) == names
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)} <= set(
        ids
    )
    assert re.search(r"<text[^>]*>induction heads</text>", text)
    assert text.count("<style") == 1
    monkeypatch.setattr(style, "find_spec", lambda _name: None)
    made = write_report(run, tmp_path / "without.html")
    (note,) = made.missing
    assert note.startswith("confusion, reliability, training, ")
    assert note.endswith(": matplotlib is not installed; pip install 'abft-mlx[plots]'")
    assert html.escape(note).replace("&#x27;", "&#39;") in made.path.read_text(encoding="utf-8")


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
    made = write_report(studied)
    text = made.path.read_text(encoding="utf-8")
    assert made.kind == "study"
    assert "figure shift: no cell that is done measured what it shows" in made.missing
    assert all(note in text for note in made.missing)
    kept = tmp_path / "kept.json.gz"
    kept.write_bytes(gzip.compress((studied / "study.json").read_bytes()))
    again = write_report(kept)
    assert again.path == tmp_path / "kept.html"
    assert again.path.read_text(encoding="utf-8") == text
    parsed = Parsed(text)
    assert (parsed.unclosed, parsed.open) == ([], [])
    assert "own &lt;method&gt;" in text
    assert "as abft (ABFT, as the recipe has it), with settings of the study's own" in (
        html.unescape(text)
    )
    assert '<td class="words">it | broke</td>' in text
    for row in (studied / "table.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| demo ", row):
            cells = [one.strip() for one in row.strip("|").split("|")]
            assert all(html.escape(one) in text for one in cells)


def test_a_broken_study_is_one_line(studied: Path) -> None:
    facts = json.loads((studied / "study.json").read_text(encoding="utf-8"))
    for change, said in (
        ({"schema": 7}, "is of schema 7 and this abft-mlx reads 1"),
        ({"cells": [{"id": "a"}]}, "study.json: cannot be read (cells.0.model: Field required)"),
        ({"cells": 3}, "is no study's facts"),
        ({"failed": [3]}, "study.json: cannot be read (failed.0"),
        ({"paper": 7}, "study.json: cannot be read (paper"),
    ):
        (studied / "study.json").write_text(json.dumps({**facts, **change}), encoding="utf-8")
        result = invoke("report", studied, "--no-figures")
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1
