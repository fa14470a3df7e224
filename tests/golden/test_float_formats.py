"""float16 and bfloat16: values worked out by hand from their definition, and NumPy's float16 beside them."""

import numpy as np
import pytest
import torch

from fewbit.errors import FormatError
from fewbit.numerics import QTensor, Scheme, get_format
from fewbit.numerics.qtensor import encode

ONE = 1 + 2.0**-11  # halfway between 1 and the next float16
LEAST = 2.0**-24  # the smallest float16 above zero


@pytest.mark.parametrize(
    ("name", "value", "coded"),
    [
        ("float16", ONE, 1.0),  # a tie goes to the even mantissa: down here ...
        ("float16", 1 + 3 * 2.0**-11, 1 + 2 * 2.0**-10),  # ... and up here
        ("float16", float(np.nextafter(np.float32(ONE), np.float32(2))), 1 + 2.0**-10),
        ("float16", 2049.0, 2048.0),
        ("float16", 2051.0, 2052.0),
        ("float16", 65504.0, 65504.0),
        ("float16", LEAST, LEAST),
        ("float16", 1.5 * LEAST, 2 * LEAST),
        ("float16", 0.5 * LEAST, 0.0),
        ("float16", -0.5 * LEAST, 0.0),
        ("float16", 0.51 * LEAST, LEAST),
        ("float16", 2.0**-14 - LEAST, 2.0**-14 - LEAST),  # the largest subnormal number
        ("float16", 1e9, 65504.0),
        ("float16", -float("inf"), -65504.0),
        ("bfloat16", 1 + 2.0**-8, 1.0),
        ("bfloat16", 1 + 3 * 2.0**-8, 1 + 2.0**-6),
        ("bfloat16", 1e9, 238 * 2.0**22),
        ("bfloat16", 2.0**-133, 2.0**-133),
        ("bfloat16", float("inf"), (2 - 2.0**-7) * 2.0**127),
    ],
)
def test_ties_subnormals_and_ends(name, value, coded):
    fmt = get_format(name)
    v = torch.tensor([value], dtype=torch.float32)
    assert fmt.decode(fmt.encode(v)).item() == coded
    assert fmt.nearest(v).item() == coded
    assert not (coded == 0 and fmt.encode(v).signbit().item())


def test_every_bit_pattern_has_its_value():
    codes = get_format("float16").codes()
    patterns = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = np.unique(patterns[np.isfinite(patterns)].astype(np.float32))
    assert np.array_equal(get_format("float16").decode(codes).numpy(), finite)
    assert len(codes) == 2 * 31 * 1024 - 1
    assert len(get_format("bfloat16").codes()) == 2 * 255 * 128 - 1


def test_random_numbers_are_rounded_as_numpy_does():
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    x = x[x.abs() <= 65504]
    assert len(x) > 50_000
    expected = x.numpy().astype(np.float16)
    got = get_format("float16").encode(x).numpy()
    assert np.array_equal(got, expected)
    assert got.dtype == np.float16


def test_a_tensor_has_no_scale_and_two_bytes_a_number():
    x = torch.tensor([[1e-3, 1.0], [-300.0, 65504.0]])
    for fields in ({}, {"granularity": "channel"}):
        q = QTensor.quantize(x, Scheme("float16", **fields))
        assert bool((q.scale == 1).all())
        assert torch.equal(q.dequantize(), x.half().float())
        assert q.nbytes == 8


def test_what_does_not_fit_is_refused_with_its_place():
    x = torch.tensor([[1.0, 2.0], [-70000.0, 3.0]])
    with pytest.raises(FormatError, match=r"-70000 at index \(1, 0\) is beyond float16, which has no scale"):
        QTensor.quantize(x, Scheme("float16"))
    assert torch.equal(QTensor.quantize(x, Scheme("bfloat16")).dequantize(), x.bfloat16().float())
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(FormatError, match="infinities or NaN: float16 has finite numbers only"):
        QTensor.from_codes(torch.tensor([float("inf")]).half(), one, zero, Scheme("float16"))
    with pytest.raises(FormatError, match="NaN at index"):
        encode(torch.tensor([float("nan")]), one, zero, Scheme("float16"))
    with pytest.raises(FormatError, match="format 'float16' has no zero point"):
        Scheme("float16", symmetric=False)
