"""The user and the expert: exact answers and counts, guidance that tells nothing, texts that do no harm."""

import itertools
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icseg_jax import simulator, synthetic
from icseg_jax.simulator import OracleExpert, OracleUser, Question, parse_question
from icseg_jax.synthetic import ASKABLE, VALUES, make_scene

SHOWN = [0, 3, 7, 11]


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(i, seed=4) for i in range(150)]


@pytest.fixture(scope="module")
def graphs(scenes):
    return [synthetic.scene_graph(scene) for scene in scenes]


@pytest.mark.parametrize("text, expected", [
    ("What color is the target?", Question("color", "what")),
    ("what COLOUR", Question("color", "what")),
    ("What shape is the target?", Question("shape", "what")),
    ("How big is the target?", Question("size", "what")),
    ("How large is it?", Question("size", "what")),
    ("Which direction does the target move?", Question("motion", "what")),
    ("Where is the target in frame 7?", Question("column", "what", (), 7)),
    ("Where is the target?", Question("column", "what")),
    ("Is the target blue?", Question("color", "yesno", ("blue",))),
    ("Does the target move left?", Question("motion", "yesno", ("leftward",))),
    ("Does the target move upward?", Question("motion", "yesno", ("upward",))),
    ("Is the target still?", Question("motion", "yesno", ("still",))),
    ("Is the target in the middle in frame 3?", Question("column", "yesno", ("middle",), 3)),
    ("Is the target blue or green?", Question("color", "choice", ("blue", "green"))),
    ("Is the target blue or red?", Question("color", "choice", ("blue",))),
    ("Is it small, medium or large?", Question("size", "choice", ("small", "medium", "large"))),
    ("In frame 9, is the target left or right?", Question("column", "choice", ("left", "right"), 9)),
    ("Where is the target in frame 99999999999999999999?", Question("column", "what", (), -1)),
    ("Is it blue, green, white or orange?", None),  # more than three options
    ("What color and shape is the target?", None),  # two attributes
    ("Is the target a blue circle?", None),
    ("Where is the target in frame 0 and in frame 3?", None),
    ("Does the target move?", None),  # its answer would tell more than was asked
    ("Does another object ever cover the target?", None),
    ("please clarify", None),
    ("", None),
])
def test_questions_are_understood(text, expected):
    assert parse_question(text) == expected


def test_restating_the_query_is_no_question():
    assert parse_question("Is the target blue?", "find the blue thing") is None
    other = parse_question("Is the target blue?", "find the green thing")
    assert other == Question("color", "yesno", ("blue",))
    assert parse_question("What color is the target?", "find the blue thing") == Question("color", "what")
    query = "track the one in the left at frame 0"
    assert parse_question("Is the target left in frame 0?", query) is None
    assert parse_question("Is the target left in frame 7?", query) == Question("column", "yesno", ("left",), 7)
    assert parse_question("Is it the blue circle?", "the blue circle") is None


@given(st.text(max_size=300), st.text(max_size=60))
def test_any_text_is_a_parse_result(text, query):
    parsed = parse_question(text, query)
    assert parsed is None or parsed.attribute in ASKABLE


