"""One optimizer update of the same prompts, side by side: ours and mlx-lm's.

All start from the same random weights and take turns in one process.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from rich.table import Table

from abft_mlx import adapters, runtime
from abft_mlx.errors import UsageError
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.batches import micro_batches
from abft_mlx.trainer.step import Step

HEAD_DIM, CLASSES = 64, 4
PUNISH, REWARD = 0.5, 1.0  # A and B of equation 1
RANK, SCALE = 16, 2.0  # of every contender's LoRA
LEARNING_RATE = 1e-4
SHARED = 8  # prompts that share demonstrations, where they do

Update = Callable[[], float]
"""Makes one update of all of a size's prompts, waits for it, and gives its loss."""


@dataclass(frozen=True)
class Size:
    """A Llama with heads of 64 channels, and one update's prompts: B of T tokens with k."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 32_000
    prompts: int = 8
    tokens: int = 160
    demonstrations: int = 4

    def __str__(self) -> str:
        return (
            f"{self.layers}x{self.width}x{self.vocabulary}:"
            f"{self.prompts}x{self.tokens}k{self.demonstrations}"
        )

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a Llama of this size, as mlx-lm and transformers read it."""
        return {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": -(-8 * self.width // 3 // HEAD_DIM) * HEAD_DIM,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // HEAD_DIM,
            "num_key_value_heads": self.width // HEAD_DIM,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(2048, self.tokens),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        }


REFERENCE = Size()


def parse(text: str) -> Size:
    """A size as ``12x768x32000:8x160k4``: layers, width, vocabulary, prompts, tokens, k."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+)x(\d+)k(\d+)", text)
    size = Size(*map(int, match.groups())) if match else Size(layers=0)
    if min(size.layers, size.width, size.prompts, size.demonstrations) < 1 or size.width % HEAD_DIM:
        raise UsageError(
            f"size {text!r} is not like {REFERENCE}: layers x width x vocabulary : prompts x "
            f"tokens k demonstrations, numbers of at least 1, the width a multiple of {HEAD_DIM}"
        )
    if size.tokens < 4 * (size.demonstrations + 1) or size.vocabulary < 64:
        raise UsageError(
            f"size {text!r}: a prompt needs four tokens for each text, and a vocabulary 64 tokens"
        )
    return size


def default() -> Size:
    """The reference size, on a CPU with a third of its layers."""
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return REFERENCE if on_gpu else replace(REFERENCE, layers=REFERENCE.layers // 3)


def random_model(size: Size, dtype: mx.Dtype) -> nn.Module:
    """An evaluated Llama of random weights, always the same."""
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(size.config))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def random_prompts(size: Size, together: int = 1) -> list[Prompt]:
    """Prompts of exactly ``size.tokens`` random tokens, labels spread evenly over them.

    So many together, in a row, share everything up to the last label.
    """
    source = np.random.default_rng(0)
    k = size.demonstrations
    positions = tuple(((np.arange(k) + 1) * (size.tokens - 2) // (k + 1)).tolist())
    prompts = []
    for row in range(size.prompts):
        tokens = source.integers(CLASSES, size.vocabulary, size.tokens)
        drawn = source.integers(0, CLASSES, k)
        if row % together == 0:
            labels, beginning = drawn, tokens[: positions[-1]]
        gold = int(labels[source.integers(0, k)])
        tokens[: positions[-1]] = beginning
        tokens[list(positions)] = labels
        ids, demonstrations = tuple(tokens.tolist()), tuple(labels.tolist())
        prompts.append(Prompt(ids, positions, demonstrations, gold=gold, target=(gold,)))
    return prompts


def ours(size: Size, dtype: mx.Dtype, together: int = 1) -> Update:
    """Equation 1 by our step, with so many prompts that share their demonstrations."""
    model = random_model(size, dtype)
    adapters.attach(model, AdapterSection(kind="lora", rank=RANK, scale=SCALE))
    step = Step(
        model,
        optim.Adam(LEARNING_RATE, bias_correction=True),
        reward_weight=REWARD,
        use_filter=True,
    )
    together = math.gcd(together, size.prompts)
    prompts = random_prompts(size, together)
    batches = micro_batches(prompts, size.prompts, together=together, bucket_tokens=1)
    return lambda: step.update(batches, PUNISH).loss


def mlx_lm(size: Size, dtype: mx.Dtype) -> Update:
    """mlx-lm's LoRA trainer on the cross-entropy of the label token, on its default layers.

    Its loss, its LoRA layers, and value, gradient and update compiled as one, as its loop has it.
    """
    model = random_model(size, dtype)
    model.freeze()
    linear_to_lora_layers(model, size.layers, {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    optimizer = optim.Adam(LEARNING_RATE)
    optimizer.init(model.trainable_parameters())
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]
    tokens = mx.array([[*prompt.token_ids, prompt.gold] for prompt in random_prompts(size)])
    # The first and the last counted position of each row, as mlx-lm's batches have them.
    counted = mx.array([[size.tokens, size.tokens + 1]] * size.prompts)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, counted: mx.array) -> Any:
        (value, _), gradients = value_and_grad(model, tokens, counted)
        optimizer.update(model, gradients)
        return value

    model.train()

    def update() -> float:
        value = step(tokens, counted)
        mx.eval(state, value)
        return float(value.item())

    return update


CONTENDERS: dict[str, Callable[[Size, mx.Dtype], Update]] = {
    "ours-exact": ours,
    "ours-shared": partial(ours, together=SHARED),
    "mlx-lm-default": mlx_lm,
}


@dataclass(frozen=True)
class Row:
    """What one contender needs for one update of a size's prompts."""

    name: str
    seconds: float  # median of the repeats
    fastest_seconds: float
    slowest_seconds: float
    examples_per_second: float  # prompts / seconds
    peak_memory_bytes: int  # of model and second update, without the other contenders


def compare(
    size: Size,
    *,
    dtype: str = "float32",
    repeats: int = 5,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Row]:
    """Measure the contenders side by side: after warm-up each makes one update in every round."""
    updates: dict[str, Update] = {}
    peaks: dict[str, int] = {}
    for name, contender in CONTENDERS.items():
        on_stage(f"{size}: {name}, warming up")
        runtime.release_memory()
        others = mx.get_active_memory()
        updates[name] = contender(size, getattr(mx, dtype))
        updates[name]()
        peaks[name] = _peak(updates[name]) - others
    seconds: dict[str, list[float]] = {name: [] for name in updates}
    for number in range(repeats):
        on_stage(f"{size}: round {number + 1} of {repeats}")
        for place, (name, update) in enumerate(updates.items(), 1):
            start = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - start)
            on_progress(number * len(updates) + place, repeats * len(updates))
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = size.prompts / median
        rows.append(Row(name, median, min(times), max(times), rate, peaks[name]))
    return rows


