"""What a number format is, and how one is found by name."""

import re
from abc import ABC, abstractmethod
from functools import cache, cached_property

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.registry import Registry, nearest

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: runtimes may flush anything smaller to zero
_FAMILIES = Registry("fewbit.numerics.formats", "format family", FormatError)


class Format(ABC):
    """How one number is coded, on *normalised* values v = x / scale (+ zero_point, for integer formats only).

    Subclasses set the attributes once and never change them; two formats of the same name are equal.

    Attributes:
        name: the name that `get_format` resolves, for example "int8".
        bits: bits of storage per number.
        integer: whether a code is the normalised value itself, so that zero points and integer kernels apply.
        scaled: whether numbers are divided by a scale first; where not, every scale is 1.
        learned: whether the values that codes stand for are fitted to each tensor, so that a `QTensor` carries them in
            a codebook; `encode` and `decode` then do not exist, and `rounding` makes the codes.
        rounding: the rounding that a plan takes where the recipe names none that this format can use.
        observer: the range estimator that a plan takes where the recipe names none but "minmax".
        zero: whether zero is one of the values.
        saturates: whether numbers beyond qmin .. qmax are coded as these; otherwise coding them is an error.
        block: how many numbers must share a scale, where the format itself says so; None where the scheme is free.
        scale_bits: bits in which one scale is stored.
        tensor_bits: bits stored once per tensor, besides codes, scales and codebook.
        qmin, qmax: the smallest and largest normalised value. A symmetric scheme maps max|x| to qmax.
        code_dtype: torch dtype that holds a code.
    """

    name: str
    bits: int
    integer: bool
    scaled: bool = True
    learned: bool = False
    rounding: str = "nearest"
    observer: str = "minmax"
    zero: bool = True
    saturates: bool = True
    block: int | None = None
    scale_bits: int = 32
    tensor_bits: int = 0
    qmin: float
    qmax: float
    code_dtype: torch.dtype

    @abstractmethod
    def encode(self, v: Tensor) -> Tensor:
        """Nearest codes of normalised values: ties to even, saturating (infinities too). NaN must not occur.

        Args:
            v: float32, any shape.

        Returns:
            codes of the same shape, dtype `code_dtype`.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Normalised values of codes: float32, same shape."""

    def codes(self) -> Tensor:
        """Every code that `encode` can give, by ascending value: `code_dtype`, 1-d."""
        return torch.arange(2**self.bits).to(self.code_dtype)

    def nearest(self, v: Tensor) -> Tensor:
        """The nearest representable normalised values: float32, in v's shape. Override it to be faster."""
        return self.decode(self.encode(v))

    @cached_property
    def unit(self) -> float | None:
        """What all values are whole multiples of, so that the integer kernels of every CPU can multiply them; or None.

        Exact: a value is float32(multiple * unit). Multiples reach 64 at most: x86 without VNNI adds two products with
        activations of 8 bits in 16 bits. Integers of at most 8 bits have unit 1; their range is limited elsewhere.
        """
        if self.learned or self.bits > 8:
            return None
        if self.integer:
            return 1.0
        values = self.decode(self.codes()).to(torch.float64)
        if not bool(values.any()):
            return 1.0
        unit = float(values[values != 0].abs().min())
        counts = torch.round(values / unit)
        small = bool((counts.abs() <= 64).all())
        exact = torch.equal((counts * unit).to(torch.float32), values.to(torch.float32))
        return unit if small and exact else None

    def scales(self, span: Tensor, top: Tensor | float) -> Tensor:
        """Scales of all blocks of a tensor, each so that its `span` falls on the normalised value `top`.

        Args:
            span: float64 [C], finite and not negative; a block of span 0 has scale 1.
            top: above zero.

        Returns:
            float32 [C], normal numbers above zero.
        """
        return stored_scales(span / top)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"Format({self.name})"


def stored_scales(scale: Tensor) -> Tensor:
    """float64 scales as normal float32 numbers; the scale of an empty range is 1."""
    scale = torch.where(scale == 0, 1.0, scale)
    return scale.clamp(min=SMALLEST_SCALE).to(torch.float32)


@cache
def get_format(name: str) -> Format:
    """The format of that name. Raises FormatError for an unknown name, with the nearest match."""
    for family in _FAMILIES.names():
        module = _FAMILIES.module(family)
        match = re.fullmatch(module.PATTERN, name) if isinstance(name, str) else None
        if match:
            return module.make(match)
    raise FormatError(f"unknown format {name!r}: {nearest(str(name), format_names())}")


def format_names() -> list[str]:
    """Example names of every format family, sorted by family; each name can be given to `get_format`."""
    return [name for family in _FAMILIES.names() for name in _FAMILIES.module(family).EXAMPLES]
