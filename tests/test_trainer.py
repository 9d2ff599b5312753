"""The loop: determinism, exact accumulation, resume, best on validation, what moves."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx.utils import tree_flatten

from abft_mlx import adapters
from abft_mlx import recipe as recipes
from abft_mlx.errors import OutputError
from abft_mlx.events import OnUpdate
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.trainer import RunFolder, Trainer
from abft_mlx.trainer.batches import micro_batches, update_rows
from abft_mlx.trainer.step import Step

K = 3


def make_prompts(n=24, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        length = int(rng.integers(18, 60))
        tokens = tuple(int(t) for t in rng.integers(1, tiny_models.VOCABULARY, length))
        positions = tuple(sorted(int(p) for p in rng.choice(length - 1, K, replace=False)))
        labels = tuple(int(y) for y in rng.integers(0, 2, K))
        made.append(Prompt(tokens, positions, labels, int(rng.integers(0, 2)), (3,)))
    return made


def make_recipe(*changes):
    return recipes.resolve(
        recipes.default(
            [
                "training.updates=6",
                "training.prompts_per_update=8",
                "training.learning_rate=0.01",
                "training.checkpoint_every=2",
                "adapter.rank=4",
                "objective.filter=false",
                *changes,
            ]
        )
    )


def make_trainer(recipe, folder=None, name="llama", **options):
    model = tiny_models.build(name)
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    return Trainer(model, make_prompts(), recipe, folder=folder, **options)


def metrics(folder):
    """The lines of metrics.jsonl, without what no two runs have alike."""
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["peak_memory_bytes"]
    return lines


def trained(model):
    return {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def test_the_loss_falls_and_only_the_adapter_moves():
    updates = []
    recipe = make_recipe("training.updates=12", "objective.pid=false")
    trainer = make_trainer(recipe, events=OnUpdate(updates.append))
    before = {n: np.array(v) for n, v in tree_flatten(trainer.model.parameters())}
    trainer.run()
    after = {n: np.array(v) for n, v in tree_flatten(trainer.model.parameters())}
    moved = {name for name in after if not np.array_equal(after[name], before[name])}
    assert moved == {name for name in after if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}
    assert len(moved) == 2 * 2 * tiny_models.LAYERS
    assert updates[-1].loss < 0.97 * updates[0].loss
    assert [one.step for one in updates] == list(range(1, 13))
    assert updates[-1].seen_examples == 96


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_same_seed_same_adapter_bit_for_bit(name):
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(
            make_recipe(f"training.seed={seed}", "adapter.dropout=0.1"), name=name
        )
        trainer.run()
        runs.append(trained(trainer.model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_gradients_do_not_depend_on_the_cut(rows):
    trainer = make_trainer(make_recipe("objective.filter=true"))
    chosen = make_prompts()[:8]
    whole, terms = trainer.step.gradients(micro_batches(chosen, 8, bucket_tokens=64), 0.5)
    cut, cut_terms = trainer.step.gradients(micro_batches(chosen, rows, bucket_tokens=16), 0.5)
    assert terms[3].item() > 0
    np.testing.assert_allclose(cut_terms, terms, rtol=1e-5)
    kept = False
    for (name, one), (_, other) in zip(tree_flatten(whole), tree_flatten(cut), strict=True):
        scale = np.abs(np.array(one)).max()
        kept = kept or ("lora_b" in name and scale > 0)
        np.testing.assert_allclose(other, one, atol=1e-5 * max(scale, 1e-6))
    assert kept


def test_metrics_hold_the_contract_and_the_controllers_weights(folder):
    trainer = make_trainer(make_recipe(), folder)
    trainer.run()
    lines = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    assert list(lines[0]) == [
        "step", "seen_examples", "loss", "punish", "reward", "induction_heads", "A", "B",
        "learning_rate", "tokens", "seconds", "peak_memory_bytes",
    ]  # fmt: skip
    controller = PunishController(0.5)
    for line in lines:
        assert line["A"] == controller.punish_weight
        assert line["loss"] == pytest.approx(
            line["A"] * line["punish"] + line["B"] * line["reward"], rel=1e-5
        )
        controller.update(line["induction_heads"])
    wanted = [make_prompts()[row] for row in update_rows(24, 8, 5, 42)]
    assert lines[5]["tokens"] == sum(len(one.token_ids) for one in wanted)


class StopHereError(Exception):
    pass


@pytest.mark.parametrize(("stop_after", "kind"), [(2, "lora"), (3, "lora"), (5, "full")])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, stop_after, kind):
    changes = (
        f"adapter.kind={kind}",
        "adapter.dropout=0.2",
        "training.validate_every=2",
        "objective.filter=true",
    )

    def run(name, stop=None):
        folder = RunFolder(tmp_path / name)
        if not folder.path.exists():
            folder.create()
            resume = False
        else:
            resume = True

        def on_update(update):
            if update.step == stop:
                raise StopHereError

        trainer = make_trainer(
            make_recipe(*changes), folder, events=OnUpdate(on_update), fingerprint="x"
        )
        trainer.validate = lambda: float(np.array(trained_sum(trainer.model)) % 1)
        trainer.run(resume=resume)
        return trained(trainer.model), trainer.progress, metrics(folder)

    want, progress, lines = run("whole")
    assert len({one["A"] for one in lines}) > 2
    with pytest.raises(StopHereError):
        run("cut", stop=stop_after)
    got, resumed, resumed_lines = run("cut")
    assert same(got, want)
    assert resumed.validations == progress.validations
    assert resumed.best_update == progress.best_update
    assert resumed_lines == lines


def trained_sum(model):
    return sum(value.sum() for _, value in tree_flatten(model.trainable_parameters()))


def test_resume_refuses_another_run_and_an_empty_folder(folder):
    with pytest.raises(OutputError, match="no checkpoint to resume from"):
        make_trainer(make_recipe(), folder, fingerprint="a").run(resume=True)
    make_trainer(make_recipe(), folder, fingerprint="a").run()
    with pytest.raises(OutputError, match="another recipe, model, data or version"):
        make_trainer(make_recipe(), folder, fingerprint="b").run(resume=True)


@pytest.mark.parametrize("keep", [True, False])
def test_the_best_on_validation_is_kept(keep):
    recipe = make_recipe("training.validate_every=2", f"training.keep_best={str(keep).lower()}")
    accuracies = iter([0.1, 0.5, 0.9, 0.4])
    seen = []
    trainer = make_trainer(recipe, validate=lambda: next(accuracies))
    trainer.events = OnUpdate(lambda update: seen.append((update, trained(trainer.model))))
    progress = trainer.run()
    assert progress.validations == [(0, 0.1), (2, 0.5), (4, 0.9), (6, 0.4)]
    assert progress.best_update == 4
    assert [one.validation_accuracy for one, _ in seen] == [None, 0.5, None, 0.9, None, 0.4]
    assert same(trained(trainer.model), seen[3][1]) is keep
    assert same(trained(trainer.model), seen[5][1]) is not keep


def test_clipping_bounds_the_gradient():
    trainer = make_trainer(make_recipe())
    batches = micro_batches(make_prompts()[:8], 8)
    norm = trainer.step.update(batches, 0.5).gradient_norm
    clipped = make_trainer(make_recipe(f"training.max_gradient_norm={norm / 100}"))
    clipped.step.update(batches, 0.5)

    # Adam's second moment after one step is (1 - beta2) g².
    def second_moment(one):
        tree = tree_flatten(one.optimizer.state)
        return float(sum(v.sum() for n, v in tree if n.endswith(".v")))

    assert second_moment(clipped) == pytest.approx(second_moment(trainer) / 1e4, rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_draws_anew_in_every_call(compiled):
    trainer = make_trainer(make_recipe("adapter.dropout=0.5"))
    trainer.step = make_step(trainer, compiled)
    adapters.train_mode(trainer.model)
    batches = micro_batches(make_prompts()[:8], 8)
    # lora_b starts at zero, which would hide what dropout does to lora_a's side.
    trainer.step.update(batches, 0.5)

    def terms(seed):
        mx.random.seed(seed)
        return trainer.step.gradients(batches, 0.5)[1].tolist()

    assert terms(1) == terms(1)
    assert terms(1) != terms(2)
    mx.random.seed(1)
    twice = [trainer.step.gradients(batches, 0.5)[1].tolist() for _ in range(2)]
    assert twice[0] != twice[1]


def make_step(trainer, compiled):
    return Step(
        trainer.model, trainer.optimizer, reward_weight=1.0, use_filter=False, compiled=compiled
    )


def test_a_compiled_step_is_the_plain_one():
    trainers = [make_trainer(make_recipe()) for _ in range(2)]
    batches = micro_batches(make_prompts()[:8], 4)
    steps = [
        make_step(one, compiled) for one, compiled in zip(trainers, (True, False), strict=True)
    ]
    for _ in range(2):
        totals = [step.update(batches, 0.5) for step in steps]
        assert totals[0].loss == pytest.approx(totals[1].loss, rel=1e-5)
        assert totals[0].gradient_norm == pytest.approx(totals[1].gradient_norm, rel=1e-4)


def test_every_update_has_a_random_key_of_its_own():
    trainer = make_trainer(make_recipe())
    keys, original = [], trainer.step.gradients

    def gradients(*args):
        keys.append(tuple(mx.random.state[0].tolist()))
        return original(*args)

    trainer.step.gradients = gradients
    trainer.run()
    assert len(set(keys)) == 6
