"""The sidecar: a real process with the shipped segmenter, its protocol, its death, and its training."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from icseg_jax import data, sam2_sidecar, synthetic
from icseg_jax.sam2_sidecar import (
    ASSET,
    EmbeddingStore,
    Prompt,
    SegmenterClient,
    Server,
    SidecarError,
    Track,
    decode_message,
    encode_message,
    load_segmenter,
    load_train_config,
    pack_mask,
    parse_address,
    prompt_of_mask,
    unpack_mask,
)

ROOT = Path(__file__).parents[1]


def scene_objects(count, seed=11):
    """Test-split frames with one visible object each: (name, frame, image, mask, prompt)."""
    found, index = [], 0
    while len(found) < count:
        scene = synthetic.make_scene(index, seed=seed, split="test")
        frame = index % scene.n_frames
        masks = synthetic.visible_masks(scene, frame)
        mask = masks[index % len(masks)]
        index += 1
        if mask.sum() > 60:
            image = synthetic.render(scene, [frame])[0]
            found.append((scene.id, frame, image, mask, prompt_of_mask(mask)))
    return found


def rows_of(objects):
    return [{"video": o[0], "frame": o[1], "box": o[4].box, "point": o[4].point} for o in objects]


def overlap(mask, truth):
    return (mask & truth).sum() / max((mask | truth).sum(), 1)


def register(client, objects):
    for name, frame, image, mask, _ in objects:
        client.register(name, frame, image, mask)


@pytest.fixture(scope="module")
def objects():
    return scene_objects(40)


@pytest.fixture(scope="module")
def client(objects, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("sidecar") / "sidecar.log"
    with SegmenterClient(log_file=log_file, timeout_s=60) as client:
        register(client, objects)
        yield client


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter(ASSET)


def ask(client, parts):
    """One raw message to the client's server, and its raw reply."""
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{client._directory}/socket" if client.address is None else client.address)
        socket.send_multipart(parts)
        assert socket.poll(60_000), "the server does not answer"
        return msgpack.unpackb(socket.recv_multipart()[1])


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# -- what it draws ---------------------------------------------------------------------------------


def test_visible_masks_from_box_and_point(client, objects):
    iou, valid = client.mask_iou(rows_of(objects))
    assert valid.all() and iou.dtype == np.float32
    assert iou.mean() >= 0.90


def test_scores_are_those_of_the_masks(client, objects):
    rows = rows_of(objects[:6])
    masks = client.segment(rows)
    expected = [overlap(mask, o[3]) for mask, o in zip(masks, objects[:6], strict=True)]
    np.testing.assert_allclose(client.mask_iou(rows)[0], expected, rtol=1e-6)


def test_a_segmenter_is_measured(capsys):
    assert sam2_sidecar.main(["measure", "--scenes", "3", "--clips", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["iou"] > 0.8 and 0.3 < told["track"] <= 1 and "complete_occluded" in told


def test_a_segmenter_of_visible_masks_alone_is_measured():
    model = sam2_sidecar.build_model(sam2_sidecar.mini_config(64, 8, [1, 1, 2, 1], 32, 4))
    told = sam2_sidecar.measure(sam2_sidecar.Segmenter(model), 2, 1)
    assert {"iou", "track"} <= told.keys() and not any("complete" in name for name in told)


def test_tracks_a_clip_both_ways(client):
    """J over all 12 frames of 8 clips, prompted at the shown frame that shows most of the object.

    A floor for the code. How well the asset tracks needs more clips than a test has time for: its README.
    """
    scores = []
    for index in range(8):
        scene = synthetic.make_scene(index, seed=12, split="test")
        truth = np.stack([synthetic.visible_masks(scene, t)[0] for t in range(scene.n_frames)])
        best = max(synthetic.shown_frames(), key=lambda t, truth=truth: truth[t].sum())
        prompt = prompt_of_mask(truth[best])
        masks = client.track(synthetic.render(scene, range(scene.n_frames)), best, prompt.box, prompt.point)
        scores.append([overlap(mask, seen) for mask, seen in zip(masks, truth, strict=True)])
        assert scores[-1][best] > 0.5
    assert np.mean(scores) >= 0.85
    assert np.mean(scores, 0)[[0, -1]].min() > 0.8


def test_complete_masks_are_other_masks(client):
    scene = synthetic.make_scene(2, seed=12, split="test")
    frames = synthetic.render(scene, range(scene.n_frames))
    prompt = prompt_of_mask(synthetic.visible_masks(scene, 3)[0])
    seen, whole = (client.track(frames, 3, prompt.box, prompt.point, kind) for kind in ("modal", "amodal"))
    assert whole.shape == seen.shape == frames.shape[:3] and (whole != seen).any()


def test_complete_masks_beat_a_perfect_visible_one(client):
    """R2SM's bound (DATA.md 2.3): whoever answers with exactly what is seen scores 1 - occlude_rate. The prompt is
    the visible part's, so that what is hidden has to be made up. Over 60 objects of which more than 15 % is hidden,
    the subset that DATA.md 2.2 calls occluded; how far below that it holds takes more objects (the asset's README)."""
    found = (row for row in sam2_sidecar.occluded_objects(seed=15) if row[1].sum() < 0.85 * row[2].sum())
    rows, seen, whole = [], [], []
    for n, (image, visible, complete) in enumerate(itertools.islice(found, 60)):
        client.register("occluded", n, image)
        prompt = prompt_of_mask(visible)
        rows.append({"video": "occluded", "frame": n, "box": prompt.box, "point": prompt.point})
        seen.append(visible)
        whole.append(complete)

    def score(masks):
        return np.mean([overlap(mask, truth) for mask, truth in zip(masks, whole, strict=True)])

    drawn = score(client.segment([{**row, "mask_type": "amodal"} for row in rows]))
    assert drawn >= score(seen) + 0.02, (drawn, score(seen))
    assert drawn > score(client.segment(rows))


# -- long videos -----------------------------------------------------------------------------------


def follow(client, frames, objects):
    """Masks [object, t, h, w] and the order in which frames were read and pairs came."""
    read, came, answered = [], [], 0
    masks = np.zeros((len(objects), *frames.shape[:3]), bool)

    def reader(t):
        read.append(t)
        assert len(read) - answered <= sam2_sidecar.CHUNK  # it never runs ahead
        return frames[t]

    for t, i, mask in client.stream(reader, len(frames), objects):
        answered = len(read)
        came.append((t, i))
        masks[i, t] = mask
    return masks, read, came


def test_several_objects_share_a_video(client):
    """Prompted in different frames, by different kinds of prompts, one of them complete and one of nothing."""
    scene = synthetic.make_scene(5, seed=17, split="test")
    frames = synthetic.render(scene, range(scene.n_frames))
    objects = []
    for n, (position, kind) in enumerate([(3, "both"), (3, "both"), (8, "box"), (0, "both"), (8, "none")]):
        seen = synthetic.visible_masks(scene, position)
        prompt = prompt_of_mask(seen[[i for i in range(len(seen)) if seen[i].sum() > 60][n % 2]])
        objects.append({"position": position, "box": prompt.box if kind != "none" else [0] * 4,
                        "point": prompt.point if kind == "both" else [0] * 2,
                        "mask_type": "amodal" if n == 1 else "modal"})
    before = client.stats()["encoded"]
    together, read, came = follow(client, frames, objects)
    assert client.stats()["encoded"] - before == len(frames)
    assert sorted(came) == [(t, i) for t in range(12) for i in range(5)]
    assert read == [*range(12), *range(7, -1, -1)]
    assert not together[4].any() and together[:4].any((2, 3)).sum() > 30
    for i in (0, 1, 2):
        alone = client.track(frames, *objects[i].values())
        assert (alone != together[i]).mean() < 1e-4  # a batch of another size may round differently


def test_a_track_survives_the_sidecar(client):
    scene = synthetic.make_scene(6, seed=12, split="test")
    frames = np.concatenate([synthetic.render(scene, range(scene.n_frames))] * 2)
    prompt = prompt_of_mask(synthetic.visible_masks(scene, 0)[0])
    objects = [{"position": 0, "box": prompt.box, "point": prompt.point}]
    expected, _, order = follow(client, frames, objects)
    came, masks, restarts = [], [], client.restarts
    for t, i, mask in client.stream(frames.__getitem__, len(frames), objects):
        came.append((t, i))
        masks.append(mask)
        if len(came) == 10:
            os.kill(client.pid, signal.SIGKILL)
    assert came == order and np.array_equal(np.stack(masks), expected[0]) and client.restarts == restarts + 1


def test_frames_that_are_none(client):
    objects = [{"position": 0, "box": [1, 1, 9, 9], "point": [5, 5]}]
    with pytest.raises(ValueError, match=r"frame 1: expected uint8 \[h, w, 3\], not float64 \[4, 4\]"):
        list(client.stream([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4))].__getitem__, 2, objects))
    with pytest.raises(SidecarError, match="position: expected 0..1, not 2"):
        list(client.stream(lambda t: None, 2, [{**objects[0], "position": 2}]))
    for message in ({"frames": 0, "objects": objects}, {"frames": 5, "objects": []}, {"frames": 2},
                    {"frames": 2, "objects": [{**objects[0], "mask_type": "both"}]}):
        assert ask(client, [b"", msgpack.packb({"op": "track", **message})]).get("error")
    assert ask(client, encode_message({"op": "advance", "track": "nobody's", "images": []})) == {"forgotten": True}
    begun = ask(client, encode_message({"op": "track", "frames": 10**15, "objects": objects}))  # costs no memory
    assert begun["next"] == list(range(8))
    again = encode_message({"op": "advance", "track": begun["track"], "images": []})
    assert ask(client, again)["error"] == "images: expected 8, not 0" and ask(client, again) == {"forgotten": True}


