"""Random networks of everything that couples channels: for a seed always the same one."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(r: random.Random, channels: int) -> nn.Module:
    made: nn.Module = r.choice([
        nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, affine=False), nn.Identity(),
        nn.GroupNorm(r.choice([d for d in (1, 2, 4) if channels % d == 0]), channels), nn.InstanceNorm2d(channels),
    ])  # fmt: skip
    return made


class Convolution(nn.Module):
    """Plain, grouped or depthwise, with a norm and a function behind it."""

    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        groups = r.choice([1, 1, 1, *(d for d in (2, 4) if ins % d == 0 and outs % d == 0)])
        if outs % ins == 0 and r.random() < 0.25:
            groups = ins
        self.conv = nn.Conv2d(ins, outs, 3, padding=1, groups=groups, bias=r.random() < 0.5)
        self.norm = _norm(r, outs)
        self.function = r.choice(
            [nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.PReLU(outs), nn.PReLU(), nn.Hardswish()]
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self.norm(self.conv(x)))
        return out


class Residual(nn.Module):
    """A sum with what went in; where channels are added, zeros or a projection stand in."""

    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Convolution(r, ins, outs), Convolution(r, outs, outs))
        self.missing = outs - ins
        self.shortcut = nn.Conv2d(ins, outs, 1) if self.missing < 0 or r.random() < 0.5 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.shortcut is None else self.shortcut(x)
        if self.shortcut is None and self.missing:
            y = F.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        out: Tensor = self.body(x) + y
        return out


class Concatenation(nn.Module):
    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        first = r.randint(1, outs - 1)
        self.a, self.b = Convolution(r, ins, first), Convolution(r, ins, outs - first)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


class Split(nn.Module):
    """Parts of a layer's channels go separate ways; one is also multiplied by the other."""

    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        self.wide, self.way = nn.Conv2d(ins, 2 * outs, 1), r.choice(["chunk", "split", "slice", "glu"])
        self.left = Convolution(r, outs, outs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        half = y.shape[1] // 2
        if self.way == "glu":
            return F.glu(y, 1)
        if self.way == "slice":
            a, b = y[:, :half], y[:, half:]
        else:
            a, b = y.chunk(2, 1) if self.way == "chunk" else y.split([half, half], 1)
        out: Tensor = self.left(a) * torch.sigmoid(b)
        return out


class Gate(nn.Module):
    """Squeeze and excitation behind a convolution."""

    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        self.conv = Convolution(r, ins, outs)
        self.down, self.up, self.flat = nn.Linear(outs, 6), nn.Linear(6, outs), r.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        pooled = y.mean((2, 3)) if self.flat else F.adaptive_avg_pool2d(y, 1).flatten(1)
        return y * torch.sigmoid(self.up(F.relu(self.down(pooled))))[:, :, None, None]


class Transposed(nn.Module):
    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        groups = 2 if ins % 2 == 0 and outs % 2 == 0 and r.random() < 0.3 else 1
        self.up, self.norm = nn.ConvTranspose2d(ins, outs, 2, 2, groups=groups), _norm(r, outs)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.up(x))), 2)


class Shuffle(nn.Module):
    def __init__(self, r: random.Random, ins: int, outs: int) -> None:
        super().__init__()
        self.pixels = r.random() < 0.5
        self.conv = nn.Conv2d(ins, outs * (4 if self.pixels else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.pixels:
            return F.avg_pool2d(F.pixel_shuffle(y, 2), 2)
        b, c, h, w = y.shape
        return y.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w) if c % 2 == 0 else y


class Attention(nn.Module):
    """Over tokens of a width, with heads and an MLP, in one of the ways in which people write it."""

    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        self.heads, self.way = r.choice([2, 4]), r.choice(["fused", "apart", "torch", "products"])
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        if self.way == "torch":
            self.attention = nn.MultiheadAttention(width, self.heads, batch_first=True)
        elif self.way == "fused":
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.way == "torch":
            x = x + self.attention(y, y, y, need_weights=False)[0]
        else:
            x = x + self.out(self._mixed(y))
        out: Tensor = x + self.down(F.gelu(self.up(self.last(x))))
        return out

    def _mixed(self, y: Tensor) -> Tensor:
        b, t, c = y.shape
        if self.way == "fused":
            q, k, v = (
                self.qkv(y).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            )
        else:
            q, k, v = (
                part(y).reshape(b, t, self.heads, c // self.heads).transpose(1, 2)
                for part in (self.q, self.k, self.v)
            )
        if self.way == "products":
            scores = torch.softmax(q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5, -1)
            mixed = scores @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(b, t, c)


class Recurrent(nn.Module):
    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        kind = r.choice([nn.LSTM, nn.GRU, nn.RNN])
        both = r.random() < 0.5
        self.cell = kind(width, 10, r.choice([1, 2]), batch_first=True, bidirectional=both)
        self.out, self.state = nn.Linear(20 if both else 10, width), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.cell(x)
        last = state[0] if isinstance(state, tuple) else state
        out: Tensor = self.out(y) + self.state(last[-1])[:, None]
        return out


class Tied(nn.Module):
    """One linear layer, used twice, around a function."""

    def __init__(self, r: random.Random, width: int) -> None:
        super().__init__()
        self.into, self.twice, self.back = nn.Linear(width, 12), nn.Linear(12, 12), nn.Linear(12, width)
        self.position = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.twice(F.relu(self.into(x) + self.position)))
        out: Tensor = self.back(F.relu(self.twice(y)))
        return out


IMAGES = (Convolution, Residual, Concatenation, Split, Gate, Transposed, Shuffle)
TOKENS = (Attention, Recurrent, Tied)


class Network(nn.Module):
    """Blocks on images of 3 x 8 x 8, then perhaps some on their pixels as tokens, then 5 numbers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        blocks: list[nn.Module] = []
        channels = 3
        for _ in range(r.randint(2, 4)):
            wider = r.choice([8, 12, 16])
            blocks.append(r.choice(IMAGES)(r, channels, wider))
            channels = wider
        self.images = nn.Sequential(*blocks)
        self.tokens = nn.Sequential(*(r.choice(TOKENS)(r, channels) for _ in range(r.choice([0, 0, 1, 2]))))
        self.flat = not len(self.tokens) and r.random() < 0.5
        self.head = nn.Linear(channels * (16 if self.flat else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.images(x)
        if len(self.tokens):
            y = self.tokens(y.flatten(2).transpose(1, 2)).mean(1)
        elif self.flat:
            y = F.adaptive_avg_pool2d(y, 4).flatten(1)
        else:
            y = y.mean((2, 3))
        out: Tensor = self.head(y)
        return out


def network(seed: int) -> nn.Module:
    """A network in eval mode with weights and statistics that tell channels apart."""
    torch.manual_seed(seed)
    made = Network(seed).eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
        if isinstance(part, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm) and part.weight is not None:
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.3)
    return made
