"""The real command at a tiny size: runs, kills, resumes, and what it says to bad input (train.py sections 1, 9, 10)."""

import dataclasses
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from icseg_jax import data, synthetic, train

ROOT = Path(__file__).parent.parent
TINY = [
    "rollout.prompts=2",
    "rollout.rollouts=2",
    "rollout.least_prompts=2",
    "update.minibatches=2",
    "evaluate.prompts=2",
    "credit.sync_interval=3",
]


EVERY = ["checkpoint.every=1", "evaluate.every=2", "evaluate.samples=4", "evaluate.clips=2", "evaluate.draws=2"]
EVERY += ["profile.steps=2..2"]


def command(*arguments, module="train"):
    return [sys.executable, "-m", f"icseg_jax.{module}", *map(str, arguments)]


def call(*arguments, module="train", timeout=600, env=None):
    return subprocess.run(
        command(*arguments, module=module), cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=env
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a prepared world of twelve scenes."""
    folder = tmp_path_factory.mktemp("train")
    synthetic.write_dataset(folder / "raw", train=6, test=6, seed=5, progress=False)
    data.prepare("ambi_rvos", folder / "raw", folder / "world", progress=False)
    return folder


def run(place, name, *more):
    return ["experiments/embedded.yaml", f"data.path={place}/world", f"run_dir={place}/{name}", *TINY, *more]


def rows(folder):
    out = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in out]


@pytest.fixture(scope="module")
def straight(place):
    """Four steps in one go, with evaluations before and after."""
    done = call(*run(place, "straight", "steps=4", *EVERY))
    assert done.returncode == 0, done.stderr[-3000:]
    return place / "straight", done


def test_a_run_leaves_all_it_promises(straight):
    folder, done = straight
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "dialogues",
        "report.html",
        "policy.json",
    ):
        assert (folder / name).exists(), name
    assert list((folder / "tensorboard").iterdir()) and list((folder / "profile").rglob("*.xplane.pb"))
    summary = json.loads((folder / "summary.json").read_text())
    words = {"success", "success_ambiguous", "success_clear", "jf", "questions_ambiguous", "questions_clear", "reward",
             "resolved_rate", "redundant_question_rate", "regret", "asked", "format_rate"}  # fmt: skip
    for when in ("before", "after"):
        for decoding in ("greedy", "sampled"):
            assert words <= set(summary[when][decoding])
        counts = {decoding: summary[when][decoding]["count"]["success"] for decoding in ("greedy", "sampled")}
        assert counts["sampled"] == 2 * counts["greedy"] > 0  # evaluate.draws
    assert {"guess", "random", "fixed_attribute", "fixed_order", "greedy", "optimal"} <= set(summary["baselines"])
    assert summary["finished"] and summary["seconds"]["total"] > 0 and 20 < summary["compilations"] < 400
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert 0.1 < summary["peak_memory_gb"]["trainer"] < 6 and summary["peak_memory_gb"]["sidecar"] > 0.1
    needed = {"loss", "ratio", "clip_fraction", "kl", "entropy", "gradient_norm", "sampler_difference/mean", "lam",
              "sampler_difference/p99",
              "advantage/trajectory_spread", "advantage/turn_spread", "advantage/step_spread"}  # fmt: skip
    for row in metrics:
        assert needed | {f"reward/{t}" for t in train.TERMS} <= set(row)
        assert row["sampler_difference/max"] < 1e-3
        assert row["segmenter_failed"] == 0
        assert row["lam"] == float(train.step_strength(train.load_config(folder / "config.yaml").credit, row["step"]))
    assert "evaluate" in metrics[1]
    # Nothing is compiled twice for the same shapes, and nothing that an earlier step had.
    programs = [json.loads(line) for line in (folder / "programs.jsonl").read_text().splitlines()]
    assert {"encode", "prefill", "decode", "extend", "logprob", "update"} <= {p["program"] for p in programs}
    kinds = [(p["program"], p["shapes"], p.get("length"), p.get("rollouts")) for p in programs]
    assert len(kinds) == len(set(kinds)) <= 20 and all(p["step"] <= 2 for p in programs)
    assert "before" in done.stdout and "after" in done.stdout
    assert "warning" not in done.stderr.lower()


@pytest.mark.slow
def test_twenty_steps_need_no_more_programs_than_four(place):
    done = call(*run(place, "twenty", "steps=20", "evaluate.every=0", "checkpoint.every=20"), timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    programs = [json.loads(line) for line in (place / "twenty" / "programs.jsonl").read_text().splitlines()]
    kinds = [(p["program"], p["shapes"], p.get("length"), p.get("rollouts")) for p in programs]
    assert len(kinds) == len(set(kinds)) <= 20
    assert json.loads((place / "twenty" / "summary.json").read_text())["compilations"] < 200


def test_a_finished_run_says_so(straight, place):
    again = call(*run(place, "straight", "steps=4", *EVERY))
    assert again.returncode == 0 and "finished" in again.stdout


def test_another_config_in_the_same_directory_is_refused(straight, place):
    other = call(*run(place, "straight", "steps=5", *EVERY))
    assert other.returncode == 2 and "steps" in other.stderr and other.stderr.count("\n") == 1


def test_checkpoints_and_exports_are_policies(straight):
    folder, _ = straight
    config, params = train.load_policy(folder / "trained")
    other, restored = train.load_policy(folder / "checkpoints" / "4")
    assert config == other
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(a, b)


def states(folder, *steps):
    """What checkpoints hold: parameters, and the rest of the state."""
    config = dataclasses.replace(train.load_config(folder / "config.yaml"), run_dir=str(folder))
    _, params = train.load_policy(train.resolve_path(config.policy.path), dtype="float32")
    like = train._parts(train.fresh_state(params, config, teacher=True))
    kept = train.Run(config)
    found = [kept.checkpointer().load_checkpointables(step, like) for step in steps]
    kept.close()
    return config, found


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_teacher_is_synced_at_its_interval(straight):
    """credit.sync_interval=3: after step 3 it is the student, after step 4 it is the student of step 3."""
    config, (third, fourth) = states(straight[0], 3, 4)
    assert fourth["rest"]["updates"] == 4 * config.update.minibatches == 8  # METHOD.md 4.6: two updates a step
    assert equal(third["params"], third["rest"]["teacher"]) and equal(third["params"], fourth["rest"]["teacher"])
    assert not equal(fourth["params"], third["params"])


def test_the_mix_of_levels_in_training(place):
    config = train.load_config("experiments/embedded.yaml", [f"data.path={place}/world", "rollout.prompts=2",
                                                             "update.minibatches=1"])  # fmt: skip
    with_repeat = lambda **times: dataclasses.replace(  # noqa: E731
        config, data=dataclasses.replace(config.data, repeat=times)
    )
    samples = data.load_prepared(place / "world", "train")
    levels = [sample.ability for sample in samples]
    assert train.training_pool(samples, config).tolist() == list(range(6))
    some, other = levels[0], next(level for level in levels if level != levels[0])
    pool = train.training_pool(samples, with_repeat(**{some: 3, other: 0})).tolist()
    assert pool == [i for i, level in enumerate(levels) for _ in range({some: 3, other: 0}.get(level, 1))]
    with pytest.raises(train.ConfigError, match="data.repeat.hard=2: no such level in training; it has "):
        train.training_pool(samples, with_repeat(hard=2))
    with pytest.raises(train.ConfigError, match="leaves 0 samples, less than rollout.prompts=2"):
        train.training_pool(samples, with_repeat(**dict.fromkeys(levels, 0)))


def test_hidden_labels_are_found_before_the_first_step(tmp_path):
    """Ref-YouTube-VOS keeps its valid split's to itself."""
    raw = synthetic.write_dataset(
        tmp_path / "raw", train=2, test=1, seed=4, layout="ref_youtube_vos", progress=False
    )
    data.prepare("ref_youtube_vos", raw, tmp_path / "world", progress=False)
    own = ["data.generate_train=0", "data.generate_test=0", "rollout.prompts=2", "update.minibatches=1"]
    own += [f"data.path={tmp_path}/world", "evaluate.split=valid"]
    with pytest.raises(train.ConfigError, match="evaluate.split=valid: its labels are hidden; give a split of "):
        train.open_data(train.load_config("experiments/embedded.yaml", own))
    train.open_data(train.load_config("experiments/embedded.yaml", [*own, "evaluate.every=0"]))


def test_another_world_is_not_taken_for_this_one(place, tmp_path, monkeypatch):
    own = ["data.generate_train=9", "data.generate_test=4", f"data.path={tmp_path}/world"]
    config = train.load_config("experiments/embedded.yaml", own)
    made = train.open_data(config)
    assert [len(split) for split in made] == [9, 4] and [p.name for p in tmp_path.iterdir()] == ["world"]
    on_train = train.load_config("experiments/embedded.yaml", [*own, "evaluate.split=train"])
    assert [len(split) for split in train.open_data(on_train)] == [9, 9]
    grown = train.load_config("experiments/embedded.yaml", [f"data.path={tmp_path}/world", "data.generate_train=12"])
    with pytest.raises(train.ConfigError, match="holds 9 and 4 samples"):
        train.open_data(grown)
    reseeded = train.load_config("experiments/embedded.yaml", [*own, "data.generate_seed=5"])
    with pytest.raises(train.ConfigError, match="holds the world of data.generate_seed=0, not 5; remove that folder"):
        train.open_data(reseeded)
    (tmp_path / "file").touch()
    nowhere = train.load_config("experiments/embedded.yaml", [*own[:2], f"data.path={tmp_path}/file/world"])
    with pytest.raises(train.ConfigError, match="can not be made"):
        train.open_data(nowhere)
    with monkeypatch.context() as earlier:
        earlier.setattr(synthetic, "SAID", ((0.35, 0.4, 0.25), 0.3))
        with pytest.raises(train.ConfigError, match="holds the world as an earlier version drew it"):
            train.open_data(config)
    with pytest.raises(train.ConfigError, match="rollout.prompts=8: the training split has 6 samples"):
        train.open_data(train.load_config("experiments/embedded.yaml", [f"data.path={place}/world"]))


def test_another_dataset_is_read_by_its_own_splits(tmp_path):
    synthetic.write_dataset(tmp_path / "raw", train=8, test=2, seed=1, progress=False, layout="mevis")
    data.prepare("mevis", tmp_path / "raw", tmp_path / "mevis", progress=False)
    given = [f"data.path={tmp_path}/mevis", "data.generate_train=0", "data.generate_test=0"]
    read = lambda *more: train.open_data(train.load_config("experiments/embedded.yaml", [*given, *more]))  # noqa: E731
    taught, tested = read("evaluate.split=valid_u")
    assert (taught.split, tested.split) == ("train", "valid_u") and tested[0].target_ids
    with pytest.raises(data.DataError, match="has no split 'test'; it has .*valid_u"):
        read()


def test_a_disk_that_fails_is_one_line(tmp_path, capfd, monkeypatch):
    def fail(config, run):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    monkeypatch.setattr(train, "train_policy", fail)
    monkeypatch.setattr(train, "cache_programs", lambda: None)
    monkeypatch.setattr(train.Run, "catch_signals", lambda run: None)  # those of pytest stay
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        assert train.main([str(ROOT / "experiments/embedded.yaml"), f"run_dir={tmp_path}/run"]) == 2
        out, err = capfd.readouterr()
        assert len(err.splitlines()) == 1 and os.strerror(number) in err and "goes on from the last checkpoint" in err
    number = errno.ENOENT  # no fault of the machine: what is missing must be seen
    with pytest.raises(FileNotFoundError):
        train.main([str(ROOT / "experiments/embedded.yaml"), f"run_dir={tmp_path}/run"])


def test_steps_without_their_checkpoints_are_not_thrown_away(tmp_path):
    run = train.Run(train.load_config("experiments/embedded.yaml", [f"run_dir={tmp_path}/run", "checkpoint.every=2"]))
    logged = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
    run.write("metrics.jsonl", logged)
    state = train.TrainState(None, None, None, None, None)
    with pytest.raises(train.ConfigError, match="checkpoints: missing, though metrics.jsonl tells of 5 steps"):
        run.restore(state)
    assert run.metrics_file.read_text() == logged
    run.write("metrics.jsonl", logged.splitlines()[0] + "\n")  # killed before the first was there
    assert run.restore(state) is None and run.metrics_file.read_text() == ""
    run.close()


class Doubles(train.Trainer):
    """A trainer whose steps double a weight; in the third one it meets a damaged record, and so do evaluations."""

    def __init__(self, config):
        self.config, self.run, self.clock = config, train.Run(config), train.Clock()
        self.test = [types.SimpleNamespace(privileged={"scene_graph": {"initial_count": 1}})]  # nothing to ask
        self.segmenter, self.user, self.expert = types.SimpleNamespace(start=lambda: None), None, None
        self.state = train.fresh_state({"weight": jnp.ones((2, 3))}, config, teacher=False)

    def step(self):
        if int(self.state.step) == 2:
            raise data.DataError("record 7 is damaged")
        doubled = {"weight": self.state.params["weight"] * 2}
        self.state = self.state.replace(step=self.state.step + 1, params=doubled)
        told = dict.fromkeys(("reward", "success", "questions_ambiguous"), 1.0)
        return {"step": int(self.state.step), "seconds": {}, **told}

    def evaluate(self, name=None):
        if name is None:
            raise data.DataError("record 8 is damaged")
        return {}


@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_a_record_that_fails_later_loses_no_step(tmp_path, where):
    """Two steps went well, the third or the evaluation before it meets a damaged record: the state after the second is
    kept, and its row."""
    every = 2 if where == "evaluation" else 0
    given = [f"run_dir={tmp_path}/run", f"evaluate.every={every}", "checkpoint.every=0"]
    config = train.load_config("experiments/embedded.yaml", given)
    trainer = Doubles(config)
    with pytest.raises(data.DataError):
        train.train_on(trainer, time.perf_counter(), {})
    trainer.run.close()
    again = Doubles(config)
    restored = again.run.restore(again.state)
    again.run.close()
    assert int(restored.step) == 2 and (restored.params["weight"] == 4).all()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    mended = Doubles(config)  # the evaluation that failed is made up for
    mended.evaluate = lambda name=None: {"success": 1.0}
    with pytest.raises(data.DataError, match="record 7"):
        train.train_on(mended, time.perf_counter(), {})
    mended.run.close()
    made_up = [row.get("evaluate") for row in rows(tmp_path / "run")]
    assert made_up == [None, {"success": 1.0} if where == "evaluation" else None]
    (tmp_path / "run" / "metrics.jsonl").unlink()  # as on a machine that has nothing but a checkpoint from a bucket
    alone = Doubles(config)
    with pytest.raises(data.DataError, match="record 7"):
        train.train_on(alone, time.perf_counter(), {})
    alone.run.close()


def test_who_stops_a_run_waits_for_no_evaluation(tmp_path):
    """The step in which SIGTERM comes is saved at once; its evaluation is made up for by the next start."""

    class Stopped(Doubles):
        def step(self):
            row = super().step()
            self.run.stop = row["step"] == 2
            return row

    given = [f"run_dir={tmp_path}/run", "evaluate.every=2", "checkpoint.every=0"]
    config = train.load_config("experiments/embedded.yaml", given)
    stopped = Stopped(config)
    train.train_on(stopped, time.perf_counter(), {"seconds": 0.0})  # an evaluation would raise
    stopped.run.close()
    assert [row.get("evaluate") for row in rows(tmp_path / "run")] == [None, None]
    again = Doubles(config)
    again.evaluate = lambda name=None: {"success": 1.0}
    with pytest.raises(data.DataError, match="record 7"):
        train.train_on(again, time.perf_counter(), {})
    again.run.close()
    assert [row.get("evaluate") for row in rows(tmp_path / "run")] == [None, {"success": 1.0}]


def large_run(tmp_path):
    """A run, and a state of 32 MB."""
    run = train.Run(train.load_config("experiments/embedded.yaml", [f"run_dir={tmp_path}/run"]))
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((2**12, 2**9), np.float32))
    return run, train.fresh_state({"weight": weight}, run.config, teacher=True)


