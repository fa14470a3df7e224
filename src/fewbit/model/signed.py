"""The same program with signed activation codes, for runtimes whose kernels take int8 and not uint8."""

import dataclasses

from torch import Tensor

from fewbit.model.program import Coding, Op, Program


def signed(program: Program) -> Program:
    """Every unsigned coding moved down by half its levels: the same grid of real values, the same ops.

    ``uint8`` with zero point z becomes ``int8`` with zero point z - 128. Tables, clamps and constants follow.
    The given program is left as it is.
    """
    codings = {name: _coding(c) for name, c in program.codings.items()}
    ops = [_op(op, program.codings) for op in program.ops]
    return dataclasses.replace(program, ops=ops, codings=codings)


def _shift(coding: Coding | None) -> int:
    """By how much codes of this coding move."""
    return 0 if coding is None or coding.scheme.qmin < 0 else 2 ** (coding.scheme.spec.bits - 1)


def _coding(coding: Coding) -> Coding:
    shift = _shift(coding)
    if not shift:
        return coding
    scheme = dataclasses.replace(coding.scheme, format=coding.scheme.format.removeprefix("u"))
    return Coding(scheme, coding.scale, coding.zero_point - shift)


def _op(op: Op, codings: dict[str, Coding]) -> Op:
    shift = _shift(codings.get(op.output))
    if not shift:
        return op
    attrs, constants = dict(op.attrs), dict(op.constants)
    if attrs.get("clamp"):
        attrs["clamp"] = [code - shift for code in attrs["clamp"]]
    for role in ("table", "value"):
        if role in constants:
            constants[role] = _codes(constants[role], shift, codings[op.output])
    return dataclasses.replace(op, attrs=attrs, constants=constants)


def _codes(codes: Tensor, shift: int, coding: Coding) -> Tensor:
    return (codes.int() - shift).to(_coding(coding).scheme.spec.code_dtype)
