"""Cases that fuzzing found, and bombs: each is one clear line, in little time and memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import invoke
from report_support import evaluation, made_heads, made_study, write_run

from abft_mlx import analysis, data, documents, recipe, study
from abft_mlx.analysis import drawing
from abft_mlx.analysis.report import write_report
from abft_mlx.data import _rows
from abft_mlx.errors import DataError, ModelError, OutputError, RecipeError
from abft_mlx.evaluation.metrics import right_answers
from abft_mlx.files import parse_json, read_bytes
from abft_mlx.induction import archives, read_heads
from abft_mlx.loading import skeleton
from abft_mlx.recipe import DataSection, _yaml

DEEP = "[" * 30_000
LAUGHS = "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: &a [x]\n" + LAUGHS, "more than 100,000 values, aliases included"),
            ("a: &a [*a]\n", r"\*?a?.*stands inside itself"),
            ("a: " + DEEP, "nested too deeply"),
            ('description: "\\ud800"\n', "half of a surrogate pair"),
            ("a: " + "x" * 1_000_001, "longer than 1,000,000 characters"),
        ],
        ids=["laughs", "itself", "deep", "surrogate", "long"],
    )
    def test_bombs(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        for load in (recipe.load, study.load):
            with pytest.raises(RecipeError, match=message) as caught:
                load(path)
            assert str(path) in str(caught.value)

    def test_aliases_that_do_not_explode_are_read(self) -> None:
        assert _yaml.parse("a: &x [1, 2]\nb: [*x, *x]\n")["b"] == [[1, 2], [1, 2]]

    def test_an_override_that_is_deep(self) -> None:
        with pytest.raises(RecipeError, match=r"--set adapter.rank: .* is not a YAML value"):
            recipe.default([f"adapter.rank={DEEP}"])

    def test_a_file_without_end(self) -> None:
        with pytest.raises(RecipeError, match=r"cannot be read \(it has more than 4 MB\)"):
            recipe.files.read(Path("/dev/zero"))

    @pytest.mark.parametrize("value", ["1.5", "[a]", "{a: b}", "7"])
    def test_settings_of_a_study_that_are_no_texts(self, value: str) -> None:
        text = f"models: [demo]\ntasks: [demo]\nmethods: [abft]\nsettings: [{value}]\n"
        with pytest.raises(RecipeError, match="settings"):
            study.loads(text)

    def test_a_mixture_of_what_is_no_recipe_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mixed.yaml"
        path.write_text("data: [nothing-known]\n", encoding="utf-8")
        with pytest.raises(RecipeError, match=r"mixed.yaml: data: no recipe is called"):
            recipe.load(path)


class TestJson:
    @pytest.mark.parametrize("text", [DEEP, '{"a": "\\ud800"}', "{", b"\xff", "9" * 5000])
    def test_is_refused_by_one_kind_of_error(self, text: str | bytes) -> None:
        with pytest.raises(ValueError):  # noqa: PT011
            parse_json(text)

    def test_pairs_of_surrogates_are_characters(self) -> None:
        assert parse_json('"\\ud83d\\ude00"') == "😀"

    @pytest.mark.parametrize("name", ["run.json", "eval.json", "metrics.jsonl"])
    def test_deep_files_of_a_run(self, tmp_path: Path, name: str) -> None:
        run = write_run(tmp_path / "run", made_heads(), measured=evaluation())
        (run / name).write_text(DEEP + "\n", encoding="utf-8")
        for read in (analysis.look, write_report):
            with pytest.raises(OutputError, match=name):
                read(run)
        assert not (run / "report.html").exists()

    @pytest.mark.parametrize("name", ["run.json", "eval.json", "metrics.jsonl"])
    def test_numbers_that_no_float_holds(self, tmp_path: Path, name: str) -> None:
        run = write_run(tmp_path / "run", made_heads(), measured=evaluation())
        text, big = (run / name).read_text(encoding="utf-8"), "9" * 400
        found, more = {
            "run.json": ('"q": [', ", "),
            "eval.json": ('"confusion": [[', ""),
            "metrics.jsonl": ('"loss": ', ', "other": '),
        }[name]
        (run / name).write_text(text.replace(found, f"{found}{big}{more}", 1), encoding="utf-8")
        with pytest.raises(OutputError, match=name):
            analysis.look(run)
        assert documents.number({"a": int("9" * 400)}, "a") is None
        with suppress(OutputError):
            write_report(run, figures=False)

    def test_facts_of_heads_that_are_no_table(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", made_heads())
        with np.load(run / "heads.npz") as archive:
            arrays = dict(archive)
        about = json.loads(arrays["about"].tobytes()) | {"facts": "x"}
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        np.savez(run / "heads.npz", **arrays)
        with pytest.raises(OutputError, match=r"is no file of heads \(its facts are no table\)"):
            analysis.look(run / "heads.npz")

    def test_examples_without_a_head(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", made_heads())
        with np.load(run / "heads.npz") as archive:
            arrays = dict(archive)
        for name in arrays:
            if name.startswith("example") and name.endswith(("before", "after")):
                arrays[name] = np.full_like(arrays[name], np.nan)
        np.savez(run / "heads.npz", **arrays)
        seen = analysis.look(run)
        assert "attention" not in seen.figures
        assert any("no attention heads that could be seen" in note for note in seen.notes)

    def test_infinite_attention(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", made_heads())
        with np.load(run / "heads.npz") as archive:
            arrays = dict(archive)
        arrays["before.magnitude"] = np.full_like(arrays["before.magnitude"], np.inf)
        np.savez(run / "heads.npz", **arrays)
        with pytest.raises(OutputError, match="run: holds a part that cannot be read"):
            write_report(run, figures=False)
        assert not (run / "report.html").exists()


def _archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def _npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


class TestArchives:
    def test_what_numpy_wrote(self, tmp_path: Path) -> None:
        given = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.eye(3, dtype="f2"))}
        np.savez_compressed(tmp_path / "a.npz", **given)
        with zipfile.ZipFile(tmp_path / "a.npz") as archive:
            found = archives.arrays(archive)
        assert all(np.array_equal(found[name], one) for name, one in given.items())

    @pytest.mark.parametrize(
        "content",
        [
            _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1125899906842624, 1024)}\n"),
            _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}\n", b"\0" * 8),
            _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", b"\x80\x04N."),
            _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (\n"),
            _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}\n", b"\0" * 16),
            b"\x80\x04N.",
        ],
        ids=["petabytes", "negative", "pickled", "cut", "too long", "pickle alone"],
    )
    def test_members_that_are_no_plain_array(self, tmp_path: Path, content: bytes) -> None:
        path = _archive(tmp_path / "heads.npz", about=content)
        tracemalloc.start()
        with pytest.raises(OutputError, match=r"heads.npz: is no file of heads"):
            read_heads(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()

    def test_a_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archives, "MOST_BYTES", 1000)
        path = _archive(tmp_path / "heads.npz", about=b"\0" * 1001)
        with pytest.raises(OutputError, match="unpacks to 1,001 bytes, more than 1,000"):
            read_heads(path)

    def test_positions_that_are_no_whole_numbers(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", made_heads())
        with np.load(run / "heads.npz") as archive:
            arrays = dict(archive)
        arrays["example0.label_positions"] = arrays["example0.label_positions"] + 0.5
        np.savez(run / "heads.npz", **arrays)
        with pytest.raises(OutputError, match="do not fit together"):
            analysis.look(run)


class TestStudies:
    def test_a_gzip_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(drawing, "MOST_FACTS_BYTES", 100_000)
        path = tmp_path / "study.json"
        path.write_bytes(gzip.compress(b" " * 50_000_000))
        tracemalloc.start()
        with pytest.raises(OutputError, match=r"study.json: .*unpacks to more than"):
            drawing.study_facts(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()

    def test_a_long_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(drawing, "MOST_FACTS_BYTES", 100_000)
        path = tmp_path / "study.json"
        path.write_bytes(b" " * 100_001)
        with pytest.raises(OutputError, match=r"study.json: .*more than 0 MB"):
            drawing.study_facts(path)

    @pytest.mark.parametrize("change", [
        {"figures": 1.5}, {"cells": [1]}, {"cells": [{}]}, {"cells": [{"id": "a", "model": []}]},
        {"paper": 7},
    ])  # fmt: skip
    def test_facts_with_other_things_in_them(self, tmp_path: Path, change: dict[str, Any]) -> None:
        path = made_study(tmp_path / "made") / "study.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change), encoding="utf-8")
        with pytest.raises(OutputError, match=r"study.json"):
            analysis.look(path)
        assert not list(tmp_path.glob(".*"))

    def test_a_failed_cell_that_is_a_number(self, tmp_path: Path) -> None:
        path = made_study(tmp_path / "made") / "study.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"failed": [3]}))
        with pytest.raises(OutputError, match=r"study.json: holds a part that cannot be read"):
            write_report(path, tmp_path / "out.html", figures=False)
        assert [one.name for one in tmp_path.iterdir()] == ["made"]

    def test_answers_that_are_neither_right_nor_wrong(self) -> None:
        with pytest.raises(ValueError, match="written as 0 and 1"):
            right_answers("01x")

    def test_gzip_that_is_broken_inside(self, tmp_path: Path) -> None:
        packed = bytearray(gzip.compress(b'{"cells": []}' * 99))
        packed[14:24] = b"\xff" * 10
        (tmp_path / "study.json").write_bytes(packed)
        with pytest.raises(OutputError, match=r"study.json: cannot be read"):
            drawing.study_facts(tmp_path / "study.json")

    @pytest.mark.parametrize("sweep", ["x", 1.5, [3]])
    def test_cells_with_other_things_in_them(self, tmp_path: Path, sweep: Any) -> None:
        folder = made_study(tmp_path / "made")
        (folder / "study.json").unlink()
        (folder / "cells").mkdir(exist_ok=True)
        broken = {"id": "a", "status": "done", "model": "m", "method": "abft", "sweep": sweep}
        (folder / "cells" / "a.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(OutputError, match="holds a part that cannot be read"):
            analysis.look(folder)


class TestParquet:
    def _write(self, path: Path, table: Any, **settings: Any) -> DataSection:
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, **settings)
        return DataSection(source=str(path))

    def _table(self, rows: int) -> Any:
        import pyarrow

        return pyarrow.table({"text": ["x" * 50] * rows, "label": ["ham", "spam"] * (rows // 2)})

    @pytest.mark.parametrize(
        ("limit", "value", "message"),
        [
            ("MOST_ROWS", 9_999, "10,000 rows, more than 9,999"),
            ("MOST_BYTES", 100, "it unpacks to [0-9,]+ bytes, more than 100"),
            # A dictionary holds the text once: only reading shows what it comes to.
            ("MOST_BYTES", 100_000, "it unpacks to [0-9,]+ bytes, more than 100,000"),
        ],
    )
    def test_bombs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
    ) -> None:
        section = self._write(tmp_path / "a.parquet", self._table(10_000))
        assert len(data.report(section).require()) == 10_000
        monkeypatch.setattr(_rows, limit, value)
        with pytest.raises(DataError, match=message):
            data.report(section).require()

    def test_what_the_file_itself_says_is_too_much_is_not_unpacked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        section = self._write(tmp_path / "a.parquet", self._table(100))
        monkeypatch.setattr(_rows, "MOST_BYTES", 100)
        monkeypatch.setattr(_rows, "_batches", None)
        with pytest.raises(DataError, match="more than 100"):
            data.report(section).require()

    def test_texts_that_are_not_utf8(self, tmp_path: Path) -> None:
        section = self._write(
            tmp_path / "a.parquet", self._table(4), use_dictionary=False, compression="none"
        )
        path = tmp_path / "a.parquet"
        path.write_bytes(path.read_bytes().replace(b"xxxx" * 12, b"\xff" * 48))
        with pytest.raises(DataError, match=r"a.parquet: holds a value that cannot be read"):
            data.report(section).require()


@pytest.mark.parametrize("layers", [10**9, 5000, -7, 1e30])
def test_layers_without_number(tmp_path: Path, layers: float) -> None:
    settings = {"model_type": "llama", "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match=r"config.json: num_hidden_layers is"):
        skeleton(str(tmp_path))


class TestCommandLine:
    def test_a_copy_of_what_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_bytes(b"\xff")
        result = invoke("recipes", "copy", tmp_path / "a.yaml", tmp_path / "b.yaml")
        assert result.exit_code == 2
        assert "a.yaml: not UTF-8 text" in result.stderr
        assert not (tmp_path / "b.yaml").exists()

    def test_a_value_without_end_is_cut_and_controls_are_shown(self) -> None:
        result = invoke("finetune", "demo", "--set", f"model=\x1b[2J{'x' * 9000}")
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.isprintable()
        assert len(line) < 3100
        assert "\\x1b[2J" in line


@pytest.mark.parametrize("read", [lambda path: read_bytes(path, 10)])
def test_sizes_are_checked(tmp_path: Path, read: Callable[[Path], bytes]) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    assert read(tmp_path / "a") == b"x" * 10
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="more than"):
        read(tmp_path / "a")
