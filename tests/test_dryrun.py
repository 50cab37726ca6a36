"""Compiling for a machine that is not there (dryrun.py): eight forced CPU devices, every axis of the mesh in use."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from icseg_jax import dryrun

ROOT = Path(__file__).parents[1]
SIZES = ["topology=cpu:8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
CODE = """
import contextlib, io, json, sys
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from icseg_jax import dryrun, train
cudnn.check_cudnn_version = lambda: 90800  # JAX asks the library that will be there; XLA compiles the calls without it
train.UNROLLED = 0  # layers in a loop, as an accelerator's are
calls, room = json.loads(sys.argv[1]), dryrun.GPU_GIB
told = []
for arguments, gib in calls:
    dryrun.GPU_GIB = gib or room
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = dryrun.main(arguments)
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def dry_run(*calls: tuple[list[str], float | None]) -> list[list]:
    """[exit code, stdout, stderr] of each, in one process of its own; the second: GiB of a chip."""
    command = [sys.executable, "-c", CODE, json.dumps(calls)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(program: dict) -> None:
    assert {"argument_gib", "temp_gib", "peak_gib", "tflops", "bytes_gib", "collectives", "compile_s"} <= program.keys()
    assert program["fits"] and 0 < program["argument_gib"] <= program["peak_gib"]


def test_a_dry_run_says_what_fits_and_what_does_not():
    small = ["experiments/embedded.yaml", *SIZES]
    fits, tight, moon, program, alone, supervised = dry_run(
        ([*small, "programs=encode,decode,resize,commit"], None), ([*small, "programs=encode"], 1e-3),
        (["experiments/embedded.yaml", "topology=moon:3"], None), ([*small, "programs=all"], None),
        (["experiments/embedded.yaml"], None), (["experiments/embedded_warmstart.yaml", *SIZES], None),
    )  # fmt: skip
    assert fits[0] == 0, fits
    report = json.loads(fits[1])
    assert report["topology"] == "cpu:8" and report["fits"] and report["hbm_gib"] > 50
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(report["programs"]) == ["encode", "decode", "resize", "commit"]
    for told in report["programs"].values():
        check(told)
    commit = report["programs"]["commit"]
    assert commit["temp_gib"] < 0.4 * commit["argument_gib"]  # in place, but for one of four layers
    # No weight is gathered while tokens are sampled: the smallest matrix of a layer takes 0.06 MiB in bfloat16.
    assert report["programs"]["decode"]["collectives"].get("all-gather", {"largest_mib": 0})["largest_mib"] < 0.06
    assert tight[0] == 1 and "DOES NOT FIT" in tight[2] and json.loads(tight[1])["fits"] is False
    assert fits[1].count("\n") == 1  # one object on one line
    for told, words in ((moon, "topology=moon:3"), (program, "programs=all"), (alone, "topology= is missing"),
                        (supervised, "stage=sft")):  # fmt: skip
        assert told[0] == 2 and told[1] == "" and told[2].startswith("error: ") and words in told[2]
        assert told[2].count("\n") == 1


def test_a_program_that_xla_can_not_make_is_one_line(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("INTERNAL: Mosaic failed\nwith much beside it")

    monkeypatch.setattr(dryrun, "open_topology", lambda name: (jax.devices()[:1], 1.0, name))
    one = dryrun.Traceable(jax.jit(lambda: 1.0), (), ())
    monkeypatch.setattr(dryrun, "trace_programs", lambda config, mesh: {"encode": one})
    monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
    assert dryrun.main(["experiments/embedded.yaml", "topology=cpu:1", "programs=encode"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "encode ... \nerror: cpu:1: encode can not be compiled (INTERNAL: Mosaic failed)\n"


def test_operations_of_loops_and_sizes_of_collectives():
    def program(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=3)[0] @ w

    traced = jax.jit(program).trace(jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert dryrun.dot_flops(traced.jaxpr.jaxpr) == 4 * 2 * 4 * 8 * 8
    # Within a shard_map shapes are a device's own; those of an axis that it leaves alone are whole.
    kinds = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((2, 3, 5), ("data", "fsdp", "tensor"), axis_types=kinds)
    whole, rows = jax.P(), jax.P(("data", "fsdp"))
    split = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, axis_names={"data", "fsdp"}
    )
    traced = jax.jit(split).trace(jnp.ones((12, 8)), jnp.ones((8, 7)))
    assert dryrun.dot_flops(traced.jaxpr.jaxpr) == 2 * 12 * 8 * 7
    text = """
      %a = f32[256,1024]{1,0} all-gather(f32[64,1024]{1,0} %p), dimensions={0}
      %b = (bf16[64,8]{1,0}, bf16[512,1024]{1,0}) all-gather-start(bf16[64,8]{1,0} %q), dimensions={0}
      %c = (f32[256,512]{1,0}, f32[256,512]{1,0}) all-reduce(%x, %y), to_apply=%add
    """
    found = dryrun.collectives(text)
    assert found["all-gather"] == {"count": 2, "mib": 2.0, "largest_mib": 1.0, "largest": "f32[256,1024]"}
    assert found["all-reduce"]["count"] == 1 and found["all-reduce"]["mib"] == 1.0


FUSED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from icseg_jax import dryrun, train
cudnn.check_cudnn_version = lambda: 90800  # as above
kind, topology = sys.argv[1:]
devices, _, _ = dryrun.open_topology(topology)
mesh = jax.sharding.Mesh(np.reshape(devices, (1, 2, 2)), train.AXES)
p, n, t, heads, groups, size, past = 1, 2, 640, 8, 4, 128, 384
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
of = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind, sharding=whole)
words, yes = (lambda *shape: of(jnp.bfloat16, *shape)), (lambda *shape: of(jnp.bool_, *shape))
q, shared, own = words(p, n, t, heads, size), [words(p, groups, past, size)] * 2, [words(p, n, groups, t, size)] * 2
def loss(q, shared, own, there, causal):
    parts = [(*shared, there), (*own, causal)]
    return train.attend_by(kind, mesh, q, parts).astype(jnp.float32).sum()
both = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
print(both.lower(q, shared, own, yes(p, 1, 1, past), yes(p, n, t, t)).compile().as_text())
"""


def compiled(kind: str, topology: str) -> str:
    """Forward and backward, a shared context before each row's own keys, rows and heads on two chips each."""
    done = subprocess.run([sys.executable, "-c", FUSED, kind, topology], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(dryrun.find_cuda() is None, reason="jax has no CUDA compiler for this platform")
def test_cudnn_compiles_for_gpus():
    calls = re.findall(r'custom_call_target="__cudnn\$(\w+)"', compiled("cudnn", "gpu:4"))
    assert set(calls) == {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}


@pytest.mark.skipif(dryrun.find_cuda() is None, reason="jax has no CUDA compiler for this platform")
def test_a_box_of_gpus_that_is_not_there():
    """The shipped 8B with its own sizes and mesh, in bfloat16."""
    [(code, told, _)] = dry_run((["experiments/qwen3vl_8b.yaml", "topology=gpu:8", "programs=decode"], None))
    report = json.loads(told)
    assert code == 0 and report["compiled_for"].startswith("8 H100 ") and report["hbm_gib"] > 50
    decode = report["programs"]["decode"]
    assert decode["peak_gib"] < 1.15 * decode["argument_gib"]  # the cache is there once
    assert max(kind["largest_mib"] for kind in decode["collectives"].values()) < 1


@pytest.mark.slow
@pytest.mark.skipif(dryrun.find_cuda() is None, reason="jax has no CUDA compiler for this platform")
@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_observations_fit_beside_full_caches(attention):
    call = ["experiments/qwen3vl_8b.yaml", "topology=gpu:8", "programs=extend", f"policy.attention={attention}"]
    [(code, told, _)] = dry_run((call, None))
    extend = json.loads(told)["programs"]["extend"]
    assert code == 0 and extend["temp_gib"] < 0.3 * extend["argument_gib"]  # the cache is there once


def test_cudnn_that_is_not_here_is_one_line(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(dryrun, "open_topology", lambda name: (jax.devices()[:1], 1.0, name))
    monkeypatch.setattr(dryrun, "trace_programs", fails)
    assert dryrun.main(["experiments/embedded.yaml", "topology=cpu:1"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: policy.attention=cudnn: ") and told.err.count("\n") == 1


@pytest.mark.skipif(dryrun.find_libtpu() is None, reason="libtpu is for Linux only")
def test_splash_compiles_for_a_tpu():
    text = compiled("splash", "v5e:2x2")
    for kernel in ("splash_mqa_fwd", "splash_mqa_dq", "splash_mqa_dkv"):
        assert re.search(rf"%{kernel}\S* = .*tpu_custom_call", text), kernel


COPIES = """
import re
from icseg_jax import dryrun, train
devices, _, _ = dryrun.open_topology("gpu:8")
config = train.load_config("experiments/qwen3vl_8b.yaml", ["topology=gpu:8"])
decode = dryrun.trace_programs(config, train.make_mesh(config.mesh, devices))["decode"]
text = decode.jitted.trace(*decode.arguments).lower().compile().as_text()
assert re.search(r"bf16\\[1,16,4,2,6144,128\\]\\S* parameter", text)  # a layer's keys lie alone
made = re.findall(r"= bf16\\[(?:1,)?16,4,2,6144,128\\]\\S* ([a-z-]+)\\(", text)
print(set(made) - {"parameter", "get-tuple-element", "bitcast"})
"""


@pytest.mark.slow
@pytest.mark.skipif(dryrun.find_cuda() is None, reason="jax has no CUDA compiler for this platform")
def test_decoding_on_gpus_copies_no_layers_cache():
    done = subprocess.run([sys.executable, "-c", COPIES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "set()\n"


PAPER = """
import hashlib, sys
from icseg_jax import dryrun, train
devices, _, _ = dryrun.open_topology("gpu:8")
for size in ("4b", "8b"):
    found = set()
    for name in ("qwen3vl", "paper"):
        c = train.load_config(f"experiments/{name}_{size}.yaml", ["topology=gpu:8"])
        programs = dryrun.trace_programs(c, train.make_mesh(c.mesh, devices))
        texts = [p.jitted.trace(*p.arguments, **p.static).lower().as_text() for p in programs.values()]
        found.add(hashlib.sha256("".join(texts).encode()).hexdigest())
    assert len(found) == 1 and len(texts) == len(dryrun.PROGRAMS), size
"""


@pytest.mark.slow
def test_the_papers_configs_run_the_same_programs():
    """Their reward lacks a term, which is added up on the host: what fits for `qwen3vl_*` fits for them."""
    done = subprocess.run([sys.executable, "-c", PAPER], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_update_gathers_no_activations():
    """P x N x T x D of them: what a mesh that loses the rows' sharding would bring together."""
    [told] = dry_run((["experiments/embedded.yaml", *SIZES, "programs=prefill,extend,logprob,update"], None))
    programs = json.loads(told[1])["programs"]
    for program in programs.values():
        check(program)
    activations = 4 * 8 * 416 * 128 * 4 / 2**20 / 2  # of a minibatch's share of `data`, in float32
    assert programs["update"]["collectives"]["all-gather"]["largest_mib"] < activations
