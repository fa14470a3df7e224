"""A program as OpenVINO IR: written as ONNX in memory, read by OpenVINO, weights stored as narrow as they are."""

import io
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from fewbit.extras import require
from fewbit.model.program import Coding, Op
from fewbit.model.sites import WEIGHTED
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.targets._onnx.builder import Builder
from fewbit.targets._onnx.floats_weights import dequantized
from fewbit.targets._onnx.writer import Writer, storage
from fewbit.targets._openvino.runtime import core, openvino

_FOUR_BITS = {TensorProto.INT4: "i4", TensorProto.UINT4: "u4"}
_HALVES = {TensorProto.FLOAT16: ("f16", np.float16), TensorProto.BFLOAT16: ("bf16", ml_dtypes.bfloat16)}
_FEW = 16  # numbers, below which a constant is not worth another type
_RECURRENT = {"LSTMSequence", "GRUSequence", "RNNSequence"}
_NODES = {"Conv", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "Softmax"}


class IrWriter(Writer):
    """The ONNX graph that OpenVINO reads best. ``nodes``: by value, the node that computes an integer operation."""

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self.builder.tables = False  # it would store what it unpacked
        self.nodes: dict[str, str] = {}

    def _emit(self, op: Op) -> None:
        first = len(self.builder.nodes)
        if op.kind.startswith("dynamic_"):
            self.names[op.output] = _weight_only(self.builder, op, self.names[op.inputs[0]])
            self.constants |= {f"{op.output}.{role}": "" for role in op.constants}
        else:
            super()._emit(op)
        if op.domain == "integer":
            for node in self.builder.nodes[first:]:
                if node.op_type in _NODES:
                    self.nodes.setdefault(op.output, node.name)

    def finish(self, op: Op, x: str) -> str:
        """Limits of a weighted layer's codes are a Clip of its floats, which becomes part of its kernel."""
        coding = self.coding(op.output)
        lo, hi = op.attrs.get("clamp") or (int(coding.scheme.qmin), int(coding.scheme.qmax))
        limits = np.iinfo(storage(coding))
        if op.kind not in WEIGHTED or (lo, hi) == (limits.min, limits.max):
            return super().finish(op, x)
        bounds = [self._bound(q, coding) for q in (lo, hi)]
        clipped = self.builder.node("Clip", [x, *bounds], op.layer)
        return self.builder.node("QuantizeLinear", [clipped, *self._qparams(coding)], f"{op.output}_codes")

    def quantize(self, x: str, name: str, coding: Coding, clamp: list[int] | None = None) -> str:
        """The upper limit is taken of floats, the lower one of codes, wherever the storage type does not imply them.

        OpenVINO 2026.4 gets a Clip wrong that lies between DequantizeLinear and QuantizeLinear, and the mean of a
        sequence of clipped codes in some batches.
        """
        lo, hi = clamp or (int(coding.scheme.qmin), int(coding.scheme.qmax))
        limits = np.iinfo(storage(coding))
        if hi != limits.max:
            x = self.builder.node("Min", [x, self._bound(hi, coding)], name)
        codes = self.builder.node("QuantizeLinear", [x, *self._qparams(coding)], f"{name}_codes")
        if lo == limits.min:
            return codes
        least = self.builder.constant(np.array(lo, storage(coding)), "limit")
        return self.builder.node("Max", [codes, least], f"{name}_codes")

    def _bound(self, code: int, coding: Coding) -> str:
        """What a code stands for, as a float."""
        return self.builder.scalar((code - coding.zero_point) * coding.scale)


