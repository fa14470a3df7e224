"""A small vision transformer (arXiv 2010.11929) that takes the mean over its patches; trained by train_networks.py."""

import torch
from torch import Tensor, nn

from models.transformer import Encoder


class VisionTransformer(nn.Module):
    """[n, 3, size, size] -> [n, classes]: patches as tokens with learned positions, an encoder, a linear head."""

    def __init__(
        self, size: int = 32, patch: int = 4, width: int = 64, depth: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.encoder = Encoder(width, heads=4, depth=depth, classes=classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.encoder(tokens + self.positions)
