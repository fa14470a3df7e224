"""Float layers with weights stored as codes: the file is smaller, and answers as the codes say."""

import copy
import re
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx_floats import longer, program, run, written
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.errors import TargetError
from fewbit.model.lowering import lower
from fewbit.model.readers.torch import read
from fewbit.model.reference import Reference
from fewbit.model.simulate import QuantizedModel
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.plan.plan import Plan


def _weight_only(module: nn.Module, x: Tensor, scheme: Scheme) -> QuantizedModel:
    gm = read(module.eval(), (x,))
    qtensors = {}
    for layer, part in list(gm.named_modules()):
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() >= 2 and "bias" not in name:
                q = QTensor.quantize(parameter.detach(), scheme)
                qtensors[f"{layer}.{name}"] = q
                parameter.data = q.dequantize()
    return QuantizedModel(gm, Plan(()), qtensors, frozenset(), (x,))


def _exact(model: onnx.ModelProto, x: Tensor, optimized: str = "") -> list[np.ndarray]:
    """Run without the 8-bit rounding of inputs that ONNX Runtime's MatMulNBits does by default."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.optimized_model_filepath = optimized
    s = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(s.run(None, {s.get_inputs()[0].name: x.numpy()}))


SCHEMES = {
    "int8": Scheme("int8", "channel"),
    "int8_tensor": Scheme("int8"),
    "uint8": Scheme("uint8", "channel", symmetric=False),
    "uint8_tensor": Scheme("uint8", symmetric=False),
    "int4": Scheme("int4", "channel"),
    "uint4": Scheme("uint4", "channel", symmetric=False),
    "uint4_tensor": Scheme("uint4", symmetric=False),
    "int2": Scheme("int2", "channel"),
    "uint3": Scheme("uint3", "channel", symmetric=False),
    "int6": Scheme("int6", "channel"),
    "int4_group": Scheme("int4", "group", group_size=16),
    "uint4_group": Scheme("uint4", "group", group_size=16, symmetric=False),
    "int8_group": Scheme("int8", "group", group_size=16),
    "int12": Scheme("int12", "channel"),
    "uint16": Scheme("uint16", symmetric=False),
    "int16_group": Scheme("int16", "group", group_size=16),
}
LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(64, 24), torch.randn(3, 64)),
    "linear_3d": (nn.Linear(64, 24), torch.randn(2, 5, 64)),
    "linear_no_bias": (nn.Linear(64, 24, bias=False), torch.randn(2, 5, 64)),
    "conv2d": (nn.Conv2d(16, 8, 3, padding=1, stride=2), torch.randn(2, 16, 9, 8)),
    "conv_transpose1d": (nn.ConvTranspose1d(16, 8, 2), torch.randn(2, 16, 5)),
    "embedding": (nn.Embedding(40, 32), torch.tensor([[1, 39, 0], [7, 3, 3]])),
    "lstm": (nn.LSTM(16, 32, bidirectional=True), torch.randn(4, 2, 16)),
    "gru": (nn.GRU(16, 32, num_layers=2), torch.randn(4, 2, 16)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_only(layer: str, scheme: str) -> None:
    torch.manual_seed(0)
    module, x = LAYERS[layer]
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.05)  # not centred: zero points differ
    float_bytes = written(program(copy.deepcopy(module), x)).ByteSize()
    quantized = _weight_only(module, x, SCHEMES[scheme])
    lowered = lower(quantized)
    model = written(lowered)
    for given in (x, x.flip(0)) if "lstm" in layer or "gru" in layer else (x, longer(x)):
        expected = pytree.tree_leaves(quantized(given))
        reference = pytree.tree_leaves(Reference(lowered)(given))
        for found, e, r in zip(_exact(model, given), expected, reference, strict=True):
            np.testing.assert_allclose(found, e.detach().numpy(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found, r.numpy(), rtol=1e-5, atol=1e-5)
    bits = 4 if SCHEMES[scheme].spec.bits <= 4 else 8 if SCHEMES[scheme].spec.bits <= 8 else 16
    weights = sum(quantized.qtensors[n].codes.numel() for n in quantized.qtensors.names())
    exact = SCHEMES[scheme].spec.bits  # larger tensors of odd widths are packed in as many bits as they have
    assert weights * exact // 8 <= _codes_bytes(model) <= weights * bits // 8
    assert model.ByteSize() < float_bytes


def _codes_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the initializers that hold more than scales and zero points."""
    kinds = {
        onnx.TensorProto.INT4,
        onnx.TensorProto.UINT4,
        onnx.TensorProto.INT8,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT16,
        onnx.TensorProto.UINT16,
    }
    return sum(
        len(t.raw_data)
        for t in model.graph.initializer
        if t.data_type in kinds and "zero_point" not in t.name
    )


@pytest.mark.parametrize("scheme", ["int4", "int4_group", "uint4_group", "int8_group"])
@pytest.mark.parametrize("layer", ["linear", "linear_3d"])
def test_narrow_linear_layers_run_as_matmulnbits(layer: str, scheme: str, tmp_path: Any) -> None:
    module, x = LAYERS[layer]
    quantized = _weight_only(copy.deepcopy(module), x, SCHEMES[scheme])
    model = written(lower(quantized))
    _exact(model, x, str(tmp_path / "optimized.onnx"))
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "MatMulNBits" in kinds
    assert "DequantizeLinear" not in kinds
    # the runtime's default: inputs rounded to 8 bits in blocks, about half a percent of the largest output
    expected = quantized(x).detach().numpy()
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_a_projected_lstm_is_refused_by_name() -> None:
    lowered = program(nn.Sequential(nn.LSTM(6, 8, proj_size=4)), torch.randn(5, 2, 6))
    with pytest.raises(
        TargetError, match=r"0: ONNX has no LSTM with projections; use proj_size=0 and a linear layer"
    ):
        written(lowered)


class _Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_an_operator_that_nothing_can_write_is_refused_by_name() -> None:
    lowered = program(_Call(torch.special.bessel_j0), torch.randn(3, 4))
    wanted = "aten.special_bessel_j0.default cannot be written as ONNX: torch.onnx has no form of it either"
    with pytest.raises(TargetError, match=re.escape(wanted)) as caught:
        written(lowered)
    assert "replace the operator, or cut it off the model" in str(caught.value)


FALLBACK = {
    "atan2": lambda x: torch.atan2(x, x.flip(0) + 2),
    "two_of_the_same": lambda x: torch.atan2(x, x + 1) + torch.atan2(x + 1, x),
    "masked": lambda x: torch.index_put(x, (torch.tensor([0, 1]),), torch.zeros(())),
    "grid": lambda x: torch.nn.functional.grid_sample(x[:, None], x[:, :2, :2, None].expand(-1, -1, -1, 2)),
    "several": lambda x: torch.sort(x, 1)[1],
    "unfold": lambda x: x.unfold(2, 3, 2),
    "convolution_by_a_result": lambda x: torch.nn.functional.conv1d(x, x[:2, :, :3].tanh(), padding=1),
    "triangle": lambda x: torch.tril(x),
}


@pytest.mark.parametrize("name", FALLBACK)
def test_any_other_operator_goes_through_torchs_exporter(name: str) -> None:
    module, x = _Call(FALLBACK[name]), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(6))
    model = written(program(module, x))
    for given in (x, longer(x)):
        np.testing.assert_allclose(run(model, given)[0], module(given).numpy(), rtol=1e-5, atol=1e-5)
