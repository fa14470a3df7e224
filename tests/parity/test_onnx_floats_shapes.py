"""Operators that move, repeat, select, pool or interpolate: ONNX Runtime answers as torch does."""

import pytest
import torch
import torch.nn.functional as F
from float_functions import Function, One, sample
from float_moves import MOVES, OF_FIXED_IMAGES, PADDING, POOLS, RESIZES
from onnx_floats import check
from torch import Tensor

FREE = pytest.mark.parametrize("batch_only", [False, True], ids=["free", "batch"])

ACROSS_THE_BATCH: list[Function] = [
    lambda x: x.flatten(0, 1),
    lambda x: x.transpose(-1, 0),
    lambda x: x.permute(-1, -3, -2),
    lambda x: x[1:, :, 5:],
    lambda x: x[-1],
    lambda x: x.repeat(2, 1, 1, 3),
    lambda x: x.repeat_interleave(2, 0),
    lambda x: x.repeat_interleave(2),
    lambda x: x.flip(0, -1),
    lambda x: x.roll(7, 0),
    lambda x: x.roll(5),
    lambda x: x[:, :1].expand(x.shape),
    lambda x: torch.zeros(x.shape[0], 2) + 1,
]


@FREE
@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str, batch_only: bool) -> None:
    x, functions = MOVES[name]
    check(One(functions), x, rtol=0, atol=0, batch_only=batch_only)


@FREE
def test_moves_across_the_batch(batch_only: bool) -> None:
    check(One(ACROSS_THE_BATCH), sample(3, 4, 6), rtol=0, atol=0, batch_only=batch_only)


def test_moves_of_fixed_images() -> None:
    check(One(OF_FIXED_IMAGES), sample(2, 8, 4, 6), rtol=0, atol=0, batch_only=True)


def test_padding() -> None:
    check(One(PADDING), sample(2, 3, 5, 6), rtol=1e-6, atol=1e-6)


@FREE
@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str, batch_only: bool) -> None:
    x, functions = POOLS[name]
    check(One(functions), x, batch_only=batch_only)


@FREE
def test_pooling_of_solids(batch_only: bool) -> None:
    functions: list[Function] = [
        lambda x: F.max_pool3d(x, 2, 2, 1),
        lambda x: F.max_pool3d(x, (2, 3, 2), ceil_mode=True),
        lambda x: F.avg_pool3d(x, 3, 2, 1),
        lambda x: F.avg_pool3d(x, 2, 2, 1, True, False),
        lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)),
        lambda x: F.adaptive_avg_pool3d(x, 1),
        lambda x: F.adaptive_max_pool3d(x, 2),
    ]
    check(One(functions), sample(2, 2, 5, 6, 7), batch_only=batch_only)


ALSO_RESIZED: dict[str, tuple[Tensor, list[Function]]] = {
    "recomputed": (
        sample(2, 3, 5, 7),
        [
            lambda x: F.interpolate(x, scale_factor=1.3, recompute_scale_factor=True),
            lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1)),
        ],
    ),
    "nearest_1d": (
        sample(2, 3, 7),
        [lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=10)],
    ),
    "nearest_3d": (
        sample(2, 2, 3, 4, 2),
        [lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=5)],
    ),
    "trilinear": (
        sample(2, 2, 3, 4, 5),
        [
            lambda x, a=a: F.interpolate(x, size=(5, 6, 3), mode="trilinear", align_corners=a)
            for a in (False, True)
        ],
    ),
}


@FREE
@pytest.mark.parametrize("name", [*RESIZES, *ALSO_RESIZED])
def test_interpolation(name: str, batch_only: bool) -> None:
    x, functions = (RESIZES | ALSO_RESIZED)[name]
    check(One(functions), x, atol=1e-5, batch_only=batch_only)