def test_every_checkpoint_is_written_however_slow_the_disk(tmp_path):
    """One that comes while the one before is being written waits for it."""
    run, state = large_run(tmp_path)
    (tmp_path / "run/checkpoints/7.orbax-checkpoint-tmp").mkdir(parents=True)  # of a killed run
    for step in (1, 2, 3):
        run.save(state, step)
    run.close()
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir() if f.is_dir()) == ["2", "3"]


def test_a_checkpoint_that_does_not_fit_is_said_and_the_next_is_tried(tmp_path, capfd):
    """A limit on the size of files stands for a full disk."""
    run, state = large_run(tmp_path)
    run.save(state, 1)
    run.settle()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        run.save(state, 2)
        run.settle()
        assert "run/checkpoints: the last one was not written (" in capfd.readouterr().err
        run.save(state, 3)
        with pytest.raises(train.ConfigError, match="was not written .*; make room, and the same command goes on"):
            run.settle(last=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.save(state, 4)
    run.settle(last=True)
    run.close()
    again = train.Run(run.config)
    assert int(again.restore(state).step) == 0 and again.checkpointer().latest.step == 4
    again.close()


def test_a_failed_start_binds_nobody(tmp_path):
    first = train.load_config("experiments/embedded.yaml", ["seed=3", f"run_dir={tmp_path}/run"])
    train.Run(first).close()
    again = train.load_config("experiments/embedded.yaml", ["seed=4", f"run_dir={tmp_path}/run"])
    kept = train.Run(again)
    kept.log({"step": 1})
    kept.close()
    with pytest.raises(train.ConfigError, match="seed .4 -> 3"):
        train.Run(first)
    # A key that is younger than the run stands at its default.
    file = tmp_path / "run" / "config.yaml"
    old = yaml.safe_load(file.read_text())
    del old["update"]["weight_decay"], old["credit"]["lam"]
    file.write_text(yaml.safe_dump(old))
    with pytest.raises(train.ConfigError, match=r"belongs to another config: update.weight_decay \(0.01 -> 0.0\);"):
        train.Run(again)


def test_a_run_goes_on_where_its_machine_and_servers_are_now(tmp_path):
    """Not what it computes: where."""
    there = ["simulator.kind=endpoint", "simulator.model=m", "simulator.url=http://one/v1"]
    given = [*there, f"run_dir={tmp_path}/run"]
    kept = train.Run(train.load_config("experiments/embedded.yaml", given))
    kept.log({"step": 1})
    kept.close()
    moved = ["simulator.url=http://two/v1", "simulator.timeout=99", "mesh.fsdp=2", "checkpoint.every=7",
             "profile.steps=3..4", "sidecar.address=tcp://127.0.0.1:5555", "update.micro_prompts=2"]  # fmt: skip
    train.Run(train.load_config("experiments/embedded.yaml", [*given, *moved])).close()
    now = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert now["simulator"]["url"] == "http://two/v1" and now["mesh"]["fsdp"] == 2
    for change in ("simulator.model=n", "simulator.description=true", "credit.lam=0.1", "policy.dtype=bfloat16"):
        with pytest.raises(train.ConfigError, match=change.split("=")[0]):
            train.Run(train.load_config("experiments/embedded.yaml", [*given, *moved, change]))


def test_a_run_does_not_go_on_with_other_prompts(tmp_path):
    """The summary of an unfinished run says how its models were asked."""
    config = train.load_config("experiments/embedded.yaml", [f"run_dir={tmp_path}/run", "evaluate.every=0"])
    run = train.Run(config)
    run.log({"step": 1})
    run.summarise(models={"expert": {"prompt_hash": "other"}})
    again = object.__new__(train.Trainer)
    again.config, again.run, again.state = config, run, train.fresh_state({"w": jnp.ones(2)}, config, teacher=False)
    again.models = lambda: {"expert": {"prompt_hash": "today's"}}
    try:
        with pytest.raises(train.ConfigError, match="expert was asked with prompts other, today's are today's"):
            train.train_on(again, time.perf_counter(), {})
    finally:
        run.close()


def test_ctrl_c_asks_and_a_second_one_insists(tmp_path):
    run = train.Run(train.load_config("experiments/embedded.yaml", [f"run_dir={tmp_path}/run"]))
    was = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run.catch_signals()
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)
        run.close()


