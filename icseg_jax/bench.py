"""Measures parts of the method against each other, in one process, so that the ratios hold on a noisy machine.

`python -m icseg_jax.bench advantages [CONFIG] [key=value ...]`
    From scores to token advantages (all three levels), per token, against a real update of the same config; and that
    arithmetic at 512 prompts x 16 rollouts x 8192 tokens. CONFIG defaults to experiments/embedded.yaml.
`python -m icseg_jax.bench metrics`
    J and F of frames of 480x854 pixels against the formula of davis2017-evaluation on OpenCV and scikit-image (`pip
    install -e '.[bench]'`): CPU seconds of either on one thread, the least of interleaved calls, and their ratio.
`python -m icseg_jax.bench world`
    Synthetic videos a minute of one core: written to disk in Ambi-RVOS's layout, and drawn in memory.
`python -m icseg_jax.bench perception [CONFIG] policy.path=DIR [key=value ...]`
    What a warm-started policy sees in three batches of scenes that it was not trained on: words and boxes of
    demonstrations, each token predicted after the true ones. CONFIG defaults to experiments/embedded_warmstart.yaml.
`python -m icseg_jax.bench reading [CONFIG] policy.path=DIR [key=value ...]`
    How it writes lists of candidates: first ones, which must be seen, and later ones, which follow from the list
    before and the answer. CONFIG defaults to experiments/embedded_warmstart.yaml.
`python -m icseg_jax.bench lists [CONFIG] policy.path=DIR [key=value ...]`
    What becomes of dialogues about test queries, greedy, by what their first list of candidates looks like, and how
    crowding spoils such lists. CONFIG defaults to experiments/embedded.yaml.
`python -m icseg_jax.bench rows [CONFIG] [key=value ...]`
    A step's real rollouts, sharing rows as `update.row_buckets` allows, against a row for each: seconds of their
    log-probabilities and of their updates. CONFIG defaults to experiments/embedded_long.yaml.
`python -m icseg_jax.bench frozen [CONFIG] [key=value ...]`
    What a frozen vision tower saves: log-probabilities and updates of a minibatch on its images, against images that
    were encoded before. Seconds to compile (no JAX_COMPILATION_CACHE_DIR) and least seconds to run, in turn. CONFIG
    defaults to experiments/embedded.yaml.
`python -m icseg_jax.bench chip [CONFIG] [key=value ...]`
    What one chip reaches of what it could, with random weights: decoding against the bandwidth of its memory, an update
    against its arithmetic (MFU), at the config's sizes. CONFIG defaults to experiments/qwen3vl_4b.yaml; one H200 wants
    rollout.prompts=2 rollout.rollouts=16 update.minibatches=1 update.micro_prompts=1 update.token_buckets=[2048]
    protocol.response_tokens=2048 (computed to fit, not run).
`python -m icseg_jax.bench rollout [model=DIR] [prompts=4 rollouts=8 images=6 ...] [against=huggingface]`
    A fixed dialogue of several turns, every one of them as long as it may be: sampled tokens over the wall time of a
    second, warm dialogue. `against=huggingface` plays the same on the same rows with `generate` of transformers.
`python -m icseg_jax.bench growth [model=DIR] [prompts=4 new_tokens=32]`
    Milliseconds per decoded token as the shared prompt grows (256, 1k, 4k tokens) and as rollouts share it (1 to 16).
`python -m icseg_jax.bench update [prompts=2 rollouts=8 prompt_tokens=1024 response_tokens=256 ...]`
    An update that runs each prompt once per group against one that runs it again for every rollout.

Prints, last, one JSON object.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen
import jax
import numpy as np
from scipy import ndimage

from icseg_jax import data, metrics, synthetic, train, weights

USAGE = __doc__
LARGE = (512, 16, 8192)  # prompts, rollouts, tokens
SPEED_FRAME = (480, 854)  # pixels of a frame of DAVIS and YouTube-VOS


def timed(call: Callable[[], Any]) -> float:
    """Wall time of a call, seconds."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of a call, compiled before."""
    jax.block_until_ready(call())
    return statistics.median(timed(call) for _ in range(repeats))


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Least seconds of each call, made in turn, so that a noisy machine disturbs all alike; and what the first took
    longer, which is compiling."""
    spent = [{name: timed(call) for name, call in calls.items()} for _ in range(repeats + 1)]
    least = {name: min(each[name] for each in spent[1:]) for name in calls}
    return {name: {"compile": spent[0][name] - least[name], "run": least[name]} for name in calls}


def world_speed(written: int = 60, drawn: int = 300) -> dict[str, float]:
    """CPU time, so that what else runs on the machine does not count; children's is in it."""

    def per_minute(count: int, work: Callable[[], None]) -> float:
        begun = os.times()
        work()
        spent = sum(os.times()[:4]) - sum(begun[:4])
        return round(count / spent * 60, 1)

    def draw() -> None:
        for index in range(drawn):
            scene = synthetic.make_scene(index, seed=1)
            synthetic.render(scene, range(scene.n_frames))
            for frame in range(scene.n_frames):
                synthetic.visible_masks(scene, frame)

    with tempfile.TemporaryDirectory() as folder:
        write = functools.partial(
            synthetic.write_dataset, Path(folder) / "world", train=written, test=0, seed=1, progress=False
        )
        return {"written": per_minute(written, write), "in_memory": per_minute(drawn, draw)}


