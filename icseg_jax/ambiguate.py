"""A benchmark in Ambi-RVOS's layout out of any referring video set: clear expressions made ambiguous by rules.

METHOD.md 6, last paragraph: words that tell a target from its kind are dropped until two objects or more match. What
is known of an object is what the set's own expressions say of it, so "does it match?" has three answers, and a query
which some object only may match is not used: the counts that are written are sure as far as the texts are. Where the
expressions leave something open, a multimodal model behind an endpoint may look (`url=`, `model=`).
`python -m icseg_jax.data ambiguate NAME source=DIR out=DIR` writes it, and `data.read_ambi_rvos` reads it.

1 What an expression says · 2 Who matches a query · 3 From clear to ambiguous · 4 On disk
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from icseg_jax import data, readers, simulator, synthetic
from icseg_jax.data import DataError, Sample


class NoAnswer(DataError):
    """A model that was asked to look did not answer in time."""


SOURCES = ("mevis", "revos", "ref_youtube_vos", "ref_davis17_a", "long_rvos")  # sets that number their objects

# ------------------------------------------------------------------------------------------------------------
# 1 What an expression says
# ------------------------------------------------------------------------------------------------------------

# attribute -> value -> the words that say so; in the order in which a query names them
ATTRIBUTES: dict[str, dict[str, str]] = {
    "size": {"small": "small little tiny", "medium": "medium", "large": "large big huge"},
    "age": {"young": "young baby", "old": "old adult"},
    "color": {"black": "black", "white": "white", "gray": "gray grey", "brown": "brown", "red": "red",
              "orange": "orange", "yellow": "yellow", "green": "green", "blue": "blue", "purple": "purple",
              "pink": "pink"},
    "position": {"left": "left leftmost", "right": "right rightmost", "middle": "middle center centre",
                 "front": "front frontmost", "back": "back rear", "top": "top", "bottom": "bottom"},
    "motion": {"leftward": "leftward leftwards", "rightward": "rightward rightwards", "upward": "upward upwards",
               "downward": "downward downwards", "forward": "forward forwards", "backward": "backward backwards",
               "still": "stationary motionless unmoving"},
}
_SAYS = {word: (attribute, value) for attribute, values in ATTRIBUTES.items()
         for value, words in values.items() for word in words.split()}
_ADJECTIVES = _SAYS.keys() - {"baby", "adult"}
# After a verb of movement these are directions, and nothing otherwise ("the left dog", "standing up").
_TOWARDS = {"left": "leftward", "right": "rightward", "up": "upward", "down": "downward"}
_MOVES = re.compile(r"(mov|walk|run|turn|swim|fly|flie|flew|go|driv|jump|crawl|head|climb|slid|roll|rid|com)"
                    r"(e|es|s|ed|ing|ning|ming|ping)?")
_STAYS = re.compile(r"(stay|stand|stood|sit|keep|kept|remain|lie|lay|lying)(s|ing|ting)?")

_OPENING = frozenset("segment find track show me please locate identify the a an this that these those all both each "
                     "one two three four five six seven eight nine ten several some many".split())
_ENDS = frozenset("that which who whose with without in on at of to from by near next behind beside under above below "
                  "over between among beneath inside into across along around through toward towards against and or "
                  "up down is are was were has have had while when as than being not then first second third "
                  "last".split())
_VERBS = frozenset("move walk run turn stand sit stay eat play hold jump fly swim lie go look climb drive wear carry "
                   "ride chase follow lead push pull bite lick watch face remain keep appear leave enter come make "
                   "take get do drink fight touch raise throw catch lay crawl roll slide".split())
_PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "kids": "kid", "mice": "mouse",
            "geese": "goose", "feet": "foot", "wolves": "wolf", "calves": "calf", "buses": "bus", "horses": "horse"}
_ING_NOUNS = frozenset("building king ring wing painting string swing ceiling railing bed shed sled".split())
_THINGS = frozenset("one object thing item something target other".split())  # what anything may be called
_KINDS = {"person": "man woman boy girl guy lady child kid baby player rider player", "child": "boy girl kid",
          "animal": "dog cat horse cow sheep goat bear elephant zebra giraffe tiger lion panda monkey rabbit bird fish "
                    "duck chicken goose turtle lizard fox deer wolf pig mouse puppy kitten calf",
          "bird": "duck chicken goose parrot pigeon swan eagle penguin", "dog": "puppy", "cat": "kitten",
          "vehicle": "car truck bus van motorcycle bicycle bike train boat", "cow": "calf"}
_ABOVE: dict[str, set[str]] = {}  # noun -> what it is as well
for _kind, _nouns in _KINDS.items():
    for _noun in _nouns.split():
        _ABOVE.setdefault(_noun, set()).add(_kind)


@dataclass(frozen=True)
class Said:
    """What an expression says: a noun ("" when none was found), and attribute -> value."""

    noun: str
    values: dict[str, str]


def parse(text: str) -> Said:
    """The noun and the known attributes of an English referring expression; everything else is passed over.

    The noun is the last word of what stands before the first verb or preposition. An expression that negates
    something says nothing but its noun. Never raises.
    """
    words = re.findall(r"[a-z]+", text.lower().replace("visible part of", "").replace("n't", " not"))
    start = next((i for i, word in enumerate(words) if word not in _OPENING), len(words))
    phrase: list[str] = []
    for word in words[start:]:
        # "the white building", "the small running dog": after an adjective even these are part of the noun.
        participle = word.endswith(("ing", "ed")) and word not in _SAYS and phrase and phrase[-1] not in _SAYS
        if word in _ENDS or participle or (phrase and {word, word.removesuffix("s"), word.removesuffix("es")} & _VERBS):
            break
        phrase.append(word)
    if not phrase and start and words[start - 1] == "one":
        phrase = ["one"]
    noun = _singular(phrase[-1]) if phrase and phrase[-1] not in _ADJECTIVES else ""
    if noun.endswith(("ing", "ed")) and noun not in _ING_NOUNS | _THINGS:
        noun = ""
    values: dict[str, str] = {}
    if {"not", "no", "without", "except", "nor"} & set(words):
        return Said(noun, {"motion": "still"} if re.search(r"\bnot mov", " ".join(words)) else {})
    for i, word in enumerate(words):
        before = words[max(i - 4, 0):i]
        if word in _TOWARDS and any(_MOVES.fullmatch(w) for w in before):
            values.setdefault("motion", _TOWARDS[word])
        elif word == "still" and before and _STAYS.fullmatch(before[-1]):
            values.setdefault("motion", "still")
        elif word in _SAYS:
            # Colours and sizes count in the noun's own phrase only: "the dog with the red ball" is not red; places
            # also as "on the left", not as "on the back of".
            own = start <= i < start + len(phrase) or _SAYS[word][0] == "motion"
            place = _SAYS[word][0] == "position" and before[-2:] in (["on", "the"], ["in", "the"], ["at", "the"])
            if own or (place and words[i + 1:i + 2] != ["of"]):
                values.setdefault(*_SAYS[word])
    return Said(noun, values)


def _singular(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    for end, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(end) and len(word) > len(end) + 1:
            return word.removesuffix(end) + instead
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word


# ------------------------------------------------------------------------------------------------------------
# 2 Who matches a query
# ------------------------------------------------------------------------------------------------------------


Seen = Mapping[str, Mapping[str, str]]  # object id -> what a model says of it (simulator.read_description)


@dataclass
class Known:
    """What the expressions about an object say of it, taken together."""

    nouns: set[str] = field(default_factory=set)
    values: dict[str, set[str]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)  # expressions about it alone

    def matches(self, said: Said) -> bool | None:
        """Whether the object is such a one; None when its expressions do not tell."""
        nouns = self.nouns - _THINGS
        if any(said.noun in _kinds(noun) for noun in nouns):
            answers: list[bool | None] = [True]
        elif nouns <= _kinds(said.noun):  # called an animal, asked for a dog; or called nothing at all
            answers = [None]
        else:
            answers = [False]
        for attribute, value in said.values.items():
            known = self.values.get(attribute)
            answers.append(value in known if known else None)
        return False if False in answers else None if None in answers else True


def _kinds(noun: str) -> set[str]:
    """The noun, and all that is said of everything called so."""
    found, more = {noun}, [noun]
    while more:
        new = _ABOVE.get(more.pop(), set()) - found
        found |= new
        more += new
    return found


def known_objects(expressions: Sequence[tuple[str, Sequence[str]]], seen: Seen) -> dict[str, Known]:
    """Object id -> what is known, of one video's expressions, each a text and the ids of the objects it means.

    What is said of several holds for each of them, unless it joins things ("the dog and the cat"). What a model saw
    fills in what no expression says.
    """
    known: dict[str, Known] = {}
    for text, ids in expressions:
        said, joined = parse(text), len(ids) > 1 and re.search(r",|\b(and|or)\b", text.lower())
        for id in ids:
            about = known.setdefault(id, Known())
            if len(ids) == 1 and text:
                about.texts.append(text)
            if joined:
                continue
            about.nouns |= {said.noun} - {""}
            for attribute, value in said.values.items():
                about.values.setdefault(attribute, set()).add(value)
    for id, told in seen.items():
        about, noun = known.setdefault(id, Known()), parse(f"the {told.get('category', '')}").noun
        if noun and about.nouns - _THINGS <= _kinds(noun):  # it may name more exactly, not otherwise
            about.nouns.add(noun)
        for attribute in ATTRIBUTES.keys() & told.keys():
            about.values.setdefault(attribute, {told[attribute]})
        about.texts += [told["description"]] if "description" in told else []
    return known


# ------------------------------------------------------------------------------------------------------------
# 3 From clear to ambiguous
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """An ambiguous query about one video. `number`: the clear expression it comes from."""

    number: int
    text: str
    noun: str
    target: str
    candidates: tuple[str, ...]  # ids of all objects that match, the target among them
    level: str  # simple | medium | difficult
    max_count: int  # questions needed in the worst case; -1: the known attributes do not tell all candidates apart


def ambiguous(expressions: Sequence[tuple[str, Sequence[str]]], seen: Seen) -> list[Query]:
    """Ambiguous queries from one video's expressions, each a text and the ids of the objects it means, and from what a
    model saw of them, if one looked.

    From each expression about one object: its noun and as many of its attributes as can stay with two matching
    objects or more, where of every object of the video it is known whether it matches. A query is made once per
    target.
    """
    known = known_objects(expressions, seen)
    queries: dict[tuple[str, str], Query] = {}
    for number, (text, ids) in enumerate(expressions):
        said = parse(text)
        if len(ids) != 1 or not said.noun or said.noun in _THINGS:
            continue
        for kept in _subsets(said.values):
            query = Said(said.noun, kept)
            answers = {id: about.matches(query) for id, about in known.items()}
            found = tuple(sorted((id for id, answer in answers.items() if answer), key=lambda id: (len(id), id)))
            if None in answers.values() or len(found) < 2:
                continue
            candidates = {id: known[id].values for id in found}
            made = Query(number, _phrase(query), said.noun, ids[0], found, _level(ids[0], candidates),
                         _questions(list(candidates.values())))
            queries.setdefault((made.target, made.text), made)
            break
    return list(queries.values())


def _subsets(values: dict[str, str]) -> Iterator[dict[str, str]]:
    """The largest first."""
    names = [name for name in ATTRIBUTES if name in values]
    for size in range(len(names), -1, -1):
        for kept in itertools.combinations(names, size):
            yield {name: values[name] for name in kept}


def _phrase(said: Said) -> str:
    words = ["the", *(said.values[a] for a in ("size", "age", "color") if a in said.values), said.noun]
    if (place := said.values.get("position")) is not None:
        words += [{"left": "on", "right": "on", "top": "at", "bottom": "at"}.get(place, "in"), "the", place]
    if (motion := said.values.get("motion")) is not None:
        words += ["that", "stays", "still"] if motion == "still" else ["moving", motion]
    return " ".join(words)


def _level(target: str, candidates: dict[str, dict[str, set[str]]]) -> str:
    """METHOD.md 6: simple 2 candidates, medium 3, difficult from 4 on, or when motion alone tells the target apart."""
    mine = candidates[target]
    telling = {a for id, theirs in candidates.items() if id != target
               for a in mine.keys() & theirs.keys() if not mine[a] & theirs[a]}
    if telling == {"motion"}:
        return "difficult"
    return {2: "simple", 3: "medium"}.get(len(candidates), "difficult")


def _questions(candidates: Sequence[dict[str, set[str]]]) -> int:
    """D* (DATA.md 6.4) over the attributes of which every candidate has one known value, or -1."""
    asked = [a for a in ATTRIBUTES if all(len(values.get(a, ())) == 1 for values in candidates)]
    if not asked:
        return -1
    worst = synthetic.optimal_questions([{a: next(iter(c[a])) for a in asked} for c in candidates], asked)[0]
    return -1 if np.isinf(worst) else int(worst)


# ------------------------------------------------------------------------------------------------------------
# 4 On disk
# ------------------------------------------------------------------------------------------------------------


def ambiguate(name: str, source: str | Path, out: str | Path, *, test: str | None = None, strict: bool = False,
              describer: simulator.ModelDescriber | None = None, progress: bool = True) -> dict[str, dict]:
    """Writes the benchmark made of the dataset `name` (SOURCES) in `source` to the new folder `out`.

    The train split gives train, `test` (None: the first other split that has labels) gives test. Frames are copied;
    masks, pictures with the target's red contour and descriptions (METHOD.md 6) are written for every target,
    descriptions of all candidates for every query. Bad records are left out; `strict` stops at the first. `describer`
    tells what the expressions leave open; who it was is then written to ambiguate.json, and when it does not answer
    all stops: what it said is known in the next call. Of an object about which its server takes no question, it tells
    nothing. Returns {split: {"videos", "levels": {level: queries}, "refused": [(id, reason)]}}.

    Raises DataError for an unknown name or split, for an `out` that holds something, when no query can be made, when
    the describer does not answer or takes no question at all, and for a full disk and the like.
    """
    if name not in SOURCES:
        raise DataError(f"{name!r} does not say which expressions mean the same object{data._closest(name, SOURCES)}; "
                        f"use one of {', '.join(SOURCES)}")
    there = readers.splits_of(name, source)
    if test is not None and test not in there:
        raise DataError(f"test={test}: {source} has the splits {', '.join(there)}")
    test = test or next((split for split in there if split != "train" and _labelled(name, source, split)), None)
    taken = {ours: theirs for ours, theirs in (("train", "train"), ("test", test)) if theirs in there}
    with data.whole_folder(Path(out), "ambiguate") as building:
        made = {ours: _write_split(name, source, theirs, building, ours, strict, describer, progress)
                for ours, theirs in taken.items()}
        told = {} if describer is None else describer.about()
        if told and told["asked"] == told["failed"] > 0:  # refused: silence ends all before
            raise DataError(f"{told['model']!r} on {told['url']} refuses all {told['asked']} questions, of up to "
                            f"{describer.FRAMES} pictures each; let its server take as many, or use another model")
        if not any(about["levels"] for about in made.values()):
            raise DataError(f"no video of {name} in {source} has labels and two objects that its expressions call the "
                            "same")
        if describer is not None:
            (building / "ambiguate.json").write_text(json.dumps({"source": name, "model": told}, indent=1))
    return made


def _labelled(name: str, source: str | Path, split: str) -> bool:
    first = next(readers.read(name, source, split, refused=[]), None)
    return first is not None and first.masks is not None


def _write_split(name: str, source: str | Path, theirs: str, root: Path, split: str, strict: bool,
                 describer: simulator.ModelDescriber | None, progress: bool) -> dict[str, Any]:
    refused: list[tuple[str, str]] = []
    samples = readers.read(name, source, theirs, strict=strict, refused=refused)
    watched = tqdm(samples, f"ambiguate {theirs}", unit=" expressions", disable=None if progress else True)
    rows: list[dict] = []
    videos = 0
    for video, group in itertools.groupby(watched, lambda sample: sample.meta["video"]):
        clear = [sample for sample in group if sample.masks is not None]
        if any(id.rpartition("/")[0] == video for id, _ in refused):
            # An object that only a refused one names would be missing among the candidates.
            refused.append((video, "left out: one of its expressions is refused"))
            continue
        try:
            seen = _seen(clear, describer) if describer else {}
            made = ambiguous(_expressions(clear), seen)
            new = _write_video(root / f"RVOS_{split.capitalize()}", video, clear, made, seen, len(rows)) if made else []
        except NoAnswer as error:  # leaving videos out for that would be a benchmark of chance
            raise DataError(f"video {video} of {theirs} of {source}: {error}") from None
        except (ValueError, OSError) as error:
            # What opens a file says in a DataError what the system said.
            if data.of_machine(error):
                raise DataError(f"video {video} of {theirs} of {source}: {data.first_line(error)}; no fault of the "
                                "video: mend it and run this again") from None
            for kind in ("JPEGImages", "Annotations", "Visualization", "description_oid"):
                shutil.rmtree(root / f"RVOS_{split.capitalize()}" / kind / video, ignore_errors=True)
            if strict:
                raise DataError(f"video {video} of {theirs} of {source}: {error}") from None
            refused.append((video, data._one_line(str(error))[:500]))
            continue
        rows += new
        videos += bool(new)
    if rows:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), root / f"{split}.parquet")
    return {"videos": videos, "levels": dict(Counter(row["ability"] for row in rows)), "refused": refused}


def _expressions(samples: Sequence[Sample]) -> list[tuple[str, list[str]]]:
    """Of ReVOS's questions, which name nothing, only which objects there are."""
    return [("" if sample.ability == "reasoning" else sample.query, sample.target_ids) for sample in samples]


