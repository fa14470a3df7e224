"""Random Keras models by seed, with inputs: what the Keras reader is counted on."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
from keras import Input, Model, layers, ops

ACTIVATIONS = ["relu", "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "elu", "leaky_relu", "hard_sigmoid",
               "hard_silu", "softplus", "selu", "linear"]  # fmt: skip
Named = Callable[..., Any]


@dataclass
class Drawn:
    """A model, and ``inputs(count)``: other numbers by every ``variant``; below ``rows`` where those are whole."""

    seed: int
    model: Any
    shapes: list[tuple[int, ...]]
    rows: int = 0
    parts: list[str] = field(default_factory=list)

    def inputs(self, count: int, variant: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1000 * self.seed + variant)
        if self.rows:
            return tuple(torch.randint(0, self.rows, (count, *s), generator=generator) for s in self.shapes)
        return tuple(torch.randn(count, *shape, generator=generator) * 1.5 for shape in self.shapes)


def draw(seed: int) -> Drawn:
    """The model of a seed: every second one works on images, the others on sequences, tokens and plain vectors."""
    builder = _Builder(random.Random(seed))
    kind = builder.rng.choice(["image", "image", "image", "sequence", "tokens", "vector"])
    drawn = getattr(builder, kind)(seed)
    spread(drawn.model, seed)
    return drawn


def spread(model: Any, seed: int) -> None:
    """Weights and statistics as a trained network has them: of all sizes, none of them zero or one."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape, path = tuple(weight.shape), weight.path
        if path.endswith(("count", "/mean", "/variance")):
            continue  # a Normalization layer's own
        width = max(1, int(np.prod(shape[:-1])) if len(shape) > 1 else 1)
        value = rng.standard_normal(shape) * (1.5 / width**0.5 if len(shape) > 1 else 0.5)
        if path.endswith("variance"):
            value = np.abs(value) + 0.3
        elif path.endswith(("gamma", "scale")):
            value = value + 1
        weight.assign(value.astype("float32"))


