"""Executes an integer program: the semantics of record that every target is compared with."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import ArtifactError, DataError
from fewbit.model.kernels import accumulate, dequantize, dynamic_quantize, dynamic_quantize_rows
from fewbit.model.profiles import PROFILES
from fewbit.model.program import Coding, Op, Program, aten, decode_args
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

_DYNAMIC = Scheme("uint8", symmetric=False, dynamic=True)
MODULES = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LayerNorm",
    "GroupNorm",
    "RMSNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "Embedding",
    "PReLU",
    "LSTM",
    "GRU",
    "RNN",
    "Dropout",
]
_INTEGERS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
}


class Reference:
    """A program ready to run. Calling it with the model's inputs gives the model's outputs.

    ``run`` also gives every intermediate value; codes are int32 tensors, everything else is float32.
    ``requantization`` names the rule of the kernels that are reproduced: "f32_even", "xnnpack" or "q31_double";
    "f32_even_shifts" shifts where weights are powers of two instead of multiplying, with the same result.
    """

    def __init__(self, program: Program, requantization: str = "f32_even") -> None:
        self.program = program
        self.profile = PROFILES[requantization]
        self._modules: dict[str, nn.Module] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        values = self.run(*inputs)
        return _fill(self.program.outputs, values)

    @torch.inference_mode()
    def run(self, *inputs: Tensor) -> dict[str, Any]:
        """All values by name. Raises ``DataError`` where the number of inputs is not the program's."""
        if len(inputs) != len(self.program.inputs):
            raise DataError(f"{len(inputs)} inputs given, the model takes {len(self.program.inputs)}")
        values: dict[str, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        for op in self.program.ops:
            values[op.output] = self.step(op, [values[name] for name in op.inputs])
        return values

    @torch.inference_mode()
    def step(self, op: Op, inputs: list[Any]) -> Any:
        """The output of one operation on the given inputs (codes as int32).

        ``layout`` "NHWC" among the attributes: images come and go with their channels last.
        """
        if op.attrs.get("layout") == "NHWC":
            result = self._step(op, [_moved(x, 0, 3, 1, 2) for x in inputs])
            return _moved(result, 0, 2, 3, 1)
        return self._step(op, inputs)

    def _step(self, op: Op, inputs: list[Any]) -> Any:
        if op.domain == "integer":
            codings = [self.program.codings[name] for name in op.inputs]
            return self.profile.kernels[op.kind](op, inputs, codings, self.program.codings[op.output])
        if op.kind == "quantize":
            return self.profile.quantize(inputs[0], self.program.codings[op.output])
        if op.kind == "dequantize":
            return dequantize(inputs[0], self.program.codings[op.inputs[0]])
        if op.kind == "constant":
            value = op.constants["value"]
            return value.to(torch.int32) if op.output in self.program.codings else value
        if op.kind.startswith("dynamic_"):
            return _dynamic(op, inputs[0])
        if op.kind == "rescale":
            return inputs[0]
        if op.kind == "module":
            if op.output not in self._modules:
                self._modules[op.output] = _module(op)
            return self._modules[op.output](*decode_args(op.attrs["args"], inputs))
        if op.kind == "getitem":
            return inputs[0][op.attrs["index"]]
        if op.kind == "integers":
            return _INTEGERS[op.attrs["target"]](*decode_args(op.attrs["args"], inputs))
        return _aten(op, inputs)


def _moved(value: Any, *axes: int) -> Any:
    return value.permute(axes) if isinstance(value, Tensor) and value.dim() == 4 else value


def _aten(op: Op, inputs: list[Any]) -> Any:
    # Pooling and padding have no integer kernels in torch; float64 holds every code exactly.
    if op.domain == "shares":
        inputs = [inputs[0].to(torch.float64), *inputs[1:]]  # what follows the codes are indices
    result = aten(op.attrs["target"])(*decode_args(op.attrs["args"], inputs), **_keywords(op, inputs))
    if op.domain == "shares":
        return (
            [r.to(torch.int32) for r in result]
            if isinstance(result, list | tuple)
            else result.to(torch.int32)
        )
    return result


def _keywords(op: Op, inputs: list[Any]) -> dict[str, Any]:
    return {
        k: v for k, v in ((k, decode_args(v, inputs)) for k, v in op.attrs["kwargs"].items()) if v is not None
    }


def _dynamic(op: Op, x: Tensor) -> Tensor:
    """A convolution or linear layer whose input is quantized with its own range; float32 in and out.

    ONNX Runtime multiplies the int32 accumulator, as float32, by s_x * s_w and adds the float bias. LiteRT does so
    too, but gives each row of a matrix, and each image of a batch, a range of its own (``rows`` in the attributes).
    """
    kind = op.kind.removeprefix("dynamic_")
    if op.attrs.get("rows"):
        codes, scale = dynamic_quantize_rows(x, 1 if kind == "linear" else x.dim() - 1)
        coding = Coding(_DYNAMIC, 1.0, 0)
    else:
        codes, (one, zero_point) = dynamic_quantize(x)
        scale, coding = torch.tensor(one), Coding(_DYNAMIC, float(one), zero_point)
    integer = Op(kind, "integer", op.layer, op.node, [], "", op.attrs, {"weight": op.constants["weight"]})
    acc = accumulate(integer, codes, coding).to(torch.float32)
    shape = (-1, *[1] * (acc.dim() - 2)) if kind == "conv" else (-1,)
    acc = acc * (scale * op.constants["weight_scale"].to(torch.float32).reshape(shape))
    return acc + op.constants["bias"].reshape(shape) if "bias" in op.constants else acc


def _module(op: Op) -> nn.Module:
    """The standard layer that a float operation runs, with its weights as they are stored."""
    name = op.attrs["type"]
    if name not in MODULES:
        raise ArtifactError(
            f"program: {op.layer}: {name!r} is no standard layer; expected one of {', '.join(MODULES)}"
        )
    try:
        module = getattr(nn, name)(**op.attrs["config"])
        module.load_state_dict(module_state(op))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"program: {op.layer}: damaged {name} ({error})") from error
    return module.eval().requires_grad_(False)


def module_state(op: Op) -> dict[str, Tensor]:
    """The float32 state of a layer; what is stored as codes is decoded."""
    state: dict[str, Tensor] = {}
    for name, tensor in op.constants.items():
        if "::" not in name:
            state[name] = qtensor_of(op, name).dequantize() if name in op.attrs.get("schemes", {}) else tensor
    return state


def qtensor_of(op: Op, name: str) -> QTensor:
    """A parameter that is stored as codes, with ``<name>::scale`` and the like beside it."""
    c, a = op.constants, op.attrs
    scale, zero_point, codebook = (c.get(f"{name}::{part}") for part in ("scale", "zero_point", "codebook"))
    if scale is None or zero_point is None:
        raise ArtifactError(f"program: {op.layer}: the codes of {name} come without a scale and zero point")
    shape, scheme = tuple(a["shapes"][name]), Scheme.from_json(a["schemes"][name])
    return QTensor(c[name], scale, zero_point, scheme, shape, codebook)


def _fill(structure: Any, values: dict[str, Any]) -> Any:
    if structure is None:
        return None
    if isinstance(structure, str):
        return values[structure]
    if isinstance(structure, dict):
        return {k: _fill(v, values) for k, v in structure.items()}
    filled = [_fill(v, values) for v in structure]
    return tuple(filled)
