"""What every number format promises. Each function takes a format and fails if a promise is broken."""

import torch

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
    """Zero is a value of the format, whatever its sign bit."""
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


def tensors_survive(fmt: Format) -> None:
    """A quantized tensor dequantizes to what is simulated, and quantizing that again changes nothing."""
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(2))
    for fields in ({}, {"granularity": "channel", "axis": 1}, {"granularity": "group", "group_size": 16}):
        scheme = Scheme(fmt.name, **fields)
        q = QTensor.quantize(x, scheme)
        values = q.dequantize()
        assert values.shape == x.shape
        assert torch.equal(values, fake_quantize(x, q.scale, q.zero_point, scheme))
        assert torch.equal(values, fake_quantize(values, q.scale, q.zero_point, scheme))
        assert float((values - x).norm() / x.norm()) < 0.8


CONTRACT = [
    codes_are_stable,
    zero_is_kept,
    coding_is_monotone_and_nearest,
    coding_saturates,
    shapes_are_kept,
    tensors_survive,
]
