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
from abft_mlx.objective import Terms, abft_terms, end_to_end_terms
from abft_mlx.ranks import Ranks
from abft_mlx.trainer import backoff, below, finite, local
from abft_mlx.trainer.checkpointing import Forward, checkpointed
from abft_mlx.trainer.explained import explained
from abft_mlx.trainer.kept import Kept
from abft_mlx.trainer.plan import MicroBatch
from abft_mlx.trainer.totals import Totals

Tree = Any
Objective = Literal["abft", "end_to_end", "read_out"]
Gradient = Literal["exact", "local"]


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
        self.compilations = Compilations()
        self.seams = Seams()
        self.compiled = mx.default_device() == mx.Device(mx.gpu) if compiled is None else compiled
        self.answered = objective == "end_to_end" or lm_head > 0
        first = None if kept_bytes is None else below.boundary(model)
        self.kept: Kept | None = None
        if first is not None and kept_bytes is not None:
            supervised = objective == "abft"
            self.kept = Kept(
                model,
                first,
                kept_bytes,
                counted=not supervised or not (only_trained or gradient == "local"),
                use_filter=use_filter or not supervised,
                answered=self.answered,
            )
        if gradient == "local" and objective == "abft":
            self.compiled = False
            built = self._build_local(reward_weight, use_filter)
        else:
            built = self._build(
                objective,
                reward_weight,
                use_filter,
                only_trained,
                checkpointing,
                read=(lm_head, together, classes),
            )
        self.value_and_grad = explained(model, built)
        optimizer.init(model.trainable_parameters())

    def _build(
        self,
        objective: Objective,
        reward_weight: float,
        use_filter: bool,
        only_trained: bool,
        checkpointing: bool,
        read: tuple[float, int, int],
    ) -> Callable[..., tuple]:
        # MLX's functions hide what they hold from Python's collector: never let them hold the step.
        model, port, seams = self.model, ports.port_for(self.model), self.seams
        compilations, compiled = self.compilations, self.compiled
        lm_head, together, classes = read
        # Of the other objectives rows are measured, or read: all of them.
        dropped = only_trained and objective == "abft"
        counting = set(adapters.trained_layers(model)) if dropped else None
        first = None if self.kept is None else self.kept.first
        first_layer = 0 if first is None else port.blocks(model)[first].layers[0]

        def terms(batch: dict[str, mx.array], punish_weight: mx.array, forward: Forward) -> Terms:
            last = batch["last"]
            if first is not None:
                behind = last
                with below.beginning(model, first, batch["hidden"]):
                    hidden, rows = forward(model, batch["tokens"], last, first_layer=first_layer)
            elif "prefix" in batch:
                behind = last - batch["prefix"].shape[1]
                attend = recompute.attending(seams.again)
                hidden, rows = prefix.forward(
                    model, batch["prefix"], batch["tokens"], behind, attend
                )
            else:
                behind = last
                hidden, rows = forward(model, batch["tokens"], last)
            if counting is not None:
                rows = [one if n in counting else None for n, one in enumerate(rows)]
            labelled = (batch["label_positions"], batch["demonstration_labels"])
            seen = (rows, *labelled, batch["gold"], last)
            weights = batch["weights"]

            def answered() -> Terms:
                # (B, W, V) logits: the head never sees the other positions.
                places = behind[:, None] + mx.arange(batch["target"].shape[1])
                answering = mx.take_along_axis(hidden, places[..., None], axis=1)
                logits = port.logits(model, answering)
                return end_to_end_terms(logits, batch["target"], *seen, prompt_weights=weights)

            if objective == "end_to_end":
                return _with_below(answered(), batch, 0.0, 0.0)
            if objective == "read_out":
                head_weights = read_out.of(model)
                assert head_weights is not None
                scores = head_weights.scores(rows, *labelled, classes)
                scores = read_out.centred(scores, together)[:, None, :]
                gold = batch["gold"][:, None]
                found = end_to_end_terms(scores, gold, *seen, prompt_weights=weights)
                if lm_head:
                    found = found._replace(loss=found.loss + lm_head * answered().loss)
                return found
            found = abft_terms(
                *seen,
                punish_weight=punish_weight,
                reward_weight=reward_weight,
                use_filter=use_filter,
                prompt_weights=weights,
            )
            return _with_below(found, batch, punish_weight, reward_weight)

        def loss(parameters: Tree, *given: Any) -> tuple:
            model.update(parameters)
            return tuple(terms(*given))

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
        if not self.compiled:
            return run
        # Dropout draws from the random state, so it must be an input and an output of the graph.
        return mx.compile(run, inputs=[mx.random.state], outputs=[mx.random.state])

    def _build_local(self, reward_weight: float, use_filter: bool) -> Callable[..., tuple]:
        def terms(
            rows: Sequence[mx.array | None], batch: dict[str, mx.array], punish_weight: mx.array
        ) -> Terms:
            return abft_terms(
                rows,
                batch["label_positions"],
                batch["demonstration_labels"],
                batch["gold"],
                batch["last"],
                punish_weight=punish_weight,
                reward_weight=reward_weight,
                use_filter=use_filter,
                prompt_weights=batch["weights"],
            )

        model, seams = self.model, self.seams
        found = local.value_and_grad(model, terms, lambda *arrays: seams.settle(*arrays))

        def run(*given: Any) -> tuple:
            with activations.replaced(model, seams.again):
                return found(*given)

        return run

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
                one_terms, one = self.value_and_grad(parameters, arrays, weight)
                mx.eval(total, terms)
                total = one if total is None else tree_map(mx.add, total, one)
                terms = terms + one_terms
                mx.async_eval(total, terms)
            mx.eval(total, terms)
        finally:
            # Tracing leaves placeholders in the model; put the real arrays back.
            self.model.update(parameters)
        return total, terms

    def _arrays(self, micro_batch: MicroBatch) -> dict[str, mx.array]:
        if self.answered:
            micro_batch = micro_batch.answered()
        return micro_batch.arrays() if self.kept is None else self.kept.arrays(micro_batch)

    def average(self, gradients: Tree, prompts: int) -> tuple[Tree, mx.array]:
        """Gradients per prompt, with V masked out of fused projections, and their L2 norm."""
        gradients = adapters.mask_gradients(self.model, gradients)
        gradients = tree_map(lambda one: one / prompts, gradients)
        squares = [one.astype(mx.float32).square().sum() for _, one in tree_flatten(gradients)]
        return gradients, mx.sqrt(mx.stack(squares).sum())

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        punish_weight: float,
        smaller: Callable[[str], Sequence[MicroBatch]] | None = None,
    ) -> Totals:
        """Average the gradients over the update's prompts and take one optimizer step.

        Args:
            micro_batches: this rank's share of the update's prompts.
            punish_weight: A.
            smaller: cuts them anew where memory ran out, told in MLX's words, or raises.

        Raises:
            NonFiniteError: the loss or the gradient is not finite; nothing changed.
            RunError: a rank is gone, and nothing changed; or weights stopped being finite.
        """
        prompts = sum(one.prompts for one in micro_batches)
        tokens = sum(one.tokens for one in micro_batches)
        gradients, terms = backoff.attempt(
            lambda batches: self.gradients(batches, punish_weight), micro_batches, smaller
        )
        if self.ranks.size > 1:
            gradients, terms, prompts, tokens = self._summed(gradients, terms, prompts, tokens)
        gradients, norm = self.average(gradients, prompts)
        loss, punish, reward, heads = (terms / prompts).tolist()
        totals = Totals(loss, punish, reward, heads, tokens, norm.item())
        # Every rank sees the same sums, so all of them leave the update out, or none.
        if not math.isfinite(totals.loss) or not math.isfinite(totals.gradient_norm):
            raise finite.NonFiniteError(totals)
        limit = self.max_gradient_norm
        if limit is not None and totals.gradient_norm > limit:
            factor = limit / totals.gradient_norm
            gradients = tree_map(lambda one: one * factor, gradients)
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.trainable_parameters(), self.optimizer.state)
        # Afterwards: evaluated along with the update it would add to the step's peak memory.
        if not finite.all_finite(self.model).item():
            rate = float(self.optimizer.learning_rate.item())
            raise finite.spoilt(self.model, totals, learning_rate=rate)
        return totals

    def _summed(
        self, gradients: Tree, terms: mx.array, prompts: int, tokens: int
    ) -> tuple[Tree, mx.array, int, int]:
        flat = tree_flatten(gradients)
        counts = mx.array([prompts, tokens], dtype=mx.float32)
        *arrays, terms, counts = self.ranks.sum([*(one for _, one in flat), terms, counts])
        names = [name for name, _ in flat]
        all_prompts, all_tokens = (int(one) for one in counts.tolist())
        summed = tree_unflatten(list(zip(names, arrays, strict=True)))
        return summed, terms, all_prompts, all_tokens


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