def test_more_videos_than_a_few_are_followed_at_a_time(segmenter, monkeypatch):
    """One for each process of a pod: only what nobody goes on with is given up, and what is beyond all bounds."""
    server = Server(segmenter)
    begin = {"op": "track", "frames": 9, "objects": [{"position": 0, "box": [1, 1, 9, 9], "point": [0, 0]}]}
    images = [{"image": bytes(12), "shape": [2, 2, 3]}] * 8
    monkeypatch.setattr(Track, "advance", lambda self, features, sizes: setattr(self, "done", 8) or [])
    monkeypatch.setattr(server, "embed", lambda image, keep: [])
    first, *others = [server.answer(begin)["track"] for _ in range(20)]
    assert server.answer({"op": "advance", "track": first, "images": images})["next"] == [8]
    assert set(server.tracks) == {first, *others}
    clock = time.monotonic
    monkeypatch.setattr(sam2_sidecar.time, "monotonic", lambda: clock() + sam2_sidecar.IDLE / 2)
    server.answer({"op": "advance", "track": others[0], "images": images})
    monkeypatch.setattr(sam2_sidecar.time, "monotonic", lambda: clock() + 1.25 * sam2_sidecar.IDLE)
    late = server.answer(begin)["track"]
    assert set(server.tracks) == {others[0], late}
    for _ in range(sam2_sidecar.TRACKS):
        server.answer(begin)
    assert len(server.tracks) == sam2_sidecar.TRACKS and late not in server.tracks


@pytest.mark.slow
def test_two_thousand_frames_need_the_memory_of_a_few(tmp_path):
    """Neither process grows with the video: 0.6 GB of pixels pass through less than 0.1 GB."""
    config = sam2_sidecar.mini_config(64, 8, [1, 1, 2, 1], 32, 4)
    sam2_sidecar.save_segmenter(tmp_path / "small", sam2_sidecar.build_model(config), config)

    def resident(pid):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    noise = np.random.default_rng(0).integers(0, 256, (240, 427, 3), np.uint8)
    objects = [{"position": 1000, "box": [100, 100, 500, 500], "point": [300, 300]}]
    with SegmenterClient(segmenter=tmp_path / "small", log_file=tmp_path / "log") as client:
        seen, early = set(), None
        for t, _, mask in client.stream(lambda t: np.roll(noise, t), 2000, objects):
            assert mask.shape == (240, 427)
            seen.add(t)
            if len(seen) == 50:
                early = resident(os.getpid()), resident(client.pid)
        assert seen == set(range(2000)) and client.stats()["encoded"] > 1900
        growth = resident(os.getpid()) - early[0], resident(client.pid) - early[1]
    assert max(growth) < 1e8, growth


# -- embeddings on disk ----------------------------------------------------------------------------


def test_embeddings_survive_the_process(client, objects, tmp_path, monkeypatch):
    """And a mask is the same with them, without them, and when one is damaged, bit for bit."""
    expected = client.mask_iou(rows_of(objects[:8]))[0]
    folder = tmp_path / "embeddings"
    monkeypatch.setenv(sam2_sidecar.CACHE_VARIABLE, str(folder))
    with SegmenterClient(cache_gb=1, log_file=tmp_path / "log") as cached:
        register(cached, objects[:8])
        for encoded, loaded in ((8, 0), (2, 6), (0, 8)):
            assert np.array_equal(cached.mask_iou(rows_of(objects[:8]))[0], expected)
            stats = cached.stats()
            assert (stats["encoded"], stats["loaded"]) == (encoded, loaded)
            cached.track(np.stack([255 - objects[0][2]] * 2), 0, objects[0][4].box, objects[0][4].point)
            files = sorted(folder.iterdir())
            assert len(files) == 8  # the tracked video's are not kept
            cached.close()
            if encoded == 8:
                files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
                files[1].write_bytes(b"")
    assert (tmp_path / "log").read_text().count("computed again (damaged)") == 2


