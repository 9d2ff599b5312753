"""The ports of mlx-lm's architectures, and how a loaded model finds its own.

What W_Q and W_K are in each kind of attention, and why, is in docs/architectures.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import mlx.nn as nn

from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports.port import MODELS_PACKAGE, HeadShape, Port, Projection, architecture


def _port(base: Port, names: str, **changes: Any) -> Port:
    """A port of some architectures, as another but for these fields."""
    return replace(base, architectures=tuple(names.split()), **changes)


def _fused(path: str, per: Literal["", "head", "group"] = "") -> tuple[Projection, ...]:
    """One layer that makes queries, keys and values."""
    return (Projection(path, "qk", ("q", "k", "v"), per),)


def _in_wrapper(port: Port, names: str) -> Port:
    """The port of a text model that is ``language_model`` in a wrapper."""
    return _port(
        port,
        names,
        layer_list=f"language_model.{port.layer_list}",
        stem=f"language_model.{port.stem}",
        heads=tuple(f"language_model.{head}" for head in port.heads),
    )


# fmt: off
# mlx-lm runs Mistral, and a few others, with its Llama code: they come under "llama" here.
_LLAMA = _port(Port(()), """
    llama qwen2 qwen3 afmoe dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe gemma3_text gemma4_text
    glm4 glm4_moe granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm3
    laguna lfm2 lfm2_moe mellum mimo mimo_v2_flash ministral3 muse_glimmer nanbeige nemotron
    nemotron-nas olmo2 olmoe phimoe qwen2_moe qwen3_moe seed_oss smollm3 solar_open starcoder2
    cohere cohere2 gemma""")
# Attributes that count heads have other names in the next three.
_LONG = _port(_LLAMA, "Klear apertus glm gpt_oss jamba minimax olmo3 olmo_hybrid telechat3",
              n_heads="num_attention_heads", n_kv_heads="num_key_value_heads")
_MIXED = _port(_LLAMA, "minicpm mixtral phi stablelm",
               n_heads="num_heads", n_kv_heads="num_key_value_heads")
_NUM = _port(_MIXED, "falcon_h1 step3p5", n_kv_heads="num_kv_heads")
_GATED = _port(_LONG, "qwen3_next", projections=(
    Projection("q_proj", "q", ("q", "gate"), "head"), Projection("k_proj", "k")))
_TRANSFORMER = _port(_LLAMA, "", attention="attn", layer_list="transformer.h", stem="transformer",
                     heads=("lm_head", "transformer.wte"))
_PLAMO = _port(_LLAMA, "plamo2", projections=_fused("qkv_proj"), attention="mixer",
               layer_list="model.layers.layers", n_heads="q_num_heads", n_kv_heads="k_num_heads")

# Multi-head latent attention. The last of the present query layers makes the heads, so it is first.
_ROTARY = (("v", "kv_lora_rank"), ("k", "qk_rope_head_dim"))
_LATENT = (*(Projection(name, "q") for name in ("q_proj", "q_b_proj", "q_a_proj")),
           Projection("kv_a_proj_with_mqa", "k", _ROTARY))
_UNFOLDED = Projection("kv_b_proj", "k", (("k", "qk_nope_head_dim"), ("v", "v_head_dim")), "head")
_FOLDED = _port(_LLAMA, "deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa mistral4",
                projections=_LATENT, n_heads="num_heads", n_kv_heads="num_heads")

PORTS: tuple[Port, ...] = (
    _LLAMA, _LONG, _MIXED, _NUM, _GATED,
    _in_wrapper(_LLAMA, "gemma3 gemma4 lfm2-vl llama4 mistral3 pixtral qwen2_vl qwen3_vl qwen3_vl_moe"),  # noqa: E501
    _in_wrapper(_GATED, "qwen3_5 qwen3_5_moe"),
    _in_wrapper(_LONG, "minimax_m3_vl"),
    _port(_LONG, "deepseek", n_kv_heads="num_kv_heads"),
    _port(_LLAMA, "gemma2", by_hand=True),
    # It shares keys and values through its cache.
    _port(_LLAMA, "gemma3n", needs_cache=True, layer_list="model.language_model.layers", stem=None,
          heads=("model.language_model.embed_tokens",)),
    _port(_LLAMA, "llama4_text", heads=("output", "model.embed_tokens")),
    _port(_LLAMA, "plamo", layer_list="model.layers.layers",
          n_heads="q_num_heads", n_kv_heads="k_num_heads"),
    _port(_MIXED, "nemotron_h", attention="mixer", layer_list="backbone.layers", stem="backbone",
          heads=("lm_head",)),
    # Fused projections
    _port(_LLAMA, "phi3", projections=_fused("qkv_proj")),
    _port(_LLAMA, "spark2_5", projections=_fused("q_k_v_proj"),
          heads=("lm_head", "model.embed_tokens")),
    _port(_NUM, "baichuan_m1", projections=_fused("W_pack")),
    _port(_LONG, "bailing_moe bailing_moe_linear", projections=_fused("query_key_value"),
          attention="attention", classes=("BailingMoeAttention", "Attention"),
          heads=("lm_head", "model.word_embeddings")),
    _PLAMO,
    # With a cache its windows are a token shorter.
    _port(_PLAMO, "plamo3", same_with_cache=False),
    _port(_LLAMA, "internlm2", attention="attention", projections=_fused("wqkv", "group"),
          heads=("output", "model.tok_embeddings")),
    # GPT-2's relatives
    _port(_LLAMA, "gpt2", projections=_fused("c_attn"), attention="attn", layer_list="model.h",
          heads=("model.wte",), n_heads="n_head", n_kv_heads="n_head"),
    _port(_LONG, "gptj", attention="attn", layer_list="model.h", heads=("lm_head",),
          n_kv_heads="num_attention_heads"),
    _port(_LONG, "gpt_neox", projections=_fused("query_key_value", "head"), attention="attention",
          layer_list="model.h", stem=None, heads=("model.embed_out",),
          n_kv_heads="num_attention_heads"),
    _port(_TRANSFORMER, "gpt_bigcode", projections=_fused("c_attn")),
    _port(_TRANSFORMER, "qwen", projections=_fused("c_attn"),
          n_heads="num_attention_heads", n_kv_heads="num_attention_heads"),
    _port(_TRANSFORMER, "exaone", attention="attn.attention"),
    _port(_TRANSFORMER, "nanochat", projections=(Projection("c_q", "q"), Projection("c_k", "k")),
          n_heads="num_heads", n_kv_heads="num_kv_heads"),
    _port(_TRANSFORMER, "dbrx", projections=_fused("Wqkv"), attention="norm_attn_norm.attn",
          layer_list="transformer.blocks", n_heads="num_heads", n_kv_heads="num_key_value_heads"),
    _port(_TRANSFORMER, "openelm", projections=_fused("qkv_proj"), layer_list="transformer.layers",
          heads=("lm_head", "transformer.token_embeddings")),
    _port(_TRANSFORMER, "lille-130m", projections=_fused("qkv_proj"), attention="attention",
          layer_list="transformer.layers", stem=None, heads=("transformer.tok_embeddings",),
          n_heads="n_head"),
    # Multi-head latent attention
    _FOLDED,
    _port(_FOLDED, "deepseek_v2 minicpm3 youtu_llm", projections=(*_LATENT, _UNFOLDED)),
    _port(_FOLDED, "bailing_hybrid bailing_moe_v3", attention="attention",
          classes=("MultiLatentAttention", "BailingMLA"),
          heads=("lm_head", "model.word_embeddings")),
    _port(_FOLDED, "kimi_linear", classes=("KimiMLAAttention",)),
    _in_wrapper(replace(_FOLDED, classes=("KimiK3MLAAttention",)), "kimi_k3"),
    _in_wrapper(_FOLDED, "kimi_k25 kimi_vl"),
)
# fmt: on


def supported() -> tuple[str, ...]:
    """The mlx-lm model modules that have a port, in alphabetical order."""
    return tuple(sorted(name for port in PORTS for name in port.architectures))


def supported_in_words() -> str:
    """The end of a message to somebody whose model has no port."""
    return (
        f"{len(supported())} of mlx-lm's are, among them gpt2, llama (Mistral models run as it), "
        "qwen2, qwen3, gemma3 and phi3; docs/architectures.md has them all"
    )


def port_for(model: nn.Module) -> Port:
    """The port of a loaded model; never guessed from how the model looks.

    Raises:
        UnsupportedArchitectureError: no port names this model's architecture.
    """
    name = architecture(model)
    for port in PORTS:
        if type(model).__module__.startswith(MODELS_PACKAGE) and name in port.architectures:
            return port
    raise UnsupportedArchitectureError(
        f"architecture {name!r} is not supported; {supported_in_words()}"
    )


def heads(model: nn.Module) -> list[HeadShape | None]:
    """Heads of every layer, None for a layer without softmax attention."""
    port = port_for(model)
    return [port.head_shape(layer) for layer in port.layers(model)]


def head_counts(model: nn.Module) -> dict[int, int]:
    """Layer number to its number of query heads, for layers with softmax attention."""
    return {n: shape.n_heads for n, shape in enumerate(heads(model)) if shape is not None}
