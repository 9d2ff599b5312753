"""Files of every kind, good and bad: what is read, and that every problem is found at once."""

from __future__ import annotations

import builtins
import csv
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abft_mlx.data import LabelledTexts, load, report
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection


def write(folder: Path, name: str, content: str | bytes) -> DataSection:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSection(source=str(path))


def problems(section: DataSection, **settings: Any) -> tuple[str, ...]:
    """Every problem, as the error that `load` raises carries them."""
    with pytest.raises(DataError) as caught:
        load(section.model_copy(update=settings))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{section.source}: {caught.value.problems[0]}")
    more = len(caught.value.problems) - 1
    assert (f"(and {more} more problem" in message) == (more > 0)
    return caught.value.problems


def rows(texts: LabelledTexts) -> list[tuple[str, str]]:
    return [(text, texts.names[label]) for text, label in texts.pairs()]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    section = write(
        tmp_path,
        "a.csv",
        '\ufeffid,Text ,label\r\n1,"one, with ""quotes""",spam\r\n\r\n'
        '2,"two\r\nlines", ham \r\n3,three,ham\r\n',
    )
    texts = load(section.model_copy(update={"text": "Text"}))
    assert rows(texts) == [
        ('one, with "quotes"', "spam"),
        ("two\r\nlines", "ham"),
        ("three", "ham"),
    ]
    assert texts.names == ("ham", "spam")
    assert texts.warnings == ("labels with spaces around them were read without: row 2 (line 4)",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,label\na,x\nb,y\n"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}'),
        ("a.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path, name: str, content: str) -> None:
    assert rows(load(write(tmp_path, name, f"\ufeff{content}"))) == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_csv_with_other_delimiters(tmp_path: Path, name: str, mark: str) -> None:
    section = write(tmp_path, name, f"text{mark}label\na, b{mark}x\nc{mark}y\n")
    assert rows(load(section)) == [("a, b", "x"), ("c", "y")]


def test_csv_every_problem_with_row_and_physical_line(tmp_path: Path) -> None:
    section = write(
        tmp_path,
        "bad.csv",
        'text,label\n"two\nlines",spam\n,ham\nmore,ham,fields\nno label,\nodd,spma\n  ,\n',
    )
    assert problems(section, labels=["ham", "spam"]) == (
        "row 2 (line 4): the text is empty; fix or remove the row, or set data.empty_texts: drop",
        "row 3 (line 5): 3 fields where the header has 2; put quotes around a field that holds ','",
        "row 4 (line 6): there is no label",
        "row 5 (line 7): label 'spma' is not one of ham, spam (did you mean 'spam'?); fix the row "
        "or add the label to data.labels",
        "row 6 (line 8): the text is empty; fix or remove the row, or set data.empty_texts: drop",
    )


def test_a_text_knows_its_place_in_the_file(tmp_path: Path) -> None:
    texts = load(write(tmp_path, "a.csv", 'text,label\n"two\nlines",x\n\nb,y\n'))
    assert texts.subset([1]).place(0) == f"{texts.source} row 2 (line 5)"
    assert texts.subset([1]).pairs()[0].place == f"{texts.source} row 2 (line 5)"


def test_csv_open_quote_is_found(tmp_path: Path) -> None:
    (found,) = problems(write(tmp_path, "a.csv", 'text,label\na,x\n"b,y\nc,x\n'))
    assert found.startswith("row 2 (up to line 4): unexpected end of data; check quotes")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "sentence,class\na,x\nb,y\n"),
        ("a.jsonl", '{"sentence": "a", "class": "x"}\n'),
        ("a.json", '[{"sentence": "a", "class": "x"}]'),
    ],
)
def test_missing_columns_name_those_found(tmp_path: Path, name: str, content: str) -> None:
    section = write(tmp_path, name, content)
    assert problems(section) == (
        "no column 'text'; the columns are 'sentence', 'class': name yours with --text-column, or "
        "as data.text in a recipe",
        "no column 'label'; the columns are 'sentence', 'class': name yours with --label-column, "
        "or as data.label in a recipe",
    )
    (found,) = problems(section, text="text|sentence", label="kind|tag")
    assert found.startswith("no column 'kind' or 'tag'; the columns are 'sentence', 'class'")


