"""The paper's nine models: configurations as published on the hub, and the paper's own numbers.

``CONFIGS`` keeps the fields that mlx-lm reads. Where each is from (hub pages as they were archived;
``n/a``: no page was found):

- GPT2-L, GPT2-XL: config.json of openai-community/gpt2-large and gpt2-xl.
- Falcon3-7B: config.json of tiiuae/Falcon3-7B-Instruct and of a fine-tune of it, the same; the
  base's own page n/a, but the sizes that litgpt lists for it agree (it does not list head_dim).
- Llama3-8B: config.json of copies of meta-llama/Meta-Llama-3-8B; the original is gated.
- DeepSeek-R1-Distill-Qwen-14B: config.json of copies (unsloth, a merge of its parts), the same.
- Qwen2.5-32B: config.json of Qwen/Qwen2.5-32B.
- s1.1-32B: n/a; taken for what it was trained from, Qwen2.5-32B-Instruct. Its norm epsilon and
  context follow from that and are not established; no shape depends on them.
- Llama3-42B: config.json of chargoddard/llama3-42b-v0.
- Llama3-56B: not established. The hub lists nyunai/nyun-c2-llama3-56B with code of its own
  (``custom_code``), which neither mlx-lm nor this package runs, and no page of its config was
  found. What stands here is Llama-3-70B (80 layers) with every MLP narrowed to 21,056 (a multiple
  of 64, for 4 bits) so that the total is the paper's 55.6B; 33M trained parameters say that all
  80 layers kept W_Q and W_K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperModel:
    """What is known of one model.

    Attributes:
        hub: its name on the hub, in paper_targets.json.
        config: fields of its config.json.
        total: parameters as counted from shapes.
        paper_total: as the paper prints it.
        buffers: numbers in the checkpoint that are no parameters but in the paper's total.
        heads: query heads, key/value heads, head dim of every layer.
        lora: trained parameters of LoRA at rank 16 on W_Q and W_K.
        paper_lora: as the paper's table 2 prints it, if it does.
        paper_end_to_end: table 2's count with the LM head, if given.
    """

    hub: str
    config: dict[str, Any]
    total: int
    paper_total: str
    heads: tuple[int, int, int]
    lora: int
    buffers: int = 0
    paper_lora: str | None = None
    paper_end_to_end: str | None = None


def _gpt2(width: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
        "n_ctx": 1024,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 50257,
    }


def _llama(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }


def _qwen2(mlp: int, layers: int, **more: Any) -> dict[str, Any]:
    shared = _llama(5120, mlp, layers, 40, 8)
    changed = {"model_type": "qwen2", "rope_theta": 1e6, "vocab_size": 152064}
    return shared | changed | {"max_position_embeddings": 131072} | more


PAPER_MODELS = {
    "GPT2-L": PaperModel(
        "openai-community/gpt2-large", _gpt2(1280, 20, 36), 774_030_080, "812M", (20, 20, 64),
        lora=36 * 16 * (1280 + 2 * 1280), buffers=36 * 1024 * 1024,
    ),
    "GPT2-XL": PaperModel(
        "openai-community/gpt2-xl", _gpt2(1600, 25, 48), 1_557_611_200, "1.61B", (25, 25, 64),
        lora=48 * 16 * (1600 + 2 * 1600), buffers=48 * 1024 * 1024,
    ),
    "Falcon3-7B": PaperModel(
        "tiiuae/Falcon3-7B-Base",
        _llama(3072, 23040, 28, 12, 4) | {
            "head_dim": 256, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_theta": 1000042, "vocab_size": 131072,
        },
        7_455_550_464, "7.46B", (12, 4, 256),
        lora=28 * 16 * ((3072 + 3072) + (3072 + 1024)),
    ),
    "Llama3-8B": PaperModel(
        "meta-llama/Meta-Llama-3-8B", _llama(4096, 14336, 32, 32, 8), 8_030_261_248, "8.03B",
        (32, 8, 128), lora=6_815_744, paper_lora="6.8M", paper_end_to_end="0.5B",
    ),
    "DeepSeek-R1-Distill-Qwen-14B": PaperModel(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", _qwen2(13824, 48), 14_770_033_664, "14.8B",
        (40, 8, 128), lora=12_582_912, paper_lora="12M", paper_end_to_end="0.8B",
    ),
    "Qwen2.5-32B": PaperModel(
        "Qwen/Qwen2.5-32B", _qwen2(27648, 64), 32_763_876_352, "32.8B",
        (40, 8, 128), lora=16_777_216, paper_lora="17M", paper_end_to_end="0.8B",
    ),
    "s1.1-32B": PaperModel(
        "simplescaling/s1.1-32B",
        _qwen2(27648, 64, max_position_embeddings=32768, rms_norm_eps=1e-6),
        32_763_876_352, "32.8B", (40, 8, 128), lora=16_777_216,
    ),
    "Llama3-43B(42B)": PaperModel(
        "chargoddard/llama3-42b-v0", _llama(8192, 28672, 48, 64, 8), 43_172_765_696, "43.2B",
        (64, 8, 128), lora=19_660_800,
    ),
    "Llama3-56B": PaperModel(
        "nyunai/nyun-c2-llama3-56B", _llama(8192, 21056, 80, 64, 8), 55_580_041_216, "55.6B",
        (64, 8, 128), lora=32_768_000, paper_lora="33M", paper_end_to_end="1.1B",
    ),
}  # fmt: skip
