"""How many tokens one micro-batch may hold on this machine."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import ports, runtime

# More tokens than these bring no speed: a CPU's caches are small, a GPU is busy by then.
CPU_TOKENS = 4096
GPU_TOKENS = 16384
SMALLEST_TOKENS = 256
MEMORY_SHARE = 0.5


def bytes_per_token(model: nn.Module, longest_tokens: int) -> int:
    """Rough bytes that a step keeps per prompt token for the backward pass.

    Per layer: about twelve arrays of the model's width, four of the MLP's (taken as four times
    the width), and the attention's backward pass, which holds a row of scores per head.

    Args:
        model: a loaded model.
        longest_tokens: longest prompt of the run.
    """
    shapes = [one for one in ports.heads(model) if one is not None]
    width = max(one.n_heads * one.head_dim for one in shapes)
    per_layer = (12 + 16) * width + 2 * max(one.n_heads for one in shapes) * longest_tokens
    return 4 * per_layer * len(shapes)


def micro_batch_tokens(model: nn.Module, longest_tokens: int) -> int:
    """Tokens of one micro-batch that fit beside the weights, padding included.

    Args:
        model: a loaded model, adapters attached.
        longest_tokens: longest prompt of the run.
    """
    weights = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    info = mx.device_info()
    memory = int(info.get("max_recommended_working_set_size", runtime.machine_memory_bytes()))
    room = max(0.0, memory * MEMORY_SHARE - weights)
    fitting = int(room / bytes_per_token(model, longest_tokens))
    return max(SMALLEST_TOKENS, min(fitting, GPU_TOKENS if on_gpu else CPU_TOKENS))
