"""What is no adapter, or fits no model: each case in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny_models

from abft_mlx import adapters
from abft_mlx.adapters import files
from abft_mlx.adapters.lora import targets
from abft_mlx.errors import AdapterError
from abft_mlx.recipe import AdapterSection

LORA = AdapterSection(rank=4, scale=2.0)
FULL = AdapterSection(kind="full")
Q = "model.layers.0.self_attn.q_proj"


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(AdapterError) as caught:
        action()
    return str(caught.value)


def llama(*, bits: int | None = None, **changes: Any) -> nn.Module:
    model = tiny_models.build("llama", **changes)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
    return model


class Odd(nn.Linear):
    """Linear, and more."""


def odd() -> nn.Module:
    """A model with one projection that is no plain linear layer."""
    model = llama()
    model.layers[1].self_attn.k_proj = Odd(64, 32, bias=False)
    return model


@pytest.mark.parametrize(
    ("model", "section", "words"),
    [
        (llama, AdapterSection(layers=[7, 1, 3]), "adapter.layers [3, 7]: this model has"),
        (llama, AdapterSection(layers="auto"), "adapter.layers auto is resolved by the census"),
        (llama, AdapterSection(rank=33), "k_proj is 32 x 64; use a rank of 1 to 32"),
        (lambda: llama(bits=4), AdapterSection(rank=65, layers=[1]), "q_proj is 64 x 64; use a"),
        (lambda: tiny_models.build("qwen2"), AdapterSection(head=True), "LM head is its embedding"),
        (lambda: llama(bits=4), FULL, f"{Q} is quantized, and a quantized base cannot train"),
        (odd, FULL, "model.layers.1.self_attn.k_proj is a Odd, which cannot train in full"),
    ],
)
def test_what_cannot_be_attached(
    model: Callable[[], nn.Module], section: AdapterSection, words: str
) -> None:
    base = model()
    assert words in refusal(lambda: adapters.attach(base, section))
    assert not adapters.adapted(base)


def test_no_layers_are_not_all_layers() -> None:
    message = refusal(lambda: targets(llama(), []))
    assert message.startswith("adapter.layers []: this model has attention layers 0 to 2")


def test_ranks_up_to_the_smaller_side() -> None:
    for bits in (None, 4, 8):
        for rank in (1, 32):
            model = llama(bits=bits)
            adapters.attach(model, AdapterSection(rank=rank))
            assert {one.lora_a.shape for one in adapters.adapted(model).values()} == {(64, rank)}


def test_one_adapter_at_a_time_and_none_for_nothing(tmp_path: Path) -> None:
    model = llama()
    for action in (
        lambda: adapters.scale(model, 2.0),
        lambda: adapters.merge(model),
        lambda: adapters.save(model, tmp_path),
        lambda: adapters.shift_norms(model),
    ):
        assert refusal(action).startswith("this model carries no adapter")
    assert refusal(lambda: adapters.combine(model, [])).startswith("no adapters to combine")
    endless = [("run", 1.0), ("other", float("-inf"))]
    assert refusal(lambda: adapters.combine(model, endless)).startswith("factor -inf of other")
    adapters.attach(model, LORA)
    assert "already carries an adapter" in refusal(lambda: adapters.attach(model, LORA))
    quantized = llama(bits=4)
    adapters.attach(quantized, LORA)
    assert "pass dequantize=True" in refusal(lambda: adapters.merge(quantized))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A saved adapter."""
    model = llama()
    adapters.attach(model, LORA)
    adapters.save(model, tmp_path / "run")
    return tmp_path / "run"


def rewrite(run: Path, **changes: Any) -> None:
    path = run / adapters.CONFIG
    written = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(written), encoding="utf-8")


