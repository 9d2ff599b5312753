"""A tiny random model of every architecture of the installed mlx-lm.

Most configurations share their fields' names, so a table of those names is enough for most; what an
architecture needs beyond it is in ``CHANGES``. Widths are small, but every rule is in use: fewer
key/value heads than query heads, windows shorter than a prompt, layers of each kind.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

from abft_mlx.ports import port_for

VOCABULARY = 96
LAYERS = 3
WINDOW = 9
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 5000.0}

_KDA = {
    "kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16,
    "short_conv_kernel_size": 4,
}  # fmt: skip
_SCALED_ROPE = _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}

COMMON: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "dim", "n_embd", "d_model", "hidden_dim", "model_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "n_layer",
        "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"),
        4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_attention_groups", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner"), 128),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size",
        "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "share_expert_dim", "moe_hidden_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size"), 256),
    **dict.fromkeys(("max_sequence_length", "max_seq_len", "model_max_length"), 256),
    **dict.fromkeys(("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"), 1e-05),
    "layernorm_epsilon": 1e-05, "head_dim": 16, "global_head_dim": 32, "rope_theta": 5000.0,
    "rope_scaling": None, "rope_traditional": False, "rotary_dim": 8, "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias"), False),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), WINDOW),
    "attention_chunk_size": WINDOW, "layer_types": _KINDS,
    # Experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"), 2),
    "top_k_experts": 2,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "num_shared_expert"), 1),
    **dict.fromkeys(("n_group", "topk_group", "moe_layer_freq", "decoder_sparse_step"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "mlp_only_layers": [],
    "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    # Multi-head latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 6,
    # Multipliers of the hidden states and logits
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "logit_scale": 0.5,
    **dict.fromkeys(("dim_model_base", "scale_emb"), 16),
    "scale_depth": 1.4,
    # Linear attention and state spaces
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "layer_group_size": 2,
    "group_norm_size": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_dt_rank": 8, "mamba_proj_bias": False,
    "mamba_conv_bias": True, "ssm_state_size": 16, "state_size": 16, "time_step_rank": 8,
    "conv_kernel": 4, "n_groups": 1,
    **dict.fromkeys(("use_conv_bias", "conv_bias"), True),
    "conv_L_cache": 3, "conv1d_width": 4, "chunk_size": 16, "time_step_limit": (0.0, float("inf")),
    "hidden_act": "silu",
}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2},
    "cohere2": {"sliding_window_pattern": 3},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 5000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": {"type": "yarn", "factor": 2.0,
        "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0}},
    "exaone4": {"sliding_window_pattern": "LLG"}, "exaone_moe": {"is_moe_layer": [False, True,
    True]}, "falcon_h1": {"mamba_rms_norm": True}, "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {"num_kv_shared_layers": 1, "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 16, "altup_num_inputs": 2, "altup_coef_clip": None,
        "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
        "rope_local_base_freq": 1000.0, "final_logit_softcapping": 30.0},
    "gemma4_text": {"layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 16, "num_experts": None,
        "top_k_experts": None, "rope_parameters": {"full_attention": _ROPE,
        "sliding_attention": _ROPE}},
    "glm4_moe": {"use_qk_norm": True}, "glm_moe_dsa": {"rope_parameters": _ROPE},
    "gpt_neox": {"rotary_emb_base": 5000, "rotary_pct": 0.5, "num_key_value_heads": 4},
    "gpt_oss": {"rope_scaling": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "attention"]},
    "hunyuan": {"use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True,
        "cla_share_factor": 2, "rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0}},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2},
    "kimi_k3": {"hidden_act": "situ", "linear_attn_config": _KDA, "mla_use_output_gate": True,
        "attn_res_block_size": 2, "activation_situ_beta": 1.0, "activation_situ_linear_beta": 1.0},
    "kimi_linear": {"linear_attn_config": _KDA}, "laguna": {"num_attention_heads_per_layer": [4, 4,
    4]},
    "lfm2": {"block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1, 2], "layer_types": None},
    "lfm2_moe": {"use_expert_bias": True, "full_attn_idxs": [1, 2], "layer_types": None},
    "llama4": {"num_hidden_layers": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "use_qk_norm": True, "attention_chunk_size": WINDOW},
    "llama4_text": {"no_rope_layers": [1, 0, 1], "use_qk_norm": True},
    "mellum": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
        "swa_rope_theta": 5000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "swa_v_head_dim": 8, "v_head_dim": 8},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1], "layer_types": None,
        "sparse_attention_config": {"sparse_num_index_heads": 2, "sparse_index_dim": 16,
        "sparse_block_size": 4, "sparse_topk_blocks": 2, "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1]}},
    "muse_spark": {"num_shared_experts": 0, "post_norm_eps": 1e-05, "rope_parameters": _ROPE,
        "layer_rope_theta": [5000.0] * LAYERS, "final_logit_softcapping": 30.0,
        "output_multiplier": 0.5},
    "minicpm3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4, "original_max_position_embeddings": 128}},
    "ministral3": {"rope_parameters": _SCALED_ROPE}, "mistral4": {"rope_parameters": _SCALED_ROPE},
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2, "no_op": False,
        "replace_with_linear": False}, "ffn": {"ffn_mult": 2.0, "no_op": False,
        "replace_with_linear": False}}] * LAYERS},
    "nemotron_h": {"hybrid_override_pattern": "M*-", "layer_types": None},
    "olmo_hybrid": {"linear_allow_neg_eigval": True, "layer_types": ["linear_attention",
        "full_attention", "full_attention"]},
    "openelm": {"num_query_heads": [4, 4, 4], "num_kv_heads": [2, 2, 2], "ffn_multipliers": [2.0,
        2.0, 2.0], "ffn_dim_divisor": 16},
    "phi3small": {"dense_attention_every_n_layers": 2, "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1, "blocksparse_vert_stride": 3,
        "ff_intermediate_size": 64, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2}, "qwen": {"kv_channels": 16}, "qwen3_next": {"head_dim": 16},
    "rwkv7": {"head_dim": 16, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8},
    "spark2_5": {"hidden_act": "gelu", "rope_parameters": {"full_attention": _ROPE,
        "sliding_attention": _ROPE}},
    "step3p5": {"moe_layers_enum": "1,2", "sliding_window": WINDOW},
}  # fmt: skip

# Wrappers that bring a text model of their own: the class of its configuration.
OWN_TEXT = {
    "gemma3n": "TextConfig", "kimi_k3": "TextArgs", "llama4": "TextArgs",
    "minimax_m3_vl": "TextArgs", "muse_spark": "TextArgs",
}  # fmt: skip
# Wrappers whose text model's configuration is a field of theirs: what that model is.
TEXT = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3", "lfm2-vl": "lfm2", "mistral3": "ministral3", "pixtral": "llama",
    "qwen2_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe", "qwen3_5": "qwen3_next",
    "qwen3_5_moe": "qwen3_next",
}  # fmt: skip

# Modules of mlx-lm's models folder that hold parts, not a model.
PARTS = frozenset(
    (
        "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline",
        "rope_utils", "ssm", "switch_layers",
    )
)  # fmt: skip


def architectures() -> list[str]:
    """Every module of mlx-lm's models that holds a model, in order."""
    names = {one.name for one in pkgutil.iter_modules(mlx_lm.models.__path__)}
    return sorted(names - PARTS)


