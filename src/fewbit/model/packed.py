"""Quantize steps and packed codes, read from files that nobody vouches for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.packing import pack, packed_size, unpack
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme

LARGEST_NUMBER = 2**40


def read_quantizer(name: str, data: Mapping[str, Any], state: Mapping[str, Tensor]) -> FakeQuantize:
    """A quantize step from its scheme and tensors; ArtifactError where they do not fit together."""
    scheme, scale, zero_point = Scheme.from_json(data["scheme"]), state["scale"], state["zero_point"]
    check_scale(name, scale)
    if scale.numel() != 1 or zero_point.numel() != 1 or not scheme.qmin <= int(zero_point) <= scheme.qmax:
        raise ArtifactError(f"{name}: its scale and zero point do not fit {scheme.format}")
    return FakeQuantize(scheme, scale, zero_point)


def check_scale(name: str, scale: Tensor) -> None:
    """ArtifactError unless every scale is a positive, finite float32 number."""
    if scale.dtype != torch.float32 or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ArtifactError(f"{name}: a scale is not a positive float32 number")


def _signed(scheme: Scheme) -> bool:
    return scheme.spec.qmin < 0 if scheme.spec.integer else scheme.spec.code_dtype.is_signed


def _whole(scheme: Scheme) -> bool:
    """Whether codes in memory are what is stored: whole bytes without unused bits."""
    return scheme.spec.code_dtype.itemsize * 8 == scheme.spec.bits


def pack_codes(q: QTensor) -> Tensor:
    """Codes as dense bytes, uint8 [n]."""
    if _whole(q.scheme):
        return q.codes.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return pack(q.codes, q.scheme.spec.bits)


def unpack_codes(
    data: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, shape: tuple[int, ...]
) -> QTensor:
    """The inverse of ``pack_codes``; ValueError where bytes, shape and scheme do not fit together."""
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= LARGEST_NUMBER:
            raise ValueError(f"{size!r:.40} is no size")
        count *= size
    bits = scheme.spec.bits
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != packed_size(count, bits):
        raise ValueError(f"{data.numel()} bytes are not {count} codes of {bits} bits")
    if _whole(scheme):
        codes = data.clone().view(scheme.spec.code_dtype)
    else:
        codes = unpack(data, bits, _signed(scheme), count)
    return QTensor.from_codes(codes.reshape(shape), scale, zero_point, scheme)
