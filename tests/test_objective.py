"""Equation 1 and the PID law against computations that share no code with them."""

import math

import mlx.core as mx
import numpy as np
import pytest

from abft_mlx.objective import PunishController, abft_terms, end_to_end_terms

B, HEADS, T, K = 5, (3, 2), 40, 4


@pytest.fixture
def case():
    """Random patterns of two layers with different head counts, lengths from 12 to T."""
    rng = np.random.default_rng(3)
    last = np.array([11, 20, 28, 33, T - 1])
    rows = []
    for heads in HEADS:
        scores = rng.normal(size=(B, heads, T)) * 2
        positions = np.stack([np.sort(rng.choice(n, K, replace=False)) for n in last])
        scores[np.arange(T)[None, None, :] > last[:, None, None] + np.zeros((B, heads, T))] = -1e9
        rows.append(scores)
    # Lift the label tokens of some heads, so that the filter keeps some and drops some.
    for scores in rows:
        for b in range(B):
            for h in range(scores.shape[1]):
                scores[b, h, positions[b]] += rng.uniform(0, 6)
    labels = rng.integers(0, 3, size=(B, K))
    gold = rng.integers(0, 3, size=B)
    labels[0] = (gold[0] + 1) % 3  # I+ empty
    return rows, positions, labels, gold, last


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def reference(rows, positions, labels, gold, last, A, B_, use_filter=True):
    """Equation 1 in float64, loop by loop."""
    punish = reward = heads = 0.0
    for scores in rows:
        pattern = softmax(scores)
        for b in range(len(gold)):
            for h in range(pattern.shape[1]):
                right = sum(
                    pattern[b, h, p]
                    for p, y in zip(positions[b], labels[b], strict=True)
                    if y == gold[b]
                )
                wrong = sum(
                    pattern[b, h, p]
                    for p, y in zip(positions[b], labels[b], strict=True)
                    if y != gold[b]
                )
                if use_filter and right + wrong <= K / (K + math.log(last[b] + 1)):
                    continue
                heads += 1
                punish += wrong
                reward += 1 - right
    return A * punish + B_ * reward, punish, reward, heads


def terms(case, A=0.5, B_=1.0, **options):
    rows, positions, labels, gold, last = case
    patterns = [mx.softmax(mx.array(one.astype(np.float32)), axis=-1) for one in rows]
    return abft_terms(
        patterns,
        mx.array(positions),
        mx.array(labels),
        mx.array(gold),
        mx.array(last),
        punish_weight=A,
        reward_weight=B_,
        **options,
    )


def loss_of_scores(case):
    """Scores of every layer to the loss, with A = .5 and B = 1."""
    _, positions, labels, gold, last = case

    def loss(scores):
        return abft_terms(
            [mx.softmax(one, axis=-1) for one in scores],
            mx.array(positions),
            mx.array(labels),
            mx.array(gold),
            mx.array(last),
            punish_weight=0.5,
            reward_weight=1.0,
        ).loss

    return loss


@pytest.mark.parametrize("use_filter", [True, False])
@pytest.mark.parametrize(("A", "B_"), [(0.5, 1.0), (0.0, 1.0), (0.5, 0.0), (2.0, 0.3)])
def test_loss_and_head_count_equal_float64(case, A, B_, use_filter):
    got = [one.item() for one in terms(case, A, B_, use_filter=use_filter)]
    want = reference(*case, A, B_, use_filter)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    kept = want[3]
    total = B * sum(HEADS)
    assert kept == total if not use_filter else 3 < kept < total - 3


def test_gradient_equals_finite_differences(case):
    rows, positions, _, _, last = case

    gradients = mx.grad(loss_of_scores(case))([mx.array(one.astype(np.float32)) for one in rows])
    rng = np.random.default_rng(0)
    step = 1e-5
    for layer, gradient in enumerate(gradients):
        for _ in range(40):
            b, h = rng.integers(B), rng.integers(rows[layer].shape[1])
            t = rng.choice([*positions[b], rng.integers(last[b] + 1)])
            moved = []
            for sign in (1, -1):
                shifted = [one.copy() for one in rows]
                shifted[layer][b, h, t] += sign * step
                moved.append(reference(shifted, *case[1:], 0.5, 1.0)[0])
            assert gradient[b, h, t].item() == pytest.approx(
                (moved[0] - moved[1]) / (2 * step), abs=2e-6
            )


def test_no_gradient_where_the_filter_drops_a_head(case):
    flat = [np.where(one < -1e8, one, 0.0) for one in case[0]]

    gradients = mx.grad(loss_of_scores(case))([mx.array(one.astype(np.float32)) for one in flat])
    assert all(mx.abs(one).max().item() == 0 for one in gradients)


