"""Random ONNX models by seed, in any opset that ONNX Runtime takes: what reading them is counted on."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx_made import Nodes, made
from torch import Tensor

NEWEST = min(onnx.defs.onnx_opset_version(), 26)  # what ONNX Runtime takes


@dataclass
class Drawn:
    """A random model and `inputs(count)`: new inputs by every `variant`; a fixed batch is what `count` must be."""

    seed: int
    model: onnx.ModelProto
    shape: tuple[int, ...]
    batch: int | None
    parts: list[str] = field(default_factory=list)

    def inputs(self, count: int = 4, variant: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1000 * self.seed + variant)
        return (torch.randn(count, *self.shape, generator=generator) * 1.5,)


def draw(seed: int) -> Drawn:
    """The model of a seed: half work on images, the others on sequences, tokens or rows; opsets 7 to the newest."""
    return _Builder(seed).draw()


class _Builder(Nodes):
    """One model under construction; `x` is the value that the next part reads, [N, channels, *sizes]."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        opset = self.rng.choice([*range(7, 24), NEWEST])
        super().__init__(opset, seed, named=self.rng.random() < 0.7)
        self.x = "x"
        self.channels, self.sizes = 0, [0]

    # ---- the whole ----

    def draw(self) -> Drawn:
        kind = self.rng.choice(["image"] * 3 + ["sequence"] * 2 + ["recurrent", "tokens", "rows"])
        self.parts.append(kind)
        batch = self.rng.choice([None, None, None, 1, 3])
        shape = getattr(self, f"_{kind}_shape")()
        getattr(self, f"_{kind}")()
        model = made(self.nodes, {"x": (batch or "N", *shape)}, [self.x], self.constants, self.opset)
        return Drawn(self.seed, model, shape, batch, [f"opset {self.opset}", *self.parts])

    def _image_shape(self) -> tuple[int, ...]:
        self.channels = self.rng.choice([1, 2, 3, 4, 8])
        self.sizes = [self.rng.randint(7, 14) for _ in range(2)]
        return (self.channels, *self.sizes)

    def _sequence_shape(self) -> tuple[int, ...]:
        self.channels, self.sizes = self.rng.choice([1, 3, 6, 8]), [self.rng.randint(9, 20)]
        return (self.channels, *self.sizes)

    def _recurrent_shape(self) -> tuple[int, ...]:
        self.channels, self.sizes = self.rng.randint(3, 8), [self.rng.randint(4, 9)]
        return (*self.sizes, self.channels)

    _tokens_shape = _recurrent_shape

    def _rows_shape(self) -> tuple[int, ...]:
        self.channels, self.sizes = self.rng.randint(4, 20), []
        return (self.channels,)

    def _image(self) -> None:
        images = [self._shuffle, self._excite, self._upsample, self._channels_last, self._blocks]
        anywhere = [self._layer, self._layer, self._residual, self._join, self._halves, self._pool, self._pad,
                    self._slice, self._depthwise]  # fmt: skip
        for _ in range(self.rng.randint(1, 4)):
            small = min(self.sizes) < 4 or np.prod(self.sizes) * self.channels > 6000
            part = self.rng.choice(
                [self._layer, self._residual, self._excite] if small else anywhere + images
            )
            self.parts.append(part.__name__.strip("_"))
            part()
        self._head()

    def _sequence(self) -> None:
        parts = [self._layer, self._residual, self._join, self._halves, self._pool, self._pad, self._slice,
                 self._depthwise, self._excite]  # fmt: skip
        for _ in range(self.rng.randint(1, 3)):
            part = self.rng.choice(parts if min(self.sizes) > 4 else [self._layer])
            self.parts.append(part.__name__.strip("_"))
            part()
        self._head()

    def _rows(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self._dense(self.rng.randint(3, 24))
            self.x = self._activation(self.x)
        self._dense(self.rng.randint(2, 8))

    # ---- parts ----

    def _activation(self, x: str) -> str:
        names = [
            "Relu",
            "Relu",
            "Sigmoid",
            "Tanh",
            "LeakyRelu",
            "Elu",
            "Clip",
            "PRelu",
            "HardSigmoid",
            "Swish",
            "none",
        ]
        since = {"HardSwish": 14, "Mish": 18, "Gelu": 20}
        names += [name for name, opset in since.items() if self.opset >= opset]
        name = self.rng.choice(names)
        if name == "none":
            return x
        if name == "Swish":
            return str(self.op("Mul", [x, self.op("Sigmoid", [x])]))
        if name == "PRelu":
            slope = self.numbers.uniform(0, 0.5, (self.channels, *[1] * len(self.sizes))).astype(np.float32)
            return str(self.op("PRelu", [x, self.constant(slope)]))
        if name == "Clip" and self.opset < 11:
            return str(self.op("Clip", [x], min=0.0, max=6.0))
        if name == "Clip":
            return str(self.op("Clip", [x, *(self.constant(np.float32(v)) for v in (0, 6))]))
        return str(self.op(name, [x]))

    def _conv(self, x: str, outputs: int, same: bool, group: int = 1) -> str:
        rng, dims = self.rng, len(self.sizes)
        kernel = [rng.choice([1, 2, 3, 3, 5]) for _ in range(dims)]
        stride = 1 if same else rng.choice([1, 1, 2])
        dilation = rng.choice([1, 1, 2]) if min(self.sizes) > 6 else 1
        spans = [dilation * (k - 1) + 1 for k in kernel]
        attrs: dict[str, Any] = {"group": group, "strides": [stride] * dims, "kernel_shape": kernel}
        if dilation == 1 and rng.random() < 0.4:
            attrs["auto_pad"] = rng.choice(["SAME_UPPER", "SAME_LOWER"])
            sizes = [-(-s // stride) for s in self.sizes]
        else:
            begins = [(s - 1) // 2 for s in spans]
            ends = [s - 1 - b for s, b in zip(spans, begins, strict=True)]
            if not same and rng.random() < 0.3:
                begins = [b + rng.choice([0, 1]) for b in begins]
            attrs |= {"pads": begins + ends, "dilations": [dilation] * dims}
            padded = [s + b + e for s, b, e in zip(self.sizes, begins, ends, strict=True)]
            sizes = [(p - span) // stride + 1 for p, span in zip(padded, spans, strict=True)]
        name = f"layer{len(self.nodes)}.conv" if self.named else ""
        inputs = [
            x,
            self.weight(outputs, self.channels // group, *kernel, name=f"{name}.weight" if name else ""),
        ]
        if rng.random() < 0.6:
            inputs.append(self.weight(outputs, name=f"{name}.bias" if name else ""))
        made = self.op("Conv", inputs, **attrs)
        self.sizes = sizes
        if rng.random() < 0.5:
            made = self._norm(made, outputs)
        return str(made)

    def _norm(self, x: str, channels: int) -> str:
        draw = self.numbers
        scale, shift = draw.uniform(0.5, 1.5, channels), draw.standard_normal(channels)
        mean = draw.standard_normal(channels)
        names = [self.constant(v.astype(np.float32)) for v in (scale, shift)]
        if self.rng.random() < 0.15 and self.sizes and min(self.sizes) > 2:
            return str(self.op("InstanceNormalization", [x, *names]))
        names += [self.constant(v.astype(np.float32)) for v in (mean, draw.uniform(0.2, 3, channels))]
        return str(self.op("BatchNormalization", [x, *names], epsilon=self.rng.choice([1e-5, 1e-3])))

    def _layer(self) -> None:
        outputs = self.rng.randint(1, 16)
        self.x = self._conv(self.x, outputs, same=False)
        self.channels = outputs
        self.x = self._activation(self.x)

    def _depthwise(self) -> None:
        many = self.rng.choice([1, 2])
        self.x = self._conv(self.x, self.channels * many, same=False, group=self.channels)
        self.channels *= many
        self.x = self._activation(self.x)
        self._layer()

    def _residual(self) -> None:
        self._layer()
        branch = self._activation(self._conv(self.x, self.channels, same=True))
        if self.rng.random() < 0.3:
            branch = self.op("Mul", [branch, self.constant(np.float32(0.5))])
        pair = [self.x, branch]
        self.x = self._activation(self.op("Add", pair[:: self.rng.choice([1, -1])]))

    def _join(self) -> None:
        left, right = self.rng.randint(1, 8), self.rng.randint(1, 8)
        parts = [self._activation_of(self._conv(self.x, n, same=True), n) for n in (left, right)]
        self.x = self.op(
            "Concat",
            [*parts, self.x],
            axis=self.rng.choice([1, -1 - len(self.sizes)]) if self.opset >= 11 else 1,
        )
        self.channels += left + right

    def _activation_of(self, x: str, channels: int) -> str:
        before, self.channels = self.channels, channels
        made, self.channels = self._activation(x), before
        return made

    def _halves(self) -> None:
        self.channels, outputs = 2 * max(1, self.channels // 2), self.channels
        if self.channels != outputs:
            self.channels = outputs
            self.x, self.channels = self._conv(self.x, 2 * outputs, same=True), 2 * outputs
        half = self.channels // 2
        if self.opset < 13:
            a, b = self.op("Split", [self.x], 2, axis=1, split=[half, half])
        else:
            a, b = self.op("Split", [self.x, self.ints(half, half)], 2, axis=1)
        self.channels = half
        a = self._activation(self._conv(a, half, same=True))
        self.channels = 2 * half
        self.x = self.op("Concat", [b, a], axis=1)

    def _pool(self) -> None:
        rng, dims = self.rng, len(self.sizes)
        window, stride = rng.choice([2, 3]), rng.choice([1, 2])
        pad = rng.choice([0, 0, 1])
        attrs: dict[str, Any] = {
            "kernel_shape": [window] * dims,
            "strides": [stride] * dims,
            "pads": [pad] * 2 * dims,
        }
        op = rng.choice(["MaxPool", "AveragePool"])
        if op == "AveragePool":
            attrs["count_include_pad"] = rng.choice([0, 1])
        self.x = self.op(op, [self.x], **attrs)
        self.sizes = [(s + 2 * pad - window) // stride + 1 for s in self.sizes]

    def _pad(self) -> None:
        sides = [[self.rng.choice([0, 1, 2]) for _ in self.sizes] for _ in range(2)]
        pads = [0, 0, *sides[0], 0, 0, *sides[1]]
        mode = self.rng.choice(["constant", "constant", "reflect", "edge"])
        if self.opset < 11:
            self.x = self.op("Pad", [self.x], pads=pads, mode=mode)
        else:
            self.x = self.op("Pad", [self.x, self.ints(*pads)], mode=mode)
        self.sizes = [s + a + b for s, a, b in zip(self.sizes, *sides, strict=True)]

    def _slice(self) -> None:
        axis, start = self.rng.randrange(len(self.sizes)), self.rng.choice([0, 1])
        end = self.rng.choice([-1, 2**62])
        if self.opset < 10:
            self.x = self.op("Slice", [self.x], starts=[start], ends=[end], axes=[axis + 2])
        else:
            self.x = self.op("Slice", [self.x, *(self.ints(v) for v in (start, end, axis + 2))])
        self.sizes[axis] -= start + (end == -1)

    def _excite(self) -> None:
        pooled = self.op("GlobalAveragePool", [self.x])
        kernel = [1] * len(self.sizes)
        gate = self.op(
            "Conv", [pooled, self.weight(self.channels, self.channels, *kernel)], kernel_shape=kernel
        )
        self.x = self.op("Mul", [self.x, self.op(self.rng.choice(["Sigmoid", "HardSigmoid"]), [gate])])

    def _shuffle(self) -> None:
        groups = 2
        self.x, self.channels = self._conv(self.x, 8, same=True), 8
        apart = self.op("Reshape", [self.x, self.batch_and(self.x, groups, 8 // groups, *self.sizes)])
        turned = self.op("Transpose", [apart], perm=[0, 2, 1, 3, 4])
        self.x = self.op("Reshape", [turned, self.batch_and(self.x, 8, *self.sizes)])

    def _upsample(self) -> None:
        scales = np.array([1, 1, 2, 2], np.float32)
        mode = self.rng.choice(["nearest", "linear"])
        if self.opset < 9:
            self.x = self.op("Upsample", [self.x], mode=mode, scales=scales.tolist())
        elif self.opset < 10:
            self.x = self.op("Upsample", [self.x, self.constant(scales)], mode=mode)
        elif self.opset < 11:
            self.x = self.op("Resize", [self.x, self.constant(scales)], mode=mode)
        else:
            rest = {"nearest_mode": "floor"} if mode == "nearest" else {}
            how = "asymmetric" if mode == "nearest" else "half_pixel"
            inputs = [
                self.x,
                "" if self.opset >= 13 else self.constant(np.zeros(0, np.float32)),
                self.constant(scales),
            ]
            self.x = self.op("Resize", inputs, mode=mode, coordinate_transformation_mode=how, **rest)
        self.sizes = [2 * s for s in self.sizes]

    def _channels_last(self) -> None:
        """As converters from channels-last frameworks write it."""
        turned = self.op("Transpose", [self.x], perm=[0, 2, 3, 1])
        turned = self.op(
            "Add", [self.op("Mul", [turned, self.weight(self.channels)]), self.weight(self.channels)]
        )
        self.x = self.op(
            "Transpose", [self.op(self.rng.choice(["Relu", "Tanh"]), [turned])], perm=[0, 3, 1, 2]
        )

    def _blocks(self) -> None:
        self.x, self.channels = self._conv(self.x, 8, same=True), 2
        self.x = self.op("DepthToSpace", [self.x], blocksize=2)
        self.sizes = [2 * s for s in self.sizes]

    # ---- heads, tokens, recurrent layers ----

    def _head(self) -> None:
        kind = self.rng.choice(["pool", "mean", "flatten", "reshape"])
        if kind == "pool":
            self.x = self.op("Flatten", [self.op("GlobalAveragePool", [self.x])], axis=1)
        elif kind == "mean":
            self.x = self.with_axes("ReduceMean", self.x, list(range(2, 2 + len(self.sizes))), 18, keepdims=0)
        else:
            self.channels *= int(np.prod(self.sizes))
            if kind == "reshape":
                self.x = self.op("Reshape", [self.x, self.batch_and(self.x, -1)])
            else:
                self.x = self.op("Flatten", [self.x])
        self.sizes = []
        self._dense(self.rng.randint(2, 9))
        if self.rng.random() < 0.3:
            self.x = self.op("Softmax", [self.x], axis=self.rng.choice([1, -1]) if self.opset >= 11 else 1)

    def _dense(self, outputs: int) -> None:
        if self.rng.random() < 0.5:
            inputs = [self.x, self.weight(outputs, self.channels), self.weight(outputs)]
            self.x = self.op("Gemm", inputs, transB=1)
        else:
            matrix = np.ascontiguousarray(
                self.numbers.standard_normal((self.channels, outputs)) * self.channels**-0.5
            )
            product = self.op("MatMul", [self.x, self.constant(matrix.astype(np.float32))])
            self.x = self.op("Add", [product, self.weight(outputs)])
        self.channels = outputs

    def _recurrent(self) -> None:
        """[N, T, channels] through one recurrent layer and a dense one of its last step, or of its mean."""
        op, both = self.rng.choice(["LSTM", "GRU", "RNN"]), self.rng.random() < 0.4
        hidden, gates, ways = self.rng.randint(3, 8), {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 1 + both
        shapes = [
            (ways, gates * hidden, self.channels),
            (ways, gates * hidden, hidden),
            (ways, 2 * gates * hidden),
        ]
        inputs = [self.op("Transpose", [self.x], perm=[1, 0, 2]), *(self.weight(*s) for s in shapes)]
        attrs = {"linear_before_reset": 1} if op == "GRU" else {}
        direction = "bidirectional" if both else self.rng.choice(["forward", "forward", "reverse"])
        y = self.op(op, inputs, hidden_size=hidden, direction=direction, **attrs)
        if both:
            y = self.op("Reshape", [self.op("Transpose", [y], perm=[0, 2, 1, 3]), self.ints(0, 0, -1)])
        else:
            y = self.with_axes("Squeeze", y, [1], 13)
        self.channels = hidden * ways
        y = self.op("Transpose", [y], perm=[1, 0, 2])
        if self.rng.random() < 0.5:
            self.x = self.op("Gather", [y, self.constant(np.array(-1, np.int64))], axis=1)
        else:
            self.x = self.with_axes("ReduceMean", y, [1], 18, keepdims=0)
        self._dense(self.rng.randint(2, 6))

    def _tokens(self) -> None:
        """Self-attention and a perceptron over [N, T, channels], both in residuals."""
        heads, steps = self.rng.choice([1, 2]), self.sizes[0]
        self._dense_last(4 * heads)
        before, width = self.x, self.channels
        projected = []
        for _ in range(3):
            self.x, self.channels = before, width
            self._dense_last(width)
            split = self.op("Reshape", [self.x, self.batch_and(before, steps, heads, 4)])
            projected.append(split)
        q, v = (self.op("Transpose", [p], perm=[0, 2, 1, 3]) for p in (projected[0], projected[2]))
        scores = self.op("MatMul", [q, self.op("Transpose", [projected[1]], perm=[0, 2, 3, 1])])
        scores = self.op("Softmax", [self.op("Div", [scores, self.constant(np.float32(2))])], axis=3)
        mixed = self.op("Transpose", [self.op("MatMul", [scores, v])], perm=[0, 2, 1, 3])
        self.x, self.channels = self.op("Reshape", [mixed, self.batch_and(before, steps, width)]), width
        self._dense_last(width)
        self.x = self.op("Add", [before, self.x])
        if self.opset >= 17 and self.rng.random() < 0.6:
            self.x = self.op("LayerNormalization", [self.x, self.weight(width), self.weight(width)], axis=-1)
        self._dense_last(self.rng.randint(3, 12))
        self.x = self.op(self.rng.choice(["Relu", "Tanh"]), [self.x])
        self.x = self.with_axes("ReduceMean", self.x, [1], 18, keepdims=0)
        self._dense(self.rng.randint(2, 6))

    def _dense_last(self, outputs: int) -> None:
        matrix = (self.numbers.standard_normal((self.channels, outputs)) * self.channels**-0.5).astype(
            np.float32
        )
        self.x = self.op("Add", [self.op("MatMul", [self.x, self.constant(matrix)]), self.weight(outputs)])
        self.channels = outputs
