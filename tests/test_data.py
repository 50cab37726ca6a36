"""data.py: frames, ground truth, the Ambi-RVOS reader, prepared records, training order, commands."""

import errno
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from icseg_jax import data, synthetic

# --- frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "number"), [("00012", 12), ("clip_00012", 12), ("a_b_7", 7), ("1_2", 2),
                                              ("frame0391", 391), ("img-0007", 7), ("999999999", 999999999),
                                              ("COCO_000000000012", 12)])
def test_frame_id(stem: str, number: int) -> None:
    assert data.frame_id(stem) == number


@pytest.mark.parametrize("stem", ["", "clip", "clip_", "12_", "clip_-3", "1.5", "٣", "9" * 40, "1700000000123"])
def test_frame_id_refuses(stem: str) -> None:
    with pytest.raises(data.DataError, match="does not end in a number of at most 9 digits; rename the frames"):
        data.frame_id(stem)


def test_sample_frames_known() -> None:
    assert data.sample_frames(12, 4) == [0, 3, 7, 11]
    assert data.sample_frames(46, 6) == [0, 9, 18, 27, 36, 45]
    assert data.sample_frames(5, 6) == [0, 1, 2, 3, 4]
    assert data.sample_frames(12, 4, anchor=5) == [0, 5, 7, 11]
    assert data.sample_frames(12, 1, anchor=9) == [9]


@given(total=st.integers(1, 300), n=st.integers(1, 40), anchored=st.floats(0, 0.999) | st.none())
def test_sample_frames(total: int, n: int, anchored: float | None) -> None:
    anchor = None if anchored is None else int(anchored * total)
    positions = data.sample_frames(total, n, anchor=anchor)
    assert len(positions) == min(n, total) == len(set(positions))
    assert positions == sorted(positions) and 0 <= positions[0] and positions[-1] < total
    plain = data.sample_frames(total, n)
    if anchor is not None:
        assert anchor in positions
        assert len(set(plain) - set(positions)) <= 1
    elif n > 1:
        assert positions[0] == 0 and positions[-1] == total - 1


