"""Calibration against protocol.md, section 4, written out, and against scikit-learn."""

import math
from itertools import islice

import made_tokenizers
import mlx.core as mx
import numpy as np
import pytest
import tiny_task
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid, NearestNeighbors

from abft_mlx import runtime
from abft_mlx.errors import PromptError
from abft_mlx.evaluation import forward, methods
from abft_mlx.prompts import batches


class Protocol:
    """protocol.md's generator: X0 = 42, X <- (1664525 X + 1013904223) mod 2^32, float X / 2^32."""

    def __init__(self, seed=42):
        self.x = seed

    def number(self):
        self.x = (1664525 * self.x + 1013904223) % 2**32
        return self.x / 2**32

    def integer(self, start, end):
        return math.floor(start + (end - start) * self.number())


def rows_of(n, pool, seed=42):
    one = Protocol(seed)
    return [math.floor(one.number() * pool) for _ in range(n)]


def shown(task, prompt, rows, query, builder=None):
    """A prompt shows these training rows and ends in this query."""
    pairs = [task.splits.training.pairs()[row] for row in rows]
    text = (builder or task.builder_for(allow_empty=True)).text(pairs, query)
    assert task.tokenizer.decode(prompt.token_ids) == text
    assert prompt.demonstration_labels == tuple(label for _, label in pairs)


def test_contextual_prompts_follow_the_protocol():
    task = tiny_task.task()
    made = methods.contextual_prompts(task, 17)
    drawn = rows_of(17 * 3, 40)
    assert len(made) == 17
    assert len(set(drawn)) < len(drawn), "drawn with repetition"
    for number, prompt in enumerate(made):
        shown(task, prompt, drawn[3 * number : 3 * number + 3], "")
        assert task.tokenizer.decode(prompt.token_ids).endswith("\ntext:  label:")


def test_domain_prompts_follow_the_protocol():
    """Words afresh from seed 42, over all prompts; neither the last row nor a last word."""
    task = tiny_task.task()
    made = methods.domain_prompts(task, 9)
    drawn, words = rows_of(9 * 3, 40), Protocol()
    source = task.splits.training.texts
    for number, prompt in enumerate(made):
        query = []
        for _ in range(64):
            text = source[words.integer(0, len(source) - 1)].split(" ")
            query.append(text[words.integer(0, len(text) - 1)])
        shown(task, prompt, drawn[3 * number : 3 * number + 3], " ".join(query))


def test_anchor_prompts_follow_the_protocol():
    """K + 1 rows a prompt, the last of which is the query."""
    task = tiny_task.task()
    made = methods.anchor_prompts(task, 13)
    drawn = rows_of(13 * 4, 40)
    for number, prompt in enumerate(made):
        *rows, query = drawn[4 * number : 4 * number + 4]
        text, gold = task.splits.training.pairs()[query]
        shown(task, prompt, rows, text)
        assert prompt.gold == gold
        assert prompt.target == task.space.token_ids[gold]


def test_another_seed_is_a_replicate():
    task = tiny_task.task()
    for make in (methods.contextual_prompts, methods.anchor_prompts):
        assert make(task, 5, 7) != make(task, 5)
    drawn = rows_of(15, 40, seed=7)
    shown(task, methods.contextual_prompts(task, 5, 7)[4], drawn[12:], "")
    assert methods.domain_prompts(task, 2, 7)[1] != methods.domain_prompts(task, 2)[1]


def test_random_words_leave_out_what_the_original_leaves_out():
    source = ["a b LAST", "single", "c  d LAST", "never NEVER"]
    words = methods.random_words(methods.Generator(), source, 400).split(" ")
    assert len(words) == 400
    # The double space holds an empty word.
    assert set(words) == {"a", "b", "single", "c", "d", ""}


def test_random_words_of_one_text():
    assert methods.random_words(methods.Generator(), ["one"], 3) == "one one one"


@pytest.mark.parametrize("kind", made_tokenizers.KINDS)
def test_every_tokenizer_takes_prompts_without_content(kind):
    """An empty query, and its label right behind it, are tokenised as in the whole text."""
    task = tiny_task.task(tokenizer=made_tokenizers.KINDS[kind]())
    assert methods.contextual_prompts(task, 4)
    assert methods.domain_prompts(task, 4)


