"""End-to-end fine-tuning against PyTorch on the same weights, and through the whole trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten
from test_step_oracle import RELATIVE, Batch, hook_lora, lora_pair, relative
from test_trainer import make_prompts, make_recipe, same, trained

from abft_mlx import adapters, attention
from abft_mlx.events import OnUpdate
from abft_mlx.prompts import PromptBatch
from abft_mlx.trainer import RunFolder, Trainer
from abft_mlx.trainer.batches import MicroBatch, micro_batches
from abft_mlx.trainer.step import Step

TARGET = [7, 90, 7, 31]
HEAD = "lm_head.weight"
CASES = [("gpt2", False), ("llama", False), ("qwen3", True)]


class Pair:
    """One tiny model here and in PyTorch, with the same LoRA and, if asked for, a trained head."""

    def __init__(self, name: str, folder: Path, *, head: bool) -> None:
        self.torch = tiny_models.torch()
        self.reference, self.model, self.batch = lora_pair(name, folder, head=head)
        self.theirs = hook_lora(self.reference, self.model)
        self.start = {key: value.detach().numpy().copy() for key, value in self.theirs.items()}
        if head:
            weight = self.theirs[HEAD]
            self.reference.lm_head.register_forward_hook(
                lambda _module, inputs, _output: inputs[0] @ weight.T
            )
        self.masks = {
            key: self.torch.tensor(np.array(value))
            for key, value in adapters.gradient_mask(self.model).items()
        }

    def loss(self) -> Any:
        """Cross-entropy of the target tokens at the last positions, averaged over prompts."""
        torch, last = self.torch, self.batch.last.tolist()
        tokens = torch.tensor(np.array(self.batch.tokens).astype(np.int64))
        mask = (torch.arange(tokens.shape[1]) <= torch.tensor(last)[:, None]).long()
        logits = self.reference(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        at_last = torch.stack([logits[row, end] for row, end in enumerate(last)])
        return torch.nn.functional.cross_entropy(at_last, torch.tensor(TARGET))

    def step(self, rate: float = 1e-3, **options: Any) -> Step:
        optimizer = optim.Adam(rate, bias_correction=True)
        options = {"reward_weight": 1.3, "use_filter": False, "objective": "end_to_end"} | options
        return Step(self.model, optimizer, **options)


def micro_batch(batch: Batch, rows: list[int], weights: list[int]) -> MicroBatch:
    """Some of a batch's prompts; weight 0 marks one that only fills the shape."""
    arrays = [np.array(array)[rows] for array in batch]
    padded = PromptBatch(*arrays, target=np.array(TARGET)[rows, None], rows=np.array(rows))
    return MicroBatch(padded, np.array(weights, np.float32))


def cut(batch: Batch) -> list[MicroBatch]:
    return [micro_batch(batch, [0, 2, 3], [1, 1, 1]), micro_batch(batch, [1, 0, 0], [1, 0, 0])]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_loss_and_gradients_equal_pytorchs(name: str, head: bool, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path, head=head)
    expected = pair.loss()
    (4 * expected).backward()
    gradients, terms = pair.step().gradients(cut(pair.batch), punish_weight=0.7)
    gradients = dict(tree_flatten(adapters.mask_gradients(pair.model, gradients)))
    assert abs(terms[0].item() / 4 - expected.item()) <= RELATIVE * expected.item()
    assert set(gradients) == set(pair.theirs)
    assert (HEAD in gradients) is head
    for key, value in gradients.items():
        wanted = pair.theirs[key].grad
        if key in pair.masks:
            wanted = wanted * pair.masks[key]
        assert np.linalg.norm(wanted) > 1e-5, f"{key}: nothing to compare"
        assert relative(np.array(value), wanted.numpy()) <= RELATIVE, key


@pytest.mark.parametrize(("name", "head"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_three_updates_equal_pytorchs_adam(name: str, head: bool, tmp_path: Path) -> None:
    pair = Pair(name, tmp_path, head=head)
    theirs = pair.torch.optim.Adam(pair.theirs.values(), lr=1e-3)
    ours = pair.step()
    for _ in range(3):
        theirs.zero_grad()
        loss = pair.loss()
        loss.backward()
        for key, mask in pair.masks.items():
            pair.theirs[key].grad *= mask
        theirs.step()
        totals = ours.update(cut(pair.batch), 0.7)
        assert abs(totals.loss - loss.item()) <= RELATIVE * loss.item()
    for key, value in tree_flatten(pair.model.trainable_parameters()):
        moved = np.array(value) - pair.start[key]
        expected = pair.theirs[key].detach().numpy() - pair.start[key]
        assert relative(moved, expected) <= 1e-3, key


END_TO_END = ("objective.kind=end_to_end", "objective.filter=true", "adapter.head=true")


def make_trainer(
    *changes: str, folder: RunFolder | None = None, bits: int | None = None, **options: Any
) -> Trainer:
    recipe = make_recipe(*END_TO_END, *changes)
    model = tiny_models.build("llama")
    if bits is not None:
        tiny_models.nn.quantize(model, group_size=64, bits=bits)
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    return Trainer(model, make_prompts(), recipe, folder=folder, **options)


def test_the_target_goes_through_the_trainer() -> None:
    """All prompts of make_prompts want token 3: its probability must rise."""
    trainer = make_trainer("training.updates=12", "training.examples=24")
    seen: list[Any] = []
    trainer.events = OnUpdate(seen.append)
    arrays = micro_batches(make_prompts()[:5], 4)[1].arrays()
    assert arrays["target"].tolist() == [[3]] * 4

    def surprise() -> float:
        batch = micro_batches(make_prompts()[:8], 8)[0].arrays()
        logits = trainer.model(batch["tokens"])
        at_last = mx.take_along_axis(logits, batch["last"][:, None, None], axis=1)[:, 0]
        return float(-mx.log(mx.softmax(at_last, axis=1)[:, 3]).mean())

    before = surprise()
    progress = trainer.run()
    assert surprise() < before / 2
    assert progress.updates == 12
    assert seen[-1].loss < seen[0].loss / 2
    assert {(one.A, one.B) for one in seen} == {(0.0, 0.0)}
    assert all(one.induction_heads > 0 for one in seen)


class StopHereError(Exception):
    pass


def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path) -> None:
    def run(name: str, stop: int | None = None) -> dict[str, np.ndarray]:
        folder = RunFolder(tmp_path / name)
        resume = folder.path.exists()
        if not resume:
            folder.create()

        def on_update(update: Any) -> None:
            if update.step == stop:
                raise StopHereError

        trainer = make_trainer(
            "adapter.dropout=0.2",
            folder=folder,
            bits=4,
            events=OnUpdate(on_update),
            fingerprint="x",
        )
        trainer.run(resume=resume)
        return trained(trainer.model)

    whole = run("whole")
    with pytest.raises(StopHereError):
        run("cut", stop=3)
    assert same(run("cut"), whole)
    assert HEAD in whole


def test_abft_with_a_trainable_head_leaves_the_head_alone() -> None:
    """Equation 1 does not read the logits: the head's gradient is exactly zero."""
    recipe = make_recipe("adapter.head=true")
    model = tiny_models.build("llama")
    tokens, last = tiny_models.tokens()
    adapters.attach(model, recipe.adapter)
    before = np.array(model.lm_head.weight)
    rows = attention.capture(model, tokens, last)
    Trainer(model, make_prompts(), recipe).run()
    assert np.array_equal(before, np.array(model.lm_head.weight))
    moved = attention.capture(model, tokens, last)
    assert not mx.array_equal(rows[-1], moved[-1])
