"""Float operators of a ``.tflite`` file as operations of the program: functions, arithmetic, reductions, moves."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fewbit.model.program import Op
from fewbit.targets._litert.model import Operator
from fewbit.targets._litert.reader import Reading
from fewbit.targets._litert.schema import names

Read = Callable[[Reading, Operator], None]
_CLAMPS: dict[str, tuple[str, list[float]]] = {
    "RELU": ("aten.relu.default", []),
    "RELU6": ("aten.relu6.default", []),
    "RELU_N1_TO_1": ("aten.hardtanh.default", [-1.0, 1.0]),
    "RELU_0_TO_1": ("aten.hardtanh.default", [0.0, 1.0]),
    "TANH": ("aten.tanh.default", []),
}


def step(r: Reading, target: str, inputs: list[str], name: str, *args: Any, **extra: Any) -> str:
    """One operation by a torch operator; ``args``: what follows the inputs."""
    attrs = {
        "target": f"aten.{target}",
        "args": [*({"$": i} for i in range(len(inputs))), *args],
        "kwargs": {},
    }
    r.ops.append(Op(f"aten.{target}", "float", name.split(";")[0], name, inputs, name, attrs | extra))
    return name


def clamped(r: Reading, op: Operator) -> str:
    """The name for an operator's result, before the activation that it applies itself is read by ``finish``."""
    name = r.tensor(op.outputs[0]).name
    return name if _activation(op) == "NONE" else f"{name}/before"


def finish(r: Reading, op: Operator) -> None:
    """The activation that an operator applies itself."""
    activation, name = _activation(op), r.tensor(op.outputs[0]).name
    if activation == "NONE":
        return
    if activation not in _CLAMPS:
        raise r.fail(op, f"the fused activation {activation} cannot be read")
    target, bounds = _CLAMPS[activation]
    step(r, target.removeprefix("aten."), [f"{name}/before"], name, *bounds)


def _activation(op: Operator) -> str:
    return names("ActivationFunctionType").get(int(op.options.get("fusedActivationFunction", 0)), "NONE")


def numbers(r: Reading, index: int, what: str) -> list[int]:
    """A constant of whole numbers, as a list."""
    return [int(v) for v in np.asarray(r.data(index, what)).reshape(-1)]


def _unary(target: str, *args: Any) -> Read:
    def read(r: Reading, op: Operator) -> None:
        step(r, target, [r.value(op.inputs[0])], r.tensor(op.outputs[0]).name, *args)

    return read


def _binary(target: str) -> Read:
    """Two operands, and the activation that the operator applies to its result."""

    def read(r: Reading, op: Operator) -> None:
        sources = [r.value(i) for i in op.inputs]
        if len(sources) == 2 and sources[0] == sources[1]:
            step(r, target, sources[:1], clamped(r, op))
            r.ops[-1].attrs["args"] = [{"$": 0}, {"$": 0}]
        else:
            step(r, target, sources, clamped(r, op))
        finish(r, op)

    return read


def _div(r: Reading, op: Operator) -> None:
    """Integers are divided towards zero."""
    if r.tensor(op.outputs[0]).kind.startswith("INT"):
        sources = [r.value(i) for i in op.inputs]
        name = r.tensor(op.outputs[0]).name
        step(r, "div.Tensor_mode", sources, name)
        r.ops[-1].attrs["kwargs"] = {"rounding_mode": "trunc"}
    else:
        _binary("div.Tensor")(r, op)


def _squared_difference(r: Reading, op: Operator) -> None:
    name = r.tensor(op.outputs[0]).name
    step(r, "square.default", [step(r, "sub.Tensor", [r.value(i) for i in op.inputs], f"{name}/apart")], name)


def _gelu(r: Reading, op: Operator) -> None:
    _unary("gelu.default")(r, op)
    if op.options.get("approximate"):
        r.ops[-1].attrs["kwargs"] = {"approximate": "tanh"}


def _leaky_relu(r: Reading, op: Operator) -> None:
    _unary("leaky_relu.default", float(op.options["alpha"]))(r, op)


def _prelu(r: Reading, op: Operator) -> None:
    """max(x, 0) + slope * min(x, 0), the slope broadcast from the last axis."""
    source, slope = (r.value(i) for i in op.inputs)
    name = r.tensor(op.outputs[0]).name
    below = step(r, "clamp_max.default", [source], f"{name}/below", 0.0)
    scaled = step(r, "mul.Tensor", [below, slope], f"{name}/scaled")
    step(r, "add.Tensor", [step(r, "relu.default", [source], f"{name}/above"), scaled], name)


