"""Adapters that PEFT wrote: the same logits here; what cannot be honoured is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import peft_support
import pytest
import tiny_models
from peft_support import TOLERANCE, Pair, far, new_adapter

from abft_mlx import adapters
from abft_mlx.adapters.peft import ending_alike
from abft_mlx.errors import AdapterError

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "k_proj"]}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "k_proj": 2},
            "alpha_pattern": {"layers.2.self_attn.q_proj": 3},
        },
    ),
    "some-layers": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}),
    "every-linear-layer": ("qwen2", {"target_modules": "all-linear"}),
    "a-pattern": ("llama", {"target_modules": r".*\.[02]\.self_attn\.[qk]_proj"}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head-of-low-rank": ("llama", {"target_modules": ["k_proj", "lm_head"]}),
    "fused": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    peft_support.peft()
    folder = tmp_path_factory.mktemp("pairs")
    return {name: Pair(name, folder / name) for name in ("gpt2", "llama", "qwen2")}


@pytest.mark.parametrize("kind", SETTINGS)
def test_logits_equal_pefts(pairs: dict[str, Pair], kind: str, tmp_path: Path) -> None:
    name, settings = SETTINGS[kind]
    pair = pairs[name]
    theirs = new_adapter(pair, tmp_path / "peft", **settings)
    model = pair.model()
    assert far(pair.ours(model), theirs) > 1e-1
    adapters.load(model, tmp_path / "peft")
    ours = pair.ours(model)
    assert far(ours, theirs) <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))
    # One rank and one scale for all layers, so that it can be saved, and stock mlx-lm loads that.
    adapters.save(model, tmp_path / "mlx")
    stock, _ = mlx_lm.load(str(pair.folder), adapter_path=str(tmp_path / "mlx"))
    assert far(pair.ours(stock), ours) <= TOLERANCE * max(1.0, float(np.abs(theirs).max()))


def test_half_of_it_and_its_shift(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["llama"]
    new_adapter(pair, tmp_path, **SETTINGS["patterns"][1])
    model = pair.model()
    adapters.load(model, tmp_path)
    shift = adapters.shift_norms(model)
    adapters.scale(model, 0.5)
    half = pair.ours(model)
    mixed = pair.model()
    adapters.combine(mixed, [(tmp_path, 0.25), (tmp_path, 0.25)])
    assert far(pair.ours(mixed), half) <= TOLERANCE
    tensors: Any = mx.load(str(tmp_path / "adapter_model.safetensors"))
    for layer, alpha in enumerate((8, 8, 3)):
        rank = 7 if layer == 1 else 4
        found = [
            np.array(tensors[f"base_model.model.model.layers.{layer}.self_attn.q_proj.{one}.weight"],
                     dtype=np.float64) for one in ("lora_B", "lora_A")
        ]  # fmt: skip
        assert shift["q"][layer] == pytest.approx(
            alpha / rank * np.linalg.norm(found[0] @ found[1])
        )


def test_a_quantized_base_takes_it(pairs: dict[str, Pair], tmp_path: Path) -> None:
    new_adapter(pairs["llama"], tmp_path / "peft", target_modules=["q_proj"])
    base = tiny_models.checkpoint(tmp_path / "base", "llama", bits=4)
    model, _ = mlx_lm.utils.load_model(base)
    before = np.array(model(mx.array(peft_support.ids())))
    adapters.load(model, tmp_path / "peft")
    assert far(np.array(model(mx.array(peft_support.ids()))), before) > 1e-1


@pytest.fixture(scope="module")
def plain(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    new_adapter(pairs["llama"], folder, target_modules=["q_proj", "k_proj"])
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is [1, 2]"),
        ({"target_parameters": ["w"]}, "target_parameters is ['w']"),
        ({"something_of_next_year": 3}, "something_of_next_year is 3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', which cannot be read"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, which cannot be read"),
        ({"r": 0}, "r is 0, which cannot be read"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0, which cannot be read"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern is {'(': 3}, which cannot be read"),
        ({"r": 5}, "lora_A (4, 64) and lora_B (64, 4) are not of the rank 5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    plain: Path, pairs: dict[str, Pair], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / adapters.CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(settings), encoding="utf-8")
    refused(pairs["llama"], tmp_path, message)


def refused(pair: Pair, folder: Path, message: str) -> None:
    model = pair.model()
    with pytest.raises(AdapterError) as caught:
        adapters.load(model, folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not adapters.adapted(model)


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half a pair", "layers.1.self_attn.q_proj.lora_B.weight: missing from"),
        ("another model", "layers.9.self_attn.q_proj.lora_A.weight: the model has no linear layer"),
        ("a tower", "vision_tower.layers.0.self_attn.q_proj.lora_A.weight: the model has no"),
        ("magnitudes", "lora_magnitude_vector: the model has no linear layer"),
        ("twice", "model.layers.0.self_attn.q_proj is the same layer of this model"),
        ("another width", "lora_b: shape (4, 63), the model needs (4, 64)"),
        ("pickled", "but adapter_model.bin, which is not opened because it can run code"),
        ("cut short", "is broken: "),
    ],
)
def test_tensors_that_do_not_fit(
    plain: Path, pairs: dict[str, Pair], fault: str, message: str, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors: Any = mx.load(str(file))
    if fault == "half a pair":
        del tensors[Q.format(1, "B")]
    elif fault == "another model":
        tensors[Q.format(9, "A")] = tensors[Q.format(1, "A")]
    elif fault == "a tower":
        tensors[Q.format(0, "A").replace("model.layers", "vision_tower.layers")] = mx.zeros((4, 64))
    elif fault == "magnitudes":
        tensors[Q.format(0, "magnitude_vector").replace(".weight", "")] = mx.zeros((64,))
    elif fault == "twice":
        tensors[Q.format(0, "A").replace("model.layers", "language_model.layers")] = mx.zeros(
            (4, 4)
        )
    elif fault == "another width":
        tensors[Q.format(1, "B")] = mx.zeros((63, 4))
    if fault == "pickled":
        file.rename(tmp_path / "adapter_model.bin")
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        mx.save_safetensors(str(file), tensors)
    refused(pairs["llama"], tmp_path, message)


def test_names_of_other_programs_are_matched_from_their_ends() -> None:
    paths = [f"language_model.model.layers.{n}.self_attn.q_proj" for n in range(12)]
    assert ending_alike("model.language_model.layers.1.self_attn.q_proj", paths) == paths[1]
    assert ending_alike("layers.11.self_attn.q_proj", paths) == paths[11]
    assert ending_alike("transformer.layers.2.self_attn.q_proj", paths) == paths[2]
    assert ending_alike("model.visual.layers.1.self_attn.q_proj", paths) is None
    assert ending_alike("self_attn.q_proj", paths) is None
    assert ending_alike("layers.1.q_proj", paths) is None
    assert (
        ending_alike("model.layers.1.self_attn.q_proj", [*paths, "layers.1.self_attn.q_proj"])
        is None
    )
