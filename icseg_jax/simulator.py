"""The user who answers and the expert who diagnoses (METHOD.md section 2, DATA.md 6.3).

Both read a scene graph (`synthetic.scene_graph`, or `scene_graph/{video}.json` on disk), never pixels: in the
synthetic world the oracle knows every answer, every candidate count and the best question exactly. A person
at the terminal may answer instead. Whatever a user says passes `sanitise` before it reaches a transcript.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from icseg_jax.synthetic import ASKABLE, MAX_OPTIONS, VALUES, optimal_questions

CLARIFY = "please clarify"
NOT_VISIBLE = "not visible"
NEITHER = "neither"
INVISIBLE = 0.1  # visible share below which a user cannot say where the target is

# ------------------------------------------------------------------------------------------------------------
# 1 Questions
# ------------------------------------------------------------------------------------------------------------

_VALUE_WORDS = {value: (attribute, value) for attribute, values in VALUES.items() for value in values}
_ATTRIBUTE_WORDS = {
    "color": "color", "colour": "color", "shape": "shape", "size": "size", "big": "size",
    "direction": "motion", "motion": "motion", "move": "motion", "moves": "motion", "moving": "motion",
    "where": "column", "column": "column", "position": "column", "side": "column",
}
_TOWARDS = {"left": "leftward", "right": "rightward", "up": "upward", "down": "downward"}
_OPENS_YESNO = ("is", "are", "does", "do", "did", "was", "can")


@dataclass(frozen=True)
class Question:
    """What a text asks about the target: kind "what" has no options, "yesno" one, "choice" up to MAX_OPTIONS.
    """

    attribute: str
    kind: str
    options: tuple[str, ...] = ()
    frame: int | None = None  # of "column" questions


def parse_question(text: str, query: str = "") -> Question | None:
    """Reads any text as a question about one attribute (DATA.md 6.3); linear in its length, never raises.

    None when it asks nothing known, more than one attribute, more than MAX_OPTIONS options, about two frames,
    or only whether a value holds that `query` has already stated.
    """
    words = re.findall(r"[^\W\d_]+|\d+", text.lower())
    frames = {int(n) if len(n) < 7 else -1 for w, n in zip(words, words[1:], strict=False)
              if w == "frame" and n.isdecimal()}
    asks = {_ATTRIBUTE_WORDS[word] for word in words if word in _ATTRIBUTE_WORDS}
    options: dict[tuple[str, str], None] = {}  # an ordered set
    for before, word in zip(["", *words], words, strict=False):
        if before == "how" and word in VALUES["size"]:  # "how large is it" offers no option
            asks.add("size")
        elif word in _TOWARDS and asks == {"motion"}:
            options["motion", _TOWARDS[word]] = None
        elif word in _VALUE_WORDS:
            options[_VALUE_WORDS[word]] = None
    attributes = asks | {attribute for attribute, _ in options}
    if len(attributes) != 1 or len(options) > MAX_OPTIONS:
        return None
    attribute = attributes.pop()
    if attribute == "column" and len(frames) > 1:
        return None
    frame = min(frames) if frames and attribute == "column" else None
    values = tuple(value for _, value in options)
    if not values:
        return None if words[0] in _OPENS_YESNO else Question(attribute, "what", (), frame)
    if len(values) > 1 or "or" in words:
        return Question(attribute, "choice", values, frame)
    stated = re.findall(r"\w+", query.lower())
    if values[0] in stated and (frame is None or str(frame) in stated):
        return None
    return Question(attribute, "yesno", values, frame)


def _reply(obj: dict, shown: Sequence[int], question: Question) -> str:
    """What a user whose target is `obj` answers."""
    if question.attribute == "column":
        per_frame = {entry["f"]: entry for entry in obj["per_frame"]}
        frames = shown if question.frame is None else [question.frame]
        if any(frame not in shown or frame not in per_frame for frame in frames):
            return CLARIFY
        seen = {NOT_VISIBLE if per_frame[f]["visible"] < INVISIBLE else per_frame[f]["col"] for f in frames}
        if len(seen) != 1 or None in seen:  # moved on between the frames, or on a boundary
            return CLARIFY
        value = seen.pop()
        if value == NOT_VISIBLE:
            return value
    else:
        value = obj["motion"]["dir"] if question.attribute == "motion" else obj[question.attribute]
    if question.kind == "yesno":
        return "yes" if value in question.options else "no"
    return value if question.kind == "what" or value in question.options else NEITHER


def consistent(graph: dict, shown: Sequence[int], oids: Sequence[int], question: str, answer: str
               ) -> list[int]:
    """The oids that a question and its answer leave (the oracle update of DATA.md 6.3).

    A question that was not understood leaves all of them, and so does an answer that fits none (a user who
    errs).
    """
    answer = answer.strip().lower()
    parsed = parse_question(question, graph["query"])
    if parsed is None or answer == CLARIFY:
        return list(oids)
    objects = {obj["oid"]: obj for obj in graph["objects"]}
    return [oid for oid in oids if _reply(objects[oid], shown, parsed) == answer] or list(oids)


# ------------------------------------------------------------------------------------------------------------
# 2 Users
# ------------------------------------------------------------------------------------------------------------


class OracleUser:
    """Answers exactly, with the fewest words: a value, yes, no, neither, "not visible" or "please clarify".
    """

    workers = 1  # questions answered at a time

    def answer(self, graph: dict, shown: Sequence[int], question: str) -> str:
        """The answer about the graph's target, of which the user sees the `shown` frames (fids)."""
        parsed = parse_question(question, graph["query"])
        target = _target(graph)
        return CLARIFY if parsed is None or target is None else _reply(target, shown, parsed)


