"""The moving-shapes world: short videos, ambiguous queries, and exact answers (DATA.md section 6).

A scene is a 12-frame clip of 128 x 128 pixels with two to seven flat shapes, some moving, some covering
others, and a query that zero, one or several of them satisfy. Everything is known exactly: masks, candidate
sets, the optimal questions. Scenes are built on an attribute table first (cheap to reject), and placed
afterwards. Scenes need numpy and jaxtyping; writing them also needs Pillow, pyarrow or pycocotools.

1 Constants · 2 Scenes · 3 Attribute tables and queries · 4 Placement · 5 Pictures and masks · 6 Texts ·
7 Optimal questions and baselines · 8 Demonstrations and conversations · 9 On disk · 10 The layouts of other datasets
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

# ------------------------------------------------------------------------------------------------------------
# 1 Constants
# ------------------------------------------------------------------------------------------------------------

HEIGHT = WIDTH = 128
N_FRAMES = 12
N_SHOWN = 4  # frames a policy sees: linspace truncated to 0, 3, 7, 11

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {  # no red: the user simulator marks the target with a red contour (DATA.md 6.7)
    "blue": (50, 90, 240),
    "green": (40, 190, 70),
    "yellow": (245, 225, 50),
    "purple": (165, 60, 200),
    "orange": (250, 140, 30),
    "white": (240, 240, 240),
}
SIZES = {"small": (7, 8), "medium": (11, 12), "large": (15, 17)}  # radius in pixels, inclusive
MOTIONS = ("leftward", "rightward", "upward", "downward", "still")
COLUMNS = ("left", "middle", "right")  # the third of the width that holds the centre, in a named frame
ASKABLE = ("color", "shape", "size", "motion", "column")
VALUES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "motion": MOTIONS, "column": COLUMNS}

LEVELS = ("simple", "medium", "difficult", "clear", "none")
LEVEL_SHARES = {"simple": 0.22, "medium": 0.22, "difficult": 0.16, "clear": 0.28, "none": 0.12}
CANDIDATES = {"simple": (2, 2), "medium": (3, 4), "difficult": (5, 6)}  # |C_0|, inclusive
MAX_OBJECTS = 7
MAX_OPTIONS = 3  # options that one question may offer (DATA.md 6.4)
BUDGET = 5  # questions a dialogue may hold (METHOD.md 1.3)

SPLITS = ("train", "test")
HELD_OUT = (("purple", "cross"), ("orange", "triangle"))  # (color, shape) pairs of the test split only

NO_TARGET = -1  # the oid of queries that nothing matches, on disk
QUERY_FRAME = 0  # column queries and the optimal question counts refer to this frame
DEAD_ZONE = 0.03  # of the width: a centre this near to a column boundary has no askable column
MARGIN = 0.05  # of the width: no centre is nearer to a boundary in the first frame
TRAVEL = (30, 50)  # pixels a moving object covers over the clip
SEEN = 0.6  # every object is this visible in at least one sampled frame
COVERED = (0.15, 0.7)  # "partly covered": share of an object that is hidden
SAID = ((0.5, 0.38, 0.12), 0.35)  # how many attributes a query mentions, and columns: whether it is ambiguous or not
MIN_GAP = 6  # pixels between left edges at first: lists of candidates run from left to right and name these edges

RED = (255, 0, 0)
GREY = (96, 96, 96)

# ------------------------------------------------------------------------------------------------------------
# 2 Scenes
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Object:
    """One shape. `oid` is a random number that goes with nothing else; `z` is its depth, 0 in front."""

    oid: int
    shape: str
    color: str
    size: str
    radius: int
    motion: str
    z: int
    centers: Float[np.ndarray, "t 2"]  # x, y in pixels, whole numbers: masks are exact translates

    def value(self, attribute: str, frame: int = QUERY_FRAME, width: int = WIDTH) -> str:
        """The object's value of an askable attribute; only "column" depends on the frame."""
        if attribute == "column":
            return COLUMNS[min(int(3 * self.centers[frame, 0] / width), 2)]
        return getattr(self, attribute)


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip, its query and what is known about it. Objects are in oid order."""

    id: str
    split: str
    index: int
    seed: int
    height: int
    width: int
    n_frames: int
    objects: tuple[Object, ...]
    query: str
    mentioned: dict[str, str]  # what the query says: attribute -> value
    candidates: tuple[int, ...]  # oids that satisfy the query (C_0)
    target: int | None  # oid; None on level "none"
    level: str
    initial_count: int  # |C_0|
    max_count: int  # D*: questions an optimal asker needs in the worst case
    optimal_expected: float  # E*: and on average
    mask_type: str  # "modal" | "amodal"
    best_first: tuple[str, ...]  # attributes that an optimal asker may ask first
    occluder: tuple[int, int, int, int] | None  # grey bar, x1 y1 x2 y2, ends excluded; in front of everything
    background_seed: int
    visible: Float[np.ndarray, "n t"] = field(repr=False)  # visible share of each object in each frame

    def object(self, oid: int) -> Object:
        """The object with this oid (oids are 1..n, in order)."""
        return self.objects[oid - 1]


def make_scene(index: int, *, seed: int = 0, split: str = "train", level: str | None = None,
               mask_type: str = "modal") -> Scene:
    """The scene that (seed, split, index) names, always the same one.

    `level` None draws it from LEVEL_SHARES. Held-out colour-shape pairs occur in the test split only.
    Ambiguous scenes designate a best first attribute at random and are redrawn until it is one and at most
    one other ties with it, so that no attribute is the answer to most of them. Raises ValueError for an
    unknown split, level or mask type.
    """
    for name, given, known in (("split", split, SPLITS), ("level", level, (None, *LEVELS)),
                               ("mask_type", mask_type, ("modal", "amodal"))):
        if given not in known:
            choices = ", ".join(map(str, known))
            raise ValueError(f"make_scene: {name} {given!r} is unknown; use one of {choices}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    drawn = str(rng.choice(LEVELS, p=[LEVEL_SHARES[name] for name in LEVELS]))
    level = level or drawn
    while True:
        table = _draw_table(rng, level, split)
        if table is None:
            continue
        rows, mentioned = table
        if len({tuple(row.values()) for row in rows}) < len(rows):
            continue  # twins: no conversation could tell them apart
        placed = _place(rng, rows)
        if placed is not None:
            break
    objects, occluder, visible = placed
    candidates = tuple(o.oid for o in objects if all(o.value(a) == v for a, v in mentioned.items()))
    worst, expected, best = optimal_questions([attributes_of(objects[oid - 1]) for oid in candidates])
    return Scene(
        id=f"{split}-{seed}-{index:06d}", split=split, index=index, seed=seed, height=HEIGHT, width=WIDTH,
        n_frames=N_FRAMES, objects=objects, query=_query_text(rng, mentioned, mask_type), mentioned=mentioned,
        candidates=candidates, target=int(rng.choice(candidates)) if candidates else None, level=level,
        initial_count=len(candidates), max_count=int(worst), optimal_expected=expected, mask_type=mask_type,
        best_first=best, occluder=occluder, background_seed=int(rng.integers(2**31)), visible=visible)


def requery(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same objects under another query: one to three attributes of some object, one time in ten of none.

    A warm start uses it to say many things about one picture. Levels are those of the candidate count and
    nothing is balanced, so it is not for measuring.
    """
    row = attributes_of(scene.objects[int(rng.integers(len(scene.objects)))], QUERY_FRAME, scene.width)
    if rng.random() < 0.1:
        changed = _pick(rng, ("color", "shape", "size", "motion"))
        other = row | {changed: _pick(rng, VALUES[changed])}
        row = other if _possible(other, scene.split) else row
    names = _draw_mentioned(rng, (0.4, 0.35, 0.25), 0.1)
    mentioned = {name: row[name] for name in ASKABLE if name in names}
    candidates = tuple(o.oid for o in scene.objects
                       if all(o.value(a, QUERY_FRAME, scene.width) == v for a, v in mentioned.items()))
    level = {0: "none", 1: "clear", 2: "simple", 3: "medium", 4: "medium"}.get(len(candidates), "difficult")
    worst, expected, best = optimal_questions(
        [attributes_of(scene.object(oid), QUERY_FRAME, scene.width) for oid in candidates])
    return replace(
        scene, query=_query_text(rng, mentioned, scene.mask_type), mentioned=mentioned, level=level,
        candidates=candidates, target=int(rng.choice(candidates)) if candidates else None,
        initial_count=len(candidates), max_count=int(worst), optimal_expected=expected, best_first=best)


MISSES = 0.2  # an imagined object that the query does not fit misses it by two attributes


