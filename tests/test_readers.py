"""readers.py: every dataset's layout, as the synthetic world writes it and as small files by hand do."""

import functools
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco

from icseg_jax import data, readers, synthetic

SEED = 3
TEST_SPLIT = {"mevis": "valid_u", "revos": "valid", "ref_youtube_vos": "valid", "ref_davis17": "valid",
              "reason_vos": "valid", "cocoa_cls": "val", "d2sa": "val"}  # else test
MUVA_KEYS = {"amodal_key": "amodal_mask", "visible_key": "modal_mask"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """layout -> its folder with two training and two test scenes, written once."""

    @functools.cache
    def write(layout: str) -> Path:
        out = tmp_path_factory.mktemp(layout) / "world"
        return synthetic.write_dataset(out, train=0 if layout == "reason_vos" else 2, test=2, seed=SEED,
                                       progress=False, layout=layout)

    return write


@pytest.fixture
def copied(world: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda layout: Path(shutil.copytree(world(layout), tmp_path / layout))


def read(name: str, root: Path, split: str, **keys: str) -> tuple[list[data.Sample], list[tuple[str, str]]]:
    refused: list[tuple[str, str]] = []
    samples = list(readers.read(name, root, split, decode=True, refused=refused, **keys))
    assert all("\n" not in reason and reason for _, reason in refused)
    return samples, refused


def scenes(split: str, level: str | None = None) -> dict[str, synthetic.Scene]:
    made = (synthetic.make_scene(i, seed=SEED, split=split, level=level) for i in range(2))
    return {scene.id: scene for scene in made}


def reason_of(name: str, root: Path, split: str, **keys: str) -> str:
    """Why the first record is refused."""
    return read(name, root, split, **keys)[1][0][1]


# --- the world in every layout: videos --------------------------------------------------------------------

VIDEOS = ["ok_vos", "mevis", "revos", "ref_youtube_vos", "ref_davis17_a", "ref_davis17_b", "long_rvos", "reason_vos"]


def said(name: str, query: str) -> str:
    """A sample's text as the scene says it."""
    if name.startswith("ref_davis17"):
        return query.rsplit(",", 1)[0]
    return query.removeprefix("which of them would you call ").removesuffix("?") if name == "reason_vos" else query


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in VIDEOS for split in ("train", "test")
                                             if (name, split) != ("reason_vos", "train")])  # which has only valid
def test_videos_read_as_they_were_made(world: Callable[[str], Path], name: str, split: str) -> None:
    layout = name.removesuffix("_a").removesuffix("_b")
    known = scenes(split, "clear" if name == "ok_vos" else None)
    theirs = split if split == "train" else TEST_SPLIT.get(layout, "test")
    samples = list(readers.read(name, world(layout), theirs, strict=True, decode=True))
    assert {s.meta["video"].split("/")[-1] for s in samples} == set(known)
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        scene = known[sample.meta["video"].split("/")[-1]]
        expressions = dict(synthetic._expressions(scene))
        oids = expressions[said(name, sample.query)]
        if name.startswith("ref_davis17"):  # of two alike ones, one
            assert int(sample.meta["object"]) in oids
            oids = (int(sample.meta["object"]),)
        assert (sample.dataset, sample.split, sample.kind, sample.size) == (name, theirs, "video", (128, 128))
        assert sample.frame_ids == [(5 if name == "ref_youtube_vos" else 1) * t for t in range(12)]
        picture = synthetic.render(scene, [7])[0].astype(int)
        assert abs(sample.image(7).astype(int) - picture).mean() < 4
        if (name, split) == ("ref_youtube_vos", "test"):
            assert sample.masks is None and sample.target_ids == []
            continue
        for p in (0, 7, 11):
            wanted = synthetic.visible_masks(scene, p)[[oid - 1 for oid in oids]].any(0)
            assert np.array_equal(sample.masks(p), wanted) and sample.masks(p).dtype == bool
            assert sample.ignore is None or not sample.ignore(p).any()
        assert len(sample.target_ids) == (len(oids) if name in ("mevis", "revos") else 1)


