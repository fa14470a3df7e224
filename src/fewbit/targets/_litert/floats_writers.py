"""Float operations as operators of the ``.tflite`` format: one each, over stored tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fewbit.errors import TargetError
from fewbit.model.program import Op
from fewbit.targets._litert.writer import Writer

Write = Callable[[Writer, Op], None]


def options(w: Writer, op: Op, name: str, table: str | None = None, version: int = 1, **fields: Any) -> None:
    """An operator over the operation's inputs."""
    w.b.operator(name, list(op.inputs), [w.tensor(op.output)], (table, fields) if table else None, version)


def _plain(name: str, table: str | None = None, version: int = 1, **fields: Any) -> Write:
    return lambda w, op: options(w, op, name, table, version, **fields)


def _operand(w: Writer, op: Op, value: Any, role: str) -> str:
    """An argument: a value's name, or a number as a constant of the first input's type."""
    if isinstance(value, dict) and "$" in value:
        return op.inputs[value["$"]]
    number = float(value["float"]) if isinstance(value, dict) else value
    array = np.asarray(number, w.dtypes[op.inputs[0]])
    return w.b.constant(f"{op.output}/{role}", array, shape=() if w.shapes[op.output] == () else (1,))


def _two(name: str, table: str | None = None, version: int = 1, **fields: Any) -> Write:
    """An operator of the first two arguments, either of which may be a number."""

    def write(w: Writer, op: Op) -> None:
        names = [_operand(w, op, v, f"number{i}") for i, v in enumerate(op.attrs["args"][:2])]
        given = dict(fields)
        if name in ("ADD", "SUB", "MUL", "DIV"):
            output, given["fusedActivationFunction"] = w.clamped(op)
        else:
            output = w.tensor(op.output)
        w.b.operator(name, names, [output], (table, given) if table else None, version)

    return write


def _gelu(w: Writer, op: Op) -> None:
    approximate = op.attrs["kwargs"].get("approximate", "none") == "tanh"
    options(w, op, "GELU", "GeluOptions", approximate=approximate)


def _leaky_relu(w: Writer, op: Op) -> None:
    args = op.attrs["args"]
    alpha = args[1] if len(args) > 1 else op.attrs["kwargs"].get("negative_slope", 0.01)
    options(w, op, "LEAKY_RELU", "LeakyReluOptions", alpha=float(alpha))


def _hardtanh(w: Writer, op: Op) -> None:
    low, high = (
        (*op.attrs["args"][1:], -1.0, 1.0)[:2] if len(op.attrs["args"]) != 2 else (op.attrs["args"][1], 1.0)
    )
    options(w, op, "RELU_N1_TO_1" if (low, high) == (-1, 1) else "RELU_0_TO_1")


def _cast(w: Writer, op: Op) -> None:
    kinds = {
        f"{end}DataType": _type(w, w.dtypes[name]) for end, name in (("in", op.inputs[0]), ("out", op.output))
    }
    options(w, op, "CAST", "CastOptions", **kinds)


def _type(w: Writer, dtype: str) -> int:
    return int(getattr(w.b.s.TensorType, dtype.upper()))


def _where(w: Writer, op: Op) -> None:
    names = [op.inputs[part["$"]] for part in op.attrs["args"]]
    w.b.operator("SELECT_V2", names, [w.tensor(op.output)], ("SelectV2Options", {}), 1)


def _reduce(name: str, version: int = 1) -> Write:
    def write(w: Writer, op: Op) -> None:
        args = op.attrs["args"]
        axes = w.numbers(op, "axes", args[1] if isinstance(args[1], list) else [args[1]])
        keep = bool(args[2]) if len(args) > 2 else bool(op.attrs["kwargs"].get("keepdim", False))
        w.b.operator(
            name, [op.inputs[0], axes], [w.tensor(op.output)], ("ReducerOptions", {"keepDims": keep}), version
        )

    return write


def _arg(name: str, table: str) -> Write:
    def write(w: Writer, op: Op) -> None:
        axis = w.b.constant(f"{op.output}/axis", np.asarray(op.attrs["args"][1], np.int32))
        fields = {"outputType": _type(w, w.dtypes[op.output])}
        w.b.operator(name, [op.inputs[0], axis], [w.tensor(op.output)], (table, fields), 1)

    return write


