"""IC-Seg in one file: a policy that asks before it segments, and Hi-GRPO, which teaches it to.

"Don't Guess, Just Ask" (arXiv 2605.17531). Read it from top to bottom; it runs as
`python -m icseg_jax.train experiments/embedded.yaml [key=value ...]`.

    section                         what it computes, by the notes' numbers
    1   Config                      5.1 recipe, 11 decisions
    2   Policy                      Qwen3-VL
    3   Mesh and sharding
    4   Protocol                    1: prompts, tags, transcript
    5   Rollout                     1.3 the dialogue loop, 1.4 and 1.5 what the environment answers
    6   Rewards                     2.2 counts, 3: trajectory terms, turn-level process reward
    7   Hi-GRPO                     4.2-4.7, 4.10: three levels of credit, group filter, losses
    8   Update                      4.5 the teacher, 4.6, 4.8, 5.1
    9   Training step, evaluation   4.7 refills, 4.9 a step, 5.2 masks, 5.3 and 11.7 scores
    10  Supervised warm start       11: the embedded base
    11  Checkpoints, logs, files
    12  Config files, command line

METHOD.md n and DATA.md n number the project's notes, which are not in this repository; what they state is written out
here. Hi-GRPO is GRPO with a turn-level term and RLSD's step weights (arXiv 2604.03128; `update.loss: rlsd` is the
paper's method); `sdpo` is arXiv 2601.20802. "The parent" is Seg-ReSearch (arXiv 2602.04454), on whose code the authors
built.

Shapes: P prompts, N rollouts of a prompt, T tokens of a rollout, t of one call, S of a prompt, L layers, H query heads,
K key/value heads, g = H/K, h head size, D width, V vocabulary, F frames, Q questions; I images, M patches and m merged
tokens of one, B merged tokens of a prompt's images (its frames, then its key frames), C slots of a rollout's cache, R
tokens of one stretch of decoding, or rows that rollouts share. The group axis is explicit: what belongs to a prompt is
[P, ...], what belongs to a rollout [P, N, ...].

Where this departs from the released scripts, or chooses where they are silent (METHOD.md 11.3):
 1. The process reward is the mean normalised reduction of the candidate count, gated by format; its formula is not
    public. `reward.process`.
 2. The turn level enters as a scalar in the return, like the terms of the trajectory level. `credit.turn_credit`.
 3. The teacher sees the expert's guidance only, never a sibling's solution. `credit.teacher_context`.
 4. A sixth reward term, the SAM2 mask IoU. `reward.weights.mask: 0` leaves the paper's five.
 5. The key frame is the last valid one before the answer; answers may span lines (the format term stays strict).
    `protocol.keyframe: first` is the parent project's reward.
 6. Frame -1 with the zero answer is scored on no-target samples. `reward.no_target`.
 7. The clarification prompt may be used on clear queries too, so that over-asking is trained against and measured;
    the embedded runs do. `protocol.clarify`: levels that get it; `data.repeat`: the mix of levels in training.
 8. Clips are 0.2/0.2 under `rlsd`; the asymmetric pair (0.2/0.28) belongs to `vanilla`. `update.clip_low`, `clip_high`.
 9. Zero-spread groups are dropped and refilled at most `rollout.refills` times; the release's filter may be inert.
10. Rollouts that ran out of tokens are masked out of the loss but stay in the group's statistics.
    `update.mask_overlong`.
11. Who asks nothing of an ambiguous query earns no process reward, even with a lucky guess. `reward.no_question`.
12. The step level weighs all that a rollout says, not its questions only. `credit.weigh`.
13. The parent's process term (`reward.process: parent_tpr`) counts malformed calls too.
14. Which models answered and diagnosed in the paper is not known, nor are their prompts: ours are in simulator.py, and
    the exact user and expert of the synthetic world are the default. `simulator.kind`, `expert.kind`.
15. `protocol.response_tokens` bounds what follows the prompt; the release's number bounds both together.
16. Test prompts longer than `protocol.prompt_tokens` are left out too; the release takes 4096 there, unfiltered.
17. Prompts, error texts and the teacher's wording are ours. `PROMPTS`, `TOOL_ERRORS`, `GUIDANCE`, `SOLUTION`.
18. Guidance that holds a number or a value of the target is not shown to the teacher.
19. The student of a step's token weights is that of its start, for both minibatches. `credit.delta_baseline`.
20. Dual clip under `rlsd` as well. `update.dual_clip`.
21. Box and point prompt SAM2 together, the parent gives one after the other. `sidecar.prompting`.
22. A teacher's context is cut by itself, not its whole prompt at 10240 tokens. `credit.guidance_tokens`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import secrets
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from icseg_jax import data, metrics, simulator, synthetic, weights
from icseg_jax.sam2_sidecar import SegmenterClient, SidecarError, parse_address
from icseg_jax.simulator import readable_counts

Array = jax.Array | np.ndarray | np.generic


class ConfigError(ValueError):
    """Something from outside is wrong. One line: what, where, and what would work."""


class PromptTooLong(ConfigError):
    """A sample's prompt has more than protocol.prompt_tokens; it is left out (METHOD.md 1.3)."""


# ======================================================================================================
# 1  Config
# ======================================================================================================


@dataclass(frozen=True)
class PolicySection:
    path: str = "asset:embedded_base"  # a Hugging Face directory, such as a run's trained/; "asset:" is in the package
    shape: str | None = None  # a config.json: random weights to start from (stage: sft), what dryrun compiles
    dtype: str = "bfloat16"  # type of the computation; master parameters are always float32
    attention: str = "xla"  # kernel of calls of 128 queries or more: xla | splash (TPU) | cudnn (NVIDIA, bfloat16)
    remat: bool = True  # recompute activations in the backward pass
    freeze_vision: bool = False  # METHOD.md 5.1: the released recipe trains the vision tower
    logits_tokens: int = 512  # tokens whose vocabulary logits exist at a time


@dataclass(frozen=True)
class DataSection:
    path: str = "data/synthetic"  # prepared by `python -m icseg_jax.data prepare`, whatever the dataset
    generate_train: int = 0  # synthetic scenes to write and prepare when `path` does not exist yet; 0: never
    generate_test: int = 0  # and their test split
    generate_seed: int = 0  # of the world
    repeat: dict[str, int] = field(default_factory=dict)  # times a level's samples come in an epoch; 1 if not named


@dataclass(frozen=True)
class ProtocolSection:
    frames: int = 6  # frames shown with the query
    frame_size: int = 448  # pixels, square (METHOD.md 1.1)
    keyframe_size: int = 864  # pixels of the high-resolution key frame
    max_turns: int = 6  # tool calls; one that names a frame and answers has asked at most max_turns - 1
    keyframe: str = "last"  # the valid key frame that counts: last before the answer | first
    prompts: str = "full"  # full | brief: how much the system prompt explains
    clarify: list[str] = field(default_factory=lambda: ["simple", "medium", "difficult"])  # abilities that may ask
    prompt_tokens: int = 2176  # longest prompt
    response_tokens: int = 8192  # T: everything after the prompt, observations included
    action_tokens: int = 4096  # one generation
    observation_tokens: int = 4096  # one observation


@dataclass(frozen=True)
class RolloutSection:
    prompts: int = 16  # P per step
    rollouts: int = 8  # N per prompt
    temperature: float = 1.0  # of sampling, and of the probabilities that the update learns from
    refills: int = 3  # times that zero-spread groups are replaced by new prompts
    cache_buckets: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])  # lengths of a rollout's cache
    observation_buckets: list[int] = field(default_factory=lambda: [64, 256, 1024, 4096])  # of a turn's observations
    decode_tokens: int = 512  # new tokens collect in a buffer of this size and then join the cache
    least_prompts: int = 4  # ended prompts leave the batch by halves, down to this many: each size is compiled


@dataclass(frozen=True)
class RewardSection:
    weights: dict[str, float] = field(
        default_factory=lambda: {"iou": 1.0, "box": 1.0, "point": 1.0, "frame": 1.0, "process": 1.0, "mask": 1.0}
    )
    iou: float = 0.5  # box IoU above this is a hit
    box_l1: float = 10.0  # mean coordinate error below this is a hit, thousandths of the frame
    point_l2: float = 100.0  # point error below this is a hit, thousandths of the frame
    process: str = (
        "reduction"  # METHOD.md 3.3: reduction | ratio | log | resolution_x_efficiency | linear | format | parent_tpr
    )
    redundant_cost: float = 0.1  # process: linear; taken off for each question that shrinks nothing
    no_question: str = "zero"  # process term of a guess at an ambiguous query: zero | format (the format term)
    success: float = 0.7  # share of the maximum return from which a rollout counts as a solution
    no_target: bool = True  # score frame -1 with the zero answer on no-target samples


@dataclass(frozen=True)
class CreditSection:
    normalise_std: bool = True  # divide by the group's standard deviation; false is Dr.GRPO
    lam: float = 0.5  # strength of the step level at the start
    lam_start: int = 1  # step until which it stays there
    lam_decay: int = 100  # steps over which it then falls to 0
    weight_clip: float = 0.2  # a token's weight stays within 1 -+ this
    weigh: str = "all"  # whose tokens are weighed: all | questions (the generations that asked)
    vanilla_on_nonnegative_adv: bool = False  # tokens of advantage 0 and above keep weight 1: only failures are weighed
    normalize_weight_by_seq_mean: bool = False  # divide the weights of a rollout by their mean
    delta_baseline: str = "student"  # what the teacher is compared with: student | teacher_plain (it without context)
    teacher_context: str = "guidance"  # what it is told: guidance | solution | solution_else_guidance | both | none
    teacher_update: str | None = None  # how it follows the student: sync | ema; null: ema under sdpo, else sync
    sync_interval: int = 10  # sync: steps between copies
    ema_rate: float = 0.05  # ema: share of the student after each update
    guidance_tokens: int = 1024  # room for what the teacher is told; what is longer is cut at its end
    turn_credit: str = "scalar"  # the process term is part of the return (scalar) or each question's own (local)
    turn_weight: float = 0.5  # local: weight of a question's advantage


@dataclass(frozen=True)
class UpdateSection:
    learning_rate: float | None = None  # null: 1e-5 under sdpo, else 1e-6
    warmup: int = 10  # steps
    decay: float = 0.0  # last share of the run in which the learning rate falls to 0; the paper's stays
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # of the gradient, all parameters together
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.999
    loss: str = "rlsd"  # rlsd | vanilla (no step level) | sdpo (self-distillation, no reward gradient)
    minibatches: int = 2  # optimiser updates per step, each on P / minibatches prompts
    micro_prompts: int = 0  # prompts whose activations live at a time; 0: the whole minibatch
    share_prefix: bool = True  # run each prompt once per group, in the update too
    clip_low: float = 0.2  # the ratio to the old policy counts within 1 - clip_low .. 1 + clip_high
    clip_high: float | None = None  # null: 0.28 under vanilla (the released 8B script: 0.30), else 0.2
    dual_clip: float = 3.0  # a failure costs at most this many times its advantage
    sdpo_top_k: int = 100  # sdpo: tokens compared one by one; the rest is one bucket
    sdpo_alpha: float = 0.5  # sdpo: 0 is KL(teacher|student), 1 KL(student|teacher), between them Jensen-Shannon
    sdpo_is_clip: float = 2.0  # sdpo: cap of the importance ratio
    mask_overlong: bool = True  # rollouts that ran out of tokens stay out of the loss
    token_buckets: list[int] = field(default_factory=lambda: [2048, 4096, 8192])  # T of a step's rollouts
    # Numbers of rows that a prompt's rollouts may be packed into; []: one each, as in sdpo's update always
    row_buckets: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class WarmstartSection:
    scenes: int = 32  # scenes per step
    rows: int = 2  # packed rows per scene
    practice: int = 0  # further rows per scene, whose list of objects is given as text: reading, not seeing
    reading: float = 0.0  # first share of the run, in which all rows are such practice
    row_tokens: int = 224  # length of a row; of scenes what is longer is left out, of `mix` it is cut
    keyframes: int = 2  # distinct high-resolution frames per scene
    learning_rate: float = 0.01  # Muon's, with consistent RMS: an update has an RMS of 0.2 times this
    warmup: int = 30  # steps
    skill: float = 0.0  # 0: noisy askers, 1: optimal ones
    guided: float = 0.2  # share of dialogues that follow the expert's guidance
    conversations: float = 0.06  # share of scenes that are conversations
    mask_types: float = 0.12  # share of scenes whose wording asks for a mask type
    dialogues_start: float = 0.0  # share of scenes with dialogues before short segments, at the start of the run
    dialogues: float = 0.7  # and from half of the run on
    decay: float = 1.0  # last share of the run in which the learning rate falls to 0
    coordinate_sigma: float = 1.5  # start of the spread of coordinate targets, in grid steps
    coordinate_sigma_end: float = 0.0  # reached after four fifths of the run
    patch_words: float = 0.5  # weight of naming what each image token shows; falls to 0 over half of the run
    mix: list[str] = field(default_factory=list)  # prepared folders: conversations in place of scenes
    rates: list[float] = field(default_factory=list)  # how often each of them is drawn; MIRAS: 10 and 2


@dataclass(frozen=True)
class SidecarSection:
    segmenter: str = "asset:sam2_mini"  # directory of config and weights, or a SAM 2.1 checkpoint (.pt)
    address: str | None = None  # a sidecar on another machine instead of one per host
    timeout: float = 60.0  # seconds per request
    threads: int = 1  # of PyTorch on a CPU
    prompting: str = "joint"  # box and point together, or sequential: box first, then the point (METHOD.md 5.2)
    cache_gb: float = 0.0  # of disk for the shown frames' embeddings, for hosts where encoding them takes the time


@dataclass(frozen=True)
class EndpointSection:
    """Of kind=endpoint: a multimodal model on a server that speaks OpenAI's chat completions."""

    url: str | None = None  # such as http://127.0.0.1:8000/v1; keys come from the environment (BUILD.md)
    model: str | None = None  # by the name under which the server lists it
    timeout: float = 60.0  # seconds for a question, retries included; then its row is left out of the step
    max_in_flight: int = 8  # questions at a time


@dataclass(frozen=True)
class SimulatorSection(EndpointSection):
    kind: str = "oracle"  # oracle | person | endpoint | local: a frozen policy of our own code, on the same mesh
    path: str | None = None  # of kind=local: the policy's directory, as policy.path; max_in_flight is its batch
    description: bool = False  # a model also reads the target's description
    flip: float = 0.0  # share of answers that are wrong
    refuse: float = 0.0  # share of questions that get no answer


@dataclass(frozen=True)
class ExpertSection(EndpointSection):
    kind: str = "oracle"  # oracle | endpoint


@dataclass(frozen=True)
class EvaluateSection:
    every: int = 50  # steps between evaluations; 0 turns every evaluation off
    prompts: int = 64  # samples side by side, each with one greedy dialogue and `draws` sampled ones
    draws: int = 1  # sampled dialogues per sample
    split: str = "test"  # of data.path that is evaluated
    samples: int = 0  # of that split; 0: all
    clips: int = 32  # samples whose video masks are scored
    gallery: int = 24  # dialogues kept with pictures
    before: bool = True  # evaluate before training too
    # What is other at test than in training (METHOD.md 7, A5, A6, A8); null: the same
    max_turns: int | None = None  # protocol.max_turns
    clarify: list[str] | None = None  # protocol.clarify
    flip: float | None = None  # simulator.flip
    refuse: float | None = None  # simulator.refuse
    describe: bool = False  # the target's description follows the query: the upper bound
    # Of greedy decoding, as vLLM applies them (METHOD.md 1.3; the released evaluation: 1.1 and 1.0)
    repetition_penalty: float = 1.0  # divides the logits of tokens in the dialogue so far; 1: off
    presence_penalty: float = 0.0  # is taken off the logits of tokens of the generation so far; 0: off


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 20  # steps
    keep: int = 2
    bucket: str | None = None  # where finished ones are copied to, such as gs://BUCKET/RUN (any file system of fsspec)


@dataclass(frozen=True)
class MeshSection:
    data: int | None = None  # prompts are spread over it; -1: what the other axes leave
    fsdp: int | None = None  # rollouts are spread over it, and parameters and optimiser are cut over it
    tensor: int | None = None  # heads, MLP width and vocabulary are cut over it
    distributed: bool = False  # several processes, one per host, find each other (BUILD.md)
    preset: str = "dp"  # the sizes not given: dp (all devices on data) | fsdp (all on fsdp) | fsdp_tp (tensor 2)


@dataclass(frozen=True)
class ProfileSection:
    steps: str | None = None  # stage rl, for example 3..5: their JAX profiler trace is written to run_dir/profile


@dataclass(frozen=True)
class Config:
    name: str = "run"  # of the run directory and the progress bar
    stage: str = "rl"  # rl | sft (the supervised warm start)
    seed: int = 0  # of all that is drawn: samples, tokens, random parameters
    steps: int = 100
    run_dir: str | None = None  # default runs/<name>
    topology: str | None = None  # the machine: chooses from the YAML's `topologies:`, such as v5p:4x4x4 or gpu:8
    policy: PolicySection = PolicySection()
    data: DataSection = DataSection()
    protocol: ProtocolSection = ProtocolSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    credit: CreditSection = CreditSection()
    update: UpdateSection = UpdateSection()
    warmstart: WarmstartSection = WarmstartSection()
    sidecar: SidecarSection = SidecarSection()
    simulator: SimulatorSection = SimulatorSection()
    expert: ExpertSection = ExpertSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    mesh: MeshSection = MeshSection()
    profile: ProfileSection = ProfileSection()


DECODINGS = ("greedy", "sampled")  # of an evaluation, side by side
HEADLINES = ("success_ambiguous", "success_clear", "questions_ambiguous", "questions_clear", "resolved_rate",
             "redundant_question_rate", "regret", "format_rate")  # fmt: skip
TERMS = ("iou", "box", "point", "frame", "process", "mask")
LEVELS = ("simple", "medium", "difficult", "clear", "none")
TURN_KINDS = ("reduction", "ratio", "log", "resolution_x_efficiency", "linear", "format", "parent_tpr")
LOSSES = ("rlsd", "vanilla", "sdpo")
CONTEXTS = ("guidance", "solution", "solution_else_guidance", "both", "none")


def resolve_path(path: str) -> Path:
    """`asset:NAME` lies in the package, everything else where the user stands."""
    if path.startswith("asset:"):
        return Path(__file__).parent / "assets" / path.removeprefix("asset:")
    return Path(path)


# ======================================================================================================
# 2  Policy: Qwen3-VL in functional Flax
# ======================================================================================================


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower, named as in `vision_config` of a Hugging Face `config.json`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class PolicyConfig:
    """Shapes of the policy, read from `config.json` (4.57-era and transformers-5 spelling of rope)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    vision: VisionConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    video_token_id: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str = "config.json") -> PolicyConfig:
        """`raw`: the parsed `config.json` of a Qwen3-VL directory. Raises ConfigError naming the key."""
        if raw.get("model_type") != "qwen3_vl":
            raise ConfigError(
                f"{where}: model_type is {raw.get('model_type')!r}; this policy reads 'qwen3_vl' (dense) only"
            )
        try:
            text, vision = raw["text_config"], raw["vision_config"]
            if not (isinstance(text, Mapping) and isinstance(vision, Mapping)):
                raise ConfigError(f"{where}: text_config and vision_config must be objects; a Qwen3-VL config.json has "
                                  "both")
            rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
            # Qwen3-VL as released; other values would be computed as if they were these.
            for key, value, known in (
                ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
                ("text_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
                ("text_config.attention_bias", text.get("attention_bias", False), False),
                ("vision_config.hidden_act", vision.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
            ):
                if value != known:
                    raise ConfigError(f"{where}: {key} is {value!r}; this policy computes {known!r} only")

            def whole(part: Mapping, key: str, least: int = 1) -> int:
                if type(part[key]) is not int or part[key] < least:
                    raise ConfigError(f"{where}: {key} is {part[key]!r}; a whole number from {least} up works")
                return part[key]

            def positive(value: Any, key: str) -> float:
                if not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise ConfigError(f"{where}: {key} is {value!r}; a number above 0 works")
                return float(value)

            def several(value: Any, key: str) -> tuple[int, ...]:
                if not isinstance(value, Sequence) or not all(type(x) is int and x >= 0 for x in value):
                    raise ConfigError(f"{where}: {key} is {value!r}; a list of whole numbers works")
                return tuple(value)

            theta = rope.get("rope_theta", text.get("rope_theta"))
            heads = whole(text, "num_attention_heads")
            config = cls(
                vocab_size=whole(text, "vocab_size"),
                hidden_size=whole(text, "hidden_size"),
                intermediate_size=whole(text, "intermediate_size"),
                num_hidden_layers=whole(text, "num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=whole(text, "num_key_value_heads"),
                head_dim=whole(text, "head_dim") if text.get("head_dim") else text["hidden_size"] // heads,
                rope_theta=positive(5e6 if theta is None else theta, "rope_theta"),
                mrope_section=several(rope.get("mrope_section", (24, 20, 20)), "mrope_section"),
                rms_norm_eps=positive(text.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
                tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
                image_token_id=whole(raw, "image_token_id", 0),
                video_token_id=whole(raw, "video_token_id", 0),
                vision_start_token_id=whole(raw, "vision_start_token_id", 0),
                vision_end_token_id=whole(raw, "vision_end_token_id", 0),
                vision=VisionConfig(
                    depth=whole(vision, "depth"),
                    hidden_size=whole(vision, "hidden_size"),
                    intermediate_size=whole(vision, "intermediate_size"),
                    num_heads=whole(vision, "num_heads"),
                    out_hidden_size=whole(vision, "out_hidden_size"),
                    num_position_embeddings=whole(vision, "num_position_embeddings"),
                    deepstack_visual_indexes=several(vision["deepstack_visual_indexes"], "deepstack_visual_indexes"),
                    patch_size=whole(vision, "patch_size"),
                    temporal_patch_size=whole(vision, "temporal_patch_size"),
                    spatial_merge_size=whole(vision, "spatial_merge_size"),
                    in_channels=whole({"in_channels": 3, **vision}, "in_channels"),
                ),
            )
        except KeyError as error:
            raise ConfigError(f"{where}: key {error.args[0]!r} is missing; a Qwen3-VL config.json has it") from None
        if len(config.mrope_section) != 3 or sum(config.mrope_section) * 2 != config.head_dim:
            raise ConfigError(
                f"{where}: mrope_section {list(config.mrope_section)} must be three numbers whose sum is head_dim/2 = "
                f"{config.head_dim // 2}"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads {config.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}"
            )
        tower = config.vision
        taps = list(tower.deepstack_visual_indexes)
        if tower.out_hidden_size != config.hidden_size:
            raise ConfigError(
                f"{where}: vision_config.out_hidden_size is {tower.out_hidden_size}; text_config.hidden_size = "
                f"{config.hidden_size} works"
            )
        if tower.in_channels != 3:
            raise ConfigError(f"{where}: vision_config.in_channels is {tower.in_channels}; 3 works")
        if not taps:
            raise ConfigError(f"{where}: deepstack_visual_indexes is empty; Qwen3-VL has at least one")
        if len(taps) > config.num_hidden_layers:
            raise ConfigError(f"{where}: more deepstack_visual_indexes than num_hidden_layers")
        if taps != sorted(set(taps)) or any(tap >= tower.depth for tap in taps):
            raise ConfigError(f"{where}: deepstack_visual_indexes is {taps}; rising numbers below {tower.depth} work")
        if math.isqrt(tower.num_position_embeddings) ** 2 != tower.num_position_embeddings:
            raise ConfigError(f"{where}: num_position_embeddings is {tower.num_position_embeddings}; a square works")
        if tower.hidden_size % (4 * tower.num_heads):
            raise ConfigError(
                f"{where}: vision_config.hidden_size is {tower.hidden_size}; a multiple of 4 x num_heads = "
                f"{4 * tower.num_heads} works"
            )
        return config


class Images(struct.PyTreeNode):
    """Images of one batch as patches, in the merge-major order that Qwen's image processor emits: the four patches that
    become one token stand together.

    Images of unequal grids are padded to the longest; what each patch needs to know of its place is data.
    """

    patches: Array  # [I, M, patch_dim]
    corners: Array  # [I, M, 4] int32: the four cells of the learned position grid around the patch
    corner_weights: Array  # [I, M, 4]: their bilinear weights
    place: Array  # [I, M, 2] int32: row and column, for the rotary embedding
    valid: Array  # [I, M] bool


class Visual(struct.PyTreeNode):
    """Encoded images: one bank of merged tokens for each prompt, into which token sequences point.

    Axes as `Policy.run` reads them; before banks are made they are per image: [I, m, D] and [taps, I, m, D].
    """

    tokens: Array  # [P, B, D]
    deepstack: Array  # [taps, P, B, D], in `Batch.visual` [P, taps, B, D]: added after the first LM layers


class Keys(struct.PyTreeNode):
    """Keys and values of one part of the context: shared by the group [L,P,K,S,h] or a rollout's own [L,P,N,K,S,h].

    Heads before tokens, as their products want them: the other way round, XLA on TPU lays a whole cache out anew before
    each decoding loop and holds it twice, and on CPU each layer's for every token.
    """

    k: Array
    v: Array


def _weight(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    scale: float | Callable | None = None,
):
    """One description of a parameter: its shape, its logical axes and how it starts (a scale or an initialiser).

    What FSDP cut is gathered here, where it is read; what tensor parallelism cut stays cut.
    """
    if callable(scale):
        start = scale
    elif scale is None:
        start = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0)
        if axes[-1] == "embed" and len(shape) == 3:  # [H, h, D]: both leading axes feed the output
            start = nn.initializers.normal((shape[0] * shape[1]) ** -0.5)
    elif scale in (0.0, 1.0):
        start = nn.initializers.constant(scale)
    else:
        start = nn.initializers.normal(scale)
    weight = module.param(name, nn.with_logical_partitioning(start, tuple(axes)), tuple(shape))
    return weight if module.mesh is None else laid(weight, module.mesh, *mesh_axes(module.mesh, axes, shape, "tensor"))


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square normalisation in fp32 over the last axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return scale.astype(x.dtype) * y.astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, eps: float = 1e-6) -> Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding, half-split convention. x [..., heads, h]; cos, sin [..., h/2], fp32."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def mrope_angles(config: PolicyConfig, positions: Array) -> tuple[Array, Array]:
    """Interleaved M-RoPE: frequency i takes its position from axis t, h, w, t, h, w, ... while the sections last.

    positions [..., 3] int32 -> cos, sin [..., h/2] fp32.
    """
    half = config.head_dim // 2
    axis = np.zeros(half, np.int32)
    for dim in (1, 2):
        axis[dim : config.mrope_section[dim] * 3 : 3] = dim
    frequency = config.rope_theta ** (-np.arange(half, dtype=np.float32) / half)
    chosen = positions.astype(jnp.float32)[..., axis]
    angle = chosen * frequency
    return jnp.cos(angle), jnp.sin(angle)


def attend(q: Array, parts: Sequence[tuple[Array, Array, Array]], ways: int = 1) -> Array:
    """Softmax attention over a context that lies in several parts, grouped queries, fp32 softmax.

    q [P,N,t,H,h]. Each part is (k, v, mask): shared by the group (k, v [P,K,S,h]) or a rollout's own
    (k, v [P,N,K,S,h]); mask is boolean and broadcasts to [P,N,t,S]. The parts are never concatenated or
    tiled: only their logits meet, in one softmax. A query that sees nothing gets the mean, not NaN. ways: devices
    among which rows and heads are divided; each has logits of at most LOGITS elements at a time, where it can be.
    """
    p, n, t, heads, size = q.shape
    groups = parts[0][0].shape[-3]
    grouped = q.reshape(p, n, t, groups, heads // groups, size).transpose(0, 1, 3, 4, 2, 5) * size**-0.5
    keys = tuple((k.astype(q.dtype), v.astype(q.dtype)) for k, v, _ in parts)
    queries = LOGITS * ways // (p * n * heads * sum(k.shape[-2] for k, _ in keys))
    block = min(QUERY_BLOCK, max(64, queries // 64 * 64))
    out = _attend(grouped, keys, tuple(mask for _, _, mask in parts), block)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(q.shape)


def _contract(spec: str, a: Array, b: Array, shared: bool) -> Array:
    """einsum in which `*` stands for the axes of a part's keys or values: pksh when shared, pnksh when a rollout's own.

    The product has the axes of a, then those of b: left to einsum, the two may change places, and on CPU the larger one
    (of size t * S) is then laid out anew for the product.
    """
    inputs, wanted = spec.replace("*", "pksh" if shared else "pnksh").split("->")
    first, second = inputs.split(",")
    axes = [x for x in first if x in second] + [x for x in first + second if (x in first) != (x in second)]
    made = "".join(x for x in axes if x in wanted)
    product = jnp.einsum(f"{inputs}->{made}", a, b, preferred_element_type=jnp.float32)
    return product.transpose([made.index(x) for x in wanted])


def _scores(q: Array, k: Array, mask: Array) -> Array:
    shared = k.ndim == 4
    few = math.prod(q.shape[3:5]) * (q.shape[1] if shared else 1) < k.shape[-2]  # so keys stay as they are
    scores = _contract("*,pnkgth->pnkgts", k, q, shared) if few else _contract("pnkgth,*->pnkgts", q, k, shared)
    return jnp.where(mask[:, :, None, None], scores, MASKED)


QUERY_BLOCK = 512  # queries of a row whose attention logits exist at a time, at most
LOGITS = 2**28  # a gibibyte of them on a device, at most


def _over_queries(
    step: Callable, most: int, carry: Any, queries: tuple[Array, ...], masks: tuple[Array, ...]
) -> tuple[Any, Any]:
    """step(carry, queries, masks) -> (carry, results) of blocks of at most `most` queries, one after the other. Queries
    are axis 4 of queries and results, axis 2 of masks.

    A block holds every n-th query, so that of a sequence that is split over devices each has a part of every block.
    """
    t = queries[0].shape[4]
    pieces = -(-t // most)
    if pieces == 1:
        return step(carry, queries, masks)
    rows = -(-t // (pieces * 64)) * 64

    def split(x, axis):
        x = jnp.pad(x, [(0, rows * pieces - t if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], rows, pieces, *x.shape[axis + 1 :]), axis + 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 5)
        return x.reshape(*x.shape[:4], rows * pieces, *x.shape[6:])[:, :, :, :, :t]

    own = [m.shape[2] > 1 for m in masks]  # the others are the same for all queries

    def block(carry, queries, cut):
        some = iter(cut)
        return step(carry, queries, tuple(next(some) if o else m for m, o in zip(masks, own, strict=True)))

    def write(state, piece):
        (carry, out), (number, *piece) = state, piece
        carry, results = block(carry, *piece)
        put = lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, number, 0)  # noqa: E731
        return (carry, jax.tree.map(put, out, results)), None

    cut = tuple(split(q, 4) for q in queries), tuple(split(m, 2) for m, o in zip(masks, own, strict=True) if o)
    # Results are written over a copy of the queries: XLA for GPUs makes zeros, which wait for nothing, for all layers
    # before the first one.
    results = jax.eval_shape(block, carry, *jax.tree.map(lambda x: x[0], cut))[1]
    out = jax.tree.map(lambda x: (cut[0][0] if x.ndim == 6 else cut[0][0][..., 0]).astype(x.dtype), results)
    (carry, out), _ = jax.lax.scan(write, (carry, out), (jnp.arange(pieces), *cut))
    return carry, jax.tree.map(join, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Array, keys: tuple[tuple[Array, Array], ...], masks: tuple[Array, ...], block: int) -> Array:
    """q [P,N,K,g,t,h], already scaled -> the same shape. Backward computes the weights again from their log-sum, so
    that nothing of size t * S outlives the forward pass: on every backend that traffic costs more than the arithmetic.
    """
    return _attend_forward(q, keys, masks, block)[0]


def _attend_forward(q, keys, masks, block):
    def step(_, queries, masks):
        (q,) = queries
        scores = [_scores(q, k, mask) for (k, _), mask in zip(keys, masks, strict=True)]
        top = functools.reduce(jnp.maximum, [x.max(-1) for x in scores])
        weights = [jnp.exp(x - top[..., None]) for x in scores]
        total = functools.reduce(operator.add, [w.sum(-1) for w in weights])
        sums = [
            _contract("pnkgts,*->pnkgth", w.astype(q.dtype), v, v.ndim == 4)
            for w, (_, v) in zip(weights, keys, strict=True)
        ]
        out = (functools.reduce(operator.add, sums) / total[..., None]).astype(q.dtype)
        return None, (out, top + jnp.log(total))

    _, (out, log_sum) = _over_queries(step, block, None, (q,), masks)
    return out, (q, keys, masks, out, log_sum)


def _attend_backward(block, kept, slope):
    q, keys, masks, out, log_sum = kept

    def step(sums, queries, masks):
        q, out, log_sum, slope = queries
        inner = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
        q_slope, key_slopes = 0.0, []
        for (k, v), mask in zip(keys, masks, strict=True):
            shared = k.ndim == 4
            weight = jnp.exp(_scores(q, k, mask) - log_sum[..., None])
            change = (weight * (_contract("pnkgth,*->pnkgts", slope, v, shared) - inner)).astype(q.dtype)
            q_slope += _contract("pnkgts,*->pnkgth", change, k, shared)
            to_key = "pnkgth,pnkgts->*"
            key_slopes.append((
                _contract(to_key, q, change, shared), _contract(to_key, slope, weight.astype(q.dtype), shared)
            ))  # fmt: skip
        return jax.tree.map(jnp.add, sums, tuple(key_slopes)), q_slope.astype(q.dtype)

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), keys)
    sums, q_slope = _over_queries(step, block, none, (q, out, log_sum, slope), masks)
    return q_slope, jax.tree.map(lambda x, key: x.astype(key.dtype), sums, keys), tuple(None for _ in masks)


_attend.defvjp(_attend_forward, _attend_backward)


MASKED = -1e30  # a finite minus infinity: a fully masked row stays finite


def fused_attend(q: Array, parts: Sequence[tuple[Array, Array, Array]], kind: str, *, interpret: bool = False) -> Array:
    """`attend` by a fused kernel on one device's rows: splash on TPU, cudnn on NVIDIA, the same masks.

    The last part holds the rows' own keys, in which a query sees itself and what came before; the parts before it are
    seen whole, as far as they are valid. Shared parts are laid beside each row's own: where these kernels pay, a device
    has few rows. What a padded query gets is undefined. interpret: without the hardware's kernel, for tests.
    """
    p, n, t, heads, size = q.shape
    groups = parts[0][0].shape[-3]

    def of_row(x):
        return jnp.broadcast_to(x[:, None] if x.ndim == 4 else x, (p, n, *x.shape[-3:])).astype(q.dtype)

    up = lambda length, to: -(-length // to) * to  # noqa: E731
    fill = lambda x, axis, to: jnp.pad(x, [(0, to - d if i == axis else 0) for i, d in enumerate(x.shape)])  # noqa: E731
    k, v = (jnp.concatenate([of_row(part[i]) for part in parts], 3) for i in (0, 1))  # [P,N,K,S,h]
    # Validity of each key: of a context it is the same for all queries, of the own part it is the diagonal.
    valid = [jnp.broadcast_to(mask[:, :, 0], (p, n, mask.shape[-1])) for _, _, mask in parts[:-1]]
    own = jnp.broadcast_to(parts[-1][2], (p, n, t, t))
    valid = jnp.concatenate([*valid, jnp.diagonal(own, axis1=-2, axis2=-1)], -1)
    before = k.shape[3] - t
    if kind == "cudnn":
        queries, total = up(t, 2), up(before + t, 2)  # its backward pass knows even lengths only
        causal = jnp.arange(total) <= before + jnp.arange(queries)[:, None]
        mask = (fill(valid, 2, total)[:, :, None] & causal).reshape(p * n, 1, queries, total)
        flat = lambda x: x.reshape(p * n, *x.shape[2:])  # noqa: E731
        k, v = (flat(fill(x, 3, total)).swapaxes(1, 2) for x in (k, v))  # tokens before heads
        by = "xla" if interpret else "cudnn"
        out = jax.nn.dot_product_attention(flat(fill(q, 2, queries)), k, v, mask=mask, implementation=by)
        return out[:, :t].reshape(q.shape)
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    queries, total = up(t, 512 if t > 512 else 128), up(k.shape[3], 512)  # blocks of 128 are several times slower
    block = lambda length: next(b for b in (512, 256, 128) if length % b == 0)  # noqa: E731
    bq, bk = block(queries), block(total)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.CausalMask((queries, total), offset=before)] * (heads // groups)
        ),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        interpret=interpret,
    )
    grouped = fill(q * size**-0.5, 2, queries).reshape(p, n, queries, groups, heads // groups, size)
    segments = splash_attention_kernel.SegmentIds(
        jnp.ones((p, n, queries), jnp.int32), fill(valid.astype(jnp.int32), 2, total)
    )
    over_groups = jax.vmap(kernel, (0, 0, 0, None))  # q [K,g,t,h], k and v [K,S,h], segments of the row
    out = jax.vmap(jax.vmap(over_groups))(
        jnp.moveaxis(grouped, 2, -2), fill(k, 3, total), fill(v, 3, total), segments
    )
    return jnp.moveaxis(out, -2, 2)[:, :, :t].reshape(q.shape)


def attend_by(kind: str, mesh: Mesh | None, q: Array, parts: Sequence[tuple[Array, Array, Array]]) -> Array:
    """`policy.attention`: XLA everywhere; a fused kernel where it pays, on many queries that are not split over
    devices. Kernels see the rows and heads of their own device."""
    p, n, t = row_axes(mesh, *q.shape[:3])
    groups = parts[0][0].shape[-3]
    whole = mesh is None or mesh.size == 1
    # cuDNN wants tokens before heads: XLA would turn the rollouts' caches around, of all layers before the first one.
    cached = kind == "cudnn" and len(parts) > 2
    if kind == "xla" or cached or q.shape[2] < 128 or t is not None or not (whole or divides(mesh, "tensor", groups)):
        heads = "tensor" if mesh is not None and divides(mesh, "tensor", q.shape[3]) else None
        return attend(q, parts, shares(mesh, p, n, t, heads))
    if whole:
        return fused_attend(q, parts, kind)
    spec = lambda x, *axes: Spec(*(a if x.shape[i] > 1 else None for i, a in enumerate(axes)))  # noqa: E731
    keys = [
        (Spec(p, "tensor"),) * 2 if k.ndim == 4 else (Spec(p, n, "tensor"),) * 2 for k, _, _ in parts
    ]
    specs = [(*pair, spec(mask, p, n)) for pair, (_, _, mask) in zip(keys, parts, strict=True)]
    rows = Spec(p, n, None, "tensor")
    local = jax.shard_map(
        lambda q, parts: fused_attend(q, parts, kind), mesh=mesh, in_specs=(rows, specs), out_specs=rows,
        check_vma=False,
    )  # fmt: skip
    return local(q, list(parts))


@jax.custom_vjp
def widen(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, I], with I above D. The kernel's slope is x times the result's slope, in this order: CPUs
    lay the first factor out anew for it, and x is the narrow one."""
    return x @ kernel


