"""Quantized weights in saved folders: entropy-coded where that is smaller, older versions readable, lies refused."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app
from fewbit.errors import ArtifactError
from fewbit.evaluation.size import size_by_tensor
from fewbit.model.packed import pack_weight, unpack_weight
from fewbit.numerics.packing import pack
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.storage import MODEL, WEIGHTS


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def saved(folder: Path, weights: str, **settings: Any) -> Path:
    model = nn.Sequential(nn.Linear(256, 64))
    with torch.no_grad():
        model[0].weight.copy_(normal(64, 256))
    q = fewbit.quantize(model, example=normal(4, 256), weights=weights, activations="float", **settings)
    return fewbit.save(q, folder)


def rewritten(
    folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None], version: int = 2
) -> None:
    """The folder with its description and tensors changed, and checksums that fit."""
    header = json.loads((folder / MODEL).read_text())
    tensors = load_file(folder / WEIGHTS)
    change(header["model"]["graph"]["layers"]["0"]["state"]["weight"], tensors)
    weights = to_bytes(tensors)
    text = json.dumps(header["model"], sort_keys=True, separators=(",", ":"))
    header |= {"weights": hashlib.sha256(weights).hexdigest(), "fewbit_model": version}
    header["model_digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / WEIGHTS).write_bytes(weights)
    (folder / MODEL).write_text(json.dumps(header))


@pytest.mark.parametrize("weights", ["int8", "int4", "float8_e4m3", "bfloat16", "int12", "nf4"])
def test_codes_take_about_their_entropy(weights: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", weights)
    q = fewbit.load(folder).qtensors["0.weight"]  # type: ignore[union-attr]
    part = next(t for t in size_by_tensor(folder).tensors if t.name == "0.weight:entropy_codes")
    assert part.dense == math.ceil(q.codes.numel() * q.scheme.spec.bits / 8)
    planes = q.codes.contiguous().view(torch.uint8).reshape(-1, q.codes.element_size())
    entropy = 0.0
    for plane in planes.T:
        share = plane.unique(return_counts=True)[1].double() / len(plane)
        entropy -= float((share * share.log2()).sum()) * len(plane) / 8
    assert entropy < part.nbytes < 1.02 * entropy + 2 * (600 + 4 * 32)
    assert part.nbytes < part.dense


def test_sizes_are_told_with_and_without_entropy_coding(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "int8")
    sizes = size_by_tensor(folder)
    part = next(t for t in sizes.tensors if t.dense is not None)
    assert f"{part.dense:,} before entropy coding" in str(sizes)
    total = f"{sizes.total + part.dense - part.nbytes:,} before entropy coding"
    assert total in str(sizes).splitlines()[-1]
    shown = CliRunner().invoke(app, ["inspect", str(folder)])
    assert shown.exit_code == 0 and total in shown.output
    described = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output)
    assert described["size"]["total"] == sizes.total


def test_few_scales_are_stored_as_bytes(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path / "m", "mxfp4") / WEIGHTS)
    blocks = 64 * 256 // 32
    stored = sum(t.nbytes for name, t in tensors.items() if ":scale" in name)
    assert "0.weight:zero_point" not in tensors and stored < blocks
    assert load_file(saved(tmp_path / "n", "nf4") / WEIGHTS)["0.weight:scale"].dtype == torch.float32


@pytest.mark.parametrize("exact", [True, False])
def test_a_codebook_is_stored_in_half_where_that_is_exact(exact: bool) -> None:
    scheme = Scheme("codebook2", "channel")
    table = torch.tensor([[-1.0, 0.0, 0.25, 1.0]]) if exact else torch.tensor([[-1.0, 0.0, 0.3, 1.0]])
    codes = torch.randint(0, 4, (3, 50), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    zeros = torch.zeros(3, dtype=torch.int32)
    q = QTensor.from_codes(codes, torch.tensor([1.0, 2.0, 0.5]), zeros, scheme, table)
    parts = pack_weight(q)
    assert parts["codebook"].dtype == (torch.float16 if exact else torch.float32)
    again = unpack_weight("w", parts, scheme, (3, 50))
    assert torch.equal(again.dequantize(), q.dequantize()) and torch.equal(again.codes, q.codes)


@pytest.mark.parametrize("weights", ["int4", "uint12", "bfloat16"])
def test_folders_of_version_1_are_read(weights: str, tmp_path: Path) -> None:
    settings = {"weight_symmetric": False} if weights == "uint12" else {}
    folder = saved(tmp_path / "m", weights, **settings)
    model, x = fewbit.load(folder), normal(5, 256)
    q = model.qtensors["0.weight"]  # type: ignore[union-attr]

    def old(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("0.weight:")]:
            del tensors[key]
        del entry["parts"]
        entry |= {"tensor": "w:codes", "scale": "w:scale", "zero_point": "w:zero", "parameter": True}
        flat = q.codes.reshape(-1)
        dense = flat.view(torch.uint8) if weights == "bfloat16" else pack(flat, q.scheme.spec.bits)
        tensors |= {"w:codes": dense.clone(), "w:scale": q.scale, "w:zero": q.zero_point}

    rewritten(folder, old, version=1)
    assert torch.equal(fewbit.load(folder)(x), model(x))


def test_later_versions_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "int4")
    rewritten(folder, lambda entry, tensors: None, version=3)
    with pytest.raises(ArtifactError, match="version 3 found, at most 2 expected"):
        fewbit.load(folder)


def put(part: str, value: Tensor) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        entry["parts"][part] = "0.weight:lie"
        tensors["0.weight:lie"] = value

    return change


def drop(part: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda entry, tensors: entry["parts"].pop(part)


def told(**values: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda entry, tensors: entry.update(values)


def lasting(codes: str, at: int) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """The entropy-coded bytes with one of them changed."""

    def change(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"0.weight:{codes}"][at] ^= 255

    return change


NAN, BYTES = float("nan"), torch.zeros(8, dtype=torch.uint8)
LIES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], None]]] = {
    "codebook with NaN": ("codebook3", put("codebook", torch.full((64, 8), NAN))),
    "codebook of another width": ("codebook3", put("codebook", torch.zeros(64, 4))),
    "codebook of too many tables": ("codebook3", put("codebook", torch.zeros(65, 8))),
    "no codebook": ("codebook3", drop("codebook")),
    "a codebook too many": ("nf4", put("codebook", torch.zeros(64, 16))),
    "codes cut off": ("nf4", put("entropy_codes", torch.zeros(20, dtype=torch.uint8))),
    "codes of another type": ("nf4", put("entropy_codes", torch.zeros(20))),
    "no codes": ("nf4", drop("entropy_codes")),
    "another share": ("nf4", lasting("entropy_codes", 10)),
    "another length": ("nf4", lasting("entropy_codes", 0)),
    "a kind that is none": ("nf4", lasting("entropy_codes", 4)),
    "huge shape": ("nf4", told(shape=[2**20, 2**19])),
    "shape of another layer": ("nf4", told(shape=[256, 64])),
    "shape that is none": ("nf4", told(shape=[64, "256"])),
    "scale index beyond the scales": ("mxfp4", put("scale_values", torch.ones(1))),
    "no scales": ("mxfp4", put("scale_values", torch.ones(0))),
    "negative scale": ("nf4", put("scale", -torch.ones(64))),
    "too few scales": ("nf4", put("scale", torch.ones(3))),
    "codes that have no value": ("float8_e4m3", put("entropy_codes", torch.zeros(1, dtype=torch.uint8))),
    "parts that are no table": ("nf4", told(parts=["codes"])),
    "a part that is not there": ("nf4", told(parts={"codes": "x", "scale": "y"})),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_weights_are_refused(lie: str, tmp_path: Path) -> None:
    weights, change = LIES[lie]
    folder = saved(tmp_path / "m", weights)
    rewritten(folder, change)
    with pytest.raises(ArtifactError, match=r"model\.json") as caught:
        fewbit.load(folder)
    assert "checksum" not in str(caught.value) and len(str(caught.value)) < 400


def test_codes_without_a_value_are_refused(tmp_path: Path) -> None:
    """0x7f is NaN in float8_e4m3."""
    folder = saved(tmp_path / "m", "float8_e4m3")

    def change(entry: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        entry["parts"] = {"codes": "lie", "scale": entry["parts"]["scale"]}
        tensors["lie"] = torch.full((64 * 256,), 0x7F, dtype=torch.uint8)

    rewritten(folder, change)
    with pytest.raises(ArtifactError, match="some that float8_e4m3 gives no value"):
        fewbit.load(folder)
