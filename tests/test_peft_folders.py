"""PEFT's folders written by hand: what their tensors come to, layer by layer, and each refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny_models

from abft_mlx import adapters, ports
from abft_mlx.adapters import files, peft
from abft_mlx.adapters.peft import linear_paths
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection

FILE = "adapter_model.safetensors"
Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"
QK = {"target_modules": ["q_proj", "k_proj"]}
Arrays = dict[str, mx.array]


def pair(name: str, rank: int = 4, outputs: int = 64, prefix: str = "base_model.model.") -> Arrays:
    """lora_A and lora_B of one layer of 64 inputs."""
    shapes = {"A": (rank, 64), "B": (outputs, rank)}
    return {
        f"{prefix}{name}.lora_{one}.weight": mx.random.normal(shape, key=mx.random.key(len(name)))
        for one, shape in shapes.items()
    }


def every(**ranks: int) -> Arrays:
    """W_Q and W_K of all three layers; ranks by ends of names, 4 elsewhere."""
    found = {}
    for n in range(3):
        found |= pair(Q.format(n), ranks.get(f"q{n}", 4))
        found |= pair(K.format(n), ranks.get(f"k{n}", 4), 32)
    return found


def write(folder: Path, tensors: Arrays, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / FILE), tensors)
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (folder / adapters.CONFIG).write_text(json.dumps(written), encoding="utf-8")
    return folder


def llama() -> nn.Module:
    return tiny_models.build("llama")


def refusal(folder: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        files.fitting(llama() if model is None else model, folder)
    return str(caught.value)


def problems(folder: Path, model: nn.Module | None = None) -> list[str]:
    """What has no place, the frame of the message checked and taken off."""
    told = refusal(folder, model)
    start, _, rest = told.partition(" mismatches): ")
    end = "; use the base model that it was trained on"
    assert rest.endswith(end)
    found = rest.removesuffix(end).split("; ")
    if not found[-1].startswith("and "):
        assert start == f"{folder} does not fit this model ({len(found)}"
    return found


@pytest.mark.parametrize(
    ("ranks", "settings", "scale", "rank", "scales"),
    [
        ({}, {}, 2.0, 4, {}),
        ({}, {"lora_alpha": 0}, 0.0, 4, dict.fromkeys(("q", "k"), 0.0)),
        (
            {"q1": 7, "k0": 2, "k1": 2, "k2": 2},
            {
                "rank_pattern": {"layers.1.self_attn.q_proj": 7, "k_proj": 2},
                "alpha_pattern": {"layers.2.self_attn.q_proj": 3},
            },
            1.0,
            7,
            {"q0": 2, "q1": 8 / 7, "q2": 3 / 4, "k": 4},
        ),
        # Of different ranks and one scale.
        ({"q0": 2}, {"rank_pattern": {".*0.*q_proj": 2}, "alpha_pattern": {".*0.*q_proj": 4}},
         2.0, 4, {}),
    ],
)  # fmt: skip
def test_one_rank_and_one_scale_for_all(
    ranks: dict[str, int],
    settings: dict[str, Any],
    scale: float,
    rank: int,
    scales: dict[str, float],
    tmp_path: Path,
) -> None:
    tensors = every(**ranks)
    half = f"base_model.model.{Q.format(0)}.lora_A.weight"
    tensors[half] = tensors[half].astype(mx.float16)
    tensors["base_model.model.lm_head.weight"] = mx.ones((96, 64), dtype=mx.bfloat16)
    write(tmp_path, tensors, **QK, modules_to_save=["lm_head"], lora_dropout=0.25, **settings)
    found = files.fitting(llama(), tmp_path)
    assert (found.kind, found.scale, found.dropout, found.keys) == ("lora", scale, 0.25, ())
    assert found.path == tmp_path
    got = dict(found.tensors)
    assert got.pop("lm_head.weight").dtype == mx.bfloat16
    assert {one.dtype for one in got.values()} == {mx.float32}
    assert len(got) == 12
    for n in range(3):
        for key, name, outputs in (("q", Q.format(n), 64), ("k", K.format(n), 32)):
            a, b = got[f"{name}.lora_a"], got[f"{name}.lora_b"]
            assert (a.shape, b.shape) == ((64, rank), (rank, outputs))
            own = ranks.get(f"{key}{n}", 4)
            assert not np.any(np.array(a[:, own:]))
            assert not np.any(np.array(b[own:]))
            theirs = [
                np.array(tensors[f"base_model.model.{name}.lora_{one}.weight"].astype(mx.float32))
                for one in "AB"
            ]
            assert np.array_equal(np.array(a[:, :own]), theirs[0].T)
            wanted = scales.get(f"{key}{n}", scales.get(key, 2.0)) * theirs[1] @ theirs[0]
            np.testing.assert_allclose(scale * np.array(a @ b).T, wanted, rtol=1e-4, atol=1e-5)


def test_a_head_alone(tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.weight": mx.ones((96, 64))}
    found = files.fitting(llama(), write(tmp_path, head, modules_to_save=["lm_head"]))
    assert (found.scale, found.modules) == (1.0, ["lm_head"])
    model = llama()
    adapters.load(model, tmp_path)
    assert list(adapters.adapted(model)) == ["lm_head"]
    assert mx.array_equal(model.lm_head.weight, head["base_model.model.lm_head.weight"])


def test_names_as_other_programs_have_them(tmp_path: Path) -> None:
    """Without PEFT's own beginning, without ``model``; on a model that has an adapter already."""
    tensors = pair(Q.format(0), prefix="") | pair(K.format(2)[6:], outputs=32)
    write(tmp_path, tensors, target_modules=["q_proj", "k_proj"])
    model = llama()
    adapters.attach(model, AdapterSection(rank=2))
    adapters.load(model, tmp_path)
    assert list(adapters.adapted(model)) == [Q.format(0), K.format(2)]
    assert {one.lora_a.shape for one in adapters.adapted(model).values()} == {(64, 4)}


