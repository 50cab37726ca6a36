"""Datasets: the in-memory `Sample`, Ambi-RVOS's reader, the prepared records, frame sampling and resizing.

    dataset's folder --readers.read--> Sample --prepare--> array_record files --load_prepared--> Sample

The layouts of all other datasets are in readers.py. `python -m icseg_jax.data --help` lists the commands.
Pure numpy and Pillow; pyarrow and tensorflow-datasets (which never needs TensorFlow here) are imported only
where they are used. Sources: METHOD.md 1 and 6 (what the authors' preprocessing does), DATA.md 3, 5 and 7
(layout, what tensorflow-datasets can do, the record).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from scipy import ndimage
from tqdm import tqdm

SPLITS = ("train", "test")
MASK_TYPES = ("modal", "amodal")
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP")  # not all that Pillow has: EPS starts Ghostscript
MAX_PIXELS = 64 * 2**20  # of one frame; a header that claims more is an attack or an accident
EXIF_ORIENTATION = 0x0112
# What goes wrong with this machine and not with a record: it is mended, and the same command goes on.
MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EROFS}


class DataError(ValueError):
    """Something outside is not as it must be: one line that says what, where, and what would work."""


def of_machine(error: BaseException) -> bool:
    """Whether this machine is at fault, and no record: one of MACHINE, or what was said in its stead."""
    return bool({getattr(e, "errno", None) for e in (error, error.__context__)} & MACHINE)


# ---------------------------------------------------------------------------------------------------------
# The record (DATA.md 7)
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One query on one image or video, from whatever dataset it came.

    Frames and masks are opened only when asked for. `masks(position)` and `amodal_masks(position)` give the
    visible and the complete mask of the target, Bool [H, W], on the frame at that position of `frames`; None
    where the dataset hides or lacks them. `privileged` is for the simulators and the expert: the policy
    never sees it.
    """

    id: str
    dataset: str
    split: str
    kind: str  # "image" | "video"
    frames: list[Path | bytes]  # encoded images, in temporal order
    frame_names: list[str]  # file stems
    size: tuple[int, int]  # (H, W) of the original frames, pixels
    query: str
    dialogue: list[dict[str, str]] | None = None  # [{"role", "text"}], a conversation that came before
    ability: str | None = None  # simple | medium | difficult | clear | none | one-hop ...
    target_ids: list[str] = field(default_factory=list)  # empty: the query has no target
    masks: Callable[[int], np.ndarray] | None = None
    amodal_masks: Callable[[int], np.ndarray] | None = None
    mask_type: str | None = None  # which of the two the query asks for: "modal" | "amodal"
    ignore: Callable[[int], np.ndarray] | None = None  # pixels that no metric counts
    initial_count: int = -1  # candidates that match the query; -1: unknown
    max_count: int = -1  # questions needed in the worst case; -1: unknown
    privileged: dict[str, Any] | None = None  # target_path, all_target_path, visual_paths, scene_graph, descriptions
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def frame_ids(self) -> list[int]:
        """The number by which the dialogue names each frame (METHOD.md 1.1)."""
        return [frame_id(name) for name in self.frame_names]

    def image(self, position: int) -> UInt8[np.ndarray, "h w 3"]:
        """The frame at `position`, RGB at its original size. DataError when it cannot be decoded."""
        return decode_image(self.frames[position])

    def truth(self, position: int) -> Bool[np.ndarray, "h w"]:
        """The mask that the query asks for: the complete one when `mask_type` is amodal, else the visible
        one."""
        masks = self.amodal_masks if self.mask_type == "amodal" else self.masks
        if masks is None:
            raise DataError(f"sample {self.id} of {self.dataset} has no {self.mask_type or 'modal'} masks")
        return masks(position)


# ---------------------------------------------------------------------------------------------------------
# Frames and masks
# ---------------------------------------------------------------------------------------------------------


def frame_id(stem: str) -> int:
    """The integer after the last underscore of a file stem: 00012 and clip_00012 are both 12 (METHOD.md 1.1).

    Not `int(stem)`: Python reads "1_2" as 12. A word may stand before the number, as in TAO's frame0391, which
    ReVOS took over; upstream fails on those. Raises DataError when no number stands there, or one of more digits
    than a key frame may have in an answer.
    """
    found = re.fullmatch(r"(?:[A-Za-z]+-?)?0{0,18}([0-9]{1,9})", stem.rsplit("_", 1)[-1])
    if not found:
        raise DataError(f"frame name {stem!r} does not end in a number of at most 9 digits; rename the frames to their "
                        "numbers: names like 00012 or clip_00012 work")
    return int(found[1])


def sample_frames(n_total: int, n: int, *, anchor: int | None = None) -> list[int]:
    """Positions of the frames shown to the policy (METHOD.md 1.1): all, or `n` of them evenly spread,
    truncated.

    `anchor` (training only: a frame on which the target is visible, any frame where there is no target) takes
    the place of the nearest of them, so that at least one good key frame is among those shown. Raises
    ValueError for counts below 1 or an anchor outside.
    """
    if n_total < 1 or n < 1:
        raise ValueError(f"cannot show {n} of {n_total} frames; both must be at least 1")
    if anchor is not None and not 0 <= anchor < n_total:
        raise ValueError(f"anchor {anchor} is not among the positions 0 to {n_total - 1}")
    if n >= n_total:
        return list(range(n_total))
    positions = [int(p) for p in np.linspace(0, n_total - 1, n)]
    if anchor is not None:
        nearest = min(range(n), key=lambda i: abs(positions[i] - anchor))
        positions[nearest] = anchor
    return sorted(positions)


def ground_truth(masks: Mapping[int, Bool[np.ndarray, "h w"]]) -> dict[str, dict]:
    """What the localisation rewards compare with: {frame id: {bbox_2d, point_2d, area, max_conn_area}}.

    METHOD.md 6. `masks`: frame id -> mask of the target, all of one size. Frames without a target pixel are
    absent. The box is the first and last pixel that are in (inclusive), the point is the pixel farthest from
    the background (the first such in row-major order), both as round(v / size * 1000) of width and height.
    `area` and `max_conn_area` (the largest 8-connected part) are divided by their maximum over the given
    frames.

    The distance is taken on the mask as it is (a choice METHOD.md leaves open): what lies outside the image
    is no background, so the point of an object cut by the border may lie on the border. Only a mask that
    fills the whole frame, where that distance is undefined, is measured from the border.
    """
    truth: dict[str, dict] = {}
    for fid, mask in masks.items():
        rows = np.flatnonzero(mask.any(axis=1))
        if rows.size == 0:
            continue
        height, width = mask.shape
        y1, y2 = int(rows[0]), int(rows[-1])
        columns = np.flatnonzero(mask[y1 : y2 + 1].any(axis=0))
        x1, x2 = int(columns[0]), int(columns[-1])
        # With one pixel more on every side, a nearest background pixel of each object pixel is in the crop.
        top, left = max(y1 - 1, 0), max(x1 - 1, 0)
        crop = mask[top : y2 + 2, left : x2 + 2]
        area = int(np.count_nonzero(crop))
        if area == height * width:
            distance = ndimage.distance_transform_edt(np.pad(crop, 1))[1:-1, 1:-1]
        else:
            distance = ndimage.distance_transform_edt(crop)
        py, px = np.unravel_index(int(distance.argmax()), distance.shape)
        parts, n_parts = ndimage.label(crop, structure=np.ones((3, 3), dtype=int))
        truth[str(fid)] = {
            "bbox_2d": [_thousandth(x1, width), _thousandth(y1, height),
                        _thousandth(x2, width), _thousandth(y2, height)],
            "point_2d": [_thousandth(left + int(px), width), _thousandth(top + int(py), height)],
            "area": area,
            "max_conn_area": area if n_parts == 1 else int(np.bincount(parts.ravel())[1:].max()),
        }
    for key in ("area", "max_conn_area"):
        largest = max((entry[key] for entry in truth.values()), default=1)
        for entry in truth.values():
            entry[key] = entry[key] / largest
    return truth


