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
from cli_support import invoke
from mlx.utils import tree_flatten, tree_map
from test_trainer import make_prompts, make_recipe, metrics, same, trained

from abft_mlx import adapters
from abft_mlx.errors import RunError
from abft_mlx.events import OnUpdate
from abft_mlx.objective import PunishController
from abft_mlx.prompts import Prompt
from abft_mlx.recipe import Recipe
from abft_mlx.trainer import DivergedError, RunFolder, Trainer, Update
from abft_mlx.trainer.batches import micro_batches, update_rows
from abft_mlx.trainer.step import Step

BAD = tiny_models.VOCABULARY - 1
MODES = {
    "plain": (),
    "compiled": (),
    "recomputed": ("training.gradient_checkpointing=true",),
    "end to end": ("objective.kind=end_to_end",),
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
        rows = update_rows(24, 8, update, by_hand.recipe.training.seed)
        if 5 in rows:
            bad.append(update + 1)
            continue
        mx.random.seed(update << 32 | by_hand.recipe.training.seed)
        cut = micro_batches([by_hand.prompts[row] for row in rows], by_hand.rows)
        totals = by_hand.step.update(cut, controller.punish_weight)
        controller.update(totals.induction_heads)
    assert 2 <= len(bad) <= 3
    assert same(trained(run.model), trained(by_hand.model))
    states = [dict(tree_flatten(one.optimizer.state)) for one in (run, by_hand)]
    assert same(*({n: np.array(v) for n, v in one.items()} for one in states))
    assert run.controller == controller
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


def test_a_resumed_run_leaves_out_the_same(tmp_path: Path) -> None:
    class CutError(Exception):
        pass

    def cut(update: Update) -> None:
        if update.step == 5:
            raise CutError

    folder = RunFolder(tmp_path / "run")
    folder.create()
    whole = trainer_of("plain", "training.checkpoint_every=1")
    whole.run()
    first = trainer_of("plain", "training.checkpoint_every=1", folder=folder)
    first.events = OnUpdate(cut)
    with pytest.raises(CutError):
        first.run()
    second = trainer_of("plain", "training.checkpoint_every=1", folder=folder)
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


def test_a_few_in_a_row_end_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    run = trainer_of("plain", "training.non_finite_updates=3", folder=folder, poison=0.1)
    asked = spoil(run, {4, 5, 6, 7})
    kept = []
    run.events = OnUpdate(lambda _: kept.append(trained(run.model)))
    with pytest.raises(DivergedError) as caught:
        run.run()
    last = 6
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
    assert "(3 such updates in a row)" in message
    assert len(metrics(folder)) == last
    # The last checkpoint is of an update before them; the one that is due within them is not made.
    state = mx.load(str(folder.checkpoint_path / "state.safetensors"))
    assert same(
        {n.removeprefix("trainable/"): np.array(v) for n, v in state.items() if "trainable/" in n},
        kept[2],
    )


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
    assert len(metrics(folder)) == 2


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
