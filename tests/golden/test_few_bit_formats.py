"""Formats of at most 8 bits that are no integers: ml_dtypes' casts, published constants, values worked out by hand."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.numerics import QTensor, Scheme, format_names, get_format, qparams

TWINS = {
    "float8_e4m3": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float6_e2m3": ml_dtypes.float6_e2m3fn,
    "float6_e3m2": ml_dtypes.float6_e3m2fn,
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
}
TABLES = [n for n in format_names() if not get_format(n).integer and get_format(n).code_dtype == torch.uint8]
TABLES = [name for name in TABLES if not get_format(name).learned]


def values(name):
    fmt = get_format(name)
    return fmt.decode(fmt.codes()).tolist()


def patterns(x: np.ndarray, name: str) -> np.ndarray:
    """Bit patterns by ml_dtypes: saturated before the cast, which has other rules there; minus zero as zero."""
    fmt = get_format(name)
    cast = np.clip(x, fmt.qmin, fmt.qmax).astype(TWINS[name])
    return np.where(cast == 0, 0, cast.view(np.uint8))


@pytest.mark.parametrize("name", TWINS)
def test_every_pattern_has_ml_dtypes_value(name):
    fmt = get_format(name)
    assert fmt.bits == ml_dtypes.finfo(TWINS[name]).bits
    assert fmt.qmax == float(ml_dtypes.finfo(TWINS[name]).max)
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = codes.view(TWINS[name]).astype(np.float32)
    given = np.isfinite(expected) & ~((expected == 0) & np.signbit(expected))
    assert np.array_equal(fmt.decode(torch.from_numpy(codes[given])).numpy(), expected[given])
    assert sorted(fmt.codes().tolist()) == codes[given].tolist()
    assert bool(fmt.decode(torch.from_numpy(codes[~given])).isnan().all())


@pytest.mark.parametrize("name", TWINS)
def test_neighbourhoods_of_levels_and_middles_are_cast_as_ml_dtypes_does(name):
    levels = np.array(values(name), dtype=np.float32)
    some = np.concatenate(
        (levels, (levels[1:] + levels[:-1]) / 2, 1.25 * levels, [1e-45, -1e-45, 3e38])
    ).astype(np.float32)
    x = np.concatenate(
        (some, np.nextafter(some, np.float32(np.inf)), np.nextafter(some, np.float32(-np.inf)))
    )
    assert np.array_equal(get_format(name).encode(torch.from_numpy(x)).numpy(), patterns(x, name))


@pytest.mark.parametrize("name", TWINS)
def test_random_floats_are_cast_as_ml_dtypes_does(name):
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    near = torch.randn(100_000, generator=torch.Generator().manual_seed(1)) * get_format(name).qmax / 2
    x = torch.cat((bits.to(torch.int32).view(torch.float32), near))
    x = x[x.isfinite()]
    assert np.array_equal(get_format(name).encode(x).numpy(), patterns(x.numpy(), name))


def test_scaled_float8_is_scale_then_cast():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    q = QTensor.quantize(x, Scheme("float8_e4m3", "channel"))
    assert torch.equal(q.scale, x.abs().amax(dim=1) / 448)
    assert np.array_equal(q.codes.numpy(), patterns((x / q.scale[:, None]).numpy(), "float8_e4m3"))


@pytest.mark.parametrize("name", TABLES)
def test_ties_go_to_the_even_code(name):
    fmt = get_format(name)
    codes, levels = fmt.codes(), fmt.decode(fmt.codes())
    middles = (levels[1:].double() + levels[:-1].double()) / 2
    exact = middles == middles.float()
    expected = torch.where(codes[1:] % 2 == 0, codes[1:], codes[:-1])
    assert torch.equal(fmt.encode(middles.float())[exact], expected[exact])
    assert bool((codes[1:] % 2 != codes[:-1] % 2).all())


# Of the published implementation (Dettmers et al., bitsandbytes), to its own precision.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_nf4_has_the_published_values():
    assert values("nf4") == pytest.approx(NF4, abs=3e-7)
    assert get_format("nf4").codes().tolist() == list(range(16))


def test_signs_and_three_values():
    x = torch.tensor([-3.0, -0.4, -0.0, 0.0, 0.4, 3.0])
    binary = QTensor.quantize(x, Scheme("binary"), torch.tensor(-2.0), torch.tensor(2.0))
    assert binary.dequantize().tolist() == [-2, -2, 2, 2, 2, 2]
    assert binary.codes.tolist() == [1, 1, 0, 0, 0, 0]
    assert QTensor.quantize(x, Scheme("binary_sign")).dequantize().tolist() == [-1, -1, 1, 1, 1, 1]
    ternary = QTensor.quantize(x, Scheme("ternary"), torch.tensor(-1.0), torch.tensor(1.0))
    assert ternary.codes.tolist() == [-1, 0, 0, 0, 0, 1]
    fixed = QTensor.quantize(x, Scheme("ternary_fixed", "channel"))
    assert fixed.dequantize().tolist() == [-1, 0, 0, 0, 0, 1]
    assert (fixed.nbytes, binary.nbytes) == (2, 1 + 4)


def test_a_dead_block_of_signs_is_next_to_nothing():
    q = QTensor.quantize(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), Scheme("binary", "channel"))
    assert q.dequantize().tolist() == [[2.0**-126, 2.0**-126], [1.0, -1.0]]


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("pow2_2", [0, 1]),
        ("pow2_3", [0, 1 / 4, 1 / 2, 1]),
        ("pow2_4", [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("exp_3", [0, 1 / 2, 0.5**0.5, 1]),
        # Equation 5 of arXiv 1909.13144 times its largest value; bit widths of both parities.
        ("apot_2", [0, 1 / 2]),
        ("apot_3", [0, 1 / 8, 1 / 4, 1 / 2]),
        ("apot_4", [0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8]),
        ("apot_5", sorted(a + b for a in (0, 1 / 2, 1 / 8, 1 / 32) for b in (0, 1 / 4, 1 / 16, 1 / 64))),
        (
            "apot_6",
            sorted(
                a + b + c
                for a in (0, 1 / 2, 1 / 8, 1 / 64)
                for b in (0, 1 / 4, 1 / 16, 1 / 128)
                for c in (0, 1 / 32)
            ),
        ),
        (
            "apot_7",
            sorted(
                a + b + c
                for a in (0, 1 / 2, 1 / 16, 1 / 128)
                for b in (0, 1 / 4, 1 / 32, 1 / 256)
                for c in (0, 1 / 8, 1 / 64, 1 / 512)
            ),
        ),
    ],
)
def test_levels_in_ratios(name, magnitudes):
    fmt = get_format(name)
    half = 2 ** (fmt.bits - 1)
    assert fmt.decode(torch.arange(half, dtype=torch.uint8)).tolist() == torch.tensor(magnitudes).tolist()
    assert values(name) == torch.tensor([-m for m in magnitudes[:0:-1]] + magnitudes).tolist()
    assert fmt.encode(torch.tensor([-9.0, 9.0])).tolist() == [2 * half - 1, half - 1]


@pytest.mark.parametrize("bits", range(2, 9))
def test_power_of_two_levels_are_as_many_as_codes_but_one(bits):
    for kind in ("pow2", "exp", "apot"):
        assert len(get_format(f"{kind}_{bits}").codes()) == 2**bits - 1


# Element format, its largest exponent and largest number, from table 1 of the OCP specification 1.0.
MX = [
    ("mxfp8_e4m3", "float8_e4m3", 8, 448.0),
    ("mxfp8_e5m2", "float8_e5m2", 15, 57344.0),
    ("mxfp6_e2m3", "float6_e2m3", 2, 7.5),
    ("mxfp6_e3m2", "float6_e3m2", 4, 28.0),
    ("mxfp4", "float4_e2m1", 2, 6.0),
    ("mxint8", None, 0, 127 / 64),
]


@pytest.mark.parametrize(("name", "element", "exponent", "largest"), MX)
def test_microscaling_by_definition(name, element, exponent, largest):
    """Section 6.3 of the specification, in float64, one block at a time."""
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-9, 9, 64)
    x[1, 0, :32] = 0
    q = QTensor.quantize(x, Scheme(name, "group", group_size=32))
    assert q.scheme.qmax == largest
    rows, found = x.reshape(-1, 32).double(), q.dequantize().reshape(-1, 32)
    for row, block, scale in zip(rows, found, q.scale, strict=True):
        shared = float(row.abs().max())
        power = 2.0 ** (np.floor(np.log2(shared)) - exponent) if shared else 1.0
        assert scale.item() == power
        if element:
            expected = (
                np.clip((row / power).numpy(), -largest, largest).astype(TWINS[element]).astype(np.float32)
            )
        else:
            expected = np.clip(np.round((row / power).numpy() * 64), -128, 127) / 64
        assert block.tolist() == (expected.astype(np.float64) * power).tolist()


def test_nvfp4_by_definition():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)) * torch.logspace(0, 3, 8).unsqueeze(1)
    x[2, 16:32] = 0
    x[3, :16] *= 1e-9
    q = QTensor.quantize(x, Scheme("nvfp4", "group", group_size=16))
    shared = (x.abs().max().double() / (448 * 6)).float()
    rows = x.reshape(-1, 16)
    eighths = (rows.abs().amax(1).double() / 6 / shared.double()).float().numpy()
    eighths = eighths.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert eighths.max() == 448
    eighths[12] = 2.0**-9  # of a block so small that its scale would be zero
    expected = torch.from_numpy(eighths) * shared
    expected[9] = 1  # a block of zeros
    assert torch.equal(q.scale, expected)
    cast = (rows / expected[:, None]).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert torch.equal(q.dequantize().reshape(-1, 16), torch.from_numpy(cast) * expected[:, None])
    assert q.nbytes == 8 * 64 // 2 + 32 + 4


def test_codes_that_have_no_value_are_refused():
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for name, code in (
        ("float8_e4m3", 0x7F),
        ("float8_e5m2", 0x7C),
        ("float4_e2m1", 8),
        ("nf4", 16),
        ("binary", 2),
    ):
        with pytest.raises(
            FormatError, match=f"codes hold some that {name} gives no value: the file is damaged"
        ):
            QTensor.from_codes(torch.tensor([0, code]), one, zero, Scheme(name))


@settings(max_examples=100)
@given(span=st.floats(0, 2.0**126, width=32), bits=st.integers(1, 8))
def test_scales_of_codebooks_are_the_least_power_of_two_that_holds_them(span, bits):
    bound = torch.tensor([span], dtype=torch.float64)
    scale = qparams(-bound, bound, Scheme(f"codebook{bits}"))[0].item()
    assert np.frexp(scale)[0] == 0.5
    assert span <= scale or span == 0
    assert scale / 2 < span or scale == 2.0**-126 or span == 0