class _Builder:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.parts: list[str] = []
        self.count = 0

    def make(self, cls: Named, *args: Any, **options: Any) -> Any:
        """A layer under a name of its own, whatever other models there are."""
        self.count += 1
        return cls(*args, name=f"part{self.count}_{cls.__name__.lower()}", **options)

    def activation(self) -> str:
        return self.rng.choice(ACTIVATIONS)

    # images

    def image(self, seed: int) -> Drawn:
        rng = self.rng
        shape = (rng.randint(7, 16), rng.randint(7, 16), rng.choice([1, 2, 3, 4, 8]))
        x = first = Input(shape, name="image")
        inputs = [first]
        if rng.random() < 0.15:
            x = self.make(layers.Rescaling, 1 / 2, offset=-0.25)(x)
        if rng.random() < 0.2:
            second = Input(shape, name="second")
            shared = self.make(layers.Conv2D, shape[-1], 3, padding="same")
            x = self.make(layers.Add)([shared(x), shared(second)])
            inputs.append(second)
        for _ in range(rng.randint(1, 4)):
            x = self.block(x)
        return self.headed(seed, inputs, x, [shape] * len(inputs))

    def block(self, x: Any) -> Any:
        names = ["conv", "conv", "separable", "depthwise", "residual", "join", "gate", "pool", "up", "transposed",
                 "pad", "norm", "operators", "nested", "twice"]  # fmt: skip
        if min(x.shape[1:3]) < 4:
            names = ["conv", "residual", "gate", "up", "norm", "transposed"]
        name = self.rng.choice(names)
        self.parts.append(name)
        return getattr(self, name)(x)

    def conv(self, x: Any, filters: int = 0, keep: bool = False) -> Any:
        """A convolution; ``keep`` leaves the picture's size as it is."""
        rng = self.rng
        options: dict[str, Any] = {
            "padding": "same" if keep or min(x.shape[1:3]) < 4 else rng.choice(["same", "valid"])
        }
        kernel = rng.choice([1, 2, 3, 3, (3, 1), (2, 3)])
        if not keep:
            options |= rng.choice([{}, {"strides": 2}, {"strides": (1, 2)}, {"dilation_rate": 1}])
        if keep and rng.random() < 0.2:
            options |= {"dilation_rate": 2}
        groups = rng.choice([1, 1, x.shape[-1]])
        filters = filters or rng.randint(1, 4) * groups
        if filters % groups == 0:
            options["groups"] = groups
        if rng.random() < 0.5:
            x = self.make(layers.Conv2D, filters, kernel, use_bias=False, **options)(x)
            x = self.make(layers.BatchNormalization, scale=rng.random() < 0.8, center=rng.random() < 0.8)(x)
            return self.make(layers.Activation, self.activation())(x)
        return self.make(layers.Conv2D, filters, kernel, activation=self.activation(), **options)(x)

    def separable(self, x: Any) -> Any:
        rng = self.rng
        return self.make(
            layers.SeparableConv2D, rng.randint(1, 12), 3, padding="same", strides=rng.choice([1, 2]),
            depth_multiplier=rng.choice([1, 2]), activation=self.activation(),
        )(x)  # fmt: skip

    def depthwise(self, x: Any) -> Any:
        rng = self.rng
        x = self.make(
            layers.DepthwiseConv2D, rng.choice([2, 3]), padding="same", strides=rng.choice([1, 2]),
            depth_multiplier=rng.choice([1, 2]),
        )(x)  # fmt: skip
        return self.make(
            layers.ReLU, max_value=rng.choice([None, 6.0]), negative_slope=rng.choice([0.0, 0.1])
        )(x)

    def residual(self, x: Any) -> Any:
        merged = self.make(self.rng.choice([layers.Add, layers.Add, layers.Multiply, layers.Subtract, layers.Maximum,
                                            layers.Average]))([x, self.conv(x, x.shape[-1], keep=True)])  # fmt: skip
        return self.make(layers.Activation, self.activation())(merged)

    def join(self, x: Any) -> Any:
        parts = [x, self.conv(x, keep=True), self.conv(x, keep=True)]
        return self.make(layers.Concatenate)(parts[self.rng.choice([0, 1]) :])

    def gate(self, x: Any) -> Any:
        """Channels scaled by a gate of their means (squeeze and excitation, arXiv 1709.01507)."""
        channels = x.shape[-1]
        if self.rng.random() < 0.5:
            g = self.make(layers.GlobalAveragePooling2D, keepdims=True)(x)
            g = self.make(layers.Conv2D, channels, 1, activation="sigmoid")(g)
        else:
            g = self.make(layers.Dense, channels, activation="hard_sigmoid")(
                self.make(layers.GlobalMaxPooling2D)(x)
            )
            g = self.make(layers.Reshape, (1, 1, channels))(g)
        return self.make(layers.Multiply)([x, g])

    def pool(self, x: Any) -> Any:
        rng = self.rng
        cls = rng.choice([layers.MaxPooling2D, layers.AveragePooling2D])
        return self.make(cls, rng.choice([2, 3, (2, 1)]), strides=rng.choice([None, 1, 2]),
                         padding=rng.choice(["same", "valid"]))(x)  # fmt: skip

    def up(self, x: Any) -> Any:
        if x.shape[1] * x.shape[2] > 200:
            return self.conv(x)
        return self.make(layers.UpSampling2D, self.rng.choice([2, (1, 3)]),
                         interpolation=self.rng.choice(["nearest", "bilinear"]))(x)  # fmt: skip

    def transposed(self, x: Any) -> Any:
        if x.shape[1] * x.shape[2] > 200:
            return self.conv(x)
        rng = self.rng
        return self.make(layers.Conv2DTranspose, rng.randint(1, 8), rng.choice([2, 3, 4]), strides=rng.choice([1, 2]),
                         padding=rng.choice(["same", "valid"]), activation=self.activation())(x)  # fmt: skip

    def pad(self, x: Any) -> Any:
        x = self.make(layers.ZeroPadding2D, ((1, 0), (0, 2)))(x)
        x = self.make(layers.Conv2D, 3, 3, activation=self.activation())(x)
        return self.make(layers.Cropping2D, ((0, 1), (1, 0)))(x) if min(x.shape[1:3]) > 3 else x

    def norm(self, x: Any) -> Any:
        rng = self.rng
        x = self.make(rng.choice([layers.BatchNormalization, layers.LayerNormalization]))(x)
        return self.make(layers.PReLU, shared_axes=[1, 2])(x) if rng.random() < 0.5 else x

    def operators(self, x: Any) -> Any:
        y = x * 0.5 + 1.0
        z = ops.concatenate([y[:, 1:, :-1], x[:, :-1, 1:]], axis=-1)
        return ops.relu(z) if self.rng.random() < 0.5 else 1.0 - z

    def nested(self, x: Any) -> Any:
        inner = Input(x.shape[1:])
        y = self.conv(self.conv(inner, keep=True), keep=True)
        return Model(inner, y, name=f"inner_{self.count}")(x)

    def twice(self, x: Any) -> Any:
        layer = self.make(layers.Conv2D, x.shape[-1], 3, padding="same", activation="relu")
        return layer(self.make(layers.Dropout, 0.2)(layer(x)))

    # sequences, tokens, vectors

    def sequence(self, seed: int) -> Drawn:
        rng = self.rng
        shape = (rng.randint(6, 14), rng.choice([1, 3, 5, 8]))
        x = first = Input(shape, name="sequence")
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(["conv", "conv", "causal", "separable", "pool", "norm", "up"])
            self.parts.append(name)
            if name in ("conv", "causal"):
                padding = {"conv": "same", "causal": "causal"}[name]
                x = self.make(layers.Conv1D, rng.randint(2, 12), rng.choice([2, 3, 4]), padding=padding,
                              dilation_rate=rng.choice([1, 2]), activation=self.activation())(x)  # fmt: skip
            elif name == "separable":
                x = self.make(
                    layers.SeparableConv1D, rng.randint(2, 12), 3, padding="same", strides=rng.choice([1, 2])
                )(x)
            elif name == "pool" and x.shape[1] > 3:
                x = self.make(rng.choice([layers.MaxPooling1D, layers.AveragePooling1D]), 2, padding="same")(
                    x
                )
            elif name == "up":
                x = self.make(layers.UpSampling1D, 2)(x)
            else:
                x = self.make(layers.BatchNormalization)(x)
        return self.headed(seed, [first], self.recurrent(x) if rng.random() < 0.6 else x, [shape])

    def recurrent(self, x: Any) -> Any:
        rng = self.rng
        cls, sequences = rng.choice([layers.LSTM, layers.GRU, layers.SimpleRNN]), rng.random() < 0.5
        self.parts.append(cls.__name__)
        layer = self.make(cls, rng.randint(2, 9), return_sequences=sequences)
        if rng.random() < 0.4:
            layer = self.make(layers.Bidirectional, layer, merge_mode=rng.choice(["concat", "sum", "ave"]))
        x = layer(x)
        return self.make(layers.TimeDistributed, layers.Dense(4, activation="tanh"))(x) if sequences else x

    def tokens(self, seed: int) -> Drawn:
        rng = self.rng
        length, rows, heads = rng.randint(4, 9), rng.randint(5, 30), rng.choice([1, 2, 3])
        x = first = Input((length,), dtype="int32", name="tokens")
        x = self.make(layers.Embedding, rows, 4 * heads)(x)
        for _ in range(rng.randint(1, 2)):
            self.parts.append("attention")
            normed = self.make(layers.LayerNormalization, epsilon=1e-6)(x)
            x = x + self.make(layers.MultiHeadAttention, heads, 4)(normed, normed)
            hidden = self.make(layers.Dense, rng.randint(4, 20), activation=self.activation())(x)
            x = self.make(layers.Add)([x, self.make(layers.Dense, 4 * heads)(hidden)])
        drawn = self.headed(seed, [first], self.recurrent(x) if rng.random() < 0.3 else x, [(length,)])
        drawn.rows = rows
        return drawn

    def vector(self, seed: int) -> Drawn:
        rng = self.rng
        shape = (rng.randint(3, 40),)
        x = first = Input(shape, name="vector")
        for _ in range(rng.randint(1, 4)):
            x = self.make(layers.Dense, rng.randint(2, 40), activation=self.activation())(x)
            if rng.random() < 0.3:
                x = self.make(layers.BatchNormalization)(x)
            if rng.random() < 0.3:
                x = self.make(layers.Dropout, 0.3)(x)
        self.parts.append("dense")
        return self.headed(seed, [first], x, [shape])

    def headed(self, seed: int, inputs: list[Any], x: Any, shapes: list[tuple[int, ...]]) -> Drawn:
        """Pooled or flattened features and a dense layer; sometimes the features are an output of their own."""
        rng, rank = self.rng, len(x.shape)
        flat = x
        if rank > 2:
            kind = rng.choice(["Flatten", f"GlobalAveragePooling{rank - 2}D", f"GlobalMaxPooling{rank - 2}D"])
            flat = self.make(getattr(layers, kind))(x)
        classes, last = rng.randint(2, 9), rng.choice(["softmax", "linear"])
        answer = self.make(layers.Dense, classes, activation=last)(flat)
        outputs = [answer, x] if rng.random() < 0.25 else answer
        return Drawn(seed, keras.Model(inputs, outputs, name=f"random_{seed}"), shapes, parts=self.parts)
