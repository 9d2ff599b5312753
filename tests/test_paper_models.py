"""The paper's models shape by shape, without a single weight: heads, LoRA, totals.

Configurations are those of the hub's pages, as archived, but for Llama3-56B, whose page has none:
Llama-3-70B with every MLP narrowed so that the total is the paper's 55.6B.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from abft_mlx import adapters, loading, memory_estimate, ports, runtime
from abft_mlx import recipe as recipes
from abft_mlx.recipe import AdapterSection

UNITS = {"M": 10**6, "B": 10**9}
FOUR_BITS = {"quantization": {"group_size": 64, "bits": 4}}


class Paper(NamedTuple):
    """A config.json, and what the paper says of the model."""

    config: dict[str, Any]
    total: int  # parameters as counted from shapes
    paper_total: str
    heads: tuple[int, int, int]
    lora: int  # trained parameters of LoRA at rank 16 on W_Q and W_K
    paper_lora: str | None = None
    end_to_end: str | None = None  # with the LM head
    buffers: int = 0  # numbers that are no parameters but in the paper's total


def gpt2(width: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "n_embd": width, "n_head": heads, "n_layer": layers, "n_ctx": 1024,
        "n_positions": 1024, "layer_norm_epsilon": 1e-5, "vocab_size": 50257,
    }  # fmt: skip


def decoder(
    width: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256, **more,
    }  # fmt: skip


QWEN = {"model_type": "qwen2", "vocab_size": 152064}
PAPER = {
    "GPT2-XL": Paper(gpt2(1600, 25, 48), 1_557_611_200, "1.61B", (25, 25, 64),
                     48 * 16 * (1600 + 2 * 1600), buffers=48 * 1024 * 1024),
    "Falcon3-7B": Paper(decoder(3072, 23040, 28, 12, 4, head_dim=256, vocab_size=131072),
                        7_455_550_464, "7.46B", (12, 4, 256),
                        28 * 16 * ((3072 + 3072) + (3072 + 1024))),
    "Llama3-8B": Paper(decoder(4096, 14336, 32, 32, 8), 8_030_261_248, "8.03B", (32, 8, 128),
                       6_815_744, "6.8M", "0.5B"),
    "DeepSeek-R1-Distill-Qwen-14B": Paper(decoder(5120, 13824, 48, 40, 8, **QWEN), 14_770_033_664,
                                          "14.8B", (40, 8, 128), 12_582_912, "13M", "0.8B"),
    "Qwen2.5-32B": Paper(decoder(5120, 27648, 64, 40, 8, **QWEN), 32_763_876_352, "32.8B",
                         (40, 8, 128), 16_777_216, "17M", "0.8B"),
    "Llama3-43B(42B)": Paper(decoder(8192, 28672, 48, 64, 8), 43_172_765_696, "43.2B",
                             (64, 8, 128), 19_660_800),
    "Llama3-56B": Paper(decoder(8192, 21056, 80, 64, 8), 55_580_041_216, "55.6B", (64, 8, 128),
                        32_768_000, "33M", "1.1B"),
}  # fmt: skip


def as_printed(number: int, like: str) -> str:
    """A number in the unit and with the digits of another one, e.g. like 6.8M."""
    digits, unit = re.fullmatch(r"([\d.]+)([MB])", like).groups()
    return f"{number / UNITS[unit]:.{len(digits.partition('.')[2])}f}{unit}"


@pytest.mark.parametrize("name", PAPER)
def test_heads_and_totals(name: str) -> None:
    paper = PAPER[name]
    active = mx.get_active_memory()
    runtime.reset_peak_memory()
    model = loading.describe(paper.config, name)
    layers = paper.config.get("num_hidden_layers", paper.config.get("n_layer"))
    assert ports.heads(model) == [ports.HeadShape(*paper.heads)] * layers
    assert loading.parameter_count(model) == paper.total
    assert as_printed(paper.total + paper.buffers, paper.paper_total) == paper.paper_total
    adapters.attach(model, AdapterSection(rank=16))
    # A fused c_attn's lora_b has the columns of V, too, which stay zero: see gradient_mask.
    trained = adapters.trainable_parameters(model)
    assert trained == paper.lora
    if paper.paper_lora is not None:
        assert as_printed(trained, paper.paper_lora) == paper.paper_lora
    if paper.end_to_end is not None:
        model = loading.describe(paper.config | FOUR_BITS, name)
        assert loading.parameter_count(model) == paper.total
        adapters.attach(model, AdapterSection(rank=16, head=True))
        trained = adapters.trainable_parameters(model)
        assert as_printed(trained, paper.end_to_end) == paper.end_to_end
    assert runtime.peak_memory_bytes() - active < 2**20, "nothing is allocated"


def test_llama_3_8b_in_4_bits_takes_what_its_parts_say() -> None:
    recipe = recipes.resolve(recipes.default(["training.micro_batch_tokens=512"]))
    model = loading.describe(PAPER["Llama3-8B"].config | FOUR_BITS, "x")
    estimate = memory_estimate.estimate(model, recipe, 250)
    # 4 bits and, for 64 numbers, a scale and a bias of 2 bytes each; norms in bfloat16.
    matrices = 8_030_261_248 - 65 * 4096
    assert estimate["weights_bytes"] == matrices * 4 // 8 + matrices // 64 * 4 + 65 * 4096 * 2
    assert estimate["adapter_bytes"] == 4 * 6_815_744
    assert estimate["moments_bytes"] // 8 == pytest.approx(6_815_744, rel=1e-6)
    assert (estimate["rows"], estimate["tokens"], estimate["micro_batches"]) == (2, 256, 16)
    parts = ("weights", "adapter", "moments", "gradients", "activations")
    assert estimate["training_bytes"] == sum(estimate[f"{part}_bytes"] for part in parts)