def peak_here(size: Size, name: str, dtype: str) -> int:
    """MLX's peak memory, in bytes, of an update in this process, which holds nothing else."""
    update = CONTENDERS[name](size, getattr(mx, dtype))
    update()
    return _peak(update)


def _peak(update: Update) -> int:
    """MLX's peak while an update is made that has been made before."""
    runtime.release_memory()
    runtime.reset_peak_memory()
    update()
    return runtime.peak_memory_bytes()


def document(measured: Mapping[Size, Sequence[Row]], dtype: str) -> dict[str, Any]:
    """The bench JSON."""
    return {
        "schema": 1,
        "device": runtime.device_description(),
        "versions": runtime.versions(),
        "dtype": dtype,
        "sizes": [
            asdict(size) | {"rows": [asdict(row) for row in rows]}
            for size, rows in measured.items()
        ],
    }


def table(size: Size, rows: Sequence[Row]) -> Table:
    """Seconds, prompts per second and memory, each also as a multiple of our exact update's."""
    result = Table(
        box=None,
        pad_edge=False,
        title=(
            f"{size.layers} layers x {size.width}, {size.vocabulary:,} tokens of vocabulary, "
            f"{size.prompts} prompts of {size.tokens} tokens, k = {size.demonstrations}"
        ),
        title_justify="left",
    )
    for heading in ("", "seconds", "range", "prompts/s", "of exact", "peak", "of exact"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    exact = rows[0]
    for row in rows:
        result.add_row(
            row.name,
            f"{row.seconds:.3f}",
            f"{row.fastest_seconds:.2f}–{row.slowest_seconds:.2f}",
            f"{row.examples_per_second:.2f}",
            f"{row.seconds / exact.seconds:.2f}x",
            f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
            f"{row.peak_memory_bytes / exact.peak_memory_bytes:.2f}x",
        )
    return result
