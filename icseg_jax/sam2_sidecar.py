"""SAM2 in a process of its own: the PyTorch side, its protocol, and the client that the trainer holds.

The trainer never imports torch (DESIGN.md section 7). It starts `python -m icseg_jax.sam2_sidecar serve`,
registers frames once, and sends ids, boxes and points; masks, or one IoU per row, come back. Torch is
imported only inside the functions that need it, so that importing this module for `SegmenterClient` stays
light.

Contents
  1 Wire        messages: msgpack over ZeroMQ, signed when a secret is set
  2 Segmenter   a SAM2 model: embed a frame, segment prompts, track through a video (METHOD.md 5.2)
  3 Server      `serve`: caches, validation, one reply for every message
  4 Client      `SegmenterClient`: deadlines, restart, joining of concurrent calls
  5 Training    `train CONFIG`: the small segmenter of the embedded world, from nothing
  6 main

A segmenter on disk is a released SAM 2.1 checkpoint (`sam2.1_hiera_large.pt`, under any name that ends in `.pt`),
or a directory: `config.json` is the `sam2` package's own model configuration (the `model` node of its YAML
files), `model.safetensors` its weights, in any float type; `import CHECKPOINT.pt OUT` makes the second of the
first. A second mask decoder, which draws complete instead of visible masks (R2SM, DATA.md section 2), is there
when weights named `complete_mask_decoder.*` are.

Coordinates of boxes and points are 0..1000 of the frame's width and height everywhere in this file (METHOD.md
1.6).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import fcntl
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
import zmq
from jaxtyping import Bool, Float, UInt8

log = logging.getLogger("icseg_jax.sam2_sidecar")

ASSET = Path(__file__).parent / "assets" / "sam2_mini"
SECRET_VARIABLE = "ICSEG_SIDECAR_SECRET"
CACHE_VARIABLE = "ICSEG_EMBEDDINGS"
MASK_TYPES = ("modal", "amodal")
PROMPTING = ("joint", "sequential")
_PREFIX = "icseg-sam2-"  # of the private directories that hold sockets
BATCH = 8  # prompts in every decoder call, padded: a mask can't depend on how many were asked for together
CHUNK = 8  # frames of a tracked video that are held at a time
# A shared server follows a video for each process of a pod, so one is given up only when nobody asks for its next
# frames. The limit of their number is for memory; so many live ones would not be answered in time anyway.
IDLE = 600  # seconds without a request, after which a tracked video is given up
TRACKS = 64  # videos that a server follows at a time
EMBEDDINGS = 2**29  # bytes of embeddings that a server holds in memory: 32 frames of a released model
FRAMES = 2**30  # bytes of frames and truths (130 of 1080p) that client and server each keep beyond what a step needs
RELEASED = {(96, 12): ("t", "tiny"), (96, 16): ("s", "small"), (112, 24): ("b+", "base_plus"),
            (144, 48): ("l", "large")}  # SAM 2.1's sizes by the trunk's first channels and blocks
DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything_2/092824/"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _write_bytes(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------
# 1 Wire
# --------------------------------------------------------------------------------------------------
# A message is two ZeroMQ frames: the HMAC-SHA256 of the second under the shared secret (empty without one),
# and a msgpack map. A request holds "op" and its arguments; a reply what was asked for, or "error", one line.
#   ping     -> pid, amodal
#   stats    -> counters
#   segment  frames?: [{video, frame, image, shape?, truth?}], remembered for this and later messages. `image`: raw
#            RGB bytes of `shape` [h, w, 3], or a PNG or JPEG file's bytes; `truth`: mask bits of the frame's size.
#            The same video and frame again replaces.
#            rows: [{video, frame, box, point, mask_type}], want: "iou" | "mask", prompting
#            -> rows: [{iou} | {mask, shape} | {error, missing?}]; missing: send the frame (again)
#   track    frames: how many, objects: [{position, box, point, mask_type}], prompting -> track, next
#   advance  track, images: [{image, shape?}], those of `next` -> masks: [{frame, object, mask, shape}], next;
#            or forgotten. A video is never here as a whole: `next` names the frames wanted now, none at the end


class SidecarError(RuntimeError):
    """The sidecar is dead, stuck, or refused a request."""


def encode_message(message: dict, secret: bytes = b"") -> list[bytes]:
    body = msgpack.packb(message)
    return [_sign(body, secret), body]


def decode_message(parts: Sequence[bytes], secret: bytes = b"") -> dict:
    """Raises ValueError when the message is not ours, not signed with the secret, or not a map."""
    if len(parts) != 2:
        raise ValueError(f"a message has 2 parts, this one {len(parts)}")
    if not hmac.compare_digest(parts[0], _sign(parts[1], secret)):
        raise ValueError(f"wrong secret; both sides need the same {SECRET_VARIABLE}")
    try:
        message = msgpack.unpackb(parts[1])
    except Exception as error:  # msgpack has half a dozen kinds
        raise ValueError(f"not msgpack ({_one_line(error)})") from None
    if not isinstance(message, dict):
        raise ValueError(f"expected a map, not {type(message).__name__}")
    return message


def _sign(body: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, body, hashlib.sha256) if secret else b""


def parse_address(text: str) -> str:
    """A ZeroMQ address of a socket path, `ipc://PATH` or `tcp://HOST:PORT`.

    Raises ValueError for anything else, and for a host beyond this machine when no secret is set.
    """
    if "://" not in text:
        text = f"ipc://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{text}: not an address; write tcp://HOST:PORT or a socket's path") from None
    if parts.scheme == "ipc" and len(text) > len("ipc://"):
        return text
    # Nothing but host and port: ZeroMQ refuses a path, a query or a user.
    if text != f"tcp://{parts.netloc}" or "@" in text or not host or port is None:
        raise ValueError(f"{text}: not an address; write tcp://HOST:PORT or a socket's path")
    loopback = host in ("localhost", "::1") or (host.startswith("127.") and host.count(".") == 3)
    if not loopback and not _secret():
        raise ValueError(f"{text}: is not on this machine; set the same {SECRET_VARIABLE} for both sides")
    return text


def _secret() -> bytes:
    return os.environ.get(SECRET_VARIABLE, "").encode()


def pack_mask(mask: Bool[np.ndarray, ...]) -> bytes:
    return np.packbits(mask).tobytes()


def unpack_mask(data: bytes, shape: Sequence[int]) -> Bool[np.ndarray, ...]:
    """Raises ValueError when the bits are not exactly those of the shape."""
    count = math.prod(shape)
    if not isinstance(data, bytes) or len(data) != (count + 7) // 8:
        raise ValueError(f"mask bits: expected {(count + 7) // 8} bytes for {list(shape)}")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count).astype(bool).reshape(shape)


# --------------------------------------------------------------------------------------------------
# 2 Segmenter
# --------------------------------------------------------------------------------------------------


def import_torchvision() -> None:
    """Imports torchvision, also where its compiled operators don't fit the installed torch (CPU builds).

    Nothing in this file needs it; `sam2`'s image predictor and transformers' image code do, for their
    pure-Python transforms. Declaring the two operators whose absence stops the import is enough (DESIGN.md
    section 7).
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.operators = operators  # they are withdrawn when the object dies
        import torchvision  # noqa: F401


def mini_config(image_size: int, embed_dim: int, stages: Sequence[int], width: int, memories: int) -> dict:
    """The `sam2` package's configuration of a small model: Hiera trunk, `memories` frames of memory, one
    mask."""
    package = "sam2.modeling."
    grid = image_size // 16

    def positions(channels):
        return {"_target_": package + "position_encoding.PositionEmbeddingSine", "num_pos_feats": channels,
                "normalize": True, "scale": None, "temperature": 10000}

    def attention(**more):
        return {"_target_": package + "sam.transformer.RoPEAttention", "rope_theta": 10000.0,
                "feat_sizes": [grid, grid], "embedding_dim": width, "num_heads": 1, "downsample_rate": 1,
                "dropout": 0.0, **more}

    return {
        "_target_": package + "sam2_base.SAM2Base",
        "image_encoder": {
            "_target_": package + "backbones.image_encoder.ImageEncoder",
            "scalp": 1,
            "trunk": {
                "_target_": package + "backbones.hieradet.Hiera", "embed_dim": embed_dim, "num_heads": 1,
                "stages": list(stages), "global_att_blocks": [sum(stages[:3]) - 1],
                "window_spec": [8, 4, grid, 8], "window_pos_embed_bkg_spatial_size": [8, 8],
            },
            "neck": {
                "_target_": package + "backbones.image_encoder.FpnNeck", "d_model": width,
                "backbone_channel_list": [embed_dim * 2**i for i in (3, 2, 1, 0)],
                "position_encoding": positions(width), "fpn_top_down_levels": [2, 3],
                "fpn_interp_model": "nearest",
            },
        },
        "memory_attention": {
            "_target_": package + "memory_attention.MemoryAttention", "d_model": width,
            "pos_enc_at_input": True, "num_layers": 2,
            "layer": {
                "_target_": package + "memory_attention.MemoryAttentionLayer", "activation": "relu",
                "dim_feedforward": 4 * width, "dropout": 0.0, "d_model": width, "pos_enc_at_attn": False,
                "pos_enc_at_cross_attn_keys": True, "pos_enc_at_cross_attn_queries": False,
                "self_attention": attention(),
                "cross_attention": attention(rope_k_repeat=True, kv_in_dim=width),
            },
        },
        "memory_encoder": {
            "_target_": package + "memory_encoder.MemoryEncoder", "in_dim": width, "out_dim": width,
            "position_encoding": positions(width),
            "mask_downsampler": {"_target_": package + "memory_encoder.MaskDownSampler", "embed_dim": width,
                                 "kernel_size": 3, "stride": 2, "padding": 1},
            "fuser": {"_target_": package + "memory_encoder.Fuser", "num_layers": 2,
                      "layer": {"_target_": package + "memory_encoder.CXBlock", "dim": width, "padding": 3,
                                "kernel_size": 7, "layer_scale_init_value": 0.1, "use_dwconv": True}},
        },
        "image_size": image_size, "num_maskmem": memories, "max_obj_ptrs_in_encoder": memories,
        "sigmoid_scale_for_mem_enc": 20.0, "sigmoid_bias_for_mem_enc": -10.0,
        "binarize_mask_from_pts_for_mem_enc": True, "use_mask_input_as_output_without_sam": True,
        "directly_add_no_mem_embed": True, "no_obj_embed_spatial": True, "use_high_res_features_in_sam": True,
        "iou_prediction_use_sigmoid": True, "use_obj_ptrs_in_encoder": True, "add_tpos_enc_to_obj_ptrs": True,
        "proj_tpos_enc_in_obj_ptrs": True, "use_signed_tpos_enc_to_obj_ptrs": True,
        "only_obj_ptrs_in_the_past_for_eval": True, "pred_obj_scores": True, "pred_obj_scores_mlp": True,
        "fixed_no_obj_ptr": True, "use_mlp_for_obj_ptr_proj": True,
    }


