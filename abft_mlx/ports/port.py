"""What a port says about one architecture, and what can be computed from that alone.

Letters in shapes: B prompts, H query heads, G key/value heads, D head dim, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from abft_mlx.errors import ModelError


@dataclass(frozen=True)
class Projection:
    """One linear layer that makes queries, keys, or both.

    Attributes:
        path: where it sits, relative to the attention module.
        role: what of W_Q and W_K it holds.
        parts: for a fused projection, what its outputs are, in order; each part is contiguous.
    """

    path: str
    role: Literal["q", "k", "qk"]
    parts: tuple[Literal["q", "k", "v"], ...] = ()


@dataclass(frozen=True)
class HeadShape:
    """The heads of one layer.

    Attributes:
        n_heads: query heads (H).
        n_kv_heads: key/value heads (G); each serves n_heads / n_kv_heads query heads.
        head_dim: width of one head's query and key (D).
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int


def resolve(module: nn.Module, path: str) -> Any:
    """The submodule or attribute at a dotted path."""
    found: Any = module
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


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


@dataclass(frozen=True)
class Port:
    """Where one architecture keeps what ABFT needs. All paths are dotted.

    Attributes:
        architectures: the mlx-lm model modules that this port describes.
        projections: W_Q and W_K inside an attention module.
        attention: the attention module's path inside a layer.
        layer_list: the layers' path inside the model.
        stem: path of the module that maps tokens to the final normed hidden state.
        heads: candidates for the output head; the first that the model has is its head. An
            embedding among them is a tied head.
        n_heads: the attention module's attribute that counts query heads.
        n_kv_heads: the same for key/value heads.
    """

    architectures: tuple[str, ...]
    projections: tuple[Projection, ...] = (Projection("q_proj", "q"), Projection("k_proj", "k"))
    attention: str = "self_attn"
    layer_list: str = "model.layers"
    stem: str = "model"
    heads: tuple[str, ...] = ("lm_head", "model.embed_tokens")
    n_heads: str = "n_heads"
    n_kv_heads: str = "n_kv_heads"

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The model's layers, first to last."""
        return list(resolve(model, self.layer_list))

    def attention_module(self, layer: nn.Module) -> nn.Module | None:
        """A layer's attention module, or None for a layer without softmax attention."""
        return resolve(layer, self.attention) if has(layer, self.attention) else None

    def attention_path(self, layer: int) -> str:
        """Full dotted path of a layer's attention module, as in the weights' names."""
        return f"{self.layer_list}.{layer}.{self.attention}"

    def head_shape(self, layer: nn.Module) -> HeadShape | None:
        """The heads of one layer, or None for a layer without softmax attention."""
        attention = self.attention_module(layer)
        if attention is None:
            return None
        n_heads = int(getattr(attention, self.n_heads))
        n_kv_heads = int(getattr(attention, self.n_kv_heads))
        counts = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
        projection = self.projections[0]
        parts = projection.parts or (projection.role,)
        outputs = output_dims(resolve(attention, projection.path))
        return HeadShape(n_heads, n_kv_heads, outputs // sum(counts[part] for part in parts))

    def qk_outputs(self, layer: nn.Module, projection: Projection) -> np.ndarray | None:
        """Which outputs of a projection are queries or keys.

        Returns:
            (outputs,) bool for a fused projection, None where all of them are.
        """
        if not projection.parts or self.head_shape(layer) is None:
            return None
        parts = self.part_outputs(layer, projection)
        outputs = np.ones(max(one.stop for one in parts.values()), dtype=bool)
        if "v" in parts:
            outputs[parts["v"]] = False
        return outputs

    def part_outputs(self, layer: nn.Module, projection: Projection) -> dict[str, slice]:
        """Where queries, keys and values lie among a projection's outputs.

        Returns:
            "q", "k" or "v", those that the projection makes, to its outputs.
        """
        shape = self.head_shape(layer)
        if shape is None:
            return {}
        heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads}
        found: dict[str, slice] = {}
        start = 0
        for part in projection.parts or (projection.role,):
            stop = start + heads[part] * shape.head_dim
            found[part] = slice(start, stop)
            start = stop
        return found

    def hidden(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """Hidden state after the final norm, which the output head reads.

        Args:
            model: a loaded model of this architecture.
            tokens: (B, T) token ids.

        Returns:
            (B, T, width).
        """
        return resolve(model, self.stem)(tokens)

    def logits(
        self, model: nn.Module, hidden: mx.array, token_ids: Sequence[int] | mx.array | None = None
    ) -> mx.array:
        """Logits of a few tokens, without computing the rest of the vocabulary.

        Args:
            model: a loaded model of this architecture.
            hidden: (..., width) hidden states after the final norm.
            token_ids: (C,) the tokens wanted; None for the whole vocabulary.

        Returns:
            (..., C) or (..., V) float32, what the model itself gives there.
        """
        head = self.head(model)
        if token_ids is None:
            whole = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
            return whole.astype(mx.float32)
        ids = token_ids if isinstance(token_ids, mx.array) else mx.array(list(token_ids))
        if "lora_a" in head:
            return head(hidden).astype(mx.float32)[..., ids]
        weight = head_rows(head, ids).astype(mx.float32)
        picked = hidden.astype(mx.float32) @ weight.T
        bias = head.get("bias")
        return picked if bias is None else picked + bias[ids].astype(mx.float32)

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


def head_rows(head: nn.Module, token_ids: mx.array | None = None) -> mx.array:
    """The head's weights for some tokens.

    Args:
        head: a linear layer or embedding, plain or quantized.
        token_ids: (C,) rows wanted; None for all.

    Returns:
        (C, width), or (V, width).
    """

    def chosen(array: mx.array) -> mx.array:
        return array if token_ids is None else array[token_ids]

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
