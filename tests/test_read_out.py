"""The label-attention read-out against NumPy, SciPy and PyTorch, and as a classifier in a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
import tiny_models
from cli_support import document, invoke
from mlx.utils import tree_flatten
from scipy.optimize import minimize
from test_prefix import prompts
from test_step_oracle import RANK, SCALE, hook_lora, lora_pair, relative
from test_trainer import same

from abft_mlx import (
    Classifier,
    adapters,
    attention,
    experiment,
    ports,
    prediction,
    read_out,
    recipe,
)
from abft_mlx.errors import StoppedError
from abft_mlx.events import OnUpdate
from abft_mlx.experiment import measuring
from abft_mlx.prompts import PromptBatch
from abft_mlx.recipe import AdapterSection
from abft_mlx.stopping import Stop
from abft_mlx.trainer import Update
from abft_mlx.trainer.batches import MicroBatch, micro_batches
from abft_mlx.trainer.step import Step

CLASSES = 3
WORDS = ("cat", "dog", "sun", "tea", "car", "man", "boy", "end", "toy")
SMALL = (
    "--set=objective.kind=read_out", "--set=training.updates=3", "--set=training.examples=32",
    "--set=training.prompts_per_update=16", "--set=training.validate_every=1",
    "--set=training.census_prompts=4", "--set=evaluation.bootstrap_samples=50",
    "--set=training.learning_rate=0.01", "--set=training.checkpoint_every=2",
)  # fmt: skip


def log_softmax(scores: np.ndarray) -> np.ndarray:
    moved = scores - scores.max(axis=1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(axis=1, keepdims=True))


def features(n: int = 48, heads: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log masses in which some heads know the gold class, and the gold classes."""
    source = np.random.default_rng(seed)
    gold = source.integers(0, CLASSES, n)
    right = np.eye(CLASSES)[gold][:, None, :] * np.linspace(-1, 2, heads)[:, None]
    return source.normal(size=(n, heads, CLASSES)) + right, gold


