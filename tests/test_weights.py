"""Weight files: our parameter tree and Hugging Face's safetensors, byte for byte; and the tokenizers.

No torch here; `test_policy_parity.py` reads what transformers wrote and has transformers read what we write.
"""

import ast
import functools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from icseg_jax import train, weights

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make_config(*, tied=False, taps=(0, 2), layers=3, width=12, inner=20, vocabulary=11):
    return train.PolicyConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1e4, mrope_section=(2, 1, 1),
        tie_word_embeddings=tied, image_token_id=1, video_token_id=2, vision_start_token_id=3,
        vision_end_token_id=4,
        vision=train.VisionConfig(
            depth=4, hidden_size=8, intermediate_size=10, num_heads=2, out_hidden_size=width,
            num_position_embeddings=9, deepstack_visual_indexes=taps, patch_size=2, temporal_patch_size=2,
            spatial_merge_size=2,
        ),
    )  # fmt: skip


@functools.cache
def shapes_of(config):
    return train.parameter_shapes(config)


def make_params(config, dtype="float32"):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(DTYPES[dtype]), shapes_of(config))


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def write(path, config, params):
    weights.write_params(path, params, train.config_json(config))


def read(path, config, **kwargs):
    return weights.read_params(path, shapes_of(config), **kwargs)


@pytest.fixture
def policy(tmp_path):
    """A policy directory in one file, its config and its parameters."""
    config = make_config()
    params = make_params(config)
    write(tmp_path / "policy", config, params)
    return tmp_path / "policy", config, params


