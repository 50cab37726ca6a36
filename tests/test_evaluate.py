"""Scores of policies and of masks from elsewhere; agreement of models with the exact user and expert, over a real
server on loopback."""

import contextlib
import dataclasses
import errno
import json
import re
import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_simulator import SECRET, server  # noqa: F401 - a fixture

from icseg_jax import data, evaluate, metrics, readers, simulator, synthetic, train

CONFIG = str(Path(__file__).parent.parent / "experiments" / "embedded.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    synthetic.write_dataset(folder / "raw", train=2, test=8, seed=3, progress=False)
    data.prepare("ambi_rvos", folder / "raw", folder / "prepared", progress=False)
    return folder / "prepared"


def command(world, server, *more):  # noqa: F811
    there = [f"{name}.{key}" for name in ("simulator", "expert")
             for key in ("kind=endpoint", "model=m", f"url={server.url}", "timeout=60")]
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
    kinds = told["simulator"]["by_kind"]
    assert "expert" not in told and kinds["what"] == kinds["choice"] == 0.0 and kinds["yesno"] > 0.3
    assert (told["simulator"]["kind"], told["simulator"]["path"]) == ("local", "somewhere")


def test_questions_of_every_kind_are_understood():
    rng, kinds = np.random.default_rng(0), set()
    for attribute in list(synthetic.ASKABLE) * 40:
        parsed = simulator.parse_question(evaluate.a_question(attribute, 7, "the blue one", rng), "the blue one")
        assert parsed.attribute == attribute and (attribute != "column" or parsed.frame == 7)
        kinds.add((attribute, parsed.kind))
    assert kinds == {(attribute, kind) for attribute in synthetic.ASKABLE for kind in ("what", "yesno", "choice")}


@pytest.mark.parametrize("attribute, said, exact, same", [
    ("color", "Blue.", "blue", True), ("color", "the blue one", "blue", True),
    ("color", "a blue circle", "blue", False),
    ("color", "blue or green", "blue", False), ("motion", "It moves to the left", "leftward", True),
    ("motion", "stays still", "still", True), ("column", "on the left side", "left", True),
    ("column", "Not visible.", "not visible", True), ("size", "unable to answer", "small", False),
    ("color", "No, it is green.", "no", True), ("color", "yes", "no", False), ("color", "nobody knows", "no", False),
    ("shape", "Neither.", "neither", True), ("shape", "", "yes", False),
])
def test_free_answers_are_compared_by_what_they_name(attribute, said, exact, same):
    assert evaluate.says_the_same(attribute, said, exact) == same


@pytest.mark.parametrize("arguments, reason", [
    ([CONFIG], "give benchmark=NAME, predictions=DIR or check=oracle"),
    ([CONFIG, "check=oracel"], "check=oracel: give"),
    ([CONFIG, "benchmark=mevsi"], "no such benchmark .did you mean 'mevis'"),
    ([CONFIG, "benchmark=mevis", "source=/nowhere"], "no dataset folder /nowhere"),
    (["benchmark=mevis", "predictions=/nowhere"], "predictions=/nowhere: needs source= too"),
    (["predictions=/nowhere", "benchmark=mevis", "source=/nowhere"], "predictions=/nowhere: no such folder"),
    ([CONFIG, "predictions=/tmp", "benchmark=mevis", "source=/nowhere"], "predictions= takes no config"),
    (["predictions=/tmp", "benchmark=mevis", "source=/tmp", "baselines=true"], "baselines=true: is not for predic"),
    ([CONFIG, "benchmark=mevis", "source="], "source= is empty"),
    ([CONFIG, "benchmark=ambi_rvos", "evaluate.repetition_penalty=0"], "repetition_penalty=0"),
    ([CONFIG, "benchmark=ambi_rvos", "evaluate.presence_penalty=.nan"], "presence_penalty=nan"),
    ([CONFIG, "benchmark=ambi_rvos", "evaluate.describe=true"], "a column of it already"),
    ([CONFIG, "benchmark=revos", "submission=x.zip", "source=/tmp"], "submission=x.zip: revos has no server"),
    ([CONFIG, "benchmark=mevis", "submission=x.zip", "evaluate.samples=3"], "leave evaluate.samples out"),
    ([CONFIG, "benchmark=mevis", "simulator.kind=local", "simulator.path=x", "mesh.distributed=true"],
     "with mesh.distributed=true use endpoint or oracle"),
    ([CONFIG, "benchmark=mevis", "simulator.kind=person", "mesh.distributed=true"], "simulator.kind=person: with mesh"),
    ([CONFIG, "check=oracle"], "compares models"),
    (["check=oracle"], "check=oracle: give a config first, such as experiments/embedded.yaml"),
    (["benchmark=mevis", "source=/tmp"], "benchmark=mevis: give a config first"),
    ([CONFIG, "check=oracle", "expert.kind=endpoint"], "expert.model"),
])
def test_bad_input_is_one_line(arguments, reason, capsys):
    assert evaluate.main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and re.search(reason, err)


# A policy


def play(world, out, *more):
    return evaluate.main([CONFIG, "benchmark=ambi_rvos", f"source={world}", f"out={out}", "evaluate.prompts=2",
                          "evaluate.samples=4", "sidecar.threads=1", *more])


@pytest.fixture(scope="module", autouse=True)
def programs_are_kept():
    """Every evaluation here makes a player of its own; those of one config share the programs of the first."""
    make, kept = train.Sampler, {}

    def sampler(config, policy, speaker, mesh, **more):
        key = repr((config, policy.config, speaker.config, mesh, more))
        if key not in kept:
            kept[key] = make(config, policy, speaker, mesh, **more)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Sampler", sampler)
        yield


@pytest.fixture(scope="module")
def scored(world, tmp_path_factory):
    """Four samples with all baselines, by the shipped base and its real segmenter."""
    out = tmp_path_factory.mktemp("scored") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(evaluate, "RESAMPLES", {"scores": 40, "dialogues": 40})
    assert play(world, out) == 0
    yield out
    patch.undo()


def test_a_policy_leaves_masks_rows_and_a_table(world, scored):
    rows = list(evaluate.read_rows(scored / "rows.jsonl"))
    samples = data.load_prepared(world, "test")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        sample = samples[row["index"]]
        masks, there = evaluate.read_masks(scored / "masks", sample)
        assert there and len(list((scored / "masks" / sample.id).iterdir())) == len(sample)
        truth = np.stack([sample.truth(p) for p in range(len(sample))])
        again = metrics.video_scores(masks, truth)
        assert row["columns"]["policy"]["scores"] == pytest.approx(again)
        assert row["id"] == sample.id and row["query"] == sample.query and row["turns"][-1]["kind"] == "answer"
        assert row["columns"]["policy"]["words"]["questions"] == sum(turn["kind"] == "call" for turn in row["turns"])
        assert row["columns"]["oracle"]["words"]["success"] == 1
        guess = row["columns"]["guess"]["words"]
        assert guess["success"] == 1 / max(sample.initial_count, 1) and guess["questions"] == 0
        assert row["columns"]["everything"]["words"]["questions"] == 5
    told = json.loads((scored / "table.json").read_text())
    assert told["answered_by"] == {"simulator": {"kind": "oracle"}, "expert": {"kind": "oracle"}}
    table = told["table"]
    assert list(table) == list(evaluate.COLUMNS)
    ceiling, floor = (table[name]["scores"]["overall"]["J"] for name in ("true box", "guess"))
    assert ceiling > 0.5 and ceiling >= floor
    low, high = table["policy"]["interval"]["scores"]["overall"]["JF"]
    assert low <= table["policy"]["scores"]["overall"]["JF"] <= high
    assert table["oracle"]["dialogues"]["resolved_rate"] == 1 and table["guess"]["dialogues"]["resolved_rate"] == 0


def test_a_table_names_the_models_and_what_they_were_told():
    given = ["simulator.kind=endpoint", "simulator.url=http://127.0.0.1:1/v1", "simulator.model=m"]
    with_file = evaluate.answering(train.load_config(CONFIG, [*given, "simulator.description=true"]))["simulator"]
    without = evaluate.answering(train.load_config(CONFIG, given))["simulator"]
    assert without["model"] == "m" and without["prompt_hash"] != with_file["prompt_hash"]
    assert without["prompt_hash"] == simulator.ModelUser(simulator.Endpoint("simulator", "http://a/v1", "m")).prompt


def test_shares_of_processes_and_a_cut_line_make_the_same_rows(world, scored, tmp_path, monkeypatch):
    """Process 0 was killed in the middle of its second row; process 1 plays its share, then 0 goes on and joins."""
    out, whole = tmp_path / "out", (scored / "rows.jsonl").read_text()
    shutil.copytree(scored, out)
    for name in ("rows.jsonl", "table.json"):
        (out / name).unlink()
    lines = whole.splitlines()
    (out / "rows.0.jsonl").write_text(f"{lines[0]}\n{lines[2][:99]}")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(evaluate.train, "agreed", lambda mine: mine)
    monkeypatch.setattr(evaluate.train, "leave_together", lambda: None)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(evaluate.train, "row_owners", lambda mesh, p, n: np.full((p, n), jax.process_index()))
    assert play(world, out) == 0
    assert [row["index"] for row in evaluate.read_rows(out / "rows.1.jsonl")] == [1, 3]
    assert not (out / "rows.jsonl").exists()
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    assert play(world, out) == 0
    assert (out / "rows.jsonl").read_text() == whole
    assert json.loads((out / "table.json").read_text()) == json.loads((scored / "table.json").read_text())


def test_what_is_there_is_not_played_again_and_nothing_else_goes_there(world, scored, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Player", lambda *_: pytest.fail("loaded"))
    assert play(world, scored) == 0
    assert "true box" in capsys.readouterr().out
    assert play(world, scored, "evaluate.repetition_penalty=1.1") == 2
    assert re.fullmatch(r"error: out=.* belongs to another evaluation: evaluate.repetition_penalty \(1.0 -> 1.1\); "
                        r"give another out=\n", capsys.readouterr().err)
    weights = json.loads((scored / "evaluation.json").read_text())["weights"]
    assert len(set(weights.values())) == 2
    with monkeypatch.context() as patch:  # such as a later export of the same run
        patch.setattr(evaluate.weights, "fingerprint", lambda path: "other")
        assert play(world, scored) == 2 and "weights.checkpoint" in capsys.readouterr().err
    assert play(world, scored, "protocol.prompt_tokens=400") == 0  # nothing that is there depends on it
    capsys.readouterr()
    held = evaluate.Log(scored, 0)
    assert play(world, scored) == 2 and "another evaluation is writing here" in capsys.readouterr().err
    held.close()


def test_a_conversation_is_held_turn_by_turn(scored, tmp_path):
    """PRIST: the user's turns as they are written, the policy's own answers in between, the mask at the end."""
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=2, seed=4, layout="prist", progress=False)
    out = tmp_path / "out"
    assert evaluate.main([CONFIG, "benchmark=prist", f"source={root}", f"out={out}", "evaluate.prompts=2"]) == 0
    source = evaluate.Source("prist", root, None)
    rows = list(evaluate.read_rows(out / "rows.jsonl"))
    assert len(rows) == 2
    for row in rows:
        sample = source.open(row["index"])
        humans = [turn["text"] for turn in sample.dialogue if turn["role"] == "user"]
        heard = [turn["reply"] for turn in row["turns"] if turn["kind"] == "talk"]
        assert heard == [*humans[1:], sample.query] and row["turns"][len(heard)]["kind"] != "talk"
        assert len(row["turns"]) > len(heard) and evaluate.read_masks(out / "masks", sample)[1]
    table = json.loads((out / "table.json").read_text())["table"]
    assert list(table) == ["policy", "true box"] and table["true box"]["scores"]["overall"]["macro"]["F1"] > 0.5


def test_askers_are_what_theory_says():
    """Over all candidates as targets: the exact means of synthetic.baselines."""
    graphs = [synthetic.scene_graph(synthetic.make_scene(i, seed=1, split="test")) for i in range(24)]
    exact, rng = synthetic.baselines(graphs), np.random.default_rng(0)

    def mean(asker, word):
        return np.mean([np.mean([evaluate.ask(asker, graph | {"target": oid}, [0, 3, 7, 11], rng)[1][word]
                                 for oid in graph["candidates"]]) for graph in graphs if graph["initial_count"] > 1])

    for asker, name in (("guess", "guess"), ("oracle", "optimal")):
        for word in ("success", "questions"):
            assert mean(asker, word) == pytest.approx(exact[name][word])
    assert mean("everything", "success") == 1 and mean("everything", "questions") == 5
    assert mean("guess", "success") < mean("random", "success") <= 1
    none = next(graph for graph in graphs if graph["level"] == "none")
    left, words = evaluate.ask("oracle", none, [0, 3, 7, 11], rng)
    assert left == [] and words["success"] == 1 and words["questions"] == 0


# Masks from elsewhere


def predict(folder, source, draw):
    """Masks of every sample: draw(truth [T, H, W], number)."""
    for number in range(len(source)):
        sample = source.open(number)
        truth = np.stack([sample.truth(p) for p in range(len(sample))])
        evaluate.write_masks(folder, sample, draw(truth, number))


HEADLINES = {
    "ambi_rvos": "overall/JF", "ok_vos": "overall/JF", "mevis": "overall/JF", "revos": "overall/JF",
    "ref_davis17_a": "overall/JF", "ref_davis17_b": "overall/JF", "long_rvos": "overall/vIoU",
    "reason_vos": "overall/JF", "reason_seg": "overall/gIoU", "prist": "overall/macro/F1",
    "r2sm": "all/all/gIoU", "cocoa_cls": "all/all/gIoU", "d2sa": "all/all/gIoU",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADLINES)
def test_perfect_masks_score_1_and_none_little(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", {"scores": 40, "dialogues": 40})
    layout = name.removesuffix("_a").removesuffix("_b")
    count = 1 if "davis" in name else 2  # all of a video's objects are compared with all
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=count, seed=4, layout=layout, progress=False)
    source = evaluate.Source(name, root, None)
    predict(tmp_path / "right", source, lambda truth, number: truth)
    told = ["benchmark=" + name, f"source={root}", f"out={tmp_path}/scores"]
    assert evaluate.main([f"predictions={tmp_path}/right", *told]) == 0

    def headline():
        value = json.loads((tmp_path / "scores" / "table.json").read_text())["table"]["policy"]
        interval = value["interval"]["scores"]
        value = value["scores"]
        for key in HEADLINES[name].split("/"):
            value, interval = value[key], interval[key]
        assert interval[0] <= value <= interval[1]
        return value

    assert headline() == pytest.approx(1, abs=1e-4)
    asks = [n for n in range(len(source)) if (s := source.open(n)).truth(0).any() and s.ability != "no_target"]
    predict(tmp_path / "wrong", source, lambda truth, number: truth & (number != asks[0]))  # one sample's are empty
    assert evaluate.main([f"predictions={tmp_path}/wrong", *told]) == 0
    assert headline() < 0.99
    before = headline()
    shutil.rmtree(tmp_path / "wrong" / source.open(asks[0]).id)
    capsys.readouterr()
    assert evaluate.main([f"predictions={tmp_path}/wrong", *told]) == 0
    assert "1 without masks" in capsys.readouterr().out
    table = json.loads((tmp_path / "scores" / "table.json").read_text())["table"]["policy"]["scores"]
    if name in ("ambi_rvos", "ok_vos"):  # whose scorer does not look at what is missing
        assert headline() == 1 and table["overall, missing as 0"]["JF"] <= before
        told = json.loads((tmp_path / "scores" / "table.json").read_text())["table"]["policy"]["interval"]["scores"]
        low, high = told["overall, missing as 0"]["JF"]
        assert low < before and high == 1  # of resamples without what is missing, too
    elif evaluate.benchmark(name).row is evaluate.video_row:  # 0 also where the target is out of sight
        assert headline() <= before
        rows = [json.loads(line) for line in (tmp_path / "scores" / "rows.jsonl").read_text().splitlines()]
        lost = next(row for row in rows if row["index"] == asks[0])["columns"]["policy"]["scores"]
        assert lost.pop("missing") and set(lost.values()) == {0.0} and {"J", "F", "tIoU"} <= lost.keys()
    else:
        assert headline() == pytest.approx(before)


def test_a_video_of_protocol_a_counts_when_all_of_its_objects_do(tmp_path):
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=1, seed=4, layout="ref_davis17", progress=False)
    source = evaluate.Source("ref_davis17_a", root, None)
    predict(tmp_path / "said", source, lambda truth, number: truth)
    rows = evaluate.merged_rows(source, tmp_path / "said", range(len(source)))
    assert {row["J"] for row in rows} == {1.0} and len({row["group"] for row in rows}) == 4
    fewer = evaluate.merged_rows(source, tmp_path / "said", range(1, len(source)))
    annotator = {f"annotator {source.open(0).meta['annotator']}"}
    assert {row["group"] for row in rows} - {row["group"] for row in fewer} == annotator
    # Nor does a video with a refused record, of which nobody knows whose object it was.
    file = root / "meta_expressions" / "valid" / "meta_expressions.json"
    meta = json.loads(file.read_text())
    video, number = source.id_of(0).split("/")
    meta["videos"][video]["expressions"][number]["exp"] = ""
    file.write_text(json.dumps(meta))
    data.prepare("ref_davis17_a", root, tmp_path / "prepared", progress=False)
    for path in (root, tmp_path / "prepared"):
        damaged, there = evaluate.Source("ref_davis17_a", path, None), []
        for k in range(len(damaged)):
            with contextlib.suppress(data.DataError):
                there.append(damaged.open(k) and k)
        assert len(there) == len(source) - 1
        groups = {row["group"] for row in evaluate.merged_rows(damaged, tmp_path / "said", there)}
        assert {row["group"] for row in rows} - groups == annotator