def test_one_layer_alone(tmp_path: Path) -> None:
    found = files.fitting(llama(), write(tmp_path, pair(Q.format(1)), target_modules=[Q.format(1)]))
    assert (found.scale, found.modules) == (2.0, [Q.format(1)])


def test_layers_whose_names_are_others_in_transformers(
    benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    model = benchmark("tiny_configs").build("gpt_neox")
    ours, theirs = (
        "model.h.{}.attention.query_key_value",
        "gpt_neox.layers.{}.attention.query_key_value",
    )
    outputs = ports.output_dims(ports.resolve(model, ours.format(0)))
    write(tmp_path, pair(theirs.format(0), outputs=outputs), target_modules=[theirs.format(0)])
    assert files.fitting(model, tmp_path).modules == [ours.format(0)]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, every(), **QK, use_dora=True)
    assert refusal(tmp_path) == (
        f"{tmp_path / adapters.CONFIG}: use_dora is True, which is not supported; merge the "
        "adapter in PEFT"
    )
    way_out = "; save the adapter with PEFT's save_pretrained"
    write(tmp_path, {})
    (tmp_path / FILE).unlink()
    assert refusal(tmp_path) == f"{tmp_path} has no {FILE}{way_out}"
    (tmp_path / "adapter_model.bin").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path} has no {FILE} but adapter_model.bin, which is not opened because it can run "
        f"code{way_out}"
    )


def without(*names: str) -> Arrays:
    return {key: one for key, one in every().items() if not any(name in key for name in names)}


PLACE = "the model has no linear layer of that name"
OTHER = "neither lora_A nor lora_B nor the weight of an LM head"
SHAPE = mx.zeros((4, 64))
B = "base_model.model."