def edit(file: Path, change) -> None:
    """Rewrites the header of a safetensors file, which `change` edits in place; the data stay."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# Mapping


def test_names_shapes_and_transposes(policy):
    """The exact list of tensors, and each kind of transpose against an independent formula."""
    path, config, params = policy
    stored = safetensors.numpy.load_file(path / "model.safetensors")
    text = "input_layernorm post_attention_layernorm self_attn.q_norm self_attn.k_norm self_attn.q_proj "
    text += "self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
    expected = {
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
    }
    expected |= {f"model.language_model.layers.{i}.{name}.weight" for i in range(3) for name in text.split()}
    expected |= {"model.visual.pos_embed.weight"}
    mergers = ["merger", "deepstack_merger_list.0", "deepstack_merger_list.1"]
    both = [
        "patch_embed.proj",
        *(f"{m}.{part}" for m in mergers for part in ("norm", "linear_fc1", "linear_fc2")),
    ]
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
    both += [f"blocks.{i}.{part}" for i in range(4) for part in parts]
    expected |= {f"model.visual.{name}.{kind}" for name in both for kind in ("weight", "bias")}
    assert set(stored) == expected

    same, layer = np.testing.assert_array_equal, "model.language_model.layers.1."
    for h in range(4):  # head h is rows h*8 to h*8+7 of q_proj, and those columns of o_proj
        rows = slice(8 * h, 8 * h + 8)
        same(stored[layer + "self_attn.q_proj.weight"][rows], params["layers"]["q"][1, :, h].T)
        same(stored[layer + "self_attn.o_proj.weight"][:, rows], params["layers"]["o"][1, h].T)
    same(stored[layer + "mlp.down_proj.weight"], params["layers"]["down"][1].T)
    same(stored["lm_head.weight"], params["output"].T)
    # Taps at 0 and 2 cut four blocks into the runs 0 | 1 2 | 3; block 2 is the second of the second run.
    run = params["vision"]["blocks_1"]
    qkv = stored["model.visual.blocks.2.attn.qkv.weight"]
    for j in range(3):  # q, k, v one after the other, heads of 4
        for h in range(2):
            rows = slice(8 * j + 4 * h, 8 * j + 4 * h + 4)
            same(qkv[rows], run["qkv"][1, :, j, h].T)
            same(stored["model.visual.blocks.2.attn.qkv.bias"][rows], run["qkv_bias"][1, j, h])
    last = stored["model.visual.blocks.3.norm2.bias"]
    same(last, params["vision"]["blocks_2"]["norm2_bias"][0])
    conv = stored["model.visual.patch_embed.proj.weight"]
    assert conv.shape == (8, 3, 2, 2, 2)
    same(conv.reshape(8, -1), params["vision"]["patch"].T)
    fc = stored["model.visual.deepstack_merger_list.1.linear_fc2.weight"]
    same(fc, params["vision"]["deepstack_1"]["fc2"].T)


@pytest.mark.parametrize("taps", [(1,), (0, 1, 2), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_and_read_is_the_identity(dtype, taps, tmp_path, monkeypatch):
    config = make_config(tied=len(taps) != 1, taps=taps)
    params = make_params(config, dtype)
    write(tmp_path / "one", config, params)
    assert_same(read(tmp_path / "one", config), params)
    config_file = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config_file["dtype"] == dtype

    monkeypatch.setattr(weights, "SHARD_BYTES", 3000)
    write(tmp_path / "many", config, jax.tree.map(jax.numpy.asarray, params))
    assert_same(read(tmp_path / "many", config), params)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert files == sorted(f.name for f in (tmp_path / "many").glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    for file in files:
        with safetensors.safe_open(tmp_path / "many" / file, "np") as part:
            assert part.metadata() == {"format": "pt"}
            names = list(part.keys())
        assert all(index["weight_map"][name] == file for name in names)
        held = [weights._read_header(tmp_path / "many" / file)[name] for name in names]
        assert len(held) == 1 or sum(np.prod(t.shape) * np.dtype(DTYPES[dtype]).itemsize for t in held) <= 3000


def test_the_type_asked_for(policy):
    path, config, params = policy
    half = read(path, config, dtype="bfloat16")
    assert_same(half, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))
    assert_same(read(path, config, dtype=np.float32), params)


def test_a_tied_head_that_is_stored_and_old_names(tmp_path):
    config = make_config(tied=True)
    params = make_params(config)
    write(tmp_path, config, params)
    old = {}

    def rename(header):
        for name in list(header):
            short = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            old[short] = header[short] = header.pop(name)
        header["lm_head.weight"] = header["model.embed_tokens.weight"]

    edit(tmp_path / "model.safetensors", rename)
    assert "visual.pos_embed.weight" in old and "model.layers.0.mlp.up_proj.weight" in old
    assert_same(read(tmp_path, config), params)


@pytest.mark.parametrize("section, key, value", [
    ("", "model_type", "qwen2_vl"), ("", "model_type", "qwen3_vl_moe"), ("", "text_config", None),
    ("text_config", "hidden_act", "gelu"), ("text_config", "attention_bias", True),
    ("text_config", "rope_scaling", {"rope_type": "yarn", "mrope_section": [2, 1, 1]}),
    ("vision_config", "hidden_act", "relu"), ("text_config", "hidden_size", "missing"),
    ("text_config", "num_key_value_heads", 0), ("text_config", "num_attention_heads", "8"),
    ("text_config", "rope_theta", "many"), ("text_config", "rms_norm_eps", -1), ("vision_config", "depth", None),
    ("vision_config", "deepstack_visual_indexes", 3), ("", "image_token_id", 1.5),
    ("vision_config", "out_hidden_size", 7), ("vision_config", "in_channels", 4),
    ("vision_config", "deepstack_visual_indexes", []),
    ("vision_config", "deepstack_visual_indexes", [1, 0]), ("vision_config", "deepstack_visual_indexes", [99]),
    ("vision_config", "num_position_embeddings", 50), ("vision_config", "hidden_size", 18),
])  # fmt: skip
def test_what_this_policy_does_not_compute_is_refused(section, key, value):
    raw = train.config_json(make_config())
    part = raw[section] if section else raw
    if value == "missing":
        del part[key]
    else:
        part[key] = value
    with pytest.raises(train.ConfigError) as failed:
        train.PolicyConfig.from_json(raw, "there/config.json")
    named = "rope_type" if key == "rope_scaling" else key
    assert str(failed.value).startswith("there/config.json: ") and named in str(failed.value)


# Shards of a mesh, and memory


def run_python(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "tests"]), **environment},
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_device_gets_its_own_shard(policy):
    """Eight devices, every axis of the mesh in use: the same values, laid out as the rules say."""
    path, config, _ = policy
    code = f"""
        import jax, numpy as np
        from icseg_jax import train, weights
        from test_weights import make_config, make_params
        config, path = make_config(), {str(path)!r}
        for sizes in ((1, 4, 2), (2, 2, 2)):
            mesh = train.make_mesh(train.MeshSection(*sizes))
            _, params = train.load_policy(path, mesh)
            specs = train.parameter_specs(train.Policy(config), mesh)
            jax.tree.map(np.testing.assert_array_equal, params, make_params(config))
            assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, params, specs)))
        weights.write_params(path + "-again", params, train.config_json(config))
        try:  # four heads
            train.load_policy(path, train.make_mesh(train.MeshSection(1, 1, 8)))
        except train.ConfigError as error:
            assert str(error).startswith("mesh.tensor=8: does not divide all of heads="), error
            assert str(error).endswith("; use one of 1, 2"), error
        else:
            raise AssertionError
    """
    run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    again = path.with_name("policy-again")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("mesh", ["None", "train.make_mesh(train.MeshSection(1, 2, 2))"])
def test_peak_memory_of_a_large_checkpoint(mesh, tmp_path):
    """1.5 GB in shards: beyond the parameters' own memory, at most the largest tensor and 256 MB."""
    code = f"""
        import dataclasses, jax, numpy as np, re, pathlib
        from icseg_jax import train, weights
        from test_weights import make_config
        config = make_config(layers=24, width=1024, inner=3584, vocabulary=100_000)
        config = dataclasses.replace(config, tie_word_embeddings=True)
        path = {str(tmp_path / "large")!r}
        weights.SHARD_BYTES = 400 * 10**6
        shapes = train.parameter_shapes(config)
        params = jax.tree.map(lambda s: np.broadcast_to(np.float32(1), s.shape), shapes)
        weights.write_params(path, params, train.config_json(config))
        mesh = {mesh}
        status = pathlib.Path("/proc/self/status")
        memory = lambda key: int(re.search(key + r":\\s+(\\d+)", status.read_text())[1]) * 1024
        train.load_policy({str(tmp_path / "small")!r}, mesh)  # everything that loading imports
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = memory("VmRSS")
        _, params = train.load_policy(path, mesh)
        own = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
        largest = max(t.size * 4 for t in [params["embedding"], params["layers"]["gate"][0]])
        print(own, memory("VmHWM") - before - own, largest)
    """
    write(tmp_path / "small", make_config(), make_params(make_config()))
    try:
        printed = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    finally:
        shutil.rmtree(tmp_path / "large", ignore_errors=True)
    own, beyond, largest = map(int, printed.split())
    assert own > 1.4e9
    print(f"beyond the parameters: {beyond / 1e6:.0f} MB; largest tensor: {largest / 1e6:.0f} MB")
    assert beyond < largest + 256e6


