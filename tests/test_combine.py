"""Adapters added up with factors, and how far they move the weights, against float64 NumPy."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_adapter_head import train

from abft_mlx import adapters, ports
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection

FACTORS = [(0.0, 1.0), (-0.5, 1.5)]
FIRST = AdapterSection(rank=4, scale=2.0)
SECOND = AdapterSection(rank=7, scale=0.5, layers=[0, 2])
FULL = AdapterSection(kind="full", layers=[1, 2])
Weights = dict[str, np.ndarray]


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
        pair = [saved(base, base / f"run{n}", one, n) for n, one in enumerate((FIRST, SECOND))]
        made[f"{name}-{bits}"] = (base, pair)
    return made


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("which", ["llama-None", "llama-4", "gpt2-None"])
def test_two_lora_adapters(
    which: str, factors: tuple[float, float], two: dict[str, tuple[Path, list[Weights]]]
) -> None:
    base, pair = two[which]
    model, _ = load_model(base)
    adapters.combine(model, [(base / f"run{n}", factor) for n, factor in enumerate(factors)])
    check(model, list(zip(pair, factors, strict=True)))
    ranks = {one.lora_a.shape[1] for one in adapters.adapted(model).values()}
    assert ranks == {FIRST.rank + SECOND.rank}


def test_the_logits_are_those_of_the_summed_weights(
    two: dict[str, tuple[Path, list[Weights]]],
) -> None:
    base, pair = two["llama-None"]
    tokens, _ = tiny_models.tokens()
    model, _ = load_model(base)
    adapters.combine(model, [(base / "run0", -0.5), (str(base / "run1"), 1.5)])
    by_hand, _ = load_model(base)
    for path in pair[0]:
        module = ports.resolve(by_hand, path)
        change = -0.5 * pair[0][path] + 1.5 * pair[1].get(path, 0)
        module.weight = mx.array((double(module.weight) + change).astype(np.float32))
    assert mx.abs(model(tokens) - by_hand(tokens)).max().item() <= 1e-3
    assert mx.abs(model(tokens) - load_model(base)[0](tokens)).max().item() > 1e-1


@pytest.mark.parametrize("factors", [(1.5, -0.5)], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_abft_and_end_to_end_with_a_head(
    bits: int | None, factors: tuple[float, float], tmp_path: Path
) -> None:
    """Figure 7's plane: LoRA on the one axis, LoRA and the head on the other."""
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=bits)
    sections = (FIRST, SECOND.model_copy(update={"head": True}))
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
        ([(base / "run0", float("nan"))], r"factor nan of .*run0: give a finite number"),
        ([(base / "run0", 1.0), (tmp_path, 1.0)], r"has no adapter_config\.json"),
        ([(base / "run0", 2.0), (tmp_path / "full", 1.0)], "q_proj is quantized"),
        ([(two["gpt2-None"][0] / "run0", 1.0)], "does not fit this model"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            adapters.combine(model, asked)
        assert "\n" not in str(caught.value)
        check(model, [(pair[0], 1.0)])


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shift_norms(name: str, kind: str) -> None:
    head = name in ("llama", "mistral", "qwen3")
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
            assert norms[part][layer] == pytest.approx(expected, rel=1e-10)
    if head:
        assert norms["head"] == pytest.approx(np.linalg.norm(change["lm_head"]), rel=1e-10)
        assert norms["head"] > 1e-2
    else:
        assert norms["head"] is None