def _widen_backward(kept, slope):
    x, kernel = kept
    return slope @ kernel.T, jnp.einsum("...d,...i->di", x, slope)


widen.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _widen_backward)


class Layer(nn.Module):
    """One decoder layer. The context's keys and values are arguments, the new ones are a result."""

    config: PolicyConfig
    mesh: Mesh | None = None
    attention: str = "xla"

    @nn.compact
    def __call__(self, carry, context, rope, mask, context_masks, visual):
        c = self.config
        x, index = carry
        heads, groups, size = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        width, inner = c.hidden_size, c.intermediate_size
        p, n, t = row_axes(self.mesh, *x.shape[:3])
        hold = lambda x, *axes: laid(x, self.mesh, *axes)  # noqa: E731

        y = rms_norm(x, _weight(self, "attention_norm", [width], ["norm"], 1.0), c.rms_norm_eps)
        q = jnp.einsum(
            "pntd,dhe->pnthe", y, _weight(self, "q", [width, heads, size], ["embed", "heads", None]).astype(x.dtype)
        )
        k = jnp.einsum(
            "pntd,dke->pntke", y, _weight(self, "k", [width, groups, size], ["embed", "kv_heads", None]).astype(x.dtype)
        )
        v = jnp.einsum(
            "pntd,dke->pntke", y, _weight(self, "v", [width, groups, size], ["embed", "kv_heads", None]).astype(x.dtype)
        )
        q = rotate(rms_norm(q, _weight(self, "q_norm", [size], ["norm"], 1.0), c.rms_norm_eps), *rope)
        k = rotate(rms_norm(k, _weight(self, "k_norm", [size], ["norm"], 1.0), c.rms_norm_eps), *rope)
        # A sequence that is split over devices asks from where it lies; what it asks is whole on each of them.
        q = hold(q, p, n, t, "tensor")
        cut = "tensor" if divides(self.mesh, "tensor", groups) else None
        k, v = (hold(x.swapaxes(2, 3), p, n, cut) for x in (k, v))  # [P,N,K,t,h]
        parts = [(keys.k, keys.v, m) for keys, m in zip(context, context_masks, strict=True)] + [(k, v, mask)]
        out = hold(attend_by(self.attention, self.mesh, q, parts), p, n, t, "tensor")
        # Letters of a sum are taken in the alphabet's order: heads come before features there as they lie in memory.
        x = x + jnp.einsum(
            "pntef,efz->pntz", out, _weight(self, "o", [heads, size, width], ["heads", None, "embed"]).astype(x.dtype)
        )
        x = hold(x, p, n, t)

        y = rms_norm(x, _weight(self, "mlp_norm", [width], ["norm"], 1.0), c.rms_norm_eps)
        gate = widen(y, _weight(self, "gate", [width, inner], ["embed", "mlp"]).astype(x.dtype))
        up = widen(y, _weight(self, "up", [width, inner], ["embed", "mlp"]).astype(x.dtype))
        inside = hold(jax.nn.silu(gate) * up, p, n, t, "tensor")
        x = hold(x + inside @ _weight(self, "down", [inner, width], ["mlp", "embed"]).astype(x.dtype), p, n, t)

        if visual is not None:
            deepstack, slots = visual  # [taps, P, B, D], [P, N, t]
            taps = deepstack.shape[0]
            added = look_up(deepstack[jnp.minimum(index, taps - 1)], slots)
            x = hold(x + jnp.where(index < taps, added, 0).astype(x.dtype), p, n, t)
        return (x, index + 1), Keys(k, v)


def project(hidden: Array, kernel: Array) -> Array:
    """hidden [..., D], kernel [D, V] -> logits [..., V] in fp32."""
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def look_up(bank: Array, slots: Array) -> Array:
    """bank [P,B,D], slots [P,N,t] (-1: no visual token) -> [P,N,t,D], zero where there is none."""
    rows = jax.vmap(lambda b, s: b[jnp.maximum(s, 0)])(bank, slots)
    return jnp.where((slots >= 0)[..., None], rows, 0)


class Merger(nn.Module):
    """2x2 patches -> one LM token. The final merger normalises before the patches join, DeepStack's after."""

    config: VisionConfig
    norm_after: bool
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        joined = c.hidden_size * c.spatial_merge_size**2
        size = joined if self.norm_after else c.hidden_size
        scale, bias = _weight(self, "norm", [size], ["norm"], 1.0), _weight(self, "norm_bias", [size], ["norm"], 0.0)
        images, patches, _ = x.shape
        if not self.norm_after:
            x = layer_norm(x, scale, bias)
        x = x.reshape(images, patches // c.spatial_merge_size**2, joined)
        if self.norm_after:
            x = layer_norm(x, scale, bias)
        x = x @ _weight(self, "fc1", [joined, joined], ["vision_joined", "mlp"]).astype(x.dtype)
        x = jax.nn.gelu(x + _weight(self, "fc1_bias", [joined], ["mlp"], 0.0).astype(x.dtype), approximate=False)
        x = x @ _weight(self, "fc2", [joined, c.out_hidden_size], ["mlp", "embed"]).astype(x.dtype)
        return x + _weight(self, "fc2_bias", [c.out_hidden_size], ["norm"], 0.0).astype(x.dtype)


class VisionBlock(nn.Module):
    config: VisionConfig
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Array, rope: tuple[Array, Array], valid: Array) -> tuple[Array, None]:
        c = self.config
        width, heads, size = c.hidden_size, c.num_heads, c.hidden_size // c.num_heads
        y = layer_norm(
            x, _weight(self, "norm1", [width], ["norm"], 1.0), _weight(self, "norm1_bias", [width], ["norm"], 0.0)
        )
        qkv = jnp.einsum(
            "imd,dche->imche",
            y,
            _weight(self, "qkv", [width, 3, heads, size], ["vision", None, "heads", None]).astype(x.dtype),
        )
        qkv = qkv + _weight(self, "qkv_bias", [3, heads, size], [None, "heads", None], 0.0).astype(x.dtype)
        q, k, v = (qkv[:, None, :, j] for j in range(3))  # one "rollout" per image
        k, v = (x.swapaxes(2, 3) for x in (rotate(k, *rope), v))  # [I,1,H,M,e]
        cut = shares(self.mesh, image_axis(self.mesh, len(x)), "tensor")
        out = attend(rotate(q, *rope), [(k, v, valid[:, None, None, :])], cut)[:, 0]
        x = x + jnp.einsum(
            "imef,efz->imz",
            out,
            _weight(self, "o", [heads, size, width], ["heads", None, "vision"], (heads * size) ** -0.5).astype(x.dtype),
        )
        x = x + _weight(self, "o_bias", [width], ["norm"], 0.0).astype(x.dtype)
        y = layer_norm(
            x, _weight(self, "norm2", [width], ["norm"], 1.0), _weight(self, "norm2_bias", [width], ["norm"], 0.0)
        )
        y = y @ _weight(self, "fc1", [width, c.intermediate_size], ["vision", "mlp"]).astype(x.dtype)
        y = jax.nn.gelu(
            y + _weight(self, "fc1_bias", [c.intermediate_size], ["mlp"], 0.0).astype(x.dtype), approximate=True
        )
        y = y @ _weight(self, "fc2", [c.intermediate_size, width], ["mlp", "vision"]).astype(x.dtype)
        return x + y + _weight(self, "fc2_bias", [width], ["norm"], 0.0).astype(x.dtype), None


def sine_grid(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """How a position grid [side * side, D] starts: half of the features are waves of the row, half of the column.

    Only for random weights. Small random numbers instead leave rows unlearned for tens of thousands of scenes: columns
    are also words ("left") and order the lists, rows occur nowhere but in y.
    """
    side, quarter = math.isqrt(shape[0]), shape[1] // 4
    wave = np.pi * np.linspace(0, 1, side)[:, None] * 2.0 ** np.linspace(-1, math.log2(side), quarter)
    axis = np.concatenate([np.sin(wave), np.cos(wave)], -1)  # [side, D/2]
    rows, columns = np.repeat(axis, side, 0), np.tile(axis, (side, 1))
    return jnp.asarray(np.pad(np.concatenate([rows, columns], -1), ((0, 0), (0, shape[1] - 4 * quarter))), dtype)


class Vision(nn.Module):
    """Images -> merged tokens [I, M/merge^2, D] and DeepStack features [taps, I, M/merge^2, D]."""

    config: VisionConfig
    remat: bool = False
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, images: Images) -> tuple[Array, Array]:
        c = self.config
        kernel = _weight(self, "patch", [c.patch_dim, c.hidden_size], [None, "vision"])
        x = images.patches.astype(kernel.dtype) @ kernel
        x = x + _weight(self, "patch_bias", [c.hidden_size], ["norm"], 0.0).astype(x.dtype)
        grid = _weight(
            self, "position", [c.num_position_embeddings, c.hidden_size], [None, "vision"], sine_grid
        ).astype(x.dtype)
        x = x + jnp.einsum("imcd,imc->imd", grid[images.corners], images.corner_weights.astype(x.dtype))
        quarter = c.hidden_size // c.num_heads // 4
        frequency = 10000.0 ** (-np.arange(quarter, dtype=np.float32) / quarter)
        angle = (images.place[..., None].astype(jnp.float32) * frequency).reshape(*images.place.shape[:2], 2 * quarter)
        rope = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        # The blocks between two taps are one scan: one compiled block, and only tapped features are kept.
        block = nn.remat(VisionBlock, prevent_cse=False) if self.remat else VisionBlock
        taps, done = [], 0
        for number, end in enumerate((*(tap + 1 for tap in c.deepstack_visual_indexes), c.depth)):
            if end > done:
                x, _ = nn.scan(
                    block,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=(nn.broadcast, nn.broadcast),
                    metadata_params={nn.PARTITION_NAME: "layers"},
                    length=end - done,
                )(c, self.mesh, name=f"blocks_{number}")(x, rope, images.valid)
            done = end
            if number < len(c.deepstack_visual_indexes):
                taps.append(Merger(c, True, self.mesh, name=f"deepstack_{number}")(x))
        merged = Merger(c, False, self.mesh, name="merger")(x)
        return merged, jnp.stack(taps) if taps else jnp.zeros((0, *merged.shape), merged.dtype)


class Policy(nn.Module):
    """Qwen3-VL as pure functions of its parameters: `encode`, `run` (hidden states), `head`, `next_words` (logits)."""

    config: PolicyConfig
    remat: bool = False
    mesh: Mesh | None = None
    attention: str = "xla"
    unroll: int = 1  # layers in one step of the loop over them

    def setup(self):
        c = self.config
        self.embedding = _weight(self, "embedding", [c.vocab_size, c.hidden_size], ["vocab", "embed"], 0.02)
        self.vision = Vision(c.vision, self.remat, self.mesh)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
            length=c.num_hidden_layers,
            unroll=self.unroll,
        )(c, self.mesh, self.attention)
        self.norm = _weight(self, "norm", [c.hidden_size], ["norm"], 1.0)
        if not c.tie_word_embeddings:
            self.output = _weight(self, "output", [c.hidden_size, c.vocab_size], ["embed", "vocab"])

    def encode(self, images: Images) -> tuple[Array, Array]:
        """Merged tokens [I, M/merge^2, D] and DeepStack features [taps, I, M/merge^2, D]; every device takes images."""
        count = len(images.patches)
        blank = -count % (1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"])

        def spread(x):
            return laid(jnp.pad(x, [(0, blank)] + [(0, 0)] * (x.ndim - 1)), self.mesh, ("data", "fsdp"))

        tokens, deepstack = self.vision(jax.tree.map(spread, images))
        return tokens[:count], deepstack[:, :count]

    def run(self, tokens, positions, mask, *, context=(), context_masks=(), visual: Visual | None = None, slots=None):
        """Hidden states after the final norm, and the new keys and values.

        tokens [P,N,t] int32; positions [P,N,t,3]; mask [P,N,t,t] (own part: causal, same segment, valid);
        context: tuple of Keys, shared or own, each with its mask in context_masks (broadcast to [P,N,t,S]);
        visual: the image bank of each prompt, slots [P,N,t]: which bank token stands here, -1 for text.
        Returns hidden [P,N,t,D] and Keys [L,P,N,K,t,h].
        """
        x = self.embedding[tokens].astype(self.dtype_of())
        injected = None
        if visual is not None:
            x = jnp.where((slots >= 0)[..., None], look_up(visual.tokens, slots).astype(x.dtype), x)
            if visual.deepstack.shape[0]:
                injected = (visual.deepstack, slots)
        x = laid(x, self.mesh, *row_axes(self.mesh, *tokens.shape))
        rope = mrope_angles(self.config, positions)
        (x, _), keys = self.layers((x, 0), tuple(context), rope, mask, tuple(context_masks), injected)
        return rms_norm(x, self.norm, self.config.rms_norm_eps), keys

    def dtype_of(self):
        return self.norm.dtype

    def head(self, hidden: Array) -> Array:
        """hidden [..., D] -> logits [..., V] in fp32."""
        return project(hidden, self.kernel())

    def next_words(self, hidden: Array) -> Array:
        """hidden [P,N,D] of one token a row -> logits [V,P,N] in fp32: words first, so that the kernel, which is larger
        than all else here, is multiplied as it lies."""
        return jnp.einsum("dv,pnd->vpn", self.kernel().astype(hidden.dtype), hidden, preferred_element_type=jnp.float32)

    def kernel(self) -> Array:
        """The output matrix [D, V]: read once by those who use it often."""
        return self.embedding.T if self.config.tie_word_embeddings else self.output

    def __call__(self, images: Images):
        """Touches every parameter once; used by init and to read shapes and logical axes."""
        tokens, deepstack = self.encode(images)
        one = jnp.zeros((1, 1, 1), jnp.int32)
        visual = Visual(
            tokens.reshape(1, -1, tokens.shape[-1]), deepstack.reshape(deepstack.shape[0], 1, -1, tokens.shape[-1])
        )
        hidden, _ = self.run(
            one, jnp.zeros((1, 1, 1, 3), jnp.int32), jnp.ones((1, 1, 1, 1), bool), visual=visual, slots=one
        )
        return self.head(hidden)


def vision_place(config: VisionConfig, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each patch of a height x width patch grid lies, in merge-major order.

    Returns corners [M,4] int32 and weights [M,4] fp32 into the learned square position grid (bilinear, corners
    aligned), and place [M,2] int32 (row, column) for the rotary embedding.
    """
    merge, side = config.spatial_merge_size, math.isqrt(config.num_position_embeddings)
    row, column = np.divmod(np.arange(height * width), width)
    order = (
        np.arange(height * width)
        .reshape(height // merge, merge, width // merge, merge)
        .transpose(0, 2, 1, 3)
        .reshape(-1)
    )
    row, column = row[order], column[order]

    def axis(index: np.ndarray, n: int):
        exact = np.linspace(0, side - 1, n, dtype=np.float32)[index]
        low = exact.astype(np.int32)
        return low, np.minimum(low + 1, side - 1), exact - low

    r0, r1, dr = axis(row, height)
    c0, c1, dc = axis(column, width)
    corners = np.stack([r0 * side + c0, r0 * side + c1, r1 * side + c0, r1 * side + c1], -1).astype(np.int32)
    weights = np.stack([(1 - dr) * (1 - dc), (1 - dr) * dc, dr * (1 - dc), dr * dc], -1).astype(np.float32)
    return corners, weights, np.stack([row, column], -1).astype(np.int32)


def image_positions(grid: tuple[int, int], start: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, h*w] of one image of h x w merged tokens that begins at `start`, and what follows it."""
    height, width = grid
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(rows), rows, columns]).astype(np.int32) + start, start + max(height, width)


