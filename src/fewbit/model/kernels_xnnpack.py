"""What XNNPACK's kernels compute where that is not ``f32_even``: sums, in fixed point, as ExecuTorch 1.5 runs them."""

import math

import torch
from torch import Tensor

from fewbit.model import kernels
from fewbit.model.program import Coding, Op

_BITS = 20  # of the larger multiplier, besides its leading one


def _add(op: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> Tensor:
    """Both multipliers are whole numbers at one shift; the sum is shifted back, halves upwards."""
    ratios = [float(torch.tensor(c.scale, dtype=torch.float32) / torch.tensor(out.scale)) for c in codings]
    shift = _BITS + 1 - math.frexp(max(ratios))[1]
    total = torch.zeros((), dtype=torch.int64)
    for x, coding, ratio in zip(xs, codings, ratios, strict=True):
        total = total + (x.to(torch.int64) - coding.zero_point) * round(math.ldexp(ratio, shift))
    lo, hi = kernels.limits(op, out)
    rounded = (total + (1 << (shift - 1))) >> shift
    return (rounded + out.zero_point).clamp(lo, hi).to(torch.int32)


KERNELS: dict[str, kernels.Kernel] = kernels.KERNELS | {"add": _add}
