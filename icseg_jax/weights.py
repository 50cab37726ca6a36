"""Weight files and tokenizers: what stands between a directory on disk and the method's arrays and token ids.

`read_params` and `write_params` carry Hugging Face Qwen3-VL safetensors to our parameter tree and back, byte
for byte, one tensor at a time; `python -m icseg_jax.weights import|export` does so between whole directories and
our Orbax checkpoints, `average` takes the mean of several. `Tokenizer` wraps a `tokenizers` JSON (Qwen's
byte-level BPE or the embedded word-level one) without importing transformers, which would pull in torch.
`build_word_tokenizer` makes the embedded one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tokenizers
from tqdm import tqdm

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


class Tokenizer:
    """Text <-> token ids, exact in both directions for every token that the vocabulary can spell.

    Raises ValueError, one line, when `path` has no readable `tokenizer.json` or lacks one of Qwen's specials.
    """

    def __init__(self, path: str | Path):
        file = Path(path) / "tokenizer.json"
        try:
            self.json = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file; a Qwen3-VL directory has a tokenizer.json") from None
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{file}: not a tokenizers JSON ({error})") from None
        self.ids = {}
        for name in SPECIALS:
            index = self._tokenizer.token_to_id(name)
            if index is None and name != "<|vision_pad|>":
                raise ValueError(f"{file}: special token {name} is missing; the policy needs Qwen's special tokens")
            self.ids[name] = index
        self.end_of_text, self.end_of_turn = self.ids["<|endoftext|>"], self.ids["<|im_end|>"]

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """`text` may hold special tokens, which become their ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable) -> str:
        """Special tokens are kept: the transcript must show what was said."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def spelling(self) -> list[bytes]:
        """The bytes that each token id adds to the text; empty for special and unused ids."""
        out = [b""] * len(self)
        special = {i for i in self.ids.values() if i is not None}
        byte_level = '"ByteLevel"' in self.json
        letters = _byte_letters() if byte_level else {}
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in special or index >= len(out):
                continue
            if byte_level and all(c in letters for c in token):
                out[index] = bytes(letters[c] for c in token)
            else:
                out[index] = token.encode("utf-8")
        return out


def _byte_letters() -> dict[str, int]:
    """The printable letters by which byte-level BPE writes bytes (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def build_word_tokenizer(
    words: Iterable[str], literals: Sequence[str], *, frames: int, coordinate_step: int
) -> tokenizers.Tokenizer:
    """The embedded word-level tokenizer: every word (bare and with its leading space), every protocol
    literal, frame numbers and a grid of coordinates from 0 to 1000 are one token each; unknown text becomes
    `<unk>`.

    Tokens spell themselves, so that decoding is plain concatenation and token ids and text agree exactly.
    """
    ordered = list(dict.fromkeys(sorted(literals, key=len, reverse=True)))
    pattern = "|".join(
        [*(re.escape(x) for x in ordered), r" ?</?[a-z]+>", r", ?-?\d+", r" ?-?\d+", r" ?[A-Za-z_']+",
         r"\n\n|\n", r" ?[^\sA-Za-z0-9]", r"\s"]
    )  # fmt: skip
    vocabulary: dict[str, int] = {}

    def add(token: str) -> None:
        vocabulary.setdefault(token, len(vocabulary))

    for token in [*SPECIALS, "<unk>", "\n", "\n\n", " ", *ordered]:
        add(token)
    for number in [-1, *range(frames)]:
        add(str(number))
        add(f" {number}")
    for coordinate in range(0, 1001, coordinate_step):
        add(str(coordinate))
        add(f", {coordinate}")
    for word in dict.fromkeys(words):
        add(word)
        add(f" {word}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


# The layout of Qwen's dialogues: each turn between its marks, a newline after it; content is a text or parts.
CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def save_word_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Writes what `transformers` needs to load it: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<|im_end|>",
             "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# ------------------------------------------------------------------------------------------------------
# Weights. Our tree has JAX's habits (kernels [in..., out...], layers stacked on a leading axis), Hugging
# Face's has torch's (kernels [out, in], one tensor per layer, heads fused). The tables below are the whole
# difference.
# ------------------------------------------------------------------------------------------------------

# Our leaf -> (Hugging Face name, leading input axes of the kernel; 0: not a kernel, the same layout in both).
TOP = {
    "embedding": ("model.language_model.embed_tokens.weight", 0),
    "norm": ("model.language_model.norm.weight", 0),
    "output": ("lm_head.weight", 1),  # absent when tied
}
LAYER = {  # model.language_model.layers.N.
    "attention_norm": ("input_layernorm.weight", 0),
    "q": ("self_attn.q_proj.weight", 1),
    "k": ("self_attn.k_proj.weight", 1),
    "v": ("self_attn.v_proj.weight", 1),
    "o": ("self_attn.o_proj.weight", 2),
    "q_norm": ("self_attn.q_norm.weight", 0),
    "k_norm": ("self_attn.k_norm.weight", 0),
    "mlp_norm": ("post_attention_layernorm.weight", 0),
    "gate": ("mlp.gate_proj.weight", 1),
    "up": ("mlp.up_proj.weight", 1),
    "down": ("mlp.down_proj.weight", 1),
}
VISION = {  # model.visual.
    "patch": ("patch_embed.proj.weight", 1),  # a convolution there, [out, C, t, p, p]
    "patch_bias": ("patch_embed.proj.bias", 0),
    "position": ("pos_embed.weight", 0),
}
BLOCK = {  # model.visual.blocks.N.
    "norm1": ("norm1.weight", 0),
    "norm1_bias": ("norm1.bias", 0),
    "qkv": ("attn.qkv.weight", 1),
    "qkv_bias": ("attn.qkv.bias", 0),
    "o": ("attn.proj.weight", 2),
    "o_bias": ("attn.proj.bias", 0),
    "norm2": ("norm2.weight", 0),
    "norm2_bias": ("norm2.bias", 0),
    "fc1": ("mlp.linear_fc1.weight", 1),
    "fc1_bias": ("mlp.linear_fc1.bias", 0),
    "fc2": ("mlp.linear_fc2.weight", 1),
    "fc2_bias": ("mlp.linear_fc2.bias", 0),
}
MERGER = {  # model.visual.merger. and model.visual.deepstack_merger_list.N.
    "norm": ("norm.weight", 0),
    "norm_bias": ("norm.bias", 0),
    "fc1": ("linear_fc1.weight", 1),
    "fc1_bias": ("linear_fc1.bias", 0),
    "fc2": ("linear_fc2.weight", 1),
    "fc2_bias": ("linear_fc2.bias", 0),
}

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 4 * 10**9  # of tensors per file
PROGRESS_BYTES = 200 * 10**6  # from which a progress bar is worth its line
# What lies in a policy directory beside config.json and the weights, and is copied from a source.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
OWN = ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor and what it holds: `layer` of a stacked leaf, or all of a leaf (None)."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    inputs: int  # leading input axes of the kernel

    def export(self, part: np.ndarray) -> np.ndarray:
        """Our part of the leaf in Hugging Face's layout, contiguous."""
        axes = (*range(self.inputs, part.ndim), *range(self.inputs))
        return np.ascontiguousarray(part.transpose(axes).reshape(self.shape))

    def adopt(self, stored: np.ndarray, part_shape: Sequence[int]) -> np.ndarray:
        """A view of the stored tensor in our layout."""
        outputs = len(part_shape) - self.inputs
        split = stored.reshape(*part_shape[self.inputs :], *part_shape[: self.inputs])
        return split.transpose(*range(outputs, len(part_shape)), *range(outputs))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _layout(shapes: Mapping[str, Any], config: Mapping[str, Any], where: str) -> list[Tensor]:
    """Every tensor of the Hugging Face file, leaf by leaf, for a tree of things that have a `shape`."""
    try:
        vision = config["vision_config"]
        conv = (vision.get("in_channels", 3), vision["temporal_patch_size"], *[vision["patch_size"]] * 2)
    except (KeyError, TypeError):
        keys = "in_channels, temporal_patch_size and patch_size"
        raise ValueError(f"{where}: vision_config must be a mapping with {keys}") from None
    # Vision blocks lie in runs between the DeepStack taps, blocks_0, blocks_1, ...; an empty run has no leaf.
    first, runs = {}, {key: tree for key, tree in shapes["vision"].items() if key.startswith("blocks_")}
    for run in sorted(runs, key=lambda key: int(key.removeprefix("blocks_"))):
        first[run] = sum(runs[before]["norm1"].shape[0] for before in first)

    out = []
    for leaf, value in _leaves(shapes):
        *group, key = leaf.split("/")
        table, prefix, start = TOP, "", None
        if group == ["layers"]:
            table, prefix, start = LAYER, "model.language_model.layers.{}.", 0
        elif group == ["vision"]:
            table, prefix = VISION, "model.visual."
        elif group and group[-1] in first:
            table, prefix, start = BLOCK, "model.visual.blocks.{}.", first[group[-1]]
        elif group == ["vision", "merger"]:
            table, prefix = MERGER, "model.visual.merger."
        elif group:
            number = group[-1].removeprefix("deepstack_")
            table, prefix = MERGER, f"model.visual.deepstack_merger_list.{number}."
        name, inputs = table[key]
        part = tuple(value.shape[start is not None :])
        shape = (math.prod(part[inputs:]), math.prod(part[:inputs])) if inputs else part
        if leaf == "vision/patch":
            shape = (shape[0], *conv)
        elif key == "qkv_bias":
            shape = (math.prod(part),)
        if start is None:
            out.append(Tensor(prefix + name, shape, leaf, None, inputs))
        else:
            for i in range(value.shape[0]):
                out.append(Tensor(prefix.format(start + i) + name, shape, leaf, i, inputs))
    return out


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor lie."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The tensor as a read-only map of the file, so that reading needs no buffer of its own."""
        size = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        data = np.memmap(self.file, np.uint8, "r", self.offset, (size,))
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


def _read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ValueError when the file is not whole."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(size - 8, 100_000_000):  # the format's own limit
                raise ValueError(f"{file}: no safetensors header, or cut short ({size} bytes); get it again")
            raw = handle.read(length)
    except OSError as error:
        raise ValueError(f"{file}: can not be read ({error.strerror})") from None
    out, end = {}, 0
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            if not (0 <= start <= stop and all(isinstance(n, int) and n >= 0 for n in (start, stop, *shape))):
                raise ValueError
            if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
                raise ValueError
            out[name], end = Stored(file, 8 + length + start, dtype, shape), max(end, 8 + length + stop)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: its safetensors header is damaged; get it again") from None
    if end > size:
        raise ValueError(f"{file}: cut short, {size} bytes where its header promises {end}; get it again")
    return out


def _modern(name: str) -> str:
    """Tensor names of before transformers 4.52 in today's spelling."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model.", name)


def _stored_tensors(path: Path) -> dict[str, Stored]:
    """Today's name -> place, for a directory with one weight file or with shards and their index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return {_modern(name): place for name, place in _read_header(single).items()}
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"{path}: no weights; model.safetensors or {index.name} must be there") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{index}: damaged; its weight_map must name files of this directory") from None
    for name in names:
        if not (path / name).is_file():
            raise ValueError(f"{path / name}: missing; {index.name} needs all {len(names)} shards")
    headers = {name: _read_header(path / name) for name in names}
    for tensor, name in files.items():
        if tensor not in headers[name]:
            raise ValueError(f"{path / name}: tensor {tensor} is missing although {index.name} names it")
    return {_modern(tensor): headers[name][tensor] for tensor, name in files.items()}


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX on a CPU takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(to: np.ndarray, source: np.ndarray, inputs: int) -> None:
    """to[...] = source, in blocks that fit the cache: a transposed copy in one go is ten times slower."""
    if not inputs or not to.size:
        to[...] = source
        return
    step = max(1, 128 // math.prod(to.shape[inputs + 1 :]))
    for at in range(0, to.shape[inputs], step):
        block = (slice(None),) * inputs + (slice(at, at + step),)
        to[block] = source[block]


def read_params(path: str | Path, shapes: Any, *, dtype: Any = None, shardings: Any = None) -> Any:
    """The weights of a Hugging Face Qwen3-VL directory as our parameter tree.

    shapes: nested dicts with a `shape` at each leaf (`train.parameter_shapes`); dtype: None keeps the stored
    one; shardings: a tree of jax.sharding.Sharding like `shapes`, None puts everything on the default device.

    Reads each tensor straight into the memory of its shards: beyond the parameters themselves it needs at
    most one shard of a leaf (on a CPU not even that) and the map of one tensor. Raises ValueError, one line,
    for a missing or truncated file, a missing tensor, one of another shape or dtype, or one without a place
    in the policy.
    """
    path = Path(path)
    config = _read_config(path)
    layout = _layout(shapes, config, f"{path}/config.json")
    stored = _stored_tensors(path)
    leaves = dict(_leaves(shapes))
    specs = dict(_leaves(shardings)) if shardings is not None else {}
    parts: dict[str, list[tuple[Tensor, Stored]]] = {}
    for tensor in layout:
        place = stored.pop(tensor.name, None)
        if place is None:
            hint = "; is tie_word_embeddings in config.json right?" if tensor.leaf == "output" else ""
            raise ValueError(f"{path}: tensor {tensor.name} {list(tensor.shape)} is missing{hint}")
        what = f"{place.file}: tensor {tensor.name}"
        if place.shape != tensor.shape:
            raise ValueError(f"{what} is {list(place.shape)}, config.json asks for {list(tensor.shape)}")
        if place.dtype not in DTYPES:
            raise ValueError(f"{what} has dtype {place.dtype!r}; {', '.join(DTYPES)} can be read")
        parts.setdefault(tensor.leaf, []).append((tensor, place))
    # A tied head that was stored all the same, and tables that follow from the config.
    unknown = [name for name in stored if name != "lm_head.weight" and not name.endswith("inv_freq")]
    if unknown:
        file = stored[unknown[0]].file
        raise ValueError(f"{file}: tensor {unknown[0]!r} has no place in the policy of config.json")

    # What to read: the distinct shards of each leaf that devices of this process hold.
    plan = []
    for leaf, members in parts.items():
        kinds = {place.dtype for _, place in members}
        if dtype is None and len(kinds) > 1:
            mixed = " and ".join(sorted(kinds))
            raise ValueError(f"{path}: {leaf} is stored as {mixed} in different layers; ask for one dtype")
        kind = np.dtype(dtype) if dtype is not None else DTYPES[members[0][1].dtype]
        shape = tuple(leaves[leaf].shape)
        everything = {None: (slice(None),) * len(shape)}  # None: the default device
        cuts = specs[leaf].addressable_devices_indices_map(shape) if specs else everything
        holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in cuts.items():
            bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        plan.append((leaf, members, kind, shape, holders))

    def volume(bounds: tuple[tuple[int, int], ...], kind: np.dtype) -> int:
        return math.prod(stop - start for start, stop in bounds) * kind.itemsize

    total = sum(volume(bounds, kind) for _, _, kind, _, holders in plan for bounds in holders)
    out: dict[str, Any] = {}
    with _progress(total, "reading weights") as bar:
        for leaf, members, kind, shape, holders in plan:
            arrays = []
            for bounds, devices in holders.items():
                shard = _aligned([stop - start for start, stop in bounds], kind)
                for tensor, place in members:
                    if tensor.layer is None:
                        to, cut, part = shard, bounds, shape
                    elif bounds[0][0] <= tensor.layer < bounds[0][1]:
                        to, cut, part = shard[tensor.layer - bounds[0][0]], bounds[1:], shape[1:]
                    else:
                        continue
                    source = tensor.adopt(place.map(), part)[tuple(slice(*c) for c in cut)]
                    _copy(to, source, tensor.inputs)
                    bar.update(to.nbytes)
                arrays += [jax.device_put(shard, device) for device in devices]
                jax.block_until_ready(arrays)  # transfers in flight would pile up on the host
            join = jax.make_array_from_single_device_arrays
            whole = join(shape, specs[leaf], arrays) if specs else arrays[0]
            *group, key = leaf.split("/")
            node = out
            for name in group:
                node = node.setdefault(name, {})
            node[key] = whole
    return out


def write_params(path: str | Path, params: Any, config: Mapping[str, Any], *, source: str | Path | None = None) -> None:
    """A Hugging Face Qwen3-VL directory with our parameters in their own dtype; appears whole or not at all.

    params: the tree of jax or numpy arrays; config: what becomes config.json (its dtype is set to the
    weights'); source: a directory whose tokenizer, template and processor files are copied along.

    `path` may be new, empty, or an earlier policy directory, which is replaced (should the process be killed
    between the two renames, the earlier one lies beside it as `.NAME.PID.old`). Raises ValueError, one line,
    when it is anything else or can not be written, or when config and parameters do not belong together.
    """
    path = Path(path).resolve()
    leaves = dict(_leaves(params))
    layout = sorted(_layout(params, config, "config"), key=lambda tensor: tensor.name)
    _check_config(config, leaves)
    codes = {np.dtype(kind): code for code, kind in DTYPES.items()}
    for leaf, value in leaves.items():
        if np.dtype(value.dtype) not in codes:
            known = ", ".join(kind.name for kind in codes)
            raise ValueError(f"parameter {leaf} is {value.dtype}; {known} can be written")
    if source is not None and not Path(source).is_dir():
        raise ValueError(f"{source}: no such directory to copy the tokenizer from")
    _check_replaceable(path)

    def size(tensor: Tensor) -> int:
        return math.prod(tensor.shape) * np.dtype(leaves[tensor.leaf].dtype).itemsize

    shards: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for tensor in layout:
        if shards[-1] and size(tensor) > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(tensor)
        room -= size(tensor)
    total = sum(map(size, layout))

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    earlier = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        weight_map = {}
        with _progress(total, "writing weights") as bar:
            for number, shard in enumerate(shards, start=1):
                part_of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                name = f"model{part_of}.safetensors"
                header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
                at = 0
                for tensor in shard:
                    code = codes[np.dtype(leaves[tensor.leaf].dtype)]
                    offsets = [at, at + size(tensor)]
                    header[tensor.name] = {
                        "dtype": code,
                        "shape": list(tensor.shape),
                        "data_offsets": offsets,
                    }
                    weight_map[tensor.name], at = name, offsets[1]
                text = json.dumps(header, separators=(",", ":")).encode()
                text += b" " * (-len(text) % 8)
                with (temporary / name).open("wb") as file:
                    file.write(struct.pack("<Q", len(text)) + text)
                    for tensor in shard:
                        value = leaves[tensor.leaf]
                        part = np.asarray(value if tensor.layer is None else value[tensor.layer])
                        file.write(tensor.export(part).reshape(-1).view(np.uint8).data)
                        bar.update(part.nbytes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if source is not None:
            _copy_companions(Path(source), temporary)
        main = np.dtype(max(leaves.values(), key=lambda value: value.size).dtype).name
        (temporary / "config.json").write_text(json.dumps(_with_dtype(config, main), indent=2) + "\n")
        # A directory can not be renamed over a full one: the earlier one steps aside first and is never lost.
        if path.exists() and any(path.iterdir()):
            os.replace(path, earlier)
        try:
            os.replace(temporary, path)
        except BaseException:
            if earlier.exists():
                os.replace(earlier, path)
            raise
    except OSError as error:
        raise ValueError(f"{path}: can not be written ({error.strerror}); give another directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(earlier, ignore_errors=True)


def _copy_companions(source: Path, to: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and _matches(file.name, COMPANIONS):
            shutil.copyfile(file, to / file.name)


def _progress(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=total <= PROGRESS_BYTES)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    try:
        config = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}/{name}: missing or not JSON; every Qwen3-VL has one")
    return config


def _check_replaceable(path: Path) -> None:
    """Only what an earlier `write_params` could have made is ever replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: is a file; give the name of a directory")
    inside = sorted(path.iterdir())
    foreign = [p.name for p in inside if not p.is_file() or not _matches(p.name, (*OWN, *COMPANIONS))]
    if foreign or (inside and not (path / "config.json").is_file()):
        what = f"holds {foreign[0]}" if foreign else "has no config.json"
        raise ValueError(f"{path}: {what}, so it is no policy directory to replace; give a new directory")


def _check_config(config: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """A config.json that describes other weights would make a directory that nobody can load."""
    text, vision = config.get("text_config") or {}, config["vision_config"]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    runs = [value.shape[0] for leaf, value in leaves.items() if re.fullmatch(r"vision/blocks_\d+/norm1", leaf)]
    for key, given, found in (
        ("tie_word_embeddings", bool(tied), "output" not in leaves),
        ("text_config.vocab_size", text.get("vocab_size"), leaves["embedding"].shape[0]),
        ("text_config.hidden_size", text.get("hidden_size"), leaves["embedding"].shape[1]),
        ("text_config.num_hidden_layers", text.get("num_hidden_layers"), leaves["layers/q"].shape[0]),
        ("text_config.num_attention_heads", text.get("num_attention_heads"), leaves["layers/q"].shape[2]),
        ("text_config.num_key_value_heads", text.get("num_key_value_heads"), leaves["layers/k"].shape[2]),
        ("text_config.intermediate_size", text.get("intermediate_size"), leaves["layers/gate"].shape[2]),
        ("vision_config.depth", vision.get("depth"), sum(runs)),
        ("vision_config.hidden_size", vision.get("hidden_size"), leaves["vision/patch"].shape[1]),
    ):
        if given != found:
            raise ValueError(f"config {key} is {given}, the parameters have {found}; they must belong together")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`dtype` is what transformers 4.56 and later read; a `torch_dtype` of before would contradict it."""
    out = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    for key in ("text_config", "vision_config"):
        if {"dtype", "torch_dtype"} & set(out[key]):
            out[key] = {k: v for k, v in out[key].items() if k != "torch_dtype"} | {"dtype": dtype}
    return out


# ------------------------------------------------------------------------------------------------------
# Our checkpoints: DIR/policy.json (the config.json that belongs to the weights) and DIR/checkpoints/STEP (Orbax).
# ------------------------------------------------------------------------------------------------------


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that `path` is, or the latest of the run that it is; None for any other directory.

    Raises ValueError for a run that holds none yet.
    """
    path = Path(path)
    if (path / "_CHECKPOINT_METADATA").exists():
        return path
    if not (path / "policy.json").is_file():
        return None
    steps = [int(p.name) for p in path.glob("checkpoints/*") if p.name.isdigit()]
    if not steps:
        raise ValueError(f"{path}/checkpoints: holds no checkpoint yet; a Hugging Face Qwen3-VL directory works")
    return path / "checkpoints" / str(max(steps))


def fingerprint(path: Path) -> str:
    """Tells weights apart that lay in the same place one after the other: a file's bytes, those of a directory's JSON
    and weights, or when a checkpoint was written. Of what is not there, that of nothing."""
    stamp = path / "_CHECKPOINT_METADATA"
    files = [stamp] if stamp.is_file() else [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in [*files, *sorted(path.glob("*.json"))]:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def read_checkpoint(path: Path, shapes: Any = None, *, dtype: Any = None, shardings: Any = None) -> Any:
    """The parameters of a checkpoint; dtype: None keeps the stored one; shardings: None puts all on one device.

    Raises ValueError, one line, for a damaged one, or one of other parameters than `shapes` where that is given.
    """
    from orbax.checkpoint import v1 as ocp

    try:
        stored = ocp.checkpointables_metadata(path.resolve()).metadata["params"]
        if shapes is not None:
            asked, held = ({k: tuple(x.shape) for k, x in _leaves(tree)} for tree in (shapes, stored))
            other = next((k for k in sorted({*asked, *held}) if asked.get(k) != held.get(k)), None)
            if other:
                raise ValueError(f"{other} is {held.get(other)} in it, {asked.get(other)} in policy.json")
        if shardings is None:
            one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: one, stored)
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=spec)  # noqa: E731
        wanted = jax.tree.map(place, stored, shardings)
        return ocp.load_checkpointables(path.resolve(), {"params": wanted})["params"]
    except Exception as error:  # Orbax has no error class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: can not be restored ({reason}); give an undamaged checkpoint") from None


def shapes_in(path: Path) -> dict[str, Any]:
    """The parameter tree of a Hugging Face directory, each leaf with a `shape`: what is stored, heads split.

    Raises ValueError as `read_params` does, which checks every tensor against it.
    """
    config = _read_config(path)
    stored = {name: place.shape for name, place in _stored_tensors(path).items()}
    try:
        text, vision = config["text_config"], config["vision_config"]
        heads = (text["num_attention_heads"], text["num_key_value_heads"], vision["num_heads"])
        taps, depth, layers = vision["deepstack_visual_indexes"], vision["depth"], text["num_hidden_layers"]
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        whole = all(type(n) is int and n > 0 for n in (*heads, depth, layers)) and all(type(n) is int for n in taps)
        if not whole or sorted(taps) != list(taps):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}/config.json: text_config and vision_config are not those of a Qwen3-VL") from None

    def leaf(name: str, inputs: int, split: tuple[int, ...], count: int | None = None) -> jax.ShapeDtypeStruct:
        """split: into what the fused axis of heads falls, the size of a head left open."""
        shape = stored.get(name)
        if shape is None:
            raise ValueError(f"{path}: tensor {name} is missing")
        if inputs and len(shape) < 2:
            raise ValueError(f"{path}: tensor {name} {list(shape)} is no matrix")
        fused = 1 if inputs == 2 else 0
        if split:
            if len(shape) <= fused or shape[fused] % math.prod(split):
                raise ValueError(f"{path}: tensor {name} {list(shape)} does not fall into heads {list(split)}")
            shape = (*shape[:fused], *split, shape[fused] // math.prod(split), *shape[fused + 1 :])
        if name.endswith("patch_embed.proj.weight"):
            shape = (shape[0], math.prod(shape[1:]))
        outputs = len(shape) - inputs
        ours = (*shape[outputs:], *shape[:outputs]) if inputs else shape
        return jax.ShapeDtypeStruct(ours if count is None else (count, *ours), np.float32)

    def group(table: Mapping, prefix: str, splits: Mapping = {}, count: int | None = None) -> dict[str, Any]:
        return {key: leaf(prefix + name, n, splits.get(key, ()), count) for key, (name, n) in table.items()}

    h, k, v = heads
    tree: dict[str, Any] = group({key: row for key, row in TOP.items() if not (tied and key == "output")}, "")
    by_head = {"q": (h,), "k": (k,), "v": (k,), "o": (h,)}
    tree["layers"] = group(LAYER, "model.language_model.layers.0.", by_head, layers)
    tree["vision"] = group(VISION, "model.visual.")
    tree["vision"]["merger"] = group(MERGER, "model.visual.merger.")
    by_head = {"qkv": (3, v), "qkv_bias": (3, v), "o": (v,)}
    start = 0
    for number, end in enumerate((*(tap + 1 for tap in taps), depth)):
        if end > start:
            run = group(BLOCK, f"model.visual.blocks.{start}.", by_head, end - start)
            tree["vision"][f"blocks_{number}"], start = run, end
        if number < len(taps):
            tree["vision"][f"deepstack_{number}"] = group(MERGER, f"model.visual.deepstack_merger_list.{number}.")
    return tree


def import_policy(source: str | Path, path: str | Path) -> None:
    """A Hugging Face directory as one of our checkpoints, in its own type; appears whole or not at all.

    `path`/checkpoints/0 holds the parameters, `path`/policy.json its config.json, beside them the tokenizer and
    processor files. Raises ValueError, one line, when `path` is there already or the source is damaged.
    """
    from orbax.checkpoint import v1 as ocp

    source, path = Path(source), Path(path).resolve()
    if not source.is_dir():
        raise ValueError(f"{source}: no such directory; a Hugging Face Qwen3-VL directory works")
    if path.exists():
        raise ValueError(f"{path}: is there already; give a new directory")
    kind = _read_config(source, "config.json").get("model_type")
    if kind != "qwen3_vl":
        raise ValueError(f"{source / 'config.json'}: model_type is {kind!r}; this policy reads 'qwen3_vl' (dense) only")
    params = read_params(source, shapes_in(source))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        (temporary / "checkpoints").mkdir(parents=True)
        _copy_companions(source, temporary)
        shutil.copyfile(source / "config.json", temporary / "policy.json")
        ocp.save_checkpointables(temporary / "checkpoints" / "0", {"params": params})
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path}: can not be written ({error.strerror}); give another directory") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export_policy(source: str | Path, path: str | Path, tokenizer: str | Path | None = None) -> None:
    """A checkpoint, or the latest of a run, as a Hugging Face directory in the stored type.

    tokenizer: the directory whose tokenizer and processor files go along; by default the run's own, where an imported
    policy has them. Raises ValueError, one line, when the source is damaged or `path` is no place for a policy.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise ValueError(f"{source}: neither a run nor one of our checkpoints; RUN or RUN/checkpoints/STEP works")
    run = checkpoint.resolve().parent.parent
    config = _read_config(run, "policy.json")
    _check_replaceable(Path(path))
    params = read_checkpoint(checkpoint)
    if not {"embedding", "layers", "vision"} <= set(params):
        raise ValueError(f"{checkpoint}: holds other parameters than a policy's; give a checkpoint of a policy")
    write_params(path, params, config, source=tokenizer or run)


def average_policies(sources: Sequence[str | Path], path: str | Path) -> None:
    """The mean of the weights of several Hugging Face directories of one shape, in the first one's type.

    Policies that went on from one another often do better averaged than each alone ("model soups", arXiv 2203.05482).
    config.json, tokenizer and processor files are the first one's. Raises ValueError, one line, for directories that
    do not belong together or a `path` that is no place for a policy.
    """
    first, *others = map(Path, sources)
    if not others:
        raise ValueError(f"{first}: one directory has no mean; give two or more, and then the new one")
    shapes = shapes_in(first)
    _check_replaceable(Path(path))
    params = read_params(first, shapes)
    total = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    for other in others:
        if {k: tuple(x.shape) for k, x in _leaves(shapes_in(other))} != {k: x.shape for k, x in _leaves(total)}:
            raise ValueError(f"{other}/config.json: a policy of another shape than {first}; give policies of one shape")
        total = jax.tree.map(lambda x, y: x + np.asarray(y, np.float32), total, read_params(other, shapes))
    count = len(others) + 1
    mean = jax.tree.map(lambda x, like: (x / count).astype(like.dtype), total, params)
    write_params(path, mean, _read_config(first), source=first)


USAGE = """usage: python -m icseg_jax.weights import SOURCE OUT
       python -m icseg_jax.weights export RUN|RUN/checkpoints/STEP OUT [tokenizer=DIR]
       python -m icseg_jax.weights average SOURCE SOURCE [SOURCE ...] OUT

  import   a Hugging Face Qwen3-VL directory -> one of our checkpoints, in its own type
  export   one of our checkpoints, or the latest of a run -> a Hugging Face Qwen3-VL directory
  average  the mean of the weights of several directories; everything else is the first one's
OUT must be new; an earlier export is replaced. Import and export again give the same bytes. tokenizer=DIR: whose
tokenizer and processor files go along, for a run that was not imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 on bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    name, places = arguments[0], [a for a in arguments[1:] if not a.startswith("tokenizer=")]
    tokenizers_from = [a.removeprefix("tokenizer=") for a in arguments if a.startswith("tokenizer=")]
    # Nothing is computed: parameters need the memory of the host, and an accelerator may be busy with the run.
    jax.config.update("jax_platforms", "cpu")
    try:
        known = {"import": len(places) == 2, "export": len(places) == 2, "average": len(places) >= 2}
        if not known.get(name) or len(tokenizers_from) > (name == "export"):
            raise ValueError(f"{' '.join(arguments)[:200]!r}: not a call; see python -m icseg_jax.weights --help")
        if name == "average":
            average_policies(places[:-1], places[-1])
        elif name == "import":
            import_policy(*places)
        else:
            export_policy(*places, *tokenizers_from)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(places[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
