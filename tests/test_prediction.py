"""Predictions equal stock mlx-lm's, in bounded memory; what a run ships is what eval measures."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import made_chats
import mlx.core as mx
import numpy as np
import pytest
import tiny_task
from cli_support import document, invoke
from sklearn.feature_extraction.text import TfidfVectorizer

from abft_mlx import Classifier, data, evaluation, experiment, prediction, recipe
from abft_mlx.errors import DataError, PromptError, RunError
from abft_mlx.evaluation import verdict
from abft_mlx.prediction import Predictor
from abft_mlx.prefix import Prefix
from abft_mlx.prompts import builder
from abft_mlx.task import Task

TEXTS = [text.replace("film", "movie") for text in tiny_task.texts(40, seed=3).texts]
SMALL = (
    "--set=training.updates=2", "--set=training.examples=16", "--set=training.prompts_per_update=8",
    "--set=training.validate_every=1", "--set=training.census_prompts=0",
    "--set=evaluation.bootstrap_samples=50", "--set=training.learning_rate=0.02",
)  # fmt: skip


def queries(texts: list[str]) -> list[data.Query]:
    return [data.Query(text, f"line {number}") for number, text in enumerate(texts, 1)]


def predictor(task: Task, batch_tokens: int = 512, model: str = "llama") -> Predictor:
    shown = task.splits.demonstrations.pairs()[: task.demonstrations]
    return Predictor(tiny_task.model(model), task.builder, shown, batch_tokens)


def flat(lists: Iterator[list[prediction.Prediction]]) -> list[prediction.Prediction]:
    return [one for some in lists for one in some]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_equal_to_whole_prompts_of_stock_mlx_lm(model: str, batch_tokens: int) -> None:
    task, stock = tiny_task.task(), tiny_task.model(model)
    made = predictor(task, batch_tokens, model)
    found = flat(made.predict([queries(TEXTS)]))
    assert [one.text for one in found] == TEXTS
    labels = mx.array(task.space.first_ids)
    for one in found:
        ids = task.tokenizer.encode(task.builder.text(made.demonstrations, one.text))
        expected = np.array(mx.softmax(stock(mx.array([ids]))[0, -1][labels]))
        np.testing.assert_allclose(list(one.probabilities.values()), expected, atol=1e-5)
        assert one.label == task.space.names[expected.argmax()]


def test_the_prefix_reaches_into_the_query_also_in_chats() -> None:
    made = predictor(tiny_task.task())
    assert made.builder.tokenizer.decode(made.prefix.token_ids).endswith("\ntext:")
    tokenizer = made_chats.CHATS["chatml"].tokenizer()
    task = tiny_task.task("prompt.chat=true", "prompt.label_words=auto", tokenizer=tokenizer)
    model = tiny_task.model(vocab_size=len(tokenizer))
    made = Predictor(model, task.builder, task.splits.demonstrations.pairs()[:3], 512)
    found = flat(made.predict([queries(TEXTS[:6])]))
    asked = [task.builder.build(made.demonstrations, text, 0) for text in TEXTS[:6]]
    expected = evaluation.label_probabilities(model, asked, task.space, batch_tokens=512)
    for one, row in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(one.probabilities.values()), row, atol=1e-5)
    assert len(made.prefix) > asked[0].label_positions[-1] + 3


def test_a_prefix_that_was_too_long_is_shortened() -> None:
    """Where a first letter of the texts is always a token of its own, and then it is not."""
    made = predictor(tiny_task.task())
    kept = made.prefix.token_ids
    asked = made.builder.build(made.demonstrations, TEXTS[0], 0).token_ids
    made.prefix = Prefix(tiny_task.model(), asked[: len(kept) + 1])
    texts = [TEXTS[0], next(one for one in TEXTS if one[0] != TEXTS[0][0])]
    found = flat(made.predict([queries(texts[:1]), queries(texts)]))
    assert made.prefix.token_ids == kept
    fresh = flat(predictor(tiny_task.task()).predict([queries(texts)]))
    for one, other in zip(found[1:], fresh, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_a_stream_without_end_is_answered_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "KEPT", 16)
    made, taken = predictor(tiny_task.task()), []

    def endless() -> Iterator[list[data.Query]]:
        for number in itertools.count():
            taken.append(number)
            yield [data.Query(f"music number {number}", f"line {number}")]

    answers = made.predict(endless())
    for number in range(40):
        assert next(answers)[0].text == f"music number {number}"
        assert len(taken) == number + 1
    answers = predictor(tiny_task.task(), batch_tokens=64).predict([queries(TEXTS)])
    first = next(answers)
    assert 0 < len(first) < len(TEXTS)
    assert [one.text for one in [*first, *flat(answers)]] == TEXTS


def test_a_bad_text_comes_after_the_answers_before_it() -> None:
    made = predictor(tiny_task.task(context_tokens=120))
    answers = made.predict([queries([*TEXTS[:3], "good bad " * 60, TEXTS[3]])])
    assert [one.text for one in next(answers)] == TEXTS[:3]
    with pytest.raises(PromptError, match=r"line 4 is \d+ tokens long and the model's context"):
        next(answers)
    with pytest.raises(PromptError, match="a prompt of the demonstrations is"):
        predictor(tiny_task.task(context_tokens=10))


def test_calibration_is_kept_only_where_labelled_texts_are_better_for_it() -> None:
    task = tiny_task.task()
    made, texts, kept = predictor(task), task.splits.training.texts[:20], set()
    for seed in range(6):
        source = np.random.default_rng(seed)
        gold = source.integers(0, 3, 12)
        labelled = list(zip(source.permutation(TEXTS)[:12].tolist(), gold.tolist(), strict=True))
        raw = np.log(made.raw_probabilities(made.prompts_of(labelled)))
        centred = raw - np.concatenate([np.log(made.raw_of(texts)), raw]).mean(axis=0)
        centred -= np.log(np.exp(centred).sum(axis=1, keepdims=True))
        qualities = [
            ((one.argmax(axis=1) == gold).mean(), one[np.arange(12), gold].mean())
            for one in (raw, centred)
        ]
        assert prediction.settle(made, texts, labelled) == pytest.approx(max(qualities))
        assert (made.calibration is not None) == (qualities[1] >= qualities[0])
        kept.add(made.calibration is not None)
    assert kept == {True, False}


def test_given_demonstrations(tmp_path: Path) -> None:
    path = tmp_path / "shown.csv"
    path.write_text("text,label\nthe roof burns,urgent\na chair stands,routine\n", encoding="utf-8")
    named = recipe.load("generated/urgency")
    opened = prediction.prepare(named, demonstrations=str(path))
    assert opened.shown() == [
        {"text": "the roof burns", "label": "urgent"},
        {"text": "a chair stands", "label": "routine"},
    ]
    assert (opened.source, opened.missing()) == (str(path), [])
    path.write_text("text,label\nthe roof burns,urgnt\na chair stands,routine\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'urgnt' is not one of urgent, routine"):
        prediction.prepare(named, demonstrations=str(path))


def finetuned(model: Path, source: Path, folder: Path, *more: str) -> dict:
    """What finetune said of a run."""
    words = ("--model", model, "--data", source, "--output", folder, *SMALL, *more, "--json")
    result = invoke("finetune", *words)
    assert result.exit_code == 0, result.stderr
    return document(result)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path
) -> tuple[Path, dict]:
    """A run, and what finetune said of it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, finetuned(model, texts, folder)


