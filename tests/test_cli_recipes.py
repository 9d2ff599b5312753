"""``abft-mlx recipes`` and ``abft-mlx doctor``: exit status and words of each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_support import document, invoke

from abft_mlx import recipe, runtime
from abft_mlx.cli import doctor


def test_list_names_every_recipe() -> None:
    result = invoke("recipes", "list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in recipe.shipped())
    assert result.stderr == ""


def test_show_prints_the_file(checkout: Path) -> None:
    result = invoke("recipes", "show", "demo")
    assert result.exit_code == 0
    assert result.stdout == (checkout / "recipes/demo.yaml").read_text(encoding="utf-8")


def test_show_as_json_spells_out_every_default() -> None:
    result = invoke("recipes", "show", "demo", "--json")
    assert result.exit_code == 0
    assert document(result)["recipe"] == recipe.load("demo").model_dump(mode="json")


def test_copy_writes_a_recipe_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("recipes", "copy", "demo")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "wrote demo.yaml\nnext: abft-mlx finetune demo.yaml\n"
    assert recipe.load("./demo.yaml") == recipe.load("demo")


def test_copy_replaces_only_when_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious", encoding="utf-8")
    refused = invoke("recipes", "copy", "demo", mine)
    assert refused.exit_code == 2
    assert f"{mine} exists" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert mine.read_text(encoding="utf-8") == "precious"
    assert invoke("recipes", "copy", "demo", mine, "--overwrite").exit_code == 0
    assert "precious" not in mine.read_text(encoding="utf-8")


def test_validate_says_which_are_wrong(tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.yaml", tmp_path / "right.yaml"
    wrong.write_text("training: {udpates: 3}\n", encoding="utf-8")
    right.write_text("training: {updates: 3}\n", encoding="utf-8")
    result = invoke("recipes", "validate", right, wrong, "demo")
    assert result.exit_code == 2
    assert result.stdout == f"{right}: valid\ndemo: valid\n"
    assert "training.udpates" in result.stderr
    assert "updates" in result.stderr
    as_json = invoke("recipes", "validate", "--json", right, wrong)
    assert as_json.exit_code == 2
    assert [one["valid"] for one in document(as_json)["files"]] == [True, False]
    assert "training.udpates" in document(as_json)["files"][1]["error"]


def test_validate_succeeds_on_every_shipped_recipe() -> None:
    result = invoke("recipes", "validate", *recipe.shipped())
    assert (result.exit_code, result.stderr) == (0, "")


def test_doctor_measures() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    facts = document(result)
    assert all(rate > 0 for rate in facts["matrix_product_flops_per_second"].values())
    assert facts["blas"]["path"] == runtime.prepare().path
    assert facts["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert "BLAS       " in result.stderr


EVEN = {"float32": 50e9, "bfloat16": 49e9}


class TestAdvice:
    def test_without_blas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
        (advice,) = doctor.advice(None, EVEN)
        assert "libopenblas0-pthread" in advice
        assert "pip install mkl" in advice

    def test_no_mkl_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
        (advice,) = doctor.advice(None, EVEN)
        assert "libopenblas0-pthread" in advice
        assert "mkl" not in advice

    def test_slow_blas_and_slow_half_precision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "linux")
        busy, half = doctor.advice("/lib/blas.so", {"float32": 9e9, "bfloat16": 1e9})
        assert "/lib/blas.so is loaded but slow" in busy
        assert "float32 models" in half

    def test_nothing_on_a_mac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        assert doctor.advice(None, {"float32": 1.0, "bfloat16": 0.1}) == []
        facts = {
            "versions": {"mlx": "1"},
            "platform": "Darwin",
            "device": "GPU",
            "blas": {"path": None, "note": "MLX brings its own"},
            "memory": {"machine_bytes": 2**34, "recommended_bytes": 2**33},
            "matrix_product_flops_per_second": EVEN,
            "advice": [],
        }
        lines = "\n".join(doctor.describe(facts))
        assert "up to 8.0 GiB" in lines
        assert "BLAS" not in lines
