"""Rows and logits of an architecture against transformers' eager attention, on the same weights.

A random transformers model is made from the tiny configuration, its weights are written as its
hub checkpoints have them, and mlx-lm's own loading code reads them.
"""

from __future__ import annotations

import copy
import importlib
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny_configs
from mlx.utils import tree_flatten

from abft_mlx import attention, ports
from abft_mlx.adapters import peft
from abft_mlx.adapters.peft import linear_paths

ABSENT = "transformers does not have it"


@dataclass(frozen=True)
class Difference:
    """What one architecture needs to be the same model in both.

    Attributes:
        both: settings that replace the tiny configuration's, in both.
            A wrapper's both, theirs, ours and without are its text model's.
        theirs: settings that transformers alone gets.
        ours: settings that mlx-lm alone gets.
        without: settings of the tiny configuration that neither gets.
        wrapper: what transformers' wrapper gets beside its text model's settings; without it the
            transformers model is the text model alone.
        model_type: transformers' name, where it is another.
        model_class: the transformers class that makes the model.
        original: whether to write the checkpoint's first format, with one weight for each expert.
        drop: beginnings of weights' names that mlx-lm is not given, such as a vision tower's.
        names: patterns in weights' names and what replaces them, as hub checkpoints have them.
        zero: ends of the names of parameters that stay 0, since mlx-lm does not use them.
        swap: ends of weights' names whose last two axes to swap.
        unused: beginnings of names of mlx-lm's parameters that transformers does without.
        why_not: why the two cannot be compared.
    """

    both: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    wrapper: dict[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    model_class: str = "AutoModelForCausalLM"
    original: bool = True
    drop: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    zero: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    why_not: str | None = None


_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0,
    "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip
_LOCAL_ROPE = {
    "full_attention": _ROPE, "sliding_attention": _ROPE | {"rope_theta": 1000.0},
}  # fmt: skip
_LONG_ROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 1.5, 2.0,
    2.5], "original_max_position_embeddings": 128,
}  # fmt: skip
_HALF = _ROPE | {"partial_rotary_factor": 0.5}
# A vision tower that is as small as the names of its settings allow; mlx-lm drops it.
_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "intermediate_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 4),
}  # fmt: skip
_IMAGES: dict[str, Any] = {
    "model_class": "AutoModelForImageTextToText", "wrapper": {"vision_config": _VISION},
}  # fmt: skip

