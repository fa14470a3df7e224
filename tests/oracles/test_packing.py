"""Dense packing against Python integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewbit.errors import FormatError
from fewbit.numerics import format_names, get_format, packing
from fewbit.numerics.packing import pack, packed_size, unpack


@st.composite
def streams(draw):
    bits, signed = draw(st.integers(1, 16)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return bits, signed, draw(st.lists(st.integers(low, high), max_size=50))


@given(streams())
def test_the_stream_is_one_large_number(stream):
    """Code i is worth 2**(i * bits); the bytes are that number's, the lowest first."""
    bits, signed, codes = stream
    number = sum((code % 2**bits) << (i * bits) for i, code in enumerate(codes))
    expected = number.to_bytes(packed_size(len(codes), bits), "little")
    data = pack(torch.tensor(codes, dtype=torch.int32), bits)
    assert data.dtype == torch.uint8
    assert bytes(data.tolist()) == expected
    assert unpack(data, bits, signed, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 11, 16])
def test_chunks_do_not_show(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (1000,), dtype=torch.int32)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 64)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, False, 1000), codes)


def test_by_hand():
    assert pack(torch.tensor([1, 2, 3, 4]), 4).tolist() == [0x21, 0x43]
    assert pack(torch.tensor([-1, 7], dtype=torch.int8), 4).tolist() == [0x7F]
    assert pack(torch.tensor([[1, 0], [1, 1]]), 1).tolist() == [0b1101]
    assert pack(torch.tensor([5, 6, 7]), 3).tolist() == [0b11110101, 0b1]
    assert pack(torch.tensor([-32768], dtype=torch.int16), 16).tolist() == [0x00, 0x80]


def test_bad_input_is_refused():
    with pytest.raises(FormatError, match="codes from 0 to 16 do not fit 4 bits"):
        pack(torch.tensor([0, 16]), 4)
    with pytest.raises(FormatError, match="codes from -9 to 0 do not fit 4 bits"):
        pack(torch.tensor([0, -9]), 4)
    with pytest.raises(FormatError, match=r"dtype torch\.float32 cannot be packed"):
        pack(torch.zeros(3), 4)
    with pytest.raises(FormatError, match="codes of 17 bits cannot be packed: expected 1 to 16"):
        pack(torch.zeros(3, dtype=torch.int32), 17)
    with pytest.raises(FormatError, match="3 bytes are too short for 7 codes of 4 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, False, 7)
    with pytest.raises(FormatError, match="too short for -1 codes"):
        unpack(torch.zeros(3, dtype=torch.uint8), 4, False, -1)


@given(
    name=st.sampled_from(format_names()),
    shape=st.lists(st.integers(0, 7), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_codes_of_any_format_and_shape_survive(name, shape, seed):
    """Formats whose codes are integers; others are floats of torch, which are stored as they are."""
    spec = get_format(name)
    if spec.code_dtype.is_floating_point:
        return
    codes = spec.codes()
    place = torch.randint(0, len(codes), shape, generator=torch.Generator().manual_seed(seed))
    chosen = codes[place]
    data = pack(chosen, spec.bits)
    assert data.numel() == packed_size(chosen.numel(), spec.bits)
    signed = spec.integer and spec.qmin < 0
    again = unpack(data, spec.bits, signed, chosen.numel()).reshape(shape).to(spec.code_dtype)
    assert torch.equal(again, chosen)
