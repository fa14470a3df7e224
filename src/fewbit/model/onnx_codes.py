"""QuantizeLinear and DequantizeLinear of constants, folded; what quantizers did to activations is left out before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.model.onnx_build import Constant
from fewbit.model.onnx_call import Call
from fewbit.model.onnx_twin import weight_name

Rule = Callable[[Call], Any]


def _parameters(c: Call, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point in a shape that fits the tensor."""
    scale = c.fixed(1, "scales").astype(np.float32)
    zero = c.fixed(2, "zero points").astype(np.float32) if c.has(2) else np.zeros((), np.float32)
    return _spread(c, scale, shape), _spread(c, zero, shape)


def _spread(c: Call, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    block = int(c.attr("block_size", 0))
    if values.size == 1:
        return values.reshape(())
    axis = c.axis(int(c.attr("axis", 1)), len(shape))
    if values.ndim == 1 and values.shape[0] == shape[axis]:
        return values.reshape([-1 if at == axis else 1 for at in range(len(shape))])
    if block > 0 and values.ndim == len(shape):
        whole = np.repeat(values, block, axis)[(*[slice(None)] * axis, slice(shape[axis]))]
        if whole.shape == shape:
            return whole
    raise c.error(f"{list(values.shape)} scales or zero points for a tensor of shape {list(shape)}")


def _dequantize(c: Call) -> Any:
    codes = c.known(0)
    if codes is not None:
        scale, zero = _parameters(c, codes.shape)
        operand = c.raw(0)
        name = weight_name(operand.name) if isinstance(operand, Constant) else ""
        return Constant((codes.astype(np.float32) - zero) * scale, name)
    scale, zero = _parameters(c, c.shape(0))
    if scale.ndim or zero.ndim:
        raise c.error("codes with several scales that are computed: expected one scale")
    return c.apply(_from_codes, c[0], scale=scale.item(), zero=zero.item())


def _from_codes(x: Tensor, *, scale: float, zero: float) -> Tensor:
    return (x.to(torch.float32) - zero) * scale


def _quantize(c: Call) -> Any:
    values = c.known(0)
    if values is None:
        raise c.error("its input is computed: expected a stored weight")
    kind = c.fixed(2, "zero points").dtype if c.has(2) else np.dtype(np.uint8)
    limits = np.iinfo(kind)
    scale, zero = _parameters(c, values.shape)
    codes = np.clip(np.rint(values / scale) + zero, limits.min, limits.max).astype(kind)
    operand = c.raw(0)
    return Constant(codes, operand.name if isinstance(operand, Constant) else "")


RULES: dict[str, Rule] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