DIFFERENCES: dict[str, Difference] = {
    "bailing_hybrid": Difference(both={"num_key_value_heads": 4, "layer_group_size": 1,
        "rms_norm_eps": 1e-06}, theirs={"head_dim": 8, "n_routed_experts": 4,
        "n_shared_experts": 1, "rope_parameters": _ROPE}, model_type="deepseek_v3",
        names=(("embed_tokens", "word_embeddings"), ("self_attn\\.o_proj", "attention.dense"),
        ("self_attn", "attention"), ("e_score_correction_bias", "expert_bias"))),
    # save_pretrained writes the attention's name for a linear layer's projection, too.
    "bailing_moe_v3": Difference(both={"num_key_value_heads": 4,
        "moe_shared_expert_intermediate_size": 32}, theirs={"layer_types": ["linear_attention",
        "full_attention", "full_attention"]}, model_type="bailing_hybrid",
        names=(("layers\\.0\\.attention\\.dense", "layers.0.attention.o_proj"),)),
    # transformers does not read the base of attn_config.
    "dbrx": Difference(theirs={"rope_parameters": _ROPE}),
    # transformers' DeepSeek-OCR 2 has this text model.
    "deepseek": Difference(theirs={"mlp_layer_types": ["dense", "sparse", "sparse"]},
        wrapper={"vision_config": {"sam_config": _VISION, "encoder_config": _VISION}},
        model_type="deepseek_ocr2", model_class="AutoModelForImageTextToText",
        drop=("model.sam_model", "model.qwen2_model", "model.projector", "model.view_")),
    "deepseek_v2": Difference(both={"num_key_value_heads": 4,
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        theirs={"rope_parameters": _YARN}),
    "deepseek_v3": Difference(both={"num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
        "rope_scaling": _YARN}, theirs={"rope_parameters": _YARN}),
    # With two heads many keys' scores are 0, and each of the two chooses among them as it likes.
    "deepseek_v32": Difference(both={"num_key_value_heads": 4, "index_n_heads": 16}),
    "ernie4_5_moe": Difference(both={"moe_k": 2, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1}, zero=("e_score_correction_bias",)),
    "exaone4": Difference(theirs={"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "gemma": Difference(theirs={"hidden_act": "gelu_python"}),
    "gemma3": Difference(both={"rope_local_base_freq": 1000.0},
        theirs={"rope_parameters": _LOCAL_ROPE}, **_IMAGES),
    "gemma3_text": Difference(both={"rope_local_base_freq": 1000.0},
        theirs={"rope_parameters": _LOCAL_ROPE}),
    "gemma3n": Difference(both={"altup_coef_clip": 120.0},
        unused=tuple(f"model.language_model.layers.2.self_attn.{one}" for one in ("k_proj",
        "k_norm", "v_proj")), theirs={"rope_parameters": _LOCAL_ROPE}, model_type="gemma3n_text",
        names=(("^model\\.", "model.language_model."),)),
    "gemma4": Difference(both={"tie_word_embeddings": True},
        **_IMAGES | {"wrapper": {"vision_config": _VISION | {"head_dim": 16},
        "audio_config": None}}),
    "glm": Difference(theirs={"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}}),
    "glm4": Difference(ours={"rope_traditional": True}),
    "glm4_moe_lite": Difference(both={"num_key_value_heads": 4, "partial_rotary_factor": 1.0}),
    "glm_moe_dsa": Difference(both={"num_key_value_heads": 4, "index_n_heads": 16}),
    "gpt2": Difference(names=(("transformer.", ""),)),
    "gpt_bigcode": Difference(without=("attention_bias", "mlp_bias"),
        theirs={"activation_function": "gelu"}),
    "gpt_neox": Difference(theirs={"intermediate_size": 256, "hidden_act": "gelu_fast"}),
    # mlx-lm reads experts as quantized checkpoints have them: (experts, out, in).
    "gpt_oss": Difference(names=(("(gate_up_proj|down_proj)$", "\\1.weight"),),
        swap=("experts.gate_up_proj.weight", "experts.down_proj.weight")),
    "granitemoehybrid": Difference(both={"position_embedding_type": "rope"}),
    "hunyuan": Difference(both={"moe_topk": 4, "moe_intermediate_size": None,
        "tie_word_embeddings": True, "use_cla": False}, theirs={"head_dim": 16,
        "rope_parameters": _ROPE | {"rope_type": "dynamic", "alpha": 10.0, "factor": 1.0}},
        model_type="hunyuan_v1_moe"),
    "internlm3": Difference(theirs={"head_dim": 16}),
    "jamba": Difference(both={"num_experts_per_tok": 4}),
    # save_pretrained writes the vision tower's word for layers.
    "kimi_k25": Difference(both={"num_key_value_heads": 4}, drop=("model.mm_projector.",),
        names=(("language_model\\.model\\.blocks", "language_model.model.layers"),), **_IMAGES),
    # save_pretrained writes the experts' name for a dense layer, too.
    "kimi_linear": Difference(both={"num_key_value_heads": 4},
        names=(("block_sparse_moe\\.(gate|up|down)_proj", "mlp.\\1_proj"),)),
    "kimi_vl": Difference(why_not="transformers does not have it, and mlx-lm does not read its hub "
        "checkpoints: its sanitize() leaves kv_b_proj whole, its attention has the two halves"),
    # mlx-lm reads only checkpoints that were converted for MLX.
    "lfm2-vl": Difference(both={"tie_word_embeddings": True}, theirs={"layer_types": ["conv",
        "full_attention", "full_attention"]}, model_type="lfm2_vl", drop=("model.vision_tower.",
        "model.multi_modal_projector.", "lm_head."), names=(("model.language_model.",
        "language_model.model."),), swap=("conv.conv.weight",), **_IMAGES),
    "lfm2_moe": Difference(theirs={"layer_types": ["conv", "full_attention", "full_attention"],
        "tie_word_embeddings": True}),
    # transformers' Llama has no windows.
    "llama": Difference(without=("layer_types",)),
    # mlx-lm needs a fourth layer. transformers' wrapper fails without images.
    "llama4": Difference(both={"num_hidden_layers": 4}, model_type="llama4_text", names=(("model.",
        "language_model.model."), ("lm_head.", "language_model.lm_head."))),
    # mlx-lm has neither experts nor chunks here.
    "llama4_text": Difference(both={"no_rope_layers": [1, 1, 1], "tie_word_embeddings": True},
        theirs={"moe_layers": [], "attention_chunk_size": 256}),
    "mimo": Difference(model_type="qwen2"),
    "mimo_v2_flash": Difference(both={"num_key_value_heads": 1, "n_shared_experts": None,
        "attention_value_scale": 0.7}, theirs={"layer_types": ["full_attention",
        "sliding_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse",
        "sparse"], "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"),
        _HALF), "sliding_window_size": 8}),
    # Granite has the same multipliers.
    "minicpm": Difference(theirs={"embedding_multiplier": 16,
        "residual_multiplier": 1.4 / 3 ** 0.5, "logits_scaling": 64 / 16,
        "attention_multiplier": 0.25}, model_type="granite"),
    "minicpm3": Difference(both={"num_key_value_heads": 4, "rope_scaling": _LONG_ROPE},
        theirs={"rope_parameters": _ROPE | _LONG_ROPE}),
    "minimax": Difference(model_type="minimax_m2"),
    "minimax_m3_vl": Difference(**_IMAGES),
    "ministral3": Difference(without=("layer_types", "sliding_window")),
    "mistral3": Difference(without=("layer_types", "sliding_window"),
        theirs={"model_type": "ministral3"}, **_IMAGES),
    "mistral4": Difference(both={"num_key_value_heads": 4,
        "rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 16}}, without=("head_dim",),
        model_class="Mistral4ForCausalLM"),
    "muse_glimmer": Difference(drop=("model.vision_",), **_IMAGES),
    "nanbeige": Difference(model_type="llama"),
    "nanochat": Difference(theirs={"rms_norm_eps": 1e-05}, names=(("model.embed_tokens",
        "transformer.wte"), ("model.layers", "transformer.h"), ("self_attn.q_proj", "attn.c_q"),
        ("self_attn.k_proj", "attn.c_k"), ("self_attn.v_proj", "attn.c_v"), ("self_attn.o_proj",
        "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))),
    "nemotron": Difference(without=("layer_types",), theirs={"hidden_act": "relu2"}),
    "nemotron-nas": Difference(theirs={"num_key_value_heads": 2, "intermediate_size": 256},
        model_type="llama"),
    "nemotron_h": Difference(without=("layer_types",)),
    "olmo3": Difference(theirs={"rope_parameters": {"full_attention": _ROPE,
        "sliding_attention": _ROPE}}),
    "olmo_hybrid": Difference(both={"linear_key_head_dim": 32}, names=(("attention_layer_norm",
        "input_layernorm"), ("feedforward_layer_norm", "post_attention_layernorm"))),
    "phimoe": Difference(theirs={"attention_bias": True, "lm_head_bias": True}),
    "pixtral": Difference(model_type="llava", without=("layer_types",), **_IMAGES),
    "qwen2_vl": Difference(theirs={"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
        **_IMAGES),
    "qwen3_5": Difference(both={"num_experts": 0}, **_IMAGES),
    "qwen3_5_moe": Difference(original=False, **_IMAGES),
    "qwen3_vl": Difference(**_IMAGES),
    # save_pretrained leaves the experts' axes as they are in memory, the hub has them swapped.
    "qwen3_vl_moe": Difference(swap=("experts.gate_up_proj", "experts.down_proj"), **_IMAGES),
    "solar_open": Difference(both={"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}),
    "step3p5": Difference(both={"rope_theta": [10000.0, 5000.0, 10000.0],
        "partial_rotary_factors": [1.0, 0.5, 1.0], "swiglu_limits": [0.0, 0.0, 0.5],
        "swiglu_limits_shared": [0.5, 0.0, 0.5], "moe_router_scaling_factor": 3.0},
        theirs={"rope_parameters": None, "rope_theta": [10000.0, 5000.0, 10000.0]},
        model_type="step3p7", drop=("vision_model.", "vit_large_projector."), **_IMAGES),
    "telechat3": Difference(model_type="llama"),
    "youtu_llm": Difference(both={"num_key_value_heads": 4}, ours={"rope_traditional": True},
        model_type="youtu"),
}  # fmt: skip


def why_not(name: str) -> str | None:
    """Why an architecture cannot be compared with transformers, or None where it can."""
    import transformers

    difference = DIFFERENCES.get(name, Difference())
    kind = difference.model_type or tiny_configs.settings(name)["model_type"]
    if difference.why_not is None and kind not in transformers.CONFIG_MAPPING:
        return ABSENT
    return difference.why_not


def reference(name: str) -> tuple[Any, dict[str, Any]]:
    """A random transformers model in float32, and its configuration as mlx-lm reads it."""
    import torch
    import transformers

    difference = DIFFERENCES.get(name, Difference())
    tiny = tiny_configs.settings(name)
    flat = {**tiny.get("text_config", tiny), **difference.both}
    for one in difference.without:
        flat.pop(one, None)
    given = {key: value for key, value in flat.items() if key != "rope_scaling"}
    theta = given.pop("rope_theta", None)
    if theta is not None and "rope_parameters" not in given:
        rope = {"rope_type": "default", "rope_theta": theta}
        if "partial_rotary_factor" in given:
            rope["partial_rotary_factor"] = given["partial_rotary_factor"]
        given["rope_parameters"] = rope
    given |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    del given["model_type"]
    given |= difference.theirs
    kind = difference.model_type or tiny["model_type"]
    if difference.wrapper:
        tied = {"tie_word_embeddings": flat.get("tie_word_embeddings", False)}
        given = {"text_config": given, **tied, **difference.wrapper}
    # transformers changes what it is given.
    given = copy.deepcopy(given)
    config = transformers.AutoConfig.for_model(kind, attn_implementation="eager", **given)
    made = getattr(transformers, difference.model_class)
    if hasattr(made, "from_config"):
        model = made.from_config(config, dtype=torch.float32).eval()
    else:
        model = made(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.1 * noise + 1 if value.ndim == 1 else noise / value.shape[-1] ** 0.5)
            if difference.zero and key.endswith(difference.zero):
                value.zero_()
    text = {**config.get_text_config().to_dict(), **flat, **difference.ours}
    if "text_config" in tiny:
        return model, {**config.to_dict(), **tiny, "text_config": text}
    return model, text


def load(name: str, oracle: Any, settings: dict[str, Any], folder: Path) -> nn.Module:
    """The mlx-lm model of a transformers model's checkpoint."""
    difference = DIFFERENCES.get(name, Difference())
    oracle.save_pretrained(folder, save_original_format=difference.original)
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= dict(mx.load(str(file)).items())
    weights = {key: value for key, value in weights.items() if not key.startswith(difference.drop)}
    for old, new in difference.names:
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    for key in weights:
        if difference.swap and key.endswith(difference.swap):
            weights[key] = weights[key].swapaxes(-1, -2)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(settings))
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    if difference.unused:
        own = dict(tree_flatten(model.parameters()))
        weights |= {key: one for key, one in own.items() if key.startswith(difference.unused)}
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model


def misnamed(oracle: Any, model: nn.Module) -> list[str]:
    """Layers whose name in transformers, as exports to PEFT have it, is another layer's or none."""
    paths = [*linear_paths(model), ports.port_for(model).head_path(model)]
    wrong = []
    modules = dict(oracle.named_modules())
    for path, theirs in peft.named(model, paths).items():
        weight = getattr(modules.get(theirs), "weight", None)
        other = None if weight is None else weight.detach().numpy()
        if other is not None and other.ndim == 2 and peft.transposed(model):
            other = other if "wte" in theirs else other.T
        if other is None or not np.array_equal(np.array(ports.resolve(model, path).weight), other):
            wrong.append(path)
    return wrong


def compare(name: str) -> dict[str, Any]:
    """Largest differences of rows and logits: a right-padded batch, and its prompts one by one."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        oracle, settings = reference(name)
        model = load(name, oracle, settings, Path(folder))
    names = misnamed(oracle, model)
    tokens, last = tiny_configs.tokens()
    ends = np.array(last)
    batches = [(tokens, ends)]
    batches += [(tokens[n : n + 1, : end + 1], np.array([end])) for n, end in enumerate(ends)]
    patterns, logits, largest = 0.0, 0.0, 0.0
    for batch, at in batches:
        ids = torch.tensor(np.array(batch).astype(np.int64))
        mask = (torch.arange(ids.shape[1]) <= torch.tensor(at)[:, None]).long()
        with torch.no_grad():
            output = oracle(
                input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False
            )
        every = np.arange(len(ids))
        expected = [one[every, :, at].numpy() for one in output.attentions if one is not None]
        rows = [one for one in attention.capture(model, batch, mx.array(at)) if one is not None]
        if len(rows) != len(expected):
            raise ValueError(f"{len(rows)} layers have rows, {len(expected)} in transformers")
        for row, one in zip(rows, expected, strict=True):
            # gpt-oss appends its sink as a column.
            patterns = max(patterns, float(np.abs(np.array(row) - one[..., : row.shape[-1]]).max()))
            largest = max(largest, float(one.max()))
        ours = tiny_configs.logits(model, batch)[every, at]
        logits = max(logits, float(np.abs(ours - output.logits[every, at].numpy()).max()))
    return {"pattern": patterns, "logits": logits, "largest": largest, "misnamed": names}
