"""Measures parts of the method against each other, in one process, so that the ratios hold on a noisy machine.

`python -m icseg_jax.bench advantages [CONFIG] [key=value ...]`
    From scores to token advantages (all three levels), per token, against a real update of the same config; and that
    arithmetic at 512 prompts x 16 rollouts x 8192 tokens. CONFIG defaults to experiments/embedded.yaml.
`python -m icseg_jax.bench perception [CONFIG] policy.path=DIR [key=value ...]`
    What a warm-started policy sees in 60 scenes that it was not trained on: words and boxes of demonstrations, each
    token predicted after the true ones. CONFIG defaults to experiments/embedded_warmstart_12.yaml.
`python -m icseg_jax.bench reading [CONFIG] policy.path=DIR [key=value ...]`
    How it writes lists of candidates: first ones, which must be seen, and later ones, which follow from the list
    before and the answer. CONFIG defaults to experiments/embedded_warmstart_12.yaml.
`python -m icseg_jax.bench lists [CONFIG] policy.path=DIR [key=value ...]`
    What becomes of dialogues about test queries, greedy, by what their first list of candidates looks like, and how
    crowding spoils such lists. CONFIG defaults to experiments/embedded.yaml.

Prints one JSON object.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from icseg_jax import data, simulator, synthetic, train, weights

USAGE = __doc__
LARGE = (512, 16, 8192)  # prompts, rollouts, tokens


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of a call, compiled before."""
    jax.block_until_ready(call())
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


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
    """A batch of the config's shapes full of random tokens: as much work as a real one."""
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
    speaker = train.Speaker(c.protocol, policy_config, weights.Tokenizer(source))
    questions = c.protocol.max_turns
    batch = random_batch(c, speaker)
    p, n, t = batch.rows.tokens.shape
    logp = -np.random.default_rng(0).random((2, p, n, t), np.float32)
    scores, nobody = random_scores(p, n, questions), np.zeros((p, n), bool)
    contexts = [["told"] * n] * p

    def credit_of(kind: str) -> train.Credit:
        """All that a step does between its scores and its updates, but the passes of the two policies."""
        section = dataclasses.replace(c, credit=dataclasses.replace(c.credit, turn_credit=kind))
        given = dict(old_logp=logp[0], teacher_logp=lambda: (logp[1], logp[0]), lam=0.5)
        return train.token_credit(batch, scores, contexts, nobody, section, **given)[0]

    _, update = train.make_programs(train.Policy(policy_config, c.policy.remat), c)
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

    more: whether another line follows; place: its number (on a first list it may be one off); fits: whether the query
    excludes what a line of a first list said; ruled_out: whether the answer before excludes it; differ: the attributes
    that differ among those left.
    """
    logits_of, scenes, tokenizer = teacher_forced(config)
    hits: dict[tuple[str, str], list[bool]] = {}
    no = tokenizer.encode(" no")[0]
    for k in range(batches):
        batch, _ = scenes.batch(10**5 + k)
        said, tokens = np.asarray(logits_of(batch)).argmax(-1), batch.rows.tokens
        for row in np.ndindex(tokens.shape[:2]):
            words = [tokenizer.decode([t]) for t in tokens[row]]
            turn, thinking, ended = 0, False, False
            for t in range(2, len(words)):
                word, before = words[t], words[t - 1]
                if batch.rows.segment[row][t] != batch.rows.segment[row][t - 1]:
                    turn, thinking = 0, False
                if word in ("<thinking>", " </thinking>"):
                    thinking, ended = word == "<thinking>", False
                    turn += thinking
                if not (thinking and batch.rows.trained[row][t]):
                    continue
                right, kind = bool(said[row][t] == tokens[row][t]), None
                same_no = bool((said[row][t] == no) == (word == " no"))
                if not ended and before.strip() in synthetic.COLUMNS:
                    hits.setdefault(("first" if turn == 1 else "later", "fits"), []).append(same_no)
                if word in ("\n", " ;") and not ended:
                    kind, ended = "more", word == " ;"
                elif before == "\n" and not ended and word.isdigit():
                    kind = "place"
                elif turn > 1 and words[t - 2] == "\n" and before.isdigit() and not ended:
                    kind, right = "ruled_out", same_no
                elif ended and word.strip() in synthetic.ASKABLE:
                    kind = "differ"
                if kind:
                    hits.setdefault(("first" if turn == 1 else "later", kind), []).append(right)
    out: dict[str, Any] = {}
    for (where, kind), values in sorted(hits.items()):
        out.setdefault(where, {})[kind] = {"right": round(float(np.mean(values)), 3), "of": len(values)}
    return out


def lists(config: train.Config) -> dict[str, Any]:
    """First lists of greedy dialogues about test queries, by what is wrong with them.

    exact: each candidate's color, shape, size and motion, nothing else; missing: some are left out; extra: some do not
    fit the query; wrong: both. Of each the share, and the share of those dialogues that go well: an ambiguous one ends
    resolved, a clear one asks nothing. Then the share of exact lists by how near the nearest two objects' left edges
    are, in thousandths of the frame.
    """
    source = train.resolve_path(config.policy.path)
    mesh = train.make_mesh(config.mesh)
    policy_config, params = train.load_policy(source, mesh, dtype="float32")
    policy, tokenizer = train.Policy(policy_config), weights.Tokenizer(source)
    speaker = train.Speaker(config.protocol, policy_config, tokenizer)
    sampler, expert = train.Sampler(config, policy, speaker, mesh), simulator.OracleExpert()
    _, test = train.open_data(config)
    samples = [s for s in test if s.initial_count > 0 and (s.privileged or {}).get("scene_graph")]
    if not samples:
        raise train.ConfigError(f"data.path={config.data.path}: holds no scene graphs; use the synthetic world")
    user = simulator.load_user(config.simulator.kind, seed=config.seed)
    found: dict[str, dict[str, list[bool]]] = {
        level: {kind: [] for kind in ("exact", "missing", "extra", "wrong")} for level in ("ambiguous", "clear")
    }
    crowded: dict[str, list[bool]] = {}
    size = config.evaluate.prompts
    for start in range(0, len(samples), size):
        part = [samples[(start + k) % len(samples)] for k in range(size)]  # one set of programs serves all
        prompts = [train.Prompt(s, data.sample_frames(len(s.frames), config.protocol.frames), speaker) for s in part]
        played = sampler.play(
            params, prompts, [0.0], user, seed=config.seed, step=train.EVALUATION, clock=train.Clock()
        )
        counts = train.score(played, config, expert, None)[0].counts
        for i, (d,) in enumerate(played[: len(samples) - start]):
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
    lines = re.findall(r"\n\d+ (\w+) (\w+) (\w+) (\w+) \w+(?! no)\b", d.texts[0].partition(" ; ")[0])
    said = collections.Counter(lines)
    missing, extra = true - said, said - true
    kind = ("wrong" if extra else "missing") if missing else "extra" if extra else "exact"
    edges = sorted(o["per_frame"][fid]["center"][0] - o["radius"] for o in graph["objects"])
    return kind, float(np.diff(edges).min(initial=np.inf)) * 1000 / graph["size"][1]


def teacher_forced(config: train.Config) -> tuple[Callable, train.SceneTeacher, weights.Tokenizer]:
    """(batch -> logits of its rows, the demonstrations, the tokenizer) of the policy in the config."""
    source = train.resolve_path(config.policy.path)
    policy_config, params = train.load_policy(source, dtype="float32")
    tokenizer, policy = weights.Tokenizer(source), train.Policy(policy_config, False)
    scenes = train.SceneTeacher(config, train.Speaker(config.protocol, policy_config, tokenizer))

    @jax.jit
    def logits_of(batch: train.Batch) -> jax.Array:
        return policy.apply({"params": params}, train.predict(policy, params, batch), method=train.Policy.head)

    return logits_of, scenes, tokenizer


MEASUREMENTS = {
    "advantages": (advantages, "experiments/embedded.yaml"),
    "lists": (lists, "experiments/embedded.yaml"),
    "perception": (perception, "experiments/embedded_warmstart_12.yaml"),
    "reading": (reading, "experiments/embedded_warmstart_12.yaml"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name not in MEASUREMENTS:
            raise train.ConfigError(f"unknown measurement {name!r}; known: {', '.join(MEASUREMENTS)}")
        measure, default = MEASUREMENTS[name]
        configs = [a for a in rest if "=" not in a]
        config = train.load_config((configs or [default])[0], [a for a in rest if "=" in a])
        print(json.dumps(measure(config), indent=1))
    except train.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
