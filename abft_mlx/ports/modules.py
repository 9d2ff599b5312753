"""Parts of a model: modules by path, weights of linear layers, hidden states, logits.

Letters in shapes: B prompts, T tokens, C tokens that are asked about, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask


def _capped(logits: mx.array, cap: float | None) -> mx.array:
    """Logits within a soft cap."""
    return mx.tanh(logits / cap) * cap if cap else logits


# What a model's code does with the logits that its head gives, where it does anything. The sweep in
# tests/test_architectures.py compares every architecture with mlx-lm's own logits.
AFTER_HEAD: dict[str, Callable[[Any, mx.array], mx.array]] = {
    **dict.fromkeys(("cohere", "cohere2"), lambda model, x: x * model.model.args.logit_scale),
    **dict.fromkeys(
        ("granite", "granitemoe", "granitemoehybrid"), lambda model, x: x / model.logits_scaling
    ),
    **dict.fromkeys(
        ("gemma2", "gemma4_text"), lambda model, x: _capped(x, model.final_logit_softcapping)
    ),
    "gemma4": lambda model, x: _capped(x, model.language_model.final_logit_softcapping),
    "gemma3n": lambda model, x: _capped(x, model.model.language_model.final_logit_softcapping),
    "gear": lambda model, x: _capped(x, model.args.final_logit_softcapping),
    "recurrent_gemma": lambda model, x: _capped(x, model.args.logits_soft_cap),
    "nanochat": lambda _, x: _capped(x, 15.0),
    "muse_glimmer": lambda model, x: _capped(
        x * model.args.output_multiplier, model.args.final_logit_softcapping
    ),
    "falcon_h1": lambda model, x: (
        x * (model.args.lm_head_multiplier / model.args.embedding_multiplier)
        if model.args.tie_word_embeddings
        else x
    ),
    "talkie": lambda model, x: model.lm_head_gain(x),
}
# The same for the hidden states that the head gets.
BEFORE_HEAD: dict[str, Callable[[Any, mx.array], mx.array]] = {
    **dict.fromkeys(
        ("minicpm", "minicpm3"),
        lambda model, x: (
            x
            if model.args.tie_word_embeddings
            else x / (model.args.hidden_size / model.args.dim_model_base)
        ),
    ),
    "phixtral": lambda model, x: model.lm_head.ln(x),
}


def resolve(module: nn.Module, path: str) -> Any:
    """The submodule or attribute at a dotted path."""
    part: Any = module
    for name in path.split("."):
        part = part[int(name)] if name.isdigit() else getattr(part, name)
    return part


def has(module: nn.Module, path: str) -> bool:
    """Whether a dotted path leads somewhere."""
    try:
        return resolve(module, path) is not None
    except (AttributeError, IndexError, KeyError):
        return False


def freeze(model: nn.Module) -> None:
    """Freeze all of a model, whose class may have left its base uninitialised, as RecurrentGemma's.

    Such a model keeps no account of what is frozen until then.
    """
    if not hasattr(model, "_no_grad"):
        nn.Module.__init__(model)
        model.eval()
    model.freeze()


def base_linear(projection: nn.Module) -> nn.Module:
    """The linear layer itself, without a LoRA layer around it."""
    return projection.linear if "linear" in projection else projection


def output_dims(projection: nn.Module | mx.array) -> int:
    """Outputs of a linear layer, plain, quantized or under LoRA, or of its weights alone."""
    if isinstance(projection, mx.array):
        return int(projection.shape[0])
    return int(base_linear(projection).weight.shape[0])


def head_rows(head: nn.Module | mx.array, token_ids: mx.array | None = None) -> mx.array:
    """The head's weights for some tokens.

    Args:
        head: a linear layer or embedding, plain or quantized, or its weights alone.
        token_ids: (C,) rows wanted; None for all.

    Returns:
        (C, width), or (V, width).
    """

    def chosen(array: mx.array) -> mx.array:
        return array if token_ids is None else array[token_ids]

    if isinstance(head, mx.array):
        return chosen(head)
    if "scales" not in head:
        return chosen(head.weight)
    biases = head.get("biases")
    return mx.dequantize(
        chosen(head.weight),
        scales=chosen(head.scales),
        biases=None if biases is None else chosen(biases),
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
    )


class _NoHead:
    """Stands for a head inside a stem: an embedding still embeds, and no logits are computed."""

    def __init__(self, head: nn.Module) -> None:
        self._embed = head if hasattr(head, "as_linear") else None

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._embed is None else self._embed(x)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The hidden states themselves."""
        return hidden


def hidden_of(
    model: nn.Module,
    tokens: mx.array,
    stem: str | None,
    head: str,
    cache: Sequence[Any] | None = None,
) -> mx.array:
    """A model's final hidden states.

    Args:
        model: a loaded model.
        tokens: (B, T) token ids.
        stem: path of the module that gives hidden states; None where the head is within it.
        head: path of the output head.
        cache: mlx-lm's prompt cache, one of its objects a layer, which the model's code reads and
            goes on with.

    Returns:
        (B, T, width).
    """
    if stem is None:
        # The head's owner, all of it but the head: a shallow copy, so that the model is untouched.
        owner, _, name = head.rpartition(".")
        module = copy.copy(resolve(model, owner))
        module.pop(name)
        object.__setattr__(module, name, _NoHead(resolve(model, head)))
        if hasattr(module, "final_logit_softcapping"):
            module.final_logit_softcapping = None
    else:
        module = resolve(model, stem)
    if type(model).__module__.endswith(".phixtral"):
        cache = cache or [None] * len(module.h)
        return module(tokens, create_attention_mask(tokens, cache[0]), cache)
    return module(tokens, cache=cache)


def logits_of(
    model: nn.Module,
    architecture: str,
    hidden: mx.array,
    head: nn.Module | mx.array,
    token_ids: mx.array | None = None,
) -> mx.array:
    """What a model makes of hidden states: (..., width) to (..., C) or (..., V).

    Args:
        model: a loaded model.
        architecture: its name.
        hidden: as :func:`hidden_of` gives them.
        head: a linear layer, an embedding that is used as one, or their weights alone.
        token_ids: (C,) the tokens wanted, in float32; None for all, in the model's type.
    """
    if architecture in BEFORE_HEAD:
        hidden = BEFORE_HEAD[architecture](model, hidden)
    whole = token_ids is None or "lora_a" in head
    if whole and isinstance(head, mx.array):
        logits = hidden @ head.T
    elif whole:
        logits = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
    else:
        logits = hidden.astype(mx.float32) @ head_rows(head, token_ids).astype(mx.float32).T
        bias = None if isinstance(head, mx.array) else head.get("bias")
        if bias is not None:
            logits = logits + bias[token_ids].astype(mx.float32)
    if whole and token_ids is not None:
        logits = logits.astype(mx.float32)[..., token_ids]
    return AFTER_HEAD.get(architecture, lambda _, x: x)(model, logits)
