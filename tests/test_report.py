"""A run's report without a browser: what is written, from what, and what is said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import document, invoke
from report_support import HOSTILE, Parsed, evaluation, made_heads, metrics, run_json, write_run

from abft_mlx.analysis.figures import style
from abft_mlx.analysis.report import html, page, write_report
from abft_mlx.analysis.report.packing import LEVELS, Packed
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


def test_it_says_what_was_trained_and_what_came_of_it(run: Path) -> None:
    text = write_report(run, figures=False).path.read_text(encoding="utf-8")
    words = re.sub(r"<[^>]+>", "", text.partition("<body>")[2])
    for said in (
        "Which mails are unwanted.",
        "ABFT trained 36,864 parameters, LoRA of rank 16 on W_Q and W_K, in the model made on "
        "mails.csv (2 labels), prompts of 4 demonstrations.",
        "12 updates of 384 prompts in all took 5.66 s, with 22 MB of MLX&#x27;s memory at the peak "
        "(CPU, two cores); the adapter is 149 kB.",
        "Accuracy (vanilla) 56.2% → 81.2%, +25.0 points (95% interval with the adapter 78.2% to "
        "83.2%, n = 94).",
        "n = 94 prompts; 3 demonstrations each; test prompts and demonstrations drawn with seed 42;"
        " one training, with seed 42",
        "The adapter (vanilla) against the base (vanilla), on the same prompts: 31 right where the "
        "other is wrong, 4 the other way round (exact McNemar test, p &lt; 0.001).",
        "python 3.11.7, mlx 0.32.4",
        "data 42, training 43, evaluation 42",
        "sha256:5d",
        "abft-mlx finetune recipe.yaml --output NEW",
    ):
        assert said in words, said
    assert (run / "recipe.yaml").read_text().splitlines()[5] in words
    assert "secret" not in text, "the path of eval.json's adapter"
    assert "/home/someone" not in text


def test_the_numbers_are_those_of_the_files(run: Path) -> None:
    heads, lines = read_heads(run / "heads.npz"), metrics()
    data = data_of(write_report(run, figures=False).path.read_text(encoding="utf-8"))
    charts = {one["series"][0]["name"] + "/" + one["unit"]: one for one in data["charts"]}
    assert charts["loss/update"]["series"][0]["y"] == [one["loss"] for one in lines]
    assert charts["punish/update"]["series"][1]["y"] == [one["reward"] for one in lines]
    validated = [one["validation_accuracy"] for one in lines if "validation_accuracy" in one]
    assert charts["accuracy/update"]["series"][0] == {
        "name": "accuracy", "x": [0, 4, 8, 12], "y": [0.5, *validated],
    }  # fmt: skip
    assert charts["W_Q/layer"]["series"][1]["y"] == run_json()["shift"]["k"]
    on_labels = charts["before, all labels/layer"]["series"]
    for n, state in enumerate(heads.states.values()):
        right = (state.magnitude + state.correctness) / 2
        np.testing.assert_allclose(on_labels[2 * n]["y"], state.magnitude.mean(axis=1))
        np.testing.assert_allclose(on_labels[2 * n + 1]["y"], right.mean(axis=1))
    assert charts["base/confidence"]["series"][1] == {
        "name": "adapter", "x": [0.55, 0.91], "y": [0.4, 0.8],
    }  # fmt: skip
    panel = data["heads"]
    assert (panel["layers"], panel["heads"], panel["prompts"]) == (3, 2, 64)
    for measure, known in panel["measures"].items():
        for name, state in heads.states.items():
            table = getattr(state, measure).ravel()
            np.testing.assert_allclose(known["values"][name], table, atol=5e-6)
    change = np.abs(heads.states["after"].correctness - heads.states["before"].correctness)
    assert tuple(panel["start"]) == np.unravel_index(change.argmax(), change.shape)
    for example, packed in zip(heads.examples, panel["examples"], strict=True):
        right = example.demonstration_labels == example.gold
        assert packed["labels"] == example.label_positions.tolist()
        for name, rows in example.rows.items():
            part = packed["states"][name]
            levels = np.frombuffer(zlib.decompress(base64.b64decode(part["rows"])), np.uint8)
            values = levels.reshape(rows.shape) * np.reshape(part["scales"], (3, 2, 1))
            assert np.abs(values - rows).max() <= 0.5 / LEVELS * rows.max() + 1e-6
            on_right = rows[:, :, example.label_positions[right]].sum(axis=-1)
            np.testing.assert_allclose(part["right"], on_right.ravel(), atol=6e-6)


def test_classic_detectors_are_in_the_map_where_all_states_have_them(tmp_path: Path) -> None:
    heads = made_heads(detected=True)
    folder = write_run(tmp_path / "run", heads)
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    measures = data_of(text)["heads"]["measures"]
    for key in ("previous_token", "duplicate_token", "induction"):
        assert f'name="measure" value="{key}"' in text
        for name, state in heads.states.items():
            table = getattr(state.detected, key).ravel()
            np.testing.assert_allclose(measures[key]["values"][name], table, atol=5e-6)
    states = {**heads.states, "before": made_heads().states["before"]}
    write_run(folder, type(heads)(states, heads.examples, heads.labels, 64))
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    assert list(data_of(text)["heads"]["measures"]) == [
        "magnitude", "correctness", "share", "sink",
    ]  # fmt: skip


def test_attention_is_packed_within_half_a_step() -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(40, 0.1), size=(5, 4)).astype(np.float32)
    rows[2] = np.nan
    rows[3, 1] = 0
    packed = Packed.of(rows)
    assert packed.rows.dtype == np.uint8
    for layer in (0, 1, 3, 4):
        for head in range(4):
            row = rows[layer, head].astype(np.float64)
            step = row.max() / 255
            assert np.abs(packed.head(layer, head) - row).max() <= step / 2 + 255 * 5e-10
    assert np.isnan(packed.scales[2]).all()
    assert not packed.rows[2].any()
    assert not packed.head(2, 0).any()


def test_the_same_files_make_the_same_bytes(run: Path, tmp_path: Path) -> None:
    first = write_report(run, figures=False).path.read_bytes()
    assert write_report(run, figures=False).path.read_bytes() == first
    other = tmp_path / "elsewhere" / "other.html"
    other.parent.mkdir()
    assert write_report(run, other, figures=False).path.read_bytes() == first


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
    for command in ("abft-mlx eval --adapter RUN", "abft-mlx heads RUN"):
        assert any(command in one for one in report.missing)
        assert command in text
    assert "This run is not finished." in text
    assert 'id="attention-panel"' not in text
    facts["validation"] = run_json()["validation"]
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    assert "Validation accuracy <strong>50.0% → 62.0%</strong> (n = 50)." in text


def test_a_base_alone_and_end_to_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_heads(states=("before",)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kind: abft", "kind: end_to_end"))
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    data = data_of(text)
    assert [one["series"][0]["name"] for one in data["charts"]][:2] == ["loss", "induction heads"]
    assert "cross-entropy of the label, nats" in text
    assert "End-to-end fine-tuning trained" in text
    assert 'name="state"' not in text


def test_many_classes_are_listed_by_what_is_confused(tmp_path: Path) -> None:
    labels = tuple(f"class {n}" for n in range(30))
    measured = evaluation(labels)
    measured["methods"]["vanilla"]["confusion"][3][7] = 99
    folder = write_run(tmp_path / "run", measured=measured)
    text = write_report(folder, figures=False).path.read_text(encoding="utf-8")
    assert "<li>class 3 taken for class 7: 99</li>" in text
    assert text.count("30 labels</summary>") == 2


def test_texts_are_shown_and_not_obeyed() -> None:
    assert html.visible("a\x00b\x1b\u202ec\ud800\r\x85") == (
        "a[U+0000]b[U+001B][U+202E]c\ufffd[U+000D][U+0085]"
    )
    assert html.visible("a\n\tb é 注意 👩‍👧") == "a\n\tb é 注意 👩‍👧"
    made = html.element("p", "<b>", html.Markup("<i></i>"), title="\"'<", hidden=True, lang=None)
    assert made == '<p title="&quot;&#x27;&lt;" hidden>&lt;b&gt;<i></i></p>'
    assert html.breakable("a/b<c") == "a/<wbr>b&lt;c"


def test_numbers_in_the_page_cannot_end_their_script() -> None:
    hostile = {"name": "</script><!--<script>&", "odd": "\ud800\u2028"}
    text = page.embedded(page.Data(charts=[hostile]))
    assert not re.search("[<>&]", text.partition(">")[2].rpartition("<")[0])
    assert data_of(text)["charts"] == [hostile]


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


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", "{", "run.json"),
        ("run.json", "[1]", "run.json: cannot be read (it holds no object)"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl: cannot be read (a line is no update of a run)"),
        ("metrics.jsonl", "nonsense\n", "metrics.jsonl: cannot be read"),
        ("recipe.yaml", "a: [", "recipe.yaml"),
        ("heads.npz", "no archive", "is no file of heads"),
        ("eval.json", "[]", "eval.json: cannot be read (it holds no object)"),
        (
            "eval.json",
            '{"methods": {"vanilla": 3}}',
            "eval.json: cannot be read (method vanilla has",
        ),
        (
            "eval.json",
            '{"base": 3}',
            "eval.json: cannot be read (it is no document",
        ),
    ],
)
def test_broken_files_are_one_line(run: Path, name: str, content: str, said: str) -> None:
    (run / name).write_text(content, encoding="utf-8")
    result = invoke("report", run)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (run / "report.html").exists()


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
    assert "heads.npz: its arrays do not fit together" in result.stderr


@pytest.mark.parametrize("without", [(0, 1, 2), (0, 2)])
def test_models_without_heads_in_some_layer_or_any(tmp_path: Path, without: tuple) -> None:
    folder = write_run(tmp_path / "run", made_heads(without=without))
    report = write_report(folder, figures=False)
    text = report.path.read_text(encoding="utf-8")
    nowhere = len(without) == 3
    assert any("no layer of this model has heads" in one for one in report.missing) == nowhere
    assert ('id="attention-panel"' in text) != nowhere


def test_odd_documents_are_left_out_not_fatal(run: Path) -> None:
    measured = evaluation()
    method = measured["methods"]["vanilla"]
    method.update(confusion=[[1]], reliability={"confidence": 3}, interval=None, macro_f1=None)
    measured["comparisons"] = True
    measured["base"]["methods"]["vanilla"]["interval"] = {"accuracy": [float("nan"), 1]}
    measured["base"]["methods"]["vanilla"]["reliability"]["confidence"][1] = float("inf")
    (run / "eval.json").write_text(json.dumps(measured), encoding="utf-8")
    facts = {"finished": True, "model": 3, "data": [], "totals": {"seconds": "long"}, "shift": 1}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1}\n')
    text = write_report(run, figures=False).path.read_text(encoding="utf-8")
    assert "81.2%" in text
    assert text.count('<p class="caption">Confusion') == 1


def test_what_matplotlib_draws_of_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    report = write_report(run, tell=told.append)
    text = report.path.read_text(encoding="utf-8")
    assert told[0] == "drawing time-to-accuracy (1 of 3)"
    assert re.findall(r'<figure class="panel drawn" id="figure-([^"]+)"', text) == [
        "time-to-accuracy", "attention-1", "attention-2",
    ]  # fmt: skip
    assert [id_ for id_ in re.findall(r'id="([^"]+)"', text) if text.count(f'id="{id_}"') > 1] == []
    monkeypatch.setattr(style, "find_spec", lambda _name: None)
    report = write_report(run, tmp_path / "without.html")
    note = "time_to_accuracy, attention: matplotlib is not installed; pip install 'abft-mlx[plots]'"
    assert report.missing == (note,)
    assert html.escape(note) in report.path.read_text(encoding="utf-8")


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
    assert "note: not in the report: attention and heads" in loud.stdout
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
