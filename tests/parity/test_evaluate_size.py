"""Bytes by tensor of modules, safetensors and ONNX files, and of files that are none of those."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from fewbit.errors import ArtifactError
from fewbit.evaluation.size import size_by_tensor


def test_a_module_counts_shared_tensors_once_and_each_dtype_by_its_width() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    net[2].half()
    sizes = size_by_tensor(net)
    found = {each.name: each.nbytes for each in sizes.tensors}
    assert found == {
        "0.weight": 64,
        "0.bias": 16,
        "2.weight": 8,
        "2.bias": 8,
        "2.running_mean": 8,
        "2.running_var": 8,
        "2.num_batches_tracked": 8,
    }
    assert sizes.total == 120 and sizes.file is None and sizes.tensors[0].name == "0.weight"
    assert json.loads(json.dumps(sizes.to_json()))["tensors"][0]["shape"] == [4, 4]
    assert "total" in str(sizes).splitlines()[-1] and "120 bytes" in str(sizes)


def test_a_quantized_model_counts_its_codes_instead_of_the_simulations_floats() -> None:
    class Codes(dict[str, Any]):
        names = dict.keys

    model = nn.Module()
    model.graph = nn.Sequential(nn.Linear(10, 6))
    scheme = type("Scheme", (), {"format": "int4"})
    q = type("Q", (), {"scheme": scheme, "shape": (6, 10), "nbytes": 30 + 24})
    model.qtensors = Codes({"0.weight": q})  # type: ignore[assignment]
    sizes = size_by_tensor(model)
    assert [(each.name, each.dtype, each.nbytes) for each in sizes.tensors] == [
        ("0.weight", "int4", 54),
        ("0.bias", "float32", 24),
    ]
    assert sizes.total == 78


def test_safetensors_file_and_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.int8)}, tmp_path / "one.safetensors")
    sizes = size_by_tensor(tmp_path / "one.safetensors")
    assert [(each.name, each.nbytes, each.shape) for each in sizes.tensors] == [
        ("a", 60, (3, 5)),
        ("b", 7, (7,)),
    ]
    assert sizes.total == 67 and sizes.file == (tmp_path / "one.safetensors").stat().st_size
    save_file({"c": torch.zeros(100, dtype=torch.float16)}, tmp_path / "two.safetensors")
    (tmp_path / "plan.json").write_text("x" * 1000)
    folder = size_by_tensor(str(tmp_path))
    assert folder.total == 267 and [each.name for each in folder.tensors] == ["c", "a", "b"]
    assert folder.file == sum(each.stat().st_size for each in tmp_path.iterdir())


def onnx_file(path: Path, external: bool = False) -> None:
    float32 = numpy_helper.from_array(np.zeros((3, 5), np.float32), "w")
    int8 = numpy_helper.from_array(np.zeros(9, np.int8), "q")
    int4 = helper.make_tensor("q4", TensorProto.INT4, (7,), np.zeros(7, np.int8))
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(2, np.float16)))
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.zeros(11, np.int32), "deep")])
    branch = helper.make_node(
        "If", ["x"], ["y"], then_branch=inner, else_branch=helper.make_graph([], "e", [], [])
    )
    graph = helper.make_graph([constant, branch], "g", [], [], [float32, int8, int4])
    model = helper.make_model(graph)
    if external:
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save(model, path)


def test_onnx_counts_initializers_of_any_width_constants_and_subgraphs(tmp_path: Path) -> None:
    onnx_file(tmp_path / "a.onnx")
    sizes = size_by_tensor(tmp_path / "a.onnx")
    assert {each.name: (each.dtype, each.nbytes) for each in sizes.tensors} == {
        "w": ("float", 60),
        "deep": ("int32", 44),
        "q": ("int8", 9),
        "q4": ("int4", 4),
        "c": ("float16", 4),
    }
    assert sizes.total == 121 and sizes.file == (tmp_path / "a.onnx").stat().st_size


def test_onnx_external_data_count_but_only_within_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx_file(path, external=True)
    sizes = size_by_tensor(path)
    data = tmp_path / "weights.bin"
    assert sizes.total == 121 and sizes.file == path.stat().st_size + data.stat().st_size
    data.unlink()
    with pytest.raises(ArtifactError, match=r"a\.onnx' lacks its data file 'weights\.bin'"):
        size_by_tensor(path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="points outside its folder for its data"):
        size_by_tensor(path)


def test_files_that_are_missing_damaged_or_of_another_kind(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            size_by_tensor(path)

    refused(tmp_path / "no.onnx", r"no\.onnx' does not exist: expected a module")
    refused(tmp_path, "holds no .safetensors file, expected a saved model")
    (tmp_path / "a.pt").write_bytes(b"x")
    refused(
        tmp_path / "a.pt", r"a\.pt' is neither \.onnx, \.fewbit nor \.safetensors: other files are not opened"
    )
    save_file({"a": torch.zeros(300)}, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for damaged in (whole[:100], whole[:3], b"", b"\xff" * 64, whole[:8] + b"[" + whole[9:]):
        (tmp_path / "b.safetensors").write_bytes(damaged)
        refused(tmp_path / "b.safetensors", r"b\.safetensors' is not a readable safetensors file")
    onnx_file(tmp_path / "a.onnx")
    whole = (tmp_path / "a.onnx").read_bytes()
    for damaged in (whole[:-5], b"\xff" * 64):
        (tmp_path / "b.onnx").write_bytes(damaged)
        refused(tmp_path / "b.onnx", r"b\.onnx' is not a readable ONNX file")
