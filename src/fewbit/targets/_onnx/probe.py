"""Looks into ONNX Runtime: the codes it computes inside a file, and which of its kernels it really chose."""

import base64
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import helper, numpy_helper
from torch import Tensor

from fewbit.errors import ArtifactError, TargetError
from fewbit.model.codings import function_values, quantize_table
from fewbit.model.program import Op, Program
from fewbit.numerics.scheme import Scheme
from fewbit.targets import Described, Kernel, has_table
from fewbit.targets._onnx.dynamic import restore_dynamic
from fewbit.targets._onnx.runtime import session
from fewbit.targets._onnx.tables import numbers_again

METADATA = "fewbit.program"
_LARGEST_DESCRIPTION = 64 * 2**20
# What a description that is damaged, or was made to do harm, can raise on its way to a program.
DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, zlib.error,
)  # fmt: skip

INTEGER_KERNELS = {
    "conv": {"QLinearConv"},
    "linear": {"QGemm"},
    "matmul": {"QLinearMatMul"},
    "add": {"QLinearAdd"},
    "mul": {"QLinearMul"},
    "avg_pool": {"QLinearAveragePool"},
    "global_avg_pool": {"QLinearGlobalAveragePool"},
    "concat": {"QLinearConcat"},
    "softmax": {"QLinearSoftmax"},
    "dynamic_linear": {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"},
    "dynamic_conv": {"ConvInteger"},
}


def describe(program: Program, constants: dict[str, Any], codes: dict[str, str]) -> str:
    """The program as text for a file's properties; ``constants`` and ``codes`` name the file's own tensors."""
    data = program.to_json()
    for op in data["ops"]:
        op["constants"] = [role for role in op["constants"] if f"{op['output']}.{role}" in constants]
    return packed({"program": data, "constants": constants, "codes": codes})


def packed(data: dict[str, Any]) -> str:
    """JSON as text of few and harmless characters."""
    text = json.dumps(data, separators=(",", ":"))
    return base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def unpacked(text: str) -> dict[str, Any]:
    """The inverse of ``packed``; raises one of ``DAMAGE`` for anything else."""
    found: dict[str, Any] = json.loads(
        zlib.decompressobj().decompress(base64.b85decode(text), _LARGEST_DESCRIPTION)
    )
    return found


def read_back(path: Path) -> Described:
    """The program of a file that fewbit wrote, its constants taken from the file's own initializers.

    Raises ``ArtifactError`` for files that are damaged, not ONNX, or not written by fewbit.
    """
    model = load(path)
    properties = {p.key: p.value for p in model.metadata_props}
    if METADATA not in properties:
        raise ArtifactError(
            f"{path}: an ONNX file without fewbit's program; only files that fewbit exported can be verified"
        )
    try:
        data = unpacked(properties[METADATA])
        stored = _Arrays(model)
        tensors = {
            key: torch.from_numpy(numbers_again(name, stored) if isinstance(name, dict) else stored[name])
            for key, name in data["constants"].items()
        }
        codes = {str(k): str(v) for k, v in data["codes"].items()}
        program = Program.from_json(data["program"], tensors)
        for op in program.ops:
            restore_dynamic(op)
            bias = op.constants.get("bias")
            if op.domain == "integer" and bias is not None and bias.is_floating_point():
                unit = np.float32(program.codings[op.inputs[0]].scale) * op.constants["weight_scale"].numpy()
                op.constants["bias"] = torch.round(bias.double() / torch.from_numpy(unit).double()).to(
                    torch.int32
                )
        add_tables(program)
        return Described(program, codes, properties)
    except DAMAGE as error:
        raise ArtifactError(f"{path}: its program is damaged ({type(error).__name__}: {error})") from error


def add_tables(program: Program) -> None:
    """Give functions of codes their tables: a file stores the function only."""
    for op in program.ops:
        if op.kind == "table":
            values = function_values(op.attrs["function"], program.codings[op.inputs[0]])
            op.constants["table"] = quantize_table(values, program.codings[op.output])


def load(path: Path) -> onnx.ModelProto:
    """The file as a protobuf, checked. Raises ``ArtifactError`` with the file's name."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file") from error
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: not a valid ONNX file ({str(error).splitlines()[0][:200]})") from error
    return model


class _Arrays(dict[str, np.ndarray]):
    """A file's initializers by name, 4-bit codes as int8, read when they are asked for."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self._protos = {i.name: i for i in model.graph.initializer}

    def __missing__(self, name: str) -> np.ndarray:
        return _plain(numpy_helper.to_array(self._protos[name]))


def _plain(array: np.ndarray) -> np.ndarray:
    """4-bit arrays as int8."""
    return array.astype(np.int8) if array.dtype.itemsize == 1 and array.dtype.kind == "V" else array.copy()


def probe(path: Path, inputs: tuple[Tensor, ...], codes: dict[str, str]) -> dict[str, Tensor]:
    """The codes (int32) of every value in ``codes``, all graph optimizations on."""
    model = onnx.load(str(path))
    graph = model.graph
    produced = {name for node in graph.node for name in node.output}
    wanted = {value: name for value, name in codes.items() if name in produced}
    present = {o.name for o in graph.output}
    for name in dict.fromkeys(wanted.values()):
        if name not in present:
            graph.output.append(helper.make_empty_tensor_value_info(name))
    s = session(model.SerializeToString())
    names = [o.name for o in s.get_outputs()]
    feed = {i.name: x.numpy() for i, x in zip(s.get_inputs(), inputs, strict=True)}
    try:
        results = dict(zip(names, s.run(None, feed), strict=True))
    except Exception as error:  # onnxruntime raises its own types, which are not importable by name
        raise TargetError(f"{path}: ONNX Runtime failed: {str(error).splitlines()[0][:300]}") from error
    return {value: torch.from_numpy(results[name].astype(np.int32)) for value, name in wanted.items()}


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Which operations run in integer kernels, read from the runtime's own optimized graph."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized=optimized)
        nodes = list(onnx.load(str(optimized)).graph.node)
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    kernels = []
    remaining = {kind: sum(counts.get(t, 0) for t in types) for kind, types in INTEGER_KERNELS.items()}
    by_weight = {name: node.op_type for node in nodes for name in node.input if name}
    for op in program.ops:
        if op.kind in INTEGER_KERNELS and (op.domain == "integer" or op.kind.startswith("dynamic_")):
            kernels.append(_kernel(op.layer, op.kind, remaining, by_weight))
        elif op.kind == "table":
            function = op.attrs["function"]["target"].split(".")[1]
            kernels.append(
                Kernel(op.layer, function, False, "no integer kernel; exact all the same", planned=False)
            )
        elif op.kind == "module" and op.attrs["type"].startswith(("Conv", "Linear", "LSTM", "GRU")):
            cause = op.note or _why_float(op)
            kernels.append(Kernel(op.layer, op.attrs["type"], False, cause, planned=False))
    return kernels


def _why_float(op: Op) -> str:
    stored = op.attrs.get("schemes", {}).values()
    tables = {s.format for s in map(Scheme.from_json, stored) if has_table(s)}
    decoded = f"; {', '.join(sorted(tables))} weights, decoded when the file is loaded" if tables else ""
    return f"planned as float{decoded}"


def _kernel(layer: str, kind: str, remaining: dict[str, int], by_weight: dict[str, Any]) -> Kernel:
    if remaining[kind] > 0:
        remaining[kind] -= 1
        return Kernel(layer, kind, True)
    return Kernel(layer, kind, False, "ONNX Runtime did not fuse it")
