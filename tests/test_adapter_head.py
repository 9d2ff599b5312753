"""The trainable LM head: in full precision, saved for stock mlx-lm, taken off again."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from abft_mlx import adapters, ports
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer import RunFolder

SECTIONS = {
    "lora": AdapterSection(rank=4, scale=2.0, head=True),
    "some-layers": AdapterSection(rank=2, scale=0.5, dropout=0.1, layers=[0, 2], head=True),
    "full": AdapterSection(kind="full", layers=[1, 2], head=True),
}
LORA = SECTIONS["lora"]
UNTIED = ("llama", "mistral", "qwen3")
HEAD = "lm_head"


def train(model: nn.Module, updates: int = 3) -> None:
    """A few Adam updates on a loss that the head has a part in."""
    tokens, _ = tiny_models.tokens()
    optimizer = optim.Adam(1e-2, bias_correction=True)

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(tokens), tokens, reduction="mean")

    for _ in range(updates):
        gradients = nn.value_and_grad(model, loss)(model)[1]
        optimizer.update(model, adapters.mask_gradients(model, gradients))
        mx.eval(model.trainable_parameters(), optimizer.state)


def trained(base: Path, section: AdapterSection) -> nn.Module:
    model, _ = load_model(base)
    adapters.attach(model, section)
    train(model)
    return model


def difference(left: mx.array, right: mx.array) -> float:
    return float(mx.abs(left - right).max())


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {
        name: np.array(value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
        for name, value in tree_flatten(model.parameters())
    }


def label_logits(model: nn.Module, tokens: mx.array, last: mx.array, labels: mx.array) -> mx.array:
    """(B, C) logits at the last positions, as evaluation computes them."""
    port = ports.port_for(model)
    hidden = port.hidden(model, tokens)[mx.arange(len(tokens)), last]
    return port.logits(model, hidden, labels)


def in_bfloat16(base: Path) -> Path:
    model, _ = load_model(base)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return base


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("name", UNTIED)
def test_stock_mlx_lm_loads_it_with_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", name)
    model = trained(base, SECTIONS[kind])
    tokens, _ = tiny_models.tokens()
    expected = model(tokens)
    adapters.save(model, tmp_path / "run", base_model="owner/name")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    assert difference(stock(tokens), expected) <= 1e-4
    ours, _ = load_model(base)
    adapters.load(ours, tmp_path / "run")
    assert mx.array_equal(ours(tokens), expected)
    # The head's part and the projections' part are both there.
    for missing in (HEAD, "self_attn"):
        half, _ = load_model(base)
        adapters.load(half, tmp_path / "run")
        plain, _ = load_model(base)
        for path in adapters.adapted(half):
            if missing in path:
                half.update_modules(tree_unflatten([(path, ports.resolve(plain, path))]))
        assert difference(half(tokens), expected) > 1e-2
    names = [key for key, _ in tree_flatten(ours.trainable_parameters())]
    assert names == [key for key, _ in tree_flatten(model.trainable_parameters())]
    for key, value in tree_flatten(ours.trainable_parameters()):
        assert mx.array_equal(value, dict(tree_flatten(model.trainable_parameters()))[key])


def test_attaching_a_head_changes_no_logit_and_detaching_gives_the_base_back() -> None:
    for bits in (None, 4, 8):
        model = tiny_models.build("llama")
        if bits is not None:
            nn.quantize(model, group_size=64, bits=bits)
        before, head = arrays(model), model.lm_head
        tokens, _ = tiny_models.tokens()
        logits = model(tokens)
        adapters.attach(model, LORA)
        assert difference(model(tokens), logits) <= (0 if bits is None else 1e-4)
        assert model.lm_head.weight.dtype == mx.float32
        train(model)
        assert difference(model(tokens), logits) > 1e-1
        adapters.detach(model)
        assert model.lm_head is head
        after = arrays(model)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert not tree_flatten(model.trainable_parameters())
        assert mx.array_equal(model(tokens), logits)


def test_what_trains_is_counted_and_the_head_is_never_masked() -> None:
    rows, width = tiny_models.VOCABULARY, 64
    for name in UNTIED:
        counts = []
        for head in (False, True):
            model = tiny_models.build(name)
            nn.quantize(model, group_size=64, bits=4)
            adapters.attach(model, AdapterSection(rank=4, head=head))
            counts.append(adapters.trainable_parameters(model))
        assert counts[1] - counts[0] == rows * width
        assert f"{HEAD}.weight" not in adapters.gradient_mask(model)
        gradients = {HEAD: {"weight": mx.ones((rows, width))}}
        assert mx.array_equal(
            adapters.mask_gradients(model, gradients)[HEAD]["weight"], gradients[HEAD]["weight"]
        )
        assert HEAD in adapters.adapted(model)
        adapters.train_mode(model)
        adapters.train_mode(model, False)


@pytest.mark.parametrize(("name", "path"), [("gpt2", "model.wte"), ("qwen2", "embed_tokens")])
def test_a_tied_head_is_one_clear_line(name: str, path: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    before = arrays(model)
    with pytest.raises(AdapterError, match=rf"{path}.*set adapter\.head to false") as caught:
        adapters.attach(model, LORA)
    assert "\n" not in str(caught.value)
    assert not adapters.adapted(model)
    assert arrays(model).keys() == before.keys()
    untied = tiny_models.build("qwen2", tie_word_embeddings=False)
    adapters.attach(untied, LORA)
    adapters.save(untied, tmp_path / "run")
    if name == "qwen2":
        with pytest.raises(AdapterError, match=r"no linear layer 'lm_head'"):
            adapters.load(model, tmp_path / "run")


def test_full_precision_of_a_bfloat16_base(tmp_path: Path) -> None:
    """Steps of 2e-5 stay in the head's weight, its logits, its file and stock mlx-lm."""
    base = in_bfloat16(tiny_models.checkpoint(tmp_path / "base", "llama"))
    model, _ = load_model(base)
    adapters.attach(model, SECTIONS["full"])
    start = model.lm_head.weight
    tokens, last = tiny_models.tokens()
    moved = start + 2e-5
    assert (mx.abs(moved - start) > 1e-5).mean().item() > 0.9
    hidden = ports.port_for(model).hidden(model, tokens)
    model.lm_head.weight = moved
    logits = model(tokens)
    assert logits.dtype == mx.float32
    exact = np.array(hidden.astype(mx.float32)) @ np.array(moved).T
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-4)
    some = label_logits(model, tokens, last, mx.array([5, 9]))
    at_last = exact[np.arange(3), np.array(last)][:, [5, 9]]
    np.testing.assert_allclose(some, at_last, rtol=1e-5, atol=1e-4)
    adapters.save(model, tmp_path / "run")
    saved: Any = mx.load(str(tmp_path / "run" / adapters.WEIGHTS))
    assert mx.array_equal(saved[f"{HEAD}.weight"], moved)
    assert saved["model.layers.1.self_attn.q_proj.weight"].dtype == mx.bfloat16
    stock, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "run"))
    assert difference(stock(tokens), logits) <= 1e-5
    ours, _ = load_model(base)
    adapters.load(ours, tmp_path / "run")
    assert mx.array_equal(ours(tokens), logits)


