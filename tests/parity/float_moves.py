"""Functions that move, pool or interpolate numbers, which runtimes must answer as torch does, with inputs for them."""

import torch
import torch.nn.functional as F
from float_functions import Function, sample
from torch import Tensor

MOVES: dict[str, tuple[Tensor, list[Function]]] = {
    "shapes": (
        sample(3, 4, 6),
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
        sample(3, 4, 6),
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
        sample(3, 4, 6),
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
        sample(3, 4, 6),
        [
            lambda x: x + x.shape[1],
            lambda x: torch.arange(x.shape[1]) + 1,
            lambda x: x * torch.arange(x.shape[2]),
            lambda x: x.reshape(x.shape[0] * x.shape[1], -1),
        ],
    ),
    "pixels": (sample(2, 8, 4, 6), [lambda x: F.pixel_shuffle(x, 2)]),
}

# torch.export traces these with images of a fixed size only.
OF_FIXED_IMAGES: list[Function] = [
    lambda x: x.reshape(x.shape[0], 2, -1, 4),
    lambda x: x.reshape(x.shape[0], 16, 12),
    lambda x: x.view(x.shape[0], x.shape[1] * 2, x.shape[2] // 2, x.shape[3]),
    lambda x: F.pixel_unshuffle(x, 2),
    lambda x: F.channel_shuffle(x, 4),
]


PADDING: list[Function] = [
    *(lambda x, m=m: F.pad(x, (2, 1, 0, 3), m) for m in ("constant", "reflect", "replicate", "circular")),
    lambda x: F.pad(x, (1, 2), value=3.5),
    lambda x: F.pad(x, (-1, 2, 1, -2)),
    lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    lambda x: F.pad(x, (1, 1), value=-float("inf")).exp(),
]


POOLS: dict[str, tuple[Tensor, list[Function]]] = {
    "1d": (
        sample(2, 3, 11),
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
        sample(2, 3, 11, 8),
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
        sample(2, 3, 11, 8),
        [
            lambda x: F.avg_pool2d(x, 2),
            lambda x: F.avg_pool2d(x, 2, 3, 1, True, False),
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
        sample(2, 3, 8, 6),
        [lambda x: F.adaptive_avg_pool2d(x, (4, 3)), lambda x: F.adaptive_max_pool2d(x, 2)],
    ),
}


RESIZES: dict[str, tuple[Tensor, list[Function]]] = {
    "nearest": (
        sample(2, 3, 5, 7),
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=(3, 1)),
            lambda x: F.interpolate(x, scale_factor=(1.7, 0.6)),
            lambda x: F.interpolate(x, size=(9, 4)),
        ],
    ),
    "bilinear": (
        sample(2, 3, 5, 7),
        [
            lambda x, m=m, a=a, k=k: F.interpolate(x, mode=m, align_corners=a, **k)
            for m in ("bilinear", "bicubic")
            for a in (False, True)
            for k in ({"scale_factor": 2}, {"scale_factor": (1.5, 0.7)}, {"size": (8, 4)}, {"size": (1, 11)})
        ],
    ),
    "linear": (
        sample(2, 3, 7),
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, size=10),
            *(
                lambda x, a=a: F.interpolate(x, size=10, mode="linear", align_corners=a)
                for a in (False, True)
            ),
        ],
    ),
    "antialias": (
        sample(2, 3, 8, 9),
        [lambda x: F.interpolate(x, size=(4, 5), mode="bilinear", antialias=True)],
    ),
}
