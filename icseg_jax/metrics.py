"""Scores of masks and of dialogues, in plain numpy.

Masks: region J and boundary F as davis2017-evaluation computes them (DATA.md 4.1), and on them what the video sets
report (4.2, 4.3); gIoU, cIoU and precisions of images as LISA and RefCOCO have them (4.2), PRIST's (1.5) and R2SM's
(2.3) scores; any non-zero pixel is foreground. Dialogues: the words of METHOD.md 11.7, each with its standard error.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from math import ceil, isqrt, prod, sqrt
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Num, Shaped

Mask = Shaped[Any, "..."]  # [..., H, W] of numpy or jax, bool or numbers
Scores = Float[np.ndarray, "..."] | float  # [...], a float for one frame

AMBIGUOUS = ("simple", "medium", "difficult")  # levels with more than one candidate at the start


# --- masks --------------------------------------------------------------------------------------------------


def jaccard(pred: Mask, truth: Mask) -> Scores:
    """Region similarity J = |P & G| / |P | G| per frame, 1 where both are empty (DATA.md 4.1).

    `[..., H, W]` twice, leading axes broadcast -> `[...]` in [0, 1] (a float for two plain frames).
    Raises ValueError when H x W differ.
    """
    pred, truth = _mask_pair(pred, truth)
    intersection, union = _areas(pred & truth), _areas(pred | truth)
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))[()]


def _areas(masks: np.ndarray) -> np.ndarray:
    """Pixels of each frame of bool [..., H, W]. One by one: with an axis, count_nonzero is ten times slower."""
    *lead, height, width = masks.shape
    frames = masks.reshape(prod(lead), height * width)
    return np.array([np.count_nonzero(frame) for frame in frames], np.int64).reshape(lead)


def boundary_f(pred: Mask, truth: Mask, bound_th: float = 0.008) -> Scores:
    """Contour accuracy F: harmonic mean of boundary precision and recall, per frame (DATA.md 4.1).

    A boundary pixel is right when the other mask has a boundary pixel within the tolerance: `bound_th` times
    the frame's diagonal, rounded up, below 1; a number of pixels from 1 on. Both boundaries empty -> 1, one
    empty -> 0. `[..., H, W]` twice, leading axes broadcast -> `[...]` (a float for two plain frames).
    Raises ValueError when H x W differ or `bound_th` is negative.
    """
    if not bound_th >= 0:
        raise ValueError(f"bound_th={bound_th}: give a fraction of the diagonal (0.008) or whole pixels (2)")
    pred, truth = _mask_pair(pred, truth)
    height, width = pred.shape[-2:]
    radius = ceil(bound_th * sqrt(height**2 + width**2)) if bound_th < 1 else int(bound_th)
    frames = zip(pred.reshape(-1, height, width), truth.reshape(-1, height, width), strict=True)
    return np.array([_frame_f(p, g, radius) for p, g in frames]).reshape(pred.shape[:-2])[()]


def video_jf(pred: Mask, truth: Mask) -> dict[str, float]:
    """J, F and JF = (J + F) / 2 of a video [T, H, W]: means over all its frames (METHOD.md 5.3)."""
    j, f = float(np.mean(jaccard(pred, truth))), float(np.mean(boundary_f(pred, truth)))
    return {"J": j, "F": f, "JF": (j + f) / 2}


def giou_ciou(
    preds: Iterable[Mask], truths: Iterable[Mask], ignore: Iterable[Mask | None] | None = None
) -> tuple[float, float]:
    """LISA's two scores of a set of images: gIoU, the mean of their IoUs, and cIoU, pooled over all pixels.

    `preds`, `truths`: one H x W mask per image, sizes may differ between images; `ignore`: per image the
    pixels that do not count (ReasonSeg's 255), or None. An image with an empty union has IoU 1 (DATA.md 4.2).
    Raises ValueError when there is no image, the lengths differ, or masks of one image differ in size.
    """
    scores = lisa_scores(_overlaps(preds, truths, ignore))
    return scores["gIoU"], scores["cIoU"]


def lisa_scores(counts: Num[np.ndarray, "3 n"]) -> dict[str, float]:
    """gIoU and cIoU as of giou_ciou, of images whose pixels are counted already: columns of pixel_counts."""
    intersections, said, true = counts
    unions = said + true - intersections
    ious = np.where(unions == 0, 1.0, intersections / (unions + 1e-5))  # both epsilons are LISA's
    return {"gIoU": float(ious.mean()), "cIoU": float(intersections.sum() / (unions.sum() + 1e-10))}


def pixel_counts(pred: Mask, truth: Mask, ignore: Mask | None = None) -> tuple[int, int, int]:
    """Pixels of one image [H, W]: in both masks, in the predicted and in the true one, without those of `ignore`.

    All scores of images are made of them. Raises ValueError when sizes differ.
    """
    pred, truth = _mask_pair(pred, truth)
    keep = True if ignore is None else ~_mask_pair(ignore, truth)[0]
    both, said, true = (int(np.count_nonzero(mask & keep)) for mask in (pred & truth, pred, truth))
    return both, said, true


def _overlaps(preds: Iterable[Mask], truths: Iterable[Mask], ignore: Iterable[Mask | None] | None = None
              ) -> np.ndarray:
    """pixel_counts of each image, [3, n]. For errors see giou_ciou."""
    counts: list[tuple[int, int, int]] = []
    end = object()
    sides = [iter(preds), iter(truths), repeat(None) if ignore is None else iter(ignore)]
    while True:
        pred, truth, void = (next(side, end) for side in sides)
        ended = [side is end for side in ((pred, truth) if ignore is None else (pred, truth, void))]
        if any(ended) and not (all(ended) and counts):
            raise ValueError(f"image {len(counts) + 1}: predictions, truths and ignore masks: need as many, and one or "
                             "more")
        if any(ended):
            return np.array(counts, float).T
        counts.append(pixel_counts(pred, truth, void))


def _mask_pair(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, truth = np.asarray(pred).astype(bool, copy=False), np.asarray(truth).astype(bool, copy=False)
    if pred.ndim < 2 or truth.ndim < 2 or pred.shape[-2:] != truth.shape[-2:]:
        raise ValueError(f"masks of shapes {pred.shape} and {truth.shape}: need [..., H, W] of one size")
    return (pred, truth) if pred.shape == truth.shape else np.broadcast_arrays(pred, truth)


def _frame_f(pred: np.ndarray, truth: np.ndarray, radius: int) -> float:
    """On 64 pixels at a time: a word's bit j is the pixel j to the right of its first."""
    guard = radius // 32 + 1  # words of 0 behind every row, so that rows one after the other do not touch
    inner = _packed((np.arange(pred.shape[1]) < pred.shape[1] - 1)[None], guard)  # what has a right neighbour
    pred, truth = _packed(pred, guard), _packed(truth, guard)
    either = pred | truth
    rows = np.flatnonzero(either.any(1))
    if not rows.size:
        return 1.0
    words = np.flatnonzero(either[rows[0] : rows[-1] + 1].any(0))
    # One row and one word of margin hold every boundary pixel; where a row is outside the frame, the crop's last one
    # is the frame's, which _boundary treats specially.
    box = slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(words[0] - 1, 0), words[-1] + 1 + guard)
    pred, truth = (_boundary(mask[box], inner[:, box[1]]) for mask in (pred, truth))
    n_pred, n_truth = _pixels(pred), _pixels(truth)
    if n_pred == 0 or n_truth == 0:
        return float(n_pred == n_truth)
    precision = _pixels(pred & _dilate(truth, radius)) / n_pred
    recall = _pixels(truth & _dilate(pred, radius)) / n_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _packed(mask: np.ndarray, guard: int) -> np.ndarray:
    """bool [H, W] as words uint64 [H, ceil(W / 64) + guard], 0 from W on."""
    height, width = mask.shape
    out = np.zeros((height, 8 * (-(-width // 64) + guard)), np.uint8)
    out[:, : -(-width // 8)] = np.packbits(mask, axis=1, bitorder="little")
    return out.view("<u8")


def _pixels(words: np.ndarray) -> int:
    return int(np.bitwise_count(words).sum())


def _boundary(mask: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour inside the array of words."""
    mask = np.ascontiguousarray(mask)
    right = mask >> 1
    right.reshape(-1)[:-1] |= mask.reshape(-1)[1:] << 63
    edge = mask ^ right
    edge[:-1] |= mask[:-1] ^ right[1:]
    edge &= inner
    edge[:-1] |= mask[:-1] ^ mask[1:]
    return edge


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation of words with the disk x^2 + y^2 <= radius^2, one row of the disk after the other.

    All rows are one line of words. What grows beyond a row's end stays in its guard, what grows beyond its beginning
    in the guard before; nobody looks there, and what comes back from there belongs where it arrives.
    """
    width, row, half = mask.shape[1], mask.reshape(-1), 0
    out = np.zeros_like(row)
    for dy in range(radius, -1, -1):
        while (grow := isqrt(radius**2 - dy**2) - half) > 0:
            step = min(grow, 2 * half + 1, 63)  # two shifted copies still touch the one in the middle
            row, narrow = row | (row << step) | (row >> step), row
            row[1:] |= narrow[:-1] >> (64 - step)
            row[:-1] |= narrow[1:] << (64 - step)
            half += step
        if dy * width < row.size:
            out[dy * width :] |= row[: row.size - dy * width]
            out[: row.size - dy * width] |= row[dy * width :]
    return out.reshape(mask.shape)


# --- videos (DATA.md 4.2 and 4.3) ---------------------------------------------------------------------------


def video_scores(pred: Mask, truth: Mask, *, foreground: Mask | None = None, ignore: Mask | None = None
                 ) -> dict[str, float]:
    """One row of a video benchmark: J, F, JF (video_jf), tIoU and vIoU of masks [T, H, W].

    tIoU: frames on which both show something over frames on which either does; vIoU: the sum of J over the former by
    the latter; both 1 where nothing is ever shown (Long-RVOS). With `foreground`, all that could be a target, also
    ReVOS's A, the share of pixels that agree, and R, 1 - false positives / (foreground + 1e-6), not below 0, both
    means over frames. Its scorer takes raw numbers, where targets that overlap wrap around; here masks are boolean.
    `ignore`: pixels that belong to neither mask (DAVIS's void; A and R do not know it). Raises ValueError when sizes
    differ or there is no frame.
    """
    pred, truth = _mask_pair(pred, truth)
    if pred.ndim != 3 or not len(pred):
        raise ValueError(f"masks of shape {pred.shape}: a video is [T, H, W] with one frame or more")
    if ignore is not None:
        keep = ~_mask_pair(ignore, truth)[0]
        pred, truth = pred & keep, truth & keep
    j, shown, there = jaccard(pred, truth), pred.any((1, 2)), truth.any((1, 2))
    either = np.count_nonzero(shown | there)
    row = video_jf(pred, truth) | {
        "tIoU": float(np.count_nonzero(shown & there) / either) if either else 1.0,
        "vIoU": float(j[shown & there].sum()) / either if either else 1.0,
    }
    if foreground is not None:
        wrong, most = _areas(pred & ~truth), _areas(_mask_pair(foreground, truth)[0])
        row |= {"A": float((pred == truth).mean((1, 2)).mean()),
                "R": float(np.maximum(1 - wrong / (most + 1e-6), 0).mean())}
    return row


def score_table(rows: Sequence[Mapping[str, Any]], by: str, *, overall: Sequence[str] | None = None,
                digits: int | None = None) -> dict[str, dict[str, float]]:
    """Means of rows of scores: {group: {"J": ..., "count": n}}, a group per value of the key `by`, and "overall".

    Every number but `by`'s that all rows hold is averaged; JF is made of the means of J and F. "overall" is the mean
    over rows (Long-RVOS, OK-VOS) or, with the names of groups in `overall`, the mean over these groups' means (ReVOS:
    referring and reasoning). `digits` rounds each row's percentages first, as ReVOS's scorer does with 2 (an odd one,
    DATA.md 4.2). Raises ValueError without a row, or for a group in `overall` that has none.
    """
    if not rows:
        raise ValueError("no rows to average")
    names = [k for k, v in rows[0].items() if k not in (by, "JF") and isinstance(v, int | float)
             and all(isinstance(row.get(k), int | float) for row in rows)]

    def value(row: Mapping[str, Any], name: str) -> float:
        return row[name] if digits is None else round(100 * row[name], digits) / 100

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {name: float(np.mean([value(row, name) for row in rows])) for name in names} | {"count": len(rows)}

    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(str(row[by]), []).append(row)
    table = {group: mean(members) for group, members in sorted(groups.items())}
    if missing := set(overall or ()) - table.keys():
        raise ValueError(f"no row of {sorted(missing)[0]}; there are {', '.join(table)}")
    table["overall"] = mean(rows) if overall is None else {
        name: float(np.mean([table[group][name] for group in overall])) for name in names
    } | {"count": sum(table[group]["count"] for group in overall)}
    for means in table.values():
        if {"J", "F"} <= means.keys():
            means["JF"] = (means["J"] + means["F"]) / 2
    return table


def davis_statistics(values: Float[np.ndarray, " t"]) -> dict[str, float]:
    """DAVIS's mean, recall (share of frames above 0.5) and decay (first quarter's mean less the last's) of J or F.

    The quarters share their border frames. Their code counts frames in 8 bits, which only videos of more than 256
    frames would show; here they are counted.
    """
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[3] : edges[4] + 1]
    return {"mean": float(np.mean(values)), "recall": float(np.mean(values > 0.5)),
            "decay": float(first.mean() - last.mean())}


def merge_objects(masks: Shaped[np.ndarray, "o *thw"]) -> Int[np.ndarray, "*thw"]:  # noqa: F821
    """Masks (or probabilities) of the objects 1 to o as one map of indices, 0 where none is above 0.5.

    Protocol A of Ref-DAVIS17 (DATA.md 4.2): the largest wins, the first of equals.
    """
    masks = np.asarray(masks)
    if masks.dtype == bool:  # as below, without making numbers of whole videos
        return np.where(masks.any(0), masks.argmax(0) + 1, 0)
    masks = np.where(masks.astype(float) < 0.5, 0.0, masks)
    return np.concatenate([np.full((1, *masks.shape[1:]), 0.1), masks]).argmax(0)


MAX_PROPOSALS = 20  # objects that a prediction may hold


def davis_objects(pred: Integer[np.ndarray, "..."], truth: Integer[np.ndarray, "..."], void: int = 255
                  ) -> tuple[Float[np.ndarray, "o t"], Float[np.ndarray, "o t"]]:
    """J and F of every object of a video per frame, when indices need not agree (DAVIS's unsupervised task).

    `pred`, `truth`: [T, H, W], maps of object indices, 0 for none; pixels that are `void` in truth count nowhere.
    Predicted and true objects are matched one to one for the largest sum of mean J and F; the rows are in the order
    of the matched predictions, as theirs are. The objects of the video are those that the first frame numbers; what
    is missing in the prediction is empty. Raises ValueError when sizes differ, when the first frame has no object, or
    for more than MAX_PROPOSALS predicted ones.
    """
    from scipy.optimize import linear_sum_assignment

    if pred.shape != truth.shape:
        raise ValueError(f"index maps of shapes {pred.shape} and {truth.shape}: need [T, H, W] of one size")
    keep = truth != void
    n_truth, n_pred = int(truth[0][keep[0]].max(initial=0)), int(pred.max(initial=0))
    if n_truth < 1 or n_pred > MAX_PROPOSALS:
        raise ValueError(f"{n_truth} objects in the first frame, {n_pred} predicted; need 1 or more, and at most "
                         f"{MAX_PROPOSALS}")
    n_pred = max(n_pred, n_truth)
    j, f = np.zeros((2, n_pred, n_truth, len(truth)))
    for a in range(n_pred):
        for b in range(n_truth):
            pair = (pred == a + 1) & keep, (truth == b + 1) & keep
            j[a, b], f[a, b] = jaccard(*pair), boundary_f(*pair)
    matched = linear_sum_assignment(-(j.mean(2) + f.mean(2)) / 2)
    return j[matched], f[matched]


# --- images (DATA.md 4.2, 1.5 and 2.3) ----------------------------------------------------------------------

PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)


def image_scores(preds: Iterable[Mask], truths: Iterable[Mask], ignore: Iterable[Mask | None] | None = None
                 ) -> dict[str, float]:
    """RefCOCO's table: mIoU (gIoU in other places), oIoU (cIoU, pooled) and P@.5 to P@.9, the share of IoUs from
    there on. Arguments and errors as of giou_ciou, without its epsilons."""
    return refcoco_scores(_overlaps(preds, truths, ignore))


def refcoco_scores(counts: Num[np.ndarray, "3 n"]) -> dict[str, float]:
    """image_scores of columns of pixel_counts."""
    both, said, true = counts
    either = said + true - both
    ious = np.where(either == 0, 1.0, both / np.maximum(either, 1))
    return {"mIoU": float(ious.mean()), "oIoU": _share(both.sum(), either.sum())} | {
        f"P@{t}": float((ious >= t).mean()) for t in PRECISIONS}


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def prist_scores(preds: Iterable[Mask], truths: Iterable[Mask]) -> dict[str, dict[str, float]]:
    """PRIST's CIoU, precision, recall and F1, as `macro` and as `micro` (DATA.md 1.5).

    macro, which the published numbers fit: means over images, F1 of the mean precision and recall, and CIoU, in spite
    of its name, the mean IoU of the images. micro: pixels of all images pooled. An empty prediction has precision 0
    and, where there is nothing to find, 1; with nothing to find recall is 1 if nothing was predicted, else 0.
    One mask per image; raises ValueError as giou_ciou does.
    """
    return prist_tables(_overlaps(preds, truths))


def prist_tables(counts: Num[np.ndarray, "3 n"]) -> dict[str, dict[str, float]]:
    """prist_scores of columns of pixel_counts."""
    both, said, true = counts
    either = said + true - both
    nothing = either == 0
    precision = np.where(nothing, 1.0, both / np.maximum(said, 1)).mean()
    recall = np.where(nothing, 1.0, both / np.maximum(true, 1)).mean()
    ious = np.where(nothing, 1.0, both / np.maximum(either, 1))

    def table(precision: float, recall: float, iou: float) -> dict[str, float]:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        return {"CIoU": float(iou), "precision": float(precision), "recall": float(recall), "F1": float(f1)}

    pooled = (1.0, 1.0) if nothing.all() else (both.sum() / max(said.sum(), 1), both.sum() / max(true.sum(), 1))
    return {"macro": table(precision, recall, ious.mean()), "micro": table(*pooled, _share(both.sum(), either.sum()))}


OCCLUSION_BINS = ("0", "(0, 0.2]", "(0.2, 0.4]", "(0.4, 0.7]", "(0.7, 1]")  # of occlude_rate (DATA.md 2.2)
TELLING = 0.1  # from this occlude_rate on, a mask itself tells which type it is


def r2sm_row(pred: Mask, visible: Mask, whole: Mask, mask_type: str, chosen: str | None = None) -> dict[str, Any]:
    """What R2SM counts of one query (DATA.md 2.3), masks [H, W]; `mask_type`: what the wording asks for.

    right_type: whether the type that the model `chosen` is that, or, where it names none, whether its mask is nearer
    to that one (None where too little is hidden to tell, or at a tie). hidden_iou: of complete masks the IoU of what
    lies outside the visible one (None where nothing is hidden). bound: the IoU of the perfect mask of the other type,
    1 - occlude_rate: a claim to see behind things must beat it. Raises ValueError for another type or size.
    """
    if mask_type not in ("modal", "amodal") or chosen not in ("modal", "amodal", None):
        raise ValueError(f"mask types {mask_type!r} and {chosen!r}: use modal or amodal")
    pred, visible = _mask_pair(pred, visible)
    visible, whole = _mask_pair(visible, whole)
    hidden = whole & ~visible
    rate = float(np.count_nonzero(hidden) / max(np.count_nonzero(whole), 1))
    truth = whole if mask_type == "amodal" else visible
    right: bool | None = None if chosen is None else chosen == mask_type
    if chosen is None and rate >= TELLING:
        seen, complete = jaccard(pred, visible), jaccard(pred, whole)
        right = None if seen == complete else bool((complete > seen) == (mask_type == "amodal"))
    return {
        "mask_type": mask_type, "occlude_rate": rate, "right_type": right,
        "intersection": int(np.count_nonzero(pred & truth)), "union": int(np.count_nonzero(pred | truth)),
        "hidden_iou": float(jaccard(pred & ~visible, hidden)) if mask_type == "amodal" and hidden.any() else None,
        "bound": float(jaccard(visible, whole)),
    }


def r2sm_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """{"modal" | "amodal" | "all": {occlusion bin | "all": scores}} of rows of r2sm_row; what has no row is absent.

    Scores: gIoU (mean IoU, empty on empty 1), cIoU (pooled), P@.5, .7 and .9, type_accuracy, hidden_iou, bound, each
    the mean over the rows that have it (None where none has), and count.
    """

    def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        ious = np.array([_share(row["intersection"], row["union"]) for row in rows])

        def mean(name: str) -> float | None:
            known = [row[name] for row in rows if row[name] is not None]
            return float(np.mean(known)) if known else None

        pooled = _share(sum(row["intersection"] for row in rows), sum(row["union"] for row in rows))
        return {"gIoU": float(ious.mean()), "cIoU": pooled,
                **{f"P@{t}": float((ious >= t).mean()) for t in (0.5, 0.7, 0.9)},
                "type_accuracy": mean("right_type"), "hidden_iou": mean("hidden_iou"), "bound": mean("bound"),
                "count": len(rows)}

    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for kind in ("modal", "amodal", "all"):
        of_kind = [row for row in rows if kind in (row["mask_type"], "all")]
        bins = {name: [row for row in of_kind if _occlusion_bin(row["occlude_rate"]) == name]
                for name in OCCLUSION_BINS} | {"all": of_kind}
        if of_kind:
            table[kind] = {name: scores(members) for name, members in bins.items() if members}
    return table


def _occlusion_bin(rate: float) -> str:
    return OCCLUSION_BINS[int(np.searchsorted((0, 0.2, 0.4, 0.7), rate))]


# --- dialogues ----------------------------------------------------------------------------------------------


def dialogue_summary(rows: Sequence[dict]) -> dict:
    """One evaluation as plain numbers, in the words of METHOD.md 11.7.

    `rows`: one dict per dialogue with `id` (of the sample; all rows have one, or each is its own), `level` (simple,
    medium, difficult, clear, none), `success`, `frame_ok` (METHOD.md 3.1), `counts` [Q + 1] (candidates left,
    METHOD.md 2.2), `asked` [Q] (attribute of each call, None where it was not understood), `gains` [Q] (METHOD.md
    3.3), `questions` = Q, `optimal` (E*, DATA.md 6.4; None where nobody knows), `budget` (unresolved: the cost),
    `format`, where it was rewarded `reward` and `terms` {name: value or None}, and where a video was segmented `J`
    and `F`.

    Returns a dict of numbers, None where nothing was there to average; `success_by_level`, `asked` (share of
    all calls; "unclear" for None) and `terms` are dicts of such numbers. `standard_error` and `count` repeat
    the same keys; shares of calls are pooled over dialogues, so their error is that of a ratio of sums, and dialogues
    over one sample count as one draw of it.
    """
    ambiguous = [r for r in rows if r["level"] in AMBIGUOUS]
    clear = [r for r in rows if r["level"] == "clear"]
    no_target = [r for r in rows if r["level"] == "none"]

    def success(rows: list[dict]) -> tuple:
        return _mean(rows, lambda r: r["success"])

    def questions(rows: list[dict]) -> tuple:
        return _mean(rows, lambda r: r["questions"])

    def call_share(hits: Callable[[dict], int]) -> tuple:
        return _ratio([hits(r) for r in rows], [r["questions"] for r in rows], rows)

    attributes = [attribute or "unclear" for r in rows for attribute in r["asked"]]
    terms = dict.fromkeys(name for r in rows for name in r.get("terms", ()))
    table = {
        "success": success(rows),
        "success_ambiguous": success(ambiguous),
        "success_clear": success(clear),
        "success_none": success(no_target),
        "success_by_level": {
            level: success([r for r in rows if r["level"] == level])
            for level in (*AMBIGUOUS, "clear", "none")
            if any(r["level"] == level for r in rows)
        },
        "frame_ok": _mean(rows, lambda r: r["frame_ok"]),
        "jf": _mean([r for r in rows if r.get("J") is not None], lambda r: (r["J"] + r["F"]) / 2),
        "questions": questions(rows),
        "questions_ambiguous": questions(ambiguous),
        "questions_clear": questions(clear),
        "questions_none": questions(no_target),
        "resolved_rate": _mean(ambiguous, _resolved),
        "redundant_question_rate": call_share(lambda r: sum(gain <= 0 for gain in r["gains"])),
        "regret": _mean(
            [r for r in ambiguous if r["optimal"] is not None],
            lambda r: (r["questions"] if _resolved(r) else r["budget"]) - r["optimal"],
        ),
        "regret_clear": questions(clear),
        "asked": {
            name: call_share(lambda r, name=name: sum((a or "unclear") == name for a in r["asked"]))
            for name in sorted(set(attributes), key=lambda a: (-attributes.count(a), a))
        },
        "format_rate": _mean(rows, lambda r: r["format"]),
        "reward": _mean([r for r in rows if r.get("reward") is not None], lambda r: r["reward"]),
        "terms": {
            name: _mean(
                [r for r in rows if r.get("terms", {}).get(name) is not None], lambda r, name=name: r["terms"][name]
            )
            for name in terms
        },
    }

    def part(i: int) -> dict:
        return {k: {n: t[i] for n, t in v.items()} if isinstance(v, dict) else v[i] for k, v in table.items()}

    return part(0) | {"standard_error": part(1), "count": part(2)}


def _resolved(row: dict) -> bool:
    return row["questions"] > 0 and row["counts"][-1] == 1


def _mean(rows: list[dict], value: Callable[[dict], float]) -> tuple[float | None, float | None, int]:
    """Mean, its standard error, and how many rows; None for what no row or one sample cannot give."""
    return _ratio([value(r) for r in rows], [1] * len(rows), rows)


def _ratio(hits: list[float], sizes: list[int], rows: list[dict]) -> tuple[float | None, float | None, int]:
    """sum(hits) / sum(sizes), its standard error by linearisation over the n samples, and sum(sizes)."""
    total = sum(sizes)
    if not total:
        return None, None, 0
    ratio = sum(hits) / total
    residuals = [hit - ratio * size for hit, size in zip(hits, sizes, strict=True)]
    if "id" in rows[0]:  # dialogues over one sample are no independent ones
        of_sample: dict[Any, float] = {}
        for residual, row in zip(residuals, rows, strict=True):
            of_sample[row["id"]] = of_sample.get(row["id"], 0.0) + residual
        residuals = list(of_sample.values())
    n = len(residuals)
    error = sqrt(sum(r * r for r in residuals) * n / (n - 1)) / total if n > 1 else None
    return float(ratio), error, total


# --- how sure a table is ------------------------------------------------------------------------------------


def bootstrap(rows: Sequence[Mapping[str, Any]], table: Callable[[list], Mapping[str, Any]], *, by: str = "video",
              resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """95 % intervals of every number of table(rows): what it makes of rows drawn again, with replacement.

    Whole videos are drawn (rows of one value of the key `by`), because several queries share one and are no
    independent samples. Returns the tables' own nested dicts with (low, high) in place of numbers: percentiles 2.5
    and 97.5 over the resamples that give the number. Raises ValueError without a row.
    """
    if not rows:
        raise ValueError("no rows to draw from")
    videos: dict[Any, list] = {}
    for row in rows:
        videos.setdefault(row[by], []).append(row)
    of_video, rng = list(videos.values()), np.random.default_rng(seed)
    drawn = [
        table([row for i in rng.integers(len(of_video), size=len(of_video)) for row in of_video[i]])
        for _ in range(resamples)
    ]

    def between(tables: list) -> Any:
        if any(isinstance(t, Mapping) for t in tables):
            names = dict.fromkeys(name for t in tables if t for name in t)
            return {name: between([t[name] for t in tables if t and name in t]) for name in names}
        known = [t for t in tables if t is not None]
        return tuple(float(x) for x in np.percentile(known, (2.5, 97.5))) if known else None

    return between(drawn)
