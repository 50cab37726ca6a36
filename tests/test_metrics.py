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

from icseg_jax.metrics import (
    bootstrap,
    boundary_f,
    davis_objects,
    davis_statistics,
    dialogue_summary,
    giou_ciou,
    image_scores,
    jaccard,
    merge_objects,
    prist_scores,
    r2sm_row,
    r2sm_table,
    score_table,
    video_jf,
    video_scores,
)

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
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40) | st.integers(60, 140)))  # up to three words

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


@given(mask_pairs(), st.sampled_from([0.0, 0.008, 0.05, 0.2, 1, 3, 9, 40, 90]))
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


# --- videos -------------------------------------------------------------------------------------------------

VIDEO = Path(__file__).parent / "golden/video.npz"


def unpacked(golden, key):
    shape = golden["shape"]
    return np.unpackbits(golden[key])[: shape.prod()].reshape(shape).astype(bool)


def test_video_scores_equal_the_references():
    with np.load(VIDEO) as golden:
        for i, name in enumerate(golden["names"]):
            pred, truth, foreground = (unpacked(golden, f"{side}{i}") for side in ("pred", "truth", "foreground"))
            row = video_scores(pred, truth, foreground=foreground)
            found = [row[key] for key in ("J", "F", "A", "R", "tIoU", "vIoU")]
            assert np.allclose(found, golden[f"scores{i}"], rtol=0, atol=1e-12), (name, found)
            assert row["JF"] == (row["J"] + row["F"]) / 2
            assert video_scores(pred, truth).keys() == row.keys() - {"A", "R"}


def test_davis_objects_and_statistics_equal_the_reference():
    with np.load(VIDEO) as golden:
        for i in range(3):
            j, f = davis_objects(golden[f"guess{i}"], golden[f"indices{i}"])
            assert np.allclose(j, golden[f"objects_J{i}"], rtol=0, atol=1e-12)
            assert np.allclose(f, golden[f"objects_F{i}"], rtol=0, atol=1e-12)
        for i in range(5):
            statistics = davis_statistics(golden[f"series{i}"])
            assert np.allclose(list(statistics.values()), golden[f"statistics{i}"], rtol=0, atol=1e-12)
    long = np.r_[np.ones(300), np.zeros(300)]  # their 8 bits would wrap here
    assert davis_statistics(long) == {"mean": 0.5, "recall": 0.5, "decay": 1.0}


def test_davis_objects_match_and_leave_void_out():
    truth = np.zeros((2, 8, 10), np.uint8)
    truth[:, 1:4, 1:4], truth[:, 5:8, 1:4], truth[:, :, 9] = 1, 2, 255
    swapped = np.array([0, 2, 1], np.uint8)[np.where(truth == 255, 0, truth)]
    swapped[:, :, 9] = 1  # nobody looks there
    for scores in davis_objects(swapped, truth):
        assert scores.shape == (2, 2) and (scores == 1).all()
    j, _ = davis_objects(np.where(swapped == 2, 2, 0), truth)  # one is missing
    assert sorted(j.mean(1)) == [0, 1]
    for bad in ((swapped[:1], truth), (swapped + 20, truth), (swapped, np.zeros_like(truth))):
        with pytest.raises(ValueError, match="need"):
            davis_objects(*bad)
    merged = merge_objects(np.array([[0.9, 0.4, 0.6, 0.0], [0.8, 0.49, 0.7, 0.5]]))
    assert merged.tolist() == [1, 0, 2, 2]
    assert merge_objects(np.ones((2, 1, 1, 1), bool)).tolist() == [[[1]]]
    masks = np.random.default_rng(0).random((3, 2, 5, 7)) < 0.4
    np.testing.assert_array_equal(merge_objects(masks), merge_objects(masks.astype(float)))


def test_video_scores_by_hand():
    truth, pred = np.zeros((4, 6, 6), bool), np.zeros((4, 6, 6), bool)
    truth[:3, 2:4, 2:4] = pred[1:, 2:4, 2:4] = True
    row = video_scores(pred, truth, foreground=np.ones((4, 6, 6)))
    assert (row["J"], row["tIoU"], row["vIoU"]) == (0.5, 0.5, 0.5)
    assert row["A"] == pytest.approx(1 - 2 * 4 / (4 * 36)) and row["R"] == pytest.approx(1 - 4 / 36 / 4)
    assert video_scores(pred, truth, foreground=np.zeros((4, 6, 6)))["R"] == 0.75  # of three frames nothing is wrong
    assert video_scores(~pred & False, ~truth & False) == {"J": 1, "F": 1, "JF": 1, "tIoU": 1, "vIoU": 1}
    assert video_scores(pred, truth, ignore=pred ^ truth)["J"] == 1
    for bad in ((pred[0], truth[0]), (pred[:0], truth[:0])):
        with pytest.raises(ValueError, match="one frame or more"):
            video_scores(*bad)


