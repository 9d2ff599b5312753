"""Readers take any bytes and any values: they read them, or refuse them with one clear error."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cli_support import invoke
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_cells import cell
from made_cells import study as made_study
from made_runs import evaluation, heads, write_run

from abft_mlx import analysis, data, recipe, study
from abft_mlx.errors import AbftError, DataError, OutputError, RecipeError, UsageError
from abft_mlx.files import parse_json
from abft_mlx.recipe import DataSection

DEEP = "[" * 30_000
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_KEYS = st.sampled_from(("data", "prompt", "training", "adapter", "model", "mixture", "evaluation"))
_BOUNDED = settings(max_examples=60, suppress_health_check=list(HealthCheck))


@_BOUNDED
@given(st.dictionaries(_KEYS, _JSON, max_size=3))
def test_recipes_and_studies(values: dict[str, Any]) -> None:
    for read in (recipe.loads, study.loads):
        with suppress(UsageError):
            read(json.dumps(values))


@_BOUNDED
@given(st.binary(max_size=300), st.sampled_from(("csv", "tsv", "jsonl", "json", "parquet")))
def test_tables_of_any_bytes(tmp_path_factory: Any, content: bytes, kind: str) -> None:
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    path.write_bytes(b"text,label\n" + content if kind in ("csv", "tsv") else content)
    with suppress(UsageError):
        data.report(DataSection(source=str(path))).require()


@_BOUNDED
@given(st.lists(st.dictionaries(st.sampled_from(("text", "label")), _JSON), max_size=5))
def test_rows_of_any_values(tmp_path_factory: Any, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with suppress(UsageError):
        data.report(DataSection(source=str(path))).require()


@pytest.mark.parametrize("text", [DEEP, "{", b"\xff", "9" * 5000])
def test_json_is_refused_by_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)


@pytest.mark.parametrize("text", ["a: " + DEEP, "data: [nothing]\n"])
def test_yaml_names_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    for load in (recipe.load, study.load):
        with pytest.raises(RecipeError) as caught:
            load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["run.json", "eval.json", "metrics.jsonl"])
def test_damaged_files_of_a_run(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", heads(), measured=evaluation())
    (run / name).write_text(DEEP + "\n", encoding="utf-8")
    with pytest.raises(OutputError, match=name):
        analysis.look(run)


def test_a_damaged_study(tmp_path: Path) -> None:
    analysis.write_study(tmp_path, made_study(), [cell("abft", "0110", seed=1)])
    path = tmp_path / "study.json"
    packed = bytearray(gzip.compress(path.read_bytes()))
    packed[14:24] = b"\xff" * 10
    path.write_bytes(packed)
    with pytest.raises(AbftError, match=r"study\.json"):
        analysis.look(path)


def test_parquet_texts_that_are_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x" * 50] * 4, "label": ["ham", "spam"] * 2})
    parquet.write_table(table, path, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"xxxx" * 12, b"\xff" * 48))
    with pytest.raises(DataError, match=r"a\.parquet"):
        data.report(DataSection(source=str(path))).require()


def test_control_characters_of_an_option_are_shown() -> None:
    result = invoke("finetune", "demo", "--set", "model=\x1b[2Jx")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.isprintable()
