"""Codes and values against ONNX Runtime's QuantizeLinear and DequantizeLinear, bit for bit."""

import numpy as np
import pytest
import torch

from fewbit.numerics import QTensor, Scheme, blocks

CASES = [
    Scheme("int8"),
    Scheme("uint8", symmetric=False),
    Scheme("int8", symmetric=False),
    Scheme("int16"),
    Scheme("uint16", symmetric=False),
    Scheme("int8", "channel", axis=1),
    Scheme("uint8", "channel", axis=0, symmetric=False),
]


def through_onnxruntime(x: np.ndarray, q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and dequantized values of x with the scales and zero points of q."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    elements = getattr(TensorProto, q.scheme.format.upper())
    shape = () if q.scheme.granularity == "tensor" else (-1,)
    zero_point = q.zero_point.numpy().astype(q.scheme.format).reshape(shape)
    constants = [
        numpy_helper.from_array(q.scale.numpy().reshape(shape), "s"),
        numpy_helper.from_array(zero_point, "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=q.scheme.axis),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=q.scheme.axis),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
    outputs = [
        helper.make_tensor_value_info("q", elements, x.shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, values = session.run(None, {"x": x})
    return codes, values


@pytest.mark.parametrize("scheme", CASES, ids=str)
def test_codes_and_values_are_onnxruntimes(scheme):
    """Random numbers, every tie between two codes and its neighbours in float32, extremes and infinities."""
    x = torch.randn(6, 5, 2000) * torch.logspace(-3, 2, 5).reshape(1, 5, 1)
    rows = blocks(x, scheme)
    lo, hi = rows.amin(dim=1) * 0.8, rows.amax(dim=1) * 0.8  # so that some saturate
    q = QTensor.quantize(x, scheme, lo, hi)
    step = torch.arange(-400, 400) + 0.5
    count = q.scale.numel()
    ties = step * q.scale.reshape(count, 1)
    rare = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, torch.inf, -torch.inf]).expand(count, -1)
    near = [ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf)), rare]
    special = torch.cat(near, dim=1)
    if scheme.granularity == "channel":
        special = special.unsqueeze(0) if scheme.axis == 1 else special.unsqueeze(1)
    for numbers in (x, special.contiguous()):
        q = QTensor.quantize(numbers, scheme, lo, hi)
        codes, values = through_onnxruntime(numbers.numpy(), q)
        assert np.array_equal(q.codes.numpy().astype(np.int64), codes.astype(np.int64))
        assert np.array_equal(q.dequantize().numpy(), values)
