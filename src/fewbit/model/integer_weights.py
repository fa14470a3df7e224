"""Quantized weights as integer kernels take them, and their products without a multiplication.

Weights that are powers of two need shifts and additions only: Zhou et al., "Incremental Network Quantization"
(arXiv 1702.03044).
"""

import dataclasses

import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.model import kernels
from fewbit.model.program import Coding, Op
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import blocks, unblocks


def integer_weights(layer: str, q: QTensor) -> dict[str, Tensor]:
    """Whole numbers without zero points (int8), and a scale per output channel; exact, where the format has a unit.

    Raises ``PlanError`` for weights that no integer kernel multiplies.
    """
    spec = q.scheme.spec
    rows = None
    if spec.unit is not None and q.scheme.granularity != "group":
        numbers = torch.round(spec.decode(q.codes) / spec.unit).to(torch.int32)
        rows = blocks(numbers, q.scheme) - q.zero_point.reshape(-1, 1)
    if rows is None or bool((rows.to(torch.int8) != rows).any()):
        raise PlanError(
            f"{layer}: weights {q.scheme} have no integer kernel; use symmetric int8 per channel or tensor"
        )
    return {"weight": unblocks(rows.to(torch.int8), q.shape, q.scheme), "weight_scale": integer_scale(q)}


def integer_scale(q: QTensor) -> Tensor:
    """The scale of these whole numbers, of each output channel: float32 [channels]."""
    scale = (q.scale.double() * (q.scheme.spec.unit or 1.0)).to(torch.float32)
    return scale.clone() if scale.numel() > 1 else scale.expand(q.shape[0]).clone()


def shiftable(weight: Tensor) -> bool:
    """Whether every weight is zero or a power of two with a sign, so that shifts can stand for multiplications."""
    magnitude = weight.to(torch.int32).abs()
    return not bool((magnitude & (magnitude - 1)).any())


def accumulate_by_shifts(op: Op, x: Tensor, coding: Coding) -> Tensor:
    """What ``kernels.accumulate`` computes for an operation with the attribute "shifts", by sums and shifts alone.

    The inputs of all weights of one magnitude are added, or subtracted; each sum is shifted once.
    """
    weight = op.constants["weight"].to(torch.int32)
    total: Tensor | None = None
    for power in range(8):
        signs = weight.sign() * (weight.abs() == 1 << power)
        constants = {"weight": signs.to(torch.int8)}
        if total is None and "bias" in op.constants:
            constants["bias"] = op.constants["bias"]  # added once, unshifted
        part = kernels.accumulate(dataclasses.replace(op, constants=constants), x, coding) << power
        total = part if total is None else total + part
    assert total is not None
    return total


def _shifted(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    sums = accumulate_by_shifts if op.attrs.get("shifts") else kernels.accumulate
    return kernels.weighted(op, xs, codings, out, sums)


SHIFTS: dict[str, kernels.Kernel] = kernels.KERNELS | {"conv": _shifted, "linear": _shifted}