def test_a_calibration_prompt_that_is_too_long_is_named():
    task = tiny_task.task(context_tokens=60)
    with pytest.raises(PromptError, match=r"domain calibration prompt 0 is .* set prompt"):
        methods.domain_prompts(task, 2)
    with pytest.raises(
        PromptError, match=r"anchor prompt \d+ \(training rows \d+, \d+, \d+, \d+\)"
    ):
        methods.anchor_prompts(tiny_task.task(context_tokens=30), 40)


def softmax(values):
    powers = [math.exp(one - max(values)) for one in values]
    return [one / sum(powers) for one in powers]


def dirichlet(n, labels=3, seed=0):
    return np.random.default_rng(seed).dirichlet([0.5] * labels, size=n)


def test_division_by_the_mean_of_empty_prompts_by_hand():
    probabilities, reference = dirichlet(20), dirichlet(7, seed=1)
    # One label that empty prompts never name: only the protocol's 1e-5 keeps it finite.
    reference[:, 2] = 0
    probabilities[:10, 2] = 1e-6
    got = methods.divided(probabilities, reference)
    means = [(1e-5 + sum(reference[:, j].tolist())) / 7 for j in range(3)]
    want = [softmax([p / a for p, a in zip(row, means, strict=True)]) for row in probabilities]
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert got[:10].max() < 1
    assert got[10:, 2].tolist() == [1.0] * 10


def test_batches_of_128_and_a_rest_by_hand():
    probabilities = dirichlet(300)
    got = methods.batch(probabilities)
    for start, end in ((0, 128), (128, 256), (256, 300)):
        piece = probabilities[start:end].tolist()
        mean = [sum(row[j] for row in piece) / len(piece) for j in range(3)]
        want = [softmax([row[j] - mean[j] for j in range(3)]) for row in piece]
        np.testing.assert_allclose(got[start:end], want, rtol=1e-9)


def points(n, width, seed):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def test_nearest_centroid_equals_scikit_learn_and_distances_by_hand():
    anchors, asked = points(40, 16, 0), points(30, 16, 1)
    gold = np.arange(40) % 4
    anchors += gold[:, None]
    asked += (np.arange(30) % 4)[:, None]
    got = methods.nearest_centroid(dirichlet(30, 4), mx.array(asked), mx.array(anchors), gold)
    oracle = NearestCentroid().fit(anchors, gold)
    np.testing.assert_array_equal(got.argmax(axis=1), oracle.predict(asked))
    assert len(set(got.argmax(axis=1))) == 4
    for row, values in zip(asked, got, strict=True):
        away = [math.dist(row, anchors[gold == j].mean(axis=0, dtype=np.float64)) for j in range(4)]
        np.testing.assert_allclose(values, softmax([away[0] - one for one in away]), rtol=1e-9)


def test_a_label_without_anchors_leaves_the_probabilities_alone():
    probabilities = dirichlet(5)
    gold = np.array([0, 2, 2, 0])
    args = (mx.array(points(5, 8, 0)), mx.array(points(4, 8, 1)), gold)
    np.testing.assert_array_equal(methods.nearest_centroid(probabilities, *args), probabilities)


def pieces(rows, *sizes):
    whole = iter(rows)
    return [mx.array(np.array(list(islice(whole, size)))) for size in sizes]


def votes(asked, anchors, gold, labels, neighbours=3):
    """Oracle: brute force in float64."""
    found = KNeighborsClassifier(neighbours, algorithm="brute").fit(
        anchors.astype(np.float64), gold
    )
    share = np.zeros((len(asked), labels))
    share[:, found.classes_] = found.predict_proba(asked.astype(np.float64))
    return np.array([softmax(row) for row in share * neighbours])


