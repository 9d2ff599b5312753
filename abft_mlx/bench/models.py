"""The bench's model and prompts: random weights, random tokens, the shapes of a size."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama

from abft_mlx.bench.sizes import Size
from abft_mlx.prompts import Prompt

CLASSES = 4
# A and B of equation 1.
PUNISH, REWARD = 0.5, 1.0


def config(size: Size) -> dict[str, Any]:
    """The config.json of a Llama of this size, as mlx-lm and transformers read it."""
    return {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.n_heads,
        "num_key_value_heads": size.n_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": max(2048, size.tokens),
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def random_model(size: Size, dtype: mx.Dtype, seed: int = 0) -> nn.Module:
    """An evaluated Llama of random weights, the same for the same seed."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config(size)))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def random_prompts(size: Size, number: int, seed: int = 0, together: int = 1) -> list[Prompt]:
    """Prompts of exactly ``size.tokens`` random tokens, label positions spread evenly over them.

    Args:
        size: of the prompts.
        number: how many.
        seed: of the tokens.
        together: so many in a row share everything up to the last label.
    """
    source = np.random.default_rng(seed)
    k = size.demonstrations
    positions = tuple(((np.arange(k) + 1) * (size.tokens - 2) // (k + 1)).tolist())
    prompts = []
    for row in range(number):
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
