"""Every architecture on a tiny random model: the first of each port, and all with ``-m slow``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx import attention, ports
from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports import table as port_table

EXACT = 1e-5
FIRST = {port.architectures[0] for port in ports.PORTS}
EVERY = [
    name if name in FIRST else pytest.param(name, marks=pytest.mark.slow)
    for port in ports.PORTS
    for name in port.architectures
]
# Their blocks read more than the hidden states of the block below, which hooks cannot replace.
READ_MORE = {
    "afm7", "gemma3n", "gemma4", "gemma4_text", "iquestloopcoder", "kimi_k3", "talkie",
}  # fmt: skip


@pytest.fixture(scope="module")
def checks(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("support_checks")


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def test_no_architecture_has_two_ports() -> None:
    names = [name for port in ports.PORTS for name in port.architectures]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", EVERY)
def test_architecture(checks: ModuleType, tiny: ModuleType, name: str, tmp_path: Path) -> None:
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
    assert (checks.hook_error(tiny.build(name)) is None) == (name in READ_MORE)
    assert checks.reload_error(model, name, tmp_path) <= EXACT
    quantized = tiny.build(name)
    checks.quantize(quantized)
    moved, kept = checks.train(quantized)
    assert moved > 1e-4
    assert kept == 0


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
