"""Safetensors headers that lie, or that two readers would take differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abft_mlx.adapters import headers
from abft_mlx.adapters.headers import read_header

DEEP = "[" * 30_000


def _safetensors(path: Path, entry: Any, body: bytes = b"\0" * 16, **header: Any) -> Path:
    text = json.dumps({"a": entry, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^its? ") as caught:
        read_header(path)
    return str(caught.value)


class TestSafetensors:
    GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}  # noqa: RUF012

    def test_a_whole_one(self, tmp_path: Path) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD, __metadata__={"format": "mlx"})
        assert read_header(path) == {"a": self.GOOD}
        assert read_header(_safetensors(path, self.GOOD, __metadata__=None)) == {"a": self.GOOD}

    @pytest.mark.parametrize(("length", "size"), [(100_000_001, 300_000_000), (41, 48), (2**63, 9)])
    def test_a_header_longer_than_it_may_be_is_not_read(
        self, tmp_path: Path, length: int, size: int
    ) -> None:
        with (tmp_path / "a").open("wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(size)  # a sparse file
        with pytest.raises(ValueError, match=f"its {size} bytes do not start with a safetensors"):
            read_header(tmp_path / "a")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"shape": [2**50, 2**20]}, "has the shape [1125899906842624, 1048576]"),
            (
                {"shape": [10**9, 10**6]},
                "of shape [1000000000, 1000000] has 16 bytes, not 4000000000000000",
            ),
            ({"shape": [2**31]}, "has the shape [2147483648]"),
            ({"shape": [2**31 - 1]}, "of shape [2147483647] has 16 bytes, not 8589934588"),
            ({"shape": [-2, -2]}, "has the shape [-2, -2]"),
            ({"shape": [True, 4]}, "has the shape [True, 4]"),
            ({"shape": [4.0]}, "has the shape [4.0]"),
            ({"shape": [1] * 9}, "has the shape [1, 1, 1, 1, 1, 1, 1, 1, 1]"),
            ({"shape": 4}, "has the shape 4"),
            ({"shape": ["x" * 99]}, f"has the shape ['{'x' * 78}"),
            ({"dtype": "f32"}, "has the type 'f32', which is not known"),
            ({"dtype": ["F32"]}, "has the type ['F32'], which is not known"),
            ({"dtype": "F" * 99}, f"has the type '{'F' * 39}, which is not known"),
            (
                {"data_offsets": [0, 10**16]},
                "of shape [2, 2] has 10000000000000000 bytes, not 16",
            ),
            ({"data_offsets": [16, 0]}, "of shape [2, 2] has -16 bytes, not 16"),
            ({"data_offsets": [-16, 0]}, "has the offsets [-16, 0]"),
            ({"data_offsets": ["0", "16"]}, "has the offsets ['0', '16']"),
            ({"data_offsets": [0, 16.0]}, "has the offsets [0, 16.0]"),
            ({"data_offsets": [0.0, 16]}, "has the offsets [0.0, 16]"),
            ({"data_offsets": [8, 24]}, "starts at 8, not at 0"),
            ({"more": 1}, "has more than a type, a shape and offsets"),
        ],
    )
    def test_headers_that_lie(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = _safetensors(tmp_path / "a", {**self.GOOD, **changes}, b"\0" * 24)
        assert _refusal(path) == f"its tensor 'a' {message}"

    @pytest.mark.parametrize("entry", [None, 3, [], {}, {"dtype": "F32", "shape": [4]},
        {"shape": [4], "data_offsets": [0, 16]}, {"dtype": "F32", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": 16},
    ])  # fmt: skip
    def test_entries_that_are_none(self, tmp_path: Path, entry: Any) -> None:
        path = _safetensors(tmp_path / "a", entry)
        assert _refusal(path) == "its safetensors header has no tensor offsets"

    def test_names_are_cut(self, tmp_path: Path) -> None:
        for part in ("more", "dtype", "shape", "data_offsets"):
            entry = {**self.GOOD, part: "?"}
            if part == "data_offsets":
                entry[part] = [-1, "?"]
            path = _safetensors(tmp_path / "a", self.GOOD, **{"x" * 99: entry})
            assert _refusal(path).startswith(f"its tensor '{'x' * 79} has ")
        path = _safetensors(tmp_path / "a", self.GOOD, **{"x" * 99: self.GOOD})
        assert _refusal(path) == f"its tensor '{'x' * 79} starts at 0, not at 16"
        path = _safetensors(path, self.GOOD, **{"x" * 99: {**self.GOOD, "shape": []}})
        assert _refusal(path) == f"its tensor '{'x' * 79} of shape [] has 16 bytes, not 4"

    def test_tensors_follow_one_another(self, tmp_path: Path) -> None:
        """In any order, of any type, also with nothing in them."""
        entries = {
            "z": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
            "none": {"dtype": "F64", "shape": [0, 7], "data_offsets": [6, 6]},
            "y": {"dtype": "BOOL", "shape": [1] * 8, "data_offsets": [6, 7]},
            "nothing": {"dtype": "U8", "shape": [0], "data_offsets": [6, 6]},
            "x": {"dtype": "C64", "shape": [], "data_offsets": [7, 15]},
        }
        path = _safetensors(tmp_path / "a", {**self.GOOD, "data_offsets": [15, 31]},
                            b"\0" * 31, **entries)  # fmt: skip
        assert list(read_header(path)) == ["a", *entries]

    def test_files_of_another_size(self, tmp_path: Path) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD)
        whole = path.read_bytes()
        length = len(whole) - 8 - 16
        no_json = "its safetensors header is not JSON"
        for content, message in (
            (b"", "its 0 bytes do not start with a safetensors header"),
            (whole[:7], "its 7 bytes do not start with a safetensors header"),
            (b"\0" * 8, f"{no_json}: Expecting value: line 1 column 1 (char 0)"),
            (b"\2" + b"\0" * 7 + b"{}", None),
            (whole[: 7 + length], f"its {7 + length} bytes do not start with a safetensors header"),
            (whole[:-1], f"it has {len(whole) - 1} bytes where its header promises {len(whole)}"),
            (whole + b"x", f"it has {len(whole) + 1} bytes where its header promises {len(whole)}"),
            (b"\2" + b"\0" * 7 + b"[]", "its safetensors header is not a table of tensors"),
            (
                b"\2" + b"\0" * 7 + b"\xff\xff",
                f"{no_json}: 'utf-8' codec can't decode byte 0xff in position 0: "
                "invalid start byte",
            ),
        ):
            path.write_bytes(content)
            if message is None:
                assert read_header(path) == {}
            else:
                assert _refusal(path) == message

    def test_headers_up_to_a_length(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD)
        length = path.stat().st_size - 8 - 16
        monkeypatch.setattr(headers, "LONGEST_HEADER_BYTES", length)
        assert read_header(path) == {"a": self.GOOD}
        monkeypatch.setattr(headers, "LONGEST_HEADER_BYTES", length - 1)
        assert _refusal(path).endswith("bytes do not start with a safetensors header")

    def test_tensors_that_overlap(self, tmp_path: Path) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD, b=self.GOOD)
        assert _refusal(path) == "its tensor 'b' starts at 0, not at 16"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (
                '{"a": {"dtype": NaN, "shape": [4], "data_offsets": [0, 16]}}',
                "NaN is no number of JSON's",
            ),
            (
                '{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
                "a key occurs twice",
            ),
            ('{"a": {}, "a": {}}', "a key occurs twice"),
            ('{"a": -Infinity}', "-Infinity is no number of JSON's"),
            ('{"a": ' + DEEP, ""),
            ("{", "Expecting property name enclosed in double quotes"),
        ],
    )
    def test_text_that_other_readers_take_otherwise(
        self, tmp_path: Path, text: str, reason: str
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\0" * 16)
        assert _refusal(path).startswith(f"its safetensors header is not JSON: {reason}")

    @pytest.mark.parametrize("metadata", [{"a": {}}, {"a": "b", "c": 1}, [1], "text", 1])
    def test_metadata_that_mlx_would_not_take(self, tmp_path: Path, metadata: Any) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD, __metadata__=metadata)
        assert _refusal(path) == "its safetensors header's metadata is no table of texts"