def build_model(config: dict) -> Any:
    """The `sam2` package's model (torch) of a configuration; any of its own files will do, SAM 2.1's too.

    Raises ValueError when the configuration names a class outside the package: it is data, not a program.
    """
    from hydra.utils import get_class, instantiate
    from omegaconf import OmegaConf

    def ours(target: Any) -> bool:
        if not isinstance(target, str) or not target.startswith("sam2.modeling."):
            return False
        try:  # a path may lead on to what a module imports: where the class was written counts
            return get_class(target).__module__.startswith("sam2.modeling.")
        except Exception:  # hydra wraps whatever importing raises
            return False

    def check(node):
        if isinstance(node, str) and "${" in node:  # OmegaConf would put in a node of its own, which nobody checked
            raise ValueError(f"segmenter config: {node[:60]!r} is an interpolation; write the value itself")
        if isinstance(node, dict):
            if "_target_" in node and not ours(node["_target_"]):
                raise ValueError(f"segmenter config: _target_ {node['_target_']!r} is not a class of sam2.modeling")
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(child)

    check(config)
    if "_target_" not in config:
        raise ValueError("segmenter config: no _target_; expected sam2.modeling.sam2_base.SAM2Base")
    try:
        return instantiate(OmegaConf.create(config)).eval()
    except Exception as error:  # hydra wraps whatever the classes raise
        raise ValueError(f"segmenter config: {_one_line(error)}") from None


def add_complete_decoder(model: Any) -> None:
    """Gives the model a second mask decoder, a copy of the first, to be trained on complete masks."""
    model.complete_mask_decoder = copy.deepcopy(model.sam_mask_decoder)
    for name in ("conv_s0", "conv_s1"):  # these belong to the frame's embedding, which both decoders share
        if hasattr(model.complete_mask_decoder, name):
            delattr(model.complete_mask_decoder, name)


def load_segmenter(path: str | Path) -> Segmenter:
    """The segmenter in a directory or a released checkpoint (see the module docstring), in float32.

    Raises FileNotFoundError when a file is missing and ValueError when one is damaged or they don't fit
    together.
    """
    path = Path(path)
    config, weights = _read_released(path) if path.suffix == ".pt" else _read_directory(path)
    model = build_model(config)
    if any(name.startswith("complete_mask_decoder.") for name in weights):
        add_complete_decoder(model)
    try:
        model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: weights and config don't fit ({_one_line(error)})") from None
    return Segmenter(model, config)


def _read_directory(path: Path) -> tuple[dict, dict]:
    import safetensors.torch

    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name}: no such file; a segmenter is a directory with config.json and "
                                    f"model.safetensors, such as {ASSET}, or a SAM 2.1 checkpoint, such as "
                                    f"{DOWNLOADS}sam2.1_hiera_large.pt")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(path / "model.safetensors")
    except Exception as error:  # json and safetensors each have their own kinds
        raise ValueError(f"{path}: damaged segmenter ({_one_line(error)})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path / 'config.json'}: expected an object, sam2's model configuration")
    return config, weights


def _read_released(path: Path) -> tuple[dict, dict]:
    """Configuration and weights of a SAM 2.1 checkpoint as Meta released it, whatever the file is called.

    The configuration is the installed package's, with what its `build_sam2_video_predictor` adds by default,
    but for the filling of holes (8 pixels or less of a mask at a quarter of the model's resolution): that
    needs its CUDA extension and is left out without it there too.
    """
    import torch
    from omegaconf import OmegaConf

    names = ", ".join(f"sam2.1_hiera_{name}.pt" for _, name in RELEASED.values())
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; get one of {names} from {DOWNLOADS}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        trunk = "image_encoder.trunk."
        blocks = {name.removeprefix(trunk + "blocks.").partition(".")[0] for name in weights
                  if name.startswith(trunk + "blocks.")}
        size = RELEASED.get((len(weights[trunk + "patch_embed.proj.weight"]), len(blocks)))
        if not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
            raise ValueError("not all of its weights are tensors")
    except Exception as error:  # torch, zipfile and whatever a stranger's file does to them
        raise ValueError(f"{path}: not a SAM 2.1 checkpoint ({_one_line(error)}); get one of {names} from "
                         f"{DOWNLOADS}") from None
    if size is None or "no_obj_embed_spatial" not in weights:  # SAM 2 lacks the latter
        raise ValueError(f"{path}: not a SAM 2.1 checkpoint; get one of {names} from {DOWNLOADS}")
    package = importlib.util.find_spec("sam2")  # its YAML lies in the package
    if package is None:
        raise ValueError(f"{path}: needs the sam2 package; `pip install 'icseg_jax[sam2]'`")
    file = Path(package.submodule_search_locations[0]) / "configs/sam2.1" / f"sam2.1_hiera_{size[0]}.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(file)["model"])
    except Exception as error:  # yaml and omegaconf each have their own kinds
        raise ValueError(f"{file}: not sam2's configuration ({_one_line(error)}); install sam2 1.1 again") from None
    stable = {"dynamic_multimask_via_stability": True, "dynamic_multimask_stability_delta": 0.05,
              "dynamic_multimask_stability_thresh": 0.98}
    return {**config, "binarize_mask_from_pts_for_mem_enc": True, "sam_mask_decoder_extra_args": stable}, weights


def import_checkpoint(checkpoint: str | Path, out: str | Path) -> None:
    """Writes a released SAM 2.1 checkpoint as a directory, weights in float32 as released.

    Raises as `load_segmenter` does, and ValueError when `out` exists.
    """
    import torch

    out = Path(out)
    if Path(checkpoint).suffix != ".pt":
        raise ValueError(f"{checkpoint}: expected a released checkpoint, a file that ends in .pt")
    if out.exists():
        raise ValueError(f"{out}: is there already; give a new directory")
    segmenter = load_segmenter(checkpoint)
    partial = out.with_name(out.name + ".partial")  # a directory that is there is whole
    save_segmenter(partial, segmenter.model, segmenter.config, torch.float32)
    os.replace(partial, out)