def _thousandth(value: int, size: int) -> int:
    return round(value / size * 1000)


def resize(image: UInt8[np.ndarray, "h0 w0 3"], height: int, width: int, *, method: str = "bicubic"
           ) -> UInt8[np.ndarray, "h w 3"]:
    """`image` at height x width; the aspect ratio is not kept (METHOD.md 1.1).

    `method`: "bicubic" for the frames shown at the start (what Qwen's processor uses), "lanczos" for the key
    frame (METHOD.md 1.5).
    """
    methods = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
    if method not in methods:
        raise ValueError(f"unknown resize method {method!r}; use one of {', '.join(methods)}")
    return np.array(Image.fromarray(image).resize((width, height), methods[method]))


def decode_image(source: Path | bytes) -> UInt8[np.ndarray, "h w 3"]:
    """An encoded image as RGB: upright (EXIF), palette and grey expanded, transparency laid on white, as
    transformers does before its image processors. DataError when it cannot be decoded."""
    with _opened(source) as image:
        return np.array(_rgb(image))


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    """The image of a file or of bytes; whatever goes wrong while it is open is a DataError that names it."""
    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name} claims {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name} is missing") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} cannot be read as an image; {', '.join(IMAGE_FORMATS)} can") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise DataError(f"{name} cannot be read as an image ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """What a user is told of an error: its first line, at most 500 characters; of a file's error, the file and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def _image_size(path: Path) -> tuple[int, int]:
    """(H, W) as `decode_image` would give them, from the header alone."""
    with _opened(path) as image:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _decode_mask(path: Path) -> Bool[np.ndarray, "h w"]:
    """A mask image: value (or palette index) 255 is the target. Any value but 0 and 255 is an error, because
    the released loader would not see it and the released scorer would (DATA.md 7)."""
    with _opened(path) as image:
        if image.mode == "1":
            return np.array(image)
        values = np.asarray(image)
    mask = values == 255
    if values.ndim != 2 or np.any(values[~mask]):
        raise DataError(f"{path} is no mask; a single channel with the values 0 and 255 is one")
    return mask


# ---------------------------------------------------------------------------------------------------------
# Records, which may be bad
# ---------------------------------------------------------------------------------------------------------

Record = tuple[str, Callable[[], Sample]]  # its id, and what opens it or says in a DataError why it cannot


def open_records(records: Iterable[Record], where: str, strict: bool,
                 refused: list[tuple[str, str]] | None) -> Iterator[Sample]:
    """The samples of the records that are as they should be, opened one by one.

    The others are left out: (id, reason), a line each, is appended to `refused`, or a warning says so when no list
    is given; `strict` raises DataError instead. `where` is the table they stand in.
    """
    for id, sample in _opened_records(records):
        if isinstance(sample, Sample):
            yield sample
        elif strict:
            raise DataError(f"record {id} of {where}: {sample}")
        elif refused is None:
            warnings.warn(f"record {id} of {where} is left out: {sample}", stacklevel=2)
        else:
            refused.append((id, sample))


def _opened_records(records: Iterable[Record], first: int = 0, step: int = 1) -> Iterator[tuple[str, Sample | str]]:
    """(id, sample, or why there is none) of the records first, first + step, ...; of the others only ids are looked at.
    """
    seen: set[str] = set()
    for number, (id, make) in enumerate(records):
        known = id in seen
        seen.add(id)
        if number < first or (number - first) % step:
            continue
        try:
            if known:
                raise DataError("its id belongs to an earlier record")
            sample: Sample | str = make()
        except (ValueError, OSError) as error:
            if of_machine(error):
                raise
            id, sample = _one_line(id), _one_line(str(error))[:500]
        yield id, sample


def _one_line(text: str) -> str:
    """Names come from files: a line break, or half a letter that cannot be printed, shows as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---------------------------------------------------------------------------------------------------------
# Ambi-RVOS on disk (METHOD.md 6, DATA.md 3.1 and 3.2)
# ---------------------------------------------------------------------------------------------------------

AMBI_COLUMNS = ("question", "images", "ability", "video", "oid")


def read_ambi_rvos(root: str | Path, split: str, *, strict: bool = False, decode: bool = False,
                   refused: list[tuple[str, str]] | None = None) -> Iterator[Sample]:
    """The records of `root`/{split}.parquet over `root`/RVOS_{Split}/ (or `root`/{split}/), in the order of the file.

    A record that is not as METHOD.md 6 says (missing frame, mask of another size, a path that leaves the
    folder ...) is left out: (id, reason) is appended to `refused`, or a warning says so when no list is
    given. `strict` raises instead. `decode` looks at every pixel of frames and masks, not only at the
    headers. A frame without mask file, or with an empty one, is a frame on which the target is not visible.
    The folders of the synthetic world (AmodalAnnotations, scene_graph) and the columns mask_type and object
    are used where they exist.

    Raises DataError at once when the folder or the parquet file is not there or lacks a column.
    """
    records = _ambi_records("ambi_rvos", Path(root), split, decode)
    return open_records(records, f"{Path(root) / split}.parquet", strict, refused)


def _ambi_records(dataset: str, root: Path, split: str, decode: bool) -> Iterator[Record]:
    """The records of Ambi-RVOS or of OK-VOS, which has the same layout under {split}/ (DATA.md 4.2)."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    if not root.is_dir():
        raise DataError(f"no dataset folder {root}")
    names = (f"RVOS_{split.capitalize()}", split)
    name = next((name for name in names if (root / name / "JPEGImages").is_dir()), None)
    if name is None:
        wanted = names[dataset == "ok_vos"]
        raise DataError(f"{root} is no {dataset} folder: {wanted}/JPEGImages is missing")
    root = root.resolve()
    rows = _parquet_rows(_inside(root, f"{split}.parquet"), AMBI_COLUMNS)
    folder = _inside(root, name).resolve()  # a link within the dataset is followed
    # Several queries share one video; its frames are looked at once.
    frames_of = functools.lru_cache(maxsize=64)(functools.partial(_video_frames, folder, decode))

    def records() -> Iterator[Record]:
        for index, row in enumerate(rows):
            id = str(index if row.get("id") is None else row["id"])
            yield id, functools.partial(_ambi_sample, dataset, row, id, folder, split, decode, frames_of)

    return records()


def _ambi_tables(root: Path, split: str) -> list[Path]:
    table = _inside(root.resolve(), f"{split}.parquet")
    return [table] if table.is_file() and _parquet(table).metadata.num_rows else []


def _ambi_sample(dataset: str, row: dict, id: str, folder: Path, split: str, decode: bool, frames_of: Callable
                 ) -> Sample:
    video, query, ability = (_text(row, key) for key in ("video", "question", "ability"))
    stems = row["images"]
    if not isinstance(stems, list) or not stems or not all(isinstance(s, str) for s in stems):
        raise DataError("its images are not a list of frame names")
    frames, size = frames_of(video, tuple(stems))
    mask_type = row.get("mask_type") or None
    if mask_type is not None and mask_type not in MASK_TYPES:
        raise DataError(f"its mask_type is {mask_type!r}; use one of {', '.join(MASK_TYPES)}")

    oid = None if ability == "none" else _oid(row["oid"])
    privileged: dict[str, Any] = {}
    aid = _whole(row.get("aid"))
    meta = {"video": video} | {k: v for k, v in (("object", row.get("object")), ("aid", aid)) if v is not None}
    if oid is None:  # nothing in the video matches the query
        masks = amodal_masks = _no_masks(size)
    else:
        if not _inside(folder, "Annotations", video, oid).is_dir():
            raise DataError(f"Annotations/{video}/{oid} is missing")
        masks = _mask_reader(folder, ("Annotations", video, oid), stems, size, decode)
        files = [_inside(folder, "Annotations", video, oid, f"{stem}.png") for stem in stems]
        there = [position for position, file in enumerate(files) if file.is_file()]
        if len(there) < len(stems):  # the released scorer looks at the frames that have a file (DATA.md 3.4)
            meta["labelled"] = there
        amodal_masks = None
        if _inside(folder, "AmodalAnnotations", video, oid).is_dir():
            amodal_masks = _mask_reader(folder, ("AmodalAnnotations", video, oid), stems, size, decode)
        elif mask_type == "amodal":
            raise DataError(f"it asks for complete masks, but AmodalAnnotations/{video}/{oid} is missing")
        privileged["target_path"] = _inside(folder, "description_oid", video, f"{object_number(oid)}.json")
        privileged["visual_paths"] = [_inside(folder, "Visualization", video, oid, f"{s}.jpg") for s in stems]
    if aid is not None:
        privileged["all_target_path"] = _inside(folder, "description_id", f"{aid}.json")
    graph = _inside(folder, "scene_graph", f"{video}.json")
    if graph.is_file():
        privileged["scene_graph"] = _json_object(graph)
    elif _inside(folder, "scene_graph").is_dir():  # the exact user and expert would know nothing of this one
        raise DataError(f"scene_graph/{video}.json is missing")
    told = {"target": privileged.get("target_path"), "candidates": privileged.get("all_target_path")}
    # Any JSON will do: the schema of the released files is not known (METHOD.md 6).
    privileged["descriptions"] = {k: _json(path) for k, path in told.items() if path and path.is_file()}

    return Sample(
        id=id, dataset=dataset, split=split, kind="video" if len(stems) > 1 else "image",
        frames=list(frames), frame_names=list(stems), size=size, query=query, ability=ability,
        target_ids=[] if oid is None else [oid], masks=masks, amodal_masks=amodal_masks, mask_type=mask_type,
        initial_count=_count(row, "initial_count"), max_count=_count(row, "max_count"), privileged=privileged,
        meta=meta,
    )


def _video_frames(folder: Path, decode: bool, video: str, stems: tuple[str, ...]
                 ) -> tuple[tuple[Path, ...], tuple[int, int]]:
    """The files of a video's frames and their common (H, W)."""
    numbers = [frame_id(stem) for stem in stems]
    if len(set(numbers)) < len(numbers):
        raise DataError(f"two of its frames have the number {Counter(numbers).most_common(1)[0][0]}")
    paths, size = [], None
    for stem in stems:
        candidates = (_inside(folder, "JPEGImages", video, stem + suffix) for suffix in FRAME_SUFFIXES)
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            raise DataError(f"frame JPEGImages/{video}/{stem}{FRAME_SUFFIXES[0]} is missing")
        this = decode_image(path).shape[:2] if decode else _image_size(path)
        if size is not None and this != size:
            raise DataError(f"frame {path} is {this[0]}x{this[1]}, others of its video {size[0]}x{size[1]}")
        size = this
        paths.append(path)
    assert size is not None  # stems is not empty
    return tuple(paths), size


def _mask_reader(folder: Path, parts: tuple[str, ...], stems: Sequence[str], size: tuple[int, int],
                 decode: bool) -> Callable[[int], np.ndarray]:
    """position -> mask, for the files {stem}.png of one object; a missing file is an empty mask."""
    paths = [_inside(folder, *parts, f"{stem}.png") for stem in stems]

    def read(position: int) -> np.ndarray:
        path = paths[position]
        if not path.is_file():
            return np.zeros(size, dtype=bool)
        mask = _decode_mask(path)
        check(mask.shape, path)
        return mask

    def check(this: tuple[int, ...], path: Path) -> None:
        if this != size:
            raise DataError(f"mask {path} is {this[0]}x{this[1]}, its frame {size[0]}x{size[1]}")

    for position, path in enumerate(paths):
        if decode:
            read(position)
        elif path.is_file():
            with _opened(path) as image:
                check((image.height, image.width), path)
    return read


def _no_masks(size: tuple[int, int]) -> Callable[[int], np.ndarray]:
    return lambda position: np.zeros(size, dtype=bool)


def _inside(folder: Path, *parts: str) -> Path:
    """folder/parts, where `folder` is resolved; DataError when '..', '/' or a link leads out of it."""
    names = "/".join(parts).split("/")
    path = folder.joinpath(*names)
    leaves = any(name in ("", ".", "..") for name in names)
    # Only a path with a link in it needs the costly look at where it really leads.
    if any(map(os.path.islink, itertools.accumulate(names, os.path.join, initial=str(folder)))):
        leaves |= not Path(os.path.realpath(path)).is_relative_to(folder)
    if leaves:
        raise DataError(f"path {'/'.join(parts)!r} leaves the dataset folder")
    return path


def _parquet(path: Path) -> Any:
    """The opened pyarrow.parquet.ParquetFile; DataError when there is none."""
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"no table {path}")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file ({first_line(error)})") from None