def test_what_the_machine_lacks_is_no_fault_of_a_record(world, scored, tmp_path, monkeypatch, capsys):
    """A full disk ends the evaluation with one line; what a record was refused for is looked at again."""
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    lines = (out / "rows.0.jsonl").read_text().splitlines(keepends=True)
    bad = json.dumps({"index": 3, "id": "x", "refused": "once"}) + "\n"
    (out / "rows.0.jsonl").write_text("".join(line for line in lines if '"index": 3,' not in line) + bad)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_masks", full)
        assert play(world, out) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: [Errno 28]")
    assert (out / "rows.0.jsonl").read_text().endswith(bad)
    assert play(world, out) == 0
    assert (out / "rows.jsonl").read_text() == (scored / "rows.jsonl").read_text()


def test_a_mask_type_that_nobody_asked_for_is_not_drawn(world):
    sample = data.load_prepared(world, "test")[0]
    said = train.Action("answer", mask_type="amodal")
    for asked, drawn in ((None, "modal"), ("modal", "amodal"), ("amodal", "amodal")):
        assert train.wanted_mask(dataclasses.replace(sample, mask_type=asked), said) == drawn


def test_bad_masks_are_refused_with_their_id(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", {"scores": 40, "dialogues": 40})
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=2, seed=4, layout="long_rvos", progress=False)
    source = evaluate.Source("long_rvos", root, None)
    predict(tmp_path / "said", source, lambda truth, number: truth)
    sample = source.open(0)
    Image.new("L", (3, 3)).save(tmp_path / "said" / sample.id / f"{sample.frame_names[1]}.png")
    told = [f"predictions={tmp_path}/said", "benchmark=long_rvos", f"source={root}"]
    assert evaluate.main(told) == 0
    out, err = capsys.readouterr()
    assert f"record {sample.id} is left out: mask " in err and "is 3x3, its frame" in err and "1 refused" in out
    assert evaluate.main([*told, "strict=true"]) == 2
    assert evaluate.main([*told, "split=valid"]) == 2
    assert "split=valid: not in" in capsys.readouterr().err
    outside = tmp_path / "secret.png"
    Image.new("L", sample.size[::-1], 255).save(outside)
    frame = tmp_path / "said" / sample.id / f"{sample.frame_names[1]}.png"
    frame.unlink()
    frame.symlink_to(outside)
    assert evaluate.main(told) == 0 and "leaves the dataset folder" in capsys.readouterr().err


