"""Float functions that runtimes must answer as torch does, with inputs for them."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[..., Any]


class Functions(nn.Module):
    """Several functions of the same inputs, as one model with one output each."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self.functions = list(functions)


class One(Functions):
    """Of one input: ``torch.export`` reads the signature."""

    def forward(self, x: Tensor) -> Any:
        return [f(x) for f in self.functions]


class Two(Functions):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return [f(x, y) for f in self.functions]


class Three(Functions):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:
        return [f(x, y, z) for f in self.functions]


def sample(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(3)) * 2


_X = torch.cat(
    [
        sample(2, 60),
        torch.tensor([[0.0, 0.5, -0.5, 1.5, 2.5, 1e-6, -3.0, 3.0, 6.0, 7.0, -9.0, 1e-3] * 5] * 2),
    ],
    0,
)
_POSITIVE = _X.abs() + 1e-3

OF_ONE: dict[str, tuple[Tensor, list[Function]]] = {
    "activations": (
        _X,
        [
            F.relu,
            F.relu6,
            F.hardtanh,
            lambda x: F.hardtanh(x, -2, 0.5),
            lambda x: F.hardtanh(x, 0.0, 1.0),
            F.hardswish,
            F.hardsigmoid,
            F.silu,
            F.gelu,
            lambda x: F.gelu(x, approximate="tanh"),
            F.elu,
            lambda x: F.elu(x, 0.7),
            F.celu,
            lambda x: F.celu(x, 2.0),
            F.selu,
            F.mish,
            F.softplus,
            lambda x: F.softplus(x, 3.0, 5.0),
            F.logsigmoid,
            torch.sigmoid,
            torch.tanh,
            F.leaky_relu,
            lambda x: F.leaky_relu(x, 0.3),
            lambda x: F.threshold(x, 0.4, -1.0),
            F.hardshrink,
            lambda x: F.hardshrink(x, 0.2),
            F.softshrink,
            lambda x: F.softshrink(x, 0.2),
            F.tanhshrink,
            F.softsign,
        ],
    ),
    "functions": (
        _X,
        [
            torch.exp,
            torch.expm1,
            torch.abs,
            torch.neg,
            torch.sign,
            torch.square,
            torch.sin,
            torch.cos,
            torch.erf,
            torch.floor,
            torch.ceil,
            torch.round,
            torch.trunc,
            torch.sinh,
            torch.cosh,
            torch.atan,
            torch.asinh,
            lambda x: torch.asin(x / 10),
            lambda x: torch.acos(x / 10),
            lambda x: torch.atanh(x / 10),
            lambda x: torch.acosh(x.abs() + 1),
            lambda x: torch.tan(x / 10),
            lambda x: x.clamp(-1, 2),
            lambda x: x.clamp(min=-1),
            lambda x: x.clamp(max=1.5),
            lambda x: x.clamp_min(0.5),
            lambda x: x**2,
            lambda x: x**3,
            lambda x: x**4.0,
            lambda x: x**3.0,
            lambda x: 2.0**x,
            lambda x: x.to(torch.int64),
            lambda x: x.to(torch.bool),
            lambda x: x.int().float(),
            torch.isnan,
            lambda x: (x > 0).to(torch.float32),
            lambda x: torch.nan_to_num(x / x),
            lambda x: torch.nan_to_num(x),
        ],
    ),
    "positive": (
        _POSITIVE,
        [
            torch.log,
            torch.log1p,
            torch.log2,
            torch.log10,
            torch.sqrt,
            torch.rsqrt,
            torch.reciprocal,
            lambda x: x**0.5,
            lambda x: x**-1.5,
            lambda x: x**-1,
        ],
    ),
    "with_numbers": (
        _X,
        [
            lambda x: x + 1,
            lambda x: x - 0.25,
            lambda x: 1.5 - x,
            lambda x: x * 3,
            lambda x: x / 7,
            lambda x: 2 / (x + 100),
            lambda x: torch.add(x, 2, alpha=3),
            lambda x: x // 0.7,
            lambda x: x % 0.75,
            lambda x: torch.fmod(x, 0.75),
            lambda x: torch.div(x, 0.7, rounding_mode="trunc"),
            lambda x: x > 0.5,
            lambda x: (x <= 1) & (x > -1),
            lambda x: ~(x < 0),
            lambda x: x != 0,
            lambda x: torch.full_like(x, 2.0),
            lambda x: x.new_zeros(x.shape[0], 3),
            lambda x: torch.ones_like(x) - x,
            lambda x: x.long() // 2,
            lambda x: x.long() % 3,
            lambda x: x.long() * 0.5,
            lambda x: torch.where(x > 0, x, -1.0),
            lambda x: x.masked_fill(x > 0.5, 9.0),
            lambda x: x.masked_fill(x < 0, -torch.inf),
            lambda x: torch.where(x > 0, 1, 0),
        ],
    ),
    "over_axes": (
        sample(3, 4, 6),
        [
            lambda x: x.softmax(-1),
            lambda x: x.softmax(1),
            lambda x: x.log_softmax(2),
            lambda x: x.log_softmax(1),
            lambda x: F.glu(x, 1),
            lambda x: F.glu(x),
            lambda x: x.cumsum(1),
            lambda x: x.cumsum(-1),
            lambda x: x.mean(1),
            lambda x: x.mean((1, 2), keepdim=True),
            torch.mean,
            torch.sum,
            lambda x: x.sum(-1, keepdim=True),
            lambda x: x.sum((0, 2)),
            lambda x: (x > 0).sum(1),
            lambda x: x.var(1),
            lambda x: x.var((1, 2), correction=0, keepdim=True),
            lambda x: x.std(-1),
            lambda x: torch.var(x, 2, unbiased=False),
            lambda x: x.amax(1),
            lambda x: x.amin((0, 2)),
            lambda x: x.argmax(1),
            lambda x: x.argmin(-1, keepdim=True),
            torch.argmax,
            lambda x: x.max(1),
            lambda x: x.min(2, True),
            torch.max,
            lambda x: x.logsumexp(1),
            lambda x: x.prod(1),
            lambda x: x.norm(dim=1),
            lambda x: x.norm(p=1, dim=(1, 2)),
            lambda x: x.norm(p=3, dim=2),
            lambda x: torch.linalg.vector_norm(x, float("inf"), 1),
            lambda x: (x > 3).any(1),
            lambda x: (x > -1).all(2),
            lambda x: torch.any(x > 4),
            lambda x: F.normalize(x, dim=1),
            lambda x: x.topk(2, 1),
            lambda x: x.topk(3)[1],
            lambda x: torch.tril(x),
            lambda x: torch.triu(x, 1),
        ],
    ),
}