@pytest.mark.parametrize(
    ("tensors", "settings", "wanted"),
    [
        (
            every() | {f"{B}{Q.format(0)}.lora_magnitude_vector": SHAPE},
            QK,
            [f"{B}{Q.format(0)}.lora_magnitude_vector: {PLACE}"],
        ),
        (every() | pair(Q.format(3)), QK, [
            f"{B}{Q.format(3)}.lora_{one}.weight: {PLACE}" for one in "AB"]),
        (every() | {f"{B}{Q.format(0)}.weight": SHAPE}, QK, [f"{B}{Q.format(0)}.weight: {OTHER}"]),
        (every() | {f"{B}{Q.format(0)}": SHAPE}, QK, [f"{B}{Q.format(0)}: {OTHER}"]),
        (every() | {"lm_head": SHAPE}, QK, [f"lm_head: {OTHER}"]),
        (
            every() | {f"{Q.format(0)[6:]}.lora_A.weight": SHAPE},
            QK,
            [f"{Q.format(0)[6:]}.lora_A.weight: {Q.format(0)} is the same layer of this model"],
        ),
        (without("0.self_attn.q_proj.lora_A"), QK, [
            f"{Q.format(0)}.lora_A.weight: missing from {FILE}"]),
        (without("0.self_attn.q_proj.lora_B"), QK, [
            f"{Q.format(0)}.lora_B.weight: missing from {FILE}"]),
        *((every(**ranks), QK | more, [
            f"{Q.format(0)}: lora_A ({rank}, 64) and lora_B (64, {rank}) are not of the rank "
            f"{asked} in adapter_config.json"])
          for ranks, more, rank, asked in (
              ({"q0": 5}, {}, 5, 4),
              ({}, {"rank_pattern": {"0.self_attn.q_proj": 3}}, 4, 3))),
        (every() | {f"{B}{Q.format(0)}.lora_A.weight": mx.zeros((4,))}, QK, [
            f"{Q.format(0)}: lora_A (4,) and lora_B (64, 4) are not of the rank 4 in "
            "adapter_config.json"]),
        (every() | {f"{B}{Q.format(0)}.lora_B.weight": mx.zeros((64, 4, 1))}, QK, [
            f"{Q.format(0)}: lora_A (4, 64) and lora_B (64, 4, 1) are not of the rank 4 in "
            "adapter_config.json"]),
        (every() | {f"{B}{Q.format(0)}.lora_B.weight": mx.zeros((64, 3))}, QK, [
            f"{Q.format(0)}: lora_A (4, 64) and lora_B (64, 3) are not of the rank 4 in "
            "adapter_config.json"]),
    ],
)  # fmt: skip
def test_tensors_without_a_place(
    tensors: Arrays, settings: dict[str, Any], wanted: list[str], tmp_path: Path
) -> None:
    assert problems(write(tmp_path, tensors, **settings)) == wanted


@pytest.mark.parametrize("shape", [(), (96,), (95, 64)])
def test_a_head_of_another_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path, {"lm_head.weight": mx.zeros(shape)}, modules_to_save=["lm_head"])
    assert refusal(tmp_path) == (
        f"{tmp_path} does not fit this model (1 mismatches): lm_head.weight: shape {shape}, the "
        "model needs (96, 64); use the base model that it was trained on"
    )


def test_a_head_of_low_rank_and_in_full(tmp_path: Path) -> None:
    tensors = pair("lm_head", outputs=96) | {"lm_head.weight": mx.zeros((96, 64))}
    write(tmp_path, tensors, target_modules=["lm_head"], modules_to_save=["lm_head"])
    assert "lm_head.weight: there are LoRA tensors of it, too" in refusal(tmp_path)


def test_linear_layers_under_an_adapter_or_not() -> None:
    model = llama()
    wanted = {
        f"model.layers.{n}.{part}_proj"
        for n in range(3)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate",
                     "mlp.up", "mlp.down")
    } | {"lm_head"}  # fmt: skip
    assert sorted(linear_paths(model)) == sorted(wanted)
    adapters.attach(model, AdapterSection(rank=2, head=True))
    assert sorted(linear_paths(model)) == sorted(wanted)


def test_names_that_transformers_has(benchmark: Callable[[str], ModuleType]) -> None:
    build = benchmark("tiny_configs").build
    for name, paths, wanted in (
        ("llama", ["lm_head", "anything"], {"lm_head": "lm_head", "anything": "anything"}),
        (
            "mixtral",
            [Q.format(0), "lm_head", "model.layers.0.block_sparse_moe.gate"],
            {Q.format(0): Q.format(0), "lm_head": "lm_head"},
        ),
        ("gptj", ["model.h.0.attn.q_proj", "lm_head", "other"],
         {"model.h.0.attn.q_proj": "transformer.h.0.attn.q_proj", "lm_head": "lm_head"}),
        (
            "qwen3_vl",
            [f"language_model.{Q.format(0)}", "language_model.lm_head"],
            {
                f"language_model.{Q.format(0)}": f"model.language_model.{Q.format(0)[6:]}",
                "language_model.lm_head": "lm_head",
            },
        ),
        ("talkie", [Q.format(0)], {}),
    ):  # fmt: skip
        model = build(name)
        assert peft.named(model, iter(paths)) == wanted, name
        assert peft.wraps(model) == (name == "qwen3_vl")
        assert not peft.transposed(model)
    assert peft.transposed(tiny_models.build("gpt2"))


def test_a_name_that_is_all_wrapper_is_no_layer() -> None:
    assert peft.ending_alike("model", ["transformer"]) is None
    assert peft.ending_alike("model.model", ["model"]) == "model"
    assert peft.ending_alike("model.layers.0.q", ["layers.0.q"]) == "layers.0.q"
