"""The classifier that a run ships: what is measured is what predict answers, without the CSV."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from cli_support import document, invoke
from sklearn.feature_extraction.text import TfidfVectorizer

from abft_mlx import Classifier, data, experiment, prediction, recipe
from abft_mlx.errors import RunError
from abft_mlx.evaluation import verdict

SMALL = (
    "--set=training.updates=2", "--set=training.examples=16", "--set=training.prompts_per_update=8",
    "--set=training.validate_every=1", "--set=training.census_prompts=0",
    "--set=evaluation.bootstrap_samples=50", "--set=training.learning_rate=0.02",
)  # fmt: skip


@pytest.fixture(scope="module")
def mail(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A copy of the texts that a test may remove."""
    path = tmp_path_factory.mktemp("mail") / "mail.csv"
    path.write_bytes(texts.read_bytes())
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, mail: Path) -> tuple[Path, dict]:
    """A run, and what finetune said of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke(
        "finetune", "--model", model, "--data", mail, "--output", folder, *SMALL, "--json"
    )
    assert result.exit_code == 0, result.stderr
    return folder, document(result)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_class_is_shown_equally_often(trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    shown = [json.loads(one) for one in (folder / "demonstrations.jsonl").read_text().splitlines()]
    labels = [one["label"] for one in shown]
    assert sorted(labels) == ["ham", "ham", "not spam", "not spam"]


def test_eval_of_a_run_measures_what_predict_answers(
    trained: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, said = trained
    measured = document(invoke("eval", "--adapter", folder, "--json"))
    assert measured["methods"] == said["methods"]
    assert measured["verdict"] == said["verdict"]
    assert json.loads((folder / "eval.json").read_text())["methods"] == measured["methods"]
    opened = recipe.load(folder)
    texts = data.load(opened.data)
    test = data.split(texts, opened.data).test
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": one}) + "\n" for one in test.texts))
    answers = invoke("predict", folder, asked, "--quiet").stdout.splitlines()
    right = [
        json.loads(line)["label"] == test.names[label]
        for line, label in zip(answers, test.labels, strict=True)
    ]
    method = measured["methods"]["classifier"]
    assert method["accuracy"] == pytest.approx(np.mean(right))
    assert method["right"] == "".join("01"[one] for one in right)
    assert measured["prompts"] == len(test)


def test_test_texts_are_neither_trained_on_nor_shown(
    trained: tuple[Path, dict], mail: Path
) -> None:
    folder, _ = trained
    opened = recipe.load(folder)
    parts = data.split(data.load(opened.data), opened.data)
    held = set(parts.test.texts)
    shown = {
        json.loads(one)["text"]
        for one in (folder / "demonstrations.jsonl").read_text().splitlines()
    }
    assert held
    assert not held & shown
    assert not held & set(parts.training.texts)
    assert len(held) <= len(rows_of(mail)) / 4


def test_a_run_predicts_without_its_texts_from_any_folder(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mail.csv").write_bytes(texts.read_bytes())
    monkeypatch.chdir(here)
    result = invoke("finetune", "--model", model, "--data", "mail.csv", "--output", "run", *SMALL)
    assert result.exit_code == 0, result.stderr
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\na dull film\n")
    before = invoke("predict", "run", asked, "--quiet")
    assert before.exit_code == 0, before.stderr
    (here / "mail.csv").unlink()
    gone = invoke("eval", "run")
    assert gone.exit_code == 2
    assert "--data" in gone.stderr
    there = tmp_path / "there"
    (here / "run").rename(tmp_path / "moved")
    there.mkdir()
    monkeypatch.chdir(there)
    after = invoke("predict", "../moved", asked, "--quiet")
    assert after.exit_code == 0, after.stderr
    assert after.stdout == before.stdout
    assert len(after.stdout.splitlines()) == 2
    classifier = Classifier(adapter="../moved")
    labels = [json.loads(line)["label"] for line in before.stdout.splitlines()]
    assert classifier.predict(["a lovely film", "a dull film"]).tolist() == labels


def test_other_labelled_texts_are_all_test_texts(
    trained: tuple[Path, dict], texts: Path, tmp_path: Path
) -> None:
    folder, _ = trained
    other = tmp_path / "other.csv"
    lines = texts.read_text().splitlines()
    other.write_text("\n".join([lines[0], *(f"{one}" for one in lines[1:31])]) + "\n")
    measured = document(invoke("eval", "--adapter", folder, "--data", other, "--json"))
    assert measured["prompts"] == 30
    assert measured["baselines"] == {}
    # The same for a run that does not know what it was trained on.
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved)
    facts = json.loads((saved / "run.json").read_text())
    del facts["data"]
    (saved / "run.json").write_text(json.dumps(facts))
    assert document(invoke("eval", saved, "--data", other, "--json"))["prompts"] == 30


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_facts_of_another_kind_are_one_line(
    command: str, trained: tuple[Path, dict], texts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (run / "run.json").write_text("[]")
    result = invoke(command, run, *([texts] if command == "predict" else []))
    assert result.exit_code == 2
    assert "run.json" in result.stderr
    assert "Error:" not in result.stderr


@pytest.mark.parametrize("change", ["a row more", "a larger test part", "another seed"])
def test_rows_that_were_trained_on_are_not_measured(
    change: str, model: Path, texts: Path, tmp_path: Path
) -> None:
    mail, folder = tmp_path / "mail.csv", tmp_path / "run"
    mail.write_bytes(texts.read_bytes())
    result = invoke(
        "finetune", "--model", model, "--data", mail, "--output", folder, *SMALL,
        "--set=data.test_rows=10",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    settings = []
    if change == "a row more":
        with mail.open("a", encoding="utf-8") as stream:
            stream.write("a lovely evening,ham\n")
    else:
        settings = ["--set", "data.test_rows=12" if "test" in change else "data.seed=1"]
    before = (folder / "eval.json").read_bytes()
    refused = invoke("eval", folder, *settings)
    assert refused.exit_code == 2
    assert "--data" in refused.stderr
    assert (folder / "eval.json").read_bytes() == before


def test_what_a_run_was_trained_with_is_not_silently_something_else(
    trained: tuple[Path, dict],
) -> None:
    folder, said = trained
    assert said["labels"] == ["ham", "not spam"]
    for command in (("eval", folder), ("predict", folder, "--show-prompt", "hello")):
        assert invoke(*command, "--label-words", "ham=ham").exit_code == 0
        for option, value in (
            ("--label-words", "ham=good"),
            ("--label-words", "letters"),
            ("--labels", "not spam,ham"),
        ):
            refused = invoke(*command, option, value)
            assert refused.exit_code == 2, (command, option)
            assert option in refused.stderr
    unused = invoke("predict", folder, "--data", "other.csv", "--quiet")
    assert "other.csv is not used" in unused.output
    shown = invoke("eval", folder, "--demonstrations", "6")
    assert "changes nothing" in shown.output
    # Repeats are no more texts, nor fewer.
    assert "there are only" not in invoke(
        "eval", folder, "--set=evaluation.repeats=2", "--set=evaluation.queries=10"
    ).output  # fmt: skip


def test_texts_may_hold_line_separators(model: Path, texts: Path, tmp_path: Path) -> None:
    mail = tmp_path / "mail.csv"
    mail.write_text(
        texts.read_text(encoding="utf-8").replace(" film", "\u2028film\x85\u2029"), encoding="utf-8"
    )
    folder = tmp_path / "run"
    made = invoke("finetune", "--model", model, "--data", mail, "--output", folder, *SMALL)
    assert made.exit_code == 0, made.stderr
    shown = prediction.Shipped.read(folder)
    assert shown is not None
    assert len(shown.demonstrations) == 4
    assert all("\u2028film\x85\u2029" in text for text, _ in shown.demonstrations)


def test_weights_that_are_not_finite_give_no_answers(
    trained: tuple[Path, dict], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    weights = folder / "adapters.safetensors"
    broken = {name: mx.full(one.shape, math.nan) for name, one in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), broken)
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\na dull film\n")
    for command in (
        ("predict", folder, asked),
        ("export", folder, "--to=mlx", "-o", tmp_path / "x"),
    ):
        result = invoke(*command)
        assert result.exit_code == 1, command
        assert "not finite" in result.stderr.splitlines()[-1]
        assert "NaN" not in result.stdout
    assert not (tmp_path / "x").exists()
    with pytest.raises(RunError, match="not finite"):
        Classifier(adapter=folder).predict(["a lovely film"])


def test_calibration_subtracts_the_mean_log_probability(trained: tuple[Path, dict]) -> None:
    folder, _ = trained
    opened = prediction.prepare(recipe.load(folder), folder)
    predictor = opened.predictor
    training = data.split(data.load(opened.recipe.data), opened.recipe.data).training
    shown = {text for text, _ in predictor.demonstrations}
    assert predictor.calibration is not None
    others = [one for one in training.texts if one not in shown]
    raw = np.log(predictor.raw_probabilities(predictor.prompts_of((t, 0) for t in others[:9])))
    predictor.calibrate(others[:9])
    np.testing.assert_allclose(predictor.calibration, raw.mean(axis=0), atol=1e-6)
    moved = (raw - raw.mean(axis=0)) / predictor.temperature
    expected = np.exp(moved) / np.exp(moved).sum(axis=1, keepdims=True)
    found = predictor.probabilities(predictor.prompts_of((t, 0) for t in others[:9]))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_best_of_several_sets_is_chosen(model: Path, mail: Path) -> None:
    changes = [f"model={model}", f"data.source={mail}", "prediction.draws=6"]
    opened = experiment.prepare(recipe.own_data(changes))
    predictor, best = experiment.choose(opened)
    pool, asked = opened.task.splits.training, opened.task.splits.validation
    gold = np.array(asked.labels)
    found = []
    for number in range(6):
        rows = data.balanced(pool.labels, 4, random.Random(f"42/{number}"))
        one = prediction.Predictor(
            opened.loaded.model, opened.task.builder, [pool.pairs()[row] for row in rows], 4096
        )
        texts = prediction.calibration_texts(pool, one, 32, 42)
        raw, others = (np.log(one.raw_of(some)) for some in (asked.texts, texts))
        centred = raw - np.concatenate([raw, others]).mean(axis=0)
        found += [(each.argmax(axis=1) == gold).mean() for each in (raw, centred)]
    assert best == pytest.approx(max(found))
    assert len(predictor.demonstrations) == 4


def test_nearest_shows_each_text_its_own_demonstrations(
    model: Path, mail: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = invoke(
        "finetune", "--model", model, "--data", mail, "--output", folder, *SMALL, "--json",
        "--set=prompt.selection=nearest", "--set=objective.kind=end_to_end",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    measured = document(invoke("eval", folder, "--json"))
    assert measured["methods"] == document(result)["methods"]
    predictor = prediction.prepare(recipe.load(folder), folder).predictor
    pool = [text for text, _ in predictor.demonstrations]
    assert len(pool) > measured["k"] == 4
    vectors = TfidfVectorizer(sublinear_tf=True).fit(pool)
    query = "a dull film with bad weather"
    similarity = (vectors.transform(pool) @ vectors.transform([query]).T).toarray()[:, 0]
    found = [pool.index(text) for text, _ in predictor.shown(query)]
    assert similarity[found].tolist() == pytest.approx(np.sort(similarity)[-4:].tolist())
    # A text that is among the demonstrations is not shown to itself.
    assert pool[3] not in [text for text, _ in predictor.shown(pool[3])]
    assert pool[3] not in [text for text, _ in predictor.shown(f"{pool[3].upper()}!")]
    prompt = invoke("predict", folder, "--show-prompt", query).stdout
    assert all(pool[row] in prompt for row in found)


def test_final_trains_on_every_row_and_gives_no_verdict(
    model: Path, mail: Path, tmp_path: Path
) -> None:
    result = invoke(
        "finetune", "--model", model, "--data", mail, "--output", tmp_path / "run", "--final",
        *SMALL, "--set=training.census_prompts=4", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "verdict" not in document(result)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (tmp_path / "run" / "heads.npz").is_file()
    assert run["data"]["rows"]["test"] == 0
    rows = run["data"]["rows"]
    assert rows["training"] + rows["validation"] == len(rows_of(mail))


def test_paper_means_random_demonstrations_and_whole_weights(
    model: Path, mail: Path, tmp_path: Path
) -> None:
    result = invoke(
        "finetune", "--model", model, "--data", mail, "--output", tmp_path / "run", "--paper",
        "--updates=1", "--set=training.examples=8", "--set=training.prompts_per_update=4",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    made = recipe.load(tmp_path / "run")
    assert made.prompt.selection == "random"
    assert made.prompt.demonstrations == 4
    assert (made.adapter.kind, made.training.learning_rate) == ("full", 2e-5)
    assert made.objective.kind == "abft"
    # What a user asks for beside it has the last word.
    assert made.training.updates == 1
    assert made.training.shared_demonstrations == 1


def test_twenty_rows_work(model: Path, texts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("\n".join(texts.read_text().splitlines()[:21]) + "\n")
    result = invoke(
        "finetune", "--model", model, "--data", few, "--output", tmp_path / "run", *SMALL, "--json"
    )
    assert result.exit_code == 0, result.stderr
    assert document(result)["verdict"]["n"] == 5


@pytest.mark.parametrize(
    ("after", "before", "simple", "prompting", "bag"),
    [
        ((90, 10), (60, 40), (70, 30), "better than", "better than"),
        ((61, 39), (60, 40), (90, 10), "not clearly different from", "worse than"),
        ((40, 60), (60, 40), (41, 59), "worse than", "not clearly different from"),
    ],
)
def test_the_verdict_follows_the_paired_test(
    after: tuple[int, int],
    before: tuple[int, int],
    simple: tuple[int, int],
    prompting: str,
    bag: str,
) -> None:
    def method(counts: tuple[int, int]) -> dict:
        right = "1" * counts[0] + "0" * counts[1]
        return {"accuracy": counts[0] / 100, "right": right, "confusion": [[30, 20], [5, 45]]}

    found = verdict(
        {
            "labels": ["a", "b"],
            "prompts": 100,
            "methods": {"classifier": method(after)},
            "base": {"methods": {"classifier": method(before)}},
            "baselines": {
                "majority": {"label": "a", "accuracy": 0.5},
                "bag_of_words": method(simple),
            },
        }
    )
    assert f"{prompting} prompting" in found["sentence"]
    assert f"{bag} bag of words" in found["sentence"]
    assert found["recall"] == {"a": 0.6, "b": 0.9}