def test_fit_finds_the_minimum_that_scipy_finds() -> None:
    """By the definition in float64: centred, scaled, cross-entropy and an L2 penalty."""
    f, gold = features()
    groups = np.arange(len(gold)) // 16
    x = f - f.mean(axis=2, keepdims=True)
    for group in range(3):
        x[groups == group] -= x[groups == group].mean(axis=0)
    size = np.sqrt((x**2).mean(axis=(0, 2))) + 1e-3

    def loss(v: np.ndarray) -> float:
        scores = np.einsum("nhc,h->nc", x / size[:, None], v)
        return -log_softmax(scores)[np.arange(len(gold)), gold].mean() + 0.3 * v @ v

    expected = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x / size
    np.testing.assert_allclose(read_out.fit(f, gold, groups), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.05


def torch_scores(torch: Any, model: Any, batch: Any, weights: list[Any]) -> Any:
    """Centred scores of prompts in groups of two, one head and prompt at a time."""
    tokens = torch.tensor(np.array(batch.tokens).astype(np.int64))
    last = batch.last.tolist()
    mask = (torch.arange(tokens.shape[1]) <= torch.tensor(last)[:, None]).long()
    output = model(input_ids=tokens, attention_mask=mask, output_attentions=True, use_cache=False)
    scores = [[torch.zeros(()) for _ in range(CLASSES)] for _ in last]
    for pattern, layer_weights in zip(output.attentions, weights, strict=True):
        for b, end in enumerate(last):
            labels = batch.demonstration_labels[b].tolist()
            places = batch.label_positions[b].tolist()
            for head, weight in zip(pattern[b], layer_weights, strict=True):
                for c in range(CLASSES):
                    mass = sum(
                        (head[end, place] for place, label in zip(places, labels, strict=True)
                         if label == c), torch.zeros(()),
                    )  # fmt: skip
                    scores[b][c] = scores[b][c] + weight * torch.log(mass + 1e-3)
    table = torch.stack([torch.stack(row) for row in scores]).reshape(-1, 2, CLASSES)
    return (table - table.mean(dim=1, keepdim=True)).reshape(-1, CLASSES)


@pytest.mark.parametrize(("name", "lm_head"), [("llama", 0.0), ("gpt2", 0.0), ("qwen3", 0.5)])
def test_loss_and_gradients_equal_pytorchs(name: str, lm_head: float, tmp_path: Path) -> None:
    torch = tiny_models.torch()
    reference, model, batch = lora_pair(name, tmp_path)
    labels = mx.array([[0, 1, 2], [0, 1, 2], [2, 0, 1], [2, 0, 1]])
    batch = batch._replace(demonstration_labels=labels)
    source = np.random.default_rng(5)
    counts = ports.head_counts(model)
    read_out.attach(model, {n: source.normal(size=count) for n, count in counts.items()})
    theirs = hook_lora(reference, model)
    weights = [read_out.SPEED * theirs[f"read_out.heads.layer{n}"] for n in counts]
    gold = torch.tensor(batch.gold.tolist())
    expected = torch.nn.functional.cross_entropy(
        torch_scores(torch, reference, batch, weights), gold, reduction="sum"
    )
    target = [7, 90, 7, 31]
    if lm_head:
        tokens = torch.tensor(np.array(batch.tokens).astype(np.int64))
        mask = (torch.arange(tokens.shape[1]) <= torch.tensor(batch.last.tolist())[:, None]).long()
        logits = reference(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        at_last = torch.stack([logits[row, end] for row, end in enumerate(batch.last.tolist())])
        expected = expected + lm_head * torch.nn.functional.cross_entropy(
            at_last, torch.tensor(target), reduction="sum"
        )
    expected.backward()

    arrays = [np.array(one) for one in batch]
    padded = PromptBatch(*arrays, target=np.array(target)[:, None], rows=np.arange(4))
    step = Step(
        model, optim.Adam(1e-3), reward_weight=1.0, use_filter=True, objective="read_out",
        lm_head=lm_head, together=2, classes=CLASSES,
    )  # fmt: skip
    gradients, terms = step.gradients([MicroBatch(padded, np.ones(4, np.float32))], 0.5)
    found = dict(tree_flatten(adapters.mask_gradients(model, gradients)))
    assert terms[0].item() == pytest.approx(expected.item(), rel=1e-4)
    assert set(found) == set(theirs)
    masks = adapters.gradient_mask(model)
    for key, value in found.items():
        wanted = theirs[key].grad.numpy()
        if key in masks:
            wanted = wanted * np.array(masks[key])
        assert np.linalg.norm(wanted) > 1e-6, f"{key}: nothing to compare"
        assert relative(np.array(value), wanted) <= 2e-4, key


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(
        "finetune", "--model", model, "--data", texts, "--output", folder, *SMALL, "--json"
    )
    assert result.exit_code == 0, result.stderr
    return folder, document(result)


def test_predict_answers_with_centred_attention(trained: tuple[Path, dict[str, Any]]) -> None:
    """Each query's whole prompt by itself, in float64, by the definition."""
    folder, _ = trained
    predictor = prediction.prepare(recipe.load(folder), folder).predictor
    weights = mx.load(str(folder / read_out.FILE))
    assert isinstance(weights, dict)

    def scores(text: str) -> np.ndarray:
        (prompt,) = predictor.prompts_of([(text, 0)])
        tokens = np.array([prompt.token_ids])
        rows = attention.capture(predictor.model, tokens, np.array([prompt.last]))
        total = np.zeros(2)
        for layer, row in enumerate(rows):
            pattern = np.array(row, dtype=np.float64)[0]
            for c in range(2):
                places = [
                    place for place, label
                    in zip(prompt.label_positions, prompt.demonstration_labels, strict=True)
                    if label == c
                ]  # fmt: skip
                mass = np.log(pattern[:, places].sum(axis=1) + 1e-3)
                total[c] += np.array(weights[f"layer{layer}"], dtype=np.float64) @ mass
        return total

    others = ["the cat sat", "rain again", "a long walk", "tea", "good day", "no", "why", "yes ok"]
    predictor.calibrate(others)
    mean = log_softmax(np.stack([scores(one) for one in others])).mean(axis=0)
    asked = ["a lovely film", "what a dull and long film", "rain"]
    moved = np.stack([scores(one) for one in asked]) - mean
    expected = np.exp(log_softmax(moved / predictor.temperature))
    found = predictor.probabilities(predictor.prompts_of((one, 0) for one in asked))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_run_answers_alike_everywhere(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, said = trained
    measured = document(invoke("eval", folder, "--json"))
    assert measured["methods"] == said["methods"]
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\na dull film\n")
    lines = invoke("predict", moved, asked, "--quiet").stdout.splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert Classifier(adapter=moved).predict(["a lovely film", "a dull film"]).tolist() == labels
    base = measured["base"]["methods"]["vanilla"]["right"]
    (moved / read_out.FILE).unlink()
    without = document(invoke("eval", moved, "--json"))
    assert without["base"]["methods"]["vanilla"]["right"] == base


def test_resuming_gives_the_same_run(model: Path, texts: Path, tmp_path: Path) -> None:
    changes = [
        f"model={model}",
        f"data.source={texts}",
        *(one.removeprefix("--set=") for one in SMALL),
    ]
    made = recipe.own_data(changes)
    experiment.finetune(made, tmp_path / "whole")
    stop = Stop()

    def ask(update: Update) -> None:
        stop.number = 2 if update.step == 2 else None

    with pytest.raises(StoppedError):
        experiment.finetune(made, tmp_path / "cut", events=OnUpdate(ask), stop=stop)
    assert not (tmp_path / "cut" / read_out.FILE).exists()
    experiment.finetune(None, tmp_path / "cut")
    for name in ("adapters.safetensors", read_out.FILE):
        one, other = (dict(mx.load(str(tmp_path / run / name))) for run in ("whole", "cut"))
        assert same(one, other)


def test_head_weights_of_another_model_are_refused(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained[0], moved)
    mx.save_safetensors(str(moved / read_out.FILE), {"layer0": mx.zeros(99)})
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\n")
    result = invoke("predict", moved, asked)
    assert result.exit_code == 2
    assert read_out.FILE in result.stderr
    (moved / read_out.FILE).write_bytes(b"no tensors")
    assert invoke("predict", moved, asked).exit_code == 2


def test_a_model_that_cannot_share_gives_the_same_gradients(benchmark: Any) -> None:
    tiny: ModuleType = benchmark("tiny_configs")
    model = tiny.build("llama")
    adapters.attach(model, AdapterSection(rank=RANK, scale=SCALE), seed=3)
    counts = ports.head_counts(model)
    read_out.attach(model, {n: np.linspace(-1, 1, count) for n, count in counts.items()})
    step = Step(
        model, optim.Adam(1e-3), reward_weight=1.0, use_filter=True, objective="read_out",
        together=3, classes=2,
    )  # fmt: skip
    whole, _ = step.gradients(
        micro_batches(prompts(), 6, together=3, bucket_tokens=1, share=False), 0.5
    )
    behind, _ = step.gradients(micro_batches(prompts(), 6, together=3, bucket_tokens=1), 0.5)
    wanted = dict(tree_flatten(whole))
    for key, value in tree_flatten(behind):
        np.testing.assert_allclose(np.array(value), np.array(wanted[key]), rtol=1e-4, atol=1e-5)
    assert np.abs(np.array(wanted["read_out.heads.layer0"])).max() > 1e-3


def test_no_updates_only_fit_head_weights(model: Path, texts: Path, tmp_path: Path) -> None:
    small = [one for one in SMALL if "updates=" not in one]
    command = ("finetune", "--model", model, "--data", texts, *small)
    result = invoke(*command, "--updates", 0, "--output", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert document(result)["verdict"]["n"] > 0
    tensors: Any = mx.load(str(tmp_path / "run" / "adapters.safetensors"))
    assert not any(mx.any(one) for name, one in tensors.items() if name.endswith("lora_b"))
    weights: Any = mx.load(str(tmp_path / "run" / read_out.FILE))
    assert any(mx.any(one) for one in weights.values())
    lines = tmp_path / "asked.txt"
    lines.write_text("a lovely film\n")
    assert invoke("predict", tmp_path / "run", lines).exit_code == 0
    refused = invoke(
        *command, "--updates", 0, "--output", tmp_path / "other", "--set=objective.kind=abft"
    )
    assert refused.exit_code == 2
    assert "updates" in refused.stderr


@pytest.mark.parametrize("to", ["fused", "mlx"])
def test_exports_load_elsewhere_and_say_what_they_lack(
    to: str, trained: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """Stock mlx-lm gives what base + adapter gives; head weights stay behind."""
    folder, _ = trained
    target = tmp_path / "exported"
    result = invoke("export", folder, "--to", to, "--output", target)
    assert result.exit_code == 0, result.stderr
    assert "LM head" in result.stderr + result.stdout
    tokens = mx.array([[5, 9, 11, 3]])
    expected = mlx_lm.load(str(model), adapter_path=str(folder))[0](tokens)
    if to == "fused":
        found = mlx_lm.load(str(target))[0](tokens)
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4)
    if to == "mlx":
        found = mlx_lm.load(str(model), adapter_path=str(target))[0](tokens)
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-6)
    names = {one.name for one in target.iterdir()}
    assert (read_out.FILE in names) == (to == "mlx")


def test_other_demonstrations_are_centred_by_the_texts_that_are_asked(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = trained
    shown = tmp_path / "shown.csv"
    shown.write_text("text,label\nthe good tea,ham\nbuy it now,not spam\n")
    asked = [f"the {word} was here" for word in WORDS]
    lines = tmp_path / "asked.txt"
    lines.write_text("".join(f"{one}\n" for one in asked))
    result = invoke("predict", folder, lines, "--demonstrations", shown)
    assert result.exit_code == 0, result.stderr
    opened = prediction.prepare(recipe.load(folder), folder, str(shown)).predictor
    raw = np.log(opened.raw_probabilities(opened.prompts_of((one, 0) for one in asked)))
    moved = raw - raw.mean(axis=0)
    expected = np.exp(log_softmax(moved))[:, 0]
    found = [json.loads(line)["probabilities"]["ham"] for line in result.stdout.splitlines()]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_run_that_lost_against_prompting_answers_by_prompting(
    keep_best: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = invoke(
        "finetune", "demo", *SMALL, "--updates", 1, "--output", folder, "--json",
        "--set=training.learning_rate=30", "--set=training.validate_every=0",
        "--set=evaluation.demonstrations=classifier", "--set=evaluation.queries=64",
        "--set=data.validation_rows=64",
        f"--set=training.keep_best={str(keep_best).lower()}",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    chosen = json.loads((folder / "run.json").read_text())["classifier"]
    assert chosen == document(result)["classifier"]
    assert chosen["validation_accuracy"] < chosen["validation_prompting"]
    assert chosen["kept"] == ("prompting" if keep_best else "adapter")
    tensors: Any = mx.load(str(folder / "adapters.safetensors"))
    changed = any(mx.any(one) for name, one in tensors.items() if name.endswith("lora_b"))
    assert changed is not keep_best
    assert (folder / read_out.FILE).exists() is not keep_best
    measured = document(invoke("eval", folder, "--json"))
    ours, base = (part["methods"]["classifier"] for part in (measured, measured["base"]))
    assert (ours["right"] == base["right"]) is keep_best
    assert measured["methods"] == document(result)["methods"]


@pytest.mark.parametrize(("right", "other", "n", "expected"), [
    (0.75, 0.5, 4, False), (0.75, 0.5, 40, True), (0.5, 0.75, 40, False), (0.64, 0.62, 100, False),
    (0.64, 0.62, 10_000, True),
])  # fmt: skip
def test_one_more_right_answer_of_few_says_nothing(
    right: float, other: float, n: int, expected: bool
) -> None:
    assert measuring.clearly_better(right, other, n) is expected
