"""Damaged and hostile .fewbit files: a clear error or the exact model, no crash, no memory that they do not pay for."""

import contextlib
import copy
import hashlib
import json
import os
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app
from fewbit.errors import ArtifactError, FormatError
from fewbit.evaluation.size import size_by_tensor
from fewbit.model.readers.torch import read
from fewbit.model.single_file import from_bytes, read_layout


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A quantized model in which every form of a tensor, and Huffman codes and ANS, occur."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 24), nn.Linear(24, 40), nn.Linear(40, 2))
    with torch.no_grad():
        net[0].weight[torch.rand(24, 30) < 0.8] = 0.0
        net[1].weight.copy_(1 - (torch.rand(40, 24) < 0.3) * 0.15 - (torch.rand(40, 24) < 0.05) * 0.5)
    path = tmp_path_factory.mktemp("good") / "m.fewbit"
    content = fewbit.save(fewbit.quantize(net, torch.randn(40, 30), weights="int4"), path).read_bytes()
    coded = [entry.read() for entry in read_layout(content).entries]
    assert {0, 1} < {each.form for each in coded} and {each.form for each in coded} & {2, 3}
    assert {1, 2} <= {s.mark for each in coded for s in (each.gaps, *each.planes)}
    return content


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The description and the bytes of the tensors."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    start, end = header["description"]["data_offsets"]
    data = content[8 + size :]
    return json.loads(zlib.decompress(data[start:end])), data[end : header["tensors"]["data_offsets"][1]]


def forged(description: Any, tensors: bytes, padding: int = 0, version: str = "1") -> bytes:
    """A file with a valid header and digest around anything; a description of bytes is taken as it is."""
    if not isinstance(description, bytes):
        description = zlib.compress(json.dumps(description, separators=(",", ":")).encode(), 9)
    sections = {"description": description, "tensors": tensors, "padding": bytes(padding)}
    data = b"".join(sections.values())
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"fewbit": version, "digest": digest}}
    at = 0
    for name, content in sections.items():
        if content:
            header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        fewbit.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message) < 600
    return message


def test_forging_is_what_saving_does(good: bytes) -> None:
    assert forged(*parts(good)) == good


def test_every_bit_of_every_byte_flipped(good: bytes, tmp_path: Path) -> None:
    for place in range(len(good)):
        for bit in range(8) if place < 300 else (0, 5):
            damaged = good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
            with pytest.raises(ArtifactError):
                read_layout(damaged)
        if place % 25 == 0:
            refused(tmp_path / "m.fewbit", damaged)


def test_every_length(good: bytes, tmp_path: Path) -> None:
    for length in range(len(good)):
        with pytest.raises(ArtifactError):
            read_layout(good[:length])
    for more in (b"\0", b" ", good):
        refused(tmp_path / "m.fewbit", good + more)
    refused(tmp_path / "m.fewbit", good[:-1])


def test_flipped_tensors_with_a_valid_digest(good: bytes, tmp_path: Path) -> None:
    """What a checksum cannot tell: an error that names the file, or a model with other numbers."""
    description, tensors = parts(good)
    packed = zlib.compress(json.dumps(description).encode())
    path = tmp_path / "m.fewbit"
    errors = 0
    for place in range(len(tensors)):
        damaged = tensors[:place] + bytes([tensors[place] ^ 1 << place % 8]) + tensors[place + 1 :]
        try:
            from_bytes(forged(packed, damaged))
        except (ArtifactError, FormatError):
            errors += 1
            if errors % 20 == 0:
                refused(path, forged(packed, damaged))
        else:
            if place % 25 == 0:
                path.write_bytes(forged(packed, damaged))
                with contextlib.suppress(ArtifactError):
                    assert isinstance(fewbit.load(path), nn.Module)
    assert len(tensors) // 5 < errors < len(tensors)


def _entry(description: dict[str, Any], end: str) -> list[Any]:
    return next(each for each in description["tensors"] if each[0].endswith(end))


