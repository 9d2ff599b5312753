"""Every method of prediction, end to end on a tiny model, against float64 arithmetic by hand."""

import made_tokenizers
import mlx.core as mx
import numpy as np
import pytest
import tiny_task
from heard import Heard
from scipy import stats
from scipy.special import softmax

from abft_mlx import evaluation
from abft_mlx.errors import PromptError
from abft_mlx.evaluation import forward, methods, metrics
from abft_mlx.prompts import batches

ALL = ("vanilla", "zero_shot", "contextual", "domain", "batch", "hidden", "knn")
SETTINGS = (
    f"evaluation.methods=[{', '.join(ALL)}]",
    "evaluation.calibration_prompts=9",
    "evaluation.anchor_prompts=15",
    "evaluation.batch_tokens=700",
    "evaluation.bootstrap_samples=50",
)
QUERIES = 10


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
def found(task, model, prompts):
    return evaluation.probabilities_of(model, task, prompts, section())


class ByHand:
    """One prompt at a time through the whole model, no padding, everything after it in float64."""

    def __init__(self, model, task, prompts):
        self.tokens = [mx.array([prompt.token_ids]) for prompt in prompts]
        self.hidden = np.array([np.array(model.model(t)[0, -1]) for t in self.tokens], np.float64)
        self.logits = np.array([np.array(model(t)[0, -1]) for t in self.tokens], np.float64)
        self.p = softmax(self.logits[:, list(task.space.first_ids)], axis=1)


@pytest.fixture(scope="module")
def hand(task, model, prompts):
    return ByHand(model, task, prompts)


def test_methods_come_in_the_order_asked_for(found):
    assert tuple(found) == ALL
    for one in found.values():
        assert one.shape == (2 * QUERIES, 3)
        assert one.dtype == np.float64
        np.testing.assert_allclose(one.sum(axis=1), 1)


def test_vanilla(found, hand):
    np.testing.assert_allclose(found["vanilla"], hand.p, atol=1e-4)


def test_zero_shot_repeats_each_query(found, task, model):
    asked = task.splits.test.pairs()[:QUERIES]
    once = ByHand(model, task, [task.builder.build([], *query) for query in asked]).p
    np.testing.assert_allclose(found["zero_shot"], np.tile(once, (2, 1)), atol=1e-4)
    assert len(np.unique(once.round(6), axis=0)) == QUERIES


@pytest.mark.parametrize("name", ["contextual", "domain"])
def test_calibration_by_prompts_without_content(found, hand, task, model, name):
    make = {"contextual": methods.contextual_prompts, "domain": methods.domain_prompts}
    reference = ByHand(model, task, make[name](task, 9)).p
    want = softmax(hand.p / ((1e-5 + reference.sum(axis=0)) / 9), axis=1)
    np.testing.assert_allclose(found[name], want, atol=2e-3)


def test_batch(found, hand):
    np.testing.assert_allclose(
        found["batch"], softmax(hand.p - hand.p.mean(axis=0), axis=1), atol=1e-4
    )


def test_hidden_and_knn(found, hand, task, model):
    prompts = methods.anchor_prompts(task, 15)
    anchors, gold = ByHand(model, task, prompts), np.array([one.gold for one in prompts])
    centroids = np.stack([anchors.hidden[gold == label].mean(axis=0) for label in range(3)])
    away = np.linalg.norm(hand.hidden[:, None] - centroids, axis=2)
    np.testing.assert_allclose(found["hidden"], softmax(-away, axis=1), atol=1e-4)
    away = np.linalg.norm(hand.logits[:, None] - anchors.logits, axis=2)
    nearest = gold[np.argsort(away, axis=1)[:, :3]]
    votes = np.stack([(nearest == label).sum(axis=1) for label in range(3)], axis=1)
    np.testing.assert_allclose(found["knn"], softmax(votes.astype(float), axis=1))


def test_hidden_calibration_without_some_label_is_vanilla(found, task, model, prompts):
    few = section("evaluation.methods=[hidden]", "evaluation.anchor_prompts=2")
    got = evaluation.probabilities_of(model, task, prompts, few)
    assert list(got) == ["hidden"]
    np.testing.assert_array_equal(got["hidden"], found["vanilla"])


@pytest.mark.parametrize("name", ALL)
def test_a_method_alone_gives_the_same_bit_for_bit(found, task, model, prompts, name):
    got = evaluation.probabilities_of(model, task, prompts, section(f"evaluation.methods=[{name}]"))
    assert list(got) == [name]
    np.testing.assert_array_equal(got[name], found[name])


def test_part_of_the_prompts_has_the_same_queries(found, task, model, prompts):
    got = evaluation.probabilities_of(
        model, task, prompts[:13], section("evaluation.methods=[zero_shot, vanilla]")
    )
    np.testing.assert_array_equal(got["zero_shot"], found["zero_shot"][:13])
    np.testing.assert_allclose(got["vanilla"], found["vanilla"][:13], atol=1e-5)


@pytest.mark.parametrize(
    ("names", "prompts_passed"),
    [
        (ALL, 20 + 10 + 9 + 9 + 15),
        (("vanilla", "batch"), 20),
        (("zero_shot",), 10),
        (("contextual",), 20 + 9),
        (("hidden", "knn", "vanilla"), 20 + 15),
    ],
)
def test_a_prompt_goes_through_the_model_once(
    task, model, prompts, names, prompts_passed, monkeypatch
):
    passed, heard = [], Heard()
    original = forward.hidden_at_last

    def counting(model, tokens, last, *behind):
        passed.append(tokens.shape[0])
        return original(model, tokens, last, *behind)

    monkeypatch.setattr(forward, "hidden_at_last", counting)
    chosen = section(f"evaluation.methods=[{', '.join(names)}]")
    evaluation.probabilities_of(model, task, prompts, chosen, heard)
    assert sum(passed) == prompts_passed
    assert heard.counts == [(int(done), prompts_passed) for done in np.cumsum(passed)]