class PersonUser:
    """Somebody at the terminal answers."""

    workers = 1

    def answer(self, graph: dict, shown: Sequence[int], question: str) -> str:
        """Asks on the terminal; an empty line or the end of input is "please clarify"."""
        target = _target(graph)
        print(f"\n[{graph['video']}] query: {graph['query']}")
        print(f"your target: {_for_a_person(target, shown) if target else 'nothing, no object matches'}")
        try:
            return sanitise(input(f"the policy asks: {sanitise(question, 64)}\n> "))
        except EOFError:
            return CLARIFY


def _target(graph: dict) -> dict | None:
    return next((obj for obj in graph["objects"] if obj["oid"] == graph["target"]), None)


def describe_target(sample: Any) -> str:
    """Every attribute of a sample's target in words, "" without one: what an oracle would add to the query."""
    graph = (sample.privileged or {}).get("scene_graph")
    target = _target(graph) if graph else None
    if target is None:
        return ""
    column = next((entry["col"] for entry in target["per_frame"] if entry["col"]), None)
    return " ".join(filter(None, (target["color"], target["shape"], target["size"], target["motion"]["dir"], column)))


def _for_a_person(obj: dict, shown: Sequence[int]) -> str:
    """What an object is and where it is in each shown frame."""
    centers = {entry["f"]: entry["center"] for entry in obj["per_frame"]}
    path = ", ".join(f"frame {f}: x {centers[f][0]:.0f} y {centers[f][1]:.0f}" for f in shown if f in centers)
    return f"{obj['size']} {obj['color']} {obj['shape']}, {obj['motion']['dir']} ({path})"


class ErringUser:
    """A user who sometimes errs (METHOD.md 7, A8): wrong with probability `flip`, "please clarify" with `refuse`.

    A function of (seed, sample, question): asked the same again, the same is answered.
    """

    def __init__(self, user: OracleUser | PersonUser, *, flip: float, refuse: float, seed: int = 0):
        self.user, self.flip, self.refuse, self.seed = user, flip, refuse, seed
        self.workers = user.workers

    def answer(self, graph: dict, shown: Sequence[int], question: str) -> str:
        """What the user says, or in place of it another answer that the question allows."""
        reply, parsed = self.user.answer(graph, shown, question), parse_question(question, graph["query"])
        if parsed is None or reply == CLARIFY:
            return reply
        told = repr((self.seed, graph["video"], graph["query"], question)).encode()
        rng = np.random.default_rng(int.from_bytes(hashlib.blake2s(told, digest_size=8).digest(), "big"))
        if rng.random() < self.refuse:
            return CLARIFY
        if rng.random() >= self.flip:
            return reply
        allowed = {"what": VALUES[parsed.attribute], "yesno": ("yes", "no"), "choice": (*parsed.options, NEITHER)}
        return str(rng.choice([value for value in allowed[parsed.kind] if value != reply]))


def load_user(kind: str, *, flip: float = 0.0, refuse: float = 0.0, seed: int = 0
              ) -> OracleUser | PersonUser | ErringUser:
    """The user that a config names: "oracle" or "person", erring or not. Raises ValueError for another."""
    users = {"oracle": OracleUser, "person": PersonUser}
    if kind not in users:
        raise ValueError(f"simulator: user {kind!r} is unknown; use oracle or person")
    user = users[kind]()
    return ErringUser(user, flip=flip, refuse=refuse, seed=seed) if flip or refuse else user


def answer_all(user: OracleUser | PersonUser | ErringUser, requests: Sequence[tuple[dict, Sequence[int], str]]
               ) -> list[str]:
    """Answers to (graph, shown, question) requests, in order; several at a time when the user takes several.
    """
    if user.workers > 1:
        with ThreadPoolExecutor(user.workers) as pool:
            answers = list(pool.map(lambda request: user.answer(*request), requests))
    else:
        answers = [user.answer(*request) for request in requests]
    return [sanitise(answer) for answer in answers]