@pytest.mark.parametrize("name, prefix", [("mevis", ""), ("ref_youtube_vos", "Annotations/")])
def test_the_zip_that_a_server_takes(name, prefix, tmp_path, capsys):
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=2, seed=4, layout=name, progress=False)
    if name == "mevis":  # as it is given out: no labels
        (root / "valid_u").rename(root / "valid")
        (root / "valid" / "mask_dict.json").unlink()
    source = evaluate.Source(name, root, "valid")
    for number in range(len(source)):
        sample = source.open(number)
        assert evaluate.hidden(sample)
        evaluate.write_masks(tmp_path / "said", sample, np.ones((len(sample), *sample.size), bool))
    told = [f"predictions={tmp_path}/said", f"benchmark={name}", f"source={root}", f"submission={tmp_path}/s.zip"]
    assert evaluate.main(told) == 0
    assert "labels are hidden" in capsys.readouterr().out
    first = (tmp_path / "s.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "s.zip") as made:
        names = made.namelist()
        assert f"{prefix}{sample.id}/{sample.frame_names[0]}.png" in names
        assert len(names) == sum(len(source.open(i)) for i in range(len(source)))
        with made.open(names[0]) as file:
            assert set(np.unique(np.asarray(Image.open(file)))) == {255}
    (tmp_path / "said" / sample.id / f"{sample.frame_names[0]}.png").unlink()
    assert evaluate.main(told) == 2 and "is missing, and the server wants all" in capsys.readouterr().err
    assert (tmp_path / "s.zip").read_bytes() == first and not list(tmp_path.glob(".s.zip*"))


def test_a_zip_lacks_no_record_that_was_refused(tmp_path, capsys):
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=2, seed=4, layout="mevis", progress=False)
    source = evaluate.Source("mevis", root, "valid_u")
    predict(tmp_path / "said", source, lambda truth, number: truth)
    file = root / "valid_u" / "meta_expressions.json"
    before = file.read_text()
    meta = json.loads(before)
    video, number = source.id_of(0).split("/")
    meta["videos"][video]["expressions"][number]["exp"] = ""
    file.write_text(json.dumps(meta))
    out = tmp_path / "prepared"
    data.prepare("mevis", root, out, progress=False)
    told = [f"predictions={tmp_path}/said", "benchmark=mevis", f"source={out}", f"submission={tmp_path}/s.zip"]
    assert evaluate.main(told) == 2
    assert f"lacks records, '{video}/{number}' the first" in capsys.readouterr().err
    assert not list(tmp_path.glob("*s.zip*"))