def save_segmenter(path: str | Path, model: Any, config: dict, dtype: Any = None) -> None:
    """Writes the directory that `load_segmenter` reads, weights in `dtype` (float16); each file appears whole or
    not at all."""
    import safetensors.torch
    import torch

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dtype = dtype or torch.float16
    weights = {name: weight.to("cpu", dtype).contiguous() for name, weight in model.state_dict().items()}
    _write_bytes(path / "model.safetensors", safetensors.torch.save(weights))
    _write_bytes(path / "config.json", (json.dumps(config, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Prompt:
    """What to segment: a box x1 y1 x2 y2, a point x y, or both, in 0..1000 of the frame."""

    box: tuple[float, ...] | None
    point: tuple[float, ...] | None
    mask_type: str = "modal"  # "modal": the visible part; "amodal": the whole object

    @property
    def empty(self) -> bool:
        return self.box is None and self.point is None


def prompt_of_mask(mask: Bool[np.ndarray, "h w"], mask_type: str = "modal") -> Prompt:
    """Box and innermost point of a mask that holds at least one pixel."""
    y1, x1, y2, x2, y, x = _extent(mask)
    height, width = mask.shape
    return Prompt((x1 * 1000 / width, y1 * 1000 / height, x2 * 1000 / width, y2 * 1000 / height),
                  (x * 1000 / width, y * 1000 / height), mask_type)


def _extent(mask: np.ndarray) -> tuple[int, ...]:
    """y1 x1 y2 x2 (inclusive) and the y x farthest from the mask's border."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y1, y2, x1, x2 = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    depth = distance_transform_edt(np.pad(mask[y1 : y2 + 1, x1 : x2 + 1], 1))
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return y1, x1, y2, x2, y1 + int(y) - 1, x1 + int(x) - 1


class Segmenter:
    """A SAM2 model behind four verbs: embed, segment, track, and the step that training uses too.

    "Features" are the model's pyramid of B frames, a list of tensors [B, C, h, w]. `config` is what the model
    was built from.
    """

    def __init__(self, model: Any, config: dict | None = None):
        self.model, self.config = model.eval(), config

    def fingerprint(self) -> bytes:
        """Changes with whatever an embedding may depend on beside the frame: configuration, weights, and the
        software and threads that add the numbers up."""
        import torch

        backend = [torch.__version__, self.model.device.type, torch.backends.cpu.get_cpu_capability(),
                   torch.get_num_threads()]
        digest = hashlib.blake2b(json.dumps([self.config, backend], sort_keys=True).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.digest()

    @property
    def has_complete(self) -> bool:
        return hasattr(self.model, "complete_mask_decoder")

    def pixels(self, images: UInt8[np.ndarray, "b h w 3"]) -> Any:
        """Frames as the model sees them: [B, 3, size, size], normalised as the package does."""
        import torch
        import torch.nn.functional as F

        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=self.model.device)
        x = (torch.from_numpy(np.array(images)).to(self.model.device).float() / 255 - mean) / std
        size = (self.model.image_size,) * 2
        return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)

    def features(self, images: UInt8[np.ndarray, "b h w 3"]) -> list:
        """Encodes frames. Serving gives one frame at a time, so that an embedding has no neighbours."""
        return self.model.forward_image(self.pixels(images))["backbone_fpn"][-self.model.num_feature_levels :]

    def step(self, features: list, prompts: Sequence[Prompt] = (), *, previous: Any = None, frame: int = 0,
             frames: int = 1, memory: dict | None = None, reverse: bool = False) -> dict:
        """The package's tracking step on a batch: `pred_masks` [B, 1, h, w] logits and what memory needs.

        `prompts` (all of one kind) start a track or refine `previous` logits; without prompts the masks
        follow `memory` (the package's output dict). Without `memory` the step is an image segmentation and
        stores nothing.
        """
        import torch

        n = features[0].shape[0]
        points = None
        if prompts:
            rows = [[*(p.box or ()), *(p.point or ())] for p in prompts]
            labels = ([2, 3] if prompts[0].box else []) + ([1] if prompts[0].point else [])
            places = torch.tensor(rows, dtype=torch.float32, device=self.model.device).reshape(n, -1, 2)
            points = {"point_coords": places * (self.model.image_size / 1000),
                      "point_labels": torch.tensor([labels] * n, dtype=torch.int32, device=self.model.device)}
        encode = self.model.image_encoder.neck.position_encoding
        return self.model.track_step(
            frame_idx=frame, is_init_cond_frame=bool(prompts),
            current_vision_feats=[f.flatten(2).permute(2, 0, 1) for f in features],
            current_vision_pos_embeds=[encode(f).flatten(2).permute(2, 0, 1) for f in features],
            feat_sizes=[f.shape[-2:] for f in features], point_inputs=points, mask_inputs=None,
            output_dict=memory, num_frames=frames, track_in_reverse=reverse,
            run_mem_encoder=memory is not None, prev_sam_mask_logits=previous)

    @contextmanager
    def drawing(self, mask_type: str) -> Iterator[None]:
        """Within it the model draws masks of this type."""
        if mask_type == "modal":
            yield
            return
        if not self.has_complete:
            raise ValueError('this segmenter has no decoder for complete masks; use mask_type "modal"')
        visible, self.model.sam_mask_decoder = self.model.sam_mask_decoder, self.model.complete_mask_decoder
        try:
            yield
        finally:
            self.model.sam_mask_decoder = visible

    def prompted(self, features: list, prompts: Sequence[Prompt], prompting: str, **memory: Any) -> dict:
        """`step` on prompts of one kind, jointly or as the parent project does: box first, then only the
        point on the logits of the box (METHOD.md 5.2)."""
        if prompting == "sequential" and prompts[0].box and prompts[0].point:
            first = self.step(features, [dataclasses.replace(p, point=None) for p in prompts])
            points = [dataclasses.replace(p, box=None) for p in prompts]
            return self.step(features, points, previous=first["pred_masks"].clamp(-32, 32), **memory)
        return self.step(features, prompts, **memory)

    def segment(self, features: Sequence[list], prompts: Sequence[Prompt], prompting: str = "joint") -> list:
        """Logits [h, w] of every prompt on its own frame's features (B = 1); None for an empty prompt.

        Prompts of one kind share decoder calls of exactly `BATCH` rows: no result depends on its company.
        """
        import torch

        kinds: dict[tuple, list[int]] = {}
        for i, p in enumerate(prompts):
            if not p.empty:
                kinds.setdefault((p.mask_type, p.box is None, p.point is None), []).append(i)
        logits: list = [None] * len(prompts)
        with torch.inference_mode():
            for (mask_type, *_), rows in kinds.items():
                for start in range(0, len(rows), BATCH):
                    chunk = rows[start : start + BATCH]
                    padded = chunk + chunk[:1] * (BATCH - len(chunk))
                    batch = [torch.cat(level) for level in zip(*(features[i] for i in padded), strict=True)]
                    with self.drawing(mask_type):
                        out = self.prompted(batch, [prompts[i] for i in padded], prompting)
                    for i, mask in zip(chunk, out["pred_masks"][:, 0], strict=False):
                        logits[i] = mask
        return logits

    def embed(self, image: UInt8[np.ndarray, "h w 3"]) -> list:
        """Features of one frame, without gradients, laid out as a file would give them back: what follows may
        round differently on another layout."""
        import torch

        with torch.inference_mode():
            return [level.contiguous() for level in self.features(image[None])]

    def track(self, features: Sequence[list], position: int, prompt: Prompt, size: tuple[int, int],
              prompting: str = "joint") -> Bool[np.ndarray, "t h w"]:
        """Masks of a whole clip from one prompt at frame `position`, its features at hand; see `Track`."""
        masks = np.zeros((len(features), *size), bool)
        track = Track(self, len(features), [(position, prompt)], prompting)
        while wanted := track.wanted():
            for t, _, mask in track.advance([features[t] for t in wanted], [size] * len(wanted)):
                masks[t] = mask
        return masks


class Track:
    """Objects on their way through a video: forward from each one's prompted frame, then backward (METHOD.md
    5.2), at most CHUNK frames at a time.

    Each object is followed by itself, as the package does since 1.1: nothing keeps two from claiming a pixel.
    Those prompted alike in the same frame share the model's calls, and all share the features of a frame. What is
    kept of earlier frames is what SAM2's memory may still look at, however long the video.

    Complete masks follow the visible ones: what is tracked is what is seen, and in every frame box and innermost
    point of the visible mask prompt the second decoder.
    """

    def __init__(self, segmenter: Segmenter, frames: int, objects: Sequence[tuple[int, Prompt]],
                 prompting: str = "joint"):
        """`objects`: each one's prompted frame, 0..frames-1, and prompt; an empty one gets empty masks."""
        self.segmenter, self.frames, self.objects, self.prompting = segmenter, frames, list(objects), prompting
        kinds: dict[tuple, list[int]] = {}
        for i, (position, p) in enumerate(self.objects):
            if not p.empty:
                kinds.setdefault((position, p.box is None, p.point is None), []).append(i)
        self.groups = [(position, rows[start : start + BATCH], {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}})
                       for (position, *_), rows in kinds.items() for start in range(0, len(rows), BATCH)]
        positions = [position for position, *_ in kinds] or [0]
        self.first, self.last, self.done = min(positions), max(positions), 0
        model = segmenter.model
        self.reach = max(model.num_maskmem * model.memory_temporal_stride_for_eval, model.max_obj_ptrs_in_encoder)

    @property
    def follows(self) -> bool:
        """Whether there is anything to follow; without, features are not looked at."""
        return bool(self.groups)

    def wanted(self) -> list[int]:
        """The frames that `advance` expects now; none at the end."""
        forward = self.frames - self.first
        places = range(self.done, min(self.done + CHUNK, forward + self.last))
        return [self.first + n if n < forward else self.last - 1 - (n - forward) for n in places]

    def advance(self, features: Sequence[list | None], sizes: Sequence[tuple[int, int]],
                ) -> list[tuple[int, int, Bool[np.ndarray, "h w"]]]:
        """(frame, object, mask) of the wanted frames, given their features (B = 1) and original sizes (h, w).

        In the end every object had every frame once.
        """
        import torch

        found: dict[tuple[int, int], np.ndarray] = {}
        whole: list[tuple[int, int, list, tuple[int, int], Prompt]] = []
        with torch.inference_mode():
            for t, frame, size in zip(self.wanted(), features, sizes, strict=True):
                backward = self.done >= self.frames - self.first
                self.done += 1
                for i, (_, prompt) in enumerate(self.objects):
                    if prompt.empty and backward == (t < self.first):
                        found[t, i] = np.zeros(size, bool)
                for position, rows, memory in self.groups:
                    if backward != (t < position):  # its turn is in the other direction
                        continue
                    for i, logits in zip(rows, self._step(t, frame, position, rows, memory, backward), strict=True):
                        found[t, i] = mask = to_mask(logits, size)
                        prompt = self.objects[i][1]
                        if prompt.mask_type == "amodal" and (mask.any() or t == position):
                            asked = prompt if t == position else prompt_of_mask(mask, "amodal")
                            whole.append((t, i, frame, size, asked))
        drawn = self.segmenter.segment([row[2] for row in whole], [row[4] for row in whole], self.prompting)
        for (t, i, _, size, _), logits in zip(whole, drawn, strict=True):
            found[t, i] = to_mask(logits, size)
        return [(t, i, mask) for (t, i), mask in found.items()]

    def _step(self, t: int, frame: list, position: int, rows: list[int], memory: dict, backward: bool) -> Any:
        """Logits [rows, h, w] of the objects `rows` in frame t."""
        features = [level.expand(len(rows), -1, -1, -1) for level in frame]
        if t == position:
            prompts = [dataclasses.replace(self.objects[i][1], mask_type="modal") for i in rows]
            out = self.segmenter.prompted(features, prompts, self.prompting, frame=t, frames=self.frames, memory=memory)
        else:
            out = self.segmenter.step(features, frame=t, frames=self.frames, memory=memory, reverse=backward)
        kept = {name: out[name] for name in ("maskmem_features", "maskmem_pos_enc", "obj_ptr")}
        memory["cond_frame_outputs" if t == position else "non_cond_frame_outputs"][t] = kept
        past = memory["non_cond_frame_outputs"]
        # Going backward the model also looks at the frames just after the prompted one.
        for old in [n for n in past if abs(n - t) >= self.reach and abs(n - position) > self.reach]:
            del past[old]
        return out["pred_masks"][:, 0]


def to_mask(logits: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Logits [h, w] (torch) at the frame's own resolution, above zero; None gives the empty mask."""
    import torch.nn.functional as F

    if logits is None:
        return np.zeros(size, bool)
    return (F.interpolate(logits[None, None].float(), size=size, mode="bilinear")[0, 0] > 0).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# 3 Server
# --------------------------------------------------------------------------------------------------


def _decode_image(entry: dict) -> UInt8[np.ndarray, "h w 3"]:
    data, shape = entry.get("image"), entry.get("shape")
    if not isinstance(data, bytes):
        raise ValueError("image: expected bytes")
    if shape is None:
        from PIL import Image

        try:
            return np.array(Image.open(io.BytesIO(data), formats=("PNG", "JPEG")).convert("RGB"))
        except Exception as error:  # PIL and its decoders
            raise ValueError(f"image: not a readable PNG or JPEG ({_one_line(error)})") from None
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) else []
    if len(sizes) != 3 or sizes[2] != 3 or math.prod(sizes) != len(data):
        raise ValueError(f"image: {len(data)} bytes are no RGB frame of shape {shape!r:.60}")
    return np.frombuffer(data, np.uint8).reshape(sizes)


def _decode_prompt(row: dict) -> Prompt:
    """A row's prompt. An all-zero box or point is left out (METHOD.md 5.2); others are clipped into the
    frame."""
    parts: list[tuple[float, ...] | None] = []
    for name, length in (("box", 4), ("point", 2)):
        values = row.get(name)
        good = isinstance(values, list) and len(values) == length
        if not good or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise ValueError(f"{name}: expected {length} finite numbers in 0..1000, not {values!r:.60}")
        parts.append(tuple(min(max(float(v), 0.0), 1000.0) for v in values) if any(values) else None)
    mask_type = row.get("mask_type", "modal")
    if mask_type not in MASK_TYPES:
        raise ValueError(f'mask_type: expected "modal" or "amodal", not {mask_type!r:.60}')
    return Prompt(parts[0], parts[1], mask_type)


def _frame_key(row: dict) -> tuple[str, int]:
    video, frame = row.get("video"), row.get("frame")
    if not isinstance(video, str) or type(frame) is not int:
        raise ValueError(f"video, frame: expected a string and an integer, not {video!r:.60}, {frame!r:.60}")
    return video, frame


def _prompting(message: dict) -> str:
    prompting = message.get("prompting", "joint")
    if prompting not in PROMPTING:
        raise ValueError(f'prompting: expected "joint" or "sequential", not {prompting!r:.60}')
    return prompting


def _entries(message: dict, name: str) -> list[dict]:
    entries = message.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{name}: expected a list of maps")
    return entries


class EmbeddingStore:
    """Embeddings on disk, shared by whoever uses the same segmenter: one file each, named after frame and
    segmenter, a checksum in front of safetensors. What can't be written or read is computed again."""

    def __init__(self, folder: str | Path, limit: float, segmenter: Segmenter):
        """`limit`: bytes of the folder, over which the files not used for longest are removed.

        Raises ValueError when the folder can't be made.
        """
        self.folder, self.limit, self.fingerprint = Path(folder), limit, segmenter.fingerprint()
        self.device = segmenter.model.device
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.size = self._trim(self.limit)
        except OSError as error:
            raise ValueError(f"{self.folder}: can't keep embeddings there ({error.strerror}); {CACHE_VARIABLE} names "
                             f"another folder") from None

    def _file(self, frame: bytes) -> Path:
        return self.folder / (hashlib.blake2b(self.fingerprint + frame, digest_size=24).hexdigest() + ".embedding")

    def load(self, frame: bytes) -> list | None:
        """The features of the frame with this digest, if they are there and undamaged."""
        import safetensors.torch

        file = self._file(frame)
        try:
            data = file.read_bytes()
            body = memoryview(data)[64:]
            if data[:64] != hashlib.blake2b(body).digest():
                raise ValueError("damaged")
            levels = safetensors.torch.load(bytes(body))
            os.utime(file)
        except FileNotFoundError:
            return None
        except Exception as error:  # one line each, and it is written anew
            log.warning("%s: embedding is computed again (%s)", file, _one_line(error))
            return None
        return [levels[str(i)].to(self.device) for i in range(len(levels))]

    def save(self, frame: bytes, features: list) -> None:
        import safetensors.torch

        body = safetensors.torch.save({str(i): level.cpu() for i, level in enumerate(features)})
        file, temporary = self._file(frame), None
        if self.limit < len(body) + 64:
            return
        try:
            # A name of its own: other hosts' sidecars may be writing the same embedding.
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "wb") as out:
                out.write(hashlib.blake2b(body).digest() + body)
            os.replace(temporary, file)
            self.size += len(body) + 64
            if self.size > self.limit:
                self.size = self._trim(0.9 * self.limit)  # some room, not to count all files again at the next one
        except OSError as error:  # the run matters more than its cache
            self.limit = 0
            log.warning("%s: no more embeddings are kept (%s); %s names another folder", self.folder, error.strerror,
                        CACHE_VARIABLE)
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)

    def _trim(self, limit: float) -> float:
        """Removes files until the folder holds at most `limit` bytes; what it then holds. Others may be removing
        and writing too."""
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".embedding"):
                    files.append((status.st_mtime, status.st_size, entry.path))
                elif entry.name.endswith(".tmp") and time.time() - status.st_mtime > 3600:  # its writer was killed
                    os.unlink(entry.path)
        size = sum(row[1] for row in files)
        for _, one, path in sorted(files):
            if size <= limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            size -= one
        return size