def wait_for_rows(folder, count, process, limit=1800):
    end = time.monotonic() + limit
    while time.monotonic() < end:
        file = folder / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.05)
    raise AssertionError(f"no {count} rows after {limit} s")


def kill_and_resume(folder, arguments, env=None):
    """kill -9 after the second row, then the same command again."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env
    )
    wait_for_rows(folder, 2, process)
    process.kill()
    process.communicate()
    resumed = call(*arguments, env=env, timeout=1800)
    assert resumed.returncode == 0, resumed.stderr[-2000:]


def test_kill_and_resume_repeat_an_uninterrupted_run(place, straight):
    """The same rows, bit for bit apart from times."""
    kill_and_resume(place / "killed", run(place, "killed", "steps=4", "checkpoint.every=1", "evaluate.every=0"))
    # Evaluations in between, which only the uninterrupted run had, leave no trace in the training either.
    whole = [{k: v for k, v in row.items() if k != "evaluate"} for row in rows(straight[0])]
    assert rows(place / "killed") == whole
    assert equal(states(place / "killed", 4)[1], states(straight[0], 4)[1])  # teacher and optimiser too


@pytest.mark.slow
def test_the_demo_goes_on_after_a_kill(tmp_path):
    """At its real sizes, on two devices of the CPU as `make demo` has it."""
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    more = ["steps=4", "checkpoint.every=1", "evaluate.every=0", f"data.path={tmp_path}/world"]
    given = {name: ["experiments/embedded.yaml", *more, f"run_dir={tmp_path}/{name}"] for name in ("whole", "killed")}
    assert call(*given["whole"], env=env, timeout=1800).returncode == 0
    kill_and_resume(tmp_path / "killed", given["killed"], env)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def test_terminate_saves_first_and_a_dead_segmenter_does_not_stop_training(place):
    more = ("steps=40", "checkpoint.every=0", "evaluate.every=0")
    process = subprocess.Popen(
        command(*run(place, "ended", *more)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rows(place / "ended", 1, process)
    second = call(*run(place, "ended", *more))
    assert second.returncode == 2 and "another run" in second.stderr
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    wait_for_rows(place / "ended", 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    assert "stopped after step" in out
    steps = [row["step"] for row in rows(place / "ended")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 3
    assert (place / "ended" / "checkpoints" / str(steps[-1])).is_dir()


@pytest.mark.slow
def test_the_warm_start_learns_from_random_weights(place):
    shape = json.loads((ROOT / "experiments/embedded_shape.json").read_text())
    shape["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    shape["text_config"] |= {"num_attention_heads": 2, "rope_scaling": {"mrope_section": [4, 2, 2]}}
    shape["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 2}
    (place / "shape.json").write_text(json.dumps(shape))
    small = ["steps=8", "warmstart.scenes=4", "warmstart.warmup=1"]
    small += ["warmstart.learning_rate=0.01", f"policy.shape={place}/shape.json", f"run_dir={place}/sft"]
    done = call("experiments/embedded_warmstart.yaml", *small)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [row["loss"] for row in rows(place / "sft")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    config, params = train.load_policy(place / "sft" / "trained")
    assert config.hidden_size == 32 and params["embedding"].shape == (config.vocab_size, 32)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """Conversations with a mask at their end, and without one, and wordings that choose a mask."""
    folder = tmp_path_factory.mktemp("talks")
    for name in ("prist", "llava", "r2sm"):
        synthetic.write_dataset(folder / f"{name}.raw", train=4, test=2, seed=5, layout=name, progress=False)
        data.prepare(name, folder / f"{name}.raw", folder / name, progress=False)
    return folder


@pytest.mark.slow
def test_given_conversations_are_taught(place, talks):
    """The real command: MIRAS's mix, from the shipped base; killed runs resume as any other."""
    arguments = ["experiments/embedded_conversations.yaml", "steps=2", "warmstart.scenes=2", f"run_dir={place}/talk",
                 f"warmstart.mix=[{talks}/prist, {talks}/llava, {talks}/r2sm]"]  # fmt: skip
    done = call(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    told = rows(place / "talk")
    assert len(told) == 2 and all(row["loss"] > 0 and row["tokens"] > 20 and row["patch_words"] == 0 for row in told)
    assert (place / "talk" / "trained" / "config.json").exists()


def test_a_lesson_teaches_the_answers_and_then_the_place(talks, capsys):
    config = train.load_config("experiments/embedded_conversations.yaml",
                               [f"warmstart.mix=[{talks}/prist, {talks}/llava, {talks}/r2sm]"])
    source = train.resolve_path(config.policy.path)
    tokenizer = train.weights.Tokenizer(source)
    policy_config = train.PolicyConfig.from_json(json.loads((source / "config.json").read_text()))
    teacher = train.ConversationLessons(config, train.Speaker(config.protocol, policy_config, tokenizer))
    for sample in teacher.sets[0]:
        prompt, row, picture = teacher.lesson(sample)
        talk = data.conversation(sample, [0])
        taught = tokenizer.decode([t for t, ok in zip(row.tokens, row.trained, strict=True) if ok])
        given = tokenizer.decode([t for t, ok in zip(row.tokens, row.trained, strict=True) if not ok])
        said, place = taught.split("<thinking>", 1)
        assert said.split("<|im_end|>")[:-1] == [answer for _, answer in talk.rounds] and "[SEG]" not in taught
        assert given.count("<|im_start|>user") == len(talk.rounds) + 1  # what follows, and the picture again
        assert all(human in given for human, _ in talk.rounds[1:]) and talk.query in given
        assert talk.rounds[0][0] in tokenizer.decode(prompt.row.tokens)
        answer = train.parse_action(place)
        assert answer.kind == "keyframe" and answer.frame == 0 and picture.shape == (*sample.size, 3)
        answer = train.parse_action(place[place.index("<answer>"):])
        assert np.abs(np.array(answer.box) - talk.box).max() <= train.COORDINATE_STEP
    for sample in teacher.sets[1]:
        _, row, picture = teacher.lesson(sample)
        taught = tokenizer.decode([t for t, ok in zip(row.tokens, row.trained, strict=True) if ok])
        assert picture is None and "<keyframe>" not in taught and taught.endswith(sample.meta["answer"] + "<|im_end|>")
    for sample in teacher.sets[2]:
        _, row, _ = teacher.lesson(sample)
        taught = tokenizer.decode([t for t, ok in zip(row.tokens, row.trained, strict=True) if ok])
        assert train.parse_action(taught[taught.index("<answer>"):].removesuffix("<|im_end|>")
                                  ).mask_type == sample.mask_type and sample.query in taught
    good, other = list(teacher.sets[0])[:2]
    dialogue = [{**good.dialogue[0], "text": "the cross " * 300}, *good.dialogue[1:]]
    long = dataclasses.replace(good, dialogue=dialogue)
    assert teacher.fitting([other, long], 1)[0].sample.id == other.id
    said = capsys.readouterr().err
    assert said.startswith("left out: protocol.prompt_tokens=") and long.id in said
    with pytest.raises(train.PromptTooLong, match=long.id):
        teacher.fitting([long], 0)
    assert not capsys.readouterr().err  # said once
    first, words = teacher.batch(3)
    assert first.rows.trained.any() and (words == -1).all()
    np.testing.assert_array_equal(first.rows.tokens, teacher.batch(3)[0].rows.tokens)


@pytest.mark.slow
def test_supervised_steps_keep_a_frozen_tower_and_add_up_micro_batches():
    """As in reinforcement learning: scenes one by one have the gradient of all at once."""
    states = {}
    shape = ["policy.path=asset:embedded_base", "policy.shape=null", "warmstart.scenes=4", "update.weight_decay=0.1"]
    kinds = {"whole": [], "parts": ["update.micro_prompts=1"], "frozen": ["policy.freeze_vision=true"]}
    for name, changes in kinds.items():
        config = train.load_config("experiments/embedded_warmstart.yaml", [*shape, *changes])
        mesh = train.make_mesh(config.mesh)
        policy_config, params = train.load_policy(config.policy.path, mesh, dtype="float32")
        before = jax.device_get(params)
        speaker = train.Speaker(config.protocol, policy_config, train.load_tokenizer(
            train.resolve_path(config.policy.path), policy_config))  # fmt: skip
        teacher = train.SceneLessons(config, speaker)
        step = train.make_warmstart_step(train.Policy(policy_config), config, teacher)
        batch, words = teacher.batch(0)
        spread = train.coordinate_spread(speaker.tokenizer, policy_config.vocab_size, 1.0)
        state, stats = step(train.fresh_state(params, config, teacher=False), batch, words, spread, 0.01, 0.5)
        states[name] = {k: float(v) for k, v in stats.items()}, jax.device_get(state.params), before
    (whole, moved, before), (parts, _, _), (_, frozen, _) = states.values()
    assert parts == pytest.approx(whole, rel=1e-4) and whole["patch_words"] > 0
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))  # noqa: E731
    assert same(frozen["vision"], before["vision"]) and not same(moved["vision"], before["vision"])
    assert not same(frozen["layers"], before["layers"])


