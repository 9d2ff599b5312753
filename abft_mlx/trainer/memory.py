"""How many prompts a micro-batch may have: estimated, measured if in doubt, halved at need.

MLX's CPU backend on Linux does not raise where memory runs out, but crashes, and macOS may end a
process: so what is doubtful is measured before the first update. Elsewhere an update whose
gradients did not fit is begun again with smaller micro-batches; nothing of it has been applied by
then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from abft_mlx import adapters, ports, runtime
from abft_mlx.errors import RunError
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import plan

# More tokens than these bring no speed: a CPU's caches are small, a GPU is busy by then.
CPU_TOKENS = 4096
GPU_TOKENS = 16384
SMALLEST_TOKENS = 256
MEMORY_SHARE = 0.5
# Of hidden states that are kept from update to update, beside that.
KEPT_SHARE = 0.25
# Rough estimates are right within this factor, either way.
ROUGHLY = 3
# What MLX counts is not all that a process takes, and prompts are not all alike.
ROOM_SHARE = 0.8

Backward = Literal["kept", "checkpointing", "local"]
"""Whether a backward pass finds what it needs, computes blocks again, or never leaves a block."""


def backward_of(recipe: Recipe) -> Backward:
    """The kind of backward pass that a recipe asks for."""
    if recipe.training.gradient == "local" and recipe.objective.kind == "abft":
        return "local"
    return "checkpointing" if recipe.training.gradient_checkpointing else "kept"


def bytes_per_token(model: nn.Module, backward: Backward = "kept") -> int:
    """Rough bytes that a step keeps per prompt token for the backward pass.

    Per layer: about ten arrays of the model's width, and two of the MLP's (taken as four times the
    width); the rest is computed again (:mod:`abft_mlx.recompute`). With gradient checkpointing
    that of one layer, and of every layer four arrays of the width: its input and what the
    adapter's gradients wait for. With local gradients that of one layer, and its input and output.
    """
    shapes = [shape for shape in ports.heads(model) if shape is not None]
    width = max(shape.n_heads * shape.head_dim for shape in shapes)
    per_layer = (10 + 8) * width
    if backward == "local":
        return 4 * (per_layer + 4 * width)
    if backward == "checkpointing":
        return 4 * (per_layer + 4 * width * len(shapes))
    return 4 * per_layer * len(shapes)


def bytes_per_prompt(model: nn.Module, objective: str) -> int:
    """Rough bytes that a step keeps per prompt whatever its length.

    Where the LM head takes part ("end_to_end") these are logits over the vocabulary at the last
    position, their exponentials and their gradient, all float32.
    """
    if objective != "end_to_end":
        return 0
    return 3 * 4 * ports.output_dims(ports.port_for(model).head(model))


def training_bytes(model: nn.Module) -> int:
    """Bytes that training keeps beside the model's parameters, whatever the batch.

    For every trainable number: Adam's two moments, its gradient, and while an update is worked
    out two more. Weights that train in full stand beside the base's own, which
    :func:`adapters.detach` needs.
    """
    trainable = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    return 5 * trainable + kept_originals_bytes(model)


def kept_originals_bytes(model: nn.Module) -> int:
    """Bytes of the base's own weights that an adapter in full stands for."""
    return sum(
        array.nbytes
        for layer in adapters.adapted(model).values()
        if isinstance(layer, adapters.FullLinear)
        for _, array in tree_flatten(layer.original.module.parameters())
    )


def micro_batch_tokens(
    model: nn.Module, longest_tokens: int, objective: str = "abft", backward: Backward = "kept"
) -> int:
    """Tokens of one micro-batch that fit beside the weights, padding included."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    room = max(0.0, _memory() * MEMORY_SHARE - _resident_bytes(model))
    per_token = bytes_per_token(model, backward)
    fitting = int(room / (per_token + bytes_per_prompt(model, objective) / longest_tokens))
    return max(SMALLEST_TOKENS, min(fitting, GPU_TOKENS if on_gpu else CPU_TOKENS))


def micro_batch_rows(model: nn.Module, recipe: Recipe, longest_tokens: int) -> int:
    """Prompts of one micro-batch: what the recipe says, or what fits this machine."""
    training = recipe.training
    budget = training.micro_batch_tokens
    if not isinstance(budget, int):
        objective = "end_to_end" if recipe.objective.lm_head else recipe.objective.kind
        budget = micro_batch_tokens(model, longest_tokens, objective, backward_of(recipe))
    return plan.rows_within(budget, longest_tokens, training.prompts_per_update, plan.BUCKET_TOKENS)


def kept_bytes(model: nn.Module, recipe: Recipe, processes: int = 1) -> int:
    """Bytes of hidden states that each process may keep in memory from update to update.

    That is what the recipe says, or a share of the machine's memory of their own, less what weights
    too large for the other share take of it.
    """
    if recipe.training.keep_hidden_bytes is not None:
        return recipe.training.keep_hidden_bytes
    memory = _memory()
    beyond = max(0.0, _resident_bytes(model) - memory * MEMORY_SHARE)
    return max(0, int(memory * KEPT_SHARE - beyond)) // processes


def _memory() -> int:
    """Bytes of the machine's memory that MLX may use."""
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size", runtime.machine_memory_bytes()))


