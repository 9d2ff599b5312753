"""Adapters train W_Q and W_K and nothing else, to the bit; strength, merging, sums, norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny_configs
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_adapter_files import train

from abft_mlx import adapters, attention, ports
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(rank=4, scale=2.0)
FULL = AdapterSection(kind="full")
SECOND = AdapterSection(rank=7, scale=0.5, layers=[0, 2])
Weights = dict[str, np.ndarray]


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


@pytest.mark.parametrize("section", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
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


@pytest.mark.parametrize(("name", "bits"), [("gpt2", 4), ("qwen3", 8)])
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
    subset = start(1, noise=0, layers=[2, 0])
    assert {name.split(".")[2] for name in subset} == {"0", "2"}
    assert all(np.array_equal(first[name], subset[name]) for name in subset)


class Odd(nn.Linear):
    """Linear, and more."""


def odd() -> nn.Module:
    """A model with one projection that is no plain linear layer."""
    model = tiny_models.build("llama")
    model.layers[1].self_attn.k_proj = Odd(64, 32, bias=False)
    return model


def quantized() -> nn.Module:
    model = tiny_models.build("llama")
    nn.quantize(model, group_size=64, bits=4)
    return model


@pytest.mark.parametrize(
    ("model", "section", "message"),
    [
        (odd, AdapterSection(layers=[7, 1, 3]), r"layers \[3, 7\].*layers 0 to 2"),
        (odd, AdapterSection(layers="auto"), "auto is resolved by the census"),
        (odd, AdapterSection(rank=33), r"k_proj is 32 x 64; use a rank of 1 to 32"),
        (quantized, AdapterSection(rank=65, layers=[1]), "64 x 64; use a rank of 1 to"),
        (lambda: tiny_models.build("qwen2"), AdapterSection(head=True), "its embedding"),
        (quantized, FULL, r"q_proj is quantized.*adapter\.kind to lora"),
        (odd, FULL, r"layers\.1\.self_attn\.k_proj.*cannot train in full"),
    ],
)
def test_what_cannot_be_attached(
    model: Callable[[], nn.Module], section: AdapterSection, message: str
) -> None:
    base = model()
    with pytest.raises(AdapterError, match=message):
        adapters.attach(base, section)
    assert not adapters.adapted(base)


def test_one_adapter_at_a_time_and_none_for_nothing(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    for action in (
        lambda: adapters.scale(model, 2.0),
        lambda: adapters.merge(model),
        lambda: adapters.save(model, tmp_path),
        lambda: adapters.shift_norms(model),
    ):
        with pytest.raises(AdapterError, match="carries no adapter"):
            action()
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
    # rank 4, 3 layers: rank * (inputs + outputs) for each projection, V's outputs not counted.
    assert counts["llama", "lora"] == 3 * 4 * ((64 + 64) + (64 + 32))
    assert counts["mistral", "lora"] == 3 * 4 * ((64 + 128) + (64 + 32))
    assert counts["gpt2", "lora"] == 3 * 4 * (64 + 128)
    assert counts["llama", "full"] == 3 * (64 * 64 + 32 * 64)
    assert counts["gpt2", "full"] == 3 * 128 * 64


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


def test_attaching_a_head_changes_no_logit_and_detaching_gives_the_base_back() -> None:
    for bits in (None, 4, 8):
        model = tiny_models.build("llama")
        if bits is not None:
            nn.quantize(model, group_size=64, bits=bits)
        before, head = parameters(model), model.lm_head
        tokens, _ = tiny_models.tokens()
        logits = model(tokens)
        adapters.attach(model, LORA.model_copy(update={"head": True}))
        assert mx.abs(model(tokens) - logits).max().item() <= (0 if bits is None else 1e-4)
        assert model.lm_head.weight.dtype == mx.float32
        train(model)
        assert mx.abs(model(tokens) - logits).max().item() > 1e-1
        adapters.detach(model)
        assert model.lm_head is head
        after = parameters(model)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert not tree_flatten(model.trainable_parameters())
        assert mx.array_equal(model(tokens), logits)


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


def double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


def dense(module: nn.Module) -> np.ndarray:
    """A plain or quantized linear layer's weight, (outputs, inputs) float64."""
    return double(ports.head_rows(module))