class Server:
    """Answers messages with a segmenter. Embeddings are cached by the frame's content, so that samples on the
    same video share them; frames and embeddings are forgotten least recently used first. With a `store` those of
    registered frames are on disk too; a tracked video's are not: they are many, and hardly asked for again."""

    def __init__(self, segmenter: Segmenter, max_frames: int = 2048, store: EmbeddingStore | None = None,
                 name: str = ""):
        self.segmenter, self.max_frames, self.store, self.name = segmenter, max_frames, store, name
        self.frames: OrderedDict[tuple[str, int], tuple[np.ndarray, np.ndarray | None]] = OrderedDict()
        self.frame_bytes = 0  # of these, truths included
        self.embeddings: OrderedDict[bytes, list] = OrderedDict()
        self.held = 0  # bytes of these
        self.tracks: OrderedDict[str, tuple[float, Track]] = OrderedDict()  # and when each was last asked for
        names = ("messages", "refused", "frames", "rows", "tracks", "encoded", "cached", "loaded")
        self.counts = dict.fromkeys(names, 0)

    def answer(self, message: dict) -> dict:
        """The reply to a request. Raises ValueError with one line when the request makes no sense."""
        operation = message.get("op")
        if operation == "ping":
            return {"pid": os.getpid(), "amodal": self.segmenter.has_complete, "segmenter": self.name}
        if operation == "stats":
            return {**self.counts, "held_frames": len(self.frames), "held_embeddings": len(self.embeddings)}
        if operation == "segment":
            if "frames" in message:
                self.register(_entries(message, "frames"))
            return self.segment(_entries(message, "rows"), message.get("want", "mask"), _prompting(message))
        if operation == "track":
            return self.track(message)
        if operation == "advance":
            return self.advance(message)
        raise ValueError(f"op: expected ping, stats, segment, track or advance, not {operation!r:.60}")

    def register(self, entries: list[dict]) -> None:
        new = {}
        for entry in entries:
            key, image, truth = _frame_key(entry), _decode_image(entry), entry.get("truth")
            new[key] = image, None if truth is None else unpack_mask(truth, image.shape[:2])
        self.counts["frames"] += len(entries)
        for key, frame in new.items():
            self.frame_bytes += _frame_bytes(frame) - (_frame_bytes(self.frames.pop(key)) if key in self.frames else 0)
            self.frames[key] = frame
        # The message's own frames, now the last ones, stay: its rows are about them.
        while len(self.frames) > len(new) and (len(self.frames) > self.max_frames or self.frame_bytes > FRAMES):
            self.frame_bytes -= _frame_bytes(self.frames.popitem(last=False)[1])

    def embed(self, image: UInt8[np.ndarray, "h w 3"], keep: bool = True) -> list:
        """The frame's features, from memory, disk or the model. `keep`: on disk too."""
        content = hashlib.blake2b(repr(image.shape).encode())
        content.update(image)
        digest = content.digest()
        features, source = self.embeddings.get(digest), "cached"
        if features is None:
            features, source = self.store and self.store.load(digest), "loaded"
            if features is None:
                features, source = self.segmenter.embed(image), "encoded"
                if self.store and keep:
                    self.store.save(digest, features)
            self.embeddings[digest] = features
            self.held += _bytes(features)
            while self.held > EMBEDDINGS and len(self.embeddings) > 1:
                self.held -= _bytes(self.embeddings.popitem(last=False)[1])
        self.counts[source] += 1
        self.embeddings.move_to_end(digest)
        return features

    def segment(self, rows: list[dict], want: Any, prompting: str) -> dict:
        if want not in ("iou", "mask"):
            raise ValueError(f'want: expected "iou" or "mask", not {want!r:.60}')
        self.counts["rows"] += len(rows)
        replies: list[dict] = [{} for _ in rows]
        jobs: OrderedDict[tuple, list[int]] = OrderedDict()  # rollouts of a group often give the same prompt
        for i, row in enumerate(rows):
            try:
                key, prompt = _frame_key(row), _decode_prompt(row)
                if prompt.mask_type == "amodal" and not self.segmenter.has_complete:
                    raise ValueError("mask_type: this segmenter has no decoder for complete masks")
                if key not in self.frames:
                    replies[i]["missing"] = True
                    raise ValueError(f"frame {key[1]} of video {key[0]!r:.60} is not registered")
                if want == "iou" and self.frames[key][1] is None:
                    raise ValueError(f"frame {key[1]} of video {key[0]!r:.60} has no truth")
            except ValueError as error:
                replies[i]["error"] = str(error)
            else:
                self.frames.move_to_end(key)
                jobs.setdefault((key, prompt), []).append(i)
        features = [self.embed(self.frames[key][0]) for key, _ in jobs]
        logits = self.segmenter.segment(features, [prompt for _, prompt in jobs], prompting)
        for ((key, _), where), mask_logits in zip(jobs.items(), logits, strict=True):
            image, truth = self.frames[key]
            mask = to_mask(mask_logits, image.shape[:2])
            if want == "mask":
                reply = {"mask": pack_mask(mask), "shape": list(mask.shape)}
            else:  # an empty truth overlaps with nothing: an empty answer on a frame without target earns 0
                reply = {"iou": float((mask & truth).sum() / max((mask | truth).sum(), 1))}
            for i in where:
                replies[i] = reply
        return {"rows": replies}

    def track(self, message: dict) -> dict:
        frames, prompting = message.get("frames"), _prompting(message)
        if type(frames) is not int or frames < 1:
            raise ValueError(f"frames: expected a number from 1, not {frames!r:.60}")
        objects = []
        for entry in _entries(message, "objects"):
            position = entry.get("position")
            if type(position) is not int or not 0 <= position < frames:
                raise ValueError(f"position: expected 0..{frames - 1}, not {position!r:.60}")
            objects.append((position, _decode_prompt(entry)))
        if not objects:
            raise ValueError("objects: expected at least one")
        if any(prompt.mask_type == "amodal" for _, prompt in objects) and not self.segmenter.has_complete:
            raise ValueError("mask_type: this segmenter has no decoder for complete masks")
        name, track = secrets.token_hex(8), Track(self.segmenter, frames, objects, prompting)
        self.counts["tracks"] += 1
        now = time.monotonic()
        while self.tracks and (len(self.tracks) >= TRACKS or now - next(iter(self.tracks.values()))[0] > IDLE):
            self.tracks.popitem(last=False)
        self.tracks[name] = now, track
        return {"track": name, "next": track.wanted()}

    def advance(self, message: dict) -> dict:
        name = message.get("track")
        if not isinstance(name, str) or name not in self.tracks:
            return {"forgotten": True}
        _, track = self.tracks.pop(name)  # a failed one can't go on
        images = [_decode_image(entry) for entry in _entries(message, "images")]
        if len(images) != len(track.wanted()):
            raise ValueError(f"images: expected {len(track.wanted())}, not {len(images)}")
        features = [self.embed(image, keep=False) if track.follows else None for image in images]
        masks = [{"frame": t, "object": i, "mask": pack_mask(mask), "shape": list(mask.shape)}
                 for t, i, mask in track.advance(features, [image.shape[:2] for image in images])]
        if wanted := track.wanted():
            self.tracks[name] = time.monotonic(), track
        return {"masks": masks, "next": wanted}


def _bytes(features: list) -> int:
    return sum(level.nbytes for level in features)


def _frame_bytes(frame: tuple[np.ndarray, np.ndarray | None]) -> int:
    return sum(part.nbytes for part in frame if part is not None)


def _lost_device(error: Exception) -> bool:
    """Whether CUDA reported what no later call of this process gets over; too little memory is not that."""
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    # torch 2.7 has no such class, and cuBLAS says it with a plain RuntimeError.
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def serve(address: str, segmenter: str | Path, *, threads: int = 1, parent: int | None = None,
          max_frames: int = 2048, cache_gb: float = 0.0) -> None:
    """Answers until killed, or until `parent` dies; on a GPU where PyTorch sees one. When that fails the process
    exits with 1: its client, or whoever supervises a server at an address, starts another.

    `cache_gb` GB of embeddings are kept on disk, in the folder that ICSEG_EMBEDDINGS names. Raises as
    `load_segmenter`, `parse_address` and `EmbeddingStore` do.
    """
    import torch

    if threads < 1:
        raise ValueError(f"threads={threads}: use 1 or more")
    address, secret = parse_address(address), _secret()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    os.umask(0o077)  # the socket is its owner's alone
    torch.set_num_threads(threads)
    if parent is not None:
        # Not PDEATHSIG: that fires when the *thread* which started us ends, and a restart may come from any.
        threading.Thread(target=_follow_parent, args=(parent, address), daemon=True).start()
    loaded = load_segmenter(segmenter)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "icseg_jax" / "embeddings"
    store = EmbeddingStore(folder, cache_gb * 1e9, loaded) if cache_gb > 0 else None
    server = Server(loaded, max_frames, store, _model_name(segmenter))
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.setsockopt(zmq.MAXMSGSIZE, 2**31)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ValueError(f"{address}: cannot listen there ({error})") from None
        print(f"serving {segmenter} on {address}", flush=True)
        while True:
            parts = socket.recv_multipart()
            server.counts["messages"] += 1
            try:
                reply = server.answer(decode_message(parts, secret))
            except Exception as error:  # whatever a message does, the next one is answered
                server.counts["refused"] += 1
                reply = {"error": _one_line(error)}
                if not isinstance(error, ValueError):
                    log.exception("unexpected")
                    if _lost_device(error):  # no reply: for the client this process is dead, and so it asks again
                        print(f"error: {address}: the GPU failed ({_one_line(error)[:120]}); start the sidecar again",
                              file=sys.stderr, flush=True)
                        os._exit(1)  # torch's clean-up may hang or abort on such a device
            socket.send_multipart(encode_message(reply, secret))


