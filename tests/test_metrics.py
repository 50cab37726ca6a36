"""Masks against davis2017-evaluation and plain definitions, dialogue words against METHOD.md 11.7."""

import json
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from icseg_jax.metrics import boundary_f, dialogue_summary, giou_ciou, jaccard, video_jf

GOLDEN = Path(__file__).parent / "golden/jf.npz"


# --- masks --------------------------------------------------------------------------------------------------


def test_jf_equal_the_reference():
    with np.load(GOLDEN) as golden:
        for i, name in enumerate(golden["names"]):
            height, width = golden[f"s{i}"]
            pred, truth = (
                np.unpackbits(golden[f"{side}{i}"])[: height * width].reshape(height, width).astype(bool)
                for side in "pg"
            )
            assert abs(jaccard(pred, truth) - golden["J"][i]) <= 1e-12, (i, name)
            assert abs(boundary_f(pred, truth) - golden["F"][i]) <= 1e-12, (i, name)


def plain_boundary_f(pred, truth, bound_th=0.008):
    """The definition of DATA.md 4.1, word for word, over the whole frame."""

    def boundary(mask):
        right, below, corner = mask.copy(), mask.copy(), mask.copy()
        right[:, :-1], below[:-1], corner[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        edge = (mask ^ right) | (mask ^ below) | (mask ^ corner)
        edge[-1] = (mask ^ right)[-1]
        edge[:, -1] = (mask ^ below)[:, -1]
        edge[-1, -1] = False
        return edge

    radius = ceil(bound_th * sqrt(pred.shape[0] ** 2 + pred.shape[1] ** 2)) if bound_th < 1 else int(bound_th)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = x**2 + y**2 <= radius**2
    p, g = boundary(pred), boundary(truth)
    if not p.any() or not g.any():
        return float(p.any() == g.any())
    precision = (p & ndimage.binary_dilation(g, disk)).sum() / p.sum()
    recall = (g & ndimage.binary_dilation(p, disk)).sum() / g.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@st.composite
def mask_pairs(draw):
    """Two masks of one size: noise, a few rectangles that may touch the border, or nothing."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))

    def mask():
        kind = draw(st.sampled_from(["noise", "boxes", "empty", "full"]))
        if kind == "noise":
            return draw(arrays(bool, shape))
        out = np.full(shape, kind == "full")
        for _ in range(draw(st.integers(1, 3)) if kind == "boxes" else 0):
            y, x = (draw(st.integers(0, size - 1)) for size in shape)
            out[y : y + draw(st.integers(1, 20)), x : x + draw(st.integers(1, 20))] = True
        return out

    return mask(), mask()


@given(mask_pairs(), st.sampled_from([0.0, 0.008, 0.05, 0.2, 1, 3, 9]))
def test_boundary_f_equals_its_definition(pair, bound_th):
    assert boundary_f(*pair, bound_th) == plain_boundary_f(*pair, bound_th)


@given(mask_pairs())
def test_jf_properties(pair):
    pred, truth = pair
    for score in (jaccard, boundary_f):
        assert 0 <= score(pred, truth) <= 1
        assert score(pred, truth) == score(truth, pred)
        assert score(truth, truth) == 1
    # A frame in the corner of a larger one: J is the same, and so is F where no mask touches the old border.
    wide = [np.pad(m, 3) for m in pair]
    assert jaccard(*wide) == jaccard(pred, truth)
    wider = [np.pad(m, ((3, 9), (3, 2))) for m in pair]
    assert boundary_f(*wide, bound_th=2) == boundary_f(*wider, bound_th=2)


def test_leading_axes_broadcast_and_numbers_count_as_masks():
    rng = np.random.default_rng(0)
    preds, truth = rng.random((2, 3, 20, 30)) > 0.5, rng.random((20, 30)) > 0.5
    for score in (jaccard, boundary_f):
        scores = score(preds, truth)
        assert scores.shape == (2, 3)
        assert scores[1, 2] == score(preds[1, 2], truth)
        assert score(preds * np.uint8(255), truth.astype(float))[0, 1] == scores[0, 1]
        assert score(np.zeros((0, 20, 30), bool), np.zeros((0, 20, 30), bool)).shape == (0,)
    video = video_jf(preds[0], preds[1])
    assert video["J"] == jaccard(preds[0], preds[1]).mean()
    assert video["F"] == boundary_f(preds[0], preds[1]).mean()
    assert video["JF"] == (video["J"] + video["F"]) / 2


def test_empty_frames():
    empty, full = np.zeros((16, 16), bool), np.ones((16, 16), bool)
    one = empty.copy()
    one[5, 5] = True
    assert jaccard(empty, empty) == boundary_f(empty, empty) == 1
    assert jaccard(one, empty) == boundary_f(one, empty) == boundary_f(empty, one) == 0
    assert (jaccard(full, empty), boundary_f(full, empty)) == (0, 1)  # a full frame has no boundary


@pytest.mark.parametrize("score", [jaccard, boundary_f])
def test_masks_of_other_sizes_are_refused(score):
    with pytest.raises(ValueError, match="one size"):
        score(np.zeros((4, 5), bool), np.zeros((5, 4), bool))
    with pytest.raises(ValueError, match="one size"):
        score(np.zeros(4, bool), np.zeros(4, bool))
    with pytest.raises(ValueError, match="bound_th"):
        boundary_f(np.zeros((4, 4), bool), np.zeros((4, 4), bool), -1)


def test_giou_ciou_are_lisas():
    a, b, nothing = (np.zeros((4, 4), bool) for _ in range(3))
    a[:2], b[1:3] = True, True  # 4 of 12 pixels
    giou, ciou = giou_ciou([a, nothing], [b, nothing])
    assert giou == pytest.approx((4 / (12 + 1e-5) + 1) / 2, abs=1e-12)
    assert ciou == pytest.approx(4 / (12 + 1e-10), abs=1e-12)
    void = np.zeros((4, 4), bool)
    void[0] = True  # takes 4 pixels of the prediction away
    assert giou_ciou([a], [b], [void])[1] == pytest.approx(4 / 8)
    assert giou_ciou([a, np.ones((2, 3))], [b, np.ones((2, 3))], [None, None])[1] == pytest.approx(10 / 18)
    for bad in (([], []), ([a], [b, b]), ([a], [b], [])):
        with pytest.raises(ValueError, match="need as many"):
            giou_ciou(*bad)
    with pytest.raises(ValueError, match="one size"):
        giou_ciou([a], [b[:2]])


# --- dialogues ----------------------------------------------------------------------------------------------


def row(level, counts, asked, success, optimal, **more):
    gains = [(a - b) / max(a - 1, 1) for a, b in zip(counts, counts[1:], strict=False)]
    return {
        "id": "x", "level": level, "success": success, "frame_ok": True, "counts": counts, "asked": asked,
        "gains": gains, "questions": len(asked), "optimal": optimal, "budget": 5, "format": True,
        "reward": 2.0, "terms": {"iou": float(success)}, "J": None, "F": None,
    } | more  # fmt: skip


ROWS = [
    row("simple", [2, 1], ["color"], True, 1.0, J=0.8, F=0.6, reward=5.0),
    row("medium", [4, 4, 2], ["color", None], False, 1.5, terms={"iou": 0.0, "mask": None}),
    row("difficult", [5], [], False, 1.4, format=False),
    row("clear", [1, 1], ["color"], True, 0.0, terms={"iou": 1.0, "mask": 0.9}),
    row("clear", [1], [], True, 0.0, J=1.0, F=1.0),
    row("none", [0], [], False, 0.0),
]


def test_dialogue_words():
    summary = dialogue_summary(ROWS)
    assert summary["success"] == pytest.approx(3 / 6)
    assert summary["success_ambiguous"] == pytest.approx(1 / 3)
    assert (summary["success_clear"], summary["success_none"]) == (1, 0)
    assert summary["success_by_level"] == {"simple": 1, "medium": 0, "difficult": 0, "clear": 1, "none": 0}
    assert summary["jf"] == pytest.approx((0.7 + 1) / 2)
    assert summary["questions_ambiguous"] == 1
    assert summary["questions_clear"] == summary["regret_clear"] == 0.5
    assert summary["resolved_rate"] == pytest.approx(1 / 3)  # no question: unresolved; 2 left: unresolved
    assert summary["redundant_question_rate"] == pytest.approx(2 / 4)  # of all calls, pooled
    assert summary["regret"] == pytest.approx((0 + (5 - 1.5) + (5 - 1.4)) / 3)  # unresolved pays the budget
    assert summary["asked"] == {"color": 0.75, "unclear": 0.25}
    assert summary["format_rate"] == pytest.approx(5 / 6)
    assert summary["reward"] == pytest.approx(2.5)
    assert summary["terms"] == {"iou": 0.5, "mask": 0.9}  # a missing mask term is left out, not zero


def test_standard_errors_and_counts():
    summary = dialogue_summary(ROWS)
    error, count = summary["standard_error"], summary["count"]
    assert error.keys() == count.keys() == summary.keys() - {"standard_error", "count"}
    assert error["success"] == pytest.approx(np.std([1, 0, 0, 1, 1, 0], ddof=1) / sqrt(6))
    assert error["regret"] == pytest.approx(np.std([0, 3.5, 3.6], ddof=1) / sqrt(3))
    assert error["success_none"] is None  # one dialogue says nothing about its spread
    assert (count["success"], count["success_ambiguous"], count["jf"], count["terms"]["mask"]) == (6, 3, 2, 1)
    assert count["redundant_question_rate"] == 4  # calls
    json.dumps(summary, allow_nan=False)


def test_pooled_share_has_the_error_of_a_ratio():
    """Against the spread of many drawn evaluations, where calls of one dialogue depend on each other."""
    rng = np.random.default_rng(0)

    def draw():
        rows = []
        for _ in range(40):
            n, bad = int(rng.integers(0, 5)), rng.random() < 0.4
            counts = [8] * (n + 1) if bad else list(range(8, 7 - n, -1))
            rows.append(row("difficult", counts, ["color"] * n, True, 2.0))
        return dialogue_summary(rows)

    draws = [draw() for _ in range(100)]
    spread = np.std([d["redundant_question_rate"] for d in draws])
    error = np.mean([d["standard_error"]["redundant_question_rate"] for d in draws])
    assert error == pytest.approx(spread, rel=0.2)


def test_what_is_not_there_is_none():
    summary = dialogue_summary([row("clear", [1], [], True, 0.0)])
    for name in ("success_ambiguous", "jf", "resolved_rate", "redundant_question_rate", "regret"):
        assert summary[name] is None and summary["count"][name] == 0
    assert summary["asked"] == {} and summary["success_by_level"] == {"clear": 1.0}
    assert dialogue_summary([])["success"] is None


@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=12))
@settings(max_examples=25)
def test_order_of_dialogues_does_not_matter(rows):
    forward, backward = dialogue_summary(rows), dialogue_summary(rows[::-1])
    assert forward["asked"] == backward["asked"] and sum(forward["asked"].values()) in (0, pytest.approx(1))
    for name in ("success", "regret", "redundant_question_rate", "questions"):
        assert forward[name] == (None if backward[name] is None else pytest.approx(backward[name]))
