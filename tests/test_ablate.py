"""The ablation runner: which rows ship, what it refuses, the table it writes, and (slow) that every row runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_simulator import GOOD, server  # noqa: F401 - a fixture
from test_simulator import models as listed

from icseg_jax import ablate, simulator, train

ROWS = sorted(Path("experiments/ablations").glob("*/*.yaml"))
TINY = ["rollout.prompts=2", "rollout.rollouts=2", "data.generate_train=6", "data.generate_test=6", "evaluate.clips=2",
        "evaluate.prompts=6", "evaluate.gallery=2"]  # fmt: skip


def test_every_row_of_the_paper_ships():
    """METHOD.md section 7, as far as it is about training: one short file per row, each saying what it is."""
    shipped = {folder: {p.stem for p in ROWS if p.parent.name == folder} for folder in {p.parent.name for p in ROWS}}
    at_test = {f"turns_{k}_at_test" for k in range(1, 6)}  # 6 is the default
    assert shipped == {
        "levels": {"full", "grpo", "no_trajectory", "no_turn", "no_step", "turn_local"},
        "losses": {"rlsd", "vanilla", "normalised", "sdpo"}
        | {f"sdpo_{kind}" for kind in ("solution", "both", "solution_else_guidance")},
        "contexts": set(train.CONTEXTS),
        "teacher": {"sync_1", "sync_10", "sync_20", "ema", "plain_baseline", "failures_only", "mean_one"},
        "strength": {"default", "lam_0", "lam_025", "lam_1", "clip_01", "clip_04"}
        | {"decay_50", "decay_100", "decay_never"},
        "process": {*train.TURN_KINDS, "weight_0", "weight_05", "weight_1"}
        | {f"turn_weight_{weight}" for weight in ("0", "05", "1", "2")},
        "groups": {"rollouts_4", "rollouts_8", "rollouts_16"},
        "turns": {*(f"turns_{k}" for k in range(1, 7)), *at_test},
        "asking": {"always", "ambiguous_only", "never", "no_tool_at_test", "described_at_test"},
        "frames": {"keyframe_small", "frames_2", "sam_sequential"},
        "models": {"user", "user_described", "expert"},
        "user": {"exact", "flip_10", "flip_30", "refuse_20", "flip_30_at_test", "flip_30_in_training"},
    }
    for row in ROWS:
        assert len(row.read_text().splitlines()) <= 12 and row.read_text().startswith("# "), row
        train.load_config(row)


@pytest.mark.parametrize("folder", sorted({p.parent for p in ROWS}), ids=lambda p: p.name)
def test_rows_of_a_folder_differ(folder):
    """No two rows are the same run under two names (the reference rows of a folder may repeat the default)."""
    configs = [train.load_config(p) for p in sorted(folder.glob("*.yaml"))]
    told = [repr(dataclasses.replace(c, name="")) for c in configs]
    assert len(set(told)) == len(told)


def test_what_the_levels_switch_off():
    read = lambda name: train.load_config(f"experiments/ablations/levels/{name}.yaml")  # noqa: E731
    assert train.needs_teacher(read("full")) and not train.needs_teacher(read("no_step"))
    assert not train.needs_teacher(read("grpo")) and read("grpo").reward.process == "format"
    assert [t for t, w in read("no_trajectory").reward.weights.items() if w] == ["process"]
    assert read("turn_local").credit.turn_credit == "local"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seeds=0"], "no config given"),
        (["experiments/ablations/levels/full.yaml", "seeds=0,x"], "whole numbers"),
        (["experiments/ablations/levels/full.yaml", "seeds=1,1"], "given twice"),
        (["experiments/ablations/levels/full.yaml", "experiments/ablations/levels/full.yaml"], "given twice"),
        (["experiments/ablations/levels/full.yaml", "seed=3"], "seeds=0,1,2"),
        (["experiments/ablations/levels/nothing.yaml"], "no such config"),
        (["experiments/ablations/levels/full.yaml", "credit.lambda=1"], "credit.lam"),
        (["experiments/ablations/levels/full.yaml", "rollout.rollouts=1"], "2 or more"),
        (["experiments/ablations/levels/full.yaml", "out=/proc/nowhere"], "can be written"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    assert ablate.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err


def write_run(folder: Path, success: float, seconds: float) -> None:
    folder.mkdir(parents=True)
    scores = {"success_ambiguous": success, "jf": None, "terms": {"iou": success / 2}}
    summary = {"finished": True, "after": {"sampled": scores, "greedy": scores}}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": i, "seconds": {"decode": seconds, "update": 1.0 + 100 * (i == 1)}} for i in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_table_is_mean_and_deviation_over_finished_seeds(tmp_path):
    write_run(tmp_path / "full" / "seed0", 0.5, 2.0)
    write_run(tmp_path / "full" / "seed1", 0.7, 4.0)
    write_run(tmp_path / "grpo" / "seed0", 0.25, 1.0)
    (tmp_path / "grpo" / "seed1").mkdir()
    (tmp_path / "grpo" / "seed1" / "summary.json").write_text('{"before": {}}')  # under way
    all_of_them = {(row, seed) for row in ("full", "grpo") for seed in (0, 1)}
    table = ablate.write_tables(tmp_path, ["full", "grpo"], [0, 1], all_of_them)
    cell = table["full"]["sampled"]["success_ambiguous"]
    assert cell["mean"] == pytest.approx(0.6) and cell["std"] == pytest.approx(0.02**0.5)
    assert table["full"]["greedy"]["terms/iou"]["values"] == [0.25, 0.35]
    assert table["grpo"]["seeds"] == [0] and table["grpo"]["sampled"]["success_ambiguous"]["std"] is None
    assert table["full"]["seconds_per_step"] == pytest.approx(4.0)  # medians 3 and 5: the compiling step is outside
    text = (tmp_path / "table.md").read_text()
    assert "| full | 2 of 2 |  | 0.60 ± 0.14 |" in text and "| grpo | 1 of 2 |  | 0.25 |" in text
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    others = ablate.gather(tmp_path, ["full", "grpo"], [0, 1], all_of_them - {("full", 1)})  # which has another config
    assert others["full"]["seeds"] == [0] and others["full"]["greedy"]["success_ambiguous"]["values"] == [0.5]
    assert {p.name for p in tmp_path.iterdir()} == {"full", "grpo", "table.md", "table.json", "table.png"}


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "icseg_jax.ablate", *more, f"out={out}", f"data.path={out}/data", *TINY]


@pytest.mark.slow
def test_stopped_and_run_again(tmp_path):
    """SIGTERM in the middle of the first of two runs: it is saved; the same command finishes both."""
    rows = ["experiments/ablations/levels/full.yaml", "experiments/ablations/levels/grpo.yaml"]
    go = command(tmp_path / "out", *rows, "steps=3", "checkpoint.every=1")
    running = subprocess.Popen(go, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "full" / "seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.2)
    os.kill(running.pid, signal.SIGTERM)
    told, _ = running.communicate(timeout=120)
    assert running.returncode == 0 and "goes on from there" in told
    assert subprocess.run(go, timeout=900, check=False).returncode == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [entry["seeds"] for entry in table.values()] == [[0], [0]]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What 60 runs can share: one segmenter and one small world."""
    folder = tmp_path_factory.mktemp("rows")
    address = f"ipc://{folder}/segmenter"
    serve = [sys.executable, "-m", "icseg_jax.sam2_sidecar", "serve", "--socket", address]
    sidecar = subprocess.Popen(serve)
    yield [f"sidecar.address={address}", f"data.path={folder}/data"]
    sidecar.terminate()
    sidecar.wait(30)


