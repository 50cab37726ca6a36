"""Rewards and Hi-GRPO (train.py sections 6 and 7): hand-worked numbers, properties, and another implementation's."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icseg_jax import train

GOLDEN = np.load(Path(__file__).parent / "golden" / "loss.npz")
CASES = sorted({name.split("_")[0] for name in GOLDEN.files})
TRUTH = {"18": {"bbox_2d": [104, 396, 226, 640], "point_2d": [165, 515], "area": 1.0, "max_conn_area": 0.9}}


def process(counts, questions, *, formed=True, ambiguous=True, kind="reduction"):
    asked = np.arange(len(counts) - 1) < questions
    return train.process_reward(np.array(counts), asked, np.array(formed), np.array(ambiguous), kind=kind)


# Hand-worked numbers (METHOD.md 8 Q19 and section 10)


def test_worked_example():
    got = train.localisation_rewards(18, (100, 400, 220, 640), (160, 520), TRUTH)
    assert got == {"iou": 1.0, "box": 1.0, "point": 1.0, "frame": 0.9}
    earned = process([3, 2, 1], 2)
    assert float(earned) == pytest.approx(0.75)
    assert sum(got.values()) + float(earned) == pytest.approx(4.65)


def test_guess_and_redundant_question():
    assert float(process([3, 3, 3], 0)) == 0.0
    assert float(process([1, 1, 1], 0, ambiguous=False)) == 1.0
    assert float(process([3, 2, 1, 1], 3)) == pytest.approx(0.5)
    assert float(process([1, 1], 1, ambiguous=False)) == 0.0


@pytest.mark.parametrize(
    ("kind", "gains", "earned"),
    [
        ("reduction", [2 / 3, 0, 1], 5 / 9),
        ("ratio", [1 / 2, 0, 1 / 2], 1 / 3),
        ("log", [0.5, 0, 1.0], 0.5),
        ("resolution_x_efficiency", [2 / 3, 0, 1], 2 / 3),
        ("linear", [2 / 3, 0, 1], 0.9),
        ("format", [2 / 3, 0, 1], 1.0),
        ("parent_tpr", [2 / 3, 0, 1], 1 - 0.3**4),
    ],
)
def test_process_kinds(kind, gains, earned):
    counts = [4, 2, 2, 1]
    got = train.turn_gains(np.array(counts), np.ones(3, bool), kind=kind)
    np.testing.assert_allclose(got, gains, rtol=1e-6, atol=1e-7)
    assert float(process(counts, 3, kind=kind)) == pytest.approx(earned, rel=1e-6)


def test_step_weight_constants():
    def weight(advantage, delta):
        w = train.step_weights(np.array([advantage]), np.array([delta]), np.zeros(1), np.array(True), clip=0.2)
        return float(w[0]), float(train.modulate(np.array([advantage]), w, 0.5)[0])

    assert weight(1.0, math.log(2)) == pytest.approx((1.2, 1.1))
    assert weight(-1.0, math.log(2)) == pytest.approx((0.8, -0.9))
    assert weight(1.0, 0.1) == pytest.approx((1.10517, 1.05259), rel=1e-5)
    assert weight(0.0, 5.0) == (1.0, 0.0)


def test_lambda_schedule():
    section = train.CreditSection(lam=0.5, lam_start=1, lam_decay=100)
    assert [float(train.step_strength(section, s)) for s in (0, 1, 51, 101, 500)] == [0.5, 0.5, 0.25, 0.0, 0.0]


def test_group_advantages_by_hand():
    np.testing.assert_allclose(
        train.group_advantages(np.array([[1.0, 2, 3, 4]])), [[-1.1619, -0.3873, 0.3873, 1.1619]], atol=1e-4
    )
    equal = np.full((3, 8), 0.1 + 0.7, np.float32)
    assert (np.asarray(train.group_advantages(equal)) == 0).all()
    alone = np.asarray(train.group_advantages(np.array([[2.5]])))
    np.testing.assert_allclose(alone, [[2.5]], rtol=1e-5)


def test_invalid_rows_are_outside_the_statistics():
    returns = np.array([[1.0, 2, 3, 99]])
    got = np.asarray(train.group_advantages(returns, valid=np.array([[True, True, True, False]])))
    np.testing.assert_allclose(got[0, :3], np.asarray(train.group_advantages(returns[:, :3]))[0], rtol=1e-6)
    assert got[0, 3] == 0


@pytest.mark.parametrize(
    ("given", "initial", "questions", "counts", "usable"),
    [
        ([3, 2, 1], 3, 2, [3, 2, 1], True),
        ([3, 2], 3, 2, [3, 2, 2], False),  # too short: the last is repeated
        ([3, 2, 1, 1], 3, 2, [3, 2, 1], False),  # too long: cut
        ([3, 5, 1], 3, 2, [3, 3, 1], False),  # increasing
        ([3, 0, -4], 3, 2, [3, 1, 1], False),  # the target always remains
        ([7, 2, 1], 3, 2, [3, 2, 1], False),  # the sample's own count wins
        (None, 3, 2, [3, 3, 3], False),
        ("3,2,1", 3, 2, [3, 3, 3], False),
        ([True, 2, 1], 3, 2, [3, 3, 3], False),
        ([5, 5, 5], 0, 2, [0, 0, 0], True),  # no target
        ([4, 2, 1], -1, 2, [4, 2, 1], True),  # the sample's own count is not known
        ([-3, 2], -1, 1, [1, 1], False),
        (None, -1, 1, [1, 1], False),
        ([10**30, 1], -1, 1, [train.MOST, 1], False),  # no count at all, but a number
    ],
)
def test_counts_are_made_fit(given, initial, questions, counts, usable):
    assert train.check_counts(given, initial, questions) == (counts, usable)


@pytest.mark.parametrize("given", [None, [], "3,2,1", 3, [3.0, 2], [True], [None], {"counts": [3]}])
def test_what_holds_no_counts_is_known(given):
    assert not train.readable_counts(given)
    assert train.readable_counts([3, -1]) and train.readable_counts((3,))


def test_parent_tpr_by_hand():
    """1-0.3^k with k the calls, at most 10, and the format term; samples without ambiguity earn the format term."""
    kind = "parent_tpr"
    assert float(process([3, 3, 3], 0, kind=kind)) == pytest.approx(0.7)
    assert float(process([3, 3, 3], 0, kind=kind, formed=False)) == 0.0
    assert float(process([3] * 14, 13, kind=kind)) == pytest.approx(1 - 0.3**11)
    assert float(process([1, 1, 1], 2, ambiguous=False, kind=kind)) == 1.0


def test_slots_that_were_not_asked_do_not_count():
    """What stands behind the last question, whatever it is, is not a count."""
    for kind in train.TURN_KINDS:
        padded = [float(process([4, 2, rest, rest], 1, kind=kind)) for rest in (0, 1, 2, 9)]
        assert len(set(padded)) == 1, kind


def test_equal_gains_have_no_advantage():
    for gain, count in ((2 / 3, 7), (2 / 3, 11), (1 / 3, 7), (0.1, 64)):
        gains = np.full((1, 1, count), gain, np.float32)
        assert (np.asarray(train.turn_advantages(gains, np.ones(gains.shape, bool))) == 0).all()
    nothing = train.turn_advantages(np.ones((2, 3, 4)), np.zeros((2, 3, 4), bool))
    assert (np.asarray(nothing) == 0).all()


def test_unknown_kinds_are_refused():
    for call in (train.turn_gains, lambda c, a, kind: train.process_reward(c, a, a, a, kind=kind)):
        with pytest.raises(ValueError, match="reduction"):
            call(np.array([3, 1]), np.array([True]), kind="best")


def test_spread_is_that_of_valid_rows():
    values, valid = np.array([[1.0, 1, 9], [1, 3, 9], [1, 2, 3]]), np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0]], bool)
    np.testing.assert_allclose(train.group_spread(values, valid), [0, math.sqrt(2), 0])


# Against another implementation (tests/golden/README.md)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_verl(case):
    put = {k: GOLDEN[f"{case}_in_{k}"] for k in ("R", "mask", "adv", "old", "lp", "s", "t")}
    for divide in (True, False):
        got = np.asarray(train.group_advantages(put["R"], normalise_std=divide)).reshape(-1, 1) * put["mask"]
        np.testing.assert_allclose(got, GOLDEN[f"{case}_adv_{int(divide)}"], rtol=1e-5, atol=1e-6)
    for name in (n for n in GOLDEN.files if n.startswith(f"{case}_ppo")):
        low, high, dual = map(float, name.split("_")[2:])
        got, _ = train.policy_loss(
            put["lp"], put["old"], put["adv"], put["mask"], clip_low=low, clip_high=high, dual_clip=dual
        )
        assert float(got) == pytest.approx(float(GOLDEN[name]), rel=1e-5)
    for name in (n for n in GOLDEN.files if n.startswith(f"{case}_sdpo")):
        alpha = float(name.split("_")[2])
        got, _ = train.sdpo_loss(put["s"], put["t"], put["lp"], put["old"], put["mask"], alpha=alpha)
        assert float(got) == pytest.approx(float(GOLDEN[name]), rel=1e-5)


# Against an independent version in float64, on shapes of every kind


def reference_advantages(returns, valid, divide):
    out = np.zeros(returns.shape)
    for g in range(len(returns)):
        rows = np.flatnonzero(valid[g])
        if not len(rows):
            continue
        values = returns[g, rows]
        mean, std = (values.mean(), values.std(ddof=1)) if len(rows) > 1 else (0.0, 1.0)
        out[g, rows] = (values - mean) / (std + 1e-6) if divide else values - mean
    return out


def reference_turns(gains, asked):
    out = np.zeros(gains.shape)
    for g in range(len(gains)):
        pool = gains[g][asked[g]]
        if len(pool) >= 2:
            out[g] = np.where(asked[g], (gains[g] - pool.mean()) / (pool.std(ddof=1) + 1e-6), 0)
    return out


def reference_loss(logp, old, advantages, mask, low, high, dual):
    total, count = 0.0, 0
    for where in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(np.clip(logp[where] - old[where], -20, 20))
        a = advantages[where]
        value = max(-a * ratio, -a * np.clip(ratio, 1 - low, 1 + high))
        total, count = total + (min(value, -a * dual) if a < 0 else value), count + 1
    return total / max(count, 1)


def reference_process(counts, asked, formed, ambiguous, kind):
    k = int(asked.sum())
    if kind == "format":
        return float(formed)
    if kind == "parent_tpr":
        return 1 - 0.3 ** (min(k, 10) + formed) if ambiguous else float(formed)
    if not k:
        return 0.0 if ambiguous and counts[0] > 1 else float(formed)
    gains = []
    for q in np.flatnonzero(asked):
        a, b = counts[q], counts[q + 1]
        if a <= 1:
            gains.append(0.0)
        else:
            gains.append({"ratio": 1 - b / a, "log": np.log(a / b) / np.log(a)}.get(kind, (a - b) / (a - 1)))
    last = counts[np.flatnonzero(asked)[-1] + 1]
    solved = (counts[0] - last) / (counts[0] - 1) if counts[0] > 1 else 0.0
    if kind == "resolution_x_efficiency":
        return formed * solved * sum(g > 0 for g in gains) / k
    if kind == "linear":
        return formed * max(solved - 0.1 * sum(g <= 0 for g in gains), 0.0)
    return formed * sum(gains) / k


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 7), (5, 16), (1, 33)])
def test_group_advantages_equal_the_reference(shape, divide):
    rng = np.random.default_rng(shape)
    returns = rng.normal(size=shape) * rng.choice([0, 1e-3, 1, 1e3], (shape[0], 1))  # one group may have no spread
    valid = rng.random(shape) < 0.8
    got = train.group_advantages(returns.astype(np.float32), valid=valid, normalise_std=divide)
    want = reference_advantages(returns.astype(np.float32).astype(np.float64), valid, divide)
    scale = np.abs(returns).max(-1, keepdims=True)  # of what is subtracted: float32 keeps so much of it
    near = np.abs(np.asarray(got) - want) <= 1e-5 * np.maximum(np.abs(want), 1 if divide else scale)
    assert near.all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 7, 2), (3, 16, 6)])
def test_turn_advantages_equal_the_reference(shape):
    rng = np.random.default_rng(shape)
    gains, asked = rng.random(shape), rng.random(shape) < 0.5
    got = np.asarray(train.turn_advantages(gains, asked))
    np.testing.assert_allclose(got, reference_turns(gains, asked), rtol=1e-5, atol=1e-5)
    turn = rng.integers(-1, 7, (*shape[:2], 11))
    asked_in = np.where(asked, np.arange(shape[2]), -2)
    laid = np.asarray(train.on_question_turns(got, asked_in, turn))
    for g, n, t in np.ndindex(turn.shape):
        at = turn[g, n, t]
        want = got[g, n, at] if 0 <= at < shape[2] and asked[g, n, at] else 0
        assert laid[g, n, t] == np.float32(want)


@pytest.mark.parametrize("kind", train.TURN_KINDS)
def test_process_reward_equals_the_reference(kind):
    rng = np.random.default_rng(5)
    for _ in range(60):
        questions, slots = rng.integers(0, 6), 6
        first = int(rng.integers(1, 9))
        counts = np.minimum.accumulate(np.r_[first, rng.integers(1, 9, slots)])
        counts[questions + 1 :] = rng.integers(0, 9)  # never read
        asked = np.arange(slots) < questions
        formed, ambiguous = np.array(rng.integers(2) == 1), np.array(rng.integers(2) == 1)
        got = float(train.process_reward(counts, asked, formed, ambiguous, kind=kind))
        assert got == pytest.approx(reference_process(counts, asked, formed, ambiguous, kind), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", train.TURN_KINDS)
def test_leading_axes_broadcast(kind):
    """Every mixture of [P,N], [N] and [] gives what single rows give."""
    counts = np.minimum.accumulate(np.random.default_rng(1).integers(1, 9, (2, 3, 5)), -1)
    asked = np.arange(4) < np.array([2, 0, 4])[:, None]  # [N,Q]
    formed, ambiguous = np.array([[True], [False]]), np.array(True)
    got = np.asarray(train.process_reward(counts, asked, formed, ambiguous, kind=kind))
    gains = np.asarray(train.turn_gains(counts, asked, kind=kind))
    assert got.shape == (2, 3) and gains.shape == (2, 3, 4)
    for i, j in np.ndindex(2, 3):
        want = reference_process(counts[i, j], asked[j], formed[i, 0], ambiguous, kind)
        assert got[i, j] == pytest.approx(want, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(gains[i, j], train.turn_gains(counts[i, j], asked[j], kind=kind), rtol=1e-6)
    one = train.process_reward(counts[0, 0], asked, formed, ambiguous, kind=kind)
    assert one.shape == (2, 3)


def test_redundant_questions_cost_what_is_set():
    asked = np.ones(3, bool)
    for cost, want in ((0.0, 1.0), (0.1, 0.9), (0.4, 0.6), (2.0, 0.0)):
        args = (np.array([4, 2, 2, 1]), asked, np.array(True), np.array(True))
        assert float(train.process_reward(*args, kind="linear", redundant_cost=cost)) == pytest.approx(want)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1, 5), (2, 4, 9)])
def test_policy_loss_equals_the_reference(shape):
    rng = np.random.default_rng(shape)
    for spread, keep in ((0.1, 0.7), (3.0, 0.7), (60.0, 1.0), (1.0, 0.0)):
        draw = lambda by, rng=rng: (rng.normal(size=shape) * by).astype(np.float32)  # noqa: E731
        logp, old, advantages = draw(spread), draw(1), draw(3)
        mask = rng.random(shape) < keep
        got, stats = train.policy_loss(logp, old, advantages, mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        change = (logp.astype(float) - old)[mask].clip(-20, 20)
        cut = np.where(advantages[mask] > 0, change > np.log(1.28), change < np.log(0.8)) & (advantages[mask] != 0)
        for name, each in (("ratio", np.exp(change)), ("kl", np.exp(change) - 1 - change), ("clip_fraction", cut)):
            told = each.mean() if mask.any() else 0.0
            assert float(stats[name]) == pytest.approx(told, rel=1e-4, abs=1e-6), name
        want = reference_loss(*(x.astype(float) for x in (logp, old, advantages)), mask, 0.2, 0.28, 3)
        assert float(got) == pytest.approx(want, rel=1e-5, abs=1e-6)
        # Leading axes broadcast: one mask for all is the same mask many times.
        wide = [np.broadcast_to(x, (3, *shape)) for x in (logp, old, advantages)]
        again, _ = train.policy_loss(*wide, mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
        assert float(again) == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1, 5), (2, 4, 9)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_self_distillation_equals_the_reference(shape, alpha):
    """METHOD.md 4.10, token by token in float64."""
    rng = np.random.default_rng(len(shape))

    def top(k):
        full = rng.normal(size=(*shape, 12)) * 2
        return (full - np.log(np.exp(full).sum(-1, keepdims=True)))[..., :k]

    student, teacher, logp, old = top(5), top(5), -rng.random(shape), -rng.random(shape)
    mask = rng.random(shape) < 0.7
    got, _ = train.sdpo_loss(student, teacher, logp, old, mask, alpha=alpha, is_clip=2.0)
    total = 0.0
    for at in zip(*np.nonzero(mask), strict=True):
        s, t = (np.append(np.exp(x[at]), 1 - np.exp(x[at]).sum()) for x in (student, teacher))
        kl = lambda a, b: float((a * np.log(a / b)).sum())  # noqa: E731
        m = (1 - alpha) * s + alpha * t
        each = kl(t, s) if alpha == 0 else kl(s, t) if alpha == 1 else (1 - alpha) * kl(s, m) + alpha * kl(t, m)
        total += each * min(np.exp(logp[at] - old[at]), 2.0)
    assert float(got) == pytest.approx(total / max(mask.sum(), 1), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 9)])
def test_step_level_equals_the_reference(shape):
    rng = np.random.default_rng(shape)
    for spread in (0.05, 3.0, 1e4):
        advantages = rng.normal(size=shape) * rng.integers(0, 2, shape)
        teacher, student = rng.normal(size=shape) * spread, rng.normal(size=shape) * spread
        context = rng.random(shape[:-1]) < 0.6
        got = train.step_weights(advantages, teacher, student, context, clip=0.2)
        delta = np.clip(np.float32(teacher).astype(float) - np.float32(student), -20, 20)
        want = np.where(context[..., None], np.clip(np.exp(np.sign(advantages) * delta), 0.8, 1.2), 1)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        for lam in (0.0, 0.25, 1.0):
            np.testing.assert_allclose(
                train.modulate(advantages, got, lam), advantages * ((1 - lam) + lam * want), rtol=1e-5, atol=1e-9
            )


def test_small_weights_are_exact():
    """(1 - lam) + lam * w, not 1 + lam * (w - 1), which loses what is small."""
    weights = np.geomspace(1e-6, 5, 41).astype(np.float32)
    for lam in (0.5, 0.999, 1.0):
        got = train.modulate(np.full(41, -3.0, np.float32), weights, lam)
        want = -3 * ((1 - lam) + lam * weights.astype(float))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert (np.asarray(got) < 0).all()
    wide = train.step_weights(np.array([1.0]), np.array([-50.0]), np.zeros(1), np.array(True), clip=0.999)
    assert float(train.modulate(np.array([2.0]), wide, 1.0)[0]) == pytest.approx(2e-3, rel=1e-4)


def reference_box_iou(a, b):
    """Inclusive pixels, counted."""
    grid = lambda r: {(x, y) for x in range(r[0], r[2] + 1) for y in range(r[1], r[3] + 1)}  # noqa: E731
    if min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]):
        return 0.0
    return len(grid(a) & grid(b)) / len(grid(a) | grid(b))


def test_localisation_equals_the_reference():
    rng = np.random.default_rng(2)
    for _ in range(200):
        corners = np.sort(rng.integers(0, 30, (2, 2, 2)), 1)
        (x1, y1), (x2, y2) = corners[0]
        box, best = [int(v) for v in (x1, y1, x2, y2)], [int(v) for v in corners[1].ravel()]
        point, centre = rng.integers(0, 30, (2, 2)).tolist()
        truth = {"5": {"bbox_2d": best, "point_2d": centre, "area": 1.0, "max_conn_area": 0.7}}
        got = train.localisation_rewards(5, box, point, truth, iou=0.4, box_l1=5, point_l2=9)
        inside = box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
        near = math.dist(point, centre) < 9
        assert got == {
            "iou": float(reference_box_iou(box, best) > 0.4),
            "box": float(np.abs(np.subtract(box, best)).mean() < 5),
            "point": float(inside and near),
            "frame": 0.7,
        }
        assert set(train.localisation_rewards(6, box, point, truth).values()) == {0.0}


def test_levels_by_hand():
    """METHOD.md 4.2-4.4 on one group of two rollouts, worked on paper."""
    returns = np.array([[1.0, 3.0]])
    args = dict(
        valid=np.ones((1, 2), bool), gains=np.array([[[1.0], [0.0]]]), asked_in=np.array([[[0], [0]]]),
        turn=np.array([[[0, -1, 1], [0, -1, 1]]]), mask=np.array([[[1, 0, 1], [1, 0, 1]]], bool),
        logp_teacher=np.full((1, 2, 3), np.log(2.0)), logp_student=np.zeros((1, 2, 3)),
        has_context=np.array([[True, False]]), lam=0.5,
    )  # fmt: skip
    half = math.sqrt(0.5)  # (1 - 2) / std of {1, 3}, which is sqrt 2
    tokens, weight = train.hierarchical_advantages(train.CreditSection(), returns, **args)
    np.testing.assert_allclose(weight, [[[0.8, 1, 0.8], [1, 1, 1]]], rtol=1e-6)  # A < 0; A = 0 gives exp(0)
    np.testing.assert_allclose(tokens, [[[-0.9 * half, 0, -0.9 * half], [half, 0, half]]], rtol=1e-5)
    local = train.CreditSection(turn_credit="local", turn_weight=0.5)
    tokens, _ = train.hierarchical_advantages(local, returns, **{**args, "lam": 0.0})
    np.testing.assert_allclose(tokens, [[[-half + 0.5 * half, 0, -half], [half - 0.5 * half, 0, half]]], rtol=1e-4)
    # Deltas of ln 0.9 and ln 1.25 on two generations: weights 1/0.9 and 0.8 where A < 0, their mean in the last row.
    uneven = {**args, "logp_teacher": np.log(np.array([[[0.9, 7, 1.25]] * 2])), "has_context": np.ones((1, 2), bool)}
    plain = np.asarray(train.hierarchical_advantages(train.CreditSection(), returns, **uneven)[1])
    np.testing.assert_allclose(plain[0, :, ::2], [[1 / 0.9, 0.8], [0.9, 1.2]], rtol=1e-6)
    mean_one = train.CreditSection(normalize_weight_by_seq_mean=True)
    one = np.asarray(train.hierarchical_advantages(mean_one, returns, **uneven)[1])
    np.testing.assert_allclose(one[..., ::2], plain[..., ::2] / plain[..., ::2].mean(-1, keepdims=True), rtol=1e-6)
    # credit.weigh: the question was asked in generation 0, what follows keeps weight 1.
    asked = np.asarray(train.hierarchical_advantages(train.CreditSection(weigh="questions"), returns, **uneven)[1])
    np.testing.assert_array_equal(asked[..., 0], plain[..., 0])
    assert (asked[..., 2] == 1).all()
    # credit.weight_clip and credit.turn_weight are those of the config.
    wide = np.asarray(train.hierarchical_advantages(train.CreditSection(weight_clip=0.5), returns, **args)[1])
    np.testing.assert_allclose(wide[0, 0, ::2], 0.5, rtol=1e-6)
    heavy = train.CreditSection(turn_credit="local", turn_weight=2.0)
    tokens, _ = train.hierarchical_advantages(heavy, returns, **{**args, "lam": 0.0})
    np.testing.assert_allclose(tokens[0, :, 0], [-half + 2 * half, half - 2 * half], rtol=1e-4)


@given(
    st.integers(0, 2**31), st.sampled_from(["scalar", "local"]), st.booleans(), st.booleans(),
    st.sampled_from(["all", "questions"]),
)  # fmt: skip
def test_all_levels_together(seed, turn_credit, failures, mean_one, weigh):
    """Under every switch: signs are those without the step level, rows may be shuffled, masked tokens get nothing."""
    rng = np.random.default_rng(seed)
    p, n, q, t = 2, 4, 3, 9
    c = train.CreditSection(
        turn_credit=turn_credit, vanilla_on_nonnegative_adv=failures, normalize_weight_by_seq_mean=mean_one, weigh=weigh
    )
    turn = np.sort(rng.integers(-1, 4, (p, n, t)), -1)
    args = [
        rng.integers(0, 4, (p, n)).astype(np.float32), rng.random((p, n)) < 0.8, rng.random((p, n, q)),
        np.where(rng.random((p, n, q)) < 0.7, np.arange(q), -2), turn, (turn >= 0) & (rng.random((p, n, t)) < 0.9),
        rng.normal(size=(p, n, t)), rng.normal(size=(p, n, t)), rng.random((p, n)) < 0.6,
    ]  # fmt: skip
    tokens, weight = map(np.asarray, train.hierarchical_advantages(c, *args, 0.7))
    plain, _ = map(np.asarray, train.hierarchical_advantages(c, *args, 0.0))
    mask, context = args[5], args[8]
    poison = [np.where(mask, x, np.nan) for x in args[6:8]]  # what masked tokens are worth reaches nothing
    poisoned = train.hierarchical_advantages(c, *args[:6], *poison, context, 0.7)
    np.testing.assert_array_equal(tokens, poisoned[0])
    np.testing.assert_array_equal(weight, poisoned[1])
    weighed = mask & context[..., None]
    if weigh == "questions":
        weighed &= (turn[..., None] == args[3][:, :, None]).any(-1)
    if failures:
        weighed &= plain < 0
    assert (weight[~weighed] == 1).all()
    if mean_one:
        for i, j in np.ndindex(p, n):
            assert not weighed[i, j].any() or weight[i, j][weighed[i, j]].mean() == pytest.approx(1, rel=1e-4)
    assert (np.sign(tokens) == np.sign(plain)).all() and (tokens[~args[5]] == 0).all()
    assert (weight[~args[8]] == 1).all() and np.array_equal(tokens[~args[8]], plain[~args[8]])
    order = rng.permutation(n)
    shuffled, _ = train.hierarchical_advantages(c, *(x[:, order] for x in args), 0.7)
    np.testing.assert_allclose(shuffled, tokens[:, order], rtol=1e-4, atol=1e-5)


# Properties

# Below 1e-30 a product may leave float32's normal numbers, which XLA takes for 0.
finite = st.floats(-50, 50, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-30 else 0.0)
kinds = st.sampled_from(train.TURN_KINDS)


@given(st.data(), st.sampled_from([1, 2, 5]), st.sampled_from([1, 4, 9]))  # few shapes: each is compiled
def test_signs_survive_the_step_level(data, n, length):
    draw = lambda: np.array(data.draw(st.lists(finite, min_size=n * length, max_size=n * length))).reshape(n, length)  # noqa: E731
    advantages, teacher, student = draw(), draw(), draw()
    context = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    weight = train.step_weights(advantages, teacher, student, context)
    for lam in (0.0, 0.3, 1.0):
        changed = np.asarray(train.modulate(advantages.astype(np.float32), weight, lam))
        assert (np.sign(changed) == np.sign(advantages.astype(np.float32))).all()
    assert (np.asarray(weight)[~context] == 1).all()
    assert np.array_equal(train.modulate(advantages.astype(np.float32), weight, 0.0), advantages.astype(np.float32))


@given(st.data(), st.integers(1, 6), kinds)
def test_process_reward_stays_in_range(data, questions, kind):
    first = data.draw(st.integers(0, 9))
    counts, _ = train.check_counts(data.draw(st.lists(st.integers(-3, 12), max_size=8)), first, questions)
    asked = data.draw(st.lists(st.booleans(), min_size=questions, max_size=questions))
    asked = np.array(asked)
    formed, ambiguous = np.array(data.draw(st.booleans())), np.array(first > 1)
    got = float(train.process_reward(np.array(counts), asked, formed, ambiguous, kind=kind))
    assert 0 <= got <= 1
    gains = np.asarray(train.turn_gains(np.array(counts), asked, kind=kind))
    assert ((gains >= 0) & (gains <= 1)).all()


@jax.jit
def loss_and_slope(logp, old, advantages, mask):
    loss = lambda x: train.policy_loss(x, old, advantages, mask, clip_low=0.2, clip_high=0.28)[0]  # noqa: E731
    return jax.value_and_grad(loss)(logp)


@given(st.data())
def test_masked_tokens_touch_nothing(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    logp, old, advantages = -rng.random((2, 3, 6)), -rng.random((2, 3, 6)), rng.normal(size=(2, 3, 6))
    mask = rng.random((2, 3, 6)) < 0.6
    value, slope = loss_and_slope(logp, old, advantages, mask)
    poison = np.where(mask, 0.0, data.draw(st.sampled_from([np.nan, np.inf, -1e30, 3.0])))
    value2, slope2 = loss_and_slope(logp + poison, old + poison, advantages + poison, mask)
    assert float(value) == float(value2)
    assert np.array_equal(np.asarray(slope), np.asarray(slope2))
    assert (np.asarray(slope)[~mask] == 0).all()
    assert float(loss_and_slope(logp, old, advantages, np.zeros_like(mask))[0]) == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1e30])
def test_masked_tokens_do_not_reach_self_distillation(poison):
    rng = np.random.default_rng(4)
    student, teacher = (np.log(rng.dirichlet(np.ones(9), (2, 5))[..., :6]) for _ in range(2))
    logp, old, mask = -rng.random((2, 5)), -rng.random((2, 5)), rng.random((2, 5)) < 0.6
    there = np.where(mask, 0.0, poison)
    loss = lambda s, x: train.sdpo_loss(s, teacher + there[..., None], x, old + there, mask)[0]  # noqa: E731
    clean = lambda s, x: train.sdpo_loss(s, teacher, x, old, mask)[0]  # noqa: E731
    value, slopes = jax.value_and_grad(clean, (0, 1))(student, logp)
    value2, slopes2 = jax.value_and_grad(loss, (0, 1))(student + there[..., None], logp + there)
    assert float(value) == float(value2) > 0
    for a, b in zip(slopes, slopes2, strict=True):
        assert np.array_equal(a, b) and (np.asarray(b)[~mask] == 0).all()
    assert float(train.sdpo_loss(student, teacher, logp, old, np.zeros_like(mask))[0]) == 0


def test_dual_clip_bounds_bad_rows():
    loss, _ = train.policy_loss(
        jnp.array([5.0]), jnp.array([0.0]), jnp.array([-1.0]), jnp.array([1]), clip_low=0.2, clip_high=0.2
    )
    assert float(loss) == pytest.approx(3.0)


def test_extreme_ratios_stay_finite():
    loss, stats = train.policy_loss(
        jnp.array([500.0, -500.0]), jnp.zeros(2), jnp.array([1.0, -1.0]), jnp.ones(2), clip_low=0.2, clip_high=0.2
    )
    assert np.isfinite(float(loss)) and all(np.isfinite(float(v)) for v in stats.values())


# Model text of any kind is a parse result, and any parse result earns a reward in range

HOSTILE = [
    '<answer> {"bbox_2d": [1e308, -1e308, 1e308, 1e308], "point_2d": [1e308, 0]} </answer>',
    '<answer> {"bbox_2d": [NaN, 1, 2, 3], "point_2d": [1, 2]} </answer>',
    '<answer> {"bbox_2d": [true, 1, 2, 3], "point_2d": [1, 2]} </answer>',
    '<answer> {"bbox_2d": ["1", 1, 2, 3], "point_2d": [1, 2]} </answer>',
    '<answer> {"bbox_2d": [[1], 1, 2, 3], "point_2d": [1, 2]} </answer>',
    '<answer> {"bbox_2d": [-5, -5, -1, -1], "point_2d": [-3, -3]} </answer>',
    '<answer> {"bbox_2d": [' + "9" * 5000 + ", 1, 2, 3]}</answer>",
    "<answer>" + "[" * 100_000 + "</answer>",
    "<answer>" + "[" * 9_000 + "</answer>",  # short enough to be read, too deep to be JSON
    '<answer> {"bbox_2d": ' + "[" * 200 + "1" + "]" * 200 + ', "point_2d": [1, 2]} </answer>',
    "<answer>" * 12_500,
    "<call>" * 8_000 + "</call>" * 8_000,
    "<keyframe> 99999999999999999999 </keyframe>",
    "<keyframe> 1.5 </keyframe>",
    "<keyframe></keyframe><answer></answer><call></call>",
    '<call> {"name": "vlm_tool"} </call>',
    '<call> {"name": "rm", "query": "x"} </call>',
    '<call> {"name": ["vlm_tool"], "query": {"a": 1}} </call>',
    "\x00\ud800<answer>",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_a_result(text):
    action = train.parse_action(text)
    assert action.kind in ("call", "keyframe", "answer", "invalid")
    got = train.localisation_rewards(18, action.box, action.point, TRUTH)
    assert all(0 <= v <= 1 for v in got.values())
    assert train.well_formed([text]) is False


@given(st.text(alphabet=st.sampled_from(list('<>/{}[]",: \n0123456789-.eNatrufkcymnswb_2dpoi')), max_size=300))
def test_any_text_is_a_result(text):
    for wrapped in (text, f"<answer>{text}</answer>", f"<call>{text}</call>", f"<keyframe>{text}</keyframe>"):
        action = train.parse_action(wrapped)
        assert action.kind in ("call", "keyframe", "answer", "invalid")
        assert (action.error is None) == (action.kind != "invalid")
        got = train.localisation_rewards(action.frame, action.box, action.point, TRUTH)
        assert all(0 <= v <= 1 for v in got.values())


odd_numbers = (
    st.floats() | st.integers(-(10**400), 10**400) | st.integers(0, 1000) | st.booleans() | st.none()
    | st.sampled_from(["1", "", "NaN"]) | st.lists(st.integers(0, 9), max_size=2)
)  # fmt: skip


numbers_like = st.lists(odd_numbers, max_size=6)


@given(numbers_like, numbers_like, st.dictionaries(st.text(max_size=3), st.none()))
def test_any_answer_earns_a_reward_in_range(box, point, more):
    """JSON that looks like an answer and holds anything in place of its numbers."""
    text = f"<thinking> x </thinking><answer> {json.dumps({'bbox_2d': box, 'point_2d': point} | more)} </answer>"
    action = train.parse_action(text)
    assert action.kind in ("answer", "invalid") and (action.error is None) == (action.kind == "answer")
    got = train.localisation_rewards(18, action.box, action.point, TRUTH)
    assert all(0 <= v <= 1 for v in got.values())
    framed = "<thinking> y </thinking><keyframe> 18 </keyframe>"
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(float_or_inf(v))  # noqa: E731
    fit = len(box) == 4 and len(point) == 2 and all(map(number, (*box, *point)))
    if action.kind == "answer":
        assert fit
        assert all(map(math.isfinite, (*action.box, *action.point)))
    if train.well_formed([framed, text]):
        assert action.kind == "answer" and not more


def float_or_inf(value):
    try:
        return float(value)
    except OverflowError:
        return math.inf


@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6), st.sampled_from([None, "modal", "amodal"]))
def test_answers_are_read_as_written(numbers, mask_type):
    value = {"bbox_2d": numbers[:4], "point_2d": numbers[4:]} | ({"mask_type": mask_type} if mask_type else {})
    text = f"<thinking> x </thinking><answer> {json.dumps(value)} </answer>"
    action = train.parse_action(text)
    assert (action.kind, action.box, action.point) == ("answer", tuple(numbers[:4]), tuple(numbers[4:]))
    assert action.mask_type == (mask_type or "modal")
    framed = "<thinking> y </thinking><keyframe> 3 </keyframe>"
    assert train.well_formed([framed, text], mask_type=mask_type is not None)
    assert not train.well_formed(
        [framed, text.replace("<thinking> x </thinking>", "")], mask_type=mask_type is not None
    )
    assert not train.well_formed([framed, text.replace('"point_2d"', '\n"point_2d"')], mask_type=mask_type is not None)
    assert not train.well_formed([text], mask_type=mask_type is not None)


def test_the_last_call_counts_and_multi_line_answers_are_read():
    text = '<call>{"name": "vlm_tool", "query": "a?"}</call> <call>{"name": "vlm_tool", "query": "b?"}</call>'
    assert train.parse_action(text).question == "b?"
    assert train.parse_action(f"{text} and so on </call>").question == "b?"
    assert train.parse_action('<answer>{"bbox_2d": [1,2,3,4],\n"point_2d": [1,2]}</answer>').kind == "answer"
    assert train.parse_action("<keyframe> -1 </keyframe>").frame == -1
    named = "<thinking> a <keyframe> is next, not <keyframe> x </keyframe> </thinking><keyframe> 12 </keyframe>"
    assert train.parse_action(named).frame == 12  # the first that holds a number (METHOD.md 1.5)
