"""A float ONNX model under construction from a quantized one: which values were codes, and what they stood for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.errors import ModelError
from fewbit.model.onnx_file import array

Record = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Coding:
    """What codes stand for: (code - zero_point) * scale."""

    scale: np.ndarray
    zero_point: np.ndarray
    format: str
    axis: int | None
    block: int = 0

    def value(self, code: float) -> float:
        """The number that a code stands for."""
        return float((np.float32(code) - np.float32(self.zero_point.item())) * np.float32(self.scale.item()))

    @property
    def clamps_at_zero(self) -> bool:
        """Whether the lowest code stands for zero, so that rounding to codes is a ReLU too."""
        bits = int(re.sub(r"\D", "", self.format) or 8)
        lowest = 0 if self.format.startswith("u") else -(2 ** (bits - 1))
        return self.scale.size == 1 and int(self.zero_point.item()) == lowest

    @property
    def ramp(self) -> tuple[float, float] | None:
        """The limits of the codes where they are those of ReLU6 or of a hard tanh: quantizers leave these out."""
        if self.scale.size != 1 or self.format not in ("int8", "uint8"):
            return None
        limits = np.iinfo(self.format)
        lo, hi = self.value(limits.min), self.value(limits.max)
        for wanted in ((0.0, 6.0), (-1.0, 1.0)):
            if max(abs(lo - wanted[0]), abs(hi - wanted[1])) <= 0.51 * self.scale.item():
                return wanted
        return None

    def json(self) -> dict[str, Any]:
        """As `gm.meta["quantization"]` has it; numbers for one scale, lists for several."""
        found = {
            "scale": self.scale.tolist(),
            "zero_point": self.zero_point.astype(np.int64).tolist(),
            "format": self.format,
            "axis": self.axis,
        }
        return found | ({"block_size": self.block} if self.block else {})


@dataclass
class Twin:
    """`codes`: values that were codes in the file and are floats here; `positive`: values that are never negative;
    `bounded`: results of functions that have limits; `constant`: values that do not depend on the inputs.
    """

    model: Any
    path: Path
    record: Record = field(default_factory=dict)
    codes: dict[str, Coding] = field(default_factory=dict)
    positive: set[str] = field(default_factory=set)
    bounded: set[str] = field(default_factory=set)
    constant: set[str] = field(default_factory=set)
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[Any]] = field(default_factory=dict)
    scaled: dict[str, str] = field(default_factory=dict)  # products that have their scale already

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.tensors = {t.name: t for t in graph.initializer}
        self.constant = set(self.tensors)
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self.tensors[node.output[0]] = attribute.t
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def stored(self, name: str) -> np.ndarray:
        """The numbers of an initializer or of a Constant node."""
        if name not in self.tensors:
            raise ModelError(
                f"{self.path}: {name!r:.80} is calculated: expected scales and zero points that are constants"
            )
        return array(self.tensors[name], self.path)

    def format(self, name: str) -> str:
        """The ONNX type of a stored tensor, as a format's name: "int8", "uint4"."""
        return type_name(self.tensors[name].data_type) if name in self.tensors else "uint8"

    def store(self, name: str, values: Any) -> str:
        """Add an initializer."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.asarray(values), name)
        self.model.graph.initializer.append(tensor)
        self.tensors[name] = tensor
        self.constant.add(name)
        return name

    def add(self, op: str, inputs: list[str], like: Any, attributes: bool = False) -> None:
        """A node in the place of `like`, with its name and first output; `attributes`: with those of `like` too."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, list(like.output)[:1], name=like.name))
        if attributes:
            self.nodes[-1].attribute.extend(like.attribute)

    def coding(self, node: Any, first: int = 1, weight: str = "") -> Coding:
        """The scale and zero point that a node reads from input `first` on; `weight` is the tensor that is coded."""
        scale = self.stored(node.input[first]).astype(np.float32)
        given = node.input[first + 1] if len(node.input) > first + 1 else ""
        zero = self.stored(given) if given else np.zeros(scale.shape, np.int64)
        attrs = {a.name: a.i for a in node.attribute}
        kind = (
            self.format(weight or given) if weight or given else type_name(attrs.get("output_dtype", 0) or 2)
        )
        axis = None if scale.size == 1 else int(attrs.get("axis", 1))
        return Coding(scale, zero, kind, axis, int(attrs.get("block_size", 0)))


def type_name(number: int) -> str:
    """The name of an ONNX type, as formats are called."""
    import onnx

    return str(onnx.TensorProto.DataType.Name(number)).lower()


def weight_name(name: str) -> str:
    """The name of a weight before a quantizer renamed it."""
    return re.sub(r"(_quantized|_DequantizeLinear(_Output)?|_dequantized)$", "", name)
