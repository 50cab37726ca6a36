"""Scores: of a policy on any benchmark, of masks from elsewhere, and of the models that answer and diagnose.

`python -m icseg_jax.evaluate CONFIG benchmark=NAME [checkpoint=PATH] [source=DIR] [split=NAME] [out=DIR] [key=value]`
    Plays a dialogue per sample, greedily, and lets SAM2 follow its answer through the video. NAME is a dataset of
    `python -m icseg_jax.data --help`; source its folder or one that `data prepare` made of it (data.path); checkpoint a
    run, one of its checkpoints or a Hugging Face directory (policy.path). out (runs/evaluate_NAME) gets
    masks/ID/FRAME.png at the frames' own size, rows.jsonl with a line per sample, and table.json: the benchmark's own
    scores beside those of askers who see perfectly and of SAM2 on the true box and point, with 95 % intervals over
    videos. The same command goes on where a killed one stopped. baselines=false leaves the others out, strict=true
    stops at a record that is not as it should be, evaluate.samples=N takes the first N,
    evaluate.repetition_penalty=1.1 evaluate.presence_penalty=1.0 is how the authors decode. Of several processes
    (mesh.distributed=true, one folder for all) each plays its share by itself.
`python -m icseg_jax.evaluate predictions=DIR benchmark=NAME source=DIR [split=NAME]`
    The benchmark's scores of the masks DIR/ID/FRAME.png; any pixel but 0 is part of one.
... submission=FILE.zip
    With either: also what the servers of MeViS and Ref-YouTube-VOS take (split=valid, whose labels are hidden).
`python -m icseg_jax.evaluate CONFIG check=oracle simulator.kind=endpoint|local [expert.kind=endpoint] [key=value ...]`
    How far models agree with the exact user and expert, on the synthetic world's test split (`evaluate.samples` of it):
    one dialogue per query with a target, of questions in random order. The model under `simulator` answers each
    question, the one under `expert` counts the candidates after the exact answers. Prints one JSON object: shares of
    answers and counts that are the exact ones.

1 Agreement with the oracle · 2 Benchmarks and their tables · 3 Samples and masks on disk · 4 Baselines · 5 A policy
6 Commands
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import math
import os
import re
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool
from PIL import Image
from tqdm import tqdm

from icseg_jax import data, metrics, readers, simulator, synthetic, train, weights
from icseg_jax.sam2_sidecar import SegmenterClient, SidecarError

USAGE = __doc__
Dialogue = list[tuple[str, str]]


# ------------------------------------------------------------------------------------------------------------
# 1 Agreement with the oracle
# ------------------------------------------------------------------------------------------------------------


def dialogues(config: train.Config) -> list[tuple[data.Sample, list[int], Dialogue]]:
    """(sample, shown frames, questions with their exact answers) of the test split. Raises ConfigError."""
    test = train.open_data(config)[1]
    oracle, out = simulator.OracleUser(), []
    for index in range(min(config.evaluate.samples or len(test), len(test))):
        sample = test[index]
        graph = (sample.privileged or {}).get("scene_graph")
        if not graph:
            raise train.ConfigError(f"data.path={config.data.path}: holds no scene graphs, so nothing exact to compare "
                                    "with; use the synthetic world (`python -m icseg_jax.data generate`)")
        if not sample.target_ids:
            continue
        shown = [sample.frame_ids[i] for i in data.sample_frames(len(sample), config.protocol.frames)]
        rng = np.random.default_rng([config.seed, index])
        asked = rng.permutation(synthetic.ASKABLE)[: config.protocol.max_turns - 1]
        questions = [a_question(str(attribute), int(rng.choice(shown)), sample.query, rng) for attribute in asked]
        out.append((sample, shown, [(question, oracle.answer(graph, shown, question)) for question in questions]))
    return out


def a_question(attribute: str, fid: int, query: str, rng: np.random.Generator) -> str:
    """About an attribute: half of them open, a quarter each offer one value (yes or no) and two (a choice). What the
    query has said already is asked openly."""
    offered = rng.permutation(synthetic.VALUES[attribute])[: rng.choice([0, 0, 1, 2])]
    verb, where = "moving " * (attribute == "motion"), f" in frame {fid}" * (attribute == "column")
    question = f"Is the target {verb}{' or '.join(offered)}{where}?"
    if len(offered) and simulator.parse_question(question, query):
        return question
    return synthetic.QUESTIONS[attribute].format(fid=fid)


def says_the_same(attribute: str, said: str, exact: str) -> bool:
    """Whether a free answer about an attribute names the exact value and no other, opens with the exact yes or no, or
    is the exact phrase."""
    if exact in ("yes", "no"):
        return re.match(r"\W*(yes|no)\b|", said.lower())[1] == exact
    if exact not in synthetic.VALUES[attribute]:  # such as "not visible" or "neither"
        return said.lower().strip(" .") == exact
    read = simulator.parse_question(f"{attribute} {said}")
    return read is not None and read.attribute == attribute and read.options == (exact,)


def check_answers(user: simulator.ModelUser, played: Sequence[tuple[data.Sample, list[int], Dialogue]]) -> dict:
    """Shares of the model's answers that say what the exact ones say: in all, by attribute, by kind of question."""
    asked = [(sample, shown, question, exact) for sample, shown, d in played for question, exact in d]
    answers = simulator.answer_all(user, [request[:3] for request in asked])
    hits: dict[str, list[bool]] = collections.defaultdict(list)
    kinds: dict[str, list[bool]] = collections.defaultdict(list)
    for (_, _, question, exact), said in zip(asked, answers, strict=True):
        if said is not None:
            parsed = simulator.parse_question(question)
            same = says_the_same(parsed.attribute, said, exact)
            hits[parsed.attribute].append(same)
            kinds[parsed.kind].append(same)
    told = [answer for answer in answers if answer is not None]
    return {
        "agreement": share([hit for some in hits.values() for hit in some]),
        "by_attribute": {attribute: share(some) for attribute, some in sorted(hits.items())},
        "by_kind": {kind: share(some) for kind, some in sorted(kinds.items())},
        "please_clarify": share([answer.lower().startswith(simulator.CLARIFY) for answer in told]),
        "unable": share([answer == simulator.UNABLE for answer in told]),
        "questions": len(asked), "without_answer": len(asked) - len(told), **user.about(),
    }  # fmt: skip


