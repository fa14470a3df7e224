"""The probe: a small network of what quantizers stumble over (depthwise, hardswish, attention, LayerNorm)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Inverted(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection with hardswish; a residual where the shape is kept."""

    def __init__(self, inputs: int, channels: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.residual = stride == 1 and inputs == channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn1(self.expand(x)))
        y = F.hardswish(self.bn2(self.depthwise(y)))
        y = self.bn3(self.project(y))
        return x + y if self.residual else y


class Probe(nn.Module):
    """[n, 1, 8, 8] -> [n, 10]: 16 convolutions, then one self-attention layer over the 4x4 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        shapes = [(32, 40, 1), (40, 64, 2), (64, 64, 1), (64, 72, 1), (72, 72, 1)]
        self.blocks = nn.Sequential(*(Inverted(*shape) for shape in shapes))
        self.attention = nn.MultiheadAttention(72, 4, batch_first=True)
        self.norm = nn.LayerNorm(72)
        self.head = nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.bn(self.stem(x))))
        tokens = torch.flatten(x, 2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head(self.norm(tokens + mixed).mean(1))
