"""Opens `.onnx` files without trusting them: versions, tensors that say what they are, data in other files."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from fewbit.errors import ArtifactError, ModelError

OLDEST = 7
MAPPED = 2**24  # bytes of external data from which on a tensor stays in its file until it is used
LARGEST_FILE = 2**31 - 1  # protobuf's own limit
_FIELDS = {"FLOAT": "float_data", "DOUBLE": "double_data", "INT64": "int64_data",
           "UINT32": "uint64_data", "UINT64": "uint64_data"}  # fmt: skip


def open_model(path: Path) -> Any:
    """The `onnx.ModelProto` of a file, external data left where it is, local functions inlined.

    Raises ArtifactError for what is no ONNX file, is damaged, or names external data that is not there;
    ModelError for an opset that is too old or too new.
    """
    import onnx

    try:
        model = onnx.ModelProto.FromString(_content(path))
    except ArtifactError:
        raise
    except Exception as error:  # protobuf's error types differ between its implementations
        raise ArtifactError(
            f"{path}: not an ONNX file, or a damaged one ({_first(error)}); export it again"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise ArtifactError(f"{path}: not an ONNX file: it holds no graph or names no opset; export it again")
    _check_versions(model, path)
    check_external(model, path)
    if model.functions:
        try:
            from onnx.inliner import inline_local_functions

            model = inline_local_functions(model)
        except Exception as error:
            raise ArtifactError(
                f"{path}: its local functions cannot be inlined ({_first(error)}); export it again without them"
            ) from error
    return model


def opset(model: Any) -> int:
    """The version of ONNX's own operators that the file was written for."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{path}: not an ordinary file; expected an ONNX file")
        if status.st_size > LARGEST_FILE:
            raise ArtifactError(
                f"{path}: {status.st_size} bytes, and an ONNX file holds at most {LARGEST_FILE}; "
                "save its weights as external data"
            )
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_versions(model: Any, path: Path) -> None:
    import onnx

    found, newest = opset(model), onnx.defs.onnx_opset_version()
    if found > newest:
        raise ModelError(
            f"{path}: written for opset {found}, but the installed onnx {onnx.__version__} knows opsets up to "
            f"{newest}: upgrade onnx, or export with opset_version={min(newest, 23)}"
        )
    if found < OLDEST:
        raise ModelError(
            f"{path}: written for opset {found}; fewbit reads opsets {OLDEST} to {newest}: convert it with "
            "onnx.version_converter, or export it again"
        )
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path}: of IR version {model.ir_version}, but the installed onnx {onnx.__version__} knows versions "
            f"up to {onnx.IR_VERSION}: upgrade onnx, or export it again with an older one"
        )


# ---- tensors ----------------------------------------------------------------------------------------------


def tensors(graph: Any) -> Iterator[Any]:
    """All tensors that a graph stores, those in attributes and in inner graphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from tensors(inner)


def check_external(model: Any, path: Path) -> None:
    """All external data lies beside the file, inside its folder, and is as long as the tensors say."""
    graphs = [model.graph, *model.functions]
    outside = [t for graph in graphs for t in _stored(graph) if t.data_location == t.EXTERNAL]
    places = {_location(t): t for t in outside}
    missing = []
    for location, tensor in places.items():
        if not _inside(path, location, tensor.name).exists():
            missing.append(location)
    if missing:
        listed = ", ".join(sorted(missing))
        raise ArtifactError(
            f"{path}: its weights lie in {len(missing)} other file{'s' * (len(missing) > 1)} "
            f"that {'are' if len(missing) > 1 else 'is'} not there ({listed}): copy "
            f"{'them' if len(missing) > 1 else 'it'} into {path.absolute().parent}"
        )


def _stored(graph: Any) -> Iterable[Any]:
    return tensors(graph) if hasattr(graph, "initializer") else _in_nodes(graph.node)


def _in_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _location(tensor: Any) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def _inside(path: Path, location: str, name: str) -> Path:
    """Where external data lies. ArtifactError for a place outside the model's folder."""
    folder = path.absolute().parent.resolve()
    windows = PureWindowsPath(location)
    steps = {*Path(location).parts, *windows.parts}
    hostile = (
        not location or "\0" in location or Path(location).is_absolute() or windows.drive or windows.root
    )
    if hostile or ".." in steps:
        raise ArtifactError(
            f"{path}: tensor {name!r:.80} lies in {location!r:.200}, and external data must lie in the model's own "
            "folder: such a path is refused; save the model again"
        )
    place = folder / location
    try:
        inside = place.resolve().is_relative_to(folder)
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ArtifactError(f"{place}: cannot be read ({error})") from error
    if not inside:
        raise ArtifactError(
            f"{path}: tensor {name!r:.80} lies in {location!r:.200}, a link out of the model's folder, which is "
            "refused: copy the file itself there"
        )
    return place