def test_the_folder_of_embeddings_is_bounded(segmenter, objects, tmp_path, caplog):
    store = EmbeddingStore(tmp_path / "e", 1e6, segmenter)
    (tmp_path / "e" / "left.tmp").write_bytes(b"by a process that was killed")
    os.utime(tmp_path / "e" / "left.tmp", (0, 0))
    server = Server(segmenter, store=store)
    for n, o in enumerate(objects[:7]):  # 221 kB each
        server.embed(o[2])
        assert sum(file.stat().st_size for file in (tmp_path / "e").iterdir() if file.suffix != ".tmp") <= 1e6
        for file in (tmp_path / "e").glob("*.embedding"):  # the clock's grain must not decide who is oldest
            os.utime(file, (min(file.stat().st_mtime, n), min(file.stat().st_mtime, n)))
    assert not list((tmp_path / "e").glob("*.tmp"))
    names = {file.name for file in (tmp_path / "e").iterdir()}
    assert 2 <= len(names) <= 4
    # Another model's embeddings are other files; a smaller limit is met at the start.
    other = load_segmenter(ASSET)
    other.model.no_mem_embed.data[0] += 1
    assert EmbeddingStore(tmp_path / "e", 5e5, other).load(b"frame") is None
    assert store._file(b"frame") != EmbeddingStore(tmp_path / "e", 5e5, other)._file(b"frame")
    left = {file.name for file in (tmp_path / "e").iterdir()}
    assert left < names and len(left) == 2
    # A disk that fails is one line, and the work goes on.
    shutil.rmtree(tmp_path / "e")
    (tmp_path / "e").write_bytes(b"")
    for o in objects[7:10]:
        assert len(server.embed(o[2])) == 3
    assert caplog.text.count("no more embeddings are kept") == 1


