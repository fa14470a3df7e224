"""A program as a PyTorch module in Q/DQ form: codes between operations, each operation in float between them.

This is the form that PyTorch's deployment tools look for: ``dequantize -> operation -> quantize`` becomes one integer
kernel. Weights stay int8 constants in front of a ``dequantize_per_channel``.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.model.program import Coding, Op, Program, aten, decode_args
from fewbit.targets._pt2e.layers import Constants, layer

import_module("torch.ao.quantization.fx._decomposed")  # registers the operators of the Q/DQ form
_OPS: Any = torch.ops.quantized_decomposed
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d}
_INTEGERS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
}
_RESHAPES = ("aten.view.default", "aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int")
_TAKES_CLAMP = ("conv", "linear", "clip")  # what a clamp may follow without a quantize step in between


@dataclass(frozen=True)
class Style:
    """What one runtime recognises: how inputs are quantized at run time, and other forms of some operators.

    ``decoded`` keeps the weights of float layers as float numbers, where the runtime cannot multiply by their codes.
    """

    dynamic: Callable[[Op, Tensor], Tensor]
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    decoded: bool = False


class QdqModule(nn.Module):
    """Calling it with the model's inputs gives the program's outputs as a flat tuple.

    ``codes``: values whose codes are given too, after the outputs.
    """

    def __init__(self, program: Program, style: Style, codes: Sequence[str] = ()) -> None:
        super().__init__()
        self.program = program
        self.style = style
        self.codes = tuple(codes)
        for i, op in enumerate(program.ops):
            own = layer(op, style.decoded) if op.kind == "module" else Constants(op, program)
            self.add_module(f"op{i}", own)
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        values: dict[str, Any] = dict(zip(self.program.inputs, inputs, strict=True))
        for i, op in enumerate(self.program.ops):
            values[op.output] = self._step(op, self.get_submodule(f"op{i}"), [values[n] for n in op.inputs])
        return tuple(values[name] for name in (*self.program.output_names(), *self.codes))

    def _step(self, op: Op, own: Any, inputs: list[Any]) -> Any:
        codings = self.program.codings
        if op.kind == "constant":
            return own.value
        if op.kind == "quantize":
            return quantized(inputs[0], codings[op.output])
        if op.kind == "dequantize":
            return floats(inputs[0], codings[op.inputs[0]])
        if op.domain == "integer":
            return self._integer(
                op, own, [floats(x, codings[n]) for n, x in zip(op.inputs, inputs, strict=True)]
            )
        if op.kind == "getitem":
            return inputs[0][op.attrs["index"]]
        if op.domain == "shares":
            return self._shares(op, inputs)
        if op.kind.startswith("dynamic_"):
            x = self.style.dynamic(op, inputs[0])
            return _linear(op, own, x) if op.kind == "dynamic_linear" else _conv(op, own, x)
        if op.kind == "module":
            return own(*decode_args(op.attrs["args"], inputs))
        if op.kind == "integers":
            return _INTEGERS[op.attrs["target"]](*decode_args(op.attrs["args"], inputs))
        return self._call(op.attrs, inputs)

    def _integer(self, op: Op, own: Any, xs: list[Tensor]) -> Tensor:
        """An integer operation in float, and its result as codes."""
        out = self.program.codings[op.output]
        clamp = op.attrs.get("clamp")
        if op.kind == "conv" and uneven(op.attrs["pad"]):
            x = self.program.codings[op.inputs[0]]
            xs = [floats(quantized(F.pad(xs[0], op.attrs["pad"]), x), x)]
        elif (
            op.kind == "concat"
        ):  # kernels that join codes cannot rescale them: every part in the output's coding
            parts = zip(op.inputs, xs, strict=True)
            xs = [x if self.program.codings[n] == out else floats(quantized(x, out), out) for n, x in parts]
        result = _INTEGER[op.kind](op, own, xs)
        if op.attrs.get("squeeze"):
            result = floats(quantized(result, out), out).flatten(1)
        if clamp and not _fuses(op, out):
            result = floats(quantized(result, out), out)
        return quantized(result, out, clamp)

    def _shares(self, op: Op, inputs: list[Any]) -> Any:
        """Codes rearranged: in float between the same codings, as the tools expect it."""
        coding, out = self.program.codings[op.inputs[0]], self.program.codings[op.output]
        x = floats(inputs[0], coding)
        if op.kind == "rescale":
            return quantized(x * (out.scale / coding.scale), out)
        result = self._call(op.attrs, [x, *inputs[1:]])
        if isinstance(result, list | tuple):
            return [quantized(part, out) for part in result]
        return quantized(result, out)

    def _call(self, attrs: dict[str, Any], inputs: list[Any]) -> Any:
        """An aten operator as a program describes it."""
        sizes = attrs["type"][1] if attrs.get("type", [""])[0] == "float32" else []
        if attrs["target"] in _RESHAPES and sizes.count(None) == 1:
            return inputs[0].reshape([-1 if size is None else size for size in sizes])
        function = self.style.calls.get(attrs["target"]) or aten(attrs["target"])
        return function(*decode_args(attrs["args"], inputs), **keywords(attrs, inputs))


def keywords(attrs: dict[str, Any], inputs: list[Any]) -> dict[str, Any]:
    """An operator's keyword arguments; what JSON does not know was left out as None."""
    given = {name: decode_args(value, inputs) for name, value in attrs["kwargs"].items()}
    return {name: value for name, value in given.items() if value is not None}