def _cast(r: Reading, op: Operator) -> None:
    dtype = "torch." + r.tensor(op.outputs[0]).kind.lower()
    name = r.tensor(op.outputs[0]).name
    step(r, "to.dtype", [r.value(op.inputs[0])], name, {"dtype": dtype})


def _reduce(target: str) -> Read:
    def read(r: Reading, op: Operator) -> None:
        axes, keep = numbers(r, op.inputs[1], "its axes"), bool(op.options.get("keepDims"))
        source, name = r.value(op.inputs[0]), r.tensor(op.outputs[0]).name
        axis: Any = axes[0] if target.endswith("dim_int") and len(axes) == 1 else axes
        step(r, target, [source], name, axis, keep)

    return read


def _truth(target: str) -> Read:
    def read(r: Reading, op: Operator) -> None:
        axes, name = numbers(r, op.inputs[1], "its axes"), r.tensor(op.outputs[0]).name
        step(r, target, [r.value(op.inputs[0])], name, axes, bool(op.options.get("keepDims")))

    return read


def _arg(target: str) -> Read:
    """The runtime answers in the type that the file says; torch in int64."""

    def read(r: Reading, op: Operator) -> None:
        axis = numbers(r, op.inputs[1], "its axis")[0]
        tensor = r.tensor(op.outputs[0])
        name = tensor.name if tensor.kind == "INT64" else f"{tensor.name}/places"
        step(r, target, [r.value(op.inputs[0])], name, axis, False)
        if name != tensor.name:
            step(r, "to.dtype", [name], tensor.name, {"dtype": "torch.int32"})

    return read


def _softmax(r: Reading, op: Operator) -> None:
    source, name = r.value(op.inputs[0]), r.tensor(op.outputs[0]).name
    beta = float(op.options.get("beta", 1.0))
    if beta != 1:
        source = step(r, "mul.Tensor", [source], f"{name}/scaled", beta)
    step(r, "softmax.int", [source], name, -1)


def _cumsum(r: Reading, op: Operator) -> None:
    if op.options.get("exclusive") or op.options.get("reverse"):
        raise r.fail(op, "sums that leave a number out, or run backwards, cannot be read")
    _unary("cumsum.default", numbers(r, op.inputs[1], "its axis")[0])(r, op)


def _topk(r: Reading, op: Operator) -> None:
    """Two results; places as int32."""
    values, places = (r.tensor(i) for i in op.outputs)
    both = step(r, "topk.default", [r.value(op.inputs[0])], f"{values.name}/both",
                numbers(r, op.inputs[1], "its count")[0], -1)  # fmt: skip
    _taken(r, both, 0, values.name)
    wide = _taken(r, both, 1, f"{places.name}/wide")
    step(r, "to.dtype", [wide], places.name, {"dtype": f"torch.{places.kind.lower()}"})


def _taken(r: Reading, source: str, index: int, name: str) -> str:
    r.ops.append(Op("getitem", "float", name, name, [source], name, {"index": index}))
    return name


def _cat(r: Reading, op: Operator) -> None:
    sources = list(dict.fromkeys(r.value(i) for i in op.inputs))
    parts = [{"$": sources.index(r.tensor(i).name)} for i in op.inputs]
    name = clamped(r, op)
    attrs = {"target": "aten.cat.default", "args": [parts, int(op.options["axis"])], "kwargs": {}}
    r.ops.append(Op("aten.cat.default", "float", name, name, sources, name, attrs))
    finish(r, op)


def _pack(r: Reading, op: Operator) -> None:
    name = r.tensor(op.outputs[0]).name
    sources = list(dict.fromkeys(r.value(i) for i in op.inputs))
    parts = [{"$": sources.index(r.tensor(i).name)} for i in op.inputs]
    attrs = {"target": "aten.stack.default", "args": [parts, int(op.options["axis"])], "kwargs": {}}
    r.ops.append(Op("aten.stack.default", "float", name, name, sources, name, attrs))


def _gather(r: Reading, op: Operator) -> None:
    """Rows along an axis by one list of places; or, with all axes but the last counted as batch, each by its own."""
    table, places = (r.tensor(i) for i in op.inputs[:2])
    axis, batch = int(op.options["axis"]) % len(table.shape), int(op.options.get("batchDims", 0))
    sources = [r.value(i) for i in op.inputs[:2]]
    name = r.tensor(op.outputs[0]).name
    if batch and batch == axis == len(table.shape) - 1 == len(places.shape) - 1:
        wide = step(r, "to.dtype", [sources[1]], f"{name}/places", {"dtype": "torch.int64"})
        attrs = {"target": "aten.gather.default", "args": [{"$": 0}, axis, {"$": 1}], "kwargs": {}}
        r.ops.append(Op("aten.gather.default", "float", name, name, [sources[0], wide], name, attrs))
        return
    if batch:
        raise r.fail(op, f"places for each of {batch} batch axes cannot be read")
    indices = [*[None] * axis, {"$": 1}]
    attrs = {"target": "aten.index.Tensor", "args": [{"$": 0}, indices], "kwargs": {}}
    r.ops.append(Op("aten.index.Tensor", "float", name, name, sources, name, attrs))