def imagine(scene: Scene, rng: np.random.Generator, *, near: bool = False) -> Scene:
    """One to six other objects in the scene's stead which the query fits, and up to two that it nearly does, for
    dialogues about a list that is given as text: what comes after a list, and what fits, is read there, not seen.

    near: two to six of those. All attributes are missed by alike: what is rare is not looked at.
    """
    worst, objects = math.inf, []
    while math.isinf(worst) or any(held_out(o.color, o.shape, scene.split) for o in objects):  # alike in everything
        n, others = (int(rng.integers(1, 4)), int(rng.integers(2, 7))) if near else (
            int(rng.integers(1, 7)), int(rng.integers(3)))
        values = {a: rng.permutation(len(VALUES[a]))[: int(rng.integers(1, 4))] for a in ASKABLE}
        kinds = rng.permutation(("color", "shape", "size", "motion"))[: int(rng.integers(1, 4 if near else 3))].tolist()
        for said in kinds:
            values[said] = values[said][:1]
        objects = []
        for oid in range(1, n + others + 1):
            row = {a: VALUES[a][int(rng.choice(values[a]))] for a in ASKABLE if a != "column"}
            for off in rng.permutation(kinds)[: 1 + (rng.random() < MISSES) if oid > n else 0].tolist():
                row[off] = _pick(rng, [v for v in VALUES[off] if v != row[off]])
            radius = int(rng.integers(SIZES[row["size"]][0], SIZES[row["size"]][1] + 1))
            center = rng.integers(radius, scene.width - radius, 2).astype(float)
            while min(abs(center[0] - scene.width * k / 3) for k in (1, 2)) <= DEAD_ZONE * scene.width + 1:
                center[0] = rng.integers(radius, scene.width - radius)
            still = np.broadcast_to(center, (scene.n_frames, 2))
            objects.append(Object(oid=oid, radius=radius, z=oid, centers=still, **row))
        worst, expected, best = optimal_questions([attributes_of(o, QUERY_FRAME, scene.width) for o in objects[:n]])
    mentioned = {said: VALUES[said][int(values[said][0])] for said in kinds}
    return replace(
        scene, objects=tuple(objects), query=_query_text(rng, mentioned, scene.mask_type), mentioned=mentioned,
        level="difficult", candidates=tuple(range(1, n + 1)), target=int(rng.integers(n)) + 1, initial_count=n,
        max_count=int(worst), optimal_expected=expected, best_first=best,
        visible=np.ones((n + others, scene.n_frames)))


def attributes_of(obj: Object, frame: int = QUERY_FRAME, width: int = WIDTH) -> dict[str, str]:
    """Every askable attribute of an object, the column in this frame."""
    return {attribute: obj.value(attribute, frame, width) for attribute in ASKABLE}


def shown_frames(n_frames: int = N_FRAMES, n: int = N_SHOWN) -> list[int]:
    """Frames a policy sees at test time: linspace over the clip, truncated (METHOD.md 1.1)."""
    return [int(f) for f in np.linspace(0, n_frames - 1, n)]


# ------------------------------------------------------------------------------------------------------------
# 3 Attribute tables and queries
# ------------------------------------------------------------------------------------------------------------

Row = dict[str, str]  # attribute -> value, the column in QUERY_FRAME


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def held_out(color: str, shape: str, split: str) -> bool:
    """Whether this split must not know such an object, neither from pictures nor from words."""
    return split != "test" and (color, shape) in HELD_OUT


def _possible(row: Row, split: str) -> bool:
    """Whether the world can hold such an object: movers need room ahead, and a split its pairs."""
    if (row["motion"], row["column"]) in (("leftward", "left"), ("rightward", "right")):
        return False
    return not held_out(row["color"], row["shape"], split)


def _draw_row(rng: np.random.Generator, split: str, fixed: Row | None = None) -> Row:
    while True:
        row = {attribute: _pick(rng, VALUES[attribute]) for attribute in ASKABLE}
        if split == "test" and rng.random() < 0.06:  # at least as often as any other pair
            row["color"], row["shape"] = HELD_OUT[int(rng.integers(len(HELD_OUT)))]
        row |= fixed or {}
        if _possible(row, split):
            return row


def _matches(row: Row, mentioned: Row) -> bool:
    return all(row[attribute] == value for attribute, value in mentioned.items())


def _draw_distractor(rng: np.random.Generator, split: str, mentioned: Row) -> Row:
    """An object that the query excludes, half of the time because of one attribute only."""
    while True:
        spared = _pick(rng, tuple(mentioned))
        near = {a: v for a, v in mentioned.items() if a != spared} if rng.random() < 0.5 else {}
        row = _draw_row(rng, split, near) if _possible_with(near, split) else _draw_row(rng, split)
        if not _matches(row, mentioned):
            return row


def _possible_with(fixed: Row, split: str) -> bool:
    free = {"color": "blue", "shape": "circle", "size": "small", "motion": "still", "column": "middle"}
    return _possible(free | fixed, split)


def _draw_mentioned(rng: np.random.Generator, counts: Sequence[float], column: float) -> list[str]:
    """One, two or three attributes for a query, so often each, which has room for one clause: the motion or, so often,
    the column."""
    n = int(rng.choice((1, 2, 3), p=counts))
    pool = ["color", "shape", "size", "column" if rng.random() < column else "motion"]
    return [pool[i] for i in rng.permutation(len(pool))[:n]]


def _draw_table(rng: np.random.Generator, level: str, split: str) -> tuple[list[Row], Row] | None:
    """Attribute rows of all objects in random order, and what the query mentions; None: call again."""
    if level in CANDIDATES:
        return _draw_ambiguous(rng, level, split)
    n_objects = int(rng.integers(2, MAX_OBJECTS + 1))
    attributes = _draw_mentioned(rng, *SAID)
    if level == "clear":
        target = _draw_row(rng, split)
        mentioned = {attribute: target[attribute] for attribute in attributes}
        rows = [target] + [_draw_distractor(rng, split, mentioned) for _ in range(n_objects - 1)]
    else:
        # No match, but near ones: the query is what a plausible object would be called.
        mentioned = {a: v for a, v in _draw_row(rng, split).items() if a in attributes}
        rows = [_draw_distractor(rng, split, mentioned) for _ in range(n_objects)]
    rng.shuffle(rows)
    return rows, mentioned


def _draw_ambiguous(rng: np.random.Generator, level: str, split: str) -> tuple[list[Row], Row] | None:
    k = int(rng.integers(CANDIDATES[level][0], CANDIDATES[level][1] + 1))
    attributes = _draw_mentioned(rng, *SAID)
    free = [attribute for attribute in ASKABLE if attribute not in attributes]
    # Few queries mention the column, so it is nearly always free: half the weight keeps it from leading.
    weights = np.array([0.5 if attribute == "column" else 1.0 for attribute in free])
    designated = free[int(rng.choice(len(free), p=weights / weights.sum()))]
    mentioned = {attribute: _pick(rng, VALUES[attribute]) for attribute in attributes}
    if not _possible_with(mentioned, split):
        return None
    for _ in range(60):
        few = np.searchsorted((0.45, 0.85), rng.random(len(ASKABLE))) + 1  # values: one, two, seldom three
        table = {attribute: [mentioned[attribute]] * k for attribute in attributes}
        for attribute, n_cells in zip(free, few, strict=False):
            most = min(k, len(VALUES[attribute]))
            n_cells = int(rng.integers(2, most + 1)) if attribute == designated else min(n_cells, most)
            values = rng.permutation(len(VALUES[attribute]))[:n_cells]
            cells = np.concatenate([np.arange(n_cells), rng.integers(n_cells, size=k - n_cells)])
            table[attribute] = [VALUES[attribute][values[cell]] for cell in rng.permutation(cells)]
        rows = [{attribute: table[attribute][i] for attribute in ASKABLE} for i in range(k)]
        if not all(_possible(row, split) for row in rows):
            continue
        worst, _, best = optimal_questions(rows)
        fits = {"simple": worst == 1, "medium": worst == 2, "difficult": 2 <= worst < math.inf}[level]
        if fits and designated in best and len(best) <= 2:
            break
    else:
        return None
    n_distractors = int(rng.integers(0, min(3, MAX_OBJECTS - k) + 1))
    rows += [_draw_distractor(rng, split, mentioned) for _ in range(n_distractors)]
    rng.shuffle(rows)
    return rows, mentioned


def _query_text(rng: np.random.Generator, mentioned: Row, mask_type: str) -> str:
    noun = mentioned.get("shape") or _pick(rng, ("object", "thing", "one"))
    words = [mentioned[a] for a in ("size", "color") if a in mentioned] + [noun]
    if (motion := mentioned.get("motion")) is not None:
        moves = _pick(rng, ("that moves ", "moving ")) + motion
        words.append("that stays still" if motion == "still" else moves)
    if (column := mentioned.get("column")) is not None:
        words.append(f"in the {column} at frame {QUERY_FRAME}")
    phrase = " ".join(words)
    if mask_type == "amodal":
        return _pick(rng, (f"segment the whole {phrase}, including the hidden part",
                           f"outline the full shape of the {phrase} as if nothing covered it"))
    heads = ("segment the ", "find the ", "track the ", "please segment the ", "show me the ", "the ",
             "segment the visible part of the ")
    return _pick(rng, heads) + phrase


# ------------------------------------------------------------------------------------------------------------
# 4 Placement
# ------------------------------------------------------------------------------------------------------------

