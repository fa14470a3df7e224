"""A ``.pt2`` archive with a program inside: written by torch.export, read here without running anything in it.

``torch.export.load`` unpickles and evaluates what a file says, so it is for files one trusts. A ``.pt2`` file is a zip
archive with the weights as raw bytes and JSON beside them: that is all that is read of a file here.
"""

import io
import json
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fewbit.errors import ArtifactError, TargetError
from fewbit.model.codings import function_values, quantize_table
from fewbit.model.program import Program
from fewbit.targets import Described
from fewbit.targets._pt2e.export import quiet
from fewbit.targets._pt2e.layers import bias_unit
from fewbit.targets._pt2e.module import QdqModule, visible

ENTRY = "fewbit.json"
_WEIGHTS = "data/weights/"
_CONFIG = f"{_WEIGHTS}model_weights_config.json"
_LARGEST_DESCRIPTION = 64 * 2**20
# Numbers of torch's serialization schema.
_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
           7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16}  # fmt: skip


def write(
    graph: ExportedProgram,
    module: QdqModule,
    inputs: tuple[Tensor, ...],
    path: Path,
    metadata: dict[str, str],
) -> None:
    """Write the graph, the program beside it. Raises ``TargetError`` where torch loads another than it saved."""
    for node in graph.graph.nodes:
        for key in (
            "stack_trace",
            "nn_module_stack",
            "torch_fn",
        ):  # half of the file, and of no use to anyone
            node.meta.pop(key, None)
    graph.example_inputs = None
    described = json.dumps({"metadata": metadata, "program": module.program.to_json()}, separators=(",", ":"))
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        torch.export.save(graph, buffer, extra_files={ENTRY: described})
        data = buffer.getvalue()
        loaded = torch.export.load(io.BytesIO(data)).module(check_guards=False)(*inputs)
        same = [torch.equal(a, b) for a, b in zip(loaded, module(*inputs), strict=True)]
    if not all(same):
        raise TargetError(
            f"{path}: torch.export.load gives another network than was saved; please report this"
        )
    path.write_bytes(data)


def read(path: Path) -> Described:
    """The program of an archive that fewbit wrote, its constants taken from the archive's own weights.

    Raises ``ArtifactError`` for files that are damaged or were written by others.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, size)
            if f"extra/{ENTRY}" not in entries:
                raise ArtifactError(
                    f"{path}: an archive without fewbit's program; only files that fewbit exported can be read, "
                    "because loading another would run what it says"
                )
            data = json.loads(archive.read(entries[f"extra/{ENTRY}"]))
            weights = _weights(archive, entries)
        program = _program(data["program"], weights)
        properties = {str(k): str(v) for k, v in data["metadata"].items()}
        return Described(program, {name: name for name in visible(program)}, properties)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RuntimeError, AssertionError, RecursionError) as error:  # fmt: skip
        raise ArtifactError(
            f"{path}: not a sound .pt2 archive ({type(error).__name__}: {error!s:.200})"
        ) from error


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Entries by their name without the archive's own folder; nothing that grows when it is read."""
    found = {}
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            raise ValueError(f"entry {info.filename!r:.100} is compressed, which torch never writes")
        found[info.filename.partition("/")[2]] = info
    return found


def _weights(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> dict[str, Tensor]:
    config = json.loads(archive.read(entries[_CONFIG]))["config"]
    return {name: _tensor(name, entry, archive, entries) for name, entry in config.items()}


def _tensor(
    name: str, entry: dict[str, Any], archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> Tensor:
    """A tensor from its raw bytes. Refuses pickled ones and whatever is not simply laid out."""
    meta = entry["tensor_meta"]
    if entry["use_pickle"] is not False:
        raise ValueError(f"weight {name!r:.100} is pickled")
    sizes, strides = ([s["as_int"] for s in meta[key]] for key in ("sizes", "strides"))
    raw = bytearray(archive.read(entries[_WEIGHTS + entry["path_name"]]))
    dtype = _DTYPES[meta["dtype"]]
    if any(type(s) is not int or s < 0 for s in sizes) or prod(sizes) * dtype.itemsize != len(raw):
        raise ValueError(f"weight {name!r:.100}: {len(raw)} bytes are not {sizes} of {dtype}")
    if not raw:
        return torch.empty(sizes, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=dtype)
    _check_layout(name, sizes, strides, meta["storage_offset"]["as_int"])
    return flat.as_strided(sizes, strides)


def _check_layout(name: str, sizes: list[int], strides: list[int], offset: int) -> None:
    """A dense tensor in any order of its axes."""
    expected = 1
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size > 1 and stride != expected:
            raise ValueError(f"weight {name!r:.100}: strides {strides} of {sizes} are not dense")
        expected *= size
    if offset != 0:
        raise ValueError(f"weight {name!r:.100}: begins at {offset} in its storage")


def _program(data: dict[str, Any], weights: dict[str, Tensor]) -> Program:
    """The program with its constants, those restored that an archive does not store as they are."""
    tensors = {
        f"{op['output']}.{role}": weights.get(f"op{i}.{role}", torch.empty(0))
        for i, op in enumerate(data["ops"])
        for role in op["constants"]
    }
    program = Program.from_json(data, tensors)
    for op in program.ops:
        if op.domain == "integer" and "bias" in op.constants:
            codes = torch.round(op.constants["bias"].double() / bias_unit(op, program).double())
            op.constants["bias"] = codes.to(torch.int32)
        if op.kind == "table":  # a file stores the function, not its table
            values = function_values(op.attrs["function"], program.codings[op.inputs[0]])
            op.constants["table"] = quantize_table(values, program.codings[op.output])
    return program