def test_what_the_files_hold(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    run = tmp_path / "run"
    model = trained(base, LORA)
    adapters.save(model, run)
    lora = {name for name in adapters.tensors(model) if not name.startswith(HEAD)}
    assert all(name.endswith(("lora_a", "lora_b")) for name in lora)
    factors: Any = mx.load(str(run / adapters.FACTORS))
    weights: Any = mx.load(str(run / adapters.WEIGHTS))
    assert set(factors) == lora
    projections = {f"{name.rpartition('.')[0]}.weight" for name in lora}
    assert set(weights) == projections | {f"{HEAD}.weight"}
    written = json.loads((run / adapters.CONFIG).read_text(encoding="utf-8"))
    assert written["fine_tune_type"] == "full"
    assert set(written["lora_parameters"]["keys"]) == {name[:-7] for name in projections}
    # A run folder knows all of these, and may be overwritten.
    RunFolder(run).create()
    assert list(run.iterdir()) == []
    adapters.save(model, run)
    plain = trained(base, AdapterSection(rank=4))
    adapters.save(plain, run)
    assert sorted(one.name for one in run.iterdir()) == [adapters.CONFIG, adapters.WEIGHTS]
    tokens, _ = tiny_models.tokens()
    adapters.load(model, run)
    assert mx.array_equal(model(tokens), plain(tokens))
    assert HEAD not in adapters.adapted(model)


def test_without_its_lora_file_the_folder_is_still_the_same_model(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    model = trained(base, LORA)
    adapters.save(model, tmp_path / "run")
    (tmp_path / "run" / adapters.FACTORS).unlink()
    ours, _ = load_model(base)
    adapters.load(ours, tmp_path / "run")
    tokens, _ = tiny_models.tokens()
    assert difference(ours(tokens), model(tokens)) <= 1e-4
    (tmp_path / "run" / adapters.FACTORS).write_bytes(b"not a safetensors file")
    with pytest.raises(AdapterError, match=r"lora\.safetensors is broken"):
        adapters.load(ours, tmp_path / "run")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base(bits: int, tmp_path: Path) -> None:
    """Ours loads it with the same logits; stock mlx-lm has no place for it and says so."""
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=bits)
    run = tmp_path / "run"
    model = trained(base, LORA)
    tokens, last = tiny_models.tokens()
    expected = model(tokens)
    adapters.save(model, run)
    assert set(mx.load(str(run / adapters.WEIGHTS))) == set(adapters.tensors(model))
    assert not (run / adapters.FACTORS).exists()
    keys = json.loads((run / adapters.CONFIG).read_text())["lora_parameters"]["keys"]
    assert not any(HEAD in key for key in keys)
    # mlx-lm 0.31, the last for Python 3.10, leaves out what has no place, and says nothing.
    if "incompatible tensors" in inspect.getsource(load_adapters):
        with pytest.raises(ValueError, match=r"lm_head\.weight"):
            mlx_lm.load(str(base), adapter_path=str(run))
    ours, _ = load_model(base)
    for _ in range(2):  # also over the adapter that is there
        adapters.load(ours, run)
        assert mx.array_equal(ours(tokens), expected)
    labels = label_logits(ours, tokens, last, mx.array([3, 80]))
    at_last = mx.take_along_axis(expected, last[:, None, None], axis=1)[:, 0]
    assert difference(labels, at_last[:, mx.array([3, 80])]) <= 1e-4
    adapters.detach(ours)
    assert isinstance(ours.lm_head, nn.QuantizedLinear)
    with pytest.raises(AdapterError, match="dequantize=True"):
        adapters.merge(model)
    adapters.merge(model, dequantize=True)
    assert not adapters.adapted(model)
    assert type(model.lm_head) is nn.Linear
    assert difference(model(tokens), expected) <= 1e-4


def test_a_base_of_which_only_the_head_is_quantized(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: path == HEAD)
    quantized = model.lm_head
    adapters.attach(model, LORA)
    train(model)
    tokens, _ = tiny_models.tokens()
    expected = model(tokens)
    adapters.save(model, tmp_path / "run")
    assert set(mx.load(str(tmp_path / "run" / adapters.WEIGHTS))) == set(adapters.tensors(model))
    adapters.detach(model)
    assert model.lm_head is quantized
    adapters.load(model, tmp_path / "run")
    assert mx.array_equal(model(tokens), expected)
    with pytest.raises(AdapterError, match="lm_head is quantized"):
        adapters.merge(model)


@pytest.mark.parametrize("kind", SECTIONS)
def test_scale_and_merge(kind: str) -> None:
    model = tiny_models.build("llama")
    names = arrays(model).keys()
    base = model.lm_head.weight
    tokens, _ = tiny_models.tokens()
    plain = model(tokens)
    adapters.attach(model, SECTIONS[kind])
    train(model)
    change, after = model.lm_head.weight - base, model(tokens)
    adapters.scale(model, 0.5)
    assert mx.allclose(model.lm_head.weight - base, change / 2, atol=1e-6)
    adapters.scale(model, 2.0)
    assert difference(model(tokens), after) <= 1e-4
    adapters.merge(model)
    assert arrays(model).keys() == names
    assert type(model.lm_head) is nn.Linear
    assert not tree_flatten(model.trainable_parameters())
    assert difference(model(tokens), after) <= 1e-4
    assert difference(model(tokens), plain) > 1e-1


def test_a_head_of_another_vocabulary_does_not_fit(tmp_path: Path) -> None:
    for bits in (None, 4):
        base = tiny_models.checkpoint(tmp_path / f"base{bits}", "llama", bits=bits)
        adapters.save(trained(base, LORA), tmp_path / f"run{bits}")
        other = tiny_models.build("llama", vocab_size=128)
        with pytest.raises(
            AdapterError, match=r"lm_head\.weight: shape \(96, 64\), the model needs \(128, 64\)"
        ):
            adapters.load(other, tmp_path / f"run{bits}")
        assert not adapters.adapted(other)


def test_lora_on_the_head_by_stock_mlx_lm(tmp_path: Path) -> None:
    """Not ours, but mlx-lm trains it; its label logits are right, too."""
    base = tiny_models.checkpoint(tmp_path / "base", "llama")
    run = tmp_path / "run"
    run.mkdir()
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": [HEAD]}
    shapes = {f"{HEAD}.lora_a": (64, 3), f"{HEAD}.lora_b": (3, 96)}
    mx.save_safetensors(
        str(run / adapters.WEIGHTS),
        {n: mx.random.normal(s, key=mx.random.key(s[0])) for n, s in shapes.items()},
    )
    written = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (run / adapters.CONFIG).write_text(json.dumps(written), encoding="utf-8")
    stock, _ = mlx_lm.load(str(base), adapter_path=str(run))
    ours, _ = load_model(base)
    adapters.load(ours, run)
    tokens, last = tiny_models.tokens()
    expected = stock(tokens)
    assert difference(ours(tokens), expected) <= 1e-5
    labels = label_logits(ours, tokens, last, mx.array([3, 80]))
    at_last = mx.take_along_axis(expected, last[:, None, None], axis=1)[:, 0]
    assert difference(labels, at_last[:, mx.array([3, 80])]) <= 1e-4