_STEPS = {"leftward": (-1, 0), "rightward": (1, 0), "upward": (0, -1), "downward": (0, 1), "still": (0, 0)}
_PROPOSALS = 48


def _propose(rng: np.random.Generator, row: Row, radius: int) -> Float[np.ndarray, "m t 2"]:
    """Trajectories that stay inside the frame and start, with a margin, in the row's column (also in frame 1,
    which takes the place of frame 0 when training anchors a sample there; so it is with four frames shown or more).
    """
    dx, dy = np.asarray(_STEPS[row["motion"]])[:, None] * rng.integers(TRAVEL[0], TRAVEL[1] + 1, _PROPOSALS)
    column = COLUMNS.index(row["column"])
    low = column * WIDTH / 3 if column > 0 else -math.inf
    high = (column + 1) * WIDTH / 3 if column < 2 else math.inf
    margin, dead, step = MARGIN * WIDTH + 0.5, DEAD_ZONE * WIDTH + 0.5, dx / (N_FRAMES - 1)
    near, far = radius + 1, WIDTH - 2 - radius
    low = np.maximum(np.maximum(low + margin, low + dead - step), near - np.minimum(dx, 0))
    high = np.minimum(np.minimum(high - margin, high - dead - step), far - np.maximum(dx, 0))
    x = low + rng.random(_PROPOSALS) * (high - low)
    low_y, high_y = near - np.minimum(dy, 0), HEIGHT - 2 - radius - np.maximum(dy, 0)
    y = low_y + rng.random(_PROPOSALS) * (high_y - low_y)
    start, travel = np.stack([x, y], -1), np.stack([dx, dy], -1)
    time = np.linspace(0, 1, N_FRAMES)[None, :, None]
    return np.rint(start[:, None] + travel[:, None] * time)[high >= low]


def _place(rng: np.random.Generator, rows: list[Row]
           ) -> tuple[tuple[Object, ...], tuple[int, int, int, int] | None, np.ndarray] | None:
    """Objects with trajectories, an occluding bar in some scenes, visible shares; None if they do not fit."""
    n = len(rows)
    radii = [int(rng.integers(SIZES[row["size"]][0], SIZES[row["size"]][1] + 1)) for row in rows]
    depth = rng.permutation(n)
    draw = rng.random()
    occluder = _draw_bar(rng) if draw < 0.1 else None
    wants_overlap = draw > 0.72
    for _ in range(12):
        paths = _place_once(rng, rows, radii, wants_overlap)
        if paths is None:
            continue
        objects = tuple(
            Object(oid=i + 1, shape=row["shape"], color=row["color"], size=row["size"], radius=radii[i],
                   motion=row["motion"], z=int(depth[i]), centers=paths[i]) for i, row in enumerate(rows))
        visible = _visible_shares(objects, occluder)
        if (visible[:, shown_frames()].max(1) < SEEN).any() or (visible[:, :2] < 0.3).any():
            continue
        hidden = 1 - visible
        covered = bool(((hidden >= COVERED[0]) & (hidden <= COVERED[1])).any())
        if covered == (wants_overlap or occluder is not None):
            return objects, occluder, visible
    return None


def _place_once(rng: np.random.Generator, rows: list[Row], radii: list[int], wants_overlap: bool
                ) -> list[np.ndarray] | None:
    """One trajectory per row, placed in random order; if asked to, the last one crosses another."""
    order = rng.permutation(len(rows))
    paths: dict[int, np.ndarray] = {}
    for i in order:
        proposals = _propose(rng, rows[i], radii[i])
        if paths and len(proposals):
            others = np.stack(list(paths.values()))  # [placed, t, 2]
            apart = proposals[:, None] - others[None]  # [m, placed, t, 2]
            reach = (radii[i] + np.array([radii[j] for j in paths]))[:, None]
            gap = np.sqrt((apart**2).sum(-1)) / reach  # 1 = circles touch
            wider = (radii[i] - np.array([radii[j] for j in paths]))[:, None]
            free = (np.abs(apart[:, :, :2, 0] - wider) >= MIN_GAP).all((1, 2))
            closest = gap.min(2)
            if wants_overlap and i == order[-1]:
                free &= (closest.min(1) > 0.35) & (closest.min(1) < 0.75)
            else:
                free &= closest.min(1) > 0.95
            proposals = proposals[free]
        if not len(proposals):
            return None
        paths[int(i)] = proposals[0]
    return [paths[i] for i in range(len(rows))]


def _draw_bar(rng: np.random.Generator) -> tuple[int, int, int, int]:
    thick, at = int(rng.integers(6, 10)), int(rng.integers(24, WIDTH - 32))
    return (at, 0, at + thick, HEIGHT) if rng.random() < 0.5 else (0, at, WIDTH, at + thick)


# ------------------------------------------------------------------------------------------------------------
# 5 Pictures and masks
# ------------------------------------------------------------------------------------------------------------


@functools.cache
def _patch(shape: str, radius: int) -> np.ndarray:
    """The shape on a square of 2 * radius + 1 pixels around its centre, bool."""
    y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1].astype(float)
    if shape == "circle":
        inside = x**2 + y**2 <= radius**2 + 0.5
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.87 * radius
    elif shape == "triangle":
        inside = (y <= 0.85 * radius) & (abs(x) <= (y + radius) / (1.85 * radius) * radius)
    else:
        inside = (np.minimum(abs(x), abs(y)) <= 0.34 * radius) & (np.maximum(abs(x), abs(y)) <= radius)
    inside.setflags(write=False)
    return inside


@functools.cache
def _edge(shape: str, radius: int) -> np.ndarray:
    """The outermost pixels of a patch, drawn darker, so that overlapping objects of one colour stay two."""
    padded = np.pad(_patch(shape, radius), 1)
    inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return padded[1:-1, 1:-1] & ~inner


def _window(obj: Object, frame: int) -> tuple[slice, slice]:
    x, y = (int(c) for c in obj.centers[frame])
    return slice(y - obj.radius, y + obj.radius + 1), slice(x - obj.radius, x + obj.radius + 1)


def _index_map(objects: Sequence[Object], occluder: tuple[int, int, int, int] | None, frame: int
               ) -> np.ndarray:
    """uint8 [H, W]: row + 1 of the object seen at a pixel, 0 where none is (painter's order, far to near)."""
    seen = np.zeros((HEIGHT, WIDTH), np.uint8)
    for row in sorted(range(len(objects)), key=lambda i: -objects[i].z):
        obj = objects[row]
        seen[_window(obj, frame)][_patch(obj.shape, obj.radius)] = row + 1
    if occluder is not None:
        x1, y1, x2, y2 = occluder
        seen[y1:y2, x1:x2] = 0
    return seen


def _visible_shares(objects: Sequence[Object], occluder: tuple[int, int, int, int] | None) -> np.ndarray:
    area = np.array([_patch(o.shape, o.radius).sum() for o in objects], float)
    counts = [np.bincount(_index_map(objects, occluder, t).ravel(), minlength=len(objects) + 1)[1:]
              for t in range(N_FRAMES)]
    return np.stack(counts, 1) / area[:, None]


def visible_masks(scene: Scene, frame: int) -> Bool[np.ndarray, "n h w"]:
    """What can be seen of each object (modal masks), rows in `scene.objects` order; they never overlap."""
    seen = _index_map(scene.objects, scene.occluder, frame)
    return seen[None] == np.arange(1, len(scene.objects) + 1, dtype=np.uint8)[:, None, None]


def complete_masks(scene: Scene, frame: int) -> Bool[np.ndarray, "n h w"]:
    """Each object as if nothing covered it (amodal masks), rows in `scene.objects` order."""
    masks = np.zeros((len(scene.objects), scene.height, scene.width), bool)
    for mask, obj in zip(masks, scene.objects, strict=True):
        mask[_window(obj, frame)] = _patch(obj.shape, obj.radius)
    return masks


def render(scene: Scene, frames: Iterable[int]) -> UInt8[np.ndarray, "f h w 3"]:
    """RGB pictures of these frames: flat shapes with a darker rim on a dark, faintly noisy background."""
    noise = np.random.default_rng(scene.background_seed)
    grain = noise.integers(0, 13, (scene.height, scene.width, 3), np.uint8)
    background = grain + noise.integers(16, 44, 3, np.uint8)
    pictures = []
    for frame in frames:
        picture = background.copy()
        for obj in sorted(scene.objects, key=lambda o: -o.z):
            color = np.array(COLORS[obj.color])
            window = picture[_window(obj, frame)]
            window[_patch(obj.shape, obj.radius)] = color
            window[_edge(obj.shape, obj.radius)] = color * 0.55
        if scene.occluder is not None:
            x1, y1, x2, y2 = scene.occluder
            picture[y1:y2, x1:x2] = GREY
        pictures.append(picture)
    return np.stack(pictures)


def scene_ground_truth(scene: Scene, oid: int, frames: Iterable[int]) -> dict[str, dict]:
    """METHOD.md 6's ground truth of an object over the shown frames, as `data.ground_truth` gives it."""
    from icseg_jax import data  # here, so that scenes can be made without the readers

    row = oid - 1
    masks = complete_masks if scene.mask_type == "amodal" else visible_masks
    return data.ground_truth({frame: masks(scene, frame)[row] for frame in frames})


