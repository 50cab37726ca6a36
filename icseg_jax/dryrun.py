"""Compiles a config's programs for a machine that is not there, and says whether they fit.

    python -m icseg_jax.dryrun experiments/qwen3vl_8b.yaml topology=v5p:4x4x4 [key=value ...]

The programs are those that training runs: nothing is compiled for the dry run alone. A TPU topology (v5e:8x8,
v5p:2x2x4, v6e:4x4, ...) is compiled by libtpu, which needs no TPU, and `gpu:8` for that many H100 of 80 GB by XLA's
compiler for CUDA, which needs no GPU: `make setup` puts both beside site-packages, where only this command looks.
Without the latter, and for `cpu:8`, the programs are compiled for 8 forced CPU devices: the sharding and the
collectives are real, memory and time of a GPU are not known from it. The report names what was compiled for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from icseg_jax import data

# Memory of a chip that programs can use, GiB, and its peak TFLOP/s in bfloat16 (FIELD.md D.2; what XLA allots).
CHIPS = {"v4": (31.25, 275), "v5e": (15.75, 197), "v5p": (95.74, 459), "v6e": (31.25, 918)}
GPU_GIB = 80 * 1e9 / 2**30  # of the released recipe's cards (METHOD.md 5.1)
# What XLA's compiler wants to know of such a card, an H100 with HBM3: NVIDIA's figures, as text of its GpuTargetConfig.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 80000000000 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
PROGRAMS = ("encode", "prefill", "decode", "extend", "resize", "commit", "logprob", "update")
GIB = 2.0**30

USAGE = """usage: python -m icseg_jax.dryrun CONFIG.yaml topology=NAME [key=value ...] [programs=decode,update]

Compiles encode, prefill, decode, extend, resize and commit (of the cache), logprob and update for the named machine and
prints, last, one JSON object.
Exit status: 0 when every program fits its chip, 1 when one does not, 2 on bad input.
  python -m icseg_jax.dryrun experiments/qwen3vl_8b.yaml topology=v5p:4x4x4
  python -m icseg_jax.dryrun experiments/qwen3vl_4b.yaml topology=gpu:8"""


def find_libtpu() -> Path | None:
    """libtpu.so where `make setup` puts it: beside site-packages, so that no other process looks for a TPU."""
    places = [Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"]
    if "TPU_LIBRARY_PATH" in os.environ:
        places.insert(0, Path(os.environ["TPU_LIBRARY_PATH"]))
    return next((place for place in places if place.is_file()), None)


def find_cuda() -> Path | None:
    """The folder of XLA's compiler for CUDA where `make setup` puts it: elsewhere, JAX would look for a GPU."""
    folder = Path(sys.prefix) / "cuda"
    needed = ("jax_plugins/*/xla_cuda_plugin.so", "nvidia/cuda_nvcc/nvvm/libdevice/*.bc", "nvidia/cuda_nvcc/bin/ptxas")
    return folder if all(any(folder.glob(path)) for path in needed) else None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing reaches the terminal, whatever library says it: that there is no driver is known."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def open_topology(name: str) -> tuple[list[Any], float, str]:
    """Devices of a topology, GiB of a chip, and what was compiled for. Call before jax is used. Raises OSError."""
    chip, _, shape = name.partition(":")
    if chip in ("gpu", "cpu"):
        if not shape.isdigit() or int(shape) < 1:
            raise OSError(f"topology={name}: use {chip}:COUNT, for example {chip}:8")
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
        # Which of Triton's products to take is found out on the card; without one it has none for some sizes.
        flags = ["--xla_gpu_enable_triton_gemm=false", *flags, f"--xla_force_host_platform_device_count={shape}"]
        os.environ["XLA_FLAGS"] = " ".join(flags)
        given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")  # of a card that JAX takes
        try:
            share = float(given)
        except ValueError:
            raise OSError(f"XLA_PYTHON_CLIENT_MEM_FRACTION={given}: is no number; 0.9 is one") from None
        import jax
        from jax.experimental import topologies

        jax.config.update("jax_platforms", "cpu")
        if chip == "gpu" and (folder := find_cuda()):
            sys.path.append(str(folder))
            try:
                with unheard():
                    found = topologies.get_topology_desc("", "cuda", target_config=H100, topology=f"1x1x{shape}")
            except Exception as error:
                raise OSError(f"topology={name}: {folder} is of no use ({data.first_line(error)})") from None
            return list(found.devices), GPU_GIB * share, f"{shape} H100 of 80 GB, ahead of time by XLA for CUDA"
        return jax.devices()[: int(shape)], GPU_GIB * share, f"{shape} forced CPU devices"
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise OSError(f"topology={name}: use one of {', '.join(CHIPS)} with a shape, such as v5p:4x4x4, or gpu:8")
    library = find_libtpu()
    if library is None:
        raise OSError(
            f"topology={name}: libtpu is missing; `make setup` installs it, or "
            f"`pip install --no-deps --target {sys.prefix}/libtpu libtpu`"
        )
    # No device is opened, so several of these may run side by side; libtpu would let one process load it at a time.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_LIBRARY_PATH=str(library), ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:
        raise OSError(f"topology={name}: libtpu does not know it ({data.first_line(error)})") from None
    return list(found.devices), CHIPS[chip][0], f"{name}, ahead of time by libtpu"