def _parquet_rows(path: Path, required: Sequence[str]) -> Iterator[dict]:
    """The rows of a table as dicts, a batch in memory at a time; the columns are checked at once."""
    import pyarrow

    table = _parquet(path)
    present = table.schema_arrow.names
    if missing := [column for column in required if column not in present]:
        raise DataError(f"{path} lacks the column {', '.join(missing)}; it has {', '.join(present)}")

    def rows() -> Iterator[dict]:
        try:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged ({first_line(error)})") from None

    return rows()


@contextlib.contextmanager
def whole_folder(out: Path, command: str) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends well, and is removed when it does not. DataError, in the
    name of the command, when `out` holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{command}: {out} exists already; remove it or choose another out=DIR")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        building.chmod(0o755)
        yield building
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _text(row: dict, key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise DataError(f"its {key} is {row[key]!r}, not a text")
    return row[key]


def _whole(value: Any) -> Any:
    """5 for 5.0: pandas writes integer columns with gaps as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _oid(value: Any) -> str:
    """The number or name of an object, as the name of its folder."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or str(value) == "":
        raise DataError(f"its oid is {value!r}, not the number or name of an object")
    return str(value)


def object_number(oid: str) -> str:
    """What the description of an object is called: its mask folder may be 007, the description of it is 7.json."""
    return str(int(oid)) if re.fullmatch("[0-9]{1,18}", oid) else oid


def _count(row: dict, key: str) -> int:
    value = -1 if row.get(key) is None else _whole(row[key])
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise DataError(f"its {key} is {value!r}, not a count")
    return value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({first_line(error)})") from None


def _json_object(path: Path) -> dict:
    value = _json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


# ---------------------------------------------------------------------------------------------------------
# Prepared records: array_record files written and read by tensorflow-datasets, without TensorFlow (DATA.md 5)
# ---------------------------------------------------------------------------------------------------------

RECORD_VERSION = "1.0.0"  # raise it when the features or their meaning change
IGNORED = 255  # in a record's masks: pixels that no metric counts
SHARD_BYTES = 128 * 2**20  # of one file, and so what a prepare that was killed has to do again
PROGRESS = "progress.json"  # of a prepare that is under way: which tables, where, and what is written of each split
MARKER = "prepared.json"  # written last: what we made, from what, and the size of every file


def _features(*, encoded: bool = False) -> Any:
    """The features of a record (DATA.md 5.3). `encoded` describes the same bytes without decoding images and
    masks, so that reading a sample costs only the frames that are looked at."""
    import tensorflow_datasets as tfds

    f = tfds.features
    raw = f.Tensor(shape=(), dtype=np.object_)
    frames = f.Sequence(raw) if encoded else f.Sequence(f.Image(shape=(None, None, 3)))
    masks = (f.FeaturesDict({"shape": f.Tensor(shape=(3,), dtype=np.int64), "value": raw}) if encoded
             else f.Tensor(shape=(None, None, None), dtype=np.uint8, encoding="zlib"))
    return f.FeaturesDict({
        "id": f.Text(), "video": f.Text(), "query": f.Text(), "ability": f.Text(),
        "frame_names": f.Sequence(f.Text()),
        "frames": frames,  # the files' own bytes: nothing is compressed twice
        "masks": masks,  # [T, H, W] of 0, 1 and IGNORED; [0, H, W] when the dataset hides them
        "amodal_masks": masks,
        "boxes": f.Sequence(f.Tensor(shape=(4,), dtype=np.int32)),  # 0..1000; zeros where it is not visible
        "points": f.Sequence(f.Tensor(shape=(2,), dtype=np.int32)),
        "initial_count": f.Scalar(np.int32), "max_count": f.Scalar(np.int32),
        "meta": f.Text(),  # JSON: everything else
    })


def _to_record(sample: Sample) -> dict:
    positions = range(len(sample))
    stacks = {}
    for key, masks in (("masks", sample.masks), ("amodal_masks", sample.amodal_masks)):
        stacks[key] = (np.zeros((0, *sample.size), dtype=np.uint8) if masks is None
                       else np.stack([masks(p) for p in positions]).astype(np.uint8))
    if sample.ignore is not None:
        for p, mask in enumerate(stacks["masks"]):
            mask[sample.ignore(p)] = IGNORED
    wanted = stacks["amodal_masks" if sample.mask_type == "amodal" else "masks"]
    truth = ground_truth({p: mask == 1 for p, mask in enumerate(wanted)})
    absent = {"bbox_2d": [0] * 4, "point_2d": [0] * 2}
    places = [truth.get(str(p), absent) for p in positions]
    return {
        "id": sample.id, "video": str(sample.meta.get("video", "")), "query": sample.query,
        "ability": sample.ability or "", "frame_names": sample.frame_names,
        "frames": [io.BytesIO(f if isinstance(f, bytes) else f.read_bytes()) for f in sample.frames],
        **stacks,
        "boxes": [np.array(place["bbox_2d"], np.int32) for place in places],
        "points": [np.array(place["point_2d"], np.int32) for place in places],
        "initial_count": sample.initial_count, "max_count": sample.max_count,
        "meta": json.dumps({
            "dataset": sample.dataset, "kind": sample.kind, "size": sample.size, "dialogue": sample.dialogue,
            "target_ids": sample.target_ids, "mask_type": sample.mask_type, "ignore": sample.ignore is not None,
            "scene_graph": (sample.privileged or {}).get("scene_graph"), "meta": sample.meta,
            "descriptions": (sample.privileged or {}).get("descriptions"),
        }),
    }


def _from_record(record: dict, split: str) -> Sample:
    about = json.loads(record["meta"])
    privileged = {k: about[k] for k in ("scene_graph", "descriptions") if about.get(k)}  # older ones have one of them
    masks = _unpacked(record["masks"])
    return Sample(
        id=record["id"].decode(), dataset=about["dataset"], split=split, kind=about["kind"],
        frames=list(record["frames"]), frame_names=[name.decode() for name in record["frame_names"]],
        size=tuple(about["size"]), query=record["query"].decode(), dialogue=about["dialogue"],
        ability=record["ability"].decode() or None, target_ids=about["target_ids"],
        masks=_equal(masks, 1), amodal_masks=_equal(_unpacked(record["amodal_masks"]), 1),
        mask_type=about["mask_type"], ignore=_equal(masks, IGNORED) if about.get("ignore") else None,
        initial_count=int(record["initial_count"]), max_count=int(record["max_count"]),
        privileged=privileged or None, meta=about["meta"],
    )


def _unpacked(encoded: dict) -> Callable[[int], np.ndarray] | None:
    """position -> values [H, W] of a compressed stack, unpacked when the first one is asked for."""
    shape = tuple(int(n) for n in encoded["shape"])
    if shape[0] == 0:
        return None

    @functools.cache
    def stack() -> np.ndarray:
        try:
            return np.frombuffer(zlib.decompress(encoded["value"]), dtype=np.uint8).reshape(shape)
        except (zlib.error, ValueError) as error:
            raise DataError(f"masks of a prepared record are damaged ({error}); prepare the dataset again") from None

    return lambda position: stack()[position]


def _equal(values: Callable[[int], np.ndarray] | None, value: int) -> Callable[[int], np.ndarray] | None:
    return None if values is None else lambda position: values(position) == value


def prepare(name: str, source: str | Path, out: str | Path, *, progress: bool = True, strict: bool = False,
            **keys: str) -> dict:
    """Writes the dataset `name` (readers.DATASETS) found in the folder `source` as array_record files into `out`.

    Every frame and mask is decoded once; bad records are left out and reported, with `strict` the first one stops
    it. What has been prepared from the same tables is reused, a prepare of them that was killed goes on where it
    stopped; what is damaged is made again, with `strict` also what lacks refused records. Nothing appears under `out`
    before all of it is there. `keys`: see `readers.read`. Returns {"reused": bool, "splits": {split: {"examples":
    int, "refused": [[id, reason], ...]}}, ...}.

    Raises DataError for an unknown name, a source that is no such dataset, no usable record, or an `out`
    that holds anything else.
    """
    from icseg_jax import readers  # here, since the readers make this module's samples

    known = readers.dataset(name)
    source, out = Path(source).absolute(), Path(out).absolute()
    splits = readers.splits_of(name, source)
    root = source.resolve()
    tables = [(split, table) for split in splits for table in known.tables(root, split)]
    labels = [(split, folder) for split in splits for label in known.labels
              if (folder := root / label.format(split=split)).is_dir()]
    places = [f"{split}/{path.relative_to(root)}" for split, path in tables + labels]
    # The last as it was until 30 November 2026: folders of that time are as good, but for what the places tell.
    fingerprint, before = (_fingerprint(name, keys, root, [table for _, table in tables], x) for x in (places, ()))
    if made := _reusable(out, (fingerprint, before), strict):
        return made | {"reused": True}

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = _begin(out, {"fingerprint": fingerprint, "source": str(root)}, strict)
    try:
        written = _write_records(name, source, splits, partial, progress, strict, keys)
    except DataError as error:
        if not of_machine(error):
            shutil.rmtree(partial, ignore_errors=True)
        raise  # after anything else (Ctrl-C, a full disk) the next prepare goes on with it
    folder = partial / name / RECORD_VERSION
    files = [path for path in sorted(folder.iterdir()) if path.name != MARKER]  # which one killed at its end has left
    made = {"name": name, "source": str(source), "keys": keys, "fingerprint": fingerprint, "splits": written,
            "files": {path.name: path.stat().st_size for path in files}}
    (folder / MARKER).write_text(json.dumps(made, indent=1))
    try:
        there = _reusable(out, (fingerprint, before), strict)  # hours may have passed
    except DataError as error:
        raise DataError(f"{error}; once {out} is free, the same command goes on with what it has written") from None
    if there is None:
        if out.exists():
            shutil.rmtree(out)
        os.replace(folder, out)
    shutil.rmtree(partial, ignore_errors=True)
    return (there or made) | {"reused": there is not None}


def _reusable(out: Path, fingerprints: Sequence[str], strict: bool) -> dict | None:
    """What `prepare` need not do again: the marker of `out` when all of it is there, for `strict` without a refusal,
    which may be mended since. None when it may be replaced, DataError when it holds anything else."""
    if not out.exists():
        return None
    made = None
    with contextlib.suppress(DataError):
        made = _check_prepared(out)
    if made and made["fingerprint"] not in fingerprints:
        raise DataError(f"{out} holds records of other tables or of another version, or lacks labels that have come "
                        f"since; it was made from {made['source']}: remove it or give another out=")
    if made and not (strict and any(split["refused"] for split in made["splits"].values())):
        return made
    _refuse_foreign(out)
    return None


def _begin(out: Path, begun: dict[str, str], strict: bool) -> Path:
    """A folder beside `out` to write into: what a killed prepare of the same tables and source left, or a new one. What
    other killed prepares left is removed, for `strict` also what refused a record."""
    mine = out.with_name(f".{out.name}.partial.{os.getpid()}")
    for path in sorted(out.parent.glob(f".{out.name}.partial.*")):
        pid = path.name.rsplit(".", 1)[-1]
        if not pid.isdigit() or (path != mine and Path(f"/proc/{pid}").exists()):
            continue
        state: dict = {}
        with contextlib.suppress(DataError):
            state = _json_object(path / PROGRESS)
        same = begun.items() <= state.items() and not (strict and any(s["refused"] for s in state["splits"].values()))
        if same and path != mine and not mine.exists():
            with contextlib.suppress(OSError):  # another prepare was quicker to take it
                os.rename(path, mine)
        elif not same or path != mine:
            shutil.rmtree(path, ignore_errors=True)
    if not mine.exists():
        mine.mkdir()
        _save(mine / PROGRESS, begun | {"splits": {}})
    return mine


def _save(path: Path, content: dict) -> None:
    """All of it or nothing."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content))
    os.replace(new, path)


def _write_records(name: str, source: Path, splits: Sequence[str], partial: Path, progress: bool, strict: bool,
                   keys: dict[str, str]) -> dict:
    """The records of all splits into partial/name/version, and what tensorflow-datasets wants to know of them."""
    import tensorflow_datasets as tfds

    folder = partial / name / RECORD_VERSION
    state = _json_object(partial / PROGRESS)
    if not folder.exists():  # nothing is written, or it was killed just after this folder had become `out`
        state["splits"] = {}
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for split in splits:
        about = state["splits"].setdefault(split, {"taken": 0, "shards": [], "bytes": 0, "refused": [], "done": False})
        if not about["done"]:
            _write_split(name, source, split, folder, about, functools.partial(_save, partial / PROGRESS, state),
                         progress, strict, keys)
        shards = about["shards"]
        for i in range(len(shards)):
            path = folder / f"{name}-{split}.array_record-{i:05d}"
            if path.exists():  # it is not when the renaming was interrupted
                os.replace(path, f"{path}-of-{len(shards):05d}")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=shards, num_bytes=about["bytes"]))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=_features(), split_infos=infos,
                                       version=RECORD_VERSION, check_data=False)
    return {split: {"examples": sum(about["shards"]), "refused": about["refused"]}
            for split, about in state["splits"].items()}


def _write_split(name: str, source: Path, split: str, folder: Path, about: dict, save: Callable[[], None],
                 progress: bool, strict: bool, keys: dict[str, str]) -> None:
    """`about` says how far it is: records taken from the table, samples per finished file, bytes, refusals."""
    from array_record.python import array_record_module

    from icseg_jax import readers

    records = readers.records(name, source, split, decode=True, **keys)
    total = (len(records) if isinstance(records, list)
             else sum(_parquet(path).metadata.num_rows for path in _ambi_tables(source, split)))
    told = share_out("records", {"name": name, "source": str(source), "split": split, "keys": keys}, total,
                     about["taken"])
    quiet = None if progress else True  # None: quiet where nobody watches
    coming = iter(tqdm(told, f"prepare {split}", total, initial=about["taken"], unit=" records", disable=quiet))
    more = True
    with contextlib.closing(told):
        while more:
            path, n, size = folder / f"{name}-{split}.array_record-{len(about['shards']):05d}", 0, 0
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for record, example in coming:
                about["taken"] += 1
                if "reason" not in record:
                    writer.write(example)
                    n, size = n + 1, size + len(example)
                elif strict:
                    raise DataError(f"record {record['id']} of {split} of {source}: {record['reason']}")
                else:
                    about["refused"].append([record["id"], record["reason"]])
                if size >= SHARD_BYTES:
                    break
            writer.close()
            more = size >= SHARD_BYTES
            if n:
                about["shards"].append(n)
            else:
                path.unlink()
            about.update(bytes=about["bytes"] + size, done=not more)
            if about["done"] and not about["shards"]:
                why = f"the first is refused because {about['refused'][0][1]}" if about["refused"] else "it is empty"
                raise DataError(f"{split} of {source} has no usable record; {why}")
            save()


def _records_job(name: str, source: str, split: str, keys: dict[str, str], first: int, step: int) -> Iterator[Told]:
    """A record: its id, and the example to write or why there is none."""
    from icseg_jax import readers

    features = _features()
    for id, sample in _opened_records(readers.records(name, source, split, decode=True, **keys), first, step):
        told, example = {"id": id}, b""
        if isinstance(sample, Sample):
            try:
                example = features.serialize_example(_to_record(sample))
            except (ValueError, TypeError, OverflowError, RuntimeError) as error:  # half a letter, a count above int32
                if of_machine(error):
                    raise
                sample = f"it cannot be written as a record ({error})"
        if isinstance(sample, str):
            told = {"id": _one_line(id), "reason": _one_line(sample)[:500]}
        yield told, example


def _videos_job(**about: Any) -> Iterator[Told]:
    from icseg_jax import synthetic

    return ((row, b"") for row in synthetic.write_videos(**about))


# ---------------------------------------------------------------------------------------------------------
# Work shared out to processes of our own
# ---------------------------------------------------------------------------------------------------------

Told = tuple[dict, bytes]  # what is told of a piece of work: some words, and bytes
JOBS = {"records": _records_job, "videos": _videos_job}
SHARE = 64  # pieces of work that are worth the start of a process
PROCESSES = 4  # at most: each reads the dataset's tables for itself, and some are large


def share_out(job: str, about: dict, total: int, first: int = 0) -> Iterator[Told]:
    """What JOBS[job](**about, first=..., step=...) tells of its pieces from `first` on, in their order.

    Up to PROCESSES processes (`python -m icseg_jax.data share ...`) each do every so many-th piece; where that does not
    pay, this one does it all. Not multiprocessing: it runs the caller's main program again in each of them. Raises
    ChildProcessError when one of them ends early.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, PROCESSES, (total - first) // SHARE)
    if workers < 2:
        yield from JOBS[job](**about, first=first, step=1)
        return
    command = [sys.executable, "-m", "icseg_jax.data", "share", job]
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    processes = [
        subprocess.Popen([*command, json.dumps(about | {"first": first + k, "step": workers})], env=environment,
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
        for k in range(workers)
    ]
    try:
        for process in itertools.cycle(processes):
            words = process.stdout.readline()
            told, size = json.loads(words) if words.endswith(b"\n") else (None, -1)
            content = process.stdout.read(max(size, 0))
            if len(content) != size:
                raise ChildProcessError(f"a share of {job}: its process ended early ({process.wait()}); run it again")
            if told is None:
                return
            yield told, content
    finally:
        for process in processes:
            process.kill()
            process.stdout.close()
            process.wait()


def _do_share(job: str, about: str) -> None:
    """One process of `share_out`: for each piece a line of JSON, [words, size], and bytes; then a line that says null.
    """
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # libraries may print
    try:
        for told, content in itertools.chain(JOBS[job](**json.loads(about)), [(None, b"")]):
            out.write(json.dumps([told, len(content)]).encode() + b"\n" + content)
            out.flush()
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)


def _fingerprint(name: str, keys: dict[str, str], source: Path, tables: Iterable[Path], places: Sequence[str] = ()
                 ) -> str:
    """A digest of a dataset's tables; `places` are their names, split by split, and those of folders of labels."""
    about = " ".join([name, RECORD_VERSION, *(f"{key}={value}" for key, value in sorted(keys.items())), *places])
    digest = hashlib.sha256(about.encode("utf-8", "surrogateescape"))  # names of files may be any bytes
    for table in tables:
        if not Path(os.path.realpath(table)).is_relative_to(source.resolve()):
            continue  # a link out of the folder, which the reader refuses
        with table.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_prepared(folder: Path) -> dict:
    """What the marker of a prepared folder says; DataError unless every file is there in its full size."""
    marker = folder / MARKER
    if not marker.is_file():
        raise DataError(f"no prepared records in {folder}; make them with: {_prepare_command(folder)}")
    try:
        made = _json_object(marker)
        command = _prepare_command(folder, made["name"], made["source"], made.get("keys"))
        sizes = dict(made["files"])
        made["splits"], made["fingerprint"]
    except (DataError, KeyError, TypeError, ValueError):
        raise DataError(f"{marker} is damaged; make it again with: {_prepare_command(folder)}") from None
    for file, size in sizes.items():
        path = folder / Path(file).name
        if not path.is_file() or path.stat().st_size != size:
            state = "damaged" if path.is_file() else "missing"
            raise DataError(f"prepared record {path} is {state}; make it again with: {command}")
    return made


def _prepare_command(folder: Path, name: str = "ambi_rvos", source: str = "DIR", keys: dict[str, str] | None = None
                     ) -> str:
    further = "".join(f" {key}={value}" for key, value in (keys or {}).items())
    return f"python -m icseg_jax.data prepare {name} source={source} out={folder}{further}"


def _refuse_foreign(out: Path) -> None:
    """Only what prepare itself wrote may be replaced."""
    ours = re.compile(r"(prepared|features|dataset_info)\.json|[a-z0-9_]+-[A-Za-z_]+\.array_record-.*")
    foreign = [p.name for p in out.iterdir() if not ours.fullmatch(p.name)] if out.is_dir() else [out.name]
    if foreign:
        raise DataError(f"{out} holds other things ({foreign[0]}); give another out=")


class PreparedDataset(Sequence):
    """The samples of one split of a prepared folder, each read from its record when asked for."""

    def __init__(self, folder: Path, split: str) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.decode import DeserializeMethod

        self.folder, self.split = folder, split
        made = _check_prepared(folder)
        if split not in made["splits"]:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(made['splits'])}")
        self.refused: list[tuple[str, str]] = [tuple(pair) for pair in made["splits"][split]["refused"]]
        self.source = made["source"]  # the folder it was prepared from
        self._command = _prepare_command(folder, made["name"], made["source"], made.get("keys"))
        self._features = _features(encoded=True)
        try:
            builder = tfds.builder_from_directory(folder)
            self._records = builder.as_data_source(split, deserialize_method=DeserializeMethod.RAW_BYTES)
            self._length = len(self._records)
        except Exception as error:  # tensorflow-datasets and array_record raise many kinds on damaged files
            raise self._damaged("the records", error) from None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; IndexError outside, DataError when its record is damaged."""
        index = range(self._length)[index]
        try:
            return _from_record(self._features.deserialize_example_np(self._records[index]), self.split)
        except Exception as error:
            raise self._damaged(f"record {index} of {self.split}", error) from None

    def _damaged(self, what: str, error: Exception) -> DataError:
        return DataError(f"{what} in {self.folder} cannot be read ({first_line(error)}); "
                         f"make it again with: rm -r {self.folder} && {self._command}")


def load_prepared(path: str | Path, split: str) -> PreparedDataset:
    """One split of what `prepare` wrote to `path`.

    Raises DataError, which names the path and the command that makes it again, when it is damaged or missing.
    """
    return PreparedDataset(Path(path), split)


def order(seed: int, step: int, refill: int, n: int, batch: int) -> Int[np.ndarray, " batch"]:
    """Which of `n` samples a training step takes: a pure function, so that a resumed run is the same run.

    Refill 0 walks through the epochs, each one a permutation of its own; the n % batch samples at an epoch's
    end are left out, other ones each time. Refill r > 0, drawn when groups without signal are replaced
    (METHOD.md 4.7), are random samples which the step has not had before, as long as there are any. Raises
    ValueError when batch > n.
    """
    if not 0 < batch <= n:
        raise ValueError(f"a batch of {batch} samples cannot be drawn from {n}; it must be 1 to {n}")
    epoch, start = divmod(step * batch, n // batch * batch)
    first = np.random.default_rng([seed, 0, epoch]).permutation(n)[start : start + batch]
    if refill == 0:
        return first
    others = np.setdiff1d(np.arange(n), first)
    pool = np.concatenate([np.random.default_rng([seed, 1, step]).permutation(others), first])
    return pool[np.arange((refill - 1) * batch, refill * batch) % n]


def mixed(seed: int, step: int, sizes: Sequence[int], rates: Sequence[float], batch: int) -> list[tuple[int, int]]:
    """(dataset, sample) for each place of a supervised batch over several datasets, as MIRAS mixes them (DATA.md 1.4).

    Each place draws a dataset in proportion to `rates` (MIRAS's second stage: conversations 10, VQA 2), then one of
    its `sizes` samples, both with replacement: a pure function of (seed, step), so the data state is the step number.
    Raises ValueError for an empty dataset, for rates that are negative or all 0, or when the two differ in length.
    """
    if len(sizes) != len(rates) or min(sizes, default=0) < 1 or min(rates) < 0 or sum(rates) <= 0 or batch < 1:
        raise ValueError(f"cannot mix a batch of {batch} from datasets of {list(sizes)} samples at the rates "
                         f"{list(rates)}; [500, 200] at [10, 2] works")
    rng = np.random.default_rng([seed, 2, step])
    places = rng.choice(len(sizes), batch, p=np.array(rates, float) / sum(rates))
    return [(int(k), int(rng.integers(sizes[k]))) for k in places]


@dataclass(frozen=True)
class Conversation:
    """What the user says, turn by turn, what was answered, and what the localisation at the end should be.

    A supervised stage puts its token loss on every answer of `rounds`, then on key frame, box and point, or, where
    there is nothing to localise, on `answer`. An evaluation says the same user turns and keeps the policy's
    own answers in the history (DATA.md 1.4).
    """

    rounds: list[tuple[str, str]]  # (user, answer) before the mask is asked for
    query: str  # the turn that asks for it
    answer: str | None  # what the dataset says to it, with the mask or, in plain talk, in its place
    frame: int | None  # fid of the shown frame with most of the target; -1: no target; None: nothing to localise
    box: list[int] | None  # 0..1000 of width and height, inclusive; zeros without a target
    point: list[int] | None


def conversation(sample: Sample, positions: Sequence[int]) -> Conversation:
    """The sample as a conversation; one without `dialogue` (any referring set) is its query alone.

    `positions`: of the frames shown. A sample with hidden labels, or whose target is on none of these frames, has
    nothing to localise; one that says that nothing matches has METHOD.md 11.4's answer. Raises DataError when the
    dialogue does not alternate between user and assistant.
    """
    said = sample.dialogue or []
    if [turn["role"] for turn in said] != ["user", "assistant"] * (len(said) // 2):
        raise DataError(f"the dialogue of {sample.id} does not alternate between user and assistant")
    rounds = [(said[i]["text"], said[i + 1]["text"]) for i in range(0, len(said), 2)]
    answer = sample.meta.get("answer")
    if sample.ability == "none" or sample.initial_count == 0:
        return Conversation(rounds, sample.query, answer, -1, [0] * 4, [0] * 2)
    hidden = sample.masks is None and sample.amodal_masks is None
    truth = {} if hidden else ground_truth({sample.frame_ids[p]: sample.truth(p) for p in positions})
    if not truth:
        return Conversation(rounds, sample.query, answer, None, None, None)
    fid, best = max(truth.items(), key=lambda entry: entry[1]["area"])
    return Conversation(rounds, sample.query, answer, int(fid), best["bbox_2d"], best["point_2d"])


# ---------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------

USAGE = """\
usage: python -m icseg_jax.data COMMAND ...

  generate out=DIR train=N test=N [seed=0] [layout=ambi_rvos]
                                             write the synthetic world, in the layout of any dataset but RefCOCO
  prepare NAME source=DIR [out=data/NAME] [strict=true]
                                             turn a dataset's folder into array_record files
  ambiguate NAME source=DIR out=DIR [test=SPLIT] [strict=true] [url=URL model=NAME] [timeout=60] [max_in_flight=8]
                                             an ambiguous benchmark in Ambi-RVOS's layout, by rules, out of the clear
                                             expressions of a referring video set; test=valid_u is MeViS's; a model
                                             behind an endpoint may look at what the expressions leave open
  preview NAME_OR_DIR [out=NAME.png] [source=DIR] [split=test] [n=8]
                                             a picture of samples: of the dataset NAME in source=, of a prepared
                                             or Ambi-RVOS folder, or of `synthetic`, made on the spot
  stats NAME_OR_DIR [source=DIR]             counts, candidates, frames and mask areas per split and ability

NAME: {names}
prepare, preview and stats of muva also take amodal_key= and visible_key=, the names of its masks.
"""


def open_splits(path: str | Path, name: str | None = None, **keys: str
                ) -> dict[str, tuple[Iterable[Sample], list[tuple[str, str]]]]:
    """The samples of every split, and the list to which refused records are added while they are read, of the
    dataset `name` in a folder; without a name, of a prepared folder or one in Ambi-RVOS's layout. `keys`: see
    `readers.read`. DataError when it is no such folder."""
    from icseg_jax import readers

    path = Path(path)
    if name is None and (path / MARKER).is_file():
        prepared = [load_prepared(path, split) for split in _check_prepared(path)["splits"]]
        return {dataset.split: (dataset, dataset.refused) for dataset in prepared}
    if name is None:
        if not any((path / f"{split}.parquet").is_file() for split in SPLITS):
            raise DataError(f"{path} is neither a prepared folder (no {MARKER}) nor one in Ambi-RVOS's layout (no "
                            f"{SPLITS[0]}.parquet); of another dataset, say its name and source={path}")
        name = "ambi_rvos"
    refused: dict[str, list[tuple[str, str]]] = {split: [] for split in readers.splits_of(name, path)}
    return {split: (readers.read(name, path, split, refused=refused[split], **keys), refused[split])
            for split in refused}


def generate(out: str, train: int, test: int, seed: int = 0, layout: str = "ambi_rvos") -> None:
    from icseg_jax import synthetic

    synthetic.write_dataset(out, train=train, test=test, seed=seed, layout=layout)
    print(f"{train} train and {test} test videos in {out}")


def stats(path: str, source: str | None = None, **keys: str) -> None:
    """Prints what a dataset holds: per split and ability the samples, the means of candidates, of questions
    needed and of frames, the share of samples whose target is visible on at least one frame, and the mean share of
    the picture, in percent, that it covers where it is visible."""

    def mean(values: Iterable[float]) -> str:
        known = [v for v in values if v >= 0]
        return f"{np.mean(known):.2f}" if known else "-"

    opened = open_splits(path, **keys) if source is None else open_splits(source, path, **keys)
    for split, (samples, refused) in opened.items():
        abilities: dict[str, list[tuple[float, ...]]] = {}
        for sample in samples:
            hidden = sample.masks is None and sample.amodal_masks is None
            areas = [] if hidden else [a for p in range(len(sample)) if (a := 100 * sample.truth(p).mean())]
            abilities.setdefault(sample.ability or "-", []).append(
                (sample.initial_count, sample.max_count, len(sample), -1 if hidden else bool(areas),
                 float(np.mean(areas)) if areas else -1))
        print(f"{split}: {sum(map(len, abilities.values()))} samples, {len(refused)} refused")
        print("  ability      samples  candidates  questions  frames  visible  area %")
        for ability, rows in sorted(abilities.items()):
            candidates, questions, frames, visible, area = (mean(column) for column in zip(*rows, strict=True))
            print(f"  {ability:<12}{len(rows):>8}{candidates:>12}{questions:>11}{frames:>8}{visible:>9}{area:>8}")
        for id, reason in refused:
            print(f"  refused {id}: {reason}")


def preview(name: str, out: str | None = None, source: str | None = None, split: str | None = None, n: int = 8,
            **keys: str) -> None:
    """Draws `n` samples, a row of shown frames each, with the target outlined in red and, where they are known, the
    other candidates in yellow, into the PNG `out` (None: NAME.png here). `split` None: test, or else the last one
    there is."""
    if n < 1:
        raise DataError(f"n={n} shows nothing; use 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(name if source is None else source)
        if source is None and name == "synthetic" and not folder.exists():
            from icseg_jax import synthetic

            folder = synthetic.write_dataset(Path(scratch) / "world", train=1, test=n, progress=False)
        splits = open_splits(folder, None if source is None else name, **keys)
        split = split or ("test" if "test" in splits else list(splits)[-1])
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        samples, refused = splits[split]
        chosen = list(itertools.islice(samples, n))
        if not chosen:
            why = f"the first is refused because {refused[0][1]}" if refused else "it is empty"
            raise DataError(f"{split} of {folder} has no usable record; {why}")
        sheet = _contact_sheet(chosen)
    target = Path(out or f"{Path(name).absolute().name}.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    sheet.save(partial, "PNG")
    os.replace(partial, target)
    print(target)


def _contact_sheet(samples: Sequence[Sample]) -> Image.Image:
    tile, shown, gap = 160, 4, 8
    caption = 34  # two lines of text above the frames
    row = caption + tile + 2 * gap
    sheet = Image.new("RGB", (gap + shown * (tile + gap), len(samples) * row), (250, 250, 248))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)

    def write(left: int, top: int, text: str, color: tuple[int, int, int]) -> None:
        text = _one_line(text)  # Pillow draws a line break as one
        while draw.textlength(text, font) > sheet.width - left - gap:
            text = text[:-2] + "\u2026"
        draw.text((left, top), text, font=font, fill=color)

    for i, sample in enumerate(samples):
        top = i * row + gap
        about = [sample.id, *filter(None, (sample.ability, sample.mask_type))]
        if sample.initial_count >= 0:
            about.append(f"{sample.initial_count} match")
        if sample.max_count >= 0:
            about.append(f"{sample.max_count} to ask")
        if found := _candidates(sample):
            about.append(", ".join(text for text, _ in found))
        write(gap, top, " \u00b7 ".join(about), (120, 120, 120))
        write(gap, top + 16, sample.query, (20, 20, 20))
        for column, position in enumerate(sample_frames(len(sample), shown)):
            frame = ImageOps.contain(Image.fromarray(_outlined(sample, position)), (tile, tile))
            sheet.paste(frame, (gap + column * (tile + gap), top + caption))
    return sheet


def _candidates(sample: Sample) -> list[tuple[str, dict | None]]:
    """What the query could mean, the target included: a few words, and the object of the scene graph if there is
    one. Empty where nobody wrote it down."""
    privileged = sample.privileged or {}
    if graph := privileged.get("scene_graph"):
        objects = {o["oid"]: o for o in graph["objects"]}
        return [(f"{objects[oid]['color']} {objects[oid]['shape']}", objects[oid]) for oid in graph["candidates"]]
    path = privileged.get("all_target_path")
    if path is None or not path.is_file():
        return []
    from icseg_jax import simulator

    found = simulator.listed(_json(path))  # METHOD.md 6
    return [(str(c.get("description", c.get("oid"))), None) for c in found if isinstance(c, dict)]


def _outlined(sample: Sample, position: int) -> np.ndarray:
    image = sample.image(position).copy()
    for _, graph in _candidates(sample):
        if graph is not None and str(graph["oid"]) not in sample.target_ids:
            x1, y1, x2, y2 = graph["per_frame"][position]["bbox"]
            drawn = Image.fromarray(image)
            ImageDraw.Draw(drawn).rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=(255, 220, 0))
            image = np.array(drawn)
    if sample.masks is not None or sample.amodal_masks is not None:
        image = outlined(image, sample.truth(position))
    return image


def outlined(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image with a red line around the mask, outside of it, of 2 to 4 pixels (METHOD.md 2.1)."""
    line = ndimage.binary_dilation(mask, iterations=min(4, max(2, max(mask.shape) // 320))) & ~mask
    return np.where(line[..., None], np.uint8((255, 0, 0)), image)


def _prepare_and_report(name: str, source: str, out: str | None = None, strict: bool = False, **keys: str) -> None:
    out = out or f"data/{name}"
    made = prepare(name, source, out, strict=strict, **keys)
    for split, result in made["splits"].items():
        print(f"{split}: {result['examples']} samples, {len(result['refused'])} refused"
              + (" (prepared before)" if made["reused"] else ""))
        for id, reason in result["refused"]:
            print(f"  refused {id}: {reason}")
        if made["reused"] and result["refused"]:
            print("  strict=true looks at all of them again")
    print(out)


def _ambiguate_and_report(name: str, source: str, out: str, test: str | None = None, strict: bool = False,
                          url: str | None = None, model: str | None = None, timeout: int = 60, max_in_flight: int = 8
                          ) -> None:
    from icseg_jax import ambiguate, simulator

    if (url is None) != (model is None):
        raise DataError(f"ambiguate needs {'model' if model is None else 'url'}= too; both make a model look")
    describer = None
    if url is not None:
        try:
            simulator.check_url(url)
        except ValueError as error:
            raise DataError(f"url: {error}") from None  # which may hold a password: it is not repeated
        if timeout < 1 or max_in_flight < 1:
            raise DataError(f"timeout={timeout} max_in_flight={max_in_flight}: both must be at least 1")
        host = simulator.Endpoint("ambiguate", url, model, timeout=timeout, max_in_flight=max_in_flight)
        host.check(pictures=True)
        describer = simulator.ModelDescriber(host, {a: list(values) for a, values in ambiguate.ATTRIBUTES.items()})
    for split, made in ambiguate.ambiguate(name, source, out, test=test, strict=strict, describer=describer).items():
        levels = ", ".join(f"{count} {level}" for level, count in sorted(made["levels"].items())) or "none"
        print(f"{split}: queries about {made['videos']} videos: {levels}; {len(made['refused'])} refused")
        for id, reason in made["refused"]:
            print(f"  refused {id}: {reason}")
    if describer is not None:
        counts = describer.about()
        print(f"{model} was asked about {counts['asked']} objects: {counts['kept']} known from before, "
              f"{counts['unreadable']} in vain, {counts['failed']} without an answer")
    print(out)


KEYS: dict[str, type] = {"amodal_key": str, "visible_key": str}  # of muva

# Command -> function, positional arguments, types of the key=value ones, how many of these are required.
COMMANDS: dict[str, tuple[Callable[..., None], list[str], dict[str, type], int]] = {
    "generate": (generate, [], {"out": str, "train": int, "test": int, "seed": int, "layout": str}, 3),
    "prepare": (_prepare_and_report, ["name"],
                {"source": str, "out": str, "strict": bool} | KEYS, 1),
    "ambiguate": (_ambiguate_and_report, ["name"], {"source": str, "out": str, "test": str, "strict": bool,
                  "url": str, "model": str, "timeout": int, "max_in_flight": int}, 2),
    "preview": (preview, ["name_or_dir"], {"out": str, "source": str, "split": str, "n": int} | KEYS, 0),
    "stats": (stats, ["name_or_dir"], {"source": str} | KEYS, 0),
}


def _closest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _parse(argv: Sequence[str]) -> Callable[[], None]:
    if not argv:
        raise DataError(f"no command; use one of {', '.join(COMMANDS)}, or --help")
    command, *words = argv
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise DataError(f"unknown command {command!r}{_closest(command, COMMANDS)}; use one of {known}")
    function, positional, types, required = COMMANDS[command]
    plain = [word for word in words if "=" not in word]
    if len(plain) != len(positional):
        wanted = f"{command} takes {' '.join(p.upper() for p in positional) or 'only key=value'}"
        raise DataError(f"{wanted}, not {' '.join(plain) or 'nothing'}; see --help")
    arguments: dict[str, Any] = {}
    for word in words:
        if word in plain:
            continue
        key, value = word.split("=", 1)
        if key not in types:
            raise DataError(f"{command} has no {key!r}{_closest(key, types)}; it takes "
                            f"{', '.join(f'{k}=' for k in types) or 'no key=value'}")
        if types[key] is bool and value not in ("true", "false"):
            raise DataError(f"{key}={value} is neither true nor false")
        try:
            arguments[key] = value == "true" if types[key] is bool else types[key](value)
        except ValueError:
            raise DataError(f"{key}={value} is no whole number; {key}=8 is one") from None
        if value == "":
            raise DataError(f"{key}= is empty")
    if missing := [key for key in list(types)[:required] if key not in arguments]:
        raise DataError(f"{command} needs {', '.join(f'{key}=' for key in missing)}; see --help")
    return functools.partial(function, *plain, **arguments)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        from icseg_jax import readers

        print(USAGE.format(names=textwrap.fill(", ".join(readers.DATASETS), 110, subsequent_indent="      ")), end="")
        return 0
    try:
        if argv[:1] == ["share"]:
            _do_share(*argv[1:])
        else:
            _parse(argv)()
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    from icseg_jax import data  # under its own name, so that readers and commands share one DataError

    sys.exit(data.main())