def test_what_is_mended_or_comes_later_makes_other_records(tmp_path):
    """Rows are resumed by their number, which a mended record moves; labels may follow the images."""
    root = synthetic.write_dataset(tmp_path / "raw", train=2, test=2, seed=4, layout="ok_vos", progress=False)
    masks = next((root / "test" / "Annotations").iterdir())
    masks.rename(tmp_path / "masks")
    data.prepare("ok_vos", root, tmp_path / "prepared", progress=False)
    damaged = evaluate.Source("ok_vos", tmp_path / "prepared", "test")
    (tmp_path / "masks").rename(masks)
    data.prepare("ok_vos", root, tmp_path / "prepared", progress=False, strict=True)
    whole = evaluate.Source("ok_vos", tmp_path / "prepared", "test")
    assert len(whole) > len(damaged) > 0 and whole.fingerprint != damaged.fingerprint

    root = synthetic.write_dataset(tmp_path / "long", train=0, test=2, seed=4, layout="long_rvos", progress=False)
    (root / "test").rename(root / "valid")
    (root / "valid" / "Annotations").rename(tmp_path / "labels")
    before = evaluate.Source("long_rvos", root, "valid").fingerprint
    assert evaluate.Source("long_rvos", root, "valid").fingerprint == before
    (tmp_path / "labels").rename(root / "valid" / "Annotations")
    assert evaluate.Source("long_rvos", root, "valid").fingerprint != before


