"""``abft-mlx export``: what it writes, in stock mlx-lm and in PEFT, and what it measured of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.fuse
import numpy as np
import pytest
import tiny_models
from cli_support import document, invoke
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_peft import far, peft_module, strict

from abft_mlx import adapters, exchange, experiment, loading, recipe
from abft_mlx.recipe import AdapterSection

TOLERANCE = 1e-4
FEW = 6  # prompts of a quantized model, which a CPU answers slowly
SETTINGS = (
    "training.updates=4",
    "training.examples=32",
    "training.prompts_per_update=8",
    "training.learning_rate=0.003",
    "evaluation.queries=64",
    "evaluation.repeats=1",
)


def train(folder: Path, *settings: str) -> Path:
    """A short run of the demo; returns its folder."""
    chosen = [f"--set={change}" for change in (*SETTINGS, *settings)]
    result = invoke("finetune", "demo", "--output", folder, "--quiet", *chosen)
    assert result.exit_code == 0, result.stderr
    return folder


def export(run: Path, to: str, output: Path, *options: object) -> dict[str, Any]:
    """The JSON document of an export that succeeds."""
    result = invoke("export", run, "--to", to, "--output", output, "--json", *options)
    assert result.exit_code == 0, result.stderr
    return document(result)


def base_folder() -> str:
    """The bundled model's folder."""
    return str(loading.find("demo"))


def asked(run: Path, count: int = 64) -> tuple[list[list[int]], list[int], Any]:
    """Tokens of a run's test texts behind its demonstrations, its label tokens, its tokenizer."""
    opened = experiment.prepare(recipe.load(run))
    task = opened.task
    lines = (run / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    shown = [(row["text"], opened.task.space.names.index(row["label"])) for row in rows]
    texts = task.splits.test.pairs()[:count]
    prompts = [task.builder.build(shown, text, gold, where="a test") for text, gold in texts]
    tokens = [list(prompt.token_ids) for prompt in prompts]
    return tokens, list(opened.task.space.first_ids), opened.loaded.tokenizer


def answers(model: nn.Module, prompts: list[list[int]]) -> np.ndarray:
    """(N, V) logits after every prompt, each asked alone through the model's own code."""
    return np.stack([np.array(model(mx.array([prompt]))[0, -1]) for prompt in prompts])


def stock(model: str | Path, adapter: Path | None = None) -> nn.Module:
    """What stock mlx-lm opens."""
    return mlx_lm.load(str(model), adapter_path=None if adapter is None else str(adapter))[0]


def quantized(folder: Path, bits: int = 4) -> Path:
    """The bundled model as mlx_lm.convert quantizes it."""
    model, tokenizer = mlx_lm.load(base_folder())
    config = mlx_lm.utils.load_config(Path(base_folder()))
    model, config = mlx_lm.utils.quantize_model(model, config, 64, bits)
    mlx_lm.utils.save(folder, base_folder(), model, tokenizer, config)
    return folder


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    """Name to array."""
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def prompts(run: Path) -> list[list[int]]:
    return asked(run)[0]


@pytest.fixture(scope="module")
def expected(run: Path, prompts: list[list[int]]) -> np.ndarray:
    """(N, V) of base + adapter in stock mlx-lm."""
    return answers(stock(base_folder(), run), prompts)


@pytest.fixture(scope="module")
def base(prompts: list[list[int]]) -> np.ndarray:
    return answers(stock(base_folder()), prompts)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("base") / "four-bits")


def holds_no_path(folder: Path, *paths: object) -> bool:
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    return not any(str(path).encode() in content for path in paths)


def test_mlx(
    run: Path, prompts: Any, expected: np.ndarray, base: np.ndarray, tmp_path: Path
) -> None:
    output = tmp_path / "mlx"
    report = export(run, "mlx", output)
    assert far(answers(stock(base_folder(), output), prompts), expected) <= TOLERANCE
    assert holds_no_path(output, tmp_path, run, base_folder())
    assert report["files"] == {p.name: p.stat().st_size for p in output.iterdir()}
    assert set(report["files"]) == {adapters.CONFIG, adapters.WEIGHTS}
    assert (report["schema"], report["to"], report["model"], report["scale"]) == (
        1,
        "mlx",
        "demo",
        1.0,
    )
    assert report["weights"] is None
    assert report["warnings"] == []
    check_measured(report["measured"], run, base, expected, expected)
    # Worth measuring: the adapter changes labels.
    assert report["measured"]["base"]["agreement"] < len(prompts)