def abstract(tree: Any, shardings: Any) -> Any:
    """The tree as shapes, each with where it lies: shardings in a tree like it, or in the order of its leaves."""
    import jax

    leaves, form = jax.tree.flatten(tree)
    places = jax.tree.leaves(shardings)
    made = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(form, made)


class Traceable(NamedTuple):
    """A program at its largest shapes. beside: what else is in memory while it runs."""

    jitted: Any
    arguments: tuple
    beside: Any
    static: dict[str, int] = {}


def trace_programs(config: Any, mesh: Any) -> dict[str, Traceable]:
    """The programs of a training step, by name."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from icseg_jax import train

    c = config
    train.check_mesh(c, mesh)
    source, policy_config = train.resolve_path(c.policy.path), train.named_shape(c)
    # The words of a tokenizer are data: any with the special tokens gives the same programs, but for how many it has.
    real = (source / "tokenizer.json").is_file()
    tokenizer = train.load_tokenizer(source if real else train.resolve_path("asset:embedded_base"), policy_config)
    policy = train.Policy(policy_config, c.policy.remat, mesh, c.policy.attention)
    speaker = train.Speaker(c.protocol, policy_config, tokenizer)
    sampler = train.Sampler(c, policy, speaker, mesh)
    if not real:
        sampler.allowed = np.arange(policy_config.vocab_size) < policy_config.vocab_size - 300  # as of a released one

    p, n, frames = c.rollout.prompts, c.rollout.rollouts, c.protocol.frames
    whole = train.placement(mesh, [])
    shapes = train.parameter_shapes(policy_config)
    of_type = lambda kind: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), shapes)  # noqa: E731
    params = abstract(of_type(jnp.float32), train.parameter_specs(policy, mesh))
    reading = train.reading_copy(policy, mesh, c.policy.dtype).eval_shape(params)

    def state_of(params: Any) -> Any:
        optimiser = train.make_optimiser(c)
        moments = jax.eval_shape(optimiser.init, params)
        like = {x.shape: x.sharding for x in jax.tree.leaves(params)}  # moments have the shapes of their parameters
        moments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.get(x.shape, whole)), moments
        )
        zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return train.TrainState(params, moments, params if train.needs_teacher(c) else None, zero, zero)

    state = state_of(params)

    def rows(prompts: int, rollouts: int, length: int) -> train.Rows:
        made = train.stack_rows([[[] for _ in range(rollouts)] for _ in range(prompts)], length, 0)
        return abstract(made, train.batch_placements(mesh, made))

    def images(count: int, grid: tuple[int, int]) -> train.Images:
        vision = policy_config.vision
        patches = grid[0] * grid[1] * vision.spatial_merge_size**2
        flat = np.broadcast_to(np.float32(0), (count, patches, vision.patch_dim))
        made = speaker.images(flat, grid)
        return abstract(made, train.batch_placements(mesh, made))

    def batch(prompts: int, length: int) -> train.Batch:
        words = rows(prompts, 1, c.protocol.prompt_tokens), rows(prompts, n, length)
        shown = [images(prompts * frames, grid) for grid in (speaker.frame_grid, speaker.keyframe_grid)]
        if not c.policy.freeze_vision:
            return train.Batch(*words, *shown)
        encode = functools.partial(sampler.encode.jitted, reading)
        visual = jax.eval_shape(functools.partial(train.encode_bank, encode, prompts=prompts), shown)
        return train.Batch(*words, None, None, abstract(visual, train.batch_placements(mesh, visual)))

    shown = images(p * frames, speaker.frame_grid)
    # Key frames are encoded by the same program: up to 16 at a time, all of a step's for its update where the tower is
    # frozen. Whichever attends more is the one to compile.
    asked = images(p * frames if c.policy.freeze_vision else 16, speaker.keyframe_grid)
    largest = max((shown, asked), key=lambda x: len(x.patches) * x.patches.shape[1] ** 2)
    tokens, deepstack = jax.eval_shape(sampler.encode.jitted, reading, shown)
    flat = train.placement(mesh, [train.row_axes(mesh, p, 1)[0]])
    encoded = train.Visual(
        jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=flat),
        jax.ShapeDtypeStruct(deepstack.shape, deepstack.dtype, sharding=train.placement(mesh, [None, *flat.spec])),
    )
    prompts = rows(p, 1, c.protocol.prompt_tokens)
    lies = sampler.layout(p, n)
    lanes = jax.eval_shape(functools.partial(sampler.prefill.jitted, rollouts=n), reading, prompts, encoded)

    def cache(length: int) -> tuple[train.Keys, ...]:
        longer = lambda x: jax.ShapeDtypeStruct((*x.shape[:4], length, x.shape[5]), x.dtype)  # noqa: E731
        return abstract(jax.tree.map(longer, lanes.past), lies.past)

    *_, before, most = (0, *sorted(c.rollout.cache_buckets))
    lanes = abstract(lanes.replace(past=cache(most)), lies)
    count, heat = (jax.ShapeDtypeStruct((p, n), kind, sharding=whole) for kind in (jnp.int32, jnp.float32))
    keys = jax.ShapeDtypeStruct((p, n, 2), jnp.uint32, sharding=whole)
    heard_most = max(*c.rollout.observation_buckets, speaker.longest_observation)
    longest = max(c.update.token_buckets)
    mini = p // c.update.minibatches
    minibatch = batch(mini, longest)
    by_row = train.placement(mesh, train.row_axes(mesh, mini, n))
    credit = train.Credit(*(
        jax.ShapeDtypeStruct((mini, n, longest), kind, sharding=by_row)
        for kind in (jnp.float32, jnp.float32, jnp.bool_)
    ))
    guided = None
    if c.update.loss == "sdpo":
        starts = jax.ShapeDtypeStruct((mini, n), jnp.int32, sharding=by_row)
        guided = train.Guided(batch(mini, longest + c.credit.guidance_tokens), starts)
    read = batch(mini if c.update.row_buckets else p, longest + train.reading_room(c))  # shared rows: a part at a time
    logprob, update = train.make_programs(policy, c, state)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    # While dialogues are played the whole training state waits, and key frames are encoded in the middle of them.
    playing = (state, reading, lanes.replace(past=None))
    heard_rows = rows(p, n, heard_most)
    fresh = cache(heard_most)
    return {
        "encode": Traceable(sampler.encode.jitted, (reading, largest), (state, lanes)),
        "prefill": Traceable(sampler.prefill.jitted, (reading, prompts, encoded), (state,), {"rollouts": n}),
        "decode": Traceable(
            sampler.decode.jitted, (reading, lanes, count, count, count, keys, heat, None), (state,)
        ),
        "extend": Traceable(sampler.extend.jitted, (reading, lanes, heard_rows), (state,)),
        "resize": Traceable(sampler.resize.jitted, (cache(before or most),), (*playing, fresh), {"length": most}),
        "commit": Traceable(sampler.commit.jitted, (lanes.past, lanes.past_length, fresh, count), playing),
        "logprob": Traceable(logprob.jitted, (params, read), (state.optimiser, state.teacher)),
        "update": Traceable(update.jitted, (state, minibatch, credit, guided, rate), ()),
    }


def per_chip(tree: Any) -> int:
    """Bytes that a tree of shapes with shardings takes on each chip."""
    import jax

    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}


def collectives(text: str) -> dict[str, dict[str, Any]]:
    """Of a compiled program's text: for each kind how many there are (a loop's body counts once), the MiB of their
    results together and of the largest one."""
    found: dict[str, dict[str, Any]] = {}
    pattern = re.compile(r"= (\([^=]*?\)|\S+) (" + "|".join(COLLECTIVES) + r")(-start)?\(")
    for shape, kind, start in pattern.findall(text):
        sizes = [
            WIDTHS.get(width, 4) * math.prod(int(d) for d in dims.split(",") if d)
            for width, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
        ]
        # The start of an asynchronous one names what it reads and what it makes: the larger is the result. Several
        # joined into one (and any all-reduce) name results only.
        reads = start and kind != "all-reduce"
        size = (max(sizes, default=0) if reads else sum(sizes)) / 2**20
        entry = found.setdefault(kind, {"count": 0, "mib": 0.0, "largest_mib": 0.0, "largest": ""})
        entry["count"] += 1
        entry["mib"] += size
        if size > entry["largest_mib"]:
            entry["largest_mib"], entry["largest"] = size, re.sub(r"\{[^}]*\}", "", shape)[:120]
    return {
        kind: {k: round(v, 2) if isinstance(v, float) else v for k, v in entry.items()} for kind, entry in found.items()
    }


def dot_flops(jaxpr: Any) -> float:
    """Operations of a program's matrix products on all devices, a loop's as often as it runs (a while loop's body
    once). Those within fused kernels are left out: which of their blocks run, a program does not say."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "shard_map":  # within it shapes are a device's own along these axes
            times = math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
        for value in eqn.params.values() if eqn.primitive.name != "pallas_call" else ():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * dot_flops(inner)
    return total


