"""One optimizer update: value and gradient over micro-batches, compiled and accumulated exactly.

Each objective is one function, of a micro-batch to its loss: :func:`abft_loss`,
:func:`end_to_end_loss` and :func:`read_out_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from abft_mlx import adapters, attention, ports, prefix, read_out, recompute
from abft_mlx.errors import RunError
from abft_mlx.objective import Terms, abft_terms, end_to_end_terms
from abft_mlx.ranks import Ranks
from abft_mlx.trainer.batches import MicroBatch
from abft_mlx.trainer.checkpointing import checkpointed

Tree = Any
Objective = Literal["abft", "end_to_end", "read_out"]


@dataclass(frozen=True)
class Totals:
    """One update's sums, each divided by its number of prompts.

    Attributes:
        loss: A · punish + B · reward, or the cross-entropy of the label.
        punish: attention on wrong labels, summed over kept heads.
        reward: one minus attention on right labels, summed over kept heads.
        induction_heads: kept heads.
        tokens: prompt tokens, padding not counted.
        gradient_norm: L2 norm of the averaged gradient, before any clipping.
    """

    loss: float
    punish: float
    reward: float
    induction_heads: float
    tokens: int
    gradient_norm: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers; an update of others is left out."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def __str__(self) -> str:
        """Loss and gradient norm, for a message."""
        return f"loss {self.loss:g}, gradient norm {self.gradient_norm:g}"


Forward = Callable[[dict[str, mx.array]], tuple[mx.array, list[mx.array | None], mx.array]]
"""Of a micro-batch the hidden states, each layer's pattern rows, and where in the hidden states
each prompt's last token is."""


def abft_loss(
    model: nn.Module,
    batch: dict[str, mx.array],
    forward: Forward,
    punish_weight: mx.array,
    *,
    reward_weight: float,
    use_filter: bool,
    layers: set[int] | None,
) -> Terms:
    """Equation 1, summed over the prompts of a micro-batch, of all layers or some."""
    del model
    _, rows, _ = forward(batch)
    if layers is not None:
        rows = [row if layer in layers else None for layer, row in enumerate(rows)]
    return abft_terms(
        rows,
        **_labels(batch),
        punish_weight=punish_weight,
        reward_weight=reward_weight,
        use_filter=use_filter,
    )


def end_to_end_loss(
    model: nn.Module, batch: dict[str, mx.array], forward: Forward, _: mx.array
) -> Terms:
    """Cross-entropy of the answers' tokens at the LM head."""
    hidden, rows, last = forward(batch)
    # (B, W, V) logits: the head never sees the other positions.
    positions = last[:, None] + mx.arange(batch["target"].shape[1])
    answering = mx.take_along_axis(hidden, positions[..., None], axis=1)
    logits = ports.port_for(model).logits(model, answering)
    return end_to_end_terms(logits, batch["target"], rows, **_labels(batch))


def read_out_loss(
    model: nn.Module,
    batch: dict[str, mx.array],
    forward: Forward,
    punish_weight: mx.array,
    *,
    classes: int,
    together: int,
    lm_head: float,
) -> Terms:
    """Cross-entropy of the read-out's scores, and with a weight that of the LM head's answers.

    Each ``together`` prompts share their demonstrations, and centre each other's scores.
    """
    states = forward(batch)
    rows, weights = states[1], read_out.of(model)
    assert weights is not None
    labels = batch["label_positions"], batch["demonstration_labels"]
    scores = read_out.centred(weights.scores(rows, *labels, classes), together)[:, None, :]
    terms = end_to_end_terms(scores, batch["gold"][:, None], rows, **_labels(batch))
    if not lm_head:
        return terms
    answers = end_to_end_loss(model, batch, lambda _: states, punish_weight)
    return terms._replace(loss=terms.loss + lm_head * answers.loss)


def _labels(batch: dict[str, mx.array]) -> dict[str, mx.array]:
    """What every objective takes beside rows: where labels are, which is gold, and weights."""
    names = ("label_positions", "demonstration_labels", "gold", "last")
    return {name: batch[name] for name in names} | {"prompt_weights": batch["weights"]}