def test_weights_are_read_with_their_own_words(tmp_path):
    """The tokenizer of a run's checkpoint: the run's own, or that of the policy that it began with."""
    checkpoint = tmp_path / "run" / "checkpoints" / "3"
    checkpoint.mkdir(parents=True)
    assert train.tokenizer_source(checkpoint) == checkpoint  # none: the error names this place
    (tmp_path / "run" / "config.yaml").write_text("policy: {path: 'asset:embedded_base'}")
    for place in (checkpoint, tmp_path / "run"):
        assert train.tokenizer_source(place) == train.resolve_path("asset:embedded_base")
    for own in (tmp_path / "run" / "policy", tmp_path / "run"):  # of a warm start, of an imported one
        own.mkdir(exist_ok=True)
        (own / "tokenizer.json").write_text("{}")
        assert train.tokenizer_source(checkpoint) == train.tokenizer_source(tmp_path / "run") == own


def test_practice_gives_the_first_list_and_trains_what_follows():
    config = train.load_config("experiments/embedded_warmstart.yaml", ["policy.path=asset:embedded_base"])
    source = train.resolve_path(config.policy.path)
    tokenizer = train.weights.Tokenizer(source)
    policy_config = train.PolicyConfig.from_json(json.loads((source / "config.json").read_text()))
    teacher = train.SceneLessons(config, train.Speaker(config.protocol, policy_config, tokenizer))
    rows = [row for scene in range(8) for row in teacher.scene(scene)[1][config.warmstart.rows :]]
    assert len(rows) == 8 and all(rows)
    whole = []
    for row in rows:
        assert sum(map(len, row)) <= config.warmstart.row_tokens
        for segment in row:
            first = segment.trained.index(True)
            given = tokenizer.decode(segment.tokens[:first])
            taught = tokenizer.decode([t for t, ok in zip(segment.tokens, segment.trained, strict=True) if ok])
            assert re.search(r"<thinking>\n\d+( [a-z]+){5}$", given)
            verdicts = re.match(r"(\n| color| shape| size| motion)*( ;)?", taught)  # of the first list: fits, or not
            rest = taught[verdicts.end() :]
            whole.append(bool(rest))
            read = re.fullmatch(r"(?: differ.*;)? one left(\n\d+(?: [a-z]+){5})", rest, re.DOTALL)
            assert read or not rest
            if read:  # what the answer names is the line before that nothing speaks against
                lists = re.findall(r"<thinking>(\n.*?) ; ", tokenizer.decode(segment.tokens), re.DOTALL)
                (left,) = re.findall(r"(?m)^\d+(?: [a-z]+){5}$", lists[-1])
                assert read[1] == f"\n{left}"
            assert not re.search("</thinking>|<call>|<information>", taught)
    assert 0.2 < np.mean(whole) < 0.7


