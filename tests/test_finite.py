"""Updates that are not finite are left out, counted and, after a few in a row, end the run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from cli_support import document, invoke
from mlx.utils import tree_flatten, tree_map
from ranks_support import Job, job
from test_trainer import make_prompts, make_recipe, same, trained

from abft_mlx import adapters
from abft_mlx.errors import RunError
from abft_mlx.events import OnUpdate
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.tracking import report
from abft_mlx.trainer import DivergedError, RunFolder, Trainer, Update, plan
from abft_mlx.trainer.step import Step

__all__ = ["job"]  # a fixture
BAD = tiny_models.VOCABULARY - 1
MODES = {
    "plain": (),
    "compiled": (),
    "local": ("training.gradient=local",),
    "micro-batches": ("training.micro_batch_tokens=64",),
    "recomputed": ("training.gradient_checkpointing=true",),
    "end to end": ("objective.kind=end_to_end",),
    "in full": ("adapter.kind=full",),
    "kept": ("adapter.layers=[1]",),
}


def prompts(bad: int = 5) -> list[Prompt]:
    """24 prompts of which one holds the token BAD, which no other does."""
    made = []
    for number, one in enumerate(make_prompts()):
        tokens = [token % BAD for token in one.token_ids]
        if number == bad:
            tokens[7] = BAD
        made.append(dataclasses.replace(one, token_ids=tuple(tokens)))
    return made


def trainer_of(
    mode: str, *changes: str, folder: RunFolder | None = None, poison: float = math.nan
) -> Trainer:
    """A trainer whose model makes what is not finite of every prompt that holds BAD."""
    # What is computed again would drop other numbers.
    dropout = "adapter.dropout=0" if mode == "recomputed" else "adapter.dropout=0.1"
    recipe = make_recipe("training.updates=7", dropout, *MODES[mode], *changes)
    model = tiny_models.build("llama")
    weight = model.model.embed_tokens.weight
    weight[BAD] = poison
    adapters.attach(model, recipe.adapter, seed=recipe.training.seed)
    made = Trainer(model, prompts(), recipe, folder=folder)
    if mode == "compiled":
        made.step = compiled(made, recipe)
    return made


def compiled(trainer: Trainer, recipe: Recipe) -> Step:
    return Step(
        trainer.model,
        trainer.optimizer,
        reward_weight=trainer.reward_weight,
        use_filter=recipe.objective.filter,
        compiled=True,
    )


def rows_of(recipe: Recipe, update: int) -> list[int]:
    return plan.update_rows(24, 8, update, recipe.training.seed)


@pytest.mark.parametrize("mode", MODES)
def test_an_update_that_is_not_finite_is_left_out(mode: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    run = trainer_of(mode, folder=folder)
    progress = run.run()

    # The same by hand: only updates without the bad prompt, in the trainer's own order.
    by_hand = trainer_of(mode)
    adapters.train_mode(by_hand.model)
    controller = PunishController(by_hand.controller.punish_weight, by_hand.controller.enabled)
    bad = []
    for update in range(7):
        rows = rows_of(by_hand.recipe, update)
        if 5 in rows:
            bad.append(update + 1)
            continue
        mx.random.seed(update << 32 | by_hand.recipe.training.seed)
        cut = plan.micro_batches([by_hand.prompts[row] for row in rows], by_hand.rows)
        totals = by_hand.step.update(cut, controller.punish_weight)
        controller.update(totals.induction_heads)
    assert 2 <= len(bad) <= 3
    assert same(trained(run.model), trained(by_hand.model))
    states = [dict(tree_flatten(one.optimizer.state)) for one in (run, by_hand)]
    assert same(*({n: np.array(v) for n, v in one.items()} for one in states))
    assert run.controller.state() == controller.state()
    assert progress.skipped == len(bad)
    assert progress.updates == 7

    lines = [json.loads(one, parse_constant=pytest.fail) for one in
             folder.metrics_path.read_text().splitlines()]  # fmt: skip
    assert [one["step"] for one in lines] == list(range(1, 8))
    assert [one["step"] for one in lines if "skipped" in one] == bad
    for one in lines:
        measures = [one[name] for name in ("loss", "punish", "reward", "induction_heads")]
        if "skipped" in one:
            assert measures == [None] * 4
            assert "not both finite" in one["skipped"]
        else:
            assert None not in measures


@pytest.mark.parametrize("mode", ["plain", "local"])
def test_a_resumed_run_leaves_out_the_same(mode: str, tmp_path: Path) -> None:
    class CutError(Exception):
        pass

    def cut(update: Update) -> None:
        if update.step == 5:
            raise CutError

    folder = RunFolder(tmp_path / "run")
    folder.create()
    whole = trainer_of(mode, "training.checkpoint_every=1")
    whole.run()
    first = trainer_of(mode, "training.checkpoint_every=1", folder=folder)
    first.events = OnUpdate(cut)
    with pytest.raises(CutError):
        first.run()
    second = trainer_of(mode, "training.checkpoint_every=1", folder=folder)
    progress = second.run(resume=True)
    assert same(trained(second.model), trained(whole.model))
    assert (progress.skipped, progress.skipped_in_a_row) == (
        whole.progress.skipped,
        whole.progress.skipped_in_a_row,
    )
    assert first.progress.skipped > 0


def spoil(trainer: Trainer, updates: set[int]) -> list[int]:
    """Make the gradients of some updates infinite, their loss as it is; notes those asked."""
    asked: list[int] = []
    original = trainer.step.value_and_grad

    def run(*given: Any) -> tuple:
        terms, gradients = original(*given)
        asked.append(trainer.progress.updates + 1)
        if asked[-1] in updates:
            gradients = tree_map(lambda one: one + mx.inf, gradients)
        return terms, gradients

    trainer.step.value_and_grad = run
    return asked


@pytest.mark.parametrize("limit", [1, 3])
def test_a_few_in_a_row_end_the_run_with_a_diagnosis(limit: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    run = trainer_of("plain", f"training.non_finite_updates={limit}", folder=folder, poison=0.1)
    bad = {4, 5, 6, 7} if limit == 3 else {4}
    asked = spoil(run, bad)
    kept = []
    run.events = OnUpdate(lambda _: kept.append(trained(run.model)))
    with pytest.raises(DivergedError) as caught:
        run.run()
    last = 3 + limit
    assert set(asked) == set(range(1, last + 1))
    assert same(trained(run.model), kept[2])
    assert not same(kept[1], kept[2])
    sizes = {name: np.abs(one).max() for name, one in kept[2].items()}
    name = max(sizes, key=lambda one: sizes[one])
    message = str(caught.value)
    assert "\n" not in message
    assert re.match(rf"update {last}: loss \d+\.\d+, gradient norm (inf|nan): not both", message)
    assert f"largest trained weight {sizes[name]:.3g} ({name})" in message
    for part in ("learning rate 0.01,", "what the 3 others trained is kept", "lower training.lea"):
        assert part in message
    assert ("(3 such updates in a row)" in message) == (limit == 3)
    assert len(folder.metrics()) == last
    # The last checkpoint is of an update before them; the one that is due within them is not made.
    state = mx.load(str(folder.checkpoint_path / "state.safetensors"))
    assert same(
        {n.removeprefix("trainable/"): np.array(v) for n, v in state.items() if "trainable/" in n},
        kept[1] if limit == 1 else kept[2],
    )


def test_updates_that_are_finite_between_them_let_the_run_go_on() -> None:
    run = trainer_of("plain", poison=0.1)
    spoil(run, {1, 2, 4, 5, 7})
    progress = run.run()
    assert (progress.updates, progress.skipped, progress.skipped_in_a_row) == (7, 5, 1)


def test_a_run_of_nothing_but_such_updates_does_not_end_well() -> None:
    run = trainer_of("plain", "training.updates=2", poison=0.1)
    before = trained(run.model)
    spoil(run, {1, 2})
    with pytest.raises(DivergedError, match="nothing was trained"):
        run.run()
    assert same(trained(run.model), before)


def test_a_stopped_run_ends_with_the_best_on_validation() -> None:
    run = trainer_of("plain", "training.validate_every=1", poison=0.1)
    accuracies = iter([0.1, 0.9, 0.3, 0.2, 0.2, 0.2])
    run.validate = lambda: next(accuracies)
    spoil(run, {4, 5, 6})
    kept = []
    run.events = OnUpdate(lambda _: kept.append(trained(run.model)))
    with pytest.raises(DivergedError):
        run.run()
    assert same(trained(run.model), kept[0])
    assert not same(kept[0], kept[1])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    run = trainer_of("plain")
    before = trained(run.model)
    totals = run.step.update(plan.micro_batches(prompts()[4:7], 3), 0.5)
    assert not totals.finite
    assert same(trained(run.model), before)
    assert run.optimizer.step.item() == 0


def test_weights_that_an_update_spoils_end_the_run_before_they_are_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    run = trainer_of("plain", "training.checkpoint_every=1", folder=folder, poison=0.1)

    def updated(update: Update) -> None:
        if update.step == 2:
            run.optimizer.learning_rate = math.inf

    run.events = OnUpdate(updated)
    with pytest.raises(RunError, match=r"made model\.layers\.\S+ and \d+ other weights not finite"):
        run.run()
    state = mx.load(str(folder.checkpoint_path / "state.safetensors"))
    assert all(np.isfinite(np.array(one)).all() for one in state.values())
    assert len(folder.metrics()) == 2


def test_trackers_are_told_no_number_that_is_none() -> None:
    seen: list[Update] = []
    run = trainer_of("plain")
    run.events = OnUpdate(seen.append)
    run.run()
    told = {"skipped": 0, "applied": 0}
    for one in seen:
        facts = report(one)
        assert None not in facts.values()
        assert ("train_loss" in facts) == (one.skipped is None)
        told["applied" if one.skipped is None else "skipped"] += 1
    assert min(told.values()) > 0


SMALL = [
    "--set=objective.filter=false", "--set=training.updates=12", "--set=training.examples=24",
    "--set=training.prompts_per_update=2", "--set=prompt.demonstrations=2",
    "--set=training.learning_rate=0.01", "--set=training.shared_demonstrations=1",
    "--set=objective.kind=abft", "--set=training.validate_every=0",
    "--set=training.census_prompts=0", "--set=data.holdout=none",
]  # fmt: skip


def poison(folder: Path, words: str | None = None) -> Path:
    """Make one word's embedding NaN, or a weight of every prompt."""
    from transformers import AutoTokenizer

    weights = mx.load(str(folder / "model.safetensors"))
    if words is None:
        name, rows = "model.layers.0.self_attn.k_proj.weight", [0]
    else:
        ids = AutoTokenizer.from_pretrained(folder).encode(words)
        name, rows = "model.embed_tokens.weight", ids[-1:]
    changed = np.array(weights[name])
    changed[rows] = math.nan
    weights[name] = mx.array(changed)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    from cli_support import write_model

    return write_model(tmp_path / "own")


