"""The policy is Qwen3-VL: the numbers of Hugging Face's PyTorch model, through the files that both read."""

import dataclasses
import functools
import inspect
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

from icseg_jax import data, train  # noqa: E402

IMAGE, VIDEO, START, END, VOCABULARY = 90, 91, 92, 93, 97


def import_transformers():
    """transformers' Qwen3-VL classes. With a CPU build of torch, torchvision's operators lack two schemas."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import_transformers.library = library  # the schemas live as long as it does
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    return Qwen3VLConfig, Qwen3VLForConditionalGeneration


def make_model(
    *, width=48, heads=4, groups=2, size=16, sections=(4, 2, 2), layers=3, tied=True,
    depth=4, taps=(0, 2), vision_width=32, vision_heads=2, positions=25, patch=4,
):  # fmt: skip
    """A small Qwen3-VL in which every weight is random, biases and norms too, and logits are of order one."""
    config_class, model_class = import_transformers()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
    config = config_class(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=80, num_hidden_layers=layers,
            head_dim=size, num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied,
            rope_parameters=rope | {"mrope_section": list(sections)}, max_position_embeddings=512,
            pad_token_id=None,
        ),
        vision_config=dict(
            depth=depth, hidden_size=vision_width, intermediate_size=48, num_heads=vision_heads,
            out_hidden_size=width, num_position_embeddings=positions, deepstack_visual_indexes=list(taps),
            patch_size=patch,
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=tied,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            elif "embed_tokens" in name or "pos_embed" in name:
                weight.copy_(0.4 * noise)
            else:
                weight.copy_(noise / weight[0].numel() ** 0.5)
    return model


def make_batch(grids, words, rows, *, seed=0):
    """Sequences of text and images, padded on the right.

    rows[b]: how many images row b shows; words: token counts of the stretches of text, one before, between
    and after the images of each row. Returns ids, mask, grids [images,3] (t, h, w in patches).
    """
    rng = np.random.default_rng(seed)
    words, images, out = iter(words), iter(grids), []
    for count in rows:
        row = rng.integers(0, IMAGE, next(words)).tolist()
        for _ in range(count):
            height, width = next(images)
            row += [
                START,
                *[IMAGE] * (height * width // 4),
                END,
                *rng.integers(0, IMAGE, next(words)).tolist(),
            ]
        out.append(row)
    longest = max(map(len, out))
    ids = np.array([row + [0] * (longest - len(row)) for row in out])
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in out])
    return ids, mask, np.array([[1, *grid] for grid in grids])


def as_torch(ids, mask, grids):
    """The arguments of Hugging Face's model; transformers 5 also wants to be told which tokens are images."""
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=torch.tensor((ids == IMAGE).astype(np.int32)),
    )


def accepted(function, arguments):
    names = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in names}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Between them: K in {1, 2, H}; D = H*h and not; 1 to 3 DeepStack taps, at the last block and not; tied and