@given(st.integers(0, 10**6))
def test_votes_equal_scikit_learn(seed):
    anchors, asked = points(40, 60, seed), points(21, 60, seed + 1)
    gold = np.random.default_rng(seed).integers(0, 4, 40)
    got = methods.neighbour_votes(pieces(asked, 8, 8, 5), pieces(anchors, 30, 10), gold, 5)
    np.testing.assert_allclose(got, votes(asked, anchors, gold, 5), rtol=1e-12)


@pytest.mark.parametrize("far", [0.0, 100.0])
def test_neighbours_do_not_drown_in_what_logits_have_in_common(far):
    """Logits of one model are alike, large and close; or lie in clusters that are far apart."""
    anchors, asked = points(50, 400, 2) * 0.01 + 50, points(30, 400, 3) * 0.01 + 50
    anchors[::2, 0] += far
    asked[::3, 0] += far
    oracle = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(anchors.astype(np.float64))
    want = np.sort(oracle.kneighbors(asked.astype(np.float64), return_distance=False), axis=1)
    got = methods.neighbour_votes(pieces(asked, 30), pieces(anchors, 50), np.arange(50), 50)
    np.testing.assert_array_equal(np.sort(np.argsort(-got, axis=1)[:, :3], axis=1), want)
    np.testing.assert_allclose(np.sort(got, axis=1)[:, -3:], math.e / (3 * math.e + 47))
    expanded = (anchors * anchors).sum(axis=1) - 2 * asked @ anchors.T
    drowned = np.sort(np.argsort(expanded, axis=1)[:, :3], axis=1)
    assert (drowned != want).any(axis=1).all()


@pytest.mark.parametrize("equal", [range(8), range(2, 10), (1, 3, 4, 6, 9)])
def test_of_equal_anchors_the_first_count(equal):
    equal = list(equal)
    anchors = np.arange(40, 80, dtype=np.float32).reshape(10, 4)
    anchors[equal] = 0
    asked = pieces(np.zeros((1, 4), np.float32), 1)
    got = methods.neighbour_votes(asked, pieces(anchors, 10), np.arange(10), 10)
    assert np.flatnonzero(got[0] > 0.1).tolist() == equal[:3]


def test_fewer_anchors_than_neighbours():
    anchors, gold = points(2, 5, 0), np.array([1, 0])
    got = methods.neighbour_votes(pieces(anchors, 1, 1), pieces(anchors, 2), gold, 3)
    np.testing.assert_allclose(got, [softmax([1, 1, 0])] * 2)


def test_votes_never_hold_all_prompts_times_vocabulary():
    vocabulary, n = 8192, 512
    anchors, gold = mx.random.normal((6, vocabulary)), np.array([0, 1, 0, 1, 0, 1])

    def logits():
        for start in range(0, n, 16):
            yield mx.random.normal((16, vocabulary), key=mx.random.key(start))

    mx.eval(anchors)
    mx.clear_cache()
    runtime.reset_peak_memory()
    before = mx.get_active_memory()
    methods.neighbour_votes(logits(), [anchors], gold, 2)
    assert runtime.peak_memory_bytes() - before < n * vocabulary * 4 / 3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_states_and_vocabulary_logits_are_the_models_own(name, monkeypatch):
    task, model = tiny_task.task(), tiny_task.model(name)
    prompts = task.test_prompts(tiny_task.recipe().evaluation)
    seen = []
    hidden = forward.hidden_states(
        model, prompts, batch_tokens=300, each=lambda one: seen.append(one[:2])
    )
    assert len(seen) == len(batches(prompts, max_tokens=300)) > 2
    for rows, part in seen:
        np.testing.assert_array_equal(np.array(hidden)[rows], np.array(part))
    want = np.stack([np.array(model(mx.array([one.token_ids]))[0, -1]) for one in prompts])
    vocabulary = want.shape[1]
    for room, size in ((7 * vocabulary + 5, 7), (vocabulary - 1, 1), (2**24, 20)):
        monkeypatch.setattr(forward, "PIECE", room)
        parts = [np.array(one) for one in forward.vocabulary_logits(model, hidden)]
        assert {len(one) for one in parts[:-1]} <= {size}
        assert len(parts[0]) == size
        np.testing.assert_allclose(np.concatenate(parts), want, atol=2e-4)
