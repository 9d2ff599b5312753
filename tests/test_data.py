"""Files of texts, labelled or to be labelled: what is read, and that every problem is found."""

from __future__ import annotations

import builtins
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abft_mlx.data import LabelledTexts, Queries, load
from abft_mlx.data import rows as reading
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection

EMPTY = "the text is empty; fix or remove the row, or set data.empty_texts: drop"


def write(folder: Path, name: str, content: str | bytes, **settings: Any) -> DataSection:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSection(source=str(path), **settings)


def problems(section: DataSection) -> tuple[str, ...]:
    """Every problem, as the error that `load` raises carries them."""
    with pytest.raises(DataError) as caught:
        load(section)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{section.source}: {caught.value.problems[0]}")
    more = len(caught.value.problems) - 1
    assert (f"(and {more} more problem" in message) == (more > 0)
    return caught.value.problems


def rows(texts: LabelledTexts) -> list[tuple[str, str]]:
    return [(text, texts.names[label]) for text, label in texts.pairs()]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    content = (
        '\ufeffid,Text ,label\r\n1,"one, with ""quotes""",spam\r\n\r\n'
        '2,"two\r\nlines", ham \r\n3,three,ham\r\n'
    )
    texts = load(write(tmp_path, "a.csv", content, text="text"))
    assert rows(texts) == [
        ('one, with "quotes"', "spam"),
        ("two\r\nlines", "ham"),
        ("three", "ham"),
    ]
    assert texts.names == ("ham", "spam")
    assert texts.warnings == ("labels with spaces around them were read without: row 2 (line 4)",)
    assert texts.subset([2]).place(0) == f"{texts.source} row 3 (line 6)"
    assert texts.subset([2]).pairs()[0].place == texts.place(2)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text\tlabel\r\nGrüße, 你好\tx\r\nb\ty\r\n"),
        ("b.csv", "id;text;label\n1;Grüße, 你好;x\n2;b;y"),
        ("a.tsv", "text\tlabel\nGrüße, 你好\tx\nb\ty\n"),
        ("a.jsonl", '{"text": "Grüße, 你好", "label": "x"}\n{"text": "b", "label": "y"}'),
        ("a.json", '[{"text": "Grüße, 你好", "label": "x"}, {"text": "b", "label": "y"}]'),
    ],
)
def test_every_encoding_and_delimiter(tmp_path: Path, coding: str, name: str, content: str) -> None:
    mark = "\ufeff" if coding == "utf-16-be" else ""
    section = write(tmp_path, name, (mark + content).encode(coding))
    assert rows(load(section)) == [("Grüße, 你好", "x"), ("b", "y")]
    assert [query.text for some in Queries(section.source, section) for query in some] == [
        "Grüße, 你好", "b",
    ]  # fmt: skip


def test_a_text_may_be_longer_than_a_field_of_csv(tmp_path: Path) -> None:
    long = "word " * 40_000
    assert load(write(tmp_path, "a.csv", f'text,label\n"{long}",x\nb,y\n')).texts == (long, "b")


def test_csv_every_problem_with_row_and_physical_line(tmp_path: Path) -> None:
    content = b'text,label\n"two\nlines",spam\n,ham\nmore,ham,fields\nno label,\nodd,spma\n  ,\n'
    section = write(tmp_path, "bad.csv", content + b"caf\xe9,ham\n", labels=["ham", "spam"])
    assert problems(section) == (
        f"row 2 (line 4): {EMPTY}",
        "row 3 (line 5): 3 fields where the header has 2; put quotes around a field that holds ','",
        "row 4 (line 6): there is no label",
        "row 5 (line 7): label 'spma' is not one of ham, spam (did you mean 'spam'?); fix the row "
        "or add the label to data.labels",
        f"row 6 (line 8): {EMPTY}",
        "row 7 (line 9): the text is not UTF-8 (byte 0xe9); save the file as UTF-8",
    )
    (problem,) = problems(write(tmp_path, "a.csv", 'text,label\na,x\n"b,y\nc,x\n'))
    assert problem.startswith("row 2 (up to line 4): unexpected end of data; check quotes")


