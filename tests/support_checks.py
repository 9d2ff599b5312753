"""What is checked of one architecture, each against something that is not the code checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import tiny_configs
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from abft_mlx import adapters, attention, ports
from abft_mlx.adapters.lora import targets
from abft_mlx.recipe import AdapterSection

SEAM = attention.SEAM
IDS = [5, 90, 0, 5, 33]
RANK = 4


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Every call of mlx-lm's attention function, by replacing it in the modules that call it.

    And every softmax of square scores, of a model that has some attention by hand.
    """
    calls: list[dict[str, Any]] = []
    names = {type(module).__module__ for module in model.modules()} - {"mlx_lm.models.base"}
    found = [sys.modules[one] for one in sorted(names) if hasattr(sys.modules[one], SEAM)]
    found = found or [mx.fast]
    originals = [getattr(one, SEAM) for one in found]

    def recorder(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(
            queries: mx.array, keys: mx.array, values: mx.array, *rest: Any, **more: Any
        ) -> Any:
            more |= dict(zip(("cache", "scale", "mask", "sinks"), rest, strict=False))
            output = original(queries, keys, values, **more)
            calls.append({"q": queries, "k": keys, "v": values, "output": output, **more})
            return output

        return call

    softmax = mx.softmax

    def by_hand(scores: mx.array, *rest: Any, **more: Any) -> mx.array:
        output = softmax(scores, *rest, **more)
        if scores.ndim >= 4 and scores.shape[-1] == scores.shape[-2]:
            calls.append({"scores": scores, "output": output})
        return output

    for module, original in zip(found, originals, strict=True):
        setattr(module, SEAM, recorder(original))
    if ports.port_for(model).by_hand:
        mx.softmax = by_hand
    try:
        yield calls
    finally:
        mx.softmax = softmax
        for module, original in zip(found, originals, strict=True):
            setattr(module, SEAM, original)


def double(array: mx.array) -> np.ndarray:
    """An array as float64."""
    return np.array(array.astype(mx.float32), dtype=np.float64)


def patterns(call: dict[str, Any]) -> tuple[np.ndarray, float]:
    """The whole pattern (B, H, T, S) of one call in float64, and how well it gives the output."""
    if "scores" in call:
        scores = double(call["scores"])
        whole = np.exp(scores - scores.max(axis=-1, keepdims=True))
        pattern = whole / whole.sum(axis=-1, keepdims=True)
        error = float(np.abs(pattern - double(call["output"])).max())
        return pattern.reshape(len(pattern), -1, *pattern.shape[-2:]), error
    q, k, v = (double(call[name]) for name in "qkv")
    groups = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = q @ k.swapaxes(-1, -2) * float(call["scale"])
    T, S = scores.shape[-2:]
    mask = call.get("mask")
    if isinstance(mask, str):
        allowed = np.arange(S) <= np.arange(T)[:, None] + (S - T)
        scores = np.where(allowed, scores, -np.inf)
    elif mask is not None and mask.dtype == mx.bool_:
        scores = np.where(np.array(mask), scores, -np.inf)
    elif mask is not None:
        scores = scores + double(mask)
    sinks = call.get("sinks")
    extra = np.zeros((*scores.shape[:-1], 0))
    if sinks is not None:
        extra = np.broadcast_to(double(sinks)[None, :, None, None], (*scores.shape[:-1], 1))
    whole = np.concatenate([scores, extra], axis=-1)
    whole = np.exp(whole - whole.max(axis=-1, keepdims=True))
    pattern = (whole / whole.sum(axis=-1, keepdims=True))[..., :S]
    return pattern, float(np.abs(pattern @ v - double(call["output"])).max())


def furthest(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, none where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return float(np.where(one == other, 0.0, np.abs(one - other)).max())


def pattern_error(model: nn.Module) -> tuple[float, float]:
    """Largest error of our rows against float64 NumPy, and of NumPy's own output against MLX's."""
    tokens, last = tiny_configs.tokens()
    with recorded_calls(model) as calls:
        tiny_configs.logits(model, tokens)
    rows = [row for row in attention.capture(model, tokens, last) if row is not None]
    if len(rows) != len(calls):
        raise ValueError(f"{len(rows)} layers have rows, and {len(calls)} calls of attention")
    errors, outputs = [], []
    every = np.arange(len(tokens))
    for row, call in zip(rows, calls, strict=True):
        pattern, output = patterns(call)
        expected = pattern[every, :, np.array(last)]
        errors.append(float(np.abs(np.array(row) - expected).max()))
        outputs.append(output)
    return max(errors), max(outputs)


def padding_error(model: nn.Module) -> float:
    """Largest difference between rows of a right-padded batch and of its prompts alone."""
    tokens, last = tiny_configs.tokens()
    padded = attention.capture(model, tokens, last)
    error = 0.0
    for number, end in enumerate(np.array(last).tolist()):
        alone = attention.capture(model, tokens[number : number + 1, : end + 1], last[number:][:1])
        for one, other in zip(padded, alone, strict=True):
            if one is not None and other is not None:
                row = one[number, :, : end + 1]
                error = max(error, float(mx.abs(row - other[0]).max().item()))
    return error


def logit_error(model: nn.Module) -> float:
    """Largest difference between the port's logits of a few tokens and the model's own."""
    tokens, last = tiny_configs.tokens()
    port = ports.port_for(model)
    expected = tiny_configs.logits(model, tokens)
    hidden = port.hidden(model, tokens)
    whole = np.array(port.logits(model, hidden))
    few = np.array(port.logits(model, hidden[mx.arange(len(tokens)), last], IDS))
    at_last = expected[np.arange(len(tokens)), np.array(last)][:, IDS]
    return max(furthest(whole, expected), furthest(few, at_last))


def train(model: nn.Module, updates: int = 3) -> tuple[float, float]:
    """A few real updates of LoRA on W_Q and W_K: how far rows moved, and how far all else did."""
    tokens, last = tiny_configs.tokens()
    adapters.attach(model, AdapterSection(kind="lora", rank=RANK, scale=2.0), seed=0)
    before = _kept(model)
    optimizer = optim.Adam(1e-2, bias_correction=True)
    start = [row for row in attention.capture(model, tokens, last) if row is not None]
    mx.eval(start)

    def loss(model: nn.Module) -> mx.array:
        rows = attention.forward(model, tokens, last)[1]
        # Every third position, so that some lie in every window.
        some = mx.arange(tokens.shape[1]) % 3 == 0
        return mx.stack([(row * some).sum() for row in rows if row is not None]).sum()

    for _ in range(updates):
        _, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, adapters.mask_gradients(model, gradients))
        mx.eval(model.parameters(), optimizer.state)
    end = [row for row in attention.capture(model, tokens, last) if row is not None]
    moved = max(mx.abs(a - b).max().item() for a, b in zip(start, end, strict=True))
    after = _kept(model)
    kept = max((np.abs(before[name] - after[name]).max() for name in before), default=0.0)
    return moved, float(kept)


def _kept(model: nn.Module) -> dict[str, np.ndarray]:
    """What must not move: the base, and of fused projections' change what is no query or key."""
    port = ports.port_for(model)
    layers = port.layers(model)
    found = {
        name: double(value)
        for name, value in tree_flatten(model.parameters())
        if not name.endswith((".lora_a", ".lora_b"))
    }
    for target in targets(model):
        outputs = port.qk_outputs(layers[target.layer], target.projection)
        if outputs is not None and not outputs.all():
            lora = ports.resolve(model, target.path)
            change = np.array(lora.lora_a @ lora.lora_b)
            found[f"change of {target.path}"] = change[:, ~outputs]
    return found


def hook_error(model: nn.Module) -> float | None:
    """Hooks that change nothing must change nothing, and a block must go on from what it is given.

    Returns:
        Largest logit difference of a run whose last block was given the hidden states of another
        run's; None where the blocks read more than hidden states.
    """
    tokens, _ = tiny_configs.tokens()
    others, _ = tiny_configs.tokens(seed=2)
    expected = tiny_configs.logits(model, tokens)
    top = len(ports.port_for(model).blocks(model)) - 1
    inputs: dict[int, mx.array] = {}

    def before(block: int, hidden: mx.array) -> mx.array:
        inputs[block] = hidden
        return hidden

    with ports.hook_blocks(model, before, lambda _, hidden: hidden):
        same = tiny_configs.logits(model, tokens)
    if list(inputs) != list(range(top + 1)) or not np.array_equal(same, expected):
        raise ValueError(f"hooks saw blocks {list(inputs)}, or changed the logits")
    with ports.hook_blocks(model, lambda block, hidden: inputs[top] if block == top else hidden):
        error = furthest(tiny_configs.logits(model, others), expected)
    return None if error > 1e-3 else error


def reload_error(model: nn.Module, name: str, folder: Path) -> float:
    """Largest logit difference after stock mlx-lm put the saved adapter on the same base."""
    tokens, _ = tiny_configs.tokens()
    adapters.save(model, folder)
    fresh = tiny_configs.build(name)
    ours = tiny_configs.logits(model, tokens)
    if not furthest(ours, tiny_configs.logits(fresh, tokens)) > 0:
        raise ValueError("the adapter changes no logit")
    loaded = load_adapters(fresh, str(folder))
    loaded.eval()
    return furthest(ours, tiny_configs.logits(loaded, tokens))


def quantize(model: nn.Module) -> None:
    """4 bits for every layer whose width, and whose model, allows it."""
    allowed = getattr(model, "quant_predicate", None) or (lambda *_: True)
    nn.quantize(
        model,
        class_predicate=lambda path, m: (
            hasattr(m, "to_quantized")
            and m.weight.shape[-1] % 32 == 0
            and bool(allowed(path, m))
            and {"group_size": 32, "bits": 4}
        ),
    )
    mx.eval(model.parameters())
