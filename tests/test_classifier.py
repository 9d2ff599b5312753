"""``abft_mlx.Classifier``: scikit-learn's manners, and the answers of ``abft-mlx predict``."""

from __future__ import annotations

import doctest
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_support import invoke
from sklearn.base import clone, is_classifier
from sklearn.metrics import accuracy_score
from sklearn.model_selection import cross_val_score
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import abft_mlx
from abft_mlx import classifier
from abft_mlx.data import generated
from abft_mlx.errors import DataError, NotFittedError, OutputError, PromptError, UsageError

SHORT = (
    "training.updates=8",
    "training.examples=64",
    "training.prompts_per_update=16",
    "training.learning_rate=2e-3",
)
ONE = ("training.updates=1", "training.examples=8", "training.prompts_per_update=8")


def task(name: str, rows: int = 120) -> tuple[list[str], list[str]]:
    labels = generated.TASKS[name].labels
    pairs = generated.generate(name, rows, 5)
    return [text for text, _ in pairs], [labels[label] for _, label in pairs]


TEXTS, LABELS = task("urgency", 40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "urgency"
    abft_mlx.finetune("generated/urgency", folder, overrides=ONE)
    return folder


@pytest.fixture(scope="module")
def fitted() -> abft_mlx.Classifier:
    made = abft_mlx.Classifier(recipe="generated/urgency", overrides=ONE)
    return made.fit(TEXTS, LABELS)


def answers(folder: Path, *arguments: object) -> list[dict]:
    asked = folder / "asked.txt"
    asked.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    result = invoke("predict", *arguments, asked, "--quiet")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_equal(classifier: abft_mlx.Classifier, found: list[dict]) -> None:
    """A classifier against the lines of ``abft-mlx predict``, which have six digits."""
    assert classifier.predict(TEXTS).tolist() == [one["label"] for one in found]
    classes = classifier.classes_.tolist()
    assert classes == sorted(classes)
    expected = [[one["probabilities"][name] for name in classes] for one in found]
    np.testing.assert_allclose(classifier.predict_proba(TEXTS), expected, atol=1e-6)


def test_a_run_answers_as_the_command_does(run: Path, tmp_path: Path) -> None:
    check_equal(abft_mlx.Classifier("demo", run), answers(tmp_path, run))
    base = abft_mlx.Classifier("demo", recipe="generated/urgency")
    check_equal(base, answers(tmp_path, "generated/urgency"))
    assert not np.array_equal(
        base.predict_proba(TEXTS), abft_mlx.Classifier("demo", run).predict_proba(TEXTS)
    )


def test_demonstrations_answer_as_the_command_does(run: Path, tmp_path: Path) -> None:
    shown = tmp_path / "shown.csv"
    pairs = list(zip(TEXTS[:5], LABELS[:5], strict=True))
    shown.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in pairs), "utf-8")
    found = answers(tmp_path, run, "--demonstrations", shown)
    check_equal(abft_mlx.Classifier("demo", run, pairs), found)
    check_equal(abft_mlx.Classifier("demo", run, shown), found)
    alone = answers(tmp_path, "--model", "demo", "--demonstrations", shown)
    for given in (pairs, shown):
        made = abft_mlx.Classifier("demo", demonstrations=given)
        check_equal(made, alone)
        assert made.demonstrations_ == pairs


def test_what_was_fitted_can_be_kept(fitted: abft_mlx.Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    fitted.save(folder)
    check_equal(fitted, answers(tmp_path, folder))
    again = abft_mlx.Classifier(adapter=folder)
    np.testing.assert_allclose(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS), atol=1e-6)
    assert "tmp" not in (folder / "adapter_config.json").read_text(encoding="utf-8")
    with pytest.raises(OutputError, match="kept: exists and is no empty folder"):
        fitted.save(folder)
    with pytest.raises(NotFittedError, match="nothing was trained"):
        again.save(tmp_path / "other")


def test_cross_validation_is_above_chance_and_training_helps() -> None:
    texts, labels = task("question")
    means = {}
    for train in (False, True):
        made = abft_mlx.Classifier(recipe="generated/question", overrides=SHORT, train=train)
        means[train] = cross_val_score(made, texts, labels, cv=3).mean()
    assert means[False] > 0.45, "four classes"
    assert means[True] >= means[False] + 0.05


