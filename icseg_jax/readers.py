"""The datasets of others, as they lie on disk: folder -> records -> `Sample` (DATA.md 1 to 4).

    for sample in readers.read("mevis", "data/mevis", "valid_u"): ...

Each dataset is one function, which looks at its tables at once and at a record's own files when that record is
asked for. What is not as DATA.md says is refused with one line (`data.open_records`). Nobody's code was copied;
where a convention is odd the section that states it is named. pycocotools (COCO's polygons) and OpenCV (LabelMe's)
draw because the published scores were computed on masks which they drew; both are imported where they are used.

1 Masks in text · 2 Tables and files · 3 Referring videos · 4 Images · 5 Complete masks · 6 Which datasets there are
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import pickle
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from icseg_jax import data
from icseg_jax.data import DataError, Record, Sample

MaskAt = Callable[[int], np.ndarray]  # position of a frame -> bool [H, W]
META, FOREGROUND = "meta_expressions.json", "mask_dict_foreground.json"
VOID = 255  # the index of pixels that no metric counts, in DAVIS's palettes and ReasonSeg's masks
IMAGE_STEM = "00000"  # what the one frame of an image is called: the files' own names do not end in frame numbers

# ------------------------------------------------------------------------------------------------------------
# 1 Masks in text: RLE and polygons (DATA.md 2.2)
# ------------------------------------------------------------------------------------------------------------


def decode_rle(rle: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask of a COCO run-length code {"size": [h, w], "counts": list, str or bytes} (DATA.md 2.2).

    Runs go down the columns and begin with one of zeros. Own code, because pycocotools takes runs that do not
    fill the frame and returns whatever was in memory. DataError when it is no such code or of another size.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        raise DataError(f"{_short(rle)} is no RLE; {{'size': [h, w], 'counts': ...}} is one")
    if rle["size"] not in ([*size], size):
        raise DataError(f"an RLE has the size {_short(rle['size'])}, its frame {size[0]}x{size[1]}")
    counts, pixels = rle["counts"], size[0] * size[1]
    if isinstance(counts, list) and all(type(n) is int and 0 <= n <= pixels for n in counts):
        runs = np.array(counts, np.int64)
    elif isinstance(counts, str | bytes):
        runs = _uncompressed(counts)
    else:
        raise DataError(f"the counts of an RLE are {_short(counts)}, neither a text nor a list of run lengths")
    if np.any(runs < 0) or runs.sum() != pixels:
        raise DataError(f"the runs of an RLE do not fill its {size[0]}x{size[1]} frame")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape(size[::-1]).T


def _uncompressed(text: str | bytes) -> np.ndarray:
    """Run lengths of COCO's text form: 5-bit groups, low one first, from the fourth number on as differences
    to the number two before."""
    raw = text.encode("ascii", "replace") if isinstance(text, str) else text
    groups = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise DataError("the counts of an RLE are damaged")
    ends = np.flatnonzero((groups & 32) == 0)
    starts = np.append(0, ends[:-1] + 1)
    place = np.arange(groups.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:  # 35 bits: more than any frame has pixels
        raise DataError("the counts of an RLE are damaged")
    values = np.add.reduceat((groups & 31) << (5 * place), starts)
    values -= np.where(groups[ends] & 16, 1 << 5 * (place[ends] + 1), 0)  # the sign is in the last group
    values[1::2], values[2::2] = np.cumsum(values[1::2]), np.cumsum(values[2::2])
    return values


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask of a COCO `segmentation`: an RLE, or a list whose parts (polygons or RLEs) are united.

    Polygons with an odd number of coordinates or fewer than six are passed over, as detectron2's loaders do
    (DATA.md 2.2); DataError when nothing is left.
    """
    if isinstance(segmentation, dict):
        return decode_rle(segmentation, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError(f"its segmentation is {_short(segmentation)}, neither an RLE nor a list of polygons")
    if all(isinstance(part, dict) for part in segmentation):
        return functools.reduce(np.logical_or, [decode_rle(part, size) for part in segmentation])
    polygons = [part for part in segmentation if isinstance(part, list) and len(part) % 2 == 0 and len(part) >= 6]
    if not polygons:
        raise DataError("its segmentation has no polygon with three points or more")
    for polygon in polygons:
        _check_numbers(polygon, size)
    from pycocotools import mask as coco

    return decode_rle(coco.merge(coco.frPyObjects([[float(v) for v in polygon] for polygon in polygons], *size)), size)


def draw_shapes(shapes: Sequence[tuple[Any, int]], size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """LabelMe polygons ([[x, y], ...], value) drawn one over the other: a line of one pixel and what is within,
    after cutting the coordinates to whole numbers (DATA.md 1.3). DataError for points that are none."""
    import cv2

    mask = np.zeros(size, np.uint8)
    for points, value in shapes:
        if (not isinstance(points, list) or not points
                or not all(isinstance(point, list) and len(point) == 2 for point in points)):
            raise DataError(f"the points of a shape are {_short(points)}, not a list of [x, y]")
        _check_numbers(list(itertools.chain.from_iterable(points)), size)
        vertices = np.array([points]).astype(np.int32)
        cv2.polylines(mask, vertices, True, value, 1)
        cv2.fillPoly(mask, vertices, value)
    return mask


def _check_numbers(values: Sequence[Any], size: tuple[int, int]) -> None:
    """Coordinates far outside would make the drawing libraries claim memory without limit."""
    far = 16 * max(size)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -far <= value <= far:
            raise DataError(f"a polygon has the coordinate {_short(value)} in a frame of {size[0]}x{size[1]}")


# ------------------------------------------------------------------------------------------------------------
# 2 Tables and files
# ------------------------------------------------------------------------------------------------------------


class _Short(reprlib.Repr):
    """A pickle may hold lists so deep, or so often within each other, that repr never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxlong, self.maxother = 3, 60, 60, 60

    def repr_int(self, value: int, level: int) -> str:
        return super().repr_int(value, level) if _key(value) is not None else "a huge number"


def _short(value: Any) -> str:
    text = _Short().repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _get(record: Any, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """record[key] of this kind, or a DataError that says what it should have been."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"its {key} is {_short(value)}, not {what}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):  # half a letter
        raise DataError(f"its {key} is {_short(value)}, which is no proper text")
    return value


def _name(record: Any, key: str) -> str:
    """A number or text that names an object or a file."""
    value = str(_get(record, key, (int, str), "a number or a name"))
    if not value:
        raise DataError(f"its {key} is empty")
    return value


def _json(path: Path) -> Any:
    """JSON as utf-8 or, as some LabelMe files are, cp1252 (DATA.md 1.3)."""
    try:
        raw = path.read_bytes()
        try:
            return json.loads(raw)
        except UnicodeDecodeError:
            return json.loads(raw.decode("cp1252"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({data.first_line(error)})") from None


def _table(root: Path, *parts: str, kind: type = dict) -> Any:
    """The JSON object (or list) in root/parts; DataError when there is none, or a link leads out of `root`."""
    path = data._inside(root, *parts)
    value = _json(path)
    if not isinstance(value, kind):
        raise DataError(f"{path} holds no JSON {'object' if kind is dict else 'list'}")
    return value


class _PlainUnpickler(pickle.Unpickler):
    """Builds what JSON could hold: the name of any class or function, which could run code, is an error."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"it names {module}.{name}; only lists, dicts, texts and numbers are read")

    def persistent_load(self, pid: Any) -> Any:
        raise DataError("it refers to objects outside; only lists, dicts, texts and numbers are read")


def plain_pickle(root: Path, *parts: str) -> Any:
    """What a pickle of plain containers in root/parts holds, Python 2's texts as latin-1 (DATA.md 4.2, RefCOCO).

    DataError when it names anything else, is damaged or missing, or a link leads out of `root`.
    """
    path = data._inside(root, *parts)
    try:
        return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} cannot be read ({data.first_line(error)})") from None


def _bad(reason: str) -> Callable[[], Sample]:
    def refuse() -> Sample:
        raise DataError(reason)

    return refuse


def _folder(root: Path, *parts: str) -> Path:
    """root/parts, resolved; DataError when it is no folder or a link leads it out of `root`."""
    folder = data._inside(root, *parts)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    return folder.resolve()


def _first(root: Path, choices: Iterable[str]) -> str | None:
    """The first of these paths that is there: releases and mirrors differ in where they put things."""
    return next((choice for choice in choices if (root / choice).exists()), None)


def _image_files(decode: bool) -> Callable[[Path, str], tuple[Path, tuple[int, int]]]:
    """(folder, file name) -> path and (H, W); several queries share one image, which is looked at once."""

    @functools.lru_cache(maxsize=64)
    def find(folder: Path, name: str) -> tuple[Path, tuple[int, int]]:
        path = data._inside(folder, name)
        if not path.is_file():
            raise DataError(f"image {path} is missing")
        return path, data.decode_image(path).shape[:2] if decode else data._image_size(path)

    return find


# ------------------------------------------------------------------------------------------------------------
# 3 Referring videos (DATA.md 4.2)
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Expression:
    """What the datasets' own part of a record is made of."""

    video: str
    entry: dict  # what the table says about the video
    id: str
    said: dict  # what it says about the expression
    stems: list[str]
    size: tuple[int, int]
    decode: bool


def _videos(root: Path, table: str) -> dict:
    videos = _table(root, table).get("videos")
    if not isinstance(videos, dict):
        raise DataError(f"{root / table} has no object 'videos'")
    return videos


def _video_records(name: str, split: str, videos: dict, folder: Path, decode: bool,
                   truth: Callable[[_Expression], dict], *, text: str = "exp") -> list[Record]:
    """One record per expression of `videos`, {vid: {"frames": [stems], "expressions": {eid: {"exp": ...}}}}, over
    folder/JPEGImages. `truth` gives the fields of Sample in which the datasets differ."""
    _folder(folder, "JPEGImages")
    frames_of = functools.lru_cache(maxsize=8)(functools.partial(data._video_frames, folder, decode))

    def make(video: str, entry: dict, eid: str, expression: Any) -> Sample:
        stems = _get(entry, "frames", list, "a list of frame names")
        if not stems or not all(isinstance(stem, str) for stem in stems):
            raise DataError("its frames are not a list of frame names")
        query = _get(expression, text, str, "a text").strip()
        if not query:
            raise DataError(f"its {text} is empty")
        frames, size = frames_of(video, tuple(stems))
        fields = truth(_Expression(video, entry, eid, expression, stems, size, decode))
        sample = Sample(
            id=f"{video}/{eid}", dataset=name, split=split, kind="video" if len(stems) > 1 else "image",
            frames=list(frames), frame_names=list(stems), size=size, query=query)
        return replace(sample, **fields | {"meta": {"video": video, "expression": eid} | fields.get("meta", {})})

    records: list[Record] = []
    for video, entry in videos.items():
        expressions = entry.get("expressions") if isinstance(entry, dict) else None
        if not isinstance(expressions, dict):
            records.append((video, _bad(f"its expressions are {_short(expressions)}, not an object")))
            continue
        records += [(f"{video}/{eid}", functools.partial(make, video, entry, eid, expression))
                    for eid, expression in expressions.items()]
    return records


def _checked(masks: MaskAt, about: _Expression) -> MaskAt:
    """The same; every one of them is looked at when all pixels are to be checked."""
    for position in range(len(about.stems)) if about.decode else ():
        masks(position)
    return masks


def _tracks(tracks: Sequence[Any], about: _Expression) -> MaskAt:
    """position -> union of mask tracks, each a list with one RLE, or null, per frame."""
    for track in tracks:
        if not isinstance(track, list) or len(track) != len(about.stems):
            length = len(track) if isinstance(track, list) else "no"
            raise DataError(f"its mask track has {length} entries, its video {len(about.stems)} frames")

    def read(position: int) -> np.ndarray:
        mask = np.zeros(about.size, dtype=bool)
        for track in tracks:
            if track[position] is not None:
                mask |= decode_rle(track[position], about.size)
        return mask

    return _checked(read, about)


def _tracks_of(about: _Expression, mask_dict: dict) -> tuple[list[str], list[Any]]:
    ids = _get(about.said, "anno_id", list, "a list of numbers")
    if not all(type(id) is int or isinstance(id, str) for id in ids):
        raise DataError(f"its anno_id is {_short(ids)}, not a list of numbers")
    ids = [str(id) for id in ids]
    if missing := [id for id in ids if id not in mask_dict]:
        raise DataError(f"mask_dict has no annotation {missing[0]}")
    return ids, [mask_dict[id] for id in ids]


def _indices(folder: Path, parts: tuple[str, ...], about: _Expression) -> MaskAt:
    """position -> uint8 [H, W]: the object indices of palette images parts/{stem}.png, which must all be there."""
    paths = [data._inside(folder, *parts, f"{stem}.png") for stem in about.stems]

    def check(this: tuple[int, ...], path: Path) -> None:
        if this != about.size:
            raise DataError(f"mask {path} is {this[0]}x{this[1]}, its frame {about.size[0]}x{about.size[1]}")

    def read(position: int) -> np.ndarray:
        with data._opened(paths[position]) as image:
            if image.mode not in ("P", "L", "1"):
                raise DataError(f"mask {paths[position]} holds no object indices; a palette image does")
            values = np.array(image).astype(np.uint8)
        check(values.shape, paths[position])
        return values

    for path in paths:
        with data._opened(path) as image:
            check((image.height, image.width), path)
    return _checked(read, about)


def _object(folder: Path, about: _Expression) -> dict:
    """The object obj_id of the palette images Annotations/{video}/{stem}.png."""
    id = _name(about.said, "obj_id")
    if not (id.isascii() and id.isdigit() and len(id) < 4 and 0 < int(id) < VOID):
        raise DataError(f"its obj_id is {_short(id)}; the objects of a palette image are 1 to {VOID - 1}")
    index, values = int(id), _indices(folder, ("Annotations", about.video), about)
    return {"target_ids": [id], "masks": lambda p: values(p) == index, "ignore": lambda p: values(p) == VOID}


HIDDEN = ("valid", "test")  # splits whose labels a server may keep


def _mevis(root: Path, split: str, decode: bool) -> list[Record]:
    """{split}/{JPEGImages/, meta_expressions.json, mask_dict.json}. The target is the union of anno_id, one or
    several objects; valid and test have no mask_dict: their labels are hidden."""
    folder = _folder(root, split)
    hidden = split in HIDDEN and not (folder / "mask_dict.json").is_file()
    mask_dict = {} if hidden else _table(folder, "mask_dict.json")

    def truth(about: _Expression) -> dict:
        if hidden:
            return {}
        ids, tracks = _tracks_of(about, mask_dict)
        if not ids:
            raise DataError("it has no target (anno_id is empty), and MeViS has no such expressions")
        return {"target_ids": ids, "masks": _tracks(tracks, about)}

    return _video_records("mevis", split, _videos(folder, META), folder, decode, truth)


REVOS_TYPES = ("referring", "reasoning", "no_target")  # type_id 0, 1, 2


def _revos(root: Path, split: str, decode: bool) -> list[Record]:
    """{JPEGImages/, meta_expressions_{split}_.json (with that underscore), mask_dict.json, mask_dict_foreground.json}.

    Video names may hold "/". type_id 2 has no target, whatever its anno_id, which may be empty there only.
    meta["foreground"] is per frame the RLE of everything that could be a target, for the score R.
    """
    mask_dict = _table(root, "mask_dict.json")
    foregrounds = _table(root, FOREGROUND) if (root / FOREGROUND).is_file() else {}

    def truth(about: _Expression) -> dict:
        kind = _get(about.said, "type_id", int, "0, 1 or 2")
        if kind not in (0, 1, 2):
            raise DataError(f"its type_id is {kind}, not 0, 1 or 2")
        ids, tracks = _tracks_of(about, mask_dict)
        if kind == 2:
            ids, tracks = [], []
        elif not ids:
            raise DataError(f"its type_id is {kind}, but its anno_id is empty")
        meta: dict[str, Any] = {"type_id": kind}
        if about.video in foregrounds:
            entries = _get(foregrounds[about.video], "masks_rle", list, "a list of RLEs")
            if len(entries) != len(about.stems):
                raise DataError(f"its masks_rle has {len(entries)} entries, its video {len(about.stems)} frames")
            for entry in entries if decode else ():
                foreground_mask(entry, about.size)
            meta["foreground"] = entries
        return {"ability": REVOS_TYPES[kind], "target_ids": ids, "masks": _tracks(tracks, about),
                "initial_count": 0 if kind == 2 else -1, "meta": meta}

    return _video_records("revos", split, _videos(root, f"meta_expressions_{split}_.json"), root, decode, truth)


def foreground_mask(entry: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask of one entry of a ReVOS sample's meta["foreground"]: an RLE, a list of them, or nothing."""
    return decode_segmentation(entry, size) if entry else np.zeros(size, dtype=bool)


def _ref_youtube_vos(root: Path, split: str, decode: bool) -> list[Record]:
    """{split}/JPEGImages/, meta_expressions/{split}/meta_expressions.json, and for train Annotations/{video}/*.png
    with object indices. The labels of valid are on a server, and its table lists the videos of test as well, which
    meta_expressions/test, if there, names."""
    folder, videos = _folder(root, split), _videos(root, f"meta_expressions/{split}/{META}")
    if split == "valid" and (root / "meta_expressions" / "test" / META).is_file():
        others = _videos(root, f"meta_expressions/test/{META}")
        videos = {video: entry for video, entry in videos.items() if video not in others}

    def truth(about: _Expression) -> dict:
        # No void here: an index of 255 would be an object of its own.
        return {} if split == "valid" else _object(folder, about) | {"ignore": None}

    return _video_records("ref_youtube_vos", split, videos, folder, decode, truth)


def _ref_davis17(protocol: str, root: Path, split: str, decode: bool) -> list[Record]:
    """The layout that ReferFormer's converter writes, like Ref-YouTube-VOS's with all labels (DATA.md 4.2).

    Expression eid is number eid % 4 of its object's four: two annotators, each from the first frame and from the
    full video. Protocol A takes the palette images, whose index 255 counts nowhere. Protocol B (VISA's) takes
    {split}/mask_dict.json (theirs, a pickle, as JSON), in which expressions are numbered in the order of sorted videos
    and, as texts, sorted expression ids ("10" before "2"). Scores of A and B cannot be compared: two datasets.
    """
    folder, videos = _folder(root, split), _videos(root, f"meta_expressions/{split}/{META}")
    mask_dict = _davis_mask_dict(folder) if protocol == "b" else {}
    pairs = [(video, eid) for video, entry in sorted(videos.items())
             if isinstance(entry, dict) and isinstance(entry.get("expressions"), dict)
             for eid in sorted(entry["expressions"])]
    numbers = {pair: str(number) for number, pair in enumerate(pairs)}

    def truth(about: _Expression) -> dict:
        if not (about.id.isascii() and about.id.isdigit() and len(about.id) < 10):
            raise DataError(f"its expression id is {_short(about.id)}, not 4 * object + annotator")
        meta = {"annotator": int(about.id) % 4, "object": _name(about.said, "obj_id")}
        if protocol == "a":
            return _object(folder, about) | {"meta": meta}
        number = numbers[about.video, about.id]
        if number not in mask_dict:
            raise DataError(f"mask_dict has no annotation {number}")
        return {"target_ids": [number], "masks": _tracks([mask_dict[number]], about), "meta": meta}

    return _video_records(f"ref_davis17_{protocol}", split, videos, folder, decode, truth)


def _davis_mask_dict(folder: Path) -> dict:
    if not (folder / "mask_dict.json").is_file():
        pickled = folder / "mask_dict.pkl"
        if pickled.is_file():
            command = ("from pickle import load; import json; json.dump(load(open(\"mask_dict.pkl\", \"rb\")), "
                       "open(\"mask_dict.json\", \"w\"), default=bytes.decode)")
            raise DataError(f"{pickled} is a pickle, which could run anything; if you trust it, write it as JSON "
                            f"in its folder: python -c '{command}'")
        raise DataError(f"{folder} has no mask_dict.json, which protocol B needs; ref_davis17_a reads palette images")
    mask_dict = _table(folder, "mask_dict.json")
    if not isinstance(mask_dict, dict):
        raise DataError(f"{folder}/mask_dict.json holds no dictionary")
    return mask_dict


def _long_rvos(root: Path, split: str, decode: bool) -> list[Record]:
    """{split}/{JPEGImages/, Annotations/{video}/{obj_id}/{frame}.png of 255, meta_expressions.json}, masks as in
    Ambi-RVOS; the expression's type is static, dynamic or hybrid. Valid or test without an Annotations folder: labels
    are hidden."""
    folder = _folder(root, split)
    labelled = (folder / "Annotations").is_dir()
    if not labelled and split not in HIDDEN:
        raise DataError(f"{folder} has no Annotations folder")

    def truth(about: _Expression) -> dict:
        id, kind = _name(about.said, "obj_id"), _get(about.said, "type", str, "static, dynamic or hybrid")
        parts = ("Annotations", about.video, id)
        if not labelled:
            return {"ability": kind}
        if not data._inside(folder, *parts).is_dir():
            raise DataError(f"{'/'.join(parts)} is missing")
        masks = data._mask_reader(folder, parts, about.stems, about.size, decode)
        return {"ability": kind, "target_ids": [id], "masks": masks}

    return _video_records("long_rvos", split, _videos(folder, META), folder, decode, truth)


def _reason_vos(root: Path, split: str, decode: bool) -> list[Record]:
    """{JPEGImages/, Annotations/{source}_{video}_{obj_id}/{frame}.png, meta_expressions.json}: not in DATA.md; read
    off showlab/VideoLISA's benchmark_check.py and its evaluation. The text is called exp_text, the one split valid,
    `source` is in small letters in the names of folders. As for their scorer, any pixel but 0 is target, and frames
    without a mask file are not scored."""

    def truth(about: _Expression) -> dict:
        source, id = _get(about.entry, "source", str, "the name of a dataset"), _name(about.said, "obj_id")
        places = [("Annotations", f"{s}_{about.video}_{id}") for s in dict.fromkeys((source, source.lower()))]
        parts = next((p for p in places if data._inside(root, *p).is_dir()), None)
        if parts is None:
            raise DataError(f"{'/'.join(places[-1])} is missing")
        there = [p for p, stem in enumerate(about.stems) if data._inside(root, *parts, f"{stem}.png").is_file()]
        if not there:
            raise DataError(f"{'/'.join(parts)} holds no mask of a frame")
        values = _indices(root, parts, replace(about, stems=[about.stems[p] for p in there]))
        meta = {"source": source, "is_sentence": bool(about.entry.get("is_sent"))}
        meta |= {"labelled": there} if len(there) < len(about.stems) else {}
        empty = np.zeros(about.size, dtype=bool)
        masks = lambda p: values(there.index(p)) > 0 if p in there else empty  # noqa: E731
        return {"target_ids": [id], "masks": masks, "meta": meta}

    return _video_records("reason_vos", split, _videos(root, META), root, decode, truth, text="exp_text")


# ------------------------------------------------------------------------------------------------------------
# 4 Images: ReasonSeg, PRIST, RefCOCO (DATA.md 1 and 4.2)
# ------------------------------------------------------------------------------------------------------------


def _reason_seg(root: Path, split: str, decode: bool) -> list[Record]:
    """{split}/{name}.jpg beside {name}.json: `text` (the first one is the query, as LISA scores it), `is_sentence`,
    and `shapes`, drawn in decreasing order of area: "ignore" as 255, "flag" not at all, anything else is target."""
    folder, find = _folder(root, split), _image_files(decode)

    def make(stem: str) -> Sample:
        about = _table(folder, f"{stem}.json")
        texts = _get(about, "text", list, "a list of texts")
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise DataError(f"its text is {_short(texts)}, not a list of texts")
        image, size = find(folder, f"{stem}.jpg")
        kinds = []
        for shape in _get(about, "shapes", list, "a list of shapes"):
            label = _get(shape, "label", str, "target, ignore or flag").lower()
            if label != "flag":
                points = _get(shape, "points", list, "a list of [x, y]")
                kinds.append((points, VOID if "ignore" in label else 1))
        if all(value == VOID for _, value in kinds):
            raise DataError("none of its shapes is a target")
        # numpy's own order among equal areas, since LISA's later shapes cover its earlier ones.
        areas = [int(np.count_nonzero(draw_shapes([(points, 1)], size))) for points, _ in kinds]
        ordered = [kinds[i] for i in np.argsort(areas)[::-1]]
        return Sample(
            id=stem, dataset="reason_seg", split=split, kind="image", frames=[image], frame_names=[IMAGE_STEM],
            size=size, query=texts[0].strip(), ability="long" if about.get("is_sentence") else "short",
            target_ids=["target"], masks=lambda p: draw_shapes(ordered, size) == 1,
            ignore=lambda p: draw_shapes(ordered, size) == VOID,
            meta={"image": image.name, "texts": texts, "is_sentence": bool(about.get("is_sentence"))})

    return [(path.stem, functools.partial(make, path.stem)) for path in _reason_seg_tables(root, split)]


def _reason_seg_tables(root: Path, split: str) -> list[Path]:
    return sorted((root / split).glob("*.json"))


PRIST_TABLES = {"train": "processed_multiturn_tot_01.json", "val": "processed_val_02.json"}  # the authors' names
PRIST_FOLDERS = (("textcaps/train", "textcaps/masks"), ("val", "val/masks"), ("images", "masks"))


def _prist(root: Path, split: str, decode: bool) -> list[Record]:
    """A list of {img_id, dialogue, focus}; images in textcaps/train, val or images, LabelMe masks beside (DATA.md 1.3).

    The query is the last human turn; `dialogue` is what came before it, meta["answer"] what is said with the mask.
    The mask is the union of all shapes whose label contains `focus`, in any case. Where upstream makes an empty
    mask because no label does, the record is refused: PRIST has no empty targets. No folder of masks (only the test
    table is public): masks None.
    """
    entries = _table(root, _talk_tables(PRIST_TABLES, root, split)[0].name, kind=list)
    find = _image_files(decode)

    def make(entry: Any, id: str) -> Sample:
        name = _get(entry, "img_id", str, "the name of an image")
        focus = _get(entry, "focus", str, "a text").strip()
        if not focus:
            raise DataError("its focus is empty")
        *before, (query, answer) = _rounds(entry, "dialogue")
        places = [(i, m) for i, m in PRIST_FOLDERS if data._inside(root, i, name).is_file()]
        if not places:
            raise DataError(f"image {name} is in none of {', '.join(i for i, _ in PRIST_FOLDERS)}")
        # Images of one name may be in several folders: the one that has a mask, or else may have one, is meant.
        label = f"{Path(name).stem}.json"
        place, folder = max(places, key=lambda p: (data._inside(root, p[1], label).is_file(), (root / p[1]).is_dir()))
        image, size = find(_folder(root, place), name)
        return Sample(
            id=id, dataset="prist", split=split, kind="image", frames=[image], frame_names=[IMAGE_STEM], size=size,
            query=query, dialogue=_dialogue(before), target_ids=[focus],
            masks=masks(folder, label, focus, size),
            meta={"image": name, "focus": focus, "answer": answer})

    def masks(folder: str, name: str, focus: str, size: tuple[int, int]) -> MaskAt | None:
        path = data._inside(root, folder, name)
        if not path.is_file():
            if (root / folder).is_dir():
                raise DataError(f"{path} is missing")
            return None
        about = _table(root, folder, name)
        given = tuple(_get(about, key, int, "a number of pixels") for key in ("imageHeight", "imageWidth"))
        if given != size:
            raise DataError(f"{path} is for {given[0]}x{given[1]} pixels, its image has {size[0]}x{size[1]}")
        shapes = [(_get(shape, "label", str, "a text"), shape.get("points"))
                  for shape in _get(about, "shapes", list, "a list of shapes")]
        found = [(points, 1) for label, points in shapes if focus.lower() in label.lower()]
        if not found:
            raise DataError(f"no shape of {path} is labelled {focus!r}")
        draw_shapes(found, size)  # now, so that bad points refuse the record
        return lambda p: draw_shapes(found, size).astype(bool)

    return _numbered(entries, "img_id", make)


LLAVA_TABLES = {"train": "llava_instruct_150k.json"}
LLAVA_FOLDERS = ("images", "train2017", "coco/train2017")


def _llava(root: Path, split: str, decode: bool) -> list[Record]:
    """A list of {id, image, conversations: [{from, value}]}, talk about images without a mask, which MIRAS mixes with
    PRIST (DATA.md 1.4). The query is the last human turn, meta["answer"] what is answered; "<image>" is left out."""
    entries, find = _table(root, _talk_tables(LLAVA_TABLES, root, split)[0].name, kind=list), _image_files(decode)

    def make(entry: Any, id: str) -> Sample:
        name = _get(entry, "image", str, "the name of an image")
        *before, (query, answer) = _rounds(entry, "conversations")
        place = next((folder for folder in LLAVA_FOLDERS if data._inside(root, folder, name).is_file()), None)
        if place is None:
            raise DataError(f"image {name} is in none of {', '.join(LLAVA_FOLDERS)}")
        image, size = find(_folder(root, place), name)
        return Sample(
            id=id, dataset="llava", split=split, kind="image", frames=[image], frame_names=[IMAGE_STEM], size=size,
            query=query, dialogue=_dialogue(before), meta={"image": name, "answer": answer})

    return _numbered(entries, "id", make)


def _rounds(entry: Any, key: str) -> list[tuple[str, str]]:
    """(human, gpt) of every round of a conversation, one or more."""
    turns = _get(entry, key, list, "a list of turns")
    spoken = [(_get(turn, "from", str, "human or gpt"), _get(turn, "value", str, "a text")) for turn in turns]
    if len(spoken) < 2 or [who for who, _ in spoken] != ["human", "gpt"] * (len(spoken) // 2):
        raise DataError(f"its {key} does not alternate between human and gpt, from human to gpt")
    texts = [text.replace("<image>", "").strip() for _, text in spoken]
    if not all(texts):
        raise DataError(f"its {key} holds an empty turn")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _dialogue(rounds: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "text": text} for pair in rounds for role, text in zip(("user", "assistant"), pair,
                                                                                   strict=True)]


def _numbered(entries: list, key: str, make: Callable[[Any, str], Sample]) -> list[Record]:
    """Records whose ids are the entries' own with a running number: several speak of one image."""
    records: list[Record] = []
    count: Counter = Counter()
    for entry in entries:
        name = str(entry.get(key)) if isinstance(entry, dict) else "?"
        id = f"{name}#{count[name]}"
        count[name] += 1
        records.append((id, functools.partial(make, entry, id)))
    return records


def _talk_tables(names: dict[str, str], root: Path, split: str) -> list[Path]:
    """{split}.json or, where a split has one, the file's released name."""
    found = [f"{split}.json", *([names[split]] if split in names else [])]
    return [root / name for name in found if (root / name).is_file()][:1]


TRAIN2014 = ("train2014", "images/train2014", "images/mscoco/images/train2014")


def _refcoco(folder: str, by: str, root: Path, split: str, decode: bool) -> list[Record]:
    """{folder}/refs({by}).p, {folder}/instances.json and COCO's train2014; every sentence is a sample.

    A ref's own file_name ends in an annotation id and names no file: the image's name is in instances.json.
    """
    refs = plain_pickle(root, folder, f"refs({by}).p")
    instances = _table(root, folder, "instances.json")
    place = _first(root, TRAIN2014)
    if place is None:
        raise DataError(f"{root} has no images; COCO's train2014 is looked for in {', '.join(TRAIN2014)}")
    images_folder = _folder(root, place)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(f"{root / folder / f'refs({by}).p'} holds no list of refs")
    images, annotations = _by_id(instances, "images"), _by_id(instances, "annotations")
    categories = _by_id(instances, "categories")
    of_category = Counter((_key(a.get("image_id")), _key(a.get("category_id"))) for a in annotations.values())
    find = _image_files(decode)

    def make(ref: dict, sentence: Any, id: str) -> Sample:
        text = _get(sentence, "sent", str, "a text").strip()
        if not text:
            raise DataError("its sent is empty")
        image = _lookup(images, ref, "image_id", "image")
        annotation = _lookup(annotations, ref, "ann_id", "annotation")
        path, size = find(images_folder, _get(image, "file_name", str, "a file name"))
        mask = functools.partial(_coco_mask, annotation, "segmentation", image, size)
        if not mask().any():
            raise DataError(f"the mask of annotation {ref['ann_id']} is empty")
        category = categories.get(_key(annotation.get("category_id")), {}).get("name")
        same = of_category[_key(annotation.get("image_id")), _key(annotation.get("category_id"))]
        return Sample(
            id=id, dataset=f"{folder.replace('+', 'plus')}_{by}", split=split, kind="image", frames=[path],
            frame_names=[IMAGE_STEM], size=size, query=text, target_ids=[str(ref["ann_id"])], masks=lambda p: mask(),
            meta={"image": path.name, "ref_id": ref["ref_id"], "category": category, "same_category": same})

    records: list[Record] = []
    for number, ref in enumerate(refs):
        if ref.get("split") != split:
            continue
        ref_id, sentences = ref.get("ref_id"), ref.get("sentences")
        if _key(ref_id) is None:
            records.append((f"ref number {number}", _bad(f"its ref_id is {_short(ref_id)}, not a number or a name")))
            continue
        name = str(ref_id)
        if not isinstance(sentences, list) or not sentences:
            records.append((name, _bad(f"its sentences are {_short(sentences)}, not a list of them")))
            continue
        for i, sentence in enumerate(sentences):
            sent_id = _key(sentence.get("sent_id")) if isinstance(sentence, dict) else None
            id = f"{name}/{i if sent_id is None else sent_id}"
            records.append((id, functools.partial(make, ref, sentence, id)))
    return records


def _key(id: Any) -> Any:
    """What a dict can be asked for; an id that is no number or text, or a number too long to print, finds nothing."""
    return id if isinstance(id, str) or isinstance(id, int) and id.bit_length() < 64 else None


def _by_id(table: dict, key: str) -> dict[Any, dict]:
    rows = table.get(key)
    if not isinstance(rows, list):
        raise DataError(f"the table of annotations has no list {key!r}")
    return {_key(row.get("id")): row for row in rows if isinstance(row, dict)}


def _lookup(rows: dict[Any, dict], record: dict, key: str, what: str) -> dict:
    id = _get(record, key, (int, str), "a number")
    if id not in rows:
        raise DataError(f"there is no {what} {id}")
    return rows[id]


def _coco_mask(annotation: dict, key: str, image: dict, size: tuple[int, int]) -> np.ndarray:
    given = tuple(_get(image, name, int, "a number of pixels") for name in ("height", "width"))
    if given != size:
        raise DataError(f"its annotation is for {given[0]}x{given[1]} pixels, its image has {size[0]}x{size[1]}")
    return decode_segmentation(annotation.get(key), size)


# ------------------------------------------------------------------------------------------------------------
# 5 Complete masks: COCOA-cls, D2SA, MUVA, and R2SM's queries over them (DATA.md 2)
# ------------------------------------------------------------------------------------------------------------

AMODAL_QUERIES = {"modal": "segment the visible part of the {}", "amodal": "segment the whole {}, including the "
                  "hidden part"}  # DATA.md 6.5: these sets have names of things, no queries


def _coco_amodal(name: str, tables: dict[str, str], images: dict[str, str], root: Path, split: str, decode: bool, *,
                 amodal_key: str = "segmentation", visible_key: str = "visible_mask") -> list[Record]:
    """COCO's {images, annotations, categories} with the complete mask in `segmentation` (DATA.md 2.2).

    Every annotation is two samples, one that asks for what can be seen of it and one for all of it;
    initial_count is how many of its kind are in the image.
    """
    table = _table(root, str(_amodal_tables(tables, root, split)[0].relative_to(root)))
    rows = _by_id(table, "images")
    annotations, categories = table.get("annotations"), _by_id(table, "categories")
    if not isinstance(annotations, list):
        raise DataError("the table of annotations has no list 'annotations'")
    folder = _folder(root, images[split])
    alike = Counter((_key(a.get("image_id")), _key(a.get("category_id"))) for a in annotations if isinstance(a, dict))
    find = _image_files(decode)

    def make(annotation: dict, mask_type: str, id: str) -> Sample:
        image = _lookup(rows, annotation, "image_id", "image")
        category = _get(_lookup(categories, annotation, "category_id", "category"), "name", str, "a text")
        path, size = find(folder, _get(image, "file_name", str, "a file name"))

        def draw() -> tuple[np.ndarray, np.ndarray]:
            whole = _coco_mask(annotation, amodal_key, image, size)
            if annotation.get(visible_key) is not None:
                return decode_segmentation(annotation[visible_key], size), whole
            if annotation.get("invisible_mask") is not None:
                return whole & ~decode_segmentation(annotation["invisible_mask"], size), whole
            return whole, whole  # neither is there when nothing covers it

        masks, rate = _both(draw)
        return Sample(
            id=id, dataset=name, split=split, kind="image", frames=[path], frame_names=[IMAGE_STEM], size=size,
            query=AMODAL_QUERIES[mask_type].format(category.replace("_", " ")), mask_type=mask_type,
            initial_count=alike[annotation["image_id"], annotation["category_id"]],
            target_ids=[str(annotation["id"])], **masks,
            meta={"image": path.name, "category": category, "occlude_rate": rate})

    records: list[Record] = []
    for number, annotation in enumerate(annotations):
        id = _key(annotation.get("id")) if isinstance(annotation, dict) else None
        if id is None:
            records.append((f"annotation number {number}", _bad("it has no id")))
            continue
        records += [(f"{id}/{kind}", functools.partial(make, annotation, kind, f"{id}/{kind}"))
                    for kind in AMODAL_QUERIES]
    return records


def _both(draw: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[dict, float]:
    """The two masks as fields of a Sample, drawn whenever one is asked for, and |invisible| / |amodal| (DATA.md 2.2).
    """
    visible, whole = draw()
    if not visible.any():
        raise DataError("nothing of it can be seen (occlude_rate 1)")  # DATA.md 7: such records are dropped
    rate = float(np.count_nonzero(whole & ~visible) / max(np.count_nonzero(whole), 1))
    return {"masks": lambda p: draw()[0], "amodal_masks": lambda p: draw()[1]}, rate


def _amodal_tables(tables: dict[str, str], root: Path, split: str) -> list[Path]:
    found = _first(root, (f"annotations/{tables[split]}", tables[split]))
    return [] if found is None else [root / found]


def _r2sm(root: Path, split: str, decode: bool) -> list[Record]:
    """{split}_queries.json, a list of {id, image_path, query, mask_type, ann_id, category, visible_rle, amodal_rle,
    occlude_rate, source}: this project's own form (DATA.md 2.3), since the authors' is not public."""
    find = _image_files(decode)

    def make(entry: Any, id: str) -> Sample:
        query, mask_type = _get(entry, "query", str, "a text").strip(), entry.get("mask_type")
        if not query:
            raise DataError("its query is empty")
        if mask_type not in data.MASK_TYPES:
            raise DataError(f"its mask_type is {_short(mask_type)}; use one of {', '.join(data.MASK_TYPES)}")
        path, size = find(root, _get(entry, "image_path", str, "the path of an image"))

        def draw() -> tuple[np.ndarray, np.ndarray]:
            visible, whole = (decode_segmentation(entry.get(key), size) for key in ("visible_rle", "amodal_rle"))
            return visible, whole

        masks, rate = _both(draw)
        if entry.get("segmentation_rle") is not None:  # the truth of this query, and so one of the two
            given = decode_segmentation(entry["segmentation_rle"], size)
            if not np.array_equal(given, draw()[mask_type == "amodal"]):
                raise DataError(f"its segmentation_rle is not its {mask_type} mask")
        return Sample(
            id=id, dataset="r2sm", split=split, kind="image", frames=[path], frame_names=[IMAGE_STEM], size=size,
            query=query, mask_type=mask_type, target_ids=[_name(entry, "ann_id")], **masks,
            meta={"image": entry["image_path"], "occlude_rate": rate}
            | {key: entry[key] for key in ("category", "source") if isinstance(entry.get(key), str)})

    records: list[Record] = []
    for number, entry in enumerate(_table(root, f"{split}_queries.json", kind=list)):
        id = str(entry.get("id", number) if isinstance(entry, dict) else number)
        records.append((id, functools.partial(make, entry, id)))
    return records


# ------------------------------------------------------------------------------------------------------------
# 6 Which datasets there are
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """One dataset: its splits, the files that make up a split (none: the split is not there), and its records."""

    splits: tuple[str, ...]
    tables: Callable[[Path, str], list[Path]]
    records: Callable[..., Iterable[Record]]  # (resolved folder, split, decode, **keys)
    needs: str  # what its folder must hold, for the line that says it does not
    keys: tuple[str, ...] = ()  # names of annotation fields that a user may have to give
    labels: tuple[str, ...] = ()  # folders of labels that may come later; {split} stands for the split's name


def _files(*names: str) -> Callable[[Path, str], list[Path]]:
    """The files of a split that are there, none without the first; {split} stands for its name."""

    def tables(root: Path, split: str) -> list[Path]:
        paths = [root / name.format(split=split) for name in names]
        return [path for path in paths if path.is_file()] if paths[0].is_file() else []

    return tables


def _refcoco_set(folder: str, by: str, splits: tuple[str, ...]) -> Dataset:
    return Dataset(splits, _files(f"{folder}/refs({by}).p", f"{folder}/instances.json"),
                   functools.partial(_refcoco, folder, by), f"{folder}/refs({by}).p")


def _amodal_set(name: str, tables: dict[str, str], images: dict[str, str], keys: tuple[str, ...] = ()) -> Dataset:
    return Dataset(tuple(tables), functools.partial(_amodal_tables, tables),
                   functools.partial(_coco_amodal, name, tables, images), " or ".join(tables.values()), keys)


_UNC = ("train", "val", "testA", "testB")
_AMBI = "train.parquet or test.parquet"

DATASETS: dict[str, Dataset] = {
    "ambi_rvos": Dataset(data.SPLITS, data._ambi_tables, functools.partial(data._ambi_records, "ambi_rvos"), _AMBI),
    "ok_vos": Dataset(data.SPLITS, data._ambi_tables, functools.partial(data._ambi_records, "ok_vos"), _AMBI),
    "mevis": Dataset(("train", "valid_u", "valid", "test"), _files("{split}/" + META, "{split}/mask_dict.json"),
                     _mevis, f"valid_u/{META}"),
    "revos": Dataset(("train", "valid"), _files("meta_expressions_{split}_.json", "mask_dict.json", FOREGROUND),
                     _revos, "meta_expressions_valid_.json"),
    "ref_youtube_vos": Dataset(("train", "valid"), _files("meta_expressions/{split}/" + META,
                                                           f"meta_expressions/test/{META}"),
                               _ref_youtube_vos, f"meta_expressions/valid/{META}"),
    "ref_davis17_a": Dataset(("train", "valid"), _files("meta_expressions/{split}/" + META),
                             functools.partial(_ref_davis17, "a"), f"meta_expressions/valid/{META}"),
    "ref_davis17_b": Dataset(("train", "valid"), _files("meta_expressions/{split}/" + META, "{split}/mask_dict.json"),
                             functools.partial(_ref_davis17, "b"), f"meta_expressions/valid/{META}"),
    "long_rvos": Dataset(("train", "valid", "test"), _files("{split}/" + META), _long_rvos, f"test/{META}",
                         labels=("{split}/Annotations",)),
    "reason_seg": Dataset(("train", "val", "test"), _reason_seg_tables, _reason_seg, "val/*.json"),
    "reason_vos": Dataset(("valid",), _files(META), _reason_vos, META),
    "refcoco_unc": _refcoco_set("refcoco", "unc", _UNC),
    "refcoco_google": _refcoco_set("refcoco", "google", ("train", "val", "test")),
    "refcocoplus_unc": _refcoco_set("refcoco+", "unc", _UNC),
    "refcocog_google": _refcoco_set("refcocog", "google", ("train", "val")),
    "refcocog_umd": _refcoco_set("refcocog", "umd", ("train", "val", "test")),
    "prist": Dataset(("train", "val", "test"), functools.partial(_talk_tables, PRIST_TABLES), _prist, "test.json",
                     labels=tuple(masks for _, masks in PRIST_FOLDERS)),
    "llava": Dataset(("train", "val", "test"), functools.partial(_talk_tables, LLAVA_TABLES), _llava,
                     "llava_instruct_150k.json"),
    "r2sm": Dataset(("train", "val", "test"), _files("{split}_queries.json"), _r2sm, "test_queries.json"),
    "cocoa_cls": _amodal_set("cocoa_cls", {s: f"COCO_amodal_{s}2014_with_classes.json" for s in ("train", "val")},
                             {"train": "train2014", "val": "val2014"}),
    "d2sa": _amodal_set("d2sa", {"train": "D2S_amodal_training_rot0.json", "augmented": "D2S_amodal_augmented.json",
                                 "val": "D2S_amodal_validation.json"},
                        dict.fromkeys(("train", "augmented", "val"), "images")),
    # Its schema is not public (DATA.md 2.2): COCO's is assumed, and the two masks may be called otherwise.
    "muva": _amodal_set("muva", {s: f"{s}.json" for s in ("train", "val", "test")},
                        dict.fromkeys(("train", "val", "test"), "images"), ("amodal_key", "visible_key")),
}


def dataset(name: str) -> Dataset:
    """The dataset of that name; DataError, with the nearest one, when there is none."""
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r}{data._closest(name, DATASETS)}; use one of {', '.join(DATASETS)}")
    return DATASETS[name]


def splits_of(name: str, root: str | Path) -> list[str]:
    """The splits of dataset `name` that the folder `root` holds. DataError when it holds none of them."""
    known, root = dataset(name), Path(root)
    if not root.is_dir():
        raise DataError(f"no dataset folder {root}")
    found = [split for split in known.splits if known.tables(root, split)]
    if not found:
        raise DataError(f"no {known.needs} with a record in {root}")
    return found


def records(name: str, root: str | Path, split: str, *, decode: bool = False, **keys: str) -> Iterable[Record]:
    """(id, how to open it) of every record of a split; a list (so its length is known) but for parquet tables.

    DataError when the folder, the split or its tables are not there or not what they should be.
    """
    known = dataset(name)
    if split not in known.splits:
        raise DataError(f"unknown split {split!r} of {name}; use one of {', '.join(known.splits)}")
    if wrong := sorted(set(keys) - set(known.keys)):
        raise DataError(f"{name} has no {wrong[0]!r}; it takes {', '.join(known.keys) or 'no further keys'}")
    if not Path(root).is_dir():
        raise DataError(f"no dataset folder {root}")
    if not known.tables(Path(root), split):
        raise DataError(f"{root} holds no split {split!r} of {name}; it has {', '.join(splits_of(name, root))}")
    return known.records(Path(root).resolve(), split, decode, **keys)


def read(name: str, root: str | Path, split: str, *, strict: bool = False, decode: bool = False,
         refused: list[tuple[str, str]] | None = None, **keys: str) -> Iterator[Sample]:
    """The samples of one split of a dataset, in the order of its tables, opened one by one.

    A record that is not as DATA.md says is left out: (id, reason) is appended to `refused`, or a warning says so
    when no list is given; `strict` raises instead. `decode` looks at every pixel of frames and masks. `keys`: for
    muva, amodal_key and visible_key. Raises DataError at once when a table is missing or is not what it should be.
    """
    opening = records(name, root, split, decode=decode, **keys)
    return data.open_records(opening, f"{split} of {root}", strict, refused)
