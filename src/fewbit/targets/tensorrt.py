"""ONNX for TensorRT: an explicit-quantization network, symmetric int8 on both sides of every integer layer.

TensorRT itself is not run here. What is checked is the structure that its explicit quantization asks for, and that ONNX
Runtime, which computes these files in float between the Q/DQ nodes, agrees with the reference within one code.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from torch import Tensor

from fewbit.model.program import Program
from fewbit.numerics.scheme import Scheme
from fewbit.plan import Row
from fewbit.targets import Described, Kernel
from fewbit.targets._onnx.probe import probe, read_back
from fewbit.targets._onnx.runtime import open_file, runtime
from fewbit.targets._onnx.writer import Writer

SUFFIX = ".onnx"
REQUANTIZATION = "f32_even"
TOLERANCE = 1
open = open_exact = open_file
_WEIGHTED = ("Conv", "Gemm", "MatMul")


def adapt(row: Row) -> Row:
    """Activations become symmetric int8, which is all that TensorRT's int8 layers take."""
    scheme = row.scheme
    if scheme is None or row.kind == "weight" or scheme.dynamic or scheme.format not in ("int8", "uint8"):
        return row
    symmetric = dataclasses.replace(scheme, format="int8", symmetric=True, narrow=False)
    return dataclasses.replace(
        row, scheme=symmetric, because=f"{row.because}; symmetric, as TensorRT wants it"
    )


def check(row: Row) -> str | None:
    """None where TensorRT's explicit quantization can express the row, else why not and what to do."""
    scheme = row.scheme
    if scheme is None:
        return None
    if scheme.dynamic:
        return "TensorRT takes no ranges at run time here; quantize statically"
    if scheme.format != "int8":
        return f"TensorRT's integer layers take int8, not {scheme.format}; use int8, or keep the layer float"
    if not scheme.symmetric:
        return "TensorRT takes no zero points; use weight_symmetric=True"
    if scheme.granularity == "group":
        return "TensorRT's int8 weights have one scale a channel; use granularity 'channel'"
    return None


def portable_bounds(weight: Tensor, lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """As they come: a GPU adds products in 32 bits."""
    return lo, hi


def prepare(program: Program) -> Program:
    """As it is."""
    return program


def write(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write the program to ``path``, every operation between DequantizeLinear and QuantizeLinear."""
    onnx.save(Writer(program, explicit=True).model(metadata), str(path))


def describe(path: Path) -> Described:
    """The program that a file carries."""
    return read_back(path)


def coverage(path: Path, program: Program, codes: dict[str, str]) -> list[Kernel]:
    """Nothing can be said about kernels without TensorRT; what is wrong with the structure is said instead."""
    return [Kernel(layer, "structure", False, problem) for layer, problem in structure(onnx.load(str(path)))]


def structure(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """Where a file breaks the rules of explicit quantization: (node, what is wrong). Empty if it keeps them.

    Zero points are zero; scales are positive constants; quantized types are int8; both factors of every convolution and
    product that is quantized at all come from DequantizeLinear; biases are float32 initializers.
    """
    constants = {i.name: i for i in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    problems = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            problems += [(node.name, p) for p in _qdq_problems(node, constants)]
        elif node.op_type in _WEIGHTED:
            sources = [producers.get(name) for name in node.input[:2]]
            dequantized = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
            if any(dequantized) and not all(dequantized):
                problems.append((node.name, "one factor is quantized and the other is not"))
            if len(node.input) > 2 and node.input[2] not in constants:
                problems.append((node.name, "its bias is no float32 initializer"))
    return problems


def _qdq_problems(node: onnx.NodeProto, constants: dict[str, Any]) -> list[str]:
    found = []
    scale = constants.get(node.input[1])
    if scale is None or not (numpy_helper.to_array(scale) > 0).all():
        found.append("its scale is no positive constant")
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None or zero.data_type != TensorProto.INT8 or np.any(numpy_helper.to_array(zero)):
        found.append("its zero point is not int8 zero")
    return found


__all__ = [
    "REQUANTIZATION",
    "SUFFIX",
    "TOLERANCE",
    "adapt",
    "check",
    "coverage",
    "describe",
    "open",
    "open_exact",
    "portable_bounds",
    "prepare",
    "probe",
    "runtime",
    "write",
]
