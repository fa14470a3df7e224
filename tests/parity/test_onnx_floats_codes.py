"""Operators that move codes: ONNX Runtime runs them on uint8 and int8 tensors directly, and exactly."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from float_functions import Function, One
from onnx_floats import longer, run, written
from torch import Tensor

from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.readers.torch import read
from fewbit.model.reference import Reference
from fewbit.model.simulate import FakeQuantize, QuantizedModel, insert_quantizer
from fewbit.numerics.scheme import Scheme
from fewbit.plan.plan import Plan

MOVES: dict[str, tuple[tuple[int, ...], list[Function]]] = {
    "shapes": (
        (3, 4, 6),
        [
            lambda x: x.flatten(1),
            lambda x: x.flatten(0, 1),
            lambda x: x.unflatten(2, (2, 3)),
            lambda x: x.unsqueeze(1),
            lambda x: x[:, :1].squeeze(1),
            lambda x: x.transpose(1, 2),
            lambda x: x.permute(2, 0, 1),
        ],
    ),
    "parts": (
        (3, 4, 6),
        [
            lambda x: x[:, 1:3],
            lambda x: x[:, :, ::2],
            lambda x: x[:, 2],
            lambda x: x[:, -1],
            lambda x: x.split([1, 3], 1)[1],
            lambda x: x.chunk(2, 2)[0],
            lambda x: x.index_select(1, torch.tensor([3, 0])),
        ],
    ),
    "copies": (
        (3, 4, 6),
        [
            lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1),
            lambda x: x.repeat(1, 2, 1),
            lambda x: x.repeat_interleave(3, 1),
            lambda x: x.flip(1),
            lambda x: x.flip(0, 2),
            lambda x: x.roll(1, 1),
            lambda x: x.roll((2, -1), (1, 2)),
        ],
    ),
    "pixels": (
        (2, 8, 4, 6),
        [
            lambda x: F.pixel_shuffle(x, 2),
            lambda x: F.pixel_unshuffle(x, 2),
            lambda x: F.channel_shuffle(x, 4),
        ],
    ),
    "maximum": (
        (2, 3, 11, 8),
        [
            lambda x: F.max_pool2d(x, 2),
            lambda x: F.max_pool2d(x, 3, 2, 1),
            lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
            lambda x: F.max_pool2d(x, 3, 2, 1, dilation=(1, 2)),
            lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
            lambda x: F.max_pool2d(x, 2, 3, 1, ceil_mode=True),
            lambda x: F.adaptive_max_pool2d(x, 1),
            lambda x: F.adaptive_max_pool2d(x, (3, 5)),
            lambda x: x.amax((2, 3)),
            lambda x: x.amin(1, True),
            lambda x: x.amax(3),
        ],
    ),
    "maximum_1d": (
        (2, 3, 11),
        [
            lambda x: F.max_pool1d(x, 3, 2, 1),
            lambda x: F.max_pool1d(x, 2, 3, ceil_mode=True),
            lambda x: F.adaptive_max_pool1d(x, 4),
        ],
    ),
    "maximum_3d": (
        (2, 2, 5, 6, 7),
        [
            lambda x: F.max_pool3d(x, 2, 2, 1),
            lambda x: F.max_pool3d(x, (2, 3, 2), ceil_mode=True),
        ],
    ),
    "nearest": (
        (2, 3, 5, 7),
        [
            lambda x: F.interpolate(x, scale_factor=2),
            lambda x: F.interpolate(x, scale_factor=(1.7, 0.6)),
            lambda x: F.interpolate(x, size=(9, 4)),
        ],
    ),
    "nearest_1d": ((2, 3, 7), [lambda x: F.interpolate(x, scale_factor=3)]),
    "nearest_3d": (
        (2, 2, 3, 4, 2),
        [lambda x: F.interpolate(x, scale_factor=2), lambda x: F.interpolate(x, size=(4, 3, 5))],
    ),
}


def _coded(functions: list[Function], x: Tensor, scheme: Scheme, zero_point: int, free: bool) -> Program:
    """The program of a model whose input is quantized, and everything after it moved as codes."""
    shapes = None if free else ({0: torch.export.Dim.AUTO},)
    gm = read(One(functions).eval(), (x,), dynamic_shapes=shapes)
    source = next(n for n in gm.graph.nodes if n.op == "placeholder")
    insert_quantizer(gm, source, FakeQuantize(scheme, torch.tensor(0.5), torch.tensor(zero_point)))
    gm.recompile()
    return lower(QuantizedModel(gm, Plan(()), {}, frozenset(), (x,)))


@pytest.mark.parametrize("free", [True, False], ids=["free", "batch"])
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_codes_move_exactly(name: str, dtype: str, free: bool) -> None:
    shape, functions = MOVES[name]
    if free and name == "pixels":
        functions = functions[:1]  # torch fixes the batch of the others when everything is free
    scheme = Scheme(dtype, symmetric=False)
    zero_point = 131 if dtype == "uint8" else -7
    codes = torch.randint(
        int(scheme.qmin), int(scheme.qmax) + 1, shape, generator=torch.Generator().manual_seed(5)
    )
    x = (codes - zero_point) * 0.5
    program = _coded(functions, x, scheme, zero_point, free)
    model = written(program)
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("QuantizeLinear") == 1
    assert kinds.count("DequantizeLinear") == len(set(program.output_names())) == len(functions), (
        "codes left on the way"
    )
    for given in (x, longer(x)):
        reference = Reference(program)(given)
        for f, found, exact in zip(functions, run(model, given), reference, strict=True):
            np.testing.assert_array_equal(found, f(given).numpy())
            np.testing.assert_array_equal(found, exact.numpy())
