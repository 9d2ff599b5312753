"""PEFT's configuration of a LoRA: what each key comes to, layer by layer, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from abft_mlx.adapters.peft import Settings
from abft_mlx.errors import AdapterError

WHERE = Path("run") / "adapter_config.json"
Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"


def parse(**written: Any) -> Settings:
    return Settings.parse({"peft_type": "LORA"} | written, WHERE)


def refusal(**written: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        parse(**written)
    return str(caught.value)


PLAIN = Settings()


def test_what_is_not_said_is_as_in_peft() -> None:
    assert (PLAIN.r, PLAIN.lora_alpha, PLAIN.use_rslora, PLAIN.lora_dropout) == (8, 8.0, False, 0.0)
    assert parse() == PLAIN
    assert parse(**dict.fromkeys(Settings.model_fields)) == PLAIN


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(start: Any) -> None:
    assert parse(init_lora_weights=start) == PLAIN


def test_keys_that_change_nothing() -> None:
    harmless = ("auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
                "fan_in_fan_out", "peft_version", "megatron_core", "loftq_config", "eva_config",
                "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
                "layers_pattern", "target_modules", "modules_to_save")  # fmt: skip
    assert parse(**dict.fromkeys(harmless, "whatever")) == PLAIN
    for unset in (None, False, {}, [], ""):
        assert parse(of_next_year=unset) == PLAIN


@pytest.mark.parametrize(
    ("key", "value", "way_out"),
    [
        ("peft_type", "LOHA", "and only LORA can be used here; take a LoRA adapter"),
        ("task_type", "SEQ_CLS", "but labels are read from a causal model's own words"),
        ("bias", "all", "but biases are not trained here; merge the adapter in PEFT"),
        (
            "init_lora_weights",
            "pissa",
            "which changes the base's weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, as plain LoRA",
        ),
        *(
            ("of_next_year", value, "which is not supported; merge the adapter in PEFT")
            for value in (0, True, 3, "x", [1], {"a": 1})
        ),
    ],
)
def test_what_cannot_be_honoured(key: str, value: Any, way_out: str) -> None:
    assert refusal(**{key: value}) == f"{WHERE}: {key} is {value!r}, {way_out}"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("r", [0, -1, True, 2.0, "8"]),
        ("lora_alpha", ["many", math.inf, -math.inf, math.nan, True, [1], 10**400]),
        ("lora_dropout", [1, 1.0, -0.1, True, "x", math.nan]),
        (
            "rank_pattern",
            [
                *({"(": 3}, {"q": 0}, {"q": True}, [1], {7: 1}, "q", {"a" * 201: 1}),
                dict.fromkeys(map(str, range(1001)), 1),
            ],
        ),
        ("alpha_pattern", [{"(": 3}, {"q": "x"}, {"q": math.inf}, [1]]),
    ],
)
def test_values_that_cannot_be_read(key: str, values: list[Any]) -> None:
    for value in values:
        assert refusal(**{key: value}).startswith(f"{WHERE}: {key} is {value!r:.80}, which cannot")


def test_ranks_and_scales_of_layers() -> None:
    found = parse(
        r=4,
        lora_alpha=6,
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 16},
        alpha_pattern={"k_proj": 3, r".*\.2\..*": 5},
    )
    for name, rank, alpha in (
        (Q.format(0), 16, 6),
        (Q.format(1), 2, 6),  # the first pattern that fits
        (Q.format(2), 16, 5),
        (K.format(0), 4, 3),
        (K.format(2), 4, 3),
        ("q_proj", 16, 6),
        ("model.qq_proj", 4, 6),  # no part of a name
        ("model.q_proj.inner", 4, 6),
    ):
        assert found.rank(name) == rank, name
        assert found.scale(name) == alpha / rank, name
    assert parse(r=4, lora_alpha=6, use_rslora=True).scale(Q.format(0)) == 3