@pytest.fixture
def run(trained: tuple[Path, dict], tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def test_eval_of_a_run_measures_what_predict_answers(
    trained: tuple[Path, dict], tmp_path: Path
) -> None:
    folder, said = trained
    measured = document(invoke("eval", "--adapter", folder, "--json"))
    assert measured["methods"] == said["methods"]
    assert measured["verdict"] == said["verdict"]
    opened = recipe.load(folder)
    parts = data.split(data.load(opened.data), opened.data)
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"text": one}) + "\n" for one in parts.test.texts))
    answers = invoke("predict", folder, asked, "--quiet").stdout.splitlines()
    right = [
        json.loads(line)["label"] == parts.test.names[label]
        for line, label in zip(answers, parts.test.labels, strict=True)
    ]
    method = measured["methods"]["classifier"]
    assert method["accuracy"] == pytest.approx(np.mean(right))
    assert method["right"] == "".join(str(int(one)) for one in right)
    # Every class is shown equally often, and test texts are neither trained on nor shown.
    shipped = prediction.Shipped.read(folder)
    assert shipped is not None
    assert sorted(label for _, label in shipped.demonstrations) == [0, 0, 1, 1]
    others = {text for text, _ in shipped.demonstrations} | set(parts.training.texts)
    assert not others & set(parts.test.texts)


