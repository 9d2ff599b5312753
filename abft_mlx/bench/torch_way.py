"""The paper's way in PyTorch: transformers' eager attention, one prompt at a time.

Needs the extra ``bench``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from abft_mlx.bench.sizes import PUNISH, REWARD, Size, config, random_model, random_prompts
from abft_mlx.errors import UsageError
from abft_mlx.prompts import Prompt


def paper_update(size: Size, dtype: mx.Dtype) -> Callable[[], float]:
    """W_Q and W_K trained in full by Adam, gradients accumulated prompt by prompt.

    Returns:
        Makes one update, waits for it, and gives its loss.

    Raises:
        UsageError: torch or transformers is not installed.
    """
    model = reference(size, dtype)
    import torch

    prompts = random_prompts(size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "k_proj" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-5)

    def update() -> float:
        total = 0.0
        optimizer.zero_grad()
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids], device=device)
            output = model(input_ids=ids, output_attentions=True, use_cache=False)
            loss = equation_1(output.attentions, prompt) / len(prompts)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return total

    return update


def reference(size: Size, dtype: mx.Dtype) -> Any:
    """The transformers model with the MLX contenders' weights; UsageError without torch."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            f"pytorch-paper needs {error.name}; install abft-mlx[bench], or leave it out with "
            "--without pytorch-paper"
        ) from error
    settings = {name: value for name, value in config(size).items() if name != "model_type"}
    theta = settings.pop("rope_theta")
    chosen = transformers.LlamaConfig(
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **settings,
    )
    kind = {mx.float32: torch.float32, mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}
    model = transformers.LlamaForCausalLM(chosen).to(kind[dtype])
    weights = tree_flatten(random_model(size, dtype).parameters())
    model.load_state_dict(
        {name: torch.tensor(np.array(value.astype(mx.float32))) for name, value in weights}
    )
    return model


def equation_1(attentions: Any, prompt: Prompt, use_filter: bool = True) -> Any:
    """The loss of one prompt from all layers' whole patterns, (1, H, T, T) each."""
    import torch

    n, k = len(prompt.token_ids), len(prompt.label_positions)
    right = torch.tensor([label == prompt.gold for label in prompt.demonstration_labels])
    loss = 0.0
    for pattern in attentions:
        at_labels = pattern[0, :, -1, list(prompt.label_positions)].float()
        is_right = right.to(at_labels.device)
        kept = (at_labels.sum(-1) > k / (k + math.log(n)) * use_filter).float().detach()
        punish = (at_labels * ~is_right).sum(-1)
        reward = 1 - (at_labels * is_right).sum(-1)
        loss = loss + (kept * (PUNISH * punish + REWARD * reward)).sum()
    return loss