def test_a_column_in_its_own_case_comes_first_and_two_others_are_no_guess(tmp_path: Path) -> None:
    section = write(tmp_path, "a.csv", "Text,text,label\na,b,x\nc,d,y\n")
    assert load(section).texts == ("b", "d")
    (found,) = problems(section, text="TEXT")
    assert found.startswith("no column 'TEXT'; the columns are 'Text', 'text', 'label'")


def test_column_alternatives_take_the_first_that_exists(tmp_path: Path) -> None:
    section = write(tmp_path, "a.csv", "text,sentence,label\na,b,x\nc,d,y\n")
    assert load(section.model_copy(update={"text": "sentence|text"})).texts == ("b", "d")
    assert load(section.model_copy(update={"text": "review|text"})).texts == ("a", "c")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", b"", "the file is empty; it needs a text and a label in each row"),
        ("a.jsonl", b" \n\n", "the file is empty; it needs a text and a label in each row"),
        ("a.json", b"[]", "the file holds an empty list"),
        ("a.csv", b"text,label\n", "the file has a header and no rows"),
        ("a.csv", b"text,label,text\na,x,b\n", "the header names column 'text' twice"),
        ("a.parquet", b"not parquet", "not a Parquet file that can be read"),
        ("a.json", b'[{"text": "a",}]', "line 1: not JSON ("),
    ],
)
def test_files_with_nothing_usable(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    assert problems(write(tmp_path, name, content))[0].startswith(found)


def test_not_utf8_names_lines_and_still_reports_the_rest(tmp_path: Path) -> None:
    section = write(tmp_path, "a.csv", b"text,label\ncaf\xe9,x\nb,y\n\xfc,y\n,x\n")
    assert problems(section) == (
        "row 1 (line 2): the text is not UTF-8 (byte 0xe9); save the file as UTF-8",
        "row 3 (line 4): the text is not UTF-8 (byte 0xfc); save the file as UTF-8",
        "row 4 (line 5): the text is empty; fix or remove the row, or set data.empty_texts: drop",
    )


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-be", "utf-16-le"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text\tlabel\r\nGrüße, 你好\tx\r\nb\ty\r\n"),
        ("a.jsonl", '{"text": "Grüße, 你好", "label": "x"}\n{"text": "b", "label": "y"}'),
        ("a.json", '[{"text": "Grüße, 你好", "label": "x"}, {"text": "b", "label": "y"}]'),
    ],
)
def test_utf16_as_excel_writes_it(tmp_path: Path, coding: str, name: str, content: str) -> None:
    mark = "" if coding == "utf-16" else "\ufeff"
    section = write(tmp_path, name, (mark + content).encode(coding))
    assert rows(load(section)) == [("Grüße, 你好", "x"), ("b", "y")]


def test_broken_utf16_names_the_line(tmp_path: Path) -> None:
    content = "text,label\na,x\nb,y\n".encode("utf-16") + b"\x00\xd8"
    assert problems(write(tmp_path, "a.csv", content))[0].startswith("line 4 is not UTF-16")


def test_a_text_may_be_longer_than_a_field_of_csv(tmp_path: Path) -> None:
    long = "word " * 40_000
    section = write(tmp_path, "a.csv", f'text,label\n"{long}",x\nb,y\n')
    assert load(section).texts == (long, "b")


def test_jsonl_every_problem_with_its_row(tmp_path: Path) -> None:
    lines = [
        '{"text": "fine", "label": "x"}',
        "",
        '{"text": "broken", "label": ',
        '["a", "x"]',
        '{"text": 7, "label": "y"}',
        '{"label": "y"}',
        '{"text": null, "label": null}',
        '{"text": "nan", "label": NaN}',
        '{"text": "half", "label": 0.5}',
        '{"text": "list", "label": ["x"]}',
        '{"text": "\\ud800", "label": "y"}',
    ]
    found = problems(write(tmp_path, "bad.jsonl", "\n".join(lines)), labels=["x", "y"])
    assert found == (
        "row 2 (line 3): not JSON (Expecting value)",
        "row 3 (line 4): not an object with a text and a label",
        "row 4 (line 5): the text is 7, which is not a string",
        "row 5 (line 6): there is no text",
        "row 6 (line 7): there is no text",
        "row 7 (line 8): there is no label (NaN)",
        "row 8 (line 9): label 0.5 is a fraction, not a class",
        "row 9 (line 10): the label is ['x'], which is neither a word nor a whole number",
        "row 10 (line 11): the text holds half a character (a lone surrogate)",
    )