# What is wrong is said in one line


def test_a_missing_shard_is_named(policy, monkeypatch):
    path, config, params = policy
    monkeypatch.setattr(weights, "SHARD_BYTES", 5000)
    shutil.rmtree(path)
    write(path, config, params)
    gone = sorted(path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=f"{gone.name}: missing; model.safetensors.index.json needs all") as error:
        read(path, config)
    one_line(error)


@pytest.mark.parametrize("keep", [0, 5, 40, 3000, -1])
def test_a_truncated_file(policy, keep):
    path, config, _ = policy
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut short") as error:
        read(path, config)
    assert str(file) in one_line(error)


Q = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.pop(Q), rf"tensor {Q} \[32, 12\] is missing"),
        (lambda h: h.pop("lm_head.weight"), r"lm_head.weight \[11, 12\] is missing; is tie_word_embeddings"),
        (lambda h: h[Q].update(shape=[12, 32]), rf"{Q} is \[12, 32\], config.json asks for \[32, 12\]"),
        (lambda h: h[Q].update(dtype="F8_E4M3"), rf"{Q} has dtype 'F8_E4M3'; F32, F16, BF16"),
        (lambda h: h[Q].update(dtype="BF16"), "header is damaged"),
        (lambda h: h[Q].update(data_offsets=[-8, 1528]), "header is damaged"),
        (lambda h: h[Q].update(data_offsets=[10**9, 10**9 + 1536]), "cut short"),
        (lambda h: h[Q].pop("shape"), "header is damaged"),
        (lambda h: h.update(extra=dict(h[Q])), "tensor 'extra' has no place"),
    ],
)
def test_a_tensor_that_does_not_fit(policy, change, says):
    path, config, _ = policy
    edit(path / "model.safetensors", change)
    with pytest.raises(ValueError, match=says) as error:
        read(path, config)
    one_line(error)


