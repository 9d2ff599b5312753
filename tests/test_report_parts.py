"""A study's report, and the parts that pages are made of: tables, charts, figures."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
from cli_support import invoke
from made_cells import cell, failed, study
from report_support import Parsed

from abft_mlx.analysis import write_study
from abft_mlx.analysis.figures import style
from abft_mlx.analysis.plotting import Plot
from abft_mlx.analysis.report import chart, figures, html, markdown, write_report


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
    assert "figure shift: no cell that is done measured what it shows" in report.missing
    assert all(note in text for note in map(html.escape, report.missing))
    kept = tmp_path / "kept.json.gz"
    kept.write_bytes(gzip.compress((studied / "study.json").read_bytes()))
    again = write_report(kept)
    assert again.path == tmp_path / "kept.html"
    assert again.path.read_text(encoding="utf-8") == text
    parsed = Parsed(text)
    assert (parsed.unclosed, parsed.open) == ([], [])
    assert "own &lt;method&gt;" in text
    assert "as abft (ABFT, as the recipe has it), with settings of the study's own" in (
        text.replace("&#x27;", "'")
    )
    assert '<td class="words">it | broke</td>' in text
    for row in (studied / "table.md").read_text(encoding="utf-8").splitlines():
        if re.match(r"\| demo ", row):
            cells = [one.strip() for one in row.strip("|").split("|")]
            assert all(html.escape(one) in text for one in cells)


def test_a_study_without_matplotlib(studied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "find_spec", lambda _name: None)
    report = write_report(studied)
    note = report.missing[0]
    assert note == "accuracy, training: matplotlib is not installed; pip install 'abft-mlx[plots]'"
    text = report.path.read_text(encoding="utf-8").replace("&#x27;", "'")
    assert note in text
    assert "<figure" not in text


def test_a_broken_study_is_one_line(studied: Path) -> None:
    facts = json.loads((studied / "study.json").read_text(encoding="utf-8"))
    for change, said in (
        ({"schema": 7}, "is of schema 7 and this abft-mlx reads 1"),
        ({"cells": [{"id": "a"}]}, "holds a part that cannot be read"),
        ({"cells": 3}, "is no study's facts"),
    ):
        (studied / "study.json").write_text(json.dumps({**facts, **change}), encoding="utf-8")
        result = invoke("report", studied, "--no-figures")
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


def test_markdown_tables_become_tables() -> None:
    text = "# name\n\nlead <b>\n\n## One | two\n\n| a | b |\n|---|---|\n| x \\| y | 1.5 |\n\nend\n"
    lead, (only,) = markdown.sections(text)
    assert lead == ["<p>lead &lt;b&gt;</p>"]
    assert (only.key, only.title) == ("one-two", "One | two")
    assert '<th scope="row">x | y</th><td>1.5</td>' in only.content
    assert only.content.endswith("<p>end</p>")


def test_ticks_are_round_and_cover_the_range() -> None:
    assert chart.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert chart.ticks(3, 32, whole=True) == [10, 20, 30]
    assert chart.ticks(0, 2, whole=True) == [0, 1, 2]
    assert chart.ticks(-0.31, 0.12) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1])


def test_a_line_stands_where_its_numbers_are() -> None:
    series = [chart.Series("one", [0, 1, 2, 3], [0.0, 5.0, None, 10.0])]
    picture, data = chart.draw(chart.Chart("t", "x", "y", series, unit="step"))
    path = re.search(r'<path d="([^"]*)" class="line s0">', picture)
    assert path
    assert path[1].startswith("M52.0 182.0 L148.0 96.0 M")
    assert path[1].endswith("M340.0 10.0")
    assert data["series"] == [{"name": "one", "x": [0, 1, 3], "y": [0, 5, 10]}]
    assert (data["across"], data["left"], data["right"]) == ([0, 3], 52, 340)


def test_long_trainings_are_thinned_to_what_can_be_seen() -> None:
    count = 12_345
    kept = chart.thinned(chart.Series("one", list(range(count)), [1.0] * count))
    assert len(kept.x) <= chart.POINTS_SHOWN + 1
    assert (kept.x[0], kept.x[-1]) == (0, count - 1)


def test_figures_can_do_nothing_but_be_seen() -> None:
    wicked = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
      onload="x()" viewBox="0 0 1 1"><script>x()</script><style>* {fill: red}</style>
      <metadata>me</metadata><defs><clipPath id="a"><rect width="1"/></clipPath></defs>
      <foreignObject><p/></foreignObject><a xlink:href="http://e.org"><text>t</text></a>
      <g clip-path="url(#a)" onclick="x()"><use xlink:href="#a"/><use href="http://e.org"/>
      <image xlink:href="https://e.org/a.png"/><text style="fill: url(http://e.org)">&lt;b&gt;
      </text></g></svg>"""
    made = figures.sanitised(wicked, "one")
    for gone in ("script", "<style", "metadata", "foreignObject", "onload", "onclick", "e.org",
                 "x()", "<a "):  # fmt: skip
        assert gone not in made, gone
    (name,) = re.findall(r'id="([^"]+)"', made)
    assert name != "a"
    assert f'clip-path="url(#{name})"' in made
    assert f'href="#{name}"' in made
    assert "&lt;b&gt;" in made
    assert figures.sanitised(wicked, "two") != made


def test_a_figure_keeps_its_text_and_its_numbers() -> None:
    plot = Plot("my-figure", lambda axes: axes.plot([0, 1], [2, 3], label="a & b"), "n = 3 <seeds>")
    made = figures.figure(plot)
    assert "<b>my figure</b>: n = 3 &lt;seeds&gt;" in made
    assert re.search(r"<text[^>]*>3.0</text>", made)
    assert figures.figure(plot) == made