# ------------------------------------------------------------------------------------------------------------
# 6 Texts
# ------------------------------------------------------------------------------------------------------------

QUESTIONS = {
    "color": "What color is the target?",
    "shape": "What shape is the target?",
    "size": "How big is the target?",
    "motion": "Which direction does the target move?",
    "column": "Where is the target in frame {fid}?",
}


def describe(obj: Object, frame: int, width: int = WIDTH) -> str:
    """Every askable attribute, e.g. "blue circle small leftward middle"."""
    return " ".join(obj.value(attribute, frame, width) for attribute in ASKABLE)


COORDINATE_STEP = 10  # thousandths of the frame; texts round places to it, as the embedded tokenizer does


def place(obj: Object, frame: int, width: int = WIDTH) -> int:
    """Where the (complete) object's left edge is in `frame`, in thousandths."""
    left = max(0.0, 1000 * (obj.centers[frame, 0] - obj.radius) / width)
    return round(left / COORDINATE_STEP) * COORDINATE_STEP


def placed(obj: Object, frame: int, width: int = WIDTH) -> str:
    """`describe` after `place`: "340 blue circle small leftward middle".

    The number is what tells alike objects apart: a list without it skips one or says one twice.
    """
    return f"{place(obj, frame, width)} {describe(obj, frame, width)}"


def think(candidates: Sequence[Object], frame: int, width: int = WIDTH,
          doubted: Sequence[tuple[Object, str]] = ()) -> str:
    """The candidates by their left edges in `frame` (the first shown), and each attribute's number of values.

    One to a line, then "; differ color 2 size 2 motion 2 column 2"; after one candidate "; one left"; none: "no match".
    `doubted`: objects that do not fit, listed with all their attributes and then the one by which they do not: at first
    all that the query does not fit, after an answer those that it rules out: "520 blue circle small leftward middle
    motion". What an object is must be said before it can be read whether it fits; and with a plain "no", in the
    attribute's place or right behind the left edge, one attribute was learned after the other, in thousands of steps,
    where naming it takes two hundred. Whether another line follows is one token, a new line or a semicolon: were it
    the next number or a word, a likeliest word would win against places of which each is unlikely, and lists that are
    read greedily would be too short.
    """
    misses = {o.oid: f" {attribute}" for o, attribute in doubted}
    lines = sorted([*candidates, *(o for o, _ in doubted)], key=lambda o: o.centers[frame, 0] - o.radius)
    listed = "".join(f"\n{placed(o, frame, width)}{misses.get(o.oid, '')}" for o in lines)
    if not candidates:
        return f"{listed} ; no match" if doubted else "no match"
    if len(candidates) == 1:
        return f"{listed} ; one left"
    kinds = {a: len({o.value(a, frame, width) for o in candidates}) for a in ASKABLE}
    return f"{listed} ; differ " + " ".join(f"{a} {n}" for a, n in kinds.items() if n > 1)


def scene_graph(scene: Scene) -> dict:
    """Everything the oracle needs as JSON (DATA.md 6.2): objects by frame, query, candidates, optimum.

    `col` is null where the centre is in the dead zone of a column boundary; boxes are inclusive pixels of the
    complete object; `visible` is the share that nothing covers.
    """
    candidates = [attributes_of(scene.object(oid)) for oid in scene.candidates]
    return {
        "video": scene.id, "size": [scene.height, scene.width],
        "frames": [f"{t:05d}" for t in range(scene.n_frames)],
        "objects": [_object_graph(scene, row) for row in range(len(scene.objects))],
        "query": scene.query, "mentioned": dict(scene.mentioned), "candidates": list(scene.candidates),
        "target": scene.target, "level": scene.level, "mask_type": scene.mask_type,
        "initial_count": scene.initial_count, "max_count": scene.max_count,
        "max_count_yesno": int(optimal_yesno(candidates)), "optimal_expected": scene.optimal_expected,
        "best_first": list(scene.best_first), "occluder": list(scene.occluder) if scene.occluder else None,
    }


def _object_graph(scene: Scene, row: int) -> dict:
    obj = scene.objects[row]
    extent = np.argwhere(_patch(obj.shape, obj.radius)) - obj.radius
    (top, first), (bottom, last) = extent.min(0).tolist(), extent.max(0).tolist()
    xy, visible = obj.centers.tolist(), scene.visible[row].tolist()
    dead = DEAD_ZONE * scene.width
    entries = []
    for t, (x, y) in enumerate(xy):
        on_boundary = any(abs(x - scene.width * k / 3) < dead for k in (1, 2))
        entries.append({
            "f": t, "center": [x, y], "bbox": [int(x) + first, int(y) + top, int(x) + last, int(y) + bottom],
            "col": None if on_boundary else obj.value("column", t, scene.width),
            "visible": round(visible[t], 4)})
    travel = math.dist(xy[0], xy[-1])
    return {
        "oid": obj.oid, "shape": obj.shape, "color": obj.color, "size": obj.size, "radius": obj.radius,
        "z": obj.z,
        "motion": {"dir": obj.motion, "speed": round(travel / (scene.n_frames - 1), 3),
                   "kind": "static" if obj.motion == "still" else "linear"},
        "per_frame": entries}


def description(obj: Object, scene: Scene) -> dict:
    """Privileged text about one object, the content of `description_oid` files (schema of METHOD.md section
    6).
    """
    columns = {str(t): obj.value("column", t, scene.width) for t in range(scene.n_frames)}
    return {
        "oid": obj.oid, "category": obj.shape,
        "attributes": {"color": obj.color, "shape": obj.shape, "size": obj.size},
        "position_by_frame": columns, "motion": obj.motion,
        "description": _named(obj)}


def _named(obj: Object) -> str:
    moves = "stays still" if obj.motion == "still" else f"moves {obj.motion}"
    return f"the {obj.size} {obj.color} {obj.shape} that {moves}"


# Every word and punctuation mark that this module and the oracle can write: queries, questions, answers,
# thinking, guidance, conversations, frame numbers. The embedded tokenizer is made of it.
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys((
    *itertools.chain.from_iterable(VALUES.values()), *ASKABLE, *map(str, range(N_FRAMES)),
    *"segment find track please show me the object thing one that moves moving stays still in at frame "
     "visible part of whole including hidden outline full shape as if nothing covered it".split(),
    *"What How Which Where is big direction does target move ?".split(),
    *"yes no neither not visible please clarify".split(),
    *"; differ one left no match guess".split(),
    *"ask first then stop when remains do not again attribute look for a none from start .".split(),
    *"which objects are them what how where does it is [ SEG ] two three four five six seven".split(),
    ",",
)))

# ------------------------------------------------------------------------------------------------------------
# 7 Optimal questions and baselines
# ------------------------------------------------------------------------------------------------------------


def _cells(values: Sequence[Row], attribute: str) -> tuple[int, ...]:
    """The candidates' bit masks, one per distinct value."""
    cells: dict[str, int] = {}
    for i, row in enumerate(values):
        cells[row[attribute]] = cells.get(row[attribute], 0) | 1 << i
    return tuple(cells.values())


Bank = tuple[tuple[int, ...], ...]  # questions, each the candidate sets that its answers leave


@functools.lru_cache(maxsize=200_000)
def _costs(subset: int, bank: Bank) -> tuple[tuple[float, float], ...]:
    """(worst, average) number of questions still needed, for each question of the bank asked first."""
    costs = []
    for question in bank:
        parts = [subset & cell for cell in question if subset & cell]
        if len(parts) == 1:
            costs.append((math.inf, math.inf))
            continue
        rest = [_optimum(part, bank) if part & (part - 1) else (0.0, 0.0) for part in parts]
        average = sum(part.bit_count() * e for part, (_, e) in zip(parts, rest, strict=True))
        costs.append((1 + max(d for d, _ in rest), 1 + average / subset.bit_count()))
    return tuple(costs)


def _optimum(subset: int, bank: Bank) -> tuple[float, float]:
    costs = _costs(subset, bank)
    return min(d for d, _ in costs), min(e for _, e in costs)


def optimal_questions(values: Sequence[Row], attributes: Sequence[str] = ASKABLE
                      ) -> tuple[float, float, tuple[str, ...]]:
    """(D*, E*, best first attributes) when questions ask the value of an attribute (DATA.md 6.4).

    `values` holds one attribute -> value dict per candidate. D* is the fewest questions that suffice in the
    worst case, E* the fewest on average over a uniform target, and the best first attributes are those that
    E* may begin with. Twins give infinity; at most one candidate gives (0, 0, ()).
    """
    if len(values) <= 1:
        return 0.0, 0.0, ()
    everything = (1 << len(values)) - 1
    bank = tuple(_cells(values, attribute) for attribute in attributes)
    worst, expected = _optimum(everything, bank)
    first = [e for _, e in _costs(everything, bank)]
    best = tuple(a for a, e in zip(attributes, first, strict=True) if e < expected + 1e-9 < math.inf)
    return worst, expected, best