def test_layers_of_different_types(policy):
    """As stored means one type per leaf, since layers are stacked; a type that is asked for settles it."""
    path, config, params = policy
    stored = safetensors.numpy.load_file(path / "model.safetensors")
    stored[Q] = stored[Q].astype(np.float16)
    safetensors.numpy.save_file(stored, path / "model.safetensors")
    with pytest.raises(ValueError, match="layers/q is stored as F16 and F32 in different layers; ask for one dtype"):
        read(path, config)
    params["layers"]["q"][1] = params["layers"]["q"][1].astype(np.float16)
    assert_same(read(path, config, dtype="float32"), params)


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_or_one_that_leads_outside(policy, index):
    path, config, _ = policy
    (path / "model.safetensors").rename(path.parent / "outside.safetensors")
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json: damaged; its weight_map must name files of this directory"):
        read(path, config)


def test_no_weights_and_no_config(policy):
    path, config, _ = policy
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights; model.safetensors or model.safetensors.index.json must be"):
        read(path, config)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: missing or not JSON"):
        read(path, config)
    (path / "config.json").write_text('{"vision_config": {}}')
    with pytest.raises(ValueError, match="vision_config must be a mapping"):
        read(path, config)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path, config = tmp_path_factory.mktemp("intact") / "policy", make_config(layers=1, taps=(1,))
    write(path, config, make_params(config))
    return path, shapes_of(config), (path / "model.safetensors").read_bytes()


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.data())
def test_any_damage_is_one_line(intact, data):
    """Bytes of the header changed at random: the parameters or a ValueError, never anything else."""
    path, shapes, whole = intact
    (length,) = struct.unpack("<Q", whole[:8])
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length))] = data.draw(st.integers(0, 255))
    (path / "model.safetensors").write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2]))])
    try:
        weights.read_params(path, shapes)
    except ValueError as error:
        assert "\n" not in str(error)


# Writing


def test_companions_are_copied_and_nothing_else(policy, tmp_path):
    path, config, params = policy
    source = tmp_path / "source"
    source.mkdir()
    kept = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"]
    kept += ["preprocessor_config.json", "generation_config.json", "special_tokens_map.json", "merges.txt"]
    for name in [*kept, "model.safetensors", "optimizer.pt", "config.json", "notes.txt"]:
        (source / name).write_text(name)
    raw = train.config_json(config) | {"torch_dtype": "float16", "_name": "kept"}
    raw["text_config"]["torch_dtype"] = "float16"
    weights.write_params(tmp_path / "new" / "policy", params, raw, source=source)
    made = tmp_path / "new" / "policy"
    assert {f.name for f in made.iterdir()} == {*kept, "config.json", "model.safetensors"}
    assert all((made / name).read_text() == name for name in kept)
    written = json.loads((made / "config.json").read_text())
    assert written["dtype"] == written["text_config"]["dtype"] == "float32" and written["_name"] == "kept"
    assert "torch_dtype" not in written and "torch_dtype" not in written["text_config"]
    assert raw["torch_dtype"] == "float16"  # the caller's is left alone
    with pytest.raises(ValueError, match="no such directory to copy the tokenizer from"):
        weights.write_params(tmp_path / "other", params, raw, source=tmp_path / "nowhere")


def test_an_earlier_policy_is_replaced_and_anything_else_left_alone(policy, tmp_path):
    path, config, params = policy
    other = jax.tree.map(lambda x: x + 1, params)
    write(path, config, other)
    assert_same(read(path, config), other)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", config, params)
    assert_same(read(tmp_path / "empty", config), params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "policy"]  # no leftovers

    (path / "thesis.tex").write_text("years of work")
    (tmp_path / "home" / ".git").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for name, says in {
        "policy": "holds thesis.tex",
        "home": r"holds \.git",
        "data": "has no config.json",
        "file": "is a file",
        "file/below": "can not be written",
    }.items():
        with pytest.raises(ValueError, match=says) as error:
            write(tmp_path / name, config, params)
        one_line(error)
    assert (path / "thesis.tex").read_text() == "years of work"
    assert_same(read(path, config), other)


def test_a_failure_in_the_middle_leaves_what_was_there(policy, monkeypatch):
    path, config, params = policy
    calls = iter(range(100))

    def fails(self, part):
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        return np.ascontiguousarray(part).reshape(self.shape)

    monkeypatch.setattr(weights.Tensor, "export", fails)
    with pytest.raises(ValueError, match="can not be written .No space left on device."):
        write(path, config, jax.tree.map(lambda x: x + 1, params))
    assert [p.name for p in path.parent.iterdir()] == ["policy"]
    assert_same(read(path, config), params)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", True), ("vocab_size", 12), ("num_hidden_layers", 2), ("depth", 5)],
)
def test_a_config_of_other_weights_is_refused(tmp_path, key, value):
    config = make_config()
    raw = train.config_json(config)
    next(part for part in (raw, raw["text_config"], raw["vision_config"]) if key in part)[key] = value
    with pytest.raises(ValueError, match=f"{key} is {value}, the parameters have") as error:
        weights.write_params(tmp_path / "policy", make_params(config), raw)
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_types_that_no_checkpoint_has(tmp_path):
    config = make_config()
    params = jax.tree.map(lambda x: x.astype(np.float64), make_params(config))
    with pytest.raises(ValueError, match="is float64; float32, float16, bfloat16 can be written"):
        write(tmp_path / "policy", config, params)


