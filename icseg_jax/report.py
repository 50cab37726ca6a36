"""What a person sees of a run: charts, tables and dialogues as one self-contained HTML page and PNG files.

`python -m icseg_jax.report RUN_DIR` reads a run directory (DESIGN.md 9) and writes `RUN_DIR/figures/` and
`RUN_DIR/report.html`, which asks the network for nothing and needs no JavaScript. What a run has not made yet
is left out; lines that cannot be read are skipped and counted on the page. Nothing here knows the algorithm.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from icseg_jax import metrics

GALLERY = 12  # dialogues on the page
PREDICTION, TRUTH = "#12e0ff", "#ffffff"  # drawn on frames; red is taken by the simulator's contours

# name in the summary, words on the page, +1: more is better, -1: less is better, 0: neither
METRICS = (
    ("success", "Success", 1),
    ("success_ambiguous", "ambiguous queries", 1),
    ("success_by_level/simple", "simple", 1),
    ("success_by_level/medium", "medium", 1),
    ("success_by_level/difficult", "difficult", 1),
    ("success_clear", "clear queries", 1),
    ("success_none", "no-target queries", 1),
    ("jf", "J&F over the video", 1),
    ("questions_ambiguous", "Questions, ambiguous", 0),
    ("questions_clear", "Questions, clear", -1),
    ("resolved_rate", "Resolved rate", 1),
    ("redundant_question_rate", "Redundant questions", -1),
    ("regret", "Regret", -1),
    ("format_rate", "Format rate", 1),
    ("reward", "Reward", 1),
)
# What a line from outside can raise while it is read.
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
KINDS = ("call", "keyframe", "answer")  # of turns that follow the protocol
INDENT = {"success_ambiguous": 1, "success_clear": 1, "success_none": 1} | {
    f"success_by_level/{level}": 2 for level in metrics.AMBIGUOUS
}
HEADLINES = ("success_ambiguous", "resolved_rate", "redundant_question_rate", "questions_clear")


# --- reading a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    role: str  # assistant | user
    kind: str  # call | keyframe | answer | invalid
    text: str
    frame: int | None
    count_after: int | None  # candidates left after this turn


@dataclass(frozen=True)
class Dialogue:
    """One line of `dialogues/*.jsonl`. Boxes and points in thousandths of the frame, paths in the run."""

    id: str
    level: str
    query: str
    decoding: str
    turns: tuple[Turn, ...]
    frames: tuple[int, ...]
    images: dict[str, str]
    keyframe: int | None
    box: tuple[float, ...] | None
    point: tuple[float, ...] | None
    truth_box: tuple[float, ...] | None
    mask: str | None
    truth_mask: str | None
    counts: tuple[int, ...]
    success: bool
    reward: float | None
    optimal: float | None


@dataclass(frozen=True)
class Run:
    path: Path
    config: str
    steps: list[dict]
    summary: dict
    before: list[Dialogue]
    after: list[Dialogue]
    damaged: dict[str, int]  # file -> lines that could not be read


def load_run(run_dir: str | Path) -> Run:
    """Read what is there of a run directory. Raises FileNotFoundError where no run is at all."""
    path = Path(run_dir)
    names = (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "dialogues/before.jsonl",
        "dialogues/after.jsonl",
    )
    if not any((path / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{path} holds no run: give a directory with metrics.jsonl or summary.json in it"
        )
    config, summary, damaged = "", {}, {}
    if (path / names[0]).is_file():
        config = (path / names[0]).read_text("utf-8", "replace")
    if (path / names[2]).is_file():
        try:
            summary = _require((path / names[2]).read_text("utf-8", "replace"), dict)
        except (ValueError, RecursionError):
            damaged[names[2]] = 1
    rows = []
    for name, parse in ((names[1], _step), (names[3], _dialogue), (names[4], _dialogue)):
        parsed, bad = _read_lines(path / name, parse)
        rows.append(parsed)
        damaged |= {name: bad} if bad else {}
    return Run(path, config, rows[0], summary, rows[1], rows[2], damaged)


def _read_lines(path: Path, parse: Callable) -> tuple[list, int]:
    parsed, bad = [], 0
    if path.is_file():
        for line in path.read_text("utf-8", "replace").split("\n"):
            try:
                if line.strip():
                    parsed.append(parse(_require(line, dict)))
            except DAMAGE:
                bad += 1
    return parsed, bad


def _require(text: str, kind: type):
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _step(row: dict) -> dict:
    """A step's numbers under flat names, `seconds` apart."""
    seconds = row.pop("seconds", None)
    flat = dict(_flatten(row))
    flat["step"] = int(flat["step"])
    flat["seconds"] = dict(_flatten(seconds)) if isinstance(seconds, dict) else {}
    return flat