class Step:
    """Computes gradients of an objective's loss, and applies them.

    Args:
        model: a loaded model with adapters attached, everything else frozen; for the objective
            "read_out" with a read-out.
        optimizer: an MLX optimizer.
        reward_weight: B of equation 1, which the other objectives only measure.
        use_filter: whether heads must pass the induction-head filter.
        only_trained: whether only layers that train have a part in equation 1; nothing above the
            last of them is then computed.
        objective: "abft", "end_to_end" or "read_out".
        lm_head: weight of end-to-end fine-tuning's loss beside the read-out's.
        together: prompts that share demonstrations, for a read-out.
        classes: C, for a read-out.
        checkpointing: run blocks again for their gradients instead of keeping what they computed
            (:mod:`abft_mlx.trainer.checkpointing`).
        max_gradient_norm: clip the averaged gradient to this L2 norm, or None.
        compiled: compile value and gradient into one graph; None compiles on a GPU only.
        ranks: the processes that share every update; this one alone if None.

    Attributes:
        shapes: (B, T) of the micro-batches so far; a compiled step has a graph for each.
        value_and_grad: from trainable parameters, one micro-batch's arrays and the punish weight to
            the four terms (4,) and the parameters' gradients, summed over prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        reward_weight: float,
        use_filter: bool,
        only_trained: bool = False,
        objective: Objective = "abft",
        lm_head: float = 0.0,
        together: int = 1,
        classes: int = 0,
        checkpointing: bool = False,
        max_gradient_norm: float | None = None,
        compiled: bool | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm
        self.shapes: set[tuple[int, int]] = set()
        self._sums: tuple[Tree, mx.array] | None = None
        self.compiled = mx.default_device() == mx.Device(mx.gpu) if compiled is None else compiled
        self._answered = objective == "end_to_end" or lm_head > 0
        layers = set(adapters.trained_layers(model)) if only_trained else None
        losses: dict[str, Callable[..., Terms]] = {
            "abft": partial(
                abft_loss, reward_weight=reward_weight, use_filter=use_filter, layers=layers
            ),
            "end_to_end": end_to_end_loss,
            "read_out": partial(read_out_loss, classes=classes, together=together, lm_head=lm_head),
        }
        # Of the other objectives rows are measured, or read: all of them.
        layers = layers if objective == "abft" else None
        self.value_and_grad = _value_and_grad(
            model, partial(losses[objective], model), layers, checkpointing
        )
        if self.compiled:
            # Dropout draws from the random state, so it must be an input and an output of the
            # graph. A CPU gains nothing: MLX runs a C++ compiler there, most of a minute on a new
            # machine.
            state = [mx.random.state]
            self.value_and_grad = mx.compile(self.value_and_grad, inputs=state, outputs=state)
        optimizer.init(model.trainable_parameters())

    def gradients(
        self, micro_batches: Sequence[MicroBatch], punish_weight: float
    ) -> tuple[Tree, mx.array]:
        """Gradients summed over micro-batches, and the four summed terms (4,).

        While the device computes a micro-batch the next one's graph is built; it is evaluated
        only when the one before is done, so memory holds one at a time.
        """
        parameters = self.model.trainable_parameters()
        weight = mx.array(punish_weight, dtype=mx.float32)
        total: Tree = None
        terms = mx.zeros(4)
        try:
            for micro_batch in micro_batches:
                self.shapes.add(micro_batch.shape)
                batch = micro_batch.answered() if self._answered else micro_batch
                more_terms, more = self.value_and_grad(parameters, batch.arrays(), weight)
                mx.eval(total, terms)
                total = more if total is None else tree_map(mx.add, total, more)
                terms = terms + more_terms
                mx.async_eval(total, terms)
            mx.eval(total, terms)
        finally:
            # Tracing leaves placeholders in the model; put the real arrays back.
            self.model.update(parameters)
        return total, terms

    def update(self, micro_batches: Sequence[MicroBatch], punish_weight: float) -> Totals:
        """`accumulate` this rank's share of an update, and `apply` it."""
        self.accumulate(micro_batches, punish_weight)
        return self.apply(micro_batches)

    def accumulate(self, micro_batches: Sequence[MicroBatch], punish_weight: float) -> None:
        """Compute and keep what `gradients` gives; nothing else changes if memory runs out."""
        self._sums = self.gradients(micro_batches, punish_weight)

    def apply(self, micro_batches: Sequence[MicroBatch]) -> Totals:
        """Take one optimizer step with the accumulated gradients, unless they are not finite.

        Args:
            micro_batches: that were accumulated.

        Returns:
            What the update came to; nothing was changed where that is not finite.

        Raises:
            RunError: a rank is gone, and nothing changed; or weights stopped being finite.
        """
        # Nobody else may hold the sums: they would stand beside the averages in memory.
        assert self._sums is not None
        gradients, terms = self._sums
        self._sums = None
        prompts = sum(batch.prompts for batch in micro_batches)
        tokens = sum(batch.tokens for batch in micro_batches)
        if self.ranks.size > 1:
            flat = tree_flatten(gradients)
            counts = mx.array([prompts, tokens], dtype=mx.float32)
            sums = self.ranks.sum([*(array for _, array in flat), terms, counts])
            names = [name for name, _ in flat]
            gradients = tree_unflatten(list(zip(names, sums[:-2], strict=True)))
            terms, counts = sums[-2:]
            del flat, sums
            prompts, tokens = (int(count) for count in counts.tolist())
        # V is masked out of fused projections.
        gradients = adapters.mask_gradients(self.model, gradients)
        gradients = tree_map(lambda array: array / prompts, gradients)
        squares = [array.astype(mx.float32).square().sum() for _, array in tree_flatten(gradients)]
        norm = mx.sqrt(mx.stack(squares).sum()).item()
        loss, punish, reward, heads = (terms / prompts).tolist()
        totals = Totals(loss, punish, reward, heads, tokens, norm)
        # Every rank sees the same sums, so all of them leave the update out, or none.
        if not totals.finite:
            return totals
        if self.max_gradient_norm is not None and norm > self.max_gradient_norm:
            factor = self.max_gradient_norm / norm
            gradients = tree_map(lambda array: array * factor, gradients)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        # Afterwards: evaluated along with the update it would add to the step's peak memory.
        weights = tree_flatten(self.model.trainable_parameters())
        if not mx.stack([mx.isfinite(array).all() for _, array in weights]).all().item():
            bad = [name for name, array in weights if not mx.isfinite(array).all().item()]
            raise RunError(
                f"an update of learning rate {self.optimizer.learning_rate.item():g} and gradient "
                f"norm {norm:g} made {bad[0]} and {len(bad) - 1} other weights not finite, so "
                "the run stops; the last checkpoint stays; lower training.learning_rate, or set "
                "training.max_gradient_norm, or take the model in float32"
            )
        return totals


