"""Models of one ONNX node, and the check that what is read of them is what ONNX Runtime computes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from onnx_made import Shape, answers, made, saved
from torch import Tensor, fx

from fewbit.model.readers.onnx import read_file

N = "N"
X2, X3, X4, X5 = (N, 6), (N, 4, 9), (N, 4, 8, 7), (N, 2, 5, 6, 4)
_RNG = np.random.default_rng(0)


@dataclass
class Case:
    """One node: its first inputs (x, y, z) are the model's, then come constants; "" leaves one out."""

    op: str
    x: Shape | dict[str, Shape]
    constants: list[Any] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    types: dict[str, str] = field(default_factory=dict)
    positive: bool = False
    name: str = ""

    def __str__(self) -> str:
        settings = "-".join(f"{k}={v}" for k, v in self.attrs.items())
        return f"{self.op}{self.opset}-{self.name or settings}".replace(" ", "")[:70]


def f(*shape: int) -> np.ndarray:
    """Random floats."""
    return _RNG.standard_normal(shape).astype(np.float32)


def i(*values: Any) -> np.ndarray:
    """An int64 vector."""
    return np.array(values, np.int64)


def s(value: Any, dtype: Any = np.float32) -> np.ndarray:
    """Floats, by default, of these values."""
    return np.array(value, dtype)


def example(case: Case, batch: int = 3) -> tuple[Tensor, ...]:
    """Inputs of a case; free sizes are 12, the batch size is `batch`."""
    shapes = case.x if isinstance(case.x, dict) else {"x": case.x}
    made = []
    for name, shape in shapes.items():
        sizes = [n if isinstance(n, int) else batch if n == N else 12 for n in shape]
        x = torch.randn(sizes) * 2
        kind = case.types.get(name, "float")
        if kind == "float":
            made.append(x.abs() + 0.1 if case.positive else x)
        else:
            made.append((x > 0) if kind == "bool" else (x * 2).round().to(getattr(torch, kind)))
    return tuple(made)


def check(case: Case, folder: Path) -> fx.GraphModule:
    """Read the case's model; what it answers to new inputs is what ONNX Runtime does."""
    shapes = case.x if isinstance(case.x, dict) else {"x": case.x}
    stored = {f"c{k}": c for k, c in enumerate(case.constants) if not isinstance(c, str)}
    names = [*shapes, *(f"c{k}" if f"c{k}" in stored else "" for k in range(len(case.constants)))]
    outputs = [f"out{k}" for k in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the_node", **case.attrs)
    path = saved(made([node], shapes, outputs, stored, case.opset, case.types), folder)
    gm = read_file(path, example(case))
    inputs = example(case, 3 if all(isinstance(n, int) for n in next(iter(shapes.values()))) else 5)
    with torch.no_grad():
        expected, actual = answers(path, inputs), gm(*inputs)
    for e, a in zip(expected, actual if isinstance(actual, tuple | list) else [actual], strict=True):
        assert a.shape == e.shape
        assert a.numpy().dtype == e.dtype
        scale = np.abs(np.where(np.isfinite(e), e, 0)).max(initial=0) if e.dtype.kind == "f" else 1
        np.testing.assert_allclose(a.numpy(), e, rtol=0, atol=1e-5 * max(scale, 1e-30))
    return gm
