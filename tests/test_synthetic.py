"""The synthetic world: what a scene promises, what leaks, what is optimal, what lies on disk."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from icseg_jax import data, simulator, synthetic
from icseg_jax.synthetic import ASKABLE, CANDIDATES, HELD_OUT, LEVELS, VALUES, Scene, make_scene

SHOWN = [0, 3, 7, 11]
NUMBERS = {word: n for n, word in enumerate("no one two three four five six seven".split())}


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return [make_scene(i, seed=3) for i in range(300)]


@pytest.fixture(scope="module")
def test() -> list[Scene]:
    kinds = ("modal", "modal", "modal", "amodal")
    return [make_scene(i, seed=3, split="test", mask_type=kinds[i % 4]) for i in range(700)]


def hidden_share(visible: np.ndarray, complete: np.ndarray) -> np.ndarray:
    return 1 - visible.sum((1, 2)) / complete.sum((1, 2))


def test_a_scene_depends_on_its_name_alone():
    once = {i: make_scene(i, seed=5) for i in (0, 7, 3)}
    for i in (3, 0, 7):
        again = make_scene(i, seed=5)
        assert synthetic.scene_graph(again) == synthetic.scene_graph(once[i])
        np.testing.assert_array_equal(synthetic.render(again, SHOWN), synthetic.render(once[i], SHOWN))
    others = [make_scene(3, seed=5, split="test"), make_scene(3, seed=6), make_scene(4, seed=5)]
    graphs = [json.dumps(synthetic.scene_graph(scene)["objects"]) for scene in [once[3], *others]]
    assert len(set(graphs)) == 4


def test_asked_levels_and_unknown_names():
    assert {make_scene(1, level=level).level for level in LEVELS} == set(LEVELS)
    for wrong in ({"split": "val"}, {"level": "hard"}, {"mask_type": "visible"}):
        with pytest.raises(ValueError, match="is unknown; use one of"):
            make_scene(0, **wrong)


def test_levels_are_what_they_say(train, test):
    for scene in train + test:
        matching = [o.oid for o in scene.objects
                    if all(o.value(a, 0, scene.width) == v for a, v in scene.mentioned.items())]
        assert list(scene.candidates) == matching and scene.initial_count == len(matching)
        assert 2 <= len(scene.objects) <= synthetic.MAX_OBJECTS and 1 <= len(scene.mentioned) <= 3
        if scene.level in CANDIDATES:
            low, high = CANDIDATES[scene.level]
            assert low <= scene.initial_count <= high and len(scene.best_first) in (1, 2)
            assert {"simple": scene.max_count == 1, "medium": scene.max_count == 2,
                    "difficult": 2 <= scene.max_count < 5}[scene.level]
            assert not set(scene.best_first) & set(scene.mentioned)
        else:
            assert scene.initial_count == (scene.level == "clear") and scene.max_count == 0
            assert scene.optimal_expected == 0 and scene.best_first == ()
        assert (scene.target in scene.candidates) if scene.candidates else scene.target is None
    shares = Counter(scene.level for scene in train + test)
    for level, share in synthetic.LEVEL_SHARES.items():
        assert abs(shares[level] / 1000 - share) < 0.05


def test_words_do_not_tell_whether_to_ask(train, test):
    """Which attributes a query mentions, and how many, says next to nothing of its level: a guess from them, learned on
    half of the scenes, is right about the other half no more often than always saying the commoner answer."""
    scenes = train + test
    halves, right = (scenes[::2], scenes[1::2]), 0
    for learned, asked in (halves, halves[::-1]):
        seen: dict[frozenset, Counter] = {}
        for scene in learned:
            seen.setdefault(frozenset(scene.mentioned), Counter())[scene.level in CANDIDATES] += 1
        for scene in asked:
            told = seen.get(frozenset(scene.mentioned), Counter([True]))
            right += told.most_common(1)[0][0] == (scene.level in CANDIDATES)
    ambiguous = np.mean([scene.level in CANDIDATES for scene in scenes])
    # It was 0.13 more while ambiguous queries mentioned neither columns nor three attributes.
    assert right / len(scenes) < max(ambiguous, 1 - ambiguous) + 0.04
    columns = {kind: np.mean(["column" in s.mentioned for s in scenes if (s.level in CANDIDATES) == kind])
               for kind in (True, False)}  # fmt: skip
    assert min(columns.values()) > 0.04


def test_held_out_pairs_are_shown_and_named_in_the_test_split_only(train, test):
    pairs = Counter((o.color, o.shape) for scene in train for o in scene.objects)
    named = {(scene.mentioned.get("color"), scene.mentioned.get("shape")) for scene in train}
    assert not set(HELD_OUT) & set(pairs) and not set(HELD_OUT) & named
    assert len(pairs) == 22
    pairs = Counter((o.color, o.shape) for scene in test for o in scene.objects)
    usual = np.mean([n for pair, n in pairs.items() if pair not in HELD_OUT])
    assert all(pairs[pair] >= usual for pair in HELD_OUT)
    assert any((s.mentioned.get("color"), s.mentioned.get("shape")) in HELD_OUT for s in test)


def test_masks_are_exact(train):
    for scene in train[:120]:
        for frame in (0, 5, 11):
            visible, complete = synthetic.visible_masks(scene, frame), synthetic.complete_masks(scene, frame)
            assert visible.sum(0).max() <= 1 and not (visible & ~complete).any()
            np.testing.assert_allclose(1 - hidden_share(visible, complete), scene.visible[:, frame])
            nearest = sorted(range(len(scene.objects)), key=lambda i: scene.objects[i].z)
            for i, j in itertools.combinations(nearest, 2):  # i is in front of j
                assert not (visible[j] & complete[i]).any()
            picture = synthetic.render(scene, [frame])[0]
            for obj, mask in zip(scene.objects, visible, strict=True):
                inner = mask & ndimage.binary_erosion(complete[obj.oid - 1], iterations=2)
                assert (picture[inner] == synthetic.COLORS[obj.color]).all()
            ground = ~visible.any(0)
            if scene.occluder:
                x1, y1, x2, y2 = scene.occluder
                assert (picture[y1:y2, x1:x2] == synthetic.GREY).all() and not visible[:, y1:y2, x1:x2].any()
                ground[y1:y2, x1:x2] = False
            assert picture[ground].max() < 60
            assert not (picture == synthetic.RED).all(-1).any()


def test_placement_keeps_its_promises(train, test):
    covered = []
    for scene in train + test:
        centers = np.stack([o.centers for o in scene.objects])
        radii = np.array([o.radius for o in scene.objects])[:, None]
        assert (centers[..., 0] > radii).all() and (centers[..., 0] < scene.width - 1 - radii).all()
        assert (centers[..., 1] > radii).all() and (centers[..., 1] < scene.height - 1 - radii).all()
        for frame, margin in ((0, 0.05), (1, 0.03)):
            x = centers[:, frame, 0]
            assert min(abs(x - scene.width * k / 3).min() for k in (1, 2)) >= margin * scene.width
            assert np.diff(np.sort(x - radii[:, 0])).min() >= synthetic.MIN_GAP
        assert [o.value("column", 0, 128) for o in scene.objects] == [
            o.value("column", 1, 128) for o in scene.objects]
        moved = centers[:, -1] - centers[:, 0]
        for obj, (dx, dy) in zip(scene.objects, moved, strict=True):
            length = abs(dx) + abs(dy)
            assert 0 in (dx, dy) and (length == 0 if obj.motion == "still" else 29 <= length <= 51)
            direction = {"leftward": dx < 0, "rightward": dx > 0, "upward": dy < 0, "downward": dy > 0}
            assert direction.get(obj.motion, True)
            low, high = synthetic.SIZES[obj.size]
            assert low <= obj.radius <= high
        assert (scene.visible[:, SHOWN].max(1) >= 0.6).all()
        covered.append((((1 - scene.visible) >= 0.15) & ((1 - scene.visible) <= 0.7)).any())
    assert 0.28 < np.mean(covered) < 0.45
    assert 0.05 < np.mean([scene.occluder is not None for scene in train + test]) < 0.15


def chi_square(pairs: list[tuple]) -> float:
    """p-value of independence between the two members of the pairs."""
    rows, columns = (sorted(set(kind)) for kind in zip(*pairs, strict=True))
    counts = Counter(pairs)
    return stats.chi2_contingency([[counts[a, b] for b in columns] for a in rows]).pvalue


def test_object_numbers_and_targets_give_nothing_away(train, test):
    scenes = [scene for scene in train + test if len(scene.objects) == 5]
    objects = [(o, scene) for scene in scenes for o in scene.objects]
    assert chi_square([(o.oid, o.z) for o, _ in objects]) > 0.01
    assert chi_square([(o.oid, o.size) for o, _ in objects]) > 0.01
    assert chi_square([(o.oid, sorted(s.objects, key=lambda p: p.centers[0, 0]).index(o)) for o, s in objects]
                      ) > 0.01
    targets = Counter(scene.target for scene in scenes if scene.target)
    assert stats.chisquare([targets[oid] for oid in range(1, 6)]).pvalue > 0.01
    ambiguous = [s for s in train + test if s.initial_count > 1]
    for feature in (lambda o: o.oid, lambda o: o.z, lambda o: o.centers[0, 0]):
        for k in (2, 3, 4):  # the target's rank among its candidates is uniform
            ranks = Counter(sum(feature(s.object(c)) < feature(s.object(s.target)) for c in s.candidates)
                            for s in ambiguous if s.initial_count == k)
            assert stats.chisquare([ranks[rank] for rank in range(k)]).pvalue > 0.01
    for attribute in ASKABLE:
        chance = Counter()
        for scene in ambiguous:
            for oid in scene.candidates:
                chance[scene.object(oid).value(attribute)] += 1 / scene.initial_count
        found = Counter(scene.object(scene.target).value(attribute) for scene in ambiguous)
        assert stats.chisquare([found[v] for v in chance], list(chance.values())).pvalue > 0.01


def brute_force(values: list[dict], questions: list) -> tuple[float, float]:
    """(worst, expected) by trying every question at every state; a question maps a row to an answer."""
    if len(values) <= 1:
        return 0.0, 0.0
    worst = expected = math.inf
    for i, question in enumerate(questions):
        cells: dict[str, list[dict]] = {}
        for row in values:
            cells.setdefault(question(row), []).append(row)
        if len(cells) > 1:
            rest = questions[:i] + questions[i + 1:]
            solved = [(len(cell), *brute_force(cell, rest)) for cell in cells.values()]
            worst = min(worst, 1 + max(d for _, d, _ in solved))
            expected = min(expected, 1 + sum(n * e for n, _, e in solved) / len(values))
    return worst, expected


tables = st.lists(st.fixed_dictionaries({a: st.sampled_from(VALUES[a][:3]) for a in ASKABLE}), min_size=1,
                  max_size=6)


@given(tables)
def test_optimal_questions_agree_with_brute_force(values):
    worst, expected, best = synthetic.optimal_questions(values)
    questions = [lambda row, a=a: row[a] for a in ASKABLE]
    assert (worst, expected) == pytest.approx(brute_force(values, questions))
    twins = len({tuple(row[a] for a in ASKABLE) for row in values}) < len(values)
    assert math.isinf(worst) == twins
    if not twins and len(values) > 1:
        arity = max(len({row[a] for row in values}) for a in ASKABLE)
        assert expected >= math.log(len(values)) / math.log(arity) - 1e-9 and expected <= worst
        assert worst >= math.ceil(math.log(len(values), arity) - 1e-9)
        for attribute in ASKABLE:
            cells = [[r for r in values if r[attribute] == v] for v in {r[attribute] for r in values}]
            cost = 1 + sum(len(c) * synthetic.optimal_questions(c)[1] for c in cells) / len(values)
            assert (attribute in best) == (len(cells) > 1 and cost < expected + 1e-9)
        assert best


@given(tables.filter(lambda values: len(values) <= 4))
def test_optimal_yesno_agrees_with_brute_force(values):
    questions = [lambda row, a=a, v=v: str(row[a] == v) for a in ASKABLE for v in {row[a] for row in values}]
    worst = synthetic.optimal_yesno(values)
    assert worst == brute_force(values, questions)[0]
    assert worst >= math.ceil(math.log2(len(values)))


def test_the_world_has_no_shortcut(test):
    """The table of issue 2, part 1: no attribute leads, and only a question that fits the scene is good."""
    ambiguous = [scene for scene in test if scene.initial_count > 1]
    assert len(ambiguous) > 380
    best = Counter(attribute for scene in ambiguous for attribute in scene.best_first)
    assert max(best.values()) < 0.5 * len(ambiguous) and set(best) == set(ASKABLE)
    for level in CANDIDATES:
        scenes = [scene for scene in ambiguous if scene.level == level]
        best = Counter(attribute for scene in scenes for attribute in scene.best_first)
        assert max(best.values()) < 0.5 * len(scenes)

    table = synthetic.baselines([synthetic.scene_graph(scene) for scene in test], seed=0)
    print("\n" + "\n".join(f"{name:16s}" + "  ".join(f"{k} {v:.3f}" for k, v in row.items() if k != "asked")
                           for name, row in table.items()))
    regret = {name: row["regret"] for name, row in table.items()}
    order = ["optimal", "greedy", "fixed_order", "random", "fixed_attribute", "guess"]
    assert [regret[name] for name in order] == sorted(regret.values())
    assert regret["optimal"] == pytest.approx(0, abs=1e-9) and regret["greedy"] < 0.1
    assert regret["fixed_order"] > 1 and regret["fixed_attribute"] > 2
    optimum = [scene.optimal_expected for scene in ambiguous]
    assert table["optimal"]["questions"] == pytest.approx(np.mean(optimum))
    guess = np.mean([1 / scene.initial_count for scene in ambiguous])
    assert table["guess"]["success"] == pytest.approx(guess)
    assert table["guess"]["regret"] == pytest.approx(synthetic.BUDGET - np.mean(optimum))
    for name in ("optimal", "greedy", "fixed_order"):
        assert table[name]["resolved_rate"] == table[name]["success"] == pytest.approx(1)
    assert table["optimal"]["redundant_question_rate"] == 0 and max(table["optimal"]["asked"].values()) < 0.4
    assert table["random"]["redundant_question_rate"] > 0.5
    with pytest.raises(ValueError, match="no scene is ambiguous"):
        synthetic.baselines([synthetic.scene_graph(scene) for scene in test if scene.level == "clear"])


def test_another_query_about_the_same_objects(train):
    rng = np.random.default_rng(0)
    for scene in train[:300]:
        other = synthetic.requery(scene, rng)
        assert other.objects is scene.objects
        assert list(other.candidates) == [o.oid for o in scene.objects if all(
            o.value(a, 0, 128) == v for a, v in other.mentioned.items())]
        assert (other.mentioned.get("color"), other.mentioned.get("shape")) not in HELD_OUT
        assert math.isfinite(other.optimal_expected)
        assert other.target in other.candidates or other.level == "none"


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.mark.parametrize("n_more", [0, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_text_is_made_of_the_vocabulary(train, test, n_more):
    rng = np.random.default_rng(0)
    known = set(synthetic.VOCABULARY)
    assert len(known) == len(synthetic.VOCABULARY)
    used = set()
    more = (make_scene(i, seed=8, split=synthetic.SPLITS[i % 2]) for i in range(n_more))
    for i, scene in enumerate(itertools.chain(train, test, more)):
        texts = [scene.query, *itertools.chain(*synthetic.conversation(scene, rng)[0])]
        texts += [synthetic.requery(scene, rng).query for _ in range(2)]
        for guided in (False, True) if i % 8 == 0 else ():
            demonstration = synthetic.demonstrate(scene, SHOWN, rng, skill=0.0, guided=guided)
            texts.append(demonstration.guidance or "")
            for turn in demonstration.turns:
                texts += [turn.thinking, turn.question or "", turn.reply or ""]
        used.update(word for text in texts for word in words(text))
    places = {str(x) for x in range(0, 1001, synthetic.COORDINATE_STEP)}  # the tokenizer has them anyway
    assert used <= known | places, used - known - places
    # What only a policy's own questions bring about, and numbers of frames that were not shown here.
    unused = "neither yes no please clarify not none attribute six seven".split() + [str(n) for n in range(12)]
    assert known - used <= set(unused)


def undoubted(thinking):
    """A list without the objects that it says do not fit."""
    return re.sub(rf"\n\d+( \w+){{5}} ({'|'.join(ASKABLE)})(?!\w)", "", thinking)


def test_thinking_lists_candidates_from_left_to_right(train):
    scene = next(s for s in train if s.level == "difficult" and len(s.objects) > len(s.candidates))
    candidates = [scene.object(oid) for oid in scene.candidates]
    listed, differ = synthetic.think(candidates, 0).split(" ; ")
    listed = listed.removeprefix("\n").split("\n")
    edges = {o.oid: max(0.0, o.centers[0, 0] - o.radius) / 128 * 1000 for o in candidates}
    ordered = sorted(candidates, key=lambda o: edges[o.oid])
    places, words = zip(*(line.split(" ", 1) for line in listed), strict=True)
    assert words == tuple(" ".join(o.value(a, 0, 128) for a in ASKABLE) for o in ordered)
    assert all(abs(int(x) - edges[o.oid]) <= 5 for x, o in zip(places, ordered, strict=True))
    assert all(int(x) % synthetic.COORDINATE_STEP == 0 for x in places)
    counts = {a: len({o.value(a, 0, 128) for o in candidates}) for a in ASKABLE}
    assert differ == "differ " + " ".join(f"{a} {n}" for a, n in counts.items() if n > 1)
    assert synthetic.think(candidates[:1], 0) == f"\n{synthetic.placed(candidates[0], 0)} ; one left"
    assert synthetic.think([], 0) == "no match"
    doubtful = next(o for o in scene.objects if o.oid not in scene.candidates)
    with_doubt, counted = synthetic.think(candidates, 0, doubted=[(doubtful, "motion")]).split(" ; ")
    assert counted == differ and f"\n{synthetic.placed(doubtful, 0)} motion" in with_doubt
    assert undoubted(with_doubt) == "\n" + "\n".join(listed)
    doubt = f"\n{synthetic.placed(doubtful, 0)} size ; no match"
    assert synthetic.think([], 0, doubted=[(doubtful, "size")]) == doubt


def test_first_lists_hold_every_object_and_what_it_misses(train):
    rng = np.random.default_rng(0)
    for scene in train:
        first = synthetic.demonstrate(scene, SHOWN, rng, skill=1.0).turns[0].thinking
        lines = first.partition(" ; ")[0].split("\n")[1:]
        assert len(lines) == len(scene.objects)
        for obj in scene.objects:
            off = [a for a in ASKABLE if a in scene.mentioned and obj.value(a) != scene.mentioned[a]]
            placed = synthetic.placed(obj, SHOWN[0])
            assert any(line in (placed, f"{placed} {off[0]}" if off else placed) for line in lines)
            assert bool(off) == (placed not in lines) == (obj.oid not in scene.candidates)


def test_a_skilled_demonstration_is_optimal(test):
    rng = np.random.default_rng(0)
    asked, optimum = [], []
    for scene in test[:400]:
        demonstration = synthetic.demonstrate(scene, SHOWN, rng, skill=1.0)
        *calls, keyframe, answer = demonstration.turns
        kinds = [turn.kind for turn in demonstration.turns]
        assert kinds == ["call"] * len(calls) + ["keyframe", "answer"]
        assert demonstration.query == scene.query and demonstration.guidance is None
        assert keyframe.oid == answer.oid == scene.target
        counts = [scene.initial_count, *(turn.count_after for turn in calls)]
        assert all(b < a for a, b in itertools.pairwise(counts)) and counts[-1] == min(scene.initial_count, 1)
        if scene.target is None:
            assert keyframe.frame == -1 and undoubted(keyframe.thinking).endswith("no match")
        else:
            assert keyframe.thinking.endswith("one left") and keyframe.frame in SHOWN
            assert scene.visible[scene.target - 1, keyframe.frame] >= 0.3
            assert answer.thinking == "\n" + synthetic.placed(scene.object(scene.target), SHOWN[0], scene.width)
        asked.append(len(calls))
        optimum.append(scene.optimal_expected)
    assert abs(np.mean(asked) - np.mean(optimum)) < 0.05


def test_imagined_objects_fit_their_query_and_can_be_told_apart(train):
    rng = np.random.default_rng(0)
    known = set(synthetic.VOCABULARY) | {str(x) for x in range(0, 1001, synthetic.COORDINATE_STEP)}
    for near, scene in zip(itertools.cycle((False, True)), train[:100]):
        about = synthetic.imagine(scene, rng, near=near)
        fitting = [o.oid for o in about.objects if all(o.value(a) == v for a, v in about.mentioned.items())]
        others = [o for o in about.objects if o.oid not in fitting]
        assert about.candidates == tuple(fitting) and 1 <= len(fitting) <= (3 if near else 6)
        assert len(others) in (range(2, 7) if near else range(3))
        misses = {sum(o.value(a) != v for a, v in about.mentioned.items()) for o in others}
        assert misses <= {1, 2}
        assert not {(o.color, o.shape) for o in about.objects} & set(HELD_OUT)  # nor may words teach them
        demonstration = synthetic.demonstrate(about, SHOWN, rng, skill=1.0)
        assert demonstration.turns[-1].oid == about.target
        assert set(words(" ".join(turn.thinking for turn in demonstration.turns))) <= known


def test_imagined_objects_miss_their_query_by_every_attribute(train):
    """Alike: what is rare is not looked at."""
    rng, missed = np.random.default_rng(0), Counter()
    for scene in train[:500]:
        about = synthetic.imagine(scene, rng, near=True)
        missed.update(a for o in about.objects for a, v in about.mentioned.items() if o.value(a) != v)
    shares = {a: n / missed.total() for a, n in missed.items()}
    assert shares.keys() == {"color", "shape", "size", "motion"} and min(shares.values()) > 0.2, shares


def test_noisy_and_guided_demonstrations(train):
    rng = np.random.default_rng(0)
    shown = [1, 3, 7, 11]  # as when training anchors a sample in frame 1
    plain = [(s, synthetic.demonstrate(s, shown, rng, skill=0.0)) for s in train]
    guided = [(s, synthetic.demonstrate(s, shown, rng, skill=0.0, guided=True)) for s in train[:200]]

    def redundant(pairs):
        calls = [turn for _, d in pairs for turn in d.turns if turn.kind == "call"]
        return np.mean([turn.count_after == turn.count_before for turn in calls])

    def right(pairs):
        return np.mean([d.turns[-1].oid == s.target for s, d in pairs if s.initial_count > 1])

    assert redundant(plain) > 0.5 and right(plain) < 0.65
    assert redundant(guided) < 0.1 and right(guided) > 0.93
    for scene, demonstration in plain:
        calls = [turn for turn in demonstration.turns if turn.kind == "call"]
        assert len(calls) <= synthetic.BUDGET
        assert sum(turn.count_before == 1 for turn in calls) <= synthetic.MAX_NEEDLESS
        # What it sees is right even when what it does is not: the target is never filtered out.
        left, ruled_out = list(scene.candidates), None
        for turn in calls:
            now = [scene.object(oid) for oid in left]
            said = undoubted(turn.thinking) if ruled_out is None else turn.thinking
            assert said == synthetic.think(now, 1, doubted=ruled_out or [])
            before, asked = left, simulator.parse_question(turn.question, scene.query).attribute
            left = simulator.consistent(synthetic.scene_graph(scene), shown, left, turn.question, turn.reply)
            ruled_out = [(scene.object(oid), asked) for oid in before if oid not in left]
            assert scene.target in left and len(left) == turn.count_after
        keyframe = demonstration.turns[-2]
        if len(left) > 1:
            guess = " ; guess\n" + synthetic.placed(scene.object(keyframe.oid), 1)
            assert keyframe.thinking.endswith(guess) and keyframe.oid in left
    needless = [any(t.kind == "call" for t in d.turns) for s, d in plain if s.level == "clear"]
    assert 0.15 < np.mean(needless) < 0.35


@pytest.mark.parametrize("still, frame", [(False, 0), (True, 0), (True, 7)])
def test_a_conversation_arrives_at_its_object(train, still, frame):
    rng = np.random.default_rng(0)
    for scene in train[:300]:
        rounds, oid = synthetic.conversation(scene, rng, frame=frame, still=still)
        if still:  # of a picture in which nothing is seen to move
            spoken = set(words(" ".join(itertools.chain(*rounds))))
            assert not spoken & {*VALUES["motion"], "move", "moving"}
            looks = Counter(
                tuple(v for a, v in synthetic.attributes_of(o, frame, scene.width).items() if a != "motion")
                for o in scene.objects
            )
            if 1 not in looks.values():  # in one of a hundred scenes only motion tells objects apart
                continue
        *facts, (human, gpt) = rounds
        assert 2 <= len(facts) <= 4 or (len(facts) == 5 and not still)
        assert "segment" in human and "[SEG]" in gpt
        left = [o for o in scene.objects]
        for asked, said in facts:
            if asked.startswith("which"):
                value = next(v for v in words(asked) if any(v in VALUES[a] for a in ASKABLE))
                left = [o for o in left if value in synthetic.describe(o, frame).split()]
                assert NUMBERS[said] == len(left)
            else:
                assert len(left) == 1 and said in synthetic.describe(left[0], frame).split()
        assert [o.oid for o in left] == [oid]


def test_two_objects_that_differ_at_frame_0_alone_are_told_apart_no_more(train):
    """Training may show other frames than 0, in which columns are others."""
    scene = next(s for s in train if len(s.objects) >= 2)
    first = scene.objects[0]
    paths = [np.full_like(first.centers, 64), np.full_like(first.centers, 64)]
    paths[1][0] = 5
    alike = [dataclasses.replace(first, oid=i + 1, centers=path) for i, path in enumerate(paths)]
    scene = dataclasses.replace(scene, objects=tuple(alike))
    rng = np.random.default_rng(0)
    asked = {synthetic._decide(scene, [1, 2], 5, rng, 0.0, (), 0, False) for _ in range(200)}
    assert None in asked and len(asked) > 1


def test_ground_truth_of_shown_frames(train):
    for scene in train[:40]:
        for amodal in (False, True):
            scene = dataclasses.replace(scene, mask_type="amodal" if amodal else "modal")
            masks = synthetic.complete_masks if amodal else synthetic.visible_masks
            for oid in scene.candidates:
                truth = synthetic.scene_ground_truth(scene, oid, SHOWN)
                assert truth == data.ground_truth({f: masks(scene, f)[oid - 1] for f in SHOWN})
                assert set(truth) == {str(f) for f in SHOWN if scene.visible[oid - 1, f] > 0 or amodal}
                for frame, entry in truth.items():
                    y, x = np.nonzero(masks(scene, int(frame))[oid - 1])
                    box = [x.min(), y.min(), x.max(), y.max()]
                    assert entry["bbox_2d"] == [round(v / 128 * 1000) for v in box]


def test_scene_graph_is_json_and_agrees_with_the_masks(train):
    for scene in train[:60]:
        graph = synthetic.scene_graph(scene)
        assert json.loads(json.dumps(graph, allow_nan=False)) == graph
        assert graph["target"] == scene.target and graph["candidates"] == list(scene.candidates)
        for obj, entry in zip(scene.objects, graph["objects"], strict=True):
            assert entry["oid"] == obj.oid and entry["motion"]["dir"] == obj.motion
            for frame in (0, 6, 11):
                y, x = np.nonzero(synthetic.complete_masks(scene, frame)[obj.oid - 1])
                assert entry["per_frame"][frame]["bbox"] == [x.min(), y.min(), x.max(), y.max()]
                assert entry["per_frame"][frame]["col"] in (obj.value("column", frame, 128), None)


# ------------------------------------------------------------------------------------------------------------
# On disk
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return synthetic.write_dataset(tmp_path_factory.mktemp("disk") / "world", train=16, test=6, seed=9,
                                   progress=False)


def digest(root: Path) -> str:
    sums = [f"{p.relative_to(root)} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in root.rglob("*")
            if p.is_file()]
    return hashlib.sha256("\n".join(sorted(sums)).encode()).hexdigest()


def test_a_written_dataset_is_the_scenes(written):
    for split, count in (("train", 16), ("test", 6)):
        samples = {sample.id: sample for sample in data.read_ambi_rvos(written, split, strict=True)}
        assert len(samples) == count
        for i in range(count):
            scene = make_scene(i, seed=9, split=split)
            sample = samples[scene.id]
            assert (sample.query, sample.ability, sample.mask_type) == (scene.query, scene.level, None)
            assert sample.target_ids == ([] if scene.target is None else [str(scene.target)])
            assert (sample.initial_count, sample.max_count) == (scene.initial_count, scene.max_count)
            assert sample.privileged["scene_graph"] == synthetic.scene_graph(scene)
            pictures = synthetic.render(scene, range(12)).astype(int)
            for frame in (0, 4, 11):
                assert abs(sample.image(frame).astype(int) - pictures[frame]).mean() < 4
                if scene.target is not None:
                    visible = synthetic.visible_masks(scene, frame)[scene.target - 1]
                    complete = synthetic.complete_masks(scene, frame)[scene.target - 1]
                    np.testing.assert_array_equal(sample.masks(frame), visible)
                    np.testing.assert_array_equal(sample.amodal_masks(frame), complete)
                else:
                    assert not sample.masks(frame).any()


def test_written_files_have_the_release_layout(written):
    folder = written / "RVOS_Train"
    for i in range(16):
        scene = make_scene(i, seed=9)
        oids = scene.candidates or (synthetic.NO_TARGET,)
        for kind, suffix in (("Annotations", "png"), ("AmodalAnnotations", "png"), ("Visualization", "jpg")):
            assert {p.name for p in (folder / kind / scene.id).iterdir()} == {str(oid) for oid in oids}
            for oid in oids:
                names = sorted(p.name for p in (folder / kind / scene.id / str(oid)).iterdir())
                assert names == [f"{t:05d}.{suffix}" for t in range(12)]
        for oid in oids:
            about = json.loads((folder / "description_oid" / scene.id / f"{oid}.json").read_text())
            assert about["oid"] == oid
            mask = np.array(Image.open(folder / "Annotations" / scene.id / str(oid) / "00003.png"))
            assert set(np.unique(mask)) <= {0, 255}
            marked = np.array(Image.open(folder / "Visualization" / scene.id / str(oid) / "00003.jpg"))
            red = (marked[..., 0] > 180) & (marked[..., 1:].max(-1) < 90)
            ring = ndimage.binary_dilation(mask > 0, iterations=3) & (mask == 0)
            assert (red.sum() > 20) == bool(mask.any()) and not (red & ~ring).any()
    described = [json.loads(p.read_text()) for p in sorted((folder / "description_id").iterdir())]
    assert len(described) == 16 and not (written / "RVOS_Test" / "description_id").exists()
    targets = Counter(json.dumps([d["query"], d["target_oid"], [c["oid"] for c in d["candidates"]]])
                      for d in described)
    scenes = [make_scene(i, seed=9) for i in range(16)]
    assert targets == Counter(json.dumps([s.query, s.target, list(s.candidates)]) for s in scenes)


def test_pictures_stand_alone_and_hold_no_contour(written, tmp_path):
    """The policy's input needs JPEGImages only: the privileged folders may be gone."""
    bare = shutil.copytree(written, tmp_path / "bare")
    for folder in (bare / "RVOS_Test").iterdir():
        if folder.name != "JPEGImages":
            shutil.rmtree(folder)
    for i in range(6):
        scene = make_scene(i, seed=9, split="test")
        for frame in SHOWN:
            picture = np.array(Image.open(bare / "RVOS_Test" / "JPEGImages" / scene.id / f"{frame:05d}.jpg"))
            assert not ((picture[..., 0] > 200) & (picture[..., 1:].max(-1) < 90)).any()


def test_writing_is_deterministic_shuffled_and_all_or_nothing(written, tmp_path, monkeypatch):
    again = synthetic.write_dataset(tmp_path / "again", train=16, test=6, seed=9, progress=False)
    assert digest(again) == digest(written)
    ids = [sample.id for sample in data.read_ambi_rvos(written, "train")]
    assert ids != sorted(ids)
    with pytest.raises(ValueError, match="exists already"):
        synthetic.write_dataset(again, train=1, test=1, progress=False)
    with pytest.raises(ValueError, match="makes no videos"):
        synthetic.write_dataset(tmp_path / "none", train=0, test=0, progress=False)

    write, done = synthetic._write_video, []

    def interrupted(folder, scene):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(write(folder, scene))

    monkeypatch.setattr(synthetic, "_write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write_dataset(tmp_path / "half", train=5, test=1, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"]
