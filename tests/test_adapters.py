"""Adapters train W_Q and W_K and nothing else, to the bit; strength, merging, dropout."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten, tree_map

from abft_mlx import adapters, attention, ports
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(rank=4, scale=2.0)
FULL = AdapterSection(kind="full")


def parameters(model: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
        for name, value in tree_flatten(model.parameters())
    }


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """Names whose tensors differ in any bit, LoRA's inner layer counted as the base's."""
    plain = {name.replace(".linear.", "."): value for name, value in after.items()}
    return {name for name, value in before.items() if not np.array_equal(value, plain[name])}


def projection_names(model: nn.Module) -> list[str]:
    port = ports.port_for(model)
    return [
        f"{layer.path}.{projection.path}"
        for layer in port.layers(model)
        for projection in port.projections
    ]


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_attached_lora_changes_nothing_yet_and_only_it_is_trainable(name: str) -> None:
    model = tiny_models.build(name)
    tokens, _ = tiny_models.tokens()
    before, expected = model(tokens), projection_names(model)
    adapters.attach(model, LORA)
    assert mx.array_equal(model(tokens), before)
    names = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"{path}.{leaf}" for path in expected for leaf in ("lora_a", "lora_b")}
    assert list(adapters.adapted(model)) == sorted(expected)
    adapters.detach(model)
    assert not tree_flatten(model.trainable_parameters())
    assert mx.array_equal(model(tokens), before)


@pytest.mark.parametrize("section", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_training_changes_w_q_and_w_k_and_nothing_else(name: str, section: AdapterSection) -> None:
    model = tiny_models.build(name)
    before, expected = parameters(model), projection_names(model)
    adapters.attach(model, section)
    start = parameters(model)
    tiny_models.train(model)
    after = parameters(model)
    if section.kind == "full":
        assert changed(before, after) == {f"{path}.weight" for path in expected}
    else:
        assert changed(before, after) == set()
        leaves = {f"{path}.{leaf}" for path in expected for leaf in ("lora_a", "lora_b")}
        assert {name for name in leaves if not np.array_equal(start[name], after[name])} == leaves
    adapters.detach(model)
    assert changed(before, parameters(model)) == set()
    assert set(parameters(model)) == set(before)


@pytest.mark.parametrize("section", [LORA, FULL], ids=["lora", "full"])
def test_the_v_part_of_a_fused_projection_never_moves(section: AdapterSection) -> None:
    """Bit-identical under real Adam steps; without the mask it does move."""
    width = tiny_models.CONFIGS["gpt2"]["n_embd"]

    def trained(masked: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        model = tiny_models.build("gpt2")
        adapters.attach(model, section)
        leaf = "lora_b" if section.kind == "lora" else "weight"
        modules = adapters.adapted(model).values()
        before = [np.array(module[leaf]) for module in modules]
        tiny_models.train(model, masked=masked)
        pairs = [(old, np.array(m[leaf])) for old, m in zip(before, modules, strict=True)]
        return [(a.T, b.T) for a, b in pairs] if section.kind == "lora" else pairs

    for old, new in trained(masked=True):
        assert old.shape[0] == 3 * width
        assert np.array_equal(old[2 * width :], new[2 * width :])
        assert (old[:width] != new[:width]).mean() > 0.9
        assert (old[width : 2 * width] != new[width : 2 * width]).mean() > 0.9
    moved = [not np.array_equal(a[2 * width :], b[2 * width :]) for a, b in trained(masked=False)]
    assert any(moved), "without the mask V would move, so this test can fail"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_quantized_base_trains_with_lora(name: str, bits: int) -> None:
    model = tiny_models.build(name)
    nn.quantize(model, group_size=64, bits=bits)
    before = parameters(model)
    tokens, last = tiny_models.tokens()
    rows = attention.capture(model, tokens, last)
    mx.eval(rows)
    adapters.attach(model, LORA)
    tiny_models.train(model)
    after = parameters(model)
    assert changed(before, after) == set()
    trained = attention.capture(model, tokens, last)
    assert all(mx.abs(a - b).max().item() > 1e-3 for a, b in zip(rows, trained, strict=True))


def test_a_quantized_base_cannot_train_in_full() -> None:
    model = tiny_models.build("llama")
    nn.quantize(model, group_size=64, bits=4)
    with pytest.raises(AdapterError, match=r"q_proj is quantized.*adapter\.kind to lora"):
        adapters.attach(model, FULL)
    assert not adapters.adapted(model)


def test_full_training_of_a_bfloat16_base_keeps_small_steps() -> None:
    """A step of 2e-5 is far below bfloat16's resolution at 1; float32 master weights keep it."""
    model = tiny_models.build("llama")
    model.set_dtype(mx.bfloat16)
    tokens, last = tiny_models.tokens()
    before = model(tokens)
    adapters.attach(model, FULL)
    assert mx.array_equal(model(tokens), before)
    assert model(tokens).dtype == mx.bfloat16
    module = model.layers[1].self_attn.q_proj
    start = module.weight
    tiny_models.train(model, updates=1, rate=2e-5)
    assert (mx.abs(module.weight - start) > 1e-5).mean().item() > 0.9
    assert all(row.dtype == mx.float32 for row in attention.capture(model, tokens, last))
    assert {value.dtype for value in adapters.tensors(model).values()} == {mx.bfloat16}


