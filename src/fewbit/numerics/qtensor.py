"""A quantized tensor, and the quantize-dequantize step that stands for it in a simulation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.scheme import Scheme, block_count, blocks, qparams, unblocks


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes with their scales: x ~ (decode(codes) - zero_point) * scale.

    Attributes:
        codes: the format's `code_dtype`, in the tensor's own shape.
        scale: float32 [C], one per block of the scheme.
        zero_point: int32 [C].
        scheme: how it was quantized.
        shape: the tensor's shape.
        codebook: the values that codes stand for before scaling, where the format is learned from the tensor:
            float32 [T, 2**bits] with T = C (a table per block) or 1 (one for all); otherwise None.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    scheme: Scheme
    shape: tuple[int, ...]
    codebook: Tensor | None = None

    @classmethod
    def quantize(
        cls, x: Tensor, scheme: Scheme, lo: Tensor | None = None, hi: Tensor | None = None
    ) -> "QTensor":
        """Nearest codes of x for a range; values outside it saturate.

        Args:
            x: float tensor of any shape; infinities saturate if a range is given.
            scheme: how to quantize; must fit the shape.
            lo, hi: float [C] or scalar, the range of each block; by default its own minimum and maximum.

        Raises:
            FormatError: NaN in x, a range that is not finite, numbers too large for a format without a scale,
                or a scheme that does not fit the shape.
        """
        x = x.detach().to(torch.float32)
        count = block_count(x.shape, scheme)
        if lo is None or hi is None:
            lo, hi = (
                (blocks(x, scheme).aminmax(dim=1)) if x.numel() else (x.new_zeros(count), x.new_zeros(count))
            )
        scale, zero_point = qparams(lo.expand(count), hi.expand(count), scheme)
        return cls(encode(x, scale, zero_point, scheme), scale, zero_point, scheme, tuple(x.shape))

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        scheme: Scheme,
        codebook: Tensor | None = None,
    ) -> "QTensor":
        """A quantized tensor from codes in the tensor's shape. Raises FormatError if its parts do not fit."""
        count = block_count(codes.shape, scheme)
        for name, part in (("scale", scale), ("zero_point", zero_point)):
            if part.shape != (count,):
                raise FormatError(f"{name} has shape {tuple(part.shape)}: this scheme needs ({count},)")
        if scheme.spec.integer and codes.numel():
            low, high = int(codes.min()), int(codes.max())
            if low < scheme.qmin or high > scheme.qmax:
                limits = f"{scheme.qmin:.0f} to {scheme.qmax:.0f}"
                raise FormatError(f"codes run from {low} to {high}: this {scheme.format} scheme has {limits}")
        if codes.is_floating_point() and not bool(torch.isfinite(codes).all()):
            raise FormatError(f"codes hold infinities or NaN: {scheme.format} has finite numbers only")
        _check_codebook(codes, codebook, scheme, count)
        codes = codes.to(scheme.spec.code_dtype)
        if not scheme.spec.learned and not bool(torch.isfinite(scheme.spec.decode(codes)).all()):
            raise FormatError(f"codes hold some that {scheme.format} gives no value: the file is damaged")
        shape = tuple(codes.shape)
        return cls(codes, scale.to(torch.float32), zero_point.to(torch.int32), scheme, shape, codebook)

    def dequantize(self) -> Tensor:
        """The values that the codes stand for: float32, in the tensor's shape."""
        if self.codebook is not None:
            rows = blocks(self.codes, self.scheme).long()
            value = self.codebook.expand(len(rows), -1).gather(1, rows)
            return unblocks(value * self.scale.reshape(-1, 1), self.shape, self.scheme)
        decode = self.scheme.spec.decode
        return _per_block(
            lambda codes, scale, zero_point: (decode(codes) - zero_point).mul_(scale),
            self.codes, self.scale, self.zero_point, self.scheme,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes when stored densely: packed codes, scales if any, zero points if affine, a float16 codebook."""
        spec = self.scheme.spec
        scales = self.scale.numel() * spec.scale_bits if spec.scaled else 0
        zero_points = 0 if self.scheme.symmetric else 8 * self.zero_point.numel() * -(-spec.bits // 8)
        codebook = 0 if self.codebook is None else 16 * self.codebook.numel()
        parts = (self.codes.numel() * spec.bits, scales + spec.tensor_bits, zero_points, codebook)
        return sum(-(-bits // 8) for bits in parts)

    def to(self, device: torch.device | str) -> "QTensor":
        """The same on another device."""
        parts = ("codes", "scale", "zero_point", "codebook")
        moved = {name: part.to(device) for name in parts if (part := getattr(self, name)) is not None}
        return replace(self, **moved)


def normalise(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Normalised values before coding, clamped: x / scale, or round(x / scale) + zero_point for integer
    formats.

    Rounding comes before the zero point is added: with an odd zero point, ties would otherwise go the
    other way. The division is a float32 division, as in ONNX QuantizeLinear; a product with 1 / scale rounds
    differently. Shapes as in `fake_quantize`.
    """
    return _per_block(partial(_normalise, scheme=scheme), x, scale, zero_point, scheme)


def _normalise(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    v = x / scale  # the only new memory: large tensors spend most of their time on fetching it
    if scheme.spec.integer:
        v.round_().add_(zero_point)
    return v.clamp_(scheme.qmin, scheme.qmax)


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes of x, arguments as in `fake_quantize`: `code_dtype`, in x's shape.

    Raises FormatError for NaN, and for numbers beyond the ends of a format that has no scale to fit them.
    """
    bad = torch.isnan(x)
    if bool(bad.any()):
        index = tuple(torch.nonzero(bad)[0].tolist())
        raise FormatError(f"NaN at index {index} has no code: remove it from the tensor")
    if not scheme.spec.saturates and bool((bad := x.abs() > scheme.qmax).any()):
        index = tuple(torch.nonzero(bad)[0].tolist())
        raise FormatError(
            f"{float(x[index]):.6g} at index {index} is beyond {scheme.format}, which has no scale and ends at "
            f"{scheme.qmax:.6g}: use bfloat16, or a format with a scale such as int8"
        )
    return scheme.spec.encode(normalise(x, scale, zero_point, scheme))


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Quantize and dequantize: what a runtime would compute with, in float32.

    Args:
        x: float32, any shape that the scheme fits.
        scale: float32 [C]; zero_point: int32 [C], one per block.

    Returns:
        float32 in x's shape; equal to the dequantized QTensor with the same scale and zero point.
    """
    return _per_block(partial(_fake_quantize, scheme=scheme), x, scale, zero_point, scheme)


def fake_quantize_rows(rows: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """`fake_quantize` of a tensor given as its blocks: rows float32 [..., any], scale and zero_point [...]."""
    return _fake_quantize(rows, scale.unsqueeze(-1), zero_point.unsqueeze(-1), scheme)


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    v = _normalise(x, scale, zero_point, scheme)
    value = v.sub_(zero_point) if scheme.spec.integer else scheme.spec.nearest(v)
    return value.mul_(scale)


def _check_codebook(codes: Tensor, codebook: Tensor | None, scheme: Scheme, count: int) -> None:
    spec = scheme.spec
    if (codebook is not None) != spec.learned:
        has = "has" if codebook is not None else "lacks"
        raise FormatError(
            f"a tensor of {scheme.format} {has} a codebook: learned formats have one, no others"
        )
    if codebook is None:
        return
    if codebook.dim() != 2 or codebook.shape[0] not in (1, count) or codebook.shape[1] != 2**spec.bits:
        raise FormatError(
            f"codebook has shape {tuple(codebook.shape)}: {scheme.format} needs ({count}, {2**spec.bits}), "
            f"or (1, {2**spec.bits})"
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook.shape[1]:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise FormatError(
            f"codes run from {found}: a codebook of {scheme.format} has 0 to {codebook.shape[1] - 1}"
        )
    if not bool(torch.isfinite(codebook).all()):
        raise FormatError("codebook holds infinities or NaN: the file is damaged")


def _per_block(
    f: Callable[..., Tensor], x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme
) -> Tensor:
    """f(x, scale, zero_point), elementwise, with the parameters of each number's block [C] beside it."""
    if scheme.granularity == "group":
        rows = f(blocks(x, scheme), scale.reshape(-1, 1), zero_point.reshape(-1, 1))
        return unblocks(rows, x.shape, scheme)
    beside: list[int] = []
    if scheme.granularity == "channel":
        beside = [1] * x.dim()
        beside[scheme.axis] = -1
    return f(x, scale.reshape(beside), zero_point.reshape(beside))
