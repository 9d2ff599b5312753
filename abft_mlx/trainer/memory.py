"""How many prompts a micro-batch may have: estimated, measured if in doubt, halved at need.

MLX's CPU backend on Linux does not raise where memory runs out, but crashes, and macOS may end a
process: so what is doubtful is measured before the first update. Elsewhere an update whose
gradients did not fit is begun again with smaller micro-batches; nothing of it has been applied by
then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import adapters, ports, runtime
from abft_mlx.errors import RunError
from abft_mlx.recipe import Recipe
from abft_mlx.task import LEAST_AUTO
from abft_mlx.trainer import batches

# More tokens than these bring no speed: a CPU's caches are small, a GPU is busy by then.
CPU_TOKENS = 4096
GPU_TOKENS = 16384
MEMORY_SHARE = 0.5
# Layers whose arrays are alive although nothing keeps them: MLX allocates ahead of the device.
LAYERS_IN_FLIGHT = 2.2
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
# Estimates are trusted where they leave or lack more than this factor.
ROUGHLY = 3
# What MLX counts is not all that a process takes, and prompts are not all alike.
ROOM_SHARE = 0.8


def activation_bytes(model: nn.Module, recipe: Recipe, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes beside weights and gradients: of a micro-batch, and of one prompt's evaluation.

    Within 30% of the peaks that MLX measures on its CPU backend; docs/performance.md has the terms.

    Args:
        model: with its adapter, loaded or a skeleton.
        recipe: objective and training count.
        rows: prompts of the micro-batch.
        tokens: of each, padding counted.
    """
    objective, together = recipe.objective, recipe.training.together
    port, shapes = ports.port_for(model), [s for s in ports.heads(model) if s is not None]
    heads = max(shape.n_heads for shape in shapes)
    width = max(shape.n_heads * shape.head_dim for shape in shapes)
    types = [array.dtype for _, array in tree_flatten(model.parameters())]
    itemsize = min(dtype.size for dtype in types if mx.issubdtype(dtype, mx.floating))
    # Two arrays of the residual stream; LoRA makes float32 copies of what W_Q and W_K get.
    stream = (6 if recipe.adapter.kind == "lora" and itemsize < 4 else 2) * width
    args = getattr(model, "args", None)
    experts = max(getattr(args, name, None) or 1 for name in EXPERTS_PER_TOKEN)
    blocks, layers = port.blocks(model), []
    for block in blocks:
        weights = [m.weight for _, m in block.module.named_modules() if "weight" in m]
        outputs = [w.shape[-2] * (1 if w.ndim == 2 else experts) for w in weights if w.ndim > 1]
        layers.append(sum(outputs) + stream)
    trained = set(adapters.trained_layers(model))
    here = [n for n, block in enumerate(blocks) if trained & set(block.layers)]
    only_trained = objective.kind == "abft" and objective.layers == "trained"
    kept = layers[here[0] : here[-1] + 1 if only_trained else None]
    answers = objective.kind == "end_to_end" or objective.lm_head > 0
    if not answers:
        kept[-1] = 2 * width + stream  # of the last layer, queries and keys alone are used
    numbers: float = sum(kept)
    if recipe.training.gradient_checkpointing:  # of one block, and the input of each
        numbers = max(layers) + 2 * heads * tokens + 1.5 * width * len(kept)
    positions = rows * tokens
    if together > 1:  # shared demonstrations are all of a prompt but one text in k + 1
        k = LEAST_AUTO if recipe.prompt.demonstrations == "auto" else recipe.prompt.demonstrations
        positions = max(1, rows // together) * tokens * (k + together) // (k + 1)
    in_flight = LAYERS_IN_FLIGHT * max(layers)
    update = int(positions * (in_flight + numbers) * itemsize)
    if answers:  # float32 logits over the vocabulary, their exponentials and their gradient
        update += rows * 3 * 4 * ports.output_dims(port.head(model))
    return update, int(tokens * (in_flight + heads * tokens) * itemsize)


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def training_bytes(model: nn.Module) -> int:
    """Bytes that training keeps beside the model's parameters, whatever the batch.

    For every trainable number: Adam's two moments, its gradient, and while an update is worked
    out two more.
    """
    return 5 * array_bytes(model.trainable_parameters()) + originals_bytes(model)


def originals_bytes(model: nn.Module) -> int:
    """Bytes of the base's own W_Q and W_K, which stay beside those that train in full."""
    layers = adapters.adapted(model).values()
    full = [layer for layer in layers if isinstance(layer, adapters.FullLinear)]
    return sum(array_bytes(layer.original.module.parameters()) for layer in full)


def micro_batch_rows(model: nn.Module, recipe: Recipe, longest_tokens: int) -> int:
    """Prompts of one micro-batch, a power of two: what the recipe says, or what fits here."""
    training, tokens = recipe.training, batches.padded_tokens(longest_tokens)
    budget, room = training.micro_batch_tokens, None
    if not isinstance(budget, int):
        budget = GPU_TOKENS if mx.default_device() == mx.Device(mx.gpu) else CPU_TOKENS
        info = mx.device_info()
        memory = info.get("max_recommended_working_set_size", runtime.machine_memory_bytes())
        resident = array_bytes(model.parameters()) + training_bytes(model)
        room = int(memory) * MEMORY_SHARE - resident
    rows = 1
    while 2 * rows * tokens <= budget and 2 * rows <= training.prompts_per_update:
        if room is not None and activation_bytes(model, recipe, 2 * rows, tokens)[0] > room:
            break
        rows *= 2
    return rows


def peak_bytes(work: Callable[[], object]) -> int:
    """MLX's peak while some work is done, beside what was held before; counted anew from here."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    held = mx.get_active_memory()
    work()
    return runtime.peak_memory_bytes() - held


def message(error: Exception) -> str:
    """What MLX said where memory ran out; raises any other error again."""
    if not runtime.out_of_memory(error):
        raise error
    return str(error) or type(error).__name__


class Backoff:
    """How many prompts a micro-batch has, and fewer of them where memory is short.

    Args:
        model: with its adapter.
        recipe: a resolved recipe.
        longest_tokens: longest prompt of the run.

    Attributes:
        rows: prompts of a micro-batch now; at least those that share demonstrations.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, longest_tokens: int) -> None:
        self._model, self._recipe, self._longest = model, recipe, longest_tokens
        self._smallest = recipe.training.together
        self._automatic = recipe.training.micro_batch_tokens == "auto"
        self.rows = max(micro_batch_rows(model, recipe, longest_tokens), self._smallest)
        self._before = 0
        self._note: str | None = None

    def measure(self, peak_bytes: Callable[[int], int]) -> None:
        """Where the estimate leaves a doubt, take as many rows as the peak of one batch allows.

        Args:
            peak_bytes: gives the peak of memory of so many of the longest prompts.
        """
        room = runtime.memory_room_bytes() - training_bytes(self._model)
        left = f"{max(0, room) / 1e9:.1f} GB of memory are left"
        smallest, tokens = self._smallest, batches.padded_tokens(self._longest)
        most, least = (
            activation_bytes(self._model, self._recipe, rows, tokens)[0]
            for rows in (self.rows, smallest)
        )
        if not self._automatic or most * ROUGHLY < room:
            return
        if least > room * ROUGHLY:
            self._fail(left)
        try:
            peak = peak_bytes(smallest)
        except (RuntimeError, MemoryError) as error:
            self._fail(message(error))
        rows = self.rows
        # Twice the prompts take at most twice as much.
        while rows > smallest and peak * rows / smallest > room * ROOM_SHARE:
            rows = max(smallest, rows // 2)
        if rows < self.rows:
            self._change(rows, left)

    def halve(self, rows: int, why: str) -> None:
        """Halve the rows, because memory ran out.

        Args:
            rows: how many there were; fewer than ``self.rows`` in a small update.
            why: MLX's own message.

        Raises:
            RunError: they cannot be halved, or must not.
        """
        if not self._automatic:
            raise RunError(
                f"memory ran out with {rows} prompts in a micro-batch ({why}); set "
                "training.micro_batch_tokens to auto, or lower it; the last checkpoint stays"
            )
        if rows <= self._smallest:
            self._fail(why)
        self._change(max(self._smallest, rows // 2), why)

    def _fail(self, why: str) -> NoReturn:
        """End a run that fits in no pieces."""
        shared = self._smallest > 1
        what = f"{self._smallest} prompts" if shared else "a prompt"
        fewer = "lower training.shared_demonstrations, " if shared else ""
        raise RunError(
            f"{what} of {self._longest} tokens cannot be trained on in the memory there is "
            f"({why}); {fewer}set training.gradient_checkpointing to true, take a 4-bit copy of "
            "the model, or fewer prompt.demonstrations; the last checkpoint stays"
        )

    def _change(self, rows: int, why: str) -> None:
        self._before = self._before or self.rows
        self.rows = rows
        self._note = f"{rows} prompts in a micro-batch instead of {self._before}: {why}"

    def take_note(self) -> str | None:
        """What has changed since this was last asked, in a line."""
        note, self._note, self._before = self._note, None, 0
        return note