def scene_lessons(*changes):
    config = train.load_config("experiments/embedded_warmstart.yaml", ["policy.path=asset:embedded_base", *changes])
    source = train.resolve_path(config.policy.path)
    policy_config = train.PolicyConfig.from_json(json.loads((source / "config.json").read_text()))
    return train.SceneLessons(
        config, train.Speaker(config.protocol, policy_config, train.weights.Tokenizer(source))
    )


def test_scenes_of_any_config_are_lessons_or_one_line():
    few = ["warmstart.scenes=1", "warmstart.rows=1", "warmstart.practice=0", "warmstart.dialogues_start=0"]
    shares = ["warmstart.conversations=0.8", "warmstart.mask_types=0.2"]  # 1 - 0.8 - 0.2 is below 0
    scene_lessons(*few, *shares).scene(0)
    frames = scene_lessons(*few, "protocol.frames=16", "protocol.prompt_tokens=800")  # of a scene that has 12
    for index in range(8):
        frames.scene(index)
    assert frames.batch(0)[0].frames.patches.shape[0] == 16
    with pytest.raises(train.PromptTooLong, match="protocol.prompt_tokens=192: the prompt of a scene has 2"):
        scene_lessons(*few, "protocol.frames=6").batch(0)


def test_the_first_share_of_a_warm_start_is_practice_alone():
    own = ["policy.path=asset:embedded_base", "steps=10", "warmstart.scenes=2", "warmstart.reading=0.2"]
    config = train.load_config("experiments/embedded_warmstart.yaml", own)
    source = train.resolve_path(config.policy.path)
    tokenizer = train.weights.Tokenizer(source)
    policy_config = train.PolicyConfig.from_json(json.loads((source / "config.json").read_text()))
    teacher = train.SceneLessons(config, train.Speaker(config.protocol, policy_config, tokenizer))

    def given(segment):
        return tokenizer.decode(segment.tokens[: segment.trained.index(True)])

    seen = [row for index in range(8) for row in teacher.scene(index)[1][: config.warmstart.rows]]
    practised = [all(re.search(r"<thinking>\n\d+( [a-z]+){5}$", given(s)) for s in row) for row in seen]
    assert all(practised[: 4 * config.warmstart.rows]) and not any(practised[4 * config.warmstart.rows :])
    assert all(seen[: 4 * config.warmstart.rows])