def visible(program: Program) -> list[str]:
    """Values whose codes can be shown; parts of a split are shown one by one, not as the list they come in."""
    lists = {op.inputs[0] for op in program.ops if op.kind == "getitem"}
    return [op.output for op in program.ops if op.output in program.codings and op.output not in lists]


# ---- between floats and codes ----------------------------------------------------------------------------------------


def floats(codes: Tensor, coding: Coding) -> Tensor:
    """What codes stand for."""
    values: Tensor = _OPS.dequantize_per_tensor(codes, *_arguments(coding))
    return values


def quantized(x: Tensor, coding: Coding, clamp: list[int] | None = None) -> Tensor:
    """Codes of a float value; limits that the storage type does not imply become a clamp of the float value."""
    lo, hi = clamp or (int(coding.scheme.qmin), int(coding.scheme.qmax))
    limits = torch.iinfo(coding.scheme.spec.code_dtype)
    if lo == coding.zero_point > limits.min and hi == limits.max:
        x = F.relu(x)
    elif (lo, hi) != (limits.min, limits.max):
        low, high = ((code - coding.zero_point) * coding.scale for code in (lo, hi))
        x = F.hardtanh(x, low, high)
    codes: Tensor = _OPS.quantize_per_tensor(x, *_arguments(coding))
    return codes


def _arguments(coding: Coding) -> tuple[float, int, int, int, torch.dtype]:
    dtype = coding.scheme.spec.code_dtype
    limits = torch.iinfo(dtype)
    return coding.scale, coding.zero_point, limits.min, limits.max, dtype


def _fuses(op: Op, out: Coding) -> bool:
    """Whether kernels for this operation clamp their own result."""
    limits = torch.iinfo(out.scheme.spec.code_dtype)
    lo, hi = op.attrs["clamp"]
    return op.kind in _TAKES_CLAMP or (hi == limits.max and (lo == limits.min or op.kind == "add"))


# ---- integer operations, in float ------------------------------------------------------------------------------------


def uneven(pad: list[int]) -> bool:
    """Whether the two sides of an axis are padded differently, which no convolution does by itself."""
    return pad[::2] != pad[1::2]


def _weight(own: Any) -> Tensor:
    """The dequantized weight of a layer: int8 codes and one scale for each output channel."""
    arguments = (own.weight, own.weight_scale, own.weight_zero, 0, -128, 127, torch.int8)
    weight: Tensor = _OPS.dequantize_per_channel(*arguments)
    return weight


def _conv(op: Op, own: Any, x: Tensor) -> Tensor:
    a, weight = op.attrs, _weight(own)
    pad = [] if uneven(a["pad"]) else list(reversed(a["pad"][::2]))
    if uneven(a["pad"]) and op.domain == "float":
        x = F.pad(x, a["pad"])
    convolution = _CONVOLUTIONS[weight.dim() - 2]
    return convolution(x, weight, own.bias, a["stride"], pad or 0, a["dilation"], a["groups"])


def _linear(op: Op, own: Any, x: Tensor) -> Tensor:
    return F.linear(x, _weight(own), own.bias)


def _global_avg_pool(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    return xs[0].mean(list(range(2 - xs[0].dim(), 0)), keepdim=True)


def _avg_pool(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    return _POOLS[len(op.attrs["kernel"])](xs[0], op.attrs["kernel"], op.attrs["stride"])


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product; batches of matrices of the same sizes in one axis, which leaves one free size at most."""
    if a.dim() != b.dim() or a.dim() < 4 or a.shape[1:-2] != b.shape[1:-2]:
        return torch.matmul(a, b)
    rows = torch.bmm(*(x.reshape(-1, *x.shape[-2:]) for x in (a, b)))
    return rows.reshape(-1, *a.shape[1:-1], b.shape[-1])


def _function(function: dict[str, Any], xs: list[Tensor]) -> Tensor:
    values: Tensor = aten(function["target"])(*decode_args(function["args"], xs), **keywords(function, xs))
    return values


_INTEGER: dict[str, Callable[[Op, Any, list[Tensor]], Tensor]] = {
    "conv": lambda op, own, xs: _conv(op, own, xs[0]),
    "linear": lambda op, own, xs: _linear(op, own, xs[0]),
    "matmul": lambda op, own, xs: product(*xs),
    "add": lambda op, own, xs: xs[0] + xs[1],
    "mul": lambda op, own, xs: xs[0] * xs[1],
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "concat": lambda op, own, xs: torch.cat(xs, op.attrs["axis"]),
    "softmax": lambda op, own, xs: torch.softmax(xs[0], -1),
    "table": lambda op, own, xs: _function(op.attrs["function"], xs),
    "clip": lambda op, own, xs: xs[0],
    "pad": lambda op, own, xs: F.pad(xs[0], op.attrs["pad"]),
}
