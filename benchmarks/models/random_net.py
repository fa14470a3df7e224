"""Random convolutional networks by seed: the population on which exactness is counted."""

import random

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """The sum of a branch and its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Concat(nn.Module):
    """Two branches side by side, joined over channels."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Gate(nn.Module):
    """Channels scaled by a sigmoid of their means, as in squeeze-and-excitation (arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(self.squeeze(x)))


class RandomNet(nn.Module):
    """[n, channels, size, size] -> [n, classes], drawn by `seed`; `example` is the shape of one input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        channels, size = self.rng.choice([1, 2, 3, 5, 8]), self.rng.randint(6, 17)
        self.example = (channels, size, size)
        body: list[nn.Module] = []
        for _ in range(self.rng.randint(1, 5)):
            block, channels = self._block(channels)
            body.append(block)
            if size >= 6 and self.rng.random() < 0.3:
                body.append(self.rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)]))
                size //= 2
        self.body = nn.Sequential(*body)
        self.pool = self.rng.choice([nn.AdaptiveAvgPool2d(1), nn.Identity()])
        features = channels * (1 if isinstance(self.pool, nn.AdaptiveAvgPool2d) else size * size)
        hidden = self.rng.choice([0, 0, self.rng.randint(2, 33)])
        head: list[nn.Module] = [nn.Linear(features, hidden), self._activation()] if hidden else []
        self.head = nn.Sequential(*head, nn.Linear(hidden or features, self.rng.randint(2, 11)))
        self._spread()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.body(x)), 1))

    def _activation(self) -> nn.Module:
        kinds = [nn.ReLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Identity, nn.Hardswish, nn.SiLU, nn.Sigmoid]
        return self.rng.choice(kinds)()

    def _conv(self, inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
        kernel = self.rng.choice([1, 3, 3, 5])
        biased = self.rng.random() < 0.5
        conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=biased)
        norm = nn.BatchNorm2d(outputs) if self.rng.random() < 0.7 else nn.Identity()
        return nn.Sequential(conv, norm, self._activation())

    def _block(self, inputs: int) -> tuple[nn.Module, int]:
        outputs = self.rng.randint(1, 40)
        kind = self.rng.choice(["conv", "conv", "residual", "concat", "depthwise", "grouped", "gate"])
        if kind == "residual":
            return nn.Sequential(Residual(self._conv(inputs, inputs)), self._activation()), inputs
        if kind == "concat":
            return Concat(self._conv(inputs, outputs), self._conv(inputs, inputs)), outputs + inputs
        if kind == "depthwise":
            return nn.Sequential(self._conv(inputs, inputs, inputs), self._conv(inputs, outputs)), outputs
        if kind == "grouped":
            return nn.Sequential(self._conv(inputs, 4 * inputs), self._conv(4 * inputs, 8, 4)), 8
        if kind == "gate":
            return nn.Sequential(self._conv(inputs, outputs), Gate(outputs)), outputs
        return self._conv(inputs, outputs), outputs

    def _spread(self) -> None:
        """Channels of very different size, some all zero: ranges that quantizers meet in trained networks."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()  # type: ignore[union-attr]
                    module.running_var.uniform_(0.05, 4)  # type: ignore[union-attr]
                    module.bias.normal_()
                elif isinstance(module, nn.Conv2d | nn.Linear) and self.rng.random() < 0.3:
                    shape = (-1, *[1] * (module.weight.dim() - 1))
                    module.weight *= torch.exp(torch.randn(module.weight.shape[0])).reshape(shape)
                    if self.rng.random() < 0.2:
                        module.weight[0] = 0
