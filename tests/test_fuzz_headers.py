"""Safetensors headers that lie, or that two readers would take differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abft_mlx.adapters.headers import read_header

DEEP = "[" * 30_000


def _safetensors(path: Path, entry: Any, body: bytes = b"\0" * 16, **header: Any) -> Path:
    text = json.dumps({"a": entry, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


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
            ({"shape": [2**50, 2**20]}, "has the shape"),
            ({"shape": [10**9, 10**6]}, "has 16 bytes, not 4000000000000000"),
            ({"shape": [-2, -2]}, "has the shape"),
            ({"shape": [True, 4]}, "has the shape"),
            ({"shape": [4.0]}, "has the shape"),
            ({"shape": [1] * 9}, "has the shape"),
            ({"dtype": "f32"}, "type 'f32', which is not known"),
            ({"dtype": ["F32"]}, "which is not known"),
            ({"data_offsets": [0, 10**16]}, "has 10000000000000000 bytes, not 16"),
            ({"data_offsets": [16, 0]}, "has -16 bytes"),
            ({"data_offsets": [-16, 0]}, "has the offsets"),
            ({"data_offsets": ["0", "16"]}, "has the offsets"),
            ({"data_offsets": [8, 24]}, "starts at 8, not at 0"),
        ],
    )
    def test_headers_that_lie(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = _safetensors(tmp_path / "a", {**self.GOOD, **changes}, b"\0" * 24)
        with pytest.raises(ValueError, match=message):
            read_header(path)

    def test_tensors_that_overlap(self, tmp_path: Path) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD, b=self.GOOD)
        with pytest.raises(ValueError, match="starts at 0, not at 16"):
            read_header(path)

    @pytest.mark.parametrize("text", [
        '{"a": {"dtype": NaN, "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], "x": 1e999}}',
        '{"a": ' + DEEP, '{"a": NaN}',
    ])  # fmt: skip
    def test_text_that_other_readers_take_otherwise(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "a"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\0" * 16)
        with pytest.raises(ValueError, match=r"is not JSON|has more than a type"):
            read_header(path)

    def test_metadata_that_mlx_would_not_take(self, tmp_path: Path) -> None:
        path = _safetensors(tmp_path / "a", self.GOOD, __metadata__={"a": {}})
        with pytest.raises(ValueError, match="no table of texts"):
            read_header(path)