# Between whole directories


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("bfloat16", {"tied": True}), ("float16", {"taps": (0, 1, 3)}), ("bfloat16", {"taps": (1,)})],
)
def test_import_and_export_again_are_the_same_bytes(tmp_path, capsys, monkeypatch, dtype, options):
    monkeypatch.setattr(weights, "SHARD_BYTES", 8_000)  # several files
    config = make_config(**options)
    params = make_params(config, dtype)
    write(tmp_path / "theirs", config, params)
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    places = {name: str(tmp_path / name) for name in ("theirs", "ours", "back")}
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1

    shapes = weights.shapes_in(tmp_path / "theirs")
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, shapes_of(config))
    assert weights.main(["import", places["theirs"], places["ours"]]) == 0
    read_back, imported = train.load_policy(places["ours"])
    assert read_back == config
    assert_same(jax.tree.map(np.asarray, imported), params)
    assert weights.main(["export", places["ours"], places["back"]]) == 0
    assert weights.main(["export", f"{places['ours']}/checkpoints/0", places["back"]]) == 0  # replaces the earlier one
    assert capsys.readouterr().out.split() == [places["ours"], places["back"], places["back"]]
    for file in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_average_of_policies(tmp_path, capsys):
    config = make_config()
    rng = np.random.default_rng(1)
    draw = lambda x: rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    made = [jax.tree.map(draw, shapes_of(config)) for _ in range(3)]
    for i, params in enumerate(made):
        write(tmp_path / str(i), config, params)
    places = [str(tmp_path / name) for name in ("0", "1", "2", "mean")]
    assert weights.main(["average", *places]) == 0 and capsys.readouterr().out.strip() == places[-1]
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x).astype(np.float64), 0), *made)
    for a, b in zip(jax.tree.leaves(read(tmp_path / "mean", config)), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert (tmp_path / "mean" / "config.json").read_text() == (tmp_path / "0" / "config.json").read_text()

    other = make_config(width=16)
    write(tmp_path / "other", other, make_params(other))
    for given, says in (([places[0], str(tmp_path / "other")], "another shape"), ([places[0]], "no mean")):
        assert weights.main(["average", *given, str(tmp_path / "new")]) == 2
        told = capsys.readouterr().err
        assert says in told and told.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["import", "nowhere", "{new}"], "nowhere: no such directory"),
        (["import", "{base}", "{here}"], "is there already; give a new directory"),
        (["import", "{here}", "{new}"], "config.json: missing or not JSON"),
        (["import", "{base}"], "not a call"),
        (["import", "{base}", "{new}", "tokenizer={base}"], "not a call"),
        (["move", "{base}", "{new}"], "not a call"),
        (["export", "tokenizer={base}"], "not a call"),
        (["tokenizer={base}"], "not a call"),
        (["export", "{base}", "{new}"], "neither a run nor one of our checkpoints"),
        (["export", "{run}", "{new}"], "holds no checkpoint yet"),
        (["export", "{run}/checkpoints/3", "{new}"], "can not be restored"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, says, tmp_path, capsys):
    (tmp_path / "here" / "precious").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "policy.json").write_text("{}")
    if "{run}/checkpoints/3" in arguments:
        (tmp_path / "run" / "checkpoints" / "3").mkdir()
        (tmp_path / "run" / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    places = {name: tmp_path / name for name in ("new", "here", "run")}
    base = Path(train.__file__).parent / "assets" / "embedded_base"
    assert weights.main([a.format(base=base, **places) for a in arguments]) == 2
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and not out.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("change", ["kind", "heads", "no_heads", "taps", "no_numbers"])
def test_a_config_of_other_weights_is_not_imported(policy, tmp_path, change):
    path, _, _ = policy
    raw = json.loads((path / "config.json").read_text())
    if change == "kind":
        raw["model_type"] = "qwen3_vl_moe"
    elif change == "heads":
        raw["text_config"]["num_attention_heads"] = 5
    elif change == "no_heads":
        del raw["text_config"]["num_attention_heads"]
    else:
        raw["vision_config"]["deepstack_visual_indexes"] = [2, 0] if change == "taps" else ["a", "b"]
    (path / "config.json").write_text(json.dumps(raw))
    says = {"heads": "heads", "kind": "model_type is 'qwen3_vl_moe'"}.get(change, "not those of a Qwen3-VL")
    with pytest.raises(ValueError, match=says) as error:
        weights.import_policy(path, tmp_path / "new")
    one_line(error)
    assert not (tmp_path / "new").exists()


def test_this_room_knows_nothing_of_the_method():
    tree = ast.parse(Path(weights.__file__).read_text())
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [name for name in names if re.search(r"torch|icseg_jax|transformers|pickle", name)]


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    words = ["which", "colour", "circle", "left", "is", "?", ".", "[", "]"]
    made = weights.build_word_tokenizer(words, ["<call>", "</call>", ' {"box": ['], frames=12, coordinate_step=10)
    (path / "tokenizer.json").write_text(made.to_str())
    return weights.Tokenizer(path)


PIECES = ["which", " colour", " circle", " left ?", "<|im_start|>", "<|im_end|>\n", "\n\n", " 7", "990",
          ", 20", "<call>", "</call>", ' {"box": [', " ", "<|image_pad|>"]  # fmt: skip


@hypothesis.given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_known_text_survives_and_tokens_spell_themselves(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    if "<unk>" not in tokenizer.decode(ids):  # pieces that run together may make a word of their own
        assert tokenizer.decode(ids) == text
        special = {i: name for name, i in tokenizer.ids.items()}
        spelled = b"".join(special[i].encode() if i in special else tokenizer.spelling()[i] for i in ids)
        assert spelled.decode() == text


def test_protocol_and_numbers_are_single_tokens(tokenizer):
    for text in ["<|im_end|>", "<call>", ' {"box": [', " circle", "circle", ", 430", "1000", " -1", "\n"]:
        assert len(tokenizer.encode(text)) == 1, text
    assert tokenizer.end_of_turn == tokenizer.ids["<|im_end|>"] and len(tokenizer) == len(tokenizer.spelling())
    assert tokenizer.spelling()[tokenizer.end_of_turn] == b""
    assert tokenizer.decode(tokenizer.encode("zebra")) == "<unk>"


def test_byte_level_tokens_spell_their_bytes(tmp_path):
    """A small byte-level BPE as Qwen's: every byte has a letter, and accents come back as UTF-8."""
    import tokenizers

    letters = weights._byte_letters()
    assert sorted(letters.values()) == list(range(256))
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Ġa": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ġ", "a")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([name for name in weights.SPECIALS if name != "<|vision_pad|>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    tokenizer = weights.Tokenizer(tmp_path)
    text = "où est a\tça ? 見"
    ids = tokenizer.encode(text)
    assert 256 in ids and b"".join(tokenizer.spelling()[i] for i in ids).decode() == tokenizer.decode(ids) == text


@pytest.mark.parametrize(("text", "says"), [(None, "no such file"), ("{", "not a tokenizers JSON")])
def test_a_tokenizer_that_is_not_there(tmp_path, text, says):
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        weights.Tokenizer(tmp_path)


def test_a_tokenizer_without_the_special_tokens(tmp_path):
    import tokenizers

    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).to_str())
    with pytest.raises(ValueError, match="special token <|endoftext|> is missing".replace("|", r"\|")):
        weights.Tokenizer(tmp_path)


def test_a_fingerprint_tells_weights_apart(tmp_path):
    policy, file = tmp_path / "policy", tmp_path / "sam2.pt"
    policy.mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (policy / name).write_text("1")
    file.write_text("1")
    first = weights.fingerprint(policy)
    (policy / "README.md").write_text("2")
    assert weights.fingerprint(policy) == first
    (policy / "model.safetensors").write_text("2")
    assert weights.fingerprint(policy) != first
    seen = {weights.fingerprint(file)}
    file.write_text("2")
    run = tmp_path / "3"
    run.mkdir()
    for stamp in ("1", "2"):
        (run / "_CHECKPOINT_METADATA").write_text(stamp)
        seen.add(weights.fingerprint(run))
    assert len(seen | {weights.fingerprint(file), weights.fingerprint(tmp_path / "nothing")}) == 5
