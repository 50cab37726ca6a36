"""How far the models that answer and diagnose agree with the exact user and expert.

`python -m icseg_jax.evaluate CONFIG check=oracle simulator.kind=endpoint|local [expert.kind=endpoint] [key=value ...]`
    On the synthetic world's test split (`evaluate.samples` of it): one dialogue per query with a target, of questions
    in random order. The model under `simulator` answers each question, the one under `expert` counts the candidates
    after the exact answers. Prints one JSON object: shares of answers and counts that are the exact ones.

Scores of a policy are part of a training run so far (`evaluate.*` in the config).
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from icseg_jax import data, simulator, synthetic, train

USAGE = __doc__
Dialogue = list[tuple[str, str]]


def dialogues(config: train.Config) -> list[tuple[data.Sample, list[int], Dialogue]]:
    """(sample, shown frames, questions with their exact answers) of the test split. Raises ConfigError."""
    test = train.open_data(config)[1]
    oracle, out = simulator.OracleUser(), []
    for index in range(min(config.evaluate.samples or len(test), len(test))):
        sample = test[index]
        graph = (sample.privileged or {}).get("scene_graph")
        if not graph:
            raise train.ConfigError(f"data.path={config.data.path}: holds no scene graphs, so nothing exact to compare "
                                    "with; use the synthetic world (`python -m icseg_jax.data generate`)")
        if not sample.target_ids:
            continue
        shown = [sample.frame_ids[i] for i in data.sample_frames(len(sample), config.protocol.frames)]
        rng = np.random.default_rng([config.seed, index])
        asked = rng.permutation(synthetic.ASKABLE)[: config.protocol.max_turns - 1]
        questions = [synthetic.QUESTIONS[attribute].format(fid=rng.choice(shown)) for attribute in asked]
        out.append((sample, shown, [(question, oracle.answer(graph, shown, question)) for question in questions]))
    return out


def says_the_same(attribute: str, said: str, exact: str) -> bool:
    """Whether a free answer about an attribute names the exact value and no other, or is the exact phrase."""
    if exact not in synthetic.VALUES[attribute]:  # such as "not visible"
        return said.lower().strip(" .") == exact
    read = simulator.parse_question(f"{attribute} {said}")
    return read is not None and read.attribute == attribute and read.options == (exact,)


def check_answers(user: simulator.ModelUser, played: Sequence[tuple[data.Sample, list[int], Dialogue]]) -> dict:
    """Shares of the model's answers that say what the exact ones say, in all and by attribute."""
    asked = [(sample, shown, question, exact) for sample, shown, d in played for question, exact in d]
    answers = simulator.answer_all(user, [request[:3] for request in asked])
    hits: dict[str, list[bool]] = collections.defaultdict(list)
    for (_, _, question, exact), said in zip(asked, answers, strict=True):
        if said is not None:
            attribute = simulator.parse_question(question).attribute
            hits[attribute].append(says_the_same(attribute, said, exact))
    told = [answer for answer in answers if answer is not None]
    return {
        "agreement": share([hit for some in hits.values() for hit in some]),
        "by_attribute": {attribute: share(some) for attribute, some in sorted(hits.items())},
        "please_clarify": share([answer.lower().startswith(simulator.CLARIFY) for answer in told]),
        "unable": share([answer == simulator.UNABLE for answer in told]),
        "questions": len(asked), "without_answer": len(asked) - len(told), **user.about(),
    }  # fmt: skip


def check_counts(expert: simulator.ModelExpert, played: Sequence[tuple[data.Sample, list[int], Dialogue]]) -> dict:
    """Shares of the model's counts, made fit as in training, that are the exact ones after a question."""
    oracle, found = simulator.OracleExpert(), simulator.diagnose_all(expert, played)
    each, whole, as_came, unread, leaky = [], [], [], [], []
    for (sample, shown, d), diagnosis in zip(played, found, strict=True):
        if diagnosis is None:
            continue
        graph = sample.privileged["scene_graph"]
        unread.append(not simulator.readable_counts(diagnosis.counts))
        if unread[-1]:
            continue
        exact = oracle.diagnose(graph, shown, d).counts
        counts, fit = train.check_counts(diagnosis.counts, sample.initial_count, len(d))
        each += [a == b for a, b in zip(counts[1:], exact[1:], strict=True)]
        whole.append(counts == exact)
        as_came.append(fit)
        leaky.append(simulator.leaks(diagnosis.guidance, graph))
    return {
        "agreement": share(each), "whole_dialogues": share(whole), "usable_as_they_came": share(as_came),
        "unreadable": share(unread), "guidance_refused": share(leaky),
        "dialogues": len(played), "without_answer": sum(d is None for d in found), **expert.about(),
    }  # fmt: skip


def share(hits: Sequence[bool]) -> float | None:
    return round(float(np.mean(hits)), 4) if len(hits) else None


def against_oracle(config: train.Config) -> dict[str, Any]:
    """What `check=oracle` prints. Raises ConfigError."""
    user, _, expert = train.meet(config, train.make_mesh(config.mesh))
    if not isinstance(user, train.MODELS) and not isinstance(expert, train.MODELS):
        raise train.ConfigError("check=oracle: compares models with the exact user and expert; use "
                                "simulator.kind=endpoint or local, expert.kind=endpoint, or both")
    played = dialogues(config)
    out: dict[str, Any] = {"samples": len(played), "seed": config.seed}
    if isinstance(user, simulator.ModelUser):
        out["simulator"] = check_answers(user, played)
    if isinstance(expert, simulator.ModelExpert):
        out["expert"] = check_counts(expert, played)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    checks = [a.removeprefix("check=") for a in arguments if a.startswith("check=")]
    config, *changes = [a for a in arguments if not a.startswith("check=")] or [""]
    try:
        if checks != ["oracle"]:
            raise train.ConfigError(f"check={','.join(checks)}: give check=oracle; a policy is evaluated by its run")
        print(json.dumps(against_oracle(train.load_config(config, changes)), indent=1))
    except (train.ConfigError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