def mrope_positions(policy_config: PolicyConfig, input_ids, image_grid_thw=None, attention_mask=None) -> np.ndarray:
    """Positions [3,B,T] int32 of whole sequences: text counts on all three axes, an image spans rows and columns.

    input_ids [B,T]; image_grid_thw [images,3] in patches, in the order the images stand in the batch;
    attention_mask [B,T] with 0 on padding (its positions are 0). Raises ConfigError when the image tokens and the
    grids do not match.
    """
    ids = np.asarray(input_ids)
    valid = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    merge = policy_config.vision.spatial_merge_size
    grids = iter([] if image_grid_thw is None else np.asarray(image_grid_thw).tolist())
    out = np.zeros((3, *ids.shape), np.int32)
    for row in range(ids.shape[0]):
        where = np.flatnonzero(valid[row])
        tokens = ids[row, where]
        position, at = 0, 0
        while at < len(tokens):
            if tokens[at] == policy_config.image_token_id:
                try:
                    t, h, w = next(grids)
                except StopIteration:
                    raise ConfigError(f"row {row}: more image tokens than image_grid_thw describes") from None
                span = t * (h // merge) * (w // merge)
                if (tokens[at : at + span] != policy_config.image_token_id).any() or at + span > len(tokens):
                    raise ConfigError(f"row {row}: image at token {at} needs {span} image tokens for grid {[t, h, w]}")
                # A still image has t = 1; more would be frames that share rows and columns.
                places, following = image_positions((h // merge, w // merge), position)
                out[:, row, where[at : at + span]] = np.tile(places, t)
                position = following
            else:
                span = 1
                out[:, row, where[at]] = position
                position += 1
            at += span
    if next(grids, None) is not None:
        raise ConfigError("image_grid_thw: describes more images than there are image tokens for")
    return out


def policy_logits(policy_config, params, input_ids, *, pixel_values=None, image_grid_thw=None, attention_mask=None):
    """Whole-sequence forward with Hugging Face's input conventions.

    input_ids [B,T]; pixel_values [patches, patch_dim]; image_grid_thw [images,3]; attention_mask [B,T], right padding.
    Returns logits [B,T,V] fp32, computed in the parameters' dtype at highest matmul precision. Raises ConfigError
    when image tokens and grids do not match.
    """
    ids = np.asarray(input_ids, np.int32)
    positions = mrope_positions(policy_config, ids, image_grid_thw, attention_mask)
    valid = np.ones_like(ids, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    mask = np.tril(np.ones((ids.shape[1],) * 2, bool)) & valid[:, None, None, :]
    images, own, slots = None, None, None
    if pixel_values is not None:
        grids, merge = np.asarray(image_grid_thw), policy_config.vision.spatial_merge_size**2
        images = pack_images(policy_config.vision, split_patches(np.asarray(pixel_values), grids), grids[:, 1:])
        images = images.replace(patches=images.patches.astype(params["norm"].dtype))
        width = images.patches.shape[1] // merge
        own = np.concatenate([i * width + np.arange(n) for i, n in enumerate(np.prod(grids, -1) // merge)])
        is_image = (ids == policy_config.image_token_id) & valid
        slots = np.where(is_image, np.cumsum(is_image.reshape(-1)).reshape(ids.shape) - 1, -1)[:, None].astype(np.int32)
    with jax.default_matmul_precision("highest"):
        return _whole_forward(
            Policy(policy_config), params, ids, np.moveaxis(positions, 0, -1)[:, None], mask, images, own, slots
        )


@functools.partial(jax.jit, static_argnums=0)
def _whole_forward(policy: Policy, params, ids, positions, mask, images: Images | None, own, slots) -> jax.Array:
    """Logits [B,T,V]. The images make one bank that every row sees; `own` is where their tokens lie among padding."""
    variables, visual = {"params": params}, None
    if images is not None:
        tokens, deepstack = policy.apply(variables, images, method=Policy.encode)
        bank = tokens.reshape(-1, tokens.shape[-1])[own]
        deep = deepstack.reshape(deepstack.shape[0], -1, tokens.shape[-1])[:, own]
        visual = Visual(jnp.broadcast_to(bank, (len(ids), *bank.shape)), jnp.repeat(deep[:, None], len(ids), 1))
    hidden, _ = policy.apply(variables, ids[:, None], positions, mask, visual=visual, slots=slots, method=Policy.run)
    return policy.apply(variables, hidden[:, 0], method=Policy.head)


def split_patches(pixel_values: np.ndarray, grids: np.ndarray) -> list[np.ndarray]:
    counts = np.prod(grids, axis=-1)
    if counts.sum() != len(pixel_values):
        raise ConfigError(f"pixel_values has {len(pixel_values)} patches, image_grid_thw describes {counts.sum()}")
    return np.split(pixel_values, np.cumsum(counts)[:-1])


def pack_images(config: VisionConfig, patches: Sequence[np.ndarray], grids: Iterable[Any]) -> Images:
    """Images of any grids as one padded batch. patches: [h*w, patch_dim] for each image; grids: (h, w) in patches."""
    most = max(len(p) for p in patches)
    out = Images(
        patches=np.zeros((len(patches), most, config.patch_dim), np.float32),
        corners=np.zeros((len(patches), most, 4), np.int32),
        corner_weights=np.zeros((len(patches), most, 4), np.float32),
        place=np.zeros((len(patches), most, 2), np.int32),
        valid=np.zeros((len(patches), most), bool),
    )
    for i, (pixels, (height, width)) in enumerate(zip(patches, grids, strict=True)):
        n = len(pixels)
        corners, weights, place = vision_place(config, int(height), int(width))
        out.patches[i, :n], out.corners[i, :n], out.corner_weights[i, :n] = pixels, corners, weights
        out.place[i, :n], out.valid[i, :n] = place, True
    return out


# ======================================================================================================
# 3  Mesh and sharding
# ======================================================================================================

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. `embed` is what FSDP cuts; heads and MLP width are what tensor
# parallelism cuts; everything named here exists on purpose, a name that is missing is an error.
RULES = {
    "embed": "fsdp",
    "vision": "fsdp",
    "vision_joined": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
    None: None,
}


PRESETS = {"dp": (-1, 1, 1), "fsdp": (1, -1, 1), "fsdp_tp": (1, -1, 2)}  # data, fsdp, tensor; -1: what is left


def mesh_shape(section: MeshSection, count: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor. Raises ConfigError when they do not cover `count` devices."""
    given = (section.data, section.fsdp, section.tensor)
    shape = tuple(own or common for own, common in zip(given, PRESETS[section.preset], strict=True))
    fixed = math.prod(size for size in shape if size > 0)
    shape = tuple(count // fixed if size == -1 else size for size in shape)
    if math.prod(shape) != count:
        named = " ".join(f"{axis}={size}" for axis, size in zip(AXES, given, strict=True) if size is not None)
        raise ConfigError(
            f"mesh.preset={section.preset} {named}: does not cover {count} devices; the product of data, fsdp and "
            "tensor must, with -1 for what is left"
        )
    return shape


def make_mesh(section: MeshSection, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) of all devices. Raises ConfigError when it does not match their number."""
    shape = mesh_shape(section, len(devices or jax.devices()))
    # Auto on purpose: since JAX 0.9 the default makes every gather name its output sharding.
    # An axis of 8 may lie on half of a torus of 4x4x4: physical axes may be split.
    laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * 3)


def join_processes() -> None:
    """Makes this process one of several, before any device is touched. TPU pods, Slurm and Kubernetes know of each
    other; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Raises ConfigError."""
    own: dict[str, Any] = {}
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
            own = {key: int(os.environ[name]) for key, name in names.items()}
        except (KeyError, ValueError):
            raise ConfigError(
                "mesh.distributed=true: JAX_COORDINATOR_ADDRESS wants whole numbers in JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID beside it"
            ) from None
    try:
        jax.distributed.initialize(**own)
    except Exception as error:
        raise ConfigError(
            f"mesh.distributed=true: the processes did not find each other ({data.first_line(error)}); on a machine of "
            "your own set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX took it, to tell whoever asks; ours come with the run


def exchange(mine: Mapping[Any, Any], mesh: Mesh | None = None) -> dict[Any, Any]:
    """What the processes know together: each gives plain values by key, all get all. All call it at the same point.

    mesh: what the values are about; where all of it lies in this process, no other one knows anything of it.
    """
    alone = mesh is not None and len({device.process_index for device in mesh.devices.flat}) == 1
    if jax.process_count() == 1 or alone:
        return dict(mine)
    packed = np.frombuffer(json.dumps(list(mine.items())).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(packed)]))[:, 0]
    padded = np.zeros(1 << (int(lengths.max()) - 1).bit_length(), np.uint8)  # few sizes: each is a program
    padded[: len(packed)] = packed
    out: dict[Any, Any] = {}
    for length, part in zip(lengths, multihost_utils.process_allgather(padded), strict=True):
        out |= dict(json.loads(part[: int(length)].tobytes()))
    return out


def to_host(x: jax.Array) -> np.ndarray:
    """All of an array, in every process."""
    return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def agreed(mine: bool) -> bool:
    """Whether any process says so."""
    return any(exchange({jax.process_index(): bool(mine)}).values())


def all_see(look: Callable[[], bool]) -> bool:
    """Whether all processes find what they look for. A network file system may take a moment."""
    end, seen = time.monotonic() + 10, look()
    while not seen and time.monotonic() < end:
        time.sleep(0.2)
        seen = look()
    return not agreed(not seen)


def row_owners(mesh: Mesh, prompts: int, rollouts: int) -> np.ndarray:
    """Index of the process that speaks for each row [P,N]: to users, experts and segmenters. A prompt has one, wherever
    its rollouts lie: what a group asks twice is asked once and has one answer."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    owner = np.take(processes, np.arange(prompts) % len(processes))
    return np.broadcast_to(owner[:, None], (prompts, rollouts))


def fills(mesh: Mesh, prompts: int, rollouts: int) -> bool:
    """Whether rows [P,N] keep every device busy with rows of its own."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    return prompts % data == 0 and (rollouts % fsdp == 0 or prompts % (data * fsdp) == 0)


def check_attention(c: Config, mesh: Mesh) -> None:
    """Raises ConfigError for a kernel that these devices do not have."""
    needed, there = {"splash": "tpu", "cudnn": "gpu"}.get(c.policy.attention), mesh.devices.flat[0].platform
    if needed not in (None, there):
        raise ConfigError(f"policy.attention={c.policy.attention}: is for a {needed}, and the devices are {there}; "
                          "use policy.attention=xla")


def check_mesh(c: Config, mesh: Mesh) -> None:
    """No device shall do the work of another again. Raises ConfigError naming the key and a value that works."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]

    def need(prompts: int, rollouts: int, key: str, of: str) -> None:
        if prompts % data:
            raise ConfigError(f"{key}={prompts}: {of} are spread over mesh.data={data}; use a multiple of it")
        if not fills(mesh, prompts, rollouts):
            raise ConfigError(
                f"{key}={prompts}: {of}, with {rollouts} rows each, are spread over mesh.data={data} times "
                f"mesh.fsdp={fsdp}; use a multiple of {data * fsdp}, or a mesh.fsdp that divides {rollouts}"
            )

    check_attention(c, mesh)
    if c.stage == "sft":
        rows = 1 if c.warmstart.mix else c.warmstart.rows + c.warmstart.practice
        need(c.warmstart.scenes, rows, "warmstart.scenes", "scenes")
    if c.stage == "rl":
        size = c.rollout.prompts // c.update.minibatches
        need(c.rollout.prompts, c.rollout.rollouts, "rollout.prompts", "prompts")
        need(size, c.rollout.rollouts, "rollout.prompts / update.minibatches", "the prompts of an update")
        if c.update.micro_prompts:
            need(c.update.micro_prompts, c.rollout.rollouts, "update.micro_prompts", "the prompts of a micro-batch")
        for rows in c.update.row_buckets:
            if not fills(mesh, c.update.micro_prompts or size, rows):
                works = ", ".join(str(k) for k in range(fsdp, c.rollout.rollouts, fsdp)) or "none of this size"
                raise ConfigError(
                    f"update.row_buckets={c.update.row_buckets}: rows are spread over mesh.fsdp={fsdp}, which does not "
                    f"divide {rows}; what works: {works}"
                )
        if c.evaluate.every:
            need(c.evaluate.prompts, 1 + c.evaluate.draws, "evaluate.prompts", "dialogues")


def each_axis(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension."""
    return (axis,) if isinstance(axis, str) else axis or ()


def placement(mesh: Mesh, axes: Sequence[str | tuple[str, ...] | None]) -> NamedSharding:
    """One spelling for one layout: without axes of a single device, since a program is compiled for each spelling."""

    def spelled(axis):
        kept = [a for a in each_axis(axis) if mesh.shape[a] > 1]
        return kept[0] if len(kept) == 1 else tuple(kept) or None

    kept = [spelled(axis) for axis in axes]
    while kept and kept[-1] is None:
        kept.pop()
    return NamedSharding(mesh, Spec(*kept))


def divides(mesh: Mesh | None, axis: str, size: int) -> bool:
    return mesh is None or size % mesh.shape[axis] == 0


def shares(mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> int:
    """Devices among which an array with these mesh axes is divided."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for axis in axes for a in each_axis(axis))


def mesh_axes(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int], *kinds: str) -> list[str | None]:
    """Mesh axes of a parameter by the rules table, those of `kinds` only; what does not divide is replicated."""
    out: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES[name]
        out.append(axis if axis in kinds and axis not in out and divides(mesh, axis, size) else None)
    return out


def row_axes(mesh: Mesh | None, prompts: int, rollouts: int, tokens: int = 1) -> tuple:
    """Mesh axes of rows [P, N, t]: P over data, N over fsdp. Where N does not divide, P takes both, else t takes fsdp:
    the prompt pass has a row per prompt only, and no device should do another's work again."""
    if mesh is None:
        return (None, None, None)
    fsdp = mesh.shape["fsdp"]
    p = "data" if divides(mesh, "data", prompts) else None
    if rollouts % fsdp == 0:
        return (p, "fsdp", None)
    if prompts % (mesh.shape["data"] * fsdp) == 0:
        return (("data", "fsdp"), None, None)
    return (p, None, "fsdp" if tokens % fsdp == 0 else None)


def image_axis(mesh: Mesh | None, count: int) -> str | tuple[str, ...] | None:
    """Mesh axes of images [I, ...]: all that rows are spread over, where they divide."""
    if mesh is None or count % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0:
        return ("data", "fsdp")
    return "data" if divides(mesh, "data", count) else None


def laid(x: Array, mesh: Mesh | None, *axes: str | tuple[str, ...] | None) -> Array:
    """x, held to a layout: the mesh axes of its first dimensions; the others are whole on every device."""
    return x if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(x, placement(mesh, axes))


def parameter_specs(policy: Policy, mesh: Mesh, *kinds: str) -> Any:
    """NamedSharding of every parameter by the rules table, cut over the mesh axes `kinds`: fsdp and tensor by default.

    Another axis that does not divide is replicated. Raises ConfigError for heads or an MLP width that mesh.tensor does
    not divide, and for a parameter that no rule knows.
    """
    kinds = kinds or ("fsdp", "tensor")
    plain = Policy(policy.config)
    boxed = jax.eval_shape(lambda: plain.init(jax.random.key(0), example_images(policy.config.vision)))["params"]
    boxes = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    cut = [(a, s) for box in boxes for a, s in zip(box.names, box.value.shape, strict=True) if a in ("heads", "mlp")]
    common = math.gcd(*(size for _, size in cut))
    if common % mesh.shape["tensor"]:
        sizes = ", ".join(f"{axis}={size}" for axis, size in sorted(set(cut)))
        works = ", ".join(str(k) for k in range(1, common + 1) if common % k == 0)
        raise ConfigError(f"mesh.tensor={mesh.shape['tensor']}: does not divide all of {sizes}; use one of {works}")

    def spec(path, box) -> NamedSharding:
        name = "/".join(str(k.key) for k in path)
        if unknown := [axis for axis in box.names if axis not in RULES]:
            raise ConfigError(f"parameter {name}: logical axis {unknown[0]!r} is in no sharding rule")
        return placement(mesh, mesh_axes(mesh, box.names, box.value.shape, *kinds))

    return jax.tree_util.tree_map_with_path(spec, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def example_images(vision: VisionConfig) -> Images:
    side = vision.spatial_merge_size
    return pack_images(vision, [np.zeros((side * side, vision.patch_dim), np.float32)], [(side, side)])


def parameter_shapes(config: PolicyConfig) -> Any:
    """The parameter tree as ShapeDtypeStructs, without the logical boxes."""
    return nn.unbox(jax.eval_shape(lambda: Policy(config).init(jax.random.key(0), example_images(config.vision))))[
        "params"
    ]


def batch_placements(mesh: Mesh, tree: Any) -> list[NamedSharding]:
    """Where each array of a batch lies, in the order of its leaves: rows [P, ...] and [P, N, ...] as `row_axes` says,
    images as `image_axis` does."""

    def of(x: Any) -> list[NamedSharding]:
        if isinstance(x, Images):
            return [placement(mesh, [image_axis(mesh, len(x.patches))])] * len(jax.tree.leaves(x))
        p, n, _ = row_axes(mesh, *(*np.shape(x), 1)[:2]) if np.ndim(x) else (None, None, None)
        return [placement(mesh, [p, n][: np.ndim(x)])]

    parts = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Images))
    return [where for part in parts for where in of(part)]


def shard_batch(mesh: Mesh, tree: Any) -> Any:
    """Host arrays -> device arrays. Every process holds the whole of them and gives its devices their part."""

    def put(x: Any, where: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    leaves, form = jax.tree.flatten(tree)
    return jax.tree.unflatten(form, map(put, leaves, batch_placements(mesh, tree)))


# ======================================================================================================
# 4  Protocol: what is said, and how it becomes tokens
# ======================================================================================================

# METHOD.md 1.2 in our own words. `full` is for instruct checkpoints, `brief` for a policy that was warm-started on the
# protocol and needs no rules explained.
PROMPTS = {
    "full": {
        "clarify": """You find one target in a video. You get a query and numbered frames; you finish with a box and a point on one frame of your choice.
The query may fit several objects. You have one tool to settle that:
{"name": "vlm_tool", "description": "asks the user a question when several objects still fit what is known", "parameters": {"query": "the question, a string"}}
The user's reply comes between <information> and </information>.
Look at the frames first. Then say exactly one of these three things.
While several objects fit: <thinking> list the objects that still fit; find the visible features in which they differ; choose the question that splits them most evenly or isolates one </thinking><call> {"name": "vlm_tool", "query": "..."} </call>
When one object is left: <thinking> which frame shows it best </thinking><keyframe> frame number </keyframe>
After you were shown that frame in high resolution: <thinking> its unique features and its exact place </thinking><answer> {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]} </answer>
Never guess while several objects fit. Do not repeat the query in a question, say "the target". Ask about one visible attribute at a time: colour, direction, action, relative position or shape; for a place name the frame. Never ask which frame is clearest. Left and right are the viewer's. Coordinates run from 0 to 1000.
If nothing in the video fits the query: <keyframe> -1 </keyframe>, then <answer> {"bbox_2d": [0, 0, 0, 0], "point_2d": [0, 0]} </answer>.
Examples: <call> {"name": "vlm_tool", "query": "Counting from the left in frame 0, which one is the target?"} </call> <call> {"name": "vlm_tool", "query": "In frame 12, is the target in front of or behind the fence?"} </call> <call> {"name": "vlm_tool", "query": "What color is the target?"} </call> <call> {"name": "vlm_tool", "query": "In frame 30, is the target in a corner or in the middle?"} </call>""",  # noqa: E501
        "direct": """You find one target in a video. You get a query and numbered frames; you finish with a box and a point on one frame of your choice.
First: <thinking> which frame shows the target best </thinking><keyframe> frame number </keyframe>
After you were shown that frame in high resolution: <thinking> its unique features and its exact place </thinking><answer> {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]} </answer>
Left and right are the viewer's. Coordinates run from 0 to 1000. If nothing in the video fits the query: <keyframe> -1 </keyframe>, then <answer> {"bbox_2d": [0, 0, 0, 0], "point_2d": [0, 0]} </answer>.""",  # noqa: E501
        "mask_type": ' Add "mask_type" to the answer: "modal" when the visible part is meant, "amodal" when the whole object is, hidden parts included.',  # noqa: E501
        "conversation": """You talk with a user about an image. Answer briefly. When the user asks for a segmentation: <thinking> which object the conversation means </thinking><keyframe> frame number </keyframe>
After you were shown that frame in high resolution: <thinking> its unique features and its exact place </thinking><answer> {"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y]} </answer>
Coordinates run from 0 to 1000.""",  # noqa: E501
    },
    "brief": {
        "clarify": "Find the target. Ask while several match.",
        "direct": "Find the target.",
        "mask_type": " Say which mask.",
        "conversation": "Answer, then find the target.",
    },
}

KEYFRAME_REPLY = "Here is the high-res version of your selected frame: "
NO_TARGET_REPLY = "No frame selected. Answer with zeros."
NO_SUCH_FRAME = "Frame index not in {frames}."


def information(reply: str) -> str:
    """The user's reply as the policy sees it (METHOD.md 1.4)."""
    return f"<information>{reply}</information>\n\n"


# What a malformed action is told (METHOD.md 1.4).
TOOL_ERRORS = {
    "call_json": "The call is not valid JSON.",
    "call_keys": 'The call needs "name" and "query".',
    "tool": "Unknown tool; the only one is vlm_tool.",
    "answer_json": "The answer is not valid JSON.",
    "answer_keys": 'The answer needs "bbox_2d" with 4 numbers and "point_2d" with 2.',
    "mask_type": '"mask_type" is "modal" or "amodal".',
    "nothing": "Nothing to do was found.",
}

SOLUTION = "\n\nHere is an earlier attempt that solved it: {solution}\n\nAnswer the query correctly."
GUIDANCE = "\n\nFeedback on an earlier attempt: {guidance}\n\nAnswer the query correctly."


@dataclass(frozen=True)
class Action:
    """What one generation asks for. Fields of other kinds are None; `error` says why a text is invalid."""

    kind: str  # call | keyframe | answer | invalid; talk: a turn of a conversation, before the mask is asked for
    question: str | None = None
    frame: int | None = None
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    mask_type: str | None = None
    error: str | None = None


def _between(text: str, tag: str, *, last: bool) -> str | None:
    """The text inside the first or last complete <tag>...</tag>; linear in the text, whatever it holds."""
    start, end = f"<{tag}>", f"</{tag}>"
    if last:
        opening = text.rfind(start, 0, max(text.rfind(end), 0))
        close = text.find(end, opening) if opening >= 0 else -1
    else:
        opening = text.find(start)
        close = text.find(end, opening) if opening >= 0 else -1
    return text[opening + len(start) : close] if opening >= 0 and close >= 0 else None


def _read_json(text: str) -> Any:
    """Strict JSON: no bottomless nesting, and NaN and infinities are read as null, of which no number is made. Returns
    None when it is not."""
    if len(text) > 20_000:
        return None
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value):
        return None
    try:
        numbers = tuple(float(x) for x in value)
    except OverflowError:
        return None
    return numbers if all(math.isfinite(x) for x in numbers) else None


KEYFRAME = re.compile(r"<keyframe>\s*(-?\d{1,9})\s*</keyframe>")


def parse_action(text: str) -> Action:
    """One generation -> what it does (METHOD.md 1.4, 1.5, 1.7). Never raises, linear in the text.

    A call wins over a key frame, a key frame over an answer, as the environment acts on the tag that stopped it.
    """
    call = _between(text, "call", last=True)
    if call is not None:
        request = _read_json(call)
        if not isinstance(request, dict):
            return Action("invalid", error=TOOL_ERRORS["call_json"])
        if (
            not isinstance(request.get("name"), str)
            or not isinstance(request.get("query"), str)
            or not request["query"].strip()
        ):
            return Action("invalid", error=TOOL_ERRORS["call_keys"])
        if request["name"] != "vlm_tool":
            return Action("invalid", error=TOOL_ERRORS["tool"])
        return Action("call", question=request["query"].strip())
    if keyframe := KEYFRAME.search(text):
        return Action("keyframe", frame=int(keyframe[1]))
    if _between(text, "keyframe", last=False) is not None:
        return Action("invalid", error="")  # the released tool server answers nothing here (METHOD.md 1.5)
    answer = _between(text, "answer", last=False)
    if answer is not None:
        value = _read_json(answer)
        if not isinstance(value, dict):
            return Action("invalid", error=TOOL_ERRORS["answer_json"])
        box, point = _numbers(value.get("bbox_2d"), 4), _numbers(value.get("point_2d"), 2)
        if box is None or point is None:
            return Action("invalid", error=TOOL_ERRORS["answer_keys"])
        mask_type = value.get("mask_type", "modal")
        if mask_type not in ("modal", "amodal"):
            return Action("invalid", error=TOOL_ERRORS["mask_type"])
        return Action("answer", box=box, point=point, mask_type=mask_type)
    return Action("invalid", error=TOOL_ERRORS["nothing"])


def well_formed(texts: Sequence[str], *, mask_type: bool = False) -> bool:
    """The format term (METHOD.md 3.2): thinking right before an integer key frame, thinking right before a one-line
    answer whose JSON has exactly the keys asked for."""
    keys = {"bbox_2d", "point_2d"} | ({"mask_type"} if mask_type else set())
    framed = answered = False
    for text in texts:
        if len(text) > 100_000 or "<thinking>" not in text:
            continue
        before, thought, after = text.rpartition("</thinking>")
        if not thought or "<thinking>" not in before:
            continue
        after = after.strip()
        framed |= KEYFRAME.fullmatch(after) is not None
        if after.startswith("<answer>") and after.endswith("</answer>") and "\n" not in after:
            value = _read_json(after.removeprefix("<answer>").removesuffix("</answer>"))
            answered |= isinstance(value, dict) and set(value) == keys and parse_action(after).kind == "answer"
    return framed and answered


class Transcript:
    """Tokens of one row as they grow, with everything the policy needs to know of each: data, made once.

    Token ids only move forward: sampled ids are appended as they are, never decoded and encoded again.
    """

    FIELDS = ("tokens", "trained", "turn", "slots", "positions", "logp")

    def __init__(self, position: int = 0):
        self.tokens: list[int] = []
        self.trained: list[bool] = []  # sampled by the policy, so part of the loss
        self.turn: list[int] = []  # which generation, -1 outside
        self.slots: list[int] = []  # token of the image bank that stands here, -1: text
        self.positions: list[tuple[int, int, int]] = []
        self.logp: list[float] = []  # of sampled tokens, by the sampler
        self.position = position  # M-RoPE position of the next token
        self.generations = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int = 0, stop: int | None = None) -> Transcript:
        out = Transcript()
        for name in self.FIELDS:
            setattr(out, name, getattr(self, name)[start:stop])
        return out

    def add(self, ids: Sequence[int], *, trained: bool = False, logp: Sequence[float] | None = None) -> None:
        n = len(ids)
        self.tokens += ids
        self.trained += [trained] * n
        self.turn += [self.generations if trained else -1] * n
        self.slots += [-1] * n
        self.positions += [(p, p, p) for p in range(self.position, self.position + n)]
        self.logp += [0.0] * n if logp is None else list(logp)
        self.position += n
        self.generations += trained

    def add_image(self, image_token: int, first_slot: int, grid: tuple[int, int]) -> None:
        """grid: height and width in merged tokens."""
        places, following = image_positions(grid, self.position)
        n = places.shape[1]
        self.tokens += [image_token] * n
        self.trained += [False] * n
        self.turn += [-1] * n
        self.slots += range(first_slot, first_slot + n)
        self.positions += list(zip(*places.tolist(), strict=True))
        self.logp += [0.0] * n
        self.position = following


class Rows(struct.PyTreeNode):
    """Transcripts as arrays, [P, 1, S] for prompts and [P, N, T] for rollouts, padded on the right."""

    tokens: Array  # [P,N,T] int32
    positions: Array  # [P,N,T,3] int32: M-RoPE's time, row and column
    slots: Array  # [P,N,T] int32
    segment: Array  # [P,N,T] int32: 0 padding; tokens see earlier ones of their own segment only
    trained: Array  # [P,N,T] bool
    turn: Array  # [P,N,T] int32
    logp: Array  # [P,N,T] float32, the sampler's


def stack_rows(grid: Sequence[Sequence[Sequence[Transcript]]], length: int, pad: int) -> Rows:
    """grid[p][n]: the segments of one row, laid one after the other. Raises ValueError when one does not fit."""
    p, n = len(grid), len(grid[0])
    out = Rows(
        tokens=np.full((p, n, length), pad, np.int32),
        positions=np.zeros((p, n, length, 3), np.int32),
        slots=np.full((p, n, length), -1, np.int32),
        segment=np.zeros((p, n, length), np.int32),
        trained=np.zeros((p, n, length), bool),
        turn=np.full((p, n, length), -1, np.int32),
        logp=np.zeros((p, n, length), np.float32),
    )
    for i, rows in enumerate(grid):
        for j, segments in enumerate(rows):
            at = 0
            for number, row in enumerate(segments, start=1):
                span = slice(at, at + len(row))
                if span.stop > length:
                    raise ValueError(f"{span.stop} tokens do not fit a row of {length}")
                if len(row):
                    out.tokens[i, j, span] = row.tokens
                    out.positions[i, j, span] = row.positions
                    out.slots[i, j, span], out.segment[i, j, span] = row.slots, number
                    out.trained[i, j, span], out.turn[i, j, span] = row.trained, row.turn
                    out.logp[i, j, span] = row.logp
                at = span.stop
    return out


def own_mask(rows: Rows) -> Array:
    """[P,N,T,T]: a token sees itself and what came before in its own segment."""
    same = (rows.segment[..., :, None] == rows.segment[..., None, :]) & (rows.segment[..., None, :] > 0)
    length = rows.segment.shape[-1]
    return same & jnp.tril(jnp.ones((length, length), bool))


class Speaker:
    """Turns words and images into transcripts, the same way for demonstrations, rollouts and evaluation.

    The chat layout is Qwen's, the newline after <|im_end|> included. The bank of a prompt holds its `frames` shown
    images first and then up to as many high-resolution key frames.
    """

    def __init__(self, config: ProtocolSection, policy: PolicyConfig, tokenizer: weights.Tokenizer):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        unit = policy.vision.patch_size * policy.vision.spatial_merge_size
        # Sizes are rounded up to whole merged tokens (METHOD.md 1.1).
        self.frame_grid = (-(-config.frame_size // unit),) * 2
        self.keyframe_grid = (-(-config.keyframe_size // unit),) * 2
        self.frame_tokens = self.frame_grid[0] * self.frame_grid[1]
        self.keyframe_tokens = self.keyframe_grid[0] * self.keyframe_grid[1]
        self.image_token = policy.image_token_id
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 4096:
                self._cache.clear()
            self._cache[text] = self.tokenizer.encode(text)
        return self._cache[text]

    def system(self, ability: str | None, *, mask_type: bool = False, conversation: bool = False) -> str:
        prompts = PROMPTS[self.config.prompts]
        if conversation:
            return prompts["conversation"]
        kind = "clarify" if self.offers_tool(ability) else "direct"
        return prompts[kind] + (prompts["mask_type"] if mask_type else "")

    def offers_tool(self, ability: str | None, *, conversation: bool = False) -> bool:
        """Whether the policy may ask the user about such a sample."""
        return ability in self.config.clarify and not conversation

    def opening(self, fids: Sequence[int], system: str) -> Transcript:
        """Everything before the query: system message and shown frames."""
        row = Transcript()
        row.add(self.ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        for i, fid in enumerate(fids):
            row.add(self.ids(f"frame {fid} <|vision_start|>"))
            row.add_image(self.image_token, i * self.frame_tokens, self.frame_grid)
            # Both newlines before the query at once: tokenizers write them as one token.
            row.add(self.ids("<|vision_end|>\n" if i + 1 < len(fids) else "<|vision_end|>\n\n"))
        return row

    def query(self, row: Transcript, query: str, guidance: str | None = None) -> None:
        text = query + (GUIDANCE.format(guidance=guidance) if guidance else "")
        row.add(self.tokenizer.encode(text))
        row.add(self.closing())

    def check_length(self, prompt: Transcript, whose: str) -> None:
        """Raises PromptTooLong when a prompt has more than protocol.prompt_tokens."""
        if len(prompt) > self.config.prompt_tokens:
            raise PromptTooLong(
                f"protocol.prompt_tokens={self.config.prompt_tokens}: the prompt of {whose} has {len(prompt)} tokens; "
                "give at least that, or fewer or smaller frames"
            )

    def closing(self) -> list[int]:
        return self.ids("<|im_end|>\n<|im_start|>assistant\n")

    @property
    def longest_observation(self) -> int:
        """Tokens of the longest that `observe` may add."""
        around = len(self.ids("<|im_end|>\n<|im_start|>user\n")) + len(self.closing())
        cut = self.config.observation_tokens + len(self.ids("...(truncated)"))
        reply = len(self.ids(KEYFRAME_REPLY))
        reply = reply if reply <= self.config.observation_tokens else cut
        return around + max(cut, reply + 2 + self.keyframe_tokens)

    def observe(self, row: Transcript, text: str, keyframe_slot: int | None = None, *, ended: bool = False) -> None:
        """The environment's reply as a user turn (METHOD.md 1.3). ended: the policy closed its turn itself."""
        row.add(self.ids("\n<|im_start|>user\n" if ended else "<|im_end|>\n<|im_start|>user\n"))
        ids = self.tokenizer.encode(text)
        if len(ids) > self.config.observation_tokens:  # the released loop keeps the end of a text that is too long
            ids = ids[-self.config.observation_tokens :] + self.ids("...(truncated)")
        row.add(ids)
        if keyframe_slot is not None:
            row.add(self.ids("<|vision_start|>"))
            first = self.config.frames * self.frame_tokens + keyframe_slot * self.keyframe_tokens
            row.add_image(self.image_token, first, self.keyframe_grid)
            row.add(self.ids("<|vision_end|>"))
        row.add(self.closing())

    # What the policy says, in the form that demonstrations teach and `parse_action` reads.

    @staticmethod
    def thought(text: str) -> str:
        lead = "" if text.startswith("\n") else " "
        return f"<thinking>{lead}{text} </thinking>"

    def call(self, thinking: str, question: str) -> str:
        return f"{self.thought(thinking)}<call> {json.dumps({'name': 'vlm_tool', 'query': question})} </call>"

    def keyframe(self, thinking: str, fid: int) -> str:
        return f"{self.thought(thinking)}<keyframe> {fid} </keyframe>"

    def answer(self, thinking: str, box: Sequence[int], point: Sequence[int], mask_type: str | None = None) -> str:
        value = {"bbox_2d": list(box), "point_2d": list(point)} | ({"mask_type": mask_type} if mask_type else {})
        return f"{self.thought(thinking)}<answer> {json.dumps(value)} </answer>"

    def patches(self, image: np.ndarray, grid: tuple[int, int], method: str) -> np.ndarray:
        """uint8 [h,w,3] -> [patches, patch_dim] at the grid's size (METHOD.md 1.1, 1.5)."""
        unit = self.policy.vision.patch_size * self.policy.vision.spatial_merge_size
        return patchify(self.policy.vision, data.resize(image, grid[0] * unit, grid[1] * unit, method=method))

    def frame_patches(self, image: np.ndarray) -> np.ndarray:
        return self.patches(image, self.frame_grid, "bicubic")

    def keyframe_patches(self, image: np.ndarray) -> np.ndarray:
        return self.patches(image, self.keyframe_grid, "lanczos")

    def images(self, patches: np.ndarray, grid: tuple[int, int]) -> Images:
        """patches [I, M, patch_dim] of one grid."""
        merge = self.policy.vision.spatial_merge_size
        corners, corner_weights, place = vision_place(self.policy.vision, grid[0] * merge, grid[1] * merge)
        count = (len(patches),)
        return Images(
            patches=patches,
            corners=np.broadcast_to(corners, count + corners.shape),
            corner_weights=np.broadcast_to(corner_weights, count + corner_weights.shape),
            place=np.broadcast_to(place, count + place.shape),
            valid=np.ones(patches.shape[:2], bool),
        )


def patchify(config: VisionConfig, image: np.ndarray) -> np.ndarray:
    """uint8 [h,w,3], sides whole merged tokens -> [h/p * w/p, patch_dim] float32 in merge-major order.

    Values are scaled to -1..1 (Qwen3-VL's mean and deviation of 0.5); a still fills its temporal patch twice.
    """
    p, m, t = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
    height, width = image.shape[0] // p, image.shape[1] // p
    x = (image.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(height // m, m, p, width // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.broadcast_to(x[..., None, :, :], (*x.shape[:5], t, p, p))
    return x.reshape(height * width, config.patch_dim)


# ======================================================================================================
# 5  Rollout: the dialogue loop
# ======================================================================================================


class Clock:
    """Seconds per phase of a step; nested phases count for themselves only."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._last = time.perf_counter()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] = self.seconds.get(self._stack[-1], 0.0) + now - self._last
        self._last = now

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self._book()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        self._book()
        out, self.seconds = {k: round(v, 4) for k, v in self.seconds.items()}, {}
        return out


class Prompt:
    """One sample as the policy meets it: its transcript so far, its images, and which key frames were asked for."""

    def __init__(self, sample: data.Sample, positions: Sequence[int], speaker: Speaker):
        self.sample, self.positions = sample, list(positions)
        self.fids = [data.frame_id(sample.frame_names[i]) for i in positions]
        self.images = [sample.image(i) for i in positions]
        # A conversation that came before is held again: what its user said, turn by turn (DATA.md 1.4).
        talk = data.conversation(sample, []).rounds if sample.dialogue else []
        first, *self.later = [*(human for human, _ in talk), sample.query]
        conversation = sample.dialogue is not None
        system = speaker.system(sample.ability, mask_type=sample.mask_type is not None, conversation=conversation)
        self.offered = speaker.offers_tool(sample.ability, conversation=conversation)
        self.row = speaker.opening(self.fids, system)
        self.row.add(speaker.tokenizer.encode(first))
        self.query_end = len(self.row)  # a teacher's guidance goes here
        self.query_position = self.row.position
        self.row.add(speaker.closing())
        speaker.check_length(self.row, sample.id)
        self.keyframes: dict[int, int] = {}  # fid -> slot of its high-resolution copy in the bank
        known = sample.masks is not None  # hidden labels: nothing is scored
        shown = zip(self.fids, positions, strict=True)
        self.truth = data.ground_truth({fid: sample.truth(i) for fid, i in shown}) if known else {}
        self.graph = (sample.privileged or {}).get("scene_graph") or {}
        self.initial_count = sample.initial_count
        self.no_target = sample.ability == "none" or sample.initial_count == 0

    def seen_by(self, who: Any) -> dict | data.Sample:
        """What a user or an expert looks at: models see the sample, everybody else knows its scene graph."""
        return self.sample if isinstance(who, MODELS) else self.graph

    @property
    def key(self) -> int:
        """A stable number for random keys: the same sample samples the same, whatever stands beside it."""
        return int.from_bytes(hashlib.blake2s(self.sample.id.encode(), digest_size=4).digest(), "big") >> 1

    def patches(self, speaker: Speaker) -> np.ndarray:
        """[F, patches, patch_dim]: blank ones follow where a video is shorter, and nothing looks there."""
        shown = np.stack([speaker.frame_patches(image) for image in self.images])
        return np.pad(shown, ((0, speaker.config.frames - len(shown)), (0, 0), (0, 0)))

    def image_of(self, fid: int) -> np.ndarray:
        return self.images[self.fids.index(fid)]


STOPS = ("</call>", "</keyframe>")  # a generation ends with one of them, which is kept, or with the turn
MODELS = (simulator.ModelUser, simulator.ModelExpert)
END_KINDS = ("answered", "stopped", "overlong", "turns", "unanswered")


class Dialogue:
    """One rollout as it unfolds on the host: what was said, asked, shown and answered."""

    def __init__(self, prompt: Prompt):
        self.prompt = prompt
        self.later = list(prompt.later)  # what the user of a conversation has still to say
        self.row = Transcript(prompt.row.position)
        self.texts: list[str] = []
        self.actions: list[Action] = []
        self.replies: list[str] = []  # observation after each generation; "" when the dialogue ended
        self.questions: list[tuple[str, str]] = []  # (question, answer) of every call; a malformed one asks ""
        self.asked_in: list[int] = []  # and the generation it was made in
        self.end: str | None = None  # one of END_KINDS
        self.closed = False  # the last generation of a conversation ended its turn itself
        self.lost: str | None = None  # user | expert: who did not answer in time; the row is left out of the step
        self.frame: int | None = None  # the valid key frame that counts; -1: no target
        self.answer: Action | None = None

    def say(self, ids: list[int], logp: list[float], speaker: Speaker, *, finished: bool, last: bool) -> None:
        """Takes one generation. finished: a stop string or the end of the turn was said; last: no tool call is left."""
        self.row.add(ids, trained=True, logp=logp)
        text = speaker.tokenizer.decode(ids)
        closed = text.endswith("<|im_end|>")
        text = text.removesuffix("<|im_end|>").removesuffix("<|endoftext|>")
        if not self.later:  # the token that completes a stop string may reach past it, as Qwen's "><" does
            text = text[: min((text.find(stop) + len(stop) for stop in STOPS if stop in text), default=len(text))]
        action = Action("talk") if self.later else parse_action(text)
        if action.kind == "call" and not self.prompt.offered:  # as any other word that means nothing
            action = Action("invalid", error=TOOL_ERRORS["nothing"])
        self.texts.append(text)
        self.actions.append(action)
        self.replies.append("")
        if action.kind == "answer":  # one that goes on until its tokens are spent ended by length, not by itself
            self.answer, self.end = action, "answered" if finished else "overlong"
        elif not finished:
            self.end = "overlong"
        elif action.kind == "talk":
            self.closed = closed
        elif closed or not text.rstrip().endswith(STOPS):
            self.end = "stopped"  # it closed its turn with nothing left to react to
        elif last:
            self.end = "turns"
        if self.end is None and action.kind == "invalid" and "</call>" in text and self.prompt.offered:
            self._ask("", action.error or "")

    def _ask(self, question: str, answer: str) -> None:
        self.questions.append((question, answer))
        self.asked_in.append(len(self.texts) - 1)

    def transcript(self) -> str:
        """Everything said, as text: what the policy wrote and what it was told."""
        said = zip(self.texts, self.replies, strict=True)
        return "".join(f"{text}\n{reply}\n" if reply else text for text, reply in said)

    def wants_user(self) -> bool:
        return self.end is None and self.actions[-1].kind == "call"

    def observe(self, speaker: Speaker, reply: str | None) -> None:
        """Appends the environment's observation. reply: the user's words, when the last action was a call."""
        action, slot = self.actions[-1], None
        if action.kind == "talk":
            text = self.later.pop(0)
        elif action.kind == "call":
            self._ask(action.question, reply)
            text = information(reply)
        elif action.kind == "keyframe" and (action.frame == -1 or action.frame in self.prompt.fids):
            text = NO_TARGET_REPLY if action.frame == -1 else KEYFRAME_REPLY
            if self.frame is None or speaker.config.keyframe == "last":
                self.frame = action.frame
        elif action.kind == "keyframe":
            text = NO_SUCH_FRAME.format(frames=self.prompt.fids)
        else:
            text = action.error or ""
        if text == KEYFRAME_REPLY:
            slot = self.prompt.keyframes.setdefault(action.frame, len(self.prompt.keyframes))
        self.replies[-1] = text
        said = len(self.row)
        speaker.observe(self.row, text, slot, ended=action.kind == "talk" and self.closed)
        if len(self.row) >= speaker.config.response_tokens:  # nothing can follow: the row ends with what was said
            self.end, self.row, self.replies[-1] = "overlong", self.row.part(stop=said), ""
            if action.kind == "call":  # whoever was not told knows no more than before
                self.questions[-1] = (action.question, "")

    @property
    def well_formed(self) -> bool:
        return well_formed(self.texts, mask_type=self.prompt.sample.mask_type is not None)


def stop_automaton(spelling: Sequence[bytes], stops: Sequence[str]) -> tuple[np.ndarray, int]:
    """Stop strings as a token-level automaton: table [states, V] int32 of next states, and the state that means stop.

    Exact for strings that straddle tokens: states are how much of a stop string the text ends on (Aho-Corasick over
    bytes), and each token is spelled through it once, here. The last state is the stop and keeps itself.
    """
    patterns = [s.encode() for s in stops]
    prefixes = sorted({b""} | {p[:i] for p in patterns for i in range(len(p))}, key=lambda x: (len(x), x))
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    done = len(prefixes)
    step = np.zeros((done + 1, 256), np.int32)
    step[done] = done
    for prefix, state in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(text.endswith(p) for p in patterns):
                step[state, byte] = done
            else:
                step[state, byte] = next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)
    longest = max(map(len, spelling))
    letters = np.zeros((len(spelling), longest), np.uint8)
    lengths = np.array([len(s) for s in spelling])
    for i, s in enumerate(spelling):
        letters[i, : len(s)] = np.frombuffer(s, np.uint8)
    table = np.tile(np.arange(done + 1, dtype=np.int32)[:, None], (1, len(spelling)))
    for place in range(longest):
        table = np.where(place < lengths, step[table, letters[:, place]], table)
    return table, done


COMPILED: list[dict[str, str]] = []  # every program compiled in this process, in order: its name and the shapes


class Program:
    """jax.jit that writes down what it is compiled for: shapes that keep changing are what makes a run slow."""

    def __init__(self, name: str, function: Callable, **options: Any):
        self.name, self.jitted, self.known = name, jax.jit(function, **options), set()

    def __call__(self, *args: Any, **static: Any) -> Any:
        # The first argument is the parameters or what holds them: the same in every call.
        leaves = jax.tree.leaves(args[1:] if isinstance(args[0], (Mapping, TrainState)) else args)
        shapes = tuple((str(getattr(x, "dtype", type(x).__name__)), np.shape(x)) for x in leaves)
        # Another layout on the devices is another program, too; what the host holds has none.
        layouts = [x.sharding if getattr(x, "committed", False) else None for x in leaves]
        key = (shapes, *layouts, *static.items())
        if key not in self.known:
            self.known.add(key)
            text = [f"{kind}{list(shape)}" for kind, shape in shapes]
            COMPILED.append({"program": self.name, "shapes": " ".join(text), **{k: str(v) for k, v in static.items()}})
        return self.jitted(*args, **static)


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`: programs are compiled once per bucket. Raises ConfigError."""
    if size > max(buckets):
        raise ConfigError(f"{size} tokens do not fit the buckets {list(buckets)}; give a larger one")
    return min(b for b in buckets if b >= size)


class Lanes(struct.PyTreeNode):
    """Device state of the dialogues in play. Everything of the prompt is [P], everything of the rollout [P, N].

    Keys lie in stacks of layers: all L in one, or on a GPU (`APART`) each layer in a stack of its own.
    """

    prompt: tuple[Keys, ...]  # [L,P,K,S,h]
    prompt_mask: Array  # [P,S]
    visual: Visual
    past: tuple[Keys, ...]  # [L,P,N,K,C,h]: the rollout's own tokens so far
    past_length: Array  # [P,N]
    hidden: Array  # [P,N,D]: what the next token is read from


class Places(NamedTuple):
    """Where the parts of lanes lie: a sharding for each leaf, in their order."""

    prompt: tuple
    prompt_mask: NamedSharding
    visual: tuple
    past: tuple
    past_length: NamedSharding
    hidden: NamedSharding


class Penalty(struct.PyTreeNode):
    """What makes tokens that were there before less likely, in vLLM's order: repetition, then presence (METHOD.md 1.3).

    A generation is a request of its own to vLLM: all before it is its prompt, which only repetition looks at.
    """

    repetition: Array  # [P,N]: divides logits above 0 of all that was heard, multiplies those below; 1: off
    presence: Array  # [P,N]: is taken off the logits of what this generation has said; 0: off
    heard: Array  # [P,N,W] int32: the tokens of the row so far, filled up with the size of the vocabulary
    since: Array  # [P,N] int32: where among them this generation begins


NO_PENALTIES = (1.0, 0.0)  # for repetition and presence


def first_above(weights: Array, aim: Array) -> tuple[Array, Array]:
    """weights [V,...] from 0 up, aim [...] below their sum: the first index whose running sum exceeds it, among those
    of some weight, and the sum before it."""
    running = jnp.cumsum(weights, 0)
    hit = (running > aim) & (weights > 0)  # rounding may leave none
    index = jnp.where(hit.any(0), jnp.argmax(hit, 0), jnp.argmax(weights, 0))
    return index, jnp.take_along_axis(running - weights, index[None], 0)[0]


BLOCKS = 128  # of the vocabulary, in which a token is looked up; Qwen's is a multiple of it


def draw(scores: Array, temperature: Array, chance: Array) -> tuple[Array, Array]:
    """Tokens [P,N] int32 with probabilities softmax(scores [V,P,N] / temperature [P,N]), the likeliest where that is 0;
    and the logarithm [P,N] of what their exponentials are divided by (0: those of the plain scores).

    chance [P,N]: one uniform number from [0, 1) for each row. It is looked up in the sums of BLOCKS blocks and then in
    one of them: noise for every word (Gumbel) cost more than the layers did.
    """
    words, p, n = scores.shape
    scores = jnp.pad(scores, ((0, -words % BLOCKS), (0, 0), (0, 0)), constant_values=MASKED)
    scores = scores.reshape(BLOCKS, -1, p, n)
    tops, cool = scores.max(1), 1 / jnp.where(temperature > 0, temperature, 1.0)
    weights = jnp.exp((scores - tops.max(0)) * cool)
    sums = weights.sum(1)
    whole = sums.sum(0)
    aim = chance * whole
    block, before = first_above(sums, aim)
    block = jnp.where(temperature > 0, block, jnp.argmax(tops, 0))
    of_block = lambda x: jnp.take_along_axis(x, block[None, None], 0)[0]  # noqa: E731
    place, _ = first_above(of_block(weights), aim - before)
    place = jnp.where(temperature > 0, place, jnp.argmax(of_block(scores), 0))
    return (block * scores.shape[1] + place).astype(jnp.int32), tops.max(0) * cool + jnp.log(whole)


UNROLLED = 8  # layers of a policy whose decoding is compiled layer by layer on a CPU, at most
# Where products read whole buffers only: before each, a layer's part of a stack would be copied, weights and cache, for
# every token. So the policy is compiled layer by layer, and caches are never stacked.
APART = ("gpu",)


def is_apart(mesh: Mesh) -> bool:
    """Whether what these devices read to decode lies layer by layer."""
    return mesh.devices.flat[0].platform in APART


def one_by_one(stacks: Sequence[Any]) -> list[Any]:
    """Stacks of layers [L,...] as stacks of one layer each [1,...]."""

    def layer(stack, i):
        return jax.tree.map(lambda x: x[i : i + 1], stack)

    return [layer(stack, i) for stack in stacks for i in range(len(jax.tree.leaves(stack)[0]))]


def as_one(stacks: Sequence[Any]) -> Any:
    """Stacks of layers as one stack: where it is taken apart again in the same program, XLA sees through it."""
    return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks) if len(stacks) > 1 else stacks[0]


def stacked(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters or a `reading_copy` of them, as the policy takes them: layers in one stack."""
    layers = params["layers"]
    return {**params, "layers": as_one(layers)} if isinstance(layers, tuple) else params


class Sampler:
    """Plays dialogues: encode and prefill once per prompt, then turns of decode, act, observe, extend.

    The prompt's keys and values stay [P]; a rollout's own grow in place across turns. During a turn the past is only
    read, new tokens collect in a small buffer and are laid behind the past once for each rollout.decode_tokens of them.
    """

    def __init__(self, config: Config, policy: Policy, speaker: Speaker, mesh: Mesh, stops: Sequence[str] = STOPS):
        self.c, self.speaker, self.mesh = config, speaker, mesh
        layers = policy.config.num_hidden_layers
        self.apart = is_apart(mesh)
        self.policy = policy.clone(unroll=layers) if self.apart else policy
        tokenizer = speaker.tokenizer
        vocabulary = policy.config.vocab_size
        spelling = tokenizer.spelling()
        spelling += [b""] * (vocabulary - len(spelling))
        table, self.stop_state = stop_automaton(spelling[:vocabulary], stops)
        self.table = jnp.asarray(table)
        # What may be sampled: tokens that spell something, and the two ends of a turn.
        allowed = np.array([bool(s) for s in spelling[:vocabulary]])
        allowed[[tokenizer.end_of_turn, tokenizer.end_of_text]] = True
        self.allowed = allowed
        self.ends = jnp.asarray([tokenizer.end_of_turn, tokenizer.end_of_text])
        self.encode = Program("encode", self._encode)
        self.prefill = Program("prefill", self._prefill, static_argnames="rollouts")
        self.insert = Program("insert", self._insert, static_argnames="rollouts", donate_argnums=0)
        self.decode, self.extend = Program("decode", self._decode), Program("extend", self._extend)
        self.resize = Program("resize", self._resize, static_argnames="length")
        self.commit = Program("commit", self._commit, donate_argnums=0)
        self.pick, self.keys = Program("pick", self._pick), Program("keys", self._keys)

    def layout(self, prompts: int, rollouts: int) -> Places:
        """Prompts over data, rollouts over fsdp, heads over tensor."""
        config, mesh = self.policy.config, self.mesh
        p, n, _ = row_axes(mesh, prompts, rollouts)
        heads = "tensor" if divides(mesh, "tensor", config.num_key_value_heads) else None
        at = lambda *axes: placement(mesh, axes)  # noqa: E731
        each = 2 * (config.num_hidden_layers if self.apart else 1)  # keys and values of each stack of layers
        prompt, past = (at(None, p, heads),) * each, (at(None, p, n, heads),) * each
        return Places(prompt, at(p), (at(p), at(None, p)), past, at(p, n), at(p, n))

    def _hold(self, found: Any, places: Any) -> Any:
        """found, each of its leaves in its place."""
        if self.mesh.size == 1:
            return found
        leaves, form = jax.tree.flatten(found)
        held = [jax.lax.with_sharding_constraint(x, at) for x, at in zip(leaves, jax.tree.leaves(places), strict=True)]
        return jax.tree.unflatten(form, held)

    def _keep(self, keys: Keys) -> tuple[Keys, ...]:
        """New keys of all layers in the stacks that lanes have."""
        return tuple(one_by_one([keys])) if self.apart else (keys,)

    # Device programs

    def _apply(self, params, *args, **kwargs):
        return self.policy.apply({"params": stacked(params)}, *args, **kwargs)

    def _run(self, params, *args, **kwargs):
        return self._apply(params, *args, method=Policy.run, **kwargs)

    def _encode(self, params, images: Images):
        return self._apply(params, images, method=Policy.encode)

    def _insert(self, visual: Visual, tokens, deepstack, prompt, first, rollouts: int):
        """Lays newly encoded images [I, m, D] into the banks: image i at prompt[i], from token first[i] on."""
        where = first[:, None] + jnp.arange(tokens.shape[1])
        p, *_ = row_axes(self.mesh, visual.tokens.shape[0], rollouts)
        return Visual(
            laid(visual.tokens.at[prompt[:, None], where].set(tokens, mode="drop"), self.mesh, p),
            laid(visual.deepstack.at[:, prompt[:, None], where].set(deepstack, mode="drop"), self.mesh, None, p),
        )

    def _prefill(self, params, prompts: Rows, images: Visual, rollouts: int):
        """Lanes before the first turn, from the frames [I, m, D] of all prompts, encoded."""
        c, count = self.c, prompts.tokens.shape[0]
        room = c.protocol.frames * self.speaker.keyframe_tokens  # every shown frame may be asked for

        def bank(x):
            x = x.reshape(*x.shape[:-3], count, -1, x.shape[-1])
            return jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, room), (0, 0)))

        visual = jax.tree.map(bank, images)
        hidden, keys = self._run(
            params, prompts.tokens, prompts.positions, own_mask(prompts), visual=visual, slots=prompts.slots
        )
        there = prompts.segment[:, 0] > 0
        last = jnp.take_along_axis(hidden[:, 0], there.sum(-1)[:, None, None] - 1, 1)
        last = jnp.broadcast_to(last, (count, rollouts, last.shape[-1]))
        keys = self._keep(jax.tree.map(lambda x: x[:, :, 0], keys))
        capacity = min(c.rollout.cache_buckets)
        past = jax.tree.map(
            lambda x: jnp.zeros((x.shape[0], count, rollouts, x.shape[2], capacity, x.shape[-1]), x.dtype), keys
        )
        lanes = Lanes(keys, there, visual, past, jnp.zeros((count, rollouts), jnp.int32), last)
        return self._hold(lanes, self.layout(count, rollouts))

    def _context(self, lanes: Lanes):
        here = jnp.arange(lanes.past[0].k.shape[4]) < lanes.past_length[..., None]
        return (lanes.prompt, lanes.past), (lanes.prompt_mask[:, None, None, :], here[:, :, None, :])

    def _extend(self, params, lanes: Lanes, rows: Rows):
        """An observation as one chunk per row, each at its own offset; rows without one have length 0."""
        context, masks = self._context(lanes)
        hidden, fresh = self._run(
            params,
            rows.tokens,
            rows.positions,
            own_mask(rows),
            context=tuple(map(as_one, context)),
            context_masks=masks,
            visual=lanes.visual,
            slots=rows.slots,
        )
        count = (rows.segment > 0).sum(-1)
        last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[..., None, None], 2)[:, :, 0]
        lies = self.layout(*count.shape)
        return self._hold((self._keep(fresh), count, last), (lies.past, lies.past_length, lies.hidden))

    def _resize(self, past: tuple[Keys, ...], length: int):
        """A cache of `length` slots; what is beyond them belongs to rows that ended."""

        def cut(x):
            x = x[..., :length, :]
            return jnp.pad(x, ((0, 0),) * 4 + ((0, length - x.shape[4]), (0, 0)))

        return self._hold(jax.tree.map(cut, past), self.layout(*past[0].k.shape[1:3]).past)

    def _commit(self, past: tuple[Keys, ...], past_length, fresh: tuple[Keys, ...], count):
        """Lays `count` fresh keys and values of each row behind its past, in place. One layer after the other: moved
        all at once they would take as much memory as the cache."""
        slot = jnp.arange(past[0].k.shape[4])
        offset = past_length[..., None]
        new = (slot >= offset) & (slot < offset + count[..., None])
        source = jnp.clip(slot - offset, 0, fresh[0].k.shape[4] - 1)

        def lay(past, fresh):
            def one(layer, past):
                moved = jnp.take_along_axis(fresh[layer], source[:, :, None, :, None], 3)
                return past.at[layer].set(jnp.where(new[:, :, None, :, None], moved, past[layer]))

            return jax.lax.fori_loop(0, len(past), one, past)

        lies = self.layout(*count.shape)
        return self._hold((jax.tree.map(lay, past, fresh), past_length + count), (lies.past, lies.past_length))

    def _pick(self, lanes: Lanes, p):
        """The lanes of prompts p [P']: those whose rollouts all ended are left behind."""
        first, second = (lambda x: x[p]), (lambda x: x[:, p])
        chosen = Lanes(
            jax.tree.map(second, lanes.prompt),
            first(lanes.prompt_mask),
            Visual(first(lanes.visual.tokens), second(lanes.visual.deepstack)),
            jax.tree.map(second, lanes.past),
            first(lanes.past_length),
            first(lanes.hidden),
        )
        return self._hold(chosen, self.layout(*chosen.past_length.shape))

    def _keys(self, seed, step, prompt, rollout):
        """prompt [P], rollout [N] -> the data [P,N,2] of a random key for each dialogue."""
        key = jax.random.fold_in(jax.random.key(seed), step)
        fold = jax.vmap(jax.vmap(lambda p, n: jax.random.fold_in(jax.random.fold_in(key, p), n)))
        return jax.random.key_data(fold(*jnp.broadcast_arrays(prompt[:, None], rollout)))

    def _decode(self, params, lanes: Lanes, position, budget, state, keys, temperature, penalty: Penalty | None):
        """One stretch of a turn: samples until every row stopped, spent its budget or said rollout.decode_tokens.

        position [P,N]: M-RoPE position of the next token; budget [P,N]: tokens a row may still say, 0 for rows that
        are out; state [P,N]: of the stop automaton; keys [P,N,2]; temperature [P,N], 0 takes the likeliest; penalty:
        None where no row has one; logp is that of the temperature (0: of the plain logits), whatever the penalty.
        Returns tokens and logp [P,N,R], length and state [P,N], finished [P,N] (a stop string or the end of the turn
        was said), all of them whole on every device, then the fresh Keys and the next token's hidden state [P,N,D].
        """
        p, n = budget.shape
        most = min(self.c.protocol.action_tokens, self.c.rollout.decode_tokens)
        context, masks = self._context(lanes)
        recent = jax.tree.map(lambda x: jnp.zeros((*x.shape[:4], most, x.shape[5]), x.dtype), lanes.past)
        one = jnp.ones((p, n, 1, 1), bool)
        row, lane = jnp.arange(p)[:, None, None], jnp.arange(n)[:, None]
        layers = self.policy.config.num_hidden_layers
        # On a CPU, too, a layer's part of a stack is a copy. So stacks are taken apart here, not for each token; in the
        # loop the policy gets them as one stack again.
        unrolled = self.apart or (self.mesh.devices.flat[0].platform == "cpu" and layers <= UNROLLED)
        policy = self.policy.clone(unroll=layers) if unrolled else self.policy
        params, apart = stacked(params), one_by_one if unrolled else list
        read, recent = [apart(stacks) for stacks in ([params["layers"]], *context)], apart(recent)
        # Logits stay words first, as their product comes: turned around they would be copied for each token.
        vocabulary = self.policy.config.vocab_size
        words = "tensor" if divides(self.mesh, "tensor", vocabulary) else None
        words_first = lambda x: laid(x, self.mesh, words, *row_axes(self.mesh, p, n)[:2])  # noqa: E731
        said = None  # which words were heard in the row, and which this generation spoke: two of [V,P,N]
        if penalty is not None:
            ours = jnp.arange(penalty.heard.shape[-1]) >= penalty.since[..., None]  # of this generation
            spoken = jnp.where(ours, penalty.heard, vocabulary)
            unheard = words_first(jnp.zeros((vocabulary, p, n), bool))
            said = [unheard.at[x, row, lane].set(True, mode="drop") for x in (penalty.heard, spoken)]

        # One number for each token that may be said, all at once: in the loop the generator's many small steps add up.
        uniform = jax.vmap(jax.vmap(lambda key, i: jax.random.uniform(jax.random.fold_in(key, i))))
        places = lanes.past_length + jnp.arange(most)[:, None, None]
        chances = jax.vmap(uniform, (None, 0))(jax.random.wrap_key_data(keys), places)  # [R,P,N]

        def less(logits, said):
            if penalty is None:
                return logits
            (heard, spoken), harder = said, penalty.repetition
            scores = jnp.where(heard, jnp.where(logits > 0, logits / harder, logits * harder), logits)
            return scores - jnp.where(spoken, penalty.presence, 0.0)

        cool = 1 / jnp.where(temperature > 0, temperature, 1.0)
        silent = np.flatnonzero(~self.allowed)

        def go_on(carry):
            at, _, live, *_ = carry
            return live.any() & (at < most)

        def body(carry):
            at, hidden, live, state, tokens, logp, length, finished, recent, said = carry
            logits = words_first(self.policy.apply({"params": params}, hidden, method=Policy.next_words))
            scores = less(logits, said)
            token, total = draw(jnp.where(self.allowed[:, None, None], scores, MASKED), temperature, chances[at])
            # logp is over all words, whatever was drawn from: those that may not be said are few.
            if penalty is not None:
                total = jax.nn.logsumexp(logits * cool, 0)
            elif len(silent):
                total = jnp.logaddexp(total, jax.nn.logsumexp(logits[silent] * cool, 0))
            likely = jnp.take_along_axis(logits, token[None], 0)[0] * cool - total
            token = jnp.where(live, token, self.speaker.tokenizer.end_of_text)
            said = jax.tree.map(lambda x: x.at[token, row[..., 0], lane[:, 0]].set(True), said)
            tokens = tokens.at[:, :, at].set(token)
            logp = logp.at[:, :, at].set(jnp.where(live, likely, 0.0))
            length = length + live
            state = jnp.where(live, self.table[state, token], state)
            stopped = (state == self.stop_state) | (token[..., None] == self.ends).any(-1)
            finished = finished | (live & stopped)
            live = live & ~stopped & (length < budget)
            place = jnp.broadcast_to((position + at)[..., None, None], (p, n, 1, 3))
            kernels, *context = map(as_one, read)
            hidden, fresh = policy.apply(
                {"params": {**params, "layers": kernels}}, token[..., None], place, one, method=Policy.run,
                context=(*context, as_one(recent)),
                context_masks=(*masks, (jnp.arange(most) < at)[None, None, None, :]),
            )  # fmt: skip
            hidden, fresh = jax.lax.optimization_barrier((hidden, fresh))  # so that recent is written after it was read
            lay = lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, x, at, buffer.ndim - 2)  # noqa: E731
            recent = jax.tree.map(lay, recent, apart([fresh]))
            return at + 1, hidden[:, :, 0], live, state, tokens, logp, length, finished, recent, said

        blank = jnp.zeros((p, n), jnp.int32)
        start = (
            jnp.int32(0), lanes.hidden, budget > 0, state, jnp.zeros((p, n, most), jnp.int32),
            jnp.zeros((p, n, most), jnp.float32), blank, jnp.zeros((p, n), bool), recent, said,
        )  # fmt: skip
        _, hidden, _, state, *whole, recent, _ = jax.lax.while_loop(go_on, body, start)
        tokens, logp, length, finished = (laid(x, self.mesh) for x in whole)
        lies = self.layout(p, n)
        recent = tuple(recent) if self.apart else (as_one(recent),)
        recent, hidden = self._hold((recent, hidden), (lies.past, lies.hidden))
        return tokens, logp, length, laid(state, self.mesh), finished, recent, hidden

    # Host side

    def begin(self, params, prompts: Sequence[Prompt], rollouts: int) -> Lanes:
        """Encodes the frames and prefills the prompts, once each."""
        images = self.speaker.images(
            np.concatenate([p.patches(self.speaker) for p in prompts]), self.speaker.frame_grid
        )
        encoded = Visual(*self.encode(params, shard_batch(self.mesh, images)))
        rows = shard_batch(self.mesh, prompt_rows(prompts, self.c, self.speaker))
        return self.prefill(params, rows, encoded, rollouts=rollouts)

    def append(self, lanes: Lanes, fresh: tuple[Keys, ...], count, size: int) -> Lanes:
        """The lanes with `count` [P,N] fresh keys behind each row's past, in a cache of `size` slots.

        Those that were given can no longer be read: their cache is written to.
        """
        past = lanes.past
        if past[0].k.shape[4] != size:
            past = self.resize(past, length=size)
            jax.tree.map(lambda x: x.delete(), lanes.past)  # whoever still names it would keep two caches alive
        past, length = self.commit(past, lanes.past_length, fresh, count)
        return lanes.replace(past=past, past_length=length)

    def show(self, params, lanes: Lanes, prompts: Sequence[Prompt], fresh: Sequence[tuple[int, int]]) -> Lanes:
        """Encodes key frames asked for the first time, (lane of the prompt, fid), and lays them into the banks."""
        speaker, visual = self.speaker, lanes.visual
        count, rollouts = lanes.past_length.shape
        for start in range(0, len(fresh), 16):
            part = fresh[start : start + 16]
            size = 16
            patches = np.zeros(
                (
                    size,
                    speaker.keyframe_tokens * speaker.policy.vision.spatial_merge_size**2,
                    speaker.policy.vision.patch_dim,
                ),
                np.float32,
            )
            prompt = np.full(size, count, np.int32)  # out of range: dropped
            first = np.zeros(size, np.int32)
            for i, (lane, fid) in enumerate(part):
                patches[i] = speaker.keyframe_patches(prompts[lane].image_of(fid))
                prompt[i] = lane
                first[i] = (
                    self.c.protocol.frames * speaker.frame_tokens
                    + prompts[lane].keyframes[fid] * speaker.keyframe_tokens
                )
            tokens, deepstack = self.encode(params, speaker.images(patches, speaker.keyframe_grid))
            visual = self.insert(visual, tokens, deepstack, prompt, first, rollouts=rollouts)
        return lanes.replace(visual=visual)

    def play(
        self, params: Any, prompts: Sequence[Prompt], temperatures: Sequence[float], user: Any, *, seed: int, step: int,
        clock: Clock, max_turns: int | None = None, penalties: tuple[float, float] = NO_PENALTIES,
    ) -> list[list[Dialogue]]:  # fmt: skip
        """Dialogues [P][N], rollout n at temperatures[n]. A dialogue depends on (seed, step, sample, rollout) only.

        max_turns: tool calls, at most and by default protocol.max_turns. penalties: for repetition and presence, of
        the rollouts at temperature 0.
        """
        c, speaker = self.c, self.speaker
        calls = min(max_turns or c.protocol.max_turns, c.protocol.max_turns)
        n = len(temperatures)
        out = [[Dialogue(prompt) for _ in range(n)] for prompt in prompts]
        grid: list[list[Dialogue | None]] = [list(row) for row in out]
        number = {id(d): (i, j) for i, row in enumerate(out) for j, d in enumerate(row)}
        lane_prompts = list(prompts)

        def live(d: Dialogue | None) -> bool:
            return d is not None and d.end is None

        def per_row(value: Callable[[Dialogue], Any], default: Any, kind: Any) -> np.ndarray:
            return np.array([[value(d) if live(d) else default for d in row] for row in grid], kind)

        with clock("prefill"):
            lanes = jax.block_until_ready(self.begin(params, prompts, n))
            keys = jax.device_get(self.keys(seed, step, np.array([p.key for p in prompts], np.int32), np.arange(n)))
        for _ in range(calls + 1 + max(len(prompt.later) for prompt in prompts)):
            with clock("decode"):
                budget = per_row(
                    lambda d: min(c.protocol.action_tokens, c.protocol.response_tokens - len(d.row)), 0, np.int32
                )
                own = per_row(lambda d: keys[number[id(d)]], keys[0, 0], np.uint32)
                heat = per_row(lambda d: temperatures[number[id(d)][1]], 0.0, np.float32)
                place, held = per_row(lambda d: d.row.position, 0, np.int32), per_row(lambda d: len(d.row), 0, np.int32)
                penalty = None
                if tuple(penalties) != NO_PENALTIES:
                    before = [[d.prompt.row.tokens + d.row.tokens if live(d) else [] for d in row] for row in grid]
                    greedy = (np.where(heat > 0, off, on) for off, on in zip(NO_PENALTIES, penalties, strict=True))
                    penalty = self.penalty(before, *greedy)
                lanes, fresh, length, words, finished = self.generate(
                    params, lanes, place, held, budget, own, heat, penalty
                )
            with clock("act"):
                for i, row in enumerate(grid):
                    for j, d in enumerate(row):
                        if live(d):
                            ids, logp = words[i][j]
                            last = len(d.texts) == calls + len(d.prompt.later)
                            d.say(ids, logp, speaker, finished=bool(finished[i, j]), last=last)
                talking = [(i, d) for i, row in enumerate(grid) for d in row if live(d)]
            with clock("simulator"):
                owners = row_owners(self.mesh, len(grid), n)
                asking = {
                    i * n + j: d for i, row in enumerate(grid) for j, d in enumerate(row)
                    if live(d) and d.wants_user() and owners[i, j] == jax.process_index()
                }  # fmt: skip
                replies = simulator.answer_all(
                    user, [(d.prompt.seen_by(user), d.prompt.fids, d.actions[-1].question) for d in asking.values()]
                )
                replies = {k: r and simulator.sanitise(r) for k, r in zip(asking, replies, strict=True)}
                replies = exchange(replies, self.mesh)
                replies = {id(grid[k // n][k % n]): reply for k, reply in replies.items()}
                for _, d in talking:
                    if d.wants_user() and replies[id(d)] is None:
                        d.lost, d.end = "user", "unanswered"
                talking = [(i, d) for i, d in talking if live(d)]
            with clock("act"):
                starts, shown = {}, [(i, set(p.keyframes)) for i, p in enumerate(lane_prompts)]
                for _, d in talking:
                    starts[id(d)] = len(d.row)
                    d.observe(speaker, replies.get(id(d)))
                new = [(i, fid) for i, before in shown for fid in lane_prompts[i].keyframes if fid not in before]
            if not any(live(d) for row in grid for d in row):
                break
            with clock("extend"):
                most = max(len(d.row) for row in grid for d in row if live(d))
                size = bucket(most, c.rollout.cache_buckets)
                lanes = self.append(lanes, fresh, length, size)
                if new:
                    lanes = self.show(params, lanes, lane_prompts, new)
                grid, lane_prompts, lanes = self.compact(grid, lane_prompts, lanes, live)
                chunks = [[d.row.part(starts[id(d)]) if live(d) else Transcript() for d in row] for row in grid]
                buckets = [*c.rollout.observation_buckets, speaker.longest_observation]
                width = bucket(max(len(x) for row in chunks for x in row), buckets)
                rows = stack_rows([[[x] for x in row] for row in chunks], width, speaker.tokenizer.end_of_text)
                fresh, count, hidden = self.extend(params, lanes, shard_batch(self.mesh, rows))
                lanes = jax.block_until_ready(self.append(lanes, fresh, count, size).replace(hidden=hidden))
                fresh = None  # it is in the cache, and a turn's worth of memory
        return out

    def penalty(self, before: Sequence[Sequence[list[int]]], repetition: Array, presence: Array) -> Penalty:
        """before[p][n]: all tokens of a row before it speaks, in the prompt and after it; the others [P,N]."""
        room = self.c.protocol.prompt_tokens + max(self.c.rollout.cache_buckets)
        heard = np.full((*np.shape(repetition), room), self.policy.config.vocab_size, np.int32)
        for i, row in enumerate(before):
            for j, tokens in enumerate(row):
                heard[i, j, : len(tokens)] = tokens
        since = np.array([[len(tokens) for tokens in row] for row in before], np.int32)
        return Penalty(np.asarray(repetition, np.float32), np.asarray(presence, np.float32), heard, since)

    def generate(self, params, lanes: Lanes, position, held, budget, keys, temperature, penalty: Penalty | None = None):
        """One turn of all rows, in stretches of rollout.decode_tokens, each laid into the cache before the next.

        held [P,N]: tokens of each row so far. Returns the lanes, the fresh Keys and lengths of the last stretch, which
        are not in the cache yet, (ids, logp) of each row [P][N], and which rows finished [P,N].
        """
        p, n = budget.shape
        words: list[list[tuple[list[int], list[float]]]] = [[([], []) for _ in range(n)] for _ in range(p)]
        said, state, finished = np.zeros((p, n), np.int32), np.zeros((p, n), np.int32), np.zeros((p, n), bool)
        while True:
            left = np.where(finished, 0, budget - said)
            tokens, logp, length, state, ended, fresh, hidden = self.decode(
                params, lanes, position + said, left, state, keys, temperature, penalty
            )
            tokens, logp, length, state, ended = jax.device_get((tokens, logp, length, state, ended))
            for i in range(p):
                for j in range(n):
                    words[i][j][0].extend(tokens[i, j, : length[i, j]].tolist())
                    words[i][j][1].extend(logp[i, j, : length[i, j]].tolist())
                    if penalty is not None:
                        at = penalty.since[i, j] + said[i, j]
                        penalty.heard[i, j, at : at + length[i, j]] = tokens[i, j, : length[i, j]]
            finished |= ended
            if not ((length == left) | finished).all():
                said += length
                size = bucket(int((held + said).max()), self.c.rollout.cache_buckets)
                lanes = self.append(lanes, fresh, length, size).replace(hidden=hidden)
                fresh = None  # as in `play`
            else:
                return lanes, fresh, length, words, finished

    def compact(self, grid, lane_prompts, lanes, live):
        """Leaves ended rows behind once half of the prompts have none that goes on; the group axis stays whole."""
        p, n = len(grid), len(grid[0])
        going = [i for i in range(p) if any(live(d) for d in grid[i])]
        sizes = [p >> k for k in range(1, p.bit_length()) if p % (1 << k) == 0]
        least = self.c.rollout.least_prompts
        sizes = [size for size in sizes if size >= max(least, len(going)) and fills(self.mesh, size, n)]
        if not sizes:
            return grid, lane_prompts, lanes
        size = sizes[-1]
        chosen = (going + [i for i in range(p) if i not in going])[:size]
        lanes = self.pick(lanes, np.array(chosen, np.int32))
        return [grid[i] for i in chosen], [lane_prompts[i] for i in chosen], lanes


def frozen_generator(c: Config, path: str, mesh: Mesh) -> Callable[[str, list[list[dict]], int], list[str]]:
    """A frozen policy as a chat model, for simulator.Local: (system, messages, most tokens) -> texts, greedily.

    It goes through the programs of a rollout's first turn, `simulator.max_in_flight` messages at a time, rows over data
    and fsdp. A message holds at most protocol.frames pictures of protocol.frame_size pixels; of a prompt that is too
    long for protocol.prompt_tokens a longer program is compiled. Raises ConfigError for a policy that can not be read.
    """
    if not resolve_path(path).is_dir():
        raise ConfigError(f"simulator.path={path}: no such directory; a Hugging Face Qwen3-VL directory works")
    policy_config, params = load_policy(path, mesh, dtype=c.policy.dtype)
    policy = Policy(policy_config, False, mesh)
    params = reading_copy(policy, mesh, c.policy.dtype)(params)
    tokenizer = load_tokenizer(resolve_path(path), policy_config)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = -(-c.simulator.max_in_flight // ways) * ways
    over = NamedSharding(mesh, Spec(("data", "fsdp")))

    @functools.cache
    def sampler(most: int) -> Sampler:
        protocol = dataclasses.replace(c.protocol, action_tokens=most, keyframe_size=c.protocol.frame_size)
        rollout = dataclasses.replace(c.rollout, cache_buckets=[1, most + 1])  # nothing is said before the only turn
        speaker = Speaker(protocol, policy_config, tokenizer)
        return Sampler(dataclasses.replace(c, protocol=protocol, rollout=rollout), policy, speaker, mesh, stops=())

    def read(speaker: Speaker, system: str, message: list[dict]) -> tuple[Transcript, np.ndarray]:
        """A message as a prompt, and its pictures' patches [F, patches, patch_dim]; those it lacks are zeros."""
        row = Transcript()
        row.add(speaker.ids(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"))
        patches: list[np.ndarray] = []
        for part in message:
            if part["type"] == "text":
                row.add(tokenizer.encode(part["text"]))
            else:
                row.add(speaker.ids("<|vision_start|>"))
                row.add_image(speaker.image_token, len(patches) * speaker.frame_tokens, speaker.frame_grid)
                row.add(speaker.ids("<|vision_end|>"))
                patches.append(speaker.frame_patches(part["image"]))
        row.add(speaker.closing())
        shape = (speaker.frame_tokens * policy_config.vision.spatial_merge_size**2, policy_config.vision.patch_dim)
        patches += [np.zeros(shape, np.float32)] * (c.protocol.frames - len(patches))
        return row, np.stack(patches)

    def generate(system: str, messages: list[list[dict]], most: int) -> list[str]:
        there, texts = sampler(most), []
        none = np.zeros((batch, 1), np.int32)
        for start in range(0, len(messages), batch):
            part = [read(there.speaker, system, message) for message in messages[start : start + batch]]
            rows, patches = zip(*part, *[part[-1]] * (batch - len(part)), strict=True)
            length = max(map(len, rows))
            length = max(c.protocol.prompt_tokens, -(-length // 256) * 256)  # few shapes
            images = there.speaker.images(np.concatenate(patches), there.speaker.frame_grid)
            stacked = stack_rows([[[row]] for row in rows], length, tokenizer.end_of_text)
            images, stacked = jax.device_put((images, stacked), over)
            lanes = there.prefill(params, stacked, Visual(*there.encode(params, images)), rollouts=1)
            position = np.array([[row.position] for row in rows], np.int32)
            keys, heat = there.keys(0, 0, none[:, 0], none[0]), none.astype(np.float32)
            *_, words, _ = there.generate(params, lanes, position, none, none + most, keys, heat)
            for i in range(len(part)):
                text = tokenizer.decode(words[i][0][0])
                texts.append(text.removesuffix("<|im_end|>").removesuffix("<|endoftext|>"))
        return texts

    return generate


def prompt_rows(prompts: Sequence[Prompt], config: Config, speaker: Speaker) -> Rows:
    return stack_rows([[[p.row]] for p in prompts], config.protocol.prompt_tokens, speaker.tokenizer.end_of_text)


# ======================================================================================================
# 6  Rewards
# ======================================================================================================


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes with inclusive pixels; 0 unless they strictly overlap (METHOD.md 3.1)."""
    x1, y1, x2, y2 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    if not (x1 < x2 and y1 < y2):
        return 0.0
    inter = (x2 - x1 + 1) * (y2 - y1 + 1)
    area = lambda r: (r[2] - r[0] + 1) * (r[3] - r[1] + 1)  # noqa: E731
    union = area(a) + area(b) - inter
    return inter / union if math.isfinite(union) and union > 0 else 0.0


def localisation_rewards(
    frame: int | np.integer | None, box: Sequence[float] | Array | None, point: Sequence[float] | Array | None,
    truth: Mapping, *,
    iou: float = 0.5, box_l1: float = 10, point_l2: float = 100,
) -> dict[str, float]:  # fmt: skip
    """The four terms of the trajectory level, each in [0,1] (METHOD.md 3.1).

    frame: chosen frame id; box (x1,y1,x2,y2), point (x,y) in thousandths of the frame, None when the answer did not
    parse; truth: {fid: {bbox_2d, point_2d, area, max_conn_area}}. All terms are 0 when the frame does not hold the
    target or something is missing. Thresholds: IoU above `iou`, mean coordinate error below `box_l1`, point inside
    the predicted box and nearer than `point_l2`. frame: the largest connected part of the target on that frame, over
    the same on the best of the shown ones.
    """
    nothing = {"iou": 0.0, "box": 0.0, "point": 0.0, "frame": 0.0}
    found = truth.get(str(frame), truth.get(frame)) if frame is not None else None
    if found is None or box is None or point is None:
        return nothing
    box, point = [float(x) for x in box], [float(x) for x in point]
    if not all(map(math.isfinite, (*box, *point))):
        return nothing
    best, centre = found["bbox_2d"], found["point_2d"]
    error = sum(abs(p - t) for p, t in zip(box, best, strict=True)) / 4
    inside = box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
    near = math.hypot(point[0] - centre[0], point[1] - centre[1]) < point_l2
    return {
        "iou": float(box_iou(box, best) > iou),
        "box": float(error < box_l1),
        "point": float(inside and near),
        "frame": float(found["max_conn_area"]),
    }


@functools.partial(jax.jit, static_argnames="kind")
def turn_gains(counts: Array, asked: Array, *, kind: str = "reduction") -> jax.Array:
    """How much each question shrank the candidates, in [0,1] (METHOD.md 3.3).

    counts [...,Q+1]: candidates before the first question and after each; asked [...,Q]: slots that hold a call,
    well-formed or not. Returns [...,Q], 0 where nothing was asked. reduction: (a-b)/(a-1); ratio: 1-b/a; log:
    log(a/b)/log(a); the other kinds of `process_reward` use reduction. Raises ValueError for an unknown kind.
    """
    if kind not in TURN_KINDS:
        raise ValueError(f"turn gain {kind!r} is unknown; use one of {', '.join(TURN_KINDS)}")
    counts = jnp.asarray(counts, jnp.float32)
    before, after = counts[..., :-1], counts[..., 1:]
    several = before > 1
    safe, left = jnp.maximum(before, 2.0), jnp.maximum(after, 1.0)
    if kind == "ratio":
        gain = 1 - left / safe
    elif kind == "log":
        gain = jnp.log(safe / left) / jnp.log(safe)
    else:
        gain = (safe - left) / (safe - 1)
    return jnp.where(several & jnp.asarray(asked, bool), gain, 0.0)


@functools.partial(jax.jit, static_argnames=("kind", "redundant_cost"))
def process_reward(
    counts: Array, asked: Array, well_formed: Array, ambiguous: Array, *, kind: str = "reduction",
    redundant_cost: float = 0.1,
) -> jax.Array:  # fmt: skip
    """The turn level's term R_proc in [0,1] (METHOD.md 3.3).

    counts c [...,Q+1], asked [...,Q], well_formed [...] (the format term R_fmt), ambiguous [...]: the sample needs a
    question; leading axes broadcast. With K questions of gains g (`turn_gains`), and c_K candidates left at the end:
    reduction, ratio, log: R_fmt * mean(g); resolution_x_efficiency: R_fmt * (c_0-c_K)/(c_0-1) * #{g > 0}/K; linear:
    R_fmt * max(0, (c_0-c_K)/(c_0-1) - redundant_cost * #{g = 0}). For these, K = 0 gives 0 to a guess (ambiguous, c_0 >
    1), else R_fmt. format: R_fmt. parent_tpr, the parent's term, which rewards calls: 1 - 0.3^(min(K,10) + R_fmt) when
    ambiguous, else R_fmt; malformed calls count, which the parent leaves out. Raises ValueError for an unknown kind.
    """
    if kind not in TURN_KINDS:
        raise ValueError(f"process reward {kind!r} is unknown; use one of {', '.join(TURN_KINDS)}")
    counts, asked = jnp.asarray(counts, jnp.float32), jnp.asarray(asked, bool)
    fmt, ambiguous = jnp.asarray(well_formed, jnp.float32), jnp.asarray(ambiguous, bool)
    lead = jnp.broadcast_shapes(counts.shape[:-1], asked.shape[:-1], fmt.shape, ambiguous.shape)
    counts, asked = (jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (counts, asked))
    fmt, ambiguous = jnp.broadcast_to(fmt, lead), jnp.broadcast_to(ambiguous, lead)
    if kind == "format":
        return fmt
    questions = asked.sum(-1)
    if kind == "parent_tpr":
        return jnp.where(ambiguous, 1 - 0.3 ** (jnp.minimum(questions, 10) + fmt), fmt)
    gains = turn_gains(counts, asked, kind=kind)
    each = jnp.maximum(questions, 1)
    slots = asked.shape[-1]
    ended = jnp.where(asked.any(-1), slots - jnp.argmax(asked[..., ::-1], -1), 0)  # slot after the last question
    last = jnp.take_along_axis(counts, ended[..., None], -1)[..., 0]
    first, last = jnp.maximum(counts[..., 0], 1.0), jnp.maximum(last, 1.0)
    resolution = jnp.where(first > 1, (first - last) / jnp.maximum(first - 1, 1.0), 0.0)
    if kind == "resolution_x_efficiency":
        earned = resolution * (gains > 0).sum(-1) / each
    elif kind == "linear":
        earned = jnp.maximum(resolution - redundant_cost * (asked & (gains <= 0)).sum(-1), 0.0)
    else:
        earned = gains.sum(-1) / each
    return jnp.where(questions > 0, fmt * earned, jnp.where(ambiguous & (counts[..., 0] > 1), 0.0, fmt))


MOST = 10**6  # more candidates than any scene holds: an expert's count is cut there


def check_counts(counts: Any, initial: int, questions: int) -> tuple[list[int], bool]:
    """The expert's counts made fit for use: `questions + 1` of them, non-increasing, never below 1 (METHOD.md 2.2).

    `initial`: the sample's own count, which wins when known (>= 0; 0 marks a sample without a target, all counts 0).
    Returns (counts, whether the expert's were usable as they came). What holds no counts at all gives `initial` over
    and over: see `readable_counts`.
    """
    values = list(counts) if readable_counts(counts) else []
    ok = len(values) == questions + 1
    if initial == 0:
        return [0] * (questions + 1), ok
    first = initial if initial > 0 else min(max(values[0], 1), MOST) if values else 1
    out = [first]
    for k in range(1, questions + 1):
        value = values[k] if k < len(values) else out[-1]
        out.append(min(max(value, 1), out[-1]))
    return out, ok and out == values


class Scores(struct.PyTreeNode):
    """What the rollouts of one step earned, [P, N, ...]; Q question slots."""

    terms: dict[str, Array]  # each [P,N], in [0,1]
    counts: Array  # [P,N,Q+1] int32, the last repeated
    asked: Array  # [P,N,Q] bool
    asked_in: Array  # [P,N,Q] int32: the generation of each question, -2 where none was asked or its count is unknown
    well_formed: Array  # [P,N] bool
    ambiguous: Array  # [P,N] bool
    valid: Array  # [P,N] bool: False where the segmenter failed, or the user or the expert did not answer in time


def wanted_mask(sample: data.Sample, answer: Action) -> str:
    """modal | amodal: what the answer names, where its query's wording chooses (DATA.md 2.3); else what is seen."""
    return (sample.mask_type and answer.mask_type) or "modal"


class MaskReward:
    """IoU of SAM2's mask with the truth, reached from a jitted function by a host callback.

    Across the callback travel ids, boxes and points, and a float per row comes back. It runs under shard_map, so each
    host's sidecar sees its own rows only, once: of devices that hold the same rows the first asks. Its body touches no
    JAX, and nothing is gathered in the same program, since devices wait for each other there, and not for long. A row
    whose sidecar failed twice comes back invalid.
    """

    def __init__(self, client: SegmenterClient, mesh: Mesh):
        self.client = client
        self.videos: list[str] = []
        rows = Spec(("data", "fsdp"))
        try:
            jax.local_devices(backend="cpu")
        except RuntimeError:
            raise ConfigError(f"JAX_PLATFORMS={jax.config.jax_platforms}: the mask reward's host callback needs the "
                              f"CPU too; use JAX_PLATFORMS={jax.config.jax_platforms},cpu") from None

        def ask(index, frame, box, point, amodal, wanted):
            index, frame, box, point, amodal, wanted = map(np.asarray, (index, frame, box, point, amodal, wanted))
            iou, valid = np.zeros(len(index), np.float32), np.ones(len(index), bool)
            where = np.flatnonzero(wanted)
            if len(where):
                kinds = np.where(amodal, "amodal", "modal").tolist()
                rows = [
                    {"video": self.videos[index[i]], "frame": int(frame[i]), "mask_type": kinds[i]}
                    | {"box": box[i].tolist(), "point": point[i].tolist()}
                    for i in where
                ]
                iou[where], valid[where] = self.client.mask_iou(rows)
            return iou, valid

        def local(*args):
            *asked, wanted = args
            n = wanted.shape[0]
            shapes = (jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.bool_))
            return jax.experimental.io_callback(ask, shapes, *asked, wanted & (jax.lax.axis_index("tensor") == 0))

        self._score = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=Spec(AXES), check_vma=False))
        self._shards, self._tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]

    def __call__(self, dialogues: Sequence[Sequence[Dialogue]]) -> tuple[np.ndarray, np.ndarray]:
        """dialogues [P][N] -> IoU [P,N] in [0,1] and valid [P,N]."""
        self.videos = [row[0].prompt.sample.id for row in dialogues]
        flat = [(p, d) for p, row in enumerate(dialogues) for d in row]
        size = -(-len(flat) // self._shards) * self._shards
        index, frame = np.zeros(size, np.int32), np.zeros(size, np.int32)
        box, point = np.zeros((size, 4), np.float32), np.zeros((size, 2), np.float32)
        amodal, wanted = np.zeros(size, bool), np.zeros(size, bool)
        shown = set()
        for i, (p, d) in enumerate(flat):
            if d.answer is None or d.frame is None or d.frame < 0 or str(d.frame) not in d.prompt.truth:
                continue
            index[i], frame[i], wanted[i] = p, d.frame, True
            box[i], point[i] = np.clip(d.answer.box, 0, 1000), np.clip(d.answer.point, 0, 1000)
            amodal[i] = wanted_mask(d.prompt.sample, d.answer) == "amodal"
            if (p, d.frame) not in shown:
                shown.add((p, d.frame))
                position = d.prompt.positions[d.prompt.fids.index(d.frame)]
                self.client.register(
                    self.videos[p], d.frame, d.prompt.image_of(d.frame), d.prompt.sample.truth(position)
                )
        told = map(to_host, self._score(index, frame, box, point, amodal, wanted))
        iou, valid = (x.reshape(self._shards, self._tensor, -1)[:, 0].ravel() for x in told)
        form = (len(dialogues), len(dialogues[0]))
        return np.array(iou[: len(flat)]).reshape(form), np.array(valid[: len(flat)]).reshape(form)


def score(
    dialogues: Sequence[Sequence[Dialogue]], config: Config, expert: Any, mask_reward: MaskReward | None,
    owners: np.ndarray | None = None,
) -> tuple[Scores, list[list[str]], dict[str, float]]:  # fmt: skip
    """Rewards of every rollout, the expert's guidance for each ("" for none), and what went wrong on the way.

    The expert looks at every dialogue that asked something (METHOD.md 2.2), in the process that `owners` [P,N] names;
    None: in this one. Without mask_reward that term is 0. A dialogue that the user or the expert left without an answer
    is `lost`, and not valid.
    """
    c = config.reward
    p, n = len(dialogues), len(dialogues[0])
    slots = max(1, config.protocol.max_turns)
    terms = {name: np.zeros((p, n), np.float32) for name in TERMS}
    counts = np.zeros((p, n, slots + 1), np.int32)
    asked, asked_in = np.zeros((p, n, slots), bool), np.full((p, n, slots), -2, np.int32)
    formed, ambiguous, valid = np.zeros((p, n), bool), np.zeros((p, n), bool), np.ones((p, n), bool)
    unread = np.zeros((p, n), bool)
    guidance = [["" for _ in row] for row in dialogues]
    faults = dict.fromkeys(
        ("diagnosed", "counts_repaired", "counts_unreadable", "guidance_refused", "segmenter_failed")
        + ("user_failed", "expert_failed"),
        0,
    )
    faults["user_unable"] = sum(
        answer == simulator.UNABLE for row in dialogues for d in row for question, answer in d.questions if question
    )
    asking = {
        i * n + j: d for i, row in enumerate(dialogues) for j, d in enumerate(row)
        if d.questions and not d.lost and (owners is None or owners[i, j] == jax.process_index())
    }  # fmt: skip
    found = simulator.diagnose_all(
        expert, [(d.prompt.seen_by(expert), d.prompt.fids, d.questions) for d in asking.values()]
    )
    told = {k: f and (f.counts, f.guidance) for k, f in zip(asking, found, strict=True)}
    told = told if owners is None else exchange(told)
    for i, row in enumerate(dialogues):
        for j, d in enumerate(row):
            prompt = d.prompt
            parts = localise(d, c)
            for name, value in parts.items():
                terms[name][i, j] = value
            raw: Any = [max(prompt.initial_count, 1)]
            diagnosis = told.get(i * n + j)
            if i * n + j in told and diagnosis is None:
                d.lost = "expert"
            if d.lost:
                faults[f"{d.lost}_failed"] += 1
            if diagnosis is not None:
                faults["diagnosed"] += 1
                raw, advice = diagnosis
                unread[i, j] = not readable_counts(raw)
                if unread[i, j]:
                    faults["counts_unreadable"] += 1
                elif advice and simulator.leaks(
                    advice, prompt.graph or simulator.giveaways(prompt.sample, d.questions)
                ):
                    faults["guidance_refused"] += 1
                else:
                    guidance[i][j] = advice or ""
            k = min(len(d.questions), slots)
            used, as_came = check_counts(raw, 0 if prompt.no_target else prompt.initial_count, k)
            faults["counts_repaired"] += diagnosis is not None and not unread[i, j] and not as_came
            for turn, (question, _) in enumerate(d.questions[:k]):
                if not question:  # an invalid call repeats its count, whatever a model says (METHOD.md 3.3)
                    used[turn + 1] = used[turn]
            counts[i, j] = used + [used[-1]] * (slots - k)
            asked[i, j, :k] = True
            if not unread[i, j]:
                asked_in[i, j, :k] = d.asked_in[:k]
            formed[i, j] = d.well_formed
            ambiguous[i, j] = prompt.initial_count > 1
    if mask_reward is not None:
        terms["mask"], valid = mask_reward(dialogues)
        for i, row in enumerate(dialogues):
            for j, d in enumerate(row):
                if c.no_target and d.prompt.no_target:
                    terms["mask"][i, j] = terms["iou"][i, j]
        faults["segmenter_failed"] = int((~valid).sum())
    valid = valid & ~np.array([[bool(d.lost) for d in row] for row in dialogues])
    process = process_reward(counts, asked, formed, ambiguous, kind=c.process, redundant_cost=c.redundant_cost)
    format_only = unread | (~asked.any(-1) if c.no_question == "format" else False)
    terms["process"] = np.where(format_only, formed, process).astype(np.float32)
    return Scores(terms, counts, asked, asked_in, formed, ambiguous, valid), guidance, faults


def localise(d: Dialogue, c: RewardSection) -> dict[str, float]:
    """The trajectory terms of one dialogue, no-target samples included (METHOD.md 3.1, 11.4)."""
    answer = d.answer
    if d.prompt.no_target and c.no_target:
        right = d.frame == -1 and answer is not None and not any((*answer.box, *answer.point))
        return dict.fromkeys(("iou", "box", "point", "frame"), float(right))
    if answer is None:
        return dict.fromkeys(("iou", "box", "point", "frame"), 0.0)
    return localisation_rewards(
        d.frame, answer.box, answer.point, d.prompt.truth, iou=c.iou, box_l1=c.box_l1, point_l2=c.point_l2
    )


def total_return(scores: Scores, config: Config) -> Array:
    """R [P,N]: the weighted sum of the terms (METHOD.md 3.4, 11.1)."""
    return sum(config.reward.weights.get(name, 0.0) * scores.terms[name] for name in TERMS)


def shared_return(scores: Scores, config: Config) -> Array:
    """What of R [P,N] belongs to the whole rollout: all of it, or, where each question earns its own
    (`credit.turn_credit: local`), with the format term in place of the process term (METHOD.md 4.3)."""
    if config.credit.turn_credit == "local":  # never added, so that equal returns stay equal to the last bit
        scores = scores.replace(terms={**scores.terms, "process": np.asarray(scores.well_formed, np.float32)})
    return total_return(scores, config)


def group_spread(values: Array, valid: Array) -> np.ndarray:
    """Standard deviation [P] (ddof 1, float64) of values [P,N] over each group's valid rows; 0 with fewer than two."""
    kept = np.ma.masked_array(np.asarray(values, np.float64), ~np.asarray(valid, bool))
    return np.ma.filled(kept.std(-1, ddof=1), 0.0)


# ======================================================================================================
# 7  Hi-GRPO: three levels of credit
# ======================================================================================================


def group_advantages(
    returns: Array, *, valid: Array | None = None, normalise_std: bool = True, eps: float = 1e-6
) -> jax.Array:
    """Trajectory and turn level: returns [P,N] relative to their group (METHOD.md 4.2).

    A = (R - mean) / (std + eps), std with ddof 1; a group of one has mean 0 and std 1. Invalid rows get 0 and stay
    outside mean and std. A group of equal returns is exactly 0: each row is measured from the group's first valid one
    before anything is averaged.
    """
    returns = jnp.asarray(returns)
    returns = returns.astype(jnp.promote_types(returns.dtype, jnp.float32))
    valid = jnp.broadcast_to(True if valid is None else jnp.asarray(valid, bool), returns.shape)
    count = valid.sum(-1, keepdims=True)
    first = jnp.take_along_axis(returns, jnp.argmax(valid, -1)[..., None], -1)
    alone = count <= 1
    shifted = jnp.where(valid, returns - jnp.where(alone, 0.0, first), 0.0)
    mean = jnp.where(alone, 0.0, shifted.sum(-1, keepdims=True) / jnp.maximum(count, 1))
    centred = jnp.where(valid, shifted - mean, 0.0)
    if not normalise_std:
        return centred
    variance = (centred**2).sum(-1, keepdims=True) / jnp.maximum(count - 1, 1)
    std = jnp.where(alone, 1.0, jnp.sqrt(variance))
    return centred / (std + eps)


def step_weights(
    advantages: Array, logp_teacher: Array, logp_student: Array, has_context: Array, *, clip: float = 0.2
) -> jax.Array:
    """Step level: how much of its credit each token gets (METHOD.md 4.4, RLSD).

    w = clip(exp(sign(A) * (logp_teacher - logp_student)), 1 - clip, 1 + clip), detached; 1 in rows without context.
    advantages, logp [...,T]; has_context [...]. With A > 0 tokens that the guided teacher likes get more credit, with
    A < 0 they are blamed less.
    """
    delta = jnp.clip(jnp.asarray(logp_teacher, jnp.float32) - jnp.asarray(logp_student, jnp.float32), -20, 20)
    weight = jnp.clip(jnp.exp(jnp.sign(advantages) * delta), 1 - clip, 1 + clip)
    return jax.lax.stop_gradient(jnp.where(jnp.asarray(has_context, bool)[..., None], weight, 1.0))


def modulate(advantages: Array, weights: Array, lam: Array | float) -> jax.Array:
    """A_hat = A * ((1 - lam) + lam * w): weights are positive, so signs never change (METHOD.md 4.4).

    Written so that lam 0, and a weight of 1, leave A as it is to the last bit.
    """
    weights = jnp.asarray(weights)
    return jnp.asarray(advantages) * jnp.where(weights == 1, 1.0, (1 - lam) + lam * weights)


def turn_advantages(gains: Array, asked: Array, *, eps: float = 1e-6) -> jax.Array:
    """Turn level as its own advantage: each question against all questions of its group (METHOD.md 4.3).

    gains, asked [P,N,Q] -> [P,N,Q]: (gain - mean) / (std + eps) over the group's questions, std with ddof 1. 0 where
    nothing was asked, and in a group with fewer than two questions.
    """
    asked, gains = jnp.asarray(asked, bool), jnp.asarray(gains, jnp.float32)
    count = asked.sum((-2, -1), keepdims=True)
    # Measured from the largest, so that equal gains are exactly 0 and not what rounding left of their mean.
    most = jnp.where(asked, gains, -jnp.inf).max((-2, -1), keepdims=True)
    gains = jnp.where(asked, gains - most, 0.0)
    mean = gains.sum((-2, -1), keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(asked, gains - mean, 0.0)
    std = jnp.sqrt((centred**2).sum((-2, -1), keepdims=True) / jnp.maximum(count - 1, 1))
    return jnp.where(count >= 2, centred / (std + eps), 0.0)


@jax.jit
def on_question_turns(values: Array, asked_in: Array, turn: Array) -> jax.Array:
    """A value per question [P,N,Q] laid on the tokens of the generation that asked it.

    asked_in [P,N,Q]: number of that generation, -2 for none; turn [P,N,T]: generation of each token, -1 outside.
    Returns [P,N,T], 0 on all other tokens.
    """
    here = jnp.asarray(turn)[..., None] == jnp.asarray(asked_in)[..., None, :]
    return (here * jnp.asarray(values)[..., None, :]).sum(-1)


def weighed_tokens(c: CreditSection, tokens: Array, mask: Array, has_context: Array, asked_in: Array, turn: Array
                   ) -> Array:
    """[P,N,T]: the tokens that the step level weighs, all others keep weight 1. tokens [P,N,T]: their advantages."""
    weighed = jnp.asarray(mask) & jnp.asarray(has_context)[..., None]
    if c.weigh == "questions":
        weighed = weighed & (on_question_turns(asked_in >= 0, asked_in, turn) > 0)
    if c.vanilla_on_nonnegative_adv:
        weighed = weighed & (tokens < 0)
    return weighed


@functools.partial(jax.jit, static_argnames="c")
def hierarchical_advantages(
    c: CreditSection,
    returns: Array,
    valid: Array,
    gains: Array,
    asked_in: Array,
    turn: Array,
    mask: Array,
    logp_teacher: Array,
    logp_student: Array,
    has_context: Array,
    lam: Array | float,
) -> tuple[jax.Array, jax.Array]:
    """All three levels: from what rollouts earned to an advantage for each token (METHOD.md 4.2-4.4).

    returns, valid, has_context [P,N]; gains, asked_in [P,N,Q]; turn, mask, logp [P,N,T]. Returns the token advantages
    and the step level's weights, both [P,N,T]. Under `turn_credit: local`, `returns` holds the format term in place of
    the process term.
    """
    advantages = group_advantages(returns, valid=valid, normalise_std=c.normalise_std)
    tokens = advantages[..., None] * mask
    if c.turn_credit == "local":
        turns = turn_advantages(gains, (asked_in >= 0) & valid[..., None])
        tokens = tokens + c.turn_weight * on_question_turns(turns, asked_in, turn) * mask
    weight = step_weights(tokens, logp_teacher, logp_student, has_context, clip=c.weight_clip)
    weighed = weighed_tokens(c, tokens, mask, has_context, asked_in, turn)
    weight = jnp.where(weighed, weight, 1.0)
    if c.normalize_weight_by_seq_mean:  # over the tokens that are weighed; the others keep 1
        mean = jnp.where(weighed, weight, 0.0).sum(-1, keepdims=True) / jnp.maximum(weighed.sum(-1, keepdims=True), 1)
        weight = jnp.where(weighed, weight / jnp.maximum(mean, 1e-6), 1.0)
    return modulate(tokens, weight, lam), weight


def teaching_groups(scores: Scores, c: Config) -> np.ndarray:
    """[P] bool: groups from which the update learns something. The others are replaced (METHOD.md 4.7)."""
    if c.update.loss == "sdpo":  # without a reward gradient a group of equal returns teaches as well as any
        return np.ones(len(scores.valid), bool)
    valid = scores.valid & (scores.valid.sum(-1, keepdims=True) >= 2)  # as in `token_credit`
    spread = group_spread(shared_return(scores, c), valid) > 1e-6
    if c.credit.turn_credit == "local":
        gains = turn_gains(scores.counts, scores.asked, kind=c.reward.process)
        turns = turn_advantages(gains, (scores.asked_in >= 0) & valid[..., None])
        spread = spread | (np.asarray(turns) != 0).any((-2, -1))
    return spread


def teacher_contexts(
    dialogues: Sequence[Sequence[Dialogue]], returns: Array, guidance: Sequence[Sequence[str]], config: Config
) -> list[list[str]]:
    """What each rollout's teacher reads after the query; "" for nothing (METHOD.md 4.5).

    A solution is the transcript of the first sibling whose return reaches `reward.success` of the maximum.
    """
    kind = config.credit.teacher_context
    enough = config.reward.success * sum(max(w, 0.0) for w in config.reward.weights.values())
    out: list[list[str]] = []
    for row, earned, advice in zip(dialogues, np.asarray(returns), guidance, strict=True):
        out.append([])
        for j, told in enumerate(advice):
            solution = feedback = ""
            if kind in ("solution", "solution_else_guidance", "both"):
                solved = [d for k, d in enumerate(row) if k != j and earned[k] >= enough]
                solution = SOLUTION.format(solution=solved[0].transcript()) if solved else ""
            if told and (kind in ("guidance", "both") or (kind == "solution_else_guidance" and not solution)):
                feedback = GUIDANCE.format(guidance=told)
            out[-1].append(solution + feedback)
    return out


def step_strength(c: CreditSection, step: Array | int) -> Array:
    """lam at a global step: lam until lam_start, then linearly to 0 over lam_decay steps (METHOD.md 4.4)."""
    return c.lam * np.clip(1 - (step - c.lam_start) / c.lam_decay, 0.0, 1.0)


def policy_loss(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 3.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped surrogate with dual clip, mean over the tokens of `mask` (METHOD.md 4.6). All [...,T], broadcast, fp32.

    rho = exp(logp - old), its exponent within 20 of 0; l = max(-A rho, -A clip(rho, 1-clip_low, 1+clip_high)), and
    where A < 0 at most -A dual_clip.
    Returns the scalar and stats: ratio, clip_fraction, kl (KL(old|new), k3 estimator). Masked tokens touch neither
    value nor gradient, whatever they hold; an empty mask gives 0.
    """
    logp, old_logp, advantages = (jnp.asarray(x, jnp.float32) for x in (logp, old_logp, advantages))
    shape = jnp.broadcast_shapes(logp.shape, old_logp.shape, advantages.shape, jnp.shape(mask))
    mask = jnp.broadcast_to(jnp.asarray(mask).astype(bool), shape)  # its sum is the number of tokens
    old_logp = jax.lax.stop_gradient(jnp.where(mask, old_logp, 0.0))
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
    change = jnp.clip(jnp.where(mask, logp, 0.0) - old_logp, -20, 20)
    ratio = jnp.exp(change)
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = jnp.maximum(plain, clipped)
    loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)
    total = jnp.maximum(mask.sum(), 1)
    mean = lambda x: jnp.where(mask, x, 0.0).sum() / total  # noqa: E731
    return mean(loss), {
        "ratio": mean(ratio),
        "clip_fraction": mean((clipped > plain).astype(jnp.float32)),
        "kl": mean(jnp.exp(change) - 1 - change),
    }


def sdpo_loss(
    student_topk_logp: Array,
    teacher_topk_logp: Array,
    logp: Array,
    old_logp: Array,
    mask: Array,
    *,
    alpha: float = 0.5,
    is_clip: float = 2.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Self-distillation: generalised Jensen-Shannon divergence over the student's top k and one tail bucket.

    student and teacher [...,T,k] at the same ids; logp, old_logp, mask [...,T]. m = (1-alpha) p_S + alpha p_T,
    D = (1-alpha) KL(p_S|m) + alpha KL(p_T|m); alpha 0 is KL(p_T|p_S), 1 is KL(p_S|p_T). Weighted by the detached
    importance ratio, capped at is_clip, then mean over `mask` (METHOD.md 4.10).
    """
    logp, old_logp = jnp.asarray(logp, jnp.float32), jnp.asarray(old_logp, jnp.float32)
    shape = jnp.broadcast_shapes(logp.shape, old_logp.shape, jnp.shape(mask), student_topk_logp.shape[:-1])
    mask = jnp.broadcast_to(jnp.asarray(mask).astype(bool), shape)

    def with_tail(x):
        x = jnp.where(mask[..., None], jnp.asarray(x, jnp.float32), -1.0)
        inside = jnp.minimum(jax.nn.logsumexp(x, -1, keepdims=True), -1e-7)
        return jnp.concatenate([x, jnp.log(-jnp.expm1(inside))], -1)

    s, t = with_tail(student_topk_logp), jax.lax.stop_gradient(with_tail(teacher_topk_logp))
    kl = lambda a, b: (jnp.exp(a) * (a - b)).sum(-1)  # noqa: E731
    if alpha == 0:
        divergence = kl(t, s)
    elif alpha == 1:
        divergence = kl(s, t)
    else:
        m = jnp.logaddexp(s + math.log(1 - alpha), t + math.log(alpha))
        divergence = (1 - alpha) * kl(s, m) + alpha * kl(t, m)
    change = jnp.where(mask, logp - old_logp, 0.0)
    ratio = jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.clip(change, -20, 20)), is_clip))
    total = jnp.maximum(mask.sum(), 1)
    mean = lambda x: jnp.where(mask, x, 0.0).sum() / total  # noqa: E731
    return mean(divergence * ratio), {"divergence": mean(divergence), "ratio": mean(ratio)}


# ======================================================================================================
# 8  Update
# ======================================================================================================


class Batch(struct.PyTreeNode):
    """What a forward pass over whole transcripts needs. Images lie flat, P * F and P * keyframes of them."""

    prompts: Rows  # [P, 1, S]
    rows: Rows  # [P, N, T]
    frames: Images | None  # None: text alone, or encoded already
    keyframes: Images | None
    visual: Visual | None = None  # the images, encoded; prompts come first: deepstack [P, taps, B, D]


def encode_bank(encode: Callable[[Images], tuple[Array, Array]], images: Sequence[Images], prompts: int) -> Visual:
    """Images of several sizes, each flat over the prompts -> `Batch.visual`: one bank per prompt, sizes one after the
    other; tokens [P, B, D], deepstack [P, taps, B, D]."""
    tokens, deepstack = [], []
    for batch in images:
        merged, deep = encode(batch)
        tokens.append(merged.reshape(prompts, -1, merged.shape[-1]))
        deepstack.append(deep.reshape(deep.shape[0], prompts, -1, merged.shape[-1]).swapaxes(0, 1))
    return Visual(jnp.concatenate(tokens, 1), jnp.concatenate(deepstack, 2))


def predict(
    policy: Policy,
    params: Any,
    batch: Batch,
    *,
    share_prefix: bool = True,
    freeze_vision: bool = False,
) -> Array:
    """Hidden states [P,N,T,D], each the one that predicts the token in its place.

    With share_prefix each prompt is run once and the rollouts attend to its keys and values; without, each rollout
    runs its prompt again. Same numbers, fewer tokens (DESIGN: about 2.8 times at the released lengths).
    """
    run = functools.partial(policy.apply, {"params": params}, method=Policy.run)
    images, visual = [x for x in (batch.frames, batch.keyframes) if x is not None], batch.visual
    if images:
        encode = functools.partial(policy.apply, {"params": params}, method=Policy.encode)
        visual = encode_bank(encode, images, batch.prompts.tokens.shape[0])
    if freeze_vision:
        visual = jax.lax.stop_gradient(visual)
    prompts, rows = batch.prompts, batch.rows
    p, n, length = rows.tokens.shape
    if visual is not None:
        alone = row_axes(policy.mesh, p, 1)[0]
        deepstack = laid(visual.deepstack.swapaxes(0, 1), policy.mesh, None, alone)
        visual = Visual(laid(visual.tokens, policy.mesh, alone), deepstack)
    there = prompts.segment > 0
    last = jnp.maximum(there.sum(-1) - 1, 0)[..., None, None]  # [P,1,1,1]
    if share_prefix:
        before, keys = run(prompts.tokens, prompts.positions, own_mask(prompts), visual=visual, slots=prompts.slots)
        # Held where the rollouts read them: XLA's own way there from the prompts' layout computes wrong slopes on a
        # mesh with all three axes above one (jax 0.10.2, with Shardy and without).
        heads = "tensor" if divides(policy.mesh, "tensor", policy.config.num_key_value_heads) else None
        axes = (None, row_axes(policy.mesh, p, n)[0], heads)
        keys = jax.tree.map(lambda x: laid(x[:, :, 0], policy.mesh, *axes), keys)
        hidden, _ = run(
            rows.tokens, rows.positions, own_mask(rows), visual=visual, slots=rows.slots,
            context=(keys,), context_masks=(there[:, :, None, :],),
        )  # fmt: skip
        before = laid(jnp.take_along_axis(before, last, 2), policy.mesh, row_axes(policy.mesh, p, n)[0])
    else:
        tile = lambda x, axis: jnp.repeat(x, n, axis=axis)  # noqa: E731
        size = prompts.tokens.shape[-1]
        whole = own_mask(rows)
        head = tile(own_mask(prompts), 1)
        mask = jnp.concatenate([
            jnp.concatenate([head, jnp.zeros((p, n, size, length), bool)], -1),
            jnp.concatenate([jnp.broadcast_to(there[:, :, None, :], (p, n, length, size)), whole], -1),
        ], -2)  # fmt: skip
        join = lambda a, b: jnp.concatenate([tile(a, 1), b], 2)  # noqa: E731
        hidden, _ = run(
            join(prompts.tokens, rows.tokens), join(prompts.positions, rows.positions), mask,
            visual=visual, slots=join(prompts.slots, rows.slots),
        )  # fmt: skip
        before = jnp.take_along_axis(hidden, last, 2)
        hidden = hidden[:, :, size:]
    # The prompt's last token predicts the first one of every segment.
    last_segment = jnp.pad(rows.segment, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    shifted = jnp.pad(hidden, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
    return jnp.where((rows.segment != last_segment)[..., None], before, shifted)


def token_logp(
    policy: Policy, params: Any, hidden: Array, tokens: Array, chunk: int, spread: tuple[Array, Array] | None = None,
    *, temperature: float = 1.0,
) -> tuple[Array, Array]:  # fmt: skip
    """Log-probability and entropy [P,N,T] in fp32 of `tokens` under the predicting hidden states, at the temperature
    that they are sampled at.

    In chunks of `chunk` tokens per rollout under remat, so that logits [P,N,T,V] never exist. `spread`: neighbours
    [V,M] and weights [V,M]; the log-probability is then the weighted mean over a token's neighbours (soft targets).
    """

    def piece(kernel, hidden, tokens):
        logits = project(hidden, kernel) / temperature
        total = jax.nn.logsumexp(logits, -1)
        entropy = total - (jax.nn.softmax(logits, -1) * logits).sum(-1)
        if spread is None:
            chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        else:
            chosen = (jnp.take_along_axis(logits, spread[0][tokens], -1) * spread[1][tokens]).sum(-1)
        return chosen - total, entropy

    kernel = policy.apply({"params": params}, method=Policy.kernel)
    return in_chunks(piece, chunk, policy.mesh, (kernel,), hidden, tokens)


def in_chunks(piece: Callable, chunk: int, mesh: Mesh | None, kernels: tuple[Array, ...], *arrays: Array) -> Any:
    """piece(*kernels, *arrays) over [P,N,T,...] in chunks of T under remat: what lies between exists one at a time.

    Each device goes through its own rows alone, so that slopes of the kernels [D,V] are added up over devices once and
    not once per chunk.
    """

    def run(kernels, arrays):
        p, n, length = arrays[0].shape[:3]
        size = min(chunk, length)
        pieces = -(-length // size)
        pad = pieces * size - length

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 3))
            return jnp.moveaxis(x.reshape(p, n, pieces, size, *x.shape[3:]), 2, 0)

        def join(x):
            return jnp.moveaxis(x, 0, 2).reshape(p, n, pieces * size, *x.shape[4:])[:, :, :length]

        body = jax.checkpoint(lambda args: piece(*kernels, *args), prevent_cse=False)
        return jax.tree.map(join, jax.lax.map(body, tuple(map(split, arrays))))

    if mesh is None or mesh.size == 1:
        return run(kernels, arrays)
    rows = Spec(*row_axes(mesh, *arrays[0].shape[:3]))
    return jax.shard_map(
        run, mesh=mesh, in_specs=(Spec(), rows), out_specs=rows, axis_names=frozenset({"data", "fsdp"})
    )(kernels, arrays)


class TrainState(struct.PyTreeNode):
    """Everything that training changes. `step` counts finished training steps, `updates` optimiser updates."""

    # Any: the same tree also holds where each of them lies
    params: Any
    optimiser: Any
    teacher: Any
    step: Any
    updates: Any


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """AdamW without its learning rate, which the loop passes: it advances once per step, not per update.

    A frozen tower has no gradient; its weights do not decay either.
    """
    section, frozen = config.update, config.policy.freeze_vision
    decaying = (lambda params: {name: name != "vision" for name in params}) if frozen else None
    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        optax.scale_by_adam(b1=section.beta1, b2=section.beta2),
        optax.add_decayed_weights(section.weight_decay, decaying),
    )


def learning_rate(section: UpdateSection | WarmstartSection, step: int, steps: int) -> float:
    """Of step 1..steps: warm-up, a plateau, then a linear fall towards zero."""
    fall = (steps - step + 1) / (section.decay * steps) if section.decay else 1.0
    return section.learning_rate * min(1.0, step / max(section.warmup, 1), fall)


def fresh_state(params: Any, config: Config, *, teacher: bool) -> TrainState:
    """The state before the first step; what has no mesh yet (counters) is replicated over that of the parameters."""
    optimiser = make_warmstart_optimiser(config) if config.stage == "sft" else make_optimiser(config)
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731
    state = TrainState(
        params, optimiser.init(params), jax.tree.map(jnp.copy, params) if teacher else None, zero(), zero()
    )
    home = jax.tree.leaves(params)[0].sharding
    if not isinstance(home, NamedSharding):
        return state
    whole = placement(home.mesh, [])  # where a state lies is part of what is compiled

    def settle(x: jax.Array) -> jax.Array:
        if isinstance(x.sharding, NamedSharding):
            return x
        return jax.make_array_from_callback(x.shape, whole, lambda index: np.asarray(x)[index])

    return jax.tree.map(settle, state)


def apply_gradients(optimiser: optax.GradientTransformation, state: TrainState, grads: Any, rate: Array) -> TrainState:
    updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    return state.replace(params=params, optimiser=optimiser_state, updates=state.updates + 1)


def compute_copy(params: Any, dtype: str) -> Any:
    """The parameters in the type of the computation."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def reading_copy(policy: Policy, mesh: Mesh, dtype: str) -> Callable:
    """params -> their copy for decoding, in the type of the computation and cut by heads only: made once for all turns
    of a step, so that the decode loop gathers no weights. On a GPU its layers are no stack but a tuple (`APART`)."""
    apart, lies = is_apart(mesh), parameter_specs(policy, mesh, "tensor")

    def make(params):
        copy = compute_copy(params, dtype)
        return copy | {"layers": tuple(one_by_one([copy["layers"]]))} if apart else copy

    if apart:
        lies |= {"layers": (lies["layers"],) * policy.config.num_hidden_layers}
    return jax.jit(make, out_shardings=lies)


class Credit(struct.PyTreeNode):
    """What the loss needs of each token, [P, N, T]."""

    advantages: Array  # after all three levels
    old_logp: Array
    mask: Array  # bool


class Guided(struct.PyTreeNode):
    """The teacher's view of a batch."""

    batch: Batch
    starts: Array  # [P, N]: where the rollout's own tokens begin


def pack(
    dialogues: Sequence[Sequence[Dialogue]],
    config: Config,
    speaker: Speaker,
    *,
    contexts: list[list[str]] | None = None,
    seen: Batch | None = None,
) -> tuple[Batch, np.ndarray]:
    """Dialogues [P][N] as one batch, and where each rollout's own tokens begin in its row [P,N].

    With `contexts` it is the teacher's view: the prompt ends with the query, and the context and the rest of the
    prompt stand at the head of each rollout's part. The tokens that follow are exactly the student's. `seen`: a batch
    of the same dialogues, whose images are taken over.
    """
    frames = config.protocol.frames
    prompts = [row[0].prompt for row in dialogues]
    starts = np.zeros((len(dialogues), len(dialogues[0])), np.int32)
    heads, rows = [], []
    for i, row in enumerate(dialogues):
        prompt = row[0].prompt
        heads.append(prompt.row if contexts is None else prompt.row.part(stop=prompt.query_end))
        line = []
        for j, d in enumerate(row):
            if contexts is None:
                line.append([d.row])
                continue
            whole = Transcript(prompt.query_position)
            told = speaker.tokenizer.encode(contexts[i][j]) if contexts[i][j] else []
            whole.add(told[: context_room(config, speaker)])
            whole.add(speaker.closing())
            starts[i, j] = len(whole)
            shift = whole.position - prompt.row.position
            for name in set(Transcript.FIELDS) - {"positions"}:
                getattr(whole, name).extend(getattr(d.row, name))
            whole.positions += [(t + shift, h + shift, w + shift) for t, h, w in d.row.positions]
            line.append([whole])
        rows.append(line)
    pad = speaker.tokenizer.end_of_text
    buckets = [b + (0 if contexts is None else config.credit.guidance_tokens) for b in config.update.token_buckets]
    length = bucket(max(len(x[0]) for line in rows for x in line), buckets)
    words = stack_rows([[[head]] for head in heads], config.protocol.prompt_tokens, pad), stack_rows(rows, length, pad)
    if seen is not None:
        return seen.replace(prompts=words[0], rows=words[1]), starts
    keyframes = np.zeros(
        (
            len(prompts),
            frames,
            speaker.keyframe_tokens * speaker.policy.vision.spatial_merge_size**2,
            speaker.policy.vision.patch_dim,
        ),
        np.float32,
    )
    for i, prompt in enumerate(prompts):
        for fid, slot in prompt.keyframes.items():
            keyframes[i, slot] = speaker.keyframe_patches(prompt.image_of(fid))
    batch = Batch(
        *words,
        speaker.images(np.concatenate([p.patches(speaker) for p in prompts]), speaker.frame_grid),
        speaker.images(keyframes.reshape(-1, *keyframes.shape[2:]), speaker.keyframe_grid),
    )
    return batch, starts


def context_room(config: Config, speaker: Speaker) -> int:
    """How many tokens of a teacher's context are read: what the end of the prompt leaves of credit.guidance_tokens."""
    return config.credit.guidance_tokens - len(speaker.closing())


def share_rows(batch: Batch, buckets: Sequence[int]) -> tuple[Batch, np.ndarray]:
    """The same rollouts in fewer rows, [P,R,T]: short ones of a group lie in one row, each a segment of its own.

    R is the least of `buckets` that holds every group, or N: few shapes, since a program is compiled for each. Also
    returns `source` [P,R,T]: the index n * T + t of each token in the rows [P,N,T], -1 for padding.
    """
    p, n, length = batch.rows.tokens.shape
    sizes = (np.asarray(batch.rows.segment) > 0).sum(-1)
    plans = [fit_into_rows(group, length) for group in sizes.tolist()]
    most = max(map(len, plans))
    count = min(rows for rows in (*buckets, n) if rows >= most)
    if count == n:  # as they are: fused kernels know no segments
        alone = np.arange(n * length, dtype=np.int32).reshape(n, length)
        return batch, np.where(np.asarray(batch.rows.segment) > 0, alone, -1)
    source = np.full((p, count, length), -1, np.int32)
    segment = np.zeros((p, count, length), np.int32)
    for i, plan in enumerate(plans):
        for r, members in enumerate(plan):
            at = 0
            for number, j in enumerate(members, start=1):
                span = slice(at, at + sizes[i, j])
                source[i, r, span] = j * length + np.arange(sizes[i, j])
                segment[i, r, span] = number
                at = span.stop
    of = lambda name: take_tokens(getattr(batch.rows, name), source, -1 if name in ("slots", "turn") else 0)  # noqa: E731
    rows = Rows(**{field.name: of(field.name) for field in dataclasses.fields(Rows)})
    return batch.replace(rows=rows.replace(segment=segment)), source


def fit_into_rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices of `sizes` by row of `length`: the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for j in sorted(range(len(sizes)), key=lambda j: -sizes[j]):
        fitting = [r for r in range(len(rows)) if room[r] >= sizes[j]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            room.append(length)
        best = min(fitting, key=lambda r: room[r])
        rows[best].append(j)
        room[best] -= sizes[j]
    return rows


def take_tokens(values: Array, source: np.ndarray, fill: Any) -> np.ndarray:
    """[P,N,T,...] -> [P,R,T,...] as `share_rows` laid it; `fill` where there is padding."""
    rest = values.shape[3:]
    flat = np.asarray(values).reshape(len(source), -1, *rest)
    out = flat[np.arange(len(source))[:, None, None], np.maximum(source, 0)]
    out[source < 0] = fill
    return out


def put_back(values: Array, source: np.ndarray, rollouts: int) -> np.ndarray:
    """[P,R,T] -> [P,N,T], 0 at padding: what `share_rows` took apart."""
    p, _, length = source.shape
    out = np.zeros((p, rollouts * length), np.asarray(values).dtype)
    there = source >= 0
    out[np.nonzero(there)[0], source[there]] = np.asarray(values)[there]
    return out.reshape(p, rollouts, length)


@functools.partial(jax.jit, static_argnames="length")
def own_tokens(values: Array, starts: Array, length: int) -> jax.Array:
    """What a teacher's view [P,N,T',...] holds from each rollout's own start [P,N] on: [P,N,length,...]."""
    at = jnp.minimum(starts[..., None] + jnp.arange(length), values.shape[2] - 1)
    return jnp.take_along_axis(values, at.reshape(*at.shape, *[1] * (values.ndim - 3)), 2)


def take_prompts(tree: Any, prompts: int, first: int, step: int) -> Any:
    """The part of a batch that belongs to every step-th prompt from the first on; images lie flat, several of them to a
    prompt."""

    def take(x: Array) -> Array:
        return x.reshape(prompts, len(x) // prompts, *x.shape[1:])[first::step].reshape(-1, *x.shape[1:])

    return jax.tree.map(take, tree)


def in_micros(tree: Any, prompts: int, size: int) -> Any:
    """[P, ...] -> [micro-batches, P / micro-batches, ...]: whole groups, activations of one live at a time.

    size: prompts of a micro-batch; 0: all. Every n-th prompt is of one micro-batch, so that each device has its part of
    all of them.
    """
    size = math.gcd(size or prompts, prompts)

    def split(x):
        x = x.reshape(size, prompts // size, len(x) // prompts, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def accumulate(loss: Callable, params: Any, micros: Any) -> Any:
    """Gradients and stats of loss(params, micro-batch), summed over all of `in_micros`, one at a time."""
    gradient = jax.value_and_grad(loss, has_aux=True)

    def one(micro):
        (_, stats), grads = gradient(params, micro)
        return grads, stats

    first = jax.tree.map(lambda x: x[0], micros)
    if len(jax.tree.leaves(micros)[0]) == 1:
        return one(first)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    return jax.lax.scan(lambda carry, micro: (jax.tree.map(jnp.add, carry, one(micro)), None), none, micros)[0]


def make_programs(policy: Policy, config: Config, state: TrainState | None = None) -> tuple[Callable, Callable]:
    """The two jitted programs of the update: log-probabilities of a batch, and one optimiser step on it.

    A new state lies as `state` does; without one, as XLA likes, which then compiles again for what it chose.
    """
    c = config
    optimiser = make_optimiser(c)

    def forward(params, batch: Batch):
        hidden = predict(
            policy, params, batch, share_prefix=c.update.share_prefix, freeze_vision=c.policy.freeze_vision
        )
        heat = c.rollout.temperature
        return token_logp(policy, params, hidden, batch.rows.tokens, c.policy.logits_tokens, temperature=heat)

    def logprob(params, batch: Batch):
        """Log-probability [P,N,T] of every token."""
        prompts = batch.rows.tokens.shape[0]
        params = compute_copy(params, c.policy.dtype)
        micros = in_micros(batch, prompts, c.update.micro_prompts)
        if len(micros.rows.tokens) == 1:
            logp = forward(params, batch)[0]
        else:
            logp = jax.lax.map(lambda b: forward(params, b)[0], micros).swapaxes(0, 1)
        return laid(logp.reshape(batch.rows.tokens.shape), policy.mesh)  # every process reads all of it

    def micro_loss(params, teacher, batch: Batch, credit: Credit, guided: Guided | None, total):
        params = compute_copy(params, c.policy.dtype)
        if c.update.loss == "sdpo":
            loss, stats = distil(params, compute_copy(teacher, c.policy.dtype), batch, credit, guided)
        else:
            logp, entropy = forward(params, batch)
            loss, stats = policy_loss(
                logp, credit.old_logp, credit.advantages, credit.mask,
                clip_low=c.update.clip_low, clip_high=c.update.clip_high, dual_clip=c.update.dual_clip,
            )  # fmt: skip
            stats["entropy"] = jnp.where(credit.mask, entropy, 0).sum() / jnp.maximum(credit.mask.sum(), 1)
        # The mean is over the tokens of the whole minibatch, not of this micro-batch.
        share = credit.mask.sum() / jnp.maximum(total, 1)
        return loss * share, jax.tree.map(lambda x: x * share, {"loss": loss, **stats})

    def distil(params, teacher, batch: Batch, credit: Credit, guided: Guided):
        """SDPO: towards what the same policy would say if it were told what the teacher is told (METHOD.md 4.10)."""
        see = functools.partial(predict, policy, share_prefix=c.update.share_prefix)
        hidden = see(params, batch, freeze_vision=c.policy.freeze_vision)
        told = jax.lax.stop_gradient(see(teacher, guided.batch))
        told = own_tokens(told, guided.starts, hidden.shape[2])
        most = min(c.update.sdpo_top_k, policy.config.vocab_size)

        def piece(kernel, its_kernel, hidden, told, tokens):
            heat, views = c.rollout.temperature, ((hidden, kernel), (told, its_kernel))
            ours, theirs = (jax.nn.log_softmax(project(*x) / heat) for x in views)
            top, ids = jax.lax.top_k(ours, most)
            chosen = jnp.take_along_axis(ours, tokens[..., None], -1)[..., 0]
            return top, jnp.take_along_axis(theirs, ids, -1), chosen, -(jnp.exp(ours) * ours).sum(-1)

        kernels = tuple(policy.apply({"params": p}, method=Policy.kernel) for p in (params, teacher))
        top, same, logp, entropy = in_chunks(
            piece, c.policy.logits_tokens, policy.mesh, kernels, hidden, told, batch.rows.tokens
        )
        loss, stats = sdpo_loss(
            top, same, logp, credit.old_logp, credit.mask, alpha=c.update.sdpo_alpha, is_clip=c.update.sdpo_is_clip
        )
        change = jnp.where(credit.mask, logp - credit.old_logp, 0.0)
        total = jnp.maximum(credit.mask.sum(), 1)
        stats["kl"] = jnp.where(credit.mask, jnp.exp(change) - 1 - change, 0).sum() / total
        stats["clip_fraction"] = (credit.mask & (change > math.log(c.update.sdpo_is_clip))).sum() / total
        stats["entropy"] = jnp.where(credit.mask, entropy, 0).sum() / total
        return loss, stats

    def update(state: TrainState, batch: Batch, credit: Credit, guided: Guided | None, rate):
        """One optimiser step (METHOD.md 4.6, 4.10)."""
        prompts = batch.rows.tokens.shape[0]
        total = credit.mask.sum()
        teacher = state.teacher if c.update.loss == "sdpo" else None

        micros = in_micros((batch, credit, guided), prompts, c.update.micro_prompts)
        loss = lambda params, micro: micro_loss(params, teacher, *micro, total)  # noqa: E731
        grads, stats = accumulate(loss, state.params, micros)
        stats["gradient_norm"] = optax.tree.norm(grads)
        state = apply_gradients(optimiser, state, grads, rate)
        if state.teacher is not None and c.credit.teacher_update == "ema":
            follow = lambda t, p: t + c.credit.ema_rate * (p - t)  # noqa: E731
            state = state.replace(teacher=jax.tree.map(follow, state.teacher, state.params))
        return state, stats

    kept = None if state is None else (jax.tree.map(lambda x: x.sharding, state), None)
    return Program("logprob", logprob), Program("update", update, donate_argnums=0, out_shardings=kept)


def encode_once(encode: Callable, params: Any, batch: Batch, mesh: Mesh) -> Batch:
    """The batch with its images encoded, so that those who read it do not encode them again.

    encode, params: of a rollout, so that frames need no program of their own.
    """

    def see(images: Images) -> tuple[np.ndarray, np.ndarray]:
        return jax.tree.map(to_host, encode(params, shard_batch(mesh, images)))

    visual = encode_bank(see, [batch.frames, batch.keyframes], len(batch.rows.tokens))
    return batch.replace(frames=None, keyframes=None, visual=jax.tree.map(np.asarray, visual))


def weighs_steps(c: Config) -> bool:
    """Whether the step level takes part: a teacher who is told something weighs the tokens (METHOD.md 4.4)."""
    return c.update.loss == "rlsd" and c.credit.lam > 0 and c.credit.teacher_context != "none"


def needs_teacher(c: Config) -> bool:
    """Whether a second set of weights is kept at all."""
    return weighs_steps(c) or c.update.loss == "sdpo"


def reading_room(c: Config) -> int:
    """Places behind each row when log-probabilities are read: a teacher's context takes them, and where their longest
    rows fall into one bucket a single program reads for student and teacher."""
    return c.credit.guidance_tokens if weighs_steps(c) else 0


def token_credit(
    batch: Batch,
    scores: Scores,
    contexts: list[list[str]],
    overlong: np.ndarray,
    config: Config,
    *,
    old_logp: np.ndarray,
    teacher_logp: Callable[[], tuple[np.ndarray, np.ndarray]] | None,
    lam: float,
) -> tuple[Credit, dict[str, float]]:
    """Advantages and loss mask of a step's tokens, and what to log of them.

    overlong [P,N]: rollouts that ran out of tokens; teacher_logp: the teacher's log-probabilities and those that they
    are compared with, both [P,N,T], asked for only where they count.
    """
    c = config
    returns = np.asarray(shared_return(scores, c))
    gains = turn_gains(scores.counts, scores.asked, kind=c.reward.process)
    # A group with fewer than two valid rows has nothing to be compared with.
    valid = scores.valid & (scores.valid.sum(-1, keepdims=True) >= 2)
    mask = batch.rows.trained & valid[..., None]
    if c.update.mask_overlong:
        mask = mask & ~overlong[..., None]
    has_context = np.array([[bool(text) for text in row] for row in contexts])
    weighs = lam > 0 and c.update.loss == "rlsd" and has_context.any() and teacher_logp is not None
    told, plain = teacher_logp() if weighs else (old_logp, old_logp)
    tokens, weight = jax.device_get(
        hierarchical_advantages(
            c.credit, returns, valid, gains, scores.asked_in, batch.rows.turn, mask, told, plain, has_context,
            lam if weighs else 0.0,
        )
    )  # fmt: skip
    if c.update.loss == "sdpo":
        mask = mask & has_context[..., None]
    spread = lambda x: float(group_spread(x, valid).mean())  # noqa: E731
    local = sum(c.reward.weights.get(k, 0.0) * scores.terms[k] for k in TERMS if k != "process")
    weighed = np.asarray(weighed_tokens(c.credit, tokens, mask, has_context, scores.asked_in, batch.rows.turn)) & weighs
    counted = weight[weighed]
    # What the guidance changed: Delta where there was some, by the sign of the advantage and by what was said.
    delta = np.asarray(told, np.float32) - np.asarray(plain, np.float32)
    guided = mask & has_context[..., None] & weighs
    raw = np.exp(np.clip(np.sign(tokens) * delta, -20, 20))[weighed]  # weights before they are clipped
    asking = np.asarray(on_question_turns(scores.asked_in >= 0, scores.asked_in, batch.rows.turn)) > 0
    over = lambda where: float(delta[guided & where].mean()) if (guided & where).any() else 0.0  # noqa: E731
    stats = {
        "advantage/trajectory_spread": spread(local),
        "advantage/turn_spread": spread(c.reward.weights.get("process", 0.0) * scores.terms["process"]),
        "advantage/step_spread": float(counted.std()) if counted.size else 0.0,
        "advantage/weight_mean": float(counted.mean()) if counted.size else 1.0,
        "advantage/weight_clipped": float((np.abs(raw - 1) >= c.credit.weight_clip - 1e-6).mean()) if raw.size else 0.0,
        "advantage/context_share": float(has_context.mean()),
        "advantage/delta_positive": over(tokens > 0),
        "advantage/delta_negative": over(tokens < 0),
        "advantage/delta_questions": over(asking),
        "advantage/delta_others": over(~asking),
        "advantage/zero_spread_groups": float((group_spread(returns, valid) <= 1e-6).mean()),
        "overlong": float(overlong.mean()),
    }
    return Credit(tokens.astype(np.float32), old_logp, mask), stats


def dialogue_row(d: Dialogue, scores: Scores, i: int, j: int, config: Config) -> dict:
    """One dialogue in the words of METHOD.md 11.7, for `metrics.dialogue_summary`."""
    k, valid, weight = int(scores.asked[i, j].sum()), bool(scores.valid[i, j]), config.reward.weights.get
    query = d.prompt.graph.get("query", d.prompt.sample.query)  # as user and expert know it, also when it is described
    questions = [simulator.parse_question(q, query) for q, _ in d.questions[:k]]
    return {
        "id": d.prompt.sample.id,
        "level": d.prompt.sample.ability,
        "success": localise(d, RewardSection())["iou"] > 0,  # of METHOD.md 11.7, whatever this run rewards
        "frame_ok": bool(scores.terms["frame"][i, j] > 0),
        "counts": scores.counts[i, j, : k + 1].tolist(),
        "asked": [q.attribute if q else None for q in questions],
        "gains": np.asarray(turn_gains(scores.counts[i, j], scores.asked[i, j]))[:k].tolist(),
        "questions": k,
        "optimal": d.prompt.graph.get("optimal_expected"),
        "budget": max(synthetic.BUDGET, config.protocol.max_turns - 1),  # one for all `turns` rows up to 6
        "format": bool(scores.well_formed[i, j]),
        "reward": float(sum(weight(t, 0.0) * scores.terms[t][i, j] for t in TERMS)) if valid else None,
        "terms": {t: float(scores.terms[t][i, j]) for t in TERMS} | ({} if valid else {"mask": None}),
        "J": None,
        "F": None,
    }


# ======================================================================================================
# 9  Training step, evaluation, loop
# ======================================================================================================


def meet(c: Config, mesh: Mesh) -> tuple[Any, Any, Any]:
    """The user, the user at test, and the expert.

    Raises ConfigError for an endpoint that does not serve, or a local policy that can not be read.
    """
    own = lambda at_test, common: common if at_test is None else at_test  # noqa: E731

    def endpoint(name: str, *, pictures: bool) -> simulator.Endpoint:
        s = getattr(c, name)
        there = simulator.Endpoint(name, s.url, s.model, timeout=s.timeout, max_in_flight=s.max_in_flight)
        there.check(pictures=pictures)
        return there

    u, host, expert = c.simulator, None, simulator.OracleExpert()
    try:
        if u.kind == "endpoint":
            host = endpoint("simulator", pictures=True)
        if c.expert.kind == "endpoint":
            expert = simulator.ModelExpert(endpoint("expert", pictures=False))
    except simulator.EndpointError as error:
        raise ConfigError(str(error)) from None
    if u.kind == "local":
        host = simulator.Local(u.path, frozen_generator(c, u.path, mesh), size=c.protocol.frame_size)
    if host is not None:
        user = simulator.ModelUser(host, description=u.description)
        return user, user, expert
    flip, refuse = own(c.evaluate.flip, u.flip), own(c.evaluate.refuse, u.refuse)
    user = simulator.load_user(u.kind, flip=u.flip, refuse=u.refuse, seed=c.seed)
    return user, simulator.load_user(u.kind, flip=flip, refuse=refuse, seed=c.seed), expert


def check_sight(who: Any, config: Config, *samples: data.Sample) -> None:
    """Raises ConfigError when the user or expert would have to see one of them and its server does not take that."""
    try:
        for sample in samples if isinstance(who, MODELS) else ():
            shown = data.sample_frames(len(sample.frames), config.protocol.frames)
            who.check_sight(sample, [sample.frame_ids[i] for i in shown])
    except simulator.EndpointError as error:
        raise ConfigError(str(error)) from None


def video_scores(sample: data.Sample, masks: np.ndarray, foreground: Callable | None = None) -> dict[str, float]:
    """metrics.video_scores of a sample's masks [T, H, W] on the frames that its benchmark scores. foreground: position
    -> all that could be a target there."""
    kept = sample.meta.get("labelled", list(range(len(sample))))
    over = lambda read: read and np.stack([read(i) for i in kept])  # noqa: E731
    ignore, others = over(sample.ignore), over(foreground)
    return metrics.video_scores(masks[kept], over(sample.truth), ignore=ignore, foreground=others)


class Trainer:
    """Everything a step of reinforcement learning needs, wired once."""

    def __init__(self, config: Config, run: Run):
        c = self.config = config
        self.run = run
        self.mesh = make_mesh(c.mesh)
        check_mesh(c, self.mesh)
        self.user, self.test_user, self.expert = meet(c, self.mesh)  # a server that is not there costs no waiting
        policy_config, params = load_policy(c.policy.path, self.mesh, dtype="float32")
        self.source = tokenizer_source(resolve_path(c.policy.path))
        self.tokenizer = load_tokenizer(self.source, policy_config)
        self.policy = Policy(policy_config, c.policy.remat, self.mesh, c.policy.attention)
        self.speaker = Speaker(c.protocol, policy_config, self.tokenizer)
        self.sampler = Sampler(c, self.policy, self.speaker, self.mesh)
        self.cast = reading_copy(self.policy, self.mesh, c.policy.dtype)
        clarify = c.protocol.clarify if c.evaluate.clarify is None else c.evaluate.clarify
        self.test_speaker = Speaker(dataclasses.replace(c.protocol, clarify=clarify), policy_config, self.tokenizer)
        self.clock = Clock()
        self.train, self.test = open_data(c)
        self.pool = training_pool(self.train, c)
        for who in (self.user, self.expert):
            check_sight(who, c, self.train[0], self.test[0])
        knowing = not (isinstance(self.user, MODELS) and isinstance(self.expert, MODELS))
        if knowing and not (self.train[0].privileged or {}).get("scene_graph"):
            raise ConfigError(
                f"data.path={c.data.path}: holds no scene graphs, which the exact user and expert read; use models "
                "(simulator.kind and expert.kind=endpoint) or the synthetic world (`python -m icseg_jax.data generate`)"
            )
        self.segmenter = SegmenterClient(
            c.sidecar.address, segmenter=resolve_path(c.sidecar.segmenter), timeout_s=c.sidecar.timeout,
            threads=c.sidecar.threads, log_file=run.own_file("sidecar.log"), prompting=c.sidecar.prompting,
            cache_gb=c.sidecar.cache_gb,
        )  # fmt: skip
        self.segmenter.start(wait=False)
        self.mask_reward = MaskReward(self.segmenter, self.mesh)
        self.state = fresh_state(params, c, teacher=needs_teacher(c))
        self.logprob, self.update = make_programs(self.policy, c, self.state)
        run.write("policy.json", json.dumps(config_json(policy_config), indent=1))

    def models(self) -> dict[str, dict]:
        """The models that answered and diagnosed, for the summary: a result depends on them (METHOD.md 8, Q7, Q8). How
        their questions went is counted over all processes, which call this together."""
        told = {"simulator": self.user, "expert": self.expert}
        asked = {name: who for name, who in told.items() if isinstance(who, MODELS)}
        everywhere = exchange({jax.process_index(): {name: who.host.counts for name, who in asked.items()}}).values()
        return {
            name: who.about() | {key: sum(counts[name][key] for counts in everywhere) for key in who.host.counts}
            for name, who in asked.items()
        }

    def test_prompt(self, sample: data.Sample) -> Prompt:
        """As `evaluate` asks for it. A described query keeps its scene graph: what is counted stays the same."""
        if self.config.evaluate.describe:
            sample = described(sample)
        shown = data.sample_frames(len(sample.frames), self.config.protocol.frames)
        return Prompt(sample, shown, self.test_speaker)

    def test_prompts(self, count: int) -> Iterator[tuple[int, Prompt]]:
        """The first samples of the test split, with their numbers. Those that are too long are said and left out;
        raises the last one's PromptTooLong where none fits."""
        fitting, last = 0, None
        for index in range(count):
            try:
                prompt = self.test_prompt(self.test[index])
            except PromptTooLong as error:
                last = error
                print(f"left out of the evaluation: {error}", file=sys.stderr)
                continue
            fitting += 1
            yield index, prompt
        if last is not None and not fitting:
            raise last

    def training_prompts(self, step: int, refill: int) -> list[Prompt]:
        """The prompts of a step: a function of (seed, step, refill). One shown frame surely holds the target; without
        one a frame is chosen as well, so that frame numbers do not tell. In the place of a prompt that is too long
        comes one of others, drawn as a further refill would be."""
        c = self.config

        def drawn(refill: int) -> Iterator[int]:
            return iter(self.pool[data.order(c.seed, step, refill, len(self.pool), c.rollout.prompts)].tolist())

        def prompt(index: int) -> Prompt:
            sample = self.train[index]
            rng = np.random.default_rng([c.seed, step, refill, index])
            seen = [i for i in range(len(sample.frames)) if sample.masks is not None and sample.truth(i).any()]
            try:
                anchor = int(rng.choice(seen or range(len(sample.frames))))
                shown = data.sample_frames(len(sample.frames), c.protocol.frames, anchor=anchor)
                return Prompt(sample, shown, self.speaker)
            except PromptTooLong as error:
                instead = next(others, None)
                if instead is None:
                    raise
                print(f"left out of step {step + 1}: {error}", file=sys.stderr)
                return prompt(instead)

        others = drawn(c.rollout.refills + 1 + refill)
        return [prompt(index) for index in drawn(refill)]

    def collect(self, step: int) -> tuple[list[list[Dialogue]], Scores, list[list[str]], dict[str, float]]:
        """Rollouts and scores of a step; groups without spread are replaced by new prompts, at most `refills` times."""
        c = self.config
        kept: list[tuple] = []
        faults: dict[str, float] = {}
        with self.clock("prefill"):
            params = self.cast(self.state.params)
        for refill in range(c.rollout.refills + 1):
            with self.clock("data"):
                prompts = self.training_prompts(step, refill)
            dialogues = self.sampler.play(
                params,
                prompts,
                [c.rollout.temperature] * c.rollout.rollouts,
                self.user,
                seed=c.seed,
                step=step,
                clock=self.clock,
            )
            with self.clock("reward"):
                masks = self.mask_reward if c.reward.weights.get("mask", 0) > 0 else None
                owners = row_owners(self.mesh, len(dialogues), c.rollout.rollouts)
                scores, guidance, seen = score(dialogues, c, self.expert, masks, owners)
            for key, value in seen.items():
                faults[key] = faults.get(key, 0) + value
            lively = teaching_groups(scores, c)
            kept += [
                (dialogues[i], jax.tree.map(lambda x, i=i: np.asarray(x)[i], scores), guidance[i], lively[i])
                for i in range(len(prompts))
            ]
            if sum(teaches for *_, teaches in kept) >= c.rollout.prompts:
                break
        faults["refills"] = refill
        chosen = sorted(kept, key=lambda group: not group[-1])[: c.rollout.prompts]
        dialogues, scores, guidance, _ = zip(*chosen, strict=True)
        return list(dialogues), jax.tree.map(lambda *x: np.stack(x), *scores), list(guidance), faults

    def step(self) -> dict:
        """One training step (METHOD.md 4.9). Returns its row of metrics.jsonl."""
        c, clock = self.config, self.clock
        number = int(self.state.step) + 1
        dialogues, scores, guidance, faults = self.collect(number - 1)
        with clock("pack"):
            batch, _ = pack(dialogues, c, self.speaker)
        lam = float(step_strength(c.credit, number))
        room = reading_room(c) if lam > 0 else 0
        with clock("logprob"):
            if c.policy.freeze_vision:  # student, teacher and update see the same
                batch = encode_once(self.sampler.encode, self.cast(self.state.params), batch, self.mesh)
            old_logp = self.read(self.state.params, batch, room)

        contexts = teacher_contexts(dialogues, total_return(scores, c), guidance, c)

        def teacher_logp() -> tuple[np.ndarray, np.ndarray]:
            with clock("teacher"):
                view, starts = pack(dialogues, c, self.speaker, contexts=contexts, seen=batch)
                logp, plain = self.read(self.state.teacher, view), old_logp
                if c.credit.delta_baseline == "teacher_plain":
                    plain = self.read(self.state.teacher, batch, room)
                return np.asarray(own_tokens(logp, starts, batch.rows.tokens.shape[-1])), plain

        most = context_room(c, self.speaker)
        told = [len(self.speaker.tokenizer.encode(text)) for row in contexts for text in row if text]
        faults["context_cut"] = sum(length > most for length in told) / max(len(told), 1)

        credit, levels = token_credit(
            batch, scores, contexts, np.array([[d.end == "overlong" for d in row] for row in dialogues]), c,
            old_logp=old_logp, teacher_logp=teacher_logp if needs_teacher(c) else None, lam=lam,
        )  # fmt: skip
        guided: Guided | None = None
        if c.update.loss == "sdpo":
            with clock("pack"):
                view, starts = pack(dialogues, c, self.speaker, contexts=contexts, seen=batch)
                guided = Guided(view, starts)
        rate = learning_rate(c.update, number, c.steps)
        with clock("update"):
            parts = []
            for mini, earned, seen in self.minibatches((batch, credit, guided)):
                if guided is None:  # sdpo compares two views token by token: their rows stay side by side
                    mini, source = share_rows(mini, c.update.row_buckets)
                    earned = jax.tree.map(lambda x, at=source: take_tokens(x, at, 0), earned)
                part = shard_batch(self.mesh, (mini, earned, seen))
                self.state, stats = self.update(self.state, *part, rate)
                parts.append(stats)
            stats = {k: float(np.mean([p[k] for p in parts])) for k in parts[0]}
            stats["final_ratio"] = float(parts[-1]["ratio"])
            self.state = self.state.replace(step=self.state.step + 1)
            syncs = c.credit.teacher_update == "sync" and number % c.credit.sync_interval == 0
            if self.state.teacher is not None and syncs:
                self.state = self.state.replace(teacher=jax.tree.map(jnp.copy, self.state.params))
        gap = np.abs(old_logp - batch.rows.logp)[batch.rows.trained]
        heard = np.array([[not d.lost for d in row] for row in dialogues])
        rows = [dialogue_row(dialogues[i][j], scores, i, j, c) for i, j in np.argwhere(heard).tolist()]
        summary = metrics.dialogue_summary(rows)
        ends = [d.end for row in dialogues for d in row]
        return {
            "step": number,
            **stats,
            **{word: summary[word] for word in ("success", *HEADLINES, "reward")},
            **{f"reward/{t}": summary["terms"].get(t) for t in TERMS},
            **levels,
            "lam": lam,
            "learning_rate": rate,
            "sampler_difference/mean": float(gap.mean()),
            "sampler_difference/p99": float(np.quantile(gap, 0.99)),
            "sampler_difference/max": float(gap.max()),
            "tokens_per_rollout": float(batch.rows.trained.sum(-1).mean()),
            "ended": {kind: ends.count(kind) / len(ends) for kind in END_KINDS},
            **faults,
            "seconds": clock.take(),
        }

    def minibatches(self, tree: Any) -> Iterator[Any]:
        """The parts of a step's batch that one update each learns from. Each takes every n-th prompt: groups without
        spread stand last (`collect`), and no update shall be left with them."""
        parts = self.config.update.minibatches
        return (take_prompts(tree, self.config.rollout.prompts, k, parts) for k in range(parts))

    def read(self, params: Any, batch: Batch, room: int = 0) -> np.ndarray:
        """Log-probability [P,N,T] of every token; what stands at padding means nothing. room: places left free behind
        each row, for the shape of longer ones."""
        buckets, out = self.config.update.row_buckets, []

        def lengthen(x: np.ndarray) -> np.ndarray:
            return np.pad(x, [(0, room if axis == 2 else 0) for axis in range(x.ndim)])

        for part in self.minibatches(batch) if buckets else [batch]:  # a part has the rows that it needs
            shared, source = share_rows(part, buckets)
            shared = shared.replace(rows=jax.tree.map(lengthen, shared.rows))
            logp = jax.device_get(self.logprob(params, shard_batch(self.mesh, shared)))[..., : source.shape[-1]]
            out.append(put_back(logp, source, part.rows.tokens.shape[1]))
        return np.stack(out, 1).reshape(-1, *out[0].shape[1:])

    def evaluate(self, name: str | None = None) -> dict[str, dict]:
        """Greedy and sampled scores on the test split (METHOD.md 11.7); with a name, the gallery is kept under it."""
        from tqdm import tqdm

        c, clock = self.config, self.clock
        params = self.cast(self.state.params)
        count = min(c.evaluate.samples or len(self.test), len(self.test))
        decodings = ["greedy"] + ["sampled"] * c.evaluate.draws  # of a sample's dialogues, side by side
        temperatures = [0.0] + [c.rollout.temperature] * c.evaluate.draws
        clips = set(np.linspace(0, count - 1, min(c.evaluate.clips, count)).astype(int).tolist())
        gallery = set(np.linspace(0, count - 1, min(c.evaluate.gallery, count)).astype(int).tolist()) if name else set()
        lost = dict.fromkeys(DECODINGS, 0)  # dialogues that the user or the expert left without an answer

        def rate(indices: Sequence[int], dialogues: list[list[Dialogue]]) -> tuple[dict[str, list[dict]], list[dict]]:
            owners = row_owners(self.mesh, len(dialogues), len(decodings))
            scores, _, _ = score(dialogues, c, self.expert, self.mask_reward, owners)
            seen = {
                i * len(decodings) + j: self.track(dialogues[i][j])
                for i, index in enumerate(indices) for j in range(len(decodings))
                if index in clips and owners[i, j] == jax.process_index()
            }  # fmt: skip
            seen = exchange(seen)
            rows: dict[str, list[dict]] = {decoding: [] for decoding in DECODINGS}
            stories = []
            for i, index in enumerate(indices):
                for j, decoding in enumerate(decodings):
                    d = dialogues[i][j]
                    if d.lost:
                        lost[decoding] += 1
                        continue
                    row = dialogue_row(d, scores, i, j, c) | seen.get(i * len(decodings) + j, {})
                    rows[decoding].append(row)
                    if index in gallery and decoding == "greedy" and self.run.writes:
                        stories.append(self.story(d, row))
            return rows, stories

        # Masks and tracks of a batch are made by the sidecar while the next one is played.
        title, quiet = f"evaluate {name or ''}".strip(), None if self.run.writes else True
        bar = tqdm(total=-(-count // c.evaluate.prompts), desc=title, unit="batch", dynamic_ncols=True, disable=quiet)
        asked = self.test_prompts(count)
        with contextlib.closing(bar), concurrent.futures.ThreadPoolExecutor(1) as rater:
            rated = []
            while True:
                with clock("data"):
                    batch = list(itertools.islice(asked, c.evaluate.prompts))
                if not batch:
                    break
                # The last batch is filled up with some of its own, so that one set of programs serves all.
                prompts = [prompt for _, prompt in itertools.islice(itertools.cycle(batch), c.evaluate.prompts)]
                dialogues = self.sampler.play(
                    params, prompts, temperatures, self.test_user, seed=c.seed, step=EVALUATION,
                    clock=clock, max_turns=c.evaluate.max_turns,
                    penalties=(c.evaluate.repetition_penalty, c.evaluate.presence_penalty),
                )  # fmt: skip
                rated.append(rater.submit(rate, [index for index, _ in batch], dialogues[: len(batch)]))
                if jax.process_count() > 1:  # what processes say to each other keeps one order
                    rated[-1].result()
                bar.update()
            with clock("reward"):
                done = [part.result() for part in rated]
        if name and self.run.writes:
            lines = [json.dumps(story) + "\n" for _, stories in done for story in stories]
            write_atomically(self.run.path / "dialogues" / f"{name}.jsonl", "".join(lines))
        return {
            decoding: metrics.dialogue_summary([row for rows, _ in done for row in rows[decoding]])
            | ({"lost": lost[decoding]} if lost[decoding] else {})
            for decoding in DECODINGS
        }

    def track(self, d: Dialogue) -> dict[str, float]:
        """J and F over the whole video of the masks that SAM2 makes of the answer; no answer is an empty video."""
        sample = d.prompt.sample
        try:
            masks = video_masks(self.segmenter, sample, *answered(d))
        except SidecarError as error:  # the row is left out of J&F, the evaluation goes on
            print(f"{sample.id}: no masks ({error})", file=sys.stderr)
            return {}
        if not sample.meta.get("labelled", True):  # no frame has a truth to compare with
            return {}
        return {k: v for k, v in video_scores(sample, masks).items() if k in ("J", "F")}

    def story(self, d: Dialogue, row: dict) -> dict:
        """One dialogue as the report shows it, its pictures beside it."""
        from PIL import Image

        folder = self.run.path / "dialogues" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", d.prompt.sample.id)

        def keep(name: str, picture: np.ndarray) -> str:
            file = folder / f"{safe}_{name}.png"
            Image.fromarray(picture).save(file)
            return str(file.relative_to(self.run.path))

        images = {str(fid): keep(str(fid), image) for fid, image in zip(d.prompt.fids, d.prompt.images, strict=True)}
        mask = truth_mask = truth_box = None
        if d.frame in d.prompt.fids:
            position = d.prompt.positions[d.prompt.fids.index(d.frame)]
            truth_mask = keep(f"{d.frame}_truth", d.prompt.sample.truth(position).astype(np.uint8) * 255)
            truth_box = (d.prompt.truth.get(str(d.frame)) or {}).get("bbox_2d")
            if d.answer is not None:
                ask = {
                    "video": d.prompt.sample.id,
                    "frame": d.frame,
                    "mask_type": wanted_mask(d.prompt.sample, d.answer),
                    "box": np.clip(d.answer.box, 0, 1000).tolist(),
                    "point": np.clip(d.answer.point, 0, 1000).tolist(),
                }
                self.segmenter.register(
                    d.prompt.sample.id, d.frame, d.prompt.image_of(d.frame), d.prompt.sample.truth(position)
                )
                tag = hashlib.blake2s(repr(d.answer).encode(), digest_size=4).hexdigest()
                with contextlib.suppress(SidecarError):  # the story is then told without its mask
                    drawn = self.segmenter.segment([ask])[0]
                    mask = keep(f"{d.frame}_{tag}", np.asarray(drawn).astype(np.uint8) * 255)
        turns, asked = [], 0
        for number, (text, action, reply) in enumerate(zip(d.texts, d.actions, d.replies, strict=True)):
            is_question = action.kind == "call" or number in d.asked_in
            asked += is_question and bool(reply)
            after = row["counts"][min(asked, len(row["counts"]) - 1)] if is_question else None
            turns.append(
                {"role": "assistant", "text": text, "kind": action.kind, "frame": action.frame}
                | {"count_after": None if reply else after}  # the answer shrinks the candidates, not the question
            )
            if reply:
                turns.append({"role": "user", "text": reply, "kind": "reply", "frame": None, "count_after": after})
        answer = d.answer
        return {
            "id": d.prompt.sample.id, "level": d.prompt.sample.ability, "query": d.prompt.sample.query,
            "split": d.prompt.sample.split, "decoding": "greedy", "turns": turns, "frames": d.prompt.fids,
            "images": images, "keyframe": d.frame,
            "box": list(answer.box) if answer else None, "point": list(answer.point) if answer else None,
            "truth_box": truth_box, "mask": mask, "truth_mask": truth_mask, "counts": row["counts"],
            "success": row["success"], "reward": row["reward"], "optimal": row["optimal"],
        }  # fmt: skip


def described(sample: data.Sample) -> data.Sample:
    """The sample with its target's description behind the query, where one is known: the upper bound."""
    return dataclasses.replace(sample, query=f"{sample.query} {simulator.describe_target(sample)}".strip())


def answered(d: Dialogue) -> tuple[int | None, Action | None]:
    """Position of the key frame in the video and the answer, both None where the dialogue names no frame or none."""
    if d.answer is None or d.frame not in d.prompt.fids:
        return None, None
    return d.prompt.positions[d.prompt.fids.index(d.frame)], d.answer


def video_masks(segmenter: SegmenterClient, sample: data.Sample, position: int | None, answer: Action | None
                ) -> np.ndarray:
    """bool [T,H,W]: what SAM2 makes of an answer on the frame at `position`; nothing for no answer. Raises
    SidecarError."""
    masks = np.zeros((len(sample.frames), *sample.size), bool)
    if answer is None:
        return masks
    asked = {"position": position, "box": np.clip(answer.box, 0, 1000).tolist(),
             "point": np.clip(answer.point, 0, 1000).tolist(), "mask_type": wanted_mask(sample, answer)}  # fmt: skip
    for i, _, mask in segmenter.stream(sample.image, len(sample.frames), [asked]):
        masks[i] = mask
    return masks


EVALUATION = 2**30  # the step under which evaluations fold their random keys, so that before and after compare


def open_data(config: Config) -> tuple[data.PreparedDataset, data.PreparedDataset]:
    """The prepared splits; with `data.generate_*` the synthetic world is made first when it is not there yet.

    Raises ConfigError when what is there is another world, of other sizes, or too few samples for a step.
    """
    c = config.data
    path = Path(c.path)
    generated = bool(c.generate_train and c.generate_test)
    if jax.process_index() > 0:  # the first process makes it; hosts with disks of their own make it again after that
        multihost_utils.sync_global_devices("data")
    if generated and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.path={path}: can not be made ({error.strerror}); give another") from None
        raw = path.with_name(f".{path.name}.raw.{os.getpid()}")  # another run may be at it too
        shutil.rmtree(raw, ignore_errors=True)
        try:
            synthetic.write_dataset(raw, train=c.generate_train, test=c.generate_test, seed=c.generate_seed)
            data.prepare("ambi_rvos", raw, path)
        finally:
            shutil.rmtree(raw, ignore_errors=True)
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices("data")
    try:
        train, test = data.load_prepared(path, "train"), data.load_prepared(path, config.evaluate.split)
        if generated:
            train[0], test[0]  # damage shows before the first step
    except data.DataError as error:
        if not generated:
            raise
        raise ConfigError(
            f"data.path={path}: damaged ({data.first_line(error)}); remove that folder, and this command makes it again"
        ) from None
    if generated and Path(train.source).name.startswith(f".{path.name}.raw."):  # it was made here
        works = "remove that folder or give another data.path="
        sizes = [len(data.load_prepared(path, split)) for split in ("train", "test")]
        if sizes != [c.generate_train, c.generate_test]:
            raise ConfigError(
                f"data.path={path}: holds {sizes[0]} and {sizes[1]} samples where data.generate_train and "
                f"generate_test say {c.generate_train} and {c.generate_test}; {works}"
            )
        # Several: what was changed since may leave a scene as it was.
        for sample in itertools.chain(*(itertools.islice(samples, 16) for samples in (train, test))):
            split, seed, index = sample.id.rsplit("-", 2)
            if int(seed) != c.generate_seed:
                raise ConfigError(
                    f"data.path={path}: holds the world of data.generate_seed={seed}, not {c.generate_seed}; {works}"
                )
            drawn = synthetic.scene_graph(synthetic.make_scene(int(index), seed=c.generate_seed, split=split))
            if json.loads(json.dumps(drawn)) != sample.privileged["scene_graph"]:
                raise ConfigError(f"data.path={path}: holds the world as an earlier version drew it; {works}")
    if len(train) < config.rollout.prompts:
        raise ConfigError(
            f"rollout.prompts={config.rollout.prompts}: the training split has {len(train)} samples; use at most that"
        )
    if config.evaluate.every and test[0].masks is None and test[0].amodal_masks is None:
        raise ConfigError(
            f"evaluate.split={config.evaluate.split}: its labels are hidden; give a split of {path} that has labels, "
            "or evaluate.every=0"
        )
    return train, test


def training_pool(train: Sequence[data.Sample], config: Config) -> np.ndarray:
    """The indices of the samples of an epoch, each as often as `data.repeat` says (METHOD.md 3.5, Q14).

    A sample that a step draws twice gives the same rollouts twice: their random keys are the sample's own.
    Raises ConfigError for a level that no sample has, or when less than a step's prompts are left.
    """
    repeat = config.data.repeat
    if not repeat:
        return np.arange(len(train))
    levels = [sample.ability or "" for sample in train]
    if unknown := sorted(set(repeat) - set(levels)):
        known = ", ".join(sorted(set(levels)))
        raise ConfigError(f"data.repeat.{unknown[0]}={repeat[unknown[0]]}: no such level in training; it has {known}")
    pool = np.repeat(np.arange(len(train)), [repeat.get(level, 1) for level in levels])
    if len(pool) < config.rollout.prompts:
        raise ConfigError(
            f"data.repeat={repeat}: leaves {len(pool)} samples, less than rollout.prompts={config.rollout.prompts}"
        )
    return pool


def train_policy(config: Config, run: Run) -> None:
    """stage: rl. Hi-GRPO from the base policy, evaluated before, during and after."""
    begun_at = time.perf_counter()
    compiled = count_compilations()
    trainer = Trainer(config, run)
    with contextlib.closing(trainer.segmenter):
        train_on(trainer, begun_at, compiled)


def train_on(trainer: Trainer, begun_at: float, compiled: Mapping[str, float]) -> None:
    """The loop of `train_policy`; begun_at, compiled: when it started, and what XLA has compiled since."""
    from tqdm import tqdm

    config, run = trainer.config, trainer.run
    known = {"summary": read_json(run.path / "summary.json") or {}, "begun": run.begun} if run.writes else {}
    known = exchange(known)
    summary = known["summary"]
    for name, who in trainer.models().items() if known["begun"] else ():
        was = ((summary.get("models") or {}).get(name) or who)["prompt_hash"]
        if was != who["prompt_hash"]:
            raise ConfigError(f"{run.path}: its {name} was asked with prompts {was}, today's are {who['prompt_hash']}; "
                              "give another run_dir=")
    trainer.state = run.restore(trainer.state) or trainer.state
    begun = int(trainer.state.step)
    if run.writes:
        (run.path / "dialogues").mkdir(exist_ok=True)
    seconds: dict[str, float] = dict(summary.get("seconds") or {})

    def book(spent: Mapping[str, float], prefix: str = "") -> None:
        for key, value in spent.items():
            seconds[prefix + key] = round(seconds.get(prefix + key, 0.0) + value, 3)

    trainer.segmenter.start()  # waits until it answers: a wrong one is known before the first step
    run.summarise(models=trainer.models())
    book({"setup": time.perf_counter() - begun_at})
    if config.evaluate.every and config.evaluate.before and "before" not in summary and begun == 0:
        asked = itertools.islice(trainer.test, config.evaluate.samples or None)  # those that `evaluate` plays
        graphs = [s.privileged["scene_graph"] for s in asked if (s.privileged or {}).get("scene_graph")]
        graphs = [graph for graph in graphs if graph["initial_count"] > 1]  # there is nothing to ask about the others
        before = trainer.evaluate("before")
        book(trainer.clock.take(), "evaluate/")
        summary = run.summarise(
            before=before, baselines=synthetic.baselines(graphs, config.seed) if graphs else {}, seed=config.seed,
            models=trainer.models(),
        )  # fmt: skip
        if run.writes:
            say_scores("before", before)

    def due(step: int) -> bool:
        return config.evaluate.every > 0 and step % config.evaluate.every == 0 and 0 < step < config.steps

    if due(begun):
        last = exchange({"row": (run.rows() or [{}])[-1]} if run.writes else {})["row"]
        if last.get("step") == begun and "evaluate" not in last:  # it failed then, and the step was kept
            last["evaluate"] = trainer.evaluate()
            book(trainer.clock.take(), "evaluate/")
            run.keep_rows(begun - 1)
            run.log(last)
    bar = tqdm(
        total=config.steps, initial=begun, desc=config.name, unit="step", dynamic_ncols=True,
        disable=None if run.writes else True,
    )  # fmt: skip
    step, traced = begun, profiled(config)
    tracing, stop = False, agreed(run.stop)
    while step < config.steps and not stop:
        if step + 1 in traced and not tracing:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call, otherwise
            jax.profiler.start_trace(run.own_file("profile"), profiler_options=options)
            tracing = True
        row = None
        try:
            row = trainer.step()
            step, stop = row["step"], agreed(run.stop)
            book(row["seconds"])
            if tracing and (step + 1 not in traced or stop):
                jax.profiler.stop_trace()
                tracing = False
            if due(step) and not stop:  # who stops it may not wait so long; it is made up for
                row["evaluate"] = trainer.evaluate()
                book(trainer.clock.take(), "evaluate/")
        except (ConfigError, data.DataError, SidecarError):  # the first: samples whose prompts are all too long
            if step > begun and jax.process_count() == 1:  # what was learned so far is kept
                if row is not None:
                    run.log(row)
                run.save(trainer.state, step)
            raise
        run.log(row)
        bar.update()
        slow = sorted(row["seconds"].items(), key=lambda x: -x[1])[:3]
        bar.set_postfix_str(
            f"reward {row['reward'] or 0:.2f} success {row['success'] or 0:.2f} "
            f"questions {row['questions_ambiguous'] or 0:.2f} " + " ".join(f"{k} {v:.1f}s" for k, v in slow)
        )
        if (config.checkpoint.every and step % config.checkpoint.every == 0) or step == config.steps or stop:
            run.save(trainer.state, step)
    bar.close()
    if step == config.steps:
        # All processes take part, one keeps it.
        params = jax.tree.map(lambda x: (to_host(x), None)[not run.writes], trainer.state.params)
        if run.writes:
            save_policy(run.path / "trained", trainer.policy.config, params, source=trainer.source)
        del params  # of a large policy as much again as the evaluation needs
        after = trainer.evaluate("after") if config.evaluate.every else {}
        book(trainer.clock.take(), "evaluate/")
        if after and run.writes:
            say_scores("after", after)
        run.settle(last=True)
        book({"total": time.perf_counter() - begun_at, "compile": compiled["seconds"]})
        run.summarise(
            after=after,
            models=trainer.models(),
            seconds=seconds,
            steps=config.steps,
            seed=config.seed,
            peak_memory_gb={"trainer": peak_memory("self"), "sidecar": peak_memory(trainer.segmenter.pid)},
            finished=True,
            compilations=int(compiled["programs"]),
            sidecar_failures=sum(exchange({jax.process_index(): trainer.segmenter.failures}).values()),
        )
        from icseg_jax import report

        if after and run.writes:
            print(f"{report.write_report(run.path)}: open it in a browser")
    else:
        run.settle(last=True)
        book({"total": time.perf_counter() - begun_at, "compile": compiled["seconds"]})
        run.summarise(seconds=seconds, models=trainer.models())
        print(f"stopped after step {step} of {config.steps}; the same command goes on from there")
    run.leave_together()


def say_scores(name: str, scores: Mapping[str, Mapping]) -> None:
    for decoding, told in scores.items():
        words = (*HEADLINES[:2], "jf", *HEADLINES[2:])
        print(
            f"{name:>7} {decoding:>8}  " + "  ".join(f"{w} {told[w]:.2f}" for w in words if told.get(w) is not None),
            flush=True,
        )


def clocked(items: Iterable[Any], clock: Clock, phase: str) -> Iterable[Any]:
    iterator = iter(items)
    while True:
        with clock(phase):
            item = next(iterator, clock)
        if item is clock:
            return
        yield item


def leave(command: Callable[[], int]) -> NoReturn:
    """Runs a command and ends this process with the code that it returns, or 1 after what it raises. Of several
    processes one that failed ends at once: JAX would wait for the others, which wait for this one in a program."""
    try:
        code = command()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ======================================================================================================
# 10  Supervised warm start (stage: sft): the embedded base learns to see and to speak the protocol
# ======================================================================================================


COORDINATE_STEP = synthetic.COORDINATE_STEP  # of the embedded tokenizer's grid, thousandths of the frame


def warmstart_words() -> list[str]:
    """Every word that the embedded tokenizer must know: the world's and the protocol's own."""
    texts = [*PROMPTS["brief"].values(), KEYFRAME_REPLY, NO_TARGET_REPLY, NO_SUCH_FRAME, GUIDANCE]
    texts.append("system user assistant frame amodal modal boxes objects ...(truncated)")
    texts += [SOLUTION.format(solution=""), *TOOL_ERRORS.values()]  # later: at the end, no token changes its number
    return [*synthetic.VOCABULARY, *re.findall(r"[A-Za-z_']+|[^\sA-Za-z0-9]", " ".join(texts))]


def build_warmstart_tokenizer() -> Any:
    literals = [
        ' {"name": "vlm_tool", "query": "',
        '"}',
        ' {"bbox_2d": [',
        '], "point_2d": [',
        '], "mask_type": "',
        "]}",
    ]
    tags = ("thinking", "call", "keyframe", "answer", "information")
    literals += [f"<{tag}>" for tag in tags] + [f"</{tag}>" for tag in tags] + [f" </{tag}>" for tag in tags]
    return weights.build_word_tokenizer(warmstart_words(), literals, frames=64, coordinate_step=COORDINATE_STEP)


FIRST = 0.6  # share of practice dialogues that end with their first list


class SceneLessons:
    """Turns synthetic scenes into packed demonstrations on one visual prefix per scene.

    A scene gives several dialogues (its own query and others on the same objects) and short grounding segments
    (object -> box and point), which hold most of the signal that perception needs.
    """

    def __init__(self, config: Config, speaker: Speaker):
        self.c, self.w, self.speaker = config, config.warmstart, speaker
        encode = speaker.tokenizer.encode
        self.groups = [[encode(f" {v}")[0] for v in synthetic.VALUES[a]] for a in ("color", "shape", "size")]
        line = range(0, 1001, COORDINATE_STEP)
        self.groups += [[encode(form.format(c))[0] for c in line] for form in ("{}", ", {}")]

    def grid(self, values: Iterable[float]) -> list[int]:
        step = COORDINATE_STEP
        return [min(1000, max(0, round(v / step) * step)) for v in values]

    def scene(self, index: int) -> tuple[Transcript, list[list[Transcript]], np.ndarray, np.ndarray, np.ndarray]:
        """Prompt, rows of segments, patches of the shown frames and of the key frames, words of each image token."""
        w, speaker, steps = self.w, self.speaker, self.c.steps
        rng = np.random.default_rng([self.c.seed, 7, index])
        kind = rng.choice(
            ["talk", "mask", "plain"], p=[w.conversations, w.mask_types, max(0, 1 - w.conversations - w.mask_types)]
        )
        amodal = kind == "mask" and rng.random() < 0.5
        scene = synthetic.make_scene(index, seed=self.c.seed, mask_type="amodal" if amodal else "modal")
        count = 1 if kind == "talk" and rng.random() < 0.5 else self.c.protocol.frames
        shown = data.sample_frames(scene.n_frames, count, anchor=int(rng.integers(scene.n_frames)))
        count = len(shown)
        pictures = synthetic.render(scene, shown)
        # Positions that get a high-res copy: of the frame that a demonstration about this scene takes, mostly the
        # first, and of others. Were all drawn alike, any key frame would do, and a greedy policy's were chance.
        about = scene.object(scene.target or int(rng.integers(len(scene.objects))) + 1)
        wanted = shown.index(synthetic.key_frame(scene, about, shown, rng))
        others = rng.permutation([i for i in range(count) if i != wanted])[: w.keyframes - 1]
        keyed = sorted([wanted, *others.tolist()])
        slots = {shown[position]: slot for slot, position in enumerate(keyed)}
        truths = {}

        def truth(oid: int) -> dict:
            if oid not in truths:
                truths[oid] = synthetic.scene_ground_truth(scene, oid, shown)
            return truths[oid]

        system = speaker.system("clear", mask_type=kind == "mask", conversation=kind == "talk")
        prefix = speaker.opening(shown, system)
        speaker.check_length(prefix, "a scene")

        def target(oid: int, fid: int) -> str:
            found = truth(oid)[str(fid)]
            return (
                json.dumps(self.grid(found["bbox_2d"]))[1:-1]
                + '], "point_2d": ['
                + json.dumps(self.grid(found["point_2d"]))[1:-1]
            )

        def finish(row: Transcript, thinking: str, named: str, oid: int, fid: int) -> None:
            row.add(speaker.tokenizer.encode(speaker.keyframe(thinking, fid)), trained=True)
            speaker.observe(row, KEYFRAME_REPLY, slots[fid])
            found = truth(oid)[str(fid)]
            text = speaker.answer(
                named,
                self.grid(found["bbox_2d"]),
                self.grid(found["point_2d"]),
                scene.mask_type if kind == "mask" else None,
            )
            row.add([*speaker.tokenizer.encode(text), speaker.tokenizer.end_of_turn], trained=True)

        def usable(oid: int, fid: int) -> int | None:
            """The wanted frame if it has a high-res copy here, else another that shows the object."""
            options = [f for f in ([fid] if fid in slots else list(slots)) if str(f) in truth(oid)]
            return int(rng.choice(options)) if options else None

        def dialogue(about: synthetic.Scene) -> Transcript | None:
            demo = synthetic.demonstrate(about, shown, rng, skill=w.skill, guided=bool(rng.random() < w.guided))
            row = Transcript(prefix.position)
            speaker.query(row, demo.query, demo.guidance)
            for turn in demo.turns:
                if turn.kind == "call":
                    row.add(speaker.tokenizer.encode(speaker.call(turn.thinking, turn.question)), trained=True)
                    speaker.observe(row, information(turn.reply))
                elif turn.kind == "keyframe" and turn.oid is None:
                    row.add(speaker.tokenizer.encode(speaker.keyframe(turn.thinking, -1)), trained=True)
                    speaker.observe(row, NO_TARGET_REPLY)
                    text = speaker.answer(turn.thinking, [0] * 4, [0] * 2, scene.mask_type if kind == "mask" else None)
                    row.add([*speaker.tokenizer.encode(text), speaker.tokenizer.end_of_turn], trained=True)
                elif turn.kind == "keyframe":
                    fid = usable(turn.oid, turn.frame)
                    if fid is None:
                        return None
                    named = next(t.thinking for t in demo.turns if t.kind == "answer")
                    finish(row, turn.thinking, named, turn.oid, fid)
            return row

        def practice() -> Transcript:
            """A dialogue of a good asker about invented objects: it teaches reading, not asking.

            The first list is given as text, and so are the calls. Taught are the attribute by which a listed object
            does not fit, whether the list goes on, and what is concluded behind it. Most end with the first list, since
            what does not fit is the harder to learn; others name the object that is left after the key frame, as an
            answer does.
            """
            first = bool(rng.random() < FIRST)
            others = synthetic.imagine(scene, rng, near=first)
            demo = synthetic.demonstrate(others, shown, rng, skill=1.0, curious=True)
            row = Transcript(prefix.position)
            speaker.query(row, demo.query, demo.guidance)
            *calls, keyframe, answer = demo.turns
            spoken = [speaker.call(turn.thinking, turn.question) for turn in calls]
            spoken.append(speaker.keyframe(keyframe.thinking, shown[keyed[0]]))
            for number, text in enumerate(spoken):
                thought, end, act = text.partition(" </thinking>")
                given, semicolon, thought = thought.partition(" ;") if number == 0 else ("", "", thought)
                head, *lines = given.split("\n")
                row.add(speaker.tokenizer.encode(head))
                fits = False  # whether the line before does: then the next one begins; if not, it is said first
                for line in lines:
                    row.add(speaker.tokenizer.encode("\n"), trained=fits)
                    line, misses = re.fullmatch(r"(\d+(?: \w+){5})( \w+)?", line).groups("")
                    fits = not misses
                    row.add(speaker.tokenizer.encode(line))
                    row.add(speaker.tokenizer.encode(misses), trained=True)
                row.add(speaker.tokenizer.encode(semicolon), trained=not first or fits)
                if first and calls:
                    return row
                row.add(speaker.tokenizer.encode(thought), trained=True)
                row.add(speaker.tokenizer.encode(end + act))
                if number < len(calls):
                    speaker.observe(row, information(calls[number].reply))
            speaker.observe(row, KEYFRAME_REPLY, 0)
            opened, named, _ = speaker.thought(answer.thinking).partition(answer.thinking)
            row.add(speaker.tokenizer.encode(opened))
            row.add(speaker.tokenizer.encode(named), trained=True)
            return row

        def talk() -> Transcript | None:
            rounds, oid = synthetic.conversation(scene, rng, frame=shown[0], still=count == 1)
            row = Transcript(prefix.position)
            fid = usable(oid, shown[0])
            if fid is None:
                return None
            for number, (human, reply) in enumerate(rounds):
                if number == 0:
                    row.add(speaker.tokenizer.encode(human))
                    row.add(speaker.closing())
                if number < len(rounds) - 1:
                    row.add([*speaker.tokenizer.encode(reply), speaker.tokenizer.end_of_turn], trained=True)
                    speaker.observe(row, rounds[number + 1][0], ended=True)
            named = "\n" + synthetic.placed(scene.object(oid), shown[0], scene.width)
            finish(row, synthetic.think([scene.object(oid)], shown[0], scene.width), named, oid, fid)
            return row

        def grounding(slot: int | None) -> Transcript:
            """Boxes of every object in one frame: from the frames shown (slot None), or from a high-res copy."""
            fid = shown[int(rng.integers(count))] if slot is None else shown[keyed[slot]]
            row = Transcript(prefix.position)
            row.add(speaker.tokenizer.encode(f"boxes frame {fid}"))
            if slot is not None:
                row.add(speaker.ids("<|vision_start|>"))
                first = self.c.protocol.frames * speaker.frame_tokens + slot * speaker.keyframe_tokens
                row.add_image(speaker.image_token, first, speaker.keyframe_grid)
                row.add(speaker.ids("<|vision_end|>"))
            row.add(speaker.closing())
            for number in rng.permutation(len(scene.objects)):
                obj = scene.objects[number]
                if str(fid) not in truth(obj.oid):
                    continue
                named = " ".join(obj.value(a, shown[0], scene.width) for a in ("color", "shape", "size"))
                row.add(speaker.tokenizer.encode(f" {named}"))
                row.add(speaker.tokenizer.encode(f' {{"bbox_2d": [{target(obj.oid, fid)}]}}'), trained=True)
            return row

        def listing() -> Transcript:
            """All objects with every attribute and their place, from left to right or from top to bottom.

            Both orders, and the place, are there for the rows: columns are also words, rows are not, and a base that
            only listed from left to right had boxes that were right across and blind up and down.
            """
            axis = int(rng.integers(2))
            row = Transcript(prefix.position)
            row.add(speaker.tokenizer.encode(("objects rightward", "objects downward")[axis]))
            row.add(speaker.closing())
            words = []
            for obj in sorted(scene.objects, key=lambda o: o.centers[shown[0], axis] - o.radius):
                found = truth(obj.oid).get(str(shown[0]))
                place = '], "point_2d": [' + json.dumps(self.grid(found["point_2d"]))[1:-1] if found else ""
                words.append(synthetic.placed(obj, shown[0], scene.width) + place)
            text = "".join(f"\n{w}" for w in words)
            row.add([*speaker.tokenizer.encode(text), speaker.tokenizer.end_of_turn], trained=True)
            return row

        makers: list[Callable[[], Transcript | None]] = []
        if kind == "talk":
            makers += [talk, talk]
        else:
            makers.append(lambda: dialogue(scene))
            makers += [lambda: dialogue(synthetic.requery(scene, rng))] * 6
        # Its own dialogue and the short segments first, then further dialogues until the rows are full.
        shorts = [lambda: grounding(0), listing, lambda: grounding(None), lambda: grounding(len(keyed) - 1)]
        share = w.dialogues_start + (w.dialogues - w.dialogues_start) * min(1.0, 2 * index / (w.scenes * steps))
        if kind == "plain" and rng.random() >= share:
            queue = [*shorts, *makers]
        else:
            queue = [makers[0], *shorts[:3], *makers[1:], shorts[3]]
        rows: list[list[Transcript]] = [[] for _ in range(w.rows + w.practice)]
        room = [w.row_tokens] * len(rows)

        def put(segment: Transcript, among: range) -> None:
            """Into the fullest of these rows that has room for it; left out where none has."""
            fitting = [j for j in among if room[j] >= len(segment)]
            if fitting:
                best = min(fitting, key=lambda j: room[j])
                rows[best].append(segment)
                room[best] -= len(segment)

        reading = index < w.reading * w.scenes * steps
        for make in () if reading else queue:
            if max(room[: w.rows]) >= 40 and (segment := make()) is not None:
                put(segment, range(w.rows))
        for row in range(0 if reading else w.rows, len(rows)):
            for _ in range(8):
                if room[row] >= 40:
                    put(practice(), range(row, row + 1))
        frames = np.zeros((self.c.protocol.frames, *self._shape(speaker.frame_grid)), np.float32)
        for i, picture in enumerate(pictures):
            frames[i] = speaker.frame_patches(picture)
        keyframes = np.zeros((w.keyframes, *self._shape(speaker.keyframe_grid)), np.float32)
        words = np.full((self.c.protocol.frames, speaker.frame_tokens, len(self.groups)), -1, np.int32)
        detail = np.full((w.keyframes, speaker.keyframe_tokens, len(self.groups)), -1, np.int32)
        for i, fid in enumerate(shown):
            words[i] = self.patch_words(scene, fid, speaker.frame_grid)
        for slot, position in enumerate(keyed):
            keyframes[slot] = speaker.keyframe_patches(pictures[position])
            detail[slot] = self.patch_words(scene, shown[position], speaker.keyframe_grid)
        words = np.concatenate([x.reshape(-1, len(self.groups)) for x in (words, detail)])
        return prefix, rows, frames, keyframes, words

    def patch_words(self, scene: synthetic.Scene, fid: int, grid: tuple[int, int]) -> np.ndarray:
        """For each image token the place in its group of what it shows: color, shape, size, x1, y1; -1 on background.

        int32 [h*w, 5]: of the object that covers most of the token's square, if that is a tenth of it at least.
        """
        masks = synthetic.visible_masks(scene, fid)
        down, across = (
            (np.arange(size) * cells // size == np.arange(cells)[:, None]).astype(np.float32) * cells / size
            for size, cells in zip(masks.shape[1:], grid, strict=True)
        )
        share = (down @ masks @ across.T).reshape(len(masks), -1)
        top = share.argmax(0)
        names = np.zeros((len(masks), len(self.groups)), np.int32)
        for row, (obj, mask) in enumerate(zip(scene.objects, masks, strict=True)):
            if mask.any():
                y, x = (np.flatnonzero(mask.any(1 - axis))[0] for axis in (0, 1))
                at = [synthetic.VALUES[a].index(getattr(obj, a)) for a in ("color", "shape", "size")]
                corner = self.grid((1000 * x / scene.width, 1000 * y / scene.height))
                names[row] = *at, *(v // COORDINATE_STEP for v in corner)
        return np.where((share.max(0) >= 0.1)[:, None], names[top], -1)

    def _shape(self, grid: tuple[int, int]) -> tuple[int, int]:
        vision = self.speaker.policy.vision
        return grid[0] * grid[1] * vision.spatial_merge_size**2, vision.patch_dim

    def batch(self, step: int) -> tuple[Batch, np.ndarray]:
        """The batch of a step and the words of its image tokens [P, B, 5]: a function of (seed, step) alone."""
        scenes = [self.scene(step * self.w.scenes + i) for i in range(self.w.scenes)]
        pad = self.speaker.tokenizer.end_of_text
        prompts = stack_rows([[[s[0]]] for s in scenes], self.c.protocol.prompt_tokens, pad)
        rows = stack_rows([s[1] for s in scenes], self.w.row_tokens, pad)
        frames = self.speaker.images(np.concatenate([s[2] for s in scenes]), self.speaker.frame_grid)
        keyframes = self.speaker.images(np.concatenate([s[3] for s in scenes]), self.speaker.keyframe_grid)
        return Batch(prompts, rows, frames, keyframes), np.stack([s[4] for s in scenes])


class ConversationLessons:
    """Turns given conversations into demonstrations, one per row (DATA.md 1.4).

    The token loss is on every answer, then on key frame, box and point, or, where nothing is to localise, on the last
    answer. Prepared datasets are mixed by `data.mixed`, so a batch is a function of (seed, step).
    """

    groups = [[0]]  # no image token is said to show anything

    def __init__(self, config: Config, speaker: Speaker):
        self.c, self.w, self.speaker = config, config.warmstart, speaker
        self.cut: set[str] = set()  # samples that were too long, and said to be
        self.sets = [data.load_prepared(Path(folder), "train") for folder in self.w.mix]
        tokenizer = speaker.tokenizer
        self.line = [v for v in range(1001) if "<unk>" not in tokenizer.decode(tokenizer.encode(f", {v}"))]

    def sayable(self, values: Iterable[float]) -> list[int]:
        """The nearest numbers that the tokenizer has words for."""
        return [min(self.line, key=lambda v: abs(v - value)) for value in values]

    def lesson(self, sample: data.Sample) -> tuple[Prompt, Transcript, np.ndarray | None]:
        """What is given, what is taught after it, and the picture that is shown again, if one is."""
        speaker, encode = self.speaker, self.speaker.tokenizer.encode
        prompt = Prompt(sample, data.sample_frames(len(sample), self.c.protocol.frames), speaker)
        talk = data.conversation(sample, prompt.positions)
        row = Transcript(prompt.row.position)
        for (_, answer), following in zip(talk.rounds, prompt.later, strict=True):
            row.add([*encode(answer), speaker.tokenizer.end_of_turn], trained=True)
            speaker.observe(row, following, ended=True)
        if talk.frame is None:
            if talk.answer and "[SEG]" not in talk.answer:  # a mask that is not known is not talked about
                row.add([*encode(talk.answer), speaker.tokenizer.end_of_turn], trained=True)
            return prompt, row.part(stop=self.w.row_tokens), None
        thought = str(sample.meta.get("focus", sample.query))
        row.add(encode(speaker.keyframe(thought, talk.frame)), trained=True)
        shown = talk.frame != -1
        speaker.observe(row, KEYFRAME_REPLY if shown else NO_TARGET_REPLY, 0 if shown else None)
        text = speaker.answer(thought, self.sayable(talk.box), self.sayable(talk.point), sample.mask_type)
        row.add([*encode(text), speaker.tokenizer.end_of_turn], trained=True)
        if len(row) > self.w.row_tokens and sample.id not in self.cut:
            self.cut.add(sample.id)
            if len(self.cut) <= 20:
                kept = f"warmstart.row_tokens={self.w.row_tokens} are kept"
                print(f"{sample.id}: {len(row)} tokens, {kept}: where the target is, is not taught", file=sys.stderr)
        return prompt, row.part(stop=self.w.row_tokens), prompt.image_of(talk.frame) if shown else None

    def fitting(self, samples: Sequence[data.Sample], index: int) -> tuple[Prompt, Transcript, np.ndarray | None]:
        """The lesson of a sample, or of the next one whose prompt is not too long. Raises PromptTooLong."""
        for number in (*range(index, len(samples)), *range(index)):
            try:
                return self.lesson(samples[number])
            except PromptTooLong as error:
                last = error
                if str(error) not in self.cut:
                    self.cut.add(str(error))
                    print(f"left out: {error}", file=sys.stderr)
        raise last

    def batch(self, step: int) -> tuple[Batch, np.ndarray]:
        """The batch of a step, and words -1 for all its image tokens [P, B, 1]."""
        c, speaker = self.c, self.speaker
        sizes = [len(samples) for samples in self.sets]
        places = data.mixed(c.seed, step, sizes, self.w.rates, self.w.scenes)
        lessons = [self.fitting(self.sets[k], i) for k, i in places]
        pad, vision = speaker.tokenizer.end_of_text, speaker.policy.vision
        prompts = stack_rows([[[prompt.row]] for prompt, *_ in lessons], c.protocol.prompt_tokens, pad)
        rows = stack_rows([[[row]] for _, row, _ in lessons], self.w.row_tokens, pad)
        frames = np.concatenate([prompt.patches(speaker) for prompt, *_ in lessons])
        again = np.zeros((len(lessons), speaker.keyframe_tokens * vision.spatial_merge_size**2, vision.patch_dim),
                         np.float32)  # fmt: skip
        for i, (_, _, picture) in enumerate(lessons):
            if picture is not None:
                again[i] = speaker.keyframe_patches(picture)
        bank = c.protocol.frames * speaker.frame_tokens + speaker.keyframe_tokens
        images = speaker.images(frames, speaker.frame_grid), speaker.images(again, speaker.keyframe_grid)
        return Batch(prompts, rows, *images), np.full((len(lessons), bank, 1), -1, np.int32)


def coordinate_spread(
    tokenizer: weights.Tokenizer, vocabulary: int, sigma: float, width: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Soft targets: a coordinate token's neighbours on the grid [V, 2*width+1] and their Gaussian weights.

    sigma in grid steps; other tokens, and all of them at sigma 0, keep their weight on themselves. Ordinal targets
    are what let boxes be learned from few scenes: a near miss is nearly right.
    """
    near = np.tile(np.arange(vocabulary)[:, None], (1, 2 * width + 1)).astype(np.int32)
    weight = np.zeros(near.shape, np.float32)
    weight[:, width] = 1.0
    if sigma > 0:
        kernel = np.exp(-0.5 * (np.arange(-width, width + 1) / sigma) ** 2)
        for form in ("{}", ", {}"):
            ids = [tokenizer.encode(form.format(c)) for c in range(0, 1001)]
            line = [i[0] for i in ids if len(i) == 1 and tokenizer.decode(i) != "<unk>"]
            if len(line) <= 10:  # single digits, which are parts of numbers, and no grid
                continue
            for place, token in enumerate(line):
                reach = np.arange(place - width, place + width + 1)
                inside = (reach >= 0) & (reach < len(line))
                weight[token] = np.where(inside, kernel, 0) / kernel[inside].sum()
                near[token] = np.array(line)[np.clip(reach, 0, len(line) - 1)]
    return near, weight


def make_warmstart_optimiser(config: Config) -> optax.GradientTransformation:
    """Muon for the matrices and Adam for the rest, without the learning rate, like `make_optimiser`.

    On the embedded shape it needs half of AdamW's steps for the same loss. RL keeps AdamW, as the paper does.
    """

    def matrices(params: Any) -> Any:
        """Which axes of each matrix are its inputs and its outputs; None: not a matrix."""

        def sides(path: tuple, x: Array) -> Any:
            names = [key.key for key in path]
            first = int(any(name == "layers" or name.startswith("blocks") for name in names))  # stacked layers
            flat = any(kind in names[-1] for kind in ("embedding", "position", "norm", "bias"))
            if flat or x.ndim - first < 2:
                return None
            if names[-1] == "qkv":  # three matrices
                return optax.contrib.MuonDimensionNumbers((first,), (first + 2, first + 3))
            split = x.ndim - 1 if names[-1] == "o" else first + 1  # o joins its heads, all others split into them
            return optax.contrib.MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, x.ndim)))

        return jax.tree_util.tree_map_with_path(sides, params)

    section, frozen = config.update, config.policy.freeze_vision
    tower = lambda params: {name: name == "vision" for name in params}  # noqa: E731
    muon = optax.contrib.muon(
        1.0, muon_weight_dimension_numbers=matrices, adam_b1=section.beta1, adam_b2=section.beta2,
        weight_decay=section.weight_decay, adam_weight_decay=section.weight_decay, adam_learning_rate=1.0,
        consistent_rms=0.2,
    )  # fmt: skip
    still = [optax.masked(optax.set_to_zero(), tower)] if frozen else []  # it would decay
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), muon, optax.scale(-1.0), *still)


def make_warmstart_step(policy: Policy, config: Config, lessons: SceneLessons | ConversationLessons) -> Callable:
    """(state, batch, words, spread, rate, patch_weight) -> (state, stats): one supervised update.

    The loss is the token mean over everything taught, plus `patch_weight` times how badly the encoded image tokens,
    read by the output head, name what they show. It puts what is seen where the language layers look for words.
    """
    optimiser, scenes = make_warmstart_optimiser(config), config.warmstart.scenes
    # A micro-batch is as large as it must be for all devices to have a part of it.
    rows = 1 if config.warmstart.mix else config.warmstart.rows + config.warmstart.practice
    whole = [k for k in range(1, scenes + 1) if scenes % k == 0 and fills(policy.mesh, k, rows)]
    size = min((k for k in whole if k >= config.update.micro_prompts > 0), default=scenes)

    def naming(params, visual, words, total):
        logits = policy.apply({"params": params}, visual.tokens, method=Policy.head)
        there = words[..., 0] >= 0
        loss = sum(
            optax.softmax_cross_entropy_with_integer_labels(logits[..., np.array(ids)], jnp.maximum(words[..., i], 0))
            for i, ids in enumerate(lessons.groups)
        )
        return (loss * there).sum() / jnp.maximum(total, 1) / len(lessons.groups)

    def loss_fn(params, micro, totals, spread, patch_weight):
        """A micro-batch's share of the loss: means are over the tokens of the whole batch."""
        batch, words = micro
        params = compute_copy(params, config.policy.dtype)
        encode = functools.partial(policy.apply, {"params": params}, method=Policy.encode)
        visual = encode_bank(encode, [batch.frames, batch.keyframes], batch.prompts.tokens.shape[0])
        if config.policy.freeze_vision:
            visual = jax.lax.stop_gradient(visual)
        hidden = predict(policy, params, batch.replace(frames=None, keyframes=None, visual=visual))
        # Of given conversations nobody knows what their pictures show: no logits of image tokens for nothing.
        named = jnp.zeros(()) if config.warmstart.mix else naming(params, visual, words, totals[1])
        logp, _ = token_logp(policy, params, hidden, batch.rows.tokens, config.policy.logits_tokens, spread)
        loss = -(logp * batch.rows.trained).sum() / jnp.maximum(totals[0], 1)
        return loss + patch_weight * named, {"loss": loss, "patch_words": named}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, words, spread, rate, patch_weight):
        totals = batch.rows.trained.sum(), (words[..., 0] >= 0).sum()
        loss = lambda params, micro: loss_fn(params, micro, totals, spread, patch_weight)  # noqa: E731
        grads, stats = accumulate(loss, state.params, in_micros((batch, words), scenes, size))
        stats["tokens"] = totals[0]
        state = apply_gradients(optimiser, state, grads, rate)
        return state.replace(step=state.step + 1), {**stats, "gradient_norm": optax.tree.norm(grads)}

    return step


def warmstart_sigma(config: Config, step: int) -> float:
    """Coordinate targets sharpen over the first four fifths of the run."""
    w = config.warmstart
    return w.coordinate_sigma_end + (w.coordinate_sigma - w.coordinate_sigma_end) * max(
        0.0, 1 - step / (0.8 * config.steps)
    )


def named_shape(config: Config) -> PolicyConfig:
    """The shape of a config's policy: of policy.path where that is there, else policy.shape. Raises ConfigError."""
    here = resolve_path(config.policy.path) / "config.json"
    shape = here if here.is_file() or config.policy.shape is None else resolve_path(config.policy.shape)
    raw = read_json(shape)
    if raw is None:
        raise ConfigError(f"{shape}: missing or not JSON; policy.shape= may name a config.json of the policy")
    return PolicyConfig.from_json(raw, str(shape))


def new_policy(config: Config, run: Run) -> tuple[PolicyConfig, weights.Tokenizer, Path]:
    """A policy of random weights; its config.json and tokenizer are written into the run, whose folder comes last."""
    source = run.path / "policy"
    if run.writes:
        source.mkdir(exist_ok=True)
        weights.save_word_tokenizer(build_warmstart_tokenizer(), source)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
    tokenizer = weights.Tokenizer(source)
    shape = resolve_path(config.policy.shape)
    raw = read_json(shape)
    if raw is None:
        raise ConfigError(f"policy.shape={shape}: missing or not JSON; experiments/embedded_shape.json is one")
    raw.setdefault("text_config", {})["vocab_size"] = -(-len(tokenizer) // 64) * 64
    for key in ("image", "video"):
        raw[f"{key}_token_id"] = tokenizer.ids[f"<|{key}_pad|>"]
    for key in ("vision_start", "vision_end"):
        raw[f"{key}_token_id"] = tokenizer.ids[f"<|{key}|>"]
    policy_config = PolicyConfig.from_json(raw, str(shape))
    if run.writes:
        write_atomically(source / "config.json", json.dumps(config_json(policy_config), indent=1))
    return policy_config, tokenizer, source


def ahead(make: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> Iterable[Any]:
    """make(i) for i in start..stop-1, in order, computed by one thread that runs `depth` ahead."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, i) for i in range(start, min(start + depth, stop))]
        for i in range(start, stop):
            if i + depth < stop:
                waiting.append(pool.submit(make, i + depth))
            yield waiting.pop(0).result()


def comparing(params: Any) -> Any:
    """Random parameters that learn sooner to compare words, by which lists are read.

    Keys start as their group's first queries: alike tokens attend to each other from the first step (Trockman and
    Kolter, arXiv 2305.09828). Embeddings start ten times as long: what all seldom said words get in common outgrows a
    standard deviation of 0.02 within some thirty steps, and then hides for thousands which of them one is.
    """
    layers = params["layers"]
    groups = layers["k"].shape[2]
    first = layers["q"][:, :, :: layers["q"].shape[2] // groups]
    return {**params, "embedding": 10 * params["embedding"], "layers": {**layers, "k": first}}


def train_warmstart(config: Config, run: Run) -> None:
    """stage: sft. Imitates noisy askers on endless synthetic scenes, or the answers of given conversations; writes the
    policy as a Hugging Face directory."""
    from tqdm import tqdm

    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    if config.policy.shape:
        policy_config, tokenizer, source = new_policy(config, run)
        init = lambda key: nn.unbox(Policy(policy_config).init(key, example_images(policy_config.vision)))["params"]  # noqa: E731
        specs = parameter_specs(Policy(policy_config), mesh)
        params = jax.jit(lambda key: comparing(init(key)), out_shardings=specs)(jax.random.key(config.seed))
    else:
        source = resolve_path(config.policy.path)
        policy_config, params = load_policy(source, mesh, dtype="float32")
        tokenizer = load_tokenizer(source, policy_config)
    run.write("policy.json", json.dumps(config_json(policy_config), indent=1))
    speaker = Speaker(config.protocol, policy_config, tokenizer)
    lessons = (ConversationLessons if config.warmstart.mix else SceneLessons)(config, speaker)
    policy = Policy(policy_config, config.policy.remat, mesh, config.policy.attention)
    state = fresh_state(params, config, teacher=False)
    state = run.restore(state) or state
    step = make_warmstart_step(policy, config, lessons)
    clock, begun = Clock(), int(state.step)
    quiet = None if run.writes else True
    bar = tqdm(total=config.steps, initial=begun, desc=config.name, unit="step", dynamic_ncols=True, disable=quiet)
    with contextlib.closing(ahead(lessons.batch, begun, config.steps)) as batches:
        for number, (batch, words) in enumerate(clocked(batches, clock, "data"), start=begun + 1):
            with clock("update"):
                patch_weight = config.warmstart.patch_words * max(0.0, 1 - 2 * (number - 1) / config.steps)
                spread = coordinate_spread(tokenizer, policy_config.vocab_size, warmstart_sigma(config, number - 1))
                rate = learning_rate(config.warmstart, number, config.steps)
                state, stats = step(state, *shard_batch(mesh, (batch, words)), spread, rate, patch_weight)
                stats = {k: float(v) for k, v in stats.items()}
            run.log({"step": number, **stats, "learning_rate": rate, "seconds": clock.take()})
            bar.update()
            bar.set_postfix(loss=f"{stats['loss']:.3f}")
            due = config.checkpoint.every and number % config.checkpoint.every == 0
            stop = agreed(run.stop)
            if due or stop or number == config.steps:
                run.save(state, number)
            if stop:
                break
    bar.close()
    if int(state.step) == config.steps:
        params = jax.tree.map(to_host, state.params)
        if run.writes:
            save_policy(run.path / "trained", policy_config, params, source=tokenizer_source(source))
        run.settle(last=True)
        run.summarise(finished=True, steps=config.steps, policy=str(run.path / "trained"))
    else:
        run.settle(last=True)
    run.leave_together()


# ======================================================================================================
# 11  Checkpoints, logs and files
# ======================================================================================================


# Where servers are and how long they are waited for. A result does not depend on it, and they move.
SERVERS = {"simulator": {"url", "timeout", "max_in_flight"}, "expert": {"url", "timeout", "max_in_flight"},
           "sidecar": {"address", "timeout", "threads", "cache_gb"}}  # fmt: skip
# What else may change between the starts of a run: the machine it is on, how its work is laid out and kept there.
MACHINE_KEYS = {"topology", "policy.attention", "policy.remat", "update.micro_prompts", "update.row_buckets"}
MACHINE_KEYS |= {"evaluate.prompts"}
MACHINE_KEYS |= {f"{section}.{key}" for section, keys in SERVERS.items() for key in keys}
MACHINE_SECTIONS = ("mesh.", "checkpoint.", "profile.")


class Run:
    """A run directory: one process at a time, one config for its whole life, complete after a kill at any moment.

    Restart order: 1 our own latest checkpoint in `checkpoints/`, 2 else the policy of the config. Rows of
    `metrics.jsonl` after the checkpoint are dropped on resume and written again, so that the file is that of an
    uninterrupted run.
    """

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.run_dir or f"runs/{config.name}")
        self.writes = jax.process_index() == 0  # of several processes the first keeps the books
        self.metrics_file = self.path / "metrics.jsonl"
        self.stop = False
        self._writer = None
        self._lock = None
        self._bucket: Bucket | None = None
        problem = ""
        try:
            if self.writes:
                self._open()
        except ConfigError as error:
            problem = str(error)
        if problem := exchange({0: problem} if self.writes else {})[0]:  # the others shall not wait for it
            raise ConfigError(problem)
        if jax.process_count() > 1:
            self._seen_by_all()

    def _seen_by_all(self) -> None:
        """All processes write checkpoints. Raises ConfigError, in every one, where their disk is not the same."""
        file = self.path / ".together"
        mark = exchange({0: str(time.time_ns())} if self.writes else {})[0]
        self.write(file.name, mark)
        multihost_utils.sync_global_devices("run directory")

        def there() -> bool:
            with contextlib.suppress(OSError):
                return file.read_text() == mark
            return False

        together = all_see(there)
        if self.writes:
            file.unlink()
        if not together:
            raise ConfigError(f"run_dir={self.path}: not all processes see it; give one on a disk that they share")

    def own_file(self, name: str) -> Path:
        """A file of this process alone."""
        return self.path / (name if self.writes else f"{jax.process_index()}.{name}")

    def write(self, name: str, text: str) -> None:
        if self.writes:
            write_atomically(self.path / name, text)

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.path}: can not be written ({error.strerror}); give another run_dir="
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.config.checkpoint.bucket and not self.finished:
                self._bucket = Bucket(self.config.checkpoint.bucket, self.config.checkpoint.keep)
            self._same_config()
        except BaseException as error:
            self._lock.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ConfigError(
                f"run_dir={self.path}: another run is writing here; wait for it or give another run_dir="
            ) from None

    def _same_config(self) -> None:
        """Raises ConfigError where the directory or the bucket holds a run of another config."""
        from omegaconf import OmegaConf

        new = OmegaConf.to_container(OmegaConf.structured(dataclasses.replace(self.config, run_dir=None)))
        file = self.path / "config.yaml"
        kept = []  # where it stands, how to read it, the key that would lead elsewhere
        if file.exists() and self.begun:  # a start that failed binds nobody
            kept.append((file, file.read_bytes, f"run_dir={self.path}"))
        if self._bucket is not None and (told := self._bucket.config()):
            kept.append((f"{self._bucket.url}/config.yaml", lambda: told, f"checkpoint.bucket={self._bucket.url}"))
        for where, read, place in kept:
            other = f"give another {place.split('=')[0]}="
            try:
                old = OmegaConf.to_container(OmegaConf.create(read().decode()))
                if not isinstance(old, Mapping):
                    raise ValueError("not a mapping of keys")
            except Exception as error:
                raise ConfigError(f"{where}: damaged ({data.first_line(error)}); remove it or {other}") from None
            # A key that is younger than the run had its default then.
            was, now = _flat(OmegaConf.to_container(OmegaConf.structured(settled(Config())))) | _flat(old), _flat(new)
            levels = {k for k in was if k.startswith("data.repeat.")}  # one that is gone differs too
            differing = sorted(
                k for k in now.keys() | levels
                if was.get(k) != now.get(k) and k not in MACHINE_KEYS and not k.startswith(MACHINE_SECTIONS)
            )  # fmt: skip
            if differing:
                shown = ", ".join(f"{k} ({was.get(k)} -> {now.get(k)})" for k in differing[:5])
                raise ConfigError(f"{place} belongs to another config: {shown}; {other}")
        if not self.finished:
            write_atomically(file, OmegaConf.to_yaml(OmegaConf.create(new)))

    @property
    def begun(self) -> bool:
        """Whether there is anything to lose: a step, a checkpoint, the evaluation before the first."""
        rows = self.metrics_file.exists() and self.metrics_file.stat().st_size > 0
        before = "before" in (read_json(self.path / "summary.json") or {})
        return rows or before or any((self.path / "checkpoints").glob("[0-9]*"))

    @property
    def finished(self) -> bool:
        summary = read_json(self.path / "summary.json")
        return bool(summary and summary.get("finished"))

    def catch_signals(self) -> None:
        """Ctrl-C and SIGTERM end the run after the step in progress; a second Ctrl-C at once."""

        def ask(number, frame):
            if self.stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop = True
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)

    # Checkpoints: Orbax, asynchronous. The directory's step numbers are finished training steps.

    def checkpointer(self):
        from orbax.checkpoint import v1 as ocp

        if not hasattr(self, "_checkpointer"):
            folder = (self.path / "checkpoints").resolve()
            if self._bucket is not None:
                self._bucket.fetch(folder)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoints")
            # Devices that hold the same array write a part of it each; a small one is not worth the cutting, which is
            # a program for every shape.
            context = ocp.Context()
            context.asynchronous.timeout_secs = 7200  # 140 GB of an 8B on a disk that writes 20 MB a second
            context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
            with context:
                keep, copied = self.config.checkpoint.keep, self.config.checkpoint.bucket
                self._checkpointer = ocp.training.Checkpointer(
                    folder,
                    # One more where they are copied: else the only one goes while it is under way.
                    preservation_policy=ocp.training.preservation_policies.LatestN(max(keep, 2 if copied else 1)),
                    cleanup_tmp_directories=True,  # of a killed run
                )
            self._same_latest()
        return self._checkpointer

    def _same_latest(self) -> None:
        """Raises ConfigError unless all processes would go on from the same checkpoint."""
        if jax.process_count() == 1:
            return

        def latest() -> int:
            found = self._checkpointer.latest
            return -1 if found is None else found.step

        wanted = exchange({0: latest()} if self.writes else {})[0]

        def there() -> bool:
            if latest() != wanted:
                self._checkpointer.reload()
            return latest() == wanted

        if not all_see(there):
            raise ConfigError(f"{self.path}/checkpoints: not all processes see step {wanted}; give them one disk")

    def restore(self, state: TrainState) -> TrainState | None:
        """The latest checkpoint with the shapes and shardings of `state`, or None. Raises ConfigError."""
        keeper = self.checkpointer()
        if keeper.latest is None:
            done = max((row["step"] for row in self.rows()), default=0)
            every = self.config.checkpoint.every
            if every and done > 2 * every:  # when the second is begun the first is there, whenever a run is killed
                raise ConfigError(
                    f"{self.path}/checkpoints: missing, though metrics.jsonl tells of {done} steps; put it back, or "
                    "give another run_dir="
                )
            self.write("metrics.jsonl", "")
            return None
        step = keeper.latest.step
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            parts = keeper.load_checkpointables(step, _parts(abstract))
        except Exception as error:
            said = data.first_line(error)
            slow = re.search("deadline|timed? ?out", said, re.IGNORECASE)  # of processes that wait for each other
            works = "start again" if slow else "remove that directory to go on from the one before"
            raise ConfigError(f"{self.path}/checkpoints/{step}: can not be restored ({said}); {works}") from None
        self.keep_rows(step)
        return state.replace(params=parts["params"], **parts["rest"])

    def save(self, state: TrainState, step: int) -> None:
        """Begins to write a checkpoint, once the one before is there."""
        keeper = self.checkpointer()
        if keeper.latest is None or keeper.latest.step != step:
            self.settle()
            keeper.save_checkpointables_async(step, _parts(state), force=True)  # Orbax may leave one out, otherwise

    def settle(self, last: bool = False) -> None:
        """Waits for the checkpoint under way and begins to copy it to the bucket. One that was not written is said.

        last: no other comes after it. Raises ConfigError, then, in all processes where one failed.
        """
        problem, works = "", "make room, and the same command goes on from the one before"
        try:
            self.checkpointer().wait()
        except Exception as error:  # a full disk is a ValueError here
            problem = f"{self.path}/checkpoints: the last one was not written ({data.first_line(error)})"
        if problem and not last:
            print(f"{problem}; the next one is tried", file=sys.stderr)
        if self._bucket is not None:
            # First what is under way: the checkpoint that it reads goes when the next but one is there.
            self._bucket.wait()
            self._bucket.copy(self.path, [c.step for c in self._checkpointer.checkpoints])
            if last and not problem and (problem := self._bucket.wait()):
                works = "the same command tries again"
        if last and agreed(bool(problem)):
            raise ConfigError(f"{problem or 'a checkpoint was not written by another process'}; {works}")

    def leave_together(self) -> None:
        """As the function of this name; the bucket has its copy by then."""
        if self._bucket is not None:
            self._bucket.wait()
        leave_together()

    def keep_rows(self, step: int) -> None:
        """Drops the rows of metrics.jsonl after a step."""
        rows = [row for row in self.rows() if row["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict]:
        """Those of metrics.jsonl."""
        rows = []
        for line in self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
                rows.append(json.loads(line))
        return rows

    def log(self, row: dict) -> None:
        """One JSON object per step, the same numbers as TensorBoard events, and what was compiled since the last."""
        if not self.writes:
            return
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._tell_programs(row["step"])
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["step"])
        for key, value in _flat(row).items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key.replace(".", "/"), value, row["step"])

    def summarise(self, **parts: Any) -> dict:
        """Merges `parts` into summary.json."""
        summary = (read_json(self.path / "summary.json") or {}) | parts
        self.write("summary.json", json.dumps(summary, indent=1))
        return summary

    def _tell_programs(self, step: int) -> None:
        with (self.path / "programs.jsonl").open("a") as file:
            file.writelines(json.dumps({"step": step, **program}) + "\n" for program in COMPILED)
        COMPILED.clear()

    def close(self) -> None:
        if COMPILED and self.writes:  # what an evaluation after the last step needed
            with contextlib.suppress(OSError):  # a full disk was told of already
                self._tell_programs(max((row["step"] for row in self.rows()), default=0))
        if hasattr(self, "_checkpointer"):
            self.settle()
            self._checkpointer.close()
        if self._bucket is not None:
            self._bucket.close()
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.close()


class Bucket:
    """Copies of finished checkpoints in a bucket: the run goes on from there on a machine that has nothing of it.

    A checkpoint counts once its marker is there, which is written last. Copying happens beside the training; one that
    fails is said and tried again with the next. The run's config lies beside them.
    """

    def __init__(self, url: str, keep: int):
        import fsspec

        self.url, self.keep = url.rstrip("/"), keep
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
            self.files.makedirs(self.root, exist_ok=True)
            self.files.pipe_file(f"{self.root}/.writable", b"")
        except Exception as error:  # every file system has its own
            raise ConfigError(
                f"checkpoint.bucket={url}: can not be written ({data.first_line(error)}); give a URL that fsspec "
                "knows, such as gs://BUCKET/RUN with gcsfs installed"
            ) from None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._problem = ""

    def config(self) -> bytes:
        """The config.yaml of the run whose checkpoints these are; empty when there is none. Raises ConfigError."""
        try:
            file = f"{self.root}/config.yaml"
            return self.files.cat_file(file) if self.files.exists(file) else b""
        except Exception as error:
            raise ConfigError(
                f"checkpoint.bucket={self.url}/config.yaml: can not be read ({data.first_line(error)})"
            ) from None

    def _steps(self, ending: str = ".complete") -> list[int]:
        names = [name.rstrip("/").rsplit("/", 1)[-1] for name in self.files.ls(self.root, detail=False)]
        found = (re.fullmatch(r"(\d+)" + re.escape(ending), name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def fetch(self, folder: Path) -> None:
        """Brings the latest one into `folder`, unless that holds a later one. Raises ConfigError."""
        here = [int(f.name) for f in folder.iterdir() if f.name.isdigit()] if folder.is_dir() else []
        for killed in folder.glob(".*.part"):
            shutil.rmtree(killed)
        step = None
        try:
            step = max(self._steps(), default=-1)
            if step <= max(here, default=-1):
                return
            partial = folder / f".{step}.part"
            folder.mkdir(parents=True, exist_ok=True)
            self.files.get(f"{self.root}/{step}/", f"{partial}/", recursive=True)
        except Exception as error:
            if step is not None:
                shutil.rmtree(folder / f".{step}.part", ignore_errors=True)
            where = self.url if step is None else f"{self.url}/{step}"
            raise ConfigError(f"checkpoint.bucket={where}: can not be read ({data.first_line(error)})") from None
        os.replace(partial, folder / str(step))

    def copy(self, run: Path, steps: Sequence[int]) -> None:
        """Begins to copy those of a run's checkpoints `steps` that are not there yet."""
        self._pool.submit(self._copy, run, sorted(steps)[-self.keep :])

    def _copy(self, run: Path, steps: Sequence[int]) -> None:
        try:
            missing = sorted(set(steps) - set(self._steps()))
            if missing:
                self.files.put_file(str(run / "config.yaml"), f"{self.root}/config.yaml")
            for step in missing:
                self.files.put(f"{run / 'checkpoints' / str(step)}/", f"{self.root}/{step}/", recursive=True)
                self.files.pipe_file(f"{self.root}/{step}.complete", b"")
            for step in self._steps()[: -self.keep]:
                self.files.rm(f"{self.root}/{step}.complete")
            kept = self._steps()
            for step in self._steps(""):
                if step < min(kept, default=0):  # also what a kill has left without a marker
                    self.files.rm(f"{self.root}/{step}", recursive=True)
            self._problem = ""
        except Exception as error:
            self._problem = f"{self.url}: a checkpoint was not copied ({data.first_line(error)})"
            print(self._problem, file=sys.stderr)

    def wait(self) -> str:
        """Until what is under way has ended. Returns what was wrong with it, empty when nothing was."""
        self._pool.submit(lambda: None).result()
        return self._problem

    def close(self) -> None:
        self._pool.shutdown(wait=True)


def _parts(state: TrainState) -> dict[str, Any]:
    """The parameters stand alone in a checkpoint, so that a policy can be read without its optimiser."""
    return {"params": state.params, "rest": {f.name: getattr(state, f.name) for f in dataclasses.fields(state)[1:]}}


def _flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def write_atomically(path: Path, text: str) -> None:
    # Hosts that share a folder may share process numbers too.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# Where a policy comes from and goes to: see weights.py for the files.


def load_policy(path: str | Path, mesh: Mesh | None = None, *, dtype: str | None = None) -> tuple[PolicyConfig, Any]:
    """A Hugging Face Qwen3-VL directory (config.json and safetensors suffice), one of our checkpoints or a run.

    Returns (PolicyConfig, params); `dtype` None keeps the stored type. With a mesh each tensor goes straight to its
    shards. Of a run directory it is the latest checkpoint. Raises ConfigError, one line, for a missing or damaged file
    or a tensor of another shape.
    """
    path = resolve_path(str(path))
    if not path.is_dir():
        raise ConfigError(
            f"policy.path={path}: no such directory; a Hugging Face Qwen3-VL directory or a run's checkpoint works"
        )
    try:
        checkpoint = weights.find_checkpoint(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    file = checkpoint.parent.parent / "policy.json" if checkpoint else path / "config.json"
    raw = read_json(file)
    if raw is None:
        raise ConfigError(f"{file}: missing or not JSON; a Hugging Face Qwen3-VL directory has a config.json")
    config = PolicyConfig.from_json(raw, str(file))
    specs = parameter_specs(Policy(config), mesh) if mesh is not None else None
    shapes = parameter_shapes(config)
    try:
        if checkpoint:
            params = weights.read_checkpoint(checkpoint, shapes, dtype=dtype, shardings=specs)
        else:
            params = weights.read_params(path, shapes, dtype=dtype, shardings=specs)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return config, params


def tokenizer_source(path: Path, otherwise: Path | None = None) -> Path:
    """Where the tokenizer of the weights in `path` lies: beside them, or, where they are a run's, in the run (a warm
    start and an imported policy have one there) or with the policy that it began with, which may be another run's.
    Where it is nowhere: `otherwise`, or `path`."""
    from omegaconf import OmegaConf

    place = path
    for _ in range(16):  # runs that began with one another
        run = place.parent.parent if place.parent.name == "checkpoints" else place
        for here in (place, run, run / "policy"):
            if (here / "tokenizer.json").is_file():
                return here
        try:
            place = resolve_path(str(OmegaConf.load(run / "config.yaml").policy.path))
        except Exception:  # missing or damaged: yaml's own errors, and what it may hold instead
            break
    return otherwise or path


def load_tokenizer(path: Path, policy: PolicyConfig) -> weights.Tokenizer:
    """The tokenizer of a Hugging Face directory, a run or a checkpoint. Raises ConfigError, also for one with more
    tokens than the policy."""
    path = tokenizer_source(path)
    try:
        tokenizer = weights.Tokenizer(path)
    except Exception as error:  # tokenizers has no error class of its own
        raise ConfigError(f"{path}: no usable tokenizer.json ({data.first_line(error)})") from None
    if len(tokenizer) > policy.vocab_size:
        raise ConfigError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the policy {policy.vocab_size}")
    return tokenizer


def save_policy(
    path: str | Path, policy_config: PolicyConfig, params: Any, *, source: str | Path | None = None
) -> None:
    """A Hugging Face directory that transformers loads, in the parameters' dtype; appears whole or not at all.

    `source`: a directory whose tokenizer, template and processor files are copied along. Raises ConfigError for what
    can not be written.
    """
    config = read_json(Path(source) / "config.json") if source is not None else None
    try:
        weights.write_params(Path(path), params, config or config_json(policy_config), source=source)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def config_json(c: PolicyConfig) -> dict:
    """`config.json` in the spelling that transformers 4.57 and 5 both read."""
    v = c.vision
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": list(c.mrope_section)}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": c.image_token_id,
        "video_token_id": c.video_token_id,
        "vision_start_token_id": c.vision_start_token_id,
        "vision_end_token_id": c.vision_end_token_id,
        "tie_word_embeddings": c.tie_word_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "rms_norm_eps": c.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": c.tie_word_embeddings,
            "rope_theta": c.rope_theta,
            "rope_scaling": rope,
            "max_position_embeddings": 262144,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": v.depth,
            "hidden_size": v.hidden_size,
            "intermediate_size": v.intermediate_size,
            "num_heads": v.num_heads,
            "out_hidden_size": v.out_hidden_size,
            "num_position_embeddings": v.num_position_embeddings,
            "deepstack_visual_indexes": list(v.deepstack_visual_indexes),
            "patch_size": v.patch_size,
            "temporal_patch_size": v.temporal_patch_size,
            "spatial_merge_size": v.spatial_merge_size,
            "in_channels": v.in_channels,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }


# ======================================================================================================
# 12  Config files and the command line
# ======================================================================================================


# Least values of whole numbers (or of lists of them), and numbers that must be above 0; `check_config` says the rest.
WHOLE = {
    "": {"seed": 0},
    "policy": {"logits_tokens": 1},
    "data": {"generate_train": 0, "generate_test": 0, "generate_seed": 0},
    "protocol": {"frames": 1, "frame_size": 1, "keyframe_size": 1, "prompt_tokens": 1, "response_tokens": 1}
    | {"action_tokens": 1, "observation_tokens": 1},
    "rollout": {"prompts": 1, "refills": 0, "cache_buckets": 1, "observation_buckets": 1, "decode_tokens": 1}
    | {"least_prompts": 1},
    "update": {"warmup": 0, "minibatches": 1, "micro_prompts": 0, "token_buckets": 1, "row_buckets": 1},
    "warmstart": {"scenes": 1, "rows": 1, "practice": 0, "row_tokens": 1, "keyframes": 1, "warmup": 0},
    "sidecar": {"threads": 1},
    "simulator": {"max_in_flight": 1},
    "expert": {"max_in_flight": 1},
    "evaluate": {"every": 0, "prompts": 1, "draws": 1, "samples": 0, "clips": 0, "gallery": 0},
    "checkpoint": {"every": 0, "keep": 1},
}
POSITIVE = {
    "reward": ("box_l1", "point_l2"),
    "update": ("learning_rate", "clip_norm", "clip_high"),
    "warmstart": ("learning_rate",),
    "sidecar": ("timeout",),
    "simulator": ("timeout",),
    "expert": ("timeout",),
    "evaluate": ("repetition_penalty",),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML with `base:` inheritance and `key.sub=value` overrides into a checked, frozen Config.

    Raises ConfigError, one line, for a missing file, an unknown key (the closest known one is named), a wrong type,
    or a combination that can not work.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def read(file: Path, seen: tuple[Path, ...]) -> Any:
        if file in seen:
            raise ConfigError(f"{file}: base: leads back to itself")
        try:
            raw = OmegaConf.load(file)
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such config; ready ones are in experiments/") from None
        except Exception as error:  # yaml's and OmegaConf's own errors
            raise ConfigError(f"{file}: not a YAML mapping ({data.first_line(error)})") from None
        if not OmegaConf.is_dict(raw):
            raise ConfigError(f"{file}: a config is a mapping of keys, this is a list or a single value")
        base = raw.pop("base", None)
        if base is None:
            return raw
        if not isinstance(base, str):
            raise ConfigError(f"{file}: base: must be the path of another YAML, not {base!r}")
        return OmegaConf.merge(read((file.parent / base).resolve(), (*seen, file)), raw)

    def known(raw: Mapping[str, Any], section: type, where: str, prefix: str = "") -> None:
        names = {f.name: f for f in dataclasses.fields(section)}
        for key, value in raw.items():
            if key not in names:
                close = difflib.get_close_matches(str(key), names, 1, 0.4)
                hint = f"; closest is {prefix}{close[0]}" if close else f"; known: {', '.join(names)}"
                raise ConfigError(f"{where}: unknown key {prefix}{key}{hint}")
            inner = type(names[key].default)
            if dataclasses.is_dataclass(inner):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{where}: {prefix}{key} is a section of keys, got {value!r}")
                known(value, inner, where, f"{prefix}{key}.")

    def on_topology(raw: Any, name: Any) -> Any:
        """What a YAML says of the machine that was chosen stands between its common keys and the command line."""
        machines = raw.pop("topologies", None) or {}
        if name is None or not machines:
            return raw
        if not OmegaConf.is_dict(machines) or not OmegaConf.is_dict(machines.get(name)):
            names = ", ".join(map(str, machines)) if OmegaConf.is_dict(machines) else "a mapping of names to keys only"
            raise ConfigError(f"topology={name}: {path} knows {names}")
        known(OmegaConf.to_container(machines[name]), Config, f"{path}: topologies.{name}")
        return OmegaConf.merge(raw, machines[name])

    file = Path(path).resolve()
    try:
        raw, told = read(file, ()), OmegaConf.create()
        for item in overrides:
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"override {item!r} is not key=value, for example steps=4")
            try:
                given = OmegaConf.from_dotlist([item])
            except OmegaConfBaseException:
                raise
            except Exception as error:  # yaml's own errors
                reason = data.first_line(error)
                raise ConfigError(f"override {item!r} is not YAML ({reason}); such as steps=4") from None
            known(OmegaConf.to_container(given), Config, "command line")
            told = OmegaConf.merge(told, given)
        raw = OmegaConf.merge(on_topology(raw, told.get("topology", raw.get("topology"))), told)
        known(OmegaConf.to_container(raw, resolve=True), Config, str(path))
        schema = OmegaConf.structured(Config)
        for node in (schema, *(schema[f.name] for f in dataclasses.fields(Config))):
            if OmegaConf.is_config(node):  # frozen dataclasses come as read-only nodes
                OmegaConf.set_readonly(node, False)
        config = OmegaConf.to_object(OmegaConf.merge(schema, raw))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {getattr(error, 'full_key', '')}: {data.first_line(error)}") from None
    return check_config(settled(config))


def settled(c: Config) -> Config:
    """The config with the defaults that depend on `update.loss` filled in (METHOD.md 4.6, 4.10, 5.1)."""
    loss = c.update.loss
    update = {"learning_rate": 1e-5 if loss == "sdpo" else 1e-6, "clip_high": 0.28 if loss == "vanilla" else 0.2}
    credit = {"teacher_update": "ema" if loss == "sdpo" else "sync"}
    missing = lambda section, defaults: {k: v for k, v in defaults.items() if getattr(section, k) is None}  # noqa: E731
    return dataclasses.replace(
        c,
        update=dataclasses.replace(c.update, **missing(c.update, update)),
        credit=dataclasses.replace(c.credit, **missing(c.credit, credit)),
    )


def check_config(c: Config) -> Config:
    """Refuses what can not work before anything is compiled. Raises ConfigError."""

    def need(ok: bool, key: str, given: Any, works: str) -> None:
        if not ok:
            raise ConfigError(f"{key}={given}: {works}")

    need(c.stage in ("rl", "sft"), "stage", c.stage, "use rl or sft")
    need(c.steps >= 1, "steps", c.steps, "use 1 or more")
    need(c.seed < 2**31, "seed", c.seed, "use a number below 2147483648")
    need(c.policy.dtype in ("float32", "bfloat16"), "policy.dtype", c.policy.dtype, "use float32 or bfloat16")
    kinds = ("xla", "splash", "cudnn")
    need(c.policy.attention in kinds, "policy.attention", c.policy.attention, f"use one of {', '.join(kinds)}")
    need(
        c.policy.attention == "xla" or c.stage == "rl",
        "policy.attention",
        c.policy.attention,
        "stage=sft packs several dialogues into a row, which only xla masks",
    )
    need(
        c.policy.attention == "xla" or not c.update.row_buckets,
        "update.row_buckets",
        c.update.row_buckets,
        "several rollouts in a row are masked by policy.attention=xla alone; use [] or that",
    )
    need(
        c.policy.attention != "cudnn" or c.policy.dtype == "bfloat16",
        "policy.dtype",
        c.policy.dtype,
        "policy.attention=cudnn computes in bfloat16",
    )
    need(c.protocol.prompts in PROMPTS, "protocol.prompts", c.protocol.prompts, f"use one of {', '.join(PROMPTS)}")
    need(c.protocol.max_turns >= 1, "protocol.max_turns", c.protocol.max_turns, "use 1 or more (6 in the paper)")
    need(
        c.rollout.rollouts >= 2 or c.stage == "sft",
        "rollout.rollouts",
        c.rollout.rollouts,
        "group statistics need 2 or more (8 in the paper)",
    )
    need(
        math.isfinite(c.rollout.temperature) and c.rollout.temperature > 0,
        "rollout.temperature",
        c.rollout.temperature,
        "use a positive number (1.0 in the paper)",
    )
    for section, keys in WHOLE.items():
        for key, least in keys.items():
            given = getattr(getattr(c, section) if section else c, key)
            name = f"{section}.{key}" if section else key
            for value in given if isinstance(given, list) else [given]:
                need(value >= least, name, given, f"use {least} or more")
            need(given != [] or key == "row_buckets", name, given, "give at least one size")
    try:
        profiled(c)
    except ValueError:
        need(False, "profile.steps", c.profile.steps, f"use first..last from 1 to steps={c.steps}, for example 3..5")
    for section, keys in POSITIVE.items():
        for key in keys:
            given = getattr(getattr(c, section), key)
            need(math.isfinite(given) and given > 0, f"{section}.{key}", given, "use a positive number")
    divisors = lambda n: ", ".join(str(k) for k in range(1, n + 1) if n % k == 0)  # noqa: E731
    need(
        c.rollout.prompts % c.update.minibatches == 0,
        "update.minibatches",
        c.update.minibatches,
        f"must divide rollout.prompts={c.rollout.prompts}; use one of {divisors(c.rollout.prompts)}",
    )
    per = c.rollout.prompts // c.update.minibatches
    need(
        c.update.micro_prompts == 0 or per % c.update.micro_prompts == 0 or c.stage == "sft",
        "update.micro_prompts",
        c.update.micro_prompts,
        f"must divide the {per} prompts of a minibatch; use 0 (all at once) or one of {divisors(per)}",
    )
    need(0 <= c.credit.lam <= 1, "credit.lam", c.credit.lam, "use a number from 0 to 1 (0.5 in the paper)")
    need(c.credit.lam_decay > 0, "credit.lam_decay", c.credit.lam_decay, "use 1 or more steps")
    need(0 <= c.credit.weight_clip < 1, "credit.weight_clip", c.credit.weight_clip, "use a number from 0 to below 1")
    for name, levels in (("protocol.clarify", c.protocol.clarify), ("evaluate.clarify", c.evaluate.clarify or [])):
        for level in set(levels) - set(LEVELS):  # other datasets have levels of their own; a slip of the pen is refused
            close = difflib.get_close_matches(level, LEVELS, 1, 0.75)
            need(not close, name, levels, f"no query is {level!r}; closest is {close and close[0]}")
    for level, times in c.data.repeat.items():
        need(times >= 0, f"data.repeat.{level}", times, "use 0 (leave them out) or more")
    for key, given, kinds in (
        ("update.loss", c.update.loss, LOSSES),
        ("credit.teacher_context", c.credit.teacher_context, CONTEXTS),
        ("credit.teacher_update", c.credit.teacher_update, ("sync", "ema")),
        ("credit.delta_baseline", c.credit.delta_baseline, ("student", "teacher_plain")),
        ("credit.turn_credit", c.credit.turn_credit, ("scalar", "local")),
        ("credit.weigh", c.credit.weigh, ("all", "questions")),
        ("reward.no_question", c.reward.no_question, ("zero", "format")),
        ("protocol.keyframe", c.protocol.keyframe, ("last", "first")),
    ):
        need(given in kinds, key, given, f"use one of {', '.join(kinds)}")
    need(
        c.update.loss != "sdpo" or c.credit.teacher_context != "none",
        "credit.teacher_context",
        "none",
        "update.loss=sdpo distils a teacher that is told something; use guidance",
    )
    need(0 < c.credit.ema_rate <= 1, "credit.ema_rate", c.credit.ema_rate, "use 0 < rate <= 1 (0.05 in the paper)")
    for key, given in (
        ("credit.turn_weight", c.credit.turn_weight),
        ("reward.redundant_cost", c.reward.redundant_cost),
        ("update.weight_decay", c.update.weight_decay),
    ):
        need(math.isfinite(given) and given >= 0, key, given, "use a number from 0 up")
    for key, given in (("update.beta1", c.update.beta1), ("update.beta2", c.update.beta2)):
        need(0 <= given < 1, key, given, "use a number from 0 to below 1")
    need(c.credit.guidance_tokens >= 16, "credit.guidance_tokens", c.credit.guidance_tokens, "use 16 or more")
    need(c.update.sdpo_top_k >= 1, "update.sdpo_top_k", c.update.sdpo_top_k, "use 1 or more (100 in the paper)")
    need(0 <= c.update.sdpo_alpha <= 1, "update.sdpo_alpha", c.update.sdpo_alpha, "use a number from 0 to 1")
    need(c.update.sdpo_is_clip > 0, "update.sdpo_is_clip", c.update.sdpo_is_clip, "use a positive number (2.0)")
    need(c.credit.sync_interval >= 1, "credit.sync_interval", c.credit.sync_interval, "use 1 or more steps")
    need(c.reward.process in TURN_KINDS, "reward.process", c.reward.process, f"use one of {', '.join(TURN_KINDS)}")
    unknown = set(c.reward.weights) - set(TERMS)
    need(not unknown, "reward.weights", sorted(unknown), f"known terms: {', '.join(TERMS)}")
    need(
        any(w > 0 for w in c.reward.weights.values()),
        "reward.weights",
        dict(c.reward.weights),
        "at least one weight must be above 0",
    )
    need(0 <= c.update.decay <= 1, "update.decay", c.update.decay, "use a share of the run, from 0 to 1")
    need(c.update.dual_clip > 1, "update.dual_clip", c.update.dual_clip, "use a number above 1 (3.0 in the paper)")
    need(0 < c.update.clip_low < 1, "update.clip_low", c.update.clip_low, "use 0 < clip_low < 1 (0.2 in the paper)")
    need(
        c.credit.turn_credit == "scalar" or c.reward.process in ("reduction", "ratio", "log"),
        "reward.process",
        c.reward.process,
        "credit.turn_credit=local gives each question its own gain; use reduction, ratio or log",
    )
    for term, weight in c.reward.weights.items():
        need(math.isfinite(weight) and weight >= 0, f"reward.weights.{term}", weight, "use a number from 0 up")
    need(0 < c.reward.iou < 1, "reward.iou", c.reward.iou, "use a number between 0 and 1 (0.5 in the paper)")
    need(0 < c.reward.success <= 1, "reward.success", c.reward.success, "use a share of the maximum (0.7 in the paper)")
    rates, mix = c.warmstart.rates, c.warmstart.mix
    alone = "random weights and the synthetic world's words cannot be taught these; null starts from policy.path"
    need(not (c.stage == "sft" and mix and c.policy.shape), "policy.shape", c.policy.shape, f"{alone} (warmstart.mix)")
    ok = len(rates) == len(mix) and all(math.isfinite(rate) and rate > 0 for rate in rates)
    need(ok, "warmstart.rates", rates, f"give a number above 0 for each of the {len(mix)} folders of warmstart.mix")
    need(0 <= c.warmstart.reading <= 1, "warmstart.reading", c.warmstart.reading, "a share of the run, from 0 to 1")
    shares = c.warmstart.conversations + c.warmstart.mask_types
    need(shares <= 1, "warmstart.mask_types", c.warmstart.mask_types, "with conversations it must stay within 1")
    for name in ("conversations", "mask_types", "skill", "guided", "dialogues_start", "dialogues", "decay"):
        given = getattr(c.warmstart, name)
        need(0 <= given <= 1, f"warmstart.{name}", given, "use a share, from 0 to 1")
    given = c.warmstart.patch_words
    need(math.isfinite(given) and given >= 0, "warmstart.patch_words", given, "use a weight from 0 up")
    for key, given in (
        ("simulator.flip", c.simulator.flip),
        ("simulator.refuse", c.simulator.refuse),
        ("evaluate.flip", c.evaluate.flip),
        ("evaluate.refuse", c.evaluate.refuse),
    ):
        need(given is None or 0 <= given <= 1, key, given, "use a probability, from 0 to 1")
    presence = c.evaluate.presence_penalty
    need(math.isfinite(presence), "evaluate.presence_penalty", presence, "use 0 (off) or a number such as 1.0")
    turns = c.evaluate.max_turns
    works = f"use 1 to protocol.max_turns={c.protocol.max_turns}"
    need(turns is None or 1 <= turns <= c.protocol.max_turns, "evaluate.max_turns", turns, works)
    if c.sidecar.address is not None:
        try:
            parse_address(c.sidecar.address)
        except ValueError as error:
            raise ConfigError(f"sidecar.address={c.sidecar.address}: {error}") from None
    kinds = ("joint", "sequential")
    need(c.sidecar.prompting in kinds, "sidecar.prompting", c.sidecar.prompting, f"use one of {', '.join(kinds)}")
    room = c.sidecar.cache_gb
    need(math.isfinite(room) and room >= 0, "sidecar.cache_gb", room, "use a number of GB, or 0 to keep none")
    kinds = ("oracle", "person", "endpoint", "local")
    need(c.simulator.kind in kinds, "simulator.kind", c.simulator.kind, f"use one of {', '.join(kinds)}")
    need(c.expert.kind in ("oracle", "endpoint"), "expert.kind", c.expert.kind, "use oracle or endpoint")
    for name, there in (("simulator", c.simulator), ("expert", c.expert)):
        if there.kind == "endpoint":
            need(bool(there.model), f"{name}.model", there.model, "give a name that the server lists under /models")
            try:
                simulator.check_url(there.url or "")
            except ValueError as error:  # the URL itself may hold a password: it is not repeated
                raise ConfigError(f"{name}.url: {error}") from None
    need(
        c.simulator.kind != "local" or bool(c.simulator.path),
        "simulator.path",
        c.simulator.path,
        "a local user is a policy; give its directory, such as asset:embedded_base",
    )
    errs = any((c.simulator.flip, c.simulator.refuse, c.evaluate.flip, c.evaluate.refuse))
    need(
        c.simulator.kind not in ("endpoint", "local") or not errs,
        "simulator.kind",
        c.simulator.kind,
        "flip and refuse are for users of the synthetic world; leave them 0",
    )
    need(
        max(c.update.token_buckets) >= c.protocol.response_tokens,
        "update.token_buckets",
        list(c.update.token_buckets),
        f"the largest must hold protocol.response_tokens={c.protocol.response_tokens}",
    )
    need(
        max(c.rollout.cache_buckets) >= c.protocol.response_tokens,
        "rollout.cache_buckets",
        list(c.rollout.cache_buckets),
        f"the largest must hold protocol.response_tokens={c.protocol.response_tokens}",
    )
    # Each process asks about its own rows: a policy on all their devices answers only when all of them ask, and most of
    # them have no terminal.
    alone = c.simulator.kind not in ("local", "person") or not c.mesh.distributed
    need(alone, "simulator.kind", c.simulator.kind, "with mesh.distributed=true use endpoint or oracle")
    need(c.mesh.preset in PRESETS, "mesh.preset", c.mesh.preset, f"use one of {', '.join(PRESETS)}")
    for axis in AXES:
        size = getattr(c.mesh, axis)
        ok = size is None or size == -1 or size >= 1
        need(ok, f"mesh.{axis}", size, "use -1 (what is left) or a count of devices")
    return c


def profiled(c: Config) -> range:
    """The steps of `profile.steps`. Raises ValueError."""
    if c.profile.steps is None:
        return range(0)
    first, last = map(int, c.profile.steps.split(".."))
    if not 1 <= first <= last <= c.steps:
        raise ValueError
    return range(first, last + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m icseg_jax.train CONFIG [key=value ...]`. Returns 0 when done or saved, 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    run = None
    try:
        config = load_config(arguments[0], arguments[1:])
        if config.mesh.distributed:
            join_processes()
        run = Run(config)
        if run.finished:
            page = run.path / ("report.html" if config.stage == "rl" else "trained")
            print(f"{run.path}: this run is finished; see {page if page.exists() else run.path}")
            return 0
        run.catch_signals()
        cache_programs()
        {"sft": train_warmstart, "rl": train_policy}[config.stage](config, run)
        return 0
    except (ConfigError, data.DataError, SidecarError) as error:
        print(f"error: {data.first_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in data.MACHINE | {errno.EACCES, errno.EPERM}:
            raise
        works = "give it room and the right to write, or another run_dir= or data.path="
        print(f"error: {error.filename or 'a write'}: {error.strerror}; {works}; the same command then goes on from "
              "the last checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if run is not None:
            run.close()


def peak_memory(process: int | str | None) -> float | None:
    """The most memory that a process has held, in GB; None where the system does not say (it is Linux that does)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9, 3)
    return None


def count_compilations() -> dict[str, float]:
    """Seconds that XLA spends on programs and how many it made or read from the cache, from now on. They are part of
    the phases they fall in."""
    out = {"seconds": 0.0, "programs": 0}

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            out["seconds"] += seconds
            out["programs"] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    return out


def cache_programs() -> None:
    """Compiled programs are kept between runs; JAX_COMPILATION_CACHE_DIR says where, an empty value turns it off."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "icseg_jax" / "programs"))
    if folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


USAGE = """usage: python -m icseg_jax.train CONFIG.yaml [key=value ...]

Trains IC-Seg as the config says. The same command on an unfinished run resumes it.
  python -m icseg_jax.train experiments/embedded.yaml
  python -m icseg_jax.train experiments/embedded.yaml steps=4 run_dir=/tmp/try update.learning_rate=1e-4
Keys and their meaning: section 1 of icseg_jax/train.py."""


def leave_together() -> None:
    """Holds all processes until the first has written everything: five minutes after one has left, JAX ends it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the end")


if __name__ == "__main__":
    leave(main)