def sanitise(text: str, max_words: int = 32) -> str:
    """Makes a user's text safe for a transcript: one line of at most `max_words` words, no tags, no tokens.

    Tags are dropped whole, then every angle bracket that is left, so that nothing can be pieced together from
    nested ones. "please clarify" when nothing remains.
    """
    text = re.sub(r"<[^<>]{0,100}>", " ", text[:8000])
    kept = "".join(" " if c in "<>" or unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(word[:40] for word in kept.split()[:max_words]) or CLARIFY


# ------------------------------------------------------------------------------------------------------------
# 3 The expert
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """Hindsight on one dialogue (METHOD.md 2.2)."""

    counts: list[int]  # candidates at first and after every question: questions + 1 numbers, never rising
    guidance: str  # how to ask better, never what the target is
    asked: list[str | None]  # attribute of each question, None where it was not understood
    plan: list[str]  # attributes that the guidance says to ask, in order


class OracleExpert:
    """Counts candidates by an exact set filter and advises from the optimal questions."""

    def diagnose(self, graph: dict, shown: Sequence[int], dialogue: Sequence[tuple[str, str]]) -> Diagnosis:
        """Diagnoses a dialogue of (question, answer) pairs over the `shown` frames (fids).

        Guidance keeps the dialogue's good beginning, continues it with best attributes down to one candidate,
        and names what was wasted. It speaks of attributes, never of their values, and holds no number.
        """
        objects = {obj["oid"]: obj for obj in graph["objects"]}
        rows = {oid: _row(objects[oid], shown[0]) for oid in graph["candidates"]}
        left = list(graph["candidates"])
        counts, asked, plan, advice = [len(left)], [], [], []
        sound = True  # so far every question was a best one
        for question, answer in dialogue:
            parsed = parse_question(question, graph["query"])
            attribute = parsed.attribute if parsed else None
            if len(left) <= 1:
                advice.append("do not ask when one remains")
            elif attribute is None:
                advice.append("ask one attribute")
            elif sound and attribute in _best(rows, left):
                plan.append(attribute)
            else:
                if sound:
                    plan += _finish(rows, left, graph["target"])
                sound = False
            after = consistent(graph, shown, left, question, answer)
            if attribute and len(left) > 1 and len(after) == len(left):
                advice.append(f"do not ask {attribute}" + (" again" if attribute in asked else ""))
            left = after
            counts.append(len(left))
            asked.append(attribute)
        if sound and len(left) > 1:
            plan += _finish(rows, left, graph["target"])
        if len(left) > 1:
            advice.append("do not guess")
        return Diagnosis(counts, _guidance(counts[0], plan, advice), asked, plan)


def _row(obj: dict, frame: int) -> dict[str, str]:
    return {attribute: _reply(obj, [frame], Question(attribute, "what", (), frame)) for attribute in ASKABLE}


def _best(rows: dict[int, dict[str, str]], oids: Sequence[int]) -> tuple[str, ...]:
    return optimal_questions([rows[oid] for oid in oids])[2]


def _finish(rows: dict[int, dict[str, str]], oids: Sequence[int], target: int) -> list[str]:
    """Attributes that an optimal asker asks from here on."""
    path = []
    while len(oids) > 1 and (best := _best(rows, oids)):
        path.append(best[0])
        oids = [oid for oid in oids if rows[oid][best[0]] == rows[target][best[0]]]
    return path


def _guidance(initial: int, plan: Sequence[str], advice: Sequence[str]) -> str:
    if initial == 0:
        return "look for a match first . do not ask when none remains"
    if initial == 1:
        return "one remains from the start . do not ask"
    steps = [f"then ask {attribute}" if i else f"ask {attribute} first" for i, attribute in enumerate(plan)]
    wasted = [line for line in dict.fromkeys(advice)
              if line.endswith(" again") or not any(line == f"do not ask {attribute}" for attribute in plan)]
    return " . ".join([*steps, "stop when one remains", *wasted])


# "one" and "first" are left out: advice needs them ("ask color first", "stop when one remains"), and a count of one
# names nobody.
_NUMBERS = frozenset(
    "zero two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand second third fourth fifth sixth seventh last leftmost rightmost".split())


def leaks(guidance: str, graph_or_values: dict | Iterable[str]) -> bool:
    """Whether a text gives the target away: a number, or any of its attribute values (METHOD.md 8, Q4).

    Takes a scene graph (its target's values, with the columns of all frames) or the values themselves. Numbers in
    words count ("third"), as do plurals ("circles") and other words for a direction ("to the left", "upwards").
    """
    if isinstance(graph_or_values, dict):
        values = set()
        if (target := _target(graph_or_values)) is not None:
            columns = {entry["col"] for entry in target["per_frame"]} - {None}
            values = {target["color"], target["shape"], target["size"], target["motion"]["dir"], *columns}
    else:
        values = set(graph_or_values)
    words = re.findall(r"[^\W_]+", guidance.lower())
    words += [word.removesuffix("s") for word in words] + [word.removesuffix("es") for word in words]
    values |= {value.removesuffix("ward") for value in values}
    return bool(re.search(r"\d", guidance)) or not (values | _NUMBERS).isdisjoint(words)
