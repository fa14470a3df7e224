"""Random networks by seed, with a recipe and inputs: what the exactness of deployed files is counted on."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Identity,
    nn.Hardtanh,
]  # fmt: skip


class Sum(nn.Module):
    """The sum of a branch and its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Shift(nn.Module):
    """A parameter of one number a channel, added."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Pooled(nn.Module):
    """The input plus its own mean, repeated over all places."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(tuple(range(2, x.dim())), keepdim=True)


class Gate(nn.Module):
    """Channels scaled by a gate of their means (squeeze and excitation, arXiv 1709.01507)."""

    def __init__(self, conv: type[nn.Module], channels: int, hard: bool) -> None:
        super().__init__()
        self.excite = conv(channels, channels, 1)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(x.mean(tuple(range(2, x.dim())), keepdim=True)))


class Join(nn.Module):
    """Two branches of the same input, one after the other along the channels."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Halves(nn.Module):
    """One half of the channels through a branch, the other past it, exchanged."""

    def __init__(self, branch: nn.Module, chunk: bool) -> None:
        super().__init__()
        self.branch, self.chunk = branch, chunk

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        a, b = x.chunk(2, 1) if self.chunk else torch.split(x, [half, x.shape[1] - half], 1)
        return torch.cat([b, self.branch(a)], 1)


class Twice(nn.Module):
    """The same layer applied twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class Moved(nn.Module):
    """Places moved about: padding, slicing, upsampling."""

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "pad":
            return F.pad(x, (1, 2) if self.dims == 1 else (1, 0, 0, 2))
        if self.kind == "slice":
            return x[..., 1:]
        if self.kind == "scale":
            return x * 0.5
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention by hand over [n, t, width], with a LayerNorm and a residual."""

    def __init__(self, width: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / (width // self.heads) ** 0.5
        mixed = torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).reshape(n, t, width)
        return x + self.out(mixed)


class Perceptron(nn.Module):
    """Two linear layers over the last axis, in a residual."""

    def __init__(self, width: int, hidden: int, activation: nn.Module, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up, self.activation, self.down = nn.Linear(width, hidden), activation, nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class Head(nn.Module):
    """Pooled or flattened features, a linear layer; with ``both``, the features are an output of their own."""

    def __init__(self, features: int, classes: int, pool: bool, both: bool) -> None:
        super().__init__()
        self.linear, self.pool, self.both = nn.Linear(features, classes), pool, both

    def forward(self, x: Tensor) -> Any:
        flat = x.mean(tuple(range(2, x.dim()))) if self.pool else torch.flatten(x, 1)
        answer = self.linear(flat)
        return (answer, flat) if self.both else answer


class Network(nn.Module):
    """A body and a head; a second input is added to the first after a layer of its own."""

    def __init__(self, body: nn.Module, head: nn.Module, second: nn.Module | None) -> None:
        super().__init__()
        self.body, self.head, self.second = body, head, second

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class TwoInputs(Network):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        assert self.second is not None
        return self.head(self.body(x + self.second(y)))


@dataclass
class Drawn:
    """A network, how to quantize it, and ``inputs(count)``: new inputs by every call."""

    seed: int
    module: nn.Module
    shapes: list[tuple[int, ...]]
    recipe: dict[str, Any]
    parts: list[str] = field(default_factory=list)

    def inputs(self, count: int, variant: int = 0) -> tuple[Tensor, ...]:
        """``count`` samples for each input; ``variant`` chooses other numbers."""
        generator = torch.Generator().manual_seed(1000 * self.seed + variant)
        return tuple(torch.randn(count, *shape, generator=generator) * 1.5 for shape in self.shapes)


def draw(seed: int) -> Drawn:
    """The network of a seed: one in four works on tokens, one in four on sequences, the others on images."""
    torch.manual_seed(seed)
    return _Builder(random.Random(seed)).draw(seed)


class _Builder:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.parts: list[str] = []
        self.dims = 2
        self.sizes: list[int] = []

    def draw(self, seed: int) -> Drawn:
        kind = self.rng.choice(["tokens", "sequence", "image", "image"])
        module, shapes = (
            self._tokens() if kind == "tokens" else self._convolutional(1 if kind == "sequence" else 2)
        )
        _spread(module, self.rng)
        return Drawn(seed, module.eval(), shapes, self._recipe(), [kind, *self.parts])

    def _recipe(self) -> dict[str, Any]:
        rng = self.rng
        bits = rng.choice([2, 3, 4, 5, 6, 7, 8, 8, 8])
        return {
            "weights": f"int{bits}",
            "activations": rng.choice(["int8", "int8", "uint8", "uint8", "uint7", "uint6", "uint4", "int4"]),
            "granularity": rng.choice(["channel", "channel", "tensor"]),
            "observer": rng.choice(["minmax", "minmax", "percentile", "mse", "entropy", "moving_average"]),
        }

    def _activation(self) -> nn.Module:
        return self.rng.choice(ACTIVATIONS)()

    def _tokens(self) -> tuple[nn.Module, list[tuple[int, ...]]]:
        rng = self.rng
        heads, tokens = rng.choice([1, 2, 3]), rng.randint(2, 9)
        width = heads * rng.choice([4, 5, 8])
        blocks: list[nn.Module] = []
        for _ in range(rng.randint(1, 3)):
            norm = rng.random() < 0.6
            name = rng.choice(["attention", "perceptron", "perceptron"])
            self.parts.append(name + (" norm" if norm else ""))
            hidden = rng.randint(2, 40)
            blocks.append(
                Attention(width, heads, norm)
                if name == "attention"
                else Perceptron(width, hidden, self._activation(), norm)
            )
        head = nn.Linear(width, rng.randint(1, 9))
        return Network(nn.Sequential(*blocks), head, None), [(tokens, width)]

    def _convolutional(self, dims: int) -> tuple[nn.Module, list[tuple[int, ...]]]:
        rng = self.rng
        self.dims, self.sizes = dims, [rng.randint(7, 16) for _ in range(dims)]
        channels = rng.choice([1, 2, 3, 4, 5, 8, 16])
        shape = (channels, *self.sizes)
        second = self._layer(channels, channels, same=True) if rng.random() < 0.2 else None
        blocks: list[nn.Module] = []
        for _ in range(rng.randint(1, 4)):
            block, channels = self._block(channels)
            blocks.append(block)
        pool = rng.random() < 0.5
        features = channels * (1 if pool else int(torch.tensor(self.sizes).prod()))
        head = Head(features, rng.randint(1, 11), pool, rng.random() < 0.2)
        made = (Network if second is None else TwoInputs)(nn.Sequential(*blocks), head, second)
        return made, [shape] if second is None else [shape, shape]

    def _conv_type(self) -> type[nn.Module]:
        return nn.Conv1d if self.dims == 1 else nn.Conv2d

    def _layer(self, inputs: int, outputs: int, same: bool = False, groups: int = 1) -> nn.Sequential:
        """A convolution with its norm and activation; unless ``same``, the sizes of the picture follow it."""
        rng = self.rng
        kernel = [rng.choice([1, 2, 3, 3, 5]) for _ in range(self.dims)]
        if rng.random() < 0.6:
            kernel = [kernel[0]] * self.dims
        dilation = rng.choice([1, 1, 1, 2])
        same = same or rng.random() < 0.4
        if same:  # torch exports 'same' padding of an even kernel for one batch size only
            kernel = [k + 1 - k % 2 for k in kernel]
        options: dict[str, Any] = {"groups": groups, "bias": rng.random() < 0.5, "dilation": dilation}
        if same:
            options["padding"] = "same"
        else:
            options["stride"] = rng.choice([1, 1, 2])
            options["padding"] = [dilation * (k - 1) // 2 for k in kernel]
            self.sizes = [
                (s + 2 * p - dilation * (k - 1) - 1) // options["stride"] + 1
                for s, p, k in zip(self.sizes, options["padding"], kernel, strict=True)
            ]
        conv = self._conv_type()(inputs, outputs, kernel, **options)
        norms = [nn.BatchNorm1d, nn.BatchNorm2d]
        norm = norms[self.dims - 1](outputs) if rng.random() < 0.6 else nn.Identity()
        return nn.Sequential(conv, norm, self._activation())

    def _block(self, inputs: int) -> tuple[nn.Module, int]:
        rng = self.rng
        names = ["layer", "layer", "depthwise", "grouped", "residual", "gate", "join", "halves", "twice", "move",
                 "pool", "shift", "pooled"]  # fmt: skip
        if min(self.sizes) < 4:
            names = ["layer", "residual", "gate", "join", "shift"]
        name = rng.choice(names)
        self.parts.append(name)
        outputs = rng.randint(1, 36)
        if name in ("move", "pool"):
            return nn.Sequential(self._layer(inputs, outputs, same=True), self._resize(name)), outputs
        if name == "layer":
            return self._layer(inputs, outputs), outputs
        if name == "depthwise":
            multiplier = rng.choice([1, 1, 2])
            first = self._layer(inputs, inputs * multiplier, groups=inputs)
            return nn.Sequential(first, self._layer(inputs * multiplier, outputs)), outputs
        if name == "grouped":
            groups = rng.choice([2, 3, 4])
            return nn.Sequential(
                self._layer(inputs, 4 * groups), self._layer(4 * groups, 2 * groups, groups=groups)
            ), 2 * groups
        before = self._layer(inputs, outputs, same=True)
        return nn.Sequential(before, self._around(name, outputs)), 2 * outputs if name == "join" else outputs

    def _around(self, name: str, channels: int) -> nn.Module:
        rng = self.rng
        if name == "gate":
            return Gate(self._conv_type(), channels, rng.random() < 0.3)
        if name == "join":
            right = nn.Identity() if rng.random() < 0.3 else self._layer(channels, channels, same=True)
            return Join(self._layer(channels, channels, same=True), right)
        if name == "halves" and channels > 1:
            half = (channels + 1) // 2 if (chunk := rng.random() < 0.5) else channels // 2
            return Halves(self._layer(half, half, same=True), chunk)
        if name == "twice":
            return Twice(self._conv_type()(channels, channels, 3, padding=1))
        if name == "shift":
            return nn.Sequential(Shift(channels, self.dims), self._activation())
        if name == "pooled":
            return Pooled()
        return nn.Sequential(Sum(self._layer(channels, channels, same=True)), self._activation())

    def _resize(self, name: str) -> nn.Module:
        rng = self.rng
        if name == "move":
            kind = rng.choice(["pad", "slice", "scale", "upsample"])
            self.parts[-1] = kind
            if kind == "pad":
                self.sizes = [self.sizes[0] + 3] if self.dims == 1 else [self.sizes[0] + 2, self.sizes[1] + 1]
            elif kind == "slice":
                self.sizes[-1] -= 1
            elif kind == "upsample":
                self.sizes = [2 * s for s in self.sizes]
            return Moved(kind, self.dims)
        kind = rng.choice(["max", "avg", "adaptive"])
        self.parts[-1] = kind
        if kind == "adaptive":
            made = (
                nn.AdaptiveAvgPool1d(self.sizes[0])
                if self.dims == 1
                else nn.AdaptiveAvgPool2d((1, self.sizes[1]))
            )
            self.sizes = self.sizes if self.dims == 1 else [1, self.sizes[1]]
            return made
        window = rng.choice([2, 3])
        stride = rng.choice([2, window])
        self.sizes = [(s - window) // stride + 1 for s in self.sizes]
        pools = {"max": (nn.MaxPool1d, nn.MaxPool2d), "avg": (nn.AvgPool1d, nn.AvgPool2d)}
        return pools[kind][self.dims - 1](window, stride)


def _spread(module: nn.Module, rng: random.Random) -> None:
    """Channels of very different size, and statistics as a trained network has them."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.05, 4)
                layer.bias.normal_()
            elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) and rng.random() < 0.3:
                sizes = torch.exp(torch.randn(layer.weight.shape[0]))
                layer.weight *= sizes.reshape(-1, *[1] * (layer.weight.dim() - 1))