def finetune(model: Path, texts: Path, folder: Path, *more: str) -> list[object]:
    return ["finetune", "--model", model, "--data", texts, "--output", folder, *SMALL, *more]


def test_a_run_that_stops_keeps_the_adapter_it_had(
    own_model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    two = "--set=training.non_finite_updates=2"
    result = invoke(*finetune(poison(own_model, " music"), texts, folder, two))
    assert result.exit_code == 1
    (line,) = [one for one in result.stderr.splitlines() if one.startswith("error: ")]
    assert "Traceback" not in result.stderr
    assert "model.embed_tokens.weight of the model is not finite: take another copy" in line
    facts = json.loads((folder / "run.json").read_text())
    assert facts["finished"] is False
    assert line == f"error: {facts['stopped']}"
    updates = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all("skipped" in one for one in updates[-2:])
    assert "left out (loss nan" in result.stderr
    adapter = mx.load(str(folder / "adapters.safetensors"))
    assert all(np.isfinite(np.array(one)).all() for one in adapter.values())
    assert any(np.abs(np.array(v)).max() > 0 for n, v in adapter.items() if n.endswith("lora_b"))
    result = invoke("report", folder)
    assert result.exit_code == 0, result.stderr


def test_answers_that_are_not_finite_are_not_measured(
    own_model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    more = ("--set=training.non_finite_updates=9", "--set=data.holdout=stratified", "--quiet")
    result = invoke(*finetune(poison(own_model, " music"), texts, folder, *more))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()[-1:]
    assert "no finite probabilities" in line
    assert (folder / "adapters.safetensors").exists()
    result = invoke("eval", folder)
    assert result.exit_code == 1
    assert "no finite probabilities" in result.stderr


def test_a_model_that_is_broken_leaves_no_adapter(
    own_model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = invoke(*finetune(poison(own_model), texts, folder, "--quiet"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "layers.0.self_attn.k_proj.linear.weight of the model is not finite" in result.stderr
    assert "nothing was trained" in result.stderr
    assert not (folder / "adapters.safetensors").exists()


def test_ranks_leave_out_the_same_updates(
    own_model: Path, texts: Path, tmp_path: Path, checkout: Path, job: Job
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    words = ("--set=training.non_finite_updates=9", "--json")
    poison(own_model, " music")
    job.start(2, checkout / "cli.py", *finetune(own_model, texts, together, *words))
    result = invoke(*finetune(own_model, texts, alone, *words))
    assert result.exit_code == 0, result.stderr
    assert document(result)["updates"] == 12
    ended = [job.end(rank) for rank in range(2)]
    assert [status for status, _, _ in ended] == [0, 0], ended
    marks = [
        [json.loads(one).get("skipped") for one in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (alone, together)
    ]
    assert marks[0] == marks[1]
    left_out = sum(one is not None for one in marks[0])
    assert 0 < left_out < 12
    for folder in (alone, together):
        totals = json.loads((folder / "run.json").read_text())["totals"]
        assert totals["skipped_updates"] == left_out
    expected, found = (mx.load(str(f / "adapters.safetensors")) for f in (alone, together))
    for name, one in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(one), atol=1e-5, err_msg=name)
