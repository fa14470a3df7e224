"""Coders and coded tensors: back to the last bit, near the entropy, like a decoder by definition, safe on any data."""

import math
from dataclasses import replace

import numpy as np
import pytest
import saved_form
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.numerics.coded_tensor import BY_COLUMN, BY_ROW, DENSE, RAW, CodedTensor
from fewbit.numerics.coding import Reader, Stream, number_bytes, registry

CODERS = registry.names()


def drawn(n: int, spread: float, seed: int = 0) -> np.ndarray:
    """Symbols 0 to 255 with rounded Gaussian numbers, as codes have them."""
    x = np.random.default_rng(seed).normal(size=n) * spread
    return (np.rint(x).astype(np.int64) % 256).astype(np.uint8)


def by(name: str, symbols: np.ndarray) -> Stream:
    """A stream of that coder; the alphabet begins at the least symbol."""
    first, last = int(symbols.min()), int(symbols.max())
    coder = registry.module(name)
    table, payload = coder.encode(symbols - np.uint8(first), np.bincount(symbols - np.uint8(first)))
    return Stream(len(symbols), first, last - first + 1, coder.MARK, table, payload)


def same(a: Tensor, b: Tensor) -> bool:
    """To the last bit: also the sign of zeros, and NaN."""
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def round_trip(x: Tensor) -> CodedTensor:
    coded = CodedTensor.encode(x)
    data = coded.to_bytes()
    assert same(CodedTensor.read(data, x.numel(), x.element_size()).decode(x.dtype, tuple(x.shape)), x)
    assert sum(coded.sizes().values()) == len(data)
    plain = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    left = list(data)
    assert saved_form.decode_tensor(left, x.numel(), x.element_size(), list(x.shape)) == plain
    assert not left
    return coded


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("n", [2, 3, 511, 512, 513, 1024, 2000])
def test_every_coder_is_exact_and_as_by_definition(name: str, n: int) -> None:
    symbols = drawn(n, 5.0, n)
    symbols[:2] = (250, 3)
    stream = by(name, symbols)
    data = stream.to_bytes()
    assert (Stream.read(Reader(data), n).decode() == symbols).all()
    assert saved_form.decode_stream(list(data), n) == symbols.tolist()


@pytest.mark.parametrize("name", CODERS)
def test_very_uneven_counts(name: str) -> None:
    """Fibonacci counts make the deepest Huffman tree; one symbol in many thousands the smallest share."""
    counts, symbols = [1, 1], []
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    for symbol, count in enumerate(counts):
        symbols += [3 * symbol] * count
    stream = by(name, np.array(symbols, np.uint8))
    assert (stream.decode() == symbols).all()
    assert saved_form.decode_stream(list(stream.to_bytes()), len(symbols)) == symbols


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 20.0])
def test_size_is_near_the_entropy(spread: float) -> None:
    symbols = drawn(50_000, spread)
    share = np.bincount(symbols) / len(symbols)
    bound = -(share[share > 0] * np.log2(share[share > 0])).sum() * len(symbols) / 8
    gallager = (share.max() + 0.086) * len(symbols) / 8  # Huffman codes never take more above the entropy
    for name, most in (("ans", 1.001 * bound), ("huffman", bound + gallager)):
        shifted = symbols + np.uint8(128)
        stream = by(name, shifted)
        size = len(stream.table) + len(stream.payload)
        assert bound < size < most + 260 + 2 * 100
        assert abs(size - registry.module(name).cost(np.bincount(shifted - shifted.min()))) < 16
    assert len(Stream.encode(symbols).to_bytes()) < 1.006 * bound + 300


def test_the_smallest_coder_is_taken() -> None:
    few, random = np.array([0, 1, 0, 0, 2, 0, 0, 0], np.uint8), drawn(5000, 1e6)
    found = [Stream.encode(x).mark for x in (few, random, drawn(5000, 2.0))]
    assert found == [registry.module(name).MARK for name in ("huffman", "plain", "ans")]
    assert Stream.encode(np.full(9, 7, np.uint8)).to_bytes() == bytes([7, 0])


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    dtype=st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.float16, torch.float32, torch.int64]),
    kept=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 99),
)  # fmt: skip
@example(shape=[40, 30], dtype=torch.float32, kept=0.05, seed=0)
@example(shape=[], dtype=torch.float32, kept=1.0, seed=0)
def test_every_tensor_comes_back(shape: list[int], dtype: torch.dtype, kept: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 9
    x = torch.where(torch.rand(shape, generator=generator) < kept, x, torch.zeros_like(x))
    round_trip(x.to(dtype))


def test_odd_floats_keep_their_bits() -> None:
    x = torch.zeros(30, 20)
    x[::7, 3] = torch.tensor([math.nan, -0.0, math.inf, 1e-45, -1.0])
    assert round_trip(x).form in (BY_ROW, BY_COLUMN)


def test_each_form_is_taken_where_it_is_smallest() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-128, 128, (64, 50), generator=generator).to(torch.int8)
    assert round_trip(noise).form == RAW
    assert round_trip(torch.randn(64, 50, generator=generator).mul(3).round().to(torch.int8)).form == DENSE
    rows, columns = torch.zeros(64, 50, dtype=torch.int8), torch.zeros(64, 50, dtype=torch.int8)
    alive = [0, 3, 4, 15, 29, 31, 46]
    rows[alive], columns[:, alive] = noise[alive], noise[:, alive]
    assert [round_trip(x).form for x in (rows, columns)] == [BY_ROW, BY_COLUMN]