def test_jsonl_keeps_line_separators_inside_texts(tmp_path: Path) -> None:
    section = write(
        tmp_path, "a.jsonl", '{"text":"a\u2028b\x85","label":"x"}\r\n{"text":"c","label":"y"}'
    )
    assert load(section).texts == ("a\u2028b\x85", "c")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([1, 0, 1], None, ("0", "1")),
        ([10, 9, 10], None, ("9", "10")),
        (["1", "0", "1"], None, ("0", "1")),
        ([1.0, 0.0, 1.0], None, ("0", "1")),
        ([True, False, True], None, ("false", "true")),
        (["b", "a", "b"], None, ("a", "b")),
        ([1, 0, 1], ["no", "yes"], ("no", "yes")),
        (["1", "0", "1.0"], ["no", "yes"], ("no", "yes")),
        (["yes", "no", 1], ["no", "yes"], ("no", "yes")),
    ],
)
def test_labels_of_every_kind(
    tmp_path: Path, labels: list[object], names: list[str] | None, expected: tuple[str, ...]
) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": label}) for i, label in enumerate(labels)]
    section = write(tmp_path, "a.jsonl", "\n".join(lines))
    texts = load(section.model_copy(update={"labels": names}))
    assert texts.names == expected
    assert texts.labels == (1, 0, 1)


def test_a_number_is_no_index_where_a_name_is_a_number(tmp_path: Path) -> None:
    section = write(tmp_path, "a.csv", "text,label\na,1\nb,3\nc,0\n")
    assert load(
        write(tmp_path, "b.csv", "text,label\na,1\nb,3\n").model_copy(update={"labels": ["1", "3"]})
    ).labels == (0, 1)
    (found,) = problems(section, labels=["1", "3"])
    assert found.startswith("row 3 (line 4): label '0' is not one of 1, 3")


def test_free_text_as_label_is_seen(tmp_path: Path) -> None:
    lines = ["text,label", *(f"t{i},sentence number {i}" for i in range(60))]
    (found,) = problems(write(tmp_path, "a.csv", "\n".join(lines)))
    assert found.startswith("60 distinct labels ('sentence number 0', ")
    assert "look like free text or numbers" in found


def test_many_classes_are_read_with_a_warning(tmp_path: Path) -> None:
    def of(classes: int, each: int) -> DataSection:
        lines = [f"t{i},intent {i % classes}" for i in range(classes * each)]
        return write(tmp_path, "a.csv", "\n".join(["text,label", *lines]))

    texts = load(of(150, 3))
    assert len(texts.names) == 150
    assert any("150 classes" in line for line in texts.warnings)
    assert not load(of(50, 2)).warnings
    assert problems(of(151, 3))[0].startswith("151 distinct labels")


def test_labels_that_differ_only_in_case_are_one_warning(tmp_path: Path) -> None:
    lines = ["text,label", "a,Bug", "b,bug", "c, BUG", "d,card lost", "e,Card  lost", "f,praise"]
    texts = load(write(tmp_path, "a.csv", "\n".join(lines)))
    assert len(texts.names) == 6
    (found,) = [line for line in texts.warnings if "one class?" in line]
    for name in ("'Bug'", "'bug'", "'BUG'", "'card lost'", "'Card  lost'"):
        assert name in found
    assert "praise" not in found


def test_duplicates_are_warnings_that_name_rows(tmp_path: Path) -> None:
    texts = load(write(tmp_path, "a.csv", "text,label\na,x\nb,y\na,x\nb,x\nc,y\n"))
    assert len(texts) == 5
    assert texts.warnings == (
        "2 rows repeat an earlier text exactly: row 1 (line 2)=row 3 (line 4), "
        "row 2 (line 3)=row 4 (line 5)",
        "the same text has different labels: row 2 (line 3) 'y', row 4 (line 5) 'x'",
    )