def changes(model: nn.Module) -> Weights:
    """W' - W of every adapted layer, as a dense matrix."""
    found = {}
    for path, module in adapters.adapted(model).items():
        if "lora_a" in module:
            found[path] = module.scale * (double(module.lora_a) @ double(module.lora_b)).T
        else:
            found[path] = double(module.weight) - dense(module.original.module)
    return found


def saved(base: Path, run: Path, section: AdapterSection, seed: int = 0) -> Weights:
    """Train an adapter a little, save it, and say what it changes."""
    model, _ = load_model(base)
    adapters.attach(model, section, seed=seed)
    train(model)
    adapters.save(model, run)
    return changes(model)


def check(model: nn.Module, wanted: list[tuple[Weights, float]]) -> None:
    """Every layer's change is the weighted sum, and no other layer is adapted."""
    got = changes(model)
    assert set(got) == {path for one, _ in wanted for path in one}
    for path, change in got.items():
        expected = sum(
            (factor * one[path] for one, factor in wanted if path in one), np.zeros(change.shape)
        )
        scale = max(np.abs(one[path]).max() for one, _ in wanted if path in one)
        np.testing.assert_allclose(change, expected, atol=1e-5 * scale, err_msg=path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Weights]]]:
    """For each base: its folder with two adapters of different rank and layers in it."""
    made = {}
    for name, bits in (("llama", None), ("llama", 4), ("gpt2", None)):
        base = tiny_models.checkpoint(tmp_path_factory.mktemp("base"), name, bits=bits)
        pair = [saved(base, base / f"run{n}", one, n) for n, one in enumerate((LORA, SECOND))]
        made[f"{name}-{bits}"] = (base, pair)
    return made


@pytest.mark.parametrize("factors", [(0.0, 1.0), (-0.5, 1.5)], ids=str)
@pytest.mark.parametrize("which", ["llama-None", "llama-4", "gpt2-None"])
def test_two_lora_adapters(
    which: str, factors: tuple[float, float], two: dict[str, tuple[Path, list[Weights]]]
) -> None:
    base, pair = two[which]
    model, _ = load_model(base)
    adapters.combine(model, [(base / f"run{n}", factor) for n, factor in enumerate(factors)])
    check(model, list(zip(pair, factors, strict=True)))
    ranks = {one.lora_a.shape[1] for one in adapters.adapted(model).values()}
    assert ranks == {LORA.rank + SECOND.rank}


def test_lora_and_weights_trained_in_full(tmp_path: Path) -> None:
    factors = (1.5, -0.5)
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    some = AdapterSection(kind="full", layers=[1, 2])
    pair = [saved(base, tmp_path / f"run{n}", one) for n, one in enumerate((LORA, some))]
    model, _ = load_model(base)
    adapters.combine(model, [(tmp_path / f"run{n}", one) for n, one in enumerate(factors)])
    check(model, list(zip(pair, factors, strict=True)))
    kinds = {path: "lora_a" in one for path, one in adapters.adapted(model).items()}
    assert all(is_lora == (".layers.0." in path) for path, is_lora in kinds.items())


@pytest.mark.parametrize("bits", [None, 4])
def test_abft_and_end_to_end_with_a_head(bits: int | None, tmp_path: Path) -> None:
    """Figure 7's plane: LoRA on the one axis, LoRA and the head on the other."""
    factors = (1.5, -0.5)
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=bits)
    sections = (LORA, SECOND.model_copy(update={"head": True}))
    pair = [saved(base, tmp_path / f"run{n}", one) for n, one in enumerate(sections)]
    assert "lm_head" in pair[1]
    model, _ = load_model(base)
    adapters.combine(model, [(tmp_path / f"run{n}", one) for n, one in enumerate(factors)])
    check(model, list(zip(pair, factors, strict=True)))
    assert isinstance(model.lm_head, adapters.FullLinear)
    assert model.lm_head(mx.ones((1, 64), dtype=mx.bfloat16)).dtype == mx.float32