def check_measured(
    found: dict[str, Any], run: Path, base: np.ndarray, adapted: np.ndarray, result: np.ndarray
) -> None:
    """Compare an export's measurement with logits that stock mlx-lm gave."""
    labels = asked(run)[1]
    assert found["prompts"] == len(adapted)
    for name, other in (("base", base), ("result", result)):
        apart = np.abs(adapted - other)
        assert found[name] == {
            "vocabulary_max": pytest.approx(apart.max(), abs=1e-3),
            "vocabulary_mean": pytest.approx(apart.mean(), abs=1e-4),
            "labels_max": pytest.approx(apart[:, labels].max(), abs=1e-3),
            "labels_mean": pytest.approx(apart[:, labels].mean(), abs=1e-4),
            "agreement": sum(
                labels[ours[labels].argmax()] == labels[theirs[labels].argmax()]
                for ours, theirs in zip(adapted, other, strict=True)
            ),
        }
    left = np.abs(adapted - result)[:, labels].mean() / np.abs(adapted - base)[:, labels].mean()
    assert found["kept"] == pytest.approx(1 - left, abs=1e-3)


def test_peft(run: Path, prompts: Any, expected: np.ndarray, tmp_path: Path) -> None:
    """The bundled model in transformers, with the export on it."""
    peft = peft_module()
    import torch
    import transformers

    report = export(run, "peft", tmp_path / "peft", "--base-model", "owner/name", "--scale", 1.5)
    assert report["base_model"] == "owner/name"
    assert holds_no_path(tmp_path / "peft", tmp_path, run, base_folder())
    with strict():
        own = transformers.AutoModelForCausalLM.from_pretrained(
            base_folder(), dtype=torch.float32, attn_implementation="eager"
        )
        model = peft.PeftModel.from_pretrained(own, tmp_path / "peft").eval()
    with torch.no_grad():
        theirs = [model(torch.tensor([prompt])).logits[0, -1].numpy() for prompt in prompts]
    stronger = stock(base_folder(), run)
    adapters.scale(stronger, 1.5)
    ours = answers(stronger, prompts)
    assert far(np.stack(theirs), ours) <= TOLERANCE
    assert far(ours, expected) > 1e-2
    assert report["measured"]["kept"] == pytest.approx(1, abs=1e-4)


