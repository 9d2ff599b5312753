"""``abft-mlx export``: wrong usage is one line, and nothing is left half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_models
from cli_support import document, invoke, train_run
from mlx_lm.utils import load_model

from abft_mlx import adapters, exchange, loading
from abft_mlx.recipe import AdapterSection


@pytest.fixture(scope="module")
def run(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "first", model, texts)


def train(folder: Path, model: Path, texts: Path) -> Path:
    return train_run(
        folder, model, texts, "adapter.rank=4", "prompt.demonstrations=4",
        "training.keep_best=false", "objective.kind=end_to_end",
    )  # fmt: skip


@pytest.fixture
def bare(run: Path, tmp_path: Path) -> Path:
    """An adapter folder as mlx-lm writes them, with nothing else in it."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        shutil.copy(run / name, folder)
    return folder


def test_for_people_and_quietly(run: Path, tmp_path: Path) -> None:
    result = invoke("export", run, "--to", "peft", "--output", tmp_path / "a", "--prompts", 5)
    assert result.exit_code == 0, result.stderr
    assert "on 5 prompts, against base + adapter" in result.stdout
    assert f"predict {run} --show-prompt" in result.stdout
    assert "100.0% of the adapter's effect on labels is kept" in result.stdout
    again = invoke(
        "export", run, "--to", "peft", "--output", tmp_path / "b", "--prompts", 8, "--quiet"
    )
    assert again.stdout.startswith("2 files, ")
    assert again.stdout.count("\n") == 1
    assert again.stderr == ""


def test_an_adapter_without_a_recipe(bare: Path, model: Path, texts: Path, tmp_path: Path) -> None:
    given = ("export", bare, "--to", "fused", "--output", tmp_path / "out")
    for options, message in (
        ((), "does not name its base model; give --model"),
        (("--model", model), "has no recipe.yaml to take prompts from: give --data or --recipe"),
    ):
        result = invoke(*given, *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    measured = invoke(*given, "--model", model, "--data", texts, "--json")
    assert measured.exit_code == 0, measured.stderr
    assert document(measured)["measured"]["prompts"] > 0


def test_a_run_is_measured_without_its_data(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mails = tmp_path / "mails.csv"
    shutil.copy(texts, mails)
    run = train(tmp_path / "run", model, mails)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = ("export", "../run", "--to", "fused", "--output", "out", "--overwrite", "--json")
    whole = document(invoke(*given))
    mails.unlink()
    done = invoke(*given)
    assert done.exit_code == 0, done.stderr
    told = document(done)
    shown = (run / "demonstrations.jsonl").read_text().splitlines()
    assert told["measured"]["prompts"] == len(shown) == 4
    assert "demonstrations" in told["measured_on"]
    assert "mails.csv" in told["measured_on"]
    assert whole["measured"]["prompts"] > 4
    for one in (whole, told):
        assert one["measured"]["kept"] == pytest.approx(1, abs=1e-3)
        assert one["measured"]["base"]["labels_max"] > 1e-3
    # An export may be given away; the texts may not.
    content = b"".join(one.read_bytes() for one in Path("out").iterdir())
    assert not [one for one in shown if json.loads(one)["text"].encode() in content]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "fused", "--scale", 0), "--scale 0.0: give a finite number that is not 0"),
        (("--to", "mlx", "--quantize", 4), "--quantize are for merged models"),
        (("--to", "fused", "--quantize", 7), "--quantize 7: MLX quantizes to 2, 3, 4, 5, 6, 8"),
        (("--to", "fused", "--float-merged", "--quantize", 8), "exclude each other"),
        (("--to", "peft", "--base-model", "a b/c"), "--base-model 'a b/c' is not a hub id"),
    ],
)
def test_wrong_usage_is_one_line(
    run: Path, options: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    result = invoke("export", run, "--output", tmp_path / "out", *options, "--quiet")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_lies_at_the_output_is_not_lost(run: Path, model: Path, tmp_path: Path) -> None:
    given = ("export", run, "--to", "mlx", "--no-measure", "--quiet", "--output")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine", encoding="utf-8")
    for place, message in (
        (tmp_path / "file", "is a file; name a folder"),
        (tmp_path / "folder", "contains thesis.tex"),
        (run, "is exported; choose another --output"),
        (model, "is exported; choose another --output"),
    ):
        before = sorted(run.iterdir())
        result = invoke(*given, place, "--overwrite")
        assert result.exit_code == 2, place
        assert message in result.stderr
        assert sorted(run.iterdir()) == before
    first = tmp_path / "first"
    assert invoke(*given, first).exit_code == 0
    again = invoke(*given, first)
    assert again.exit_code == 2
    assert "contains an export already; use --overwrite" in again.stderr
    # Another format: nothing of the earlier one stays.
    other = invoke("export", run, "--to", "peft", "--no-measure", "--output", first, "--overwrite")
    assert other.exit_code == 0
    assert sorted(one.name for one in first.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


def test_a_failure_leaves_the_earlier_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    given = ("export", run, "--to", "peft", "--output", out, "--prompts", 4)
    assert invoke(*given, "--no-measure").exit_code == 0
    before = {one.name: one.read_bytes() for one in out.iterdir()}

    def fail(path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise RuntimeError("no space")

    monkeypatch.setattr(mx, "save_safetensors", fail)
    result = invoke(*given, "--overwrite", "--scale", 2)
    assert result.exit_code == 1
    assert "cannot be written (no space)" in result.stderr
    assert {one.name: one.read_bytes() for one in out.iterdir()} == before
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_tokenizers_memory_of_a_folder_is_not_copied(
    model: Path, run: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base)
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"name_or_path": str(base)}), encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = str(base)
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    exchange.export(run, "fused", tmp_path / "out", model=str(base))
    for one in (tmp_path / "out").iterdir():
        assert str(base).encode() not in one.read_bytes(), one.name
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize(
    ("to", "bits", "named"),
    [
        ("mlx", None, "owner/name"),
        ("mlx", 4, "owner/name"),
        ("peft", 4, None),
    ],
)
def test_a_base_of_the_hub_is_named(
    to: str, bits: int | None, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=bits)
    made, _ = load_model(base)
    adapters.attach(made, AdapterSection(rank=4))
    adapters.save(made, tmp_path / "adapter", base_model="owner/name")
    whole = loading.find
    monkeypatch.setattr(
        loading, "find", lambda name, *rest: base if name == "owner/name" else whole(name, *rest)
    )
    result = invoke(
        "export", tmp_path / "adapter", "--to", to, "--output", tmp_path / "out", "--no-measure",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert (document(result)["model"], document(result)["base_model"]) == ("owner/name", named)
    written = json.loads((tmp_path / "out" / adapters.CONFIG).read_text(encoding="utf-8"))
    assert written.get("base_model_name_or_path" if to == "peft" else "model") == named
