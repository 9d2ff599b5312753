"""Texts to classify: lines as they come, tables as a whole, and what is wrong with them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from abft_mlx.data import Queries, queries
from abft_mlx.errors import DataError
from abft_mlx.recipe import DataSection


def lines(content: bytes, **settings: str) -> list[str]:
    found = Queries("standard input", DataSection(**settings), io.BytesIO(content))
    return [one.text for some in found for one in some]


def file(path: Path, **settings: str) -> list[str]:
    return [one.text for some in Queries(str(path), DataSection(**settings)) for one in some]


class Dripping(io.RawIOBase):
    """A pipe whose other end writes a little at a time."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def read1(self, size: int) -> bytes:
        assert size == queries.READ_BYTES
        return self.pieces.pop(0) if self.pieces else b""


def test_lines_as_they_are() -> None:
    content = '\ufeffone, "two"\r\n  three\t\nfünf\u2028sechs\nlast'.encode()
    assert lines(content) == ['one, "two"', "  three\t", "fünf\u2028sechs", "last"]
    assert lines(b"") == []
    assert lines(b"a\n") == ["a"]


def test_lists_are_what_is_there() -> None:
    stream = Dripping(b"one\ntw", b"o\nthree\n", "fü".encode()[:2], "fü\n".encode()[2:], b"end")
    found = Queries("-", DataSection(), stream)
    assert [[one.text for one in some] for some in found] == [
        ["one"], ["two", "three"], ["fü"], ["end"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\nb\xe9d\nfour\n", "standard input line 3 is not UTF-8 (byte 0xe9)"),
        (b"one\ntwo\n \t\nfour\n", "standard input line 3: the text is empty"),
        (b"one\ntwo\n" + b"x" * 300, "standard input line 3 is longer than"),
    ],
)
def test_what_stood_before_a_bad_line_is_given(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LONGEST_LINE_BYTES", 200)
    found = iter(Queries("standard input", DataSection(), io.BytesIO(content)))
    assert [one.text for one in next(found)] == ["one", "two"]
    with pytest.raises(DataError) as caught:
        list(found)
    assert str(caught.value).startswith(message)


def test_empty_lines_as_the_recipe_says() -> None:
    content = b"one\n\n  \ntwo\n"
    assert lines(content, empty_texts="keep") == ["one", "", "  ", "two"]
    source = Queries("-", DataSection(empty_texts="drop"), io.BytesIO(content))
    assert [(one.text, one.place) for some in source for one in some] == [
        ("one", "- line 1"), ("two", "- line 4"),
    ]  # fmt: skip
    assert source.dropped == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n"),
        ("lines", "one\ntwo"),
        ("a.csv", 'text,label\none,x\n"two",y\n'),
        ("b.csv", "id;text\n1;one\n2;two\n"),
        ("a.tsv", "text\tid\none\t1\ntwo\t2\n"),
        ("a.jsonl", '{"text": "one"}\n{"text": "two", "label": null}\n'),
        ("a.json", '[{"text": "one"}, {"text": "two"}]'),
    ],
)
def test_files_need_no_labels(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert file(tmp_path / name) == ["one", "two"]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": [1, 2], "sentence": ["one", "two"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert file(tmp_path / "a.parquet", text="text|sentence") == ["one", "two"]


def test_a_table_with_problems_gives_none_of_its_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": ""}\n{"text": 3}\n{"x": 1}\n[]\n', encoding="utf-8")
    with pytest.raises(DataError) as caught:
        file(path)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        f"row {n}" for n in (2, 3, 4, 5)
    ]
    assert str(caught.value).startswith(f"{path}: row 2: the text is empty")
    assert "a text and a label" not in str(caught.value.problems)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", "x", "a.pdf: files ending in '.pdf' are not read; use .txt"),
        ("a.csv", "body,label\nx,y\n", "no column 'text'; the columns are 'body', 'label'"),
        ("a.jsonl", '{"body": "x"}\n', "no column 'text'; the columns are 'body'"),
        ("a.csv", "", "the file is empty; it needs a text in each row"),
        ("a.txt", None, "a.txt: no such file"),
        ("a.csv", None, "a.csv: no such file"),
    ],
)
def test_files_that_cannot_be_used(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        file(tmp_path / name)
    assert message in str(caught.value)


def test_lines_of_utf16_with_their_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße\r\n你好 ਊ\r\n".encode("utf-16"))
    assert file(path) == ["Grüße", "你好 ਊ"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not UTF-16"):
        file(path)
