"""A model's description and tensors as one safetensors file, entropy-coded; `docs/saved-form.md` has it byte by byte.

Reading trusts nothing: the digest is checked first, and every size before memory is taken for it.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError, ModelError
from fewbit.model.arguments import DTYPES
from fewbit.model.packed import LARGEST_NUMBER
from fewbit.numerics.coded_tensor import CodedTensor
from fewbit.numerics.scheme import Scheme

VERSION = 1
SUFFIX = ".fewbit"
MARK = "fewbit"
SECTIONS = ("description", "tensors", "padding")
_EXAMPLE = "example:"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 4096
_LONGEST_DESCRIPTION = 16 * 2**20
# What a small file may ask for at most: numbers, and characters of the description, for each of its bytes.
_DENSEST = 256


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its name, dtype and shape, and its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: bytes

    def read(self) -> CodedTensor:
        """How it is coded. Raises FormatError for what cannot be."""
        return CodedTensor.read(self.content, math.prod(self.shape), self.dtype.itemsize)


@dataclass(frozen=True)
class Layout:
    """What is where in a file: the description's model and inputs, the tensors, and the bytes of all else."""

    model: dict[str, Any]
    inputs: list[Any]
    entries: tuple[Entry, ...]
    other: dict[str, int]

    def schemes(self) -> dict[str, Scheme]:
        """How the weights whose codes are stored are quantized, by the codes' name. Raises as `from_bytes`."""
        states = (layer.get("state", {}) for layer in self.model["graph"]["layers"].values())
        coded = [entry for state in states for entry in state.values() if "parts" in entry]
        return {entry["parts"]["codes"]: Scheme.from_json(entry["scheme"]) for entry in coded}


