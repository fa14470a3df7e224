"""What a ``.pte`` file says of itself: fewbit's program, its constants where XNNPACK keeps them, XNNPACK's graphs."""

import base64
import hashlib
import json
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from math import prod
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError
from fewbit.model.codings import function_values, quantize_table
from fewbit.model.program import Program
from fewbit.targets._pt2e.export import mute
from fewbit.targets._pt2e.xnnpack import package

METHOD = "fewbit"  # a method of the file that returns what fewbit has to say about it
_CHECKSUM = (
    "fewbit_checksum"  # and one that returns the hash of all the rest, for a runtime that trusts its files
)
_MARK = b"sha256 of this file with zeros here: "
_ZEROS = b"0" * 64
_INFINITE = re.compile(r"(: -?)inf\b")
_LARGEST_DESCRIPTION = 64 * 2**20
_PADDING = 64  # bytes
_MANY = 2**14  # numbers: more are not stored twice
_DTYPES = {str(d): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
                               torch.int32, torch.int64, torch.bool)}  # fmt: skip


def methods(text: str) -> dict[str, str]:
    """What the file's methods beside the model return, before it is sealed."""
    return {METHOD: text, _CHECKSUM: (_MARK + _ZEROS).decode()}


def sealed(data: bytes) -> bytes:
    """The file with its checksum filled in: XNNPACK ends the process where its part is damaged."""
    begin = data.index(_MARK + _ZEROS) + len(_MARK)
    return data[:begin] + _hash(data).encode() + data[begin + len(_ZEROS) :]


def sound(data: bytes) -> bool:
    """Whether the file is as it was written; another tool's file has no checksum."""
    begin = data.find(_MARK) + len(_MARK)
    if begin < len(_MARK):
        return True
    end = begin + len(_ZEROS)
    return data[begin:end] == _hash(data[:begin] + _ZEROS + data[end:]).encode()


@dataclass
class Content:
    """What fewbit wrote into a file. ``independent``: its samples are computed each for itself."""

    program: Program | None = None
    properties: dict[str, str] = field(default_factory=dict)
    independent: bool = False


def read(path: Path, data: bytes) -> Content:
    """What fewbit wrote into a file, empty for another tool's; its bytes must have passed the runtime's verification.

    Raises ``ArtifactError`` where it is damaged.
    """
    try:
        file = _file(data)
        texts = [v.val.string_val for plan in file.program.execution_plan if plan.name == METHOD for v in plan.values
                 if type(v.val).__name__ == "String"]  # fmt: skip
        if not texts:
            return Content()
        found = _unpacked(texts[0])
        properties = {str(k): str(v) for k, v in found["metadata"].items()}
        kept = [bytes(b.storage) for b in file.program.constant_buffer]
        kept += [] if file.named_data is None else [bytes(b) for b in file.named_data.buffers]
        return Content(_restored(found, by_hash(kept)), properties, bool(found["independent"]))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
            RecursionError, StopIteration, zlib.error, struct.error) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: its program is damaged ({type(error).__name__}: {error!s:.200})"
        ) from error


def graphs(path: Path, data: bytes) -> list[dict[str, Any]]:
    """XNNPACK's graphs as plain data."""
    try:
        return [_graph(bytes(d.data)) for d in _file(data).program.backend_delegate_data]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, struct.error,
            SubprocessError) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: XNNPACK's part is damaged ({type(error).__name__}: {error!s:.200})"
        ) from error


def _file(data: bytes) -> Any:
    return package("exir._serialize._program").deserialize_pte_binary(data)


def by_hash(constants: Iterable[bytes | Tensor]) -> dict[str, bytes]:
    """Constants of a file by what the description knows them by."""
    found = (c if isinstance(c, bytes) else _bytes(c) for c in constants)
    return {_hash(constant): constant for constant in found}


def _graph(data: bytes) -> dict[str, Any]:
    """XNNPACK's graph by the schema that ExecuTorch carries."""
    begin = data.find(b"XN01") - 4
    if begin < 0:
        return {"xnodes": [], "xvalues": []}
    schema = files(package("backends.xnnpack.serialization")).joinpath("schema.fbs").read_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "graph.bin").write_bytes(data[begin:])
        (folder / "schema.fbs").write_bytes(schema)
        decompile = package("exir._serialize._flatbuffer")._flatc_decompile
        with mute():
            decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    graph: dict[str, Any] = json.loads(_INFINITE.sub(r"\1Infinity", text))  # limits of clamps
    return graph


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- the program -----------------------------------------------------------------------------------------------------