def _topk(w: Writer, op: Op) -> None:
    """Both results at once; the places as int32, which torch has as int64."""
    count = w.b.constant(f"{op.output}/k", np.asarray(op.attrs["args"][1], np.int32), shape=())
    taken = {
        o.attrs["index"]: o.output for o in w.program.ops if o.kind == "getitem" and o.inputs == [op.output]
    }
    shape = w.shapes[next(iter(taken.values()))]
    values = w.tensor(taken[0]) if 0 in taken else w.temporary(f"{op.output}/values", shape)
    places = w.temporary(f"{op.output}/places", shape, "int32")
    w.b.operator("TOPK_V2", [op.inputs[0], count], [values, places], ("TopKV2Options", {}), 1)
    if 1 in taken:
        kinds = {"inDataType": _type(w, "int32"), "outDataType": _type(w, "int64")}
        w.b.operator("CAST", [places], [w.tensor(taken[1])], ("CastOptions", kinds), 1)


def _written_already(w: Writer, op: Op) -> None:
    """One of several results: the operator that computes it has its tensor."""


def _cumsum(w: Writer, op: Op) -> None:
    axis = w.b.constant(f"{op.output}/axis", np.asarray(op.attrs["args"][1], np.int32))
    w.b.operator("CUMSUM", [op.inputs[0], axis], [w.tensor(op.output)], ("CumsumOptions", {}), 1)


def _flip(w: Writer, op: Op) -> None:
    axes = w.numbers(op, "axes", op.attrs["args"][1])
    w.b.operator("REVERSE_V2", [op.inputs[0], axes], [w.tensor(op.output)], ("ReverseV2Options", {}), 1)


def _cat(w: Writer, op: Op) -> None:
    parts, axis = op.attrs["args"][:2]
    names = [op.inputs[part["$"]] for part in parts]
    fields = {"axis": axis, "fusedActivationFunction": 0}
    w.b.operator("CONCATENATION", names, [w.tensor(op.output)], ("ConcatenationOptions", fields), 1)


def _index_select(w: Writer, op: Op) -> None:
    w.b.operator(
        "GATHER", op.inputs[:2], [w.tensor(op.output)], ("GatherOptions", {"axis": op.attrs["args"][1]}), 1
    )


def _gather(w: Writer, op: Op) -> None:
    last = len(w.shapes[op.inputs[0]]) - 1
    fields = {"axis": last, "batchDims": last}
    names = [op.inputs[op.attrs["args"][i]["$"]] for i in (0, 2)]
    w.b.operator("GATHER", names, [w.tensor(op.output)], ("GatherOptions", fields), 1)


def _product(w: Writer, op: Op) -> None:
    equation, parts = op.attrs["args"]
    names = [op.inputs[part["$"]] for part in parts]
    fields = {"adjX": False, "adjY": "kj" in equation, "asymmetricQuantizeInputs": False}
    w.b.operator("BATCH_MATMUL", names, [w.tensor(op.output)], ("BatchMatMulOptions", fields), 1)


def _avg_pool(w: Writer, op: Op) -> None:
    kernel, stride = op.attrs["args"][1:3]
    output, activation = w.clamped(op)
    fields = {"padding": 1, "strideH": stride[0], "strideW": stride[1], "filterHeight": kernel[0],
              "filterWidth": kernel[1], "fusedActivationFunction": activation}  # fmt: skip
    w.b.operator("AVERAGE_POOL_2D", op.inputs, [output], ("Pool2DOptions", fields), 1)


def _pad(w: Writer, op: Op) -> None:
    """Zeros, another number, or the image mirrored at its border."""
    _, flat, mode, *value = op.attrs["args"]
    rank = len(w.shapes[op.inputs[0]])
    flat = [*flat, *[0] * (2 * rank - len(flat))]
    pairs = [flat[2 * (rank - 1 - a) : 2 * (rank - a)] for a in range(rank)]
    if op.attrs.get("layout") == "NHWC":
        pairs = [pairs[0], *pairs[2:], pairs[1]]
    amounts = w.b.constant(f"{op.output}/pad", np.asarray(pairs, np.int32))
    number = 0.0 if not value or value[0] is None else value[0]
    number = float(number["float"]) if isinstance(number, dict) else float(number)
    output = w.tensor(op.output)
    if mode == "reflect":
        w.b.operator("MIRROR_PAD", [op.inputs[0], amounts], [output], ("MirrorPadOptions", {"mode": 0}), 1)
    elif number == 0:
        w.b.operator("PAD", [op.inputs[0], amounts], [output], ("PadOptions", {}), 1)
    else:
        constant = w.b.constant(f"{op.output}/value", np.asarray([number], w.dtypes[op.inputs[0]]))
        w.b.operator("PADV2", [op.inputs[0], amounts, constant], [output], ("PadV2Options", {}), 1)