def optimal_yesno(values: Sequence[Row], attributes: Sequence[str] = ASKABLE) -> float:
    """D* when only "is it this value?" may be asked: at least ceil(log2 of the number of candidates)."""
    if len(values) <= 1:
        return 0.0
    everything = (1 << len(values)) - 1
    bank = tuple((cell, everything & ~cell) for a in attributes for cell in _cells(values, a))
    return _optimum(everything, bank)[0]


def baselines(graphs: Sequence[dict], seed: int = 0) -> dict[str, dict]:
    """Askers that see perfectly and stop when one candidate is left, on the ambiguous ones among scene graphs.

    guess (asks nothing), random (any attribute, also again), fixed_attribute (one question, the best choice
    for all scenes), fixed_order (the best of all orders), greedy (most even split now) and optimal. Each
    gives questions, resolved_rate, success (1 / candidates left), regret (METHOD.md 11.7: unresolved is
    charged the budget), gain (mean over questions, METHOD.md 3.3), redundant_question_rate and the share of
    each asked attribute; all are exact means over a uniform target, except that the random asker draws its
    questions (from `seed`).
    """
    tables = [_Table.of(graph) for graph in graphs if graph["initial_count"] > 1]
    if not tables:
        raise ValueError("baselines: no scene is ambiguous; give some of level simple, medium or difficult")
    rng = np.random.default_rng(seed)

    def least_regret(askers: Iterable[_Asker]) -> dict:
        return min((_play(tables, asker) for asker in askers), key=lambda row: row["regret"])

    return {
        "guess": _play(tables, lambda table, left, asked: None),
        "random": _play(tables, lambda table, left, asked: _pick(rng, ASKABLE)),
        "fixed_attribute": least_regret(_in_order((attribute,)) for attribute in ASKABLE),
        "fixed_order": least_regret(map(_in_order, itertools.permutations(ASKABLE))),
        "greedy": _play(tables, _ask_greedily),
        "optimal": _play(tables, _ask_optimally),
    }


@dataclass(frozen=True)
class _Table:
    """The candidates of one scene as bit masks: what each attribute's answer leaves, per target."""

    values: list[Row]
    left_by: dict[str, list[int]]
    expected: float

    @staticmethod
    def of(graph: dict) -> _Table:
        known = {obj["oid"]: obj for obj in graph["objects"]}
        values = [
            {a: known[oid][a] for a in ("color", "shape", "size")}
            | {"motion": known[oid]["motion"]["dir"], "column": known[oid]["per_frame"][QUERY_FRAME]["col"]}
            for oid in graph["candidates"]
        ]
        left_by = {a: [next(cell for cell in _cells(values, a) if cell >> i & 1) for i in range(len(values))]
                   for a in ASKABLE}
        return _Table(values, left_by, graph["optimal_expected"])


_Asker = Callable[[_Table, int, int], "str | None"]  # (table, candidates left, questions asked) -> attribute


def _in_order(order: Sequence[str]) -> _Asker:
    return lambda table, left, asked: order[asked] if asked < len(order) else None


def _ask_greedily(table: _Table, left: int, asked: int) -> str:
    members = [i for i in range(len(table.values)) if left >> i & 1]
    return min(ASKABLE, key=lambda a: sum((table.left_by[a][i] & left).bit_count() for i in members))


def _ask_optimally(table: _Table, left: int, asked: int) -> str:
    return optimal_questions([row for i, row in enumerate(table.values) if left >> i & 1])[2][0]


def _play(tables: Sequence[_Table], choose: _Asker) -> dict:
    questions = resolved = success = regret = gain = redundant = 0.0
    asked = dict.fromkeys(ASKABLE, 0.0)
    for table in tables:
        n = len(table.values)
        for target in range(n):
            left, count = (1 << n) - 1, 0
            while left.bit_count() > 1 and count < BUDGET:
                attribute = choose(table, left, count)
                if attribute is None:
                    break
                after = left & table.left_by[attribute][target]
                reduced = (left.bit_count() - after.bit_count()) / (left.bit_count() - 1)
                gain += reduced / n
                redundant += (reduced == 0) / n
                asked[attribute] += 1 / n
                left, count = after, count + 1
            done = left.bit_count() == 1
            questions += count / n
            resolved += done / n
            success += 1 / left.bit_count() / n
            regret += ((count if done else BUDGET) - table.expected) / n
    scenes, total = len(tables), questions or 1.0
    return {"questions": questions / scenes, "resolved_rate": resolved / scenes, "success": success / scenes,
            "regret": regret / scenes, "gain": gain / total, "redundant_question_rate": redundant / total,
            "asked": {attribute: share / total for attribute, share in asked.items()}}