def array(tensor: Any, path: Path) -> np.ndarray:
    """The numbers of a stored tensor; many in another file are mapped into memory, not read.

    Raises ArtifactError where dims, type and data do not belong together.
    """
    import onnx

    name = f"{path}: tensor {tensor.name!r:.80}"
    dims = tuple(int(d) for d in tensor.dims)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except Exception as error:
        raise ArtifactError(f"{name} is of the unknown type {tensor.data_type}: damaged") from error
    if dtype.hasobject:
        raise ModelError(f"{name} holds strings: expected numbers; cut the text processing off the model")
    if any(d < 0 for d in dims):
        raise ArtifactError(f"{name} has shape {list(dims)}: sizes must not be negative; damaged")
    count = math.prod(dims)
    bits = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}.get(str(dtype), 0)
    bits = bits or 8 * dtype.itemsize
    expected = (count * bits + 7) // 8
    if tensor.data_location == tensor.EXTERNAL:
        mapped = _mapped(tensor, path, expected, name)
        if bits >= 8 and expected >= MAPPED and mapped.ctypes.data % dtype.itemsize == 0:
            return mapped.view(dtype).reshape(dims)
        raw = mapped.tobytes()
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        return _fields(tensor, dtype, dims, count, bits, name)
    if len(raw) != expected:
        raise ArtifactError(
            f"{name} has shape {list(dims)} of {dtype}, {expected} bytes, but holds {len(raw)}: damaged; "
            "export the model again"
        )
    if bits >= 8:
        return np.frombuffer(raw, dtype).reshape(dims).copy()
    whole = onnx.TensorProto(data_type=tensor.data_type, dims=dims, raw_data=raw, name=tensor.name)
    return _widened(onnx.numpy_helper.to_array(whole))


def _fields(
    tensor: Any, dtype: np.dtype[Any], dims: tuple[int, ...], count: int, bits: int, name: str
) -> np.ndarray:
    """Numbers stored one by one in the protobuf message."""
    import onnx

    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    field = getattr(tensor, _FIELDS.get(kind, "int32_data"))
    entries = -(-count * bits // 8) if bits < 8 else count * (2 if kind.startswith("COMPLEX") else 1)
    if len(field) != entries:
        raise ArtifactError(
            f"{name} has shape {list(dims)}, {entries} entries, but holds {len(field)}: damaged; "
            "export the model again"
        )
    try:
        return _widened(onnx.numpy_helper.to_array(tensor).reshape(dims))
    except Exception as error:
        raise ArtifactError(f"{name} cannot be read ({_first(error)}): damaged") from error


def _widened(values: np.ndarray) -> np.ndarray:
    """Integers of fewer than 8 bits, which NumPy does not have, in 8; floats of fewer than 32 that it does not have."""
    if values.dtype.kind != "V":
        return values
    kind = str(values.dtype)
    return values.astype(
        np.uint8 if kind.startswith("uint") else np.int8 if kind.startswith("int") else np.float32
    )


def _mapped(tensor: Any, path: Path, expected: int, name: str) -> np.ndarray:
    place = _inside(path, _location(tensor), tensor.name)
    entries = {e.key: e.value for e in tensor.external_data}
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else expected
        size = place.stat().st_size
        ordinary = stat.S_ISREG(place.stat().st_mode)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{name}: its external data cannot be found ({error}); save it again") from error
    if not ordinary:
        raise ArtifactError(f"{name}: {place} is not an ordinary file")
    if length != expected or offset < 0 or offset + length > size:
        raise ArtifactError(
            f"{name} needs {expected} bytes; the file says {length} at {offset} of {place.name}, which holds "
            f"{size}: damaged or not the file that belongs to it"
        )
    if not expected:
        return np.zeros(0, np.uint8)
    # copy on write, because torch wants memory that it could write to
    return np.memmap(place, np.uint8, "c", offset, (expected,)).view(np.ndarray)


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
