"""Bytes by tensor: of an ONNX file, of safetensors, of a .fewbit file, of a module in memory."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fewbit.errors import ArtifactError
from fewbit.model.single_file import SUFFIX, read_layout
from fewbit.numerics.format import get_format
from fewbit.numerics.packing import packed_size

# Widths below a byte are stored densely, two or more to a byte.
_ONNX_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2, "BOOL": 8}

DENSE = "fewbit.dense"  # of a safetensors file's metadata: bytes before entropy coding, by tensor, as JSON


@dataclass(frozen=True)
class TensorSize:
    """One stored tensor: its name, dtype and shape, and the bytes that it takes.

    ``dense``: of entropy-coded codes, the bytes that they would take in as many bits as their format has.
    ``parts``: of a tensor in a .fewbit file, what its bytes are for: codes, gaps, tables, scale, ...
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    dense: int | None = None
    parts: dict[str, int] | None = None


@dataclass(frozen=True)
class Sizes:
    """Tensors of a model, largest first, their sum, and the bytes of its file or folder, if it has one."""

    tensors: tuple[TensorSize, ...]
    total: int
    file: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        tensors = [vars(each) | {"shape": list(each.shape)} for each in self.tensors]
        return {"total": self.total, "file": self.file, "tensors": tensors}

    def __str__(self) -> str:
        width = max((len(each.name) for each in self.tensors), default=5)
        rows = [
            f"{x.name:<{width}}  {x.nbytes:>12,}  {x.dtype} {list(x.shape)}"
            + ("" if x.dense is None else f", {x.dense:,} before entropy coding")
            + ("" if x.parts is None else f": {', '.join(f'{key} {n:,}' for key, n in x.parts.items())}")
            for x in self.tensors
        ]
        saved = sum(x.dense - _coded(x) for x in self.tensors if x.dense is not None)
        file = f"; {self.total + saved:,} before entropy coding" if saved else ""
        file += "" if self.file is None else f"; file {self.file:,}"
        return "\n".join([*rows, f"{'total':<{width}}  {self.total:>12,} bytes{file}"])


def _coded(x: TensorSize) -> int:
    """Bytes of the codes that ``dense`` is about."""
    return (
        x.nbytes
        if x.parts is None
        else sum(x.parts.get(key, 0) for key in ("codes", "gaps", "tables", "frames"))
    )


def size_by_tensor(source: nn.Module | str | Path) -> Sizes:
    """Bytes of each tensor of a module, an .onnx, .fewbit or .safetensors file or a folder of the latter.

    A module's parameters and buffers count once, however often they are shared; of a quantized model the
    weights count as their packed codes with scales and zero points. An ONNX file's external data are
    counted, and not opened. A .fewbit file's header, checksum and description count as tensors, so that all bytes are
    accounted for. Raises ArtifactError for a file that is missing, damaged or of another kind;
    nothing is ever unpickled.
    """
    if isinstance(source, nn.Module):
        return _sizes(_of_module(source))
    path = Path(source)
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        stored = [each for each in files if each.suffix == ".safetensors"]
        if not stored:
            raise ArtifactError(f"folder {str(path)!r} holds no .safetensors file, expected a saved model")
        tensors = [tensor for each in stored for tensor in _of_safetensors(each)]
        return _sizes(tensors, sum(each.stat().st_size for each in files))
    if not path.is_file():
        raise ArtifactError(
            f"{str(path)!r} does not exist: expected a module, an .onnx, {SUFFIX} or .safetensors file"
        )
    if path.suffix == ".safetensors":
        return _sizes(_of_safetensors(path), path.stat().st_size)
    if path.suffix == SUFFIX:
        return _sizes(_of_single_file(path), path.stat().st_size)
    if path.suffix == ".onnx":
        tensors, external = _of_onnx(path)
        return _sizes(tensors, path.stat().st_size + external)
    raise ArtifactError(
        f"{str(path)!r} is neither .onnx, {SUFFIX} nor .safetensors: other files are not opened"
    )