# ------------------------------------------------------------------------------------------------------------
# 8 Demonstrations and conversations
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn of a demonstration. `oid` is the object that a key frame or an answer is about (None: no
    match).
    """

    kind: str  # "call" | "keyframe" | "answer"
    thinking: str
    count_before: int
    count_after: int
    question: str | None = None
    reply: str | None = None  # what the simulated user said
    frame: int | None = None  # fid; -1: no match
    oid: int | None = None


@dataclass(frozen=True)
class Demonstration:
    """A whole dialogue: questions, then one key frame and one answer (frame -1 and no oid when nothing
    matches).
    """

    query: str
    guidance: str | None
    turns: list[Turn]


# How a noisy asker (skill 0) decides: it stays correct in what it sees and wrong-headed in what it does.
GUESSES = 0.35  # commits although several are left
NEEDLESS = 0.25  # asks although one is left
MAX_NEEDLESS = 3
HABITS = {"any": 0.55, "color": 0.25, "differing": 0.20}  # which attribute it asks
BEST_FRAME = 0.6  # takes the shown frame with the largest visible area, else any good one
GUIDED_SKILL = 0.95


def demonstrate(scene: Scene, shown: Sequence[int], rng: np.random.Generator, *, skill: float,
                guided: bool = False, curious: bool = False) -> Demonstration:
    """A dialogue about the scene by an asker who sees perfectly and decides well with probability `skill`.

    Skill 1 always asks a best attribute and stops when one candidate is left; skill 0 guesses, repeats and
    asks needlessly (the constants above). With `guided`, the expert's guidance on a skill-0 dialogue about
    the same scene is given and followed. Columns refer to the first shown frame. A curious one asks about any
    attribute that differs in place of a best one, all of them alike often.
    """
    from icseg_jax import simulator  # here, since the simulator reads this module's constants

    graph, user = scene_graph(scene), simulator.OracleUser()
    if not guided:
        return Demonstration(scene.query, None, _dialogue(scene, graph, user, shown, rng, skill, (), curious))
    rehearsal = _dialogue(scene, graph, user, shown, rng, 0.0, ())
    asked = [(turn.question, turn.reply) for turn in rehearsal if turn.kind == "call"]
    diagnosis = simulator.OracleExpert().diagnose(graph, shown, asked)
    turns = _dialogue(scene, graph, user, shown, rng, GUIDED_SKILL, diagnosis.plan)
    return Demonstration(scene.query, diagnosis.guidance, turns)


def _dialogue(scene: Scene, graph: dict, user, shown: Sequence[int], rng: np.random.Generator, skill: float,
              plan: Sequence[str], curious: bool = False) -> list[Turn]:
    from icseg_jax import simulator

    turns: list[Turn] = []
    left, needless = list(scene.candidates), 0
    doubted = _doubted(scene)

    def thought() -> str:
        return think([scene.object(oid) for oid in left], shown[0], scene.width, doubted)

    while len(turns) < BUDGET and left:
        attribute = _decide(scene, left, shown[0], rng, skill, plan, needless, curious)
        if attribute is None:
            break
        needless += len(left) == 1
        question = QUESTIONS[attribute].format(fid=shown[0])
        reply = user.answer(graph, shown, question)
        after = simulator.consistent(graph, shown, left, question, reply)
        turns.append(Turn("call", thought(), len(left), len(after), question=question, reply=reply))
        doubted = [(scene.object(oid), attribute) for oid in left if oid not in after]
        left = after
    thinking = thought()
    if not left:
        return [Turn("keyframe", thinking, 0, 0, frame=-1), Turn("answer", thinking, 0, 0)]
    chosen = scene.object(int(rng.choice(left)))
    if len(left) > 1:
        thinking += " ; guess\n" + placed(chosen, shown[0], scene.width)
    return [*turns,
            Turn("keyframe", thinking, len(left), len(left), frame=key_frame(scene, chosen, shown, rng),
                 oid=chosen.oid),
            Turn("answer", "\n" + placed(chosen, shown[0], scene.width), len(left), len(left), oid=chosen.oid)]


def _doubted(scene: Scene) -> list[tuple[Object, str]]:
    """The objects that the query does not fit and the first attribute that it misses each by.

    All of them: were only some listed, the place of the next line would depend on what fits, which can be read only
    once the line is there.
    """
    found = []
    for obj in scene.objects:
        is_ = attributes_of(obj, QUERY_FRAME, scene.width)
        off = next((a for a in ASKABLE if is_[a] != scene.mentioned.get(a, is_[a])), None)
        if off:
            found.append((obj, off))
    return found


def _decide(scene: Scene, left: Sequence[int], frame: int, rng: np.random.Generator, skill: float,
            plan: Sequence[str], needless: int, curious: bool) -> str | None:
    """The attribute to ask, or None to commit."""
    rows = [attributes_of(scene.object(oid), frame, scene.width) for oid in left]
    differ = [a for a in ASKABLE if len({row[a] for row in rows}) > 1]
    if rng.random() < skill:
        best = differ if curious else optimal_questions(rows)[2]
        return next((a for a in plan if a in best), None) or (_pick(rng, best) if best else None)
    if len(left) == 1:
        return _pick(rng, ASKABLE) if needless < MAX_NEEDLESS and rng.random() < NEEDLESS else None
    if rng.random() < GUESSES:
        return None
    habit = rng.random()
    if habit < HABITS["any"]:
        return _pick(rng, ASKABLE)
    if habit < HABITS["any"] + HABITS["color"]:
        return "color"
    return _pick(rng, differ) if differ else None  # two may differ at frame 0 alone


def key_frame(scene: Scene, obj: Object, shown: Sequence[int], rng: np.random.Generator) -> int:
    """The shown frame that a demonstration takes: mostly the first in which most of the object is visible."""
    seen = scene.visible[obj.oid - 1, list(shown)]
    good = np.flatnonzero(seen >= 0.3)
    if rng.random() < BEST_FRAME or not len(good):
        return int(shown[int(seen.argmax())])
    return int(shown[int(rng.choice(good))])


_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_FACTS = {"color": "what color is it?", "shape": "what shape is it?", "size": "how big is it?",
          "motion": "where does it move?"}


def conversation(scene: Scene, rng: np.random.Generator, *, frame: int = QUERY_FRAME, still: bool = False
                 ) -> tuple[list[tuple[str, str]], int]:
    """A PRIST-like dialogue about the scene (DATA.md 1.2, 6.5): (human, gpt) rounds, and the oid they reach.

    Two to four rounds of facts narrow the objects to one (more only if nothing less does), then the human
    asks to segment it and the answer holds [SEG]. frame: of which columns are told. still: that frame is all there is
    to see, so nothing is said of motion; where motion alone tells every object from another, several are left.
    """
    told = [a for a in ASKABLE if not (still and a == "motion")]
    rows = {obj.oid: attributes_of(obj, frame, scene.width) for obj in scene.objects}
    alike = Counter(tuple(row[a] for a in told) for row in rows.values())
    apart = [oid for oid, row in rows.items() if alike[tuple(row[a] for a in told)] == 1]
    oid = int(rng.choice(apart or list(rows)))
    paths = []
    for _ in range(8):
        left, path = list(rows), []
        for i in rng.permutation(len(told)):
            after = [o for o in left if rows[o][told[i]] == rows[oid][told[i]]]
            if len(after) < len(left):
                path.append((told[i], len(after)))
            left = after
        paths.append(path)
    path = min(paths, key=len)
    rounds = []
    for attribute, count in path:
        value, who = rows[oid][attribute], "which of them are" if rounds else "which objects are"
        kind = {"shape": f"of {value} shape", "motion": value if value == "still" else f"moving {value}",
                "column": f"in the {value} at frame {frame}"}.get(attribute, value)
        rounds.append((f"{who} {kind}?", _COUNTS[count]))
    facts = [a for a in _FACTS if a in told and a not in dict(path)]
    n_rounds = int(rng.integers(2, 5))
    for i in rng.permutation(len(facts))[:max(n_rounds - len(rounds), 0)]:
        rounds.append((_FACTS[facts[i]], rows[oid][facts[i]]))
    return [*rounds, ("segment it", "it is [SEG]")], oid


# ------------------------------------------------------------------------------------------------------------
# 9 On disk
# ------------------------------------------------------------------------------------------------------------


def write_dataset(out: str | os.PathLike, *, train: int, test: int, seed: int = 0, progress: bool = True,
                  layout: str = "ambi_rvos") -> Path:
    """Writes scenes in Ambi-RVOS's layout (DATA.md 3.1, 3.2, 6.5), AmodalAnnotations and scene_graph added.

    Annotations, Visualization and descriptions are there for every candidate; a query without a target has
    oid -1 and all-zero masks. Another `layout` (LAYOUTS) writes the same scenes as that dataset would have them.
    The folder appears whole or not at all. Raises ValueError when `out` holds something already, when a count is
    negative, or for an unknown layout.
    """
    out = Path(out)
    if layout not in LAYOUTS:
        raise ValueError(f"generate: unknown layout {layout!r}; use one of {', '.join(LAYOUTS)}")
    if train < 0 or test < 0 or train + test == 0:
        raise ValueError(f"generate: train={train} test={test} makes no videos; give counts of 0 or more")
    from icseg_jax import data  # here, so that scenes can be made without the readers

    with data.whole_folder(out, "generate") as building:
        for split, count in (("train", train), ("test", test)):
            LAYOUTS[layout](building, split, count, seed, progress)
    return out


def _write_split(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from icseg_jax import data

    job = {"root": str(root), "split": split, "count": count, "seed": seed}
    rows = [row for row, _ in _watched(data.share_out("videos", job, count), split, progress, count)]
    schema = pa.schema([("id", pa.string()), ("question", pa.string()), ("images", pa.list_(pa.string())),
                        ("ability", pa.string()), ("video", pa.string()), ("oid", pa.int64()),
                        ("object", pa.string()), ("initial_count", pa.int64()), ("max_count", pa.int64()),
                        *([("aid", pa.int64())] if split == "train" else [])])
    pq.write_table(pa.Table.from_pylist(rows, schema), root / f"{split}.parquet")


def write_videos(root: str, split: str, count: int, seed: int, first: int, step: int) -> Iterator[dict]:
    """Writes the videos first, first + step, ... of a split in Ambi-RVOS's layout, and gives their rows of its table.

    Videos lie in the table in a random order, so that its first rows are of all levels."""
    folder = Path(root) / f"RVOS_{split.capitalize()}"
    order = np.random.default_rng([seed, SPLITS.index(split)]).permutation(count)
    for aid in range(first, count, step):
        scene = make_scene(int(order[aid]), seed=seed, split=split)
        _write_video(folder, scene)
        row = {"id": scene.id, "question": scene.query, "images": [f"{t:05d}" for t in range(scene.n_frames)],
               "ability": scene.level, "video": scene.id, "oid": scene.target or NO_TARGET,
               "object": _named(scene.object(scene.target)) if scene.target else "",
               "initial_count": scene.initial_count, "max_count": scene.max_count}
        if split == "train":
            row["aid"] = aid
            found = [description(scene.object(oid), scene) for oid in scene.candidates]
            _write_json(folder / "description_id" / f"{aid}.json",
                        {"query": scene.query, "candidates": found, "target_oid": scene.target})
        yield row


def _watched(items: Iterable, split: str, progress: bool, total: int | None = None) -> Iterable:
    from tqdm import tqdm

    quiet = None if progress else True  # None: quiet where nobody watches
    return tqdm(items, desc=f"{split} videos", total=total, disable=quiet)


def _write_video(folder: Path, scene: Scene) -> None:
    frames = range(scene.n_frames)
    pictures = render(scene, frames)
    visible = np.stack([visible_masks(scene, t) for t in frames])  # [T, n, H, W]
    complete = np.stack([complete_masks(scene, t) for t in frames])
    nothing = np.zeros(visible.shape[:1] + visible.shape[2:], bool)
    _write_pictures(folder / "JPEGImages" / scene.id, pictures)
    for oid in scene.candidates or (NO_TARGET,):
        found = oid != NO_TARGET
        seen, whole = (visible[:, oid - 1], complete[:, oid - 1]) if found else (nothing, nothing)
        _write_masks(folder / "Annotations" / scene.id / str(oid), seen)
        _write_masks(folder / "AmodalAnnotations" / scene.id / str(oid), whole)
        _write_pictures(folder / "Visualization" / scene.id / str(oid), _with_contour(pictures, seen))
        about = description(scene.object(oid), scene) if found else {"oid": oid, "description": "no match"}
        _write_json(folder / "description_oid" / scene.id / f"{oid}.json", about)
    _write_json(folder / "scene_graph" / f"{scene.id}.json", scene_graph(scene))


def _with_contour(pictures: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The pictures with a red line of two pixels around the masks, outside of them."""
    height, width = masks.shape[1:]
    padded = np.pad(masks, ((0, 0), (2, 2), (2, 2)))
    near = np.zeros_like(masks)
    for dy, dx in itertools.product(range(5), repeat=2):
        if (dy - 2) ** 2 + (dx - 2) ** 2 <= 5:
            near |= padded[:, dy:dy + height, dx:dx + width]
    marked = pictures.copy()
    marked[near & ~masks] = RED
    return marked