def test_jsonl_every_problem_with_its_row(tmp_path: Path) -> None:
    lines = [
        '{"text": "fine\u2028\x85", "label": "x"}',
        "",
        '{"text": "broken", "label": ',
        '["a", "x"]',
        '{"text": 7, "label": "y"}',
        '{"text": null, "label": null}',
        '{"text": "nan", "label": NaN}',
        '{"text": "half", "label": 0.5}',
        '{"text": "list", "label": ["x"]}',
        '{"text": "\\ud800", "label": "y"}',
    ]
    assert problems(write(tmp_path, "bad.jsonl", "\n".join(lines), labels=["x", "y"])) == (
        "row 2 (line 3): not JSON (Expecting value)",
        "row 3 (line 4): not an object with a text and a label",
        "row 4 (line 5): the text is 7, which is not a string",
        "row 5 (line 6): there is no text",
        "row 6 (line 7): there is no label (NaN)",
        "row 7 (line 8): label 0.5 is a fraction, not a class",
        "row 8 (line 9): the label is ['x'], which is neither a word nor a whole number",
        "row 9 (line 10): the text holds half a character (a lone surrogate)",
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "sentence,class\na,x\nb,y\n"),
        ("a.jsonl", '{"sentence": "a", "class": "x"}\n{"sentence": "b", "class": "y"}'),
    ],
)
def test_columns_are_found_or_named(tmp_path: Path, name: str, content: str) -> None:
    text, label = problems(write(tmp_path, name, content))
    assert text.startswith("no column 'text'; the columns are 'sentence', 'class'")
    assert "--text-column" in text
    assert "--label-column" in label
    found = load(write(tmp_path, name, content, text="text|SENTENCE", label="class"))
    assert found.texts == ("a", "b")
    two = "Text,text,label\na,b,x\nc,d,y\n"
    assert load(write(tmp_path, "a.csv", two)).texts == ("b", "d")
    (problem,) = problems(write(tmp_path, "a.csv", two, text="TEXT"))
    assert "no column 'TEXT'" in problem


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"", "the file is empty; it needs a text and a label in each row"),
        ("a.json", b"[]", "the file holds an empty list"),
        ("a.csv", b"text,label\n", "the file has a header and no rows"),
        ("a.csv", b"text,label,text\na,x,b\n", "the header names column 'text' twice"),
        ("a.parquet", b"not parquet", "not a Parquet file that can be read"),
        ("a.json", b'[{"text": "a",}]', "line 1: not JSON ("),
        ("a.csv", "text,label\na,x\n".encode("utf-16") + b"\x00\xd8", "line 3 is not UTF-16"),
    ],
)
def test_files_with_nothing_usable(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    assert problems(write(tmp_path, name, content))[0].startswith(problem)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([1, 0, 1], None, ("0", "1")),
        (["10", "9", "10"], None, ("9", "10")),
        ([1.0, 0.0, 1.0], None, ("0", "1")),
        ([True, False, True], None, ("false", "true")),
        (["b", "a", "b"], None, ("a", "b")),
        (["1", "no", "1.0"], ["no", "yes"], ("no", "yes")),
    ],
)
def test_labels_of_every_kind(
    tmp_path: Path, labels: list[object], names: list[str] | None, expected: tuple[str, ...]
) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": label}) for i, label in enumerate(labels)]
    texts = load(write(tmp_path, "a.jsonl", "\n".join(lines), labels=names))
    assert texts.names == expected
    assert texts.labels == (1, 0, 1) or expected == ("9", "10")


def test_a_number_is_no_index_where_a_name_is_a_number(tmp_path: Path) -> None:
    content, names = "text,label\na,1\nb,3\nc,0\n", ["1", "3"]
    (problem,) = problems(write(tmp_path, "a.csv", content, labels=names))
    assert problem.startswith("row 3 (line 4): label '0' is not one of 1, 3")
    assert load(write(tmp_path, "a.csv", content[:-4], labels=names)).labels == (0, 1)


