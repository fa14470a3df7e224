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


def grouped(cases: list[Case]) -> list[list[Case]]:
    """Cases with the same inputs and opset together, at most eight: one model of many nodes is read faster."""
    found: dict[str, list[list[Case]]] = {}
    for case in cases:
        groups = found.setdefault(repr((case.x, case.opset, case.types, case.positive)), [[]])
        if len(groups[-1]) == 8:
            groups.append([])
        groups[-1].append(case)
    return [group for groups in found.values() for group in groups]


def name_of(group: list[Case]) -> str:
    """A test's name: the case, or the operators of several."""
    ops = dict.fromkeys(case.op for case in group)
    return str(group[0]) if len(group) == 1 else f"{'-'.join(ops)}-{len(group)}-{group[0].opset}"


def check(group: list[Case], folder: Path) -> fx.GraphModule:
    """Read a model with a node for each case; what it answers to new inputs is what ONNX Runtime does."""
    first = group[0]
    shapes = first.x if isinstance(first.x, dict) else {"x": first.x}
    nodes, outputs, stored = [], {}, {}
    for at, case in enumerate(group):
        constants = {f"c{at}_{k}": c for k, c in enumerate(case.constants) if not isinstance(c, str)}
        names = [f"c{at}_{k}" for k in range(len(case.constants))]
        inputs = [*shapes, *(name if name in constants else "" for name in names)]
        made_here = [f"out{at}_{k}" for k in range(case.outputs)]
        nodes.append(helper.make_node(case.op, inputs, made_here, name=f"node {at}: {case}", **case.attrs))
        outputs |= dict.fromkeys(made_here, case)
        stored |= constants
    path = saved(made(nodes, shapes, list(outputs), stored, first.opset, first.types), folder)
    gm = read_file(path, example(first))
    given = example(first, 3 if all(isinstance(n, int) for n in next(iter(shapes.values()))) else 5)
    with torch.no_grad():
        expected, actual = answers(path, given), gm(*given)
    actual = actual if isinstance(actual, tuple | list) else [actual]
    for case, e, a in zip(outputs.values(), expected, actual, strict=True):
        assert a.shape == e.shape, case
        assert a.numpy().dtype == e.dtype, case
        scale = np.abs(np.where(np.isfinite(e), e, 0)).max(initial=0) if e.dtype.kind == "f" else 1
        np.testing.assert_allclose(a.numpy(), e, rtol=0, atol=1e-5 * max(scale, 1e-30), err_msg=str(case))
    return gm
