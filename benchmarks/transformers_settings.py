"""Where transformers and mlx-lm read a configuration or a checkpoint in different ways."""

from __future__ import annotations

from typing import Any

from transformers_difference import Difference

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LOCAL_ROPE = {
    "full_attention": _ROPE,
    "sliding_attention": _ROPE | {"rope_theta": 1000.0},
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 2.5],
    "original_max_position_embeddings": 128,
}
_HALF = _ROPE | {"partial_rotary_factor": 0.5}
# A vision tower that is as small as the names of its settings allow; mlx-lm drops it.
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
}
_IMAGES: dict[str, Any] = {
    "model_class": "AutoModelForImageTextToText",
    "wrapper": {"vision_config": _VISION},
}

_ONE_WINDOW = (
    "transformers has one window for all layers, mlx-lm needs a layer without: compared without"
)

DIFFERENCES: dict[str, Difference] = {
    "bailing_hybrid": Difference(
        note="transformers' bailing_hybrid is another model, which mlx-lm calls bailing_moe_v3: "
        "compared with transformers' DeepSeek V3, which this is without linear layers",
        both={"num_key_value_heads": 4, "layer_group_size": 1, "rms_norm_eps": 1e-6},
        theirs={
            "head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "rope_parameters": _ROPE,
        },
        model_type="deepseek_v3",
        names=(
            ("embed_tokens", "word_embeddings"),
            (r"self_attn\.o_proj", "attention.dense"),
            ("self_attn", "attention"),
            ("e_score_correction_bias", "expert_bias"),
        ),
    ),
    # save_pretrained writes the attention's name for a linear layer's projection, too.
    "bailing_moe_v3": Difference(
        both={"num_key_value_heads": 4, "moe_shared_expert_intermediate_size": 32},
        theirs={"layer_types": ["linear_attention", "full_attention", "full_attention"]},
        model_type="bailing_hybrid",
        names=((r"layers\.0\.attention\.dense", "layers.0.attention.o_proj"),),
    ),
    # transformers does not read the base of attn_config.
    "dbrx": Difference(theirs={"rope_parameters": _ROPE}),
    # transformers' DeepSeek-OCR 2 has this text model.
    "deepseek": Difference(
        theirs={"mlp_layer_types": ["dense", "sparse", "sparse"]},
        wrapper={"vision_config": {"sam_config": _VISION, "encoder_config": _VISION}},
        model_type="deepseek_ocr2",
        model_class="AutoModelForImageTextToText",
        drop=("model.sam_model", "model.qwen2_model", "model.projector", "model.view_"),
    ),
    "deepseek_v2": Difference(
        both={
            "num_key_value_heads": 4,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
        },
        theirs={"rope_parameters": _YARN},
    ),
    "deepseek_v3": Difference(
        both={"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "rope_scaling": _YARN},
        theirs={"rope_parameters": _YARN},
    ),
    # With two heads many keys' scores are 0, and each of the two chooses among them as it likes.
    "deepseek_v32": Difference(both={"num_key_value_heads": 4, "index_n_heads": 16}),
    "ernie4_5_moe": Difference(
        note="transformers adds a bias to the scores that choose experts (moe_statics), mlx-lm "
        "does not read it: compared with a bias of 0",
        both={"moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        zero=("e_score_correction_bias",),
    ),
    "exaone4": Difference(theirs={"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "gear": Difference(
        note="compared with transformers' Gemma 3, which it is but for layers that do not attend",
        both={"rope_local_base_freq": 1000.0, "query_pre_attn_scalar": 16},
        theirs={"rope_parameters": _LOCAL_ROPE},
        model_type="gemma3_text",
    ),
    "gemma": Difference(
        note="mlx-lm has the exact GELU, transformers its approximation with tanh: compared with "
        "the exact one",
        theirs={"hidden_act": "gelu_python"},
    ),
    "gemma3": Difference(
        both={"rope_local_base_freq": 1000.0},
        theirs={"rope_parameters": _LOCAL_ROPE},
        **_IMAGES,
    ),
    "gemma3_text": Difference(
        both={"rope_local_base_freq": 1000.0}, theirs={"rope_parameters": _LOCAL_ROPE}
    ),
    "gemma3n": Difference(
        both={"altup_coef_clip": 120.0},
        unused=tuple(
            f"model.language_model.layers.2.self_attn.{one}"
            for one in ("k_proj", "k_norm", "v_proj")
        ),
        theirs={"rope_parameters": _LOCAL_ROPE},
        model_type="gemma3n_text",
        names=((r"^model\.", "model.language_model."),),
    ),
    "gemma4": Difference(
        both={"tie_word_embeddings": True},
        **_IMAGES
        | {"wrapper": {"vision_config": _VISION | {"head_dim": 16}, "audio_config": None}},
    ),
    "glm": Difference(
        note="transformers rotates half of the channels by default (partial_rotary_factor), "
        "mlx-lm always all: compared with all",
        theirs={"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}},
    ),
    "glm4": Difference(ours={"rope_traditional": True}),
    "glm4_moe_lite": Difference(both={"num_key_value_heads": 4, "partial_rotary_factor": 1.0}),
    "glm_moe_dsa": Difference(both={"num_key_value_heads": 4, "index_n_heads": 16}),
    "gpt2": Difference(names=(("transformer.", ""),)),
    "gpt_bigcode": Difference(
        note="mlx-lm has the exact GELU, transformers its approximation with tanh by default: "
        "compared with the exact one",
        without=("attention_bias", "mlp_bias"),
        theirs={"activation_function": "gelu"},
    ),
    "gpt_neox": Difference(
        note="mlx-lm always has the approximate GELU and an MLP of four times the width: compared "
        "so",
        theirs={"intermediate_size": 256, "hidden_act": "gelu_fast"},
    ),
    # mlx-lm reads experts as quantized checkpoints have them: (experts, out, in).
    "gpt_oss": Difference(
        names=(("(gate_up_proj|down_proj)$", r"\1.weight"),),
        swap=("experts.gate_up_proj.weight", "experts.down_proj.weight"),
    ),
    "granitemoehybrid": Difference(both={"position_embedding_type": "rope"}),
    "hunyuan": Difference(
        note="transformers norms the weights of the chosen experts, mlx-lm does not, and "
        "transformers shares no keys between layers: compared with all experts chosen and without "
        "sharing",
        both={
            "moe_topk": 4,
            "moe_intermediate_size": None,
            "tie_word_embeddings": True,
            "use_cla": False,
        },
        theirs={
            "head_dim": 16,
            "rope_parameters": _ROPE | {"rope_type": "dynamic", "alpha": 10.0, "factor": 1.0},
        },
        model_type="hunyuan_v1_moe",
    ),
    "internlm3": Difference(theirs={"head_dim": 16}),
    "jamba": Difference(
        both={"num_experts_per_tok": 4},
        note="mlx-lm's router norms the weights of the chosen experts, transformers' does not: "
        "compared with all experts chosen",
    ),
    # save_pretrained writes the vision tower's word for layers.
    "kimi_k25": Difference(
        both={"num_key_value_heads": 4},
        drop=("model.mm_projector.",),
        names=((r"language_model\.model\.blocks", "language_model.model.layers"),),
        **_IMAGES,
    ),
    # save_pretrained writes the experts' name for a dense layer, too.
    "kimi_linear": Difference(
        both={"num_key_value_heads": 4},
        names=((r"block_sparse_moe\.(gate|up|down)_proj", r"mlp.\1_proj"),),
    ),
    "kimi_vl": Difference(
        why_not="transformers does not have it, and mlx-lm does not read its hub checkpoints: its "
        "sanitize() leaves kv_b_proj whole, its attention has the two halves",
    ),
    # mlx-lm reads only checkpoints that were converted for MLX.
    "lfm2-vl": Difference(
        both={"tie_word_embeddings": True},
        theirs={"layer_types": ["conv", "full_attention", "full_attention"]},
        model_type="lfm2_vl",
        drop=("model.vision_tower.", "model.multi_modal_projector.", "lm_head."),
        names=(("model.language_model.", "language_model.model."),),
        swap=("conv.conv.weight",),
        **_IMAGES,
    ),
    "lfm2_moe": Difference(
        theirs={
            "layer_types": ["conv", "full_attention", "full_attention"],
            "tie_word_embeddings": True,
        }
    ),
    # transformers' Llama has no windows.
    "llama": Difference(without=("layer_types",)),
    # mlx-lm needs a fourth layer. transformers' wrapper fails without images.
    "llama4": Difference(
        both={"num_hidden_layers": 4},
        model_type="llama4_text",
        names=(("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    ),
    # mlx-lm has neither experts nor chunks here.
    "llama4_text": Difference(
        note="mlx-lm norms queries and keys of layers without RoPE, too, transformers does not: "
        "compared with RoPE in all layers",
        both={"no_rope_layers": [1, 1, 1], "tie_word_embeddings": True},
        theirs={"moe_layers": [], "attention_chunk_size": 256},
    ),
    # transformers writes experts that give back what they get; the hub has none.
    "longcat_flash": Difference(
        note="mlx-lm norms the chosen experts' weights where norm_topk_prob is set, transformers "
        "never does: compared without",
        both={"norm_topk_prob": False},
        theirs={"head_dim": 8},
        drop=tuple(f"model.layers.{layer}.mlp.experts.4." for layer in range(3)),
    ),
    "mimo": Difference(model_type="qwen2"),
    "mimo_v2_flash": Difference(
        note="transformers' windows hold one position more than mlx-lm's: compared with "
        "sliding_window_size lowered by one in transformers",
        both={
            "num_key_value_heads": 1,
            "n_shared_experts": None,
            "attention_value_scale": 0.7,
        },
        theirs={
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _HALF),
            "sliding_window_size": 8,
        },
    ),
    # Granite has the same multipliers.
    "minicpm": Difference(
        theirs={
            "embedding_multiplier": 16,
            "residual_multiplier": 1.4 / 3**0.5,
            "logits_scaling": 64 / 16,
            "attention_multiplier": 0.25,
        },
        model_type="granite",
    ),
    "minicpm3": Difference(
        note="mlx-lm always has the factors of long prompts (long_factor): compared with the same "
        "factors for short ones",
        both={"num_key_value_heads": 4, "rope_scaling": _LONG_ROPE},
        theirs={"rope_parameters": _ROPE | _LONG_ROPE},
    ),
    "minimax": Difference(model_type="minimax_m2"),
    "minimax_m3_vl": Difference(**_IMAGES),
    "ministral3": Difference(without=("layer_types", "sliding_window"), note=_ONE_WINDOW),
    "mistral3": Difference(
        note=_ONE_WINDOW,
        without=("layer_types", "sliding_window"),
        theirs={"model_type": "ministral3"},
        **_IMAGES,
    ),
    "mistral4": Difference(
        both={
            "num_key_value_heads": 4,
            "rope_parameters": _YARN
            | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16},
        },
        without=("head_dim",),
        model_class="Mistral4ForCausalLM",
    ),
    "muse_glimmer": Difference(drop=("model.vision_",), **_IMAGES),
    "nanbeige": Difference(
        model_type="llama", note="compared with transformers' Llama, which it is without loops"
    ),
    "nanochat": Difference(
        theirs={"rms_norm_eps": 1e-5},
        names=(
            ("model.embed_tokens", "transformer.wte"),
            ("model.layers", "transformer.h"),
            ("self_attn.q_proj", "attn.c_q"),
            ("self_attn.k_proj", "attn.c_k"),
            ("self_attn.v_proj", "attn.c_v"),
            ("self_attn.o_proj", "attn.c_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ),
    ),
    "nemotron": Difference(without=("layer_types",), theirs={"hidden_act": "relu2"}),
    "nemotron-nas": Difference(
        note="compared with transformers' Llama, which it is where a layer has attention and MLP",
        theirs={"num_key_value_heads": 2, "intermediate_size": 256},
        model_type="llama",
    ),
    "nemotron_h": Difference(without=("layer_types",)),
    "olmo3": Difference(
        theirs={"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    ),
    "olmo_hybrid": Difference(
        both={"linear_key_head_dim": 32},
        names=(
            ("attention_layer_norm", "input_layernorm"),
            ("feedforward_layer_norm", "post_attention_layernorm"),
        ),
    ),
    "phimoe": Difference(theirs={"attention_bias": True, "lm_head_bias": True}),
    "pixtral": Difference(model_type="llava", without=("layer_types",), **_IMAGES),
    "qwen2_vl": Difference(
        theirs={"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}, **_IMAGES
    ),
    "qwen3_5": Difference(both={"num_experts": 0}, **_IMAGES),
    "qwen3_5_moe": Difference(original=False, **_IMAGES),
    "qwen3_vl": Difference(**_IMAGES),
    # save_pretrained leaves the experts' axes as they are in memory, the hub has them swapped.
    "qwen3_vl_moe": Difference(swap=("experts.gate_up_proj", "experts.down_proj"), **_IMAGES),
    "recurrent_gemma": Difference(
        note="mlx-lm rotates with a base of 10000 whatever rope_theta is: compared with that",
        both={"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "solar_open": Difference(both={"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
    "step3p5": Difference(
        both={
            "rope_theta": [10000.0, 5000.0, 10000.0],
            "partial_rotary_factors": [1.0, 0.5, 1.0],
            "swiglu_limits": [0.0, 0.0, 0.5],
            "swiglu_limits_shared": [0.5, 0.0, 0.5],
            "moe_router_scaling_factor": 3.0,
        },
        theirs={"rope_parameters": None, "rope_theta": [10000.0, 5000.0, 10000.0]},
        model_type="step3p7",
        drop=("vision_model.", "vit_large_projector."),
        **_IMAGES,
    ),
    "telechat3": Difference(model_type="llama"),
    "youtu_llm": Difference(
        both={"num_key_value_heads": 4}, ours={"rope_traditional": True}, model_type="youtu"
    ),
}
