"""From float to codes while lowering: codings of values and constants, clamps as codes, tables of functions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.model.program import Coding, aten, decode_args
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.scheme import Scheme, qparams


def coding_of(module: FakeQuantize) -> Coding:
    """The coding that a quantize step stands for."""
    return Coding(module.scheme, float(module.scale.item()), int(module.zero_point.item()))


def constant_coding(value: Tensor, scheme: Scheme) -> Coding:
    """The coding of a constant that an integer operation reads: its own minimum and maximum."""
    scale, zero_point = qparams(value.min().reshape(1), value.max().reshape(1), scheme)
    return Coding(scheme, float(scale), int(zero_point))


def clamp_codes(bounds: tuple[float, float] | None, coding: Coding) -> list[int]:
    """A float clamp as limits of codes, never outside the format's own."""
    lo, hi = bounds if bounds is not None else (-float("inf"), float("inf"))
    limits = []
    for value, edge in ((lo, coding.scheme.qmin), (hi, coding.scheme.qmax)):
        code = (
            edge
            if np.isinf(value)
            else np.rint(np.float32(value) / np.float32(coding.scale)) + coding.zero_point
        )
        limits.append(int(min(max(code, coding.scheme.qmin), coding.scheme.qmax)))
    return limits


def function_values(function: dict[str, Any], x: Coding) -> Tensor:
    """An elementwise function at every value that codes of ``x`` can stand for: float64, one entry a code."""
    codes = torch.arange(int(x.scheme.qmin), int(x.scheme.qmax) + 1, dtype=torch.float64)
    inputs = ((codes - x.zero_point).to(torch.float32) * torch.tensor(x.scale, dtype=torch.float32)).double()
    with torch.no_grad():
        result = aten(function["target"])(*decode_args(function["args"], [inputs]), **function["kwargs"])
    assert isinstance(result, Tensor)
    return result


def quantize_table(values: Tensor, out: Coding) -> Tensor:
    """Codes of a table's float64 values, in the output's storage dtype."""
    codes = torch.round(values / out.scale) + out.zero_point
    return codes.clamp(out.scheme.qmin, out.scheme.qmax).to(out.scheme.spec.code_dtype)
