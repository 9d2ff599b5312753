"""One optimizer update: value and gradient over micro-batches, compiled and accumulated exactly."""

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

from abft_mlx import activations, adapters, attention, ports, prefix, read_out, recompute
from abft_mlx.errors import RunError
from abft_mlx.objective import Terms, abft_terms, end_to_end_terms
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import below, local
from abft_mlx.trainer.checkpointing import Forward, checkpointed
from abft_mlx.trainer.kept import Kept
from abft_mlx.trainer.plan import MicroBatch

Tree = Any
Objective = Literal["abft", "end_to_end", "read_out"]
Gradient = Literal["exact", "local"]


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


@dataclass
class Seams:
    """What the footprint replaces in a step that it only looks at.

    Attributes:
        settle: evaluates what local gradients have come to, block by block.
        again: makes the backward pass compute a function again (:mod:`abft_mlx.recompute`).
    """

    settle: Callable[..., None] = mx.eval
    again: recompute.Again = recompute.again


@dataclass
class Compilations:
    """How often a step's graph has been compiled; 0 where it is not.

    Attributes:
        count: so far.
    """

    count: int = 0


@dataclass(frozen=True)
class _Loss:
    """The four terms of a micro-batch by one objective, of an exact forward pass.

    Attributes:
        model: with its adapters, and its read-out where one is trained.
        objective: which.
        reward_weight: B.
        use_filter: whether heads must pass the induction-head filter.
        counting: layers that have a part in equation 1; None for all.
        lm_head: weight of the LM head's loss beside the read-out's.
        together: prompts that centre each other in a read-out.
        classes: C, of a read-out.
        first: the block whose input is known from earlier updates, or None.
        seams: of the step.
    """

    model: nn.Module
    objective: Objective
    reward_weight: float
    use_filter: bool
    counting: set[int] | None
    lm_head: float
    together: int
    classes: int
    first: int | None
    seams: Seams

    def __call__(
        self, batch: dict[str, mx.array], punish_weight: mx.array, forward: Forward
    ) -> Terms:
        """The terms, summed over the prompts."""
        hidden, rows, behind = self._forward(batch, forward)
        if self.counting is not None:
            rows = [row if layer in self.counting else None for layer, row in enumerate(rows)]
        if self.objective == "end_to_end":
            return _with_below(self._answered(batch, hidden, rows, behind), batch, 0.0, 0.0)
        if self.objective == "read_out":
            terms = self._read(batch, rows)
            if self.lm_head:
                beside = self._answered(batch, hidden, rows, behind).loss
                terms = terms._replace(loss=terms.loss + self.lm_head * beside)
            return terms
        terms = abft_terms(
            *_labelled(batch, rows),
            punish_weight=punish_weight,
            reward_weight=self.reward_weight,
            use_filter=self.use_filter,
            prompt_weights=batch["weights"],
        )
        return _with_below(terms, batch, punish_weight, self.reward_weight)

    def _forward(
        self, batch: dict[str, mx.array], forward: Forward
    ) -> tuple[mx.array, list[mx.array | None], mx.array]:
        """Hidden states, pattern rows, and where each prompt's last token is among the states."""
        model, last = self.model, batch["last"]
        if self.first is not None:
            layer = ports.port_for(model).blocks(model)[self.first].layers[0]
            with below.beginning(model, self.first, batch["hidden"]):
                return *forward(model, batch["tokens"], last, first_layer=layer), last
        if "prefix" in batch:
            behind = last - batch["prefix"].shape[1]
            attend = recompute.attending(self.seams.again)
            made = prefix.forward(model, batch["prefix"], batch["tokens"], behind, attend)
            return *made, behind
        return *forward(model, batch["tokens"], last), last

    def _answered(
        self,
        batch: dict[str, mx.array],
        hidden: mx.array,
        rows: list[mx.array | None],
        behind: mx.array,
    ) -> Terms:
        """Cross-entropy of the answers' tokens at the LM head."""
        # (B, W, V) logits: the head never sees the other positions.
        places = behind[:, None] + mx.arange(batch["target"].shape[1])
        answering = mx.take_along_axis(hidden, places[..., None], axis=1)
        logits = ports.port_for(self.model).logits(self.model, answering)
        return end_to_end_terms(
            logits, batch["target"], *_labelled(batch, rows), prompt_weights=batch["weights"]
        )

    def _read(self, batch: dict[str, mx.array], rows: list[mx.array | None]) -> Terms:
        """Cross-entropy of the read-out's scores."""
        weights = read_out.of(self.model)
        assert weights is not None
        scores = weights.scores(
            rows, batch["label_positions"], batch["demonstration_labels"], self.classes
        )
        scores = read_out.centred(scores, self.together)[:, None, :]
        return end_to_end_terms(
            scores,
            batch["gold"][:, None],
            *_labelled(batch, rows),
            prompt_weights=batch["weights"],
        )


