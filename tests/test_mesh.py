"""One program on any mesh (train.py section 3): 8 forced CPU devices, and two processes of four."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PRESETS = {"dp": "mesh.preset=dp", "fsdp": "mesh.preset=fsdp", "fsdp_tp": "mesh.preset=fsdp_tp"}
MIXED = "mesh.data=2 mesh.fsdp=2 mesh.tensor=2 update.row_buckets=[2,3]"  # one device has a row for each rollout
SMALL = ["rollout.prompts=8", "rollout.rollouts=8", "rollout.least_prompts=8", "update.minibatches=1"]
SMALL += ["protocol.max_turns=3", "evaluate.every=0", "credit.lam=0"]


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices. NPROC sizes XLA's pool of threads: a device waits in each collective that is
    under way with a thread of its own, and with as few threads as devices none may be left for what they wait for."""
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "NPROC": str(4 * devices)}


def on_meshes(folder: Path, size: int, overrides: list[str]) -> dict[str, dict]:
    """meshes: for each how far dialogues, log-probabilities, loss and gradients are from those of one device; of `size`
    prompts with as many rollouts. restored: on other meshes, whether the last one's checkpoint is what was saved."""
    command = [sys.executable, __file__, str(folder), str(size), *overrides]
    done = subprocess.run(command, env=environment(8), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(told: dict[str, dict]) -> None:
    assert len(told["restored"]) == 3 and all(told["restored"].values()), told["restored"]
    for mesh, found in told["meshes"].items():
        assert found["tokens"] > 500 and found["other_tokens"] == 0, mesh
        assert found["logp"] < 1e-4 and found["loss"] < 1e-5 and found["gradient"] < 1e-5, (mesh, found)
        assert found["largest_gradient"] > 1e-4


def test_a_mesh_of_all_axes_computes_what_one_device_does(tmp_path):
    check(on_meshes(tmp_path, 4, [MIXED]))


@pytest.mark.slow
def test_presets_compute_what_one_device_does(tmp_path):
    check(on_meshes(tmp_path, 8, list(PRESETS.values())))


def train_command(folder: Path, name: str, *more: str) -> list[str]:
    world = [f"data.path={folder}/world", "data.generate_train=24", "data.generate_test=8"]
    own = ["steps=2", "checkpoint.every=1", f"run_dir={folder}/{name}", *world]
    return [sys.executable, "-m", "icseg_jax.train", "experiments/embedded.yaml", *SMALL, *own, *more]


def start(commands: list[list[str]], folder: Path) -> list[subprocess.Popen]:
    """Processes that share eight devices, which find each other on this machine when there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    all_of_them = []
    for index, command in enumerate(commands):
        own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(len(commands))}
        own["JAX_PROCESS_ID"] = str(index)
        where = environment(8 // len(commands)) | own
        with open(folder / f"log{index}", "w") as log:
            all_of_them.append(subprocess.Popen(command, env=where, cwd=ROOT, stdout=log, stderr=log))
    return all_of_them


def end(*processes: subprocess.Popen) -> None:
    for process in processes:
        process.kill()
        process.wait()


def together(commands: list[list[str]], folder: Path) -> None:
    """Such processes to their end, which is a good one."""
    all_of_them = start(commands, folder)
    latest, codes = time.monotonic() + 1800, [None]
    try:
        while None in codes and not any(codes) and time.monotonic() < latest:
            time.sleep(1)
            codes = [process.poll() for process in all_of_them]
        if any(codes):
            time.sleep(10)  # the others learn of it
            codes = [process.poll() for process in all_of_them]
    finally:
        end(*all_of_them)
    logs = "\n".join((folder / f"log{i}").read_text()[-2000:] for i in range(len(commands)))
    assert codes == [0] * len(commands), f"{codes}\n{logs}"


def test_one_of_several_that_fails_is_gone_at_once(tmp_path):
    """JAX would wait five minutes for the other one, which may wait for it."""
    program = "import time; from icseg_jax import train; train.join_processes(); train.leave(lambda: {})"
    commands = [[sys.executable, "-c", program.format(does)] for does in ("time.sleep(600)", "1 / 0")]
    waits, fails = start(commands, tmp_path)
    try:
        assert fails.wait(timeout=100) == 1 and "ZeroDivisionError" in (tmp_path / "log1").read_text()
    finally:
        end(waits, fails)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [["mesh.data=2", "mesh.fsdp=4"], ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"]])
def test_two_processes_are_one_of_eight_devices(tmp_path, sizes):
    """SAM2's rewards included, each process with a sidecar of its own; the second layout splits each group."""
    subprocess.run(train_command(tmp_path, "one", *sizes), env=environment(8), cwd=ROOT, check=True, timeout=1800)
    together([train_command(tmp_path, "two", *sizes, "mesh.distributed=true")] * 2, tmp_path)
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for pair in zip(one, two, strict=True):
        check_rows(*pair)
    assert one[0]["reward/mask"] > 0 and (tmp_path / "two" / "1.sidecar.log").exists()
    # One process goes on from what two have written.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "2")
    (tmp_path / "two" / "summary.json").unlink()
    subprocess.run(train_command(tmp_path, "two", *sizes), env=environment(8), cwd=ROOT, check=True, timeout=1800)
    again = rows_of(tmp_path / "two")
    assert again[0] == two[0] and len(again) == 2
    check_rows(one[1], again[1])


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_rows(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for key in one.keys() - {"seconds"}:
        if key.startswith("sampler_difference"):  # rounding itself
            assert max(one[key], two[key]) < 2e-4, key
        elif isinstance(one[key], float):
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key
        else:
            assert one[key] == two[key], key


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_supervised_training_on_a_mesh_is_that_of_one_device(tmp_path, processes):
    """Two steps: the first tells of the loss, the second of the gradient."""
    own = ["steps=2", "checkpoint.every=1", "warmstart.scenes=4", "warmstart.practice=1"]
    command = [sys.executable, "-m", "icseg_jax.train", "experiments/embedded_warmstart.yaml", *own]
    subprocess.run([*command, f"run_dir={tmp_path}/one"], env=environment(1), cwd=ROOT, check=True, timeout=1800)
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", f"mesh.distributed={str(processes > 1).lower()}"]
    together([[*command, *mesh, f"run_dir={tmp_path}/two"]] * processes, tmp_path)
    rows = [rows_of(tmp_path / name) for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2]
    for one, two in zip(*rows, strict=True):
        for key in one.keys() - {"seconds"}:
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    files = [sorted(p.name for p in (tmp_path / name / "trained").iterdir()) for name in ("one", "two")]
    assert files[0] == files[1] and "model.safetensors" in files[0]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Each plays every other sample on four devices of its own."""
    from icseg_jax import data, synthetic

    synthetic.write_dataset(tmp_path / "raw", train=0, test=3, seed=4, layout="r2sm", progress=False)
    data.prepare("r2sm", tmp_path / "raw", tmp_path / "r2sm", progress=False)
    command = [sys.executable, "-m", "icseg_jax.evaluate", "experiments/embedded.yaml", "benchmark=r2sm"]
    command += ["checkpoint=asset:embedded_base", f"source={tmp_path}/r2sm", "baselines=false"]
    subprocess.run([*command, f"out={tmp_path}/one"], env=environment(4), cwd=ROOT, check=True, timeout=1800)
    together([[*command, f"out={tmp_path}/two", "mesh.distributed=true"]] * 2, tmp_path)
    lines = [sorted((tmp_path / name / "rows.jsonl").read_text().splitlines()) for name in ("one", "two")]
    assert lines[0] == lines[1] and len(lines[0]) == len(data.load_prepared(tmp_path / "r2sm", "test"))
    shares = [(tmp_path / f"two/rows.{i}.jsonl").read_text().splitlines() for i in range(2)]
    assert abs(len(shares[0]) - len(shares[1])) <= 1 and sorted(shares[0] + shares[1]) == lines[1]
    masks = [{p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")}
             for name in ("one", "two")]  # fmt: skip
    assert masks[0] == masks[1] and masks[0]


def main(folder: str, size: str, *overrides: str) -> None:
    import jax

    from icseg_jax import data, simulator, synthetic, train, weights

    path, n = Path(folder), int(size)
    small = [*SMALL, *(f"rollout.{key}={n}" for key in ("prompts", "rollouts", "least_prompts"))]
    small.append("policy.freeze_vision=false")  # slopes of the tower too
    synthetic.write_dataset(path / "raw", train=2, test=24, seed=3, progress=False)
    data.prepare("ambi_rvos", path / "raw", path / "prepared", progress=False)
    # Ambiguous ones of few objects: their dialogues are short enough for several to share a row.
    few = lambda sample: (sample.initial_count < 2, len(sample.privileged["scene_graph"]["objects"]))  # noqa: E731
    samples = sorted(data.load_prepared(path / "prepared", "test"), key=few)[:n]
    found, expected = {}, None
    for override in ("one device", *overrides):
        config = train.load_config("experiments/embedded.yaml", small + override.split() * ("=" in override))
        mesh = train.make_mesh(config.mesh, None if "=" in override else jax.devices()[:1])
        train.check_mesh(config, mesh)
        train.UNROLLED = 0 if "=" in override else 8  # meshes loop over the layers, as on an accelerator
        source = train.resolve_path(config.policy.path)
        policy_config, params = train.load_policy(source, mesh, dtype="float32")
        policy = train.Policy(policy_config, config.policy.remat, mesh)
        speaker = train.Speaker(config.protocol, policy_config, weights.Tokenizer(source))
        sampler = train.Sampler(config, policy, speaker, mesh)
        shown = data.sample_frames(12, config.protocol.frames)
        prompts = [train.Prompt(sample, shown, speaker) for sample in samples]
        reading = train.reading_copy(policy, mesh, "float32")(params)
        dialogues = sampler.play(
            reading, prompts, [0.0] + [1.0] * (n - 1), simulator.OracleUser(), seed=7, step=0, clock=train.Clock(),
            penalties=(1.1, 1.0),
        )  # fmt: skip
        assert len({len(d.texts) for row in dialogues for d in row}) > 1  # they end at different turns
        batch, _ = train.pack(dialogues, config, speaker)
        state = train.fresh_state(params, config, teacher=False)
        logprob, update = train.make_programs(policy, config, state)
        shared, taken = train.share_rows(batch, config.update.row_buckets)
        assert shared.rows.tokens.shape[1] < n or not config.update.row_buckets
        logp = train.put_back(logprob(state.params, train.shard_batch(mesh, shared)), taken, n)
        advantages = np.random.default_rng(0).standard_normal((n, n, 1)).astype(np.float32)
        credit = train.Credit(advantages * np.ones_like(logp), batch.rows.logp, batch.rows.trained)
        credit = jax.tree.map(lambda x, at=taken: train.take_tokens(x, at, 0), credit)
        state, stats = update(state, *train.shard_batch(mesh, (shared, credit, None)), np.float32(0))
        got = {
            "tokens": batch.rows.tokens, "logp": np.where(batch.rows.trained, logp, 0), "loss": float(stats["loss"]),
            "gradient": [np.asarray(x) / 0.1 for x in jax.tree.leaves(state.optimiser[1].mu)],
        }  # fmt: skip
        if expected is None:
            expected = got
            continue
        gaps = [float(np.abs(a - b).max()) for a, b in zip(got["gradient"], expected["gradient"], strict=True)]
        found[override] = {
            "tokens": int(batch.rows.trained.sum()),
            "other_tokens": int((got["tokens"] != expected["tokens"]).sum()),
            "logp": float(np.abs(got["logp"] - expected["logp"]).max()),
            "loss": abs(got["loss"] - expected["loss"]),
            "gradient": max(gaps),
            "largest_gradient": max(float(np.abs(x).max()) for x in expected["gradient"]),
        }
    config = dataclasses.replace(config, run_dir=str(path / "run"))
    run = train.Run(config)
    run.save(state, 1)
    run.close()
    saved, restored = jax.device_get(state), {}
    for sizes in ({"data": 1}, {"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = train.make_mesh(dataclasses.replace(train.MeshSection(), **sizes), devices)
        _, params = train.load_policy(source, mesh, dtype="float32")
        fresh, run = train.fresh_state(params, config, teacher=False), train.Run(config)
        pairs = [jax.tree.leaves(x) for x in (run.restore(fresh), saved, fresh)]
        run.close()
        restored[str(sizes)] = all(
            x.sharding == like.sharding and np.array_equal(x, kept) for x, kept, like in zip(*pairs, strict=True)
        )
    print(json.dumps({"meshes": found, "restored": restored}))


@pytest.mark.parametrize(
    "sizes, count, shape",
    [
        ({}, 8, (8, 1, 1)),
        ({"preset": "fsdp"}, 8, (1, 8, 1)),
        ({"preset": "fsdp_tp"}, 8, (1, 4, 2)),
        ({"fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 3}, 8, None),
        ({"fsdp": 3}, 8, None),
        ({"data": -1, "preset": "fsdp", "tensor": 2}, 8, None),
    ],
)
def test_sizes_of_a_mesh(sizes, count, shape):
    from icseg_jax import train

    section = dataclasses.replace(train.MeshSection(), **sizes)
    if shape is None:
        with pytest.raises(train.ConfigError, match="does not cover 8 devices"):
            train.mesh_shape(section, count)
    else:
        assert train.mesh_shape(section, count) == shape


if __name__ == "__main__":
    main(*sys.argv[1:])