def to_bytes(model: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The file of what `serialize.describe` gave. Of example inputs it keeps dtype, shape and range only.

    Raises ModelError for a tensor of a dtype that has no name, and a description that is too long.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_EXAMPLE)}
    for name, tensor in kept.items():
        if tensor.dtype not in _NAMES:
            raise ModelError(f"{name}: {tensor.dtype} cannot be saved; expected one of {', '.join(DTYPES)}")
    inputs = [_range(tensors[f"{_EXAMPLE}{i}"]) for i in range(len(tensors) - len(kept))]
    contents = [CodedTensor.encode(tensor).to_bytes() for tensor in kept.values()]
    index = [
        [name, _NAMES[tensor.dtype], list(tensor.shape), len(content)]
        for (name, tensor), content in zip(kept.items(), contents, strict=True)
    ]
    text = json.dumps(
        {"inputs": inputs, "model": model, "tensors": index},
        sort_keys=True, separators=(",", ":"), allow_nan=False,
    ).encode()  # fmt: skip
    if len(text) > _LONGEST_DESCRIPTION:
        raise ModelError(
            f"the description of the graph has {len(text) >> 20} MiB, and a single file's at most "
            f"{_LONGEST_DESCRIPTION >> 20}: save to a folder (a name without .fewbit)"
        )
    sections = [zlib.compress(text, 9), b"".join(contents)]
    asked = max(_numbers(model, index, inputs), len(text))
    padding = -(-asked // _DENSEST) - sum(map(len, sections))
    sections.append(bytes(max(padding, 0)))
    data = b"".join(sections)
    return _header([len(section) for section in sections], _digest(data)) + data


def from_bytes(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_bytes`; example inputs are random numbers of their range.

    Raises ArtifactError and FormatError, or what Python raises on data of a wrong kind.
    """
    layout = read_layout(content)
    tensors = {entry.name: entry.read().decode(entry.dtype, entry.shape) for entry in layout.entries}
    for i, described in enumerate(layout.inputs):
        tensors[f"{_EXAMPLE}{i}"] = _drawn(*described)
    return layout.model, tensors


def is_ours(start: bytes) -> bool:
    """Whether a file with this beginning, of LONGEST_HEADER bytes, is one that `to_bytes` made: of any version."""
    size = int.from_bytes(start[:8], "little")
    try:
        header = json.loads(start[8 : 8 + min(size, LONGEST_HEADER)])
        return isinstance(header["__metadata__"], dict) and MARK in header["__metadata__"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def read_layout(content: bytes) -> Layout:
    """What is where, with everything checked that can be before the tensors are decoded. Raises as `from_bytes`."""
    start, sizes = _sections(content)
    data = content[start:]
    text = _inflated(data[: sizes[0]], min(_LONGEST_DESCRIPTION, _DENSEST * len(content)))
    description = json.loads(text)
    index, inputs, model = description["tensors"], description["inputs"], description["model"]
    if _numbers(model, index, inputs) > _DENSEST * len(content):
        raise ArtifactError(
            f"its tensors have more than {_DENSEST} numbers for each byte of the file: hostile"
        )
    other = {
        "header": start - 2 * _DIGEST, "checksum": 2 * _DIGEST, "description": sizes[0], "padding": sizes[2],
    }  # fmt: skip
    return Layout(model, inputs, tuple(_entries(index, data[sizes[0] : sizes[0] + sizes[1]])), other)


def _entries(index: list[Any], data: bytes) -> Iterator[Entry]:
    names: set[str] = set()
    at = 0
    for name, dtype, shape, size in index:
        if (
            not isinstance(name, str)
            or name in names
            or type(size) is not int
            or not 0 <= size <= len(data) - at
        ):
            raise ArtifactError(f"the tensor {name!r:.80} of {size!r:.40} bytes is not in this file")
        names.add(name)
        yield Entry(name, DTYPES[dtype], tuple(shape), data[at : at + size])
        at += size
    if at != len(data):
        raise ArtifactError(f"{len(data) - at} bytes belong to no tensor")


# ---- header and description ------------------------------------------------------------------------------------------

_DIGEST = 16  # bytes; twice as many characters


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST).hexdigest()


def _header(sizes: list[int], digest: str) -> bytes:
    """The one header of these sections: a reader makes it again and compares, so that no byte of it is free."""
    header: dict[str, Any] = {"__metadata__": {MARK: str(VERSION), "digest": digest}}
    start = 0
    for name, size in zip(SECTIONS, sizes, strict=True):
        if size:
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sections(content: bytes) -> tuple[int, list[int]]:
    """Where the first section begins, and the bytes of each; ArtifactError where anything in the file is damaged."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > min(LONGEST_HEADER, len(content)) or not is_ours(content):
        raise ArtifactError("not a file that fewbit.save wrote, or its beginning is damaged")
    header = json.loads(content[8:start])
    version = header["__metadata__"][MARK]
    if version != str(VERSION):
        raise ArtifactError(
            f"version {version!r:.40} found, at most {VERSION} expected: damaged, or of a later fewbit"
        )
    try:
        sizes = [int(header[name]["shape"][0]) if name in header else 0 for name in SECTIONS]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise ArtifactError("its header is damaged; save the model again") from error
    data = content[start:]
    if content[:start] != _header(sizes, _digest(data)) or len(data) != sum(sizes):
        raise ArtifactError(
            "its content does not have the checksum that it states: damaged; save the model again"
        )
    return start, sizes


def _inflated(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    text = stream.decompress(data, limit)
    if not stream.eof or stream.unused_data:
        raise ArtifactError(f"its description is damaged, or longer than {limit} characters")
    return text


def _numbers(model: Mapping[str, Any], index: list[Any], inputs: list[Any]) -> int:
    """How many numbers memory will hold: those of tensors as often as layers have them, and those of inputs."""
    counts = {name: _count(shape) for name, _, shape, _ in index}
    total = sum(counts.values()) + sum(_count(shape) for _, shape, *_ in inputs)
    for layer in model["graph"]["layers"].values():
        for entry in layer.get("state", {}).values():
            total += sum(
                counts[name] for name in (entry["parts"].values() if "parts" in entry else [entry["tensor"]])
            )
    return total


def _count(shape: list[Any]) -> int:
    if len(shape) > 64 or any(type(s) is not int or not 0 <= s <= LARGEST_NUMBER for s in shape):
        raise ArtifactError(f"{shape!r:.80} is no shape")
    return math.prod(shape)


# ---- example inputs --------------------------------------------------------------------------------------------------


def _range(x: Tensor) -> list[Any]:
    """dtype, shape, least and greatest number of an input."""
    wide = x.to(torch.float64 if x.is_floating_point() else torch.int64).nan_to_num()
    low, high = (v.item() for v in wide.aminmax()) if x.numel() else (0, 0)
    return [_NAMES[x.dtype], list(x.shape), low, high]


def _drawn(dtype: str, shape: list[int], low: float, high: float) -> Tensor:
    """Seeded numbers of a range, whose ends are among them: so that a model saved once more is the same file."""
    generator = torch.Generator().manual_seed(0)
    if DTYPES[dtype].is_floating_point:
        x = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    else:
        x = torch.randint(int(low), int(high) + 1, shape, generator=generator)
    if x.numel():
        flat = x.view(-1)
        flat[0], flat[-1] = low, high
    return x.to(DTYPES[dtype])