def test_a_combination_is_an_adapter_like_any_other(
    two: dict[str, tuple[Path, list[Weights]]], tmp_path: Path
) -> None:
    """Saved, it loads in stock mlx-lm, although the layers had different ranks."""
    base, pair = two["llama-None"]
    model, _ = load_model(base)
    adapters.combine(model, [(base / "run0", 0.5), (base / "run1", 1.5)])
    tokens, _ = tiny_models.tokens()
    adapters.save(model, tmp_path / "run")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    assert mx.abs(stock(tokens) - model(tokens)).max().item() <= 1e-4
    adapters.scale(model, 2.0)
    check(model, [(pair[0], 1.0), (pair[1], 3.0)])
    assert tree_flatten(model.trainable_parameters())


def test_what_cannot_be_combined_is_one_line_and_changes_nothing(
    two: dict[str, tuple[Path, list[Weights]]], tmp_path: Path
) -> None:
    base, pair = two["llama-4"]
    saved(tiny_models.checkpoint(tmp_path / "plain", "llama"), tmp_path / "full", FULL)
    model, _ = load_model(base)
    adapters.load(model, base / "run0")
    for asked, message in (
        ([], "give at least one"),
        ([(base / "run0", float("nan"))], "a finite factor"),
        ([(base / "run0", 1.0), (tmp_path, 1.0)], r"has no adapter_config\.json"),
        ([(base / "run0", 2.0), (tmp_path / "full", 1.0)], "the model's is quantized"),
        ([(two["gpt2-None"][0] / "run0", 1.0)], "does not fit this model"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            adapters.combine(model, asked)
        assert "\n" not in str(caught.value)
        check(model, [(pair[0], 1.0)])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shift_norms(name: str, kind: str) -> None:
    head = name == "llama"
    model = tiny_models.build(name)
    section = AdapterSection(kind=kind, rank=4, scale=3.0, layers=[0, 2], head=head)
    adapters.attach(model, section)
    train(model)
    if kind == "lora":
        adapters.scale(model, -0.5)
    norms, change = adapters.shift_norms(model), changes(model)
    assert list(norms) == ["q", "k", "head"]
    for layer in range(tiny_models.LAYERS):
        for part in ("q", "k"):
            if layer == 1:
                assert norms[part][layer] == 0
                continue
            if name == "gpt2":
                # Fused: 64 queries, 64 keys, 64 values.
                start = 0 if part == "q" else 64
                wanted = change[f"model.h.{layer}.attn.c_attn"][start : start + 64]
            else:
                wanted = change[f"model.layers.{layer}.self_attn.{part}_proj"]
            expected = np.linalg.norm(wanted)
            assert expected > 1e-2
            assert norms[part][layer] == pytest.approx(expected, rel=1e-6)
    if head:
        assert norms["head"] == pytest.approx(np.linalg.norm(change["lm_head"]), rel=1e-6)
        assert norms["head"] > 1e-2
    else:
        assert norms["head"] is None


def test_shift_norms_of_what_has_several_parts() -> None:
    """DeepSeek 2 makes its queries in two steps."""
    model = tiny_configs.build("deepseek_v2")
    adapters.attach(model, AdapterSection(rank=2, scale=3.0))
    for n, module in enumerate(adapters.adapted(model).values()):
        module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(n))
    norms, change = adapters.shift_norms(model), changes(model)
    port = ports.port_for(model)
    several = 0
    for n, layer in enumerate(port.layers(model)):
        for part in ("q", "k"):
            rows = [
                change[f"{layer.path}.{one.path}"][np.array(port.part_outputs(layer, one)[part])]
                for one in port.layer_projections(layer)
                if part in port.part_outputs(layer, one)
            ]
            several += len(rows) > 1
            expected = np.sqrt(sum(np.square(one).sum() for one in rows))
            assert norms[part][n] == pytest.approx(expected, rel=1e-6)
    assert several