def _flatten(row: dict, prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/")
        elif (number := _number(value)) is not None:
            yield f"{prefix}{name}", number


def _dialogue(row: dict) -> Dialogue:
    def numbers(value, length: int) -> tuple[float, ...] | None:
        if value is None:
            return None
        if len(value) != length or any(_number(v) is None for v in value):
            raise ValueError(f"{value} instead of {length} numbers")
        return tuple(min(max(float(v), -9999.0), 9999.0) for v in value)

    def whole(value) -> int | None:
        return None if value is None else int(value)

    if not isinstance(row["success"], bool):
        raise ValueError(f"success: {row['success']!r} instead of true or false")
    turns = tuple(
        Turn(
            role=str(turn["role"]),
            kind=str(turn.get("kind")),
            text=str(turn["text"]),
            frame=whole(turn.get("frame")),
            count_after=whole(turn.get("count_after")),
        )
        for turn in row["turns"]
    )
    return Dialogue(
        id=str(row["id"]),
        level=str(row["level"]),
        query=str(row["query"]),
        decoding=str(row.get("decoding", "")),
        turns=turns,
        frames=tuple(int(frame) for frame in row["frames"]),
        images={str(fid): str(path) for fid, path in row["images"].items()},
        keyframe=whole(row.get("keyframe")),
        box=numbers(row.get("box"), 4),
        point=numbers(row.get("point"), 2),
        truth_box=numbers(row.get("truth_box"), 4),
        mask=None if row.get("mask") is None else str(row["mask"]),
        truth_mask=None if row.get("truth_mask") is None else str(row["truth_mask"]),
        counts=tuple(int(count) for count in row.get("counts") or ()),
        success=row["success"],
        reward=_number(row.get("reward")),
        optimal=_number(row.get("optimal")),
    )


def _number(value) -> float | None:
    """A finite number, or None: JSON from outside holds NaN, null and words too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _look_up(table: object, name: str) -> float | None:
    for part in name.split("/"):
        table = table.get(part) if isinstance(table, dict) else None
    return _number(table)


def _evaluation(summary: dict, side: str, decoding: str) -> dict:
    """`summary[side][decoding]`, empty where it is not there."""
    table = summary.get(side)
    table = table.get(decoding) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}


def _baselines(summary: dict) -> dict[str, dict]:
    tables = summary.get("baselines")
    return {n: t for n, t in tables.items() if isinstance(t, dict)} if isinstance(tables, dict) else {}


def _decodings(summary: dict) -> list[str]:
    """Those of which anything was measured."""
    return [d for d in ("greedy", "sampled") if any(_evaluation(summary, s, d) for s in ("before", "after"))]


def _pairs(run: Run) -> list[tuple[Dialogue | None, Dialogue | None]]:
    """One sample before and after each, in file order, the levels in turn: nobody picks what looks good."""
    # Greedy where there is any: what the policy does at its surest.
    greedy = any(d.decoding == "greedy" for d in run.before + run.after)
    before, after = (
        {d.id: d for d in reversed(dialogues) if d.decoding == "greedy" or not greedy}
        for dialogues in (run.before, run.after)
    )
    ids = dict.fromkeys(d.id for d in run.before + run.after if d.id in before or d.id in after)
    rank, seen = {}, Counter()
    for key in ids:
        alone = key not in before or key not in after  # pairs come first
        kind = (alone, (before.get(key) or after[key]).level)
        seen[kind] += 1
        rank[key] = (alone, seen[kind])
    return [(before.get(key), after.get(key)) for key in sorted(ids, key=rank.get)[:GALLERY]]


# --- charts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    card: str
    ink: str
    muted: str
    line: str
    before: str
    after: str
    phases: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1d2125", "#6a7076", "#e3e1dc", "#c07a2c", "#0a7c86",
    ("#0a7c86", "#c07a2c", "#6b5ca5", "#5b8c3e", "#b2506b", "#4a7fc1", "#8a8378", "#b9b3a8"),
)  # fmt: skip
DARK = Theme(
    "#181b20", "#e9e7e3", "#9aa0a8", "#30353c", "#e3a75f", "#4fc9d0",
    ("#4fc9d0", "#e3a75f", "#a89be0", "#94c973", "#e58aa3", "#86b4ee", "#b5aea3", "#7a756c"),
)  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """One picture in both themes: `draw` fills a matplotlib figure of `size` inches."""

    name: str
    alt: str
    size: tuple[float, float]
    draw: Callable[[Figure, Theme], None]


def _series_chart(name: str, steps: list[int], values: list[float]) -> Chart:
    smooth = _smooth(values)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, name)
        if len(values) > 8:
            axes.plot(steps, values, color=theme.after, alpha=0.3, linewidth=0.8)
            axes.plot(steps, smooth, color=theme.after, linewidth=1.8)
        else:
            axes.plot(steps, values, color=theme.after, linewidth=1.4, marker="o", markersize=3)
        last = {"color": theme.after, "fontweight": "bold", "fontsize": 9, "ha": "right", "va": "top"}
        figure.text(0.98, 0.97, f"{smooth[-1]:.3g}", **last)

    return Chart(name, f"{name} by step: from {smooth[0]:.3g} to {smooth[-1]:.3g}", (3.0, 1.75), draw)


def _seconds_chart(steps: list[dict]) -> Chart:
    phases = dict.fromkeys(name for row in steps for name in row["seconds"] if name != "total")
    table = {name: [row["seconds"].get(name, 0.0) for row in steps] for name in phases}
    table = dict(sorted(table.items(), key=lambda item: -sum(item[1])))
    if len(table) > 8:  # a colour each, the rest together
        rest = np.sum([table.pop(name) for name in list(table)[7:]], axis=0)
        table["others"] = list(rest)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, "seconds per step", bottom=0.72)
        layers = [_smooth(values) for values in table.values()]
        names = [_clean(name, 20) for name in table]
        axes.stackplot([row["step"] for row in steps], layers, labels=names, colors=theme.phases, linewidth=0)
        axes.set_ylim(0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.47, -0.1), ncol=4, frameon=False, fontsize=8.5,
                    labelcolor=theme.ink, handlelength=0.9, handleheight=0.9)  # fmt: skip

    means = ", ".join(f"{name} {np.mean(values):.2g} s" for name, values in table.items())
    return Chart("seconds", f"mean seconds per step: {means}", (4.6, 2.9), draw)


def _asked_chart(decoding: str, shares: dict[str, dict[str, float]], reference: dict[str, float]) -> Chart:
    """Bars of asked attributes; `shares`: before/after -> attribute -> share of calls."""
    attributes = dict.fromkeys(name for side in (reference, *shares.values()) for name in side)
    attributes = sorted(attributes, key=lambda a: -max(side.get(a, 0) for side in shares.values()))[:12]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme, f"share of questions, {decoding}", left=0.85)
        height = 0.8 / len(shares)
        for i, (side, table) in enumerate(shares.items()):
            places = np.arange(len(attributes)) + (i - (len(shares) - 1) / 2) * height
            values = [table.get(a, 0) for a in attributes]
            axes.barh(places, values, height * 0.92, color=getattr(theme, side), label=side)
        if reference:
            for i, attribute in enumerate(attributes):
                share = reference.get(attribute, 0)
                axes.plot([share, share], [i - 0.42, i + 0.42], color=theme.ink, linewidth=1.4,
                          label=None if i else "optimal asker")  # fmt: skip
        axes.set_yticks(
            range(len(attributes)), [_clean(a, 12) for a in attributes], color=theme.ink, fontsize=9
        )
        axes.invert_yaxis()
        axes.set_xlim(0)
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right", frameon=False, fontsize=8.5, labelcolor=theme.ink, handlelength=1.2)

    words = "; ".join(
        f"{side}: " + ", ".join(f"{a} {t.get(a, 0):.2f}" for a in attributes) for side, t in shares.items()
    )
    return Chart(f"asked_{decoding}", f"share of each asked attribute, {decoding}. {words}", (4.4, 2.7), draw)


def _axes(figure: Figure, theme: Theme, title: str, *, left: float = 0.52, bottom: float = 0.26):
    """Axes with a title above; margins in inches (matplotlib's own layout doubles the time)."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.32) / height)
    )
    figure.text(0.02, 0.97, _clean(title, 40), va="top", color=theme.ink, fontsize=9, parse_math=False)
    axes.set_facecolor(theme.card)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0, pad=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.line)
    axes.grid(color=theme.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.locator_params(nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    return axes


def _smooth(values: list[float]) -> np.ndarray:
    """Centred running mean over a fifteenth of the run; windows shrink at the ends."""
    half = len(values) // 30
    sums = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _render(chart: Chart, theme: Theme) -> bytes:
    figure = Figure(figsize=chart.size, facecolor=theme.card)
    chart.draw(figure, theme)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": None})
    return buffer.getvalue()


def _curve_sections(steps: list[dict]) -> list[tuple[str, list[Chart]]]:
    """A chart of every number in the log, by theme; what fits no theme is optimisation."""
    names = [n for n in dict.fromkeys(name for row in steps for name in row) if n not in ("step", "seconds")]
    sections = {"Reward": [], "Dialogue": [], "Optimisation": [], "Evaluation during training": []}
    talk = (
        "success",
        "question",
        "resolved",
        "redundant",
        "regret",
        "format",
        "gain",
        "asked",
        "frame",
        "jf",
    )
    measured = {name for name, _, _ in METRICS}
    for name in names:
        points = [(row["step"], row[name]) for row in steps if name in row]
        family, last = name.split("/")[0], name.split("/")[-1]
        if family in ("evaluate", "evaluation"):
            if last not in measured or "standard_error" in name or "count" in name:
                continue
            section = "Evaluation during training"
        elif family == "reward":
            section = "Reward"
        else:
            section = "Dialogue" if name.startswith(talk) else "Optimisation"
        sections[section].append(_series_chart(name, *map(list, zip(*points, strict=True))))
    found = [(title, charts) for title, charts in sections.items() if charts]
    if len(steps) > 1 and any(row["seconds"] for row in steps):
        found.append(("Time", [_seconds_chart(steps)]))
    return found


# --- pictures of dialogues ----------------------------------------------------------------------------------


def _open_image(root: Path, relative: str | None, mode: str) -> Image.Image | None:
    """An image inside `root`, or None: missing, damaged or outside is shown on the page, not raised."""
    try:
        path = (root / (relative or "")).resolve()
        if not relative or not path.is_relative_to(root.resolve()):
            return None
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError):
        return None


def _open_frame(root: Path, dialogue: Dialogue, fid: int | None) -> Image.Image | None:
    return _open_image(root, dialogue.images.get(str(fid)), "RGB")


def _open_mask(root: Path, relative: str | None) -> np.ndarray | None:
    image = _open_image(root, relative, "L")
    return None if image is None else np.asarray(image) > 0


def _corners(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom: the policy may have mixed them up."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def _overlay(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A mask as a tinted layer of `size` (width, height) with its contour."""
    mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (*_rgb(PREDICTION), 90)
    layer[mask & ~inner] = (*_rgb(PREDICTION), 255)
    return Image.fromarray(layer)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _mask_iou(root: Path, dialogue: Dialogue) -> float | None:
    mask, truth = _open_mask(root, dialogue.mask), _open_mask(root, dialogue.truth_mask)
    if mask is None or truth is None or mask.shape != truth.shape:
        return None
    return float(metrics.jaccard(mask, truth))


def _talk(dialogue: Dialogue) -> Iterable[tuple[Turn, str, str]]:
    """(turn, thinking, what was said) without the protocol's tags, as far as they are in order."""
    shown = None  # the frame whose picture is the next reply: drawn beside the talk, not in it
    for turn in dialogue.turns[:40]:
        text = turn.text.replace("<|im_end|>", "")
        if turn.role == "user":
            said = "" if shown is not None else _between(text, "<information>", "</information>")
            yield turn, "", _clean(said, 500)
            continue
        thinking, tag, rest = text.partition("</thinking>")
        thinking, said = (thinking.rpartition("<thinking>")[2], rest) if tag else ("", text)
        shown = turn.frame if turn.kind == "keyframe" and turn.frame in dialogue.frames else None
        if turn.kind == "call":
            said = _between(said, "<call>", "</call>")
            try:
                said = str(_require(said, dict)["query"])
            except (ValueError, KeyError, RecursionError):
                pass  # shown as it is
        elif turn.kind == "keyframe" and turn.frame is not None:
            said = "There is no such object." if turn.frame < 0 else f"Show me frame {turn.frame}."
        elif turn.kind == "answer" and dialogue.box and dialogue.point:
            box, point = (" ".join(f"{v:g}" for v in values) for values in (dialogue.box, dialogue.point))
            said = f"Box {box}, point {point}." if any(dialogue.box) else "Nothing to mark."
        thought = [_clean(line, 200) for line in thinking[:2000].splitlines()]
        yield turn, "\n".join([line for line in thought if line][:10]), _clean(said, 500) or "(nothing)"


def _verdict(dialogue: Dialogue) -> str:
    if dialogue.level == "none":
        return "right: no target" if dialogue.success else "missed"
    return "right object" if dialogue.success else "missed"


def _between(text: str, opening: str, closing: str) -> str:
    _, found, rest = text.partition(opening)
    inner, closed, _ = rest.partition(closing)
    return inner if found and closed else text


def _clean(text: str, limit: int) -> str:
    """One line of printable characters: no control, no direction override, no lone surrogate."""
    text = text[: 4 * limit + 4]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def dialogue_sheet(before: dict, after: dict, path: str | Path, *, root: str | Path = ".") -> Path:
    """Draw one sample before and after training as a picture, the kind that opens a README.

    `before`, `after`: two lines of `dialogues/*.jsonl` as dicts, of one sample; `root`: the run directory,
    which their image paths are relative to. Writes a PNG, 1680 pixels wide, at `path` and returns that.
    Raises ValueError for a dict that is no dialogue.
    """
    try:
        pair = _dialogue(before), _dialogue(after)
    except DAMAGE as error:
        raise ValueError(f"no line of dialogues/*.jsonl: {type(error).__name__}: {error}") from error
    path = Path(path)
    _write(path, _png(_draw_sheet(*pair, Path(root))))
    return path


def _draw_sheet(before: Dialogue | None, after: Dialogue | None, root: Path) -> Image.Image:
    width, pad, gap = 1680, 56, 48
    one = after or before
    canvas = Image.new("RGB", (width, 4000), LIGHT.card)
    draw = ImageDraw.Draw(canvas)
    thumb, thumbs = 168, one.frames[:6]
    strip = len(thumbs) * (thumb + 12) - 12
    y = pad
    for line in _wrap(f"“{_clean(one.query, 200)}”", _font(38, bold=True), width - 2 * pad - strip - gap, 3):
        draw.text((pad, y), line, LIGHT.ink, _font(38, bold=True))
        y += 52
    draw.text((pad, y + 10), _facts(one), LIGHT.muted, _font(24))
    x = width - pad - strip
    for fid in thumbs:
        _paste_frame(canvas, _open_frame(root, one, fid), x, pad, thumb)
        draw.text((x + thumb / 2, pad + thumb + 8), f"frame {fid}", LIGHT.muted, _font(20), anchor="ma")
        x += thumb + 12
    y = max(y + 60, pad + thumb + 52)
    column = (width - 2 * pad - gap) // 2
    ends = [
        _draw_side(canvas, draw, pad + i * (column + gap), y, column, dialogue, side, root)
        for i, (side, dialogue) in enumerate((("before", before), ("after", after)))
    ]
    height = min(max(ends) + pad, canvas.height)
    middle = pad + column + gap // 2
    draw.line((middle, y, middle, height - pad), LIGHT.line, 2)
    return canvas.crop((0, 0, width, height))


def _draw_side(
    canvas, draw, x: int, y: int, width: int, dialogue: Dialogue | None, side: str, root: Path
) -> int:
    colour, size = getattr(LIGHT, side), 300
    draw.text((x, y), f"{side} training", colour, _font(30, bold=True))
    if dialogue is None:
        draw.text((x, y + 60), "not run", LIGHT.muted, _font(24))
        return y + 100
    badge, tint = _verdict(dialogue), "#1f8a4c" if dialogue.success else "#b3403a"
    length = _font(22, bold=True).getlength(badge) + 32
    _blob(canvas, (x + width - length, y, x + width, y + 38), tint)
    draw.text((x + width - length / 2, y + 19), badge, "#ffffff", _font(22, bold=True), anchor="mm")
    y += 64
    chat, top, limit = width - size - 28, y, canvas.height - 400
    total = dialogue.counts[0] if dialogue.counts else None
    if total is not None:
        y = _draw_dots(canvas, draw, x, y, total, total, colour, "match the query")
    for turn, thinking, said in _talk(dialogue):
        if y > limit:
            draw.text((x, y), "…", LIGHT.muted, _font(26))
            break
        thought = [part for line in thinking.splitlines() for part in _wrap(line, _font(19), chat, 3)]
        for line in thought[:8]:
            draw.text((x, y), line, LIGHT.muted, _font(19))
            y += 27
        y += 6 if thinking else 0
        if said and turn.role == "user":
            y = _draw_bubble(canvas, draw, x, y, chat, said, "#eceae5", LIGHT.ink, right=True)
        elif said:
            y = _draw_bubble(canvas, draw, x, y, chat, said, colour, "#ffffff")
        if turn.count_after is not None and total is not None:
            y = _draw_dots(canvas, draw, x, y, turn.count_after, total, colour, "left")
    bottom = _draw_keyframe(canvas, draw, x + width - size, top, size, dialogue, root)
    return max(y, bottom)


def _draw_keyframe(canvas, draw, x: int, y: int, size: int, dialogue: Dialogue, root: Path) -> int:
    """The chosen frame with predicted box, point and mask, and the true box."""
    frame = _open_frame(root, dialogue, dialogue.keyframe)
    mask = _open_mask(root, dialogue.mask)
    if frame is not None and mask is not None:
        frame.paste(layer := _overlay(mask, frame.size), (0, 0), layer)
    height = _paste_frame(canvas, frame, x, y, size)

    def place(values: tuple[float, ...]) -> list[float]:
        values = [min(max(v, 0), 1000) / 1000 for v in values]
        return [y + v * height if i % 2 else x + v * size for i, v in enumerate(values)]

    if frame is not None:
        if dialogue.truth_box:
            _dashed_box(draw, *place(_corners(dialogue.truth_box)))
        if dialogue.box and any(dialogue.box):
            draw.rectangle(place(_corners(dialogue.box)), outline=PREDICTION, width=4)
        if dialogue.point and any(dialogue.point):
            px, py = place(dialogue.point)
            draw.ellipse((px - 7, py - 7, px + 7, py + 7), PREDICTION, "#000000", 2)
    label = "no key frame" if frame is None else f"key frame {dialogue.keyframe}"
    if dialogue.keyframe is not None and dialogue.keyframe < 0:
        label = "says: no target"
    y += height + 10
    draw.text((x, y), label, LIGHT.muted, _font(20))
    if (iou := _mask_iou(root, dialogue)) is not None:
        draw.text((x + size, y), f"mask IoU {iou:.2f}", LIGHT.muted, _font(20), anchor="ra")
    return y + 32


def _dashed_box(draw, x1: float, y1: float, x2: float, y2: float) -> None:
    for x in np.arange(x1, x2, 16):
        for y in (y1, y2):
            draw.line((x, y, min(x + 9, x2), y), TRUTH, 3)
    for y in np.arange(y1, y2, 16):
        for x in (x1, x2):
            draw.line((x, y, x, min(y + 9, y2)), TRUTH, 3)


def _paste_frame(canvas: Image.Image, frame: Image.Image | None, x: int, y: int, width: int) -> int:
    """Returns the height it took; a frame that could not be read is a grey field."""
    if frame is None:
        ImageDraw.Draw(canvas).rectangle((x, y, x + width, y + width), "#d9d6d0")
        return width
    height = min(max(1, round(width * frame.height / frame.width)), 2 * width)
    sampling = Image.Resampling.NEAREST if frame.width < width / 1.5 else Image.Resampling.LANCZOS
    canvas.paste(frame.resize((width, height), sampling), (x, y))
    return height


def _draw_bubble(
    canvas, draw, x: int, y: int, width: int, text: str, fill: str, ink: str, right=False
) -> int:
    font, step = _font(25), 34
    lines = _wrap(text, font, width * 0.92 - 36, 6)
    wide = max(font.getlength(line) for line in lines) + 36
    left, height = x + width - wide if right else x, len(lines) * step + 18
    _blob(canvas, (left, y, left + wide, y + height), fill, radius=18)
    for i, line in enumerate(lines):
        draw.text((left + 18, y + 8 + i * step), line, ink, font)
    return y + height + 14


def _draw_dots(canvas, draw, x: int, y: int, left: int, total: int, colour: str, words: str) -> int:
    shown = min(max(total, left), 12)
    for i in range(shown):
        _blob(canvas, (x + i * 26, y + 5, x + i * 26 + 19, y + 24), colour)
        if i >= left:
            _blob(canvas, (x + i * 26 + 2, y + 7, x + i * 26 + 17, y + 22), LIGHT.card)
    draw.text((x + shown * 26 + 8, y + 15), f"{left} {words}", LIGHT.muted, _font(21), anchor="lm")
    return y + 44


def _blob(
    canvas: Image.Image, box: tuple[float, float, float, float], fill: str, radius: float = 1e9
) -> None:
    """A rounded rectangle with smooth edges, which Pillow's own has not."""
    x1, y1, x2, y2 = map(round, box)
    width, height = x2 - x1, y2 - y1
    mask = Image.new("L", (width * 4, height * 4))
    corner = min(radius, width / 2, height / 2) * 4
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width * 4 - 1, height * 4 - 1), corner, 255)
    canvas.paste(fill, (x1, y1, x2, y2), mask.resize((width, height), Image.Resampling.BOX))


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"  # both come with matplotlib
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf", name)), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, most: int) -> list[str]:
    """At most `most` lines no wider than `width` pixels; words too long for a line are cut."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, line, word = [*lines, line] if line else lines, word[:cut], word[cut:]
            lines, line = [*lines, line], ""
        if line and font.getlength(f"{line} {word}") > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    lines = [*lines, line] if line else lines
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " …"]


def _facts(dialogue: Dialogue) -> str:
    facts = [_clean(dialogue.level, 30)]
    if dialogue.counts:
        facts.append(f"{dialogue.counts[0]} candidate{'s' * (dialogue.counts[0] != 1)}")
    if dialogue.optimal is not None:
        facts.append(f"at best {dialogue.optimal:.3g} question{'s' * (dialogue.optimal != 1)}")
    return " · ".join(facts)


# --- page ---------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, `run_dir/report.html` unless `out` says otherwise, and `run_dir/figures/*.png`.

    Works on an unfinished run. Returns the page's path; raises FileNotFoundError where there is no run, and
    OSError where nothing can be written.
    """
    run = load_run(run_dir)
    out = run.path / "report.html" if out is None else Path(out)
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"{out.parent} is no directory: make it, or choose another place for the page"
        )
    figures = run.path / "figures"
    figures.mkdir(exist_ok=True)
    pairs = _pairs(run)
    for i, (before, after) in enumerate(pairs):
        _write(figures / f"dialogue_{i:02d}.png", _png(_draw_sheet(before, after, run.path)))
    sections = (
        _opening(run),
        _table(run.summary),
        _curves(run, figures),
        _asked(run.summary, figures),
        _gallery(pairs, run.path),
        _seconds(run.summary),
        _closing(run),
    )
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{_escape(run.path.resolve().name, 80)} · IC-Seg</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""
    _write(out, page.encode("utf-8"))
    return out


