"""A program as a PyTorch module in Q/DQ form: codes between operations, each operation in float between them.

This is the form that PyTorch's deployment tools look for: ``dequantize -> operation -> quantize`` becomes one integer
kernel. Weights stay int8 constants in front of a ``dequantize_per_channel``.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit.model.program import Coding, Op, Program, aten, decode_args
from fewbit.targets._pt2e.codes import codes, floats, limits, quantized, recoded, through_codes, weights
from fewbit.targets._pt2e.layers import Constants, layer

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d}
_INTEGERS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")
}
_RESHAPES = ("aten.view.default", "aten.reshape.default", "aten.flatten.using_ints", "aten.unflatten.int")
_NO_CLAMP = ("add", "mul", "global_avg_pool")  # integer kernels that stay float if a clamp follows at once


@dataclass(frozen=True)
class Style:
    """What one runtime recognises.

    ``dynamic`` quantizes inputs at run time, ``calls`` are other forms of some operators. ``moves``: operations that
    its kernels do not know in Q/DQ form, and which therefore move codes. ``multiplies`` says of a layer whose input is
    quantized at run time whether there is a kernel for it; others run in float. ``decoded`` keeps the weights of what
    runs in float as numbers, not codes. ``lifted`` runs one-dimensional convolutions as two-dimensional ones.
    """

    dynamic: Callable[[Op, Tensor], Tensor]
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    moves: frozenset[str] = frozenset()
    multiplies: Callable[[Op], bool] = lambda op: True
    decoded: bool = False
    lifted: bool = False


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
            self.add_module(f"op{i}", self._own(op))
        self.eval()

    def _own(self, op: Op) -> nn.Module:
        if op.kind == "module":
            return layer(op, self.style.decoded)
        floating = op.kind.startswith("dynamic_") and not self.style.multiplies(op)
        return Constants(op, self.program, floating and self.style.decoded)

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
        if op.kind.removeprefix("dynamic_") == "conv":
            return self._conv(op, own, inputs[0])
        if op.domain == "integer":
            views = [floats(x, codings[name]) for name, x in zip(op.inputs, inputs, strict=True)]
            return self._integer(op, own, views)
        if op.kind == "getitem":
            return inputs[0][op.attrs["index"]]
        if op.domain == "shares":
            return self._shares(op, inputs)
        if op.kind == "dynamic_linear":
            return _linear(op, own, [self.style.dynamic(op, inputs[0])])
        if op.kind == "module":
            return own(*decode_args(op.attrs["args"], inputs))
        if op.kind == "integers":
            return _INTEGERS[op.attrs["target"]](*decode_args(op.attrs["args"], inputs))
        return self._call(op.attrs, inputs)

    def _integer(self, op: Op, own: Any, xs: list[Tensor]) -> Tensor:
        """An integer operation in float, and its result as codes."""
        out, clamp = self.program.codings[op.output], op.attrs.get("clamp")
        if op.kind == "concat":  # kernels that join codes cannot rescale them
            parts = zip(op.inputs, xs, strict=True)
            xs = [x if self.program.codings[name] == out else recoded(x, out) for name, x in parts]
            return codes(torch.cat(xs, op.attrs["axis"]), out)
        result = _INTEGER[op.kind](op, own, xs)
        if op.attrs.get("squeeze"):
            return codes(floats(quantized(result, out, clamp), out).flatten(1), out)
        if op.kind in _NO_CLAMP and not _clamps_itself(op, out):
            result = through_codes(result, out)
        return quantized(result, out, clamp)

    def _conv(self, op: Op, own: Any, x: Tensor) -> Tensor:
        """A convolution of codes, or of floats that are quantized here."""
        a, weight = op.attrs, own.weight
        lifted = self.style.lifted and weight.dim() == 3
        settings = [a["stride"], list(reversed(a["pad"][::2])) or [0] * len(a["stride"]), a["dilation"]]
        if a["pad"][::2] != a["pad"][1::2]:  # no convolution pads two sides of an axis differently
            settings[1] = [0] * len(a["stride"])
            x = self._padded(op, x)
        if lifted:
            x, weight = x.unsqueeze(2), weight.unsqueeze(2)
            settings = [[neutral, *given] for neutral, given in zip((1, 0, 1), settings, strict=True)]
        dynamic = op.domain == "float"
        if not dynamic:
            view = floats(x, self.program.codings[op.inputs[0]])
        else:
            view = self.style.dynamic(op, x) if self.style.multiplies(op) else x
        if not weight.is_floating_point():
            weight = weights(weight, own.weight_scale, own.weight_zero)
        y = _CONVOLUTIONS[weight.dim() - 2](view, weight, own.bias, *settings, a["groups"])
        if not dynamic:
            y = quantized(y, self.program.codings[op.output], a.get("clamp"))
        return y.squeeze(2) if lifted else y

    def _padded(self, op: Op, x: Tensor) -> Tensor:
        if op.domain == "float":
            return F.pad(x, op.attrs["pad"])
        coding = self.program.codings[op.inputs[0]]
        return codes(F.pad(floats(x, coding), op.attrs["pad"]), coding)

    def _shares(self, op: Op, inputs: list[Any]) -> Any:
        """Codes rearranged: as they are, or in float between the same codings where the runtime expects that."""
        coding, out = self.program.codings[op.inputs[0]], self.program.codings[op.output]
        if op.kind in self.style.moves:
            return self._call(op.attrs, inputs)
        x = floats(inputs[0], coding)
        if op.kind == "rescale":
            return codes(x * (out.scale / coding.scale), out)
        result = self._call(op.attrs, [x, *inputs[1:]])
        if isinstance(result, list | tuple):
            return [codes(part, out) for part in result]
        return codes(result, out)

    def _call(self, attrs: dict[str, Any], inputs: list[Any]) -> Any:
        """An aten operator as a program describes it."""
        sizes = attrs["type"][1] if attrs.get("type", [""])[0] == "float32" else []
        if attrs["target"] in _RESHAPES and sizes.count(None) == 1:
            return inputs[0].reshape([-1 if size is None else size for size in sizes])
        function = self.style.calls.get(attrs["target"]) or aten(attrs["target"])
        return function(*decode_args(attrs["args"], inputs), **_keywords(attrs, inputs))


def visible(program: Program) -> list[str]:
    """Values whose codes can be shown; parts of a split are shown one by one, not as the list they come in."""
    lists = {op.inputs[0] for op in program.ops if op.kind == "getitem"}
    return [op.output for op in program.ops if op.output in program.codings and op.output not in lists]


def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product; batches of matrices of the same sizes in one axis, which leaves one free size at most."""
    if a.dim() != b.dim() or a.dim() < 4 or a.shape[1:-2] != b.shape[1:-2]:
        return torch.matmul(a, b)
    rows = torch.bmm(*(x.reshape(-1, *x.shape[-2:]) for x in (a, b)))
    return rows.reshape(-1, *a.shape[1:-1], b.shape[-1])


