"""Entropy-coded codes: back to the last bit, near Shannon's bound, and safe to decode whatever a file holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.entropy_coding import entropy_decode, entropy_encode


def drawn(n: int, bits: int, spread: float, seed: int) -> Tensor:
    """Codes of rounded Gaussian numbers, as weights have them."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * spread * 2**bits + 2 ** (bits - 1)
    return x.round().clamp(0, 2**bits - 1).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 5000), bits=st.integers(1, 8), spread=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_code_comes_back(n: int, bits: int, spread: float, seed: int) -> None:
    codes = drawn(n, bits, spread, seed)
    assert torch.equal(entropy_decode(entropy_encode(codes), torch.uint8, n), codes)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float16, torch.bfloat16])
def test_every_type_of_codes_comes_back(dtype: torch.dtype) -> None:
    codes = (torch.randn(3, 700, 2, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    found = entropy_decode(entropy_encode(codes), dtype, codes.numel())
    assert found.dtype == dtype
    assert torch.equal(found.reshape(codes.shape), codes)
    with pytest.raises(FormatError, match=r"dtype torch\.float32"):
        entropy_encode(codes.float())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_size_is_near_the_entropy(bits: int) -> None:
    codes = drawn(200_000, bits, 0.15, 0)
    share = np.bincount(codes.numpy()) / len(codes)
    bound = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(codes) / 8
    size = entropy_encode(codes).numel()
    assert bound < size < 1.01 * bound + 4 * 400 + 2 * 2**bits + 16  # lanes' states and the table


def test_codes_without_a_pattern_cost_only_a_header() -> None:
    codes = torch.randint(0, 256, (9999,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert entropy_encode(codes).numel() == 9999 + 5


def test_layout_stays_what_files_hold() -> None:
    """Golden: one lane; shares 3/4 and 1/4 of 2**14; the state by Duda's formula C(s, x) by hand."""
    x = 1 << 16
    for symbol in (0, 0, 1, 0):
        share, start = ((12288, 0), (4096, 12288))[symbol]
        if x >> 18 >= share:
            pytest.fail("the example is to need no word")
        x = (x // share << 14) + x % share + start
    plane = np.concatenate(
        [np.array(v, t).reshape(-1).view(np.uint8) for v, t in (([1, 2, 12288, 4096], "<u2"), (x, "<u4"))]
    )
    codes = torch.tensor([0, 1, 0, 0], dtype=torch.uint8)
    frame = torch.from_numpy(np.concatenate([np.array([12, 0, 0, 0, 1], np.uint8), plane]))
    assert torch.equal(entropy_decode(frame, torch.uint8, 4), codes)
    assert torch.equal(entropy_encode(codes.repeat(50))[:13], torch.tensor(
        [len(frame) - 5 + 2 * 10, 0, 0, 0, 1, 1, 0, 2, 0, 0, 48, 0, 16], dtype=torch.uint8
    ))  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=80), n=st.integers(0, 2**40))
def test_noise_is_refused(data: bytes, n: int) -> None:
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    try:
        codes = entropy_decode(raw, torch.uint8, n)
    except FormatError as error:
        assert "damaged" in str(error)
    else:
        assert codes.numel() == n <= 256 * 80


@settings(max_examples=200, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), to=st.integers(0, 255), cut=st.booleans())
def test_damage_is_refused_or_harmless(at: float, to: int, cut: bool) -> None:
    codes = drawn(3000, 3, 0.15, 0)
    coded = entropy_encode(codes)
    place = int(at * len(coded))
    damaged = coded[:place].clone() if cut else coded.clone()
    if not cut:
        damaged[place] = to
    try:
        found = entropy_decode(damaged, torch.uint8, 3000)
    except FormatError as error:
        assert "damaged" in str(error)
    else:
        assert found.numel() == 3000
        assert not cut


@pytest.mark.parametrize("place", ["state", "behind"])
def test_what_does_not_end_where_it_began_is_refused(place: str) -> None:
    """The decoder's last states are the encoder's first: a checksum that costs nothing."""
    codes = drawn(3000, 3, 0.15, 0)
    coded = entropy_encode(codes)
    if place == "state":
        coded[5 + 4 + 2 * 8] ^= 1
    else:
        coded = torch.cat([coded, torch.ones(2, dtype=torch.uint8)])
        coded[:4] = torch.tensor([len(coded) - 5], dtype=torch.int32).view(torch.uint8)
    with pytest.raises(FormatError, match="damaged"):
        entropy_decode(coded, torch.uint8, 3000)


def test_a_small_file_cannot_ask_for_much_memory() -> None:
    zeros = torch.zeros(100_000, dtype=torch.uint8)
    coded = entropy_encode(zeros)
    assert 100_000 / 256 <= coded.numel() < 1200
    for n in (2**20, 2**40):
        with pytest.raises(FormatError, match="damaged"):
            entropy_decode(coded, torch.uint8, n)
