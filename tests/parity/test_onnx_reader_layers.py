"""ONNX operators with weights, in the opsets that changed them: torch computes what ONNX Runtime does."""

from pathlib import Path

import numpy as np
import pytest
from onnx_reader_cases import X2, X3, X4, X5, Case, N, check, f, grouped, name_of, s

CONVOLUTIONS = [
    Case("Conv", X4, [f(5, 4, 3, 3), f(5)], {"pads": [1, 1, 1, 1]}),
    Case("Conv", X4, [f(5, 4, 3, 3)], {"strides": [2, 1], "dilations": [1, 2]}),
    Case("Conv", X4, [f(6, 2, 3, 2), f(6)], {"group": 2, "pads": [0, 1, 2, 0]}),
    Case("Conv", X4, [f(4, 1, 3, 3)], {"group": 4, "pads": [1, 1, 1, 1]}),
    *(Case("Conv", X4, [f(5, 4, 3, 2), f(5)], {"auto_pad": p, "strides": [2, 2]})
      for p in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    *(Case("Conv", (N, 4, "H", "W"), [f(5, 4, 4, 4), f(5)], {"auto_pad": p, "strides": t}, name=f"free-{p}-{t[0]}")
      for p in ("SAME_UPPER", "SAME_LOWER") for t in ([1, 1], [3, 3])),
    Case("Conv", X3, [f(5, 4, 3), f(5)], {"pads": [2, 2]}),
    Case("Conv", X5, [f(3, 2, 2, 3, 2), f(3)], {"pads": [0, 1, 0, 0, 1, 0]}),
    Case("Conv", X4, [f(5, 4, 3, 3)], {"pads": [1, 1, 1, 1]}, opset=7),
    Case("Conv", {"x": X4, "y": (3, 4, 2, 2)}, name="computed"),
    Case("ConvTranspose", X4, [f(4, 3, 3, 3), f(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("ConvTranspose", X4, [f(4, 3, 3, 3)], {"strides": [2, 2], "output_padding": [1, 1]}),
    Case("ConvTranspose", X4, [f(4, 2, 3, 2), f(4)], {"strides": [3, 2], "pads": [0, 1, 1, 0], "group": 2}),
    *(Case("ConvTranspose", X4, [f(4, 3, 3, 3), f(3)], {"strides": [2, 2], "auto_pad": p})
      for p in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    Case("ConvTranspose", X4, [f(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [16, 15]}),
    Case("ConvTranspose", X3, [f(4, 3, 3)], {"dilations": [2]}),
    Case("ConvTranspose", X5, [f(2, 3, 2, 2, 2)], {"strides": [2, 1, 2]}),
]  # fmt: skip

PRODUCTS = [
    Case("Gemm", X2, [f(6, 5), f(5)]),
    Case("Gemm", X2, [f(5, 6), f(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", X2, [f(5, 6)], {"transB": 1}),
    Case("Gemm", X2, [f(5, 6), f(1, 5)], {"transB": 1}, opset=7),
    Case("Gemm", X2, [f(5, 6), s(0.3)], {"transB": 1}),
    Case("Gemm", (6, 3), [f(6, 5), f(3, 5)], {"transA": 1}),
    Case("Gemm", {"x": (3, 6), "y": (6, 5), "z": (1, 5)}, attrs={"alpha": 0.5, "beta": 0.25}),
    Case("MatMul", X2, [f(6, 5)]),
    Case("MatMul", (N, 3, 6), [f(6, 5)]),
    Case("MatMul", (N, 3, 2, 6), [f(3, 6, 5)], name="stack"),
    Case("MatMul", {"x": (N, 3, 6), "y": (N, 6, 2)}),
    Case("Einsum", {"x": (N, 3, 6), "y": (N, 5, 6)}, attrs={"equation": "nij,nkj->nik"}),
    Case("Einsum", (N, 3, 6), [f(6, 2, 4)], {"equation": "bij,jhd->bhid"}),
]

Q, KV, FLAT = (N, 4, 6, 8), (N, 2, 6, 8), (N, 6, 16)
ATTENTION = [
    Case("Attention", {"q": Q, "k": Q, "v": Q}, opset=23),
    Case("Attention", {"q": Q, "k": KV, "v": KV}, attrs={"is_causal": 1, "scale": 0.3}, opset=23),
    Case(
        "Attention", {"q": FLAT, "k": FLAT, "v": FLAT}, attrs={"q_num_heads": 4, "kv_num_heads": 4}, opset=23
    ),
    Case("Attention", {"q": Q, "k": Q, "v": Q}, [f(6, 6)], opset=23, name="mask"),
    Case("Attention", {"q": Q, "k": Q, "v": Q}, [np.tri(6, dtype=bool)], opset=23, name="truth"),
]

NORMS = [
    *(Case("BatchNormalization", x, [f(x[1]), f(x[1]), f(x[1]), np.abs(f(x[1])) + 0.1], {"epsilon": 1e-3}, opset=o)
      for x in (X2, X3, X4, X5) for o in (7, 9, 15)),
    *(Case("InstanceNormalization", x, [f(x[1]), f(x[1])], {"epsilon": 1e-3}) for x in (X3, X4, X5)),
    Case("LayerNormalization", (N, 3, 6), [f(6), f(6)], {"axis": -1}, opset=17),
    Case("LayerNormalization", (N, 3, 6), [f(3, 6)], {"axis": 1, "epsilon": 1e-2}, opset=17),
    Case("RMSNormalization", (N, 3, 6), [f(6)], {"axis": -1}, opset=23),
    Case("GroupNormalization", X4, [f(4), f(4)], {"num_groups": 2}),
    Case("GroupNormalization", X4, [f(2), f(2)], {"num_groups": 2}, opset=18),
    Case("Dropout", X4, attrs={"ratio": 0.4}, opset=7),
    Case("Dropout", X4, [s(0.4)], opset=13),
    Case("LpNormalization", X2, attrs={"axis": 1, "p": 2}),
    Case("LpNormalization", X2, attrs={"axis": 0, "p": 1}),
    Case("LRN", X4, attrs={"size": 3, "alpha": 0.2, "beta": 0.7, "bias": 1.5}),
]  # fmt: skip


@pytest.mark.parametrize("group", grouped([*CONVOLUTIONS, *PRODUCTS, *ATTENTION, *NORMS]), ids=name_of)
def test_torch_computes_what_onnx_runtime_does(group: list[Case], tmp_path: Path) -> None:
    check(group, tmp_path)