def _opening(run: Run) -> str:
    steps = run.steps[-1]["step"] if run.steps else 0
    total = sum(value for name, value in _phases(run.summary))
    finished = isinstance(run.summary.get("after"), dict)
    facts = [f"{steps} training steps" if steps else "no training step yet"]
    facts += [f"seed {_escape(run.summary['seed'], 20)}"] if "seed" in run.summary else []
    facts += _models(run.summary)
    facts += [_duration(total)] if total else []
    facts += [] if finished else ["<strong>not finished: what is here so far</strong>"]
    tiles = []
    words = {name: (label, sense) for name, label, sense in METRICS}
    decoding = next(reversed(_decodings(run.summary)), "")
    for name in HEADLINES:
        before, after = (_look_up(_evaluation(run.summary, s, decoding), name) for s in ("before", "after"))
        label, sense = words[name]
        label = "Success, ambiguous" if name == "success_ambiguous" else label
        number = before if after is None else after
        if number is None:
            continue
        then = "before training" if after is None else f"was {_two(before)}" if before is not None else ""
        tiles.append(
            f'<div class="tile"><span>{label}</span><b>{_two(number)}</b>'
            f"<small>{then} {_arrow(run.summary, decoding, name, sense)}</small></div>"
        )
    board = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
    board += f'<p class="note">Held-out queries, {decoding} decoding.</p>' if tiles else ""
    return f"""<header>
<p class="kicker">IC-Seg · interactive reasoning segmentation</p>
<h1>{_escape(run.path.resolve().name, 80)}</h1>
<p class="lead">A vision-language policy reads a few frames of a video and a query that may fit several
objects. It may ask the user one question at a time; then it names a key frame, a box and a point, which
SAM2 turns into a mask. Hi-GRPO trains it to ask only what tells the remaining candidates apart, and to stop
when one is left. This page compares the policy before and after that training on held-out scenes.</p>
<p class="facts">{" · ".join(facts)}</p>
{board}
</header>"""


