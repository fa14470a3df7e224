"""Functional Keras models: branches, shared and nested parts, several inputs and outputs, operators, attention."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("keras")

import keras
from keras import Input, Model, ops
from keras import layers as kl
from random_keras import spread

from fewbit.errors import ModelError
from fewbit.model.keras_model import outputs_of
from fewbit.model.readers.keras import read_file, read_model
from fewbit.model.torch_proof import difference

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:.*inputs.*as a dict:UserWarning"
)
aten = torch.ops.aten


def check(model: Any) -> torch.fx.GraphModule:
    """Read a model and compare it with Keras on three inputs that the reader did not see."""
    spread(model, 0)
    gm = read_model(model)
    inputs = tuple(torch.randn(3, *t.shape[1:]) * 1.5 for t in model.inputs)
    with torch.no_grad():
        results = tree_leaves(gm(*inputs))
    expected = outputs_of(model, inputs)
    worst = [difference(e, a) for e, a in zip(expected, results, strict=True)]
    assert max(worst) <= 1e-5, worst
    return gm


def permutes(gm: torch.fx.GraphModule) -> int:
    return sum(n.target is aten.permute.default for n in gm.graph.nodes)


def test_a_picture_is_turned_once_and_its_channels_stay_second() -> None:
    i = Input((8, 8, 3))
    x = kl.Conv2D(4, 3, padding="same")(i)
    y = kl.Activation("relu")(kl.BatchNormalization()(kl.Conv2D(4, 3, padding="same")(x)))
    y = kl.Concatenate()([x, y, x * 2.0])
    g = kl.Reshape((1, 1, 12))(kl.Dense(12, activation="sigmoid")(kl.GlobalAveragePooling2D()(y)))
    y = kl.MaxPooling2D()(kl.Multiply()([y, g])[:, 1:, :-1])
    assert permutes(check(Model(i, kl.Dense(3)(kl.GlobalMaxPooling2D()(kl.Softmax()(y)))))) == 1
    assert permutes(check(Model(i, y))) == 2  # what goes out is the user's layout again


def test_merging() -> None:
    i = Input((6, 6, 3))
    pair = [kl.Conv2D(3, 3, padding="same")(i), i]
    layers = [kl.Add, kl.Subtract, kl.Multiply, kl.Average, kl.Maximum, kl.Minimum, kl.Concatenate]
    check(Model(i, [layer()(pair) for layer in layers]))


def test_merging_other_ranks() -> None:
    i, j = Input((6, 6, 3)), Input((3,))
    check(Model([i, j], kl.Add()([kl.Conv2D(3, 1)(i), j])))


def test_products() -> None:
    a, b, v, w = Input((5, 6)), Input((4, 6)), Input((6,)), Input((5, 7))
    dots = [
        kl.Dot(1)([v, v]),
        kl.Dot(2)([a, b]),
        kl.Dot(1)([a, w]),
        kl.Dot((2, 1))([a, v]),
        kl.Dot((1, 2))([v, b]),
    ]
    check(Model([a, b, v, w], dots))


def test_a_shared_layer_is_one_layer() -> None:
    i, j = Input((6, 6, 3)), Input((6, 6, 3))
    shared = kl.Conv2D(4, 3, activation="relu", strides=2, padding="same", name="shared")
    gm = check(Model([i, j], [kl.Add()([shared(i), shared(j)]), shared(i)]))
    assert sum(n.target == "shared" for n in gm.graph.nodes) == 3
    assert sum(isinstance(part, torch.nn.Conv2d) for part in gm.modules()) == 1


def test_nested_models_keep_their_names() -> None:
    encoder = keras.Sequential(
        [Input((6, 6, 3)), kl.Conv2D(4, 3, name="conv"), kl.BatchNormalization(name="norm")], name="enc"
    )
    f = Input((4, 4, 4))
    two = Model(f, [kl.Flatten()(f), kl.ReLU()(f)], name="two")
    i = Input((6, 6, 3))
    flat, picture = two(encoder(i))
    gm = check(Model(i, [kl.Dense(3, name="head")(flat), picture, encoder(i)]))
    assert {"enc.conv", "enc.norm", "head"} <= {name for name, _ in gm.named_modules()}


def test_inputs_and_outputs_by_name() -> None:
    a, b = Input((3,), name="a"), Input((4,), name="b")
    model = Model({"b": b, "a": a}, {"z": kl.Dense(2)(kl.Concatenate()([a, b])), "y": kl.Dense(3)(b)})
    gm = check(model)
    assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == [t.name for t in model.inputs]


def test_names_that_pytorch_does_not_allow() -> None:
    x = Input((6,), name="data in")
    y = kl.Dense(4, name="type")(x)
    y = kl.Dense(4, name="a:b-c")(y)
    y = kl.Dense(4, name="a_b_c", activation="relu")(y)
    act = kl.ReLU(name="act")
    y = act(kl.Dense(3, name="act_1")(act(y)))
    gm = check(Model(x, y, name="training"))
    assert {"type_", "a_b_c", "a_b_c_1", "act_1"} == {name for name, _ in gm.named_children()}


def test_attention() -> None:
    i, j = Input((6, 8)), Input((5, 3))
    x = kl.LayerNormalization()(kl.MultiHeadAttention(2, 4, name="mha")(i, i) + i)
    y = kl.MultiHeadAttention(2, 4, value_dim=3, output_shape=7, use_bias=False, dropout=0.1)(i, j)
    z, scores = kl.MultiHeadAttention(3, 4)(i, i, use_causal_mask=True, return_attention_scores=True)
    plain = kl.Attention(use_scale=True)([i, x, z])
    gm = check(Model([i, j], [x, y, z, scores, plain]))
    linear = {name for name, part in gm.named_modules() if isinstance(part, torch.nn.Linear)}
    assert {"mha.query", "mha.key", "mha.value", "mha.attention_output"} <= linear
    assert any("dropout of attention weights" in note for note in gm.meta["notes"])


def test_states() -> None:
    i = Input((6, 8))
    y, h, c = kl.LSTM(4, return_state=True)(i)
    z, g = kl.GRU(4, return_state=True, return_sequences=True)(i)
    follow = [kl.LSTM(4)(z, initial_state=[h, c]), kl.GRU(4)(i, initial_state=g)]
    both = kl.Bidirectional(kl.GRU(3), merge_mode=None)(i)
    check(Model(i, [y, h, c, z, g, *follow, *both]))


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda x: 1 - (x * 2.0 + 1 - x / 3),
    "divided": lambda x: 2.0 / ops.exp(x),
    "array": lambda x: x * np.array([1.0, 2.0, 3.0, 4.0], "float32") - np.ones((6, 1), "float32"),
    "array first": lambda x: ops.subtract(np.array([1.0, 2.0, 3.0, 4.0], "float32"), x),
    "functions": lambda x: (
        ops.sqrt(ops.abs(x)) + ops.square(x) + ops.gelu(x) + ops.leaky_relu(x, 0.1) + ops.sigmoid(-x)
    ),
    "power": lambda x: ops.power(ops.abs(x) + 1, 2.0) ** 0.5,
    "bounds": lambda x: ops.maximum(ops.clip(x, -1, 1), 0.1) + ops.minimum(x, x * x),
    "concatenate": lambda x: ops.concatenate([x, 2 * x], axis=-1),
    "stack": lambda x: ops.stack(ops.split(x, 2, axis=-1), axis=1),
    "split": lambda x: ops.split(x, [1, 3], axis=-1)[1],
    "mean": lambda x: ops.mean(x, axis=(1, 2)),
    "sum": lambda x: ops.sum(x, axis=2, keepdims=True),
    "max": lambda x: ops.max(x, axis=-1) - ops.min(x, axis=-1),
    "reshape": lambda x: ops.reshape(x, (-1, 36 * 4)),
    "transpose": lambda x: ops.transpose(x, (0, 3, 1, 2)),
    "swapaxes": lambda x: [ops.swapaxes(x, 1, 3), ops.transpose(x, (0, 1, 2, 3))],
    "squeeze": lambda x: ops.squeeze(ops.expand_dims(ops.mean(x, axis=1), 1), 1),
    "slices": lambda x: x[:, 1:, :-1, ::2],
    "items": lambda x: [x[:, 0], x[:, None, ..., 0], x[..., -1]],
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=0.5),
    "softmax": lambda x: ops.softmax(x, axis=-1) + ops.log_softmax(x, axis=1),
    "matmul": lambda x: ops.matmul(ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))), np.ones((6, 2), "float32")),
    "flip": lambda x: ops.flip(x, axis=1),
}


def test_operators() -> None:
    i = Input((6, 6, 3))
    x = kl.Conv2D(4, 3, padding="same")(i)
    results = {name: tree_leaves(function(x)) for name, function in OPERATORS.items()}
    check(Model(i, [value for values in results.values() for value in values]))


def test_bytes_as_pixels() -> None:
    model = keras.Sequential([Input((6, 6, 3), dtype="uint8"), kl.Rescaling(1 / 255), kl.Conv2D(4, 3)])
    spread(model, 0)
    gm = read_model(model)
    x = torch.randint(0, 256, (3, 6, 6, 3), dtype=torch.uint8)
    assert difference(outputs_of(model, (x,))[0], gm(x).detach()) <= 1e-5
    assert gm.meta["example"][0].dtype == torch.uint8 and int(gm.meta["example"][0].max()) > 127


def test_an_input_that_nobody_reads_and_one_that_goes_out() -> None:
    i, j = Input((6,)), Input((4,))
    check(Model([i, j], [i, kl.Dense(2)(i)]))


def test_a_mask_that_changes_nothing_is_let_be() -> None:
    i = Input((8,), dtype="int32")
    e = kl.BatchNormalization()(kl.Dense(3)(kl.Embedding(10, 4, mask_zero=True)(i)))
    model = Model(i, kl.Flatten()(e))
    gm = read_model(model)
    x = torch.randint(0, 10, (3, 8))
    assert difference(outputs_of(model, (x,))[0], gm(x).detach()) <= 1e-5


def test_a_batch_size_that_the_model_fixes() -> None:
    gm = read_model(keras.Sequential([Input(batch_shape=(3, 5)), kl.Dense(2)]))
    assert list(gm.meta["dynamic"].values()) == [(3, 5)]


@keras.saving.register_keras_serializable("tests")
class Doubled(kl.Dense):
    """A layer of the user's that computes what Keras's does."""


@keras.saving.register_keras_serializable("tests")
class Functional(keras.Model):
    """A model class of the user's whose layers can be seen."""


def test_classes_of_the_user_that_compute_as_keras_does(tmp_path: Any) -> None:
    i = Input((5,))
    model = Functional(i, Doubled(3, name="mine", activation="relu")(i))
    check(model)
    model.save(tmp_path / "own.keras")
    assert isinstance(read_file(tmp_path / "own.keras").mine, torch.nn.Linear)


def test_what_only_the_comparison_with_keras_can_see() -> None:
    class Twofold(keras.Model):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return 2 * super().__call__(*args, **options)

    i = Input((5,))
    with pytest.raises(ModelError, match=r"differs from Keras on the example by 5\.0e-01"):
        read_model(Twofold(i, kl.Dense(3)(i)))