@pytest.mark.parametrize("arguments", [(0, 4, None), (4, 0, None), (12, 4, 12), (12, 4, -1)])
def test_sample_frames_refuses(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        data.sample_frames(*arguments[:2], anchor=arguments[2])


# --- ground truth -----------------------------------------------------------------------------------------


def slow_truth(mask: np.ndarray) -> dict:
    """The same by definition: every distance to every background pixel, components by flooding."""
    ys, xs = np.nonzero(mask)
    height, width = mask.shape
    background = np.argwhere(~mask)
    if not len(background):
        background = np.argwhere(~np.pad(mask, 1)) - 1
    squared = ((np.argwhere(mask)[:, None] - background) ** 2).sum(-1).min(1)
    y, x = np.argwhere(mask)[squared.argmax()]
    left, largest = set(zip(ys.tolist(), xs.tolist(), strict=True)), 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            cy, cx = stack.pop()
            size += 1
            near = {(cy + dy, cx + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        largest = max(largest, size)
    return {"bbox_2d": [round(xs.min() / width * 1000), round(ys.min() / height * 1000),
                        round(xs.max() / width * 1000), round(ys.max() / height * 1000)],
            "point_2d": [round(x / width * 1000), round(y / height * 1000)], "area": mask.sum(),
            "max_conn_area": largest}


@given(st.lists(hnp.arrays(bool, (9, 13)), min_size=1, max_size=3))
def test_ground_truth_by_definition(masks: list[np.ndarray]) -> None:
    truth = data.ground_truth({7 * i: mask for i, mask in enumerate(masks)})
    slow = {str(7 * i): slow_truth(mask) for i, mask in enumerate(masks) if mask.any()}
    for key in ("area", "max_conn_area"):
        largest = max((entry[key] for entry in slow.values()), default=1)
        for entry in slow.values():
            entry[key] = entry[key] / largest
    assert truth == slow
    json.dumps(truth)  # plain numbers only


def test_ground_truth_of_a_square() -> None:
    mask = np.zeros((100, 200), bool)
    mask[20:31, 40:51] = True
    small = np.zeros_like(mask)
    small[0, 0] = True
    truth = data.ground_truth({0: mask, 5: np.zeros_like(mask), 9: small})
    assert truth == {
        "0": {"bbox_2d": [200, 200, 250, 300], "point_2d": [225, 250], "area": 1.0, "max_conn_area": 1.0},
        "9": {"bbox_2d": [0, 0, 0, 0], "point_2d": [0, 0], "area": 1 / 121, "max_conn_area": 1 / 121},
    }
    assert data.ground_truth({}) == {} == data.ground_truth({3: np.zeros((4, 4), bool)})


def test_ground_truth_at_the_border_and_full() -> None:
    corner = np.zeros((50, 50), bool)
    corner[:10, :10] = True  # what is outside the frame is no background
    assert data.ground_truth({0: corner})["0"]["point_2d"] == [0, 0]
    assert data.ground_truth({0: np.ones((5, 5), bool)})["0"]["point_2d"] == [400, 400]


def test_ground_truth_is_the_same_as_on_the_whole_frame() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = ndimage.gaussian_filter(rng.normal(size=(64, 48)), 4) > 0.03
        if mask.any():
            y, x = np.unravel_index(ndimage.distance_transform_edt(mask).argmax(), mask.shape)
            point = data.ground_truth({0: mask})["0"]["point_2d"]
            assert point == [round(x / 48 * 1000), round(y / 64 * 1000)]


# --- images -----------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_image_turns_every_mode_into_rgb() -> None:
    red = np.full((4, 6, 3), (200, 10, 20), np.uint8)
    image = Image.fromarray(red)
    assert np.array_equal(data.decode_image(encoded(image, "PNG")), red)
    assert np.array_equal(data.decode_image(encoded(image.quantize(4), "PNG")), red)
    grey = data.decode_image(encoded(image.convert("L"), "PNG"))
    assert grey.shape == (4, 6, 3) and (grey == grey[..., :1]).all()
    clear = image.copy()
    clear.putalpha(0)
    assert (data.decode_image(encoded(clear, "PNG")) == 255).all()  # laid on white
    assert (data.decode_image(encoded(image.quantize(4), "PNG", transparency=0)) == 255).all()
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = 6
    assert data.decode_image(encoded(image, "JPEG", exif=exif)).shape == (6, 4, 3)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff garbage", b"<svg/>"])
def test_decode_image_refuses(content: bytes) -> None:
    with pytest.raises(data.DataError, match="cannot be read as an image"):
        data.decode_image(content)


def test_images_are_of_the_usual_formats_only() -> None:
    image = Image.fromarray(np.full((4, 6, 3), (200, 10, 20), np.uint8))
    for kind in data.IMAGE_FORMATS:
        assert abs(data.decode_image(encoded(image, kind)).astype(int) - (200, 10, 20)).max() < 20
    several = encoded(image, "MPO", save_all=True, append_images=[image])  # of cameras with two lenses
    assert data.decode_image(several).shape == (4, 6, 3)
    for kind in ("EPS", "PPM", "TGA"):
        with pytest.raises(data.DataError, match="cannot be read as an image; JPEG, PNG, .* can$"):
            data.decode_image(encoded(image, kind))


def test_a_header_that_claims_too_much_is_refused() -> None:
    bomb = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    bomb[16:24] = (8500).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    with pytest.raises(data.DataError, match="8500x8500"):
        data.decode_image(bytes(bomb))


def test_resize() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    bicubic, lanczos = data.resize(image, 8, 12), data.resize(image, 8, 12, method="lanczos")
    assert bicubic.shape == (8, 12, 3) and not np.array_equal(bicubic, lanczos)
    assert np.array_equal(data.resize(image, 20, 30), image)
    pillow = Image.fromarray(image).resize((12, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(bicubic, np.asarray(pillow))
    with pytest.raises(ValueError, match="lanczos"):
        data.resize(image, 8, 12, method="nearest")


# --- the reader -------------------------------------------------------------------------------------------

STEMS = ["clip_00012", "clip_00013", "clip_00020"]


def make_row(**changes: object) -> dict:
    row = {"id": "q0", "question": "the cup", "images": STEMS, "ability": "simple", "video": "kitchen",
           "oid": 3, "aid": 5, "initial_count": 2, "max_count": 1}
    return row | changes


def write_table(root: Path, rows: list[dict], split: str = "train") -> None:
    pq.write_table(pa.Table.from_pylist(rows), root / f"{split}.parquet")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as the authors' loader expects it; names with a prefix, a missing and an empty mask."""
    root = tmp_path / "ambi"
    folder = root / "RVOS_Train"
    frames, masks = folder / "JPEGImages" / "kitchen", folder / "Annotations" / "kitchen" / "3"
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i, stem in enumerate(STEMS):
        Image.new("RGB", (24, 16), (40 * i, 80, 90)).save(frames / f"{stem}.jpg")
    mask = np.zeros((16, 24), np.uint8)
    mask[4:8, 6:12] = 255
    Image.fromarray(mask).save(masks / f"{STEMS[0]}.png")
    Image.fromarray(np.zeros_like(mask)).save(masks / f"{STEMS[2]}.png")
    write_table(root, [make_row()])
    return root


def read(root: Path, **options: object) -> tuple[list[data.Sample], list[tuple[str, str]]]:
    refused: list[tuple[str, str]] = []
    return list(data.read_ambi_rvos(root, "train", refused=refused, **options)), refused


def test_reads_the_layout(root: Path) -> None:
    (sample,), refused = read(root)
    assert refused == []
    assert (sample.id, sample.query, sample.ability, sample.target_ids) == ("q0", "the cup", "simple", ["3"])
    assert (sample.size, len(sample), sample.kind, sample.frame_ids) == ((16, 24), 3, "video", [12, 13, 20])
    assert (sample.initial_count, sample.max_count, sample.mask_type) == (2, 1, None)
    assert sample.image(1).shape == (16, 24, 3) and sample.image(1).dtype == np.uint8
    assert [int(sample.masks(p).sum()) for p in range(3)] == [24, 0, 0]  # there, missing, empty
    assert sample.amodal_masks is None
    assert np.array_equal(sample.truth(0), sample.masks(0))
    assert sample.privileged["target_path"].parts[-3:] == ("description_oid", "kitchen", "3.json")
    assert sample.privileged["all_target_path"].name == "5.json"
    truth = data.ground_truth(dict(zip(sample.frame_ids, map(sample.truth, range(3)), strict=True)))
    assert list(truth) == ["12"] and truth["12"]["bbox_2d"] == [250, 250, 458, 438]


def test_defaults_of_optional_columns(root: Path) -> None:
    row = make_row(ability="one-hop", oid="3")
    for column in ("id", "aid", "initial_count", "max_count"):
        del row[column]
    write_table(root, [row])
    (sample,), _ = read(root)
    assert (sample.id, sample.initial_count, sample.max_count) == ("0", -1, -1)
    assert "all_target_path" not in sample.privileged


def test_integers_with_gaps_are_read_as_such(root: Path) -> None:
    """As pandas writes them: as floats."""
    write_table(root, [make_row(oid=3.0, aid=5.0, max_count=1.0), make_row(id="q1", ability="none", oid=None, aid=None),
                       make_row(id="q2", oid=3.5)])
    (sample, none), refused = read(root)
    assert sample.target_ids == ["3"] and sample.masks(0).any() and sample.max_count == 1
    assert sample.privileged["all_target_path"].name == "5.json" and repr(sample.meta["aid"]) == "5"
    assert "aid" not in none.meta and "its oid is 3.5" in refused[0][1]


def test_no_target(root: Path) -> None:
    write_table(root, [make_row(ability="none", oid=None, initial_count=0, max_count=0)])
    (sample,), _ = read(root)
    assert sample.target_ids == [] and not sample.masks(0).any() and sample.masks(0).shape == (16, 24)


def test_palette_masks_and_paths_with_folders(root: Path) -> None:
    folder = root / "RVOS_Train"
    for kind in ("JPEGImages", "Annotations"):
        (folder / kind / "house").mkdir()
        (folder / kind / "kitchen").rename(folder / kind / "house" / "kitchen")
    path = folder / "Annotations" / "house" / "kitchen" / "3" / f"{STEMS[0]}.png"
    with Image.open(path) as image:
        values = np.asarray(image)
    palette = Image.new("P", (24, 16))
    palette.putpalette([0] * 765 + [9, 9, 9])  # the index 255 counts, whatever its colour
    palette.putdata([int(v) for v in values.ravel()])
    palette.save(path)
    write_table(root, [make_row(video="house/kitchen")])
    (sample,), refused = read(root)
    assert refused == [] and sample.masks(0).sum() == 24


def test_the_policy_needs_only_the_frames(root: Path) -> None:
    (sample,), _ = read(root)
    (root / "RVOS_Train" / "Annotations").rename(root / "elsewhere")
    assert all(sample.image(p).any() for p in range(3))


BAD_ROWS = {
    "no frame": (dict(images=[*STEMS, "clip_00021"]), "clip_00021.jpg is missing"),
    "no number": (dict(images=["clip"]), "does not end in a number"),
    "same number twice": (dict(images=["clip_00012", "12"]), "have the number 12"),
    "images empty": (dict(images=[]), "images"),
    "images null": (dict(images=None), "images"),
    "images with a null": (dict(images=[None]), "images"),
    "frame outside": (dict(images=["../kitchen/clip_00012"]), "leaves the dataset folder"),
    "frame of another root": (dict(images=["/etc/clip_00012"]), "leaves the dataset folder"),
    "video outside": (dict(video="../../RVOS_Train/JPEGImages/kitchen"), "leaves the dataset folder"),
    "video absolute": (dict(video="/etc"), "leaves the dataset folder"),
    "video of one dot": (dict(video="."), "leaves the dataset folder"),
    "video too long": (dict(video="x" * 5000), "too long"),
    "video null": (dict(video=None), "video"),
    "video with a zero byte": (dict(video="kit\0chen"), "kit"),
    "oid outside": (dict(oid="../kitchen/3"), "leaves the dataset folder"),
    "oid null": (dict(oid=None), "oid"),
    "oid unknown": (dict(oid=4), "Annotations/kitchen/4 is missing"),
    "query empty": (dict(question="  "), "question"),
    "ability null": (dict(ability=None), "ability"),
    "count negative": (dict(initial_count=-2), "initial_count"),
    "count broken": (dict(max_count=1.5), "max_count"),
    "mask type": (dict(mask_type="whole"), "modal, amodal"),
    "no complete masks": (dict(mask_type="amodal"), "AmodalAnnotations/kitchen/3 is missing"),
    "aid outside": (dict(aid="../../x"), "leaves the dataset folder"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_refuses_a_bad_record_and_goes_on(root: Path, name: str) -> None:
    changes, reason = BAD_ROWS[name]
    write_table(root, [make_row(id="bad", **changes)])
    samples, refused = read(root)
    assert samples == [] and len(refused) == 1 and refused[0][0] == "bad" and reason in refused[0][1]
    assert "\n" not in refused[0][1]
    with pytest.raises(data.DataError, match="record bad of"):
        list(data.read_ambi_rvos(root, "train", strict=True))


def test_refusals_are_collected_and_the_rest_is_read(root: Path) -> None:
    write_table(root, [make_row(), make_row(), make_row(id="q1", video="attic"), make_row(id="q2")])
    samples, refused = read(root)
    assert [s.id for s in samples] == ["q0", "q2"]
    assert [id for id, _ in refused] == ["q0", "q1"] and "earlier record" in refused[0][1]
    with pytest.warns(UserWarning, match="left out"):
        list(data.read_ambi_rvos(root, "train"))


def test_refuses_damaged_files(root: Path) -> None:
    folder = root / "RVOS_Train"
    frame = folder / "JPEGImages" / "kitchen" / f"{STEMS[1]}.jpg"
    good = frame.read_bytes()

    def reason(**options: object) -> str:
        samples, refused = read(root, **options)
        assert samples == []
        return refused[0][1]

    frame.write_bytes(b"no picture")
    assert "clip_00013.jpg cannot be read" in reason()
    frame.write_bytes(good[:-12])
    assert "clip_00013.jpg cannot be read" in reason(decode=True)
    (sample,), _ = read(root)  # the header is sound: it shows when the frame is asked for
    with pytest.raises(data.DataError, match="clip_00013.jpg"):
        sample.image(1)
    Image.new("RGB", (16, 16)).save(frame)
    assert "16x16" in reason()
    frame.write_bytes(good)

    mask = folder / "Annotations" / "kitchen" / "3" / f"{STEMS[0]}.png"
    Image.new("L", (16, 24)).save(mask)
    assert "24x16, its frame 16x24" in reason()
    Image.new("L", (24, 16), 1).save(mask)  # invisible to the loader, seen by the scorer
    assert "values 0 and 255" in reason(decode=True)
    Image.new("RGB", (24, 16), (255, 255, 255)).save(mask)
    assert "single channel" in reason(decode=True)
    Image.new("1", (24, 16), 1).save(mask)
    assert read(root, decode=True)[0][0].masks(0).all()

    (folder / "scene_graph").mkdir()
    for content in ("{", "[]", "[" * 100_000):
        (folder / "scene_graph" / "kitchen.json").write_text(content)
        assert "kitchen.json" in reason()
    (folder / "scene_graph" / "kitchen.json").unlink()
    assert reason().endswith("scene_graph/kitchen.json is missing")


@pytest.mark.parametrize("link", ["RVOS_Train/JPEGImages/kitchen", "RVOS_Train/Annotations/kitchen/3",
                                  f"RVOS_Train/JPEGImages/kitchen/{STEMS[0]}.jpg"])
def test_links_do_not_lead_out(root: Path, tmp_path: Path, link: str) -> None:
    path = root / link
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    samples, refused = read(root)
    assert samples == [] and "leaves the dataset folder" in refused[0][1]
    path.unlink()
    inside = root / "RVOS_Train" / "inside"
    (tmp_path / "outside").rename(inside)
    path.symlink_to(inside)
    assert len(read(root)[0]) == 1


def test_tables_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="no dataset folder"):
        data.read_ambi_rvos(tmp_path / "nowhere", "train")
    with pytest.raises(data.DataError, match="RVOS_Test/JPEGImages is missing"):
        data.read_ambi_rvos(root, "test")
    with pytest.raises(data.DataError, match="unknown split 'val'; use one of train, test"):
        data.read_ambi_rvos(root, "val")
    (root / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(data.DataError, match="is no parquet file"):
        data.read_ambi_rvos(root, "train")
    write_table(root, [{"question": "the cup", "video": "kitchen"}])
    with pytest.raises(data.DataError, match="lacks the column images, ability, oid"):
        data.read_ambi_rvos(root, "train")
    write_table(root, [make_row(images="clip_00012", oid=1.5)])
    assert "images are not a list" in read(root)[1][0][1]


# --- prepared records -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(synthetic.write_dataset(tmp_path_factory.mktemp("world") / "w", train=6, test=3, seed=1,
                                        progress=False))


@pytest.fixture(scope="module")
def prepared(world: Path) -> Path:
    out = world.parent / "prepared"
    made = data.prepare("ambi_rvos", world, out, progress=False)
    assert not made["reused"]
    assert made["splits"] == {"train": {"examples": 6, "refused": []}, "test": {"examples": 3, "refused": []}}
    assert sorted(p.name for p in world.parent.iterdir()) == ["prepared", "w"]  # nothing else is left behind
    return out


def test_processes_with_a_share_of_the_work_make_what_one_makes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHARE", 2)  # so that even this is worth it
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: {0, 1})
    shared = Path(synthetic.write_dataset(tmp_path / "w", train=6, test=4, seed=1, progress=False))
    other = Path(synthetic.write_dataset(tmp_path / "o", train=6, test=0, seed=1, progress=False))
    files = sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file() and "Train" in str(p))
    assert len(files) > 300
    assert all((shared / f).read_bytes() == (other / f).read_bytes() == (world / f).read_bytes() for f in files)
    assert (shared / "train.parquet").read_bytes() == (world / "train.parquet").read_bytes()

    missing = shared / "RVOS_Train/JPEGImages" / sorted((shared / "RVOS_Train/JPEGImages").iterdir())[2].name
    shutil.rmtree(missing)
    told = data.prepare("ambi_rvos", shared, tmp_path / "two", progress=False)
    monkeypatch.setattr(data, "SHARE", 100)
    assert told["splits"] == data.prepare("ambi_rvos", shared, tmp_path / "one", progress=False)["splits"]
    assert told["splits"]["train"]["examples"] == 5 and missing.name in str(told["splits"]["train"]["refused"])
    for split in ("train", "test"):
        one, two = (data.load_prepared(tmp_path / name, split) for name in ("one", "two"))
        assert [s.id for s in one] == [s.id for s in two]
        assert all(np.array_equal(a.frames[3], b.frames[3]) for a, b in zip(one, two, strict=True))


def test_a_process_that_ends_early_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    monkeypatch.setattr(data, "SHARE", 2)
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: {0, 1})
    job = {"name": "ambi_rvos", "source": str(tmp_path / "nowhere"), "split": "train", "keys": {}}
    with pytest.raises(ChildProcessError, match=r"a share of records: its process ended early \(2\); run it again"):
        list(data.share_out("records", job, 8))
    assert "no dataset folder" in capfd.readouterr().err


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "records"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_prepared_samples_are_those_that_were_read(world: Path, prepared: Path, split: str) -> None:
    records = data.load_prepared(prepared, split)
    samples = list(data.read_ambi_rvos(world, split, strict=True))
    assert len(records) == len(samples)
    for ours, theirs in zip(records, samples, strict=True):
        for name in ("id", "dataset", "split", "kind", "frame_names", "size", "query", "dialogue", "ability",
                     "target_ids", "mask_type", "initial_count", "max_count", "meta"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.frames == [path.read_bytes() for path in theirs.frames]  # nothing was compressed again
        assert ours.privileged["scene_graph"] == theirs.privileged["scene_graph"]
        for p in range(len(ours)):
            assert np.array_equal(ours.image(p), theirs.image(p))
            assert np.array_equal(ours.masks(p), theirs.masks(p)) and ours.masks(p).dtype == bool
            assert np.array_equal(ours.amodal_masks(p), theirs.amodal_masks(p))
    assert np.array_equal(records[-1].masks(0), records[len(records) - 1].masks(0))
    with pytest.raises(IndexError):
        records[len(records)]


def test_the_synthetic_world_reads_as_it_was_made(world: Path) -> None:
    for sample in data.read_ambi_rvos(world, "train", strict=True, decode=True):
        graph = sample.privileged["scene_graph"]
        assert sample.size == (128, 128) and sample.frame_ids == list(range(12))
        assert graph["query"] == sample.query and len(graph["candidates"]) == sample.initial_count
        assert bool(sample.target_ids) == (sample.ability != "none")
        assert all((sample.amodal_masks(p) | ~sample.masks(p)).all() for p in range(12))


def test_records_have_the_canonical_features(prepared: Path) -> None:
    """DATA.md 5.3: any tensorflow-datasets program can read them."""
    import tensorflow_datasets as tfds

    plain = tfds.builder_from_directory(prepared).as_data_source("train")
    assert len(plain) == 6
    for record, sample in zip(plain, data.load_prepared(prepared, "train"), strict=True):
        assert set(record) == {"id", "video", "query", "ability", "frame_names", "frames", "masks",
                               "amodal_masks", "boxes", "points", "initial_count", "max_count", "meta"}
        assert record["query"].decode() == sample.query and record["video"].decode() == sample.meta["video"]
        assert np.array_equal(record["frames"][5], sample.image(5))
        assert record["masks"].shape == (12, 128, 128)
        truth = data.ground_truth({p: sample.truth(p) for p in range(12)})
        for p in range(12):
            entry = truth.get(str(p), {"bbox_2d": [0] * 4, "point_2d": [0] * 2})
            assert list(record["boxes"][p]) == entry["bbox_2d"]
            assert list(record["points"][p]) == entry["point_2d"]


def test_prepared_work_is_reused(world: Path, prepared: Path, root: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in prepared.iterdir()}
    assert data.prepare("ambi_rvos", world, prepared)["reused"]
    assert before == {p.name: p.stat().st_mtime_ns for p in prepared.iterdir()}
    with pytest.raises(data.DataError, match="other tables"):
        data.prepare("ambi_rvos", root, prepared)


def test_bad_records_are_reported_not_prepared(root: Path, tmp_path: Path) -> None:
    frame = root / "RVOS_Train" / "JPEGImages" / "kitchen" / f"{STEMS[0]}.jpg"
    write_table(root, [make_row(), make_row(id="q1", oid=9)])
    made = data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    (id, reason), = made["splits"]["train"]["refused"]
    assert id == "q1" and "Annotations/kitchen/9" in reason
    assert data.load_prepared(tmp_path / "out", "train").refused == [(id, reason)]
    assert data.load_prepared(tmp_path / "out", "train")[0].amodal_masks is None
    with pytest.raises(data.DataError, match="has no split 'test'; it has train"):
        data.load_prepared(tmp_path / "out", "test")

    frame.write_bytes(frame.read_bytes()[:200])
    with pytest.raises(data.DataError, match="no usable record.*clip_00012.jpg"):
        data.prepare("ambi_rvos", root, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".*partial*"))


def test_what_prepare_refuses(world: Path, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="did you mean 'ambi_rvos'"):
        data.prepare("ambi-rvos", world, tmp_path / "out")
    with pytest.raises(data.DataError, match="no train.parquet or test.parquet"):
        data.prepare("ambi_rvos", tmp_path, tmp_path / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(data.DataError, match="holds other things .thesis.tex."):
        data.prepare("ambi_rvos", world, mine)
    assert (mine / "thesis.tex").exists()


def test_damaged_records_say_how_to_make_them_again(world: Path, copied: Path) -> None:
    shard = next(copied.glob("*test*"))
    whole = shard.read_bytes()
    again = f"python -m icseg_jax.data prepare ambi_rvos source={world} out={copied}"

    def message(folder: Path = copied) -> str:
        with pytest.raises(data.DataError) as caught:
            list(data.load_prepared(folder, "test"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    shard.write_bytes(whole[:-1])
    assert f"{shard} is damaged; make it again with: {again}" in message()
    shard.unlink()
    assert f"{shard} is missing; make it again with: {again}" in message()
    middle = bytearray(whole)
    for i in range(len(whole) // 10, len(whole) // 10 + 4000):
        middle[i] ^= 0xFF
    shard.write_bytes(bytes(middle))

    assert again in message()
    shard.write_bytes(whole[:-1])
    assert not data.prepare("ambi_rvos", world, copied, progress=False)["reused"]
    assert len(list(data.load_prepared(copied, "test"))) == 3

    marker = copied / data.MARKER
    odd = {"files": 3, "name": "ambi_rvos", "source": "x", "splits": {}, "fingerprint": ""}
    for content in ("", "{}", json.dumps(odd)):
        marker.write_text(content)
        assert "prepared.json is damaged" in message()
    marker.unlink()  # half-written
    assert "no prepared records" in message()
    assert not data.prepare("ambi_rvos", world, copied, progress=False)["reused"]
    nowhere = copied / "nowhere"
    assert f"out={nowhere}" in message(nowhere)


def test_leftovers_of_a_killed_prepare_are_removed(world: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover, rival = tmp_path / f".out.partial.{dead.pid}", tmp_path / f".out.partial.{os.getppid()}"
    for folder in (leftover, rival):
        folder.mkdir()
    data.prepare("ambi_rvos", world, tmp_path / "out", progress=False)
    assert not leftover.exists() and rival.exists()


def fail_at(id: str, to_record: Callable[[data.Sample], dict], sample: data.Sample) -> dict:
    if sample.id == id:
        raise MemoryError(f"no room for {id}")
    return to_record(sample)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), MemoryError("no room")])
def test_a_killed_prepare_goes_on_where_it_stopped(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   reason: BaseException) -> None:
    rows = [make_row(id=f"q{i}") for i in range(5)]
    write_table(root, [*rows[:2], make_row(id="bad", oid=9), *rows[2:], rows[0]])
    monkeypatch.setattr(data, "SHARD_BYTES", 1)  # a file for every sample
    to_record, opened = data._to_record, []

    def interrupted(sample: data.Sample) -> dict:
        if len(opened) == 4:
            raise reason
        opened.append(sample.id)
        return to_record(sample)

    monkeypatch.setattr(data, "_to_record", interrupted)
    with pytest.raises(type(reason)):
        data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists() and opened == ["q0", "q1", "q2", "q3"]
    (left,) = tmp_path.glob(".out.partial.*")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left.rename(tmp_path / f".out.partial.{dead.pid}")  # as if another process had been killed

    monkeypatch.setattr(data, "_to_record", lambda sample: (opened.append(sample.id), to_record(sample))[1])
    made = data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    assert opened == ["q0", "q1", "q2", "q3", "q4"]  # nothing twice
    assert [id for id, _ in made["splits"]["train"]["refused"]] == ["bad", "q0"]  # once each, the second q0 too
    assert [s.id for s in data.load_prepared(tmp_path / "out", "train")] == [f"q{i}" for i in range(5)]
    assert len(list((tmp_path / "out").glob("*array_record*"))) == 5 and not list(tmp_path.glob(".out*"))

    with monkeypatch.context() as patch:  # other tables begin anew
        patch.setattr(data, "_to_record", interrupted)
        with pytest.raises(type(reason)):
            opened.clear()
            data.prepare("ambi_rvos", root, tmp_path / "other", progress=False)
    write_table(root, rows[:2])
    opened.clear()
    assert data.prepare("ambi_rvos", root, tmp_path / "other", progress=False)["splits"]["train"]["examples"] == 2
    assert opened == ["q0", "q1"] and not list(tmp_path.glob(".other*"))


@pytest.mark.parametrize("moved", [False, True])
def test_a_prepare_killed_at_its_very_end_is_finished(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      moved: bool) -> None:
    """Just before its folder becomes `out`, or just after."""
    write_table(root, [make_row(), make_row(id="bad", oid=9)])
    out, replace, rmtree = tmp_path / "out", os.replace, shutil.rmtree

    def killed(path: Path, *to: Path, **options: object) -> None:
        if out in to or moved and ".out.partial." in str(path):
            raise KeyboardInterrupt
        (replace if to else rmtree)(path, *to, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.shutil if moved else data.os, "rmtree" if moved else "replace", killed)
        data.prepare("ambi_rvos", root, out, progress=False)
    assert out.exists() == moved and list(tmp_path.glob(".out.partial.*"))
    assert data.prepare("ambi_rvos", root, out, progress=False)["reused"] == moved
    assert [s.id for s in data.load_prepared(out, "train")] == ["q0"] and bool(list(tmp_path.glob(".out*"))) == moved
    assert data.MARKER not in json.loads((out / data.MARKER).read_text())["files"]


def test_refused_records_are_looked_at_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture) -> None:
    write_table(root, [make_row(id="q0", oid=9), make_row(id="q1"), make_row(id="q2")])
    out, masks = tmp_path / "out", root / "RVOS_Train" / "Annotations" / "kitchen"
    command = ["prepare", "ambi_rvos", f"source={root}", f"out={out}"]
    assert data.main(command) == 0
    assert data.main([*command, "strict=true"]) == 2 and "Annotations/kitchen/9" in capsys.readouterr().err
    assert [s.id for s in data.load_prepared(out, "train")] == ["q1", "q2"]  # what was there stays

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(data, "SHARD_BYTES", 1)
        patch.setattr(data, "_to_record", functools.partial(fail_at, "q2", data._to_record))
        data.prepare("ambi_rvos", root, tmp_path / "other", progress=False)
    shutil.copytree(masks / "3", masks / "9")  # it is mended
    capsys.readouterr()
    assert data.main(command) == 0 and "strict=true looks at all of them again" in capsys.readouterr().out
    for folder in (out, tmp_path / "other"):  # also what a killed one has refused, when nothing may be refused
        made = data.prepare("ambi_rvos", root, folder, progress=False, strict=True)
        assert not made["reused"] and made["splits"] == {"train": {"examples": 3, "refused": []}}
        assert [s.id for s in data.load_prepared(folder, "train")] == ["q0", "q1", "q2"]
    assert data.prepare("ambi_rvos", root, out, progress=False, strict=True)["reused"]

    (masks / "9").rename(masks / "8")
    write_table(root, [make_row(id="q0", oid=9), make_row(id="q1")])
    data.prepare("ambi_rvos", root, tmp_path / "mine", progress=False)
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(data.DataError, match="holds other things .thesis.tex."):
        data.prepare("ambi_rvos", root, tmp_path / "mine", progress=False, strict=True)


def test_tables_belong_to_their_splits(root: Path, tmp_path: Path) -> None:
    data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    earlier = Path(shutil.copytree(tmp_path / "out", tmp_path / "earlier")) / data.MARKER  # when names were no part
    told = json.loads(earlier.read_text())
    told["fingerprint"] = data._fingerprint("ambi_rvos", {}, root, [root / "train.parquet"])
    earlier.write_text(json.dumps(told))
    assert data.prepare("ambi_rvos", root, earlier.parent, progress=False)["reused"]
    (root / "train.parquet").rename(root / "test.parquet")
    (root / "RVOS_Train").rename(root / "RVOS_Test")
    with pytest.raises(data.DataError, match="other tables"):
        data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)


def test_a_killed_prepare_of_another_folder_is_not_gone_on_with(root: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables may be the same, its frames are not."""
    write_table(root, [make_row(), make_row(id="q1")])
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(data, "SHARD_BYTES", 1)
        patch.setattr(data, "_to_record", functools.partial(fail_at, "q1", data._to_record))
        data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    other = Path(shutil.copytree(root, tmp_path / "other"))
    frame = other / "RVOS_Train" / "JPEGImages" / "kitchen" / f"{STEMS[0]}.jpg"
    Image.new("RGB", (24, 16), (250, 0, 0)).save(frame)
    data.prepare("ambi_rvos", other, tmp_path / "out", progress=False)
    assert [s.frames[0] for s in data.load_prepared(tmp_path / "out", "train")] == [frame.read_bytes()] * 2


def test_what_came_to_its_place_meanwhile_is_not_removed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                         ) -> None:
    data.prepare("ambi_rvos", root, tmp_path / "rival", progress=False)
    write, out = data._write_records, tmp_path / "out"

    def meanwhile(comes: Callable[[], object]) -> dict:
        def slow(*about: object) -> dict:
            written = write(*about)
            comes()
            return written

        with monkeypatch.context() as patch:
            patch.setattr(data, "_write_records", slow)
            return data.prepare("ambi_rvos", root, out, progress=False)

    assert meanwhile(lambda: (tmp_path / "rival").rename(out))["reused"] and not list(tmp_path.glob(".out*"))
    shutil.rmtree(out)

    def thesis() -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(data.DataError, match="other things .thesis.tex.*the same command goes on with what it has"):
        meanwhile(thesis)
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    monkeypatch.setattr(data, "_to_record", functools.partial(fail_at, "q0", data._to_record))  # nothing is done again
    assert not data.prepare("ambi_rvos", root, out, progress=False)["reused"]
    assert [s.id for s in data.load_prepared(out, "train")] == ["q0"] and not list(tmp_path.glob(".out*"))


def test_what_no_record_can_hold_is_refused(root: Path, tmp_path: Path) -> None:
    write_table(root, [make_row(object=None), make_row(id="q1", initial_count=2**40), make_row(id="q2", object=b"cup")])
    made = data.prepare("ambi_rvos", root, tmp_path / "out", progress=False)
    assert made["splits"]["train"]["examples"] == 1
    (first, count), (second, content) = made["splits"]["train"]["refused"]
    assert (first, second) == ("q1", "q2") and "initial_count" in count and "\n" not in count
    assert "cannot be written as a record (Object of type bytes" in content
    with pytest.raises(data.DataError, match="record q1 of train of .* cannot be written"):
        data.prepare("ambi_rvos", root, tmp_path / "strict", progress=False, strict=True)


def test_threads_may_share_a_dataset(prepared: Path) -> None:
    records = data.load_prepared(prepared, "train")
    expected = [records[i].image(0).sum() for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: records[i % 6].image(0).sum(), range(48))) == expected * 8


def test_reading_records_needs_neither_tensorflow_nor_torch(prepared: Path) -> None:
    program = ("import sys\nfrom icseg_jax import data\n"
               f"data.load_prepared({str(prepared)!r}, 'train')[0].image(0)\n"
               "sys.exit(any(m in sys.modules for m in ('tensorflow', 'torch', 'jax')))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- order ------------------------------------------------------------------------------------------------


def test_what_a_link_leads_to_outside_is_not_even_hashed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    secret, table = tmp_path / "secret", tmp_path / "in" / "table.json"
    table.symlink_to(secret)
    found = []
    for content in "ab":
        secret.write_text(content)
        found.append(data._fingerprint("mevis", {}, tmp_path / "in", [table]))
    assert found[0] == found[1]


def test_mixed_takes_sets_at_their_rates() -> None:
    drawn = [place for step in range(60) for place in data.mixed(0, step, [30, 7, 5], [10, 2, 0], 16)]
    share = sum(k == 0 for k, _ in drawn) / len(drawn)
    assert abs(share - 10 / 12) < 0.06 and {k for k, _ in drawn} == {0, 1}
    assert {i for k, i in drawn if k == 1} == set(range(7)) and {i for k, i in drawn if k == 0} == set(range(30))
    assert data.mixed(0, 5, [30, 7], [1, 1], 8) == data.mixed(0, 5, [30, 7], [1, 1], 8)
    assert data.mixed(0, 5, [30, 7], [1, 1], 8) != data.mixed(1, 5, [30, 7], [1, 1], 8)
    for bad in (([], [], 1), ([3], [1, 1], 1), ([0], [1], 1), ([3], [0], 1), ([3, 3], [2, -1], 1), ([3], [1], 0)):
        with pytest.raises(ValueError, match="cannot mix"):
            data.mixed(0, 0, *bad)


@given(seed=st.integers(0, 2**31), n=st.integers(1, 60), data_=st.data())
def test_order(seed: int, n: int, data_: st.DataObject) -> None:
    batch = data_.draw(st.integers(1, n))
    per_epoch = n // batch
    epochs = [np.concatenate([data.order(seed, e * per_epoch + k, 0, n, batch) for k in range(per_epoch)])
              for e in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == per_epoch * batch and set(epoch.tolist()) <= set(range(n))
    again = data.order(seed, per_epoch, 0, n, batch)
    assert np.array_equal(again, epochs[1][:batch])
    step = data_.draw(st.integers(0, 100))
    rounds = [data.order(seed, step, refill, n, batch) for refill in range(n // batch)]
    assert len(set(np.concatenate(rounds).tolist())) == n // batch * batch  # no sample comes twice in a step
    assert len(data.order(seed, step, 50, n, batch)) == batch


def test_order_depends_on_everything() -> None:
    first = data.order(0, 0, 0, 1000, 16).tolist()
    others = [data.order(1, 0, 0, 1000, 16), data.order(0, 1, 0, 1000, 16), data.order(0, 0, 1, 1000, 16),
              data.order(0, 62, 0, 1000, 16)]
    assert all(other.tolist() != first for other in others)
    for n, batch in ((4, 5), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match="cannot be drawn"):
            data.order(0, 0, 0, n, batch)


# --- commands ---------------------------------------------------------------------------------------------


def test_commands_from_nothing_to_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    world, out, picture = (str(tmp_path / name) for name in ("world", "records", "sheet.png"))
    assert data.main(["generate", f"out={world}", "train=2", "test=2", "seed=5"]) == 0
    assert data.main(["prepare", "ambi_rvos", f"source={world}", f"out={out}"]) == 0
    assert "train: 2 samples, 0 refused" in capsys.readouterr().out
    assert data.main(["prepare", "ambi_rvos", f"source={world}", f"out={out}"]) == 0
    assert "(prepared before)" in capsys.readouterr().out
    assert data.main(["stats", out]) == 0
    from_records = capsys.readouterr().out
    assert data.main(["stats", world]) == 0
    assert capsys.readouterr().out == from_records and "test: 2 samples" in from_records
    for source in (out, world, "synthetic"):
        assert data.main(["preview", source, f"out={picture}", "n=2"]) == 0
        assert data.decode_image(Path(picture)).shape == (420, 680, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["records", "sheet.png", "world"]
    monkeypatch.chdir(tmp_path)  # without out=
    assert data.main(["preview", "world", "n=1"]) == 0 and Path("world.png").is_file()
    assert data.main(["prepare", "ambi_rvos", "source=world"]) == 0
    assert len(data.load_prepared(tmp_path / "data" / "ambi_rvos", "test")) == 2


BAD_COMMANDS = {
    "": "no command; use one of generate, prepare, ambiguate, preview, stats",
    "generte out=x": "did you mean 'generate'",
    "generate out=x train=2": "generate needs test=",
    "generate out=x train=two test=1": "train=two is no whole number",
    "generate out=x tran=2 test=1": "did you mean 'train'",
    "generate out= train=1 test=1": "out= is empty",
    "generate now out=x train=1 test=1": "takes only key=value",
    "prepare source=a out=b": "prepare takes NAME",
    "prepare mevvis source=a out=b": "unknown dataset 'mevvis' (did you mean 'mevis'?); use one of ambi_rvos",
    "prepare ambi_rvos source=nowhere out=b": "no dataset folder",
    "prepare ambi_rvos source=. out=b": "no train.parquet or test.parquet",
    "prepare ambi_rvos source=. out=b strict=yes": "strict=yes is neither true nor false",
    "generate out=x train=1 test=1 layout=mevvis": "unknown layout 'mevvis'; use one of ambi_rvos",
    "generate out=x train=1 test=1 layout=reason_vos": "use train=0",
    "preview mevis out=x.png source=.": "no valid_u/meta_expressions.json",
    "stats mevis source=nowhere": "no dataset folder nowhere",
    "preview nowhere out=x.png": "neither a prepared folder",
    "preview synthetic out=x.png n=0": "n=0",
    "preview synthetic out=x.png split=val": "has no split 'val'; it has train, test",
    "preview synthetic out=/proc/none/x.png n=1": "/proc/none",
    "stats nowhere": "neither a prepared folder",
    "stats": "stats takes NAME_OR_DIR",
}


@pytest.mark.parametrize("words", BAD_COMMANDS)
def test_bad_commands(words: str, capsys: pytest.CaptureFixture, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD_COMMANDS[words] in error
    assert list(tmp_path.iterdir()) == []


def test_help() -> None:
    done = subprocess.run([sys.executable, "-m", "icseg_jax.data", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(command in done.stdout for command in data.COMMANDS)


@pytest.mark.parametrize("said", [OSError(errno.EMFILE, "Too many open files"), data.DataError("cannot be read")])
def test_what_the_machine_lacks_is_no_fault_of_a_record(said):
    def fails():
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise said from None

    with pytest.raises(type(said)):
        list(data._opened_records([("a", fails)]))

    def damaged():
        raise data.DataError("it is damaged")

    assert list(data._opened_records([("a", damaged)])) == [("a", "it is damaged")]
