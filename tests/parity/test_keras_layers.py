"""Every layer of Keras that is read, equal to what Keras computes."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

import keras
from keras import layers as kl
from random_keras import spread

from fewbit.model.keras_functions import ACTIVATIONS
from fewbit.model.keras_model import outputs_of
from fewbit.model.readers.keras import read_model
from fewbit.model.torch_proof import difference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def check(shape: tuple[int | None, ...], *chains: Any, dtype: str | None = None, scale: float = 1.5) -> Any:
    """Read one model in which each layer, or list of layers, works on the same input; compare each output with Keras
    on inputs that the reader did not see.
    """
    i = keras.Input(shape, dtype=dtype)
    outputs = []
    for chain in chains:
        x = i
        for layer in chain if isinstance(chain, list) else [chain]:
            x = layer(x)
        outputs.append(x)
    model = keras.Model(i, outputs)
    spread(model, 0)
    gm = read_model(model)
    sizes = [11 if size is None else size for size in shape]
    inputs = torch.randn(3, *sizes) * scale if dtype is None else torch.randint(0, 5, (3, *sizes))
    with torch.no_grad():
        results = tree_leaves(gm(inputs))
    for chain, expected, actual in zip(chains, outputs_of(model, (inputs,)), results, strict=True):
        last = chain[-1] if isinstance(chain, list) else chain
        assert difference(expected, actual) <= 1e-5, last.get_config()
        assert float(expected.abs().max()) > 0, last.get_config()
    return gm


SIZES = {1: (11, 4), 2: (11, 9, 4), 3: (6, 7, 5, 4)}
CONVS = {1: kl.Conv1D, 2: kl.Conv2D, 3: kl.Conv3D}
TRANSPOSED = {1: kl.Conv1DTranspose, 2: kl.Conv2DTranspose, 3: kl.Conv3DTranspose}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int) -> None:
    cases = [("same", 3, 1, 1), ("same", 3, 2, 1), ("same", 2, 2, 1), ("same", 4, 1, 1), ("same", 5, 3, 1),
             ("same", 3, 1, 2), ("same", 1, 3, 1), ("valid", 3, 2, 1), ("valid", 2, 1, 2)]  # fmt: skip
    check(SIZES[dims], *(CONVS[dims](6, k, strides=s, dilation_rate=d, padding=p) for p, k, s, d in cases))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_transposed_convolutions(dims: int, padding: str) -> None:
    cases: list[dict[str, Any]] = [
        {"kernel_size": 3}, {"kernel_size": 3, "strides": 2}, {"kernel_size": 2, "strides": 3, "activation": "relu"},
        {"kernel_size": 5, "strides": 2, "use_bias": False}, {"kernel_size": 3, "dilation_rate": 2},
        {"kernel_size": 4, "strides": 2, "output_padding": 1}, {"kernel_size": 1, "strides": 3},
    ]  # fmt: skip
    check(SIZES[dims], *(TRANSPOSED[dims](5, padding=padding, **case) for case in cases))


def test_convolutions_by_groups_and_parts() -> None:
    check(
        (9, 4),
        kl.Conv1D(5, 3, padding="causal", dilation_rate=2),
        kl.DepthwiseConv1D(3, strides=2, padding="same", depth_multiplier=2, activation="tanh"),
        kl.SeparableConv1D(5, 4, padding="same", depth_multiplier=2),
        kl.Conv1D(6, 3, groups=2, padding="same", use_bias=False),
    )
    check(
        (9, 8, 4),
        kl.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=3),
        kl.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2, activation="relu"),
        kl.SeparableConv2D(5, (3, 2), padding="valid", dilation_rate=2),
        kl.Conv2D(6, (3, 2), groups=2, padding="same", activation=kl.LeakyReLU(0.3)),
    )


def test_channels_first() -> None:
    first = {"data_format": "channels_first"}
    layers = [kl.Conv2D(6, 3, strides=2, padding="same", **first), kl.BatchNormalization(axis=1)]
    layers += [kl.ZeroPadding2D(1, **first), kl.MaxPooling2D(**first), kl.Flatten(**first), kl.Dense(3)]
    gm = check((4, 13, 9), layers)
    assert sum(n.target is torch.ops.aten.permute.default for n in gm.graph.nodes) == 1  # Flatten's own
    check(
        (4, 13, 9),
        kl.UpSampling2D(2, **first),
        kl.GlobalAveragePooling2D(**first),
        kl.SpatialDropout2D(0.2, **first),
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Max", "Average"])
def test_pooling(dims: int, kind: str) -> None:
    cases = [(2, None, "valid"), (2, None, "same"), (3, 2, "same"), (3, 1, "same"), (2, 1, "same"), (4, 1, "same"),
             (2, 3, "same"), (5, 3, "same"), (3, 2, "valid")]  # fmt: skip
    pools = [getattr(kl, f"{kind}Pooling{dims}D")(p, s, padding=padding) for p, s, padding in cases]
    over_all = [getattr(kl, f"Global{kind}Pooling{dims}D")(keepdims=keepdims) for keepdims in (True, False)]
    gm = check(SIZES[dims], *pools, *over_all)
    notes = [note for note in gm.meta["notes"] if "uneven 'same' padding" in note]
    assert bool(notes) == (kind == "Average")


def test_activations() -> None:
    names = sorted(ACTIVATIONS)
    check((6, 5, 4), *([kl.Conv2D(4, 3), kl.Activation(name)] for name in names), *map(kl.Activation, names))
    check((6, 5, 4), *(kl.Conv2D(4, 1, activation=name) for name in names))


def test_activation_layers() -> None:
    relus = [kl.ReLU(), kl.ReLU(6), kl.ReLU(2.5), kl.ReLU(negative_slope=0.2),
             kl.ReLU(max_value=1.0, negative_slope=0.2), kl.ReLU(threshold=0.5),
             kl.ReLU(max_value=1.0, threshold=0.2, negative_slope=0.1)]  # fmt: skip
    others = [kl.LeakyReLU(0.3), kl.ELU(0.7), kl.Softmax(), kl.Softmax(axis=1)]
    slopes = [kl.PReLU(shared_axes=axes) for axes in (None, [1, 2], [1, 2, 3], [1])]
    check((6, 5, 3), *([kl.Conv2D(4, 3), layer] for layer in (*relus, *others, *slopes)))
    check((8,), *relus, kl.PReLU(), kl.Softmax())


@pytest.mark.parametrize("kind", ["Batch", "Layer", "Group"])
def test_normalizations(kind: str) -> None:
    groups = {"groups": 2} if kind == "Group" else {}
    layers = [
        getattr(kl, f"{kind}Normalization")(scale=s, center=c, **groups)
        for s in (True, False)
        for c in (True, False)
    ]
    check((5, 6, 4), *layers, [kl.Conv2D(4, 3), getattr(kl, f"{kind}Normalization")(**groups)])


def test_normalizations_of_other_ranks_and_axes() -> None:
    check((6,), kl.BatchNormalization(), kl.LayerNormalization())
    check(
        (7, 6),
        kl.BatchNormalization(),
        kl.LayerNormalization(epsilon=1e-6),
        kl.RMSNormalization(),
        kl.GroupNormalization(3),
    )
    check(
        (7, 6, 4),
        kl.BatchNormalization(axis=2),
        kl.LayerNormalization(axis=[1, 2, 3]),
        kl.GroupNormalization(-1),
    )


def test_constants_along_channels() -> None:
    given = {"mean": [1.0, 2.0, 3.0], "variance": [1.0, 4.0, 9.0]}
    check(
        (6, 6, 3),
        kl.Rescaling(1 / 127.5, -1),
        kl.Rescaling([0.1, 0.2, 0.3], [1, 2, 3]),
        [kl.Conv2D(3, 1), kl.Rescaling([0.1, 0.2, 0.3], 1)],  # channels elsewhere in memory
        kl.Normalization(**given),
        kl.Normalization(**given, invert=True),
    )


def test_adapted_normalization() -> None:
    layer = kl.Normalization()
    layer.adapt(np.random.default_rng(0).normal(100, 30, (50, 6, 6, 3)))
    gm = check((6, 6, 3), [layer, kl.Conv2D(3, 3)], scale=100)
    assert float(gm.meta["example"][0].min()) >= 0  # raw pixels: such layers are there for them


def test_batch_normalization_trains_as_in_keras() -> None:
    model = keras.Sequential(
        [keras.Input((6, 5, 3)), kl.BatchNormalization(momentum=0.9, epsilon=1e-2, name="norm")]
    )
    norm = read_model(model).norm
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert (round(norm.momentum, 6), norm.eps) == (0.1, 1e-2)
    frozen = kl.BatchNormalization(name="norm", trainable=False)
    assert not read_model(keras.Sequential([keras.Input((6, 5, 3)), frozen])).norm.weight.requires_grad


def test_moving_numbers_about() -> None:
    conv = {"filters": 4, "kernel_size": 3}
    check(
        (5, 6, 3),
        [kl.Conv2D(**conv), kl.Flatten(), kl.Dense(3)],
        [kl.Conv2D(**conv), kl.Reshape((-1, 4)), kl.Dense(3)],
        [kl.Permute((2, 1, 3)), kl.Conv2D(**conv)],
        [kl.Conv2D(**conv), kl.Permute((3, 1, 2)), kl.Dense(3)],
        [kl.ZeroPadding2D(((1, 2), (0, 3))), kl.Conv2D(**conv)],
        [kl.Conv2D(4, 1), kl.Cropping2D(((1, 2), (0, 3)))],
        kl.UpSampling2D((2, 3)),
        [kl.Conv2D(**conv), kl.UpSampling2D(2, interpolation="bilinear")],
    )
    check((6, 4, 3), kl.Resizing(5, 9), [kl.Conv2D(2, 1), kl.Resizing(12, 3)])
    check((12,), [kl.Reshape((1, 1, 12)), kl.Conv2D(4, 1), kl.Flatten()], [kl.Reshape((2, 2, -1)), kl.Conv2D(4, 1)],
          [kl.RepeatVector(3), kl.Dense(2)])  # fmt: skip
    check((5, 6), [kl.Permute((2, 1)), kl.Conv1D(4, 3), kl.Permute((2, 1))], kl.ZeroPadding1D((1, 2)),
          kl.Cropping1D((1, 2)), kl.UpSampling1D(3))  # fmt: skip
    check(
        (3, 4, 2, 3),
        [kl.ZeroPadding3D(1), kl.Cropping3D(((0, 1), (1, 0), (1, 1)))],
        kl.UpSampling3D((1, 2, 3)),
    )


def test_what_acts_in_training_only() -> None:
    layers = [
        kl.RandomFlip(),
        kl.RandomRotation(0.1),
        kl.Dropout(0.3),
        kl.SpatialDropout2D(0.2),
        kl.GaussianNoise(0.3),
    ]
    gm = check((5, 6, 3), [*layers, kl.AlphaDropout(0.1), kl.Dropout(0.0), kl.Conv2D(3, 3)])
    kinds = {type(part) for part in gm.modules()}
    assert {torch.nn.Dropout, torch.nn.Dropout2d, torch.nn.AlphaDropout} <= kinds
    assert any("GaussianNoise acts in training only" in note for note in gm.meta["notes"])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_embedding(dtype: str) -> None:
    gm = check((7,), [kl.Embedding(12, 5), kl.GlobalAveragePooling1D()], dtype=dtype)
    assert gm.meta["example"][0].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("cls", [kl.LSTM, kl.GRU, kl.SimpleRNN])
def test_recurrent_layers(cls: Any) -> None:
    options: list[dict[str, Any]] = [{}, {"go_backwards": True}, {"use_bias": False}]
    gm = check((7, 5), *(cls(6, return_sequences=s, **o) for s in (True, False) for o in options))
    assert sum(isinstance(part, torch.nn.RNNBase) for part in gm.modules()) == 6
    merges = [("concat", True), ("concat", False), ("sum", True), ("ave", False), ("mul", False)]
    check((7, 5), *(kl.Bidirectional(cls(6, return_sequences=s), merge_mode=m) for m, s in merges))


def test_layers_over_every_step() -> None:
    relu = kl.SimpleRNN(6, activation="relu", return_sequences=True)
    check(
        (7, 5),
        [relu, kl.TimeDistributed(kl.Dense(3, activation="relu"))],
        kl.TimeDistributed(kl.LayerNormalization()),
    )
    check((4, 8, 8, 3), [kl.TimeDistributed(kl.Conv2D(3, 3)), kl.TimeDistributed(kl.Flatten()), kl.GRU(4)])


def test_free_sizes() -> None:
    free = check(
        (None, 6), [kl.Conv1D(4, 3, padding="causal"), kl.Dense(2)], [kl.Dense(8), kl.Reshape((-1, 2, 4))]
    )
    assert [type(size) for size in next(iter(free.meta["dynamic"].values()))] == [str, str, int]
    fixed = check((None, 6), [kl.Conv1D(4, 3, padding="same"), kl.GlobalMaxPooling1D()])
    assert not fixed.meta["notes"]
    recurrent = keras.Sequential([keras.Input((None, 6), name="steps"), kl.LSTM(3)])
    assert "axis 1 of input 'steps' is fixed at 16" in read_model(recurrent).meta["notes"][0]
    assert "is fixed at 9" in read_model(recurrent, torch.randn(4, 9, 6)).meta["notes"][0]
    read_model(
        keras.Sequential([keras.Input((None, None, 3)), kl.Conv2D(4, 3, strides=2), kl.GlobalMaxPooling2D()])
    )