def test_cutting_a_batch_changes_nothing(case):
    rows, positions, labels, gold, last = case
    whole = [one.item() for one in terms(case)]
    cut = np.zeros(4)
    for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
        piece = ([one[part] for one in rows], positions[part], labels[part], gold[part], last[part])
        cut += [one.item() for one in terms(piece)]
    np.testing.assert_allclose(cut, whole, rtol=1e-6)


def test_filling_rows_do_not_count(case):
    weights = mx.array([1.0, 1.0, 0.0, 1.0, 0.0])
    rows, positions, labels, gold, last = case
    kept = [0, 1, 3]
    want = reference(
        [one[kept] for one in rows], positions[kept], labels[kept], gold[kept], last[kept], 0.5, 1.0
    )
    got = [one.item() for one in terms(case, prompt_weights=weights)]
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_pid_by_hand():
    """Heads 10, 12, 15, 13, worked by hand with Cp .03, Ci .005, Cd .005.

    t=3: .5 + .03·3 + .005·5 + .005·(15 - 24 + 10) = .62
    t=4: .62 + .03·(-2) + .005·3 + .005·(13 - 30 + 12) = .55
    """
    controller = PunishController(0.5)
    weights = [controller.update(heads) for heads in (10.0, 12.0, 15.0, 13.0)]
    assert weights == pytest.approx([0.5, 0.5, 0.62, 0.55])


def test_pid_integral_equals_the_sum_of_the_paper():
    heads = [30.0, 33.0, 31.0, 40.0, 44.0, 38.0, 39.5]
    controller = PunishController(0.5)
    want = 0.5
    for t, count in enumerate(heads, start=1):
        got = controller.update(count)
        if t > 2:
            integral = sum(heads[i] - heads[i - 1] for i in range(1, t))
            want += 0.03 * (count - heads[t - 2]) + 0.005 * integral
            want += 0.005 * (count - 2 * heads[t - 2] + heads[t - 3])
        assert got == pytest.approx(want)


def test_pid_is_clamped_at_zero_and_recovers():
    controller = PunishController(0.1)
    for heads in (100.0, 100.0, 50.0):
        weight = controller.update(heads)
    assert weight == 0.0
    assert controller.update(150.0) == pytest.approx(0.03 * 100 + 0.005 * 50 + 0.005 * 150)


@pytest.mark.parametrize(("other", "kept"), [(-1, 1), (1, 0)])
def test_the_prompts_length_is_one_more_than_its_last_position(other, kept):
    """A head whose mass lies between the thresholds of n and n - 1 tokens is kept, below not."""
    n = 12
    between = (K / (K + math.log(n)) + K / (K + math.log(n + other))) / 2
    pattern = np.full((1, 1, n), (1 - between) / (n - K))
    pattern[..., :K] = between / K
    got = abft_terms(
        [mx.array(pattern.astype(np.float32))],
        mx.array([list(range(K))]),
        mx.array([[0, 1, 1, 0]]),
        mx.array([0]),
        mx.array([n - 1]),
        punish_weight=0.5,
        reward_weight=1.0,
    )
    assert got.induction_heads.item() == kept


def test_end_to_end_terms_by_hand():
    """Two prompts of targets of one and two tokens; equation 1 as abft_terms has it."""
    # The third row predicts what stands behind a target, and is not looked at.
    logits = mx.array([[[1.0, 2.0, -1.0], [9.0, 9.0, -9.0]], [[300.0, 0.0, 5.0], [0.0, 0.0, 0.0]]])
    target = mx.array([[1, -1], [2, 0]])
    pattern = mx.random.uniform(shape=(2, 4, 6), key=mx.random.key(0))
    where = (mx.array([[0, 2], [1, 4]]), mx.array([[0, 1], [1, 1]]), mx.array([1, 0]))
    last = mx.array([5, 4])
    weights = mx.array([1.0, 0.5])
    got = end_to_end_terms(logits, target, [pattern, None], *where, last, prompt_weights=weights)
    first = -np.log(np.exp(2) / np.exp([1.0, 2.0, -1.0]).sum())
    assert got.loss.item() == pytest.approx(first + 0.5 * (295.0 + np.log(3)), rel=1e-6)
    seen = abft_terms(
        [pattern, None], *where, last, punish_weight=1, reward_weight=1, prompt_weights=weights
    )
    assert [one.item() for one in got[1:]] == [one.item() for one in seen[1:]]
    whole = end_to_end_terms(logits, target, [pattern, None], *where, last)
    assert whole.loss.item() == pytest.approx(first + 295.0 + np.log(3), rel=1e-6)
    gradient = mx.grad(lambda rows: end_to_end_terms(logits, target, [rows], *where, last).loss)
    assert not mx.any(gradient(pattern)).item()