def test_long_texts_take_linear_time():
    for piece in ("frame ", "frame 1", "blue ", "a", "9", " ", "<", "is the target left or "):
        text = piece * (100_000 // len(piece))
        start = time.process_time()
        parse_question(text, text)
        simulator.sanitise(text)
        assert time.process_time() - start < 1


def test_every_standard_question_is_answered_with_the_truth(scenes, graphs):
    user = OracleUser()
    for scene, graph in zip(scenes, graphs, strict=True):
        for attribute, question in synthetic.QUESTIONS.items():
            reply = user.answer(graph, SHOWN, question.format(fid=0))
            if scene.target is None:
                assert reply == simulator.CLARIFY
                continue
            truth = scene.object(scene.target).value(attribute, 0, scene.width)
            assert reply == truth
            for value in set(VALUES[attribute]) - {scene.mentioned.get(attribute)}:
                suffix = " in frame 0" if attribute == "column" else ""
                asked = user.answer(graph, SHOWN, f"Is the target {value}{suffix}?")
                assert asked == ("yes" if value == truth else "no")
            others = [value for value in VALUES[attribute] if value != truth][:2]
            suffix = " in frame 0" if attribute == "column" else ""
            assert user.answer(graph, SHOWN, f"Is it {' or '.join(others)}{suffix}?") == simulator.NEITHER
            assert user.answer(graph, SHOWN, f"Is it {truth} or {others[0]}{suffix}?") == truth


def test_columns_need_a_shown_frame_a_visible_target_and_no_boundary(graphs):
    user = OracleUser()
    ask = "Where is the target in frame {}?".format
    kinds = set()
    for graph in graphs:
        if graph["target"] is None:
            continue
        target = graph["objects"][graph["target"] - 1]
        assert user.answer(graph, SHOWN, ask(5)) == user.answer(graph, SHOWN, ask(-1)) == simulator.CLARIFY
        for frame in range(12):
            entry = target["per_frame"][frame]
            reply = user.answer(graph, list(range(12)), ask(frame))
            if entry["visible"] < simulator.INVISIBLE:
                expected = simulator.NOT_VISIBLE
            else:
                expected = entry["col"] or simulator.CLARIFY
            assert reply == expected
            kinds.add(reply)
        stays = len({target["per_frame"][f]["col"] for f in SHOWN}) == 1
        assert (user.answer(graph, SHOWN, "Where is the target?") == simulator.CLARIFY) or stays
    assert kinds >= {"left", "middle", "right", simulator.CLARIFY}
    graph = next(graph for graph in graphs if graph["target"])
    hidden = {**graph, "objects": [
        {**o, "per_frame": [{**e, "visible": 0.0} for e in o["per_frame"]]} for o in graph["objects"]]}
    assert user.answer(hidden, SHOWN, ask(0)) == simulator.NOT_VISIBLE
    diagnosis = OracleExpert().diagnose(hidden, SHOWN, [(ask(0), "not visible")])
    assert diagnosis.counts == [hidden["initial_count"]] * 2


def noisy_dialogue(scene, graph, rng) -> list[tuple[str, str]]:
    user = OracleUser()
    pool = [question.format(fid=0) for question in synthetic.QUESTIONS.values()]
    pool += ["Is the target large?", "Is it a circle or a square?", "hello", "What color and size is it?",
             "Is the target on the left in frame 3?", "Is it upward, downward or still?"]
    asked = [pool[int(rng.integers(len(pool)))] for _ in range(int(rng.integers(0, 6)))]
    return [(question, user.answer(graph, SHOWN, question)) for question in asked]


def test_counts_are_those_of_a_brute_force_filter(scenes, graphs):
    rng = np.random.default_rng(0)
    user, expert = OracleUser(), OracleExpert()
    for scene, graph in zip(scenes, graphs, strict=True):
        dialogue = noisy_dialogue(scene, graph, rng)
        diagnosis = expert.diagnose(graph, SHOWN, dialogue)
        counts, left = [scene.initial_count], set(scene.candidates)
        for question, reply in dialogue:
            if reply != simulator.CLARIFY:  # who else would have got this answer?
                told = {oid: user.answer({**graph, "target": oid}, SHOWN, question) for oid in left}
                left = {oid for oid in left if told[oid] == reply}
            counts.append(len(left))
        assert diagnosis.counts == counts and len(diagnosis.asked) == len(dialogue)
        assert all(b <= a for a, b in itertools.pairwise(counts))
        assert scene.target is None or (scene.target in left and counts[-1] >= 1)
        assert diagnosis.asked == [q.attribute if (q := parse_question(t, scene.query)) else None
                                   for t, _ in dialogue]


def test_an_answer_that_fits_nobody_changes_nothing(graphs):
    graph = next(g for g in graphs if g["initial_count"] > 1 and "color" not in g["mentioned"])
    question = synthetic.QUESTIONS["color"]
    assert OracleExpert().diagnose(graph, SHOWN, [(question, "red")]).counts == [graph["initial_count"]] * 2


def test_guidance_is_useful_and_gives_nothing_away(scenes, graphs):
    rng = np.random.default_rng(1)
    expert, user = OracleExpert(), OracleUser()
    for scene, graph in zip(scenes, graphs, strict=True):
        for _ in range(3):
            dialogue = noisy_dialogue(scene, graph, rng)
            diagnosis = expert.diagnose(graph, SHOWN, dialogue)
            assert diagnosis.guidance and not simulator.leaks(diagnosis.guidance, graph)
            assert not simulator.leaks(diagnosis.guidance, {v for values in VALUES.values() for v in values})
            assert len(diagnosis.guidance.split()) <= 60
        # Following the plan from the start resolves the scene.
        plan = expert.diagnose(graph, SHOWN, []).plan
        plan = [synthetic.QUESTIONS[attribute].format(fid=0) for attribute in plan]
        followed = expert.diagnose(graph, SHOWN, [(q, user.answer(graph, SHOWN, q)) for q in plan])
        assert followed.counts[-1] == min(scene.initial_count, 1) and len(plan) <= max(scene.max_count, 3)
        assert (len(plan) == 0) == (scene.initial_count <= 1)
        if plan:
            assert followed.plan == followed.asked and "guess" not in followed.guidance


def test_guidance_names_what_was_wasted(graphs):
    expert, user = OracleExpert(), OracleUser()

    def diagnose(graph, *attributes):
        asked = [synthetic.QUESTIONS[attribute].format(fid=0) for attribute in attributes]
        return expert.diagnose(graph, SHOWN, [(q, user.answer(graph, SHOWN, q)) for q in asked])

    graph = next(g for g in graphs if g["level"] == "medium" and len(g["best_first"]) == 1)
    (best,), stated = graph["best_first"], next(iter(graph["mentioned"]))
    wasted = diagnose(graph, stated)
    assert wasted.guidance.startswith(f"ask {best} first . ")
    assert wasted.guidance.endswith(f"stop when one remains . do not ask {stated} . do not guess")
    twice = diagnose(graph, stated, stated)
    assert twice.guidance.endswith(f"do not ask {stated} . do not ask {stated} again . do not guess")
    assert diagnose(graph, best, best).plan[0] == best
    assert "ask one attribute" in expert.diagnose(graph, SHOWN, [("hello", "please clarify")]).guidance
    clear = next(g for g in graphs if g["level"] == "clear")
    assert diagnose(clear, "color").guidance == "one remains from the start . do not ask"
    none = next(g for g in graphs if g["level"] == "none")
    assert diagnose(none, "color", "size").counts == [0, 0, 0] and "match" in diagnose(none, "color").guidance


def test_leaks_are_found(graphs):
    graph = next(graph for graph in graphs if graph["target"])
    target = graph["objects"][graph["target"] - 1]
    column, motion = target["per_frame"][0]["col"], target["motion"]["dir"]
    for value in (target["color"], target["shape"].upper(), motion, column):
        assert simulator.leaks(f"ask size first . it is {value}", graph)
    assert simulator.leaks("it is at 420", graph) and simulator.leaks("frame 3", [])
    assert not simulator.leaks("ask color first", graph)
    for told, value in (("it moves to the left", "leftward"), ("it goes upwards", "upward"), ("the circles", "circle"),
                        ("a red-ish one", "red"), ("look at crosses", "cross")):
        assert simulator.leaks(told, [value]), told
    assert simulator.leaks("ask about the third one", []) and not simulator.leaks("stop when one remains", ["one"][:0])
    assert simulator.leaks("the blue one", ["blue"]) and not simulator.leaks("the bluest one", ["blue"])


@given(st.text(max_size=400) | st.lists(st.sampled_from(
    ["<answer>", "</answer>", "<", ">", "<|im_end|>", "<keyframe> 3 </keyframe>", "\n", "\x00", "\u2028",
     "blue", "<<think>ing>", "\u200b", "\ud800", "|"])).map("".join))
def test_a_sanitised_text_is_harmless(text):
    clean = simulator.sanitise(text)
    assert clean and not set(clean) & set("<>") and clean.isprintable() and "\n" not in clean
    assert len(clean.split()) <= 32 and simulator.sanitise(clean) == clean


def test_sanitise_keeps_what_a_user_says():
    assert simulator.sanitise("the red one") == "the red one"
    assert simulator.sanitise(" <answer>{}</answer> blue <|im_end|>\n green") == "{} blue green"
    assert simulator.sanitise("<call></call>") == simulator.CLARIFY
    assert simulator.sanitise("a " * 100, max_words=3) == "a a a"


def test_many_questions_are_answered_in_order(graphs):
    requests = [(graph, SHOWN, "What color is the target?") for graph in graphs]
    expected = [OracleUser().answer(*request) for request in requests]
    assert simulator.answer_all(OracleUser(), requests) == expected

    together = threading.Barrier(5)

    class SlowUser(OracleUser):
        workers = 5

        def answer(self, graph, shown, question):
            together.wait(timeout=60)  # nobody gets on before five have asked
            return super().answer(graph, shown, question) + "<answer>"

    assert len(requests) % 5 == 0
    assert simulator.answer_all(SlowUser(), requests) == expected


def test_a_person_answers_at_the_terminal(graphs, monkeypatch, capsys):
    user = simulator.load_user("person")
    graph = next(graph for graph in graphs if graph["target"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or " <b>blue\x07 ")
    assert user.answer(graph, SHOWN, "What color <|im_end|> is it?") == "blue"
    shown = capsys.readouterr().out
    assert graph["query"] in shown and "What color is it?" in shown and "frame 11: x" in shown

    def closed(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", closed)
    none = next(graph for graph in graphs if graph["target"] is None)
    assert user.answer(none, SHOWN, "What color is it?") == simulator.CLARIFY
    assert isinstance(simulator.load_user("oracle"), OracleUser)
    with pytest.raises(ValueError, match="use oracle or person"):
        simulator.load_user("robot")


def test_an_erring_user_errs_as_often_as_told_and_always_alike():
    graphs = [synthetic.scene_graph(synthetic.make_scene(i, seed=4, level="medium")) for i in range(120)]
    asked = [(g, [0, 3, 7, 11], f"What {a} is the target?") for g in graphs for a in ("color", "shape", "size")]
    exact = simulator.load_user("oracle")
    truth = [exact.answer(*request) for request in asked]
    for flip, refuse in ((0.3, 0.0), (0.0, 0.4), (1.0, 0.0), (0.5, 1.0)):
        user = simulator.load_user("oracle", flip=flip, refuse=refuse, seed=1)
        said = [user.answer(*request) for request in asked]
        assert said == [user.answer(*request) for request in asked]
        refused = np.mean([s == simulator.CLARIFY for s in said])
        wrong = np.mean([s not in (t, simulator.CLARIFY) for s, t in zip(said, truth, strict=True)])
        assert abs(refused - refuse) < 0.1 and abs(wrong - flip * (1 - refuse)) < 0.1
        for (graph, _, question), s in zip(asked, said, strict=True):
            attribute = simulator.parse_question(question, graph["query"]).attribute
            assert s in (*VALUES[attribute], simulator.CLARIFY)
    liar = simulator.load_user("oracle", flip=1.0)
    yes = [(liar.answer(g, [0], "Is it red?"), exact.answer(g, [0], "Is it red?")) for g in graphs]
    assert all({a, b} == {"yes", "no"} for a, b in yes if b != simulator.CLARIFY)
    # An expert who sees wrong answers still counts, and advises without falling over.
    for graph in graphs[:20]:
        lied = [(q, liar.answer(graph, [0], q)) for q in ("What color is the target?", "What size is the target?")]
        counts = simulator.OracleExpert().diagnose(graph, [0], lied).counts
        assert len(counts) == 3 and counts == sorted(counts, reverse=True) and min(counts) >= 1


def test_a_described_target_is_named_in_full():
    for index in range(20):
        scene = synthetic.make_scene(index, seed=6, level="medium")
        graph = synthetic.scene_graph(scene)
        told = simulator.describe_target(types.SimpleNamespace(privileged={"scene_graph": graph})).split()
        target = next(obj for obj in graph["objects"] if obj["oid"] == graph["target"])
        assert told[:4] == [target["color"], target["shape"], target["size"], target["motion"]["dir"]]
        assert set(told[4:]) <= set(VALUES["column"])
    nobody = graph | {"target": -1}
    assert simulator.describe_target(types.SimpleNamespace(privileged={"scene_graph": nobody})) == ""
    assert simulator.describe_target(types.SimpleNamespace(privileged=None)) == ""