def test_the_start_depends_on_the_seed_alone() -> None:
    def start(seed: int, noise: int, layers: list[int] | None = None) -> dict[str, np.ndarray]:
        model = tiny_models.build("llama")
        mx.random.seed(noise)
        adapters.attach(model, AdapterSection(rank=4, layers=layers), seed=seed)
        return {name: np.array(value) for name, value in adapters.tensors(model).items()}

    first, again, other = start(1, noise=0), start(1, noise=5), start(2, noise=0)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    starts = [name for name in first if name.endswith("lora_a")]
    assert not any(np.array_equal(first[name], other[name]) for name in starts)
    assert len({first[name].tobytes() for name in starts}) == len(starts)
    assert all((first[name] == 0).all() for name in first if name.endswith("lora_b"))
    bound = 1 / np.sqrt(tiny_models.CONFIGS["llama"]["hidden_size"])
    assert all(0.9 * bound < np.abs(first[name]).max() <= bound for name in starts)
    zero = start(0, noise=0)
    for put_on in (adapters.attach, adapters.place):
        model = tiny_models.build("llama")
        put_on(model, AdapterSection(rank=4))
        unsaid = adapters.tensors(model)
        assert all(np.array_equal(np.array(unsaid[name]), zero[name]) for name in zero)
    subset = start(1, noise=0, layers=[2, 0])
    assert {name.split(".")[2] for name in subset} == {"0", "2"}
    assert all(np.array_equal(first[name], subset[name]) for name in subset)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (AdapterSection(layers=[1, 3, 7]), r"layers \[3, 7\].*layers 0 to 2"),
        (AdapterSection(rank=33), r"rank 33: model\.layers\.0\.self_attn\.k_proj.*1 to 32"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(section: AdapterSection, message: str) -> None:
    model = tiny_models.build("llama")
    with pytest.raises(AdapterError, match=message):
        adapters.attach(model, section)
    assert not adapters.adapted(model)
    adapters.attach(model, LORA)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        adapters.attach(model, LORA)


def test_trainable_parameters_counts_what_can_move() -> None:
    counts = {}
    for name in tiny_models.ARCHITECTURES:
        for section in (LORA, FULL):
            model = tiny_models.build(name)
            adapters.attach(model, section)
            counts[name, section.kind] = adapters.trainable_parameters(model)
    assert {type(one) for one in counts.values()} == {int}
    # rank 4, 3 layers: rank * (inputs + outputs) for each projection, V's outputs not counted.
    assert counts["llama", "lora"] == 3 * 4 * ((64 + 64) + (64 + 32))
    assert counts["mistral", "lora"] == 3 * 4 * ((64 + 128) + (64 + 32))
    assert counts["gpt2", "lora"] == 3 * 4 * (64 + 128)
    assert counts["llama", "full"] == 3 * (64 * 64 + 32 * 64)
    assert counts["gpt2", "full"] == 3 * 128 * 64


def test_where_a_mask_holds_still_what_is_fused() -> None:
    still = np.arange(192) < 128
    for section, leaf in ((LORA, "lora_b"), (FULL, "weight")):
        model = tiny_models.build("gpt2")
        adapters.attach(model, section.model_copy(update={"layers": [0, 2]}))
        masks = adapters.gradient_mask(model)
        assert list(masks) == [f"model.h.{n}.attn.c_attn.{leaf}" for n in (0, 2)]
        for mask in masks.values():
            assert mask.dtype == mx.bool_
            assert mask.shape == ((1, 192) if leaf == "lora_b" else (192, 1))
            assert np.array_equal(np.array(mask).ravel(), still)
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        for name, one in tree_flatten(adapters.mask_gradients(model, gradients)):
            wanted = masks.get(name, True)
            assert mx.array_equal(one, mx.broadcast_to(mx.array(wanted), one.shape)), name
        adapters.attach(model := tiny_models.build("llama"), section)
        assert adapters.gradient_mask(model) == {}
        assert adapters.mask_gradients(model, gradients) is gradients


def test_layers_in_their_own_order() -> None:
    model = tiny_models.build("llama", num_hidden_layers=12)
    adapters.attach(model, AdapterSection(rank=1, layers=[11, 2, 10, 0], head=True))
    wanted = [
        f"model.layers.{n}.self_attn.{name}"
        for n in (0, 2, 10, 11)
        for name in ("k_proj", "q_proj")
    ]
    assert list(adapters.adapted(model)) == ["lm_head", *wanted]
    assert adapters.trained_layers(model) == [0, 2, 10, 11]
    adapters.detach(model)
    assert adapters.trained_layers(model) == []


@pytest.mark.parametrize("section", [LORA, FULL], ids=["lora", "full"])
def test_scale_and_merge(section: AdapterSection) -> None:
    for name in ("gpt2", "qwen2"):
        model = tiny_models.build(name)
        names = set(parameters(model))
        tokens, _ = tiny_models.tokens()
        before = model(tokens)
        adapters.attach(model, section)
        tiny_models.train(model)
        after = model(tokens)
        assert mx.abs(after - before).max().item() > 1e-2
        path, module = next(iter(adapters.adapted(model).items()))
        inputs = mx.eye(64)
        base = ports.resolve(tiny_models.build(name), path)(inputs)
        change = module(inputs) - base
        adapters.scale(model, 0.5)
        assert mx.allclose(module(inputs) - base, change / 2, atol=1e-5)
        half = model(tokens)
        assert mx.abs(half - after).max().item() > 1e-3
        assert mx.abs(half - before).max().item() > 1e-3
        adapters.scale(model, 2.0)
        assert mx.abs(model(tokens) - after).max().item() <= 1e-4
        adapters.merge(model)
        assert set(parameters(model)) == names
        assert mx.abs(model(tokens) - after).max().item() <= 1e-4
        with pytest.raises(AdapterError, match="carries no adapter"):
            adapters.scale(model, 0.5)


def test_merging_into_a_quantized_base_asks_for_full_precision_layers() -> None:
    model = tiny_models.build("llama")
    nn.quantize(model, group_size=64, bits=4)
    tokens, _ = tiny_models.tokens()
    adapters.attach(model, LORA)
    tiny_models.train(model)
    after = model(tokens)
    with pytest.raises(AdapterError, match="dequantize=True"):
        adapters.merge(model)
    assert mx.array_equal(model(tokens), after)
    adapters.merge(model, dequantize=True)
    assert not adapters.adapted(model)
    assert mx.abs(model(tokens) - after).max().item() <= 1e-4


def test_dropout_acts_in_train_mode_alone_and_touches_no_other_layer() -> None:
    model = tiny_models.build("llama")
    tokens, _ = tiny_models.tokens()
    adapters.attach(model, AdapterSection(rank=4, dropout=0.5))
    for module in adapters.adapted(model).values():
        module.lora_b = mx.ones_like(module.lora_b)
    modes = {
        path: module.training
        for path, module in model.named_modules()
        if not path.endswith("dropout")
    }
    assert mx.array_equal(model(tokens), model(tokens))
    adapters.train_mode(model)
    assert not mx.array_equal(model(tokens), model(tokens))
    assert all(dict(model.named_modules())[path].training == mode for path, mode in modes.items())
    adapters.train_mode(model, False)
    assert mx.array_equal(model(tokens), model(tokens))