def _product(r: Reading, op: Operator) -> None:
    """Stacks of matrices, either of them turned."""
    first = "...ji" if op.options.get("adjX") else "...ij"
    second = "...kj" if op.options.get("adjY") else "...jk"
    name = r.tensor(op.outputs[0]).name
    sources = list(dict.fromkeys(r.value(i) for i in op.inputs))
    parts = [{"$": sources.index(r.tensor(i).name)} for i in op.inputs]
    attrs = {"target": "aten.einsum.default", "args": [f"{first},{second}->...ik", parts], "kwargs": {}}
    r.ops.append(Op("aten.einsum.default", "float", name, name, sources, name, attrs))


def _expand_dims(r: Reading, op: Operator) -> None:
    _unary("unsqueeze.default", numbers(r, op.inputs[1], "its axis")[0])(r, op)


def _squeeze(r: Reading, op: Operator) -> None:
    given = op.options.get("squeezeDims")
    axes = [int(a) for a in (given if given is not None else [])]
    shape = r.tensor(op.inputs[0]).shape
    _unary("squeeze.dims", axes or [i for i, s in enumerate(shape) if s == 1])(r, op)


def _slice(r: Reading, op: Operator) -> None:
    """A box out of a tensor; -1: up to the end."""
    begins, sizes = (numbers(r, i, "its range") for i in op.inputs[1:3])
    source, name = r.value(op.inputs[0]), r.tensor(op.outputs[0]).name
    shape = r.tensor(op.inputs[0]).shape
    cuts = [
        (a, b, s) for a, (b, s) in enumerate(zip(begins, sizes, strict=True)) if b or s not in (-1, shape[a])
    ]
    for i, (axis, begin, size) in enumerate(cuts):
        end = 2**31 - 1 if size == -1 else begin + size
        source = step(
            r, "slice.Tensor", [source], name if i == len(cuts) - 1 else f"{name}/{i}", axis, begin, end, 1
        )
    if not cuts:
        step(r, "alias.default", [source], name)


def _split(r: Reading, op: Operator) -> None:
    axis, parts = numbers(r, op.inputs[0], "its axis")[0], len(op.outputs)
    tensor, source = r.tensor(op.inputs[1]), r.value(op.inputs[1])
    whole = tensor.shape[axis]
    if whole is None:
        raise r.fail(op, "the batch cannot be split")
    for i, output in enumerate(op.outputs):
        size = whole // parts
        step(r, "slice.Tensor", [source], r.tensor(output).name, axis, i * size, (i + 1) * size, 1)


def _where(r: Reading, op: Operator) -> None:
    sources = list(dict.fromkeys(r.value(i) for i in op.inputs))
    parts = [{"$": sources.index(r.tensor(i).name)} for i in op.inputs]
    name = r.tensor(op.outputs[0]).name
    attrs = {"target": "aten.where.self", "args": parts, "kwargs": {}}
    r.ops.append(Op("aten.where.self", "float", name, name, sources, name, attrs))


def _pad(r: Reading, op: Operator) -> None:
    pairs = np.asarray(r.data(op.inputs[1], "its amounts")).reshape(-1, 2).tolist()
    flat = [int(p) for pair in reversed(pairs) for p in pair]
    name, source = r.tensor(op.outputs[0]).name, r.value(op.inputs[0])
    value = float(r.data(op.inputs[2], "its value").reshape(-1)[0]) if len(op.inputs) > 2 else 0.0
    number: Any = {"float": str(value)} if np.isinf(value) else value
    step(r, "pad.default", [source], name, flat, "constant", number)