OF_TWO: list[Function] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    lambda x, y: torch.add(x, y, alpha=2),
    lambda x, y: torch.sub(x, y, alpha=0.5),
    torch.maximum,
    torch.minimum,
    torch.lt,
    torch.ge,
    torch.eq,
    torch.ne,
    lambda x, y: x + y.long(),
    lambda x, y: x.long() / y.long().clamp(1, 3),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: x.masked_fill(y > 0, 0.0),
    lambda x, y: torch.cat([x, y], 1),
    lambda x, y: torch.cat([x, y.long()], -1),
    lambda x, y: torch.stack([x, y, x], 1),
    lambda x, y: torch.stack([x, y], -1),
    lambda x, y: x @ y.mT,
    lambda x, y: torch.einsum("bij,bkj->bik", x, y),
    lambda x, y: torch.einsum("bij,bij->b", x, y),
    lambda x, y: torch.einsum("bij,bkj->bki", x, y),
    lambda x, y: x.unsqueeze(1) @ y.mT.unsqueeze(1),
    lambda x, y: (x.unsqueeze(1) @ y[:, 0].unsqueeze(-1).unsqueeze(1)).squeeze(-1),
    lambda x, y: x.pow(y.abs().floor()),
    lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    lambda x, y: (x > 0) | (y > 0),
    lambda x, y: torch.logical_xor(x > 0, y > 0),
    lambda x, y: x % (y.abs() + 1),
    lambda x, y: torch.clamp(x, y, y + 1),
    lambda x, y: x[:, :1] * y[:, :, :1],
    torch.atan2,
]


def _attention(**options: object) -> Function:
    return lambda q, k, m: F.scaled_dot_product_attention(q, k, k * 2, **options)  # type: ignore[arg-type]


ATTENTION: list[Function] = [
    _attention(),
    _attention(is_causal=True),
    _attention(scale=0.3),
    lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m),
    lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m > 0),
    lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m.masked_fill(m < 0.5, -torch.inf)),
    lambda q, k, m: F.scaled_dot_product_attention(q, k[:, :2], k[:, 2:], enable_gqa=True),
    lambda q, k, m: F.scaled_dot_product_attention(q[:, 0], k[:, 1], k[:, 2]),
]


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and a mask."""
    mask = sample(2, 1, 5, 7)
    mask[0, 0, 2] = -1.0  # a row that masks everything
    return sample(2, 4, 5, 8), sample(2, 4, 7, 8).flip(0), mask


TAKEN_APART: list[Function] = [
    lambda x: F.cosine_similarity(x, x * 2 + 1, dim=1),
    lambda x: torch.lerp(x, x * 2, 0.3),
    lambda x: torch.addcmul(x, x, x, value=0.5),
    lambda x: torch.logaddexp(x, x * 2),
    lambda x: torch.diff(x, dim=1),
    lambda x: torch.std_mean(x, 1),
    lambda x: torch.aminmax(x, dim=1),
    lambda x: F.pairwise_distance(x, x + 1),
    lambda x: torch.einsum("bij->bji", x),
    lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3),
    lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 2),
    lambda x: x.unfold(2, 3, 2),
]
