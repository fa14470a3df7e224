"""What every number format promises. Each function takes a format and fails if a promise is broken."""

import pytest
import torch

from fewbit.errors import FormatError
from fewbit.numerics import Format, QTensor, Scheme, fake_quantize


def codes_are_stable(fmt: Format) -> None:
    """Coding what a code stands for gives that code again; no two codes stand for the same value."""
    codes = fmt.codes()
    assert codes.dtype == fmt.code_dtype
    assert 2 <= codes.numel() <= 2**fmt.bits
    values = fmt.decode(codes)
    assert values.dtype == torch.float32
    assert torch.equal(fmt.encode(values), codes)
    assert bool((values.diff() > 0).all()), "codes() must ascend by value"
    assert float(values[0]) == fmt.qmin
    assert float(values[-1]) == fmt.qmax


def zero_is_kept(fmt: Format) -> None:
    """Zero is a value of the format, whatever its sign bit, unless it says that it has none."""
    if not fmt.zero:
        assert not bool((fmt.decode(fmt.codes()) == 0).any())
        return
    zeros = torch.tensor([0.0, -0.0])
    assert torch.equal(fmt.decode(fmt.encode(zeros)), torch.zeros(2))
    assert torch.equal(fmt.nearest(zeros), torch.zeros(2))


def coding_is_monotone_and_nearest(fmt: Format) -> None:
    """A larger number never gets a smaller value, and no other value of the format is nearer."""
    generator = torch.Generator().manual_seed(1)
    span = fmt.qmax - fmt.qmin
    # In float64, which also holds the span of a format that reaches to the ends of float32.
    v = torch.rand(4096, generator=generator, dtype=torch.float64) * span * 1.2 + (fmt.qmin - 0.1 * span)
    values = fmt.decode(fmt.codes())
    middles = (values[1:].double() + values[:-1].double()) / 2
    some = slice(None, None, max(1, values.numel() // 4096))
    v = torch.cat((v, middles[some], values[some].double())).sort().values.to(torch.float32)
    coded = fmt.decode(fmt.encode(v))
    assert bool((coded.diff() >= 0).all())
    place = torch.searchsorted(values, v).clamp(1, values.numel() - 1)
    best = torch.minimum((v - values[place]).abs(), (v - values[place - 1]).abs())
    assert torch.equal((v - coded).abs(), best)
    assert torch.equal(fmt.nearest(v), coded)


def coding_saturates(fmt: Format) -> None:
    """Numbers beyond the extremes, infinities included, get the extreme codes."""
    beyond = torch.tensor([-torch.inf, -3.4e38, fmt.qmin * 1.5 - 1, fmt.qmax * 1.5 + 1, 3.4e38, torch.inf])
    expected = torch.tensor([fmt.qmin] * 3 + [fmt.qmax] * 3)
    assert torch.equal(fmt.decode(fmt.encode(beyond)), expected)
    assert torch.equal(fmt.nearest(beyond), expected)


def shapes_are_kept(fmt: Format) -> None:
    """Codes and values have the shape of what went in; so has a tensor without numbers."""
    for shape in ((), (0,), (2, 0, 3), (2, 3, 4)):
        codes = fmt.encode(torch.zeros(shape))
        assert codes.shape == shape
        assert codes.dtype == fmt.code_dtype
        assert fmt.decode(codes).shape == shape


def schemes(fmt: Format) -> list[Scheme]:
    """A scheme of each granularity that the format allows."""
    if fmt.block is not None:
        return [Scheme(fmt.name, "group", axis, fmt.block) for axis in (0, 1)]
    fields = ({}, {"granularity": "channel", "axis": 1}, {"granularity": "group", "group_size": 32})
    return [Scheme(fmt.name, **each) for each in fields]


def tensors_survive(fmt: Format) -> None:
    """A quantized tensor dequantizes to what is simulated, and quantizing that again changes nothing."""
    x = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(2))
    for scheme in schemes(fmt):
        q = QTensor.quantize(x, scheme)
        values = q.dequantize()
        assert values.shape == x.shape
        assert torch.equal(values, fake_quantize(x, q.scale, q.zero_point, scheme))
        assert torch.equal(values, fake_quantize(values, q.scale, q.zero_point, scheme))
        if fmt.bits > 1:  # the largest number is no good scale for a single level
            assert float((values - x).norm() / x.norm()) < (0.8 if fmt.bits > 2 else 1.0)
        again = QTensor.from_codes(q.codes, q.scale, q.zero_point, scheme)
        assert torch.equal(again.dequantize(), values)


def bytes_are_counted(fmt: Format) -> None:
    """A tensor's bytes: its packed codes and scales of the size that the format says."""
    x = torch.ones(2, 3, 32)
    for scheme in schemes(fmt):
        q = QTensor.quantize(x, scheme)
        scales = q.scale.numel() * fmt.scale_bits + fmt.tensor_bits if fmt.scaled else 0
        assert q.nbytes == -(-192 * fmt.bits // 8) + -(-scales // 8)


def blocks_are_demanded(fmt: Format) -> None:
    """A format that says how many numbers share a scale is refused with any other granularity."""
    if fmt.block is None:
        return
    for fields in ({}, {"granularity": "channel"}, {"granularity": "group", "group_size": 2 * fmt.block}):
        with pytest.raises(FormatError, match=f"use granularity='group' and group_size={fmt.block}"):
            Scheme(fmt.name, **fields)


def values_must_be_fitted(fmt: Format) -> None:
    """A learned format has no values before a rounding fits them, and says which rounding does."""
    codes = fmt.codes()
    assert codes.tolist() == list(range(2**fmt.bits))
    assert codes.dtype == fmt.code_dtype == torch.uint8
    for attempt in (
        lambda: fmt.encode(torch.zeros(3)),
        lambda: fmt.decode(codes),
        lambda: QTensor.quantize(torch.zeros(4, 8), Scheme(fmt.name)),
    ):
        with pytest.raises(
            FormatError, match=f"format '{fmt.name}' has no values before .* '{fmt.rounding}'"
        ):
            attempt()


def tables_are_demanded(fmt: Format) -> None:
    """A tensor of a learned format needs a table of as many values as there are codes."""
    scheme = Scheme(fmt.name, "channel")
    codes, one, zero = torch.zeros(3, 5), torch.ones(3), torch.zeros(3, dtype=torch.int32)
    table = torch.linspace(-1, 1, 2**fmt.bits)
    for rows in (1, 3):
        q = QTensor.from_codes(codes, one, zero, scheme, table.expand(rows, -1))
        assert torch.equal(q.dequantize(), torch.full((3, 5), -1.0))
        assert q.nbytes == -(-15 * fmt.bits // 8) + -(-3 * fmt.scale_bits // 8) + 2 * rows * 2**fmt.bits
    for bad in (None, table, table.expand(2, -1), table[None, 1:], (table / 0)[None]):
        with pytest.raises(FormatError, match="codebook"):
            QTensor.from_codes(codes, one, zero, scheme, bad)
    for outside in (-1, 2**fmt.bits):
        with pytest.raises(FormatError, match=f"a codebook of {fmt.name} has 0 to {2**fmt.bits - 1}"):
            QTensor.from_codes(codes + outside, one, zero, scheme, table[None])


CONTRACT = [
    codes_are_stable,
    zero_is_kept,
    coding_is_monotone_and_nearest,
    coding_saturates,
    shapes_are_kept,
    tensors_survive,
    bytes_are_counted,
    blocks_are_demanded,
]
LEARNED = [values_must_be_fitted, tables_are_demanded]
