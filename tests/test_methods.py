"""Every method of prediction, against protocol.md section 4 written out and scikit-learn."""

import math

import mlx.core as mx
import numpy as np
import pytest
import tiny_task
from heard import Heard
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from small_task import HandGenerator

from abft_mlx import evaluation
from abft_mlx.errors import PromptError
from abft_mlx.evaluation import forward, methods, metrics

ALL = ("vanilla", "zero_shot", "contextual", "domain", "batch", "hidden", "knn")
SETTINGS = (
    f"evaluation.methods=[{', '.join(ALL)}]",
    "evaluation.calibration_prompts=9",
    "evaluation.anchor_prompts=15",
    "evaluation.batch_tokens=700",
    "evaluation.bootstrap_samples=50",
)
QUERIES = 10
GROUPS = np.arange(2 * QUERIES) % QUERIES


def section(*changes):
    return tiny_task.recipe(*SETTINGS, *changes).evaluation


@pytest.fixture(scope="module")
def task():
    return tiny_task.task()


@pytest.fixture(scope="module")
def model():
    return tiny_task.model()


@pytest.fixture(scope="module")
def prompts(task):
    return task.test_prompts(section())


@pytest.fixture(scope="module")
def gold(prompts):
    return np.array([prompt.gold for prompt in prompts])


@pytest.fixture(scope="module")
def found(task, model, prompts):
    return evaluation.probabilities_of(model, task, prompts, section())


class ByHand:
    """One prompt at a time through the whole model, no padding, everything after it in float64."""

    def __init__(self, model, task, prompts):
        tokens = [mx.array([prompt.token_ids]) for prompt in prompts]
        self.hidden = np.array([np.array(model.model(t)[0, -1]) for t in tokens], np.float64)
        self.logits = np.array([np.array(model(t)[0, -1]) for t in tokens], np.float64)
        self.p = softmax(self.logits[:, list(task.space.first_ids)], axis=1)


def test_every_method_by_hand(found, task, model, prompts):
    hand = ByHand(model, task, prompts)
    assert tuple(found) == ALL
    np.testing.assert_allclose(found["vanilla"], hand.p, atol=1e-4)
    asked = task.splits.test.pairs()[:QUERIES]
    once = ByHand(model, task, [task.builder.build([], *query) for query in asked]).p
    np.testing.assert_allclose(found["zero_shot"], np.tile(once, (2, 1)), atol=1e-4)
    for name, made in (
        ("contextual", methods.contextual_prompts(task, 9)),
        ("domain", methods.domain_prompts(task, 9)),
    ):
        mean = (1e-5 + ByHand(model, task, made).p.sum(axis=0)) / 9
        np.testing.assert_allclose(found[name], softmax(hand.p / mean, axis=1), atol=2e-3)
    centred = softmax(hand.p - hand.p.mean(axis=0), axis=1)
    np.testing.assert_allclose(found["batch"], centred, atol=1e-4)
    made = methods.anchor_prompts(task, 15)
    anchors, gold = ByHand(model, task, made), np.array([one.gold for one in made])
    centroids = np.stack([anchors.hidden[gold == label].mean(axis=0) for label in range(3)])
    away = np.linalg.norm(hand.hidden[:, None] - centroids, axis=2)
    np.testing.assert_allclose(found["hidden"], softmax(-away, axis=1), atol=1e-4)
    away = np.linalg.norm(hand.logits[:, None] - anchors.logits, axis=2)
    nearest = gold[np.argsort(away, axis=1)[:, :3]]
    votes = np.stack([(nearest == label).sum(axis=1) for label in range(3)], axis=1)
    np.testing.assert_allclose(found["knn"], softmax(votes.astype(float), axis=1))


