"""A decoder of .fewbit files in plain Python, written from docs/saved-form.md: slow, and ours has no part in it."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2,
          "int32": 4, "int64": 8}  # fmt: skip


def decode_file(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The description, and the little-endian bytes of each tensor, row-major."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    assert header["__metadata__"]["fewbit"] == "1"
    assert hashlib.blake2b(data, digest_size=16).hexdigest() == header["__metadata__"]["digest"]
    start, end = header["description"]["data_offsets"]
    description = json.loads(zlib.decompress(data[start:end]))
    at = end
    tensors = {}
    for name, dtype, shape, size in description["tensors"]:
        n = 1
        for each in shape:
            n *= each
        taken = list(data[at : at + size])
        tensors[name] = decode_tensor(taken, n, WIDTHS[dtype], shape)
        assert not taken, name
        at += size
    return description, tensors


def decode_tensor(data: list[int], n: int, w: int, shape: list[int]) -> bytes:
    """Takes a tensor from the front of the data."""
    form = data.pop(0)
    if form == 0:
        return bytes(take(data, n * w))
    if form == 1:
        planes = [decode_stream(data, n) for _ in range(w)]
        return bytes(planes[j][i] for i in range(n) for j in range(w))
    common = take(data, w)
    limit = data.pop(0)
    values, count = number(data), number(data)
    gaps = decode_stream(data, count)
    planes = [decode_stream(data, values) for _ in range(w)]
    numbers = [common] * n
    rows = shape[0] if shape else 1
    columns = n // rows
    place = met = 0
    for gap in gaps:
        place += gap
        if gap < limit:
            where = place if form == 2 else (place % rows) * columns + place // rows
            numbers[where] = [plane[met] for plane in planes]
            met += 1
            place += 1
    return bytes(byte for each in numbers for byte in each)


def decode_stream(data: list[int], n: int) -> list[int]:
    """Takes a stream of n symbols from the front of the data."""
    if n == 0:
        return []
    first, count = data.pop(0), data.pop(0) + 1
    if count == 1:
        return [first] * n
    coder, size = data.pop(0), number(data)
    table = take(data, {0: 0, 1: (count + 1) // 2, 2: count}[coder])
    found = (plain, huffman, ans)[coder](table, take(data, size), n)
    return [(first + index) % 256 for index in found]


def plain(table: list[int], payload: list[int], n: int) -> list[int]:
    return payload


def huffman(table: list[int], payload: list[int], n: int) -> list[int]:
    lengths = [half for byte in table for half in (byte % 16, byte // 16)]
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, i) for i, length in enumerate(lengths) if length):
        code *= 2 ** (length - before)
        codes[length, code] = symbol
        code, before = code + 1, length
    if n > 512:
        payload = payload[2 * -(-n // 512) :]
    bits = [(byte >> (7 - k)) & 1 for byte in payload for k in range(8)]
    out: list[int] = []
    length = code = 0
    for bit in bits:
        length, code = length + 1, code * 2 + bit
        if (length, code) in codes and len(out) < n:
            out.append(codes[length, code])
            length = code = 0
    return out


def ans(table: list[int], payload: list[int], n: int) -> list[int]:
    words = [int.from_bytes(bytes(payload[i : i + 4]), "little") for i in range(0, len(payload), 4)]
    weights = [(8 + b % 8) * 2 ** (b // 8) if b else 0 for b in table]
    free = 2**24 - sum(weight > 0 for weight in weights)
    shares = [1 + weight * free // sum(weights) if weight else 0 for weight in weights]
    shares[weights.index(max(weights))] += 2**24 - sum(shares)
    state = 0
    for _ in range(min(2, len(words))):
        state = state * 2**32 + words.pop()
    out = []
    for _ in range(n):
        q, start, symbol = state % 2**24, 0, 0
        while q >= start + shares[symbol]:
            start += shares[symbol]
            symbol += 1
        out.append(symbol)
        state = state // 2**24 * shares[symbol] + q - start
        if state < 2**32 and words:
            state = state * 2**32 + words.pop()
    assert state == 0
    assert not words
    return out


def number(data: list[int]) -> int:
    """Takes a LEB128 number from the front of the data."""
    value = shift = 0
    while True:
        byte = data.pop(0)
        value += (byte % 128) << shift
        shift += 7
        if byte < 128:
            return value


def take(data: list[int], size: int) -> list[int]:
    taken, data[:] = data[:size], data[size:]
    assert len(taken) == size
    return taken