def test_empty_texts_can_be_dropped_or_kept(tmp_path: Path) -> None:
    section = write(tmp_path, "a.csv", "text,label\na,x\n ,y\nb,y\n")
    dropped = load(section.model_copy(update={"empty_texts": "drop"}))
    assert (dropped.texts, dropped.warnings) == (
        ("a", "b"),
        ("rows left out because their text is empty: 1",),
    )
    assert load(section.model_copy(update={"empty_texts": "keep"})).texts == ("a", " ", "b")


def test_many_problems_are_all_kept_and_shown_in_part(tmp_path: Path) -> None:
    found = report(write(tmp_path, "a.csv", "text,label\n" + ",x\n" * 30))
    assert (found.rows, len(found.problems), found.texts) == (30, 30, None)
    with pytest.raises(DataError, match="and 29 more problems") as caught:
        found.require()
    (line,) = caught.value.shown()
    assert line.startswith("row 1 (line 2): the text is empty")
    assert line.endswith("(29 more of this kind)")
    wrong = [f"{'x' * n},label {chr(96 + n)}" for n in range(1, 10) for _ in range(n)]
    section = write(tmp_path, "b.csv", "\n".join(["text,label", *wrong]))
    with pytest.raises(DataError) as caught:
        load(section.model_copy(update={"labels": ["yes", "no"]}))
    shown = caught.value.shown()
    assert len(shown) == 6
    assert "label 'label c' is not one of yes, no" in shown[2]
    assert "(2 more of this kind)" in shown[2]
    assert shown[5] == f"and {6 + 7 + 8 + 9} more problems"


@given(
    st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
        ).filter(str.strip),
        min_size=2,
        max_size=8,
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_and_json_writers_write_is_read_back(
    wanted: list[str], mark: str, ending: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = ["x", "y"] * len(wanted)
        table = io.StringIO(newline="")
        # Quotes everywhere: older Pythons write a bare carriage return without them.
        writer = csv.writer(table, delimiter=mark, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *zip(wanted, labels, strict=False)])
        objects = [{"text": t, "label": x} for t, x in zip(wanted, labels, strict=False)]
        lines = ending.join(json.dumps(one, ensure_ascii=False) for one in objects)
        for file, content in (
            ("a.csv", table.getvalue()),
            ("a.jsonl", lines),
            ("a.json", json.dumps(objects)),
        ):
            assert load(write(folder, file, content)).texts == tuple(wanted)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow (extra data) writes the Parquet file")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra data) writes it")
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": ["a", "b", None], "label": [0, 1, None], "n": [1, 2, 3]}), path
    )
    section = DataSection(source=str(path), labels=["no", "yes"])
    assert problems(section) == ("row 3: there is no text",)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), path)
    assert rows(load(section)) == [("a", "no"), ("b", "yes")]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = write(tmp_path, "a.parquet", b"PAR1")
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=r"needs pyarrow.*pip install 'abft-mlx\[data\]'"):
        load(section)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.csv", "none.csv: no such file; a path is relative to the current folder"),
        ("notes.txt", "Unknown data.source 'notes.txt'."),
        ("emotoin", "Did you mean emotion?"),
        ("trec", "trec is a recipe: abft-mlx finetune trec"),
        (".", ". is a folder; name a file in it"),
    ],
)
def test_sources_that_are_nothing(source: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load(DataSection(source=source))
    assert said in str(caught.value)


def test_builtin_tasks() -> None:
    demo = load(DataSection())
    assert len(demo) == 6000
    assert demo.fingerprint() == load(DataSection()).fingerprint()
    assert demo.warnings == ()


def test_the_room_imports_nothing_heavy() -> None:
    program = (
        "import sys, abft_mlx.recipe, abft_mlx.data, abft_mlx.prompts\n"
        "heavy = {'mlx', 'mlx_lm', 'pyarrow', 'datasets', 'huggingface_hub', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
