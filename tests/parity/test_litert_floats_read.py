"""Float files that others wrote: operators and options that fewbit itself never writes are read as they run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ai_edge_litert")

from litert_floats import error

from fewbit.errors import ArtifactError
from fewbit.model.reference import Reference
from fewbit.targets._litert.builder import Builder
from fewbit.targets._litert.reader import read_back
from fewbit.targets._litert.runtime import Session

_G = np.random.default_rng(0)
Constant = tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray]


def _numbers(*shape: int) -> np.ndarray:
    return _G.normal(size=shape).astype(np.float32)


def _ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def _codes(*shape: int) -> np.ndarray:
    return _G.integers(-127, 128, shape).astype(np.int8)


def _scales(count: int) -> np.ndarray:
    return (_G.random(count) * 0.01 + 0.001).astype(np.float32)


def _file(
    name: str, shape: tuple[int, ...], outputs: list[tuple[int, ...]], constants: list[Any], options: Any,
    order: list[int] | None = None, version: int = 1,
) -> bytes:  # fmt: skip
    """One operator: its input, then its constants (in ``order`` if that differs)."""
    b = Builder()
    b.tensor("x", shape, "float32")
    names = ["x"]
    for i, constant in enumerate(constants):
        value, *scales = constant if isinstance(constant, tuple) else (constant,)
        zeros = np.zeros(len(scales[0]), np.int64) if scales else None
        axis = value.ndim - 1 if name == "DEPTHWISE_CONV_2D" else 0
        names.append(
            b.constant(f"c{i}", value, scales=scales[0] if scales else None, zero_points=zeros, axis=axis)
        )
    results = [b.tensor(f"y{i}", s, "float32") for i, s in enumerate(outputs)]
    b.operator(name, [names[i] for i in order] if order else names, results, options, version)
    return b.finish(["x"], results, {})


def _window(table: str, stride: int, **more: int) -> tuple[str, dict[str, int]]:
    return table, {"padding": 0, "strideH": stride, "strideW": stride, **more}


def _pool(stride: int, activation: int = 0) -> tuple[str, dict[str, int]]:
    return _window("Pool2DOptions", stride, filterHeight=3, filterWidth=3, fusedActivationFunction=activation)


_CONV = {"dilationHFactor": 1, "dilationWFactor": 1}
FILES: dict[str, bytes] = {
    "elu": _file("ELU", (2, 3), [(2, 3)], [], None),
    "round": _file("ROUND", (2, 3), [(2, 3)], [], None),
    "ceil": _file("CEIL", (2, 3), [(2, 3)], [], None),
    "prelu": _file("PRELU", (1, 4, 4, 3), [(1, 4, 4, 3)], [_numbers(1, 1, 3)], None),
    "squared_difference": _file(
        "SQUARED_DIFFERENCE", (2, 3), [(2, 3)], [_numbers(3)], ("SquaredDifferenceOptions", {})
    ),
    "split": _file("SPLIT", (2, 6), [(2, 3), (2, 3)], [_ints(1)], ("SplitOptions", {"numSplits": 2}), [1, 0]),
    "slice": _file("SLICE", (4, 6), [(2, 3)], [_ints(1, 3), _ints(2, -1)], ("SliceOptions", {})),
    "expand_dims": _file("EXPAND_DIMS", (4, 6), [(4, 1, 6)], [_ints(1)], ("ExpandDimsOptions", {})),
    "squeeze": _file("SQUEEZE", (4, 1, 6), [(4, 6)], [], ("SqueezeOptions", {"squeezeDims": _ints(1)})),
    "pack": _file("PACK", (4, 6), [(4, 2, 6)], [_numbers(4, 6)], ("PackOptions", {"axis": 1, "valuesCount": 2})),
    "softmax_beta": _file("SOFTMAX", (4, 6), [(4, 6)], [], ("SoftmaxOptions", {"beta": 0.5})),
    "add_relu6": _file(
        "ADD", (4, 6), [(4, 6)], [_numbers(6)], ("AddOptions", {"fusedActivationFunction": 3})
    ),
    "bmm_turned": _file(
        "BATCH_MATMUL", (2, 5, 4), [(2, 4, 3)], [_numbers(2, 3, 5)],
        ("BatchMatMulOptions", {"adjX": True, "adjY": True}),
    ),
    "mean_of_borders": _file("AVERAGE_POOL_2D", (1, 8, 8, 3), [(1, 4, 4, 3)], [], _pool(2, 1)),
    "mean_of_both_sides": _file("AVERAGE_POOL_2D", (1, 7, 7, 3), [(1, 4, 4, 3)], [], _pool(2)),
    "largest_of_borders": _file("MAX_POOL_2D", (1, 8, 8, 3), [(1, 4, 4, 3)], [], _pool(2)),
    "conv_one_side": _file(
        "CONV_2D", (1, 8, 8, 4), [(1, 4, 4, 6)], [_numbers(6, 3, 3, 4), _numbers(6)],
        _window("Conv2DOptions", 2, **_CONV, fusedActivationFunction=1),
    ),
    "conv_groups": _file(
        "CONV_2D", (1, 7, 7, 4), [(1, 7, 7, 6)], [_numbers(6, 3, 3, 2), _numbers(6)],
        _window("Conv2DOptions", 1, **_CONV),
    ),
    "depthwise": _file(
        "DEPTHWISE_CONV_2D", (1, 8, 8, 4), [(1, 4, 4, 8)], [_numbers(1, 3, 3, 8), _numbers(8)],
        _window("DepthwiseConv2DOptions", 2, **_CONV, depthMultiplier=2),
    ),
    "conv_codes": _file(
        "CONV_2D", (1, 8, 8, 4), [(1, 4, 4, 6)], [(_codes(6, 3, 3, 4), _scales(6)), _numbers(6)],
        _window("Conv2DOptions", 2, **_CONV, fusedActivationFunction=3), None, 5,
    ),
    "depthwise_codes": _file(
        "DEPTHWISE_CONV_2D", (1, 8, 8, 4), [(1, 4, 4, 4)], [(_codes(1, 3, 3, 4), _scales(4)), _numbers(4)],
        _window("DepthwiseConv2DOptions", 2, **_CONV, depthMultiplier=1), None, 6,
    ),
    "linear_codes": _file(
        "FULLY_CONNECTED", (5, 6), [(5, 4)], [(_codes(4, 6), _scales(1)), _numbers(4)],
        ("FullyConnectedOptions", {"asymmetricQuantizeInputs": True}), None, 9,
    ),
    "linear_of_an_image": _file(
        "FULLY_CONNECTED", (1, 2, 3, 4), [(2, 3)], [_numbers(3, 12)], ("FullyConnectedOptions", {})
    ),
    "transposed_cropped": _file(
        "TRANSPOSE_CONV", (1, 5, 5, 4), [(1, 10, 10, 3)], [_ints(1, 10, 10, 3), _numbers(3, 3, 3, 4)],
        _window("TransposeConvOptions", 2), [1, 2, 0],
    ),
    "mirrored": _file(
        "MIRROR_PAD", (1, 5, 5, 2), [(1, 7, 8, 2)], [np.asarray([[0, 0], [1, 1], [1, 2], [0, 0]], np.int32)],
        ("MirrorPadOptions", {"mode": 0}),
    ),
    "corners": _file(
        "RESIZE_BILINEAR", (1, 5, 5, 2), [(1, 9, 8, 2)], [_ints(9, 8)],
        ("ResizeBilinearOptions", {"alignCorners": True}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_read_as_it_runs(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(FILES[name])
    program = read_back(path).program
    assert program is not None
    shape = [s or 1 for s in program.input_shapes[0]]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2
    found = Reference(program)(x)
    for read, ran in zip(found, Session(path)(x), strict=True):
        assert error(read, ran) < 1e-5


REFUSED = {
    "symmetric_mirror": (
        _file("MIRROR_PAD", (1, 4), [(1, 6)], [np.asarray([[0, 0], [1, 1]], np.int32)],
              ("MirrorPadOptions", {"mode": 1})),
        "a border that repeats the outermost numbers",
    ),
    "exclusive": (
        _file("CUMSUM", (1, 4), [(1, 4)], [_ints(1)], ("CumsumOptions", {"exclusive": True})),
        "sums that leave a number out",
    ),
    "half_pixels": (
        _file("RESIZE_BILINEAR", (1, 5, 5, 2), [(1, 9, 8, 2)], [_ints(9, 8)], ("ResizeBilinearOptions", {})),
        "corners of pixels in place of their centers",
    ),
    "around_zero": (
        _file("FULLY_CONNECTED", (5, 6), [(5, 4)], [(_codes(4, 6), _scales(1))], ("FullyConnectedOptions", {}),
              None, 9),
        "an input quantized around zero",
    ),
    "wrong_shape": (_file("ABS", (2, 3), [(2, 4)], [], ("AbsOptions", {})), "but .* is computed: damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = tmp_path / f"{name}.tflite"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_back(path)