def test_a_disk_that_fails_is_no_bad_mask(tmp_path, monkeypatch, capsys):
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=1, seed=4, layout="long_rvos", progress=False)
    predict(tmp_path / "said", evaluate.Source("long_rvos", root, None), lambda truth, number: truth)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(evaluate, "read_masks", broken)
    assert evaluate.main([f"predictions={tmp_path}/said", "benchmark=long_rvos", f"source={root}"]) == 2
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].startswith("error: [Errno 5]") and "left out" not in told.err


def test_a_video_without_all_its_objects_has_no_score_and_no_hidden_labels(tmp_path, capsys):
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=1, seed=4, layout="ref_davis17", progress=False)
    source = evaluate.Source("ref_davis17_a", root, None)
    sample = source.open(0)
    row = evaluate.about(0, sample) | {"columns": {"policy": {"scores": {"J": 1.0}, "words": None}}}
    evaluate.report(source, [row], tmp_path, None)
    told = capsys.readouterr().out
    assert "no video has the expressions of all its objects" in told and "hidden" not in told


def test_only_frames_with_a_file_are_scored_where_the_scorer_lists_them(tmp_path):
    """Ambi-RVOS (DATA.md 3.4): a frame without a mask file is left out, an empty file counts."""
    root = synthetic.write_dataset(tmp_path / "raw", train=0, test=2, seed=4, layout="ok_vos", progress=False)
    source = evaluate.Source("ok_vos", root, None)
    before = source.open(0)
    files = sorted((root / "test" / "Annotations").glob(f"{before.meta['video']}/*/*.png"))
    files[0].unlink()
    sample = source.open(0)
    assert "labelled" not in before.meta and sample.meta["labelled"] == list(range(1, len(sample)))
    wrong = np.stack([before.truth(p) for p in range(len(before))])
    wrong[0] = True
    assert evaluate.video_row(sample, wrong, None)["J"] == 1 > evaluate.video_row(before, wrong, None)["J"]
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(data.DataError, match="none of its frames has a mask file"):
        source.open(0)


def test_every_dataset_with_masks_is_a_benchmark():
    assert set(readers.DATASETS) - set(evaluate.BENCHMARKS) == {"llava"}