def test_tables_are_means_of_groups():
    rows = [{"id": i, "type": kind, "J": j, "F": f, "JF": 9.0, "tIoU": 1.0, "note": "x"}
            for i, (kind, j, f) in enumerate((("a", 0.1, 0.3), ("a", 0.3, 0.5), ("b", 0.8, 0.8), ("none", 1.0, 1.0)))]
    table = score_table([{k: v for k, v in row.items() if k != "id"} for row in rows], "type")
    assert table["a"] == pytest.approx({"J": 0.2, "F": 0.4, "JF": 0.3, "tIoU": 1.0, "count": 2})
    assert table["overall"]["J"] == pytest.approx(0.55) and table["overall"]["count"] == 4
    classes = score_table(rows, "type", overall=("a", "b"))  # ReVOS's: of the classes' means, no_target left out
    assert classes["overall"]["J"] == pytest.approx(0.5) and classes["overall"]["count"] == 3
    odd = [{"type": 0, "J": 0.123456, "F": 0.5}, {"type": 0, "J": 0.123449, "F": 0.5}]
    assert score_table(odd, "type", digits=2)["0"]["J"] == pytest.approx((0.1235 + 0.1234) / 2, abs=1e-15)
    with pytest.raises(ValueError, match="no row of c; there are a, b, none"):
        score_table(rows, "type", overall=("c",))
    with pytest.raises(ValueError, match="no rows"):
        score_table([], "type")


# --- images -------------------------------------------------------------------------------------------------


def test_prist_scores_equal_the_released_ones():
    """Their "cIoU" and "pixel accuracy in ROI" of single images; an empty truth, where theirs is 0, is ours to say."""
    with np.load(VIDEO) as golden:
        for i in range(len(golden["names"])):
            pred, truth = unpacked(golden, f"pred{i}"), unpacked(golden, f"truth{i}")
            for p, g, iou, recall in zip(pred, truth, golden[f"ciou{i}"], golden[f"roi{i}"], strict=True):
                for table in prist_scores([p], [g]).values():
                    assert table["CIoU"] == pytest.approx(iou, abs=1e-12)
                    assert not g.any() or table["recall"] == pytest.approx(recall, abs=1e-12)
            macro = prist_scores(pred, truth)["macro"]
            assert macro["CIoU"] == pytest.approx(golden[f"ciou{i}"].mean(), abs=1e-12)


@pytest.mark.parametrize(("precision", "recall", "f1"), [(24.22, 40.61, 30.34), (26.23, 29.22, 27.64),
                                                         (21.54, 49.31, 29.98), (16.67, 77.80, 27.46)])
def test_prist_f1_is_of_the_means_as_published(precision, recall, f1):
    """DATA.md 1.6: an image with the published precision and recall has the published F1."""
    n, tp = 10_000, 1000
    pred, truth = np.zeros((1, n), bool), np.zeros((1, n), bool)
    pred[0, : round(tp / (precision / 100))] = True
    truth[0, :tp] = True
    truth[0, n - (round(tp / (recall / 100)) - tp) :] = True
    macro = prist_scores([pred], [truth])["macro"]
    assert macro["precision"] == pytest.approx(precision / 100, abs=5e-4)  # of whole pixels
    assert macro["recall"] == pytest.approx(recall / 100, abs=5e-4)
    assert 100 * macro["F1"] == pytest.approx(f1, abs=0.02)


def test_prist_edges_and_pooling():
    empty, left, wide = np.zeros((2, 4), bool), np.zeros((2, 4), bool), np.ones((2, 4), bool)
    left[:, :1] = True  # 2 of 8
    tables = prist_scores([left, empty, empty, wide], [wide, empty, left, empty])
    assert tables["macro"] == pytest.approx({
        "precision": (1 + 1 + 0 + 0) / 4, "recall": (0.25 + 1 + 0 + 0) / 4, "CIoU": (0.25 + 1) / 4,
        "F1": 2 * 0.5 * 0.3125 / 0.8125})
    assert tables["micro"] == pytest.approx({"precision": 2 / 10, "recall": 2 / 10, "CIoU": 2 / 18, "F1": 0.2})
    assert set(prist_scores([empty], [empty])["micro"].values()) == {1.0}
    assert set(prist_scores(iter([empty]), iter([left]))["micro"].values()) == {0.0}
    with pytest.raises(ValueError, match="need as many"):
        prist_scores([empty], [])


