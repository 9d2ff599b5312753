"""The ports of mlx-lm's architectures, and how a loaded model finds its own.

What is the same in several stands in one row.

What W_Q and W_K are in each kind of attention, and why, is in docs/architectures.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import mlx.nn as nn

from abft_mlx.errors import UnsupportedArchitectureError
from abft_mlx.ports.port import MODELS_PACKAGE, HeadShape, Port, Projection, architecture


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _fused(path: str, per: Literal["", "head", "group"] = "") -> tuple[Projection, ...]:
    return (Projection(path, "qk", ("q", "k", "v"), per),)


_SHORT = Port(
    # mlx-lm runs Mistral, and a few others, with its Llama code: they come under "llama" here.
    _names(
        "llama qwen2 qwen3 afmoe dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe "
        "gemma3_text gemma4_text glm4 glm4_moe granite granitemoe granitemoehybrid "
        "helium hunyuan hunyuan_v1_dense internlm3 laguna lfm2 lfm2_moe mellum mimo "
        "mimo_v2_flash ministral3 muse_glimmer nanbeige nemotron nemotron-nas olmo2 "
        "olmoe phimoe qwen2_moe qwen3_moe seed_oss smollm3 solar_open starcoder2 cohere "
        "cohere2 gemma"
    )
)
_LONG = replace(
    _SHORT,
    architectures=(
        "Klear",
        "apertus",
        "glm",
        "gpt_oss",
        "jamba",
        "minimax",
        "olmo3",
        "olmo_hybrid",
        "telechat3",
    ),
    n_heads="num_attention_heads",
    n_kv_heads="num_key_value_heads",
)
_MIXED = replace(
    _SHORT,
    architectures=("minicpm", "mixtral", "phi", "stablelm"),
    n_heads="num_heads",
    n_kv_heads="num_key_value_heads",
)
_NUM = replace(_MIXED, architectures=("falcon_h1", "step3p5"), n_kv_heads="num_kv_heads")
_GATED = replace(
    _LONG,
    architectures=("qwen3_next",),
    projections=(Projection("q_proj", "q", ("q", "gate"), "head"), Projection("k_proj", "k")),
)
_GPT = Port(
    ("gpt2",),
    projections=_fused("c_attn"),
    attention="attn",
    layer_list="model.h",
    heads=("model.wte",),
    n_heads="n_head",
    n_kv_heads="n_head",
)
_TRANSFORMER = replace(
    _SHORT,
    attention="attn",
    layer_list="transformer.h",
    stem="transformer",
    heads=("lm_head", "transformer.wte"),
)

_KEYS_OF_LATENT = Projection(
    "kv_a_proj_with_mqa", "k", (("v", "kv_lora_rank"), ("k", "qk_rope_head_dim"))
)
# The last of them first: its outputs are the heads.
_LATENT_QUERIES = tuple(Projection(name, "q") for name in ("q_proj", "q_b_proj", "q_a_proj"))
_FOLDED = Port(
    ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4"),
    projections=(*_LATENT_QUERIES, _KEYS_OF_LATENT),
    n_heads="num_heads",
    n_kv_heads="num_heads",
)
_LATENT = replace(
    _FOLDED,
    architectures=("deepseek_v2", "minicpm3", "youtu_llm"),
    projections=(
        *_LATENT_QUERIES,
        _KEYS_OF_LATENT,
        Projection("kv_b_proj", "k", (("k", "qk_nope_head_dim"), ("v", "v_head_dim")), "head"),
    ),
)
_PLAMO = replace(
    _SHORT,
    architectures=("plamo2",),
    projections=_fused("qkv_proj"),
    attention="mixer",
    layer_list="model.layers.layers",
    n_heads="q_num_heads",
    n_kv_heads="k_num_heads",
)


def _in_wrapper(port: Port, *architectures: str) -> Port:
    """The port of a text model that is ``language_model`` in a wrapper."""
    return replace(
        port,
        architectures=architectures,
        layer_list=f"language_model.{port.layer_list}",
        stem=f"language_model.{port.stem}",
        heads=tuple(f"language_model.{head}" for head in port.heads),
    )


PORTS: tuple[Port, ...] = (
    _SHORT,
    _LONG,
    _MIXED,
    _NUM,
    _GATED,
    _in_wrapper(
        _SHORT,
        *_names(
            "gemma3 gemma4 lfm2-vl llama4 mistral3 pixtral qwen2_vl qwen3_vl qwen3_vl_moe"
        ),
    ),
    _in_wrapper(_GATED, "qwen3_5", "qwen3_5_moe"),
    _in_wrapper(_LONG, "minimax_m3_vl"),
    replace(_LONG, architectures=("deepseek",), n_kv_heads="num_kv_heads"),
    replace(_SHORT, architectures=("gemma2",), calls=(), by_hand=("__call__",)),
    replace(_SHORT, architectures=("gear",), by_hand=("_softcap_attention",)),
    # Two loops through the layers. In the second each attends to the keys of the first, and in a
    # window to its own; a gate mixes the two.
    replace(_SHORT, architectures=("iquestloopcoder",), calls=("attention",), passes=(1, 2)),
    replace(_SHORT, architectures=("recurrent_gemma",), attention="temporal_block",
            classes=("LocalAttentionBlock",), n_heads="num_heads", n_kv_heads=1),
    replace(
        _SHORT,
        architectures=("gemma3n",),
        needs_cache=True,  # it shares keys and values through it
        layer_list="model.language_model.layers",
        stem=None,
        heads=("model.language_model.embed_tokens",),
    ),
    replace(_SHORT, architectures=("llama4_text",), heads=("output", "model.embed_tokens")),
    replace(_SHORT, architectures=("plamo",), layer_list="model.layers.layers",
            n_heads="q_num_heads", n_kv_heads="k_num_heads"),
    replace(
        _MIXED,
        architectures=("nemotron_h",),
        attention="mixer",
        layer_list="backbone.layers",
        stem="backbone",
        heads=("lm_head",),
    ),
    # Fused projections
    replace(_SHORT, architectures=("phi3",), projections=_fused("qkv_proj")),
    # Keys are rounded to 8 bits, through which no gradient comes: of W_Q and W_K, W_Q learns.
    replace(
        _SHORT,
        architectures=("afm7",),
        projections=(*_fused("qkv_proj"), Projection("q_proj", "q")),
        layer_list=("model.layers", "model.kv_reuse_layers"),
        heads=("model.embedding",),
    ),
    replace(_SHORT, architectures=("spark2_5",), projections=_fused("q_k_v_proj"),
            heads=("lm_head", "model.embed_tokens")),
    replace(_NUM, architectures=("baichuan_m1",), projections=_fused("W_pack")),
    replace(
        _LONG,
        architectures=("bailing_moe", "bailing_moe_linear"),
        projections=_fused("query_key_value"),
        attention="attention",
        classes=("BailingMoeAttention", "Attention"),
        heads=("lm_head", "model.word_embeddings"),
    ),
    _PLAMO,
    # With a cache its windows are a token shorter.
    replace(_PLAMO, architectures=("plamo3",), same_with_cache=False),
    replace(_SHORT, architectures=("internlm2",), attention="attention",
            projections=_fused("wqkv", "group"),
            heads=("output", "model.tok_embeddings")),
    # GPT-2's relatives
    _GPT,
    replace(_LONG, architectures=("gptj",), attention="attn", layer_list="model.h",
            heads=("lm_head",), n_kv_heads="num_attention_heads"),
    replace(
        _LONG,
        architectures=("gpt_neox",),
        projections=_fused("query_key_value", "head"),
        attention="attention",
        layer_list="model.h",
        stem=None,
        heads=("model.embed_out",),
        n_kv_heads="num_attention_heads",
    ),
    replace(_TRANSFORMER, architectures=("gpt_bigcode",), projections=_fused("c_attn")),
    replace(_TRANSFORMER, architectures=("qwen",), projections=_fused("c_attn"),
            n_heads="num_attention_heads", n_kv_heads="num_attention_heads"),
    replace(_TRANSFORMER, architectures=("phixtral",), projections=_fused("Wqkv"),
            attention="mixer", heads=("lm_head.linear",), n_heads="num_heads",
            n_kv_heads="num_heads"),
    replace(_TRANSFORMER, architectures=("exaone",), attention="attn.attention"),
    replace(
        _TRANSFORMER,
        architectures=("nanochat",),
        projections=(Projection("c_q", "q"), Projection("c_k", "k")),
        n_heads="num_heads",
        n_kv_heads="num_kv_heads",
    ),
    replace(
        _TRANSFORMER,
        architectures=("dbrx",),
        projections=_fused("Wqkv"),
        attention="norm_attn_norm.attn",
        layer_list="transformer.blocks",
        n_heads="num_heads",
        n_kv_heads="num_key_value_heads",
    ),
    replace(_TRANSFORMER, architectures=("openelm",), projections=_fused("qkv_proj"),
            layer_list="transformer.layers", heads=("lm_head", "transformer.token_embeddings")),
    replace(
        _TRANSFORMER,
        architectures=("lille-130m",),
        projections=_fused("qkv_proj"),
        attention="attention",
        layer_list="transformer.layers",
        stem=None,
        heads=("transformer.tok_embeddings",),
        n_heads="n_head",
    ),
    replace(
        _SHORT,
        architectures=("talkie",),
        projections=(Projection("attn_query", "q"), Projection("attn_key", "k")),
        attention="attn",
        layer_list="model.blocks",
        block_input="x",
        heads=("lm_head",),
        n_kv_heads="n_heads",
    ),
    # Multi-head latent attention
    _FOLDED,
    _LATENT,
    replace(_FOLDED, architectures=("bailing_hybrid", "bailing_moe_v3"), attention="attention",
            classes=("MultiLatentAttention", "BailingMLA"),
            heads=("lm_head", "model.word_embeddings")),
    replace(_FOLDED, architectures=("kimi_linear",), classes=("KimiMLAAttention",)),
    _in_wrapper(replace(_FOLDED, classes=("KimiK3MLAAttention",)), "kimi_k3"),
    _in_wrapper(_FOLDED, "kimi_k25", "kimi_vl"),
    replace(_FOLDED, architectures=("longcat_flash", "longcat_flash_ngram"),
            attention=("self_attn.0", "self_attn.1"), heads=("lm_head",),
            n_heads="num_attention_heads", n_kv_heads="num_attention_heads"),
)  # fmt: skip


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
    module = type(model).__module__
    name = architecture(model)
    for port in PORTS:
        if module.startswith(MODELS_PACKAGE) and name in port.architectures:
            return port
    raise UnsupportedArchitectureError(
        f"architecture {name!r} is not supported; {supported_in_words()}"
    )


def head_counts(model: nn.Module) -> dict[int, int]:
    """Layer number to its number of query heads, for layers with softmax attention."""
    return {n: shape.n_heads for n, shape in enumerate(heads(model)) if shape is not None}


def heads(model: nn.Module) -> list[HeadShape | None]:
    """Heads of every layer, None for a layer without softmax attention."""
    port = port_for(model)
    return [port.head_shape(layer) for layer in port.layers(model)]