def _weight_only(builder: Builder, op: Op, x: str) -> str:
    """A layer whose input's range is taken at run time: OpenVINO does that itself, given integer weights.

    Its ranges are those of groups of numbers; convolutions it computes in float.
    """
    codes, scale = op.constants["weight"], op.constants["weight_scale"]
    scheme = Scheme("int4" if int(codes.abs().max()) <= 7 else "int8", "channel", narrow=True)
    q = QTensor(codes, scale, scale.new_zeros(len(scale)).int(), scheme, tuple(codes.shape))
    bias = (
        [builder.constant(op.constants["bias"].numpy(), f"{op.layer}.bias")] if "bias" in op.constants else []
    )
    if op.kind == "dynamic_linear":
        weight = builder.node(
            "Transpose", [dequantized(builder, q, f"{op.layer}.weight")], op.layer, perm=[1, 0]
        )
        product = builder.node("MatMul", [x, weight], op.layer)
        return builder.node("Add", [product, *bias], op.layer) if bias else product
    a = op.attrs
    pad = a["pad"] or [0] * (2 * len(a["stride"]))
    return builder.node(
        "Conv",
        [x, dequantized(builder, q, f"{op.layer}.weight"), *bias],
        op.layer,
        pads=[*reversed(pad[0::2]), *reversed(pad[1::2])],
        strides=a["stride"],
        dilations=a["dilation"],
        group=a["groups"],
    )


def converted(graph: onnx.ModelProto) -> Any:
    """The OpenVINO model of an ONNX graph, its weights stored as they are there.

    ``openvino.convert_model`` would do the same, and report home that it was used.
    """
    transformations = require("openvino._offline_transformations", "openvino", "writing OpenVINO files")
    model = core().read_model(io.BytesIO(graph.SerializeToString()))
    transformations.apply_moc_transformations(model, False)
    _narrow(model, graph)
    for node in model.get_ordered_ops():
        if node.get_type_name() in _RECURRENT:
            for i in range(1, node.get_input_size()):
                _foldable(node.input_value(i).get_node())
    model.validate_nodes_and_infer_types()
    return model


def _foldable(node: Any) -> None:
    """Let OpenVINO compute recurrent weights from their codes when it compiles: it takes constants only there.

    It leaves a Convert from 8 bits to float alone, as part of an integer operation to be; one from 32 bits it folds.
    """
    opset = require("openvino.opset13", "openvino", "writing OpenVINO files")
    for i in range(node.get_input_size()):
        source = node.input_value(i).get_node()
        if node.get_type_name() == "Convert" and source.get_element_type().is_integral():
            wide = opset.convert(source.output(0), "i32")
            node.input(i).replace_source_output(wide.output(0))
        else:
            _foldable(source)


def _narrow(model: Any, graph: onnx.ModelProto) -> None:
    """Undo the folding of Casts: constants are stored as narrow as the graph's initializers are, with a Convert."""
    stored = {i.name: i for i in graph.graph.initializer}
    kinds = {i.data_type for i in stored.values()}
    casts = {
        n.name: stored[n.input[0]] for n in graph.graph.node if n.op_type == "Cast" and n.input[0] in stored
    }
    made: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant":
            continue
        if name in casts and casts[name].data_type in _FOUR_BITS:
            tensor = casts[name]
            kind = _FOUR_BITS[tensor.data_type]
            if tensor.name not in made:
                made[tensor.name] = _constant(tensor.name, kind, list(tensor.dims), tensor.raw_data)
            _replace(node, made[tensor.name])
        elif node.get_element_type().get_type_name() == "f32" and node.data.size >= _FEW:
            for number, (kind, dtype) in _HALVES.items():
                half = node.data.astype(dtype)
                if number in kinds and np.array_equal(half.astype(np.float32), node.data):
                    _replace(node, _constant(f"{name}/{kind}", kind, list(node.data.shape), half.tobytes()))
                    break


def _constant(name: str, kind: str, shape: list[int], data: bytes) -> Any:
    """A constant of an OpenVINO type from its bytes."""
    ov = openvino()
    tensor = ov.Tensor(np.frombuffer(data, np.uint8), ov.Shape(shape), getattr(ov.Type, kind))
    constant = ov.op.Constant(tensor, shared_memory=False)
    constant.set_friendly_name(name)
    return constant


def _replace(node: Any, stored: Any) -> None:
    """Let the readers of a constant read one of a narrower type, converted."""
    opset = require("openvino.opset13", "openvino", "writing OpenVINO files")
    convert = opset.convert(stored.output(0), node.get_element_type())
    convert.set_friendly_name(node.get_friendly_name())
    for reader in list(node.output(0).get_target_inputs()):
        reader.replace_source_output(convert.output(0))
