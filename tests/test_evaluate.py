"""Agreement of models with the exact user and expert, over a real server on loopback."""

import json
import re
from pathlib import Path

import pytest
from test_simulator import SECRET, server  # noqa: F401 - a fixture

from icseg_jax import data, evaluate, simulator, synthetic

CONFIG = str(Path(__file__).parent.parent / "experiments" / "embedded.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    synthetic.write_dataset(folder / "raw", train=2, test=8, seed=3, progress=False)
    data.prepare("ambi_rvos", folder / "raw", folder / "prepared", progress=False)
    return folder / "prepared"


def command(world, server, *more):  # noqa: F811
    there = [f"{name}.{key}" for name in ("simulator", "expert")
             for key in ("kind=endpoint", "model=m", f"url={server.url}", "timeout=5")]
    return [CONFIG, "check=oracle", f"data.path={world}", "data.generate_train=0", "rollout.prompts=2",
            "update.minibatches=1", *there, *more]


def test_a_model_that_knows_agrees_and_one_that_guesses_does_not(world, server, capsys):  # noqa: F811
    config = evaluate.train.load_config(CONFIG, [a for a in command(world, server)[1:] if a != "check=oracle"])
    played = evaluate.dialogues(config)
    assert played and all(sample.target_ids and len(d) == 5 for sample, _, d in played)
    exact = {question: answer for _, _, d in played[:1] for question, answer in d}
    counts = simulator.OracleExpert().diagnose(played[0][0].privileged["scene_graph"], *played[0][1:]).counts

    def says(body):
        text = body["messages"][-1]["content"][-1]["text"]
        if body["messages"][0]["content"] == simulator.EXPERT_PROMPT:
            found = {"sequential_subset_count": counts, "holistic_guidance": "ask color first"}
            return f"<output> {json.dumps(found)} </output>"
        return f"<answer> It is {exact.get(text.removeprefix('Question: '), 'no idea')}. </answer>"

    server.says = says
    assert evaluate.main(command(world, server, "evaluate.samples=1")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 1 and told["simulator"]["agreement"] >= 0.8  # "It is please clarify." is not the phrase
    assert told["expert"]["agreement"] == told["expert"]["whole_dialogues"] == 1.0
    assert told["expert"]["guidance_refused"] == 0.0 and len(told["simulator"]["prompt_hash"]) == 16
    server.says = lambda body: "<answer> purple </answer>"
    assert evaluate.main(command(world, server)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["simulator"]["agreement"] < 0.5 and told["expert"]["unreadable"] > 0.5
    assert SECRET not in json.dumps(told) and set(told["simulator"]["by_attribute"]) == set(synthetic.ASKABLE)


def test_a_frozen_policy_is_compared_as_a_served_one_is(world, monkeypatch, capsys):
    speaks = lambda system, messages, most: ["<answer> no </answer>"] * len(messages)  # noqa: E731
    monkeypatch.setattr(evaluate.train, "frozen_generator", lambda config, path, mesh: speaks)
    assert evaluate.main([CONFIG, "check=oracle", f"data.path={world}", "data.generate_train=0", "rollout.prompts=2",
                          "update.minibatches=1", "simulator.kind=local", "simulator.path=somewhere"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "expert" not in told and told["simulator"]["agreement"] == 0.0
    assert (told["simulator"]["kind"], told["simulator"]["path"]) == ("local", "somewhere")


@pytest.mark.parametrize("attribute, said, exact, same", [
    ("color", "Blue.", "blue", True), ("color", "the blue one", "blue", True),
    ("color", "a blue circle", "blue", False),
    ("color", "blue or green", "blue", False), ("motion", "It moves to the left", "leftward", True),
    ("motion", "stays still", "still", True), ("column", "on the left side", "left", True),
    ("column", "Not visible.", "not visible", True), ("size", "unable to answer", "small", False),
])
def test_free_answers_are_compared_by_what_they_name(attribute, said, exact, same):
    assert evaluate.says_the_same(attribute, said, exact) == same


@pytest.mark.parametrize("arguments, reason", [
    ([CONFIG], "give check=oracle"),
    ([CONFIG, "check=oracle"], "compares models"),
    (["check=oracle"], "no such config|can not be read|: "),
    ([CONFIG, "check=oracle", "expert.kind=endpoint"], "expert.model"),
])
def test_bad_input_is_one_line(arguments, reason, capsys):
    assert evaluate.main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(reason, err)
