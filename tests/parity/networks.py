"""Small networks for tests: one for each layer or situation that a reader must cope with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Apply(nn.Module):
    """A model that is one function of its inputs, between two layers where `width` says so."""

    def __init__(self, function: Callable[..., Any], width: int | None = None) -> None:
        super().__init__()
        self.function = function
        self.before = nn.Conv2d(width, width, 1) if width else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.function(self.before(x))


class Net(nn.Sequential):
    """Layers in a row, under the names `body.0`, `body.1`, ..."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.add_module("body", nn.Sequential(*layers))


class Residual(nn.Module):
    """Two convolutions with batch norm, an addition in place and ReLUs in place that share one module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, two residual blocks, pooling to the size that is there, a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(self.dropout(x.view(x.size(0), -1)))


class Attention(nn.Module):
    """Self-attention through nn.MultiheadAttention, with or without the weights."""

    def __init__(self, need_weights: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attn(x, x, x, need_weights=self.need_weights)
        return (y, weights) if self.need_weights else y


class CrossAttention(nn.Module):
    """Queries from one input, keys and values from another: the projection is split in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        return self.attn(query, memory, memory, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent layer that returns its sequence and its last state; the state may be given."""

    def __init__(self, layer: nn.RNNBase, given: bool = False) -> None:
        super().__init__()
        self.rnn = layer
        self.given = given

    def forward(self, x: Tensor) -> Any:
        if not self.given:
            return self.rnn(x)
        batch = x.shape[0] if self.rnn.batch_first else x.shape[1]
        cells = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        state = torch.ones(cells, batch, self.rnn.hidden_size) / 2
        return self.rnn(x, (state, state * 2) if isinstance(self.rnn, nn.LSTM) else state)


class Tied(nn.Module):
    """A language model's embedding whose matrix is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


class TiedByHand(nn.Module):
    """The same tie, written as a matrix product with the transposed embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).tanh() @ self.embed.weight.t()


class Twice(nn.Module):
    """One convolution and one batch norm that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(self.bn(self.conv(x)))))


class Loose(nn.Module):
    """Parameters and buffers that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.w = nn.Parameter(torch.randn(6, 5))
        self.v = nn.Parameter(torch.randn(4, 5))
        self.gamma = nn.Parameter(torch.rand(4))
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, padding=1).mean((2, 3))
        return F.linear(x @ self.w, self.v) * self.gamma + self.shift


class Gamma(nn.Module):
    """A scale per channel that forward reshapes, a learned position table that it cuts, a mask that it
    builds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(4))
        self.table = nn.Parameter(torch.randn(9, 6))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(5, 6).tril().to(x.dtype)
        return x * self.gamma[:, None, None] + self.table[:5] * mask


class Token(nn.Module):
    """A class token in front of the sequence, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, activation="gelu", norm_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.head(self.block(x)[:, 0])


class ManyOutputs(nn.Module):
    """Two inputs; outputs in a dict with a tuple and a list inside."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, image: Tensor, meta: Tensor) -> dict[str, Any]:
        a, b = self.left(image), self.right(meta)
        return {"sum": a + b, "parts": (a, [b, a * b])}


class InPlace(nn.Module):
    """Writes in place: to a tensor, through slices, reshapes and parts, seen again through other views."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        first, second = y.chunk(2, dim=1)
        flat = y.view(-1)
        y[:, :1] += 1
        second.mul_(3)
        flat.clamp_(max=2.0)
        row = y.select(1, 0)
        y.transpose(1, 2).relu_()
        y[:, 1, 0] = 7.0
        return y, first, flat, row


class Frozen(nn.Module):
    """A training network whose batch norm stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.frozen, self.live = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.live(self.frozen(self.conv(x)))


class Branches(nn.Module):
    """Control flow that depends on the values of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Counting(nn.Module):
    """Writes to its own buffer in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls
