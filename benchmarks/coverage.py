"""Which convolutions and matrix products of an ONNX file ONNX Runtime really runs in integer kernels."""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONV = {"integer": {"QLinearConv", "ConvInteger"}, "float": {"Conv", "FusedConv", "NhwcFusedConv"}}
PRODUCT = {
    "integer": {
        "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "QAttention", "MatMulNBits",
    },
    "float": {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Attention", "MultiHeadAttention"},
}  # fmt: skip


@dataclass(frozen=True)
class Coverage:
    """Counts in the runtime's optimized graph; a product is a layer where one factor is a constant."""

    integer_convs: int
    float_convs: int
    integer_linears: int
    float_linears: int
    operators: dict[str, int]

    def __str__(self) -> str:
        parts = []
        if convs := self.integer_convs + self.float_convs:
            parts.append(f"{self.integer_convs}/{convs} conv")
        if linears := self.integer_linears + self.float_linears:
            parts.append(f"{self.integer_linears}/{linears} linear")
        return ", ".join(parts) or "none"

    @property
    def complete(self) -> bool:
        """True where every convolution and every linear layer runs in an integer kernel."""
        return not self.float_convs and not self.float_linears


def read(path: Path) -> Coverage:
    """Lets ONNX Runtime optimize the file with everything on, and counts kernels in what it made of it."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = onnx.load(str(_optimize(path, Path(folder) / "optimized.onnx")))
    nodes = list(optimized.graph.node)
    constants = {i.name for i in optimized.graph.initializer}
    # A weight may still pass through DequantizeLinear or Transpose: what a constant becomes is a constant.
    for node in nodes:
        if node.input and all(name in constants or not name for name in node.input):
            constants.update(node.output)
    products = [n for n in nodes if any(name in constants for name in _factors(n))]
    return Coverage(
        sum(n.op_type in CONV["integer"] for n in nodes),
        sum(n.op_type in CONV["float"] for n in nodes),
        sum(n.op_type in PRODUCT["integer"] for n in products),
        sum(n.op_type in PRODUCT["float"] for n in products),
        dict(Counter(n.op_type for n in nodes).most_common()),
    )


def _optimize(path: Path, target: Path) -> Path:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3  # warns that the optimized file is for this machine: the very point
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return target


def _factors(node: Any) -> list[str]:
    # QLinearMatMul and QGemm: a, a_scale, a_zero_point, b, ...; all others have the second factor second.
    if node.op_type in ("QLinearMatMul", "QGemm"):
        return [node.input[0], node.input[3]]
    return list(node.input[:2])
