"""Inputs quantized at run time, in the forms that the runtimes' integer kernels are recognised by."""

from typing import Any

import torch
from torch import Tensor

from fewbit.model.program import Op

_OPS: Any = torch.ops.quantized_decomposed
_SMALLEST_SCALE = torch.finfo(torch.float32).eps


def per_tensor(op: Op, x: Tensor) -> Tensor:
    """uint8 with the range of the whole tensor: oneDNN's, and the rule of the integer program."""
    limits = (0, 255, torch.uint8)
    scale, zero_point = _OPS.choose_qparams.tensor(x, 0, 255, _SMALLEST_SCALE, torch.uint8)
    codes = _OPS.quantize_per_tensor.tensor(x, scale, zero_point, *limits)
    values: Tensor = _OPS.dequantize_per_tensor.tensor(codes, scale, zero_point, *limits)
    return values


def per_row(op: Op, x: Tensor) -> Tensor:
    """int8 with a range for each row (linear layers) or sample (convolutions): XNNPACK's."""
    if op.kind == "dynamic_conv":
        scale, zero_point = _OPS.choose_qparams.tensor(x, -128, 127, _SMALLEST_SCALE, torch.int8)
        codes = _OPS.quantize_per_tensor.tensor(x, scale, zero_point, -128, 127, torch.int8)
        whole: Tensor = _OPS.dequantize_per_tensor.tensor(codes, scale, zero_point, -128, 127, torch.int8)
        return whole
    scale, zero_point = _OPS.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = _OPS.quantize_per_token(x, scale, zero_point, -128, 127, torch.int8)
    rows: Tensor = _OPS.dequantize_per_token(codes, scale, zero_point, -128, 127, torch.int8, torch.float32)
    return rows