def _bilinear(w: Writer, op: Op) -> None:
    size = w.numbers(op, "size", op.attrs["args"][1])
    align = bool(op.attrs["args"][2])
    fields = {"alignCorners": align, "halfPixelCenters": not align}
    w.b.operator(
        "RESIZE_BILINEAR", [op.inputs[0], size], [w.tensor(op.output)], ("ResizeBilinearOptions", fields), 3
    )


def _div_mode(w: Writer, op: Op) -> None:
    """Integers divided towards zero, as LiteRT's DIV does."""
    if op.attrs["kwargs"].get("rounding_mode") != "trunc" or not w.dtypes[op.output].startswith("int"):
        raise TargetError(f"{op.layer}: this division cannot be written for LiteRT")
    _two("DIV", "DivOptions", 2)(w, op)


_SAME_NAME = "relu relu6 tanh exp log sqrt rsqrt abs neg sign square sin cos floor logical_not"
_TABLES = {"EXP": "ExpOptions", "ABS": "AbsOptions", "NEG": "NegOptions", "SIGN": "SignOptions",
           "SQUARE": "SquareOptions", "COS": "CosOptions", "LOGICAL_NOT": "LogicalNotOptions"}  # fmt: skip
_COMPARE = {"eq": ("EQUAL", "EqualOptions"), "ne": ("NOT_EQUAL", "NotEqualOptions"), "lt": ("LESS", "LessOptions"),
            "le": ("LESS_EQUAL", "LessEqualOptions"), "gt": ("GREATER", "GreaterOptions"),
            "ge": ("GREATER_EQUAL", "GreaterEqualOptions")}  # fmt: skip

FLOAT_OPERATORS: dict[str, Write] = {
    **{
        f"aten.{name}.default": _plain(name.upper(), _TABLES.get(name.upper())) for name in _SAME_NAME.split()
    },
    "aten.sigmoid.default": _plain("LOGISTIC"),
    "aten.hardswish.default": _plain("HARD_SWISH", "HardSwishOptions"),
    "aten.hardtanh.default": _hardtanh,
    "aten.gelu.default": _gelu,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.clamp_min.default": _two("MAXIMUM", "MaximumMinimumOptions"),
    "aten.clamp_max.default": _two("MINIMUM", "MaximumMinimumOptions"),
    "aten.maximum.default": _two("MAXIMUM", "MaximumMinimumOptions"),
    "aten.minimum.default": _two("MINIMUM", "MaximumMinimumOptions"),
    "aten.atan2.default": _two("ATAN2", "ATan2Options"),
    "aten.logical_and.default": _two("LOGICAL_AND", "LogicalAndOptions"),
    "aten.logical_or.default": _two("LOGICAL_OR", "LogicalOrOptions"),
    "aten.floor_divide.default": _two("FLOOR_DIV", "FloorDivOptions", 2),
    "aten.remainder.Tensor": _two("FLOOR_MOD", "FloorModOptions"),
    "aten.pow.Tensor_Tensor": _two("POW", "PowOptions"),
    "aten.add.Tensor": _two("ADD", "AddOptions"),
    "aten.sub.Tensor": _two("SUB", "SubOptions"),
    "aten.mul.Tensor": _two("MUL", "MulOptions"),
    "aten.div.Tensor": _two("DIV", "DivOptions"),
    "aten.div.Tensor_mode": _div_mode,
    **{f"aten.{k}.{o}": _two(*names) for k, names in _COMPARE.items() for o in ("Tensor", "Scalar")},
    "aten.to.dtype": _cast,
    "aten.where.self": _where,
    "aten.mean.dim": _reduce("MEAN"),
    "aten.sum.dim_IntList": _reduce("SUM"),
    "aten.amax.default": _reduce("REDUCE_MAX"),
    "aten.amin.default": _reduce("REDUCE_MIN"),
    "aten.prod.dim_int": _reduce("REDUCE_PROD"),
    "aten.argmax.default": _arg("ARG_MAX", "ArgMaxOptions"),
    "aten.argmin.default": _arg("ARG_MIN", "ArgMinOptions"),
    "aten.softmax.int": _plain("SOFTMAX", "SoftmaxOptions", beta=1.0),
    "aten.log_softmax.int": _plain("LOG_SOFTMAX", "LogSoftmaxOptions"),
    "aten.topk.default": _topk,
    "getitem": _written_already,
    "aten.cumsum.default": _cumsum,
    "aten.flip.default": _flip,
    "aten.cat.default": _cat,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.einsum.default": _product,
    "aten.avg_pool2d.default": _avg_pool,
    "aten.pad.default": _pad,
    "aten.upsample_bilinear2d.vec": _bilinear,
}