def check_counts(expert: simulator.ModelExpert, played: Sequence[tuple[data.Sample, list[int], Dialogue]]) -> dict:
    """Shares of the model's counts, made fit as in training, that are the exact ones after a question."""
    oracle, found = simulator.OracleExpert(), simulator.diagnose_all(expert, played)
    each, whole, as_came, unread, leaky = [], [], [], [], []
    for (sample, shown, d), diagnosis in zip(played, found, strict=True):
        if diagnosis is None:
            continue
        graph = sample.privileged["scene_graph"]
        unread.append(not simulator.readable_counts(diagnosis.counts))
        if unread[-1]:
            continue
        exact = oracle.diagnose(graph, shown, d).counts
        counts, fit = train.check_counts(diagnosis.counts, sample.initial_count, len(d))
        each += [a == b for a, b in zip(counts[1:], exact[1:], strict=True)]
        whole.append(counts == exact)
        as_came.append(fit)
        leaky.append(simulator.leaks(diagnosis.guidance, graph))
    return {
        "agreement": share(each), "whole_dialogues": share(whole), "usable_as_they_came": share(as_came),
        "unreadable": share(unread), "guidance_refused": share(leaky),
        "dialogues": len(played), "without_answer": sum(d is None for d in found), **expert.about(),
    }  # fmt: skip


def share(hits: Sequence[bool]) -> float | None:
    return round(float(np.mean(hits)), 4) if len(hits) else None


def against_oracle(config: train.Config) -> dict[str, Any]:
    """What `check=oracle` prints. Raises ConfigError."""
    user, _, expert = train.meet(config, train.make_mesh(config.mesh))
    if not isinstance(user, train.MODELS) and not isinstance(expert, train.MODELS):
        raise train.ConfigError("check=oracle: compares models with the exact user and expert; use "
                                "simulator.kind=endpoint or local, expert.kind=endpoint, or both")
    played = dialogues(config)
    out: dict[str, Any] = {"samples": len(played), "seed": config.seed}
    if isinstance(user, simulator.ModelUser):
        out["simulator"] = check_answers(user, played)
    if isinstance(expert, simulator.ModelExpert):
        out["expert"] = check_counts(expert, played)
    return out


# ------------------------------------------------------------------------------------------------------------
# 2 Benchmarks and their tables (DATA.md 4.2, 4.3 and 7)
# ------------------------------------------------------------------------------------------------------------

Row = dict[str, Any]
Table = dict[str, Any]  # nested dicts of numbers


def video_row(sample: data.Sample, masks: Bool[np.ndarray, "t h w"], chosen: str | None) -> Row:
    """metrics.video_scores of one sample on the frames that its benchmark scores."""
    objects = sample.meta.get("foreground")
    return train.video_scores(
        sample, masks, objects and (lambda position: readers.foreground_mask(objects[position], sample.size))
    )


def image_row(sample: data.Sample, masks: Bool[np.ndarray, "1 h w"], chosen: str | None) -> Row:
    """metrics.pixel_counts of one image, and their IoU, 1 where both masks are empty."""
    both, said, true = metrics.pixel_counts(masks[0], sample.truth(0), sample.ignore and sample.ignore(0))
    either = said + true - both
    return {"both": both, "said": said, "true": true, "IoU": both / either if either else 1.0}


def amodal_row(sample: data.Sample, masks: Bool[np.ndarray, "1 h w"], chosen: str | None) -> Row:
    """metrics.r2sm_row of one query; `chosen`: the mask type that the answer named."""
    return metrics.r2sm_row(masks[0], sample.masks(0), sample.amodal_masks(0), sample.mask_type, chosen)


def by_group(rows: Sequence[Row], **keys: Any) -> Table:
    """J, F and what else all rows have, by level, type or split."""
    return metrics.score_table([{k: v for k, v in row.items() if k != "missing"} for row in rows], "group", **keys)


def found_only(rows: Sequence[Row]) -> Table:
    """Ambi-RVOS's and OK-VOS's: their scorer skips samples without masks (DATA.md 3.4); the last group does not. It is
    there where `report` says of each row whether it has masks."""
    found = [row for row in rows if not row.get("missing")]
    if not any("missing" in row for row in rows):
        return by_group(rows)
    return (by_group(found) if found else {}) | {"overall, missing as 0": by_group(rows)["overall"]}


def class_means(rows: Sequence[Row]) -> Table:
    """ReVOS's: overall is the mean of referring and reasoning, each row's percentages rounded first."""
    classes = [name for name in readers.REVOS_TYPES[:2] if any(row["group"] == name for row in rows)]
    return by_group(rows, overall=classes, digits=2) if classes else by_group(rows, digits=2)


def annotators(rows: Sequence[Row]) -> Table:
    """Ref-DAVIS17's protocol A: overall is the mean of the annotators' scores, which are means over objects."""
    return by_group(rows, overall=sorted({row["group"] for row in rows}))


def pooled(scores: Callable[[np.ndarray], Table]) -> Callable[[Sequence[Row]], Table]:
    """The table of images whose scores are made of pixel counts, by group and overall."""

    def table(rows: Sequence[Row]) -> Table:
        groups: dict[str, list] = collections.defaultdict(list)
        for row in rows:
            groups[row["group"]].append([row["both"], row["said"], row["true"]])
        whole = [counts for members in groups.values() for counts in members]
        named = dict(sorted(groups.items())) if len(groups) > 1 else {}
        return {name: scores(np.array(members, float).T) for name, members in (named | {"overall": whole}).items()}

    return table


@dataclass(frozen=True)
class Benchmark:
    """How one dataset is scored: a row per sample, and the table of all rows."""

    row: Callable[[data.Sample, np.ndarray, str | None], Row] = video_row
    table: Callable[[Sequence[Row]], Table] = by_group
    image: bool = False  # one frame per sample
    merged: bool = False  # rows are made anew of all objects of a video (Ref-DAVIS17's protocol A)