def _keywords(attrs: dict[str, Any], inputs: list[Any]) -> dict[str, Any]:
    """An operator's keyword arguments; what JSON does not know was left out as None."""
    given = {name: decode_args(value, inputs) for name, value in attrs["kwargs"].items()}
    return {name: value for name, value in given.items() if value is not None}


def _clamps_itself(op: Op, out: Coding) -> bool:
    """Whether the limits of the result are those of its storage, or a ReLU after an addition."""
    lo, hi = op.attrs.get("clamp") or (out.scheme.qmin, out.scheme.qmax)
    smallest, largest = limits(out)
    return bool(hi == largest and (lo == smallest or (op.kind == "add" and lo == out.zero_point)))


# ---- integer operations, in float ------------------------------------------------------------------------------------


def _linear(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    return F.linear(xs[0], weights(own.weight, own.weight_scale, own.weight_zero), own.bias)


def _global_avg_pool(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    return xs[0].mean(list(range(2 - xs[0].dim(), 0)), keepdim=True)


def _avg_pool(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    return _POOLS[len(op.attrs["kernel"])](xs[0], op.attrs["kernel"], op.attrs["stride"])


def _table(op: Op, own: Any, xs: list[Tensor]) -> Tensor:
    f = op.attrs["function"]
    values: Tensor = aten(f["target"])(*decode_args(f["args"], xs), **_keywords(f, xs))
    return values


_INTEGER: dict[str, Callable[[Op, Any, list[Tensor]], Tensor]] = {
    "linear": _linear,
    "matmul": lambda op, own, xs: product(*xs),
    "add": lambda op, own, xs: xs[0] + xs[1],
    "mul": lambda op, own, xs: xs[0] * xs[1],
    "avg_pool": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "softmax": lambda op, own, xs: torch.softmax(xs[0], -1),
    "table": _table,
    "clip": lambda op, own, xs: xs[0],
    "pad": lambda op, own, xs: F.pad(xs[0], op.attrs["pad"]),
}