def _seen(samples: Sequence[Sample], describer: simulator.ModelDescriber) -> Seen:
    """What the model says of each object of a video that has masks of its own. DataError when it does not answer."""
    own = {s.target_ids[0]: s for s in samples if len(s.target_ids) == 1}
    if len(own) < 2:
        return {}
    told = dict(zip(own, describer.describe_all(list(own.values())), strict=True))
    if lost := [id for id, said in told.items() if said is None]:
        raise NoAnswer(f"the model did not answer about object {lost[0]}; what it answered is kept for the next call")
    return told


def _write_video(folder: Path, video: str, samples: Sequence[Sample], queries: Sequence[Query], seen: Seen, aid: int
                 ) -> list[dict]:
    """The files of one video, and its rows of the table (DATA.md 3.2); `aid`: the number of the first."""
    folder.mkdir(exist_ok=True)
    folder = folder.resolve()
    known = known_objects(_expressions(samples), seen)
    masks = {s.target_ids[0]: s.masks for s in samples if len(s.target_ids) == 1}
    abouts = {id: _description(id, known[id], masks.get(id), samples[0].frame_ids)
              for query in queries for id in query.candidates}
    stems, rows, done = samples[0].frame_names, [], set()
    for query in queries:
        if not abouts[query.target]["position_by_frame"]:
            continue  # never to be seen: nothing could be asked about it, or found
        if not done:
            for stem, path in zip(stems, samples[0].frames, strict=True):
                shutil.copyfile(path, _place(folder, "JPEGImages", video, stem + Path(path).suffix))
        if query.target not in done:
            done.add(query.target)
            for p, stem in enumerate(stems):
                mask = masks[query.target](p)
                # All-zero masks too, so that both ways of listing frames see the same ones (DATA.md 6.7).
                target = _place(folder, "Annotations", video, query.target, f"{stem}.png")
                Image.fromarray(mask.astype(np.uint8) * 255).save(target)
                seen = Image.fromarray(data.outlined(samples[0].image(p), mask))
                seen.save(_place(folder, "Visualization", video, query.target, f"{stem}.jpg"), quality=95,
                          subsampling=0)  # else red lines come out brown
            about = _place(folder, "description_oid", video, f"{data.object_number(query.target)}.json")
            about.write_text(json.dumps(abouts[query.target]))
        number = aid + len(rows)
        listed = {"query": query.text, "candidates": [abouts[id] for id in query.candidates],
                  "target_oid": query.target}
        _place(folder, "description_id", f"{number}.json").write_text(json.dumps(listed))
        rows.append({"id": samples[query.number].id, "question": query.text, "images": stems, "ability": query.level,
                     "video": video, "oid": query.target, "aid": number, "object": query.noun,
                     "initial_count": len(query.candidates), "max_count": query.max_count})
    return rows


def _place(folder: Path, *parts: str) -> Path:
    """folder/parts, ready to be written; names come from the dataset, so DataError when they lead out."""
    path = data._inside(folder, *parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _description(id: str, about: Known, masks: Callable[[int], np.ndarray] | None, fids: Sequence[int]
                 ) -> dict[str, Any]:
    """An object in the schema of METHOD.md 6; the places are thirds of the width, on frames where its mask (None: it
    has none of its own) shows it."""
    places = {}
    for p, fid in enumerate(fids if masks else ()):
        mask = masks(p)
        columns = np.flatnonzero(mask.any(0))
        if columns.size:
            middle = (columns[0] + columns[-1] + 1) / 2 / mask.shape[1]
            places[str(fid)] = synthetic.COLUMNS[min(int(3 * middle), 2)]
    values = {attribute: " or ".join(sorted(values)) for attribute, values in sorted(about.values.items())}
    return {"oid": id, "category": " or ".join(sorted(about.nouns - _THINGS)),
            "attributes": {a: v for a, v in values.items() if a not in ("position", "motion")},
            "position_by_frame": places, "motion": values.get("motion", ""), "description": "; ".join(about.texts)}
