"""The estimate that sizes micro-batches, against what a step really takes."""

import mlx.core as mx
import pytest
import tiny_models

from abft_mlx import adapters, runtime
from abft_mlx import recipe as recipes
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import Trainer, memory, plan

LENGTH = 64


def prompts(n):
    tokens = tuple(1 + i % (tiny_models.VOCABULARY - 1) for i in range(LENGTH))
    return [Prompt(tokens, (5, 9, 20, 33), (0, 1, 0, 1), 0, (3,))] * n


def trainer(*changes, **sizes):
    recipe = recipes.resolve(recipes.default(["adapter.rank=4", *changes]))
    sizes = sizes or {"hidden_size": 256, "intermediate_size": 1024}
    model = tiny_models.build("llama", **sizes)
    adapters.attach(model, recipe.adapter)
    return Trainer(model, prompts(32), recipe)


def peak(n, work):
    mx.clear_cache()
    runtime.reset_peak_memory()
    work(plan.micro_batches(prompts(n), n), 0.5)
    return runtime.peak_memory_bytes()


@pytest.mark.parametrize(
    ("setting", "backward", "layers"),
    [
        ("gradient=exact", "kept", 3),
        ("gradient_checkpointing=true", "checkpointing", 6),
        ("gradient=local", "local", 6),
    ],
)
def test_a_steps_peak_grows_as_estimated_within_a_factor_of_two(setting, backward, layers):
    one = trainer(
        f"training.{setting}",
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
    )
    assert memory.backward_of(one.recipe) == backward
    peak(4, one.step.gradients)
    measured = (peak(24, one.step.gradients) - peak(8, one.step.gradients)) / (16 * LENGTH)
    estimate = memory.bytes_per_token(one.model, backward)
    assert measured / 2 < estimate < measured * 2


LARGE = {"vocab_size": 40000, "hidden_size": 64, "intermediate_size": 128}
END_TO_END = ("objective.kind=end_to_end", "training.micro_batch_tokens=64")


def test_a_vocabulary_of_logits_is_accounted_for():
    """Measured as the difference that the vocabulary makes; the layers are the same."""

    def measured(vocabulary):
        one = trainer(*END_TO_END, **LARGE | {"vocab_size": vocabulary})
        peak(4, one.step.gradients)
        return (peak(24, one.step.gradients) - peak(8, one.step.gradients)) / 16

    def estimated(vocabulary):
        model = trainer(**LARGE | {"vocab_size": vocabulary}).model
        assert memory.bytes_per_prompt(model, "abft") == 0
        return memory.bytes_per_prompt(model, "end_to_end")

    grown = measured(200000) - measured(40000)
    assert grown / 2 < estimated(200000) - estimated(40000) < grown * 2


def test_a_heads_gradient_and_moments_are_accounted_for():
    one = trainer(*END_TO_END, "adapter.head=true", **LARGE)
    weights = sum(value.nbytes for value in _arrays(one.model))
    peak(1, one.step.update)
    extra = peak(1, one.step.update) - weights
    estimate = memory.training_bytes(one.model)
    assert estimate / 1.1 < extra < estimate * 1.1
    plain = trainer(*END_TO_END, **LARGE)
    assert memory.training_bytes(plain.model) < estimate / 100


def test_the_budget_shrinks_with_the_machine_and_keeps_a_floor(monkeypatch):
    model = trainer("adapter.head=true", **LARGE).model
    needed = memory.bytes_per_token(model)
    taken = sum(v.nbytes for v in _arrays(model)) + memory.training_bytes(model)

    def tokens(room, objective="abft"):
        total = int((taken + room) / memory.MEMORY_SHARE)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": total})
        return memory.micro_batch_tokens(model, LENGTH, objective)

    assert tokens(1000 * needed) == pytest.approx(1000, abs=2)
    per_prompt = memory.bytes_per_prompt(model, "end_to_end")
    room = 20 * (LENGTH * needed + per_prompt)
    assert tokens(room, "end_to_end") == pytest.approx(20 * LENGTH, abs=2)
    assert tokens(room) > 20 * LENGTH
    assert tokens(10**12) == memory.CPU_TOKENS
    assert tokens(-taken) == memory.SMALLEST_TOKENS


def test_the_trainer_says_what_it_trains(monkeypatch):
    """A machine with room for exactly eight of ABFT's prompts holds fewer with logits."""
    model = trainer(**LARGE).model
    taken = sum(v.nbytes for v in _arrays(model)) + memory.training_bytes(model)
    room = 8 * LENGTH * memory.bytes_per_token(model) + LENGTH
    total = int((taken + room) / memory.MEMORY_SHARE)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": total})
    assert trainer(**LARGE).rows == 8
    assert trainer("objective.kind=end_to_end", **LARGE).rows == 4


def test_a_recipe_may_fix_the_micro_batch():
    assert trainer("training.micro_batch_tokens=256").rows == 4
    assert trainer("training.micro_batch_tokens=1").rows == 1


def _arrays(model):
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]