KIND = "{file}: fine_tune_type {value!r} is not supported; use lora or full"
PARAMETERS = "{file}: lora_parameters {value!r} needs a number scale and a dropout of 0 up to 1"


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("fine_tune_type", ["dora", None, 7], KIND),
        (
            "lora_parameters",
            [
                None,
                [],
                {},
                {"scale": "much"},
                {"scale": None},
                {"scale": float("inf")},
                {"scale": float("nan")},
                {"scale": 10**400},
                {"scale": 1.0, "dropout": 1.0},
                {"scale": 1.0, "dropout": -0.01},
                {"scale": 1.0, "dropout": "some"},
                {"scale": 1.0, "keys": 7},
            ],
            PARAMETERS,
        ),
    ],
)
def test_settings_that_cannot_be_used(run: Path, key: str, values: list[Any], message: str) -> None:
    model = llama()
    for value in values:
        rewrite(run, **{key: value})
        told = refusal(lambda: adapters.load(model, run))
        assert told == message.format(file=run / adapters.CONFIG, value=value)


def test_settings_that_need_not_be_there(run: Path) -> None:
    path = run / adapters.CONFIG
    path.write_text('{"lora_parameters": {"scale": 3}}', encoding="utf-8")
    found = files.read(llama(), run)
    assert (found.kind, found.scale, found.dropout, found.keys) == ("lora", 3.0, 0.0, ())
    path.write_text('{"lora_parameters": {"scale": -1.5, "dropout": 0.5, "keys": null}}')
    found = files.read(llama(), run)
    assert (found.path, found.scale, found.dropout, found.keys) == (run, -1.5, 0.5, ())
    assert found.modules[:2] == ["model.layers.0.self_attn.k_proj", Q]


def problems(run: Path, model: nn.Module) -> list[str]:
    """What does not fit, the frame of the message checked and taken off."""
    told = refusal(lambda: adapters.load(model, run))
    assert not adapters.adapted(model)
    start, _, rest = told.partition(" mismatches): ")
    end = "; use the base model that it was trained on"
    assert rest.endswith(end)
    found = rest.removesuffix(end).split("; ")
    if not found[-1].startswith("and "):
        assert start == f"{run} does not fit this model ({len(found)}"
    return found


def changed(run: Path, change: dict[str, tuple[int, ...] | None], **settings: Any) -> None:
    tensors: Any = mx.load(str(run / adapters.WEIGHTS))
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = mx.zeros(shape)
    mx.save_safetensors(str(run / adapters.WEIGHTS), tensors)
    rewrite(run, **settings)


MISSING = "missing from adapters.safetensors"
K = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({f"{Q}.lora_a": (65, 4)}, [f"{Q}.lora_a: shape (65, 4), the model needs (64, 4)"]),
        ({f"{Q}.lora_a": (64,)}, [f"{Q}.lora_a: shape (64,), the model needs (64, 0)"]),
        ({f"{Q}.lora_b": (4, 63)}, [f"{Q}.lora_b: shape (4, 63), the model needs (4, 64)"]),
        ({f"{K}.lora_b": (3, 32)}, [f"{K}.lora_b: rank 3, lora_a has 4"]),
        ({f"{Q}.lora_b": None}, [f"{Q}.lora_b: {MISSING}"]),
        ({f"{Q}.lora_a": None}, [f"{Q}.lora_a: {MISSING}"]),
        (
            {f"{Q}.lora_a": None, f"{Q}.lora_b": None},
            [f"{Q}: named in adapter_config.json, but adapters.safetensors has no tensors for it"],
        ),
        ({f"{Q}.m": (3,)}, [f"{Q}.m: not a lora tensor (lora_a or lora_b)"]),
        ({f"{Q}.weight": (64, 64)}, [f"{Q}.weight: not a lora tensor (lora_a or lora_b)"]),
        (
            {"lm_head.weight": (95, 64)},
            ["lm_head.weight: shape (95, 64), the model needs (96, 64)"],
        ),
        (
            {"lm_head.weight": (96, 64), "lm_head.lora_a": (64, 4), "lm_head.lora_b": (4, 96),
             "x.weight": (1, 1)},
            ["lm_head.weight: there are LoRA tensors of lm_head, too",
             "x.weight: the model has no linear layer 'x'"],
        ),
        (
            {"lora_a": (64, 4)},
            ["lora_a: the model has no linear layer ''", f".lora_a: {MISSING}",
             f".lora_b: {MISSING}"],
        ),
        (
            {"x.y.lora_a": (64, 4), "x.y.lora_b": (4, 4)},
            ["x.y.lora_a: the model has no linear layer 'x.y'",
             "x.y.lora_b: the model has no linear layer 'x.y'"],
        ),
        (
            {"model.norm.lora_a": (64, 4), "model.norm.lora_b": (4, 4)},
            ["model.norm.lora_a: the model has no linear layer 'model.norm'",
             "model.norm.lora_b: the model has no linear layer 'model.norm'"],
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    run: Path, change: dict[str, tuple[int, ...] | None], wanted: list[str]
) -> None:
    changed(run, change)
    assert problems(run, llama()) == wanted


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = llama()
    adapters.attach(model, AdapterSection(kind="full", layers=[0], head=True))
    adapters.save(model, run)
    found = files.read(llama(), run)
    assert (found.kind, found.scale, found.dropout, found.keys) == ("full", 1.0, 0.0, ())
    other = "model.layers.0.self_attn.k_proj.weight"
    assert problems(run, llama(bits=4)) == [
        f"{other}: the model's {other[:-7]} is quantized",
        f"{Q}.weight: the model's {Q} is quantized",
    ]
    changed(run, {f"{Q}.weight": (64, 63), f"{Q}.lora_b": (4, 64)})
    assert problems(run, llama()) == [
        f"{Q}.lora_b: not a full tensor (weight)",
        f"{Q}.weight: shape (64, 63), the model needs (64, 64)",
    ]