def test_a_run_predicts_without_its_texts_from_any_folder(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    # Texts may hold what Python takes for the end of a line.
    content = texts.read_text(encoding="utf-8").replace(" film", "\u2028film\x85\u2029")
    (here / "mail.csv").write_text(content, encoding="utf-8")
    monkeypatch.chdir(here)
    finetuned(model, Path("mail.csv"), Path("run"))
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\na dull film\n")
    before = invoke("predict", "run", asked, "--quiet")
    (here / "mail.csv").unlink()
    gone = invoke("eval", "run")
    assert gone.exit_code == 2
    assert "--data" in gone.stderr
    (here / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(there)
    after = invoke("predict", "../moved", asked, "--quiet")
    assert after.exit_code == 0, after.stderr
    assert after.stdout == before.stdout
    labels = [json.loads(line)["label"] for line in before.stdout.splitlines()]
    assert (
        Classifier(adapter="../moved").predict(["a lovely film", "a dull film"]).tolist() == labels
    )


def test_other_labelled_texts_are_all_test_texts(run: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("\n".join(texts.read_text().splitlines()[:31]) + "\n")
    measured = document(invoke("eval", "--adapter", run, "--data", other, "--json"))
    assert (measured["prompts"], measured["baselines"]) == (30, {})
    # The same for a run that does not know what it was trained on.
    facts = json.loads((run / "run.json").read_text())
    del facts["data"]
    (run / "run.json").write_text(json.dumps(facts))
    assert document(invoke("eval", run, "--data", other, "--json"))["prompts"] == 30
    (run / "run.json").write_text("[]")
    for words in (("eval", run), ("predict", run, texts)):
        result = invoke(*words)
        assert result.exit_code == 2
        assert "run.json" in result.stderr


@pytest.mark.parametrize("change", ["a row more", "data.test_rows=12"])
def test_rows_that_were_trained_on_are_not_measured(
    change: str, model: Path, texts: Path, tmp_path: Path
) -> None:
    mail, folder = tmp_path / "mail.csv", tmp_path / "run"
    mail.write_bytes(texts.read_bytes())
    finetuned(model, mail, folder, "--set=data.test_rows=10")
    settings = [] if change == "a row more" else ["--set", change]
    if not settings:
        mail.write_text(mail.read_text(encoding="utf-8") + "a lovely evening,ham\n", "utf-8")
    refused = invoke("eval", folder, *settings)
    assert refused.exit_code == 2
    assert "--data" in refused.stderr


def test_what_a_run_was_trained_with_is_not_silently_something_else(run: Path) -> None:
    for command in (("eval", run), ("predict", run, "--show-prompt", "hello")):
        assert invoke(*command, "--label-words", "ham=ham").exit_code == 0
        for option, value in (("--label-words", "ham=good"), ("--labels", "not spam,ham")):
            refused = invoke(*command, option, value)
            assert refused.exit_code == 2, (command, option)
            assert option in refused.stderr
    assert "other.csv is not used" in invoke("predict", run, "--data", "other.csv", "-q").output


def test_weights_that_are_not_finite_give_no_answers(run: Path, tmp_path: Path) -> None:
    weights = run / "adapters.safetensors"
    broken = {name: mx.full(one.shape, math.nan) for name, one in mx.load(str(weights)).items()}
    mx.save_safetensors(str(weights), broken)
    asked = tmp_path / "asked.txt"
    asked.write_text("a lovely film\na dull film\n")
    for command in (("predict", run, asked), ("export", run, "--to=mlx", "-o", tmp_path / "x")):
        result = invoke(*command)
        assert result.exit_code == 1, command
        assert "not finite" in result.stderr.splitlines()[-1]
        assert "NaN" not in result.stdout
    assert not (tmp_path / "x").exists()
    with pytest.raises(RunError, match="not finite"):
        Classifier(adapter=run).predict(["a lovely film"])


def test_calibration_subtracts_the_mean_log_probability(trained: tuple[Path, dict]) -> None:
    opened = prediction.prepare(recipe.load(trained[0]), trained[0])
    made = opened.predictor
    assert made.calibration is not None
    training = data.split(data.load(opened.recipe.data), opened.recipe.data).training
    shown = {text for text, _ in made.demonstrations}
    prompts = made.prompts_of([(one, 0) for one in training.texts if one not in shown][:9])
    raw = np.log(made.raw_probabilities(prompts))
    made.calibrate([one for one in training.texts if one not in shown][:9])
    np.testing.assert_allclose(made.calibration, raw.mean(axis=0), atol=1e-6)
    moved = np.exp((raw - raw.mean(axis=0)) / made.temperature)
    expected = moved / moved.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(made.probabilities(prompts), expected, atol=1e-6)
    made.calibrate(training.texts[:7])  # too few
    assert made.calibration is None


def test_the_best_of_several_sets_is_chosen(model: Path, texts: Path) -> None:
    changes = [f"model={model}", f"data.source={texts}", "prediction.draws=6"]
    opened = experiment.prepare(recipe.own_data(changes))
    chosen, best = experiment.choose(opened)
    pool, asked = opened.task.splits.training, opened.task.splits.validation
    gold, found = np.array(asked.labels), []
    for number in range(6):
        rows = data.balanced(pool.labels, 4, random.Random(f"42/{number}"))
        pairs = [pool.pairs()[row] for row in rows]
        one = Predictor(opened.loaded.model, opened.task.builder, pairs, 4096)
        others = prediction.calibration_texts(pool, one, 32, 42)
        raw, more = (np.log(one.raw_of(some)) for some in (asked.texts, others))
        centred = raw - np.concatenate([raw, more]).mean(axis=0)
        found += [(each.argmax(axis=1) == gold).mean() for each in (raw, centred)]
    assert best == pytest.approx(max(found))
    assert len(chosen.demonstrations) == 4


def test_nearest_shows_each_text_its_own_demonstrations(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    nearest = ("--set=prompt.selection=nearest", "--set=objective.kind=end_to_end")
    said = finetuned(model, texts, folder, *nearest)
    measured = document(invoke("eval", folder, "--json"))
    assert measured["methods"] == said["methods"]
    made = prediction.prepare(recipe.load(folder), folder).predictor
    pool = [text for text, _ in made.demonstrations]
    assert len(pool) > measured["k"] == 4
    vectors = TfidfVectorizer(sublinear_tf=True).fit(pool)
    query = "a dull film with bad weather"
    similarity = (vectors.transform(pool) @ vectors.transform([query]).T).toarray()[:, 0]
    found = [pool.index(text) for text, _ in made.shown(query)]
    assert similarity[found].tolist() == pytest.approx(np.sort(similarity)[-4:].tolist())
    # A text that is among the demonstrations is not shown to itself.
    assert pool[3] not in [text for text, _ in made.shown(f"{pool[3].upper()}!")]
    prompt = invoke("predict", folder, "--show-prompt", query).stdout
    assert all(pool[row] in prompt for row in found)


def test_final_trains_on_every_row_and_gives_no_verdict(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    said = finetuned(model, texts, tmp_path / "run", "--final", "--set=training.census_prompts=4")
    assert "verdict" not in said
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (tmp_path / "run" / "heads.npz").is_file()
    rows = run["data"]["rows"]
    assert (rows["test"], rows["training"] + rows["validation"]) == (0, 80)


def test_paper_means_random_demonstrations_and_whole_weights(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    sizes = ("--updates=1", "--set=training.examples=8", "--set=training.prompts_per_update=4")
    words = ("--model", model, "--data", texts, "--output", tmp_path / "run", "--paper", *sizes)
    result = invoke("finetune", *words)
    assert result.exit_code == 0, result.stderr
    made = recipe.load(tmp_path / "run")
    assert (made.prompt.selection, made.prompt.demonstrations) == ("random", 4)
    assert (made.adapter.kind, made.training.learning_rate) == ("full", 2e-5)
    assert (made.objective.kind, made.training.shared_demonstrations) == ("abft", 1)
    # What a user asks for beside it has the last word.
    assert made.training.updates == 1


def test_twenty_rows_work(model: Path, texts: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("\n".join(texts.read_text().splitlines()[:21]) + "\n")
    assert finetuned(model, few, tmp_path / "run")["verdict"]["n"] == 5


@pytest.mark.parametrize(
    ("after", "before", "simple", "prompting", "bag", "advice"),
    [
        (90, 60, 70, "better than", "better than", "Label texts with it"),
        (61, 60, 90, "not clearly different from", "worse than", "Bag of words"),
        (40, 60, 41, "worse than", "not clearly different from", "without the adapter"),
        (61, 60, 61, "not clearly different from", "not clearly", "train longer"),
    ],
)
def test_the_verdict_follows_the_paired_test(
    after: int, before: int, simple: int, prompting: str, bag: str, advice: str
) -> None:
    def method(right: int) -> dict:
        answers = "1" * right + "0" * (100 - right)
        return {"accuracy": right / 100, "right": answers, "confusion": [[30, 20], [5, 45]]}

    measured = {"labels": ["a", "b"], "prompts": 100, "methods": {"classifier": method(after)}}
    base = {"methods": {"classifier": method(before)}}
    baselines = {"majority": {"accuracy": 0.5}, "bag_of_words": method(simple)}
    found = verdict({**measured, "base": base, "baselines": baselines})
    assert f"{prompting} prompting" in found["sentence"]
    assert f"{bag} bag of words" in found["sentence"] or bag == "not clearly"
    assert advice in found["next"]
    assert found["recall"] == {"a": 0.6, "b": 0.9}
    assert "Fine-tune it" in verdict(measured)["next"]
