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
from abft_mlx.ports.output import NarrowHead, hidden_of, logits_of
from abft_mlx.ports.weights import has, output_dims, resolve

Role = Literal["q", "k", "v", "gate"]
Part = Role | tuple[Role, str]
"""What some outputs of a projection are; with the attention module's attribute that says how many,
where a head's queries, keys and values are not all head_dim wide."""


@dataclass(frozen=True)
class Projection:
    """One linear layer that makes queries, keys, or both.

    Attributes:
        path: where it sits, relative to the attention module. A layer that lacks it goes without.
        role: what of W_Q and W_K it holds.
        parts: for a fused projection, what its outputs are, in order.
        per: the outputs are ``parts`` once (""), or once for every "head" or every "group", a
            key/value head with the query heads that it serves.
    """

    path: str
    role: Literal["q", "k", "qk"]
    parts: tuple[Part, ...] = ()
    per: Literal["", "head", "group"] = ""


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


@dataclass(frozen=True)
class Port:
    """Where one architecture keeps what ABFT needs. All paths are dotted.

    Attributes:
        architectures: the mlx-lm model modules that this port describes.
        projections: W_Q and W_K inside an attention module.
        attention: the attention module's path inside a layer.
        layer_list: the layers' path inside the model.
        stem: path of the module that maps tokens to the final hidden state; None where the head is
            inside it.
        heads: candidates for the output head; the first that the model has is its head. An
            embedding among them is a tied head.
        n_heads: the attention module's attribute that counts query heads.
        n_kv_heads: the same for key/value heads.
        computes_softmax: the attention module computes its pattern itself, with ``mx.softmax``,
            instead of calling mlx-lm's attention function.
        classes: names of the classes of softmax attention, where linear attention sits at the same
            path in other layers.
        layer_input: the name under which a layer's ``__call__`` takes its hidden states; "" for
            its first argument.
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
    computes_softmax: bool = False
    classes: tuple[str, ...] = ()
    layer_input: str = ""
    same_with_cache: bool = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The model's layers, first to last."""
        return list(resolve(model, self.layer_list))

    def attention_module(self, layer: nn.Module) -> nn.Module | None:
        """A layer's attention module, or None for a layer without softmax attention."""
        if not has(layer, self.attention):
            return None
        module = resolve(layer, self.attention)
        softmax = not self.classes or type(module).__name__ in self.classes
        return module if softmax and self._projections(module) else None

    def attention_path(self, layer: int) -> str:
        """Full dotted path of a layer's attention module, as in the weights' names."""
        return f"{self.layer_list}.{layer}.{self.attention}"

    def layer_projections(self, layer: nn.Module) -> list[Projection]:
        """W_Q and W_K of one layer; no keys where it attends to another layer's."""
        module = self.attention_module(layer)
        return [] if module is None else self._projections(module)

    def _projections(self, attention: nn.Module) -> list[Projection]:
        found = [one for one in self.projections if has(attention, one.path)]
        return found if any("q" in one.role for one in found) else []

    def head_shape(self, layer: nn.Module) -> HeadShape | None:
        """The heads of one layer, or None for a layer without softmax attention."""
        attention = self.attention_module(layer)
        if attention is None:
            return None
        n_heads = int(getattr(attention, self.n_heads))
        n_kv_heads = int(getattr(attention, self.n_kv_heads))
        projection = next(one for one in self._projections(attention) if "q" in one.role)
        counts = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads, "gate": n_heads}
        parts = [one for one in projection.parts or (projection.role,) if isinstance(one, str)]
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
        outputs = np.zeros(sum(map(len, parts.values())), dtype=bool)
        for part in ("q", "k"):
            outputs[parts.get(part, [])] = True
        return outputs

    def part_outputs(self, layer: nn.Module, projection: Projection) -> dict[str, np.ndarray]:
        """Where queries, keys and the rest lie among a projection's outputs.

        Returns:
            "q", "k", "v" or "gate", those that the projection makes, to the indices of its outputs.
        """
        attention, shape = self.attention_module(layer), self.head_shape(layer)
        if attention is None or shape is None:
            return {}
        heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads,
                 "gate": shape.n_heads}  # fmt: skip
        blocks = {"": 1, "head": shape.n_heads, "group": shape.n_kv_heads}[projection.per]
        found: dict[str, list[np.ndarray]] = {}
        start = 0
        for _ in range(blocks):
            for part in projection.parts or (projection.role,):
                if isinstance(part, str):
                    role, width = part, heads[part] // blocks * shape.head_dim
                else:
                    role, width = part[0], int(getattr(attention, part[1]))
                found.setdefault(role, []).append(np.arange(start, start + width))
                start += width
        return {role: np.concatenate(several) for role, several in found.items()}

    def hidden(
        self, model: nn.Module, tokens: mx.array, cache: list[Any] | None = None
    ) -> mx.array:
        """Hidden state after the final norm, which the output head reads.

        Args:
            model: a loaded model of this architecture.
            tokens: (B, T) token ids.
            cache: what ``mlx_lm.models.cache.make_prompt_cache`` makes: the tokens go on behind
                those that it holds, and are added to it.

        Returns:
            (B, T, width).
        """
        return hidden_of(model, tokens, self.stem, self.head_path(model), cache)

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
        if token_ids is None:
            return logits_of(model, hidden, self.stem, self.head_path(model)).astype(mx.float32)
        ids = token_ids if isinstance(token_ids, mx.array) else mx.array(list(token_ids))
        narrow = NarrowHead(self.head(model), ids)
        return logits_of(model, hidden, self.stem, self.head_path(model), narrow)

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