def metrics_speed(repeats: int = 25) -> dict[str, Any]:
    """J and F of a frame, ours and the reference's, of an object, of a large one and of one in many parts."""
    try:
        import cv2
        from skimage.morphology import disk
    except ImportError as error:
        raise train.ConfigError(f"metrics: {error.name} is missing; pip install -e '.[bench]'") from None

    def edges(mask: np.ndarray) -> np.ndarray:
        """DATA.md 4.1: pixels unlike their right, lower or lower right neighbour, inside the frame."""
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        right, below, across = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
        return (mask ^ right) | (mask ^ below) | (mask ^ across)

    def reference(pred: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        j = np.sum(pred & truth) / np.sum(pred | truth)
        radius = np.ceil(0.008 * np.linalg.norm(pred.shape))
        near, maps = disk(radius).astype(np.uint8), [edges(pred), edges(truth)]
        wide = [cv2.dilate(edge.astype(np.uint8), near) for edge in maps]
        precision, recall = (np.sum(maps[i] * wide[1 - i]) / np.sum(maps[i]) for i in range(2))
        return float(j), float(2 * precision * recall / (precision + recall))

    def ours(pred: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        return float(metrics.jaccard(pred, truth)), float(metrics.boundary_f(pred, truth))

    rng, (height, width) = np.random.default_rng(0), SPEED_FRAME
    y, x = np.mgrid[:height, :width]
    smooth = ndimage.gaussian_filter(rng.normal(size=SPEED_FRAME), 12)
    wave = 1 + 8 * smooth  # so that outlines are not smooth
    kinds = {
        "object": np.hypot((y - 230) / 110, (x - 400) / 90) < wave,
        "large": np.hypot((y - 240) / 230, (x - 430) / 400) < wave,
        "parts": smooth > 0.6 * smooth.std(),
    }
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    out: dict[str, Any] = {"frame": [height, width], "opencv": cv2.__version__}
    for kind, truth in kinds.items():
        pred = np.roll(truth, (3, 5), (0, 1)) & (ndimage.gaussian_filter(rng.normal(size=SPEED_FRAME), 6) < 0.1)
        if not np.allclose(ours(pred, truth), reference(pred, truth), atol=1e-12):
            raise AssertionError(f"metrics: {ours(pred, truth)} is not the reference's {reference(pred, truth)}")
        spent: dict[str, list[float]] = {"ours": [], "reference": []}
        for _ in range(repeats):
            for name, call in (("ours", ours), ("reference", reference)):
                start = time.process_time()
                call(pred, truth)
                spent[name].append(time.process_time() - start)
        ms = {name: round(1000 * min(times), 3) for name, times in spent.items()}
        out[kind] = {"area": round(float(truth.mean()), 3), "ms": ms, "ratio": round(ms["reference"] / ms["ours"], 2)}
    cv2.setNumThreads(threads)
    return out | {"least_ratio": min(out[kind]["ratio"] for kind in kinds)}


def encoded(config: train.Config, policy: train.Policy, params: Any, batch: train.Batch) -> train.Batch:
    """A step's batch as it is read: with a frozen tower, images are replaced by what they encode to."""
    if not config.policy.freeze_vision:
        return batch
    encode = train.Program("encode", lambda params, x: policy.apply({"params": params}, x, method=train.Policy.encode))
    mesh = policy.mesh or train.make_mesh(train.MeshSection())
    return train.encode_once(encode, params, batch, mesh)


def random_scores(p: int, n: int, questions: int, seed: int = 0) -> train.Scores:
    """What rollouts might have earned, [p, n]: all of them asked `questions` times."""
    rng = np.random.default_rng(seed)
    counts = np.sort(rng.integers(1, 7, (p, n, questions + 1)), -1)[..., ::-1].astype(np.int32)
    return train.Scores(
        terms={term: rng.random((p, n), np.float32) for term in train.TERMS}, counts=counts,
        asked=np.ones((p, n, questions), bool), well_formed=np.ones((p, n), bool), ambiguous=counts[..., 0] > 1,
        asked_in=np.broadcast_to(np.arange(questions, dtype=np.int32), (p, n, questions)),
        valid=rng.random((p, n)) < 0.95,
    )  # fmt: skip


def random_batch(config: train.Config, speaker: train.Speaker) -> train.Batch:
    """A batch of the config's shapes full of random tokens: as much work as a real one without update.row_buckets."""
    c, rng = config, np.random.default_rng(0)
    p, n = c.rollout.prompts // c.update.minibatches, c.rollout.rollouts

    def rows(count: int, length: int) -> train.Rows:
        row = train.Transcript()
        row.add(rng.integers(0, len(speaker.tokenizer), length).tolist(), trained=True)
        return train.stack_rows([[[row]] * count] * p, length, 0)

    merge = speaker.policy.vision.spatial_merge_size**2

    def images(grid: tuple[int, int]) -> train.Images:
        shape = (p * c.protocol.frames, grid[0] * grid[1] * merge, speaker.policy.vision.patch_dim)
        return speaker.images(rng.random(shape, np.float32), grid)

    return train.Batch(
        rows(1, c.protocol.prompt_tokens), rows(n, max(c.update.token_buckets)),
        images(speaker.frame_grid), images(speaker.keyframe_grid),
    )  # fmt: skip


def advantages(config: train.Config) -> dict[str, Any]:
    """Per-token seconds of the three levels against those of an update, and the large shape alone."""
    c = config
    if c.update.loss == "sdpo":
        raise train.ConfigError("update.loss=sdpo: has no advantages to measure; use rlsd or vanilla")
    source = train.resolve_path(c.policy.path)
    policy_config, params = train.load_policy(source, dtype="float32")
    policy, questions = train.Policy(policy_config, c.policy.remat), c.protocol.max_turns
    batch = random_batch(c, train.Speaker(c.protocol, policy_config, train.load_tokenizer(source, policy_config)))
    batch = encoded(c, policy, params, batch)
    p, n, t = batch.rows.tokens.shape
    logp = -np.random.default_rng(0).random((2, p, n, t), np.float32)
    scores, nobody = random_scores(p, n, questions), np.zeros((p, n), bool)
    contexts = [["told"] * n] * p

    def credit_of(kind: str) -> train.Credit:
        """All that a step does between its scores and its updates, but the passes of the two policies."""
        section = dataclasses.replace(c, credit=dataclasses.replace(c.credit, turn_credit=kind))
        given = dict(old_logp=logp[0], teacher_logp=lambda: (logp[1], logp[0]), lam=0.5)
        return train.token_credit(batch, scores, contexts, nobody, section, **given)[0]

    _, update = train.make_programs(policy, c)
    state = [train.fresh_state(params, c, teacher=False)]
    credit = credit_of("scalar")

    def one_update() -> Any:
        state[0], stats = update(state[0], batch, credit, None, np.float32(0.0))
        return stats

    updating = seconds(one_update) / (p * n * t)
    out: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    out["update"] = {"shape": [p, n, t], "per_token": updating}
    for kind in ("scalar", "local"):
        spent = seconds(lambda kind=kind: credit_of(kind).advantages, 20)
        each = spent / (p * n * t)
        out[kind] = {"per_token": each, "share_of_update": each / updating}
    out["large"] = {"shape": list(LARGE), "seconds": seconds(large_call(c, questions), 3)}
    return out


def large_call(c: train.Config, questions: int) -> Callable[[], Any]:
    """Returns, gains and token advantages of LARGE on the device."""
    p, n, t = LARGE
    rng = np.random.default_rng(0)
    draw = lambda: -rng.random((p, n, t), np.float32)  # noqa: E731
    scores = jax.device_put(random_scores(p, n, questions))
    turn = np.broadcast_to(np.arange(t) * (questions + 2) // t, (p, n, t)).astype(np.int32)
    tokens = jax.device_put((turn, np.ones((p, n, t), bool), draw(), draw(), rng.random((p, n)) < 0.8))

    def call() -> Any:
        returns, gains = train.total_return(scores, c), train.turn_gains(scores.counts, scores.asked)
        return train.hierarchical_advantages(c.credit, returns, scores.valid, gains, scores.asked_in, *tokens, 0.5)

    return call


def perception(config: train.Config, batches: int = 3) -> dict[str, Any]:
    """Share of right words of each attribute, share of boxes with IoU above 0.5, mean corner errors in thousandths.

    Words include choices that a demonstration makes at random (what to ask, whom to guess): 1 is out of reach.
    """
    logits_of, scenes, tokenizer = teacher_forced(config)
    words = {a: np.array([tokenizer.encode(f" {v}")[0] for v in values]) for a, values in synthetic.VALUES.items()}
    line = range(0, 1001, train.COORDINATE_STEP)
    forms = [np.array([tokenizer.encode(form.format(v))[0] for v in line]) for form in ("{}", ", {}")]

    right: dict[str, list] = {a: [] for a in words}
    errors: list[np.ndarray] = []
    hits: list[bool] = []
    for k in range(batches):
        batch, _ = scenes.batch(10**5 + k)  # far behind the last step of any training
        logits, tokens = np.asarray(logits_of(batch)), batch.rows.tokens
        said = logits.argmax(-1)
        for a, ids in words.items():
            there = batch.rows.trained & np.isin(tokens, ids)
            right[a] += (said == tokens)[there].tolist()
        # A box is four coordinates in a row: one as it stands, three after a comma.
        first, later = (batch.rows.trained & np.isin(tokens, ids) for ids in forms)
        boxes = np.argwhere(first[..., :-3] & later[..., 1:-2] & later[..., 2:-1] & later[..., 3:])
        for i, j, at in boxes:
            ids = [forms[0], forms[1], forms[1], forms[1]]
            span = range(at, at + 4)
            true = [int(np.flatnonzero(f == tokens[i, j, t])[0]) for f, t in zip(ids, span, strict=True)]
            seen = [int(logits[i, j, t, f].argmax()) for f, t in zip(ids, span, strict=True)]
            errors.append(np.abs(np.subtract(true, seen)) * train.COORDINATE_STEP)
            hits.append(train.box_iou(true, seen) > 0.5)
    corners = dict(zip(("x1", "y1", "x2", "y2"), np.mean(errors, 0).round(1).tolist(), strict=True))
    return {
        "words": {a: round(float(np.mean(v)), 3) for a, v in right.items()},
        "boxes": round(float(np.mean(hits)), 3),
        "corner_errors": corners,
        "counted": {"boxes": len(hits), **{a: len(v) for a, v in right.items()}},
    }


def reading(config: train.Config, batches: int = 3) -> dict[str, Any]:
    """Share of right tokens in the lists of thinking, the truth before them given; later lists can be read.

    more: whether another line follows; place: its number (on a first list it may be one off); fits: whether the query,
    or the answer before, excludes what a line said, and misses ATTRIBUTE: of those that are excluded by this one;
    differ: the attributes that differ among those left; named: what the answer says of the one that is left, or
    guessed.
    """
    logits_of, scenes, tokenizer = teacher_forced(config)
    hits: dict[tuple[str, str], list[bool]] = {}
    verdicts = [tokenizer.encode(f" {word}")[0] for word in synthetic.ASKABLE]  # that a line does not fit
    for k in range(batches):
        batch, _ = scenes.batch(10**5 + k)
        said, tokens = np.asarray(logits_of(batch)).argmax(-1), batch.rows.tokens
        for row in np.ndindex(tokens.shape[:2]):
            words = [tokenizer.decode([t]) for t in tokens[row]]
            turn, thinking, ended, answering = 0, False, False, False
            for t in range(2, len(words)):
                word, before = words[t], words[t - 1]
                if batch.rows.segment[row][t] != batch.rows.segment[row][t - 1]:
                    turn, thinking, answering = 0, False, False
                answering |= word == "<|vision_end|>"  # of the key frame
                if word in ("<thinking>", " </thinking>"):
                    thinking, ended = word == "<thinking>", False
                    turn += thinking
                if not (thinking and batch.rows.trained[row][t]):
                    continue
                right, kind, where = bool(said[row][t] == tokens[row][t]), None, "first" if turn == 1 else "later"
                if not ended and before.strip() in synthetic.COLUMNS:
                    verdict = f"misses{word}" if tokens[row][t] in verdicts else "fits"
                    same = bool((said[row][t] in verdicts) == (tokens[row][t] in verdicts))
                    hits.setdefault((where, verdict), []).append(same)
                if answering:
                    kind = "named" if word != "<thinking>" else None
                elif word in ("\n", " ;") and not ended:
                    kind, ended = "more", word == " ;"
                elif before == "\n" and not ended and word.isdigit():
                    kind = "place"
                elif ended and word.strip() in synthetic.ASKABLE:
                    kind = "differ"
                if kind:
                    hits.setdefault((where, kind), []).append(right)
    out: dict[str, Any] = {}
    for (where, kind), values in sorted(hits.items()):
        out.setdefault(where, {})[kind] = {"right": round(float(np.mean(values)), 3), "of": len(values)}
    return out


class Stage:
    """A config's policy, the user who answers it and the expert, and the samples that they talk about.

    Raises ConfigError when the data hold no scene graphs.
    """

    def __init__(self, config: train.Config):
        self.config, self.mesh = config, train.make_mesh(config.mesh)
        source = train.resolve_path(config.policy.path)
        policy_config, self.params = train.load_policy(source, self.mesh, dtype="float32")
        self.policy = train.Policy(policy_config, config.policy.remat, self.mesh, config.policy.attention)
        self.speaker = train.Speaker(config.protocol, policy_config, train.load_tokenizer(source, policy_config))
        self.sampler = train.Sampler(config, self.policy, self.speaker, self.mesh)
        _, self.user, self.expert = train.meet(config, self.mesh)
        self.train, self.test = train.open_data(config)
        if not (self.test[0].privileged or {}).get("scene_graph"):
            raise train.ConfigError(f"data.path={config.data.path}: holds no scene graphs; use the synthetic world")

    def play(self, samples: Sequence[data.Sample], temperatures: Sequence[float]) -> list[list[train.Dialogue]]:
        """A dialogue of each sample at each temperature."""
        shown = [data.sample_frames(len(sample.frames), self.config.protocol.frames) for sample in samples]
        prompts = [train.Prompt(*each, self.speaker) for each in zip(samples, shown, strict=True)]
        where = dict(seed=self.config.seed, step=train.EVALUATION, clock=train.Clock())
        return self.sampler.play(self.params, prompts, temperatures, self.user, **where)


def rows(config: train.Config, repeats: int = 7) -> dict[str, Any]:
    """Least seconds of a step's log-probabilities and updates, in shared rows and in a row each, measured in turn."""
    c = config
    if not c.update.row_buckets or c.update.loss == "sdpo":
        raise train.ConfigError("update.row_buckets=[] or update.loss=sdpo: no rows are shared; give e.g. [4, 6], rlsd")
    stage = Stage(c)
    samples = [stage.train[int(i)] for i in data.order(c.seed, 0, 0, len(stage.train), c.rollout.prompts)]
    batch, _ = train.pack(stage.play(samples, [c.rollout.temperature] * c.rollout.rollouts), c, stage.speaker)
    batch = encoded(c, stage.policy, stage.params, batch)
    state = train.fresh_state(stage.params, c, teacher=False)
    logprob, update = train.make_programs(stage.policy, c, state)
    parts = c.update.minibatches
    rng = np.random.default_rng(0)

    def calls(buckets: Sequence[int]) -> tuple[list[int], dict[str, Callable[[], Any]]]:
        """Rows of each part, and what is timed: everything that a step does with them, the laying out too."""

        def shared() -> list[tuple[train.Batch, np.ndarray]]:
            each = [train.take_prompts(batch, c.rollout.prompts, k, parts) for k in range(parts)]
            return [train.share_rows(part, buckets) for part in each]

        def read() -> Any:
            return [jax.device_get(logprob(stage.params, train.shard_batch(stage.mesh, part))) for part, _ in shared()]

        def learn() -> Any:
            nonlocal state
            for part, source in shared():
                credit = train.Credit(rng.standard_normal(source.shape, np.float32), part.rows.logp, part.rows.trained)
                state, stats = update(state, *train.shard_batch(stage.mesh, (part, credit, None)), np.float32(0.0))
            return stats

        return [part.rows.tokens.shape[1] for part, _ in shared()], {"logprob": read, "update": learn}

    kinds = {"shared": calls(c.update.row_buckets), "alone": calls([])}
    out: dict[str, Any] = {"device": jax.devices()[0].device_kind, "rows": {kind: n for kind, (n, _) in kinds.items()}}
    for name in ("logprob", "update"):
        told = in_turn({kind: call[name] for kind, (_, call) in kinds.items()}, repeats)
        least = {kind: each["run"] for kind, each in told.items()}
        out[name] = least | {"ratio": least["shared"] / least["alone"]}
    return out


def frozen(config: train.Config, repeats: int = 5) -> dict[str, Any]:
    """Seconds of what reads a minibatch, of its images and of what they were encoded to."""
    c = config
    if not c.policy.freeze_vision or c.update.loss == "sdpo":
        raise train.ConfigError("policy.freeze_vision=false or update.loss=sdpo: use freeze_vision=true and rlsd")
    source, mesh = train.resolve_path(c.policy.path), train.make_mesh(c.mesh)
    policy_config, params = train.load_policy(source, mesh, dtype="float32")
    policy = train.Policy(policy_config, c.policy.remat, mesh, c.policy.attention)
    plain = random_batch(c, train.Speaker(c.protocol, policy_config, train.load_tokenizer(source, policy_config)))
    state = train.fresh_state(params, c, teacher=False)
    logprob, update = train.make_programs(policy, c, state)
    noise = np.random.default_rng(0).standard_normal(plain.rows.logp.shape, np.float32)
    credit = train.Credit(noise, plain.rows.logp, plain.rows.trained)

    def read(batch: train.Batch) -> Any:
        return logprob(params, train.shard_batch(mesh, batch))

    def learn(batch: train.Batch) -> Any:  # gives the weights away, so it comes last
        nonlocal state
        state, stats = update(state, *train.shard_batch(mesh, (batch, credit, None)), np.float32(0.0))
        return stats

    out: dict[str, Any] = {"device": jax.devices()[0].device_kind, "devices": len(jax.devices())}
    batches = {"images": plain, "encoded": encoded(c, policy, params, plain)}
    for name, call in {"logprob": read, "update": learn}.items():
        told = in_turn({kind: functools.partial(call, batch) for kind, batch in batches.items()}, repeats)
        out[name] = told | {"ratio": told["encoded"]["run"] / told["images"]["run"]}
    return out


def lists(config: train.Config) -> dict[str, Any]:
    """First lists of greedy dialogues about test queries, by what is wrong with them.

    exact: each candidate's color, shape, size and motion, nothing else; missing: some are left out; extra: some do not
    fit the query; wrong: both. Of each the share, and the share of those dialogues that go well: an ambiguous one ends
    resolved, a clear one asks nothing. Then the share of exact lists by how near the nearest two objects' left edges
    are, in thousandths of the frame.
    """
    stage = Stage(config)
    samples = [s for s in stage.test if s.initial_count > 0]
    found: dict[str, dict[str, list[bool]]] = {
        level: {kind: [] for kind in ("exact", "missing", "extra", "wrong")} for level in ("ambiguous", "clear")
    }
    crowded: dict[str, list[bool]] = {}
    size = config.evaluate.prompts
    for start in range(0, len(samples), size):
        part = [samples[(start + k) % len(samples)] for k in range(size)]  # one set of programs serves all
        played = stage.play(part, [0.0])
        counts = train.score(played, config, stage.expert, None)[0].counts
        for i, (d,) in enumerate(played[: len(samples) - start]):
            if d.lost:
                continue
            kind, gap = first_list(d)
            asked = len(d.questions)
            ambiguous = part[i].initial_count > 1
            well = asked > 0 and counts[i, 0, asked] == 1 if ambiguous else asked == 0
            found["ambiguous" if ambiguous else "clear"][kind].append(bool(well))
            near = next((f"below {x}" for x in (35, 60, 100) if gap < x), "100 or more")
            crowded.setdefault(near, []).append(kind == "exact")
    share = lambda values: round(float(np.mean(values)), 3) if values else None  # noqa: E731
    out: dict[str, Any] = {}
    for level, kinds in found.items():
        total = sum(map(len, kinds.values()))
        out[level] = {"dialogues": total}
        for kind, well in kinds.items():
            out[level][kind] = {"share": round(len(well) / max(total, 1), 3), "go_well": share(well)}
    near = {k: {"exact": share(v), "of": len(v)} for k, v in sorted(crowded.items())}
    return out | {"exact_by_nearest_left_edges": near}


def first_list(d: train.Dialogue) -> tuple[str, float]:
    """What the first list of a dialogue is (see `lists`), and the least gap between left edges in its scene."""
    graph, fid = d.prompt.graph, d.prompt.fids[0]
    words = {o["oid"]: (o["color"], o["shape"], o["size"], o["motion"]["dir"]) for o in graph["objects"]}
    true = collections.Counter(words[oid] for oid in graph["candidates"])
    lines = re.findall(r"\n\d+ (\w+) (\w+) (\w+) (\w+) \w+(?=\n|$)", d.texts[0].partition(" ; ")[0])
    said = collections.Counter(lines)
    missing, extra = true - said, said - true
    kind = ("wrong" if extra else "missing") if missing else "extra" if extra else "exact"
    edges = sorted(o["per_frame"][fid]["center"][0] - o["radius"] for o in graph["objects"])
    return kind, float(np.diff(edges).min(initial=np.inf)) * 1000 / graph["size"][1]


def teacher_forced(config: train.Config) -> tuple[Callable, train.SceneLessons, weights.Tokenizer]:
    """(batch -> logits of its rows, the demonstrations, the tokenizer) of the policy in the config."""
    source = train.resolve_path(config.policy.path)
    policy_config, params = train.load_policy(source, dtype="float32")
    tokenizer, policy = train.load_tokenizer(source, policy_config), train.Policy(policy_config, False)
    scenes = train.SceneLessons(config, train.Speaker(config.protocol, policy_config, tokenizer))

    @jax.jit
    def logits_of(batch: train.Batch) -> jax.Array:
        return policy.apply({"params": params}, train.predict(policy, params, batch), method=train.Policy.head)

    return logits_of, scenes, tokenizer


# ------------------------------------------------------------------------------------------------------
# Speed of the two halves of a step. These take their sizes as key=value, not a config.
# ------------------------------------------------------------------------------------------------------

RANDOM_MODEL = {  # of `rollout` and `growth` without model=
    "model_type": "qwen3_vl", "tie_word_embeddings": True, "image_token_id": 31990, "video_token_id": 31991,
    "vision_start_token_id": 31992, "vision_end_token_id": 31993,
    "text_config": {
        "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [8, 4, 4]},
    },
    "vision_config": {
        "depth": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 256,
        "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1, 2], "patch_size": 16,
        "temporal_patch_size": 2, "spatial_merge_size": 2,
    },
}  # fmt: skip


def sizes(arguments: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """key=value over defaults of the same types, whole numbers from 1 up. Raises ConfigError."""
    out = dict(defaults)
    for item in arguments:
        key, equals, value = item.partition("=")
        if not equals or key not in defaults:
            raise train.ConfigError(f"{item!r}: known are {', '.join(f'{k}={v}' for k, v in defaults.items())}")
        if isinstance(defaults[key], int):
            if not value.isdigit() or int(value) < 1:
                raise train.ConfigError(f"{item}: use a whole number from 1 up, for example {key}={defaults[key]}")
            value = int(value)
        out[key] = value
    return out


def random_params(config: train.PolicyConfig, dtype: str = "float32") -> Any:
    def init(key: jax.Array) -> Any:
        made = train.Policy(config).init(key, train.example_images(config.vision))
        return train.compute_copy(flax.linen.unbox(made)["params"], dtype)

    return jax.jit(init)(jax.random.key(0))


def model_of(path: str) -> tuple[train.PolicyConfig, Any]:
    """The policy in a directory as it is stored, or RANDOM_MODEL."""
    if path:
        return train.load_policy(path)
    policy_config = train.PolicyConfig.from_json(RANDOM_MODEL)
    return policy_config, random_params(policy_config)


class FixedDialogue:
    """A dialogue without words: prompts of images and random text, then turns of as many tokens as may be sampled with
    an observation between each two. The device programs and their order are those of `train.Sampler.play`."""

    def __init__(self, policy_config: train.PolicyConfig, given: dict[str, Any], devices: Sequence[Any] | None = None):
        self.given, g = given, given
        unit = policy_config.vision.patch_size * policy_config.vision.spatial_merge_size
        protocol = train.ProtocolSection(
            frames=g["images"], frame_size=g["image_size"], keyframe_size=unit, action_tokens=g["new_tokens"]
        )
        # As a run's cache grows from bucket to bucket, this one does from turn to turn.
        each = g["new_tokens"] + g["observation_tokens"]
        rollout = train.RolloutSection(
            prompts=g["prompts"], rollouts=g["rollouts"], decode_tokens=g["new_tokens"],
            cache_buckets=[(turn + 1) * each for turn in range(g["turns"])],
        )  # fmt: skip
        self.config = train.Config(protocol=protocol, rollout=rollout)
        words = train.resolve_path("asset:embedded_base")  # they are never used
        tokenizer = train.load_tokenizer(words, policy_config)
        self.speaker = train.Speaker(protocol, policy_config, tokenizer)
        self.mesh = train.make_mesh(train.MeshSection(), devices)
        self.sampler = train.Sampler(
            self.config, train.Policy(policy_config, mesh=self.mesh), self.speaker, self.mesh
        )
        self.sampler.allowed = np.ones(policy_config.vocab_size, bool)
        self.sampler.stop_state, self.sampler.ends = -1, np.array([-1])  # nothing ends a turn
        rng = np.random.default_rng(0)
        p, words = g["prompts"], min(policy_config.vocab_size, policy_config.image_token_id)
        self.text = rng.integers(0, words, (p, g["text_tokens"]))
        self.told = rng.integers(0, words, (g["turns"], p, g["rollouts"], g["observation_tokens"]))
        rows = []
        for text in self.text.tolist():
            row = train.Transcript()
            row.add(text[: len(text) // 2])
            for i in range(g["images"]):
                row.add([policy_config.vision_start_token_id])
                row.add_image(policy_config.image_token_id, i * self.speaker.frame_tokens, self.speaker.frame_grid)
                row.add([policy_config.vision_end_token_id])
            row.add(text[len(text) // 2 :])
            rows.append(row)
        self.start = rows[0].position
        self.tokens = np.array([row.tokens for row in rows])
        self.rows = train.stack_rows([[[row]] for row in rows], len(rows[0]), 0)
        merge = policy_config.vision.spatial_merge_size**2
        shape = (p * g["images"], self.speaker.frame_tokens * merge, policy_config.vision.patch_dim)
        self.images = self.speaker.images(rng.standard_normal(shape, np.float32), self.speaker.frame_grid)

    def observation(self, turn: int, position: int) -> train.Rows:
        def row(tokens: list[int]) -> list[train.Transcript]:
            out = train.Transcript(position)
            out.add(tokens)
            return [out]

        grid = [[row(tokens) for tokens in line] for line in self.told[turn].tolist()]
        return train.stack_rows(grid, self.given["observation_tokens"], 0)

    def play(self, params: Any, seed: int = 0) -> dict[str, float]:
        """Seconds per phase of one dialogue."""
        g, s, clock = self.given, self.sampler, train.Clock()
        p, n = g["prompts"], g["rollouts"]
        done = jax.block_until_ready
        with clock("encode"):
            visual = done(train.Visual(*s.encode(params, train.shard_batch(self.mesh, self.images))))
        with clock("prefill"):
            lanes = done(s.prefill(params, train.shard_batch(self.mesh, self.rows), visual, rollouts=n))
        fill = lambda value, kind=np.int32: np.full((p, n), value, kind)  # noqa: E731
        position = self.start
        for turn, capacity in enumerate(self.config.rollout.cache_buckets):
            with clock("decode"):
                keys = s.keys(seed, turn, np.arange(p), np.arange(n))
                lanes, fresh, length, words, _ = s.generate(
                    params, lanes, fill(position), fill(0), fill(g["new_tokens"]), keys, fill(1.0, np.float32),
                )  # fmt: skip
                assert all(len(ids) == g["new_tokens"] for line in words for ids, _ in line)
            position += g["new_tokens"]
            if turn + 1 == g["turns"]:
                break
            with clock("extend"):
                lanes = s.append(lanes, fresh, length, capacity)
                rows = train.shard_batch(self.mesh, self.observation(turn, position))
                fresh, count, hidden = s.extend(params, lanes, rows)
                lanes = done(s.append(lanes, fresh, count, capacity).replace(hidden=hidden))
            position += g["observation_tokens"]
        return clock.take()


def rollout(arguments: Sequence[str]) -> dict[str, Any]:
    """Tokens per second of a fixed dialogue."""
    g = sizes(
        arguments, model="", prompts=4, rollouts=8, images=6, image_size=224, text_tokens=64, turns=3, new_tokens=32,
        observation_tokens=16, against="",
    )  # fmt: skip
    if g["against"] not in ("", "huggingface"):
        raise train.ConfigError(f"against={g['against']}: use huggingface, or leave it out")
    policy_config, params = model_of(g["model"])
    dialogue = FixedDialogue(policy_config, g)
    first = sum(dialogue.play(params).values())
    spent = dialogue.play(params, seed=1)
    total = sum(spent.values())
    out: dict[str, Any] = {
        "tokens_per_s": g["prompts"] * g["rollouts"] * g["turns"] * g["new_tokens"] / total,
        **{f"{phase}_s": spent.get(phase, 0.0) for phase in ("encode", "prefill", "decode", "extend")},
        "compile_s": first - total,
        "peak_rss_gib": (train.peak_memory("self") or 0.0) * 1e9 / 2**30,
        "prompt_tokens": int(dialogue.tokens.shape[1]),
    }
    if g["against"]:
        with tempfile.TemporaryDirectory() as folder:
            train.save_policy(folder, policy_config, params)
            np.savez(
                f"{folder}/dialogue.npz", tokens=dialogue.tokens, told=dialogue.told, patches=dialogue.images.patches
            )
            grid = [side * policy_config.vision.spatial_merge_size for side in dialogue.speaker.frame_grid]
            job = {"folder": folder, "grid": grid, **{k: g[k] for k in ("rollouts", "turns", "new_tokens", "images")}}
            code = "import json, sys; from icseg_jax import bench; bench.huggingface(json.loads(sys.argv[1]))"
            done = subprocess.run(
                [sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise train.ConfigError(f"against=huggingface: {last}")
            told = json.loads(done.stdout.strip().splitlines()[-1])
        out["huggingface"] = told
        out["times_huggingface"] = out["tokens_per_s"] / told["tokens_per_s"]
    return out


def huggingface(job: dict[str, Any]) -> None:
    """The dialogue of `rollout` by transformers, in a process of its own: each turn a `generate` on all rows with its
    own cache, the second dialogue timed. Prints one JSON object."""
    import torch

    from icseg_jax.sam2_sidecar import import_torchvision

    import_torchvision()
    from transformers import Qwen3VLForConditionalGeneration

    saved = np.load(f"{job['folder']}/dialogue.npz")
    model = Qwen3VLForConditionalGeneration.from_pretrained(job["folder"], dtype="auto", use_safetensors=True).eval()
    n = job["rollouts"]
    rows = np.repeat(saved["tokens"], n, 0)
    p = len(saved["tokens"])
    images = job["images"]
    pixels = saved["patches"].reshape(p, images * saved["patches"].shape[1], -1)
    pixels = torch.from_numpy(np.repeat(pixels, n, 0).reshape(-1, pixels.shape[-1]))
    grids = torch.tensor([[1, *job["grid"]]] * (len(rows) * images))
    model.generation_config.eos_token_id = None
    length = job["new_tokens"]
    pictures = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    pictures = torch.tensor([getattr(model.config, name) for name in pictures])

    def play() -> float:
        begun = time.perf_counter()
        ids = torch.from_numpy(rows)
        with torch.inference_mode():
            for turn in range(job["turns"]):
                kinds = (ids == model.config.image_token_id).int()
                ids = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grids,
                    mm_token_type_ids=kinds, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=length, min_new_tokens=length, use_cache=True, pad_token_id=0,
                )  # fmt: skip
                said = ids[:, -length:]
                said[torch.isin(said, pictures)] = 0  # a random model says these too; no picture comes with them
                if turn + 1 < job["turns"]:
                    told = torch.from_numpy(saved["told"][turn].reshape(len(rows), -1))
                    ids = torch.cat([ids, told], 1)
        return time.perf_counter() - begun

    play()
    spent = play()
    print(json.dumps({"tokens_per_s": len(rows) * job["turns"] * length / spent, "seconds": spent}))


def growth(arguments: Sequence[str]) -> dict[str, Any]:
    """Milliseconds per decoded token of all rows, and of one of them, by the prompt's length and the rollouts that
    share it; and what the longest prompt takes beyond the shortest: not rollouts times that of one rollout."""
    g = sizes(arguments, model="", prompts=4, new_tokens=32)
    policy_config, params = model_of(g["model"])
    unit = policy_config.vision.patch_size * policy_config.vision.spatial_merge_size

    def step_ms(prompt: int, rollouts: int) -> float:
        fixed = dict(images=1, image_size=unit, turns=1, observation_tokens=16, text_tokens=prompt - 3)
        dialogue = FixedDialogue(policy_config, {**g, **fixed, "rollouts": rollouts})
        dialogue.play(params)
        return 1e3 * min(dialogue.play(params, seed=k)["decode"] for k in (1, 2, 3)) / g["new_tokens"]

    lengths, counts = (256, 1024, 4096), (1, 2, 4, 8, 16)
    step = {length: {n: step_ms(length, n) for n in counts} for length in lengths}
    row = {length: {n: ms / (g["prompts"] * n) for n, ms in by_count.items()} for length, by_count in step.items()}
    longer = {n: step[lengths[-1]][n] - step[lengths[0]][n] for n in counts}
    return {"step_ms": step, "row_ms": row, f"step_ms_of_{lengths[-1] - lengths[0]}_more_prompt_tokens": longer}


def update(arguments: Sequence[str]) -> dict[str, Any]:
    """Forward, backward and optimiser, with the prompt run once per group and once per rollout."""
    g = sizes(
        arguments, prompts=2, rollouts=8, prompt_tokens=1024, response_tokens=256, layers=8, width=512, vocabulary=4096
    )
    text = RANDOM_MODEL["text_config"] | {
        "num_hidden_layers": g["layers"], "hidden_size": g["width"], "intermediate_size": 3 * g["width"],
        "vocab_size": g["vocabulary"],
    }  # fmt: skip
    vision = RANDOM_MODEL["vision_config"] | {"out_hidden_size": g["width"]}
    policy_config = train.PolicyConfig.from_json(RANDOM_MODEL | {"text_config": text, "vision_config": vision})
    params = jax.device_get(random_params(policy_config))
    rng = np.random.default_rng(0)

    def rows(count: int, length: int, start: int) -> train.Rows:
        def row() -> list[train.Transcript]:
            out = train.Transcript(start)
            out.add(rng.integers(0, g["vocabulary"], length).tolist(), trained=True)
            return [out]

        return train.stack_rows([[row() for _ in range(count)] for _ in range(g["prompts"])], length, 0)

    p, n, t = g["prompts"], g["rollouts"], g["response_tokens"]
    batch = train.Batch(rows(1, g["prompt_tokens"], 0), rows(n, t, g["prompt_tokens"]), None, None)
    advantages = rng.standard_normal((p, n, 1), np.float32) * np.ones((1, 1, t), np.float32)
    found: dict[bool, dict[str, Any]] = {}
    old = None
    for shared in (True, False):
        section = train.UpdateSection(
            loss="vanilla", learning_rate=1e-6, clip_high=0.2, clip_norm=1e9, share_prefix=shared
        )
        config = train.Config(policy=train.PolicySection(dtype="float32"), update=section)
        policy = train.Policy(policy_config, config.policy.remat)
        logprob, step = train.make_programs(policy, config)
        state = train.fresh_state(jax.tree.map(jax.numpy.asarray, params), config, teacher=False)
        old = np.asarray(logprob(state.params, batch)) if old is None else old
        credit = train.Credit(advantages, old, batch.rows.trained)
        step = step.jitted.lower(state, batch, credit, None, np.float32(0)).compile()  # once: it tells its memory too
        memory = step.memory_analysis()
        after, stats = step(state, batch, credit, None, np.float32(0))
        held = [after]

        def again(step=step, held=held, credit=credit) -> Any:
            held[0], stats = step(held[0], batch, credit, None, np.float32(0))
            return stats

        # After one update the first moment is (1 - beta1) times the gradient.
        grads = jax.tree.map(lambda x, rest=1 - section.beta1: np.asarray(x) / rest, after.optimiser[1].mu)
        found[shared] = {
            "loss": float(stats["loss"]), "grads": grads,
            "peak_gib": (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30,
            "seconds": min(timed(again) for _ in range(2)),  # it ran once already
        }  # fmt: skip
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found[True]["grads"], found[False]["grads"])
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(found[False]["grads"]))
    return {
        "shared_s": found[True]["seconds"], "unshared_s": found[False]["seconds"],
        "times_faster": found[False]["seconds"] / found[True]["seconds"],
        "max_grad_difference": max(jax.tree.leaves(gap)), "max_grad": size,
        "loss_difference": abs(found[True]["loss"] - found[False]["loss"]),
        "shared_peak_gib": found[True]["peak_gib"], "unshared_peak_gib": found[False]["peak_gib"],
    }  # fmt: skip


CHIPS = {  # one chip in bfloat16 by what JAX calls it: TFLOP/s and TB/s of its vendor
    "H200": (989, 4.8), "H100": (989, 3.35), "A100": (312, 2.0),
    "v5 lite": (197, 0.82), "v5": (459, 2.77), "v6 lite": (918, 1.64),
}  # fmt: skip


def chip(config: train.Config, repeats: int = 3) -> dict[str, Any]:
    """One chip's decoding and update, and their shares of what it could do; None where that is not known.

    A decoded token reads the language model's weights and every slot of the cache, used or not; an update takes 6
    operations a parameter and token, and 12 a head's feature for each pair of a query and a key it sees. The vision
    tower's are not counted.
    """
    c, kind = config, jax.devices()[0].device_kind
    tera, bandwidth = next((peak for name, peak in CHIPS.items() if name in kind), (None, None))
    m = train.named_shape(c)
    p, n, new = c.rollout.prompts, c.rollout.rollouts, min(c.protocol.action_tokens, c.rollout.decode_tokens)
    params = random_params(m, c.policy.dtype)
    read = {name: part for name, part in params.items() if name != "vision"}
    if not m.tie_word_embeddings:
        read.pop("embedding")  # a row for a token
    count = sum(x.size for x in jax.tree.leaves(read))
    weighs = sum(x.nbytes for x in jax.tree.leaves(read))
    del read
    sizes = dict(prompts=p, rollouts=n, images=c.protocol.frames, image_size=c.protocol.frame_size, new_tokens=new)
    dialogue = FixedDialogue(m, sizes | {"text_tokens": 64, "turns": 1, "observation_tokens": 1}, jax.devices()[:1])
    params = train.reading_copy(dialogue.sampler.policy, dialogue.mesh, c.policy.dtype)(params)  # as a run has them
    dialogue.play(params)
    spent = [dialogue.play(params, seed=k + 1) for k in range(repeats)]
    step = min(each["decode"] for each in spent) / new
    slots = p * dialogue.tokens.shape[1] + p * n * (dialogue.config.rollout.cache_buckets[0] + new)
    one = 2 * m.num_hidden_layers * m.num_key_value_heads * m.head_dim * jax.numpy.dtype(c.policy.dtype).itemsize
    reads = weighs + slots * one
    out: dict[str, Any] = {"device": kind, "policy": str(c.policy.shape or c.policy.path), "parameters": count}
    out["decode"] = {
        "rows": p * n, "tokens_per_s": p * n / step, "ms_per_token": 1e3 * step, "reads_gib": reads / 2**30,
        "share_of_bandwidth": bandwidth and reads / (bandwidth * 1e12) / step,
        **{f"{phase}_s": min(each[phase] for each in spent) for phase in ("encode", "prefill")},
    }  # fmt: skip
    del params, dialogue

    batch = random_batch(c, train.Speaker(c.protocol, m, train.load_tokenizer(
        train.resolve_path("asset:embedded_base"), m)))  # fmt: skip
    state = train.fresh_state(random_params(m), c, teacher=False)
    _, update = train.make_programs(train.Policy(m, c.policy.remat, attention=c.policy.attention), c)
    p, n, t = batch.rows.tokens.shape
    noise = np.random.default_rng(0).standard_normal((p, n, t), np.float32)
    credit = train.Credit(noise, batch.rows.logp, batch.rows.trained)

    def learn() -> Any:
        nonlocal state
        state, stats = update(state, batch, credit, None, np.float32(0.0))
        return stats

    told, length = in_turn({"update": learn}, repeats)["update"], c.protocol.prompt_tokens
    pairs = p * (length**2 / 2 + n * t * (length + t / 2))
    tokens = p * (length + n * t)
    operations = 6 * count * tokens + 12 * m.num_hidden_layers * m.num_attention_heads * m.head_dim * pairs
    out["update"] = {
        "shape": [p, n, t], "seconds": told["run"], "compile_s": told["compile"], "tokens_per_s": tokens / told["run"],
        "tflops": operations / 1e12, "mfu": tera and operations / (tera * 1e12) / told["run"],
    }  # fmt: skip
    return out


SPEEDS = {"rollout": rollout, "growth": growth, "update": update}
MEASUREMENTS = {
    "advantages": (advantages, "experiments/embedded.yaml"),
    "chip": (chip, "experiments/qwen3vl_4b.yaml"),
    "frozen": (frozen, "experiments/embedded.yaml"),
    "lists": (lists, "experiments/embedded.yaml"),
    "metrics": (metrics_speed, None),  # of no config
    "perception": (perception, "experiments/embedded_warmstart.yaml"),
    "reading": (reading, "experiments/embedded_warmstart.yaml"),
    "rows": (rows, "experiments/embedded_long.yaml"),
    "world": (world_speed, None),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name in SPEEDS:
            print(json.dumps(SPEEDS[name](rest)))
            return 0
        if name not in MEASUREMENTS:
            raise train.ConfigError(f"unknown measurement {name!r}; known: {', '.join([*MEASUREMENTS, *SPEEDS])}")
        measure, default = MEASUREMENTS[name]
        if default is None:
            if rest:
                raise train.ConfigError(f"{name} takes no config and no key=value, not {' '.join(rest)}")
            print(json.dumps(measure()))
            return 0
        configs = [a for a in rest if "=" not in a]
        config = train.load_config((configs or [default])[0], [a for a in rest if "=" in a])
        print(json.dumps(measure(config)))
    except (train.ConfigError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
