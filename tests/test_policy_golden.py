"""The policy against frozen numbers of Hugging Face's PyTorch model (tests/golden): no torch needed here."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from icseg_jax import train

CASES = sorted((Path(__file__).parent / "golden" / "qwen3vl").iterdir())


@pytest.fixture(params=CASES, ids=lambda folder: folder.name)
def case(request):
    config, params = train.load_policy(request.param)
    return config, params, dict(np.load(request.param / "expected.npz"))


def program(policy, method):
    """A method of the policy as one program: op by op, hundreds of them would be compiled."""
    return jax.jit(functools.partial(policy.apply, method=method))


def test_there_are_cases():
    assert len(CASES) == 4


def test_logits_and_positions(case):
    config, params, saved = case
    shown = dict(pixel_values=saved["patches"], image_grid_thw=saved["grids"], attention_mask=saved["mask"])
    logits = np.asarray(train.policy_logits(config, params, saved["ids"], **shown))
    real = saved["mask"].astype(bool)
    np.testing.assert_allclose(logits[real], saved["logits"][real], rtol=0, atol=1e-4)
    positions = train.mrope_positions(config, saved["ids"], saved["grids"], saved["mask"])
    np.testing.assert_array_equal(positions, saved["positions"])


def test_features_of_the_vision_tower(case):
    config, params, saved = case
    grids = saved["grids"]
    images = train.pack_images(config.vision, train.split_patches(saved["patches"], grids), grids[:, 1:])
    with jax.default_matmul_precision("highest"):
        tokens, deepstack = program(train.Policy(config), train.Policy.encode)({"params": params}, images)
    own = np.arange(tokens.shape[1]) < np.prod(grids, -1)[:, None] // config.vision.spatial_merge_size**2
    np.testing.assert_allclose(np.asarray(tokens)[own], saved["vision"], rtol=0, atol=1e-4)
    for mine, theirs in zip(deepstack, saved["deepstack"], strict=True):
        np.testing.assert_allclose(np.asarray(mine)[own], theirs, rtol=0, atol=1e-4)


def test_prefill_decode_and_extend_are_the_whole_forward(case):
    """A prompt with its images, then a token, then a chunk, through the cache as the sampler uses it."""
    config, params, saved = case
    length = int(saved["mask"][0].sum())
    ids, grids = saved["ids"][:1, :length], saved["grids"][:2]
    count = int(np.prod(grids, -1).sum())
    patches = saved["patches"][:count]
    policy = train.Policy(config)
    positions = np.moveaxis(train.mrope_positions(config, ids, grids), 0, -1)[:, None]
    forward = program(policy, train.Policy.run)
    run = lambda part, **more: forward(  # noqa: E731
        {"params": params}, ids[:, None, part], positions[:, :, part],
        np.tril(np.ones((1, 1, len(ids[0, part]), len(ids[0, part])), bool)), **more,
    )  # fmt: skip
    with jax.default_matmul_precision("highest"):
        images = train.pack_images(config.vision, train.split_patches(patches, grids), grids[:, 1:])
        tokens, deepstack = program(policy, train.Policy.encode)({"params": params}, images)
        sizes = np.prod(grids, -1) // config.vision.spatial_merge_size**2
        flat = np.concatenate([i * tokens.shape[1] + np.arange(n) for i, n in enumerate(sizes)])
        width = tokens.shape[-1]
        bank = train.Visual(
            tokens.reshape(1, -1, width)[:, flat], deepstack.reshape(len(deepstack), 1, -1, width)[:, :, flat]
        )
        is_image = ids[0] == config.image_token_id
        slots = np.where(is_image, np.cumsum(is_image) - 1, -1)[None, None].astype(np.int32)
        after = int(np.flatnonzero(is_image)[-1]) + 2
        hidden, keys = [], []
        for part in (slice(0, after), slice(after, after + 1), slice(after + 1, length)):
            seen = dict(visual=bank, slots=slots[:, :, part])
            masks = tuple(np.ones((1, 1, 1, k.k.shape[4]), bool) for k in keys)
            found, fresh = run(part, context=tuple(keys), context_masks=masks, **seen)
            hidden.append(np.asarray(found))
            keys.append(fresh)
        logits = program(policy, train.Policy.head)({"params": params}, np.concatenate(hidden, 2))
    np.testing.assert_allclose(np.asarray(logits)[0, 0], saved["logits"][0, :length], rtol=0, atol=1e-4)