def compile_one(program: Traceable, chips: int, hbm_gib: float) -> dict[str, Any]:
    """One program's report; `fits` counts what waits in memory beside it. tflops: of the matrix products, a chip's
    share; bytes_gib: as XLA counts them, a loop's body once. Raises OSError when XLA has no program for that machine.
    """
    waiting = per_chip(program.beside) / GIB
    begun = time.perf_counter()
    traced = program.jitted.trace(*program.arguments, **program.static)
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # XLA has no class of its own for it
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise OSError(f"can not be compiled ({data.first_line(error)})") from error
        needed = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT])", str(error))
        told = needed.group(0) if needed else data.first_line(error)
        spent = round(time.perf_counter() - begun, 1)
        unknown = ("argument_gib", "temp_gib", "peak_gib", "tflops", "bytes_gib", "collectives")
        return {"fits": False, "error": told, **dict.fromkeys(unknown), "beside_gib": round(waiting, 3),
                "compile_s": spent}  # fmt: skip
    seconds = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes
    # What a program does not read is no argument of it, and is in memory all the same: decoding needs no vision tower.
    waiting += max(0, per_chip(program.arguments) - memory.argument_size_in_bytes) / GIB
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    read = cost.get("bytes accessed")  # XLA does not count them for GPUs
    return {
        "fits": peak / GIB + waiting <= hbm_gib,
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 3),
        "temp_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "peak_gib": round(peak / GIB, 3),
        "beside_gib": round(waiting, 3),
        "tflops": round(dot_flops(traced.jaxpr.jaxpr) / chips / 1e12, 3),
        "bytes_gib": read and round(read / GIB, 3),
        "collectives": collectives(compiled.as_text()),
        "compile_s": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when everything fits, 1 when something does not, 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    chosen = [a.removeprefix("programs=").split(",") for a in arguments if a.startswith("programs=")]
    rest = [a for a in arguments[1:] if not a.startswith("programs=")]
    names = chosen[-1] if chosen else list(PROGRAMS)
    wrong = [name for name in names if name not in PROGRAMS]
    if wrong:
        print(f"error: programs={','.join(wrong)}: known are {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2
    from icseg_jax import train

    try:
        config = train.load_config(arguments[0], rest)
        if config.topology is None:
            raise train.ConfigError("topology= is missing, for example topology=v5p:4x4x4 or gpu:8")
        if config.stage != "rl":
            raise train.ConfigError(f"stage={config.stage}: a dry run compiles the programs of stage=rl")
        devices, hbm, target = open_topology(config.topology)
        mesh = train.make_mesh(config.mesh, devices)
        programs = trace_programs(config, mesh)
    except (train.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        print(f"error: policy.attention=cudnn: JAX wants cuDNN here to trace it; try xla ({error})", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "config": arguments[0], "topology": config.topology, "compiled_for": target, "mesh": dict(mesh.shape),
        "hbm_gib": round(hbm, 2), "fits": True, "programs": {},
    }  # fmt: skip
    for name in names:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        try:
            told = compile_one(programs[name], len(devices), hbm)
        except OSError as error:
            print(f"\nerror: {config.topology}: {name} {error}", file=sys.stderr)
            return 2
        report["programs"][name] = told
        report["fits"] &= told["fits"]
        short = told.get("error") or f"{told['peak_gib']} GiB and {told['beside_gib']} beside it of {hbm:.2f}"
        print(f"{short}, {told['compile_s']} s{'' if told['fits'] else ': DOES NOT FIT'}", file=sys.stderr)
    print(json.dumps(report))
    return 0 if report["fits"] else 1


if __name__ == "__main__":
    sys.exit(main())