def test_the_frequent_number_need_not_be_zero() -> None:
    x = torch.full((40, 40), 8, dtype=torch.uint8)
    x[::5, ::3] = 3
    assert round_trip(x).common == bytes([8])


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 5000])
def test_long_gaps(gap: int) -> None:
    x = torch.zeros(9000, dtype=torch.int8)
    x[gap] = 1
    x[gap + 1 : gap + 30] = torch.arange(29)
    assert round_trip(x).form == BY_ROW


@pytest.mark.parametrize("form", [BY_ROW, BY_COLUMN])
def test_gaps_beyond_the_tensor_are_refused(form: int) -> None:
    x = torch.zeros(40, 30)
    x[3, 5] = x[-1, -1] = 1.0
    data = replace(round_trip(x), form=form).to_bytes()
    with pytest.raises(FormatError, match="beyond the tensor"):
        CodedTensor.read(data, 39 * 30, 4).decode(torch.float32, (39, 30))


def test_sparse_weights_take_about_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 400, generator=generator) < 0.05
    x = torch.where(mask, torch.randint(1, 17, mask.shape, generator=generator), 0).to(torch.uint8)
    share = x.unique(return_counts=True)[1].double() / x.numel()
    bound = -float((share * share.log2()).sum()) * x.numel() / 8
    assert len(round_trip(x).to_bytes()) < 1.01 * bound + 120


@settings(max_examples=300)
@given(data=st.binary(max_size=60), n=st.integers(0, 3000), size=st.sampled_from([1, 2, 4]))
def test_noise_is_refused_or_a_tensor(data: bytes, n: int, size: int) -> None:
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.float32}[size]
    for shape in ((n,), (n, 1)):
        try:
            found = CodedTensor.read(data, n, size).decode(dtype, shape)
        except FormatError as error:
            assert "damaged" in str(error) or "expected" in str(error)
        else:
            assert found.shape == shape


@pytest.mark.parametrize("name", CODERS)
def test_damage_is_refused_or_gives_as_many_symbols(name: str) -> None:
    stream = by(name, drawn(1500, 3.0) + np.uint8(100))
    data = stream.to_bytes()
    generator = np.random.default_rng(0)
    for place in [*range(40), *generator.integers(0, len(data), 300).tolist()]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(generator.integers(8))
        try:
            assert len(Stream.read(Reader(bytes(damaged)), 1500).decode()) == 1500
        except FormatError as error:
            assert "damaged" in str(error) or "expected" in str(error)


def test_huffman_codes_end_where_their_512_symbols_do() -> None:
    stream = by("huffman", drawn(1400, 3.0) + np.uint8(100))
    words = np.frombuffer(stream.payload[:6], "<u2").copy()
    words[:2] += np.array([1, -1]).astype(np.uint16)  # the sum is as before
    moved = words.tobytes() + stream.payload[6:]
    with pytest.raises(FormatError, match="damaged"):
        registry.module("huffman").decode(stream.table, moved, stream.n)


def test_a_panic_of_the_library_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As Rust's: not an Exception."""

    def panic(share: np.ndarray) -> None:
        raise PanicException("out of range")

    stream = by("ans", drawn(50, 3.0) + np.uint8(100))
    monkeypatch.setattr(registry.module("ans"), "_model", panic)
    with pytest.raises(FormatError, match="damaged"):
        stream.decode()


@settings(max_examples=50)
@given(value=st.integers(0, 2**49 - 1))
def test_numbers(value: int) -> None:
    assert Reader(number_bytes(value)).number() == value == saved_form.number(list(number_bytes(value)))
    with pytest.raises(FormatError, match="49 bits"):
        Reader(bytes([255] * 9)).number()


def test_layout_stays_what_files_hold() -> None:
    """Golden bytes of each form and coder: a change of one is a new version of the file."""
    x = torch.zeros(4, 50, dtype=torch.int8)
    x[1, 3:9] = torch.tensor([1, -1, 1, 1, 2, 1])
    assert CodedTensor.encode(x).to_bytes().hex() == "030007060703040102012002e000ff030101022146"
    symbols = np.array([5, 6, 5, 5, 5, 8, 5, 5, 5, 6] * 3, np.uint8)
    found = {name: by(name, symbols).to_bytes().hex() for name in CODERS}
    assert found == {
        "ans": "05030208a0910089eb0d9e0cb646bf00",
        "huffman": "05030105212043121890c4",
        "plain": "0503001e" + 3 * "00010000000300000001",
    }
