"""Operators that move, repeat, select, pool or interpolate floats: LiteRT answers as torch does."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from float_functions import Function, One, sample
from float_moves import MOVES, OF_FIXED_IMAGES, PADDING, POOLS, RESIZES
from litert_floats import answers, check, file, kinds, lowered

from fewbit.targets._litert.prepare import prepare


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    x, functions = MOVES[name]
    check(One(functions), x, tolerance=1e-6)


def test_moves_of_fixed_images() -> None:
    check(One(OF_FIXED_IMAGES), sample(2, 8, 4, 6), tolerance=1e-6)


def test_padding() -> None:
    check(One(PADDING), sample(2, 3, 5, 6), tolerance=1e-6)


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
    check(Behind(functions), sample(2, 3, 7, 6))


def test_what_cannot_follow_the_batch_is_written_for_one_sample() -> None:
    model = One(
        [lambda x: torch.zeros(x.shape[0], 2) + 1, lambda x: x.new_zeros(x.shape[0], 3) + x[:, 0, :3]]
    )
    program, _ = check(model, sample(3, 4, 6))
    assert program.input_shapes == [(1, 4, 6)]


def test_a_number_that_is_the_batch_size_fixes_it() -> None:
    model, x = One([lambda x: x * x.shape[0]]), sample(3, 4, 6)
    program = prepare(lowered(model, x))
    assert program.input_shapes == [(1, 4, 6)]
    assert torch.equal(answers(file(program), x[:1])[0], x[:1])


def test_steps_of_torch_that_hold_the_batch_size_fix_it() -> None:
    check(One([lambda x: F.unfold(x, 2, padding=1)]), sample(3, 2, 4, 5))


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str) -> None:
    x, functions = POOLS[name]
    check(One(functions), x)


@pytest.mark.parametrize("name", RESIZES)
def test_interpolation(name: str) -> None:
    x, functions = RESIZES[name]
    check(One(functions), x)


def test_solids() -> None:
    functions: list[Function] = [
        lambda x: F.interpolate(x, size=(5, 6, 3), mode="trilinear"),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)),
    ]
    check(One(functions), sample(2, 2, 3, 4, 5))


def test_bilinear_is_one_operator_where_it_computes_the_same() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 1)
    )
    _, content = check(model, sample(2, 3, 5, 7))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "RESIZE_BILINEAR", "CONV_2D", "TRANSPOSE"]


def test_zeros_around_an_image_between_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2))
    _, content = check(model, sample(2, 3, 8, 6))
    assert kinds(content) == ["TRANSPOSE", "CONV_2D", "PAD", "CONV_2D", "TRANSPOSE"]


def test_one_high_images_are_not_flattened_between_layers() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 2, 3, padding=1))
    _, content = check(model, sample(2, 3, 12))
    assert kinds(content) == [
        "TRANSPOSE",
        "RESHAPE",
        "CONV_2D",
        "MAX_POOL_2D",
        "CONV_2D",
        "RESHAPE",
        "TRANSPOSE",
    ]
