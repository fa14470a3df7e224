"""ONNX operators that move numbers, in the opsets that changed them: torch computes what ONNX Runtime does."""

from pathlib import Path

import numpy as np
import pytest
from onnx_reader_cases import X2, X3, X4, X5, Case, N, check, f, grouped, i, name_of, s

POOLS = [
    *(Case("MaxPool", X4, attrs={"kernel_shape": [3, 2], "strides": [2, 2], **more}) for more in (
        {}, {"ceil_mode": 1}, {"pads": [1, 0, 1, 0]}, {"pads": [1, 1, 2, 0]}, {"dilations": [2, 1]},
        {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "VALID"})),
    *(Case("AveragePool", X4, attrs={"kernel_shape": [3, 2], "strides": [2, 2], **more}) for more in (
        {}, {"ceil_mode": 1}, {"pads": [1, 1, 1, 1]}, {"pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"pads": [1, 1, 2, 0]}, {"pads": [1, 1, 2, 0], "count_include_pad": 1},
        {"ceil_mode": 1, "pads": [1, 1, 1, 1]}, {"ceil_mode": 1, "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"})),
    Case("MaxPool", X3, attrs={"kernel_shape": [4], "pads": [3, 3]}),
    Case("MaxPool", X5, attrs={"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
    Case("AveragePool", X3, attrs={"kernel_shape": [4], "strides": [3]}, opset=7),
    Case("AveragePool", X5, attrs={"kernel_shape": [2, 3, 2]}),
    Case("AveragePool", (N, 3, "H", "W"), attrs={"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    *(Case(op, x) for op in ("GlobalAveragePool", "GlobalMaxPool") for x in (X3, X4, X5)),
]  # fmt: skip

SHAPES = [
    Case("Reshape", X4, [i(0, -1)]),
    Case("Reshape", X4, [i(-1, 2, 0, 7)], opset=7),
    Case("Flatten", X4, attrs={"axis": 2}),
    Case("Flatten", X4, attrs={"axis": 0}),
    Case("Flatten", X4, attrs={"axis": -1}),
    Case("Transpose", X4, attrs={"perm": [0, 2, 3, 1]}),
    Case("Transpose", X3),
    Case("Squeeze", (N, 1, 4, 1), attrs={"axes": [1, -1]}, opset=11),
    Case("Squeeze", (N, 1, 4, 1), [i(1)], opset=13),
    Case("Squeeze", (N, 1, 4, 1)),
    Case("Unsqueeze", X2, attrs={"axes": [0, 2]}, opset=11),
    Case("Unsqueeze", X2, [i(-1, 1)], opset=13),
    Case("Expand", (N, 1, 4), [i(1, 3, 1)]),
    Case("Expand", (3, 1), [i(2, 1, 6)]),
    Case("Tile", X3, [i(1, 2, 3)]),
    Case("Concat", {"x": X3, "y": X3}, attrs={"axis": 1}),
    Case("Concat", {"x": (N, 2, 9)}, [], {"axis": -1}),
    Case("Split", X3, attrs={"axis": 1, "split": [1, 3]}, opset=11, outputs=2),
    Case("Split", X3, [i(1, 1, 2)], {"axis": -2}, opset=13, outputs=3),
    Case("Split", X3, attrs={"axis": 1}, opset=13, outputs=2),
    Case("Split", X4, attrs={"axis": 2, "num_outputs": 3}, opset=18, outputs=3),
    Case("Slice", X4, attrs={"starts": [1, -3], "ends": [3, 9223372036854775807], "axes": [1, 3]}, opset=9),
    Case("Slice", X4, attrs={"starts": [0, 1], "ends": [2, 100]}, opset=7),
    Case("Slice", X4, [i(1, 6), i(100, -100), i(2, 3), i(2, -2)], opset=13),
    Case("Slice", X4, [i(-1), i(-100), i(1), i(-1)], opset=10),
    Case("Slice", X4, [i(5), i(1), i(2), i(-3)], opset=10),
    Case("Gather", X4, [i(2).reshape(())], {"axis": 1}),
    Case("Gather", X4, [i(1, 2)], {"axis": 2}),
    Case("Gather", X4, [i(3, -1, 0)], {"axis": 1}),
    Case("Gather", X4, [i([0, 1], [2, -2])], {"axis": 3}),
    Case("GatherElements", (4, 4, 9), [np.zeros((4, 4, 9), np.int64) + i(1, 0, 2, -1).reshape(1, 4, 1)], {"axis": 1}),
    Case("GatherND", (4, 3, 5), [i([0, 1], [3, 2])]),
    Case("Pad", X4, attrs={"pads": [0, 0, 1, 2, 0, 0, 0, 1], "value": 0.5}, opset=7),
    Case("Pad", X4, [i(0, 0, 1, 2, 0, 0, 0, 1), s(-1.5)], opset=11),
    Case("Pad", X4, [i(0, 1, 1, 2, 0, 0, 0, 1)], opset=13),
    Case("Pad", X4, [i(0, 0, -1, 2, 0, 0, 0, -1)], opset=13),
    Case("Pad", X4, [i(1, 2), s(0.0), i(-1)], opset=18),
    *(Case("Pad", X4, [i(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": m}, opset=19) for m in ("reflect", "edge", "wrap")),
    *(Case("Pad", X4, [i(0, 1, 1, 0, 0, 2, 0, 1)], {"mode": m}, opset=19) for m in ("reflect", "edge", "wrap")),
    *(Case("Pad", X2, [i(0, 1, 0, 2)], {"mode": m}, opset=19) for m in ("reflect", "edge", "wrap")),
    *(Case("DepthToSpace", (N, 8, 3, 4), attrs={"blocksize": 2, "mode": m}, opset=11) for m in ("DCR", "CRD")),
    Case("DepthToSpace", (N, 8, 3, 4), attrs={"blocksize": 2}, opset=7),
    Case("SpaceToDepth", (N, 2, 4, 6), attrs={"blocksize": 2}),
    Case("Cast", X3, attrs={"to": 7}),
    Case("Cast", X3, attrs={"to": 9}),
    Case("Cast", X3, attrs={"to": 1}, types={"x": "int64"}),
    Case("Trilu", (N, 5, 5), attrs={"upper": 0}, opset=14),
    Case("Trilu", (N, 5, 5), [i(1).reshape(())], opset=14),
    Case("Shape", X3, attrs={"start": 1}, opset=15),
    Case("ScatterND", (4, 3), [i([0], [2]), f(2, 3)], opset=13),
    Case("OneHot", (N, 3), [i(5).reshape(()), f(2)], types={"x": "int64"}),
]  # fmt: skip


RESIZES = [
    *(Case("Resize", X4, ["", s([1, 1, 2, 2])],
           {"mode": "nearest", "coordinate_transformation_mode": t, "nearest_mode": n}, opset=13)
      for t in ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")
      for n in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    *(Case("Resize", X4, ["", s([1, 1, 0.7, 1.6])], {"mode": m, "coordinate_transformation_mode": t}, opset=13)
      for m in ("nearest", "linear") for t in ("asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners")),
    *(Case("Resize", (3, 4, 8, 7), ["", "", i(3, 4, 5, 13)], {"mode": m, "coordinate_transformation_mode": t},
           opset=13, name="s")
      for m in ("nearest", "linear", "cubic") for t in ("half_pixel", "align_corners")),
    Case("Resize", X4, ["", s([2, 2])], {"mode": "linear", "axes": [2, 3]}, opset=18),
    Case("Resize", (N, 3, "H", "W"), ["", s([1, 1, 2, 2])], {"coordinate_transformation_mode": "asymmetric",
         "nearest_mode": "floor"}, opset=13, name="free"),
    Case("Resize", X3, ["", s([1, 1, 2])], {"mode": "linear"}, opset=13),
    Case("Resize", X4, [s([1, 1, 2, 3])], opset=10),
    Case("Resize", X4, [s([1, 1, 2, 3])], {"mode": "linear"}, opset=10),
    Case("Upsample", X4, [s([1, 1, 2, 3])], opset=9),
    Case("Upsample", X4, attrs={"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
    Case("Upsample", X4, attrs={"mode": "linear", "scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
]  # fmt: skip


@pytest.mark.parametrize("group", grouped([*POOLS, *SHAPES, *RESIZES]), ids=name_of)
def test_torch_computes_what_onnx_runtime_does(group: list[Case], tmp_path: Path) -> None:
    check(group, tmp_path)