# -- SAM 2.1 as it was released --------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint of the tiny model's shapes in the released layout, random but for a head that always sees
    something: the real weights are not here."""
    import torch

    config = sam2_sidecar._read_released(fake_checkpoint(tmp_path_factory.mktemp("fake"), 96, 12))[0]
    torch.manual_seed(0)
    model = sam2_sidecar.build_model(config)
    torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 9.0)
    file = tmp_path_factory.mktemp("released") / "tiny.pt"
    torch.save({"model": model.state_dict()}, file)
    yield file
    file.unlink()  # 156 MB


def fake_checkpoint(folder, channels, blocks, **more):
    """What tells the sizes apart, and nothing else."""
    import torch

    names = [f"image_encoder.trunk.blocks.{i}.norm1.weight" for i in range(blocks)]
    weights = {name: torch.zeros(1) for name in names} | {"no_obj_embed_spatial": torch.zeros(1, 64)}
    weights["image_encoder.trunk.patch_embed.proj.weight"] = torch.zeros(channels, 3, 7, 7)
    torch.save({"model": weights | more}, folder / "x.pt")
    return folder / "x.pt"


@pytest.mark.parametrize("letter, channels, blocks", [("t", 96, 12), ("s", 96, 16), ("b+", 112, 24), ("l", 144, 48)])
def test_released_sizes_find_their_configuration(letter, channels, blocks, tmp_path):
    import sam2
    from omegaconf import OmegaConf

    config = sam2_sidecar._read_released(fake_checkpoint(tmp_path, channels, blocks))[0]
    theirs = OmegaConf.load(Path(sam2.__path__[0]) / f"configs/sam2.1/sam2.1_hiera_{letter}.yaml")["model"]
    assert {key: config[key] for key in theirs} == theirs
    with pytest.raises(ValueError, match="don't fit"):
        load_segmenter(tmp_path / "x.pt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:cannot import name '_C':UserWarning")  # its CUDA extension
def test_a_released_checkpoint_tracks_like_the_package(released, monkeypatch):
    """The package builds and loads its predictor itself, with its defaults; ours gets the path alone."""
    import sam2.sam2_video_predictor as package
    from sam2.build_sam import build_sam2_video_predictor

    ours = load_segmenter(released)
    frames = np.stack([o[2] for o in scene_objects(2, seed=16)])
    predictor = build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml", str(released), device="cpu")
    monkeypatch.setattr(package, "load_video_frames", lambda **_: (ours.pixels(frames), 128, 128))
    state = predictor.init_state("unused")
    box, point = np.array([20, 30, 70, 90], np.float32), np.array([[40, 50]], np.float32)
    predictor.add_new_points_or_box(state, 0, 1, points=point, labels=np.array([1]), box=box)
    expected = np.stack([logits[0, 0].numpy() > 0 for _, _, logits in predictor.propagate_in_video(state, 0)])
    prompt = Prompt(tuple((box / 0.128).tolist()), tuple((point[0] / 0.128).tolist()))
    masks = ours.track([ours.embed(frame) for frame in frames], 0, prompt, (128, 128))
    assert 0.01 < expected.mean() < 0.99 and (masks[0] != expected[0]).mean() < 1e-3
    assert (masks[1] != expected[1]).mean() < 0.02  # the package keeps its memory in bfloat16


def test_a_released_checkpoint_is_imported_once(released, tmp_path, capsys):
    assert sam2_sidecar.main(["import", str(released), str(tmp_path / "out")]) == 0
    assert "sidecar.segmenter=" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    ours, theirs = load_segmenter(tmp_path / "out"), load_segmenter(released)
    assert ours.config == theirs.config
    mine = ours.model.state_dict()
    assert all(weight.equal(mine[name]) for name, weight in theirs.model.state_dict().items())
    assert sam2_sidecar.main(["import", str(released), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


def test_files_that_are_no_released_checkpoint(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file; get one of sam2.1_hiera_tiny.pt, .* from https://dl"):
        load_segmenter(tmp_path / "sam2.1_hiera_large.pt")
    with pytest.raises(FileNotFoundError, match="or a SAM 2.1 checkpoint, such as https://dl"):
        load_segmenter(tmp_path / "models/sam2.1_hiera_large")
    file = tmp_path / "bad.pt"
    for content in (b"", b"PK\x03\x04 half", (ASSET / "model.safetensors").read_bytes()[:4000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="not a SAM 2.1 checkpoint") as error:
            load_segmenter(file)
        assert "\n" not in str(error.value)
    for content in (Trap(), {"model": Trap()}, {}, {"model": [1]}, {"model": {"a": 1}}, 3):
        torch.save(content, file)
        with pytest.raises(ValueError, match="not a SAM 2.1 checkpoint"):
            load_segmenter(file)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(ValueError, match="not a SAM 2.1 checkpoint; get"):
        load_segmenter(fake_checkpoint(tmp_path, 96, 13))
    with pytest.raises(ValueError, match="not all of its weights are tensors"):
        load_segmenter(fake_checkpoint(tmp_path, 96, 12, other="text"))
    with pytest.raises(ValueError, match="ends in .pt"):
        sam2_sidecar.import_checkpoint(ASSET, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_mask_depends_neither_on_company_nor_on_the_cache(client, objects):
    """Bit for bit: alone, in another order, after a restart with empty caches, and beside amodal rows."""
    rows = rows_of(objects[:20])
    together = client.mask_iou(rows)[0]
    alone = np.concatenate([client.mask_iou([row])[0] for row in rows])
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = client.mask_iou([rows[i] for i in order])[0]
    mixed = client.mask_iou([{**rows[i // 2], "mask_type": ("modal", "amodal")[i % 2]} for i in range(40)])[0]
    client.close()
    fresh = client.mask_iou(rows[:7])[0]
    assert np.array_equal(together, alone) and np.array_equal(together[order], shuffled)
    assert np.array_equal(together, mixed[::2]) and np.array_equal(together[:7], fresh)
    masks = client.segment(rows[:9])
    for row, mask in zip(rows[:9], masks, strict=True):
        assert np.array_equal(client.segment([row])[0], mask)


def test_zero_box_or_point_is_left_out(client, objects):
    row = rows_of(objects[:1])[0]
    nothing, point, both = client.segment([{**row, "box": [0] * 4, "point": [0] * 2},
                                           {**row, "box": [0] * 4}, row])
    assert not nothing.any() and point.any() and both.any()
    assert client.mask_iou([{**row, "box": [0] * 4, "point": [0] * 2}])[0][0] == 0
    assert not client.track(np.stack([objects[0][2]] * 2), 0, [0] * 4, [0] * 2).any()


def test_an_empty_truth_earns_nothing(client, objects):
    name, frame, image, mask, _ = objects[0]
    client.register(name + "-absent", frame, image, np.zeros_like(mask))
    row = {"video": name + "-absent", "frame": frame, "box": [0] * 4, "point": [0] * 2}
    iou, valid = client.mask_iou([row])
    assert valid.all() and iou[0] == 0


def test_sequential_prompting_is_another_mask(segmenter, objects):
    _, _, image, mask, prompt = objects[3]
    features = segmenter.embed(image)
    joint, sequential = (segmenter.segment([features], [prompt], how)[0] for how in ("joint", "sequential"))
    assert not np.array_equal(joint.numpy(), sequential.numpy())
    drawn = sam2_sidecar.to_mask(sequential, mask.shape)
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.7


def test_images_may_come_as_files(client, objects):
    buffer = io.BytesIO()
    Image.fromarray(objects[0][2]).save(buffer, "PNG")
    entry = {"video": "file", "frame": 0, "image": buffer.getvalue(), "truth": pack_mask(objects[0][3])}
    row = {**rows_of(objects[:1])[0], "video": "file", "frame": 0}
    reply = ask(client, encode_message({"op": "segment", "frames": [entry], "rows": [row], "want": "iou"}))
    assert reply["rows"][0]["iou"] == pytest.approx(client.mask_iou(rows_of(objects[:1]))[0][0])


# -- the package's own predictors are the oracle ---------------------------------------------------


def test_tracks_like_the_packages_predictor(segmenter, monkeypatch):
    import sam2.sam2_video_predictor as package
    from hydra.utils import instantiate

    scene = synthetic.make_scene(4, seed=12, split="test")
    there_and_back = [*range(12), *range(10, -1, -1), *range(1, 8)]  # long enough for memories to be forgotten
    frames, position = synthetic.render(scene, there_and_back), 14
    prompt = prompt_of_mask(synthetic.visible_masks(scene, there_and_back[position])[0])
    config = json.loads((ASSET / "config.json").read_text())
    predictor = instantiate({**config, "_target_": "sam2.sam2_video_predictor.SAM2VideoPredictor"}).eval()
    predictor.load_state_dict(segmenter.model.state_dict(), strict=False)
    monkeypatch.setattr(package, "load_video_frames", lambda **_: (segmenter.pixels(frames), 128, 128))
    state = predictor.init_state("unused")
    box, point = np.array(prompt.box) * 0.128, np.array(prompt.point) * 0.128
    predictor.add_new_points_or_box(state, position, 1, points=point[None], labels=np.array([1]), box=box)
    expected = np.zeros(frames.shape[:3], bool)
    for reverse in (False, True):
        for t, _, logits in predictor.propagate_in_video(state, position, reverse=reverse):
            expected[t] = logits[0, 0].numpy() > 0
    features = [segmenter.embed(frame) for frame in frames]
    held, step = [], Track._step

    def watched(self, *arguments):
        logits = step(self, *arguments)
        held.append(len(self.groups[0][2]["non_cond_frame_outputs"]))
        return logits

    monkeypatch.setattr(Track, "_step", watched)
    assert (segmenter.track(features, position, prompt, (128, 128)) != expected).mean() < 1e-4
    assert len(held) == 30 and max(held) <= 12  # three times what the model looks back at


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_segments_like_the_packages_predictor(segmenter, objects):
    sam2_sidecar.import_torchvision()
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    _, _, image, _, prompt = objects[0]
    predictor = SAM2ImagePredictor(segmenter.model)
    size = segmenter.model.image_size  # the predictor's own list fits only 1024
    predictor._bb_feat_sizes = [(size // s, size // s) for s in (4, 8, 16)]
    predictor.set_image(image)
    box, point = np.array(prompt.box) * 0.128, np.array(prompt.point) * 0.128
    expected, _, _ = predictor.predict(point[None], np.array([1]), box, multimask_output=False)
    mask = sam2_sidecar.to_mask(segmenter.segment([segmenter.embed(image)], [prompt])[0], (128, 128))
    assert (mask != (expected[0] > 0)).mean() < 2e-3  # it pads its prompts differently


# -- what can go wrong -----------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_request(client):
    many = scene_objects(50, seed=13)
    register(client, many)
    result = {}
    names = ("iou", "valid")
    thread = threading.Thread(
        target=lambda: result.update(zip(names, client.mask_iou(rows_of(many)), strict=True)))
    client.start()
    before, restarts = client.pid, client.restarts
    thread.start()
    time.sleep(0.15)
    os.kill(before, signal.SIGKILL)
    thread.join(300)
    assert result["valid"].all() and client.pid != before and client.restarts == restarts + 1
    assert np.array_equal(result["iou"], client.mask_iou(rows_of(many))[0])


def test_stuck_process_is_replaced(objects, tmp_path):
    with SegmenterClient(log_file=tmp_path / "log", timeout_s=60) as client:
        register(client, objects[:2])
        expected = client.mask_iou(rows_of(objects[:2]))[0]
        stuck = client.pid
        os.kill(stuck, signal.SIGSTOP)
        client.timeout_s = 0.5

        def patient_with_the_new_one():
            while not gone(stuck):
                time.sleep(0.01)
            client.timeout_s = 60

        threading.Thread(target=patient_with_the_new_one, daemon=True).start()
        iou, valid = client.mask_iou(rows_of(objects[:2]))
        assert valid.all() and np.array_equal(iou, expected) and client.pid != stuck and gone(stuck)


def test_dead_twice_gives_invalid_rows_and_no_exception(objects, tmp_path):
    shutil.copytree(ASSET, tmp_path / "asset")
    with SegmenterClient(segmenter=tmp_path / "asset", log_file=tmp_path / "log") as client:
        register(client, objects[:2])
        assert client.mask_iou(rows_of(objects[:2]))[1].all()
        (tmp_path / "asset/config.json").rename(tmp_path / "asset/hidden")
        os.kill(client.pid, signal.SIGKILL)
        iou, valid = client.mask_iou(rows_of(objects[:2]))
        assert not valid.any() and not iou.any() and client.failures == 2
        with pytest.raises(SidecarError, match="no such file"):
            client.segment(rows_of(objects[:1]))
        (tmp_path / "asset/hidden").rename(tmp_path / "asset/config.json")
        assert client.mask_iou(rows_of(objects[:2]))[1].all()  # and training goes on when it is back


@pytest.fixture
def fragile(tmp_path):
    """A Python whose first sidecar fails as one with a broken GPU does, at its first segmentation."""
    file = tmp_path / "python"
    file.write_text(f"""#!{sys.executable}
import sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from icseg_jax import sam2_sidecar


def fail(*_):
    import torch

    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nmore of it")


try:
    Path({str(tmp_path / "failed")!r}).touch(exist_ok=False)
    sam2_sidecar.Server.segment = fail
except FileExistsError:
    pass
sys.exit(sam2_sidecar.main(sys.argv[3:]))
""")
    file.chmod(0o755)
    return str(file)


def test_a_broken_gpu_costs_a_restart(fragile, objects, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", fragile)
    with SegmenterClient(log_file=tmp_path / "log") as client:
        register(client, objects[:2])
        assert client.mask_iou(rows_of(objects[:2]))[1].all() and client.restarts == 1
        assert "it exited with 1: error: ipc://" in caplog.text
        assert "(CUDA error: an illegal memory access was encountered more of it); start the sidecar" in caplog.text


def test_a_broken_gpu_at_an_address_is_left_to_its_supervisor(fragile, objects, tmp_path):
    command = [fragile, "-m", "icseg_jax.sam2_sidecar", "serve", "--socket", str(tmp_path / "socket")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True)]

    def supervise(client):
        told.append(processes[0].communicate()[1])
        client.timeout_s = 60  # the dead one was not worth waiting for
        processes.append(subprocess.Popen(command))

    told = []
    try:
        with SegmenterClient(str(tmp_path / "socket")) as client:
            register(client, objects[:2])
            client.timeout_s = 2
            threading.Thread(target=supervise, args=[client], daemon=True).start()
            assert client.mask_iou(rows_of(objects[:2]))[1].all() and client.restarts == 1
        assert processes[0].returncode == 1
        assert told[0].splitlines()[-1].startswith(f"error: ipc://{tmp_path}/socket: the GPU failed (CUDA error: an")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_a_process_does_not_get_over():
    import torch

    lost = sam2_sidecar._lost_device
    assert lost(torch.AcceleratorError("out of order")) and lost(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    assert not lost(torch.cuda.OutOfMemoryError("CUDA error: out of memory")) and not lost(RuntimeError("a shape"))


def test_one_bad_row_leaves_the_others_alone(client, objects):
    good = rows_of(objects[:1])[0]
    client.register("untruthful", 0, objects[0][2])
    bad = [{**good, "box": [float("nan")] * 4}, {**good, "point": "ab"}, {**good, "box": [1, 2, 3]},
           {**good, "mask_type": "other"}, {**good, "video": "nobody registered"}, {"video": "x"},
           {**good, "video": "untruthful", "frame": 0}, {**good, "box": None},
           {**good, "box": [float("inf")] * 4}]
    failures = client.failures
    iou, valid = client.mask_iou([good, *bad, good])
    assert valid.tolist() == [True] + [False] * len(bad) + [True]
    assert iou[0] == iou[-1] > 0 and not iou[1:-1].any()
    assert client.failures == failures + len(bad)
    assert np.isfinite(client.mask_iou([{**good, "box": [-1e30, 5, 1e30, 900]}])[0]).all()
    with pytest.raises(SidecarError, match="not registered"):
        client.segment([{**good, "video": "nobody registered"}])


def test_bad_messages_are_answered_and_survived(client, objects):
    good = rows_of(objects[:1])[0]
    client.mask_iou([good])
    bodies = [b"\xff\x00garbage", b"", msgpack.packb([1, 2]), b"\x91" * 5000, msgpack.packb({}),
              msgpack.packb({"op": ["segment"]})]
    frame, pixel = {"video": "v", "frame": 0}, {"image": b"123", "shape": [1, 1, 3]}
    frames = [3, frame, {**frame, "image": b"no picture"}, {**frame, **pixel, "shape": [1 << 40, 1 << 40, 3]},
              {**frame, **pixel, "truth": b""}, {**pixel, "video": 5, "frame": 0}]
    prompt = {"position": 7, "box": [1, 1, 2, 2], "point": [1, 1]}
    bodies += [msgpack.packb(message) for message in (
        {"op": "segment", "rows": [], "frames": 3},
        *({"op": "segment", "rows": [], "frames": [entry]} for entry in frames),
        {"op": "segment", "rows": "all"}, {"op": "segment", "rows": [good], "want": "money"},
        {"op": "segment", "rows": [good], "prompting": "nicely"},
        {"op": "track", "frames": 1, "objects": [prompt]}, {"op": "track", "objects": [prompt]})]
    for parts in [[b"", body] for body in bodies] + [[b"alone"], [b"", b"", b""]]:
        error = ask(client, parts)["error"]
        assert error and "\n" not in error
    assert ask(client, encode_message({"op": "ping"}))["pid"] == client.pid
    assert client.mask_iou([good])[1].all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.dictionaries(
    st.sampled_from(["op", "rows", "frames", "images", "want", "objects", "track", "prompting"]),
    st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.binary(max_size=12)
                 | st.sampled_from(["ping", "stats", "segment", "track", "advance", "iou"]),
                 lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
                     st.sampled_from(["video", "frame", "image", "shape", "truth", "box", "point", "position"]),
                     inner, max_size=4), max_leaves=12)))
def test_any_message_is_a_reply_or_a_valueerror(segmenter, message):
    try:
        assert isinstance(Server(segmenter).answer(message), dict)
    except ValueError as error:
        assert str(error)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.binary(max_size=40), max_size=3), secret=st.sampled_from([b"", b"secret"]))
def test_any_bytes_are_a_message_or_a_valueerror(parts, secret):
    try:
        assert isinstance(decode_message(parts, secret), dict)
    except ValueError:
        pass


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_mask_bits_round_trip(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    assert np.array_equal(unpack_mask(pack_mask(mask), mask.shape), mask)
    with pytest.raises(ValueError, match="expected"):
        unpack_mask(pack_mask(mask) + b"1", mask.shape)


def test_frames_the_server_forgot_are_sent_again(objects, tmp_path):
    with SegmenterClient(log_file=tmp_path / "log", max_frames=4) as client:
        register(client, objects[:4])
        expected = client.mask_iou(rows_of(objects[:4]))[0]
        others = [{"video": "other", "frame": i, "image": bytes(3), "shape": [1, 1, 3]} for i in range(4)]
        ask(client, encode_message({"op": "segment", "frames": others, "rows": []}))  # they push ours out
        iou, valid = client.mask_iou(rows_of(objects[:4]))
        assert valid.all() and np.array_equal(iou, expected) and client.stats()["held_frames"] == 4


def of_bytes(name, count, truth=None):
    """Entries of 27 bytes each, 36 with a truth in the server."""
    entry = {"image": bytes(27), "shape": [3, 3, 3], "truth": truth}
    return [{**entry, "video": name, "frame": i} for i in range(count)]


def test_the_server_bounds_its_frames_by_bytes_too(segmenter, monkeypatch):
    server = Server(segmenter, max_frames=9)
    monkeypatch.setattr(sam2_sidecar, "FRAMES", 4 * 27)
    server.register(of_bytes("a", 4))
    server.register(of_bytes("b", 1))
    assert list(server.frames) == [("a", 1), ("a", 2), ("a", 3), ("b", 0)]
    server.register(of_bytes("b", 1, truth=bytes(2)))  # replaced, and truths count
    assert list(server.frames) == [("a", 2), ("a", 3), ("b", 0)] and server.frame_bytes == 27 * 2 + 36
    for _ in range(3):  # a refused message leaves nothing behind
        with pytest.raises(ValueError, match="image"):
            server.register([*of_bytes("c", 1), {"video": "c", "frame": 1}])
    assert server.frame_bytes == 27 * 2 + 36
    server.register(of_bytes("d", 12))  # what one message brings stays until the next, its rows need it
    assert list(server.frames) == [("d", i) for i in range(12)] and server.frame_bytes == 27 * 12
    server.register(of_bytes("e", 1))
    assert len(server.frames) == 4 and server.frame_bytes == 27 * 4


def in_process(server, **more):
    """A client whose messages go to `server` without a process between; and these messages."""
    client, sent = SegmenterClient(join_s=0, **more), []
    client.start = lambda wait=True: None
    client._request = lambda message, timeout_s: sent.append(message) or server.answer(message)
    return client, sent


def test_the_client_bounds_its_frames_by_bytes_too(segmenter, objects, monkeypatch):
    one = objects[0][2].nbytes + len(pack_mask(objects[0][3]))
    monkeypatch.setattr(sam2_sidecar, "FRAMES", 3 * one)
    client, _ = in_process(Server(segmenter))
    register(client, objects[:5])  # all wait for their request
    assert len(client._frames) == 5 and client._frame_bytes == 5 * one
    assert client.mask_iou(rows_of(objects[:5]))[1].all()
    assert client.mask_iou(rows_of(objects[:1]))[1].all()  # used last
    register(client, objects[5:6])
    register(client, objects[5:6])
    names = [client._prefix + objects[i][0] for i in (4, 0, 5)]
    assert [video for video, _ in client._frames] == names and client._frame_bytes == 3 * one
    assert client._waiting == {(names[2], objects[5][1])} and client._sent == set(client._frames) - client._waiting
    register(client, objects[:1])  # waits again, though the server has it
    register(client, objects[6:10])
    assert client.mask_iou(rows_of([objects[0], *objects[5:10]]))[1].all()


def test_clients_that_push_each_others_frames_out(segmenter, objects, monkeypatch):
    """All frames of a request come with it when one is missing, so whatever came between can't hurt."""
    server = Server(segmenter)
    (client, sent), (other, _) = in_process(server), in_process(server)
    register(client, objects[:4])
    expected = client.mask_iou(rows_of(objects[:3]))[0]
    monkeypatch.setattr(sam2_sidecar, "FRAMES", server.frame_bytes)  # 3 of them
    register(other, objects[4:6])
    assert other.mask_iou(rows_of(objects[4:6]))[1].all()  # two of ours are gone
    sent.clear()
    iou, valid = client.mask_iou(rows_of(objects[:4]))
    assert valid.all() and np.array_equal(iou[:3], expected)
    assert [len(message["frames"]) for message in sent] == [1, 4]


