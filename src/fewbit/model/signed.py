"""The same program with signed or unsigned activation codes, for runtimes whose kernels take only one of the two."""

import dataclasses

from torch import Tensor

from fewbit.model.program import Coding, Op, Program


def signed(program: Program) -> Program:
    """Every unsigned coding moved down by half its levels: the same grid of real values, the same ops.

    ``uint8`` with zero point z becomes ``int8`` with zero point z - 128. Tables, clamps and constants follow.
    The given program is left as it is.
    """
    return _moved(program, {n: _down(c) for n, c in program.codings.items() if c.scheme.qmin >= 0})


def unsigned_codes(program: Program) -> Program:
    """Every signed coding of up to 8 bits moved up by half its levels: the inverse of ``signed``.

    A coding that leaves out the lowest code stays signed: it has no unsigned counterpart.
    """
    up = {n: _up(c) for n, c in program.codings.items() if c.scheme.qmin < 0 and not c.scheme.narrow}
    return _moved(program, {n: c for n, c in up.items() if c.scheme.spec.bits <= 8})


def _down(coding: Coding) -> Coding:
    scheme = dataclasses.replace(coding.scheme, format=coding.scheme.format.removeprefix("u"))
    return Coding(scheme, coding.scale, coding.zero_point - 2 ** (scheme.spec.bits - 1))


def _up(coding: Coding) -> Coding:
    scheme = dataclasses.replace(coding.scheme, format=f"u{coding.scheme.format}", symmetric=False)
    return Coding(scheme, coding.scale, coding.zero_point + 2 ** (scheme.spec.bits - 1))


def _moved(program: Program, codings: dict[str, Coding]) -> Program:
    """The program with these codings in the place of its own."""
    ops = [_op(op, program.codings, codings) for op in program.ops]
    return dataclasses.replace(program, ops=ops, codings=program.codings | codings)


def _op(op: Op, before: dict[str, Coding], after: dict[str, Coding]) -> Op:
    if op.output not in after:
        return op
    coding = after[op.output]
    shift = coding.zero_point - before[op.output].zero_point
    attrs, constants = dict(op.attrs), dict(op.constants)
    if attrs.get("clamp"):
        attrs["clamp"] = [code + shift for code in attrs["clamp"]]
    for role in ("table", "value"):
        if role in constants:
            constants[role] = _codes(constants[role], shift, coding)
    return dataclasses.replace(op, attrs=attrs, constants=constants)


def _codes(codes: Tensor, shift: int, coding: Coding) -> Tensor:
    return (codes.int() + shift).to(coding.scheme.spec.code_dtype)
