"""Every row of the port table on a tiny random model; benchmarks/support_table.py has them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports import table as port_table

EXACT = 1e-5
FIRST = [port.architectures[0] for port in ports.PORTS]


@pytest.fixture(scope="module")
def checks(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("support_checks")


@pytest.fixture(scope="module")
def table(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("support_table")


@pytest.fixture(scope="module")
def page(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("support_page")


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def test_no_architecture_has_two_ports() -> None:
    names = [name for port in ports.PORTS for name in port.architectures]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", FIRST)
def test_one_of_every_row(
    checks: ModuleType, page: ModuleType, tiny: ModuleType, name: str, tmp_path: Path
) -> None:
    if name not in tiny.architectures():
        pytest.skip(f"the installed mlx-lm has no {name}")
    model = tiny.build(name)
    assert checks.logit_error(model) <= EXACT
    pattern, output = checks.pattern_error(model)
    assert pattern <= EXACT
    assert output <= EXACT
    assert checks.padding_error(model) <= EXACT
    moved, kept = checks.train(model)
    assert moved > 1e-4
    assert kept == 0
    assert (checks.hook_error(tiny.build(name)) is None) == (name in page.BESIDES)
    assert checks.reload_error(model, name, tmp_path) <= EXACT


@pytest.mark.parametrize(
    "name", ["gpt_neox", "internlm2", "qwen3_next", "deepseek_v2", "phi3", "afm7"]
)
def test_the_outputs_that_train_make_the_pattern_and_the_others_do_not(
    tiny: ModuleType, name: str
) -> None:
    """Of the first layer: what comes after it changes with the values."""
    model = tiny.build(name)
    port = ports.port_for(model)
    tokens, last = tiny.tokens()
    number = next(n for n, one in enumerate(port.layers(model)) if port.attention_module(one))
    layer = port.layers(model)[number]
    before = np.array(attention.capture(model, tokens, last)[number])

    def moved(path: str, outputs: np.ndarray) -> float:
        linear = ports.resolve(port.attention_module(layer), path)
        weight = linear.weight
        noise = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32)
        linear.weight = weight + mx.array(noise * outputs[:, None])
        after = np.array(attention.capture(model, tokens, last)[number])
        linear.weight = weight
        return float(np.abs(after - before).max())

    fused = [one for one in port.layer_projections(layer) if one.parts]
    assert fused
    for projection in fused:
        outputs = port.qk_outputs(layer, projection)
        parts = port.part_outputs(layer, projection)
        assert outputs is not None
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(outputs)))
        for role, indices in parts.items():
            chosen = np.isin(np.arange(len(outputs)), indices)
            if role in ("q", "k"):
                assert moved(projection.path, chosen) > 0.01
            elif role == "gate" or not projection.path.startswith("kv_a"):
                # The latent of kv_a_proj_with_mqa makes keys as well as values.
                assert moved(projection.path, chosen) == 0


def test_a_hybrid_has_heads_in_its_attention_layers_alone(tiny: ModuleType) -> None:
    for name, with_heads in {"nemotron_h": [1], "kimi_linear": [1], "qwen3_next": [1]}.items():
        heads = ports.heads(tiny.build(name))
        assert [n for n, one in enumerate(heads) if one is not None] == with_heads


def test_scales_and_caps_of_the_logits_are_the_models_own(tiny: ModuleType) -> None:
    """Where they are left out, logits differ: the test can fail."""
    for name in ("gemma2", "cohere", "granite", "minicpm", "nanochat"):
        model = tiny.build(name)
        port = ports.port_for(model)
        tokens, _ = tiny.tokens()
        hidden = port.hidden(model, tokens)
        expected = np.array(model(tokens))[..., :3]
        bare = np.array(hidden @ ports.head_rows(port.head(model), mx.arange(3)).T)
        assert np.abs(bare - expected).max() > 0.01, name
        assert np.abs(np.array(port.logits(model, hidden, [0, 1, 2])) - expected).max() <= EXACT


def test_an_attention_that_is_computed_otherwise_is_one_line(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gear has its own attention where scores are capped; here its port does not say so."""
    gear = pytest.importorskip("mlx_lm.models.gear", reason="the installed mlx-lm has no gear")
    model = gear.Model(
        gear.ModelArgs.from_dict(tiny.settings("gear") | {"attn_logit_softcapping": 20.0})
    )
    unaware = replace(ports.port_for(model), by_hand=())
    monkeypatch.setattr(port_table, "PORTS", (unaware,))
    tokens, last = tiny.tokens()
    with pytest.raises(UnsupportedArchitectureError, match="computes its attention in another way"):
        attention.capture(model, tokens, last)


GOOD = {
    "layers": [3, 3], "trained": ["q_proj"], "pattern": 1e-8, "output": 1e-7, "logits": 0.0,
    "stock": 0.0, "hooks": 0.0, "padding": 0.0, "lora": 0.2, "kept": 0.0, "quantized": 0.2,
    "quantized_kept": 0.0,
    "eager": 1e-7, "eager_logits": 1e-6, "largest": 0.9, "why_not": None, "note": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pattern", 1e-3, "pattern"),
        ("logits", float("nan"), "logits"),
        ("padding", 1e-2, "padding"),
        ("kept", 1e-9, "kept"),
        ("lora", 0.0, "lora"),
        ("eager", 1e-3, "eager"),
        ("eager_logits", 1e-2, "eager_logits"),
        ("eager", None, "nothing to compare with"),
        ("largest", 0.1, "uniform"),
        ("hooks", None, "hooks"),
    ],
)
def test_the_table_notices(page: ModuleType, name: str, value: Any, said: str) -> None:
    assert page.problem("one", GOOD) is None
    assert said in page.problem("one", GOOD | {name: value})


def test_the_table_keeps_what_failed(page: ModuleType) -> None:
    pytest.importorskip("transformers")
    made = page.page(
        {
            "one": GOOD,
            "two": {"error": "no | such"},
            "three": GOOD | {"stock": 1.0},
            "four": GOOD | {"eager": None, "eager_logits": None, "why_not": "a reason"},
            "talkie": GOOD | {"hooks": None, "note": "a difference"},
        }
    )
    assert "**3 of 5 are supported" in made
    assert "2 of them also against" in made
    assert "| one | 3 of 3 | q_proj | 1e-07 | 1e-06 |" in made
    assert "| two | no \\| such |" in made
    assert "| three | stock 1.0e+00 |" in made
    assert "| four | a reason |" in made
    assert "| talkie | a difference |" in made
    assert "| talkie | the embeddings of the tokens |" in made


def test_one_architecture_from_the_command_line(
    table: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("torch", reason="needs the bench extra, to compare with")
    for name, key in {"llama": "eager", "mamba": "error"}.items():
        monkeypatch.setattr("sys.argv", ["support_table.py", "--one", name])
        table.main()
        assert key in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_an_unknown_name_is_refused_in_one_line(
    table: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["support_table.py", "--only", "llama", "nosuch"])
    with pytest.raises(SystemExit) as stopped:
        table.main()
    assert stopped.value.code == 2
    assert "nosuch" in capsys.readouterr().err.splitlines()[-1]