def _models(summary: dict) -> list[str]:
    """Which models answered and diagnosed, and by which prompts: results depend on them."""
    models = summary.get("models")
    return [
        _escape(f"{name} {told.get('model') or told.get('path')}, prompts {told.get('prompt_hash')}", 160)
        for name, told in (models.items() if isinstance(models, dict) else ())
        if isinstance(told, dict)
    ]


def _arrow(summary: dict, decoding: str, name: str, sense: int) -> str:
    """Up or down, coloured by whether that is better; a change within two standard errors is called none."""
    sides = [_evaluation(summary, side, decoding) for side in ("before", "after")]
    old, new = (_look_up(side, name) for side in sides)
    old_se, new_se = (_look_up(side, f"standard_error/{name}") for side in sides)
    if old is None or new is None:
        return ""
    if abs(new - old) <= max(2 * math.hypot(old_se or 0.0, new_se or 0.0), 0.005):
        return '<span class="same" title="within two standard errors">≈</span>'
    kind = "changed" if sense == 0 else "better" if (new - old) * sense > 0 else "worse"
    arrow = "▲" if new > old else "▼"
    return f'<span class="{kind}" title="{kind} by {abs(new - old):.2f}">{arrow}<i>{kind}</i></span>'


def _table(summary: dict) -> str:
    decodings, baselines = _decodings(summary), _baselines(summary)
    if not decodings and not baselines:
        return '<section><h2>Before and after</h2><p class="note">No evaluation yet.</p></section>'
    groups = "".join(f'<th colspan="2" scope="colgroup" class="edge">{d}</th>' for d in decodings)
    sides = '<th scope="col" class="before edge">before</th><th scope="col" class="after">after</th>'
    names = sides * len(decodings)
    if baselines:
        seeing = "askers that see perfectly"
        groups += f'<th colspan="{len(baselines)}" scope="colgroup" class="edge">{seeing}</th>'
    for i, name in enumerate(baselines):
        names += f'<th scope="col" class="base{_edge(i)}">{_escape(name.replace("_", " "), 30)}</th>'
    rows = []
    for name, label, sense in METRICS:
        values, cells = [], ""
        for decoding in decodings:
            for i, side in enumerate(("before", "after")):
                table = _evaluation(summary, side, decoding)
                values.append(_look_up(table, name))
                error = _look_up(table, f"standard_error/{name}")
                spread = "" if error is None else f"<small> ±{error:.2f}</small>"
                arrow = f" {_arrow(summary, decoding, name, sense)}" if i else ""
                cells += f'<td class="{_edge(i)}"><b>{_two(values[-1])}</b>{spread}{arrow}</td>'
        for i, table in enumerate(baselines.values()):
            values.append(_baseline(table, name))
            cells += f'<td class="base{_edge(i)}">{"" if values[-1] is None else _two(values[-1])}</td>'
        if any(value is not None for value in values):
            rows.append(f'<tr><th scope="row" class="in{INDENT.get(name, 0)}">{label}</th>{cells}</tr>')
    tables = (_evaluation(summary, side, d) for side in ("after", "before") for d in decodings)
    one = next(filter(None, tables), {})
    kinds = {"success_ambiguous": "ambiguous", "success_clear": "clear", "success_none": "no-target"}
    kinds |= {"jf": "clips for J&amp;F"}
    sizes = [f"{n:.0f} {kind}" for name, kind in kinds.items() if (n := _look_up(one, f"count/{name}"))]
    size = f"Held-out queries: {', '.join(sizes)}." if sizes else ""
    asked = [_look_up(_evaluation(summary, "after", d), "count/success") for d in ("greedy", "sampled")]
    draws = f", {asked[1] / asked[0]:.0f} dialogues per query" if all(asked) and asked[1] > asked[0] else ""
    seeing = "The askers at the right see perfectly and differ only in what they ask." if baselines else ""
    return f"""<section>
<h2>Before and after</h2>
<div class="scroll" tabindex="0" role="region" aria-label="table of results"><table class="results">
<thead><tr><td></td>{groups}</tr><tr><td></td>{names}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<p class="note">{size} ± is one standard error; <span class="same">≈</span> marks a change within two of them.
Sampled: at the temperature of training{draws}. {seeing}</p>
<details><summary>What the words mean</summary><dl>
<dt>Success</dt><dd>The predicted box overlaps the target's on the chosen frame by more than half (IoU), or a
missing target is called missing.</dd>
<dt>Resolved rate</dt><dd>Share of ambiguous dialogues whose last question left one candidate; one without a
question counts as unresolved.</dd>
<dt>Redundant questions</dt><dd>Share of all questions that removed no candidate.</dd>
<dt>Regret</dt><dd>Questions asked on an ambiguous query minus the smallest expected number; an unresolved
dialogue is charged the whole budget, so that never asking is not best.</dd>
<dt>J&amp;F</dt><dd>Mean of region overlap and contour accuracy of the masks over all frames of the clip.</dd>
</dl></details>
</section>"""


