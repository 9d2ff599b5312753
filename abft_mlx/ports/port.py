"""What differs between architectures, as data, and what follows: layers, heads, logits.

Letters in shapes: B prompts, H query heads, G key/value heads, D head dim, T tokens, C tokens that
are asked about, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from abft_mlx.errors import ModelError

MODELS_PACKAGE = "mlx_lm.models."

Part = str | tuple[str, str]
"""What some outputs of a projection are: "q", "k", "v" or "gate"; with the attention module's
attribute that counts them, where a head's queries, keys and values are not all head_dim wide."""


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
    "nanochat": lambda _, x: _capped(x, 15.0),
    "muse_glimmer": lambda model, x: _capped(
        x * model.args.output_multiplier, model.args.final_logit_softcapping
    ),
    "falcon_h1": lambda model, x: (
        x * (model.args.lm_head_multiplier / model.args.embedding_multiplier)
        if model.args.tie_word_embeddings
        else x
    ),
}
# The same for the hidden states that the head gets.
BEFORE_HEAD: dict[str, Callable[[Any, mx.array], mx.array]] = dict.fromkeys(
    ("minicpm", "minicpm3"),
    lambda model, x: (
        x
        if model.args.tie_word_embeddings
        else x / (model.args.hidden_size / model.args.dim_model_base)
    ),
)


def architecture(model: nn.Module) -> str:
    """Name of the mlx-lm model module that runs this model; it decides the port.

    A model's own ``model_type`` may be another: mlx-lm runs ``mistral`` checkpoints as ``llama``.
    """
    return type(model).__module__.removeprefix(MODELS_PACKAGE)


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


def base_linear(projection: nn.Module) -> nn.Module:
    """The linear layer itself, without a LoRA layer around it."""
    return projection.linear if "linear" in projection else projection


def output_dims(projection: nn.Module) -> int:
    """Outputs of a linear layer, plain, quantized or under LoRA."""
    return int(base_linear(projection).weight.shape[0])


def head_rows(head: nn.Module, token_ids: mx.array | None = None) -> mx.array:
    """The dequantized weights of a linear layer or embedding, (V, width), or those of C tokens."""
    rows = slice(None) if token_ids is None else token_ids
    if "scales" not in head:
        return head.weight[rows]
    biases = head.get("biases")
    return mx.dequantize(
        head.weight[rows],
        scales=head.scales[rows],
        biases=None if biases is None else biases[rows],
        group_size=head.group_size,
        bits=head.bits,
        mode=head.mode,
    )


class _NoHead:
    """Takes a head's place in a stem: an embedding still embeds, and no logits are computed."""

    def __init__(self, head: nn.Module) -> None:
        self._embed = head if hasattr(head, "as_linear") else None

    def __call__(self, x: mx.array) -> mx.array:
        return x if self._embed is None else self._embed(x)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The hidden states themselves."""
        return hidden


@dataclass(frozen=True)
class Projection:
    """One linear layer that makes queries, keys, or both.

    Attributes:
        path: where it sits, relative to the attention module. A layer that lacks it goes without.
        role: "q", "k" or "qk".
        parts: for a fused projection, what its outputs are, in order.
        per: the outputs are ``parts`` once (""), or once for every "head" or every "group", a
            key/value head with the query heads that it serves.
    """

    path: str
    role: str
    parts: tuple[Part, ...] = ()
    per: Literal["", "head", "group"] = ""


@dataclass(frozen=True)
class HeadShape:
    """The heads of one layer: H query heads, G key/value heads, each of D channels."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Layer:
    """One place where a model may attend: path and module; None where nothing is there."""

    path: str
    attention: nn.Module | None