def _write_pictures(folder: Path, pictures: np.ndarray, every: int = 1) -> None:
    folder.mkdir(parents=True)
    for t, picture in enumerate(pictures):
        _write_picture(folder / f"{every * t:05d}.jpg", picture)


def _write_picture(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95, subsampling=0)


def _write_masks(folder: Path, masks: np.ndarray) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for t, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{t:05d}.png", compress_level=1)


def _write_json(path: Path, content: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# 10 The layouts of other datasets (DATA.md 1 to 4 and 6.5), so that their readers meet files of the real shape
# ------------------------------------------------------------------------------------------------------------
#
# DATA.md 6.5 would have them all in one folder over shared frames. Here each stands alone with frames of its own,
# as the originals do: a reader may not leave its folder. RefCOCO's tables are pickles, which nothing here writes.


def _scenes(split: str, count: int, seed: int, progress: bool, level: str | None = None) -> Iterable[Scene]:
    for index in _watched(range(count), split, progress):
        yield make_scene(index, seed=seed, split=split, level=level)


def _expressions(scene: Scene) -> list[tuple[str, tuple[int, ...]]]:
    """What can be said about a scene: its query, and each object by name; with the oids that it fits."""
    names: dict[str, list[int]] = {}
    for obj in scene.objects:
        names.setdefault(_named(obj), []).append(obj.oid)
    return [(scene.query, scene.candidates), *((text, tuple(oids)) for text, oids in names.items())]


def _single(scene: Scene) -> list[tuple[str, int]]:
    """The expressions that fit one object."""
    return [(text, oids[0]) for text, oids in _expressions(scene) if len(oids) == 1]


def _visible(scene: Scene) -> np.ndarray:
    """[T, n, H, W]"""
    return np.stack([visible_masks(scene, t) for t in range(scene.n_frames)])


def _rle(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode("ascii")}


def _frame_names(scene: Scene, every: int = 1) -> list[str]:
    return [f"{every * t:05d}" for t in range(scene.n_frames)]


def _write_ok_vos(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """Clear queries only; the ability is named after how much the query says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, folder = [], root / split
    for scene in _scenes(split, count, seed, progress, level="clear"):
        _write_pictures(folder / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)))
        _write_masks(folder / "Annotations" / scene.id / str(scene.target), _visible(scene)[:, scene.target - 1])
        ability = ("one-hop", "multi-hop", "relational")[min(len(scene.mentioned), 3) - 1]
        rows.append({"id": scene.id, "question": scene.query, "images": _frame_names(scene), "ability": ability,
                     "video": scene.id, "oid": scene.target})
    if rows:
        pq.write_table(pa.Table.from_pylist(rows), root / f"{split}.parquet")


def _tracks(scene: Scene, first: int) -> dict[str, list]:
    """A mask_dict's tracks of all objects, numbered from `first`; null where nothing is to be seen."""
    masks = _visible(scene)
    return {str(first + i): [_rle(mask) if mask.any() else None for mask in masks[:, i]]
            for i in range(len(scene.objects))}


def _write_mevis(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    folder = root / {"train": "train", "test": "valid_u"}[split]
    videos, mask_dict = {}, {}
    for scene in _scenes(split, count, seed, progress):
        first = len(mask_dict)
        mask_dict |= _tracks(scene, first)
        _write_pictures(folder / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)))
        said = [{"exp": text, "obj_id": [oid - 1 for oid in oids], "anno_id": [first + oid - 1 for oid in oids]}
                for text, oids in _expressions(scene) if oids]
        videos[scene.id] = {"frames": _frame_names(scene), "expressions": {str(i): e for i, e in enumerate(said)}}
    if videos:
        _write_json(folder / "meta_expressions.json", {"videos": videos})
        _write_json(folder / "mask_dict.json", mask_dict)


def _write_revos(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """Both splits share the mask tables; type_id 0: named, 1: the ambiguous query, 2: no match."""
    tables = {name: root / f"{name}.json" for name in ("mask_dict", "mask_dict_foreground")}
    mask_dict, foreground = (json.loads(p.read_text()) if p.is_file() else {} for p in tables.values())
    videos = {}
    for scene in _scenes(split, count, seed, progress):
        first, video = len(mask_dict), f"syn/{scene.id}"
        mask_dict |= _tracks(scene, first)
        foreground[video] = {"masks_rle": [_rle(masks.any(0)) for masks in _visible(scene)]}
        _write_pictures(root / "JPEGImages" / video, render(scene, range(scene.n_frames)))
        said = [{"exp": text, "type_id": (1 if i == 0 else 0) if oids else 2,
                 "obj_id": [oid - 1 for oid in oids], "anno_id": [first + oid - 1 for oid in oids]}
                for i, (text, oids) in enumerate(_expressions(scene))]
        videos[video] = {"frames": _frame_names(scene), "expressions": {str(i): e for i, e in enumerate(said)}}
    if videos:
        _write_json(root / f"meta_expressions_{'train' if split == 'train' else 'valid'}_.json", {"videos": videos})
        _write_json(tables["mask_dict"], mask_dict)
        _write_json(tables["mask_dict_foreground"], foreground)


def _write_palettes(folder: Path, scene: Scene, every: int = 1) -> None:
    """Object indices as colours of a palette, 0 where none is."""
    from PIL import Image

    folder.mkdir(parents=True)
    for t in range(scene.n_frames):
        image = Image.fromarray(_index_map(scene.objects, scene.occluder, t))
        image.putpalette([0, 0, 0, *itertools.chain.from_iterable(COLORS.values()), *RED])
        image.save(folder / f"{every * t:05d}.png")


def _write_ref_youtube_vos(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """Every fifth frame; the labels of valid are hidden, as they are in truth."""
    name = {"train": "train", "test": "valid"}[split]
    videos, objects = {}, {}
    for scene in _scenes(split, count, seed, progress):
        _write_pictures(root / name / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)), every=5)
        if split == "train":
            _write_palettes(root / name / "Annotations" / scene.id, scene, every=5)
        said = [{"exp": text} | ({"obj_id": str(oid)} if split == "train" else {}) for text, oid in _single(scene)]
        frames = _frame_names(scene, every=5)
        videos[scene.id] = {"frames": frames, "expressions": {str(i): e for i, e in enumerate(said)}}
        objects[scene.id] = {"objects": {str(o.oid): {"category": o.shape, "frames": frames} for o in scene.objects}}
    if videos:
        _write_json(root / "meta_expressions" / name / "meta_expressions.json", {"videos": videos})
        if split == "train":
            _write_json(root / name / "meta.json", {"videos": objects})


def _write_ref_davis17(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """As ReferFormer's converter leaves it, with the mask_dict of protocol B; four expressions per object."""
    name = {"train": "train", "test": "valid"}[split]
    videos, tracks = {}, {}
    for scene in _scenes(split, count, seed, progress):
        _write_pictures(root / name / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)))
        _write_palettes(root / name / "Annotations" / scene.id, scene)
        said = [{"obj_id": str(o.oid), "exp": f"{_named(o)}, {way}"} for o in scene.objects
                for way in ("at first", "in the video", "first of all", "all along")]
        videos[scene.id] = {"expressions": {str(i): e for i, e in enumerate(said)}, "frames": _frame_names(scene)}
        of_object = list(_tracks(scene, 0).values())
        tracks |= {(scene.id, str(i)): of_object[i // 4] for i in range(len(said))}
    if videos:
        _write_json(root / "meta_expressions" / name / "meta_expressions.json", {"videos": videos})
        numbered = {str(i): tracks[pair] for i, pair in enumerate(sorted(tracks))}  # DATA.md 4.2
        _write_json(root / name / "mask_dict.json", numbered)


def _write_long_rvos(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    folder, videos = root / split, {}
    for scene in _scenes(split, count, seed, progress):
        _write_pictures(folder / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)))
        masks = _visible(scene)
        for obj in scene.objects:
            _write_masks(folder / "Annotations" / scene.id / str(obj.oid), masks[:, obj.oid - 1])
        said = [{"exp": text, "obj_id": oid, "type": "hybrid" if text != scene.query else
                 "dynamic" if "motion" in scene.mentioned else "static"} for text, oid in _single(scene)]
        videos[scene.id] = {"frames": _frame_names(scene), "expressions": {str(i): e for i, e in enumerate(said)}}
    if videos:
        _write_json(folder / "meta_expressions.json", {"videos": videos})


def _write_reason_vos(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """Its only split is valid: the scenes of test."""
    if split == "train":
        if count:
            raise ValueError(f"generate: reason_vos has no training split; use train=0, not train={count}")
        return
    videos = {}
    for scene in _scenes(split, count, seed, progress):
        _write_pictures(root / "JPEGImages" / scene.id, render(scene, range(scene.n_frames)))
        masks = _visible(scene)
        said = [{"exp_text": f"which of them would you call {text}?", "obj_id": oid}
                for text, oid in {oid: (text, oid) for text, oid in _single(scene)}.values()]
        for expression in said:
            _write_masks(root / "Annotations" / f"mose_{scene.id}_{expression['obj_id']}",
                         masks[:, expression["obj_id"] - 1])
        videos[scene.id] = {"source": "MOSE", "frames": _frame_names(scene), "is_sent": True,
                            "expressions": {str(i): e for i, e in enumerate(said)}}
    _write_json(root / "meta_expressions.json", {"videos": videos})


def _polygon(obj: Object, frame: int) -> list[list[float]]:
    """The exact vertices of a shape, [[x, y], ...]; a circle has 32 (DATA.md 6.5)."""
    r, (x, y) = obj.radius, obj.centers[frame].tolist()
    if obj.shape == "circle":
        corners = [(r * math.cos(k * math.pi / 16), r * math.sin(k * math.pi / 16)) for k in range(32)]
    elif obj.shape == "square":
        corners = [(0.87 * r * a, 0.87 * r * b) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    elif obj.shape == "triangle":
        corners = [(0, -r), (r, 0.85 * r), (-r, 0.85 * r)]
    else:
        arm = 0.34 * r
        quarter = [(arm, -r), (arm, -arm), (r, -arm)]
        corners = [p for _ in range(4) for p in quarter]
        for k in range(3, 12):  # each quarter is the one before, turned by 90 degrees
            corners[k] = (-corners[k - 3][1], corners[k - 3][0])
    return [[x + a, y + b] for a, b in corners]


def _write_reason_seg(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """The first frame; the target are all candidates, one other object is to be ignored. A query that speaks of motion,
    which a still does not show, gives way to an object's looks."""
    for scene in _scenes(split, count, seed, progress):
        text, oids = scene.query, scene.candidates
        if not oids or "motion" in scene.mentioned:
            looks = operator.attrgetter("size", "color", "shape")
            text = f"the {' '.join(looks(scene.objects[0]))}"
            oids = tuple(o.oid for o in scene.objects if looks(o) == looks(scene.objects[0]))
        shapes = [{"label": "target", "points": _polygon(scene.object(oid), QUERY_FRAME)} for oid in oids]
        others = [o for o in scene.objects if o.oid not in oids]
        shapes += [{"label": "ignore", "points": _polygon(o, QUERY_FRAME)} for o in others[:1]]
        shapes.append({"label": "flag", "points": [[0, 0], [WIDTH, 0], [WIDTH, HEIGHT]]})
        _write_picture(root / split / f"{scene.id}.jpg", render(scene, [QUERY_FRAME])[0])
        _write_json(root / split / f"{scene.id}.json", {"text": [text], "is_sentence": False, "shapes": shapes})


def _full_name(obj: Object) -> str:
    """Every attribute: no two objects of a scene share it."""
    return f"{_named(obj).removeprefix('the ')} in the {obj.value('column')}"


def _write_prist(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    entries = []
    for scene in _scenes(split, count, seed, progress):
        rng = np.random.default_rng([seed, SPLITS.index(split), scene.index, 1])
        for _ in range(50):  # polygons know nothing of what covers them: take an object that nothing does
            rounds, oid = conversation(scene, rng, still=True)
            if scene.visible[oid - 1, QUERY_FRAME] == 1:
                break
        stem = hashlib.sha256(scene.id.encode()).hexdigest()[:16]
        _write_picture(root / "images" / f"{stem}.jpg", render(scene, [QUERY_FRAME])[0])
        shapes = [{"label": _full_name(o), "points": _polygon(o, QUERY_FRAME)} for o in scene.objects]
        _write_json(root / "masks" / f"{stem}.json",
                    {"imageHeight": scene.height, "imageWidth": scene.width, "shapes": shapes})
        turns = [{"from": who, "value": text} for pair in rounds
                 for who, text in zip(("human", "gpt"), pair, strict=True)]
        entries.append({"img_id": f"{stem}.jpg", "dialogue": turns, "focus": _full_name(scene.object(oid))})
    if entries:
        _write_json(root / f"{split}.json", entries)


def _write_llava(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    """The conversations without the round that asks for a mask."""
    entries = []
    for scene in _scenes(split, count, seed, progress):
        rng = np.random.default_rng([seed, SPLITS.index(split), scene.index, 2])
        rounds, _ = conversation(scene, rng, still=True)
        turns = [{"from": who, "value": text} for pair in rounds[:-1]
                 for who, text in zip(("human", "gpt"), pair, strict=True)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        _write_picture(root / "images" / f"{scene.id}.jpg", render(scene, [QUERY_FRAME])[0])
        entries.append({"id": scene.id, "image": f"{scene.id}.jpg", "conversations": turns})
    if entries:
        _write_json(root / f"{split}.json", entries)


def _amodal_table(root: Path, images: str, split: str, count: int, seed: int, progress: bool, keys: tuple[str, str]
                  ) -> tuple[dict, list[dict]]:
    """Of every scene the frame with most hidden; COCO's table of it, and R2SM's records (DATA.md 2.2, 2.3, 6.5)."""
    from icseg_jax.readers import AMODAL_QUERIES  # here, so that scenes can be made without the readers

    table: dict[str, list] = {"images": [], "annotations": [],
                              "categories": [{"id": i + 1, "name": shape} for i, shape in enumerate(SHAPES)]}
    queries: list[dict] = []
    for scene in _scenes(split, count, seed, progress):
        frame = int(scene.visible.sum(0).argmin())
        name, image_id = f"{scene.id}.jpg", len(table["images"]) + 1
        _write_picture(root / images / name, render(scene, [frame])[0])
        table["images"].append({"id": image_id, "file_name": name, "height": scene.height, "width": scene.width})
        seen, whole = visible_masks(scene, frame), complete_masks(scene, frame)
        names = [" ".join(obj.value(a) for a in ("size", "color", "shape")) for obj in scene.objects]
        for i, obj in enumerate(scene.objects):
            rows, columns = np.flatnonzero(whole[i].any(1)), np.flatnonzero(whole[i].any(0))
            area, hidden = int(whole[i].sum()), int((whole[i] & ~seen[i]).sum())
            rate = hidden / area
            annotation = {
                "id": len(table["annotations"]) + 1, "image_id": image_id, "category_id": SHAPES.index(obj.shape) + 1,
                "iscrowd": 0, "area": area, "occlude_rate": rate, keys[0]: _rle(whole[i]), keys[1]: _rle(seen[i]),
                "bbox": [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]}
            if hidden:  # absent where nothing covers it
                annotation["invisible_mask"] = _rle(whole[i] & ~seen[i])
            table["annotations"].append(annotation)
            if names.count(names[i]) > 1 or (hidden and not COVERED[0] <= rate <= COVERED[1]):
                continue
            for kind, text in AMODAL_QUERIES.items():
                queries.append({
                    "id": f"{annotation['id']}-{kind}", "image_path": f"{images}/{name}",
                    "query": text.format(names[i]), "mask_type": kind, "ann_id": annotation["id"],
                    "category": obj.shape,
                    "segmentation_rle": annotation[keys[kind == "modal"]], "visible_rle": annotation[keys[1]],
                    "amodal_rle": annotation[keys[0]], "occlude_rate": rate, "source": "synthetic"})
    return table, queries


_AMODAL_KEYS = ("segmentation", "visible_mask")


def _write_r2sm(root: Path, split: str, count: int, seed: int, progress: bool) -> None:
    table, queries = _amodal_table(root, "images", split, count, seed, progress, _AMODAL_KEYS)
    if count:
        _write_json(root / f"{split}.json", table)
        _write_json(root / f"{split}_queries.json", queries)


def _write_coco_amodal(names: dict[str, tuple[str, str]], keys: tuple[str, str], root: Path, split: str, count: int,
                       seed: int, progress: bool) -> None:
    """`names`: the table's name and the images' folder, per split."""
    name, images = names[split]
    table, _ = _amodal_table(root, images, split, count, seed, progress, keys)
    if count:
        _write_json(root / "annotations" / name, table)


LAYOUTS: dict[str, Callable[..., None]] = {
    "ambi_rvos": _write_split, "ok_vos": _write_ok_vos, "mevis": _write_mevis, "revos": _write_revos,
    "ref_youtube_vos": _write_ref_youtube_vos, "ref_davis17": _write_ref_davis17, "long_rvos": _write_long_rvos,
    "reason_seg": _write_reason_seg, "reason_vos": _write_reason_vos, "prist": _write_prist,
    "llava": _write_llava, "r2sm": _write_r2sm,
    "cocoa_cls": functools.partial(_write_coco_amodal, {
        "train": ("COCO_amodal_train2014_with_classes.json", "train2014"),
        "test": ("COCO_amodal_val2014_with_classes.json", "val2014")}, _AMODAL_KEYS),
    "d2sa": functools.partial(_write_coco_amodal, {
        "train": ("D2S_amodal_training_rot0.json", "images"),
        "test": ("D2S_amodal_validation.json", "images")}, _AMODAL_KEYS),
    "muva": functools.partial(_write_coco_amodal, {
        "train": ("train.json", "images"), "test": ("test.json", "images")}, ("amodal_mask", "modal_mask")),
}