def _edge(column: int) -> str:
    return "" if column else " edge"


def _baseline(table: dict, name: str) -> float | None:
    """A baseline with one success and one number of questions means those of ambiguous queries."""
    if "success_ambiguous" not in table:
        short = {"success_ambiguous": "success", "questions_ambiguous": "questions", "success": ""}
        name = short.get(name, name)
    return _look_up(table, name)


def _curves(run: Run, figures: Path) -> str:
    if not run.steps:
        return '<section><h2>Training</h2><p class="note">No training step yet.</p></section>'
    parts = []
    for title, charts in _curve_sections(run.steps):
        pictures = "".join(_picture(chart, figures, "curve_") for chart in charts)
        parts.append(f'<h3>{title}</h3><div class="charts{" wide" * (title == "Time")}">{pictures}</div>')
    note = '<p class="note">Thin: each step. Thick: running mean; its last value stands at the right.</p>'
    return f"<section><h2>Training</h2>{note}{''.join(parts)}</section>"


def _asked(summary: dict, figures: Path) -> str:
    charts = []
    reference = _shares(_baselines(summary).get("optimal", {}))
    for decoding in _decodings(summary):
        shares = {side: _shares(_evaluation(summary, side, decoding)) for side in ("before", "after")}
        shares = {side: table for side, table in shares.items() if table}
        if shares:
            charts.append(_asked_chart(decoding, shares, reference))
    if not charts:
        return ""
    pictures = "".join(_picture(chart, figures) for chart in charts)
    return f'<section><h2>What it asks about</h2><div class="charts two">{pictures}</div></section>'


