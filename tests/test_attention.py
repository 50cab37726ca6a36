"""Attention (train.py section 2): in blocks of queries, and by fused kernels, it is the same softmax."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icseg_jax import train

ROOT = Path(__file__).parents[1]


def case(t, *, groups=2, heads=4, size=128, prompt=96, past=None, seed=0):
    """q and parts of two prompts with three rollouts: a shared prompt, perhaps a past, and the rows' own keys."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    p, n = 2, 3
    there = np.arange(prompt) < np.array([[prompt], [prompt - 17]])
    parts = [(draw(p, groups, prompt, size), draw(p, groups, prompt, size), jnp.asarray(there)[:, None, None])]
    if past:
        here = np.arange(past) < rng.integers(0, past, (p, n, 1))
        parts.append((draw(p, n, groups, past, size), draw(p, n, groups, past, size), jnp.asarray(here)[:, :, None]))
    length = rng.integers(t // 2, t + 1, (p, n, 1))
    valid = np.arange(t) < length
    own = valid[:, :, None] & np.tril(np.ones((t, t), bool))
    parts.append((draw(p, n, groups, t, size), draw(p, n, groups, t, size), jnp.asarray(own)))
    return draw(p, n, t, heads, size), parts, jnp.asarray(valid)


def value_and_slopes(attend, q, parts, valid):
    def loss(q, keys):
        out = attend(q, [(k, v, mask) for (k, v), (_, _, mask) in zip(keys, parts, strict=True)])
        out = jnp.where(valid[..., None, None], out, 0)
        return (jnp.sin(out) * jnp.arange(out.shape[-1])).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(q, [(k, v) for k, v, _ in parts])


def same(one, other, *, rtol=1e-4, atol=1e-4):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(scale, 1.0))


@pytest.mark.parametrize("t, block", [(70, 32), (64, 16), (5, 4)])
def test_blocks_of_queries_change_nothing(monkeypatch, t, block):
    q, parts, valid = case(t, size=8, prompt=20, past=9)
    whole = value_and_slopes(train.attend, q, parts, valid)
    monkeypatch.setattr(train, "QUERY_BLOCK", block)
    same(value_and_slopes(train.attend, q, parts, valid), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t, past", [(130, None), (128, 40)])
def test_splash_is_the_same_softmax(t, past):
    """In plain JAX: that the kernel itself compiles for a TPU is in test_dryrun.py."""
    q, parts, valid = case(t, past=past)
    splash = lambda q, parts: train.fused_attend(q, parts, "splash", interpret=True)  # noqa: E731
    same(value_and_slopes(splash, q, parts, valid), value_and_slopes(train.attend, q, parts, valid))


@pytest.mark.parametrize("t, past", [(130, 41), (129, None)])
def test_cudnn_gets_the_same_softmax_at_even_lengths(monkeypatch, t, past):
    """By XLA with what the kernel would be given: that runs where the hardware is."""
    q, parts, valid = case(t, past=past, size=16, prompt=33)
    given, softmax = [], jax.nn.dot_product_attention
    note = lambda q, k, v, **more: given.append((q.shape[1], k.shape[1])) or softmax(q, k, v, **more)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", note)
    fused = lambda q, parts: train.fused_attend(q, parts, "cudnn", interpret=True)  # noqa: E731
    same(value_and_slopes(fused, q, parts, valid), value_and_slopes(train.attend, q, parts, valid))
    assert given and all(length % 2 == 0 for lengths in given for length in lengths)


def test_few_queries_are_left_to_xla():
    q, parts, _ = case(1)
    np.testing.assert_array_equal(train.attend_by("splash", None, q, parts), train.attend(q, parts))


ON_HARDWARE = """
import sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp
import test_attention as tests
from icseg_jax import train
kind = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend())
for t, past in ((130, None), (131, 40), (640, 384)) if kind else ():
    q, parts, valid = tests.case(t, past=past)
    less = lambda tree: jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.bfloat16), tree)
    fused = lambda q, parts: train.fused_attend(*less((q, parts)), kind).astype(jnp.float32)
    here, there = (tests.value_and_slopes(f, q, parts, valid) for f in (fused, train.attend))
    tests.same(here, there, rtol=0.05, atol=0.02)
print(kind)
"""


@pytest.mark.slow
def test_the_fused_kernel_of_the_accelerator_that_is_here():
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", ON_HARDWARE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.split()[-1] == "None":
        pytest.skip("no accelerator here")