def test_clients_of_one_sidecar_name_their_videos_alike(client, objects):
    """Two runs on the same data: each has its own frames and truths, and pixels are still encoded once."""
    name, frame, image, mask, _ = objects[0]
    rows = rows_of(objects[:1])
    expected = client.mask_iou(rows)[0][0]
    with SegmenterClient(f"ipc://{client._directory}/socket") as other:
        before = client.stats()["encoded"]
        other.register(name, frame, image, ~mask)
        assert other.mask_iou(rows)[0][0] < 0.1 < expected == client.mask_iou(rows)[0][0]
        assert other.stats()["encoded"] == before
        client.close()  # a restarted process is told the names again
    assert client.mask_iou(rows)[0][0] == expected


def test_calls_of_several_threads_share_a_request(client, objects):
    rows = rows_of(objects[:8])
    expected, before = client.mask_iou(rows)[0], client.stats()["messages"]
    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: client.mask_iou(rows[i : i + 3])}))
               for i in range(6)]
    client.join_s = 0.3
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    client.join_s = 0.004
    assert all(np.array_equal(results[i][0], expected[i : i + 3]) for i in range(6))
    assert client.stats()["messages"] - before <= 4  # stats itself, and one or two for the six callers


def test_samples_on_one_video_share_its_embedding(client, objects):
    name, frame, image, mask, _ = objects[0]
    row = rows_of(objects[:1])[0]
    client.mask_iou([row])
    before = client.stats()["encoded"]
    client.register("another query", frame, image, ~mask)
    inverse = client.mask_iou([{**row, "video": "another query"}])[0][0]
    assert client.stats()["encoded"] == before and inverse < 0.1 < client.mask_iou([row])[0][0]


# -- processes and addresses -----------------------------------------------------------------------


