"""PEFT's ``adapter_config.json`` of a LoRA: what can be honoured, and a refusal of the rest."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from abft_mlx.errors import AdapterError

# Keys that change nothing of what a finished adapter does, whatever their value.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out",
    "peft_version", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "ensure_weight_tying", "layers_pattern", "peft_type",
})  # fmt: skip
_READ = frozenset({
    "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "init_lora_weights", "bias",
})  # fmt: skip
# Bounds that no real adapter comes near.
MOST_PATTERNS = 1000
LONGEST_KEY = 200
LONGEST_PATTERN = 2000
# The other ways to start change the base's own weights, which the adapter then is relative to.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Settings:
    """What a LoRA configuration says of layers, by their names in transformers.

    Attributes:
        default_rank: of layers that ``ranks`` does not name.
        default_alpha: of layers that ``alphas`` does not name.
        ranks: patterns of names to ranks.
        alphas: patterns of names to alphas.
        stabilized: whether scale is alpha / sqrt(rank) and not alpha / rank.
        dropout: before lora_A.
        target_modules: names, or ends of names; or one pattern.
        exclude_modules: of the same kinds.
        layers: numbers of the layers that ends of names are looked for in; None for all.
        modules_to_save: names, or ends of names, of layers that were trained in full.
    """

    default_rank: int
    default_alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    stabilized: bool
    dropout: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None
    modules_to_save: tuple[str, ...]

    @classmethod
    def parse(cls, written: dict[str, Any], where: Path) -> Settings:
        """Check a configuration.

        Args:
            written: the content of ``adapter_config.json``.
            where: what errors call it.

        Raises:
            AdapterError: one line that names the first key that cannot be honoured.
        """

        def refuse(key: str, way_out: str) -> AdapterError:
            return AdapterError(f"{where}: {key} is {written.get(key)!r:.80}, {way_out}")

        if written["peft_type"] != "LORA":
            raise refuse("peft_type", "and only LORA can be used here; take a LoRA adapter")
        if written.get("task_type") not in (None, "CAUSAL_LM"):
            raise refuse("task_type", "but labels are read from a causal model's own words")
        if written.get("bias", "none") != "none":
            raise refuse("bias", "but biases are not trained here; merge the adapter in PEFT")
        if written.get("init_lora_weights") not in _STARTS:
            raise refuse(
                "init_lora_weights",
                "which changes the base's weights; save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion, as plain LoRA",
            )
        for key, value in written.items():
            plain = value is None or value is False or value in ({}, [], "")
            if key not in _HARMLESS | _READ and not plain:
                raise refuse(key, "which is not supported; merge the adapter in PEFT")
        found: dict[str, Any] = {}
        for name, key, read in _FIELDS:
            try:
                found[name] = read(written.get(key))
            except (
                TypeError,
                ValueError,
                OverflowError,
                AttributeError,
                RecursionError,
                re.error,
            ) as error:
                way_out = "which cannot be read; compare it with PEFT's LoraConfig"
                raise refuse(key, way_out) from error
        return cls(**found)

    def rank(self, name: str) -> int:
        """Rank of one layer's factors."""
        return _matching(self.ranks, name, self.default_rank)

    def scale(self, name: str) -> float:
        """What multiplies B·A of one layer."""
        rank = self.rank(name)
        return _matching(self.alphas, name, self.default_alpha) / (
            math.sqrt(rank) if self.stabilized else rank
        )

    def targets(self, name: str) -> bool:
        """Whether PEFT puts LoRA on a layer."""
        if _named(self.exclude_modules, name) or _named(self.modules_to_save, name):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or _named(self.target_modules, name)
        if name in self.target_modules or self.layers is None:
            return _named(self.target_modules, name)
        number = re.match(r".*?\.(\d+)\.", name)
        return (
            _named(self.target_modules, name)
            and number is not None
            and int(number[1]) in self.layers
        )


def _matching(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _named(names: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)


def _number(default: float, value: Any) -> float:
    found = default if value is None else float(value)
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError
    return found


def _rank(value: Any) -> int:
    found = 8 if value is None else value
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError
    return found


def _dropout(value: Any) -> float:
    found = _number(0.0, value)
    if not 0 <= found < 1:
        raise ValueError
    return found


def _patterns(read: Any, value: Any) -> dict[str, Any]:
    given = value or {}
    if len(given) > MOST_PATTERNS or any(len(key) > LONGEST_KEY for key in given):
        raise ValueError
    return {_pattern(key): read(one) for key, one in given.items()}


def _pattern(value: str) -> str:
    if len(value) > LONGEST_PATTERN:
        raise ValueError
    re.compile(value)
    return value


def _names(value: Any) -> tuple[str, ...] | str:
    if isinstance(value, str):
        return _pattern(value)
    found = tuple(value or ())
    if not all(isinstance(one, str) for one in found):
        raise TypeError
    return found


def _list_of_names(value: Any) -> tuple[str, ...]:
    found = _names(value)
    return (found,) if isinstance(found, str) else found


def _layers(value: Any) -> tuple[int, ...] | None:
    several = [value] if isinstance(value, int) else list(value or ())
    if not all(isinstance(one, int) for one in several):
        raise TypeError
    return tuple(several) or None


_ALPHA = partial(_number, 8.0)
_FIELDS = (
    ("default_rank", "r", _rank),
    ("default_alpha", "lora_alpha", _ALPHA),
    ("ranks", "rank_pattern", partial(_patterns, _rank)),
    ("alphas", "alpha_pattern", partial(_patterns, _ALPHA)),
    ("stabilized", "use_rslora", bool),
    ("dropout", "lora_dropout", _dropout),
    ("target_modules", "target_modules", _names),
    ("exclude_modules", "exclude_modules", _names),
    ("layers", "layers_to_transform", _layers),
    ("modules_to_save", "modules_to_save", _list_of_names),
)
