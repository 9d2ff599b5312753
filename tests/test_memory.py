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
    return [Prompt(tokens, (5, 9, 20, 33), (0, 1, 0, 1), 0, 3)] * n


def trainer(*changes):
    recipe = recipes.resolve(recipes.default(["adapter.rank=4", *changes]))
    model = tiny_models.build("llama", hidden_size=256, intermediate_size=1024)
    adapters.attach(model, recipe.adapter)
    return Trainer(model, prompts(32), recipe)


def test_a_steps_peak_grows_as_estimated_within_a_factor_of_two():
    one = trainer()

    def peak(n):
        mx.clear_cache()
        runtime.reset_peak_memory()
        one.step.gradients(plan.micro_batches(prompts(n), n), 0.5)
        return runtime.peak_memory_bytes()

    peak(4)
    measured = (peak(24) - peak(8)) / (16 * LENGTH)
    estimate = memory.bytes_per_token(one.model, LENGTH)
    assert measured / 2 < estimate < measured * 2


def test_the_budget_shrinks_with_the_machine_and_keeps_a_floor(monkeypatch):
    model = trainer().model
    needed = memory.bytes_per_token(model, LENGTH)
    weights = sum(v.nbytes for v in _arrays(model))

    def tokens(room):
        total = int((weights + room) / memory.MEMORY_SHARE)
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": total})
        return memory.micro_batch_tokens(model, LENGTH)

    assert tokens(1000 * needed) == pytest.approx(1000, abs=2)
    assert tokens(10**12) == memory.CPU_TOKENS
    assert tokens(-weights) == memory.SMALLEST_TOKENS


def test_a_recipe_may_fix_the_micro_batch():
    assert trainer("training.micro_batch_tokens=256").rows == 4
    assert trainer("training.micro_batch_tokens=1").rows == 1


def _arrays(model):
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(model.parameters())]
