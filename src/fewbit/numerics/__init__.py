"""Tensor arithmetic of quantization: formats, schemes, quantized tensors, requantization, packing."""

from fewbit.numerics.format import Format, format_names, get_format
from fewbit.numerics.qtensor import QTensor, encode, fake_quantize
from fewbit.numerics.scheme import Scheme, block_count, blocks, dynamic_qparams, qparams, unblocks

__all__ = [
    "Format",
    "QTensor",
    "Scheme",
    "block_count",
    "blocks",
    "dynamic_qparams",
    "encode",
    "fake_quantize",
    "format_names",
    "get_format",
    "qparams",
    "unblocks",
]