def test_what_the_video_sets_say_beside(world: Callable[[str], Path]) -> None:
    abilities = {s.ability for s in readers.read("long_rvos", world("long_rvos"), "train")}
    assert "hybrid" in abilities <= {"static", "dynamic", "hybrid"}
    abilities = {s.ability for s in readers.read("ok_vos", world("ok_vos"), "test")}
    assert abilities <= {"one-hop", "multi-hop", "relational"}
    for sample in readers.read("ref_davis17_a", world("ref_davis17"), "valid"):
        eid = int(sample.meta["expression"])
        assert sample.meta["annotator"] == eid % 4 and sample.meta["object"] == str(eid // 4 + 1)
    for sample in readers.read("revos", world("revos"), "train", strict=True):
        assert sample.ability == readers.REVOS_TYPES[sample.meta["type_id"]]
        assert (sample.initial_count == 0) == (sample.ability == "no_target") == (not sample.target_ids)
        scene = scenes("train")[sample.meta["video"].split("/")[-1]]
        foreground = readers.foreground_mask(sample.meta["foreground"][3], sample.size)
        assert np.array_equal(foreground, synthetic.visible_masks(scene, 3).any(0))
    assert not readers.foreground_mask(None, (4, 5)).any()
    rle = synthetic._rle(np.eye(4, dtype=bool))
    assert np.array_equal(readers.foreground_mask([rle, rle], (4, 4)), np.eye(4, dtype=bool))


def test_opening_is_lazy(copied: Callable[[str], Path]) -> None:
    root = copied("mevis")
    opening = readers.read("mevis", root, "train", refused=[])
    first = next(opening)
    shutil.rmtree(root / "train" / "JPEGImages")
    assert first.masks(3).shape == (128, 128)
    with pytest.raises(data.DataError, match="00000.jpg is missing"):
        first.image(0)
    assert all(s.meta["video"] == first.meta["video"] for s in opening)  # the other video's files are looked at now


# --- the world in every layout: images --------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_reason_seg_reads_as_it_was_made(world: Callable[[str], Path], split: str) -> None:
    samples = list(readers.read("reason_seg", world("reason_seg"), split, strict=True, decode=True))
    known = scenes(split)
    assert [s.id for s in samples] == sorted(known)
    for sample in samples:
        scene = known[sample.id]
        oids = [o.oid for o in scene.objects if sample.query == f"the {o.size} {o.color} {o.shape}"]
        if sample.query == scene.query:
            oids = scene.candidates
            assert "motion" not in scene.mentioned  # a still shows none
        whole = synthetic.complete_masks(known[sample.id], 0)
        wanted = whole[[oid - 1 for oid in oids]].any(0)
        # Polygons with their outline are a pixel or so wider than what was painted.
        assert (sample.masks(0) & wanted).sum() > 0.9 * wanted.sum() and sample.masks(0).sum() < 1.4 * wanted.sum()
        assert not (sample.masks(0) & sample.ignore(0)).any()
        assert sample.ignore(0).any() == (len(oids) < len(known[sample.id].objects))
        assert (sample.kind, sample.frame_ids, sample.ability) == ("image", [0], "short")


def test_prist_reads_as_it_was_made(world: Callable[[str], Path]) -> None:
    known = scenes("train")
    samples = list(readers.read("prist", world("prist"), "train", strict=True, decode=True))
    for sample, scene in zip(samples, known.values(), strict=True):
        (oid,) = (o.oid for o in scene.objects if synthetic._full_name(o) == sample.meta["focus"])
        wanted = synthetic.complete_masks(scene, 0)[oid - 1]
        assert (sample.masks(0) & wanted).sum() > 0.9 * wanted.sum() and sample.masks(0).sum() < 1.4 * wanted.sum()
        assert sample.query == "segment it" and sample.meta["answer"] == "it is [SEG]"
        assert [turn["role"] for turn in sample.dialogue] == ["user", "assistant"] * (len(sample.dialogue) // 2)
        assert 4 <= len(sample.dialogue) <= 10 and sample.id.endswith(".jpg#0")


def test_conversations_are_what_was_said_and_where_it_ends(world: Callable[[str], Path]) -> None:
    samples = list(readers.read("prist", world("prist"), "train", strict=True))
    for sample, scene in zip(samples, scenes("train").values(), strict=True):
        about = data.conversation(sample, [0])
        flat = [text for pair in about.rounds for text in pair]
        assert flat == [turn["text"] for turn in sample.dialogue] and about.query == sample.query
        (oid,) = (o.oid for o in scene.objects if synthetic._full_name(o) == sample.meta["focus"])
        truth = synthetic.scene_ground_truth(replace(scene, mask_type="amodal"), oid, [0])["0"]
        assert about.frame == 0 and np.abs(np.subtract(about.box, truth["bbox_2d"])).max() <= 16  # two pixels
        assert np.abs(np.subtract(about.point, truth["point_2d"])).max() <= 60
        hidden = replace(sample, masks=None)
        assert data.conversation(hidden, [0]) == replace(about, frame=None, box=None, point=None)
        nothing = data.conversation(replace(sample, initial_count=0), [0])
        assert (nothing.frame, nothing.box, nothing.point, nothing.rounds) == (-1, [0] * 4, [0] * 2, about.rounds)
        with pytest.raises(data.DataError, match="does not alternate"):
            data.conversation(replace(sample, dialogue=sample.dialogue[1:]), [0])
    query = next(readers.read("r2sm", world("r2sm"), "test"))
    alone = data.conversation(query, [0])
    whole = data.ground_truth({0: query.truth(0)})["0"]
    assert alone == data.Conversation([], query.query, None, 0, whole["bbox_2d"], whole["point_2d"])


def test_plain_talk_reads_as_it_was_made(world: Callable[[str], Path], tmp_path: Path) -> None:
    samples = list(readers.read("llava", world("llava"), "test", strict=True, decode=True))
    for i, (sample, scene) in enumerate(zip(samples, scenes("test").values(), strict=True)):
        rounds, _ = synthetic.conversation(scene, np.random.default_rng([SEED, 1, i, 2]), still=True)
        about = data.conversation(sample, [0])
        assert [*about.rounds, (about.query, about.answer)] == rounds[:-1] and about.frame is None
        assert sample.masks is None and sample.id == f"{scene.id}#0" and sample.size == (128, 128)
    picture(tmp_path / "train2017" / "1.jpg")
    talk = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A cup."}]
    entry = {"id": "1", "image": "1.jpg", "conversations": talk}
    write_json(tmp_path / "llava_instruct_150k.json", [
        entry, entry, entry | {"conversations": talk[:1]}, entry | {"image": "2.jpg"}, entry | {"image": "../1.jpg"},
        entry | {"conversations": [talk[0] | {"value": "<image>"}, talk[1]]}, 3])
    samples, refused = read("llava", tmp_path, "train")
    assert [(s.id, s.query, s.dialogue, s.meta["answer"]) for s in samples] == [
        (f"1#{i}", "What is it?", [], "A cup.") for i in range(2)]
    for (_, reason), part in zip(refused, ("alternate", "2.jpg is in none of", "leaves the dataset", "an empty turn",
                                           "its image is None"), strict=True):
        assert part in reason


@pytest.mark.parametrize(("name", "split"), [("r2sm", "train"), ("r2sm", "test"), ("cocoa_cls", "train"),
                                             ("cocoa_cls", "val"), ("d2sa", "val"), ("muva", "test")])
def test_complete_masks_read_as_they_were_made(world: Callable[[str], Path], name: str, split: str) -> None:
    keys = MUVA_KEYS if name == "muva" else {}
    samples = list(readers.read(name, world(name), split, strict=True, decode=True, **keys))
    known = scenes("train" if split == "train" else "test")
    hidden = 0
    for sample in samples:
        scene = known[Path(sample.meta["image"]).stem]
        frame = int(scene.visible.sum(0).argmin())
        seen, whole = synthetic.visible_masks(scene, frame), synthetic.complete_masks(scene, frame)
        row = next(i for i in range(len(seen)) if np.array_equal(sample.amodal_masks(0), whole[i]))
        assert np.array_equal(sample.masks(0), seen[row])
        assert np.array_equal(sample.truth(0), (whole if sample.mask_type == "amodal" else seen)[row])
        assert sample.meta["occlude_rate"] == pytest.approx(1 - scene.visible[row, frame])
        assert (sample.mask_type == "amodal") == ("whole" in sample.query)
        assert scene.objects[row].shape == sample.meta["category"] and sample.meta["category"] in sample.query
        hidden += sample.meta["occlude_rate"] > 0
        if name != "r2sm":
            assert sample.initial_count == sum(o.shape == sample.meta["category"] for o in scene.objects)
    assert {s.mask_type for s in samples} == {"modal", "amodal"} and len(samples) > 3
    if name != "r2sm":
        assert len(samples) == 2 * sum(len(scene.objects) for scene in known.values())


# --- RLE and polygons -------------------------------------------------------------------------------------


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_rle_is_pycocotools_rle(mask: np.ndarray) -> None:
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    column = mask.T.ravel()
    changes = np.flatnonzero(np.diff(column.astype(int), prepend=0)).tolist()
    counts = np.diff([0, *changes, mask.size]).tolist()
    for given_counts in (code["counts"], code["counts"].decode(), counts):
        decoded = readers.decode_rle({"size": list(mask.shape), "counts": given_counts}, mask.shape)
        assert np.array_equal(decoded, mask) and decoded.dtype == bool


def test_rle_of_a_large_mask() -> None:
    mask = np.random.default_rng(0).random((480, 854)) < 0.3
    mask[:, :400] = False  # one run of more than 2**16
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert np.array_equal(readers.decode_rle(code, (480, 854)), mask)


@given(st.binary(max_size=30) | st.text(max_size=30) | st.lists(st.integers(-5, 80), max_size=6))
def test_rle_never_reads_beyond(counts: bytes | str | list[int]) -> None:
    try:
        mask = readers.decode_rle({"size": [8, 9], "counts": counts}, (8, 9))
    except data.DataError as error:
        assert "\n" not in str(error)
    else:
        assert mask.shape == (8, 9)


@pytest.mark.parametrize("rle", [None, 3, [], {}, {"size": [4, 4]}, {"size": [4, 5], "counts": [20]},
                                 {"size": [4, 4], "counts": [15]}, {"size": [4, 4], "counts": [17]},
                                 {"size": [4, 4], "counts": [20, -4]}, {"size": [4, 4], "counts": [16.0]},
                                 {"size": [4, 4], "counts": ""}, {"size": [4, 4], "counts": "P"},
                                 {"size": [4, 4], "counts": "oooooooooooo0"}, {"size": [4, 4], "counts": None}])
def test_rle_refuses(rle: Any) -> None:
    with pytest.raises(data.DataError):
        readers.decode_rle(rle, (4, 4))


def test_segmentations() -> None:
    square = [2, 3, 8, 3, 8, 9, 2, 9]
    wanted = np.zeros((12, 10), bool)
    wanted[3:9, 2:8] = True
    assert np.array_equal(readers.decode_segmentation([square], (12, 10)), wanted)
    assert np.array_equal(readers.decode_segmentation([square, [1, 1, 2, 2], [0, 0, 1]], (12, 10)), wanted)
    rle = synthetic._rle(wanted)
    assert np.array_equal(readers.decode_segmentation(rle, (12, 10)), wanted)
    corner = np.zeros((12, 10), bool)
    corner[0, 0] = True
    assert np.array_equal(readers.decode_segmentation([rle, synthetic._rle(corner)], (12, 10)), wanted | corner)
    for bad in (None, [], "x", [[1, 2]], [[0, 0, 1, 1, 1e9, 0]], [[0, 0, 1, 1, None, 0]], [[0, 0, 1, 1, True, 0]],
                [[0, 0, 1, 1, float("nan"), 0]]):
        with pytest.raises(data.DataError):
            readers.decode_segmentation(bad, (12, 10))


def test_shapes_are_drawn_with_their_outline_and_over_each_other() -> None:
    mask = readers.draw_shapes([([[2.9, 3.9], [8, 3], [8, 9], [2, 9]], 1), ([[8, 9], [9, 9], [9, 11]], 255)], (12, 10))
    assert (mask[3:10, 2:9] == 1).sum() == 48 and mask[9, 8] == 255  # 7 x 7, one corner covered
    assert (mask == 255).sum() == 5
    assert readers.draw_shapes([([[1, 1]], 1)], (4, 4)).sum() == 1
    for bad in (None, [], [[1]], [[1, 2, 3]], [[1, "2"]], [1, 2], [[1, 10**9]]):
        with pytest.raises(data.DataError):
            readers.draw_shapes([(bad, 1)], (12, 10))


# --- small files by hand: images --------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (12, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 30)).save(path)


def write_json(path: Path, content: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))


BIG, SMALL = [[0, 0], [9, 0], [9, 11], [0, 11]], [[3, 3], [6, 3], [6, 6], [3, 6]]


def test_reason_seg_by_hand(tmp_path: Path) -> None:
    picture(tmp_path / "val" / "a.jpg")
    about = {"text": ["the caf\u00e9 door", "another"], "is_sentence": True, "shapes": [
        {"label": "ignore region", "points": SMALL}, {"label": "Target", "points": BIG},
        {"label": "FLAG", "points": BIG}]}
    write_json(tmp_path / "val" / "a.json", about, "cp1252")
    (sample,), refused = read("reason_seg", tmp_path, "val")
    assert refused == [] and (sample.query, sample.ability) == ("the caf\u00e9 door", "long")
    assert sample.ignore(0).sum() == 16 and sample.masks(0).sum() == 120 - 16  # the larger one is drawn first
    bad = {"no json": ("b", b"{"), "no text": ("c", about | {"text": []}), "no shapes": ("d", about | {"shapes": None}),
           "no target": ("e", about | {"shapes": about["shapes"][:1]}), "no label": ("f", about | {"shapes": [{}]}),
           "points": ("g", about | {"shapes": [{"label": "target", "points": [[1, None]]}]}),
           "no picture": ("h", about)}
    for stem, content in bad.values():
        if stem != "h":
            picture(tmp_path / "val" / f"{stem}.jpg")
        path = tmp_path / "val" / f"{stem}.json"
        path.write_bytes(content) if isinstance(content, bytes) else write_json(path, content)
    samples, refused = read("reason_seg", tmp_path, "val")
    assert len(samples) == 1 and [id for id, _ in refused] == list("bcdefgh")
    for (_, reason), part in zip(refused, ("is no JSON", "its text", "its shapes", "none of its shapes", "its label",
                                           "coordinate None", "h.jpg is missing"), strict=True):
        assert part in reason


def prist_entry(**changes: Any) -> dict:
    turns = [("human", "What is it?"), ("gpt", "A cup."), ("human", "Please segment it."), ("gpt", "[SEG]")]
    return {"img_id": "0a1b.jpg", "focus": "cup", "dialogue": [{"from": who, "value": text} for who, text in turns]
            } | changes


@pytest.mark.parametrize(("images", "masks"), readers.PRIST_FOLDERS)
def test_prist_by_hand(tmp_path: Path, images: str, masks: str) -> None:
    picture(tmp_path / images / "0a1b.jpg")
    table = tmp_path / ("processed_val_02.json" if images == "val" else "val.json")  # the authors' name of it
    write_json(table, [prist_entry(), prist_entry()])
    samples, _ = read("prist", tmp_path, "val")
    assert [s.id for s in samples] == ["0a1b.jpg#0", "0a1b.jpg#1"] and samples[0].masks is None
    assert samples[0].query == "Please segment it." and samples[0].meta["answer"] == "[SEG]"
    assert samples[0].dialogue == [{"role": "user", "text": "What is it?"}, {"role": "assistant", "text": "A cup."}]
    shapes = [{"label": "the CUPs", "points": SMALL}, {"label": "a cup\u2019s rim", "points": [[0, 0], [1, 0]]},
              {"label": "saucer", "points": BIG}]
    write_json(tmp_path / masks / "0a1b.json", {"imageHeight": 12, "imageWidth": 10, "shapes": shapes}, "cp1252")
    assert read("prist", tmp_path, "val")[0][0].masks(0).sum() == 16 + 2  # a part of the label, in any case
    bad = {"focus": "plate", "img_id": "../x.jpg"}
    write_json(table, [prist_entry(**{k: v}) for k, v in bad.items()] + [
        prist_entry(img_id="0a1c.jpg"), prist_entry(focus=" "), prist_entry(dialogue=[]),
        prist_entry(dialogue=prist_entry()["dialogue"][:3]), prist_entry(dialogue=[{"from": "human"}] * 2),
        prist_entry(dialogue=[{"from": "human", "value": "Segment it."}, {"from": "gpt", "value": " "}]), 7])
    samples, refused = read("prist", tmp_path, "val")
    assert samples == []
    for (_, reason), part in zip(refused, ("labelled 'plate'", "leaves the dataset folder", "0a1c.jpg is in none of",
                                           "focus is empty", "alternate", "alternate", "its value is None",
                                           "holds an empty turn",
                                           "its img_id is None"), strict=True):
        assert part in reason
    write_json(tmp_path / masks / "0a1b.json", {"imageHeight": 10, "imageWidth": 12, "shapes": shapes})
    write_json(table, [prist_entry()])
    assert "is for 10x12 pixels, its image has 12x10" in reason_of("prist", tmp_path, "val")
    (tmp_path / masks / "0a1b.json").unlink()
    assert "0a1b.json is missing" in reason_of("prist", tmp_path, "val")


def test_prist_takes_the_image_that_has_a_mask(tmp_path: Path) -> None:
    """Of those with one name: test images may also be TextCaps's."""
    for folder, width in (("textcaps/train", 20), ("images", 10)):
        picture(tmp_path / folder / "0a1b.jpg", (12, width))
    write_json(tmp_path / "test.json", [prist_entry()])
    (sample,), _ = read("prist", tmp_path, "test")
    assert sample.masks is None
    (tmp_path / "masks").mkdir()
    assert "/masks/0a1b.json is missing" in reason_of("prist", tmp_path, "test")  # it is not hidden
    (tmp_path / "textcaps" / "masks").mkdir()
    shapes = [{"label": "cup", "points": SMALL}]
    write_json(tmp_path / "masks" / "0a1b.json", {"imageHeight": 12, "imageWidth": 10, "shapes": shapes})
    (sample,), refused = read("prist", tmp_path, "test")
    assert refused == [] and sample.frames == [tmp_path / "images" / "0a1b.jpg"] and sample.masks(0).sum() == 16
    shutil.rmtree(tmp_path / "masks")
    assert "/textcaps/masks/0a1b.json is missing" in reason_of("prist", tmp_path, "test")


REF = {"ref_id": 7, "ann_id": 11, "category_id": 1, "image_id": 5, "split": "testA", "sent_ids": [70, 71],
       "file_name": "COCO_train2014_000000000005_11.jpg", "sentences": [
           {"raw": "The Left One", "sent": "the left one ", "sent_id": 70, "tokens": ["the", "left", "one"]},
           {"raw": "caf\u00e9", "sent": "caf\u00e9", "sent_id": 71, "tokens": []}]}


def refcoco(root: Path, refs: Any, protocol: int = 2, folder: str = "refcoco", by: str = "unc") -> None:
    picture(root / "images" / "mscoco" / "images" / "train2014" / "COCO_train2014_000000000005.jpg")
    crowd = {"size": [12, 10], "counts": [0, 12, 108]}
    write_json(root / folder / "instances.json", {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg", "height": 12, "width": 10}],
        "annotations": [{"id": 11, "image_id": 5, "category_id": 1, "segmentation": [[2, 3, 8, 3, 8, 9, 2, 9]]},
                        {"id": 12, "image_id": 5, "category_id": 1, "segmentation": crowd, "iscrowd": 1},
                        {"id": 13, "image_id": 5, "category_id": 2, "segmentation": []},
                        {"id": 14, "image_id": 6, "category_id": 2, "segmentation": crowd}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "cup"}]})
    (root / folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_refcoco(tmp_path: Path, protocol: int) -> None:
    refcoco(tmp_path, [REF, REF | {"ref_id": 8, "split": "train"}, REF | {"ref_id": 9, "ann_id": 12}], protocol)
    samples, refused = read("refcoco_unc", tmp_path, "testA")
    assert refused == [] and [s.id for s in samples] == ["7/70", "7/71", "9/70", "9/71"]
    assert [s.query for s in samples[:2]] == ["the left one", "caf\u00e9"]  # each sentence is a sample
    assert samples[0].masks(0).sum() == 36 and samples[2].masks(0)[:, 0].all() and samples[2].masks(0).sum() == 12
    assert samples[0].meta | {"image": ""} == {"image": "", "ref_id": 7, "category": "person", "same_category": 2}
    assert readers.splits_of("refcoco_unc", tmp_path) == ["train", "val", "testA", "testB"]


def test_refcoco_of_python_2(tmp_path: Path) -> None:
    refcoco(tmp_path, [], folder="refcoco+")
    # [{'split': 'val', 'ref_id': 7, ..., 'sent': 'caf\xe9'}] as Python 2 wrote byte texts, protocol 0
    table = (b"(lp0\n(dp1\nS'split'\np2\nS'val'\np3\nsS'ref_id'\np4\nI7\nsS'ann_id'\np5\nL11L\nsS'image_id'\np6\nI5\ns"
             b"S'sentences'\np7\n(lp8\n(dp9\nS'sent'\np10\nS'caf\\xe9'\np11\nsS'sent_id'\np12\nI70\nsasa.")
    (tmp_path / "refcoco+" / "refs(unc).p").write_bytes(table)
    (sample,), refused = read("refcocoplus_unc", tmp_path, "val")
    assert refused == [] and sample.query == "caf\u00e9" and sample.dataset == "refcocoplus_unc"


class Hostile:
    def __reduce__(self) -> tuple:
        return print, ("run",)


@pytest.mark.parametrize("content", [
    pickle.dumps([Hostile()]), pickle.dumps([np.float64(1)]), pickle.dumps({1}, 5)[:-3], b"",
    b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"(S'a'\nios\nsystem\n.", b"Pid\n.", b"\x82\x01.", b"garbage",
    pickle.dumps({"a": 1}), pickle.dumps([1])])
def test_a_pickle_runs_nothing(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture) -> None:
    refcoco(tmp_path, [])
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        readers.read("refcoco_unc", tmp_path, "val")
    assert "\n" not in str(caught.value) and "refs(unc).p" in str(caught.value) and capsys.readouterr().out == ""


def test_refcoco_refuses(tmp_path: Path) -> None:
    bad = {"ann_id": (99, "no annotation 99"), "image_id": (6, "no image 6"), "sentences": ([], "its sentences are []")}
    refs = [REF | {"ref_id": i, key: value} for i, (key, (value, _)) in enumerate(bad.items())]
    refs += [REF | {"ref_id": 20, "ann_id": 13}, REF | {"ref_id": 21, "sentences": [{"sent": " "}]}, REF,
             REF, REF | {"ref_id": 22, "ann_id": None}, REF | {"ref_id": None}]
    refcoco(tmp_path, refs)
    samples, refused = read("refcoco_unc", tmp_path, "testA")
    reasons = dict(refused)
    assert [s.id for s in samples] == ["7/70", "7/71"] and "neither an RLE nor" in reasons["20/70"]
    assert "no annotation 99" in reasons["0/70"] and "no image 6" in reasons["1/71"] and "[]" in reasons["2"]
    assert "its sent is empty" in reasons["21/0"] and "earlier record" in reasons["7/70"]
    assert "its ann_id is None" in reasons["22/70"] and "its ref_id is None" in reasons["ref number 8"]
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(data.DataError, match="train2014 is looked for in train2014, images/train2014"):
        readers.read("refcoco_unc", tmp_path, "testA")


def test_refcoco_refuses_what_could_not_be_written(tmp_path: Path) -> None:
    """Nested too deep or too often for repr, a number too long for one, or nothing that JSON holds."""
    often: Any = []
    for _ in range(50):
        often = [often] * 10
    odd = ["DEEP", often, 10**5000, b"7", {7}]
    refcoco(tmp_path, [REF, *(REF | {"ref_id": value} for value in odd),
                       *(REF | {"ref_id": 100 + i, "sentences": {"a": value}} for i, value in enumerate(odd)),
                       REF | {"ref_id": 200, "sentences": [{"sent": value, "sent_id": value} for value in odd[1:]]}], 4)
    table = tmp_path / "refcoco" / "refs(unc).p"
    head, tail = table.read_bytes().split(b"\x8c\x04DEEP")  # pickle itself writes no list as deep as it reads
    table.write_bytes(head + b"]" * 100_000 + b"a" * 99_999 + tail)
    told = [words for words, _ in data._records_job("refcoco_unc", str(tmp_path), "testA", {}, 0, 1)]
    assert [words["id"] for words in told] == [
        "7/70", "7/71", *(f"ref number {i}" for i in range(1, 6)), *(str(i) for i in range(100, 105)),
        *(f"200/{i}" for i in range(4))]
    for words, part in zip(told[2:], ["its ref_id is "] * 5 + ["its sentences are {"] * 5 + ["its sent is "] * 4,
                           strict=True):
        assert part in words["reason"] and len(words["reason"]) < 200
    assert "its ref_id is [[[[...]]]]," in told[2]["reason"] and "a huge number" in told[4]["reason"]


def test_complete_masks_by_hand(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    whole, half = [[2, 3, 8, 3, 8, 9, 2, 9]], [[2, 3, 5, 3, 5, 9, 2, 9]]
    rest = synthetic._rle(readers.decode_segmentation(whole, (12, 10)) & ~readers.decode_segmentation(half, (12, 10)))
    everything = synthetic._rle(readers.decode_segmentation(whole, (12, 10)))
    plain = {"image_id": 1, "category_id": 4, "segmentation": whole}
    table = {"images": [{"id": 1, "file_name": "a.jpg", "height": 12, "width": 10}],
             "categories": [{"id": 4, "name": "soda_can"}],
             "annotations": [plain | {"id": 1}, plain | {"id": 2, "visible_mask": half},
                             plain | {"id": 3, "invisible_mask": rest}, plain | {"id": 4, "invisible_mask": everything},
                             plain | {"id": 5, "category_id": 9}, plain, 3]}
    write_json(tmp_path / "annotations" / "D2S_amodal_augmented.json", table)
    samples, refused = read("d2sa", tmp_path, "augmented")
    assert [(s.masks(0).sum(), s.amodal_masks(0).sum()) for s in samples[::2]] == [(36, 36), (18, 36), (18, 36)]
    assert samples[2].query == "segment the visible part of the soda can" and samples[2].meta["occlude_rate"] == 0.5
    assert [id for id, _ in refused] == ["4/modal", "4/amodal", "5/modal", "5/amodal", "annotation number 5",
                                         "annotation number 6"]
    assert "nothing of it can be seen" in refused[0][1] and "no category 9" in refused[2][1]
    table["images"][0]["height"] = 11
    write_json(tmp_path / "annotations" / "D2S_amodal_augmented.json", table)
    assert "is for 11x10 pixels" in reason_of("d2sa", tmp_path, "augmented")
    with pytest.raises(data.DataError, match="d2sa has no 'visible_key'"):
        readers.read("d2sa", tmp_path, "augmented", visible_key="x")


def test_r2sm_refuses(copied: Callable[[str], Path]) -> None:
    root = copied("r2sm")
    path = root / "test_queries.json"
    entries = json.loads(path.read_text())
    line = synthetic._rle(np.eye(128, dtype=bool))
    for entry, (key, value) in zip(entries, {"query": "", "mask_type": "whole", "image_path": "../a.jpg",
                                             "visible_rle": None, "segmentation_rle": line}.items(), strict=False):
        entry[key] = value
    write_json(path, [*entries, [], entries[-1]])
    refused = [reason for _, reason in read("r2sm", root, "test")[1]]
    for reason, part in zip(refused, ("query is empty", "use one of modal, amodal", "leaves the dataset folder",
                                      "its segmentation is None", "its segmentation_rle is not its modal mask",
                                      "its query is None", "earlier record"), strict=True):
        assert part in reason


# --- small files by hand: videos --------------------------------------------------------------------------

STEMS = ["clip_00012", "clip_00013"]


def davis(root: Path, expressions: dict[str, dict], **masks: np.ndarray) -> None:
    for stem in STEMS:
        picture(root / "valid" / "JPEGImages" / "kite" / f"{stem}.jpg")
    for stem, values in masks.items():
        path = root / "valid" / "Annotations" / "kite" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(list(range(256)) * 3)
        image.save(path)
    write_json(root / "meta_expressions" / "valid" / "meta_expressions.json",
               {"videos": {"kite": {"frames": STEMS, "expressions": expressions}}})


def test_davis_by_hand(tmp_path: Path) -> None:
    values = np.zeros((12, 10))
    values[:2], values[2:5], values[11] = 1, 2, 255
    expressions = {str(i): {"exp": f"thing {i}", "obj_id": str(i // 4 + 1)} for i in range(11)}
    davis(tmp_path, expressions, clip_00012=values, clip_00013=np.zeros((12, 10)))
    samples, refused = read("ref_davis17_a", tmp_path, "valid")
    assert len(samples) == 11 and refused == [] and samples[0].frame_ids == [12, 13]
    assert samples[3].masks(0).sum() == 20 and samples[4].masks(0).sum() == 30 and not samples[8].masks(0).any()
    assert samples[3].ignore(0).sum() == 10 and not samples[3].masks(1).any()

    with pytest.raises(data.DataError, match="no mask_dict.json, which"):
        readers.read("ref_davis17_b", tmp_path, "valid")
    rows = [np.zeros((12, 10), bool) for _ in range(11)]
    for i in range(11):
        rows[i][i] = True
    in_order = sorted(expressions)  # "0", "1", "10", "2" ...
    mask_dict = {str(n): [coco.encode(np.asfortranarray(rows[int(eid)].astype(np.uint8))), None]
                 for n, eid in enumerate(in_order)}  # counts are bytes, as pycocotools gives them
    (tmp_path / "valid" / "mask_dict.pkl").write_bytes(pickle.dumps(mask_dict))
    with pytest.raises(data.DataError, match="if you trust it, write it as JSON") as told:
        readers.read("ref_davis17_b", tmp_path, "valid")
    command = str(told.value).partition("python -c ")[2].strip("'")
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path / "valid", check=True)
    samples, refused = read("ref_davis17_b", tmp_path, "valid")
    assert refused == [] and all(s.masks(0)[i].all() and s.masks(0).sum() == 10 for i, s in enumerate(samples))
    assert not samples[0].masks(1).any() and samples[0].ignore is None
    write_json(tmp_path / "valid" / "mask_dict.json", {"0": [None], "1": [{"size": [10, 12], "counts": [120]}, None]})
    samples, refused = read("ref_davis17_b", tmp_path, "valid")
    reasons = dict(refused)
    assert "has 1 entries, its video 2 frames" in reasons["kite/0"] and "its frame 12x10" in reasons["kite/1"]
    assert "no annotation 2" in reasons["kite/10"]


def test_palettes_refuse(tmp_path: Path) -> None:
    davis(tmp_path, {"0": {"exp": "a kite", "obj_id": "1"}}, clip_00012=np.ones((12, 10)))
    masks = tmp_path / "valid" / "Annotations" / "kite"
    assert "clip_00013.png is missing" in reason_of("ref_davis17_a", tmp_path, "valid")
    Image.new("P", (12, 10)).save(masks / "clip_00013.png")
    assert "clip_00013.png is 10x12, its frame 12x10" in reason_of("ref_davis17_a", tmp_path, "valid")
    Image.new("RGB", (10, 12)).save(masks / "clip_00013.png")
    assert "holds no object indices" in reason_of("ref_davis17_a", tmp_path, "valid")
    (masks / "clip_00013.png").write_bytes(b"nothing")
    assert "cannot be read as an image" in reason_of("ref_davis17_a", tmp_path, "valid")
    for eid, obj_id, part in (("0", "0", "1 to 254"), ("0", "255", "1 to 254"), ("0", None, "its obj_id"),
                              ("0", True, "its obj_id"), ("x", "1", "4 * object + annotator"),
                              ("\u0663", "1", "4 * object + annotator")):
        davis(tmp_path, {eid: {"exp": "a kite", "obj_id": obj_id}})
        assert part in reason_of("ref_davis17_a", tmp_path, "valid")


def test_youtube_valid_is_without_the_videos_of_test(copied: Callable[[str], Path]) -> None:
    root = copied("ref_youtube_vos")
    before, _ = read("ref_youtube_vos", root, "valid")
    videos = sorted({s.meta["video"] for s in before})
    write_json(root / "meta_expressions" / "test" / "meta_expressions.json", {"videos": {videos[0]: {}}})
    after, refused = read("ref_youtube_vos", root, "valid")
    assert {s.meta["video"] for s in after} == set(videos[1:]) and refused == []


def test_hidden_labels(copied: Callable[[str], Path]) -> None:
    root = copied("mevis")
    shutil.move(root / "valid_u", root / "valid")
    (root / "valid" / "mask_dict.json").unlink()
    samples, refused = read("mevis", root, "valid")
    assert samples and refused == [] and all(s.masks is None and s.target_ids == [] for s in samples)
    root = copied("long_rvos")
    shutil.rmtree(root / "test" / "Annotations")
    samples, refused = read("long_rvos", root, "test")
    assert samples and refused == [] and all(s.masks is None for s in samples)


@pytest.mark.parametrize("name, label", [("mevis", "mask_dict.json"), ("long_rvos", "Annotations")])
def test_labels_that_nobody_hides_are_missing(copied: Callable[[str], Path], name: str, label: str) -> None:
    """Of a training split: it would teach nothing, in silence."""
    root = copied(name)
    shutil.move(root / "train" / label, root / "elsewhere")
    with pytest.raises(data.DataError, match=label):
        read(name, root, "train")


def changed(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


BAD_VIDEOS = {
    "no expressions": ("mevis", "valid_u", "", None, "its expressions are None"),
    "exp": ("mevis", "valid_u", "exp", " ", "its exp is empty"),
    "half a letter": ("mevis", "valid_u", "exp", "\\ud800", "no proper text"),
    "no target": ("mevis", "valid_u", "anno_id", [], "it has no target"),
    "anno_id": ("mevis", "valid_u", "anno_id", "7", "not a list of numbers"),
    "anno_id of lists": ("mevis", "valid_u", "anno_id", [[]], "not a list of numbers"),
    "anno_id unknown": ("mevis", "valid_u", "anno_id", [999], "mask_dict has no annotation 999"),
    "type_id": ("revos", "valid", "type_id", 3, "not 0, 1 or 2"),
    "type_id true": ("revos", "valid", "type_id", True, "not 0, 1 or 2"),
    "type_id against anno_id": ("revos", "valid", "anno_id", [], "but its anno_id is empty"),
    "type": ("long_rvos", "test", "type", 3, "static, dynamic or hybrid"),
    "obj_id outside": ("long_rvos", "test", "obj_id", "../1", "leaves the dataset folder"),
    "obj_id unknown": ("long_rvos", "test", "obj_id", 99, "/99 is missing"),
    "obj_id of ReasonVOS": ("reason_vos", "valid", "obj_id", 99, "_99 is missing"),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_bad_expressions_are_refused_and_the_rest_is_read(copied: Callable[[str], Path], case: str) -> None:
    name, split, key, value, part = BAD_VIDEOS[case]
    root = copied(name)
    table = {"revos": root / "meta_expressions_valid_.json", "reason_vos": root / "meta_expressions.json"}.get(
        name, root / split / "meta_expressions.json")
    whole, _ = read(name, root, split)

    def spoil(content: dict) -> None:
        video = next(iter(content["videos"].values()))
        if not key:
            video["expressions"] = value
        else:
            first = next(e for e in video["expressions"].values() if e.get("type_id") != 2)
            first[key] = value

    changed(table, spoil)
    if case == "half a letter":  # written as an escape, which is how it gets into a file
        table.write_text(table.read_text().replace("\\\\ud800", "\\ud800"))
    samples, refused = read(name, root, split)
    assert part in refused[0][1] and 0 < len(samples) < len(whole)
    with pytest.raises(data.DataError, match="^record .* of "):
        list(readers.read(name, root, split, strict=True))
    with pytest.warns(UserWarning, match="left out"):
        list(readers.read(name, root, split))


def test_frames_and_masks_that_do_not_fit(copied: Callable[[str], Path]) -> None:
    root = copied("long_rvos")
    (sample, *_), _ = read("long_rvos", root, "test")
    frame, id = sample.frames[3], sample.target_ids[0]
    mask = root / "test" / "Annotations" / sample.meta["video"] / id / "00003.png"
    Image.new("L", (64, 64)).save(mask)
    assert "64x64, its frame 128x128" in reason_of("long_rvos", root, "test")
    Image.new("L", (128, 128), 1).save(mask)
    assert "values 0 and 255" in reason_of("long_rvos", root, "test")
    mask.unlink()  # not visible there
    assert not read("long_rvos", root, "test")[0][0].masks(3).any()
    frame.unlink()
    assert "00003.jpg is missing" in reason_of("long_rvos", root, "test")
    shutil.rmtree(frame.parent)
    assert "is missing" in reason_of("long_rvos", root, "test")
    shutil.rmtree(root / "test" / "JPEGImages")
    with pytest.raises(data.DataError, match="no folder .*JPEGImages"):
        readers.read("long_rvos", root, "test")


def test_frames_without_a_mask_are_not_scored_in_reason_vos(copied: Callable[[str], Path]) -> None:
    """Its scorer goes through the mask files."""
    root = copied("reason_vos")
    (before, *_), _ = read("reason_vos", root, "valid")
    folder = next(f for f in (root / "Annotations").iterdir()
                  if f.name.lower().endswith(f"_{before.meta['video']}_{before.target_ids[0]}".lower()))
    (folder / f"{before.frame_names[3]}.png").unlink()
    (after, *_), refused = read("reason_vos", root, "valid")
    assert not refused and after.meta["labelled"] == [p for p in range(len(after)) if p != 3]
    assert not after.masks(3).any()
    assert all((after.masks(p) == before.masks(p)).all() for p in after.meta["labelled"])
    for file in folder.iterdir():
        file.unlink()
    assert reason_of("reason_vos", root, "valid").endswith("holds no mask of a frame")


LINKS = [("ok_vos", "test", "test"), ("ok_vos", "test", "test.parquet"),
         ("mevis", "valid_u", "valid_u/JPEGImages"), ("mevis", "valid_u", "valid_u"),
         ("mevis", "valid_u", "valid_u/mask_dict.json"), ("long_rvos", "test", "test/Annotations"),
         ("ref_davis17_a", "valid", "valid/Annotations"), ("reason_vos", "valid", "Annotations"),
         ("reason_seg", "test", "test"), ("prist", "test", "images"), ("prist", "test", "masks"),
         ("r2sm", "test", "images"), ("cocoa_cls", "val", "val2014"), ("d2sa", "val", "annotations")]


@pytest.mark.parametrize(("name", "split", "link"), LINKS)
def test_links_do_not_lead_out(copied: Callable[[str], Path], tmp_path: Path, name: str, split: str, link: str) -> None:
    root = copied(name.removesuffix("_a"))
    shutil.move(root / link, tmp_path / "outside")
    (root / link).symlink_to(tmp_path / "outside")
    try:
        samples, refused = read(name, root, split)
    except data.DataError as error:
        assert "leaves the dataset folder" in str(error)
    else:
        assert samples == [] and refused and all("leaves the dataset folder" in reason for _, reason in refused)


# --- whatever the tables hold -----------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["..", "/", "\0", "\ud800", "a" * 300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


TABLES = [("mevis", "valid_u", "valid_u/meta_expressions.json"), ("mevis", "valid_u", "valid_u/mask_dict.json"),
          ("revos", "valid", "meta_expressions_valid_.json"), ("revos", "valid", "mask_dict_foreground.json"),
          ("ref_youtube_vos", "train", "meta_expressions/train/meta_expressions.json"),
          ("ref_davis17_b", "valid", "meta_expressions/valid/meta_expressions.json"),
          ("long_rvos", "test", "test/meta_expressions.json"), ("reason_vos", "valid", "meta_expressions.json"),
          ("prist", "test", "test.json"), ("r2sm", "test", "test_queries.json"),
          ("cocoa_cls", "val", "annotations/COCO_amodal_val2014_with_classes.json")]


@pytest.mark.parametrize(("name", "split", "table"), TABLES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_=st.data())
def test_no_table_brings_a_trace(world: Callable[[str], Path], name: str, split: str, table: str,
                                 given_: st.DataObject) -> None:
    """One value anywhere in a table becomes anything: records are refused with a line, or the table is."""
    root = world(name.removesuffix("_b"))
    original = (root / table).read_bytes()
    content = json.loads(original)
    *above, last = given_.draw(st.sampled_from([p for p in places(content) if p]))
    functools.reduce(lambda inner, key: inner[key], above, content)[last] = given_.draw(ANYTHING)
    try:
        (root / table).write_text(json.dumps(content))
        refused: list[tuple[str, str]] = []
        try:
            for sample in readers.read(name, root, split, refused=refused):
                assert isinstance(sample, data.Sample)
        except data.DataError as error:
            refused.append(("table", str(error)))
        assert all("\n" not in reason and (id + reason).encode() for id, reason in refused)
    finally:
        (root / table).write_bytes(original)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"videos": []}', b'{"videos": 3}', b"[" * 100_000,
                                     b"\xff\xfe\x81"])
def test_tables_that_are_none(copied: Callable[[str], Path], content: bytes) -> None:
    root = copied("mevis")
    (root / "valid_u" / "meta_expressions.json").write_bytes(content)
    with pytest.raises(data.DataError, match="meta_expressions.json"):
        readers.read("mevis", root, "valid_u")


def test_what_is_not_there(world: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="did you mean 'mevis'"):
        readers.read("mevvis", tmp_path, "train")
    with pytest.raises(data.DataError, match="no dataset folder"):
        readers.read("mevis", tmp_path / "nowhere", "train")
    with pytest.raises(data.DataError, match="unknown split 'val' of mevis; use one of train, valid_u"):
        readers.read("mevis", world("mevis"), "val")
    with pytest.raises(data.DataError, match="holds no split 'test' of mevis; it has train, valid_u"):
        readers.read("mevis", world("mevis"), "test")
    for name, known in readers.DATASETS.items():
        with pytest.raises(data.DataError, match="with a record in"):
            readers.splits_of(name, tmp_path)
        assert known.splits


# --- prepared records and commands ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mevis", "ref_youtube_vos", "reason_seg", "prist", "r2sm", "revos"])
def test_prepared_samples_are_those_that_were_read(world: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    made = data.prepare(name, world(name), tmp_path / "out", progress=False)
    for split in made["splits"]:
        samples = list(readers.read(name, world(name), split, strict=True))
        prepared = data.load_prepared(tmp_path / "out", split)
        assert len(prepared) == len(samples) == made["splits"][split]["examples"]
        for ours, theirs in zip(prepared, samples, strict=True):
            for field in ("id", "dataset", "split", "kind", "frame_names", "size", "query", "dialogue", "ability",
                          "target_ids", "mask_type", "initial_count", "max_count", "meta"):
                assert getattr(ours, field) == getattr(theirs, field), field
            for field in ("masks", "amodal_masks", "ignore"):
                ours_, theirs_ = getattr(ours, field), getattr(theirs, field)
                assert (ours_ is None) == (theirs_ is None), field
                assert ours_ is None or np.array_equal(ours_(0), theirs_(0))
    assert data.prepare(name, world(name), tmp_path / "out")["reused"]


@pytest.mark.parametrize(("name", "labels"), [("long_rvos", "test/Annotations"), ("prist", "masks")])
def test_labels_that_come_later_are_not_overlooked(copied: Callable[[str], Path], tmp_path: Path, name: str,
                                                   labels: str) -> None:
    root, out = copied(name), tmp_path / "out"
    shutil.move(root / labels, tmp_path / "labels")
    data.prepare(name, root, out, progress=False)
    assert data.load_prepared(out, "test")[0].masks is None
    shutil.move(tmp_path / "labels", root / labels)
    with pytest.raises(data.DataError, match="or lacks labels that have come since; .* remove it"):
        data.prepare(name, root, out, progress=False)
    shutil.rmtree(out)
    data.prepare(name, root, out, progress=False)
    assert data.load_prepared(out, "test")[0].masks is not None


def test_half_a_letter_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    root = copied("r2sm")
    path = root / "test_queries.json"
    first, *others = json.loads(path.read_text())
    path.write_text(json.dumps([first | {"id": "\ud800"}, *others]))
    made = data.prepare("r2sm", root, tmp_path / "out", progress=False)["splits"]["test"]
    (id, reason), = made["refused"]
    assert id == "\\ud800" and "cannot be written as a record" in reason and made["examples"] == len(others)


def test_keys_are_part_of_what_was_prepared(world: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="no usable record; the first is refused because its segmentation is None"):
        data.prepare("muva", world("muva"), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []
    assert data.main(["stats", "muva", f"source={world('muva')}", *(f"{k}={v}" for k, v in MUVA_KEYS.items())]) == 0
    data.prepare("muva", world("muva"), tmp_path / "out", progress=False, **MUVA_KEYS)
    with pytest.raises(data.DataError, match="other tables or of another version"):
        data.prepare("muva", world("muva"), tmp_path / "out")
    next((tmp_path / "out").glob("*test*")).unlink()
    with pytest.raises(data.DataError, match="amodal_key=amodal_mask visible_key=modal_mask"):
        data.load_prepared(tmp_path / "out", "test")


def test_commands(copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = copied("mevis")
    changed(root / "train" / "meta_expressions.json",
            lambda table: next(iter(table["videos"].values()))["expressions"]["0"].update(anno_id=[999]))
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    assert data.main(["prepare", "mevis", f"source={root}", f"out={out}", "strict=true"]) == 2
    assert capsys.readouterr().err.endswith("mask_dict has no annotation 999\n") and not out.exists()
    assert data.main(["prepare", "mevis", f"source={root}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert ", 1 refused\n" in printed and "mask_dict has no annotation 999" in printed
    assert data.main(["stats", "mevis", f"source={root}"]) == 0
    from_folder = capsys.readouterr().out
    assert data.main(["stats", str(out)]) == 0
    assert capsys.readouterr().out == from_folder and "valid_u: " in from_folder and "area %" in from_folder
    assert data.main(["preview", "mevis", f"source={root}", f"out={sheet}", "n=2"]) == 0
    before = sheet.read_bytes()
    assert data.decode_image(sheet).shape[1:] == (680, 3)
    assert data.main(["preview", str(out), f"out={sheet}", "n=2", "split=valid_u"]) == 0
    assert sheet.read_bytes() == before  # the last split is shown when there is no test
    shutil.rmtree(root / "valid_u" / "JPEGImages")
    (root / "valid_u" / "JPEGImages").mkdir()
    capsys.readouterr()
    assert data.main(["preview", "mevis", f"source={root}", f"out={sheet}"]) == 2
    assert "no usable record; the first is refused because frame JPEGImages" in capsys.readouterr().err


def test_every_layout_but_refcoco_is_written() -> None:
    assert {name.removesuffix("_a").removesuffix("_b") for name in readers.DATASETS if "refcoco" not in name} == set(
        synthetic.LAYOUTS)


def test_preview_shows_the_candidates(tmp_path: Path) -> None:
    root = synthetic.write_dataset(tmp_path / "world", train=6, test=1, seed=SEED, progress=False)
    sample = next(s for s in data.read_ambi_rvos(root, "train") if s.initial_count > 1)
    found = data._candidates(sample)
    assert len(found) == sample.initial_count
    drawn = data._outlined(sample, 0)
    assert (drawn == (255, 220, 0)).all(-1).any() and (drawn == (255, 0, 0)).all(-1).any()
    graph = sample.privileged.pop("scene_graph")
    about = data._candidates(sample)  # from description_id, where no scene graph is
    assert len(about) == len(graph["candidates"]) and about[0][0].startswith("the ")
    assert data._contact_sheet([sample]).size[0] == 680
