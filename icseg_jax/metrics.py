"""Scores of masks and of dialogues, in plain numpy.

Masks: region J and boundary F as davis2017-evaluation computes them (DATA.md 4.1), gIoU and cIoU as LISA
computes them for ReasonSeg (DATA.md 4.2); any non-zero pixel is foreground. Dialogues: the words of METHOD.md
11.7, each with its standard error.
"""

from collections.abc import Callable, Iterable, Sequence
from math import ceil, isqrt, sqrt
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

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
    intersection = np.count_nonzero(pred & truth, axis=(-2, -1))
    union = np.count_nonzero(pred | truth, axis=(-2, -1))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))[()]


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
    preds, truths = list(preds), list(truths)
    ignore = [None] * len(preds) if ignore is None else list(ignore)
    if not len(preds) == len(truths) == len(ignore) > 0:
        raise ValueError(
            f"{len(preds)} predictions, {len(truths)} truths, {len(ignore)} ignore masks: need as many"
        )
    intersections, unions = np.zeros(len(preds)), np.zeros(len(preds))
    for i, (pred, truth, void) in enumerate(zip(preds, truths, ignore, strict=True)):
        pred, truth = _mask_pair(pred, truth)
        keep = True if void is None else ~_mask_pair(void, truth)[0]
        intersections[i] = np.count_nonzero(pred & truth & keep)
        unions[i] = np.count_nonzero((pred | truth) & keep)
    ious = np.where(unions == 0, 1.0, intersections / (unions + 1e-5))  # both epsilons are LISA's
    return float(ious.mean()), float(intersections.sum() / (unions.sum() + 1e-10))


def _mask_pair(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pred, truth = np.asarray(pred).astype(bool, copy=False), np.asarray(truth).astype(bool, copy=False)
    if pred.ndim < 2 or truth.ndim < 2 or pred.shape[-2:] != truth.shape[-2:]:
        raise ValueError(f"masks of shapes {pred.shape} and {truth.shape}: need [..., H, W] of one size")
    return (pred, truth) if pred.shape == truth.shape else np.broadcast_arrays(pred, truth)


def _frame_f(pred: np.ndarray, truth: np.ndarray, radius: int) -> float:
    rows = np.flatnonzero(pred.any(1) | truth.any(1))
    if not rows.size:
        return 1.0
    columns = np.flatnonzero((pred[rows[0] : rows[-1] + 1] | truth[rows[0] : rows[-1] + 1]).any(0))
    # One pixel of margin holds every boundary pixel; where it is outside the frame, the crop's last row and
    # column are the frame's, which _boundary treats specially.
    box = slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)
    pred, truth = _boundary(pred[box]), _boundary(truth[box])
    n_pred, n_truth = np.count_nonzero(pred), np.count_nonzero(truth)
    if n_pred == 0 or n_truth == 0:
        return float(n_pred == n_truth)
    precision = np.count_nonzero(pred & _dilate(truth, radius)) / n_pred
    recall = np.count_nonzero(truth & _dilate(pred, radius)) / n_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour inside the array."""
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """Dilation with the disk x^2 + y^2 <= radius^2, one row of the disk after the other."""
    height, width = mask.shape
    out, row, half = np.zeros_like(mask), mask, 0
    for dy in range(radius, -1, -1):
        while (grow := isqrt(radius**2 - dy**2) - half) > 0:
            step = min(grow, 2 * half + 1)  # two shifted copies still touch the one in the middle
            row, narrow = row.copy(), row
            row[:, step:] |= narrow[:, : max(width - step, 0)]
            row[:, : max(width - step, 0)] |= narrow[:, step:]
            half += step
        if dy < height:
            out[dy:] |= row[: height - dy]
            out[: height - dy] |= row[dy:]
    return out


# --- dialogues ----------------------------------------------------------------------------------------------


def dialogue_summary(rows: Sequence[dict]) -> dict:
    """One evaluation as plain numbers, in the words of METHOD.md 11.7.

    `rows`: one dict per dialogue with `level` (simple, medium, difficult, clear, none), `success`, `frame_ok`
    (METHOD.md 3.1), `counts` [Q + 1] (candidates left, METHOD.md 2.2), `asked` [Q] (attribute of each call,
    None where it was not understood), `gains` [Q] (METHOD.md 3.3), `questions` = Q, `optimal` (E*, DATA.md
    6.4), `budget` (most questions allowed), `format`, `reward`, `terms` {name: value or None}, and where a
    video was segmented `J` and `F`.

    Returns a dict of numbers, None where nothing was there to average; `success_by_level`, `asked` (share of
    all calls; "unclear" for None) and `terms` are dicts of such numbers. `standard_error` and `count` repeat
    the same keys; shares of calls are pooled over dialogues, so their error is that of a ratio of sums.
    """
    ambiguous = [r for r in rows if r["level"] in AMBIGUOUS]
    clear = [r for r in rows if r["level"] == "clear"]
    no_target = [r for r in rows if r["level"] == "none"]

    def success(rows: list[dict]) -> tuple:
        return _mean(rows, lambda r: r["success"])

    def questions(rows: list[dict]) -> tuple:
        return _mean(rows, lambda r: r["questions"])

    def call_share(hits: Callable[[dict], int]) -> tuple:
        return _ratio([hits(r) for r in rows], [r["questions"] for r in rows])

    attributes = [attribute or "unclear" for r in rows for attribute in r["asked"]]
    terms = dict.fromkeys(name for r in rows for name in r["terms"])
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
            ambiguous, lambda r: (r["questions"] if _resolved(r) else r["budget"]) - r["optimal"]
        ),
        "regret_clear": questions(clear),
        "asked": {
            name: call_share(lambda r, name=name: sum((a or "unclear") == name for a in r["asked"]))
            for name in sorted(set(attributes), key=lambda a: (-attributes.count(a), a))
        },
        "format_rate": _mean(rows, lambda r: r["format"]),
        "reward": _mean(rows, lambda r: r["reward"]),
        "terms": {
            name: _mean(
                [r for r in rows if r["terms"].get(name) is not None], lambda r, name=name: r["terms"][name]
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
    """Mean, its standard error, and n; None for what n = 0 or n = 1 cannot give."""
    return _ratio([value(r) for r in rows], [1] * len(rows))


def _ratio(hits: list[float], sizes: list[int]) -> tuple[float | None, float | None, int]:
    """sum(hits) / sum(sizes), its standard error by linearisation over the n dialogues, and sum(sizes)."""
    n, total = len(sizes), sum(sizes)
    if not total:
        return None, None, 0
    ratio = sum(hits) / total
    residuals = sum((hit - ratio * size) ** 2 for hit, size in zip(hits, sizes, strict=True))
    return float(ratio), sqrt(residuals * n / (n - 1)) / total if n > 1 else None, total