def _shares(table: dict) -> dict[str, float]:
    asked = table.get("asked")
    return dict(_flatten(asked)) if isinstance(asked, dict) else {}


def _picture(chart: Chart, figures: Path, prefix: str = "") -> str:
    """A chart written under figures/ and embedded, in both themes: the browser takes the reader's."""
    stem = prefix + "".join(c if c.isalnum() else "_" for c in chart.name)[:60]
    light, dark = _render(chart, LIGHT), _render(chart, DARK)
    _write(figures / f"{stem}.png", light)
    _write(figures / f"{stem}_dark.png", dark)
    width, height = round(chart.size[0] * 100), round(chart.size[1] * 100)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark)}">'
        f'<img src="{_data_uri(light)}" width="{width}" height="{height}" '
        f'alt="{_escape(chart.alt, 400)}"></picture>'
    )


def _gallery(pairs: list, root: Path) -> str:
    if not pairs:
        return ""
    cards = "".join(_card(before, after, root) for before, after in pairs)
    return f"""<section>
<h2>Dialogues</h2>
<p class="note">The same samples before and after, levels in turn, in the order of the file: not picked.
<span class="legend"><i></i>predicted box, point and mask</span>
<span class="legend"><i class="dashed"></i>true box</span>
<span class="legend">{_dots(2, 3)}candidates left</span></p>
{cards}
</section>"""


def _card(before: Dialogue | None, after: Dialogue | None, root: Path) -> str:
    one = after or before
    strip = ""
    for fid in one.frames[:12]:
        image = _open_frame(root, one, fid)
        picture = '<span class="lost">?</span>'
        if image is not None:
            picture = f'<img src="{_image_uri(image, 256)}" alt="" class="{_crisp(image)}">'
        strip += f"<figure>{picture}<figcaption>frame {fid}</figcaption></figure>"
    sides = "".join(_side(d, name, root) for name, d in (("before", before), ("after", after)))
    return f"""<article class="card">
<header><div><h3>{_escape(one.query, 300)}</h3><p class="facts">{html.escape(_facts(one))}
<span class="id">{_escape(one.id, 60)}</span></p></div>
<div class="strip" aria-label="frames shown">{strip}</div></header>
<div class="sides">{sides}</div>
</article>"""


def _side(dialogue: Dialogue | None, name: str, root: Path) -> str:
    if dialogue is None:
        return f'<div class="side {name}"><h4>{name}</h4><p class="note">not run</p></div>'
    verdict = f'<span class="badge{" good" * dialogue.success}">{_verdict(dialogue)}</span>'
    decoding = f" <small>{_escape(dialogue.decoding, 20)}</small>" if dialogue.decoding else ""
    chat, total = "", dialogue.counts[0] if dialogue.counts else None
    if total is not None:
        chat += _count(total, total, "match the query" if total != 1 else "matches the query")
    last = total
    for turn, thinking, said in _talk(dialogue):
        chat += f'<p class="thinking">{html.escape(thinking)}</p>' if thinking else ""
        kind = "user" if turn.role == "user" else "said" if turn.kind in KINDS else "said code"
        chat += f'<p class="{kind}">{html.escape(said)}</p>' if said else ""
        if turn.count_after is not None:
            words = "left" if last is None or turn.count_after < last else "left, no change"
            chat += _count(turn.count_after, max(total or 0, turn.count_after), words)
            last = turn.count_after
    calls = sum(turn.role == "assistant" and turn.kind == "call" for turn in dialogue.turns)
    questions = max(len(dialogue.counts) - 1, calls)
    facts = [f"{questions} question{'s' * (questions != 1)}"]
    facts += [f"reward {dialogue.reward:.2f}"] if dialogue.reward is not None else []
    iou = _mask_iou(root, dialogue)
    facts += [f"mask IoU {iou:.2f}"] if iou is not None else []
    return f"""<div class="side {name}"><h4>{name}{decoding} {verdict}</h4>
<div class="talk"><div class="chat">{chat}</div>
<div class="shot">{_keyframe(dialogue, root)}<p class="facts">{" · ".join(facts)}</p></div></div></div>"""