def test_the_trainer_gets_neither_torch_nor_jax_from_importing_the_client():
    program = "import sys, icseg_jax.sam2_sidecar; print(sorted({'torch', 'jax', 'sam2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_it_ends_with_its_parent(tmp_path):
    program = ("import os, signal\nfrom icseg_jax.sam2_sidecar import SegmenterClient\n"
               "client = SegmenterClient()\nclient.start()\n"
               "print(client.pid, client._directory, flush=True)\n"
               "os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    pid, directory = done.stdout.split()
    end = time.monotonic() + 120
    while not (gone(pid) and not Path(directory).exists()) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(pid) and not Path(directory).exists()


def test_ctrl_c_is_left_to_the_trainer_and_the_socket_to_its_owner(client, objects):
    client.start()
    os.kill(client.pid, signal.SIGINT)
    assert client.mask_iou(rows_of(objects[:1]))[1].all()
    assert os.getpgid(client.pid) != os.getpgid(0)  # nor does a terminal's Ctrl-C reach it while it imports
    assert os.stat(client._directory).st_mode & 0o077 == 0
    assert os.stat(f"{client._directory}/socket").st_mode & 0o077 == 0


def test_a_secret_is_asked_for(objects, tmp_path, monkeypatch):
    monkeypatch.setenv(sam2_sidecar.SECRET_VARIABLE, "open sesame")
    with SegmenterClient(log_file=tmp_path / "log") as client:
        register(client, objects[:1])
        assert client.mask_iou(rows_of(objects[:1]))[1].all()
        assert "wrong secret" in ask(client, encode_message({"op": "ping"}))["error"]
        assert "wrong secret" in ask(client, encode_message({"op": "ping"}, b"guess"))["error"]
        assert parse_address("tcp://10.0.0.1:5555") == "tcp://10.0.0.1:5555"
    monkeypatch.delenv(sam2_sidecar.SECRET_VARIABLE)
    with pytest.raises(ValueError, match=sam2_sidecar.SECRET_VARIABLE):
        parse_address("tcp://10.0.0.1:5555")


def test_a_sidecar_at_an_address(objects, tmp_path, caplog):
    with zmq.Context.instance().socket(zmq.REP) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    command = [sys.executable, "-m", "icseg_jax.sam2_sidecar", "serve", "--socket", f"tcp://127.0.0.1:{port}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        with SegmenterClient(f"tcp://127.0.0.1:{port}") as client:
            register(client, objects[:1])
            assert client.mask_iou(rows_of(objects[:1]))[1].all() and client.pid is None and not caplog.records
        with SegmenterClient(f"tcp://127.0.0.1:{port}", segmenter="models/sam2.1_hiera_large.pt"):
            said = [record.getMessage() for record in caplog.records]
            assert len(said) == 1 and "serves sam2_mini, and sidecar.segmenter says sam2.1_hiera_large" in said[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("text", ["", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "http://127.0.0.1:1",
                                  "tcp://*:5555", "tcp://127.0.0.1:5555/", "tcp://127.0.0.1:5555?", "tcp://[::1]:5/#a",
                                  "tcp://me@127.0.0.1:5555", "TCP://127.0.0.1:5555", "tcp://127.0.0.1:5555#"])
def test_bad_addresses(text):
    with pytest.raises(ValueError, match="address|on this machine"):
        parse_address(text)


def test_addresses_too_long_for_a_socket(tmp_path, monkeypatch):
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    client = SegmenterClient()
    for _ in range(2):
        with pytest.raises(SidecarError, match="no socket .* File name too long .*; set TMPDIR to a shorter path"):
            client.start()
    assert client.pid is None and not list(long.iterdir())
    iou, valid = client.mask_iou([{"video": "v", "frame": 0, "box": [0] * 4, "point": [0] * 2}])
    assert not valid.any() and client.failures == 1
    with pytest.raises(SidecarError, match="File name too long .*; write tcp://HOST:PORT or a shorter path"):
        SegmenterClient(str(long / "socket")).start()


def test_damaged_segmenters(tmp_path, segmenter):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_segmenter(tmp_path)
    shutil.copytree(ASSET, tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes((ASSET / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged"):
        load_segmenter(tmp_path / "a")
    shutil.copy(ASSET / "model.safetensors", tmp_path / "a")
    config = json.loads((ASSET / "config.json").read_text())
    for change, complaint in (({"_target_": "os.system"}, "not a class"), ({"num_maskmem": 9}, "don't fit"),
                              ({"memory_encoder": {"_target_": "subprocess.run"}}, "not a class"),
                              ({"memory_encoder": "${oc.create:'{_target_: os.getcwd}'}"}, "is an interpolation"),
                              ({"_target_": "sam2.modeling.sam2_base.torch.nn.Linear"}, "not a class"),
                              ({"unheard_of": 1}, "unheard_of")):
        (tmp_path / "a/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=complaint):
            load_segmenter(tmp_path / "a")


@pytest.mark.parametrize("arguments, complaint", [
    (["serve", "--socket", "{tmp}/s", "--segmenter", "{tmp}"], "no such file"),
    (["serve", "--socket", "tcp://0.0.0.0:1"], sam2_sidecar.SECRET_VARIABLE),
    (["serve", "--socket", "{tmp}/no/such/folder/s"], "cannot listen"),
    (["serve", "--socket", "{tmp}/s", "--segmenter", "{tmp}/large.pt"], "no such file; get one of"),
    (["serve", "--socket", "{tmp}/s", "--cache-gb", "1"], "ICSEG_EMBEDDINGS names another"),
    (["serve", "--socket", "{tmp}/s", "--threads", "0"], "threads=0: use 1 or more"),
    (["import", "{tmp}/large.pt", "{tmp}/out"], "no such file; get one of"),
    (["train", "{tmp}/missing.yaml"], "no such config"),
    (["train", "experiments/embedded_sam2.yaml", "image_step=3"], "did you mean image_steps"),
    (["train", "experiments/embedded_sam2.yaml", "image_steps=many"], "image_steps"),
    (["train", "experiments/embedded_sam2.yaml", "image_size=100"], "multiple of 64"),
    (["train", "experiments/embedded_sam2.yaml", "warmup=0"], "1 or more"),
    (["train", "experiments/embedded_sam2.yaml", "seed"], "key=value"),
    (["train", "experiments/embedded_sam2_2.yaml", "start={tmp}", "run_dir={tmp}/r"], "no such file"),
])
def test_bad_command_lines(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(sam2_sidecar.SECRET_VARIABLE, raising=False)
    monkeypatch.setenv(sam2_sidecar.CACHE_VARIABLE, str(ROOT / "README.md"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    umask = os.umask(0o077)
    try:
        assert sam2_sidecar.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    finally:
        os.umask(umask)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and complaint in error and "\n" not in error


# -- training --------------------------------------------------------------------------------------


def test_training_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    small = ["image_size=64", "embed_dim=8", "stages=[1,1,2,1]", "width=32", "image_steps=4",
             "complete_steps=3", "clip_steps=3", "scenes=1", "objects=2", "clip_frames=3",
             "checkpoint_every=2", "test_scenes=1", "test_clips=1"]

    def config(name):
        paths = [f"run_dir={tmp_path / name}", f"asset={tmp_path / name / 'asset'}"]
        return load_train_config(ROOT / "experiments/embedded_sam2.yaml", [*small, *paths])

    numbers = sam2_sidecar.train(config("whole"))
    assert set(numbers) >= {"iou", "iou_noisy", "track", "track_complete"}
    save, left = sam2_sidecar._save_checkpoint, []

    def save_and_die(*arguments):
        save(*arguments)
        left.append(arguments[2:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(sam2_sidecar, "_save_checkpoint", save_and_die)
    while len(left) < 6:  # die at every checkpoint there is
        with pytest.raises(KeyboardInterrupt):
            sam2_sidecar.train(config("parts"))
    assert left == [(0, 2), (0, 4), (1, 2), (1, 3), (2, 2), (2, 3)]
    assert sam2_sidecar.train(config("parts")) == numbers
    whole, parts = tmp_path / "whole/asset", tmp_path / "parts/asset"
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert "minutes of one CPU core" in (parts / "README.md").read_text()
    with pytest.raises(ValueError, match="another config .differs in seed"):
        sam2_sidecar.train(load_train_config(ROOT / "experiments/embedded_sam2.yaml",
                                             [*small, f"run_dir={tmp_path / 'parts'}", "seed=5"]))
    monkeypatch.setattr(sam2_sidecar, "_save_checkpoint", save)
    for name, steps, trained in (("embedded_sam2_2", [0, 3], {"memory_attention", "sam_mask_decoder"}),
                                 ("embedded_sam2_complete", [2, 0], {"complete_mask_decoder"})):
        out = tmp_path / name
        further = [f"start={whole}", f"run_dir={out}", f"asset={out / 'asset'}", f"complete_steps={steps[0]}",
                   f"clip_steps={steps[1]}"]
        sam2_sidecar.train(load_train_config(ROOT / f"experiments/{name}.yaml", [*small, *further]))
        before, after = (load_segmenter(path).model.state_dict() for path in (whole, out / "asset"))
        changed = {key.split(".")[0] for key in before if not before[key].equal(after[key])}
        assert trained <= changed
        assert not changed & ({"image_encoder", "complete_mask_decoder", "sam_prompt_encoder"} - trained)
    raw = synthetic.write_dataset(tmp_path / "r2sm.raw", train=3, test=12, seed=4, layout="r2sm", progress=False)
    data.prepare("r2sm", raw, tmp_path / "r2sm", progress=False)
    own = [f"start={whole}", f"data={tmp_path / 'r2sm'}", "complete_steps=2", "clip_steps=0", "test_scenes=2"]
    own.append(f"run_dir={tmp_path / 'own'}")
    numbers = sam2_sidecar.train(load_train_config(ROOT / "experiments/embedded_sam2_complete.yaml", [*small, *own]))
    assert set(numbers) == {f"{kind}_occluded{more}" for kind in ("complete", "visible") for more in ("", "_15")}
    assert 0 < numbers["visible_occluded_15"] <= numbers["visible_occluded"] < 0.95
    before, after = (load_segmenter(path).model.state_dict() for path in (whole, tmp_path / "own/trained"))
    changed = {key.split(".")[0] for key in before if not before[key].equal(after[key])}
    assert changed == {"complete_mask_decoder"}
    assert f"trained on {tmp_path / 'r2sm'}" in (tmp_path / "own/trained/README.md").read_text()
    assert sam2_sidecar.main(["train", str(ROOT / "experiments/embedded_sam2.yaml"), "data=x"]) == 2
    assert "give start=DIR and clip_steps=0" in capsys.readouterr().err
    (tmp_path / "parts/checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        sam2_sidecar.train(config("parts"))


def test_the_shortest_and_the_longest_clips(monkeypatch):
    monkeypatch.setattr(sam2_sidecar, "AHEAD", (max(sam2_sidecar.AHEAD),))
    model = sam2_sidecar.build_model(sam2_sidecar.mini_config(64, 8, [1, 1, 2, 1], 32, 4))
    segmenter, scene = sam2_sidecar.Segmenter(model), synthetic.make_scene(0, seed=3)
    file = ROOT / "experiments/embedded_sam2.yaml"
    for frames in (2, 10):
        config = load_train_config(file, [f"clip_frames={frames}", "objects=1"])
        assert sam2_sidecar._clip_step(segmenter, config, np.random.default_rng(0), [scene])[0].isfinite()
    for frames in (1, 11):
        with pytest.raises(ValueError, match=f"clip_frames={frames}: use 2..10"):
            load_train_config(file, [f"clip_frames={frames}"])


@pytest.mark.parametrize("kind", ["both", "box", "point", "sequential"])
def test_an_object_that_is_hidden_in_the_prompted_frame(kind, monkeypatch):
    model = sam2_sidecar.build_model(sam2_sidecar.mini_config(64, 8, [1, 1, 2, 1], 32, 4))
    segmenter, scene = sam2_sidecar.Segmenter(model), synthetic.make_scene(0, seed=3)
    masks = synthetic.visible_masks
    monkeypatch.setattr(sam2_sidecar, "_prompt_kind", lambda rng: kind)
    monkeypatch.setattr(synthetic, "visible_masks", lambda scene, t: masks(scene, t) & (np.arange(
        len(scene.objects)) > 0)[:, None, None])
    config = load_train_config(ROOT / "experiments/embedded_sam2.yaml",
                               ["clip_frames=2", f"objects={len(scene.objects)}"])
    assert sam2_sidecar._clip_step(segmenter, config, np.random.default_rng(0), [scene])[0].isfinite()


def test_a_target_too_thin_for_the_masks_is_drawn_no_prompt_from():
    def sample(mask):
        masks, file = lambda position: mask, io.BytesIO()
        Image.fromarray(mask).save(file, "PNG")
        return data.Sample(
            id="0", dataset="r2sm", split="train", kind="image", frames=[file.getvalue()],
            frame_names=["00000"], size=mask.shape, query="it", masks=masks, amodal_masks=masks)

    thin, wide = np.zeros((2, 480, 640), bool)
    thin[7:9, 7:9] = wide[100:300, 100:300] = True
    views = sam2_sidecar._sample_views([sample(thin), sample(wide)], np.random.default_rng(0), 8, 48)
    assert all(seen.any() and whole.any() for _, seen, whole in views)
    with pytest.raises(ValueError, match="none of 10001 frames drawn shows its target at 48x48 pixels"):
        list(sam2_sidecar._sample_views([sample(thin)], np.random.default_rng(0), 1, 48))


def test_prompt_of_mask_is_inside():
    for _, _, _, mask, prompt in scene_objects(20, seed=14):
        ys, xs = np.nonzero(mask)
        np.testing.assert_allclose(np.array(prompt.box) * 0.128, [xs.min(), ys.min(), xs.max(), ys.max()])
        x, y = (round(v * 0.128) for v in prompt.point)
        assert mask[y, x]
    assert Prompt(None, None).empty
