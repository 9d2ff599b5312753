"""What training and evaluation take of memory, from shapes alone: nothing is computed or loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from abft_mlx import activations, adapters, ports, read_out
from abft_mlx.errors import RecipeError
from abft_mlx.evaluation.forward import hidden_at_last
from abft_mlx.footprint.graph import trace
from abft_mlx.footprint.peak import peak_bytes
from abft_mlx.footprint.recomputed import marked, spelled_out
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.task import LEAST_AUTO
from abft_mlx.trainer import below, memory, plan
from abft_mlx.trainer.step import Step

Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a run, in bytes as ``mx.get_peak_memory`` counts them, and its parts.

    Attributes:
        parameters: numbers in the base model, quantized ones counted one by one.
        trainable_parameters: numbers that training can change.
        rows: prompts of one micro-batch (B).
        tokens: their padded length (T).
        micro_batches: of one update.
        evaluation_rows: prompts of one batch of an evaluation.
        weights_bytes: the base model.
        adapter_bytes: what training puts beside it; with full W_Q and W_K also the base's own,
            which are kept to be put back.
        moments_bytes: Adam's two moments.
        gradients_bytes: one gradient; two where an update has several micro-batches.
        activations_bytes: the rest of the peak: what the backward pass keeps, and temporaries.
        kept_hidden_bytes: hidden states below what trains that are kept in memory, at most.
        training_bytes: the sum of these parts.
        evaluation_bytes: peak of predicting labels with the adapter.
    """

    parameters: int
    trainable_parameters: int
    rows: int
    tokens: int
    micro_batches: int
    evaluation_rows: int
    weights_bytes: int
    adapter_bytes: int
    moments_bytes: int
    gradients_bytes: int
    activations_bytes: int
    kept_hidden_bytes: int
    training_bytes: int
    evaluation_bytes: int

    def as_dict(self) -> dict[str, int]:
        """The same as plain values."""
        return asdict(self)


def footprint(model: nn.Module, recipe: Recipe, length_tokens: int) -> Footprint:
    """Estimate what a recipe takes on a model.

    ``adapter.layers`` auto counts as all layers: which it will choose, only a census can say.

    The trainer's own step is traced for one micro-batch, and so are its optimizer step and a batch
    of an evaluation; what MLX would allocate and free is replayed. The model is left without an
    adapter.

    Args:
        model: a loaded model, or :func:`abft_mlx.loading.skeleton`'s, without an adapter.
        recipe: a resolved recipe; adapter, objective, training, evaluation and prompt are used.
        length_tokens: the longest prompt.

    Raises:
        AdapterError: the recipe's adapter cannot be put on this model.
        RecipeError: gradient checkpointing, whose graph MLX cannot export.
    """
    if recipe.training.gradient_checkpointing:
        raise RecipeError(
            "training.gradient_checkpointing true: MLX cannot describe what it computes, so its "
            "memory cannot be estimated; leave it out for the most that it can take, or measure a "
            "short run with --set training.updates=1"
        )
    parameters, weights = parameter_count(model), _bytes(model.parameters())
    section = recipe.adapter
    if section.layers == "auto":
        section = section.model_copy(update={"layers": None})
    adapters.place(model, section)
    if recipe.objective.kind == "read_out":
        heads = ports.head_counts(model)
        read_out.attach(model, {n: mx.zeros(count) for n, count in heads.items()})
    try:
        return _with_adapter(model, recipe, length_tokens, parameters, weights)
    finally:
        adapters.detach(model)