def test_many_classes_are_read_with_a_warning_and_free_text_is_not(tmp_path: Path) -> None:
    def of(classes: int, each: int) -> DataSection:
        lines = [f"t{i},intent {i % classes}" for i in range(classes * each)]
        return write(tmp_path, "a.csv", "\n".join(["text,label", *lines]))

    texts = load(of(150, 3))
    assert len(texts.names) == 150
    assert any("150 classes" in line for line in texts.warnings)
    assert not load(of(50, 2)).warnings
    for section in (of(151, 3), of(60, 1)):
        assert "look like free text or numbers" in problems(section)[0]


def test_alike_labels_and_repeated_texts_are_warnings(tmp_path: Path) -> None:
    lines = ["text,label", "a,Bug", "b,bug", "c,card lost", "d,Card  lost", "e,praise"]
    texts = load(write(tmp_path, "a.csv", "\n".join(lines)))
    assert len(texts.names) == 5
    (warning,) = texts.warnings
    assert all(repr(name) in warning for name in ("Bug", "bug", "card lost", "Card  lost"))
    assert "praise" not in warning
    texts = load(write(tmp_path, "a.csv", "text,label\na,x\nb,y\na,x\nb,x\nc,y\n"))
    assert len(texts) == 5
    assert texts.warnings == (
        "2 rows repeat an earlier text exactly: row 1 (line 2)=row 3 (line 4), "
        "row 2 (line 3)=row 4 (line 5)",
        "the same text has different labels: row 2 (line 3) 'y', row 4 (line 5) 'x'",
    )
    (problem,) = problems(write(tmp_path, "a.csv", "text,label\na,x\nb,x\n"))
    assert "at least two classes" in problem


def test_empty_texts_can_be_dropped_or_kept(tmp_path: Path) -> None:
    content = "text,label\na,x\n ,y\nb,y\n"
    dropped = load(write(tmp_path, "a.csv", content, empty_texts="drop"))
    assert dropped.texts == ("a", "b")
    assert dropped.warnings == ("rows left out because their text is empty: 1",)
    assert load(write(tmp_path, "a.csv", content, empty_texts="keep")).texts == ("a", " ", "b")


