"""Sizes of models and batches, and the model and prompts of a size: random weights and tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from abft_mlx.errors import UsageError
from abft_mlx.prompts import Prompt

HEAD_DIM = 64
CLASSES = 4
# A and B of equation 1.
PUNISH, REWARD = 0.5, 1.0
# Rank and scale of every contender's LoRA.
RANK, SCALE = 16, 2.0


@dataclass(frozen=True)
class Size:
    """A Llama with heads of 64 channels, and one update's prompts: B of T tokens with k."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 32_000
    prompts: int = 8
    tokens: int = 160
    demonstrations: int = 4

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP: 8/3 of the width, as in Llama."""
        return -(-8 * self.width // 3 // HEAD_DIM) * HEAD_DIM

    def __str__(self) -> str:
        return (
            f"{self.layers}x{self.width}x{self.vocabulary}:"
            f"{self.prompts}x{self.tokens}k{self.demonstrations}"
        )


REFERENCE = Size()


def parse(text: str) -> Size:
    """A size as ``12x768x32000:8x160k4``: layers, width, vocabulary, prompts, tokens, k.

    Raises:
        UsageError: the text is no such size, or one that cannot be made.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)x(\d+)k(\d+)", text)
    if not match:
        raise UsageError(
            f"size {text!r} is not like {REFERENCE}: layers x width x vocabulary : prompts x "
            "tokens k demonstrations"
        )
    size = Size(*map(int, match.groups()))
    if min(size.layers, size.width, size.prompts, size.demonstrations) < 1 or size.width % HEAD_DIM:
        raise UsageError(
            f"size {text!r}: numbers must be at least 1 and the width a multiple of {HEAD_DIM}"
        )
    if size.tokens < 4 * (size.demonstrations + 1) or size.vocabulary < 64:
        raise UsageError(
            f"size {text!r}: a prompt needs four tokens for each text, and a vocabulary 64 tokens"
        )
    return size


def default() -> Size:
    """The reference size, on a CPU with a third of its layers."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return REFERENCE if on_gpu else replace(REFERENCE, layers=REFERENCE.layers // 3)


def weight_bytes(size: Size, dtype: mx.Dtype) -> int:
    """Bytes of the base's weights: what an update must hold, whatever it does."""
    per_layer = 4 * size.width**2 + 3 * size.width * size.mlp_width + 2 * size.width
    numbers = size.layers * per_layer + size.width + 2 * size.width * size.vocabulary
    return numbers * dtype.size


def step_flops(size: Size) -> int:
    """Floating-point operations of the matrix products of our exact update, two a multiply-add.

    Nothing of the last layer but its queries and keys is computed, and no product of the backward
    pass that the gradient of LoRA on W_Q and W_K does not need.
    """
    # Multiply-adds of a token. Scores and mixed values are T x width each.
    width, upper = size.width, size.layers - 1
    block = 4 * width**2 + 3 * width * size.mlp_width
    pattern, keys, lora = size.tokens * width, 2 * width**2, 4 * width * RANK
    forward = upper * (block + 2 * pattern) + keys + size.layers * lora
    backward = upper * (block + 4 * pattern) + keys + 2 * size.layers * lora
    # The first layer's input needs no gradient, so neither do its values.
    backward -= lora // 2 + (3 * width**2 + pattern if upper else keys)
    return 2 * size.prompts * size.tokens * (forward + backward)


def config(size: Size) -> dict[str, Any]:
    """The config.json of a Llama of this size, as mlx-lm and transformers read it."""
    return {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // HEAD_DIM,
        "num_key_value_heads": size.width // HEAD_DIM,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": max(2048, size.tokens),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def random_model(size: Size, dtype: mx.Dtype) -> nn.Module:
    """An evaluated Llama of random weights, always the same."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config(size)))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def random_prompts(size: Size, together: int = 1) -> list[Prompt]:
    """Prompts of exactly ``size.tokens`` random tokens, labels spread evenly over them.

    Args:
        size: of the prompts.
        together: so many in a row share everything up to the last label.
    """
    source = np.random.default_rng(0)
    k = size.demonstrations
    positions = tuple(((np.arange(k) + 1) * (size.tokens - 2) // (k + 1)).tolist())
    prompts = []
    for row in range(size.prompts):
        tokens = source.integers(CLASSES, size.vocabulary, size.tokens)
        drawn = source.integers(0, CLASSES, k)
        if row % together == 0:
            labels, beginning = drawn, tokens[: positions[-1]]
        gold = int(labels[source.integers(0, k)])
        tokens[: positions[-1]] = beginning
        tokens[list(positions)] = labels
        prompts.append(
            Prompt(
                token_ids=tuple(tokens.tolist()),
                label_positions=positions,
                demonstration_labels=tuple(labels.tolist()),
                gold=gold,
                target=(gold,),
            )
        )
    return prompts