def test_fused(run: Path, prompts: Any, expected: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "fused"
    report = export(run, "fused", output)
    assert far(answers(stock(output), prompts), expected) <= TOLERANCE
    assert report["measured"]["result"]["vocabulary_max"] <= TOLERANCE
    assert report["measured"]["lost"] is False
    assert report["weights"] == "floating point, as the base"
    assert report["base_model"] is None
    assert holds_no_path(output, tmp_path, run, base_folder())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (Path(base_folder()) / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_quantizing_again_is_mlx_lms_and_is_measured(
    run: Path, four_bits: Path, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mlx_lm.fuse does silently, bit for bit; and the adapter is said to be lost."""
    few = prompts[:FEW]
    report = export(run, "fused", tmp_path / "ours", "--model", four_bits, "--prompts", FEW)
    options = ("--model", four_bits, "--adapter-path", run, "--save-path", tmp_path / "theirs")
    monkeypatch.setattr(sys, "argv", ["mlx_lm.fuse", *map(str, options)])
    mlx_lm.fuse.main()
    ours, theirs = stock(tmp_path / "ours"), stock(tmp_path / "theirs")
    expected = parameters(theirs)
    found = parameters(ours)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    check_measured(
        report["measured"], run,
        answers(stock(four_bits), few),
        answers(stock(four_bits, run), few),
        answers(theirs, few),
    )  # fmt: skip
    assert report["measured"]["lost"] is True
    assert report["measured"]["kept"] < 0.5
    (warning,) = report["warnings"]
    assert warning.startswith("the adapter is lost: ")
    assert "--float-merged" in warning


@pytest.mark.parametrize(
    ("option", "weights", "close"),
    [
        (["--float-merged"], "as the base, what was merged in floating point", 1e-3),
        (["--dequantize"], "floating point, dequantized", 1e-3),
        (["--quantize", "8"], "as the base, what was merged in 8 bits", 0.5),
    ],
)
def test_ways_not_to_lose_it(
    run: Path, four_bits: Path, prompts: Any, option: list[str], weights: str, close: float,
    tmp_path: Path,
) -> None:  # fmt: skip
    report = export(
        run, "fused", tmp_path / "fused", "--model", four_bits, "--prompts", FEW, *option
    )
    expected = answers(stock(four_bits, run), prompts[:FEW])
    assert far(answers(stock(tmp_path / "fused"), prompts[:FEW]), expected) <= close
    assert report["measured"]["kept"] > 0.9
    assert report["weights"] == weights
    assert report["warnings"] == []
    kinds = {
        name.rpartition(".")[0]
        for name in parameters(stock(tmp_path / "fused"))
        if "scales" in name
    }
    merged = "model.layers.0.self_attn.q_proj"
    assert (merged in kinds, "lm_head" in kinds) == {
        "--float-merged": (False, True), "--dequantize": (False, False), "--quantize": (True, True),
    }[option[0]]  # fmt: skip


def test_a_float_base_is_quantized_as_a_whole(run: Path, tmp_path: Path) -> None:
    report = export(run, "fused", tmp_path / "fused", "--quantize", 8, "--prompts", FEW)
    settings = json.loads((tmp_path / "fused" / "config.json").read_text(encoding="utf-8"))
    assert settings["quantization"]["bits"] == 8
    assert report["weights"] == "8 bits"
    assert 0.5 < report["measured"]["kept"] < 0.9999
    again = export(run, "fused", tmp_path / "fused", "--quantize", 2, "--overwrite", "--prompts", 4)
    assert again["measured"]["lost"] is True
    assert "leave --quantize out" in again["warnings"][0]


@pytest.mark.parametrize("kind", ["mlx", "peft"])
def test_what_was_exported_is_imported(
    kind: str, run: Path, prompts: Any, expected: np.ndarray, tmp_path: Path
) -> None:
    """Everything that takes an adapter takes it; export among them, without a recipe."""
    export(run, kind, tmp_path / "first", "--no-measure")
    back = export(tmp_path / "first", "mlx", tmp_path / "back", "--model", "demo", "--no-measure")
    assert back["measured"] is None
    assert far(answers(stock(base_folder(), tmp_path / "back"), prompts), expected) <= TOLERANCE
    report = export(
        tmp_path / "first", "fused", tmp_path / "fused", "--model", "demo", "--recipe", "demo",
        "--prompts", 8,
    )  # fmt: skip
    assert report["measured"]["prompts"] == 8
    assert report["measured"]["kept"] > 0.999
    result = invoke("eval", "demo", "--adapter", tmp_path / "first", "--json",
                    "--set=evaluation.queries=8", "--set=evaluation.repeats=1")  # fmt: skip
    assert result.exit_code == 0, result.stderr


def test_a_full_run_with_a_head(tmp_path: Path) -> None:
    """The widest adapter: whole weights and the LM head, in all three formats."""
    run = train(tmp_path / "run", "adapter.kind=full", "adapter.head=true",
                "objective.kind=end_to_end", "training.learning_rate=0.0005")  # fmt: skip
    prompts, *_ = asked(run, 16)
    expected = answers(stock(base_folder(), run), prompts)
    export(run, "mlx", tmp_path / "mlx", "--prompts", 8)
    assert far(answers(stock(base_folder(), tmp_path / "mlx"), prompts), expected) <= TOLERANCE
    report = export(run, "fused", tmp_path / "fused", "--prompts", 8)
    assert far(answers(stock(tmp_path / "fused"), prompts), expected) <= TOLERANCE
    assert "lm_head" in report["layers"]
    assert export(run, "peft", tmp_path / "peft", "--prompts", 8)["measured"]["kept"] > 0.999


@pytest.mark.parametrize(("name", "head"), [("qwen2", False), ("gpt2", False), ("llama", True)])
def test_other_quantized_bases(name: str, head: bool, tmp_path: Path) -> None:
    """Tied embeddings, a fused projection, a trained LM head over a quantized one."""
    base = tiny_models.checkpoint(tmp_path / "base", name, bits=4)
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    # As mixed quantization notes single layers; what is merged may no longer be in there.
    path = "model.h.1.attn.c_attn" if name == "gpt2" else "model.layers.1.self_attn.q_proj"
    settings["quantization"][path] = {"group_size": 64, "bits": 4}
    (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    model, _ = load_model(base)
    adapters.attach(model, AdapterSection(rank=4, layers=[1], head=head))
    tiny_models.train(model)
    if head:
        noise = mx.random.normal(model.lm_head.weight.shape, key=mx.random.key(1))
        model.lm_head.weight = model.lm_head.weight + 0.1 * noise
    adapters.save(model, tmp_path / "run")
    tokens, _ = tiny_models.tokens()
    expected = np.array(model(tokens))
    assert far(np.array(load_model(base)[0](tokens)), expected) > 1e-2
    for kind in ("float_merged", "dequantize"):
        report = exchange.export(
            tmp_path / "run", "fused", tmp_path / kind, model=str(base),
            precision=exchange.Precision(**{kind: True}),
        )  # fmt: skip
        assert report.measured is None
        again, _ = load_model(tmp_path / kind)
        assert ("lm_head" in again) == (name == "llama")
        assert far(np.array(again(tokens)), expected) <= TOLERANCE
