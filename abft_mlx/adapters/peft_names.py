"""What transformers, and so PEFT, call the linear layers of mlx-lm's models.

mlx-lm keeps the names of checkpoints, transformers those of its own classes; they are the same but
for their beginnings. Which architectures that holds for was found by comparing weights, not names:
``tests/test_transformers_rows.py`` does so for every one named here.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.nn as nn

from abft_mlx.adapters.attach import targets
from abft_mlx.ports import architecture, port_for

SAME = frozenset({
    "afmoe", "apertus", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "gemma", "gemma2",
    "gemma3_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "gpt_bigcode", "gpt_oss", "granite", "helium", "hunyuan_v1_dense", "jamba", "lfm2", "llama",
    "ministral3", "mistral4", "nemotron", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma", "seed_oss",
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

_WRAPPING = frozenset({
    "base_model", "model", "language_model", "text_model", "transformer", "backbone", "gpt_neox",
})  # fmt: skip


def named(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """What layers of an mlx-lm model are called in transformers.

    Args:
        model: a loaded model.
        paths: full dotted paths of linear layers.

    Returns:
        Path to the path there, of those for which the two have been compared.
    """
    name, paths = architecture(model), list(paths)
    if name in SAME:
        return {path: path for path in paths}
    if name in SAME_ATTENTION:
        known = {one.path for one in targets(model)} | {port_for(model).head_path(model)}
        return {path: path for path in paths if path in known}
    found = {}
    for path in paths:
        for own, other in BEGINNINGS.get(name, ()):
            if path.startswith(own):
                found[path] = other + path.removeprefix(own)
                break
    return found


def transposed(model: nn.Module) -> bool:
    """Whether transformers keeps this model's projections transposed (``fan_in_fan_out``)."""
    return architecture(model) in TRANSPOSED


def wraps(model: nn.Module) -> bool:
    """Whether this model is the text model of one that has other towers in transformers."""
    return architecture(model) in _WRAPPERS


def ending_alike(name: str, paths: Iterable[str]) -> str | None:
    """The layer of an mlx-lm model that a name of another program means, from how it ends.

    What stands before the common end, on either side, may be nothing but what wraps a text model,
    so that the layer's number is in the end, and a vision tower's layers are no text model's.

    Args:
        name: a dotted path, such as those of an older transformers.
        paths: of the model's linear layers.

    Returns:
        One of ``paths``, or None where none or several would do.
    """
    found = [path for path in paths if _core(path) == _core(name)]
    return found[0] if len(found) == 1 else None


def _core(path: str) -> list[str]:
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPING:
        parts.pop(0)
    return parts