@pytest.mark.parametrize("name", ALL)
def test_a_method_alone_gives_the_same_and_runs_each_prompt_once(
    found, task, model, prompts, name, monkeypatch
):
    passed, heard, run = [], Heard(), forward.hidden_at_last

    def counting(tokens, *others):
        passed.append(len(tokens))
        return run(tokens, *others)

    monkeypatch.setattr(forward, "hidden_at_last", counting)
    chosen = section(f"evaluation.methods=[{name}]")
    got = evaluation.probabilities_of(model, task, prompts, chosen, heard)
    assert list(got) == [name]
    np.testing.assert_array_equal(got[name], found[name])
    extra = {"contextual": 9, "domain": 9, "hidden": 15, "knn": 15}
    total = 10 if name == "zero_shot" else 20 + extra.get(name, 0)
    assert heard.counts == [(int(done), total) for done in np.cumsum(passed)]
    assert sum(passed) == total


def test_a_half_precision_model_and_a_label_without_anchors(found, task, prompts):
    model = tiny_task.model()
    model.set_dtype(mx.bfloat16)
    got = evaluation.probabilities_of(model, task, prompts, section())
    np.testing.assert_allclose(got["hidden"], found["hidden"], atol=0.1)
    few = section("evaluation.methods=[hidden, vanilla]", "evaluation.anchor_prompts=2")
    got = evaluation.probabilities_of(model, task, prompts, few)
    np.testing.assert_array_equal(got["hidden"], got["vanilla"])


def test_prompts_that_cannot_be_built_stop_before_the_model_works(monkeypatch, model):
    monkeypatch.setattr(forward, "hidden_at_last", None)
    with pytest.raises(PromptError, match=r"domain calibration prompt 0 is .* set prompt"):
        evaluation.probabilities_of(model, tiny_task.task(context_tokens=70), [], section())


def test_a_report_holds_metrics_intervals_and_comparisons(found, gold):
    got = evaluation.report(found, gold, GROUPS, section())
    for name, one in got["methods"].items():
        plain = metrics.summary(found[name], gold)
        assert {key: one[key] for key in plain} == plain
        assert one.keys() - plain.keys() == {"interval", "right"}
        assert one["interval"] == evaluation.intervals(found[name], gold, GROUPS, 50, 42)
    compared = got["comparisons"]
    assert [one["first"] for one in compared] == [name for name in ALL if name != "vanilla"]
    assert {one["second"] for one in compared} == {"vanilla"}
    vanilla = found["vanilla"].argmax(axis=1) == gold
    for one in compared:
        right = found[one["first"]].argmax(axis=1) == gold
        assert one["only_first"] == np.sum(right & ~vanilla)
        differing = one["only_first"] + one["only_second"]
        want = stats.binomtest(one["only_first"], differing).pvalue if differing else 1.0
        assert one["p_value"] == pytest.approx(want)
    assert evaluation.report({"knn": found["knn"]}, gold, GROUPS, section())["comparisons"] == []
    none = section("evaluation.bootstrap_samples=0", "evaluation.compat=true")
    got = evaluation.entry(found["vanilla"], gold, GROUPS, none)
    assert "interval" not in got
    assert got["true_label_probability"] != metrics.summary(found["vanilla"], gold)


@pytest.mark.parametrize("seed", [42, 7])
def test_calibration_prompts_follow_the_protocol(seed):
    """Rows drawn with repetition; words leave out the last text and a text's last word."""
    task = tiny_task.task()
    pairs = task.splits.training.pairs()
    plain = task.builder_for(allow_empty=True)

    def check(prompt, rows, query):
        assert task.tokenizer.decode(prompt.token_ids) == plain.text(
            [pairs[r] for r in rows], query
        )
        assert prompt.demonstration_labels == tuple(pairs[row][1] for row in rows)

    hand, words = HandGenerator(seed), HandGenerator(seed)
    contextual = methods.contextual_prompts(task, 9, seed)
    domain = methods.domain_prompts(task, 9, seed)
    for empty, nonsense in zip(contextual, domain, strict=True):
        rows = [hand.below(40) for _ in range(3)]
        query = []
        for _ in range(64):
            text = pairs[words.below(39)][0].split(" ")
            query.append(text[words.below(max(1, len(text) - 1))])
        check(empty, rows, "")
        check(nonsense, rows, " ".join(query))
    hand = HandGenerator(seed)
    for prompt in methods.anchor_prompts(task, 13, seed):
        *rows, query = [hand.below(40) for _ in range(4)]
        check(prompt, rows, pairs[query][0])
        assert prompt.gold == pairs[query][1]


