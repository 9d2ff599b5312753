"""The paper's way in PyTorch: transformers' eager attention, one prompt at a time.

Needs the extra ``bench``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from abft_mlx.bench.models import PUNISH, REWARD, config, random_model, random_prompts
from abft_mlx.bench.sizes import Size
from abft_mlx.errors import UsageError
from abft_mlx.prompts import Prompt

LEARNING_RATE = 2e-5


def paper_update(size: Size, dtype: mx.Dtype) -> Callable[[], float]:
    """W_Q and W_K trained in full by Adam, gradients accumulated prompt by prompt.

    Args:
        size: of the model; as many prompts are accumulated as its batch has.
        dtype: of the weights and of all computation.

    Returns:
        Makes one update, waits for it, and gives its loss.

    Raises:
        UsageError: torch or transformers is not installed.
    """
    model, prompts = reference(size, dtype)
    step = PaperStep(model, LEARNING_RATE)
    return lambda: step.update(prompts, PUNISH)[0]


class PaperStep:
    """Updates of W_Q and W_K in full by Adam, gradients accumulated prompt by prompt.

    Args:
        model: a transformers model with eager attention and projections of these names.
        learning_rate: Adam's.
        reward_weight: B.
        use_filter: whether heads must pass the induction-head filter.
    """

    def __init__(
        self,
        model: Any,
        learning_rate: float,
        *,
        reward_weight: float = REWARD,
        use_filter: bool = True,
    ) -> None:
        import torch

        self.model = model
        self.reward_weight = reward_weight
        self.use_filter = use_filter
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(self.device).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or "k_proj" in name)
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=learning_rate)

    def update(self, prompts: Sequence[Prompt], punish_weight: float) -> tuple[float, float]:
        """Make one update and wait for it.

        Args:
            prompts: what the loss is averaged over.
            punish_weight: A.

        Returns:
            The loss, and the induction heads in a prompt.
        """
        import torch

        total = heads = 0.0
        self.optimizer.zero_grad()
        for prompt in prompts:
            ids = torch.tensor([prompt.token_ids], device=self.device)
            output = self.model(input_ids=ids, output_attentions=True, use_cache=False)
            punish, reward, kept = terms(output.attentions, prompt, torch, self.use_filter)
            loss = (punish_weight * punish + self.reward_weight * reward) / len(prompts)
            loss.backward()
            total += float(loss.detach())
            heads += float(kept) / len(prompts)
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return total, heads


def reference(size: Size, dtype: mx.Dtype) -> tuple[Any, list[Prompt]]:
    """The transformers model with the MLX contenders' weights, and their prompts.

    Raises:
        UsageError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            f"pytorch-paper needs {error.name}; install abft-mlx[bench], or leave it out with "
            "--without pytorch-paper"
        ) from error
    kind = {mx.float32: torch.float32, mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}
    settings = {name: value for name, value in config(size).items() if name != "model_type"}
    theta = settings.pop("rope_theta")
    chosen = transformers.LlamaConfig(
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **settings,
    )
    model = transformers.LlamaForCausalLM(chosen).to(kind[dtype])
    model.load_state_dict(_weights(size, dtype, torch))
    return model, random_prompts(size, size.prompts)


def equation_1(attentions: Any, prompt: Prompt, torch: Any, use_filter: bool = True) -> Any:
    """The loss of one prompt from all layers' whole patterns, (1, H, T, T) each."""
    punish, reward, _ = terms(attentions, prompt, torch, use_filter)
    return PUNISH * punish + REWARD * reward


def terms(
    attentions: Any, prompt: Prompt, torch: Any, use_filter: bool = True
) -> tuple[Any, Any, Any]:
    """Equation 1's two terms without A and B, and the number of kept heads, of one prompt."""
    n, k = len(prompt.token_ids), len(prompt.label_positions)
    right = torch.tensor([one == prompt.gold for one in prompt.demonstration_labels])
    punish = reward = heads = 0.0
    for pattern in attentions:
        at_labels = pattern[0, :, -1, list(prompt.label_positions)].float()
        above = at_labels.sum(-1) > k / (k + math.log(n)) * use_filter
        kept = above.float().detach()
        right = right.to(at_labels.device)
        punish = punish + (kept * (at_labels * ~right).sum(-1)).sum()
        reward = reward + (kept * (1 - (at_labels * right).sum(-1))).sum()
        heads = heads + kept.sum()
    return punish, reward, heads


def _weights(size: Size, dtype: mx.Dtype, torch: Any) -> dict[str, Any]:
    """The same random weights as the MLX contenders have."""
    model = random_model(size, dtype)
    return {
        name: torch.tensor(np.array(value.astype(mx.float32)))
        for name, value in tree_flatten(model.parameters())
    }
