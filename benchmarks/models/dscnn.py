"""A keyword-spotting network (DS-CNN of Hello Edge, arXiv 1711.07128); trained by train_networks.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Separable(nn.Module):
    """3x3 depthwise and 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class DSCNN(nn.Module):
    """[n, 1, 49, 10], 49 frames of 10 cepstral coefficients -> [n, 12]: the network of MLPerf Tiny's size."""

    def __init__(self, channels: int = 64, blocks: int = 4, classes: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1), bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(Separable(channels) for _ in range(blocks)))
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.adaptive_avg_pool2d(self.blocks(self.dropout(x)), 1)
        return self.head(torch.flatten(x, 1))