def _sizes(tensors: Iterable[TensorSize], file: int | None = None) -> Sizes:
    ordered = tuple(sorted(tensors, key=lambda each: (-each.nbytes, each.name)))
    return Sizes(ordered, sum(each.nbytes for each in ordered), file)


def _of_module(module: nn.Module) -> Iterator[TensorSize]:
    quantized: Any = getattr(module, "qtensors", None)
    names = set(quantized.names()) if quantized is not None else set()
    for name in sorted(names):
        q = quantized[name]
        yield TensorSize(name, q.scheme.format, tuple(q.shape), q.nbytes)
    # The simulation's graph holds the same weights once more, as floats.
    graph: Any = module.graph if names else module
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        if name not in names:
            yield _of_tensor(name, tensor)


def _of_tensor(name: str, tensor: Tensor) -> TensorSize:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSize(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def _of_safetensors(path: Path) -> list[TensorSize]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            dense = json.loads((stored.metadata() or {}).get(DENSE, "{}"))
            found = [_of_tensor(name, stored.get_tensor(name)) for name in stored.keys()]  # noqa: SIM118
        return [replace(each, dense=int(dense[each.name])) if each.name in dense else each for each in found]
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{str(path)!r} is not a readable safetensors file ({error})") from None


def _of_single_file(path: Path) -> list[TensorSize]:
    """Rows whose bytes add up to the file's: a weight with all its parts in one row, then what is no tensor."""
    parts: dict[str, dict[str, int]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        layout = read_layout(path.read_bytes())
        schemes = layout.schemes()
        for entry in layout.entries:
            name, _, part = entry.name.rpartition(":")
            if part in ("scale", "zero_point", "codebook"):
                parts.setdefault(name, {})[part] = len(entry.content)
                continue
            name = name if part == "codes" else entry.name
            dtype = str(entry.dtype).removeprefix("torch.")
            kinds[name] = (schemes[entry.name].format if entry.name in schemes else dtype, entry.shape)
            parts[name] = entry.read().sizes() | parts.get(name, {})
    except Exception as error:  # a hostile description can make anything fail
        raise ArtifactError(f"{path}: its parts cannot be told: {str(error)[:200]}") from None
    found = []
    for name, (kind, shape) in kinds.items():
        used = {key: size for key, size in parts[name].items() if size}
        bits = get_format(kind).bits if f"{name}:codes" in schemes else None
        dense = None if bits is None else packed_size(math.prod(shape), bits)
        found.append(TensorSize(name, kind, shape, sum(used.values()), dense, used))
    rest = {name: size for name, size in layout.other.items() if size}
    return found + [TensorSize(f"({name})", "bytes", (size,), size) for name, size in rest.items()]


def _of_onnx(path: Path) -> tuple[list[TensorSize], int]:
    """Initializers and constants of all graphs in the file, and the bytes of its external data files."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        tensors, folders = [], set()
        for tensor in _onnx_tensors(model.graph):
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            count = math.prod(tensor.dims)
            bits = _ONNX_BITS.get(kind)
            if bits is None:
                bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            tensors.append(TensorSize(tensor.name, kind.lower(), tuple(tensor.dims), -(-count * bits // 8)))
            folders |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    # Protobuf and onnx raise several unrelated classes on damaged files.
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{str(path)!r} is not a readable ONNX file ({detail})") from None
    return tensors, sum(_external_bytes(path, location) for location in sorted(folders))


def _external_bytes(path: Path, location: str) -> int:
    data = (path.parent / location).resolve()
    if not data.is_relative_to(path.parent.resolve()):
        raise ArtifactError(
            f"{str(path)!r} points outside its folder for its data ({location!r}): not opened"
        )
    if not data.is_file():
        raise ArtifactError(f"{str(path)!r} lacks its data file {location!r}")
    return data.stat().st_size


def _onnx_tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensor = attribute.t
                tensor.name = tensor.name or node.output[0]
                yield tensor
            if attribute.HasField("g"):
                yield from _onnx_tensors(attribute.g)
