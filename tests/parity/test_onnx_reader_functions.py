"""ONNX operators that calculate, in the opsets that changed them: torch computes what ONNX Runtime does."""

from pathlib import Path

import numpy as np
import pytest
from onnx_reader_cases import X3, X4, Case, check, f, grouped, i, name_of, s

ACTIVATIONS = [
    *(Case(op, X3) for op in (
        "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish", "Mish", "Gelu", "Abs", "Neg", "Exp", "Floor",
        "Ceil", "Round", "Erf", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Sign", "Reciprocal", "LeakyRelu",
        "Elu", "Selu", "Celu", "ThresholdedRelu", "Shrink", "HardSigmoid", "Identity", "IsNaN", "IsInf",
        "GlobalAveragePool", "GlobalMaxPool", "Size", "Shape")),
    *(Case(op, X3, positive=True) for op in ("Sqrt", "Log")),
    Case("LeakyRelu", X3, attrs={"alpha": 0.3}, opset=7),
    Case("Elu", X3, attrs={"alpha": 0.7}),
    Case("Selu", X3, attrs={"alpha": 1.1, "gamma": 0.9}),
    Case("HardSigmoid", X3, attrs={"alpha": 1 / 6, "beta": 0.5}),
    Case("Gelu", X3, attrs={"approximate": "tanh"}),
    Case("Shrink", X3, attrs={"lambd": 0.3, "bias": 0.1}),
    Case("Swish", X3, attrs={"alpha": 1.5}, opset=24),
    Case("PRelu", X3, [f(4, 1)]),
    Case("PRelu", X3, [f(1)], opset=7),
    Case("PRelu", X3, [f(4, 9)]),
    Case("Clip", X3, attrs={"min": -0.5, "max": 0.5}, opset=7),
    Case("Clip", X3, attrs={"min": 0.0}, opset=7),
    Case("Clip", X3, [s(0.0), s(6.0)], opset=11),
    Case("Clip", X3, ["", s(0.4)]),
    Case("Clip", X3),
    Case("Clip", {"x": X3, "y": (), "z": ()}, name="computed"),
    *(Case(op, X3, attrs={"axis": a}, opset=o) for op in ("Softmax", "LogSoftmax")
      for a, o in ((1, 11), (2, 7), (0, 12), (1, 13), (-1, 13))),
    *(Case(op, X3, opset=o) for op in ("Softmax", "LogSoftmax") for o in (11, 13)),
]  # fmt: skip

BINARY = [
    *(Case(op, {"x": X3, "y": X3}) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    *(Case(op, {"x": X3, "y": X3}) for op in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")),
    *(Case(op, X3, [f(4, 1)]) for op in ("Add", "Sub", "Mul", "Div", "Max")),
    *(Case(op, X3, [s(0.5)]) for op in ("Add", "Sub", "Mul", "Div", "Pow", "Greater", "Equal")),
    *(Case(op, {"x": X3, "y": X3}, types={"x": "bool", "y": "bool"}) for op in ("And", "Or", "Xor", "Equal")),
    *(Case(op, {"x": X3, "y": X3}, types={"x": "int64", "y": "int64"}) for op in ("Add", "Mul", "Max", "Less")),
    Case("Div", X3, [i(3)], types={"x": "int64"}, name="integers"),
    Case("Mod", X3, [i(3)], types={"x": "int64"}, name="integers"),
    Case("Mod", X3, [s(0.7)], {"fmod": 1}),
    Case("Not", X3, types={"x": "bool"}),
    Case("Pow", X3, [s(2, np.int64)]),
    Case("Where", {"x": X3, "y": X3, "z": (9,)}, types={"x": "bool"}),
    Case("Add", X3, [f(4, 1)], opset=7),
    Case("Max", {"x": X3, "y": X3, "z": X3}, opset=8),
    Case("Mean", {"x": X3, "y": X3, "z": X3}, opset=8),
]  # fmt: skip

REDUCED = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
           "ReduceLogSumExp", "ReduceProd")  # fmt: skip
REDUCTIONS = [
    *(Case(op, X4, attrs={"axes": [2, -1], "keepdims": 0}, opset=11) for op in REDUCED),
    *(Case(op, X4, [i(1)], {"keepdims": 1}, opset=18) for op in REDUCED),
    *(Case(op, X3, attrs={"keepdims": 0}, opset=18) for op in REDUCED),
    Case("ReduceLogSum", X3, [i(1)], opset=18, positive=True),
    Case("ReduceSum", X3, [i(1)], {"keepdims": 0}, opset=13),
    Case("ReduceMean", X3, ["", ], {"noop_with_empty_axes": 1}, opset=18),
    *(Case(op, X3, attrs={"axis": 2, "keepdims": k}, opset=o) for op in ("ArgMax", "ArgMin")
      for k, o in ((1, 7), (0, 13))),
    *(Case("CumSum", X3, [s(2, np.int64)], attrs=a)
      for a in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1})),
    Case("TopK", X3, [i(3)], {"axis": -1}, outputs=2, opset=11),
    Case("TopK", X3, [i(3)], {"axis": 1, "largest": 0}, outputs=2, opset=11),
    Case("TopK", X3, attrs={"k": 2}, outputs=2, opset=9),
]  # fmt: skip


@pytest.mark.parametrize("group", grouped([*ACTIVATIONS, *BINARY, *REDUCTIONS]), ids=name_of)
def test_torch_computes_what_onnx_runtime_does(group: list[Case], tmp_path: Path) -> None:
    check(group, tmp_path)