def settings(name: str) -> dict[str, Any]:
    """The tiny configuration of an architecture, as its config.json would hold it."""
    if name in TEXT:
        inner = settings(TEXT[name])
        return {"model_type": name, "text_config": inner, "vocab_size": VOCABULARY}
    module = importlib.import_module(f"mlx_lm.models.{name}")
    described = getattr(module, OWN_TEXT.get(name, "ModelArgs"))
    fields = {one.name for one in dataclasses.fields(described)}
    known = {key: value for key, value in COMMON.items() if key in fields}
    made = {**known, "model_type": name, **CHANGES.get(name, {})}
    return {"model_type": name, "text_config": made} if name in OWN_TEXT else made


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with sharp random weights, in evaluation mode."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(settings(name)))
    parameters = tree_flatten(model.parameters())
    size = sum(value.size for _, value in parameters)
    if size > 8e6:
        raise ValueError(f"the tiny {name} has {size:,} parameters; its configuration is not tiny")
    keys = iter(mx.random.split(mx.random.key(seed), len(parameters)))

    def sharp(_path: str, value: mx.array) -> mx.array:
        noise = mx.random.normal(value.shape, key=next(keys))
        if value.dtype not in (mx.float32, mx.bfloat16, mx.float16):
            return value
        if value.ndim < 2:
            return 0.1 * noise + value.astype(mx.float32)
        return noise / value.shape[-1] ** 0.5

    model.update(tree_map_with_path(sharp, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def tokens(length: int = 24, batch: int = 2, seed: int = 1) -> tuple[mx.array, mx.array]:
    """Right-padded random tokens (B, T), longer than the windows, and last positions (B,)."""
    ids = mx.random.randint(1, VOCABULARY, (batch, length), key=mx.random.key(seed))
    last = mx.array([length - 1 - 5 * n for n in range(batch)])
    return mx.where(mx.arange(length) <= last[:, None], ids, 0), last


def logits(model: nn.Module, ids: mx.array) -> np.ndarray:
    """What mlx-lm itself gives, (B, T, V) float32, as its generation runs the model."""
    cache = make_prompt_cache(model) if port_for(model).needs_cache else None
    return np.array((model(ids) if cache is None else model(ids, cache=cache)).astype(mx.float32))
