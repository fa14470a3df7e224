"""Bad input: one clear error that names the layer or file, what was found, and what to do; nothing is left behind."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit import FewbitError
from fewbit.errors import ArtifactError, DataError, ModelError, PlanError, RecipeError, TargetError

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*layers).eval()


def message(error: type[FewbitError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


BAD_DATA: dict[str, tuple[Any, str]] = {
    "empty": (torch.zeros(0, 3, 8, 8), "calibration data is empty"),
    "integers": (torch.zeros(8, 3, 8, 8, dtype=torch.int64), "int64"),
    "nan": (
        IMAGES.clone().index_fill_(0, torch.tensor([3]), float("nan")),
        "input 0 holds nan at index (3, 0, 0, 0) of batch 0",
    ),
    "infinite": (
        IMAGES.clone().index_fill_(0, torch.tensor([3]), float("inf")),
        "input 0 holds inf at index (3, 0, 0, 0) of batch 0",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_calibration_data(name: str) -> None:
    data, said = BAD_DATA[name]
    assert said in message(DataError, lambda: fewbit.quantize(network(), data, example=IMAGES))


def test_calibration_data_of_another_shape() -> None:
    said = message(DataError, lambda: fewbit.quantize(network(), IMAGES[:, :2], example=IMAGES))
    assert "(8, 2, 8, 8)" in said or "2, 8, 8" in said
    assert "3, 8, 8" in said


def test_weights_that_are_not_finite() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[1, 2, 0, 1] = float("nan")
    said = message(ModelError, lambda: fewbit.quantize(model, IMAGES))
    assert said.startswith("2.weight holds nan at [1, 2, 0, 1]: expected finite numbers")


UNKNOWN: dict[str, tuple[dict[str, Any], type[FewbitError], str]] = {
    "format": ({"weights": "inte8"}, RecipeError, "did you mean 'int8'"),
    "observer": ({"observer": "minmx"}, RecipeError, "did you mean 'minmax'"),
    "rounding": ({"rounding": "neerest"}, RecipeError, "did you mean 'nearest'"),
    "key": ({"wieghts": "int8"}, RecipeError, "did you mean 'weights'"),
    "recipe": ({"recipe": "int8-dinamic"}, RecipeError, "int8-dynamic"),
    "target": ({"target": "onxx"}, TargetError, "did you mean 'onnx'"),
    "rule": ({"rules": [{"match": "conv9*", "weights": "int4"}]}, RecipeError, "matches no layer"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_come_with_the_nearest(name: str) -> None:
    settings, error, said = UNKNOWN[name]
    assert said in message(error, lambda: fewbit.quantize(network(), IMAGES, **settings))


_GROUPS = [{"match": "4", "group_size": 32}, {"match": "2", "group_size": 54}]
CANNOT_RUN: dict[str, tuple[dict[str, Any], str]] = {
    "activations": (
        {"activations": "int16"},
        "0.output: uint16 activations have no integer kernel; use 8 bits",
    ),
    "wide weights": ({"weights": "int16"}, "0.weight: int16 weights have no integer kernel; use int8"),
    "zero points": ({"weight_symmetric": False}, "0.weight: weights of over 6 bits with zero points have no"),
    "groups": (
        {"granularity": "group", "group_size": 9, "rules": _GROUPS},
        "0.weight: weights in groups have no integer kernel; use granularity='channel'",
    ),
    "tensorrt": (
        {"target": "tensorrt", "weights": "int4"},
        "0.weight: TensorRT's integer layers take int8, not int4",
    ),
}


@pytest.mark.parametrize("name", CANNOT_RUN)
def test_what_the_target_cannot_run_is_refused_by_layer(name: str) -> None:
    settings, said = CANNOT_RUN[name]
    text = message(PlanError, lambda: fewbit.quantize(network(), IMAGES, **settings))
    assert said in text and "cannot run this plan" in text


def test_dead_and_constant_channels_work(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 3.0
        model[2].weight.zero_()
        model[2].bias.zero_()
    with pytest.warns(UserWarning, match="dead|always zero"):
        quantized = fewbit.quantize(model, IMAGES)
    assert fewbit.export(quantized, tmp_path / "m.onnx", time=False).verification.exact


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "model.onnx"
    fewbit.export(fewbit.quantize(network(), IMAGES), path, time=False)
    return path


def test_a_truncated_file(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    path = tmp_path / "model.onnx"
    for part in range(20):
        path.write_bytes(content[: len(content) * part // 20])
        assert str(path) in message(FewbitError, lambda: fewbit.verify(path))


def test_flipped_bytes_are_an_error_or_harmless(good: Path, tmp_path: Path) -> None:
    content, chance = good.read_bytes(), random.Random(0)
    path = tmp_path / "model.onnx"
    for _ in range(120):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert fewbit.verify(path).exact
        except FewbitError as error:
            assert str(error)


def test_a_foreign_file(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", 1, [1])
    y = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.helper.make_model(graph), str(path))
    said = message(ArtifactError, lambda: fewbit.verify(path))
    assert (
        said
        == f"{path}: an ONNX file without fewbit's program; only files that fewbit exported can be verified"
    )


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    quantized = fewbit.quantize(network(), IMAGES)
    said = message(ArtifactError, lambda: fewbit.export(quantized, tmp_path / "no" / "m.onnx"))
    assert (
        said == f"{tmp_path / 'no' / 'm.onnx'}: the folder {tmp_path / 'no'} does not exist; create it first"
    )
    said = message(TargetError, lambda: fewbit.export(quantized, tmp_path / "m.xyz"))
    assert "no target has the suffix '.xyz'; expected one of .onnx" in said


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    quantized = fewbit.quantize(network(), IMAGES)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fewbit.deploy.check_file", fail)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        fewbit.export(quantized, path)
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.model import kernels

    def one_more(op: Any, xs: list[Tensor], codings: Any, out: Any) -> Tensor:
        return (kernels.weighted(op, xs, codings, out) + 1).clamp(max=255)

    monkeypatch.setitem(kernels.KERNELS, "conv", one_more)
    quantized = fewbit.quantize(network(), IMAGES)
    said = message(FewbitError, lambda: fewbit.export(quantized, tmp_path / "m.onnx"))
    assert ": 0 (conv) is the first layer that differs from the reference" in said
    assert said.endswith("the file was not kept")
    assert list(tmp_path.iterdir()) == []


def test_hostile_arrays_are_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    said = message(DataError, lambda: fewbit.quantize(network(), str(path), example=IMAGES))
    assert "data.npy" in said