_refcoco = Benchmark(image_row, pooled(metrics.refcoco_scores), image=True)
_amodal = Benchmark(amodal_row, metrics.r2sm_table, image=True)
BENCHMARKS: dict[str, Benchmark] = {
    "ambi_rvos": Benchmark(table=found_only), "ok_vos": Benchmark(table=found_only), "mevis": Benchmark(),
    "revos": Benchmark(table=class_means), "ref_youtube_vos": Benchmark(),
    "ref_davis17_a": Benchmark(table=annotators, merged=True), "ref_davis17_b": Benchmark(),
    "long_rvos": Benchmark(), "reason_vos": Benchmark(),
    "reason_seg": Benchmark(image_row, pooled(metrics.lisa_scores), image=True),
    **{name: _refcoco for name in readers.DATASETS if name.startswith("refcoco")},
    "prist": Benchmark(image_row, pooled(metrics.prist_tables), image=True),
    **dict.fromkeys(("r2sm", "cocoa_cls", "d2sa", "muva"), _amodal),
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """How the dataset `name` is scored. Raises ConfigError, with the nearest one, where there is no such benchmark."""
    if name not in BENCHMARKS:
        close = data._closest(name, BENCHMARKS)
        raise train.ConfigError(f"benchmark={name}: no such benchmark{close}; use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def merged_rows(source: Source, folder: Path, known: Iterable[int]) -> list[Row]:
    """Ref-DAVIS17's protocol A: a row per object, annotator and video, its objects merged and matched anew.

    `known`: numbers of the samples that have masks in `folder`; a video counts for an annotator when all of his
    expressions do. `group` is the annotator: the overall scores are the mean over the four.
    """
    videos: dict[tuple, list[int]] = collections.defaultdict(list)
    for number in known:
        meta = source.open(number).meta
        videos[meta["video"], meta["annotator"]].append(number)
    rows = []
    whole = collections.Counter()
    for id in source.ids():  # a record that is refused has a name at least
        video, _, expression = id.rpartition("/")
        if expression.isdigit():
            whole[video, int(expression) % 4] += 1
    for (video, annotator), numbers in videos.items():
        if len(numbers) < whole[video, annotator]:
            continue  # an object without its expression would count as perfectly absent
        samples = sorted(map(source.open, numbers), key=lambda s: int(s.meta["object"]))
        said = metrics.merge_objects(np.stack([read_masks(folder, sample)[0] for sample in samples]))
        truth = np.zeros(said.shape, np.int64)
        for sample in samples:
            for t in range(len(sample)):
                truth[t][sample.truth(t)] = int(sample.meta["object"])
                if sample.ignore is not None:
                    truth[t][sample.ignore(t)] = readers.VOID
        try:
            objects = metrics.davis_objects(said, truth)
        except ValueError as error:
            raise data.DataError(f"video {video} of annotator {annotator}: {error}") from None
        for j, f in zip(*objects, strict=True):
            rows.append({"video": video, "group": f"annotator {annotator}", "J": float(j.mean()), "F": float(f.mean())})
    return rows


# ------------------------------------------------------------------------------------------------------------
# 3 Samples and masks on disk
# ------------------------------------------------------------------------------------------------------------

SPLITS = ("valid_u", "test", "valid", "val", "testA", "testB", "train")  # the first that is there; MeViS's has labels


class Source:
    """One split of a benchmark, each sample opened by its number when asked for."""

    def __init__(self, name: str, path: Path, split: str | None):
        """A prepared folder or the dataset's own. Raises ConfigError or DataError when it is neither, or lacks it."""
        prepared = (path / data.MARKER).is_file()
        if prepared and (made := data._check_prepared(path))["name"] != name:
            raise train.ConfigError(f"source={path}: holds records of {made['name']}; use benchmark={made['name']}")
        there = list(made["splits"]) if prepared else readers.splits_of(name, path)
        if split is not None and split not in there:
            raise train.ConfigError(f"split={split}: not in {path}, which has {', '.join(there)}")
        self.name, self.path, self.split = name, path, split or next(s for s in (*SPLITS, *there) if s in there)
        if prepared:
            samples = data.load_prepared(path, self.split)
            self._refused = [id for id, _ in samples.refused]
            self._records = [("", functools.partial(samples.__getitem__, i)) for i in range(len(samples))]
            # Rows are known by their number, and a record that is mended moves all after it.
            self.fingerprint = " ".join([made["fingerprint"], *self._refused])
        else:
            self._records, self._refused = list(readers.records(name, path, self.split)), []
            known = readers.dataset(name)
            labels = [label for x in known.labels if (path / (label := x.format(split=self.split))).is_dir()]
            tables = known.tables(path, self.split)
            self.fingerprint = data._fingerprint(name, {}, path.absolute(), tables, labels)
        first = {id: number for number, (id, _) in reversed(list(enumerate(self._records)))}
        self._twice = set() if prepared else {n for n, (id, _) in enumerate(self._records) if first[id] != n}

    def __len__(self) -> int:
        return len(self._records)

    def open(self, number: int) -> data.Sample:
        """Raises DataError (or ValueError, OSError) when the record is not as it should be."""
        if number in self._twice:
            raise data.DataError(f"its id {self._records[number][0]!r} belongs to an earlier record")
        sample = self._records[number][1]()
        if not sample.meta.get("labelled", True):
            raise data.DataError("none of its frames has a mask file")
        return sample

    def ids(self) -> list[str]:
        """Of all records that have one to be read, those that are refused too."""
        ids = list(self._refused)
        for id, read in self._records:
            with contextlib.suppress(ValueError, OSError):
                ids.append(id or read().id)
        return ids

    def id_of(self, number: int) -> str:
        return self._records[number][0] or f"number {number}"


def video_of(sample: data.Sample) -> str:
    """What several queries may share, and no two videos: the unit that intervals are drawn over."""
    return str(sample.meta.get("video") or sample.meta.get("image") or sample.id)


def about(number: int, sample: data.Sample) -> Row:
    """What a row says of its sample."""
    return {"index": number, "id": sample.id, "video": video_of(sample), "group": sample.ability or sample.split,
            "query": sample.query}  # fmt: skip


def hidden(sample: data.Sample) -> bool:
    return sample.masks is None and sample.amodal_masks is None


def write_masks(folder: Path, sample: data.Sample, masks: Bool[np.ndarray, "t h w"]) -> None:
    """folder/ID/FRAME.png of 0 and 255, each whole or not there. DataError for an id that leads out of `folder`."""
    place = data._inside(folder.resolve(), sample.id)
    place.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(sample.frame_names, masks, strict=True):
        file = data._inside(folder.resolve(), sample.id, f"{name}.png")
        new = file.with_name(f".{file.name}.{os.getpid()}")
        Image.fromarray(mask.astype(np.uint8) * 255).save(new, "PNG")
        os.replace(new, file)


def read_masks(folder: Path, sample: data.Sample) -> tuple[Bool[np.ndarray, "t h w"], bool]:
    """The masks folder/ID/FRAME.png, anything but 0 is in; and whether there was one. A missing frame is an empty mask.

    DataError for one of another size, with several channels, or that is no image.
    """
    masks, some = np.zeros((len(sample), *sample.size), bool), False
    for t, name in enumerate(sample.frame_names):
        file = data._inside(folder.resolve(), sample.id, f"{name}.png")
        if not file.is_file():
            continue
        some = True
        with data._opened(file) as image:
            values = np.asarray(image)
        if values.shape != sample.size:
            given = "x".join(map(str, values.shape))
            raise data.DataError(f"mask {file} is {given}, its frame {sample.size[0]}x{sample.size[1]}")
        masks[t] = values != 0
    return masks, some


SUBMISSIONS = {"mevis": "", "ref_youtube_vos": "Annotations/"}  # what stands before VIDEO/EXPRESSION/FRAME.png


def write_submission(file: Path, source: Source, folder: Path) -> int:
    """The zip that the server of `source`'s benchmark takes, of all masks in `folder`; whole or not there.

    Returns how many masks it holds. Raises ConfigError for a mask that is missing.
    """
    if source._refused:
        raise train.ConfigError(f"submission={file}: {source.path} lacks records, {source._refused[0]!r} the first, "
                                "and the server wants all; mend them and prepare it again with strict=true")
    file.parent.mkdir(parents=True, exist_ok=True)
    new, count = file.with_name(f".{file.name}.{os.getpid()}"), 0
    try:
        with zipfile.ZipFile(new, "w") as out:  # PNG is compressed already
            for number in tqdm(range(len(source)), "submission", unit="sample", dynamic_ncols=True, disable=None):
                sample = source.open(number)
                for name in sample.frame_names:
                    mask = data._inside(folder.resolve(), sample.id, f"{name}.png")
                    if not mask.is_file():
                        raise train.ConfigError(f"submission={file}: {mask} is missing, and the server wants all of "
                                                f"{source.split}'s {len(source)} expressions")
                    with data._opened(mask) as image:
                        binary = Image.fromarray((np.asarray(image) != 0).astype(np.uint8) * 255)
                    png = io.BytesIO()
                    binary.save(png, "PNG")
                    where = f"{SUBMISSIONS[source.name]}{sample.id}/{name}.png"
                    out.writestr(zipfile.ZipInfo(where), png.getvalue())  # dateless: the same masks, the same file
                    count += 1
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
    return count


# ------------------------------------------------------------------------------------------------------------
# 4 Baselines: who asks otherwise, and what the segmenter could do at best
# ------------------------------------------------------------------------------------------------------------

ASKERS = ("guess", "random", "everything", "oracle")
COLUMNS = ("policy", "described", *ASKERS, "true box")


def ask(asker: str, graph: dict, shown: Sequence[int], rng: np.random.Generator) -> tuple[list[int], Row]:
    """A dialogue of somebody who sees perfectly with the exact user: the candidates left, and its row in the words of
    METHOD.md 11.7.

    guess asks nothing, random any attribute until one candidate is left, everything all attributes in their order,
    also of a clear query, and oracle a best question each time (DATA.md 6.6). Who is left with several takes any of
    them: `success` is the chance to take the target.
    """
    user, left = simulator.OracleUser(), list(graph["candidates"])
    objects = {obj["oid"]: obj for obj in graph["objects"]}

    def values(oid: int) -> dict[str, str]:
        column = next(entry["col"] for entry in objects[oid]["per_frame"] if entry["f"] == shown[0])
        return {a: objects[oid][a] for a in ("color", "shape", "size")} | {
            "motion": objects[oid]["motion"]["dir"], "column": str(column)}

    def choose() -> str | None:
        if asker == "everything":
            return (*synthetic.ASKABLE, None)[len(asked)]
        if asker == "guess" or len(left) <= 1:
            return None
        if asker == "random":
            return str(rng.choice(synthetic.ASKABLE))
        return (*synthetic.optimal_questions([values(oid) for oid in left])[2], None)[0]  # None: twins

    counts, asked = [len(left)], []
    while len(asked) < synthetic.BUDGET and (attribute := choose()) is not None:
        question = synthetic.QUESTIONS[attribute].format(fid=shown[0])
        left = simulator.consistent(graph, shown, left, question, user.answer(graph, shown, question))
        asked.append(attribute)
        counts.append(len(left))
    empty = synthetic.BUDGET - len(asked)  # one shape for all: each is a program
    gains = train.turn_gains(np.array(counts + counts[-1:] * empty), np.array([True] * len(asked) + [False] * empty))
    success = 1.0 if not left else (graph["target"] in left) / len(left)
    return left, {
        "level": graph["level"], "success": success, "frame_ok": True, "counts": counts, "asked": asked,
        "gains": np.asarray(gains)[: len(asked)].tolist(), "questions": len(asked),
        "optimal": float(graph["optimal_expected"]), "budget": synthetic.BUDGET, "format": True,
    }  # fmt: skip


def true_answer(prompt: train.Prompt) -> tuple[int | None, train.Action | None]:
    """Position, and the true box and point, of the shown frame with most of the target; None where it is on none."""
    if not prompt.truth:
        return None, None
    fid, best = max(prompt.truth.items(), key=lambda entry: entry[1]["area"])
    action = train.Action("answer", box=tuple(best["bbox_2d"]), point=tuple(best["point_2d"]),
                          mask_type=prompt.sample.mask_type or "modal")  # fmt: skip
    return prompt.positions[prompt.fids.index(int(fid))], action


def object_answer(prompt: train.Prompt, oid: int) -> tuple[int, train.Action]:
    """The same of any object of the scene graph, on the shown frame that shows most of it: its box and its centre."""
    obj = next(obj for obj in prompt.graph["objects"] if obj["oid"] == oid)
    place = max((entry for entry in obj["per_frame"] if entry["f"] in prompt.fids), key=lambda entry: entry["visible"])
    height, width = prompt.graph["size"]
    x1, y1, x2, y2 = place["bbox"]
    box = (1000 * x1 / width, 1000 * y1 / height, 1000 * x2 / width, 1000 * y2 / height)
    point = (1000 * place["center"][0] / width, 1000 * place["center"][1] / height)
    action = train.Action("answer", box=box, point=point, mask_type=prompt.sample.mask_type or "modal")
    return prompt.positions[prompt.fids.index(place["f"])], action


class Exact:
    """The exact user (or a person) and expert."""

    def __init__(self, who: Any):
        self.who, self.workers = who, getattr(who, "workers", 1)
        self.said: dict[tuple, str] = {}  # batches are filled up with copies, and a person should hear them once

    def answer(self, graph: dict, shown: Sequence[int], question: str) -> str:
        key = (json.dumps(graph, sort_keys=True), tuple(shown), question)
        if key not in self.said:
            self.said[key] = self.who.answer(graph, shown, question)
        return self.said[key]

    def diagnose(self, graph: dict, shown: Sequence[int], dialogue: Dialogue) -> simulator.Diagnosis:
        return self.who.diagnose(graph, shown, dialogue)


# ------------------------------------------------------------------------------------------------------------
# 5 A policy
# ------------------------------------------------------------------------------------------------------------


class Player:
    """A policy, its user and the segmenter, wired for evaluation: this process's devices only, no optimiser."""

    def __init__(self, config: train.Config, path: str, baselines: bool, out: Path, process: int):
        c = self.config = config
        self.baselines, self.masks = baselines, out / "masks"
        tensor, here = c.mesh.tensor or train.PRESETS[c.mesh.preset][2], jax.local_device_count()
        tensor = here if tensor == -1 else math.gcd(tensor, here)
        self.mesh = train.make_mesh(train.MeshSection(data=-1, fsdp=1, tensor=tensor), jax.local_devices())
        if c.evaluate.prompts % self.mesh.shape["data"]:
            raise train.ConfigError(f"evaluate.prompts={c.evaluate.prompts}: dialogues are spread over "
                                    f"{self.mesh.shape['data']} devices; use a multiple of it")
        train.check_attention(c, self.mesh)
        _, user, expert = train.meet(c, self.mesh)
        self.user = user if isinstance(user, train.MODELS) else Exact(user)
        self.expert = expert if isinstance(expert, train.MODELS) else Exact(expert)
        policy_config, params = train.load_policy(path, self.mesh, dtype=c.policy.dtype)
        words = train.tokenizer_source(Path(path), otherwise=train.resolve_path(c.policy.path))
        policy = train.Policy(policy_config, mesh=self.mesh, attention=c.policy.attention)
        self.params = train.reading_copy(policy, self.mesh, c.policy.dtype)(params)
        clarify = c.protocol.clarify if c.evaluate.clarify is None else c.evaluate.clarify
        protocol = dataclasses.replace(c.protocol, clarify=clarify)
        self.speaker = train.Speaker(protocol, policy_config, train.load_tokenizer(words, policy_config))
        self.sampler = train.Sampler(c, policy, self.speaker, self.mesh)
        self.clock = train.Clock()
        self.segmenter = SegmenterClient(
            c.sidecar.address, segmenter=train.resolve_path(c.sidecar.segmenter), timeout_s=c.sidecar.timeout,
            threads=c.sidecar.threads, log_file=out / f"sidecar.{process}.log", prompting=c.sidecar.prompting,
        )  # fmt: skip
        self.segmenter.start(wait=False)

    def prompt(self, sample: data.Sample) -> train.Prompt:
        """Raises DataError when the sample's frames or masks cannot be read, ConfigError where nobody could answer."""
        prompt = train.Prompt(sample, data.sample_frames(len(sample), self.config.protocol.frames), self.speaker)
        told = prompt.graph or isinstance(self.user, train.MODELS)
        if not told and prompt.offered:
            raise train.ConfigError(
                f"simulator.kind={self.config.simulator.kind}: {sample.id} is a query to ask about, and no scene graph "
                "tells the exact user what is true; use simulator.kind=endpoint or local"
            )
        for who in (self.user, self.expert):
            train.check_sight(who, self.config, sample)
        return prompt

    def play(self, prompts: Sequence[train.Prompt]) -> list[train.Dialogue]:
        """Greedy dialogues, one each; a short batch is filled up, so that one set of programs serves all."""
        c = self.config
        full = [prompts[i % len(prompts)] for i in range(c.evaluate.prompts)]
        played = self.sampler.play(
            self.params, full, [0.0], self.user, seed=c.seed, step=train.EVALUATION, clock=self.clock,
            max_turns=c.evaluate.max_turns, penalties=(c.evaluate.repetition_penalty, c.evaluate.presence_penalty),
        )  # fmt: skip
        return [row[0] for row in played[: len(prompts)]]

    def batch(self, prompts: Sequence[train.Prompt]) -> tuple[list[train.Dialogue], list[train.Dialogue | None]]:
        """The dialogues of the policy, and, where a target is described, those of the policy that is told."""
        played = self.play(prompts)
        described: dict[int, train.Prompt] = {}
        for i, prompt in enumerate(prompts):
            if self.baselines and simulator.describe_target(prompt.sample):
                try:
                    described[i] = self.prompt(train.described(prompt.sample))
                except train.PromptTooLong as error:
                    print(f"no column `described`: with the description {error}", file=sys.stderr)
        if not described:
            return played, [None] * len(prompts)
        # A query without a target stays as it is.
        told = [None if d.prompt.sample.target_ids else d for d in played]
        for i, d in zip(described, self.play(list(described.values())), strict=True):
            told[i] = d
        return played, told

    def rate(self, numbers: Sequence[int], played: list[train.Dialogue], told: list[train.Dialogue | None]
             ) -> Iterator[Row | None]:
        """The rows of a batch, masks written before each; None: the user or the expert model did not answer."""
        words = [self.words(dialogues) for dialogues in (played, told)]
        for i, (number, d) in enumerate(zip(numbers, played, strict=True)):
            if words[0][i] is None or (told[i] is not None and words[1][i] is None):
                yield None
                continue
            prompt, sample = d.prompt, d.prompt.sample
            answer = d.answer
            try:
                masks = train.video_masks(self.segmenter, sample, *train.answered(d))
                write_masks(self.masks, sample, masks)
                columns = {"policy": self.column(sample, masks, answer, words[0][i])}
                if told[i] is d:
                    columns["described"] = columns["policy"]
                elif told[i] is not None:
                    columns["described"] = self.answered(prompt, *train.answered(told[i]), words[1][i])
                if self.baselines and not hidden(sample):
                    columns |= self.others(number, prompt)
            except (ValueError, OSError) as error:
                if data.of_machine(error):
                    raise
                yield refusal(number, sample.id, error)
                continue
            turns = [{"said": text, "kind": action.kind, "reply": reply}
                     for text, action, reply in zip(d.texts, d.actions, d.replies, strict=True)]
            yield about(number, sample) | {
                "turns": turns, "end": d.end, "frame": d.frame, "box": answer and list(answer.box),
                "point": answer and list(answer.point), "mask_type": answer and answer.mask_type, "columns": columns,
            }  # fmt: skip

    def words(self, dialogues: Sequence[train.Dialogue | None]) -> list[Row | None]:
        """Each dialogue in the words of METHOD.md 11.7, without counts where nobody knows them; None where lost."""
        there = [d for d in dialogues if d is not None]
        out: list[Row | None] = [None] * len(dialogues)
        if not there:
            return out
        places = [i for i, d in enumerate(dialogues) if d is not None]
        scores, _, _ = train.score([[d] for d in there], self.config, self.expert, None)
        for i, d in enumerate(there):
            row = train.dialogue_row(d, scores, i, 0, self.config)
            kept = ["level", "success", "frame_ok", "questions", "format"]
            if d.prompt.graph or isinstance(self.expert, train.MODELS):
                kept += ["counts", "asked", "gains", "optimal", "budget"]
            if hidden(d.prompt.sample):
                kept = ["level", "questions", "format"]
            out[places[i]] = None if d.lost else {k: row[k] for k in kept}
        return out

    def column(self, sample: data.Sample, masks: np.ndarray, answer: train.Action | None, words: Row | None) -> Row:
        scores = {} if hidden(sample) else benchmark(sample.dataset).row(sample, masks, answer and answer.mask_type)
        if answer is None and "right_type" in scores:
            scores["right_type"] = False  # no answer is not the right one
        return {"scores": scores, "words": words}

    def answered(self, prompt: train.Prompt, position: int | None, answer: train.Action | None, words: Row | None
                 ) -> Row:
        masks = train.video_masks(self.segmenter, prompt.sample, position, answer)
        return self.column(prompt.sample, masks, answer, words)

    def others(self, number: int, prompt: train.Prompt) -> dict[str, Row]:
        """The columns of the true box and point and, with a scene graph, of the askers."""
        best = self.answered(prompt, *true_answer(prompt), None)
        columns, tracked = {"true box": best}, {}
        for k, asker in enumerate(ASKERS if prompt.graph else ()):
            rng = np.random.default_rng([self.config.seed, k, number])
            left, words = ask(asker, prompt.graph, prompt.fids, rng)
            taken = int(rng.choice(left)) if left else None
            if taken is None or str(taken) in prompt.sample.target_ids:
                columns[asker] = best | {"words": words}
                continue
            if taken not in tracked:
                tracked[taken] = self.answered(prompt, *object_answer(prompt, taken), None)
            columns[asker] = tracked[taken] | {"words": words}
        return columns


def refusal(number: int, id: str, error: Exception) -> Row:
    return {"index": number, "id": data._one_line(id), "refused": data._one_line(str(error))[:500]}


class Log:
    """The rows of one process, a line each, written when its masks are; nobody else writes to the same file."""

    def __init__(self, out: Path, process: int):
        self.out, self.file = out, out / f"rows.{process}.jsonl"
        self._lock = open(out / f".lock.{process}", "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise train.ConfigError(f"out={out}: another evaluation is writing here; wait for it or give another out="
                                    ) from None
        if self.file.exists() and not self.file.read_bytes().endswith(b"\n"):  # killed in the middle of a line
            train.write_atomically(self.file, "".join(json.dumps(row) + "\n" for row in read_rows(self.file)))

    def all(self) -> dict[int, Row]:
        """The rows of all processes by number, in their order."""
        rows: dict[int, Row] = {}
        for file in sorted(self.out.glob("rows.*.jsonl")):
            for row in read_rows(file):  # one that another process refused before may be played by now
                if "refused" not in row or row["index"] not in rows:
                    rows[row["index"]] = row
        return dict(sorted(rows.items()))

    def add(self, row: Row) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._lock.close()


def wait_for_others(out: Path, process: int, processes: int) -> None:
    """Until all have played their shares: each holds its lock while it plays. Hours may pass, which no collective
    waits for."""
    for other in range(processes):
        if other != process and (lock := out / f".lock.{other}").exists():
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)


def read_rows(file: Path) -> Iterator[Row]:
    """The whole lines of a file of rows; the last one of a killed process may be cut."""
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("index"), int):
                yield row