# MLX's functions hide what they hold from Python's collector: never let these hold the step.
def _value_and_grad(
    model: nn.Module, loss: Callable[..., Terms], layers: set[int] | None, checkpointing: bool
) -> Callable[..., tuple]:
    """Value and gradient of a loss of a batch, of how to run the model, and the punish weight.

    ``layers`` are those whose rows are used, None for all.
    """

    def value(parameters: Tree, *batch: Any) -> tuple:
        model.update(parameters)
        return tuple(loss(*batch))

    value_and_grad = mx.value_and_grad(value)

    def run(parameters: Tree, batch: dict[str, mx.array], punish_weight: mx.array) -> tuple:
        attend = recompute.attending
        plain = nullcontext(partial(attention.forward, attend=attend))
        opened = checkpointed(model, layers, attend) if checkpointing else plain

        def forward(batch: dict[str, mx.array]) -> tuple:
            tokens, last = batch["tokens"], batch["last"]
            if "prefix" in batch:
                last = last - batch["prefix"].shape[1]
                return *prefix.forward(model, batch["prefix"], tokens, last, attend), last
            return *whole(model, tokens, last), last

        with recompute.activations_again(model), opened as whole:
            values, gradients = value_and_grad(parameters, batch, forward, punish_weight)
        return mx.stack(values), gradients

    return run
