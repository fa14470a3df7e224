"""How a tensor is quantized: a scheme gives the blocks that share a scale, their scales and zero points.

Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (arXiv 1806.08342), section
2.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.format import Format, get_format
from fewbit.registry import nearest

Granularity = Literal["tensor", "channel", "group"]
_GRANULARITIES = ["tensor", "channel", "group"]
# A zero point is rounded, so the last code can decode to half a step beyond its bound: half of float32's
# range is left free, so that no code ever decodes to infinity.
_LARGEST_BOUND = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized: hashable, and to and from JSON.

    Attributes:
        format: name of a number format, for example "int8".
        granularity: what shares a scale: the whole "tensor", a "channel", or a "group" of `group_size`
            numbers.
        axis: the channel dimension, for "channel" and "group"; may be negative.
        group_size: numbers in a group. Groups run along the flattened other dimensions of one channel.
        symmetric: the range is centred on zero, else it is affine (integer formats only).
        dynamic: ranges are taken from each tensor at run time, not from calibration.
        narrow: the most negative code of a signed integer format is not used, for example -127..127.

    Raises:
        FormatError: unknown format, or fields that contradict each other.
    """

    format: str
    granularity: Granularity = "tensor"
    axis: int = 0
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        spec = get_format(self.format)
        if self.granularity not in _GRANULARITIES:
            raise FormatError(
                f"unknown granularity {self.granularity!r}: {nearest(str(self.granularity), _GRANULARITIES)}"
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise FormatError(
                f"granularity {self.granularity!r} with group_size {self.group_size}: "
                "give a group size exactly when the granularity is 'group'"
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise FormatError(f"group_size is {self.group_size!r}: it must be a positive whole number")
        if not spec.integer and not self.symmetric:
            raise FormatError(
                f"format {self.format!r} has no zero point: use symmetric=True, or an integer format"
            )
        if self.narrow and (spec.qmin >= 0 or spec.qmax <= 0):
            raise FormatError(
                f"narrow=True drops the most negative code, and {self.format!r} has none to spare: use narrow=False"
            )
        if spec.block is not None and self.group_size != spec.block:
            raise FormatError(
                f"format {self.format!r} has one scale for every {spec.block} numbers, found granularity "
                f"{self.granularity!r} with group_size {self.group_size}: "
                f"use granularity='group' and group_size={spec.block}"
            )

    @cached_property
    def spec(self) -> Format:
        """The number format itself."""
        return get_format(self.format)

    @cached_property
    def qmin(self) -> float:
        """Smallest normalised value in use, after `narrow`."""
        return -self.spec.qmax if self.narrow else self.spec.qmin

    @cached_property
    def qmax(self) -> float:
        """Largest normalised value in use."""
        return self.spec.qmax

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> "Scheme":
        """The inverse of `to_json`. Raises FormatError for unknown keys, missing keys and wrong types."""
        types: dict[str, tuple[type, ...]] = {
            "format": (str,), "granularity": (str,), "axis": (int,), "group_size": (int, type(None)),
            "symmetric": (bool,), "dynamic": (bool,), "narrow": (bool,),
        }  # fmt: skip
        known = [field.name for field in fields(cls)]
        for key, value in d.items():
            if key not in known:
                raise FormatError(f"unknown key {key!r} in a scheme: {nearest(str(key), known)}")
            if type(value) not in types[key]:
                raise FormatError(f"scheme key {key!r} is {value!r}: expected {types[key][0].__name__}")
        if "format" not in d:
            raise FormatError("a scheme has no key 'format': name a number format, e.g. 'int8'")
        return cls(**d)


def block_count(shape: tuple[int, ...] | torch.Size, scheme: Scheme) -> int:
    """How many blocks, so scales, a tensor of this shape has.

    Raises FormatError if the scheme does not fit.
    """
    if scheme.granularity == "tensor":
        return 1
    if not -len(shape) <= scheme.axis < len(shape):
        raise FormatError(
            f"a tensor of shape {tuple(shape)} has no axis {scheme.axis}: "
            "choose an axis it has, or granularity 'tensor'"
        )
    channels = shape[scheme.axis]
    if scheme.group_size is None:
        return channels
    rest = torch.Size(shape).numel() // channels if channels else 0
    if rest % scheme.group_size:
        raise FormatError(
            f"group_size {scheme.group_size} does not divide the {rest} numbers per channel of a tensor of "
            f"shape {tuple(shape)} (axis {scheme.axis}): choose a divisor of {rest}"
        )
    return channels * (rest // scheme.group_size)


def blocks(x: Tensor, scheme: Scheme) -> Tensor:
    """The tensor as one row per scale: [C, n], a view where strides allow.

    "tensor": [1, numel]; "channel": [channels, rest]; "group": [channels * groups, group_size].
    Raises FormatError if the scheme does not fit the shape.
    """
    count = block_count(x.shape, scheme)
    if scheme.granularity == "tensor":
        return x.reshape(1, -1)
    return x.movedim(scheme.axis, 0).reshape(count, x.numel() // max(count, 1))


def unblocks(rows: Tensor, shape: tuple[int, ...] | torch.Size, scheme: Scheme) -> Tensor:
    """The inverse of `blocks`: rows [C, n] back to a tensor of `shape`."""
    if scheme.granularity == "tensor":
        return rows.reshape(shape)
    sizes = list(shape)
    channels = sizes.pop(scheme.axis)
    return rows.reshape(channels, *sizes).movedim(0, scheme.axis)


def qparams(lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block from its range, which is first widened to hold zero.

    Symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0; an unsigned format takes its middle code as the
    zero point of a block that has negative values. Affine: scale = (hi - lo) / (qmax - qmin), zero point =
    round(qmin - lo / scale). A range of zero width gives scale 1, and so does a format without scales. Bounds
    are limited to half of float32's range and scales to normal numbers.

    Args:
        lo, hi: [C], any float dtype; finite.

    Returns:
        scale float32 [C] (computed in float64 and rounded once), zero_point int32 [C].

    Raises:
        FormatError: bounds that are not finite.
    """
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise FormatError(
            "a quantization range is not finite: remove NaN and infinite values from the tensor"
        )
    return _qparams(lo, hi, scheme)


def dynamic_qparams(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each block from the tensor's own extremes, as at run time.

    The same numbers as `qparams` gives, without its check, so that it can be traced by `torch.export`.

    Args:
        x: float, any shape that the scheme fits, with at least one number.

    Returns:
        scale float32 [C], zero_point int32 [C].
    """
    rows = blocks(x, scheme)
    return _qparams(rows.amin(dim=1), rows.amax(dim=1), scheme)


def _qparams(lo: Tensor, hi: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if not scheme.spec.scaled:
        return torch.ones_like(lo, dtype=torch.float32), torch.zeros_like(lo, dtype=torch.int32)
    lo, hi = lo.to(torch.float64), hi.to(torch.float64)
    lo = lo.clamp(-_LARGEST_BOUND, 0.0)
    hi = hi.clamp(0.0, _LARGEST_BOUND)
    if not scheme.symmetric:
        scale = scheme.spec.scales(hi - lo, scheme.qmax - scheme.qmin)
        zero_point = torch.round(scheme.qmin - lo / scale.to(torch.float64)).clamp(scheme.qmin, scheme.qmax)
        return scale, zero_point.to(torch.int32)
    span = torch.maximum(-lo, hi)
    if scheme.spec.qmin < 0 or not scheme.spec.integer:
        top = scheme.qmax or -scheme.qmin  # int1 has nothing above zero
        return scheme.spec.scales(span, top), torch.zeros_like(lo, dtype=torch.int32)
    middle = 2.0 ** (scheme.spec.bits - 1)
    zero_point = torch.where(lo < 0, middle, 0.0)
    above = torch.where(zero_point < scheme.qmax, scheme.qmax - zero_point, zero_point)  # uint1 again
    return scheme.spec.scales(span, above), zero_point.to(torch.int32)
