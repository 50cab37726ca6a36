"""ambiguate.py: what expressions say, which queries come of them, and the benchmark it writes of MeViS's layout."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_simulator import server  # noqa: F401 - a fixture

from icseg_jax import ambiguate, data, synthetic

SEED, COUNTS = 3, {"train": 4, "test": 2}


@pytest.mark.parametrize(("text", "noun", "values"), [
    ("The small blue circle that moves leftward", "circle", {"size": "small", "color": "blue", "motion": "leftward"}),
    ("segment the visible part of the cross", "cross", {}),
    ("two dogs walking to the left", "dog", {"motion": "leftward"}),
    ("dog on the left", "dog", {"position": "left"}),
    ("the man on the back of a horse", "man", {}),
    ("dog standing in front of the right car", "dog", {}),
    ("The left dog turns right", "dog", {"position": "left", "motion": "rightward"}),
    ("white dog with a red ball", "dog", {"color": "white"}),
    ("the elephant not moving", "elephant", {"motion": "still"}),
    ("a person without a black hat", "person", {}),
    ("People standing still", "person", {"motion": "still"}),
    ("the dog is still eating", "dog", {}),
    ("baby elephant following its mother", "elephant", {"age": "young"}),
    ("the baby", "baby", {"age": "young"}),
    ("the white building", "building", {"color": "white"}),
    ("the white one", "one", {"color": "white"}),
    ("moving left", "", {"motion": "leftward"}),
    ("one moving up", "", {"motion": "upward"}),
    ("which one is it?", "", {}),
    ("", "", {}),
    ("\u0000 \u4e2d\u6587 !", "", {}),
])
def test_what_expressions_say(text: str, noun: str, values: dict[str, str]) -> None:
    assert ambiguate.parse(text) == ambiguate.Said(noun, values)


def made(*expressions: tuple[str, str]) -> list[tuple]:
    return found([(text, ids.split()) for text, ids in expressions], {})


def found(expressions, seen) -> list[tuple]:
    queries = ambiguate.ambiguous(expressions, seen)
    return [(q.text, q.target, " ".join(q.candidates), q.level, q.max_count) for q in queries]


def test_words_are_dropped_until_two_match() -> None:
    pair = [("white dog", "1"), ("the black dog moving left", "2"), ("the cat", "3"), ("two dogs", "1 2")]
    assert made(*pair) == [("the dog", "1", "1 2", "simple", 1), ("the dog", "2", "1 2", "simple", 1)]
    # Of an animal nobody knows whether it is a dog (but dogs are animals); of a thing of no name nothing is known.
    assert made(*pair, ("the animal on the left", "4")) == [("the animal", "4", "1 2 3 4", "difficult", -1)]
    assert made(*pair, ("eating", "4")) == []
    assert len(made(*pair, ("the person", "4"))) == 2
    # Words that stay: two white ones, and the black one is none of them. Twins in what is known: -1.
    three = [("white dog", "1"), ("the white dog eating", "2"), ("black puppy", "3")]
    assert made(*three) == [("the white dog", "1", "1 2", "simple", -1), ("the white dog", "2", "1 2", "simple", -1)]
    assert made(("the cat", "1"), ("the dog", "2")) == [] == made(("two dogs", "1 2"))
    # What joins two is said of neither.
    assert made(("the dog", "1"), ("a dog and a cat", "1 2"), ("the kitten", "2")) == []


def test_what_a_model_saw_fills_what_is_open() -> None:
    pair = [("white dog", ["1"]), ("eating", ["2"])]
    assert found(pair, {}) == [] == found(pair, {"2": {"category": "cat"}})
    seen = {"1": {"category": "dog", "color": "black"}, "2": {"category": "Dogs", "color": "black", "size": "small"}}
    # What expressions say stands: the first one is white, so color tells them apart.
    assert found(pair, seen) == [("the dog", "1", "1 2", "simple", 1)]
    known = ambiguate.known_objects([("the animal", ["1"]), ("a cat", ["2"])], {
        "1": {"category": "dog", "description": "eats"}, "2": {"category": "dog", "color": "white"}})
    assert known["1"].nouns == {"animal", "dog"} and known["1"].texts == ["the animal", "eats"]
    assert known["2"].nouns == {"cat"} and known["2"].values == {"color": {"white"}}


def test_levels() -> None:
    many = [(f"the {color} car", str(i)) for i, color in enumerate(("red", "blue", "white", "black"))]
    assert {(q[3], q[4]) for q in made(*many[:3])} == {("medium", 1)}
    assert {(q[3], q[4]) for q in made(*many)} == {("difficult", 1)}
    directions = [("the car driving left", "1"), ("the car moving right", "2")]
    assert made(*directions)[0] == ("the car", "1", "1 2", "difficult", 1)  # motion alone tells them apart
    assert made(*directions, ("the red car", "1"), ("the blue car", "2"))[0][3] == "simple"
    both = [("small red car", "1"), ("small blue car", "2"), ("large red car", "3"), ("large blue car", "4")]
    assert [q[:4] for q in made(*both)] == [
        (f"the {size} car", str(i), "1 2" if size == "small" else "3 4", "simple")
        for i, size in enumerate(("small", "small", "large", "large"), 1)]
    assert ambiguate._questions([{"size": {s}, "color": {c}} for s in ("small", "large") for c in ("red", "blue")]) == 2


@pytest.fixture(scope="module")
def mevis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mevis") / "world"
    return synthetic.write_dataset(out, **COUNTS, seed=SEED, progress=False, layout="mevis")


def test_the_worlds_videos_become_a_benchmark(mevis: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert data.main(["ambiguate", "mevis", f"source={mevis}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "train: queries about" in printed and "; 0 refused" in printed and printed.endswith(f"{out}\n")
    total = 0
    for split, count in COUNTS.items():
        first, scenes = {}, {}
        for i in range(count):
            scene = synthetic.make_scene(i, seed=SEED, split=split)
            first[scene.id], scenes[scene.id] = sum(len(s.objects) for s in scenes.values()), scene
        rows = pq.read_table(out / f"{split}.parquet").to_pylist()
        samples = list(data.read_ambi_rvos(out, split, strict=True, decode=True))
        assert len(samples) == len(rows) > 0
        for sample in samples:
            total += 1
            scene, said = scenes[sample.meta["video"]], ambiguate.parse(sample.query)
            wanted = said.values | {"shape": said.noun}
            matching = [o for o in scene.objects if all(o.value(a) == v for a, v in wanted.items())]
            target = scene.object(int(sample.target_ids[0]) - first[scene.id] + 1)
            assert target in matching and sample.initial_count == len(matching) >= 2
            for p in (0, 11):
                assert (sample.masks(p) == synthetic.visible_masks(scene, p)[target.oid - 1]).all()
            values = [{a: o.value(a) for a in ("color", "size", "motion")} for o in matching]
            worst = synthetic.optimal_questions(values, ("color", "size", "motion"))[0]
            assert sample.max_count == (-1 if worst == float("inf") else worst)
            assert sample.ability == "difficult" or len(matching) == {"simple": 2, "medium": 3}[sample.ability]
            listed = json.loads(sample.privileged["all_target_path"].read_text())
            assert listed["query"] == sample.query and listed["target_oid"] == sample.target_ids[0]
            assert [int(c["oid"]) - first[scene.id] + 1 for c in listed["candidates"]] == [o.oid for o in matching]
            about = json.loads(sample.privileged["target_path"].read_text())
            assert about in listed["candidates"] and about["category"] == target.shape
            assert about["attributes"] == {"color": target.color, "size": target.size}
            assert about["motion"] == target.motion and synthetic._named(target) in about["description"]
            assert about["position_by_frame"]["0"] == target.value("column", 0)
            seen = data.decode_image(sample.privileged["visual_paths"][0]).astype(int)
            assert ((seen[..., 0] > 200) & (seen[..., 1:] < 90).all(-1)).any()  # the red contour, as a JPEG has it
        assert [s.id for s in samples] == [row["id"] for row in rows]
    assert total > 4


@pytest.fixture
def unclear(mevis: Path, tmp_path: Path) -> Path:
    """A set in which every expression is "the thing" but one a video."""
    root = Path(shutil.copytree(mevis, tmp_path / "mevis"))
    shutil.rmtree(root / "valid_u")
    table = json.loads((root / "train" / "meta_expressions.json").read_text())
    for video in table["videos"].values():
        for number, said in enumerate(video["expressions"].values()):
            said["exp"] = "the thing" if number else "the red circle"
    (root / "train" / "meta_expressions.json").write_text(json.dumps(table))
    return root


CIRCLE = '<output> {"category": "circle", "color": "red"} </output>'


def test_a_model_looks_at_what_expressions_leave_open(unclear: Path, tmp_path: Path, server, capsys) -> None:  # noqa: F811
    """A server that calls all things circles makes these many."""
    call = ["ambiguate", "mevis", f"source={unclear}", f"out={tmp_path}/out"]
    assert data.main(call) == 2 and "two objects that its expressions call the same" in capsys.readouterr().err
    about = {"category": "circle", "color": "red", "size": ["no"], "description": "<b>round</b> one"}
    server.says = lambda body: f"<thinking> hm </thinking><output> {json.dumps(about)} </output>"
    call += [f"url={server.url}", "model=m"]
    assert data.main(call) == 0
    assert " 0 in vain, 0 without an answer" in capsys.readouterr().out
    body = server.bodies[-1]
    kinds = [part["type"] for part in body["messages"][-1]["content"]]
    assert kinds == ["text", "image_url"] * 6 and '"color": ""' in body["messages"][0]["content"]
    samples = list(data.read_ambi_rvos(tmp_path / "out", "train", strict=True))
    assert samples and all(sample.query == "the red circle" and sample.initial_count >= 2 for sample in samples)
    listed = json.loads(samples[0].privileged["all_target_path"].read_text())["candidates"]
    assert all(c["attributes"] == {"color": "red"} and c["description"].endswith("round one") for c in listed)
    told = json.loads((tmp_path / "out" / "ambiguate.json").read_text())["model"]
    assert told["model"] == "m" and told["unreadable"] == 0 and len(told["prompt_hash"]) == 16
    # Again: nothing is asked; another server that is not there is one line, before anything is written.
    asked = len(server.bodies)
    shutil.rmtree(tmp_path / "out")
    assert data.main(call) == 0 and len(server.bodies) == asked + 1  # the check
    assert f"{told['asked']} known from before" in capsys.readouterr().out
    server.stop()
    shutil.rmtree(tmp_path / "out")
    assert data.main(call) == 2 and not (tmp_path / "out").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "no HTTP connection" in told


@pytest.mark.parametrize(("status", "which", "code", "part"), [
    (400, "one", 0, " refuses a question (HTTP 400: Error code: 400); it stays unanswered"),
    (400, "all", 2, "questions, of up to 6 pictures each; let its server take as many, or use another model"),
    (401, "one", 2, "the model did not answer about object"),
], ids=["one", "all", "the key"])
def test_a_question_that_is_refused(unclear: Path, tmp_path: Path, server, capsys, status: int,  # noqa: F811
                                    which: str, code: int, part: str) -> None:
    refused = []

    def says(body: dict) -> str | tuple:
        pictures = [p["image_url"]["url"] for p in body["messages"][-1]["content"] if p["type"] == "image_url"]
        if len(pictures) > 1 and (not refused or which == "all"):
            refused.append(pictures)
        return (status, "text/plain", "no") if pictures in refused else CIRCLE

    server.says = says
    call = ["ambiguate", "mevis", f"source={unclear}", f"out={tmp_path}/out", f"url={server.url}", "model=m"]
    assert data.main(call) == code
    out, err = capsys.readouterr()
    assert part in err and "left out" not in err and (tmp_path / "out").exists() == (code == 0)
    assert err.count("error: ") == (code == 2)
    if code == 0:
        assert " 1 without an answer" in out and "; 0 refused" in out
        samples = list(data.read_ambi_rvos(tmp_path / "out", "train", strict=True))
        assert samples and all(sample.query == "the red circle" for sample in samples)


@pytest.mark.parametrize("kind", ["write", "read"])
def test_a_full_disk_is_no_bad_video(mevis: Path, tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    """Nor are too many open files, which the reader of a picture says in words of its own."""
    copy, decode, done = shutil.copyfile, data.decode_image, []

    def full(source: Path, target: Path) -> None:
        if len(done) == 15:  # in the second video
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        done.append(copy(source, target))

    def no_more(source: Path, formats: tuple = ()) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source))

    def starved(source: Path) -> np.ndarray:
        with monkeypatch.context() as patch:
            if len(done) == 15:
                patch.setattr(data.Image, "open", no_more)
            done.append(source)
            return decode(source)

    monkeypatch.setattr(*(ambiguate.shutil, "copyfile", full) if kind == "write" else (data, "decode_image", starved))
    assert data.main(["ambiguate", "mevis", f"source={mevis}", f"out={tmp_path}/out"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: video ") and told.count("\n") == 1 and "mend it and run this again" in told
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_is_a_bad_video(mevis: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    copy, failed = shutil.copyfile, []

    def long(source: Path, target: Path) -> None:
        if not failed:
            failed.append(target)
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(target))
        copy(source, target)

    monkeypatch.setattr(ambiguate.shutil, "copyfile", long)
    assert data.main(["ambiguate", "mevis", f"source={mevis}", f"out={tmp_path}/out"]) == 0
    assert "; 1 refused" in capsys.readouterr().out


def test_a_refused_expression_leaves_its_video_out(mevis: Path, tmp_path: Path) -> None:
    """It may be the only one that names an object, which would then be missing among the candidates."""
    root = Path(shutil.copytree(mevis, tmp_path / "mevis"))
    file = root / "train" / "meta_expressions.json"
    table = json.loads(file.read_text())
    made = {s.meta["video"] for s in ambiguated(root, tmp_path / "before")}
    spoilt = sorted(made)[0]
    next(iter(table["videos"][spoilt]["expressions"].values()))["anno_id"] = [999]
    file.write_text(json.dumps(table))
    assert {s.meta["video"] for s in ambiguated(root, tmp_path / "after")} == made - {spoilt}


def ambiguated(root: Path, out: Path) -> list[data.Sample]:
    assert data.main(["ambiguate", "mevis", f"source={root}", f"out={out}"]) == 0
    return list(data.read_ambi_rvos(out, "train", strict=True))


def test_names_do_not_lead_out(mevis: Path, tmp_path: Path) -> None:
    """An annotation's id is the name of a folder in what is written."""
    root = Path(shutil.copytree(mevis, tmp_path / "mevis"))
    shutil.rmtree(root / "valid_u")
    folder = root / "train"
    table, masks = (json.loads((folder / n).read_text()) for n in ("meta_expressions.json", "mask_dict.json"))
    for video in table["videos"].values():
        for said in video["expressions"].values():
            said["anno_id"] = [f"../../../{id}" for id in said["anno_id"]]
    (folder / "meta_expressions.json").write_text(json.dumps(table))
    (folder / "mask_dict.json").write_text(json.dumps({f"../../../{id}": track for id, track in masks.items()}))
    with pytest.raises(data.DataError, match="no video of mevis in"):
        ambiguate.ambiguate("mevis", root, tmp_path / "out", progress=False)
    with pytest.raises(data.DataError, match="^video .* leaves the dataset folder"):
        ambiguate.ambiguate("mevis", root, tmp_path / "out", progress=False, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mevis"]


@pytest.mark.parametrize(("words", "part"), [
    ("prist source=. out=x", "'prist' does not say which expressions mean the same object; use one of mevis"),
    ("mevvis source=. out=x", "(did you mean 'mevis'?)"), ("mevis source=nowhere out=x", "no dataset folder nowhere"),
    ("mevis source=. out=x", "with a record in ."), ("mevis source=.", "needs out="),
    ("mevis source=. out=x endpoint=http://x", "ambiguate has no 'endpoint'"),
    ("mevis source=. out=x url=http://x", "needs model= too"), ("mevis source=. out=x model=m", "needs url= too"),
    ("mevis source=. out=x url=x model=m", "url: is no URL"),
    ("mevis source=. out=x url=http://me:hush@x model=m", "url: a URL is written into logs"),
    ("mevis source=. out=x url=http://x model=m timeout=0", "timeout=0 max_in_flight=8: both must be"),
])
def test_bad_input_is_one_line(words: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    assert data.main(["ambiguate", *words.split()]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and part in told and list(tmp_path.iterdir()) == []
    assert "hush" not in told


def test_a_folder_with_something_in_it_stays(mevis: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="ambiguate: .* exists already"):
        ambiguate.ambiguate("mevis", mevis, mevis, progress=False)
    with pytest.raises(data.DataError, match="test=valid: .* has the splits train, valid_u"):
        ambiguate.ambiguate("mevis", mevis, tmp_path / "out", test="valid")
