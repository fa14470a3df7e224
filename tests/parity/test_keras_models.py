"""Whole Keras models, from files and live, read and equal to what Keras computes."""

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewbit.model.readers.keras import read_file, read_model

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")


def test_the_resnet_of_mlperf_tiny_answers_as_published(data_dir: Path, datasets: ModuleType) -> None:
    gm = read_file(data_dir / "models" / "mlperf-tiny-resnet8.h5")
    images, labels = datasets.cifar10("test")
    images = torch.from_numpy(images[:2000]).float()  # raw pixels, channels last
    with torch.no_grad():
        right = (gm(images).argmax(1) == torch.from_numpy(labels[:2000]).long()).float().mean()
    assert gm.meta["dynamic"] == {"input_1": (gm.meta["dynamic"]["input_1"][0], 32, 32, 3)}
    assert abs(float(right) - 0.872) < 0.02
    permutes = [n for n in gm.graph.nodes if n.target is torch.ops.aten.permute.default]
    assert len(permutes) == 1  # at the input; the picture is one point large where it is flattened


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_perceptron_is_the_same_from_both_files(tmp_path: Path, suffix: str) -> None:
    layers = [keras.layers.Dense(16, activation="relu", name="hidden"), keras.layers.Dense(10, name="answer")]
    model = keras.Sequential([keras.Input((28,)), *layers, keras.layers.Softmax()])
    model.save(tmp_path / f"model.{suffix}")
    gm = read_file(tmp_path / f"model.{suffix}")
    x = torch.randn(7, 28)
    expected = model(x.numpy(), training=False).detach()
    torch.testing.assert_close(gm(x).detach(), expected, rtol=1e-5, atol=1e-6)
    assert {name for name, _ in gm.named_children()} == {"hidden", "answer"}
    assert str(keras.__version__) in gm.meta["source"] or f"model.{suffix}" in gm.meta["source"]
    assert gm.meta["example"][0].shape == (4, 28)


def test_a_live_model_is_left_as_it_is() -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dropout(0.5)])
    before = [w.copy() for w in model.get_weights()]
    gm = read_model(model)
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert any(isinstance(part, torch.nn.Dropout) for part in gm.modules())
