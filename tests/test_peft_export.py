"""Adapters written for PEFT: PEFT and transformers compute the same logits with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft_support
import pytest
import tiny_models
from mlx_lm.utils import load_model
from peft_support import TOLERANCE, Pair, far

from abft_mlx import adapters, exchange
from abft_mlx.errors import AdapterError
from abft_mlx.exchange import peft
from abft_mlx.recipe import AdapterSection

SECTIONS = {
    "lora": AdapterSection(rank=4, scale=2.0),
    "layers": AdapterSection(rank=3, scale=0.75, layers=[0, 2]),
    "full": AdapterSection(kind="full"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    peft_support.peft()
    folder = tmp_path_factory.mktemp("pairs")
    return {name: Pair(name, folder / name) for name in ("gpt2", "llama", "qwen2")}


def trained(pair: Pair, section: AdapterSection) -> nn.Module:
    model = pair.model()
    adapters.attach(model, section)
    tiny_models.train(model)
    return model


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_peft_gives_the_same_logits(
    pairs: dict[str, Pair], name: str, kind: str, tmp_path: Path
) -> None:
    pair = pairs[name]
    model = trained(pair, SECTIONS[kind])
    adapters.scale(model, 1.5)
    ours = pair.ours(model)
    peft.save(model, tmp_path, base_model="owner/name")
    assert far(pair.ours(pair.model()), ours) > 1e-2
    assert far(pair.theirs(tmp_path), ours) <= TOLERANCE
    settings = written(tmp_path)
    assert settings["base_model_name_or_path"] == "owner/name"
    assert settings["fan_in_fan_out"] == (name == "gpt2")
    short = ["c_attn"] if name == "gpt2" else ["k_proj", "q_proj"]
    targets = settings["target_modules"]
    assert targets == short if kind != "layers" else len(targets) == 2 * len(short)
    # And back: the reader makes of it what was written.
    again = pair.model()
    adapters.load(again, tmp_path)
    assert far(pair.ours(again), ours) <= TOLERANCE


def test_alpha_is_scale_times_rank(pairs: dict[str, Pair], tmp_path: Path) -> None:
    model = trained(pairs["llama"], SECTIONS["layers"])
    peft.save(model, tmp_path, base_model=None)
    settings = written(tmp_path)
    assert (settings["r"], settings["lora_alpha"]) == (3, 2.25)
    assert settings["base_model_name_or_path"] is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_trained_head_is_a_module_to_save(
    pairs: dict[str, Pair], kind: str, tmp_path: Path
) -> None:
    pair = pairs["llama"]
    model = pair.model()
    adapters.attach(model, AdapterSection(rank=4, kind=kind, head=True))
    tiny_models.train(model)
    head = model.lm_head
    head.weight = head.weight + 0.1 * mx.random.normal(head.weight.shape, key=mx.random.key(1))
    ours = pair.ours(model)
    peft.save(model, tmp_path, base_model=None)
    assert written(tmp_path)["modules_to_save"] == ["lm_head"]
    assert far(pair.theirs(tmp_path), ours) <= TOLERANCE
    again = pair.model()
    adapters.load(again, tmp_path)
    assert far(pair.ours(again), ours) <= TOLERANCE


def test_layers_that_differ_in_what_trains_are_named_in_full(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    """W_Q of one layer and W_K of another: no list of ends and numbers says that."""
    pair = pairs["llama"]
    model = trained(pair, SECTIONS["lora"])
    dropped = ("model.layers.0.self_attn.k_proj", "model.layers.2.self_attn.q_proj")
    for path, module in adapters.adapted(model).items():
        if path in dropped:
            module.lora_b = mx.zeros_like(module.lora_b)
    expected = pair.ours(model)
    run = tmp_path / "run"
    adapters.save(model, run)
    tensors: Any = mx.load(str(run / adapters.WEIGHTS))
    kept = {name: one for name, one in tensors.items() if not name.startswith(dropped)}
    mx.save_safetensors(str(run / adapters.WEIGHTS), kept)
    settings = written(run)
    settings["lora_parameters"]["keys"] = sorted({name.rpartition(".")[0] for name in kept})
    (run / adapters.CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    model = pair.model()
    adapters.load(model, run)
    peft.save(model, tmp_path, base_model=None)
    assert len(written(tmp_path)["target_modules"]) == 4
    assert far(pair.theirs(tmp_path), expected) <= TOLERANCE


def test_a_mixture_of_full_and_low_rank(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Layers of different ranks and alphas, in one PEFT folder."""
    pair = pairs["llama"]
    for kind, layers in (("lora", [0, 1]), ("full", [2])):
        adapters.save(
            trained(pair, AdapterSection(rank=4, kind=kind, layers=layers)), tmp_path / kind
        )
    model = pair.model()
    adapters.combine(model, [(tmp_path / "lora", 1.0), (tmp_path / "full", 0.5)])
    peft.save(model, tmp_path, base_model=None)
    ranks = written(tmp_path)["rank_pattern"]
    assert set(ranks.values()) == {64, 32}
    ours = pair.ours(model)
    assert far(pair.theirs(tmp_path), ours) <= TOLERANCE
    again = pair.model()
    adapters.load(again, tmp_path)
    assert far(pair.ours(again), ours) <= TOLERANCE


def test_v_of_a_fused_projection_stays_still(pairs: dict[str, Pair], tmp_path: Path) -> None:
    model = trained(pairs["gpt2"], SECTIONS["lora"])
    peft.save(model, tmp_path, base_model=None)
    tensors: Any = mx.load(str(tmp_path / "adapter_model.safetensors"))
    for name, one in tensors.items():
        if "lora_B" in name:
            assert one.shape == (192, 4)
            assert not np.any(np.array(one[128:]))
            assert np.any(np.array(one[:128]))


def test_names_that_were_never_compared_are_refused(tmp_path: Path) -> None:
    from mlx_lm.models.mimo import Model, ModelArgs

    settings = tiny_models.config("qwen2") | {"model_type": "mimo", "num_nextn_predict_layers": 0}
    model = Model(ModelArgs.from_dict(settings))
    adapters.attach(model, SECTIONS["lora"])
    with pytest.raises(AdapterError, match=r"model\.layers\.0.*mimo.*--to mlx or --to fus"):
        peft.save(model, tmp_path, base_model=None)
    assert not list(tmp_path.iterdir())


def test_what_stock_mlx_lm_cannot_load_is_refused(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=4)
    model, _ = load_model(base)
    adapters.attach(model, AdapterSection(rank=4, head=True))
    adapters.save(model, tmp_path / "run")
    with pytest.raises(AdapterError, match=r"lm_head.*--to fused"):
        exchange.export(tmp_path / "run", "mlx", tmp_path / "out", model=str(base))
    assert not (tmp_path / "out").exists()