def test_folds_are_stratified_and_scores_are_scikit_learns() -> None:
    made = abft_mlx.Classifier(recipe="generated/urgency", train=False)
    assert is_classifier(made)
    # Sorted by class: folds that were not stratified would leave a fold without a class.
    order = sorted(range(len(LABELS)), key=lambda row: LABELS[row])
    texts, labels = [TEXTS[row] for row in order], [LABELS[row] for row in order]
    for scoring in ("roc_auc", "neg_log_loss"):
        scores = cross_val_score(made, texts, labels, cv=2, scoring=scoring, error_score="raise")
        assert np.isfinite(scores).all()
    made.fit(texts, labels)
    weights = np.linspace(0, 1, len(texts))
    assert made.score(texts, labels) == accuracy_score(labels, made.predict(texts))
    assert made.score(texts, labels, weights) == pytest.approx(
        accuracy_score(labels, made.predict(texts), sample_weight=weights)
    )


@pytest.mark.parametrize(
    "check",
    [
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_own_checks(check: str) -> None:
    getattr(estimator_checks, check)("Classifier", abft_mlx.Classifier())


def test_a_clone_knows_nothing(fitted: abft_mlx.Classifier) -> None:
    check_is_fitted(fitted)
    assert clone(fitted)._fitted is None
    bare = abft_mlx.Classifier("demo")
    assert not bare.__sklearn_is_fitted__()
    assert not hasattr(bare, "classes_")
    with pytest.raises(NotFittedError, match=r"call fit\(texts, labels\), or give"):
        bare.predict(TEXTS)
    with pytest.raises(ValueError, match="no parameter 'modle'; there are model, adapter,"):
        bare.set_params(modle="demo")


def test_parameters_that_change_are_used(run: Path) -> None:
    made = abft_mlx.Classifier("demo", recipe="generated/urgency")
    before = made.predict_proba(TEXTS)
    opened = made._opened
    made.predict(TEXTS)
    assert made._opened is opened, "opened once"
    assert not np.array_equal(made.set_params(adapter=run).predict_proba(TEXTS), before)


@pytest.mark.parametrize(
    "kind",
    [
        lambda label: label == "urgent",
        lambda label: {"urgent": 10, "routine": 9}[label],
        lambda label: {"urgent": "10", "routine": "9"}[label],
    ],
)
def test_labels_of_any_kind_give_the_same_answers(kind: object) -> None:
    y = [kind(label) for label in LABELS]
    words = {kind("urgent"): "urgent", kind("routine"): "routine"}
    made = abft_mlx.Classifier(recipe="generated/urgency", train=False, label_words=words)
    made.fit(np.array(TEXTS, dtype=object), np.array(y))
    assert made.classes_.tolist() == np.unique(y).tolist()
    named = abft_mlx.Classifier(recipe="generated/urgency", train=False).fit(TEXTS, LABELS)
    found = made.predict(TEXTS)
    assert found.dtype.kind == np.array(y).dtype.kind
    assert found.tolist() == [kind(label) for label in named.predict(TEXTS).tolist()]
    columns = [named.classes_.tolist().index(words[one]) for one in made.classes_.tolist()]
    np.testing.assert_allclose(
        made.predict_proba(TEXTS), named.predict_proba(TEXTS)[:, columns], atol=1e-6
    )
    np.testing.assert_allclose(made.predict_proba(TEXTS).sum(axis=1), 1, atol=1e-6)
    assert [label for _, label in made.demonstrations_].count(kind("urgent")) == 2


def test_fitting_trains_on_all_texts_and_is_repeatable(fitted: abft_mlx.Classifier) -> None:
    seen: list[int] = []
    again = clone(fitted).set_params(on_update=lambda update: seen.append(update.step))
    again.fit(TEXTS, LABELS)
    assert seen == [1]
    assert again.progress_.updates == 1
    np.testing.assert_array_equal(again.predict_proba(TEXTS), fitted.predict_proba(TEXTS))
    untrained = clone(fitted).set_params(train=False).fit(TEXTS, LABELS)
    assert untrained.progress_ is None
    assert untrained.demonstrations_ == again.demonstrations_
    assert not np.array_equal(untrained.predict_proba(TEXTS), fitted.predict_proba(TEXTS))


def test_an_adapter_that_is_there_is_kept(run: Path) -> None:
    plain = ["prediction.calibration_texts=0"]
    made = abft_mlx.Classifier("demo", run, train=False, overrides=plain).fit(TEXTS, LABELS)
    same = abft_mlx.Classifier("demo", run, made.demonstrations_)
    np.testing.assert_allclose(made.predict_proba(TEXTS), same.predict_proba(TEXTS), atol=1e-6)
    base = clone(made).set_params(adapter=None, recipe="generated/urgency").fit(TEXTS, LABELS)
    assert base.demonstrations_ == made.demonstrations_
    assert not np.allclose(base.predict_proba(TEXTS), made.predict_proba(TEXTS), atol=1e-6)


def fit(texts: object, labels: object, **parameters: object) -> None:
    abft_mlx.Classifier(recipe="generated/urgency", **parameters).fit(texts, labels)


@pytest.mark.parametrize(
    ("texts", "labels", "parameters", "message"),
    [
        ("one text", ["a"], {}, "X is 'one text'; give a list with an item for each text"),
        ([["a"]], ["a"], {}, r"X: item 0: the text is \['a'\], which is not a string"),
        (np.array([["a"], ["b"]]), ["a", "b"], {}, "X has 2 dimensions; give one column"),
        (TEXTS, ["a"] * 40, {}, "every label is 'a'; a classifier needs at least two"),
        (TEXTS, [0.5, 1] * 20, {}, "label 0.5 cannot be used: label 0.5 is a fraction"),
        (TEXTS, ["1", 1] * 20, {}, "labels '1' and 1 have the same name"),
        (TEXTS, ["a", 1] * 20, {}, r"labels of several kinds \('a', 1\); make them all words"),
        (["", *TEXTS[1:]], LABELS, {}, "X: item 0: the text is empty"),
        (TEXTS, LABELS, {"adapter": "somewhere"}, "adapter 'somewhere' is given and fit would"),
        (TEXTS, LABELS, {"demonstrations": [("a",)]}, r"demonstrations item 0 is \('a',\)"),
        (TEXTS, LABELS, {"demonstrations": []}, "demonstrations is empty"),
        (TEXTS, LABELS, {"demonstrations": [("a", "b")]}, "label 'b' is not one of routine, urg"),
        (TEXTS, LABELS, {"demonstrations": "none.csv"}, "none.csv: no such file"),
    ],
)
def test_what_cannot_be_fitted_is_said_in_a_line(
    texts: object, labels: object, parameters: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        fit(texts, labels, **parameters)
    assert "\n" not in str(error.value)


def test_texts_that_cannot_be_asked(fitted: abft_mlx.Classifier) -> None:
    with pytest.raises(DataError, match="X: item 1: the text is 5, which is not a string"):
        fitted.predict(["a door", 5])
    with pytest.raises(PromptError, match="X item 1: a text is empty"):
        fitted.predict(["a door", ""])
    with pytest.raises(DataError, match="X has 1 texts and y 2 labels"):
        fitted.score(["a door"], ["urgent", "routine"])


def test_other_processes_can_be_given_one(fitted: abft_mlx.Classifier, run: Path) -> None:
    made = abft_mlx.Classifier("demo", run)
    expected = made.predict_proba(TEXTS[:3])
    again = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(again.predict_proba(TEXTS[:3]), expected)
    with pytest.raises(TypeError, match=r"keep it with save\(folder\)"):
        pickle.dumps(fitted)


def test_the_example_in_the_docstring_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    (found,) = finder.find(classifier.Classifier, "Classifier", globs={})
    assert len(found.examples) >= 4
    result = doctest.DocTestRunner().run(found)
    assert result.failed == 0


def test_nothing_needs_scikit_learn(checkout: Path) -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; import abft_mlx; "
        "made = abft_mlx.Classifier('demo', demonstrations=[('a leak', 'b'), ('a chair', 'a')]); "
        "print(made.predict(['a leak']).tolist(), made)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("['a']", "['b']"))
    assert "Classifier(model='demo', demonstrations=" in done.stdout