def described(program: Program, blobs: dict[str, bytes], facts: dict[str, Any]) -> str:
    """The program as text: constants that the file has anyway by their hashes, the others in full.

    Large ones of float layers that the lowering took apart are left out, and with them whatever the layer has.
    """
    data = program.to_json()
    constants: dict[str, dict[str, Any]] = {}
    for op, entry in zip(program.ops, data["ops"], strict=True):
        found = {role: _stored(t, blobs) for role, t in op.constants.items() if role != "table"}
        missing = [op.constants[role] for role, stored in found.items() if stored is None]
        if op.kind == "module" and any(t.is_floating_point() and t.numel() > _MANY for t in missing):
            found = {}
        constants |= {f"{op.output}.{role}": s or _in_full(op.constants[role]) for role, s in found.items()}
        entry["constants"] = sorted(found)
    text = json.dumps({"program": data, "constants": constants} | facts, separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _layouts(tensor: Tensor) -> list[Tensor]:
    """A weight as it is, and with its input or output channels last, as XNNPACK keeps those of convolutions."""
    return [tensor] + ([tensor.movedim(1, -1), tensor.movedim(0, -1)] if tensor.dim() > 2 else [])


def hashes(weight: Tensor) -> list[str]:
    """By which a file may know a weight."""
    return [_hash(_bytes(view)) for view in _layouts(weight)]


def _stored(tensor: Tensor, blobs: dict[str, bytes]) -> dict[str, Any] | None:
    for layout, key in enumerate(hashes(tensor)):
        if key in blobs:
            return {"hash": key, "layout": layout, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}
    return None


def _in_full(tensor: Tensor) -> dict[str, Any]:
    text = base64.b85encode(_bytes(tensor)).decode()
    return {"bytes": text, "layout": 0, "dtype": str(tensor.dtype), "shape": list(tensor.shape)}


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _unpacked(text: str) -> dict[str, Any]:
    data = json.loads(zlib.decompressobj().decompress(base64.b85decode(text), _LARGEST_DESCRIPTION))
    if not isinstance(data, dict):
        raise ValueError("no description")
    return data


def _restored(data: dict[str, Any], blobs: dict[str, bytes]) -> Program:
    tensors = {name: _tensor(entry, blobs) for name, entry in data["constants"].items()}
    tables = {
        f"{op['output']}.table": torch.empty(0) for op in data["program"]["ops"] if op["kind"] == "table"
    }
    for op in data["program"]["ops"]:
        op["constants"] += ["table"] if op["kind"] == "table" else []
    program = Program.from_json(data["program"], tensors | tables)
    for op in program.ops:
        if op.kind == "table":  # a file stores the function, not its table
            values = function_values(op.attrs["function"], program.codings[op.inputs[0]])
            op.constants["table"] = quantize_table(values, program.codings[op.output])
    return program


def _tensor(entry: dict[str, Any], blobs: dict[str, bytes]) -> Tensor:
    dtype, shape, layout = _DTYPES[entry["dtype"]], [int(s) for s in entry["shape"]], int(entry["layout"])
    size = prod(shape) * dtype.itemsize
    raw = base64.b85decode(entry["bytes"]) if "bytes" in entry else _found(entry["hash"], size, blobs)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    if layout == 0:
        return flat.reshape(shape)
    axis = 1 if layout == 1 else 0
    moved = shape[:axis] + shape[axis + 1 :] + [shape[axis]]
    return flat.reshape(moved).movedim(-1, axis).contiguous()


def _found(key: str, size: int, blobs: dict[str, bytes]) -> bytes:
    """A constant of the file by its hash; ExecuTorch's own operators keep theirs with padding behind."""
    if key in blobs:
        return blobs[key]
    padded = (blob[:size] for blob in blobs.values() if 0 < len(blob) - size < _PADDING)
    return next(blob for blob in padded if _hash(blob) == key)
