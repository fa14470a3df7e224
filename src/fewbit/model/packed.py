"""Quantize steps and quantized weights as tensors of a file, and read from files that nobody vouches for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import ArtifactError
from fewbit.model.simulate import FakeQuantize
from fewbit.numerics.entropy_coding import entropy_decode, entropy_encode
from fewbit.numerics.packing import pack, packed_size, unpack
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme, block_count

LARGEST_NUMBER = 2**40
_FEW = 256  # scales that an index of 8 bits can tell apart


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


def pack_weight(q: QTensor) -> dict[str, Tensor]:
    """A quantized tensor as the tensors of a file, each in the smallest lossless form, by what they are.

    Either "codes" (dense bits) or "entropy_codes" (``entropy_encode``); "scale", or "scale_values" where they are few
    and "scale_codes" or "scale_entropy_codes" say which one each block has; "zero_point" unless all are zero;
    "codebook" where the format is learned, in float16 where that is exact.
    """
    return _pack_codes(q.codes, q.scheme.spec.bits, "") | _pack_scale(q.scale) | _few_parts(q)


def plain_parts(q: QTensor) -> dict[str, Tensor]:
    """A quantized tensor as tensors for a file that codes each by itself.

    "codes" in their own dtype and shape, "scale", and "zero_point" and "codebook" as by ``pack_weight``.
    """
    return {"codes": q.codes, "scale": q.scale} | _few_parts(q)


def _few_parts(q: QTensor) -> dict[str, Tensor]:
    parts = {}
    if bool(q.zero_point.any()):
        parts["zero_point"] = q.zero_point
    if q.codebook is not None:
        half = q.codebook.to(torch.float16)
        parts["codebook"] = half if torch.equal(half.to(torch.float32), q.codebook) else q.codebook
    return parts


def unpack_weight(name: str, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...]) -> QTensor:
    """The inverse of ``pack_weight``; FewbitError or ValueError where parts, shape and scheme do not fit together."""
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size <= LARGEST_NUMBER:
            raise ValueError(f"{size!r:.40} is no size")
        count *= size
    codes = _unpack_codes(parts, "", scheme.spec.code_dtype, scheme.spec.bits, _signed(scheme), count)
    plain = dict(parts) | {
        "codes": codes.reshape(shape),
        "scale": _unpack_scale(parts, block_count(shape, scheme)),
    }
    return from_plain_parts(name, plain, scheme, shape)


def from_plain_parts(
    name: str, parts: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, ...]
) -> QTensor:
    """The inverse of ``plain_parts``; FewbitError or ValueError where parts, shape and scheme do not fit together."""
    codes, scale = parts["codes"], parts["scale"]
    if codes.dtype != scheme.spec.code_dtype or codes.shape != shape:
        raise ValueError(f"codes of {codes.dtype} {tuple(codes.shape)} are none of {scheme.format} {shape}")
    _check_bits(codes, scheme.spec.bits, _signed(scheme))
    check_scale(name, scale)
    zero_point = parts.get("zero_point", torch.zeros_like(scale, dtype=torch.int32))
    codebook = parts["codebook"].to(torch.float32) if "codebook" in parts else None
    return QTensor.from_codes(codes, scale, zero_point, scheme, codebook)


def dense_bytes(q: QTensor) -> int:
    """Bytes of the codes without entropy coding."""
    return packed_size(q.codes.numel(), q.scheme.spec.bits)


def _signed(scheme: Scheme) -> bool:
    return scheme.spec.qmin < 0 if scheme.spec.integer else scheme.spec.code_dtype.is_signed


def _pack_codes(codes: Tensor, bits: int, prefix: str) -> dict[str, Tensor]:
    whole = codes.dtype.itemsize * 8 == bits  # codes in memory are then what is stored
    flat = codes.detach().cpu().contiguous().reshape(-1)
    dense = flat.view(torch.uint8) if whole else pack(flat, bits)
    wide = flat.to(torch.int16) if codes.dtype == torch.int32 else flat  # codes of uint9 to uint16
    coded = entropy_encode(wide)
    if coded.numel() < dense.numel():
        return {f"{prefix}entropy_codes": coded}
    return {f"{prefix}codes": dense}


def _unpack_codes(
    parts: Mapping[str, Tensor], prefix: str, dtype: torch.dtype, bits: int, signed: bool, count: int
) -> Tensor:
    narrow = torch.int16 if dtype == torch.int32 else dtype
    coded = parts.get(f"{prefix}entropy_codes")
    if coded is not None:
        if coded.dtype != torch.uint8 or coded.dim() != 1:
            raise ValueError(f"entropy-coded codes are {coded.dtype} of {coded.dim()} dimensions")
        codes = entropy_decode(coded, narrow, count)
        codes = codes.to(torch.int32) & (2**16 - 1) if narrow != dtype else codes
        _check_bits(codes, bits, signed)
        return codes
    data = parts[f"{prefix}codes"]
    if data.dtype != torch.uint8 or data.dim() != 1 or data.numel() != packed_size(count, bits):
        raise ValueError(f"{data.numel()} bytes are not {count} codes of {bits} bits")
    if dtype.itemsize * 8 == bits:
        return data.clone().view(dtype)
    return unpack(data, bits, signed, count).to(dtype)


def _check_bits(codes: Tensor, bits: int, signed: bool) -> None:
    if not codes.is_floating_point() and codes.numel() and int(codes.max()) >= 2 ** (bits - signed):
        raise ValueError(f"a code has more than {bits} bits")


def _pack_scale(scale: Tensor) -> dict[str, Tensor]:
    values, index = scale.unique(return_inverse=True)
    if len(values) > _FEW or 4 * len(values) + len(scale) >= 4 * len(scale):
        return {"scale": scale}
    return {"scale_values": values} | _pack_codes(index.to(torch.uint8), 8, "scale_")


def _unpack_scale(parts: Mapping[str, Tensor], count: int) -> Tensor:
    if "scale" in parts:
        return parts["scale"]
    values = parts["scale_values"]
    index = _unpack_codes(parts, "scale_", torch.uint8, 8, False, count)
    if values.dim() != 1 or not len(values) or int(index.max()) >= len(values):
        raise ValueError("a block's scale is not among the scales")
    return values[index.long()]
