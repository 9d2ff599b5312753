"""What one architecture or two do otherwise than all others, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_architectures import EXACT

from abft_mlx import adapters, attention, ports
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(kind="lora", rank=4, scale=2.0)


@pytest.fixture(scope="module")
def checks(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("support_checks")


@pytest.fixture(scope="module")
def tiny(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("tiny_configs")


def moved_adapter(model: nn.Module, section: AdapterSection = LORA) -> None:
    """An adapter that has learned something."""
    adapters.attach(model, section, seed=0)
    for module in adapters.adapted(model).values():
        module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(0))


def test_a_block_that_attends_twice_is_two_layers(tiny: ModuleType) -> None:
    """LongCat: each has its own rows, name and adapter."""
    model = tiny.build("longcat_flash")
    port = ports.port_for(model)
    tokens, last = tiny.tokens()
    layers = port.layers(model)
    assert [one.path for one in layers[2:4]] == [f"model.layers.1.self_attn.{n}" for n in range(2)]
    before = attention.capture(model, tokens, last)
    queries = layers[3].attention.q_b_proj
    queries.weight = 2 * queries.weight
    after = attention.capture(model, tokens, last)
    moved = [mx.abs(a - b).max().item() > 1e-4 for a, b in zip(before, after, strict=True)]
    assert moved == [False, False, False, True, True, True]
    adapters.attach(model, LORA.model_copy(update={"layers": [3]}), seed=0)
    assert set(adapters.adapted(model)) == {
        f"{layers[3].path}.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
    }


def test_every_call_of_a_looped_block_is_a_layer_of_its_own(tiny: ModuleType) -> None:
    """IQuest LoopCoder: each block once, then each once more, over the whole and in a window."""
    model = tiny.build("iquestloopcoder")
    tokens, last = tiny.tokens()
    blocks = [one.path.split(".")[2] for one in ports.port_for(model).layers(model)]
    assert "".join(blocks) == "012" + "001122"
    rows = [np.array(row) for row in attention.capture(model, tokens, last)]
    start = int(last[0]) - 8
    assert [bool((row[0, :, :start] == 0).all()) for row in rows] == [False] * 3 + [False, True] * 3
    moved_adapter(model)
    assert len(adapters.adapted(model)) == 2 * 3
    model = tiny.build("iquestloopcoder")
    adapters.attach(model, LORA.model_copy(update={"layers": [1, 5, 6]}), seed=0)
    assert {path.split(".")[2] for path in adapters.adapted(model)} == {"1"}


def test_layers_that_attend_in_chunks_and_one_that_attends_to_all(tiny: ModuleType) -> None:
    """Llama 4: every fourth."""
    model = tiny.build("llama4")
    tokens, last = tiny.tokens()
    rows = [np.array(row) for row in attention.capture(model, tokens, last)]
    chunk = int(last[0]) // 9 * 9
    assert [bool((row[0, :, :chunk] == 0).all()) for row in rows] == [True] * 3 + [False]


def test_layers_that_reuse_keys_have_the_heads_of_those(tiny: ModuleType) -> None:
    """AFM 7: its last layer makes queries alone."""
    model = tiny.build("afm7")
    port = ports.port_for(model)
    assert ports.heads(model) == [ports.HeadShape(4, 2, 16)] * 3
    assert [
        [one.path for one in port.layer_projections(layer)] for layer in port.layers(model)
    ] == [
        ["qkv_proj"],
        ["qkv_proj"],
        ["q_proj"],
    ]
    assert port.layers(model)[2].path == "model.kv_reuse_layers.0.self_attn"


@pytest.mark.parametrize("bits", [None, 4])
def test_lora_on_a_layer_of_several_outputs(
    checks: ModuleType, tiny: ModuleType, bits: int | None, tmp_path: Path
) -> None:
    """AFM 7: saved, loaded, merged, taken off."""
    tokens, _ = tiny.tokens()

    def base() -> nn.Module:
        model = tiny.build("afm7")
        if bits:
            checks.quantize(model)
        return model

    model = base()
    plain = np.array(model(tokens))
    moved_adapter(model)
    expected = np.array(model(tokens))
    assert np.abs(expected - plain).max() > 0.01
    adapters.save(model, tmp_path)
    again = base()
    adapters.load(again, tmp_path)
    assert np.array_equal(np.array(again(tokens)), expected)
    path = next(iter(adapters.adapted(again)))
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))
    parts = ports.resolve(again, path)(x)
    adapters.merge(again, dequantize=True)
    # Of one layer: logits jump where a key comes to lie on the other side of a rounding.
    for part, merged in zip(parts, ports.resolve(again, path)(x), strict=True):
        assert mx.abs(part - merged).max().item() <= 1e-4
    adapters.detach(model)
    assert np.array_equal(np.array(model(tokens)), plain)


def test_keys_that_are_rounded_have_no_gradient(checks: ModuleType, tiny: ModuleType) -> None:
    """AFM 7: what docs/ports.md says of it."""
    model = tiny.build("afm7")
    checks.train(model)
    port = ports.port_for(model)
    layer = port.layers(model)[0]
    (projection,) = port.layer_projections(layer)
    parts = port.part_outputs(layer, projection)
    learned = np.abs(np.array(layer.attention.qkv_proj.lora_b)).max(axis=0)
    assert learned[parts["q"]].min() > 0
    assert learned[parts["k"]].max() == 0


def test_a_model_that_does_not_initialise_its_base_trains_nothing_but_the_adapter(
    tiny: ModuleType,
) -> None:
    """RecurrentGemma, as mlx-lm has it."""
    model = tiny.build("recurrent_gemma")
    with pytest.raises(AttributeError):
        model.freeze()
    adapters.attach(model, LORA, seed=0)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    assert not model.training


def test_scores_that_are_capped_in_a_function_of_their_own(
    checks: ModuleType, tiny: ModuleType
) -> None:
    """Gear: its other configurations call mlx-lm's attention function."""
    gear = pytest.importorskip("mlx_lm.models.gear", reason="the installed mlx-lm has no gear")
    settings = tiny.settings("gear") | {"attn_logit_softcapping": 2.0}
    model = gear.Model(gear.ModelArgs.from_dict(settings))
    model.eval()
    pattern, output = checks.pattern_error(model)
    assert max(pattern, output) <= EXACT
    assert checks.train(model)[0] > 1e-4


def test_trained_layers(tiny: ModuleType) -> None:
    for name in ("llama", "gpt2", "qwen3_next", "gemma3n", "longcat_flash"):
        model = tiny.build(name)
        with_heads = [n for n, one in enumerate(ports.heads(model)) if one is not None]
        assert adapters.trained_layers(model) == []
        adapters.attach(model, AdapterSection(rank=2, layers=with_heads[:1]))
        assert adapters.trained_layers(model) == with_heads[:1], name
        adapters.detach(model)
        adapters.attach(model, AdapterSection(rank=2))
        assert adapters.trained_layers(model) == with_heads, name
    looped = tiny.build("iquestloopcoder")
    adapters.attach(looped, AdapterSection(rank=2, layers=[1]))
    assert adapters.trained_layers(looped) == [1, 5, 6], "all that share what trains"
