"""The page of a run, on run directories made of random shapes: what it shows, what it survives."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icseg_jax import report
from icseg_jax.metrics import dialogue_summary

ATTRIBUTES = ("color", "shape", "size", "motion", "column")
COLOURS = {"blue": (60, 110, 230), "green": (60, 180, 90), "yellow": (230, 205, 70), "orange": (235, 140, 50)}
FRAMES = (0, 3, 7, 11)


# --- a run directory ----------------------------------------------------------------------------------------


def make_scene(run, index, rng, size=128):
    """Discs and squares that move over noise: (frames' paths, names, visible mask per object and frame)."""
    rows, columns = np.mgrid[:size, :size]
    noise = rng.integers(18, 34, (size, size, 1)) + np.zeros(3, int)
    names = list(COLOURS)[: 2 + index % 3]
    frames = {fid: noise.copy() for fid in FRAMES}
    masks = {}
    for k, name in enumerate(names):
        x, y, speed = 22 + 84 * k / len(names), rng.integers(30, 100), rng.integers(-3, 4)
        radius = rng.integers(8, 15)
        for fid in FRAMES:
            dx, dy = np.abs(columns - x), np.abs(rows - np.clip(y + speed * fid, 16, 111))
            shape = np.maximum(dx, dy) <= radius if k % 2 else dx**2 + dy**2 <= radius**2
            frames[fid][shape] = COLOURS[name]
            masks |= {(other, fid): masks[other, fid] & ~shape for other in range(k)} | {(k, fid): shape}
    paths = {}
    for fid, frame in frames.items():
        paths[str(fid)] = f"dialogues/images/{index:03d}_{fid}.png"
        save(run / paths[str(fid)], frame.astype(np.uint8))
    return paths, names, masks


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def bounding_box(mask):
    rows, columns = np.nonzero(mask)
    return [round(int(v) / 128 * 1000) for v in (columns.min(), rows.min(), columns.max(), rows.max())]


def make_dialogue(run, index, rng, trained, decoding="greedy"):
    """A guess or a useless question before training, the right question after it."""
    images, names, masks = make_scene(run, index, np.random.default_rng([7, index]))
    level = ("simple", "medium", "difficult", "clear", "none")[index % 5]
    keyframe = 7 if trained else int(rng.choice(FRAMES))
    right = trained or rng.random() < 0.4
    if level == "clear":
        names = names[:1]
    count = 0 if level == "none" else len(names)
    counts, turns = [count], []

    def say(role, kind, text, frame=None, count_after=None):
        turns.append({"role": role, "kind": kind, "text": text, "frame": frame, "count_after": count_after})

    listed = "\n".join(
        f"{200 * k} {name} {'square' if k % 2 else 'circle'} small leftward middle" for k, name in enumerate(names)
    )
    for question, answer, left in (
        [("What size is the target?", "small", count)] * (not trained)
        + [("What color is the target?", "blue", 1)]
    ) * (count > 1):
        call = json.dumps({"name": "vlm_tool", "query": question})
        say(
            "assistant",
            "call",
            f"<thinking>\n{listed} ; differ color {count} </thinking> <call> {call} </call>",
        )
        say("user", "call", f"<information>{answer}</information>\n\n", count_after=left)
        counts.append(left)
    truth, mask = masks[0, keyframe], np.roll(masks[0 if right else 1, keyframe], 1, (0, 1))
    truth_box, box = bounding_box(truth), bounding_box(mask)
    point = [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2]
    if level == "none":
        keyframe, box, point, truth_box = -1, [0, 0, 0, 0], [0, 0], None
    else:
        save(run / f"dialogues/masks/{index}_{trained}.png", mask.astype(np.uint8) * 255)
        save(run / f"dialogues/masks/{index}_truth_{keyframe}.png", truth.astype(np.uint8) * 255)
    say(
        "assistant",
        "keyframe",
        f"<thinking> one left </thinking> <keyframe> {keyframe} </keyframe>",
        frame=keyframe,
    )
    reply = "Here is the high-res version of your selected frame: <image>"
    say("user", "keyframe", "No frame." if keyframe < 0 else reply)
    answer = json.dumps({"bbox_2d": box, "point_2d": point})
    say(
        "assistant",
        "answer",
        f"<thinking> {names[0]} circle small </thinking> <answer> {answer} </answer><|im_end|>",
    )
    return {
        "id": f"syn_{index:06d}", "level": level, "split": "test", "decoding": decoding,
        "query": "segment the small thing", "turns": turns, "frames": list(FRAMES), "images": images,
        "keyframe": keyframe, "box": box, "point": point,
        "truth_box": truth_box, "counts": counts, "success": bool(right), "reward": 4.8 if right else 1.3,
        "optimal": float(count > 1),
        "mask": None if level == "none" else f"dialogues/masks/{index}_{trained}.png",
        "truth_mask": None if level == "none" else f"dialogues/masks/{index}_truth_{keyframe}.png",
    }  # fmt: skip


def make_evaluation(rng, trained):
    rows = []
    for i in range(450):
        level = ("simple", "medium", "difficult", "clear", "none")[min(i // 100, 4)]
        count = {"simple": 2, "medium": 4, "difficult": 5, "clear": 1, "none": 0}[level]
        skill = 0.85 if trained else 0.3
        questions = int(rng.integers(0, 3)) if not trained else int(count > 1) + int(count > 2)
        counts, gains, asked = [count], [], []
        for _ in range(questions):
            hit = rng.random() < skill and counts[-1] > 1
            counts.append(max(1, counts[-1] // 2) if hit else counts[-1])
            gains.append((counts[-2] - counts[-1]) / max(counts[-2] - 1, 1))
            asked.append(str(rng.choice(ATTRIBUTES, p=[0.2] * 5 if trained else [0.6, 0.1, 0.1, 0.1, 0.1])))
        success = bool(rng.random() < (0.8 if trained else 0.4))
        terms = {
            name: float(success * rng.random())
            for name in ("iou", "box", "point", "frame", "process", "mask")
        }
        rows.append({
            "id": str(i), "level": level, "success": success, "frame_ok": True, "counts": counts,
            "asked": asked,
            "gains": gains, "questions": questions, "optimal": float(count > 1), "budget": 5, "format": True,
            "reward": sum(terms.values()), "terms": terms, "J": 0.8 if i < 32 else None,
            "F": 0.7 if i < 32 else None,
        })  # fmt: skip
    return dialogue_summary(rows)


def make_run(path, finished=True, steps=120, dialogues=12):
    """A run directory as train.py leaves it; not finished: no summary and nothing after training."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("seed: 0\nsteps: 120\nprompts: 16\nrollouts: 8\nmodel:\n  layers: 4\n")
    lines = []
    for step in range(1, steps + 1):
        rise = 1 - np.exp(-step / 40)
        noise = rng.normal(0, 0.05, 12)
        terms = {
            f"reward/{n}": 0.3 + 0.5 * rise * k / 6 + noise[k]
            for k, n in enumerate(("iou", "box", "point", "frame", "mask", "process"))
        }
        lines.append({
            "step": step, "loss": -0.02 + noise[6] / 10, "reward": sum(terms.values()), **terms,
            "advantage/trajectory": 1 + noise[7], "advantage/turn": 0.4 + noise[8],
            "ratio": 1.0 + noise[9] / 100,
            "clip_fraction": abs(noise[9]) / 10, "kl": abs(noise[10]) / 50, "entropy": 1.2 - 0.8 * rise,
            "sampler_difference": abs(noise[11]) / 1000, "success": 0.4 + 0.4 * rise + noise[0],
            "success_ambiguous": 0.35 + 0.4 * rise + noise[1], "questions": 1.1 + 0.3 * rise + noise[2],
            "seconds": {"rollout": 1.4 + noise[3], "update": 0.8, "reward": 0.35, "expert": 0.02,
                        "teacher": 0.2},
        })  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for side, trained in (("before", False), ("after", True)) if finished else (("before", False),):
        rows = [make_dialogue(path, i, rng, trained) for i in range(dialogues)]
        (path / f"dialogues/{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        evaluate = {
            d: {"before": make_evaluation(rng, False), "after": make_evaluation(rng, True)}
            for d in ("greedy", "sampled")
        }
        baselines = {}
        for k, name in enumerate(
            ("guess", "random", "best_fixed_attribute", "best_fixed_order", "greedy", "optimal")
        ):
            shares = dict.fromkeys(ATTRIBUTES, 0.2) if k else {}
            baselines[name] = {
                "questions": k / 3, "resolved_rate": k / 5, "gain": k / 5, "success": 0.4 + k / 9,
                "regret": 4 - k * 0.8, "redundant_question_rate": 0.3 - k / 20, "asked": shares,
            }  # fmt: skip
        summary = {
            "before": {d: evaluate[d]["before"] for d in evaluate},
            "after": {d: evaluate[d]["after"] for d in evaluate},
            "baselines": baselines, "seed": 0, "config": {}, "seconds": {"rollout": 168.2, "update": 96.1,
            "reward": 42.0, "teacher": 24.0, "evaluate": 88.4, "compile": 41.7, "checkpoint": 4.1},
        }  # fmt: skip
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def append(path, line):
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class Page(HTMLParser):
    """What a browser would make of the page: tags, references, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.references += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, name):
        """Elements of a class."""
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.tags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with hostile text and damaged lines, and its page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "embedded", steps=40, dialogues=8)
    hostile = make_dialogue(run, 1, np.random.default_rng(1), True)
    hostile["id"] = '"><script>alert(1)</script>'
    hostile["query"] = "segment <img src=x onerror=alert(2)> \u202e $x^2$ & \ud800"
    hostile["turns"][0]["text"] = (
        '<thinking>a</thinking><call>{"name": "vlm_tool", "query": "<script>alert(3)</script>?"}</call>'
    )
    hostile["turns"][1]["text"] = (
        "</p></div></body><iframe src=//example.org></iframe>\x00\x1b[31m" + "a" * 100_000
    )
    hostile["images"] = {"0": "../../../../etc/passwd", "3": "/etc/passwd", "7": "config.yaml", "11": "\0"}
    hostile["mask"] = "config.yaml"
    dialogues = run / "dialogues/after.jsonl"
    dialogues.write_text(json.dumps(hostile) + "\n" + dialogues.read_text())
    for line in ('{"id": "cut o', "[]", "null", '{"id": "no turns"}', "[" * 100_000, '{"turns": "abc"}'):
        append(dialogues, line)
    append(run / "metrics.jsonl", '{"loss": 1.0}')
    append(run / "metrics.jsonl", '{"step": 41, "loss": NaN, "kl": null, "note": "<b>", "reward": 3.0}')
    page = report.write_report(run)
    assert page == run / "report.html"
    return run, Page(page.read_text("utf-8"))


# --- the page -----------------------------------------------------------------------------------------------


def test_page_is_one_file_that_asks_for_nothing(finished):
    run, page = finished
    assert page.open == []  # every element is closed, in order
    assert page.references and all(r.startswith("data:image/png;base64,") for r in page.references)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    style = (run / "report.html").read_text("utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_page_shows_the_run(finished):
    run, page = finished
    assert "of it compilation41.7 s" in page.text
    for heading in ("Before and after", "Training", "What it asks about", "Dialogues", "Where the time went"):
        assert heading in page.text
    summary = json.loads((run / "summary.json").read_text())
    for name in ("success_ambiguous", "resolved_rate", "regret", "redundant_question_rate"):
        for side in ("before", "after"):
            value, error = (
                t[name] for t in (summary[side]["sampled"], summary[side]["sampled"]["standard_error"])
            )
            assert f"{value:.2f} ±{error:.2f}" in page.text
    for words in (
        "best fixed attribute",
        "300 ambiguous",
        "sampler",
        "prompts: 16",
        "What color is the target?",
    ):
        assert words in page.text or any(words in (a.get("alt") or "") for _, a in page.tags)
    assert page.count("card") == 9
    assert page.count("prediction") >= 8 and page.count("truth") >= 8 and page.count("better") > 10
    assert all(a.get("alt") is not None for tag, a in page.tags if tag == "img")
    figures = {path.name for path in (run / "figures").iterdir()}
    assert {
        "curve_reward.png",
        "curve_reward_iou_dark.png",
        "curve_seconds.png",
        "asked_sampled.png",
    } <= figures
    assert not [name for name in figures if name.endswith(".tmp")]


def test_model_text_is_text(finished):
    _, page = finished
    for text in ("<script>alert(3)</script>?", "<img src=x onerror=alert(2)>", "<iframe src=//example.org>"):
        assert text in page.text  # shown to the reader, not obeyed
    assert not set("\x00\x1b\u202e\ud800") & set(page.text)
    assert "root:" not in page.text


def test_damage_is_skipped_and_counted(finished):
    _, page = finished
    assert "1 in metrics.jsonl" in page.text and "6 in dialogues/after.jsonl" in page.text


def test_dots_shrink_with_the_candidates(tmp_path):
    dialogue = make_dialogue(
        tmp_path, 2, np.random.default_rng(0), False
    )  # 4 candidates: useless, then colour
    page = Page(report._side(report._dialogue(dialogue), "before", tmp_path))
    dots = [a.get("class") for tag, a in page.tags if tag == "i" or a.get("class") == "dots"]
    rows = " ".join(d or "off" for d in dots).split("dots")[1:]
    assert [row.split().count("on") for row in rows] == [4, 4, 1]
    assert "4 match the query" in page.text and "4 left, no change" in page.text and "1 left" in page.text


def test_gallery_takes_levels_in_turn_and_pairs_first(tmp_path):
    def dialogues(ids):
        rows = [make_dialogue(tmp_path, i, np.random.default_rng(0), False) for i in ids]
        return [report._dialogue(row) for row in rows]

    run = report.Run(tmp_path, "", [], {}, dialogues(range(12)), dialogues(range(10)), {})
    pairs = report._pairs(run)
    levels = [before.level for before, _ in pairs]
    assert set(levels[:5]) == set(levels[5:10]) == {"simple", "medium", "difficult", "clear", "none"}
    assert [after is None for _, after in pairs] == [False] * 10 + [True] * 2
    assert all(after is None or before.id == after.id for before, after in pairs)


def test_arrows(tmp_path):
    def arrow(old, new, error, name="regret", sense=-1):
        side = {
            s: {"sampled": {name: v, "standard_error": {name: error}}}
            for s, v in (("before", old), ("after", new))
        }
        return report._arrow(side, "sampled", name, sense)

    assert 'class="better"' in arrow(3.0, 1.0, 0.1) and "▼" in arrow(3.0, 1.0, 0.1)
    assert 'class="worse"' in arrow(1.0, 3.0, 0.1)
    assert 'class="better"' in arrow(0.1, 0.3, 0.01, "success", 1)
    assert 'class="same"' in arrow(1.0, 1.2, 0.1)
    assert 'class="changed"' in arrow(1.0, 2.0, 0.1, "questions_ambiguous", 0)
    assert arrow(None, 1.0, 0.1) == ""


# --- runs with parts missing --------------------------------------------------------------------------------


def test_unfinished_run(tmp_path):
    run = make_run(tmp_path / "run", finished=False, steps=2, dialogues=2)
    page = Page(report.write_report(run).read_text("utf-8"))
    assert "not finished" in page.text and "not run" in page.text and page.count("card") == 2


@pytest.mark.parametrize(
    "summary",
    [
        "",
        "[1, 2]",
        '{"before": 3, "after": [], "baselines": [], "seconds": "long"}',
        '{"before": {"greedy": {"success": "high", "asked": [1], "count": 0, "standard_error": null}}}',
        '{"after": {"sampled": {"success": 0.5}}, "baselines": {"guess": {"success": NaN}, "odd": 1}}',
        '{"models": {"simulator": {"model": ["m"]}, "expert": 3}}',
        '{"models": ["m"]}',
    ],
)
def test_any_summary_gives_a_page(tmp_path, summary):
    (tmp_path / "summary.json").write_text(summary)
    page = Page(report.write_report(tmp_path, tmp_path / "page.html").read_text("utf-8"))
    assert "No training step yet" in page.text and page.open == []


def test_page_names_the_models_that_answered(tmp_path):
    told = {"kind": "endpoint", "model": "org/<b>model", "prompt_hash": "0123456789abcdef"}
    (tmp_path / "summary.json").write_text(json.dumps({"models": {"simulator": told}}))
    page = Page(report.write_report(tmp_path, tmp_path / "page.html").read_text("utf-8"))
    assert "simulator org/<b>model, prompts 0123456789abcdef" in page.text


FIELDS = ["id", "turns", "frames", "images", "keyframe", "box", "point", "counts", "success", "mask"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        SCALARS | st.lists(st.floats(), max_size=5) | st.dictionaries(st.text(), st.text()),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_dialogue_is_drawn_or_refused(changes):
    turn = {"role": "assistant", "kind": "answer", "text": "<thinking></thinking>"}
    row = {
        "id": "a",
        "level": "simple",
        "query": "q",
        "turns": [turn],
        "frames": [],
        "images": {},
        "success": True,
    }
    try:
        dialogue = report._dialogue(row | changes)
    except report.DAMAGE:
        return
    page = Page(report._card(dialogue, dialogue, report.Path("/nowhere")))
    assert page.open == []


@given(st.text(max_size=300), st.integers(1, 40))
def test_clean_text_is_printable_and_short(text, limit):
    clean = report._clean(text, limit)
    assert len(clean) <= limit and clean.isprintable() and clean == clean.strip()
    clean.encode("utf-8")


@given(st.text(st.characters(codec="ascii", categories=["L", "Zs"]), max_size=120), st.integers(40, 300))
@settings(max_examples=40)
def test_wrapped_lines_fit(text, width):
    font = report._font(20)
    lines = report._wrap(text, font, width, 1000)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


# --- pictures and the command -------------------------------------------------------------------------------


def test_dialogue_sheet(tmp_path):
    before, after = (
        make_dialogue(tmp_path, 1, np.random.default_rng(0), trained) for trained in (False, True)
    )
    path = report.dialogue_sheet(before, after, tmp_path / "sheet.png", root=tmp_path)
    with Image.open(path) as image:
        assert image.width == 1680 and 600 < image.height < 4000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    for expected in (report.PREDICTION, report.LIGHT.before, report.LIGHT.after):
        assert report._rgb(expected) in colours
    long = after | {
        "query": "$" + "word " * 500,
        "turns": after["turns"] * 30,
        "box": [1e300, -5, 3, 1e9],
        "images": {},
    }
    report.dialogue_sheet(long, long, path, root=tmp_path)
    with pytest.raises(ValueError, match="no line of dialogues"):
        report.dialogue_sheet({}, after, path)


def test_images_stay_inside_the_run(tmp_path):
    save(tmp_path / "secret.png", np.full((4, 4, 3), 9, np.uint8))
    run = tmp_path / "run"
    save(run / "in.png", np.full((4, 4, 3), 9, np.uint8))
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "loop.png").symlink_to(run / "loop.png")
    (run / "cut.png").write_bytes((run / "in.png").read_bytes()[:40])
    assert np.asarray(report._open_image(run, "in.png", "RGB")).tolist() == np.full((4, 4, 3), 9).tolist()
    for name in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "loop.png",
        "cut.png",
        "",
        "\0",
        None,
    ):
        assert report._open_image(run, name, "RGB") is None


def test_command_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file() and not (tmp_path / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(tmp_path / "empty")],
        [str(tmp_path), "--out", "/no/where.html"],
    ):
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "empty/figures").exists()


def test_import_stays_light():
    code = "import sys, icseg_jax.report; print(*{'torch', 'jax', 'matplotlib.pyplot'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