# untied.
CASES = {
    "one-tap-tied": dict(width=64, groups=4, taps=(1,)),
    "two-taps-untied": dict(width=40, groups=1, taps=(0, 2), tied=False),
    "last-block-tapped": dict(groups=2, taps=(0, 1, 3), layers=4, tied=False),
    "other-sizes": dict(
        size=24, sections=(6, 3, 3), taps=(1, 3), vision_width=48, vision_heads=4, positions=64, patch=8
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_positions_and_features_are_hugging_faces(case, tmp_path):
    model = make_model(**CASES[case])
    model.save_pretrained(tmp_path / "policy")
    config, params = train.load_policy(tmp_path / "policy")

    # Two images in the first row, one in the second; unequal grids that are not square; text on every side.
    ids, mask, grids = make_batch([(4, 6), (8, 2), (2, 6)], [3, 4, 5, 2, 6], [2, 1])
    count = np.prod(grids, -1).sum()
    patches = np.random.default_rng(1).standard_normal((count, config.vision.patch_dim), np.float32)
    given = as_torch(ids, mask, grids)
    with torch.no_grad():
        positions, _ = model.model.get_rope_index(**accepted(model.model.get_rope_index, given))
        pixels = torch.tensor(patches)
        expected = model(pixel_values=pixels, **accepted(model.forward, given)).logits.numpy()
        blind = model(pixel_values=0 * pixels, **accepted(model.forward, given)).logits.numpy()
        features = model.model.visual(pixels, grid_thw=given["image_grid_thw"])

    shown = dict(pixel_values=patches, image_grid_thw=grids, attention_mask=mask)
    ours = train.policy_logits(config, params, ids, **shown)
    assert ours.shape == expected.shape and ours.dtype == np.float32
    real = mask.astype(bool)
    assert 0.3 < expected[real].std() < 10 and np.abs(blind - expected)[real].max() > 0.1  # worth comparing
    np.testing.assert_allclose(np.asarray(ours)[real], expected[real], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(train.mrope_positions(config, ids, grids, mask), positions.numpy())

    sides = [(h, w) for _, h, w in grids.tolist()]
    images = train.pack_images(config.vision, train.split_patches(patches, grids), sides)
    with jax.default_matmul_precision("highest"):
        encode = functools.partial(train.Policy(config).apply, method=train.Policy.encode)
        tokens, deepstack = jax.jit(encode)({"params": params}, images)
    own = np.arange(tokens.shape[1]) < np.prod(grids, -1)[:, None] // 4
    np.testing.assert_allclose(np.asarray(tokens)[own], features.pooler_output.numpy(), rtol=0, atol=1e-4)
    assert len(deepstack) == len(features.deepstack_features) == len(CASES[case]["taps"])
    for mine, theirs in zip(deepstack, features.deepstack_features, strict=True):
        np.testing.assert_allclose(np.asarray(mine)[own], theirs.numpy(), rtol=0, atol=1e-4)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.data())
def test_positions_of_any_layout(data):
    """Random text lengths, images side by side, at the very start and at the end, padding, rows without
    images."""
    rows = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    side = st.integers(1, 5).map(lambda n: 2 * n)
    grids = [data.draw(st.tuples(side, side)) for _ in range(sum(rows))]
    words = [data.draw(st.integers(0, 6)) for _ in range(sum(rows) + len(rows))]
    ids, mask, grid_thw = make_batch(grids, words, rows)
    hypothesis.assume(mask.any(1).all())  # Hugging Face needs a token in every row
    grid_thw = grid_thw.reshape(-1, 3)
    model = tiny_model()
    given = as_torch(ids, mask, grid_thw)
    if not len(grid_thw):
        given["image_grid_thw"] = None
    expected, _ = model.model.get_rope_index(**accepted(model.model.get_rope_index, given))
    config = train.PolicyConfig.from_json(model.config.to_dict())
    ours = train.mrope_positions(config, ids, grid_thw if len(grid_thw) else None, mask)
    real = np.broadcast_to(mask.astype(bool), ours.shape)
    np.testing.assert_array_equal(ours[real], expected.numpy()[real])


def tiny_model(made=[]):  # noqa: B006 - one for the module
    if not made:
        made.append(make_model())
    return made[0]


def test_text_alone_and_images_that_do_not_fit():
    model = tiny_model()
    config = train.PolicyConfig.from_json(model.config.to_dict())
    with pytest.raises(ValueError, match="more image tokens"):
        train.mrope_positions(config, [[1, IMAGE]], None, None)
    with pytest.raises(ValueError, match="needs 6 image tokens"):
        train.mrope_positions(config, [[1, IMAGE, IMAGE]], [[1, 4, 6]], None)
    with pytest.raises(ValueError, match="more images than there are image tokens"):
        train.mrope_positions(config, [[1, IMAGE, 1]], [[1, 2, 2], [1, 2, 2]], None)


KINDS = {
    "odd": {}, "grey": {"mode": "L"}, "palette": {"mode": "P"}, "transparent": {"mode": "RGBA"}, "turned": {"turn": 6},
    "wide": {"size": (411, 37)}, "small": {"size": (33, 32)},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_images_are_what_the_pil_processor_makes_of_them(kind):
    """Files of every mode, decoded and resized without keeping the aspect, as released, then as patches."""
    import_transformers()
    from transformers.image_transforms import convert_to_rgb
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    mode, turn, size = kind.get("mode", "RGB"), kind.get("turn"), kind.get("size", (133, 75))
    exif = Image.Exif()
    if turn:
        exif[data.EXIF_ORIENTATION] = turn
    noise = np.random.default_rng(3).integers(0, 255, (size[1], size[0], 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert("RGB" if mode == "P" else mode).convert(mode).save(file, "PNG", exif=exif)
    frame = 64
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": frame**2, "longest_edge": frame**2},
    )  # fmt: skip
    theirs = Image.fromarray(convert_to_rgb(ImageOps.exif_transpose(Image.open(file)), return_numpy=True))
    told = processor(images=[theirs.resize((frame, frame), Image.Resampling.BICUBIC)], return_tensors="np")
    assert told["image_grid_thw"].tolist() == [[1, 4, 4]]
    vision = tiny_vision(patch_size=16)
    image = data.decode_image(file.getvalue())
    ours = train.patchify(vision, data.resize(image, frame, frame))
    np.testing.assert_allclose(ours, told["pixel_values"], atol=1e-6)
    for method in Image.Resampling.BICUBIC, Image.Resampling.LANCZOS:  # at the size that the processor would choose
        told = processor(images=[theirs], resample=method, return_tensors="np")
        (_, rows, columns), *_ = told["image_grid_thw"].tolist()
        ours = train.patchify(vision, data.resize(image, rows * 16, columns * 16, method=method.name.lower()))
        np.testing.assert_allclose(ours, told["pixel_values"], atol=1e-6)


def tiny_vision(**changes):
    return dataclasses.replace(train.PolicyConfig.from_json(tiny_model().config.to_dict()).vision, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_files_that_hugging_face_wrote_come_back_byte_for_byte(dtype, tied, tmp_path):
    model = make_model(tied=tied).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    config, params = train.load_policy(tmp_path / "theirs")
    assert {np.dtype(x.dtype).name for x in jax.tree.leaves(params)} == {dtype}
    train.save_policy(tmp_path / "ours", config, params, source=tmp_path / "theirs")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("theirs", "ours"))
    assert one == two  # the header and the order of the tensors, too
    assert (tmp_path / "ours" / "tokenizer.json").read_text() == "{}"
    assert train.load_policy(tmp_path / "ours")[0] == config


@pytest.mark.parametrize("shards", [1, 4])
def test_transformers_loads_what_we_save(shards, tmp_path, monkeypatch, caplog):
    """Without a source, from our own config.json, in one file and in several."""
    model = make_model(tied=False, taps=(0, 3)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    config, params = train.load_policy(tmp_path / "theirs")
    if shards > 1:
        total = sum(x.nbytes for x in jax.tree.leaves(params))
        monkeypatch.setattr(train.weights, "SHARD_BYTES", total // (shards - 1))
    train.save_policy(tmp_path / "ours", config, params)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) == shards
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, info = type(model).from_pretrained(tmp_path / "ours", dtype="auto", output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not any(info.values()), info
    assert train.PolicyConfig.from_json(again.config.to_dict()) == config
    theirs, ours = model.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


def test_both_spellings_of_config_json(tmp_path: Path):
    """What transformers 5 writes (rope_parameters) and what 4.57 wrote (rope_theta and rope_scaling) mean the
    same."""
    model = tiny_model()
    new = train.PolicyConfig.from_json(model.config.to_dict())
    assert "rope_parameters" in model.config.to_dict()["text_config"]
    old = train.config_json(new)
    assert old["text_config"]["rope_theta"] == 1e4 and "rope_parameters" not in old["text_config"]
    assert train.PolicyConfig.from_json(old) == new


@pytest.mark.slow
def test_packed_segments_on_a_shared_prompt_are_whole_sequences(tmp_path):
    """What the update computes (prompt once per group, segments packed in rows, images in a bank) against
    each dialogue run whole: DESIGN.md 6 promises the same numbers."""
    tiny_model().save_pretrained(tmp_path)
    config, params = train.load_policy(tmp_path)
    rng = np.random.default_rng(0)
    text = lambda n: rng.integers(0, IMAGE, n).tolist()  # noqa: E731
    small, large = (
        (2, 4),
        (3, 2),
    )  # merged tokens of the frames shown and of the key frames; a bank holds two of each
    sizes = [8, 8, 6, 6]

    def show(row, slot):
        row.add([START])
        row.add_image(IMAGE, sum(sizes[:slot]), small if slot < 2 else large)
        row.add([END])

    prompts, rows = [], []
    for p in range(2):
        prompt = train.Transcript()
        for slot in range(2):
            prompt.add(text(2 + p))
            show(prompt, slot)
        prompt.add(text(3))
        prompts.append([[prompt]])
        rows.append([])
        for n in range(2):
            segments = [train.Transcript(prompt.position) for _ in range(2)]
            for k, segment in enumerate(segments):
                segment.add(text(4 - k))
                show(segment, 2 + (p + n + k) % 2)
                segment.add(text(2))
            rows[-1].append(segments)
    patches = [rng.standard_normal((2, 4 * size, config.vision.patch_dim), np.float32) for size in sizes]
    banks = [
        train.pack_images(config.vision, [x for p in range(2) for x in (one[p], two[p])], [(2 * h, 2 * w)] * 4)
        for (one, two), (h, w) in ((patches[:2], small), (patches[2:], large))
    ]
    batch = train.Batch(train.stack_rows(prompts, 40, 0), train.stack_rows(rows, 40, 0), *banks)
    policy = train.Policy(config)
    with jax.default_matmul_precision("highest"):
        logits = []
        for share in (True, False):
            hidden = jax.jit(functools.partial(train.predict, policy, share_prefix=share))(params, batch)
            logits.append(np.asarray(policy.apply({"params": params}, hidden, method=train.Policy.head)))
    # Every dialogue whole, as one padded batch.
    pieces = [(p, n, k) for p in range(2) for n in range(2) for k in range(2)]
    ids, mask = np.zeros((2, 8, 80), int)
    shown = []
    for row, (p, n, k) in enumerate(pieces):
        tokens = prompts[p][0][0].tokens + rows[p][n][k].tokens
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        shown += [patches[slot][p] for slot in (0, 1, 2 + (p + n + k) % 2)]
    whole = train.policy_logits(
        config,
        params,
        ids,
        pixel_values=np.concatenate(shown),
        image_grid_thw=np.array([[1, 4, 8], [1, 4, 8], [1, 6, 4]] * len(pieces)),
        attention_mask=mask,
    )
    for row, (p, n, k) in enumerate(pieces):
        before, length = len(prompts[p][0][0]), len(rows[p][n][k])
        at = len(rows[p][n][0]) * k
        # A later segment's first token has another segment before it in its row: it is never trained.
        first = 1 if k else 0
        expected = whole[row, before - 1 + first : before - 1 + length]
        for ours in logits:
            np.testing.assert_allclose(ours[p, n, at + first : at + length], expected, rtol=0, atol=1e-4)