def test_image_scores():
    truth = np.zeros((1, 10), bool)
    truth[0, :7] = True
    preds = [truth, np.ones((1, 10), bool), ~truth, np.zeros((1, 10), bool)]
    table = image_scores(preds, [truth, truth, truth, np.zeros((1, 10), bool)])
    assert table["mIoU"] == pytest.approx((1 + 0.7 + 0 + 1) / 4) and table["oIoU"] == pytest.approx(14 / 27)
    assert [table[f"P@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == [0.75, 0.75, 0.75, 0.5, 0.5]
    assert image_scores([preds[1]], [truth], [~truth])["mIoU"] == 1


def test_r2sm_words():
    visible, whole = np.zeros((4, 10), bool), np.zeros((4, 10), bool)
    visible[:, :6] = whole[:, :8] = True  # a quarter is hidden
    assert r2sm_row(whole, visible, whole, "amodal") == {
        "mask_type": "amodal", "occlude_rate": 0.25, "right_type": True, "intersection": 32, "union": 32,
        "hidden_iou": 1.0, "bound": 0.75}
    modal = r2sm_row(whole, visible, whole, "modal")
    assert (modal["right_type"], modal["hidden_iou"], modal["intersection"] / modal["union"]) == (False, None, 0.75)
    assert r2sm_row(whole, visible, whole, "modal", chosen="modal")["right_type"] is True  # what it says counts
    nothing = np.zeros_like(whole)
    assert r2sm_row(nothing, visible, whole, "amodal")["right_type"] is None  # a tie
    assert r2sm_row(nothing, visible, whole, "amodal")["hidden_iou"] == 0
    free = r2sm_row(whole, whole, whole, "amodal")
    assert (free["right_type"], free["hidden_iou"], free["bound"]) == (None, None, 1)
    for bad in (("whole", None), ("modal", "both")):
        with pytest.raises(ValueError, match="use modal or amodal"):
            r2sm_row(whole, visible, whole, *bad)
    with pytest.raises(ValueError, match="one size"):
        r2sm_row(whole[:2], visible, whole, "modal")


def test_perfect_visible_masks_reach_the_bound():
    """DATA.md 2.3 and 6.6: on complete queries they score mean(1 - occlude_rate), and so the other way round."""
    rng = np.random.default_rng(0)
    rows, rates = [], []
    for hidden in (0, 1, 3, 6, 9):
        whole = np.zeros((3, 12), bool)
        whole[:, :10] = True
        visible = whole & (np.arange(12) >= hidden)
        for kind in ("modal", "amodal"):
            rows.append(r2sm_row(visible, visible, whole, kind))
        rates.append(hidden / 10)
    table = r2sm_table([rows[i] for i in rng.permutation(len(rows))])
    amodal = table["amodal"]["all"]
    assert amodal["gIoU"] == pytest.approx(1 - np.mean(rates)) == amodal["bound"] and amodal["hidden_iou"] == 0
    assert table["modal"]["all"]["gIoU"] == 1 and table["modal"]["all"]["type_accuracy"] == 1
    assert amodal["type_accuracy"] == 0 and table["all"]["all"]["type_accuracy"] == 0.5
    assert amodal["cIoU"] == pytest.approx(1 - np.mean(rates)) and table["all"]["all"]["count"] == 10
    assert [amodal[f"P@{t}"] for t in (0.5, 0.7, 0.9)] == pytest.approx([0.6, 0.6, 0.4])
    assert {name: t["count"] for name, t in table["amodal"].items()} == {
        "0": 1, "(0, 0.2]": 1, "(0.2, 0.4]": 1, "(0.4, 0.7]": 1, "(0.7, 1]": 1, "all": 5}
    assert table["amodal"]["0"]["type_accuracy"] is None and table["amodal"]["0"]["gIoU"] == 1
    assert r2sm_table([]) == {}


# --- dialogues ----------------------------------------------------------------------------------------------


def row(level, counts, asked, success, optimal, **more):
    gains = [(a - b) / max(a - 1, 1) for a, b in zip(counts, counts[1:], strict=False)]
    return {
        "level": level, "success": success, "frame_ok": True, "counts": counts, "asked": asked,
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
    assert dialogue_summary([row | {"optimal": None} for row in ROWS])["regret"] is None  # nobody knows
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


def test_dialogues_over_one_sample_are_one_draw_of_it():
    samples = [row | {"id": str(i)} for i, row in enumerate(ROWS)]
    once, thrice = dialogue_summary(samples), dialogue_summary(samples * 3)
    assert thrice["count"]["success"] == 3 * once["count"]["success"]
    assert dialogue_summary(ROWS) == once  # without ids each row is a sample of its own
    for word in ("success", "regret", "redundant_question_rate"):
        assert thrice[word] == pytest.approx(once[word])
        assert thrice["standard_error"][word] == pytest.approx(once["standard_error"][word])


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


def test_intervals_are_over_videos():
    """Two copies of a row say no more than the row: an interval over videos stays, one over rows would shrink."""
    rng = np.random.default_rng(0)
    rows = [{"video": v, "J": float(x), "group": "a"} for v, x in enumerate(rng.random(30))]
    table = lambda rows: score_table(rows, "group")  # noqa: E731
    low, high = bootstrap(rows, table, resamples=200)["overall"]["J"]
    mean = table(rows)["overall"]["J"]
    error = np.std([row["J"] for row in rows], ddof=1) / np.sqrt(30)
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert bootstrap(rows * 2, table, resamples=200)["overall"]["J"] == pytest.approx((low, high))
    alone = bootstrap([row | {"video": 0} for row in rows], table, resamples=20)["overall"]["J"]
    assert alone == pytest.approx((mean, mean))
    rare = bootstrap([*rows, {"video": 31, "J": 0.5, "group": "b"}], table, resamples=20)
    assert rare["b"]["J"] == (0.5, 0.5)  # not in every resample
    with pytest.raises(ValueError, match="no rows"):
        bootstrap([], table)