class Step:
    """Computes gradients of the recipe's loss, and applies them.

    Args:
        model: a loaded model with adapters attached; everything else frozen.
        optimizer: an MLX optimizer.
        reward_weight: B.
        use_filter: whether heads must pass the induction-head filter.
        only_trained: whether only layers that train have a part in equation 1; nothing above the
            last of them is then computed. With local gradients it is always so, block by block.
        gradient: "exact", or "local": each layer's loss trains that layer alone
            (:mod:`abft_mlx.trainer.local`). End-to-end gradients are always exact.
        checkpointing: whether exact gradients run blocks again instead of keeping what they
            computed (:mod:`abft_mlx.trainer.checkpointing`).
        objective: "abft"; or "end_to_end" or "read_out", for which the punish weight,
            ``reward_weight`` and ``use_filter`` do nothing. A read-out must be on the model.
        lm_head: weight of end-to-end fine-tuning's loss beside the read-out's.
        together: prompts that share demonstrations, which centre each other in a read-out.
        classes: C, for a read-out.
        max_gradient_norm: clip the averaged gradient to this L2 norm, or None.
        compiled: compile value and gradient into one graph; None compiles on a GPU only. Local
            gradients are never compiled.
        ranks: the processes that share every update; this one alone if None.
        kept_bytes: keep the hidden states that go into the first block that trains, so many bytes
            of them in memory, where they suffice (:func:`abft_mlx.trainer.below.boundary`); None
            computes them in every update. Micro-batches may then not share beginnings.

    Attributes:
        compilations: counted; an update after warm-up adds none.
        seams: for whoever looks at the step without running it.
        kept: what is kept of the prompts that were seen, or None.
        answered: whether prompts are followed by their answers.
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
        gradient: Gradient = "exact",
        checkpointing: bool = False,
        max_gradient_norm: float | None = None,
        compiled: bool | None = None,
        ranks: Ranks | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.optimizer = optimizer
        self.max_gradient_norm = max_gradient_norm
        self.shapes: set[tuple[int, int]] = set()
        self._summed: tuple[Tree, mx.array] | None = None
        self.compilations = Compilations()
        self.seams = Seams()
        self.compiled = mx.default_device() == mx.Device(mx.gpu) if compiled is None else compiled
        self.answered = objective == "end_to_end" or lm_head > 0
        supervised = objective == "abft"
        first = None if kept_bytes is None else below.boundary(model)
        self.kept: Kept | None = None
        if first is not None and kept_bytes is not None:
            self.kept = Kept(
                model,
                first,
                kept_bytes,
                counted=not supervised or not (only_trained or gradient == "local"),
                use_filter=use_filter or not supervised,
                answered=self.answered,
            )
        # Of the other objectives rows are measured, or read: all of them.
        dropped = only_trained and supervised
        counting = set(adapters.trained_layers(model)) if dropped else None
        loss = _Loss(
            model,
            objective,
            reward_weight,
            use_filter,
            counting,
            lm_head,
            together,
            classes,
            first,
            self.seams,
        )
        if gradient == "local" and supervised:
            self.compiled = False
            self.value_and_grad = _local(loss)
        else:
            self.value_and_grad = self._exact(loss, checkpointing)
        optimizer.init(model.trainable_parameters())

    def _exact(self, terms: _Loss, checkpointing: bool) -> Callable[..., tuple]:
        """Value and gradient through the whole model."""
        # MLX's functions hide what they hold from Python's collector: never let them hold the step.
        model, seams, counting = self.model, self.seams, terms.counting
        compilations, compiled = self.compilations, self.compiled

        def loss(parameters: Tree, *batch: Any) -> tuple:
            model.update(parameters)
            return tuple(terms(*batch))

        value_and_grad = mx.value_and_grad(loss)

        def run(parameters: Tree, batch: dict[str, mx.array], punish_weight: mx.array) -> tuple:
            # A compiled function's own code runs only as it is compiled, once for each shape.
            compilations.count += compiled
            attend = recompute.attending(seams.again)
            plain = nullcontext(partial(attention.forward, attend=attend))
            opened = checkpointed(model, counting, attend) if checkpointing else plain
            with activations.replaced(model, seams.again), opened as forward:
                values, gradients = value_and_grad(parameters, batch, punish_weight, forward)
            return mx.stack(values), gradients

        # A CPU gains nothing: MLX runs a C++ compiler there, most of a minute on a new machine.
        if not compiled:
            return run
        # Dropout draws from the random state, so it must be an input and an output of the graph.
        return mx.compile(run, inputs=[mx.random.state], outputs=[mx.random.state])

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
                arrays = self._arrays(micro_batch)
                more_terms, more = self.value_and_grad(parameters, arrays, weight)
                mx.eval(total, terms)
                total = more if total is None else tree_map(mx.add, total, more)
                terms = terms + more_terms
                mx.async_eval(total, terms)
            mx.eval(total, terms)
        finally:
            # Tracing leaves placeholders in the model; put the real arrays back.
            self.model.update(parameters)
        return total, terms

    def _arrays(self, micro_batch: MicroBatch) -> dict[str, mx.array]:
        """A micro-batch as the loss takes it."""
        if self.answered:
            micro_batch = micro_batch.answered()
        return micro_batch.arrays() if self.kept is None else self.kept.arrays(micro_batch)

    def average(self, gradients: Tree, prompts: int) -> tuple[Tree, mx.array]:
        """Gradients per prompt, with V masked out of fused projections, and their L2 norm."""
        gradients = adapters.mask_gradients(self.model, gradients)
        gradients = tree_map(lambda array: array / prompts, gradients)
        squares = [array.astype(mx.float32).square().sum() for _, array in tree_flatten(gradients)]
        return gradients, mx.sqrt(mx.stack(squares).sum())

    def update(self, micro_batches: Sequence[MicroBatch], punish_weight: float) -> Totals:
        """Average the gradients over the update's prompts and take one optimizer step.

        Args:
            micro_batches: this rank's share of the update's prompts.
            punish_weight: A.

        Returns:
            What the update came to; nothing was changed where that is not finite.

        Raises:
            RunError: as `apply`.
        """
        self.accumulate(micro_batches, punish_weight)
        return self.apply(micro_batches)

    def accumulate(self, micro_batches: Sequence[MicroBatch], punish_weight: float) -> None:
        """Compute and keep what `gradients` gives; nothing else changes if memory runs out."""
        self._summed = self.gradients(micro_batches, punish_weight)

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
        assert self._summed is not None
        gradients, terms = self._summed
        self._summed = None
        prompts = sum(batch.prompts for batch in micro_batches)
        tokens = sum(batch.tokens for batch in micro_batches)
        if self.ranks.size > 1:
            gradients, terms, prompts, tokens = self._over_ranks(gradients, terms, prompts, tokens)
        gradients, norm = self.average(gradients, prompts)
        loss, punish, reward, heads = (terms / prompts).tolist()
        totals = Totals(loss, punish, reward, heads, tokens, norm.item())
        # Every rank sees the same sums, so all of them leave the update out, or none.
        if not totals.finite:
            return totals
        limit = self.max_gradient_norm
        if limit is not None and totals.gradient_norm > limit:
            factor = limit / totals.gradient_norm
            gradients = tree_map(lambda array: array * factor, gradients)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        # Afterwards: evaluated along with the update it would add to the step's peak memory.
        self._check_weights(totals)
        return totals

    def _check_weights(self, totals: Totals) -> None:
        """See that an update of a finite gradient has left every trained weight finite."""
        arrays = tree_flatten(self.model.trainable_parameters())
        if mx.stack([mx.isfinite(array).all() for _, array in arrays]).all().item():
            return
        names = [name for name, array in arrays if not mx.isfinite(array).all().item()]
        raise RunError(
            f"an update of learning rate {self.optimizer.learning_rate.item():g} and gradient norm "
            f"{totals.gradient_norm:g} made {names[0]} and {len(names) - 1} other weights not "
            "finite, so the run stops; the last checkpoint stays; lower training.learning_rate, or "
            "set training.max_gradient_norm, or take the model in float32"
        )

    def _over_ranks(
        self, gradients: Tree, terms: mx.array, prompts: int, tokens: int
    ) -> tuple[Tree, mx.array, int, int]:
        """The same, summed over all ranks."""
        flat = tree_flatten(gradients)
        counts = mx.array([prompts, tokens], dtype=mx.float32)
        *arrays, terms, counts = self.ranks.sum([*(array for _, array in flat), terms, counts])
        names = [name for name, _ in flat]
        all_prompts, all_tokens = (int(count) for count in counts.tolist())
        summed = tree_unflatten(list(zip(names, arrays, strict=True)))
        return summed, terms, all_prompts, all_tokens


def _local(loss: _Loss) -> Callable[..., tuple]:
    """Value and gradient block by block."""
    model, seams = loss.model, loss.seams

    def terms(
        rows: Sequence[mx.array | None], batch: dict[str, mx.array], punish_weight: mx.array
    ) -> Terms:
        return abft_terms(
            *_labelled(batch, rows),
            punish_weight=punish_weight,
            reward_weight=loss.reward_weight,
            use_filter=loss.use_filter,
            prompt_weights=batch["weights"],
        )

    value_and_grad = local.value_and_grad(model, terms, lambda *arrays: seams.settle(*arrays))

    def run(*given: Any) -> tuple:
        with activations.replaced(model, seams.again):
            return value_and_grad(*given)

    return run


def _labelled(batch: dict[str, mx.array], rows: Sequence[mx.array | None]) -> tuple[Any, ...]:
    """What every objective is told of rows: where labels are, and which is the gold one."""
    names = ("label_positions", "demonstration_labels", "gold", "last")
    return (rows, *(batch[name] for name in names))


def _with_below(
    terms: Terms,
    batch: dict[str, mx.array],
    punish_weight: mx.array | float,
    reward_weight: mx.array | float,
) -> Terms:
    """The terms with those of layers below the first that trains, where a batch knows them."""
    if "below" not in batch:
        return terms
    known = (batch["below"] * batch["weights"][:, None]).sum(axis=0)
    punish, reward, heads = known[0], known[1], known[2]
    return Terms(
        terms.loss + punish_weight * punish + reward_weight * reward,
        terms.punish + punish,
        terms.reward + reward,
        terms.induction_heads + heads,
    )
