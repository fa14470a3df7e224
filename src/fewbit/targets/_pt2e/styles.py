"""What differs between oneDNN and XNNPACK: inputs quantized at run time, attention, weights of float layers."""

from typing import Any

import torch
from torch import Tensor

from fewbit.model.program import Op
from fewbit.targets._pt2e.module import Style, product

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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention in plain products: ExecuTorch's own form of it guards against masks that hide everything."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
        plain = torch.nn.functional.scaled_dot_product_attention
        return plain(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    factor = torch.tensor([query.shape[-1] ** -0.5 if scale is None else scale])
    scores = product(query * factor, key.transpose(-2, -1))
    return product(torch.softmax(scores if attn_mask is None else scores + attn_mask, -1), value)


def _xnnpack_multiplies(op: Op) -> bool:
    """Whether XNNPACK quantizes the input of this layer at run time: linear layers, plain images' convolutions."""
    weight = op.constants["weight"]
    return op.kind == "dynamic_linear" or (weight.dim() == 4 and weight.shape[1] > 1)


_MOVES = frozenset(("slice", "split", "repeat", "flip", "pixel_shuffle"))
ONEDNN = Style(
    per_tensor,
    moves=_MOVES | {"reshape", "transpose"},
    multiplies=lambda op: op.kind == "dynamic_linear",
    lifted=True,  # torch 2.13 expects wrong sizes of padded one-dimensional integer convolutions
)
XNNPACK = Style(
    per_row,
    {"aten.scaled_dot_product_attention.default": attention},
    moves=_MOVES,
    multiplies=_xnnpack_multiplies,
    decoded=True,
)