def test_lora_beside_weights_for_stock_mlx_lm(tmp_path: Path) -> None:
    model = llama()
    adapters.attach(model, AdapterSection(rank=4, scale=3.0, dropout=0.5, layers=[1], head=True))
    adapters.save(model, tmp_path)
    found = files.read(llama(), tmp_path)
    names = [f"{K}.lora_a", f"{K}.lora_b"]
    names += [name.replace("k_proj", "q_proj") for name in names]
    assert (found.kind, found.scale, found.dropout) == ("lora", 3.0, 0.5)
    assert sorted(found.tensors) == ["lm_head.weight", *names]
    # Such a file beside LoRA tensors is some other program's.
    adapters.detach(model)
    adapters.attach(model, LORA)
    (tmp_path / "lora").mkdir()
    adapters.save(model, tmp_path / "lora")
    (tmp_path / "lora" / adapters.FACTORS).touch()
    assert len(files.read(llama(), tmp_path / "lora").tensors) == 12


def test_layers_that_the_settings_name_by_their_ends(run: Path) -> None:
    changed(run, {}, lora_parameters={"scale": 1.0, "keys": ["self_attn.q_proj", Q, "k_proj"]})
    assert len(files.fitting(llama(), run).modules) == 6
    changed(run, {}, lora_parameters={"scale": 1.0, "keys": ["_proj", "v_proj"]})
    assert problems(run, llama()) == [
        f"{key}: named in adapter_config.json, but adapters.safetensors has no tensors for it"
        for key in ("_proj", "v_proj")
    ]


@pytest.mark.parametrize("number", [5, 6])
def test_five_problems_are_shown(run: Path, number: int) -> None:
    changed(run, {f"x{n:02}.weight": (1, 1) for n in range(number)})
    found = problems(run, llama())
    shown = [f"x{n:02}.weight: the model has no linear layer 'x{n:02}'" for n in range(number)]
    assert found == shown[:5] + ([f"and {number - 5} more"] if number > 5 else [])
    assert f"({number} mismatches)" in refusal(lambda: files.fitting(llama(), run))


def test_of_many_wrong_shapes_one_is_enough(run: Path) -> None:
    names = [name for name in mx.load(str(run / adapters.WEIGHTS)) if name.endswith("lora_a")]
    assert len(names) > 2
    changed(run, dict.fromkeys(names, (65, 4)))
    found = problems(run, llama())
    assert sum("shape" in one for one in found) == 1
    assert found[-1] == f"and {len(names) - 1} more"