def test_words_of_a_domain_query():
    queries = methods.domain_queries(["a b LAST", "single", "c  d LAST", "never NEVER"], 2, 200)
    # The double space holds an empty word.
    assert set(" ".join(queries).split(" ")) == {"a", "b", "single", "c", "d", ""}
    assert methods.domain_queries(["one"], 1, 3) == ["one one one"]


def dirichlet(n, labels=3, seed=0):
    return np.random.default_rng(seed).dirichlet([0.5] * labels, size=n)


def test_batches_of_128_and_a_rest():
    p = dirichlet(300)
    want = [softmax(part - part.mean(axis=0), axis=1) for part in (p[:128], p[128:256], p[256:])]
    np.testing.assert_allclose(methods.batch(p), np.concatenate(want), rtol=1e-9)


def points(n, width, seed):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def test_nearest_centroid_equals_scikit_learn():
    gold = np.arange(40) % 4
    anchors = points(40, 16, 0) + gold[:, None]
    asked = points(30, 16, 1) + (np.arange(30) % 4)[:, None]
    got = methods.nearest_centroid(dirichlet(30, 4), mx.array(asked), mx.array(anchors), gold)
    oracle = NearestCentroid().fit(anchors, gold)
    np.testing.assert_array_equal(got.argmax(axis=1), oracle.predict(asked))
    away = np.linalg.norm(asked[:, None] - oracle.centroids_.astype(float), axis=2)
    np.testing.assert_allclose(got, softmax(away[:, :1] - away, axis=1), rtol=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 50.0]))
def test_votes_equal_scikit_learn(seed, common):
    """Brute force in float64; logits of one model are alike, large and close."""
    anchors, asked = (points(n, 60, seed + n) * 0.01 + np.float32(common) for n in (40, 21))
    gold = np.random.default_rng(seed).integers(0, 4, 40)
    got = methods.neighbour_votes(
        [mx.array(asked[:8]), mx.array(asked[8:])], [mx.array(anchors)], gold, 5
    )
    oracle = KNeighborsClassifier(3, algorithm="brute").fit(anchors.astype(np.float64), gold)
    share = np.zeros((21, 5))
    share[:, oracle.classes_] = oracle.predict_proba(asked.astype(np.float64))
    np.testing.assert_allclose(got, softmax(share * 3, axis=1), rtol=1e-12)


def test_of_equal_anchors_the_first_count():
    anchors = np.arange(40, 80, dtype=np.float32).reshape(10, 4)
    anchors[[1, 3, 4, 6, 9]] = 0
    asked = [mx.zeros((1, 4))]
    got = methods.neighbour_votes(asked, [mx.array(anchors)], np.arange(10), 10)
    assert np.flatnonzero(got[0] > 0.1).tolist() == [1, 3, 4]
    got = methods.neighbour_votes(asked, [mx.array(anchors[:2])], np.array([1, 0]), 3)
    np.testing.assert_allclose(got, [softmax([1, 1, 0])])
    assert math.isclose(got.sum(), 1)


def test_vocabulary_logits_come_in_pieces(model, prompts, monkeypatch):
    hidden = forward.outputs(model, prompts, batch_tokens=300).hidden
    want = np.stack([np.array(model(mx.array([one.token_ids]))[0, -1]) for one in prompts])
    for room, size in ((7 * want.shape[1] + 5, 7), (want.shape[1] - 1, 1), (2**24, 20)):
        monkeypatch.setattr(forward, "PIECE", room)
        parts = [np.array(one) for one in forward.vocabulary_logits(model, hidden)]
        assert {len(one) for one in parts[:-1]} <= {size}
        np.testing.assert_allclose(np.concatenate(parts), want, atol=2e-4)
