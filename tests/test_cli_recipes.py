"""``abft-mlx recipes`` and ``abft-mlx doctor``: exit status and words of each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_support import document, invoke

from abft_mlx import recipe, runtime
from abft_mlx.cli import doctor


def test_list_and_show(checkout: Path) -> None:
    result = invoke("recipes", "list")
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(name in result.stdout for name in recipe.shipped())
    assert len(document(invoke("recipes", "list", "--json"))["recipes"]) == len(recipe.shipped())
    result = invoke("recipes", "show", "demo")
    assert result.stdout == (checkout / "recipes/demo.yaml").read_text(encoding="utf-8")
    shown = document(invoke("recipes", "show", "demo", "--json"))["recipe"]
    assert shown == recipe.load("demo").model_dump(mode="json")


def test_copy_writes_a_recipe_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("recipes", "copy", "demo")
    assert result.stdout == "wrote demo.yaml\nnext: abft-mlx finetune demo.yaml\n"
    assert recipe.load("./demo.yaml") == recipe.load("demo")
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious", encoding="utf-8")
    refused = invoke("recipes", "copy", "demo", mine)
    assert refused.exit_code == 2
    assert f"{mine} exists" in refused.stderr
    assert mine.read_text(encoding="utf-8") == "precious"
    assert invoke("recipes", "copy", "demo", mine, "--overwrite").exit_code == 0
    assert recipe.load(mine) == recipe.load("demo")


def test_validate_says_which_are_wrong(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("training: {udpates: 3}\n", encoding="utf-8")
    result = invoke("recipes", "validate", wrong, "demo")
    assert (result.exit_code, result.stdout) == (2, "demo: valid\n")
    assert "training.udpates" in result.stderr
    as_json = invoke("recipes", "validate", "--json", "demo", wrong)
    assert as_json.exit_code == 2
    assert [row["valid"] for row in document(as_json)["files"]] == [True, False]
    result = invoke("recipes", "validate", *recipe.shipped())
    assert (result.exit_code, result.stderr) == (0, "")


def test_doctor_measures_and_estimates() -> None:
    result = invoke("doctor", "demo", "--batch", 4, "--json")
    assert result.exit_code == 0
    facts = document(result)
    assert all(rate > 0 for rate in facts["matrix_product_flops_per_second"].values())
    assert facts["blas"]["path"] == runtime.prepare().path
    assert facts["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    estimate = facts["memory_estimate"]
    assert (estimate["model"], estimate["length_tokens"], estimate["rows"]) == ("demo", 256, 4)
    assert "verdict    fits" in result.stderr


@pytest.mark.parametrize(
    ("platform", "blas", "rates", "parts"),
    [
        ("linux", None, {"float32": 50e9, "bfloat16": 49e9}, ["libopenblas0-pthread"]),
        (
            "linux",
            "/lib/blas.so",
            {"float32": 9e9, "bfloat16": 1e9},
            ["/lib/blas.so is loaded but slow", "float32 models"],
        ),
        ("darwin", None, {"float32": 1.0, "bfloat16": 0.1}, []),
    ],
)
def test_advice(
    platform: str,
    blas: str | None,
    rates: dict[str, float],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    lines = doctor.advice(blas, rates)
    assert len(lines) == len(parts)
    assert all(part in line for part, line in zip(parts, lines, strict=True))
    facts = {
        "versions": {"mlx": "1"},
        "platform": "any",
        "device": "GPU",
        "blas": {"path": blas, "note": "a note"},
        "memory": {"machine_bytes": 2**34, "recommended_bytes": 2**33},
        "matrix_product_flops_per_second": rates,
        "advice": lines,
    }
    shown = "\n".join(doctor.describe(facts))
    assert "up to 8.0 GiB" in shown
    assert ("BLAS" in shown) == (platform == "linux")
