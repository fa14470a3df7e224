"""Between floats and codes: the quantize and dequantize steps of the Q/DQ form."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbit.model.program import Coding

import_module("torch.ao.quantization.fx._decomposed")  # registers the operators of the Q/DQ form
_OPS: Any = torch.ops.quantized_decomposed


def floats(codes: Tensor, coding: Coding) -> Tensor:
    """What codes stand for."""
    values: Tensor = _OPS.dequantize_per_tensor(codes, *_arguments(coding))
    return values


def codes(x: Tensor, coding: Coding) -> Tensor:
    """Codes of a float value, limited by their storage type only."""
    found: Tensor = _OPS.quantize_per_tensor(x, *_arguments(coding))
    return found


def through_codes(x: Tensor, coding: Coding) -> Tensor:
    """A float value rounded to what codes can stand for."""
    return floats(codes(x, coding), coding)


def limits(coding: Coding) -> tuple[int, int]:
    """Smallest and largest code that the storage type has."""
    storage = torch.iinfo(coding.scheme.spec.code_dtype)
    return storage.min, storage.max


def clamped(x: Tensor, coding: Coding, clamp: list[int] | None = None) -> Tensor:
    """A float value within the limits of its codes, as far as the storage type does not imply them."""
    lo, hi = clamp or (int(coding.scheme.qmin), int(coding.scheme.qmax))
    smallest, largest = limits(coding)
    if lo == coding.zero_point > smallest and hi == largest:
        return F.relu(x)
    if (lo, hi) == (smallest, largest):
        return x
    low, high = ((code - coding.zero_point) * coding.scale for code in (lo, hi))
    return F.hardtanh(x, low, high)


def quantized(x: Tensor, coding: Coding, clamp: list[int] | None = None) -> Tensor:
    """Codes of a float value within the coding's own limits, or those of a fused activation."""
    return codes(clamped(x, coding, clamp), coding)


def recoded(x: Tensor, coding: Coding) -> Tensor:
    """A dequantized value in another coding, dequantized again.

    It is clamped after it has its codes: XNNPACK takes a clamp between two codings for part of the operation before
    it, and rounds once where the program rounds twice.
    """
    inside = clamped(x := through_codes(x, coding), coding)
    return x if inside is x else through_codes(inside, coding)


def weights(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """A layer's dequantized weight: int8 codes and one scale for each output channel."""
    values: Tensor = _OPS.dequantize_per_channel(codes, scale, zero, 0, -128, 127, torch.int8)
    return values


def _arguments(coding: Coding) -> tuple[float, int, int, int, torch.dtype]:
    return coding.scale, coding.zero_point, *limits(coding), coding.scheme.spec.code_dtype