def _resident_bytes(model: nn.Module) -> int:
    """Bytes of the weights and of what training keeps beside them."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return weights + training_bytes(model)


def peak_bytes(work: Callable[[], object]) -> int:
    """MLX's peak while some work is done, beside what was held before; counted anew from here."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    held = mx.get_active_memory()
    work()
    return runtime.peak_memory_bytes() - held


def words_of(error: Exception) -> str:
    """What MLX said where memory ran out; raises any other error again."""
    if not runtime.out_of_memory(error):
        raise error
    return str(error) or type(error).__name__


class Backoff:
    """How many prompts a micro-batch has, and what is done where they are too many.

    Args:
        rows: prompts of a micro-batch to begin with.
        smallest: the fewest that it can be cut into: 1, or those that share demonstrations.
        automatic: whether it may be cut.
        longest_tokens: longest prompt of the run, for messages.

    Attributes:
        rows: prompts of a micro-batch now.
    """

    def __init__(self, rows: int, smallest: int, automatic: bool, longest_tokens: int) -> None:
        self.rows = max(rows, smallest)
        self.smallest = smallest
        self.automatic = automatic
        self.longest_tokens = longest_tokens
        self._was: int | None = None
        self._why = ""

    def measure(self, peak_bytes: Callable[[int], int], room_bytes: int) -> None:
        """Take as many rows as fit, by the peaks of two small micro-batches.

        Args:
            peak_bytes: gives the peak of memory of so many of the longest prompts.
            room_bytes: what MLX may take beside what it holds.
        """
        room = int(room_bytes * ROOM_SHARE)
        rows, smallest = self.rows, self.smallest
        first = peak_bytes(smallest)
        # Twice the prompts take at most twice as much.
        if rows > smallest and 2 * first > room:
            rows = smallest
        elif rows > smallest:
            each = max(0, peak_bytes(2 * smallest) - first)
            while rows > smallest and first + each * (rows / smallest - 1) > room:
                rows //= 2
        if rows < self.rows:
            self._change(rows, f"{room_bytes / 1e9:.1f} GB of memory are left")

    def smaller(self, tried: int, words: str) -> None:
        """Halve the rows, because memory ran out.

        Args:
            tried: how many there were; fewer than ``rows`` in a small update.
            words: MLX's own.

        Raises:
            RunError: they cannot be halved, or must not.
        """
        if not self.automatic:
            raise RunError(
                f"memory ran out with {tried} prompts in a micro-batch ({words}); set "
                "training.micro_batch_tokens to auto, or lower it; the last checkpoint stays"
            )
        if tried <= self.smallest:
            self.fail(words)
        self._change(max(self.smallest, tried // 2), words)

    def fail(self, words: str) -> NoReturn:
        """End a run that fits in no pieces."""
        what = "a prompt" if self.smallest == 1 else f"{self.smallest} prompts"
        fewer = "" if self.smallest == 1 else "lower training.shared_demonstrations, "
        raise RunError(
            f"{what} of {self.longest_tokens} tokens cannot be trained on in the memory there is "
            f"({words}); {fewer}set training.gradient_checkpointing to true or training.gradient "
            "to local, take a 4-bit copy of the model, or fewer prompt.demonstrations; the last "
            "checkpoint stays"
        )

    def _change(self, rows: int, why: str) -> None:
        """Take other rows, and remember why for `news`."""
        self._was = self._was or self.rows
        self.rows, self._why = rows, why

    def news(self) -> str | None:
        """What has changed since this was last asked, in a line."""
        was, self._was = self._was, None
        if was is None:
            return None
        return f"{self.rows} prompts in a micro-batch instead of {was}: {self._why}"