def _weight(description: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = description["model"]["graph"]["layers"]["0"]["state"]["weight"]
    return found


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "huge tensor": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, [2**20, 2**20]), "numbers for each byte"),
    "huge size": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, [2**60]), "is no shape"),
    "negative size": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, [-24, -30]), "is no shape"),
    "size that is none": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, ["24", 30]), "is no shape"),
    "other shape": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, [30, 24]), "are none of int4"),
    "longer tensor": (lambda d: _entry(d, "0.weight:codes").__setitem__(2, [24, 31]), "damaged"),
    "more bytes": (lambda d: _entry(d, "0.weight:codes").__setitem__(3, 2**40), "is not in this file"),
    "negative bytes": (lambda d: _entry(d, "0.weight:codes").__setitem__(3, -1), "is not in this file"),
    "fewer bytes": (lambda d: d["tensors"][-1].__setitem__(3, d["tensors"][-1][3] - 1), "belong to no tensor"),
    "other dtype": (lambda d: _entry(d, "0.weight:codes").__setitem__(1, "uint8"), "are none of int4"),
    "dtype that is none": (lambda d: _entry(d, "0.weight:codes").__setitem__(1, "object"), "object"),
    "name twice": (lambda d: d["tensors"].append([d["tensors"][0][0], "int8", [0], 0]), "is not in this file"),
    "no tensors": (lambda d: d["tensors"].clear(), "KeyError"),
    "huge input": (lambda d: d["inputs"][0].__setitem__(1, [2**20, 2**10]), "numbers for each byte"),
    "input of no range": (lambda d: d["inputs"][0].__setitem__(2, "x"), "hostile"),
    "no model": (lambda d: d.pop("model"), "KeyError"),
    "list as a model": (lambda d: d.__setitem__("model", []), "hostile"),
    "other scheme": (lambda d: _weight(d)["scheme"].update(format="codebook4"), "hostile"),
    "codes of another weight": (
        lambda d: d["model"]["graph"]["layers"]["1"]["state"].update(
            weight=copy.deepcopy(_weight(d)) | {"parts": _weight(d)["parts"] | {"more": "0.bias"}}
        ), "its codes are those of another weight",
    ),
    "layer that is none": (lambda d: d["model"]["graph"]["layers"]["0"].update(type="Sequential"), "no standard layer"),
    "unknown target": (lambda d: d["model"].update(target="../../etc"), "unknown target"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_a_valid_digest_are_refused(lie: str, good: bytes, tmp_path: Path) -> None:
    description, tensors = parts(good)
    change, message = LIES[lie]
    change(description)
    assert message in refused(tmp_path / "m.fewbit", forged(description, tensors))


def test_tied_layers_pay_for_each_copy(tmp_path: Path) -> None:
    """A hundred layers with the same large weight, which takes hardly a byte: lowering them takes memory for each."""
    net = nn.Sequential(nn.Linear(300, 2000, bias=False))
    nn.init.zeros_(net[0].weight)
    path = fewbit.save(read(net, (torch.randn(2, 300),)), tmp_path / "m.fewbit")
    description, tensors = parts(path.read_bytes())
    layers = description["model"]["graph"]["layers"]
    layers |= {f"more{i}": layers["0"] for i in range(100)}
    assert "numbers for each byte" in refused(path, forged(description, tensors, padding=5000))


@pytest.mark.parametrize("text", [b"[" * 10**6, b"0" * (2**24 + 1), b"{" + b'"a":' * 10**5])
def test_bombs_in_the_description(text: bytes, tmp_path: Path) -> None:
    """zlib packs a thousand to one: what is inflated is bounded by the file's own size."""
    content = forged(zlib.compress(text, 9), b"\0")
    tracemalloc.start()
    start = time.perf_counter()
    refused(tmp_path / "m.fewbit", content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 256 * len(content)  # zlib's buffer doubles as it grows
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text", [b"[" * 10**6, b"nonsense", b"", b"NaN", b'{"tensors":{},"inputs":3,"model":{}}']
)
def test_descriptions_that_are_none(text: bytes, good: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "m.fewbit", forged(zlib.compress(text), b"\0", padding=10**5))
    refused(tmp_path / "m.fewbit", forged(text or b"\0", parts(good)[1]))
    with pytest.raises(ArtifactError):
        size_by_tensor(tmp_path / "m.fewbit")


def test_a_later_version_says_so(good: bytes, tmp_path: Path) -> None:
    message = refused(tmp_path / "m.fewbit", forged(*parts(good), version="2"))
    assert "version '2' found, at most 1 expected" in message


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"\xff" * 8, b"\xff" * 100, b"PK\3\4" * 20, (2**40).to_bytes(8, "little") + b"{}",
                (2).to_bytes(8, "little") + b"{}", (4).to_bytes(8, "little") + b"null",
                (26).to_bytes(8, "little") + b'{"__metadata__":"fewbit"} ' + bytes(99)],
)  # fmt: skip
def test_files_of_others(content: bytes, tmp_path: Path) -> None:
    assert "not a file that fewbit.save wrote" in refused(tmp_path / "m.fewbit", content)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.fewbit")
    with pytest.raises(ArtifactError, match="not an ordinary file"):
        fewbit.load(tmp_path / "pipe.fewbit")
    with pytest.raises(ArtifactError, match="left alone"):
        fewbit.save(read(nn.Sequential(nn.Linear(2, 2)), (torch.ones(1, 2),)), tmp_path / "pipe.fewbit")
    with pytest.raises(ArtifactError, match=r"does not exist"):
        size_by_tensor(tmp_path / "pipe.fewbit")
    with pytest.raises(ArtifactError, match="no such file"):
        fewbit.load(tmp_path / "nothing.fewbit")
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing.fewbit")]).exit_code == 1