def _model_name(segmenter: str | Path) -> str:
    """What a model is called, be it a directory or the released file it was made of."""
    return Path(segmenter).name.removesuffix(".pt")


def _follow_parent(parent: int, address: str) -> None:
    while os.getppid() == parent:
        time.sleep(0.3)
    directory = Path(address.removeprefix("ipc://")).parent
    if directory.name.startswith(_PREFIX):  # made by a client that can't remove it any more
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


# --------------------------------------------------------------------------------------------------
# 4 Client
# --------------------------------------------------------------------------------------------------


class _Call:
    """Rows of one caller, waiting for the request they are joined into."""

    def __init__(self, rows: Sequence[dict]):
        self.rows, self.done = rows, threading.Event()
        self.iou, self.valid = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)


class SegmenterClient:
    """Talks to a sidecar: one of its own that it starts and restarts, or one that runs at `address`.

    A row is {"video": str, "frame": int, "box": 4 numbers, "point": 2 numbers, "mask_type": "modal" |
    "amodal"}, box and point in 0..1000; its frame must have been registered. `truth` belongs to (video,
    frame): where several targets share a video, register it under a name for each (pixels are still encoded
    once). Other clients of the same sidecar have names of their own.

    `mask_iou` never raises for anything that happens in the sidecar: the row comes back invalid and is
    counted in `failures`. `segment` and `track`, which evaluation uses, raise SidecarError when a second try
    failed too. All methods may be called from any thread.
    """

    ROWS = 64  # in one request: the deadline is for these

    def __init__(self, address: str | None = None, *, segmenter: str | Path = ASSET, prompting: str = "joint",
                 log_file: str | Path | None = None, threads: int = 1, timeout_s: float = 60.0,
                 start_timeout_s: float = 180.0, join_s: float = 0.004, max_frames: int = 2048,
                 cache_gb: float = 0.0):
        """`address` None starts a process of its own, which loads `segmenter`, writes to `log_file` and keeps up
        to `cache_gb` GB of embeddings on disk; `timeout_s` is for one request, `start_timeout_s` for the first
        answer; rows that come within `join_s` share a request; `max_frames` is how many registered frames client
        and server each remember, and of these FRAMES bytes, least recently used forgotten first."""
        self.address = None if address is None else parse_address(address)
        self.segmenter, self.log_file, self.threads = Path(segmenter), log_file, threads
        self.timeout_s, self.start_timeout_s, self.join_s = timeout_s, start_timeout_s, join_s
        self.max_frames, self.cache_gb, self.prompting = max_frames, cache_gb, prompting
        self.failures = 0  # rows that came back invalid
        self.restarts = 0
        # Independent runs may share a sidecar, and name their videos alike.
        self._prefix = secrets.token_hex(4) + "/"
        self._frames: OrderedDict[tuple[str, int], dict] = OrderedDict()  # as they go over the wire
        self._frame_bytes = 0  # of these
        self._waiting: set[tuple[str, int]] = set()  # no request was about them since they were registered
        self._sent: set[tuple[str, int]] = set()  # known to the process that runs now
        self._queue: list[_Call] = []
        self._queue_lock, self._lock = threading.Lock(), threading.RLock()
        self._socket: zmq.Socket | None = None
        self._process: subprocess.Popen | None = None
        self._directory: str | None = None
        self._ready = False
        self.amodal = False  # whether complete masks can be had; known once it is ready

    def __enter__(self) -> SegmenterClient:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The local sidecar's process id."""
        return self._process and self._process.pid

    def start(self, wait: bool = True) -> None:
        """Starts the process, or connects. Without `wait` it comes up while the caller does other things.

        Raises SidecarError, with the end of its log, when it dies or is silent for `start_timeout_s`, and when its
        address can't be one.
        """
        with self._lock:
            try:
                self._launch()
                if wait:
                    self._await_ready()
            except _Lost as error:
                self._stop()
                where = f" at {self.address}" if self.address else ""
                raise SidecarError(f"the sidecar{where} did not start: {error}") from None
            except zmq.ZMQError as error:
                self._stop()
                hint = "write tcp://HOST:PORT or a shorter path" if self.address else "set TMPDIR to a shorter path"
                raise SidecarError(f"no socket for the sidecar: {error}; {hint}") from None

    def register(self, video: str, frame: int, image: UInt8[np.ndarray, "h w 3"],
                 truth: Bool[np.ndarray, "h w"] | None = None) -> None:
        """Remembers a frame, and the truth that `mask_iou` compares with; it is sent with the first row that
        needs it. Registering the same pair again replaces it."""
        if image.ndim != 3 or image.shape[2] != 3 or (truth is not None and truth.shape != image.shape[:2]):
            raise ValueError(f"register: image {image.shape} and truth {np.shape(truth)} don't fit")
        key = (self._prefix + str(video), int(frame))
        entry = {"video": key[0], "frame": key[1], "image": image.tobytes(), "shape": list(image.shape),
                 "truth": None if truth is None else pack_mask(truth)}
        with self._lock:
            if self._frames.get(key) != entry:
                self._forget(key)
                self._frames[key] = entry
                self._frame_bytes += _entry_bytes(entry)
            self._frames.move_to_end(key)
            self._waiting.add(key)
            full = self._frame_bytes > FRAMES or len(self._frames) > self.max_frames
            for old in list(self._frames) if full else ():
                # What waits for its request stays: it is nowhere else.
                heavy = self._frame_bytes > FRAMES and old not in self._waiting
                if heavy or len(self._frames) > self.max_frames:
                    self._forget(old)

    def mask_iou(self, rows: Sequence[dict]) -> tuple[Float[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """IoU of each row's mask with the registered truth (0 where that is empty), and if it is valid.

        Calls that several threads make at once (a host callback fires once per device) are one request.
        """
        call = _Call(rows)
        with self._queue_lock:
            self._queue.append(call)
            leader = len(self._queue) == 1
        if leader:
            calls = []
            try:
                time.sleep(self.join_s)
                with self._lock:  # whoever comes while another request runs joins the next one
                    calls = self._take_calls()
                    self._score(calls)
            finally:  # also on Ctrl-C: nobody must wait for a leader that left
                for each in calls or self._take_calls():
                    each.done.set()
        call.done.wait()
        return call.iou, call.valid

    def segment(self, rows: Sequence[dict]) -> list[Bool[np.ndarray, "_ _"]]:
        """The rows' masks at their frames' resolution. Raises SidecarError when one can't be had."""
        with self._lock:
            masks = []
            plain = [_plain_row(row, self._prefix) for row in rows]
            for start in range(0, len(rows), self.ROWS):
                for reply in self._segment(plain[start : start + self.ROWS], "mask"):
                    if "error" in reply:
                        raise SidecarError(reply["error"])
                    masks.append(unpack_mask(reply["mask"], reply["shape"]))
            return masks

    def track(self, frames: UInt8[np.ndarray, "t h w 3"], position: int, box: Sequence[float],
              point: Sequence[float], mask_type: str = "modal") -> Bool[np.ndarray, "t h w"]:
        """Masks of a clip from a prompt at frame `position`, as `stream` makes them."""
        masks = np.zeros(np.shape(frames)[:3], bool)
        objects = [{"position": position, "box": box, "point": point, "mask_type": mask_type}]
        for t, _, mask in self.stream(frames.__getitem__, len(frames), objects):
            masks[t] = mask
        return masks

    def stream(self, read: Callable[[int], UInt8[np.ndarray, "h w 3"]], count: int, objects: Sequence[dict],
               ) -> Iterator[tuple[int, int, Bool[np.ndarray, "h w"]]]:
        """Follows objects through a video of any length: (frame, object, mask), every pair once.

        `read` gives a frame by its position, 0..count-1, and is asked for a few at a time, in the order in which
        they are tracked: from the first prompt to the end, then from the last prompt to the beginning. An object is
        {"position": the prompted frame, "box", "point", "mask_type"} as in a row; all share the reading and encoding
        of frames. Masks have their frame's size. `timeout_s` is for CHUNK frames.

        Raises SidecarError when the masks can't be had, ValueError for a frame that is none, and what `read` raises.
        """
        rows = [{**_plain_row({**entry, "video": "", "frame": 0}), "position": int(entry["position"])}
                for entry in objects]
        given = 0
        for last_try in (False, True):
            try:
                for n, found in enumerate(self._stream(read, count, rows)):
                    if n >= given:  # a second try makes the same masks in the same order
                        given = n + 1
                        yield found
                return
            except _Lost as error:
                log.warning("sidecar lost while tracking (%s)", error)
                with self._lock:
                    self._stop()
                    self.restarts += not last_try
                if last_try:
                    raise

    def _stream(self, read: Callable, count: int, rows: list[dict]) -> Iterator[tuple[int, int, np.ndarray]]:
        def ask(message: dict) -> dict:
            with self._lock:  # not held while a frame is read or a mask is used: other requests go between
                self.start()
                return self._request(message, self.timeout_s)

        reply = ask({"op": "track", "frames": int(count), "objects": rows, "prompting": self.prompting})
        name = reply["track"]
        while reply["next"]:
            images = []
            for t in reply["next"]:
                image = np.asarray(read(t))
                if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                    raise ValueError(f"frame {t}: expected uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
                images.append({"image": image.tobytes(), "shape": list(image.shape)})
            reply = ask({"op": "advance", "track": name, "images": images})
            if reply.get("forgotten"):
                raise _Lost(f"it was restarted, or gave the video up ({IDLE} s idle, or {TRACKS} others)")
            for row in reply["masks"]:
                yield row["frame"], row["object"], unpack_mask(row["mask"], row["shape"])

    def stats(self) -> dict[str, int]:
        """The server's counters since it started, and `failures` and `restarts` of this client."""
        with self._lock:
            counts = self._twice(lambda: self._request({"op": "stats"}, self.timeout_s))
        return {**counts, "failures": self.failures, "restarts": self.restarts}

    def close(self) -> None:
        """Ends the local process. The client may be started again."""
        with self._lock:
            self._stop()

    # -- one request at a time, under self._lock ------------------------------------------------------------

    def _forget(self, key: tuple[str, int]) -> None:
        if key in self._frames:
            self._frame_bytes -= _entry_bytes(self._frames.pop(key))
            self._waiting.discard(key)
            self._sent.discard(key)

    def _take_calls(self) -> list[_Call]:
        with self._queue_lock:
            calls, self._queue = self._queue, []
        return calls

    def _score(self, calls: Sequence[_Call]) -> None:
        places = [(call, i) for call in calls for i in range(len(call.rows))]
        rows = []
        for call, i in places:
            try:
                rows.append(_plain_row(call.rows[i], self._prefix))
            except (KeyError, TypeError, ValueError) as error:
                log.warning("row left out: %s", _one_line(error))
                rows.append(None)
        live = [n for n, row in enumerate(rows) if row is not None]
        try:
            for start in range(0, len(live), self.ROWS):
                chunk = live[start : start + self.ROWS]
                for n, reply in zip(chunk, self._segment([rows[n] for n in chunk], "iou"), strict=True):
                    call, i = places[n]
                    if "error" in reply:
                        log.warning("row left out: %s", reply["error"])
                    else:
                        call.iou[i], call.valid[i] = reply["iou"], True
        except Exception as error:  # training goes on whatever happened; the rows are invalid and counted
            log.warning("%d rows without a mask: %s", len(places), _one_line(error))
        self.failures += sum(int((~call.valid).sum()) for call in calls)

    def _segment(self, rows: list[dict], want: str) -> list[dict]:
        message = {"op": "segment", "rows": rows, "want": want, "prompting": self.prompting}
        asked = [(row["video"], row["frame"]) for row in rows]
        keys = [key for key in dict.fromkeys(asked) if key in self._frames]
        for key in keys:
            self._frames.move_to_end(key)
        self._waiting.clear()  # of several processes each asks about its own rows, and registers all

        def attempt() -> list[dict]:
            for _ in range(2):
                new = [key for key in keys if key not in self._sent]
                frames = [self._frames[key] for key in new]
                replies = self._request({**message, "frames": frames}, self.timeout_s)["rows"]
                self._sent.update(new)
                if not any(reply.get("missing") and key in self._frames
                           for key, reply in zip(asked, replies, strict=True)):
                    break
                # The server forgot some, or is another process by now. All go again, in one message: it keeps these
                # together, whatever other clients send.
                self._sent.difference_update(keys)
            return replies

        return self._twice(attempt)

    def _twice(self, attempt: Callable[[], Any]) -> Any:
        """Tries, and when the sidecar is dead or stuck, tries once more with a new one."""
        try:
            self.start()
            return attempt()
        except _Lost as error:
            log.warning("sidecar lost (%s); starting it again", error)
            self._stop()
            self.restarts += 1
        try:
            self.start()
            return attempt()
        except _Lost:
            self._stop()
            raise

    def _request(self, message: dict, timeout_s: float) -> dict:
        """Raises _Lost when no answer comes, SidecarError when it is a refusal."""
        assert self._socket is not None
        end = time.monotonic() + timeout_s
        try:
            self._socket.send_multipart(encode_message(message, _secret()))
            while not self._socket.poll(100):
                if self._process is not None and self._process.poll() is not None:
                    raise _Lost(f"it exited with {self._process.returncode}: {self._log_tail()}")
                if time.monotonic() > end:
                    raise _Lost(f"no answer within {timeout_s:g} s")
            reply = decode_message(self._socket.recv_multipart(), _secret())
        except (zmq.ZMQError, ValueError) as error:  # an interrupted request leaves the socket unusable
            raise _Lost(str(error)) from None
        if "error" in reply:
            raise SidecarError(reply["error"])
        return reply

    def _launch(self) -> None:
        if self._socket is not None:
            return
        address = self.address
        if address is None:
            self._directory = tempfile.mkdtemp(prefix=_PREFIX)  # readable by its owner only
            address = f"ipc://{self._directory}/socket"
            command = [sys.executable, "-m", "icseg_jax.sam2_sidecar", "serve", "--socket", address,
                       "--segmenter", str(self.segmenter), "--threads", str(self.threads),
                       "--frames", str(self.max_frames), "--cache-gb", str(self.cache_gb),
                       "--parent", str(os.getpid())]
            hidden = ("XLA_", "JAX_", "TPU_", "LIBTPU_")
            environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
            paths = (str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            environment["OMP_NUM_THREADS"] = str(self.threads)
            # It shares the cores with the trainer: threads that spin while they wait for each other took four times
            # the CPU, and ten times as long, beside a rollout.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            with open(self.log_file or os.devnull, "ab") as output:
                # In a group of its own: Ctrl-C is meant for the trainer, which saves and then stops the sidecar.
                self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                                 stdout=output, stderr=subprocess.STDOUT, process_group=0)
        self._socket = zmq.Context.instance().socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def _await_ready(self) -> None:
        if not self._ready:
            there = self._request({"op": "ping"}, self.start_timeout_s)
            self.amodal, self._ready = bool(there["amodal"]), True
            served, wanted = str(there.get("segmenter")), _model_name(self.segmenter)
            if self.address is not None and served != wanted:  # it loaded what its own --segmenter says
                log.warning("the sidecar at %s serves %s, and sidecar.segmenter says %s", self.address, served, wanted)

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._socket = self._process = self._directory = None
        self._sent.clear()
        self._ready = False

    def _log_tail(self) -> str:
        try:
            lines = Path(self.log_file or os.devnull).read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "no log"


class _Lost(SidecarError):
    """No answer: the process is dead or stuck, and a new one may do better."""


def _entry_bytes(entry: dict) -> int:
    return len(entry["image"]) + len(entry["truth"] or b"")


def _plain_row(row: dict, prefix: str = "") -> dict:
    """The row in msgpack's types. Raises KeyError, TypeError or ValueError when it can't be one."""
    return {"video": prefix + str(row["video"]), "frame": int(row["frame"]), "box": [float(v) for v in row["box"]],
            "point": [float(v) for v in row["point"]], "mask_type": str(row.get("mask_type", "modal"))}


# --------------------------------------------------------------------------------------------------
# 5 Training
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """How the small segmenter is made. Scenes come from `synthetic`; of the disk `start` is read, and `data` if given.
    """

    run_dir: str = "runs/sam2_mini"  # checkpoint and log lines
    asset: str | None = None  # where the finished segmenter is written; default run_dir/trained
    start: str | None = None  # a finished segmenter to go on from: its phases 2 and 3 are trained further
    data: str | None = None  # prepared records with complete masks (R2SM): phase 2 looks at these in place of scenes
    seed: int = 0  # of the weights and of the scenes
    threads: int = 1  # of torch
    image_size: int = 192  # pixels, a multiple of 64: frames are resized to it, masks come out at a quarter
    embed_dim: int = 24  # channels of Hiera's first stage, doubled at every further one
    stages: tuple[int, ...] = (1, 2, 3, 1)  # Hiera's blocks per stage
    width: int = 96  # channels of everything after the trunk
    memories: int = 4  # frames that a tracking step may look back at (num_maskmem)
    image_steps: int = 1700  # phase 1: visible masks from prompts, everything but the memory trained
    complete_steps: int = 300  # phase 2: complete masks, only the second decoder trained
    clip_steps: int = 250  # phase 3: tracking, memory and first decoder trained
    scenes: int = 4  # per step
    frames: int = 2  # per scene, phases 1 and 2
    objects: int = 4  # prompts per frame, or tracks per scene
    clip_frames: int = 5  # per scene, phase 3: the prompted frame and those tracked
    learning_rate: float = 8e-4  # at the top of warm-up, then a cosine to 0 in every phase (AdamW)
    warmup: int = 100  # steps of each phase
    focal: float = 5.0  # weight of the focal loss beside dice
    locality: float = 6.0  # how sharply the untrained decoder looks near its prompt (see `start_local`)
    checkpoint_every: int = 100  # steps
    test_scenes: int = 100  # measured at the end, from the test split
    test_clips: int = 40  # of those, tracked through


PHASES = ("image", "complete", "clip")
MIN_AREA = 60  # pixels an object must show to be prompted or scored
AHEAD = (1, 1, 2, 3)  # from a clip's prompted frame to the first tracked; more than 1: frames that memory has missed


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and `key=value` overrides. Raises ValueError with one line that names what is
    wrong."""
    from omegaconf import OmegaConf

    from icseg_jax import synthetic

    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r}: an override reads key=value, such as seed=1")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such config file; try experiments/embedded_sam2.yaml")
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:  # yaml and omegaconf each have their own kinds
        raise ValueError(f"{path}: {_one_line(error)}") from None
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(names)}"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(TrainConfig), given))
    except Exception as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    config = TrainConfig(**{**values, "stages": tuple(values["stages"])})
    for name in ("warmup", "checkpoint_every", "scenes", "frames", "objects", "threads"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: use 1 or more")
    if config.data and not (config.start and config.clip_steps == 0):
        raise ValueError(f"data={config.data}: teaches complete masks alone; give start=DIR and clip_steps=0 with it")
    most = synthetic.N_FRAMES + 1 - max(AHEAD)  # `_clip_step` needs a frame to start from
    if not 2 <= config.clip_frames <= most:
        raise ValueError(f"clip_frames={config.clip_frames}: use 2..{most}")
    if config.image_size % 64:
        raise ValueError(f"image_size={config.image_size}: must be a multiple of 64, such as 192")
    return config


def start_local(model: Any, sharpness: float) -> None:
    """Lets the untrained mask decoder look near its prompts.

    SAM encodes places as random Fourier features, whose inner product falls off with distance; the decoder's
    random query and key projections hide that, and finding it again takes a thousand steps in which masks
    ignore the prompt. Here both projections of each cross-attention begin by picking the same few of these
    features.
    """
    import torch

    half = model.hidden_dim // 2  # sines, then cosines
    with torch.no_grad():
        for layer in model.sam_mask_decoder.transformer.layers:
            for attention in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token):
                rows = torch.arange(attention.internal_dim)
                wave = torch.randperm(half)[rows // 2] + half * (rows % 2)
                pick = torch.zeros(attention.internal_dim, model.hidden_dim)
                pick[rows, wave] = math.sqrt(sharpness)
                for projection in (attention.q_proj, attention.k_proj):
                    projection.weight.mul_(0.3).add_(pick)
                    projection.bias.zero_()


def start_tracking(model: Any, scale: float) -> None:
    """Puts the untrained memory where a trained image model can use it; `scale`: deviation of its features.

    The neck has no norm, so features leave the image phase some 15 times larger than what fresh layers make.
    Without this, a memory holds the frame but hardly the mask, tracked frames reach the decoder 15 times too
    small, and 250 steps bring an IoU of 0.4; with it 40 steps bring 0.85. Query and key biases alike make
    attention between rotary positions begin local: an object is sought where it was.
    """
    import torch

    with torch.no_grad():
        model.memory_encoder.pix_feat_proj.weight.div_(scale)
        model.memory_attention.norm.weight.fill_(scale)
        for layer in model.memory_attention.layers:
            layer.cross_attn_image.out_proj.weight.mul_(scale)
            layer.cross_attn_image.q_proj.bias.fill_(3.0)
            layer.cross_attn_image.k_proj.bias.fill_(3.0)


def _noisy_prompt(mask: np.ndarray, kind: str, rng: np.random.Generator) -> Prompt:
    """A prompt as a policy would give it: corners off by up to 4 pixels, the point innermost or anywhere
    inside."""
    y1, x1, y2, x2, y, x = _extent(mask)
    height, width = mask.shape
    scale = np.array([1000 / width, 1000 / height])
    corners = np.array([[x1, y1], [x2, y2]]) + rng.uniform(-1, 1, (2, 2)) * rng.choice([0, 2, 2, 4])
    if rng.random() < 0.5:
        inside = np.flatnonzero(mask)
        y, x = divmod(int(inside[rng.integers(len(inside))]), width)
    box = tuple((corners * scale).clip(0, 1000).reshape(-1).tolist())
    point = tuple((np.array([x, y]) * scale).tolist())
    return Prompt(box if kind != "point" else None, point if kind != "box" else None)


def _prompt_kind(rng: np.random.Generator) -> str:
    return str(rng.choice(["both", "box", "point", "sequential"], p=[0.6, 0.15, 0.15, 0.1]))


def _loss(logits: Any, truth: Any, focal_weight: float) -> tuple[Any, Any]:
    """Dice plus weighted focal loss at the truth's resolution, [B] each; and the IoU [B]."""
    import torch.nn.functional as F

    logits = F.interpolate(logits, size=truth.shape[-2:], mode="bilinear")[:, 0]
    p = logits.sigmoid()
    overlap, total = (p * truth).sum((1, 2)), (p + truth).sum((1, 2))
    missed = (1 - p) * truth + p * (1 - truth)
    # More weight on objects (0.6) than SAM's 0.25: with that the masks of small objects first die out.
    alpha = 0.6 * truth + 0.4 * (1 - truth)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    focal = (alpha * missed.square() * bce).mean((1, 2))
    hit, either = ((logits > 0) & (truth > 0)).sum((1, 2)), ((logits > 0) | (truth > 0)).sum((1, 2))
    return 1 - (2 * overlap + 1) / (total + 1) + focal_weight * focal, hit / either.clamp(min=1)


View = tuple[np.ndarray, np.ndarray, np.ndarray]  # frame [h,w,3], visible and complete masks [n,H,W] of its objects


def _scene_views(config: TrainConfig, rng: np.random.Generator, scenes: list) -> Iterator[View]:
    """Some frames of each scene."""
    from icseg_jax import synthetic

    for scene in scenes:
        frames = rng.choice(scene.n_frames, config.frames, replace=False).tolist()
        for image, frame in zip(synthetic.render(scene, frames), frames, strict=True):
            yield image, synthetic.visible_masks(scene, frame), synthetic.complete_masks(scene, frame)


def _sample_views(samples: Sequence, rng: np.random.Generator, count: int, side: int) -> Iterator[View]:
    """Frames of a dataset's samples, with the masks of their targets at side x side pixels."""
    from PIL import Image

    def at_side(mask: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)) > 127

    misses = 0
    while count:
        if misses > 10_000:
            raise ValueError(f"data=: none of {misses} frames drawn shows its target at {side}x{side} pixels")
        sample = samples[int(rng.integers(len(samples)))]
        position = int(rng.integers(len(sample)))
        seen, whole = both_masks(sample, position)
        seen = at_side(seen)
        misses = 0 if seen.any() else misses + 1  # a thin one may be gone at this size
        if not misses:
            count -= 1
            yield sample.image(position), seen[None], at_side(whole)[None]


def both_masks(sample: Any, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The visible and the complete mask of a sample's target. Raises ValueError for a dataset without such masks."""
    if sample.masks is None or sample.amodal_masks is None:
        raise ValueError(f"sample {sample.id} of {sample.dataset} has no visible and complete masks; R2SM's have them")
    return sample.masks(position), sample.amodal_masks(position)


def _image_step(segmenter: Segmenter, config: TrainConfig, rng: np.random.Generator, kind: str,
                views: Iterator[View], complete: bool) -> tuple[Any, Any]:
    """Loss and IoU of prompts on single frames. For complete masks the features stay as they are."""
    import torch

    images, prompts, truth = [], [], []
    for image, visible, whole in views:
        images.append(image)
        area = visible.sum((1, 2))
        weight = (area > MIN_AREA) * (1.0 + 4 * complete * (area < 0.95 * whole.sum((1, 2)))) + 1e-9
        for i in rng.choice(len(visible), config.objects, replace=len(visible) < config.objects,
                            p=weight / weight.sum()):
            truth.append((whole if complete else visible)[i])
            # Who asks for the whole object may have boxed the whole or only what is seen of it.
            shown = whole[i] if complete and rng.random() < 0.5 else visible[i]
            prompts.append(_noisy_prompt(shown if shown.any() else whole[i], kind, rng))
    with torch.set_grad_enabled(not complete):
        alike = itertools.groupby(images, key=lambda image: image.shape)
        parts = [segmenter.features(np.stack(list(group))) for _, group in alike]
    features = [torch.cat(level).repeat_interleave(config.objects, 0) for level in zip(*parts, strict=True)]
    with segmenter.drawing("amodal" if complete else "modal"):
        out = segmenter.prompted(features, prompts, "sequential" if kind == "sequential" else "joint")
    aim = torch.from_numpy(np.stack(truth)).float().to(segmenter.model.device)
    loss, iou = _loss(out["pred_masks"], aim, config.focal)
    seen = torch.nn.functional.softplus(-out["object_score_logits"])
    return (loss + 0.1 * seen[:, 0]).mean(), iou.mean()


def _clip_step(segmenter: Segmenter, config: TrainConfig, rng: np.random.Generator,
               scenes: list) -> tuple[Any, Any]:
    """Loss and IoU of tracks: prompts in one frame, then the package's tracking step, either way in time."""
    import torch
    import torch.nn.functional as F

    from icseg_jax import synthetic

    images, masks = [], []
    backward = bool(rng.integers(2))
    ahead = int(rng.choice(AHEAD))
    length = scenes[0].n_frames
    start = int(rng.integers(length - (config.clip_frames - 2 + ahead)))
    order = [start, *range(start + ahead, start + ahead + config.clip_frames - 1)]
    if backward:
        order = [length - 1 - t for t in order]
    for scene in scenes:
        images.append(synthetic.render(scene, order))
        visible = np.stack([synthetic.visible_masks(scene, t) for t in order])  # [T, n, H, W]
        weight = (visible[0].sum((1, 2)) > MIN_AREA) + 1e-9
        chosen = rng.choice(visible.shape[1], config.objects, replace=visible.shape[1] < config.objects,
                            p=weight / weight.sum())
        masks.append(visible[:, chosen])
    truth = torch.from_numpy(np.concatenate(masks, 1)).float()  # [T, B, H, W]
    kind = _prompt_kind(rng)
    with torch.no_grad():
        clips = segmenter.features(np.concatenate(images))
    clips = [f.unflatten(0, (len(scenes), len(order))).repeat_interleave(config.objects, 0) for f in clips]
    memory: dict = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    total, ious = 0.0, []
    for i, t in enumerate(order):
        features = [f[:, i] for f in clips]
        if i == 0:
            nothing = Prompt(None if kind == "point" else (0.0, 0.0, 1.0, 1.0), None if kind == "box" else (1.0, 1.0))
            prompts = [_noisy_prompt(mask.numpy() > 0, kind, rng) if mask.any() else nothing for mask in truth[0]]
            out = segmenter.prompted(features, prompts, "sequential" if kind == "sequential" else "joint",
                                     frame=t, frames=length, memory=memory)
            memory["cond_frame_outputs"][t] = out
        else:
            out = segmenter.step(features, frame=t, frames=length, memory=memory, reverse=backward)
            memory["non_cond_frame_outputs"][t] = out
        there = truth[i].flatten(1).any(1).float()
        loss, iou = _loss(out["pred_masks"], truth[i], config.focal)
        score = F.binary_cross_entropy_with_logits(out["object_score_logits"][:, 0], there, reduction="none")
        total = total + (loss * there + 0.1 * score).mean()
        if i:
            ious.append((iou * there).sum() / there.sum().clamp(min=1))
    return total / len(order), torch.stack(ious).mean()


def _trained(model: Any, phase: str) -> list:
    """The parameters that a phase trains; all others are frozen, so that earlier phases stay true."""
    memory = ("memory_", "maskmem_", "obj_ptr_", "no_obj_", "mask_downsample")
    chosen = []
    for name, parameter in model.named_parameters():
        train = {"image": not name.startswith((*memory, "complete_mask_decoder.")),
                 "complete": name.startswith("complete_mask_decoder."),
                 "clip": name.startswith((*memory, "sam_mask_decoder.")) and ".conv_s" not in name}[phase]
        parameter.requires_grad_(train)
        if train:
            chosen.append(parameter)
    return chosen


def train(config: TrainConfig) -> dict[str, float]:
    """Trains the small segmenter, writes it (`asset`), and returns the numbers of `measure`.

    The same call continues an unfinished run from its last checkpoint, bit for bit; a finished one is only
    measured and written again. Raises ValueError when `run_dir` holds a run of another config, or when another
    process is training there.
    """
    run = Path(config.run_dir)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"run_dir={run}: another training is writing here; wait for it") from None
        return _train(config, run, Path(config.asset or run / "trained"))


def _train(config: TrainConfig, run: Path, asset: Path) -> dict[str, float]:
    import torch
    from tqdm import tqdm

    from icseg_jax import data, synthetic

    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.start:
        begun = load_segmenter(config.start)
        model, model_config, first = begun.model, begun.config, PHASES.index("complete")
    else:
        model_config = mini_config(config.image_size, config.embed_dim, config.stages, config.width,
                                   config.memories)
        model, first = build_model(model_config), 0
        start_local(model, config.locality)
        # The package replaces the mask wherever the object score is negative, and then nothing is learned:
        # begin above 0.
        torch.nn.init.constant_(model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias, 4.0)
    segmenter = Segmenter(model)
    samples = test = None
    if config.data:
        samples, test = (data.load_prepared(Path(config.data), split) for split in ("train", "test"))
        for split in (samples, test):
            both_masks(split[0], 0)

    file = run / "checkpoint.pt"
    done, seconds, saved = 0, 0.0, None  # seconds of processor time
    free = ("run_dir", "asset", "threads", "checkpoint_every", "test_scenes", "test_clips")
    identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    identity["stages"] = list(config.stages)
    if file.exists():
        try:
            saved = torch.load(file, weights_only=True)
            first, done, seconds = saved["phase"], saved["step"], saved["seconds"]
            theirs = saved["config"]
        except Exception as error:  # torch and zipfile each have their own kinds
            raise ValueError(f"{file}: damaged checkpoint ({_one_line(error)}); remove it") from None
        if keys := [key for key in identity if identity[key] != theirs.get(key)]:
            raise ValueError(f"{run} holds a run with another config (differs in {', '.join(keys)}); choose "
                             f"another run_dir")
        if any(name.startswith("complete_mask_decoder.") for name in saved["model"]) and not segmenter.has_complete:
            add_complete_decoder(model)
        model.load_state_dict(saved["model"])

    for number, phase in enumerate(PHASES):
        if number < first:
            continue
        steps = (config.image_steps, config.complete_steps, config.clip_steps)[number]
        if config.start and not steps:
            continue
        if phase == "complete" and not segmenter.has_complete:
            add_complete_decoder(model)
        parameters = _trained(model, phase)
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
        start = 0
        if phase == "clip" and not config.start and (saved is None or number > first):
            scenes = [synthetic.make_scene(i, seed=config.seed) for i in range(8)]
            frames = np.concatenate([synthetic.render(scene, [0]) for scene in scenes])
            with torch.no_grad():
                start_tracking(model, segmenter.features(frames)[-1].std().item())
        if saved is not None and number == first:
            start = done
            if saved["optimizer"] is not None:
                optimizer.load_state_dict(saved["optimizer"])
        began, recent = time.process_time() - seconds, []
        for step in tqdm(range(start, steps), phase, steps, initial=start, disable=None):
            rng = np.random.default_rng([config.seed, number, step])
            seeds = range(step * config.scenes, (step + 1) * config.scenes)
            scenes = [synthetic.make_scene(i, seed=1000 * (config.seed + 1) + number) for i in seeds if not samples]
            schedule = min(1.0, (step + 1) / config.warmup) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule
            if phase == "clip":
                loss, iou = _clip_step(segmenter, config, rng, scenes)
            else:
                kind = _prompt_kind(rng)
                views = _scene_views(config, rng, scenes) if samples is None else _sample_views(
                    samples, rng, config.scenes * config.frames, model.image_size // 4)
                loss, iou = _image_step(segmenter, config, rng, kind, views, phase == "complete")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            recent.append((loss.item(), iou.item()))
            seconds = time.process_time() - began
            if (step + 1) % 50 == 0 or step + 1 == steps:
                means = np.mean(recent, 0)
                print(f"{phase} {step + 1}/{steps} loss {means[0]:.4f} iou {means[1]:.4f} "
                      f"seconds {seconds:.0f}", flush=True)
                recent.clear()
            if (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
                _save_checkpoint(file, identity, number, step + 1, seconds, model, optimizer)
        if start < steps:
            _save_checkpoint(file, identity, number, steps, seconds, model, None)

    save_segmenter(asset, model, model_config)
    trained = load_segmenter(asset)
    numbers = (measure(trained, config.test_scenes, config.test_clips) if test is None
               else measure_complete(trained, itertools.islice(occluded_targets(test), 3 * config.test_scenes)))
    print(json.dumps(numbers), flush=True)
    count = sum(p.numel() for p in model.parameters())
    _write_bytes(asset / "README.md", _asset_readme(config, count, seconds, numbers).encode())
    return numbers


def _save_checkpoint(file: Path, config: dict, phase: int, step: int, seconds: float, model: Any,
                     optimizer: Any) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save({"config": config, "phase": phase, "step": step, "seconds": seconds,
                "model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict()}, buffer)
    _write_bytes(file, buffer.getvalue())


def _asset_readme(config: TrainConfig, parameters: int, seconds: float, numbers: dict[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in numbers.items())
    plain = dataclasses.asdict(TrainConfig())
    changed = {key: value for key, value in dataclasses.asdict(config).items() if value != plain[key]}
    settings = "\n".join(f"    {key}: {value}" for key, value in changed.items())
    measured = (f"by `measure` on\n{config.test_scenes} test scenes (objects that show more than {MIN_AREA} pixels), "
                f"{config.test_clips} tracked")
    if config.data:
        measured = "by `measure_complete` on its test split (targets of which 5 % or more are hidden)"
    return f"""# {"A SAM2 with complete masks" if config.data else "The embedded world's SAM2"}

{parameters:,} parameters, the `sam2` package's own classes, trained on {config.data or "`synthetic` scenes"} by
`python -m icseg_jax.sam2_sidecar train` with

{settings}

in {seconds / 60:.0f} minutes of one CPU core. Measured {measured}:

| | |
|---|---|
{rows}
"""


def occluded_objects(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(frame [h, w, 3], visible mask, complete mask) of the test split's objects that show more than MIN_AREA pixels
    and hide 5 % or more; without end, a frame of each scene."""
    from icseg_jax import synthetic

    for index in itertools.count():
        scene = synthetic.make_scene(index, seed=seed, split="test")
        frame = index % scene.n_frames
        visible, whole = synthetic.visible_masks(scene, frame), synthetic.complete_masks(scene, frame)
        image = None
        for seen, all_of_it in zip(visible, whole, strict=True):
            if MIN_AREA < seen.sum() < 0.95 * all_of_it.sum():
                image = synthetic.render(scene, [frame])[0] if image is None else image
                yield image, seen, all_of_it


def occluded_targets(samples: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same of a dataset's samples; where a target is asked for twice, of the query that wants all of it."""
    for sample in samples:
        for position in range(len(sample) * (sample.mask_type != "modal")):
            seen, whole = both_masks(sample, position)
            if MIN_AREA < seen.sum() < 0.95 * whole.sum():
                yield sample.image(position), seen, whole


def mask_iou(logits: Any, truth: np.ndarray) -> float:
    mask = to_mask(logits, truth.shape)
    return (mask & truth).sum() / max((mask | truth).sum(), 1)


def measure_complete(segmenter: Segmenter, objects: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
                     ) -> dict[str, float]:
    """Mean IoUs of complete masks, prompted by what is seen; names: `measure`."""
    scores: dict[str, list[float]] = {}
    for image, visible, whole in objects:
        logits = segmenter.segment([segmenter.embed(image)], [prompt_of_mask(visible, "amodal")])[0]
        seen = visible.sum() / whole.sum()
        for bound, suffix in ((0.95, ""), (0.85, "_15")):
            if seen < bound:
                scores.setdefault("complete_occluded" + suffix, []).append(mask_iou(logits, whole))
                scores.setdefault("visible_occluded" + suffix, []).append(seen)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def measure(segmenter: Segmenter, scenes: int, clips: int) -> dict[str, float]:
    """Mean IoUs on the test split.

    `iou` and `iou_sequential`: visible masks from true box and point; `iou_box`, `iou_point`: from one alone;
    `iou_noisy`: from noisy ones; `complete_occluded`: complete masks of objects with 5 % or more hidden, prompted by
    what is seen, and `visible_occluded`, the score of answering with exactly what is seen, the bound that complete
    masks must beat (DATA.md 2.3), three objects for every scene; the two `_15`: of those with more than 15 % hidden;
    `track`: mean J over all frames but the prompted one; `track_complete`: the same of complete masks.
    """
    from icseg_jax import synthetic

    names = ("iou", "iou_sequential", "iou_box", "iou_point", "iou_noisy", "track", "track_complete")
    scores: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    for index in range(scenes):
        scene = synthetic.make_scene(index, seed=7, split="test")
        frame = int(rng.integers(scene.n_frames))
        visible = synthetic.visible_masks(scene, frame)
        chosen = [i for i in range(len(visible)) if visible[i].sum() > MIN_AREA]
        features = [segmenter.embed(synthetic.render(scene, [frame])[0])] * len(chosen)
        prompts = [prompt_of_mask(visible[i]) for i in chosen]
        for name, given, prompting in (
            ("iou", prompts, "joint"),
            ("iou_sequential", prompts, "sequential"),
            ("iou_box", [dataclasses.replace(p, point=None) for p in prompts], "joint"),
            ("iou_point", [dataclasses.replace(p, box=None) for p in prompts], "joint"),
            ("iou_noisy", [_noisy_prompt(visible[i], "both", rng) for i in chosen], "joint"),
        ):
            logits = segmenter.segment(features, given, prompting)
            scores[name] += [mask_iou(mask, visible[i]) for mask, i in zip(logits, chosen, strict=True)]
        if index >= clips:
            continue
        features = [segmenter.embed(image) for image in synthetic.render(scene, range(scene.n_frames))]
        seen = np.stack([synthetic.visible_masks(scene, t) for t in range(scene.n_frames)])
        all_of_it = np.stack([synthetic.complete_masks(scene, t) for t in range(scene.n_frames)])
        i = int(rng.integers(seen.shape[1]))
        shown = synthetic.shown_frames()
        best = max(shown, key=lambda t, i=i: seen[t, i].sum())
        others = [t for t in range(scene.n_frames) if t != best]
        for name, truth, mask_type in (("track", seen[:, i], "modal"),
                                       ("track_complete", all_of_it[:, i], "amodal"))[: 1 + segmenter.has_complete]:
            masks = segmenter.track(features, best, prompt_of_mask(seen[best, i], mask_type), truth.shape[1:])
            either = np.maximum((masks | truth).sum((1, 2)), 1)
            scores[name] += [float(j) for j in ((masks & truth).sum((1, 2)) / either)[others]]
    means = {name: float(np.mean(values)) for name, values in scores.items() if values}
    if not segmenter.has_complete:
        return means
    return means | measure_complete(segmenter, itertools.islice(occluded_objects(seed=7), 3 * scenes))


# --------------------------------------------------------------------------------------------------
# 6 main
# --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    about = "SAM2 in a process of its own, and the training of the small one."
    parser = argparse.ArgumentParser(prog="python -m icseg_jax.sam2_sidecar", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="answer segmentation requests until killed")
    command.add_argument("--socket", required=True, help="path of a Unix socket, or tcp://HOST:PORT; a HOST "
                         f"that is not this machine needs the same secret in {SECRET_VARIABLE} on both sides")
    command.add_argument("--segmenter", default=str(ASSET), help="directory of the model, or a SAM 2.1 .pt")
    command.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    command.add_argument("--frames", type=int, default=2048, help="registered frames to remember, 1 GiB at most")
    command.add_argument("--cache-gb", type=float, default=0.0, help="GB of frame embeddings to keep on disk, in "
                         f"~/.cache/icseg_jax/embeddings or the folder that {CACHE_VARIABLE} names")
    command.add_argument("--parent", type=int, help="exit when this parent process dies")
    command = commands.add_parser("train", help="make the small segmenter of the embedded world")
    command.add_argument("config", help="a YAML file, such as experiments/embedded_sam2.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="fields of TrainConfig")
    command = commands.add_parser("measure", help="score the small segmenter on test scenes of the synthetic world")
    command.add_argument("segmenter", nargs="?", default=str(ASSET), help="directory of config and weights")
    command.add_argument("--scenes", type=int, default=60, help="for masks of single frames")
    command.add_argument("--clips", type=int, default=16, help="for tracks")
    command = commands.add_parser("import", help="write a released SAM 2.1 checkpoint as a segmenter's directory")
    command.add_argument("checkpoint", help="such as sam2.1_hiera_large.pt")
    command.add_argument("out", help="a directory that does not exist yet")
    given = parser.parse_args(arguments)
    try:
        if given.command == "serve":
            serve(given.socket, given.segmenter, threads=given.threads, parent=given.parent,
                  max_frames=given.frames, cache_gb=given.cache_gb)
        elif given.command == "measure":
            print(json.dumps(measure(load_segmenter(given.segmenter), given.scenes, given.clips), indent=1))
        elif given.command == "import":
            import_checkpoint(given.checkpoint, given.out)
            print(f"wrote {given.out}; use it as sidecar.segmenter={given.out}")
        else:
            train(load_train_config(given.config, given.overrides))
    except (ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
