"""Integer operations as LiteRT has them: its fixed scales, its fused activations, its functions of one code."""

import dataclasses
from typing import Any

import torch

from fewbit.model.codings import clamp_codes, function_values, quantize_table
from fewbit.model.kernels_16x8 import wide
from fewbit.model.program import Coding, Op, Program
from fewbit.model.ties import near_tie
from fewbit.numerics.scheme import Scheme
from fewbit.targets._litert.wide import check_width

ACTIVATIONS = {"RELU": (0.0, float("inf")), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
_FUSING = ("conv", "linear", "add", "mul")  # kinds whose operation can clamp its own output

# Functions that have an int8 kernel with a table of 256 entries, by the name of the torch operator.
NATIVE = {
    "aten.sigmoid.default": "LOGISTIC",
    "aten.tanh.default": "TANH",
    "aten.gelu.default": "GELU",
    "aten.exp.default": "EXP",
    "aten.abs.default": "ABS",
    "aten.rsqrt.default": "RSQRT",
    "aten.log.default": "LOG",
}
_FLOAT_SOFTMAX: dict[str, Any] = {"target": "aten.softmax.int", "args": [{"$": 0}, -1], "kwargs": {}}
_INT8 = Scheme("int8", symmetric=False)
SOFTMAX = Coding(_INT8, 1 / 256, -128)
_FIXED = {
    "aten.sigmoid.default": SOFTMAX,
    "aten.tanh.default": Coding(_INT8, 1 / 128, 0),
}


def legalize(program: Program) -> Program:
    """The program with operations that this runtime has, and its constraints on codings; same values, in order."""
    ops: list[Op] = []
    codings = {name: _contained(coding) for name, coding in program.codings.items()}
    for op in program.ops:
        check_width(op, codings)
        narrow = _narrow(op, program.codings, codings)
        if op.kind == "softmax" and op.domain == "integer" and wide(codings[op.output]):
            ops += _island(op, _FLOAT_SOFTMAX, codings, [])
        elif op.kind == "table":
            ops += _function(op, codings, narrow)
        elif op.kind == "softmax" and op.domain == "integer" and codings[op.output] != SOFTMAX:
            ops += _softmax(op, codings, narrow)
        elif narrow and (op.domain == "integer" or op.kind == "quantize") and op.kind not in ("pad", "clip"):
            ops += _clamped(dataclasses.replace(op, attrs=op.attrs | {"clamp": narrow}), codings)
        elif op.domain == "integer" and op.attrs.get("clamp"):
            ops += _clamped(op, codings)
        else:
            ops.append(dataclasses.replace(op))
    return dataclasses.replace(program, ops=ops, codings=codings)


def _contained(coding: Coding) -> Coding:
    """Codes of fewer than 8 bits in int8: the runtime knows no other below 16."""
    kept = coding.scheme.format in ("int8", "int16")
    return coding if kept else Coding(_INT8, coding.scale, coding.zero_point)


def _narrow(op: Op, planned: dict[str, Coding], contained: dict[str, Coding]) -> list[int]:
    """The clamp that keeps codes of fewer than 8 bits within their own; empty for 8 bits."""
    coding = planned.get(op.output)
    if coding is None or coding == contained[op.output]:
        return []
    return list(op.attrs.get("clamp") or [int(coding.scheme.qmin), int(coding.scheme.qmax)])


def _softmax(op: Op, codings: dict[str, Coding], clamp: list[int]) -> list[Op]:
    """The runtime's softmax answers in 256ths; any other scale is a step of its own."""
    inner = f"{op.output}_fixed"
    codings[inner] = SOFTMAX
    attrs: dict[str, Any] = {"clamp": clamp} if clamp else {}
    step = Op("requantize", "integer", op.layer, op.node, [inner], op.output, attrs)
    return [dataclasses.replace(op, output=inner, node=f"{op.node}_fixed"), *_clamped(step, codings)]


def activation(clamp: list[int] | None, coding: Coding) -> str | None:
    """The fused activation that clamps codes just so: "NONE", a name of ``ACTIVATIONS``, or None if there is none."""
    full = [int(coding.scheme.qmin), int(coding.scheme.qmax)]
    if not clamp or list(clamp) == full:
        return "NONE"
    return next((name for name, b in ACTIVATIONS.items() if clamp_codes(b, coding) == list(clamp)), None)


def _clamped(op: Op, codings: dict[str, Coding]) -> list[Op]:
    """A clamp that the operation cannot do itself becomes one of its own."""
    coding = codings[op.output]
    name = activation(op.attrs.get("clamp"), coding)
    if op.kind == "clip" and name == "NONE":  # nothing to cut off: the same codes under another name
        return [dataclasses.replace(op, kind="rescale", domain="shares", attrs={})]
    if name == "NONE" or (name is not None and op.kind in _FUSING) or op.kind == "clip":
        return [dataclasses.replace(op)]
    inner = f"{op.output}_unclamped"
    codings[inner] = coding
    attrs = {k: v for k, v in op.attrs.items() if k != "clamp"}
    clip = Op("clip", "integer", op.layer, op.node, [inner], op.output, {"clamp": op.attrs["clamp"]})
    return [dataclasses.replace(op, output=inner, attrs=attrs, node=f"{op.node}_unclamped"), clip]


def _function(op: Op, codings: dict[str, Coding], clamp: list[int]) -> list[Op]:
    """A function of one code: a kernel with a table, the leaky ReLU, or float between two steps."""
    function = op.attrs["function"]
    target = str(function["target"])
    if target == "aten.leaky_relu.default" and not clamp:
        alpha = function["args"][1] if len(function["args"]) > 1 else 0.01
        return [dataclasses.replace(op, kind="leaky_relu", attrs={"alpha": alpha}, constants={})]
    if clamp or len(op.constants["table"]) != 256:
        return _island(op, function, codings, clamp)
    if target == "aten.hardswish.default":
        return [dataclasses.replace(op, kind="hard_swish", attrs={}, constants={})]
    fixed = _FIXED.get(target)
    if target in NATIVE and (fixed is None or codings[op.output] == fixed):
        return [dataclasses.replace(op)]
    if fixed is not None:
        inner = f"{op.output}_fixed"
        values = quantize_table(function_values(function, codings[op.inputs[0]]), fixed)
        table = dataclasses.replace(op, output=inner, constants={"table": values}, node=f"{op.node}_fixed")
        if not near_tie(table, codings | {inner: fixed}):
            codings[inner] = fixed
            return [table, Op("requantize", "integer", op.layer, op.node, [inner], op.output)]
    return _island(op, function, codings, clamp)


def _island(op: Op, function: dict[str, Any], codings: dict[str, Coding], clamp: list[int]) -> list[Op]:
    """Dequantize, the function in float, quantize.

    Exact for 8 bits, as no entry of the table lies near a tie; with 16 bits there are too many entries for that.
    """
    floats, result = f"{op.output}_in", f"{op.output}_real"
    attrs = {"target": function["target"], "args": function["args"], "kwargs": function["kwargs"]}
    note = "LiteRT has no int8 kernel for this function; exact all the same"
    if wide(codings[op.output]):
        note = "in float, which is more precise than LiteRT's tables for 16 bits; may differ by a unit"
    return [
        Op("dequantize", "boundary", op.layer, f"{op.node}_in", op.inputs, floats),
        Op(attrs["target"], "float", op.layer, f"{op.node}_real", [floats], result, attrs, note=note),
        *_clamped(
            Op("quantize", "boundary", op.layer, op.node, [result], op.output, {"clamp": clamp}), codings
        ),
    ]


def bound_codes(coding: Coding, clamp: list[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The lower and upper code of a clamp as tensors of one number; None where the format ends there anyway."""
    lo, hi = clamp
    dtype = coding.scheme.spec.code_dtype
    low = torch.tensor([lo], dtype=dtype) if lo > coding.scheme.qmin else None
    high = torch.tensor([hi], dtype=dtype) if hi < coding.scheme.qmax else None
    return low, high