@dataclass(frozen=True)
class Block:
    """One of a model's blocks, with the number of the layer in it."""

    path: str
    module: nn.Module
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """Where one architecture keeps what ABFT needs. All paths are dotted.

    Attributes:
        architectures: the mlx-lm model modules that this port describes.
        projections: W_Q and W_K inside an attention module.
        attention: the attention module's path inside a block.
        layer_list: the blocks' path inside the model.
        stem: path of the module that maps tokens to the final hidden state; None where the head is
            inside it.
        heads: candidates for the output head; the first that the model has is its head. An
            embedding among them is a tied head.
        n_heads: the attention module's attribute that counts query heads.
        n_kv_heads: the same for key/value heads.
        by_hand: the pattern is computed with ``mx.softmax``, not by mlx-lm's attention function.
        needs_cache: without a prompt cache mlx-lm's code computes another model.
        classes: names of the classes of softmax attention, where linear attention sits at the same
            path in other layers.
        same_with_cache: mlx-lm's code computes the same with a prompt cache as without.
    """

    architectures: tuple[str, ...]
    projections: tuple[Projection, ...] = (Projection("q_proj", "q"), Projection("k_proj", "k"))
    attention: str = "self_attn"
    layer_list: str = "model.layers"
    stem: str | None = "model"
    heads: tuple[str, ...] = ("lm_head", "model.embed_tokens")
    n_heads: str = "n_heads"
    n_kv_heads: str = "n_kv_heads"
    by_hand: bool = False
    needs_cache: bool = False
    classes: tuple[str, ...] = ()
    same_with_cache: bool = True

    def blocks(self, model: nn.Module) -> list[Block]:
        """The model's blocks, in the order in which it runs them."""
        modules = enumerate(resolve(model, self.layer_list))
        return [Block(f"{self.layer_list}.{n}", module, (n,)) for n, module in modules]

    def layers(self, model: nn.Module) -> list[Layer]:
        """The model's layers, one in each block."""
        return [
            Layer(
                f"{block.path}.{self.attention}",
                resolve(block.module, self.attention)
                if has(block.module, self.attention)
                else None,
            )
            for block in self.blocks(model)
        ]

    def layer_projections(self, layer: Layer) -> list[Projection]:
        """W_Q and W_K of one layer; no keys where it attends to another layer's."""
        module = layer.attention
        if module is None or (self.classes and type(module).__name__ not in self.classes):
            return []
        present = [part for part in self.projections if has(module, part.path)]
        return present if any("q" in part.role for part in present) else []

    def attention_module(self, layer: Layer) -> nn.Module | None:
        """A layer's attention module, or None for a layer without softmax attention."""
        return layer.attention if self.layer_projections(layer) else None

    def head_shape(self, layer: Layer) -> HeadShape | None:
        """The heads of one layer, or None for a layer without softmax attention."""
        attention, projections = layer.attention, self.layer_projections(layer)
        if not projections:
            return None
        H, G = (int(getattr(attention, name)) for name in (self.n_heads, self.n_kv_heads))
        projection = next(part for part in projections if "q" in part.role)
        counts = {"q": H, "k": G, "v": G, "gate": H}
        parts = [part for part in projection.parts or (projection.role,) if isinstance(part, str)]
        outputs = output_dims(resolve(attention, projection.path))
        return HeadShape(H, G, outputs // sum(counts[part] for part in parts))

    def part_outputs(self, layer: Layer, projection: Projection) -> dict[str, np.ndarray]:
        """Indices of a projection's outputs that are "q", "k", "v" and "gate", if it makes them."""
        attention, shape = layer.attention, self.head_shape(layer)
        if attention is None or shape is None:
            return {}
        if not projection.parts:
            outputs = output_dims(resolve(attention, projection.path))
            return {projection.role: np.arange(outputs)}
        heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads,
                 "gate": shape.n_heads}  # fmt: skip
        repeats = {"": 1, "head": shape.n_heads, "group": shape.n_kv_heads}[projection.per]
        indices: dict[str, list[np.ndarray]] = {}
        start = 0
        for _ in range(repeats):
            for part in projection.parts:
                if isinstance(part, str):
                    role, width = part, heads[part] // repeats * shape.head_dim
                else:
                    role, width = part[0], int(getattr(attention, part[1]))
                indices.setdefault(role, []).append(np.arange(start, start + width))
                start += width
        return {role: np.concatenate(several) for role, several in indices.items()}

    def qk_outputs(self, layer: Layer, projection: Projection) -> np.ndarray | None:
        """(outputs,) bool, which of a fused projection are queries or keys; None where all are."""
        parts = self.part_outputs(layer, projection)
        if not projection.parts or not parts:
            return None
        outputs = np.zeros(sum(map(len, parts.values())), dtype=bool)
        for part in ("q", "k"):
            outputs[parts.get(part, [])] = True
        return outputs

    def hidden(
        self, model: nn.Module, tokens: mx.array, cache: Sequence[Any] | None = None
    ) -> mx.array:
        """Hidden states after the final norm, (B, T, width), which the output head reads.

        Args:
            model: a loaded model of this architecture.
            tokens: (B, T) token ids.
            cache: what ``mlx_lm.models.cache.make_prompt_cache`` makes: the tokens go on behind
                those that it holds, and are added to it.
        """
        if cache is None and self.needs_cache:
            cache = make_prompt_cache(model)
        if self.stem is not None:
            return resolve(model, self.stem)(tokens, cache=cache)
        # The head's owner without the head: a shallow copy, so that the model is untouched.
        path, _, name = self.head_path(model).rpartition(".")
        stem = copy.copy(resolve(model, path))
        head = stem.pop(name)
        object.__setattr__(stem, name, _NoHead(head))
        if hasattr(stem, "final_logit_softcapping"):
            stem.final_logit_softcapping = None
        return stem(tokens, cache=cache)

    def logits(
        self, model: nn.Module, hidden: mx.array, token_ids: Sequence[int] | mx.array | None = None
    ) -> mx.array:
        """Logits of a few tokens, without computing the rest of the vocabulary.

        Args:
            model: a loaded model of this architecture.
            hidden: (..., width) hidden states after the final norm.
            token_ids: (C,) which tokens; None for the whole vocabulary.

        Returns:
            (..., C) or (..., V) float32, as the model itself gives them.
        """
        name, head = architecture(model), self.head(model)
        if name in BEFORE_HEAD:
            hidden = BEFORE_HEAD[name](model, hidden)
        ids = None if token_ids is None else mx.array(token_ids)
        if ids is None or "lora_a" in head:
            logits = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
            if ids is not None:
                logits = logits.astype(mx.float32)[..., ids]
        else:
            logits = hidden.astype(mx.float32) @ head_rows(head, ids).astype(mx.float32).T
            if "bias" in head:
                logits = logits + head.bias[ids].astype(mx.float32)
        if name in AFTER_HEAD:
            logits = AFTER_HEAD[name](model, logits)
        return logits.astype(mx.float32)

    def head(self, model: nn.Module) -> nn.Module:
        """The output head: a linear layer, or the embedding it is tied to."""
        return resolve(model, self.head_path(model))

    def head_path(self, model: nn.Module) -> str:
        """Full dotted path of the output head, or of the embedding it is tied to."""
        for path in self.heads:
            if has(model, path):
                return path
        raise ModelError(
            f"this {self.architectures[0]} model has no output head at {' or '.join(self.heads)}; "
            "load a causal language model"
        )
