"""A .fewbit file read by a decoder that was written from its document alone, and by the safetensors library."""

from pathlib import Path

import pytest
import saved_form
import torch
from safetensors import safe_open
from torch import nn

import fewbit
from fewbit.model.readers.torch import read
from fewbit.model.serialize import describe


def pruned_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    with torch.no_grad():
        weight = net[0].weight
        weight.copy_(torch.where(torch.rand(30, 40) < 0.1, weight, torch.zeros(())))
    return net


def bits(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("weights", ["codebook4_shared", "int8", "float16", "ternary"])
def test_weights_of_a_file_by_definition(weights: str, tmp_path: Path) -> None:
    x = torch.randn(8, 40)
    q = fewbit.quantize(pruned_net(), example=x, weights=weights, activations="float")
    description, tensors = saved_form.decode_file(fewbit.save(q, tmp_path / "m.fewbit"))
    for site in ("0.weight", "2.weight"):
        found = q.qtensors[site]
        assert tensors[f"{site}:codes"] == bits(found.codes)
        assert tensors[f"{site}:scale"] == bits(found.scale)
        table = tensors.get(f"{site}:codebook")
        if table is not None:
            values = torch.frombuffer(bytearray(table), dtype=torch.float16).float()
            codes = torch.frombuffer(bytearray(tensors[f"{site}:codes"]), dtype=torch.uint8)
            value = values[codes.long()].reshape(found.shape) * found.scale.reshape(-1, 1)
            assert torch.equal(value, q.graph.get_parameter(site))
    assert tensors["0.bias"] == bits(q.graph.get_parameter("0.bias"))
    assert description["inputs"] == [["float32", [8, 40], float(x.min()), float(x.max())]]


def test_a_float_graph_by_definition(tmp_path: Path) -> None:
    gm = read(pruned_net(), (torch.randn(8, 40),))
    path = fewbit.save(gm, tmp_path / "m.fewbit")
    description, tensors = saved_form.decode_file(path)
    model, expected, _ = describe(gm)
    assert description["model"] == model
    assert tensors == {name: bits(x) for name, x in expected.items()}
    assert path.stat().st_size < 30 * 40 * 4 * 0.3 + 30 * 5 * 4 + 35 * 4 + 1200


def test_safetensors_opens_the_file(tmp_path: Path) -> None:
    path = fewbit.save(read(pruned_net(), (torch.randn(8, 40),)), tmp_path / "m.fewbit")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"description", "tensors"}
        assert file.metadata()["fewbit"] == "1"
        assert file.get_tensor("tensors").dtype == torch.uint8