def test_many_problems_are_all_kept_and_shown_by_kind(tmp_path: Path) -> None:
    wrong = [f"{'x' * n},label {chr(96 + n)}" for n in range(1, 10) for _ in range(n)]
    section = write(tmp_path, "b.csv", "\n".join(["text,label", *wrong]), labels=["yes", "no"])
    with pytest.raises(DataError, match="and 44 more problems") as caught:
        load(section)
    assert len(caught.value.problems) == 45
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
    texts: list[str], mark: str, ending: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        labels = ["x", "y"] * len(texts)
        table = io.StringIO(newline="")
        # Quotes everywhere: older Pythons write a bare carriage return without them.
        writer = csv.writer(table, delimiter=mark, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *zip(texts, labels, strict=False)])
        objects = [{"text": t, "label": x} for t, x in zip(texts, labels, strict=False)]
        lines = ending.join(json.dumps(row, ensure_ascii=False) for row in objects)
        for file, content in (
            ("a.csv", table.getvalue()),
            ("a.jsonl", lines),
            ("a.json", json.dumps(objects)),
        ):
            assert load(write(Path(name), file, content)).texts == tuple(texts)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow (extra data) writes the Parquet file")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra data) writes it")
    path = tmp_path / "a.parquet"
    columns = {"sentence": ["a", "b", None], "label": [0, 1, None], "n": [1, 2, 3]}
    pq.write_table(pa.table(columns), path)
    section = DataSection(source=str(path), labels=["no", "yes"], text="text|sentence")
    assert problems(section) == ("row 3: there is no text",)
    pq.write_table(pa.table(columns).slice(0, 2), path)
    assert rows(load(section)) == [("a", "no"), ("b", "yes")]
    queries = Queries(str(path), section)
    assert queries.columns == ("sentence", "label", "n")
    assert [dict(query.fields)["n"] for query in next(iter(queries))] == [1, 2]


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
    ("source", "message"),
    [
        ("none.csv", "none.csv: no such file"),
        ("notes.txt", "Unknown data.source 'notes.txt'."),
        ("emotoin", "Did you mean emotion?"),
        ("trec", "trec is a recipe: abft-mlx finetune trec"),
        (".", ". is a folder; name a file in it"),
        ("./none", "./none: no such file"),
    ],
)
def test_sources_that_are_nothing(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load(DataSection(source=source))
    assert message in str(caught.value)


class Pipe(io.RawIOBase):
    """A pipe whose other end writes a little at a time."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def read1(self, size: int) -> bytes:
        assert size == reading.READ_BYTES
        return self.pieces.pop(0) if self.pieces else b""


def stream(*pieces: bytes, **settings: Any) -> Queries:
    skip = settings.pop("skip", False)
    return Queries("standard input", DataSection(**settings), Pipe(*pieces), skip=skip)


def lists(queries: Queries) -> list[list[str]]:
    return [[query.text for query in some] for some in queries]


def test_lines_of_a_stream_come_as_they_are_and_when_they_are_there() -> None:
    content = '\ufeffone, "two"\r\n  three\t\nfünf\u2028sechs\nlast'.encode()
    assert lists(stream(content)) == [
        ['one, "two"', "  three\t", "fünf\u2028sechs"], ["last"],
    ]  # fmt: skip
    pieces = (b"one\ntw", b"o\nthree\n", "fü".encode()[:2], "fü\n".encode()[2:], b"end")
    assert lists(stream(*pieces)) == [["one"], ["two", "three"], ["fü"], ["end"]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"one\ntwo\nb\xe9d\nfour\n", "line 3: the text is not UTF-8 (byte 0xe9)"),
        (b"one\ntwo\n \t\nfour\n", "line 3: the text is empty"),
        (b"one\ntwo\n" + b"x" * 300, "line 3 is longer than"),
    ],
)
def test_what_stands_before_a_bad_line_is_returned(
    content: bytes, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE_BYTES", 200)
    queries = iter(stream(content))
    assert [query.text for query in next(queries)] == ["one", "two"]
    with pytest.raises(DataError) as caught:
        list(queries)
    assert str(caught.value).startswith(f"standard input {problem}")
    if b"four" in content:
        (batch,) = stream(content, skip=True)
        assert [bool(query.problem) for query in batch] == [False, False, True, False]


def test_empty_lines_as_the_recipe_says() -> None:
    content = b"one\n\n  \ntwo\n"
    assert lists(stream(content, empty_texts="keep")) == [["one", "", "  ", "two"]]
    queries = stream(content, empty_texts="drop")
    assert [query.place for some in queries for query in some] == [
        "standard input line 1", "standard input line 4",
    ]  # fmt: skip
    assert queries.dropped == 2


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.pdf", "x", "a.pdf: files ending in '.pdf' are not read; use .txt"),
        ("a.csv", "body,label\nx,y\n", "no column 'text'; the columns are 'body', 'label'"),
        ("a.csv", "", "the file is empty; it needs a text in each row"),
        ("a.txt", "a\n\nb", "a.txt: line 2: the text is empty"),
        ("a.txt", None, "a.txt: no such file"),
        (
            "a.jsonl",
            '{"text": "one"}\n{"text": ""}\n{"text": 3}\n[]\n',
            "row 2: the text is empty; remove it, or set data.empty_texts to drop or keep (and 2 "
            "more problems)",
        ),
    ],
)
def test_files_of_texts_that_cannot_be_used(
    tmp_path: Path, name: str, content: str | None, problem: str
) -> None:
    section = write(tmp_path, name, content or "")
    if content is None:
        Path(section.source).unlink()
    with pytest.raises(DataError) as caught:
        Queries(section.source, section)
    assert problem in str(caught.value)


@pytest.mark.parametrize(("name", "coding"), [("a.txt", "utf-8-sig"), ("lines", "utf-16")])
def test_files_of_lines(tmp_path: Path, name: str, coding: str) -> None:
    section = write(tmp_path, name, "Grüße\r\n你好 ਊ\r\n".encode(coding))
    queries = Queries(section.source, section)
    assert lists(queries) == [["Grüße", "你好 ਊ"]]
    assert (queries.total, queries.columns) == (2, ("text",))
