"""Operators that move, repeat, select, pool or interpolate floats: LiteRT answers as torch does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from float_functions import Function, One
from litert_floats import answers, check, file, kinds, lowered

from fewbit.targets._litert.prepare import prepare


def _x(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


MOVES: dict[str, tuple[Tensor, list[Function]]] = {
    "shapes": (
        _x(3, 4, 6),
        [
            lambda x: x.flatten(1),
            lambda x: x.unsqueeze(1).unsqueeze(-1),
            lambda x: x[:, None, :, :].squeeze(1),
            lambda x: x.transpose(1, 2),
            lambda x: x.permute(2, 0, 1),
            lambda x: x.mT,
            lambda x: x.movedim(0, 2),
            lambda x: x.unflatten(2, (2, 3)),
        ],
    ),
    "parts": (
        _x(3, 4, 6),
        [
            lambda x: x[:, 1:3],
            lambda x: x[:, :, ::2],
            lambda x: x[:, -3:-1],
            lambda x: x[:, 2],
            lambda x: x[:, -1, 3],
            lambda x: x.narrow(1, 1, 2),
            lambda x: x.split([1, 3], 1)[1],
            lambda x: torch.cat(x.chunk(2, 2)[::-1], 1),
            lambda x: x.unbind(1)[2],
            lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
            lambda x: x[:, : x.shape[1] - 1],
            lambda x: x[:, x.shape[1] // 2],
        ],
    ),
    "copies": (
        _x(3, 4, 6),
        [
            lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1),
            lambda x: x[:, :1].expand(x.shape[0], 4, 6),
            lambda x: x.repeat(1, 2, 1),
            lambda x: x.repeat_interleave(3, 1),
            lambda x: x.flip(1),
            lambda x: x.flip(2, 1),
            lambda x: x.roll(1, 1),
            lambda x: x.roll((2, -5), (1, 2)),
            lambda x: torch.tile(x, (2, 1)),
        ],
    ),
    "sizes": (
        _x(3, 4, 6),
        [
            lambda x: x + x.shape[1],
            lambda x: torch.arange(x.shape[1]) + 1,
            lambda x: x * torch.arange(x.shape[2]),
            lambda x: x.reshape(x.shape[0] * x.shape[1], -1),
        ],
    ),
    "pixels": (
        _x(2, 8, 4, 6),
        [
            lambda x: F.pixel_shuffle(x, 2),
            lambda x: F.pixel_unshuffle(x, 2),
            lambda x: F.channel_shuffle(x, 4),
            lambda x: x.reshape(x.shape[0], 2, -1, 4),
            lambda x: x.view(x.shape[0], x.shape[1] * 2, x.shape[2] // 2, x.shape[3]),
        ],
    ),
    "padding": (
        _x(2, 3, 5, 6),
        [
            *(
                lambda x, m=m: F.pad(x, (2, 1, 0, 3), m)
                for m in ("constant", "reflect", "replicate", "circular")
            ),
            lambda x: F.pad(x, (1, 2), value=3.5),
            lambda x: F.pad(x, (-1, 2, 1, -2)),
            lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
            lambda x: F.pad(x, (1, 1), value=-float("inf")).exp(),
        ],
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    x, functions = MOVES[name]
    check(One(functions), x, tolerance=1e-6)


POOLS: dict[str, tuple[Tensor, list[Function]]] = {
    "1d": (
        _x(2, 3, 11),
        [
            lambda x: F.max_pool1d(x, 3, 2, 1),
            lambda x: F.max_pool1d(x, 3, 2, dilation=2),
            lambda x: F.max_pool1d(x, 2, 3, ceil_mode=True),
            lambda x: F.avg_pool1d(x, 3, 2, 1),
            lambda x: F.avg_pool1d(x, 3, 2, 1, True, False),
            lambda x: F.avg_pool1d(x, 2, 2, ceil_mode=True),
            lambda x: F.adaptive_avg_pool1d(x, 4),
            lambda x: F.adaptive_max_pool1d(x, 5),
            lambda x: F.adaptive_avg_pool1d(x, 1),
        ],
    ),
    "2d_maximum": (
        _x(2, 3, 11, 8),
        [
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
            lambda x: F.max_pool2d(x, 3, 2, 1, dilation=(1, 2)),
            lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
            lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True),
            lambda x: F.max_pool2d(x, 3, 2, 1, (2, 1), True),
            lambda x: F.adaptive_max_pool2d(x, 1),
            lambda x: F.adaptive_max_pool2d(x, (3, 5)),
            lambda x: F.adaptive_max_pool2d(x, (None, 4)),
            lambda x: x.amax((2, 3)),
            lambda x: x.amin(1, True),
        ],
    ),
    "2d_mean": (
        _x(2, 3, 11, 8),
        [
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, (3, 2), (2, 1), (1, 0)),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=4),
            lambda x: F.avg_pool2d(x, 3, 2, 1, True),
            lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
            lambda x: F.avg_pool2d(x, 2, 3, 1, True),
            lambda x: F.avg_pool2d(x, 3, 2, 0, True, True, 5),
            lambda x: F.adaptive_avg_pool2d(x, 1),
            lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
            lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
        ],
    ),
    "2d_divisible": (
        _x(2, 3, 8, 6),
        [lambda x: F.adaptive_avg_pool2d(x, (4, 3)), lambda x: F.adaptive_max_pool2d(x, 2)],
    ),
}


class Behind(nn.Module):
    """Functions of an image that a convolution made, which lies with its channels last."""

    def __init__(self, functions: list[Function]) -> None:
        super().__init__()
        self.conv, self.functions = nn.Conv2d(3, 4, 2), functions

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)
        return [f(y) for f in self.functions]


def test_axes_follow_the_order_of_storage() -> None:
    functions: list[Function] = [
        lambda x: torch.cat([x, x * 2], 1),
        lambda x: torch.cat([x, x[:, :, :1]], 2),
        lambda x: torch.stack([x, x + 1], 1),
        lambda x: x.flip(1),
        lambda x: x.roll(1, 2),
        lambda x: x.cumsum(2),
        lambda x: x.softmax(1),
        lambda x: x.log_softmax(3),
        lambda x: x.transpose(1, 2).softmax(-1),
        lambda x: x.argmax(1),
        lambda x: x.topk(2, 1)[0],
        lambda x: x.mean(1),
        lambda x: x.amax((1, 3)),
        lambda x: x.prod(2),
        lambda x: F.glu(x, 1),
        lambda x: F.pad(x, (1, 2, 0, 1, 1, 0), value=2.0),
        lambda x: F.pad(x, (1, 2, 0, 1), "reflect"),
        lambda x: x.index_select(1, torch.tensor([3, 0])),
        lambda x: x[:, 1:3, ::2],
        lambda x: x[:, :, 2],
        lambda x: x.repeat(1, 2, 1, 3),
        lambda x: x @ x.mT,
        lambda x: x.mT @ x,
        lambda x: x.unsqueeze(2) * torch.arange(5.0),
        lambda x: x + torch.arange(4.0)[:, None, None],
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    ]
    check(Behind(functions), _x(2, 3, 7, 6))


def test_what_cannot_follow_the_batch_is_written_for_one_sample() -> None:
    model = One(
        [lambda x: torch.zeros(x.shape[0], 2) + 1, lambda x: x.new_zeros(x.shape[0], 3) + x[:, 0, :3]]
    )
    program, _ = check(model, _x(3, 4, 6))
    assert program.input_shapes == [(1, 4, 6)]


def test_a_number_that_is_the_batch_size_fixes_it() -> None:
    model, x = One([lambda x: x * x.shape[0]]), _x(3, 4, 6)
    program = prepare(lowered(model, x))
    assert program.input_shapes == [(1, 4, 6)]
    assert torch.equal(answers(file(program), x[:1])[0], x[:1])


def test_steps_of_torch_that_hold_the_batch_size_fix_it() -> None:
    check(One([lambda x: F.unfold(x, 2, padding=1)]), _x(3, 2, 4, 5))


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    x, functions = POOLS[name]
    check(One(functions), x)


RESIZES: dict[str, tuple[Tensor, list[Function]]] = {
    "nearest": (
        _x(2, 3, 5, 7),
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=(3, 1)),
            lambda x: F.interpolate(x, scale_factor=(1.7, 0.6)),
            lambda x: F.interpolate(x, size=(9, 4)),
        ],
    ),
    "bilinear": (
        _x(2, 3, 5, 7),
        [
            lambda x, m=m, a=a, k=k: F.interpolate(x, mode=m, align_corners=a, **k)
            for m in ("bilinear", "bicubic")
            for a in (False, True)
            for k in ({"scale_factor": 2}, {"scale_factor": (1.5, 0.7)}, {"size": (8, 4)}, {"size": (1, 11)})
        ],
    ),
    "linear": (
        _x(2, 3, 7),
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, size=10),
            *(
                lambda x, a=a: F.interpolate(x, size=10, mode="linear", align_corners=a)
                for a in (False, True)
            ),
        ],
    ),
    "solid": (
        _x(2, 2, 3, 4, 5),
        [
            lambda x: F.interpolate(x, size=(5, 6, 3), mode="trilinear"),
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)),
        ],
    ),
    "antialias": (
        _x(2, 3, 8, 9),
        [lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True)],
    ),
}


@pytest.mark.parametrize("name", RESIZES)
def test_interpolation(name: str) -> None:
    x, functions = RESIZES[name]
    check(One(functions), x)


def test_bilinear_is_one_operator_where_it_computes_the_same() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 1)
    )
    _, content = check(model, _x(2, 3, 5, 7))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "RESIZE_BILINEAR", "CONV_2D", "TRANSPOSE"]


def test_zeros_around_an_image_between_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2))
    _, content = check(model, _x(2, 3, 8, 6))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "PAD", "CONV_2D", "TRANSPOSE"]


def test_one_high_images_are_not_flattened_between_layers() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 2, 3, padding=1))
    _, content = check(model, _x(2, 3, 12))
    assert kinds(content) == [
        "TRANSPOSE",
        "RESHAPE",
        "CONV_2D",
        "MAX_POOL_2D",
        "CONV_2D",
        "RESHAPE",
        "TRANSPOSE",
    ]
