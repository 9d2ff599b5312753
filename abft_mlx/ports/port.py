"""What a port says about one architecture, and what can be computed from that alone.

Letters in shapes: B prompts, H query heads, G key/value heads, D head dim, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from abft_mlx.errors import ModelError
from abft_mlx.ports.modules import has, hidden_of, logits_of, output_dims, resolve

MODELS_PACKAGE = "mlx_lm.models."

Role = Literal["q", "k", "v", "gate"]
Part = Role | tuple[Role, str]
"""What some outputs of a projection are; with the attention module's attribute that says how many,
where a head's queries, keys and values are not all head_dim wide."""


def _several(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def architecture(model: nn.Module) -> str:
    """Name of the mlx-lm model module that runs this model; it decides the port.

    A model's own ``model_type`` may be another: mlx-lm runs ``mistral`` checkpoints as ``llama``.
    """
    return type(model).__module__.removeprefix(MODELS_PACKAGE)


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
class Layer:
    """One place where a model may attend: what this package counts as a layer.

    Attributes:
        path: full dotted path of its attention module, as in the weights' names.
        attention: what sits there, of softmax attention or not; None where nothing does.
        keys: the attention module that makes the keys it attends to.
    """

    path: str
    attention: nn.Module | None
    keys: nn.Module | None


@dataclass(frozen=True)
class Block:
    """One of a model's blocks, each time it is run.

    Attributes:
        path: its full dotted path.
        module: the block.
        layers: numbers of the layers in it; one, but where a block attends more than once.
    """

    path: str
    module: nn.Module
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """Where one architecture keeps what ABFT needs. All paths are dotted.

    Rows, heads and an adapter's layer numbers count places where a model attends. So a block with
    two attention modules is two layers, one after the other, and a block through which a model goes
    twice is two layers with the same W_Q and W_K, each with its own rows.

    Attributes:
        architectures: the mlx-lm model modules that this port describes.
        projections: W_Q and W_K inside an attention module.
        attention: the attention module's path inside a block; several, in the order in which a
            block runs them.
        layer_list: the blocks' path inside the model; several, in the order in which it runs them.
        passes: how often the model goes through its blocks, and how often an attention module
            attends each time.
        stem: path of the module that maps tokens to the final hidden state; None where the head is
            inside it.
        heads: candidates for the output head; the first that the model has is its head. An
            embedding among them is a tied head.
        n_heads: the attention module's attribute that counts query heads.
        n_kv_heads: the same for key/value heads, or their number where none says it.
        calls: where mlx-lm's attention function is called: methods of the attention class, or
            functions that its methods call.
        by_hand: where the pattern is computed with ``mx.softmax`` instead: methods, or functions.
        needs_cache: without a prompt cache mlx-lm's code computes another model.
        classes: names of the classes of softmax attention, where linear attention sits at the same
            path in other layers.
        block_input: the name under which a block's ``__call__`` takes its hidden states; "" for
            its first argument.
        same_with_cache: mlx-lm's code computes the same with a prompt cache as without.
    """

    architectures: tuple[str, ...]
    projections: tuple[Projection, ...] = (Projection("q_proj", "q"), Projection("k_proj", "k"))
    attention: str | tuple[str, ...] = "self_attn"
    layer_list: str | tuple[str, ...] = "model.layers"
    passes: tuple[int, ...] = (1,)
    stem: str | None = "model"
    heads: tuple[str, ...] = ("lm_head", "model.embed_tokens")
    n_heads: str = "n_heads"
    n_kv_heads: str | int = "n_kv_heads"
    calls: tuple[str, ...] = ("__call__",)
    by_hand: tuple[str, ...] = ()
    needs_cache: bool = False
    classes: tuple[str, ...] = ()
    block_input: str = ""
    same_with_cache: bool = True

    def layers(self, model: nn.Module) -> list[Layer]:
        """The model's layers, in the order in which it runs them."""
        layers: list[Layer] = []
        keys: nn.Module | None = None
        for path, times in self._attention_paths(model):
            module = resolve(model, path) if has(model, path) else None
            if module is not None and (
                isinstance(self.n_kv_heads, int) or has(module, self.n_kv_heads)
            ):
                keys = module
            layers += [Layer(path, module, keys)] * times
        return layers

    def blocks(self, model: nn.Module) -> list[Block]:
        """The model's blocks, in the order in which it runs them, as often as it does."""
        runs: list[Block] = []
        count = 0
        for times in self.passes:
            for blocks in _several(self.layer_list):
                for number, module in enumerate(resolve(model, blocks)):
                    layers = times * len(_several(self.attention))
                    runs.append(
                        Block(f"{blocks}.{number}", module, tuple(range(count, count + layers)))
                    )
                    count += layers
        return runs

    def _attention_paths(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Where attention modules may sit, and how often each attends."""
        for times in self.passes:
            for blocks in _several(self.layer_list):
                for number in range(len(resolve(model, blocks))):
                    for path in _several(self.attention):
                        yield f"{blocks}.{number}.{path}", times

    def attention_module(self, layer: Layer) -> nn.Module | None:
        """A layer's attention module, or None for a layer without softmax attention."""
        module = layer.attention
        if module is None:
            return None
        softmax = not self.classes or type(module).__name__ in self.classes
        return module if softmax and self._projections(module) else None

    def layer_projections(self, layer: Layer) -> list[Projection]:
        """W_Q and W_K of one layer; no keys where it attends to another layer's."""
        module = self.attention_module(layer)
        return [] if module is None else self._projections(module)

    def _projections(self, attention: nn.Module) -> list[Projection]:
        present = [part for part in self.projections if has(attention, part.path)]
        return present if any("q" in part.role for part in present) else []

    def head_shape(self, layer: Layer) -> HeadShape | None:
        """The heads of one layer, or None for a layer without softmax attention."""
        attention = self.attention_module(layer)
        if attention is None:
            return None
        n_heads = int(getattr(attention, self.n_heads))
        n_kv_heads = int(
            self.n_kv_heads
            if isinstance(self.n_kv_heads, int)
            else getattr(layer.keys, self.n_kv_heads)
        )
        projection = next(p for p in self._projections(attention) if "q" in p.role)
        counts = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads, "gate": n_heads}
        parts = [part for part in projection.parts or (projection.role,) if isinstance(part, str)]
        outputs = output_dims(resolve(attention, projection.path))
        return HeadShape(n_heads, n_kv_heads, outputs // sum(counts[part] for part in parts))

    def qk_outputs(self, layer: Layer, projection: Projection) -> np.ndarray | None:
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

    def part_outputs(self, layer: Layer, projection: Projection) -> dict[str, np.ndarray]:
        """Where queries, keys and the rest lie among a projection's outputs.

        Returns:
            "q", "k", "v" or "gate", those that the projection makes, to the indices of its outputs.
        """
        attention, shape = self.attention_module(layer), self.head_shape(layer)
        if attention is None or shape is None:
            return {}
        if not projection.parts:
            every = output_dims(resolve(attention, projection.path))
            return {projection.role: np.arange(every)}
        heads = {"q": shape.n_heads, "k": shape.n_kv_heads, "v": shape.n_kv_heads,
                 "gate": shape.n_heads}  # fmt: skip
        blocks = {"": 1, "head": shape.n_heads, "group": shape.n_kv_heads}[projection.per]
        indices: dict[str, list[np.ndarray]] = {}
        start = 0
        for _ in range(blocks):
            for part in projection.parts:
                if isinstance(part, str):
                    role, width = part, heads[part] // blocks * shape.head_dim
                else:
                    role, width = part[0], int(getattr(attention, part[1]))
                indices.setdefault(role, []).append(np.arange(start, start + width))
                start += width
        return {role: np.concatenate(several) for role, several in indices.items()}

    def hidden(
        self, model: nn.Module, tokens: mx.array, cache: Sequence[Any] | None = None
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
        if cache is None and self.needs_cache:
            cache = make_prompt_cache(model)
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
        if token_ids is not None and not isinstance(token_ids, mx.array):
            token_ids = mx.array(list(token_ids))
        head = self.head(model)
        return logits_of(model, architecture(model), hidden, head, token_ids).astype(mx.float32)

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
