"""Keeps tables of elementwise functions away from rounding ties, so that every correct runtime gives the same codes.

A runtime computes tanh or GELU in float32 with an error of its own. Its answer is rounded to a code, and two runtimes
can disagree only where the exact value lies almost halfway between two codes. The output's scale is free: it is
moved by a few parts in ten thousand until no entry of the table lies there.
"""

import torch

from fewbit.errors import PlanError
from fewbit.model.codings import function_values
from fewbit.model.lowering import lower
from fewbit.model.program import Coding, Op
from fewbit.model.simulate import FakeQuantize, QuantizedModel

MARGIN = (
    5e-4  # in codes: over 255 codes, a relative error of 2e-6, some 16 units in the last place of float32
)
_STEP = 2.0**-13
_TRIES = 200


def separate_ties(model: QuantizedModel) -> None:
    """Move output scales of tables in ``model`` (in place) until every entry is at least ``MARGIN`` from a tie."""
    for _ in range(_TRIES):
        program = lower(model)
        near = [
            op for op in program.ops if op.kind == "table" and _short(op) and near_tie(op, program.codings)
        ]
        if not near:
            return
        for op in near:
            quantizer = _quantizer(model, op)
            quantizer.scale.mul_(1 + _STEP)
    raise PlanError(f"{near[0].layer}: no scale keeps its table of values away from rounding ties")


def _quantizer(model: QuantizedModel, op: Op) -> FakeQuantize:
    quantizer = model.quantizer(op.output)
    assert quantizer is not None
    return quantizer


def _short(op: Op) -> bool:
    """Whether a table is of 8-bit codes: among the 65,536 entries of 16 bits some always lie near a tie."""
    return len(op.constants["table"]) <= 256


def near_tie(op: Op, codings: dict[str, Coding]) -> bool:
    """Whether an entry of a table lies so near a tie that runtimes could disagree about it."""
    out = codings[op.output]
    codes = function_values(op.attrs["function"], codings[op.inputs[0]]) / out.scale
    inside = (codes + out.zero_point > out.scheme.qmin - 1) & (codes + out.zero_point < out.scheme.qmax + 1)
    distance = ((codes - torch.floor(codes)) - 0.5).abs()
    return bool((distance[inside] < MARGIN).any())
