"""PEFT's side of an adapter: what it calls layers, and its ``adapter_config.json`` of a LoRA.

mlx-lm keeps the names of checkpoints, transformers those of its own classes; they are the same but
for their beginnings. Which architectures that holds for was found by comparing weights, not names:
``tests/test_transformers_rows.py`` does so for every one named here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from abft_mlx.adapters.lora import targets
from abft_mlx.errors import AdapterError
from abft_mlx.ports import architecture, port_for

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

SAME = frozenset({
    "afmoe", "apertus", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "gpt_bigcode", "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "jamba", "lfm2", "llama",
    "ministral3", "mistral4", "nemotron", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "seed_oss",
    "smollm3", "solar_open", "stablelm", "starcoder2",
})  # fmt: skip

# Of these only W_Q, W_K and the LM head: routers and experts have other names.
SAME_ATTENTION = frozenset({
    "dbrx", "granitemoe", "granitemoehybrid", "laguna", "lfm2_moe", "mixtral", "phimoe",
})  # fmt: skip

_WRAPPER = (("language_model.model.", "model.language_model."), ("language_model.", ""))
_WRAPPERS = (
    "gemma3", "gemma4", "lfm2-vl", "mistral3", "pixtral", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip
BEGINNINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "gpt2": (("model.", "transformer."),),
    "gptj": (("model.", "transformer."), ("lm_head", "lm_head")),
    "gpt_neox": (("model.h.", "gpt_neox.layers."),),
    "nemotron_h": (("backbone.", "model."), ("lm_head", "lm_head")),
    **dict.fromkeys(_WRAPPERS, _WRAPPER),
}
"""Architecture to the beginnings that differ, ours and theirs; the first that fits is replaced."""

# transformers keeps the weights of these as (inputs, outputs), in a Conv1D.
TRANSPOSED = frozenset({"gpt2"})

# What may stand before a text model's layers in either program.
_WRAPPING = frozenset({
    "base_model", "model", "language_model", "text_model", "transformer", "backbone", "gpt_neox",
})  # fmt: skip


def named(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """What linear layers of an mlx-lm model, full dotted paths, are called in transformers.

    Those are left out for which the two have not been compared.
    """
    name, paths = architecture(model), list(paths)
    if name in SAME:
        return {path: path for path in paths}
    if name in SAME_ATTENTION:
        compared = {target.path for target in targets(model)} | {port_for(model).head_path(model)}
        return {path: path for path in paths if path in compared}
    theirs = {}
    for path in paths:
        for own, other in BEGINNINGS.get(name, ()):
            if path.startswith(own):
                theirs[path] = other + path.removeprefix(own)
                break
    return theirs


def transposed(model: nn.Module) -> bool:
    """Whether transformers keeps this model's projections transposed (``fan_in_fan_out``)."""
    return architecture(model) in TRANSPOSED


def wraps(model: nn.Module) -> bool:
    """Whether this model is the text model of one that has other towers in transformers."""
    return architecture(model) in _WRAPPERS


def linear_paths(model: nn.Module) -> list[str]:
    """Full paths of a model's linear layers, those under an adapter by the adapter's path."""
    inner = {f"{path}.linear" for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    kinds = (nn.Linear, nn.QuantizedLinear, LoRALinear)
    return [path for path, m in model.named_modules() if isinstance(m, kinds) and path not in inner]


def ending_alike(name: str, paths: Iterable[str]) -> str | None:
    """The one layer of an mlx-lm model that a name of another program means, from how it ends.

    What stands before the common end, on either side, may be nothing but what wraps a text model,
    so that the layer's number is in the end, and a vision tower's layers are no text model's.
    """

    def core(path: str) -> list[str]:
        parts = path.split(".")
        while len(parts) > 1 and parts[0] in _WRAPPING:
            parts.pop(0)
        return parts

    alike = [path for path in paths if core(path) == core(name)]
    return alike[0] if len(alike) == 1 else None


def _pattern(value: str) -> str:
    """A text that is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(str(error)) from error
    return value


_Name = Annotated[str, AfterValidator(_pattern)]
_Rank = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class Settings(BaseModel):
    """What PEFT's LoraConfig says of ranks and scales, under its own keys.

    Which layers there are, the file's tensors say.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    r: _Rank = 8
    lora_alpha: _Number = 8.0
    rank_pattern: dict[_Name, _Rank] = {}
    alpha_pattern: dict[_Name, _Number] = {}
    use_rslora: bool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @classmethod
    def parse(cls, written: dict[str, Any], where: Path) -> Settings:
        """Check the content of an ``adapter_config.json``.

        Raises:
            AdapterError: one line that names the first key that cannot be honoured.
        """

        def refuse(key: str, way_out: str) -> AdapterError:
            return AdapterError(f"{where}: {key} is {written.get(key)!r:.80}, {way_out}")

        for key, allowed, way_out in _NEEDED:
            if written.get(key) not in allowed:
                raise refuse(key, way_out)
        for key, value in written.items():
            unset = value is None or value is False or value in ({}, [], "")
            if not unset and key not in _IGNORED and key not in cls.model_fields:
                raise refuse(key, "which is not supported; merge the adapter in PEFT")
        try:
            return cls(
                **{k: v for k, v in written.items() if k in cls.model_fields and v is not None}
            )
        except ValidationError as error:
            key = str(error.errors()[0]["loc"][0])
            raise refuse(key, "which cannot be read; compare it with PEFT's LoraConfig") from error

    def rank(self, name: str) -> int:
        """Rank of one layer's factors."""
        return _matching(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        """What multiplies B·A of one layer."""
        rank = self.rank(name)
        alpha = _matching(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# Keys, the values that can be honoured, and what to do where one has another.
_NEEDED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("peft_type", ("LORA",), "and only LORA can be used here; take a LoRA adapter"),
    ("task_type", (None, "CAUSAL_LM"), "but labels are read from a causal model's own words"),
    ("bias", (None, "none"), "but biases are not trained here; merge the adapter in PEFT"),
    # The other ways to start change the base's own weights, which the adapter then is relative to.
    ("init_lora_weights", (None, True, False, "gaussian", "eva", "orthogonal"),
     "which changes the base's weights; save the adapter with PEFT's "
     "path_initial_model_for_weight_conversion, as plain LoRA"),
)  # fmt: skip
# Keys that are read apart, or change nothing of what a finished adapter does.
_IGNORED = frozenset({
    "peft_type", "task_type", "bias", "init_lora_weights", "auto_mapping",
    "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "peft_version",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "ensure_weight_tying", "layers_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "modules_to_save",
})  # fmt: skip


def _matching(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a name."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)
