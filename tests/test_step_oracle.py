"""The whole step, model + loss + gradient, against PyTorch on the same weights.

PyTorch runs transformers' model with eager attention, LoRA written by hand as forward hooks, and
equation 1 written from the paper; nothing of ours but the weights goes in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from abft_mlx import adapters, attention, ports
from abft_mlx.objective import abft_terms
from abft_mlx.prompts import PromptBatch
from abft_mlx.recipe import AdapterSection
from abft_mlx.trainer.batches import MicroBatch
from abft_mlx.trainer.step import Step

RELATIVE = 1e-4
SCALE, RANK = 3.0, 4
PUNISH, REWARD = 0.7, 1.3
K = 3


class Batch(NamedTuple):
    """Arrays of one update; label positions lie where heads look, so that some are kept."""

    tokens: mx.array
    last: mx.array
    label_positions: mx.array
    demonstration_labels: mx.array
    gold: mx.array


def batch_for(model: nn.Module) -> Batch:
    tokens, last = tiny_models.tokens(batch=4, length=32)
    rows = attention.capture(model, tokens, last)
    # The last layer counts most: a head of it must pass the filter for its weights to have a
    # gradient at all.
    seen = np.array(sum(3.0**layer * row.sum(axis=1) for layer, row in enumerate(rows)))
    seen[np.arange(len(seen)), np.array(last)] = 0
    positions = np.sort(np.argsort(-seen, axis=1)[:, :K], axis=1)
    # The last prompt's gold label is not among its demonstrations.
    labels = mx.array([[0, 1, 0], [1, 1, 0], [2, 0, 2], [0, 0, 1]])
    return Batch(tokens, last, mx.array(positions), labels, mx.array([0, 1, 2, 2]))


def randomize_lora(model: nn.Module) -> dict[str, np.ndarray]:
    """Give lora_b values, on W_Q and W_K only, and return every LoRA tensor by name."""
    masks = adapters.gradient_mask(model)
    key = mx.random.key(11)
    for path, module in adapters.adapted(model).items():
        if "lora_b" not in module:
            continue
        key, here = mx.random.split(key)
        noise = 0.1 * mx.random.normal(module.lora_b.shape, key=here)
        mask = masks.get(f"{path}.lora_b")
        module.lora_b = noise if mask is None else mx.where(mask, noise, 0)
    return {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}


def torch_name(path: str) -> str:
    """Our parameter path in transformers' model: GPT-2's stem has another name there."""
    return path.replace("model.h.", "transformer.h.")


def torch_loss(torch: Any, model: Any, batch: Batch, filtered: bool) -> tuple[Any, int]:
    """Equation 1 summed over prompts, layers and kept heads, one head at a time."""
    tokens = torch.tensor(np.array(batch.tokens).astype(np.int64))
    last = batch.last.tolist()
    mask = (torch.arange(tokens.shape[1]) <= torch.tensor(last)[:, None]).long()
    output = model(input_ids=tokens, attention_mask=mask, output_attentions=True, use_cache=False)
    loss, kept = torch.zeros(()), 0
    for layer in output.attentions:
        for b, end in enumerate(last):
            for head in layer[b]:
                positions = batch.label_positions[b].tolist()
                a = [head[end, position] for position in positions]
                if filtered and sum(a).item() <= K / (K + math.log(end + 1)):
                    continue
                kept += 1
                right = (batch.demonstration_labels[b] == batch.gold[b]).tolist()
                same = sum(x for x, r in zip(a, right, strict=True) if r)
                other = sum(x for x, r in zip(a, right, strict=True) if not r)
                loss = loss + PUNISH * other + REWARD * (1 - same)
    return loss, kept


def step(model: nn.Module, batch: Batch, filtered: bool) -> tuple[float, int, dict[str, mx.array]]:
    """Our loss, kept heads and masked gradients."""

    def loss(model: nn.Module, batch: Batch) -> tuple[mx.array, mx.array]:
        rows = attention.forward(model, batch.tokens, batch.last)[1]
        terms = abft_terms(
            rows,
            batch.label_positions,
            batch.demonstration_labels,
            batch.gold,
            batch.last,
            punish_weight=PUNISH,
            reward_weight=REWARD,
            use_filter=filtered,
        )
        return terms.loss, terms.induction_heads

    (value, heads), gradients = nn.value_and_grad(model, loss)(model, batch)
    gradients = adapters.mask_gradients(model, gradients)
    return value.item(), int(heads.item()), dict(tree_flatten(gradients))


def lora_pair(name: str, folder: Path, *, head: bool = False) -> tuple[Any, nn.Module, Batch]:
    """A reference, our model of the same weights with LoRA that does something, and a batch."""
    reference = tiny_models.reference(name).requires_grad_(False)
    model, _ = load_model(tiny_models.save_reference(reference, folder, name))
    batch = batch_for(model)
    adapters.attach(model, AdapterSection(rank=RANK, scale=SCALE, head=head), seed=3)
    randomize_lora(model)
    return reference, model, batch


def hook_lora(reference: Any, model: nn.Module) -> dict[str, Any]:
    """Give the reference our trainable weights, by name, as tensors that have a gradient."""
    torch = tiny_models.torch()
    theirs = {
        name: torch.tensor(np.array(value), requires_grad=True)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    for path in adapters.adapted(model):
        if f"{path}.lora_a" in theirs:
            a, b = theirs[f"{path}.lora_a"], theirs[f"{path}.lora_b"]
            reference.get_submodule(torch_name(path)).register_forward_hook(
                lambda _module, inputs, output, a=a, b=b: output + SCALE * (inputs[0] @ a @ b)
            )
    return theirs


def relative(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "all-heads"])
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_lora_step_equals_pytorch(name: str, filtered: bool, tmp_path: Path) -> None:
    torch = tiny_models.torch()
    reference, model, batch = lora_pair(name, tmp_path)
    theirs = hook_lora(reference, model)
    expected, expected_heads = torch_loss(torch, reference, batch, filtered)
    expected.backward()

    loss, heads, gradients = step(model, batch, filtered)
    total = len(batch.gold) * sum(shape.n_heads for shape in ports.heads(model) if shape)
    assert heads == expected_heads
    assert heads == total if not filtered else 0 < heads < total
    assert abs(loss - expected.item()) <= RELATIVE * abs(expected.item())
    assert set(gradients) == set(theirs)
    masks = adapters.gradient_mask(model)
    errors = {}
    for key, value in gradients.items():
        wanted = theirs[key].grad.numpy()
        if key in masks:
            # PyTorch's V columns have a gradient too: only W_Q's and W_K's are to agree.
            wanted = wanted * np.array(masks[key])
        assert np.linalg.norm(wanted) > 1e-5, f"{key}: nothing to compare"
        errors[key] = relative(np.array(value), wanted)
    print(f"{name}: {heads} of {total} heads, largest relative error {max(errors.values()):.1e}")
    assert max(errors.values()) <= RELATIVE, errors


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_full_step_equals_pytorch(name: str, tmp_path: Path) -> None:
    torch = tiny_models.torch()
    reference = tiny_models.reference(name)
    model, _ = load_model(tiny_models.save_reference(reference, tmp_path, name))
    batch = batch_for(model)
    adapters.attach(model, AdapterSection(kind="full"))
    expected, expected_heads = torch_loss(torch, reference, batch, filtered=True)
    expected.backward()

    loss, heads, gradients = step(model, batch, filtered=True)
    assert heads == expected_heads
    assert abs(loss - expected.item()) <= RELATIVE * abs(expected.item())
    assert len(gradients) == tiny_models.LAYERS * (1 if name == "gpt2" else 2)
    for key, value in gradients.items():
        wanted = reference.get_parameter(torch_name(key)).grad.numpy()
        if name == "gpt2":
            wanted = wanted.T  # transformers keeps it (inputs, outputs)
            wanted[2 * wanted.shape[1] :] = 0
        assert relative(np.array(value), wanted) <= RELATIVE, key


def micro_batch(batch: Batch, rows: list[int], weights: list[int]) -> MicroBatch:
    """Some of a batch's prompts; weight 0 marks one that only fills the shape."""
    tokens, last, positions, labels, gold = (np.array(array)[rows] for array in batch)
    padded = PromptBatch(tokens, last, positions, labels, gold, gold, np.array(rows))
    return MicroBatch(padded, np.array(weights, np.float32))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_three_updates_of_the_trainer_equal_pytorchs_adam(name: str, tmp_path: Path) -> None:
    """Micro-batches, averaging, V masked, Adam with bias correction: parameters after 3 updates."""
    torch = tiny_models.torch()
    reference, model, batch = lora_pair(name, tmp_path)
    theirs = hook_lora(reference, model)
    start = {key: value.detach().numpy().copy() for key, value in theirs.items()}
    masks = {key: torch.tensor(np.array(v)) for key, v in adapters.gradient_mask(model).items()}
    torch_optimizer = torch.optim.Adam(theirs.values(), lr=1e-3)
    ours = Step(
        model, optim.Adam(1e-3, bias_correction=True), reward_weight=REWARD, use_filter=False
    )
    cut = [micro_batch(batch, [0, 2, 3], [1, 1, 1]), micro_batch(batch, [1, 0, 0], [1, 0, 0])]
    mx.disable_compile()
    try:
        for _ in range(3):
            torch_optimizer.zero_grad()
            loss, _heads = torch_loss(torch, reference, batch, filtered=False)
            (loss / len(batch.gold)).backward()
            for key, mask in masks.items():
                theirs[key].grad *= mask
            norm = (
                torch.stack([value.grad.square().sum() for value in theirs.values()]).sum() ** 0.5
            )
            torch_optimizer.step()
            totals = ours.update(cut, PUNISH)
            assert abs(totals.loss - loss.item() / 4) <= RELATIVE * abs(loss.item() / 4)
            assert abs(totals.gradient_norm - norm.item()) <= RELATIVE * norm.item()
    finally:
        mx.enable_compile()
    for key, value in tree_flatten(model.trainable_parameters()):
        moved, expected = np.array(value) - start[key], theirs[key].detach().numpy() - start[key]
        assert relative(moved, expected) <= 1e-3, key