def _with_adapter(
    model: nn.Module, recipe: Recipe, length_tokens: int, parameters: int, weights: int
) -> Footprint:
    training, tokens = recipe.training, plan.padded_tokens(length_tokens)
    rows = memory.micro_batch_rows(model, recipe, length_tokens)
    micro_batches = -(-training.prompts_per_update // rows)
    trainable = _bytes(model.trainable_parameters())
    resident = _bytes(model.parameters()) + memory.kept_originals_bytes(model)
    if training.validate_every and training.keep_best:
        resident += trainable
    moments, gradients = 2 * trainable, trainable
    k = recipe.prompt.demonstrations
    # auto depends on texts, which are not read here.
    k = LEAST_AUTO if k == "auto" else k
    read = recipe.objective.kind == "read_out"
    step = Step(
        model,
        optim.Adam(1.0, bias_correction=True),
        reward_weight=recipe.objective.reward,
        use_filter=recipe.objective.filter,
        only_trained=recipe.objective.layers == "trained",
        objective=recipe.objective.kind,
        lm_head=recipe.objective.lm_head if read else 0.0,
        together=training.together,
        classes=k,
        gradient=training.gradient,
        compiled=False,
    )
    one = _prompt(length_tokens, k)
    batch = _training_batch(one, rows, training.together).arrays()
    adapters.train_mode(model)
    peak = resident + moments + _gradients_peak(step, batch)
    adapters.train_mode(model, False)
    if micro_batches > 1:
        gradients += trainable
        peak += trainable
    averaging, updating = _update_peaks(step)
    peak = max(peak, resident + moments + averaging, resident + updating)
    kept = _kept_bytes(model, recipe, length_tokens)
    evaluation = recipe.evaluation
    queries = evaluation.queries * evaluation.repeats
    seen = max(1, min(evaluation.batch_tokens // tokens, queries))
    batch = plan.micro_batches([one] * seen, seen)[0].arrays()
    return Footprint(
        parameters=parameters,
        trainable_parameters=adapters.trainable_parameters(model),
        rows=rows,
        tokens=tokens,
        micro_batches=micro_batches,
        evaluation_rows=seen,
        weights_bytes=weights,
        adapter_bytes=resident - weights,
        moments_bytes=moments,
        gradients_bytes=gradients,
        activations_bytes=peak - resident - moments - gradients,
        kept_hidden_bytes=kept,
        training_bytes=peak + kept,
        evaluation_bytes=resident + _evaluation_peak(model, batch),
    )


def _kept_bytes(model: nn.Module, recipe: Recipe, length_tokens: int) -> int:
    """Hidden states of all training prompts, as far as they may be in memory."""
    training = recipe.training
    if not training.keep_hidden or training.together > 1:
        return 0
    prompts = min(training.examples, training.updates * training.prompts_per_update)
    each = below.input_bytes(model, length_tokens)
    return min(prompts * each, memory.kept_bytes(model, recipe))


def parameter_count(model: nn.Module) -> int:
    """Numbers in a model's weights; a quantized weight counts as what it stands for.

    Args:
        model: a model, plain or quantized.
    """
    total = 0
    for _, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        own = dict(tree_flatten(module.parameters()))
        if "scales" in own:
            total += own.pop("weight").size * 32 // module.bits
            own = {name: value for name, value in own.items() if name not in ("scales", "biases")}
        total += sum(value.size for value in own.values())
    return total


def _bytes(tree: Any) -> int:
    return sum(one.nbytes for _, one in tree_flatten(tree))


def _prompt(length_tokens: int, demonstrations: int) -> Prompt:
    positions = tuple(range(min(demonstrations, length_tokens)))
    return Prompt((1,) * length_tokens, positions, (0,) * len(positions), 0, (1,))


def _training_batch(one: Prompt, rows: int, together: int) -> plan.MicroBatch:
    """Prompts as long as one; where some share demonstrations, all but the text of a query."""
    if together == 1:
        return plan.micro_batches([one] * rows, rows)[0]
    demonstrations = len(one.label_positions)
    shared = len(one.token_ids) * demonstrations // (demonstrations + 1)
    prompts = [
        replace(one, token_ids=one.token_ids[:shared] + (n,) * (len(one.token_ids) - shared))
        for n in range(together)
    ]
    groups = max(1, rows // together)
    return plan.shared_micro_batches(prompts * groups, together, groups * together)[0]


def _lazy(tree: Any) -> Arrays:
    """Stand-ins of the same shapes and types that are never evaluated."""
    return {name: mx.zeros(one.shape, one.dtype) for name, one in tree_flatten(tree)}


def _peak(
    function: Callable[..., Sequence[mx.array]],
    groups: Sequence[Arrays],
    dying: Sequence[int] = (),
    stages: Sequence[int] = (),
) -> int:
    """Peak of a function of dictionaries of arrays, beside those that outlive it.

    Args:
        function: takes as many dictionaries, gives a list of arrays.
        groups: its arguments; lazy arrays.
        dying: numbers of the arguments that nobody else holds: they count, and go when read last.
        stages: how many of the results are evaluated together; filled by the time that the
            function has run.
    """
    names = [(number, name) for number, group in enumerate(groups) for name in group]

    def flat(*arrays: mx.array) -> Sequence[mx.array]:
        given: list[Arrays] = [{} for _ in groups]
        for (number, name), one in zip(names, arrays, strict=True):
            given[number][name] = one
        return function(*given)

    graph = spelled_out(trace(flat, [one for group in groups for one in group.values()]))
    released = [place for place, (number, _) in enumerate(names) if number in dying]
    return peak_bytes(graph, dying=released, stages=stages)


def _gradients_peak(step: Step, batch: Arrays) -> int:
    model = step.model
    trained = [name for name, _ in tree_flatten(model.trainable_parameters())]
    settled: list[mx.array] = []
    stages: list[int] = []

    def settle(*trees: Any) -> None:
        arrays = [one for _, one in tree_flatten(trees)]
        settled.extend(arrays)
        stages.append(len(arrays))

    def function(parameters: Arrays, batch: Arrays, weight: Arrays) -> list[mx.array]:
        model.update(tree_unflatten(list(parameters.items())))
        chosen = tree_unflatten([(name, parameters[name]) for name in trained])
        terms, gradients = step.value_and_grad(chosen, batch, weight["A"])
        return [*settled, *(one for _, one in tree_flatten(gradients)), terms]

    whole = model.parameters()
    step.seams.settle, step.seams.again = settle, marked
    try:
        return _peak(function, [_lazy(whole), batch, {"A": mx.array(0.5)}], stages=stages)
    finally:
        model.update(whole)


def _update_peaks(step: Step) -> tuple[int, int]:
    """Peaks of averaging gradients, and of Adam's step with parameters and moments counted."""
    model, optimizer = step.model, step.optimizer
    shapes = _lazy(model.trainable_parameters())

    def average(gradients: Arrays) -> list[mx.array]:
        tree, norm = step.average(tree_unflatten(list(gradients.items())), 32)
        return [*(one for _, one in tree_flatten(tree)), norm]

    def apply(gradients: Arrays, parameters: Arrays, state: Arrays) -> list[mx.array]:
        optimizer.state = tree_unflatten(list(state.items()))
        changed = optimizer.apply_gradients(
            tree_unflatten(list(gradients.items())), tree_unflatten(list(parameters.items()))
        )
        return [one for _, one in (*tree_flatten(changed), *tree_flatten(optimizer.state))]

    state = _lazy(optimizer.state)
    averaging = _peak(average, [shapes], dying=(0,))
    trainable = sum(one.nbytes for one in shapes.values())
    # Parameters are in the model's own bytes already; they die here, so count them once.
    updating = _peak(apply, [shapes, dict(shapes), state], dying=(0, 1, 2)) - trainable
    return averaging, updating


def _evaluation_peak(model: nn.Module, batch: Arrays) -> int:
    def function(parameters: Arrays, batch: Arrays) -> list[mx.array]:
        model.update(tree_unflatten(list(parameters.items())))
        with activations.quickly(model, exportable=True):
            return [hidden_at_last(model, batch["tokens"], batch["last"])]

    whole = model.parameters()
    try:
        return _peak(function, [_lazy(whole), batch])
    finally:
        model.update(whole)