def _keyframe(dialogue: Dialogue, root: Path) -> str:
    if dialogue.keyframe is None or dialogue.keyframe < 0:
        words = "no key frame" if dialogue.keyframe is None else "says: no target"
        return f'<div class="lost">{words}</div>'
    frame = _open_frame(root, dialogue, dialogue.keyframe)
    if frame is None:
        return f'<div class="lost">frame {dialogue.keyframe} is missing</div>'
    width, height = frame.size

    def box(values: tuple[float, ...], kind: str) -> str:
        x1, y1, x2, y2 = _corners(values)
        place = f'x="{x1 * width / 1000:.2f}" y="{y1 * height / 1000:.2f}"'
        size = f'width="{(x2 - x1) * width / 1000:.2f}" height="{(y2 - y1) * height / 1000:.2f}"'
        return f'<rect class="{kind}" {place} {size}/>'

    def image(picture: Image.Image) -> str:
        size = f'width="{width}" height="{height}" class="{_crisp(frame)}"'
        return f'<image href="{_image_uri(picture, 640)}" {size}/>'

    layers = image(frame)
    mask = _open_mask(root, dialogue.mask)
    if mask is not None:
        layers += image(_overlay(mask, frame.size))
    if dialogue.truth_box:
        layers += box(dialogue.truth_box, "shade") + box(dialogue.truth_box, "truth")
    if dialogue.box and any(dialogue.box):
        layers += box(dialogue.box, "prediction")
    if dialogue.point and any(dialogue.point):
        x, y = dialogue.point[0] * width / 1000, dialogue.point[1] * height / 1000
        layers += f'<circle class="point" cx="{x:.2f}" cy="{y:.2f}" r="{max(width, height) / 60:.2f}"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="key frame {dialogue.keyframe} with the answer">'
        f'{layers}</svg><p class="facts">key frame {dialogue.keyframe}</p>'
    )


def _count(left: int, total: int, words: str) -> str:
    return f'<p class="count">{_dots(left, total)}{left} {words}</p>'


def _dots(left: int, total: int) -> str:
    dots = "".join('<i class="on"></i>' if i < left else "<i></i>" for i in range(min(total, 12)))
    return f'<span class="dots" aria-hidden="true">{dots}</span>'


def _phases(summary: dict) -> list[tuple[str, float]]:
    seconds = summary.get("seconds")
    # Compilation falls into the phases that need it.
    inside = ("total", "compile")
    phases = [(n, v) for n, v in _flatten(seconds) if n not in inside] if isinstance(seconds, dict) else []
    return sorted(phases, key=lambda item: -item[1])


def _seconds(summary: dict) -> str:
    phases = _phases(summary)
    total = sum(value for _, value in phases)
    if total <= 0:
        return ""
    compiling = dict(_flatten(summary["seconds"])).get("compile", 0.0)
    compiling = f"""<tr><th scope="row">of it compilation</th><td>{compiling:.1f} s</td><td>{compiling / total:.0%}</td>
<td></td></tr>""" if compiling > 0 else ""
    rows = "".join(
        f'<tr><th scope="row">{_escape(name, 40)}</th><td>{value:.1f} s</td><td>{value / total:.0%}</td>'
        f'<td><i style="width:{max(value, 0) / total:.1%}"></i></td></tr>'
        for name, value in phases
    )
    return f"""<section><h2>Where the time went</h2>
<table class="seconds"><tbody>{rows}</tbody>
<tfoot><tr><th scope="row">together</th><td>{_duration(total)}</td><td></td><td></td></tr>{compiling}</tfoot></table>
</section>"""


def _closing(run: Run) -> str:
    parts = []
    if run.damaged:
        files = ", ".join(f"{n} in {html.escape(name)}" for name, n in run.damaged.items())
        parts.append(f'<p class="note">Unreadable lines skipped: {files}.</p>')
    if run.config:
        config = "".join(c if c.isprintable() or c == "\n" else " " for c in run.config[:50_000])
        parts.append(f"<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>")
    parts.append(
        '<p class="note">Made by <code>python -m icseg_jax.report RUN_DIR</code>; pictures in figures/.</p>'
    )
    return f"<footer>{''.join(parts)}</footer>"


def _escape(text: object, limit: int) -> str:
    return html.escape(_clean(str(text), limit))


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _crisp(image: Image.Image) -> str:
    return "crisp" if max(image.size) <= 256 else "soft"  # small frames are shown as the pixels they are


def _image_uri(image: Image.Image, longest: int) -> str:
    if max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest))
    return _data_uri(_png(image))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _css(theme: Theme, more: str) -> str:
    return (
        f":root{{--card:{theme.card};--ink:{theme.ink};--muted:{theme.muted};--line:{theme.line};"
        f"--before:{theme.before};--after:{theme.after};--prediction:{PREDICTION};--truth:{TRUTH};{more}}}"
    )