@pytest.fixture
def own_signals():
    """A run in this process takes Ctrl-C and SIGTERM; they come back after it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def served_model(body: dict) -> str:
    """What the user or the expert behind the tests' server says: a color; one candidate less after each question."""
    if body["messages"][0]["content"] == simulator.EXPERT_PROMPT:
        asked = body["messages"][-1]["content"][-1]["text"].count('"question"')
        return GOOD % (", ".join(str(max(1, asked + 1 - i)) for i in range(asked + 1)), "Ask for the motion first.")
    return "<thinking> I look at it. </thinking><answer> blue </answer>"


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_row_runs_two_steps(row, tmp_path, shared, own_signals, server):  # noqa: F811
    """As `python -m icseg_jax.train ROW`, which `ablate` starts, but in this process."""
    small = [a for a in TINY if row.parent.name != "groups" or "rollouts" not in a]  # what the row says is what runs
    if models := row.parent.name == "models":  # the one thing that a row can not bring is the server
        small.append(f"{'expert' if row.stem == 'expert' else 'simulator'}.url={server.url}")
        server.says, server.lists = served_model, listed("user", "expert")
    out = tmp_path / "run"
    assert train.main([str(row), "steps=2", f"run_dir={out}", *small, *shared]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["user_failed"] == line["expert_failed"] == 0 for line in lines)
    assert models == bool(server.bodies) and all(body["model"] in ("user", "expert") for body in server.bodies)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["finished"] and summary["after"]["sampled"]["count"]["success"] == 6
