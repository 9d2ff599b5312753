"""What sizes micro-batches: the machine's memory, the recipe, and what training keeps."""

import mlx.core as mx
import pytest
import tiny_models

from abft_mlx import adapters, runtime
from abft_mlx import recipe as recipes
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import Trainer, memory
from abft_mlx.trainer.batches import micro_batches

LENGTH = 64
LARGE = {"vocab_size": 40000, "hidden_size": 64, "intermediate_size": 128}
END_TO_END = "objective.kind=end_to_end"


def trainer(*changes):
    recipe = recipes.resolve(recipes.default(["adapter.rank=4", *changes]))
    model = tiny_models.build("llama", **LARGE)
    adapters.attach(model, recipe.adapter)
    tokens = tuple(1 + i % (tiny_models.VOCABULARY - 1) for i in range(LENGTH))
    prompts = [Prompt(tokens, (5, 9, 20, 33), (0, 1, 0, 1), 0, (3,))] * 32
    return Trainer(model, prompts, recipe)


def test_a_heads_gradient_and_moments_are_accounted_for():
    one = trainer(END_TO_END, "adapter.head=true", "training.micro_batch_tokens=64")
    weights = memory.array_bytes(one.model.parameters())

    def update():
        mx.clear_cache()
        runtime.reset_peak_memory()
        one.step.update(micro_batches(one.prompts[:1], 1), 0.5)
        return runtime.peak_memory_bytes() - weights

    update()
    estimate = memory.training_bytes(one.model)
    assert estimate / 1.1 < update() < estimate * 1.1
    assert memory.training_bytes(trainer().model) < estimate / 100


@pytest.mark.parametrize(("changes", "rows"), [((), 8), ((END_TO_END,), 4)])
def test_rows_are_what_half_the_machine_holds(monkeypatch, changes, rows):
    """Room for eight of ABFT's prompts holds fewer with logits over a vocabulary."""
    one = trainer(*changes)
    assert one.rows == 32
    abft = trainer()
    needed = memory.activation_bytes(abft.model, abft.recipe, 8, LENGTH)[0]
    taken = memory.array_bytes(one.model.parameters()) + memory.training_bytes(one.model)
    total = int((taken + needed) / memory.MEMORY_SHARE) + 1
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": total})
    assert trainer(*changes).rows <= rows
    assert trainer().rows == 8
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 0})
    assert trainer(*changes).rows == 1


def test_a_recipe_may_fix_the_micro_batch():
    assert trainer("training.micro_batch_tokens=256").rows == 4
    assert trainer("training.micro_batch_tokens=1").rows == 1