PAPER = "--page:#f7f5f1;--bubble:#efece6;--good:#1f8a4c;--bad:#b3403a;--on:#fff"
NIGHT = "--page:#101215;--bubble:#262a31;--good:#58c98a;--bad:#f08a80;--on:#101215"
STYLE = (
    f"{_css(LIGHT, PAPER)}@media (prefers-color-scheme:dark){{{_css(DARK, NIGHT)}}}"
    + """
:root { color-scheme: light dark }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 48px 24px 64px }
h1 { font-size: clamp(1.9rem, 5vw, 2.7rem); line-height: 1.1; letter-spacing: -.02em; margin: .1em 0 .5em;
  overflow-wrap: anywhere }
h2 { font-size: 1.45rem; letter-spacing: -.01em; margin: 0 0 .6em }
h3 { font-size: 1rem; margin: 1.4em 0 .5em }
section, footer { margin-top: 56px }
p { margin: .5em 0 }
.kicker { color: var(--muted); font-size: .85rem; letter-spacing: .04em; margin: 0 }
.lead { max-width: 68ch; font-size: 1.06rem }
.facts, .note { color: var(--muted); font-size: .88rem }
.note { max-width: 84ch }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px;
  margin-top: 28px }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px;
  display: grid; gap: 2px; align-content: start }
.tile > span, .tile small { color: var(--muted); font-size: .85rem; font-variant-numeric: tabular-nums }
.tile b { font-size: 2.1rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums }

.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 14px }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .9rem }
.results { width: 100% }
.results th, .results td { padding: 7px 11px; text-align: right; white-space: nowrap; font-weight: 400 }
.results thead th { color: var(--muted); font-size: .82rem; vertical-align: bottom }
.results thead tr:first-child th { color: var(--ink); font-weight: 600; text-align: center;
  padding-top: 12px }
.results thead th.before { color: var(--before) }
.results thead th.after { color: var(--after) }
.results thead th.base { white-space: normal; line-height: 1.2 }
.results tbody th, .results thead td { text-align: left; position: sticky; left: 0; background: var(--card) }
.results tbody > tr > * { border-top: 1px solid var(--line) }
.results .in1 { padding-left: 26px }
.results .in2 { padding-left: 40px; color: var(--muted) }
.results b { font-weight: 600 }
.results small, .base { color: var(--muted) }
.results .edge { border-left: 1px solid var(--line) }
.better, .worse, .same, .changed { display: inline-block; width: 1.1em; text-align: center; font-size: .8rem }
.better i, .worse i, .changed i { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%) }
.better { color: var(--good) }
.worse { color: var(--bad) }
.same, .changed { color: var(--muted) }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 12px }
.charts.two { grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); max-width: 960px }
.charts.wide { grid-template-columns: minmax(0, 560px) }
.charts picture { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 8px }
.charts img { display: block; width: 100%; height: auto }

.legend { white-space: nowrap; margin-left: 14px }
.legend > i { display: inline-block; width: 22px; height: 15px; margin-right: 6px; background: #181a1d;
  vertical-align: -2px; border: 2px solid var(--prediction) }
.legend > i.dashed { border: 1.5px dashed var(--truth) }
.legend .dots { margin-right: 6px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 16px; margin-top: 20px;
  overflow: hidden }
.card > header { display: flex; flex-wrap: wrap; gap: 16px; justify-content: space-between;
  padding: 18px 22px; border-bottom: 1px solid var(--line) }
.card > header > div:first-child { flex: 1 1 260px; min-width: 0 }
.card h3 { font-size: 1.18rem; line-height: 1.3; margin: 0 0 4px; overflow-wrap: anywhere }
.card h3::before { content: "\\201c" }
.card h3::after { content: "\\201d" }
.id { opacity: .75; margin-left: .6em; overflow-wrap: anywhere }
.strip { display: flex; flex-wrap: wrap; gap: 8px }
.strip figure { margin: 0; width: 84px }
.strip img, .strip .lost { display: block; width: 100%; min-height: 48px; border-radius: 6px }
.strip figcaption { text-align: center; color: var(--muted); font-size: .75rem }
.crisp { image-rendering: pixelated }
.sides { display: grid; grid-template-columns: 1fr 1fr }
.side { padding: 16px 22px 22px; min-width: 0 }
.side + .side { border-left: 1px solid var(--line) }
.side.before { --tone: var(--before) }
.side.after { --tone: var(--after) }
h4 { margin: 0 0 10px; font-size: .95rem; color: var(--tone); display: flex; align-items: center; gap: 8px }
h4::first-letter { text-transform: uppercase }
h4 small { color: var(--muted); font-weight: 400 }
.badge { margin-left: auto; font-size: .78rem; font-weight: 600; color: var(--on); border-radius: 99px;
  padding: 2px 11px; background: var(--bad) }
.badge.good { background: var(--good) }
.talk { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 200px); gap: 18px; align-items: start }
.chat { display: flex; flex-direction: column; gap: 7px; min-width: 0 }
.chat p { margin: 0; overflow-wrap: anywhere }
.said, .user { max-width: 92%; padding: 6px 13px; border-radius: 15px; font-size: .93rem; line-height: 1.4 }
.said { align-self: flex-start; background: var(--tone); color: var(--on); border-bottom-left-radius: 4px }
.code { font: .78rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace }
.user { align-self: flex-end; background: var(--bubble); border-bottom-right-radius: 4px }
.thinking { color: var(--muted); font-size: .78rem; line-height: 1.4; padding-left: 9px; white-space: pre-line;
  border-left: 2px solid var(--line) }
.count { color: var(--muted); font-size: .8rem; display: flex; align-items: center; flex-wrap: wrap;
  gap: 8px }
.dots { display: inline-flex; gap: 4px }
.dots i { width: 9px; height: 9px; border-radius: 50%; border: 1.5px solid var(--tone, var(--muted)) }
.dots .on { background: var(--tone, var(--muted)) }
.shot svg { display: block; width: 100%; height: auto; border-radius: 8px }
.shot p { margin: 5px 0 0; font-size: .8rem }
.lost { display: grid; place-items: center; background: var(--bubble); color: var(--muted);
  border-radius: 8px; font-size: .85rem }
.shot .lost { aspect-ratio: 1; padding: 12px; text-align: center }
rect { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2.2 }
rect.prediction { stroke: var(--prediction) }
rect.truth { stroke: var(--truth); stroke-dasharray: 5 4 }
rect.shade { stroke: #000; stroke-opacity: .55; stroke-width: 3.4 }
.point { fill: var(--prediction); stroke: #000; vector-effect: non-scaling-stroke; stroke-width: 1.5 }

.seconds { width: 100%; max-width: 640px }
.seconds th { text-align: left; font-weight: 400; padding: 5px 14px 5px 0 }
.seconds td { text-align: right; padding: 5px 10px; white-space: nowrap }
.seconds td:last-child { width: 45% }
.seconds i { display: block; height: 8px; border-radius: 4px; background: var(--after); min-width: 1px }
.seconds tfoot * { border-top: 1px solid var(--line); font-weight: 600 }
details { margin-top: 14px; font-size: .9rem }
summary { cursor: pointer }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; max-width: 84ch; margin: 10px 0 }
dt { font-weight: 600 }
dd { margin: 0 }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px;
  overflow-x: auto; font-size: .8rem; line-height: 1.5 }
@media (max-width: 860px) {
  .sides { grid-template-columns: 1fr }
  .side + .side { border-left: 0; border-top: 1px solid var(--line) }
}
@media (max-width: 480px) {
  main { padding: 28px 14px 48px }
  .talk, dl { grid-template-columns: 1fr }
  .shot { max-width: 260px }
  .side, .card > header { padding-left: 14px; padding-right: 14px }
  .legend { display: block; margin: 4px 0 0 }
}
"""
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icseg_jax.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dir", type=Path, help="a run's directory, e.g. runs/embedded")
    parser.add_argument("--out", type=Path, help="where the page goes (default: RUN_DIR/report.html)")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run_dir, options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