def _mirror_pad(r: Reading, op: Operator) -> None:
    """An image with its border mirrored, the outermost numbers not repeated."""
    pairs = np.asarray(r.data(op.inputs[1], "its amounts")).reshape(-1, 2).tolist()
    if int(op.options.get("mode", 0)) != 0:
        raise r.fail(op, "a border that repeats the outermost numbers cannot be read")
    source, name, rank = r.value(op.inputs[0]), r.tensor(op.outputs[0]).name, len(pairs)
    if rank == 4 and not any(pairs[0]) and not any(pairs[3]):
        step(r, "pad.default", [source], name, [*pairs[2], *pairs[1]], "reflect", layout="NHWC")
        return
    first = next((i for i, pair in enumerate(pairs) if any(pair)), rank)
    step(
        r,
        "pad.default",
        [source],
        name,
        [int(p) for pair in reversed(pairs[first:]) for p in pair],
        "reflect",
    )


def _widen(r: Reading, op: Operator) -> None:
    """Stored codes, or halves, as the float32 numbers that they stand for; else codes that were computed."""
    tensor, name = r.tensor(op.inputs[0]), r.tensor(op.outputs[0]).name
    if tensor.data is None:
        r.add(op, "dequantize", "boundary", [r.value(op.inputs[0])])
        return
    value = torch.from_numpy(tensor.data.copy()).to(torch.float32)
    if len(tensor.scales):
        shape = [1] * value.dim()
        if len(tensor.scales) > 1:
            shape[tensor.axis] = -1
        zeros = torch.from_numpy(tensor.zero_points.astype(np.float32)).reshape(shape)
        value = (value - zeros) * torch.from_numpy(tensor.scales.copy()).reshape(shape)
    r.widened[name] = value


_SAME_NAME = [
    "TANH",
    "EXP",
    "LOG",
    "SQRT",
    "RSQRT",
    "ABS",
    "NEG",
    "SIGN",
    "SQUARE",
    "SIN",
    "COS",
    "FLOOR",
    "CEIL",
    "ROUND",
    "ELU",
    "LOGICAL_NOT",
    "RELU",
    "RELU6",
]
_PAIRS = {"ADD": "add.Tensor", "SUB": "sub.Tensor", "MUL": "mul.Tensor", "MAXIMUM": "maximum.default",
          "MINIMUM": "minimum.default", "POW": "pow.Tensor_Tensor", "ATAN2": "atan2.default",
          "FLOOR_DIV": "floor_divide.default", "FLOOR_MOD": "remainder.Tensor", "EQUAL": "eq.Tensor",
          "NOT_EQUAL": "ne.Tensor", "LESS": "lt.Tensor", "LESS_EQUAL": "le.Tensor", "GREATER": "gt.Tensor",
          "GREATER_EQUAL": "ge.Tensor", "LOGICAL_AND": "logical_and.default",
          "LOGICAL_OR": "logical_or.default"}  # fmt: skip

READERS_FLOAT: dict[str, Read] = {
    **{name: _unary(f"{name.lower()}.default") for name in _SAME_NAME},
    **{name: _binary(target) for name, target in _PAIRS.items()},
    "LOGISTIC": _unary("sigmoid.default"),
    "HARD_SWISH": _unary("hardswish.default"),
    "RELU_N1_TO_1": _unary("hardtanh.default", -1.0, 1.0),
    "RELU_0_TO_1": _unary("hardtanh.default", 0.0, 1.0),
    "LOG_SOFTMAX": _unary("log_softmax.int", -1),
    "DIV": _div,
    "SQUARED_DIFFERENCE": _squared_difference,
    "GELU": _gelu,
    "LEAKY_RELU": _leaky_relu,
    "PRELU": _prelu,
    "CAST": _cast,
    "MEAN": _reduce("mean.dim"),
    "SUM": _reduce("sum.dim_IntList"),
    "REDUCE_MAX": _reduce("amax.default"),
    "REDUCE_MIN": _reduce("amin.default"),
    "REDUCE_PROD": _reduce("prod.dim_int"),
    "REDUCE_ANY": _truth("any.dims"),
    "REDUCE_ALL": _truth("all.dims"),
    "ARG_MAX": _arg("argmax.default"),
    "ARG_MIN": _arg("argmin.default"),
    "SOFTMAX": _softmax,
    "CUMSUM": _cumsum,
    "TOPK_V2": _topk,
    "REVERSE_V2": lambda r, op: _unary("flip.default", numbers(r, op.inputs[1], "its axes"))(r, op),
    "CONCATENATION": _cat,
    "PACK": _pack,
    "GATHER": _gather,
    "BATCH_MATMUL": _product,
    "EXPAND_DIMS": _expand_dims,
    "SQUEEZE": _squeeze,
    "SLICE": _slice,
    "SPLIT": _split,
    "SELECT": _where,
    "SELECT_V2": _where,
    "PAD": _pad,
    "PADV2": _pad,
    "MIRROR_PAD": _mirror_pad,
    "DEQUANTIZE": _widen,
}