def same_evaluation(out: Path, told: Mapping[str, Any]) -> None:
    """Writes down what is evaluated, or raises ConfigError when `out` holds rows of anything else."""
    file = out / "evaluation.json"
    if not any(rows.stat().st_size for rows in out.glob("rows.*.jsonl")):  # a start that failed binds nobody
        train.write_atomically(file, json.dumps(told, indent=1))
    old, new = train._flat(train.read_json(file) or {}), train._flat(dict(told))
    free = {f"{section}.{key}" for section, keys in FREE.items() for key in keys}
    # Weights that lie on another machine, or were written down by an earlier version, are known by their names only.
    free |= {k for k in old.keys() | new.keys() if k.startswith("weights.") and None in (old.get(k), new.get(k))}
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in free]
    if differing:
        shown = ", ".join(f"{k} ({old.get(k)} -> {new.get(k)})" for k in differing[:4])
        raise train.ConfigError(f"out={out} belongs to another evaluation: {shown}; give another out=")


# What a row does not depend on: batches, deadlines, where servers run; how long a prompt may be that was played.
FREE = train.SERVERS | {
    "protocol": {"prompt_tokens"},
    "evaluate": {"prompts", "draws", "split", "samples", "every", "clips", "gallery", "before", "describe"}
}


def play_benchmark(config: train.Config, given: Mapping[str, str]) -> int:
    """`benchmark=` of a policy: plays this process's share of what is not there yet, then prints the table. Returns how
    many dialogues got no answer from a model."""
    name, how = given["benchmark"], benchmark(given["benchmark"])
    check_submission(given, whole=not config.evaluate.samples)
    if config.mesh.distributed:
        train.join_processes()
    process, processes = jax.process_index(), jax.process_count()
    if config.evaluate.describe:
        raise train.ConfigError("evaluate.describe=true: the table has a column of it already; leave it out")
    if how.image:
        config = dataclasses.replace(config, protocol=dataclasses.replace(config.protocol, frames=1))
    source = Source(name, Path(given.get("source", config.data.path)), given.get("split"))
    path = given.get("checkpoint", config.policy.path)
    resolved = train.resolve_path(path)
    try:
        resolved = weights.find_checkpoint(resolved) or resolved if resolved.is_dir() else resolved
    except ValueError as error:
        raise train.ConfigError(str(error)) from None
    baselines, strict = (truth(given, key, default) for key, default in (("baselines", True), ("strict", False)))
    out = Path(given.get("out", f"runs/evaluate_{name}"))
    try:
        (out / "masks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise train.ConfigError(f"out={out}: can not be written ({error.strerror}); give another out=") from None
    settings = dataclasses.asdict(config)
    settings = {section: {k: v for k, v in settings[section].items() if k not in FREE.get(section, ())}
                for section in ("protocol", "evaluate", "sidecar", "simulator", "expert")}  # fmt: skip
    local = not config.sidecar.address  # what lies on another machine is known by its name
    segmenter = weights.fingerprint(train.resolve_path(config.sidecar.segmenter)) if local else None
    log = Log(out, process)
    try:
        same_evaluation(out, {
            "benchmark": name, "source": str(source.path.resolve()), "split": source.split, "seed": config.seed,
            "records": source.fingerprint, "checkpoint": str(resolved), "dtype": config.policy.dtype,
            "weights": {"checkpoint": weights.fingerprint(resolved), "segmenter": segmenter},
            "baselines": baselines, "prompts": answering(config), **json.loads(json.dumps(settings)),
        })  # fmt: skip
        count = min(config.evaluate.samples or len(source), len(source))
        done = {number: row for number, row in log.all().items() if "refused" not in row}  # those are tried again
        share = range(process, count, processes)
        pending = [number for number in share if number not in done]
        lost = 0
        if train.agreed(bool(pending)):  # all load the policy or none does: they meet there
            train.cache_programs()
            player = Player(config, str(resolved), baselines, out, process)
            with contextlib.closing(player.segmenter):
                player.segmenter.start()
                if how.row is amodal_row and not player.segmenter.amodal:
                    what = f"sidecar.segmenter={config.sidecar.segmenter}: draws no complete masks"
                    raise train.ConfigError(f"{what}, which {name} wants; asset:sam2_mini has a decoder for them")
                old = [done[number] for number in share if number in done]
                lost = play_pending(player, source, pending, log, old, strict, len(share)) if pending else 0
        log.close()
        wait_for_others(out, process, processes)
        if process == 0:
            rows = {number: row for number, row in log.all().items() if number < count}
            train.write_atomically(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
            report(source, list(rows.values()), out / "masks", out, answering(config))
        if lost:
            print(f"{lost} dialogues got no answer from a model; the same command plays them again", file=sys.stderr)
        if process == 0 and "submission" in given:
            submit(given["submission"], source, out / "masks")
        train.leave_together()
    finally:
        log.close()
    return lost


def play_pending(player: Player, source: Source, pending: Sequence[int], log: Log, old: Sequence[Row], strict: bool,
                 total: int) -> int:
    """Plays the samples of these numbers in batches and writes their rows. Returns how many were lost."""
    waiting = collections.deque(pending)
    bar = tqdm(total=total, initial=len(old), desc=f"evaluate {source.name}", unit="sample", dynamic_ncols=True,
               disable=None if jax.process_index() == 0 else True)  # fmt: skip
    running: dict[str, list[float]] = collections.defaultdict(list)
    lost, keeping = 0, threading.Lock()

    def watch(row: Row) -> None:
        scores = row.get("columns", {}).get("policy", {})
        for key, value in ((scores.get("scores") or {}) | (scores.get("words") or {})).items():
            if key in ("JF", "IoU", "success"):
                running[key].append(float(value))

    def keep(row: Row) -> None:
        if "refused" in row and strict:
            raise data.DataError(f"record {row['id']} of {source.split} of {source.path}: {row['refused']}")
        with keeping:
            if "refused" in row:
                bar.write(f"record {row['id']} is left out: {row['refused']}", file=sys.stderr)
            log.add(row)
            watch(row)
            bar.update()
            bar.set_postfix_str(" ".join(f"{k} {np.mean(v):.3f}" for k, v in running.items()))

    def next_batch() -> tuple[list[int], list[train.Prompt]]:
        numbers, prompts = [], []
        while waiting and len(prompts) < player.config.evaluate.prompts:
            number = waiting.popleft()
            try:
                prompts.append(player.prompt(source.open(number)))
                numbers.append(number)
            except train.PromptTooLong as error:
                keep(refusal(number, source.id_of(number), error))
            except train.ConfigError:
                raise
            except (ValueError, OSError) as error:
                if data.of_machine(error):
                    raise
                keep(refusal(number, source.id_of(number), error))
        return numbers, prompts

    def rate(numbers: Sequence[int], played: list, told: list) -> None:
        nonlocal lost
        for row in player.rate(numbers, played, told):
            if row is None:
                lost += 1
            else:
                keep(row)

    for row in old:
        watch(row)
    # Masks of a batch are made by the segmenter while the next one is played.
    with contextlib.closing(bar), concurrent.futures.ThreadPoolExecutor(1) as rater:
        rated = None
        while waiting:
            numbers, prompts = next_batch()
            batch = player.batch(prompts) if prompts else ([], [])
            if rated is not None:
                rated.result()
            rated = rater.submit(rate, numbers, *batch) if prompts else None
        if rated is not None:
            rated.result()
    return lost


# ------------------------------------------------------------------------------------------------------------
# 6 Commands
# ------------------------------------------------------------------------------------------------------------


def dialogue_words(rows: Sequence[Row]) -> Table:
    """metrics.dialogue_summary's, or where nobody counts candidates, shares and means of what is known."""
    words = [row["words"] for row in rows]
    if all("counts" in w for w in words):
        summary = metrics.dialogue_summary(words)
        kept = ("success", "success_ambiguous", "success_clear", "success_none", "questions_ambiguous",
                "questions_clear", "resolved_rate", "redundant_question_rate", "regret", "frame_ok",
                "format_rate")  # fmt: skip
        return {k: summary[k] for k in kept if summary[k] is not None}
    known = [k for k in ("success", "frame_ok", "questions", "format") if all(k in w for w in words)]
    return {"format_rate" if k == "format" else k: float(np.mean([w[k] for w in words])) for k in known}


def answering(c: train.Config) -> dict[str, dict]:
    """Who answered and who counted; models with the hash of what they are told, since results depend on them
    (METHOD.md 8, Q7, Q8)."""
    told = {"simulator": {"kind": c.simulator.kind}, "expert": {"kind": c.expert.kind}}
    hashes = {"simulator": simulator.ModelUser.prompt_hash(c.simulator.description),
              "expert": simulator.ModelExpert.prompt_hash()}  # fmt: skip
    for name, said in told.items():
        section = getattr(c, name)
        if section.kind in ("endpoint", "local"):
            said["model"] = section.path if section.kind == "local" else section.model
            said |= {"prompt_version": simulator.PROMPT_VERSION, "prompt_hash": hashes[name]}
    return told


def report(source: Source, rows: Sequence[Row], folder: Path, out: Path | None,
           answered_by: Mapping[str, dict] | None = None) -> Table:
    """Prints the table of all columns and writes it to out/table.json: {column: {"scores", "dialogues"}} of numbers
    and, under "interval", of (low, high) beside them; `answered_by` goes beside the table."""
    how, played = benchmark(source.name), [row for row in rows if "columns" in row]
    if not played:
        why = f"the first is refused because {rows[0]['refused']}" if rows else "no dialogue was answered"
        raise train.ConfigError(f"{source.split} of {source.path}: nothing to score; {why}")
    table: Table = {}
    for column in COLUMNS:
        mine = [row["columns"][column] | {k: row[k] for k in ("video", "group")} for row in played
                if column in row["columns"]]  # fmt: skip
        if not mine or (column != "policy" and len(mine) < len(played)):
            continue  # a part of the samples would not be comparable
        parts: dict[str, tuple[Callable, list]] = {}
        scores = [row["scores"] | {k: row[k] for k in ("video", "group")} for row in mine if row["scores"]]
        if any("missing" in row for row in scores):  # so that resamples, too, tell the same scores
            scores = [{"missing": False} | row for row in scores]
        if how.merged and column == "policy" and scores:
            scores = merged_rows(source, folder, [row["index"] for row in played])
        if scores and not (how.merged and column != "policy"):
            # Rows of images with a mask type of their own are not grouped by level.
            parts["scores"] = (how.table, scores)
        if all(row["words"] for row in mine):
            parts["dialogues"] = (dialogue_words, mine)
        table[column] = {name: of(members) for name, (of, members) in parts.items()} | {
            "interval": {name: metrics.bootstrap(members, of, resamples=RESAMPLES[name])
                         for name, (of, members) in parts.items()}}  # fmt: skip
    refused = len(rows) - len(played)
    told = {"benchmark": source.name, "split": source.split, "samples": len(played), "refused": refused,
            "videos": len({row["video"] for row in played}), "answered_by": answered_by, "table": table}  # fmt: skip
    missing = sum(bool(row["columns"]["policy"]["scores"].get("missing")) for row in played)
    print(f"{source.name} {source.split}: {len(played)} samples of {told['videos']} videos"
          + (f", {refused} refused" if refused else "") + (f", {missing} without masks" if missing else ""))
    if not any(row["columns"]["policy"]["scores"] for row in played):
        print("labels are hidden: no scores")
    elif "scores" not in table["policy"]:
        print("no scores: no video has the expressions of all its objects by one annotator")
    for line in table_lines(table):
        print(line)
    if out is not None:
        train.write_atomically(out / "table.json", json.dumps(told, indent=1))
        print(out / "table.json")
    return told


RESAMPLES = {"scores": 1000, "dialogues": 200}


def table_lines(table: Table) -> list[str]:
    """The table as text: a line per number, a column per asker, "-" where there is none, the policy's with its 95 %
    interval over videos."""
    if not any(name in parts for parts in table.values() for name in RESAMPLES):
        return []
    flat = {column: train._flat({k: v for k, v in parts.items() if k != "interval"}) for column, parts in table.items()}
    sure = {column: train._flat(parts["interval"]) for column, parts in table.items()}
    names = list(dict.fromkeys(name for numbers in flat.values() for name in numbers))
    lines = [["", *COLUMNS] if len(table) > 1 else ["", *table]]
    for name in names:
        cells = []
        for column in lines[0][1:]:
            value, between = flat.get(column, {}).get(name), sure.get(column, {}).get(name)
            cell = "-" if value is None else f"{value:.0f}" if name.endswith("count") else f"{value:.3f}"
            if column == "policy" and value is not None and between and not name.endswith("count"):
                cell += f" [{between[0]:.3f}, {between[1]:.3f}]"
            cells.append(cell)
        lines.append([name, *cells])
    wide = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join([line[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(line[1:], wide[1:], strict=True))])
            for line in lines]  # fmt: skip


def check_submission(given: Mapping[str, str], *, whole: bool) -> None:
    """Raises ConfigError for a submission that could not be written in the end."""
    if "submission" not in given:
        return
    if given["benchmark"] not in SUBMISSIONS:
        raise train.ConfigError(f"submission={given['submission']}: {given['benchmark']} has no server; of "
                                f"{', '.join(SUBMISSIONS)} there is")
    if not whole:
        raise train.ConfigError(f"submission={given['submission']}: the server wants all; leave evaluate.samples out")


def submit(file: str, source: Source, folder: Path) -> None:
    print(f"{file}: {write_submission(Path(file), source, folder)} masks")


def score_predictions(given: Mapping[str, str]) -> None:
    """`predictions=` of any method: rows and table of masks on disk; a video without any scores 0, an image has an
    empty mask (as in Ref-DAVIS17's protocol A, where objects are merged to videos)."""
    for key in ("benchmark", "source"):
        if key not in given:
            raise train.ConfigError(f"predictions={given['predictions']}: needs {key}= too; see --help")
    how, folder = benchmark(given["benchmark"]), Path(given["predictions"])
    check_submission(given, whole=True)
    if not folder.is_dir():
        raise train.ConfigError(f"predictions={folder}: no such folder; masks are looked for in {folder}/ID/FRAME.png")
    source = Source(given["benchmark"], Path(given["source"]), given.get("split"))
    strict = truth(given, "strict", False)
    rows: list[Row] = []
    for number in tqdm(range(len(source)), f"score {source.name}", unit="sample", dynamic_ncols=True, disable=None):
        try:
            sample = source.open(number)
            masks, there = read_masks(folder, sample)
            scores = {} if hidden(sample) else how.row(sample, masks, None)
            if scores and not there:
                # A video's scorers give 0 then, also where the target is out of sight; an image's see an empty mask.
                scores = (dict.fromkeys(scores, 0.0) if how.row is video_row else scores) | {"missing": True}
        except (ValueError, OSError) as error:
            if data.of_machine(error):
                raise
            if strict:
                raise data.DataError(f"record {source.id_of(number)} of {source.split}: {error}") from None
            rows.append(refusal(number, source.id_of(number), error))
            print(f"record {rows[-1]['id']} is left out: {rows[-1]['refused']}", file=sys.stderr)
            continue
        rows.append(about(number, sample) | {"columns": {"policy": {"scores": scores, "words": None}}})
    played = [row for row in rows if "columns" in row]
    if played and not any(data._inside(folder.resolve(), row["id"]).is_dir() for row in played):
        first = source.open(played[0]["index"])
        raise train.ConfigError(f"predictions={folder}: no masks of {source.name} {source.split}; the first would be "
                                f"{folder}/{first.id}/{first.frame_names[0]}.png")
    out = Path(given["out"]) if "out" in given else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        train.write_atomically(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report(source, rows, folder, out)
    if "submission" in given:
        submit(given["submission"], source, folder)


def truth(given: Mapping[str, str], key: str, default: bool) -> bool:
    value = given.get(key, str(default).lower())
    if value not in ("true", "false"):
        raise train.ConfigError(f"{key}={value}: use true or false")
    return value == "true"


OWN = {"check": (), "predictions": ("benchmark", "source", "split", "out", "submission", "strict"),
       "benchmark": ("checkpoint", "source", "split", "out", "submission", "baselines", "strict")}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when a model left dialogues without an answer, or 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    words = {*OWN, *(key for keys in OWN.values() for key in keys)}
    given = dict(a.split("=", 1) for a in arguments if a.split("=", 1)[0] in words and "=" in a)
    config, *changes = [a for a in arguments if a.split("=", 1)[0] not in words] or [""]
    try:
        kind = next((kind for kind in OWN if kind in given), None)
        if kind is None or (kind == "check" and given["check"] != "oracle"):
            words = "give benchmark=NAME, predictions=DIR or check=oracle"
            raise train.ConfigError(f"check={given.get('check', '')}: {words}; see --help")
        if unused := sorted(given.keys() - {kind, *OWN[kind]}):
            raise train.ConfigError(f"{unused[0]}={given[unused[0]]}: is not for {kind}=; see --help")
        if empty := [key for key, value in given.items() if not value]:
            raise train.ConfigError(f"{empty[0]}= is empty")
        if kind != "predictions" and not config:
            raise train.ConfigError(f"{kind}={given[kind]}: give a config first, such as experiments/embedded.yaml")
        if kind == "predictions":
            if config:
                raise train.ConfigError(f"{config}: predictions= takes no config")
            score_predictions(given)
        elif kind == "benchmark":
            return int(play_benchmark(train.load_config(config, changes), given) > 0)
        else:
            told = against_oracle(train.load_config(config, changes))
            print(json.dumps(told, indent=1))
            return int(any(told.get(name, {}).get("without_answer") for name in ("simulator", "expert")))
    except (train.ConfigError, data.DataError, SidecarError, OSError) as error:
        print(f"error: {data.first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    train.leave(main)