def test_sizes_and_seed_come_from_the_section(found, task, model, prompts):
    for name, changes in {
        "contextual": ["evaluation.calibration_prompts=5"],
        "domain": ["evaluation.calibration_prompts=5"],
        "knn": ["evaluation.anchor_prompts=4"],
    }.items():
        for change in (changes, ["evaluation.seed=1"]):
            chosen = section(f"evaluation.methods=[{name}]", *change)
            got = evaluation.probabilities_of(model, task, prompts, chosen)
            assert not np.allclose(got[name], found[name])


def test_half_precision_models_calibrate_too(task, prompts, found):
    model = tiny_task.model()
    model.set_dtype(mx.bfloat16)
    got = evaluation.probabilities_of(model, task, prompts, section())
    assert tuple(got) == ALL
    np.testing.assert_allclose(got["hidden"], found["hidden"], atol=0.1)


@pytest.mark.parametrize("kind", made_tokenizers.KINDS)
def test_zero_shot_prompts_are_instruction_query_prefix_and_query(kind):
    tokenizer = made_tokenizers.KINDS[kind]()
    changes = ["prompt.instruction=the text was good\n", "prompt.query_prefix=the label\n"]
    if kind == "words":
        changes[0] = "prompt.instruction=the film was good \n"
    one = tiny_task.task(*changes, tokenizer=tokenizer)
    made = methods.zero_shot_prompts(one, section())
    assert len(made) == QUERIES
    start = len(tokenizer.encode("a")) - len(tokenizer.encode("a", add_special_tokens=False))
    for prompt, (text, gold) in zip(made, one.splits.test.pairs(), strict=False):
        wanted = f"{one.template.instruction}the label\ntext: {text} label:"
        assert list(prompt.token_ids[start:]) == tokenizer.encode(wanted, add_special_tokens=False)
        assert (prompt.gold, prompt.target) == (gold, one.space.token_ids[gold])
        assert prompt.label_positions == prompt.demonstration_labels == ()
    for batch in batches(made, max_tokens=100):
        assert batch.label_positions.shape == batch.demonstration_labels.shape == (len(batch), 0)


def test_prompts_that_cannot_be_built_stop_before_the_model_works(monkeypatch, model):
    def fail(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(forward, "hidden_at_last", fail)
    small = tiny_task.task(context_tokens=70)
    with pytest.raises(PromptError, match="domain calibration prompt"):
        evaluation.probabilities_of(model, small, [], section())


@pytest.fixture(scope="module")
def gold(prompts):
    return np.array([one.gold for one in prompts])


GROUPS = np.arange(2 * QUERIES) % QUERIES


def test_a_report_holds_metrics_intervals_and_who_was_right(found, gold):
    got = evaluation.report(found, gold, GROUPS, section())
    assert list(got) == ["methods", "comparisons"]
    assert tuple(got["methods"]) == ALL
    for name, one in got["methods"].items():
        plain = metrics.summary(found[name], gold)
        assert {key: one[key] for key in plain} == plain
        assert one.keys() - plain.keys() == {"interval", "right"}
        assert one["interval"] == evaluation.intervals(found[name], gold, GROUPS, 50, 42)
        right = found[name].argmax(axis=1) == gold
        assert one["right"] == "".join(str(int(flag)) for flag in right)


def test_every_method_is_compared_with_vanilla(found, gold):
    compared = evaluation.report(found, gold, GROUPS, section())["comparisons"]
    assert [(one["first"], one["second"]) for one in compared] == [
        (name, "vanilla") for name in ALL if name != "vanilla"
    ]
    vanilla = found["vanilla"].argmax(axis=1) == gold
    for one in compared:
        right = found[one["first"]].argmax(axis=1) == gold
        assert one["only_first"] == np.sum(right & ~vanilla)
        assert one["only_second"] == np.sum(vanilla & ~right)
        differing = one["only_first"] + one["only_second"]
        want = stats.binomtest(one["only_first"], differing).pvalue if differing else 1.0
        assert one["p_value"] == pytest.approx(want)
    assert any(one["only_first"] != one["only_second"] for one in compared)


def test_a_report_without_vanilla_compares_nothing(found, gold):
    got = evaluation.report({"knn": found["knn"]}, gold, GROUPS, section())
    assert got["comparisons"] == []


def test_no_bootstrap_no_intervals(found, gold):
    none = section("evaluation.bootstrap_samples=0")
    got = evaluation.report(found, gold, GROUPS, none)["methods"]["vanilla"]
    assert "interval" not in got
    assert len(got["right"]) == 2 * QUERIES


def test_a_report_seeds_its_intervals_and_may_repeat_the_faults(found, gold):
    vanilla = found["vanilla"]
    got = evaluation.entry(vanilla, gold, GROUPS, section("evaluation.seed=3"))
    assert got["interval"] == evaluation.intervals(vanilla, gold, GROUPS, 50, 3)
    got = evaluation.entry(vanilla, gold, GROUPS, section("evaluation.compat=true"))
    want = metrics.summary(vanilla, gold, compat=True)
    assert {key: got[key] for key in want} == want
    assert want != metrics.summary(vanilla, gold)
    assert got["interval"] == evaluation.intervals(vanilla, gold, GROUPS, 50, 42, compat=True)