def test_random_parameters_start_with_keys_like_queries_and_words_apart():
    queries = np.random.default_rng(0).normal(size=(2, 6, 8, 4)).astype(np.float32)
    given = {"layers": {"q": queries, "k": np.zeros((2, 6, 2, 4), np.float32), "v": queries}, "embedding": queries[0]}
    made = train.comparing(given)
    np.testing.assert_array_equal(made["layers"]["k"], queries[:, :, [0, 4]])
    np.testing.assert_array_equal(made["embedding"], 10 * queries[0])
    assert made["layers"]["q"] is queries and made["layers"]["v"] is queries


def test_learning_rate_rises_stays_and_falls():
    section = train.UpdateSection(learning_rate=1.0, warmup=4, decay=0.5)
    rates = [train.learning_rate(section, step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and set(rates[4:11]) == {1.0}
    np.testing.assert_allclose(rates[10:], np.arange(10, 0, -1) / 10)
    assert train.learning_rate(train.UpdateSection(learning_rate=1.0), 20, 20) == 1.0  # the paper's does not fall


# Bad input: one clear line each, exit code 2, nothing lost


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["experiments/none.yaml"], "no such config"),
        (["experiments/embedded.yaml", "stepz=4"], "closest is steps"),
        (["experiments/embedded_conversations.yaml", "warmstart.rates=[1]"], "for each of the 3 folders"),
        (["experiments/embedded.yaml", "rollout.rolouts=4"], "closest is rollout.rollouts"),
        (["experiments/embedded.yaml", "steps=many"], "steps"),
        (["experiments/embedded.yaml", "steps"], "key=value"),
        (["experiments/embedded.yaml", "rollout=3"], "section"),
        (["experiments/embedded.yaml", "rollout.rollouts=1"], "2 or more"),
        (["experiments/embedded.yaml", "update.minibatches=3"], "must divide rollout.prompts=8"),
        (["experiments/embedded.yaml", "update.decay=2"], "from 0 to 1"),
        (["experiments/qwen3vl_4b.yaml", "stage=sft", "warmstart.mix=[a]", "warmstart.rates=[1]"], "policy.shape="),
        (["experiments/embedded_warmstart.yaml", "warmstart.reading=2"], "warmstart.reading=2.0: a share of the run"),
        (["experiments/embedded.yaml", "steps=[a"], "not YAML"),
        (["experiments/embedded.yaml", "update.minibatches=0"], "update.minibatches=0: use 1 or more"),
        (["experiments/embedded.yaml", "update.micro_prompts=3"], "one of 1, 2, 4"),
        (["experiments/embedded.yaml", "rollout.refills=-1"], "0 or more"),
        (["experiments/embedded.yaml", "rollout.prompts=0"], "rollout.prompts=0"),
        (["experiments/embedded.yaml", "seed=-1"], "seed=-1"),
        (["experiments/embedded.yaml", "seed=3000000000"], "below 2147483648"),
        (["experiments/embedded_warmstart.yaml", "warmstart.conversations=-0.1"], "conversations=-0.1: use a share"),
        (["experiments/embedded_warmstart.yaml", "warmstart.decay=-1"], "warmstart.decay=-1.0: use a share"),
        (["experiments/embedded_warmstart.yaml", "warmstart.patch_words=.nan"], "warmstart.patch_words=nan"),
        (["experiments/embedded.yaml", "update.token_buckets=[]"], "at least one size"),
        (["experiments/embedded.yaml", "update.row_buckets=[0]"], "use 1 or more"),
        (["experiments/embedded.yaml", "update.row_buckets=[4]", "policy.attention=splash"], "policy.attention=xla"),
        (["experiments/embedded.yaml", "update.clip_high=-1"], "update.clip_high=-1"),
        (["experiments/embedded.yaml", "reward.weights.box=.nan"], "reward.weights.box"),
        (["experiments/embedded.yaml", "reward.success=5"], "share of the maximum"),
        (["experiments/embedded.yaml", "credit.turn_credit=local", "reward.process=format"], "reduction, ratio or log"),
        (["experiments/embedded.yaml", "simulator.flip=2"], "from 0 to 1"),
        (["experiments/embedded.yaml", "evaluate.max_turns=9"], "1 to protocol.max_turns=6"),
        (["experiments/embedded.yaml", "sidecar.prompting=both"], "joint, sequential"),
        (["experiments/embedded.yaml", "sidecar.cache_gb=-1"], "sidecar.cache_gb=-1"),
        (["experiments/embedded.yaml", "mesh.fsdp=0"], "mesh.fsdp=0"),
        (["experiments/embedded.yaml", "profile.steps=5..3"], "first..last"),
        (["experiments/embedded.yaml", "profile.steps=3"], "first..last"),
        (["experiments/embedded.yaml", "sidecar.address=tcp://there", "run_dir={tmp}/e"], "sidecar.address=tcp"),
        (["experiments/embedded.yaml", "update.loss=ppo"], "rlsd, vanilla, sdpo"),
        (["experiments/embedded.yaml", "update.loss=sdpo", "credit.teacher_context=none"], "use guidance"),
        (["experiments/embedded.yaml", "credit.turn_credit=turns"], "scalar, local"),
        (["experiments/embedded.yaml", "credit.teacher_update=copy"], "sync, ema"),
        (["experiments/embedded.yaml", "credit.delta_baseline=plain"], "teacher_plain"),
        (["experiments/embedded.yaml", "reward.process=gain"], "parent_tpr"),
        (["experiments/embedded.yaml", "credit.lam=1.5"], "0 to 1"),
        (["experiments/embedded.yaml", "credit.lam=-0.1"], "credit.lam=-0.1"),
        (["experiments/embedded.yaml", "credit.teacher_context=x"], "solution_else_guidance"),
        (["experiments/embedded.yaml", "credit.weigh=some"], "all, questions"),
        (["experiments/embedded.yaml", "credit.turn_weight=.inf"], "credit.turn_weight=inf"),
        (["experiments/embedded.yaml", "reward.no_question=one"], "zero, format"),
        (["experiments/embedded.yaml", "protocol.keyframe=best"], "last, first"),
        (["experiments/embedded.yaml", "protocol.clarify=[simpel]"], "closest is simple"),
        (["experiments/embedded.yaml", "data.repeat.clear=-1"], "data.repeat.clear=-1: use 0"),
        (["experiments/embedded.yaml", "update.beta2=1"], "update.beta2=1"),
        (["experiments/embedded.yaml", "reward.process=best"], "reduction"),
        (["experiments/embedded.yaml", "reward.weights.looks=1"], "known terms"),
        (["experiments/embedded.yaml", "run_dir=/proc/none"], "run_dir"),
        (["experiments/embedded.yaml", "mesh.fsdp=3", "run_dir={tmp}/a"], "devices"),
        (["experiments/embedded.yaml", "policy.path={tmp}/none", "run_dir={tmp}/b"], "no such directory"),
        (
            ["experiments/embedded.yaml", "data.path={tmp}/none", "data.generate_train=0", "run_dir={tmp}/c"],
            "{tmp}/none",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, says, tmp_path, capfd):
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    arguments[0] = str(ROOT / arguments[0])
    assert train.main(arguments) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(err) == 1 and says.replace("{tmp}", str(tmp_path)) in err[0]


@pytest.mark.parametrize(
    ("loss", "rate", "high", "teacher"),
    [("rlsd", 1e-6, 0.2, "sync"), ("vanilla", 1e-6, 0.28, "sync"), ("sdpo", 1e-5, 0.2, "ema")],
)
def test_a_loss_brings_its_own_defaults(tmp_path, loss, rate, high, teacher):
    """METHOD.md 4.6, 4.10, 5.1; what is given wins."""
    file = tmp_path / "own.yaml"
    file.write_text(f"update: {{loss: {loss}}}\n")
    c = train.load_config(file)
    assert (c.update.learning_rate, c.update.clip_high, c.credit.teacher_update) == (rate, high, teacher)
    given = ["update.learning_rate=0.5", "update.clip_high=0.3", "credit.teacher_update=ema"]
    c = train.load_config(file, given)
    assert (c.update.learning_rate, c.update.clip_high, c.credit.teacher_update) == (0.5, 0.3, "ema")


def test_damaged_records_and_checkpoints_are_named(place, straight):
    damaged = place / "damaged"
    subprocess.run(["cp", "-r", place / "world", damaged], check=True)
    for record in damaged.rglob("*array_record*"):
        record.write_bytes(record.read_bytes()[:100])
    done = call("experiments/embedded.yaml", f"data.path={damaged}", f"run_dir={place}/d1", *TINY)
    assert done.returncode == 2 and str(damaged) in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["cp", "-r", straight[0], place / "d2"], check=True)
    (place / "d2" / "summary.json").unlink()
    for file in (place / "d2" / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    broken = call(*run(place, "d2", "steps=4", *EVERY))
    assert broken.returncode == 2 and "checkpoints" in broken.stderr and "Traceback" not in broken.stderr
    assert len(rows(place / "d2")) == 4  # nothing was lost by trying


def test_every_experiment_loads():
    for file in sorted((ROOT / "experiments").glob("*.yaml")):
        if "sam2" in file.name or "world" in file.name:
            continue
        config = train.load_config(file)
        assert yaml.safe_load(file.read_text())["name"] == config.name


def checkpoints_of_text(run: Path, *steps: int) -> None:
    (run / "config.yaml").write_text("name: a\n")
    for step in steps:
        (run / "checkpoints" / str(step) / "inner").mkdir(parents=True)
        (run / "checkpoints" / str(step) / "inner" / "data").write_text(f"of {step}")


def test_checkpoints_are_copied_to_a_bucket_and_brought_back(tmp_path):
    """fsspec's in-memory file system stands for a bucket."""
    checkpoints_of_text(tmp_path, 1, 2, 3)
    bucket = train.Bucket("memory://runs/a", keep=2)
    assert bucket.config() == b""
    bucket.copy(tmp_path, [1, 2])
    bucket.copy(tmp_path, [1, 2, 3])
    bucket.close()
    assert bucket._steps() == [2, 3] and bucket.config() == b"name: a\n"
    bucket.files.pipe_file(f"{bucket.root}/1/inner/data", b"its marker went before a kill")
    bucket._copy(tmp_path, [2, 3])
    assert bucket._steps("") == [2, 3]
    bucket.files.pipe_file(f"{bucket.root}/4/inner/data", b"cut short")  # without its marker it is none
    fresh = tmp_path / "elsewhere"
    (fresh / ".2.part").mkdir(parents=True)  # of a killed run
    train.Bucket("memory://runs/a", keep=2).fetch(fresh)
    assert [f.name for f in fresh.iterdir()] == ["3"] and (fresh / "3/inner/data").read_text() == "of 3"
    (fresh / "5").mkdir()
    train.Bucket("memory://runs/a", keep=2).fetch(fresh)  # what is here is later
    assert sorted(f.name for f in fresh.iterdir()) == ["3", "5"]


def test_a_run_goes_on_from_its_bucket_on_a_machine_that_has_nothing_of_it(tmp_path, monkeypatch, capfd):
    """A bucket so slow that a checkpoint would go while it is copied; one that fails at the end; another config's."""
    given = ["checkpoint.bucket=memory://runs/c", "checkpoint.keep=1"]
    config = lambda name, *more: train.load_config(  # noqa: E731
        "experiments/embedded.yaml", [*given, *more, f"run_dir={tmp_path}/{name}"]
    )
    run = train.Run(config("first"))
    state = train.fresh_state({"weight": jnp.arange(12.0).reshape(3, 4)}, run.config, teacher=True)
    put = run._bucket.files.put
    monkeypatch.setattr(run._bucket.files, "put", lambda *a, **k: (time.sleep(0.3), put(*a, **k)))
    for step in range(1, 5):
        state = state.replace(params={"weight": state.params["weight"] + 1}, step=jnp.asarray(step))
        run.save(state, step)
    monkeypatch.setattr(run._bucket.files, "put", lambda *a, **k: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(train.ConfigError, match="runs/c: a checkpoint was not copied .gone.; the same command tries"):
        run.settle(last=True)
    assert run._bucket._steps() == [3]  # each before the last was copied
    monkeypatch.setattr(run._bucket.files, "put", put)
    run.settle(last=True)
    run.close()
    assert capfd.readouterr().err.count("\n") == 1 and run._bucket._steps() == [4]
    with pytest.raises(train.ConfigError, match=r"bucket=memory://runs/c belongs to another config: seed \(0 -> 3\)"):
        train.Run(config("other", "seed=3"))
    again = train.Run(config("elsewhere"))
    blank = jax.tree.map(jnp.zeros_like, state)
    restored = again.restore(blank)
    again.close()
    for kept, had in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert np.array_equal(kept, had)


def test_a_bucket_that_can_not_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for url in (f"{tmp_path}/file/bucket", "nosuch://bucket"):
        with pytest.raises(train.ConfigError, match="checkpoint.bucket=.*can not be written"):
            train.Bucket(url, keep=2)


def test_a_failed_copy_is_said_and_tried_again(tmp_path, monkeypatch, capfd):
    checkpoints_of_text(tmp_path, 1)
    bucket = train.Bucket("memory://runs/b", keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(bucket.files, "put", lambda *a, **k: (_ for _ in ()).throw(OSError("gone")))
        bucket._copy(tmp_path, [1])
    assert "runs/b: a checkpoint was not copied (gone)" in capfd.readouterr().err and bucket._steps() == []
    bucket.copy(tmp_path, [1])
    assert bucket.wait() == ""
    assert bucket._steps() == [1]
    with monkeypatch.context() as patch:
        patch.setattr(bucket.files, "ls", lambda *a, **k: (_ for _ in ()).throw(OSError("no right to list")))
        with pytest.raises(train.ConfigError, match="memory://runs/b: can not be read .no right to list"):
            bucket.fetch(tmp_path / "elsewhere")
    bucket.close()
