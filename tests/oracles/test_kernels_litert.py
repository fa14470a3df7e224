"""The integer kernels of LiteRT's reference interpreter, operator by operator, against the program's own arithmetic."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from fewbit.model.program import Coding, Op, Program
from fewbit.model.reference import Reference
from fewbit.numerics.scheme import Scheme
from fewbit.targets._litert.runtime import Session, probe
from fewbit.targets._litert.writer import Writer

INT8 = Scheme("int8", symmetric=False)
# Pairs with scales whose ratio is a power of two make ties frequent, and most wrong rules fail there.
CODINGS = [
    ((0.05, -3), (0.07, 11)),
    ((0.1, 5), (0.05, 0)),
    ((0.03, -128), (0.06, -128)),
    ((0.25, 0), (1.0, 3)),
]


def coding(scale: float, zero_point: int) -> Coding:
    return Coding(INT8, float(np.float32(scale)), zero_point)


def single(op: Op, shapes: list[list[int]], ins: list[Coding], out: Coding) -> Program:
    """A program that quantizes its inputs, applies one operation and dequantizes the result."""
    names = [f"x{i}" for i in range(len(shapes))]
    steps = [Op("quantize", "boundary", n, n, [n], f"{n}_codes") for n in names]
    op.inputs, op.output = [f"{n}_codes" for n in names], "y_codes"
    ops = [*steps, op, Op("dequantize", "boundary", "y", "y", ["y_codes"], "y")]
    codings = {f"{n}_codes": c for n, c in zip(names, ins, strict=True)} | {"y_codes": out}
    free = [(None, *s[1:]) for s in shapes]
    return Program(names, free, ["float32"] * len(names), "y", [()], ["float32"], ops, codings)


def values(shape: list[int], c: Coding, seed: int) -> Tensor:
    """Floats that are exactly codes, all of which occur."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, generator=generator)
    return (codes - c.zero_point).float() * c.scale


def differing(program: Program, inputs: tuple[Tensor, ...], folder: Path) -> tuple[int, int]:
    """Codes of the operation that LiteRT computes differently, and all of them."""
    path = folder / "one.tflite"
    path.write_bytes(Writer(program).file({}))
    codes = probe(path, inputs, {"y_codes": "y_codes"})["y_codes"]
    expected = Reference(program, "q31_double").run(*inputs)["y_codes"]
    return int((codes != expected).sum()), codes.numel()


def op(kind: str, **attrs: object) -> Op:
    return Op(kind, "integer", "y", "y", [], "y_codes", attrs)


def weights(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        "weight_scale": torch.tensor([2.0**-9, 0.003, 0.02, 0.0007])[torch.arange(shape[0]) % 4],
        "bias": torch.randint(-3000, 3000, shape[:1], generator=generator, dtype=torch.int32),
    }


@pytest.mark.parametrize(("given", "out"), CODINGS)
@pytest.mark.parametrize("groups", [1, 8])
def test_convolution(given: tuple[float, int], out: tuple[float, int], groups: int, tmp_path: Path) -> None:
    step = op("conv", stride=[2, 1], dilation=[1, 1], groups=groups, pad=[1, 1, 0, 1], layout="NHWC")
    step.constants = weights(8, 8 // groups, 3, 3)
    c, o = coding(*given), coding(out[0] * 8, out[1])
    program = single(step, [[1, 8, 8, 8]], [c], o)
    assert differing(program, (values([16, 8, 8, 8], c, 1),), tmp_path) == (0, 16 * 4 * 8 * 8)


@pytest.mark.parametrize(("given", "out"), CODINGS)
def test_linear(given: tuple[float, int], out: tuple[float, int], tmp_path: Path) -> None:
    step = op("linear", shape=[None, 24])
    step.constants = weights(12, 24)
    c, o = coding(*given), coding(out[0] * 4, out[1])
    assert differing(single(step, [[1, 24]], [c], o), (values([512, 24], c, 2),), tmp_path) == (0, 512 * 12)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_one_scale_for_all_weights(kind: str, tmp_path: Path) -> None:
    """Decimal scales, whose products and quotients round: each combination puts its ties elsewhere."""
    torch.manual_seed(0)
    attrs = {"stride": [1, 1], "dilation": [1, 1], "groups": 1, "pad": [], "layout": "NHWC"}
    shape = [1, 1, 1, 4] if kind == "conv" else [1, 4]
    for given, weight, out in ((0.9, 0.1, 0.6), (0.7, 0.3, 1.4), (0.03, 0.07, 0.0042), (0.3, 0.06, 0.036)):
        step = op(kind, **(attrs if kind == "conv" else {"shape": [None, 4]}))
        step.constants = weights(1, 4, *([1, 1] if kind == "conv" else []))
        step.constants |= {
            "weight_scale": torch.tensor([weight]),
            "bias": torch.tensor([2], dtype=torch.int32),
        }
        c = coding(given, 0)
        x = (torch.randint(-9, 10, [4000, *shape[1:]]) * c.scale,)
        step.constants["weight"] = torch.sign(step.constants["weight"])
        program = single(step, [shape], [c], coding(out, 0))
        assert differing(program, x, tmp_path) == (0, 4000)


@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize(("first", "second"), CODINGS)
def test_pairs(kind: str, first: tuple[float, int], second: tuple[float, int], tmp_path: Path) -> None:
    """All 65,536 pairs of codes, with a fused ReLU."""
    a, b = coding(*first), coding(*second)
    o = coding(first[0] * second[0] * 64 if kind == "mul" else first[0] + second[0], -20)
    step = op(kind, clamp=[-20, 127])
    grid = torch.cartesian_prod(torch.arange(-128, 128), torch.arange(-128, 128))
    x = tuple((grid[:, i : i + 1] - c.zero_point).float() * c.scale for i, c in enumerate((a, b)))
    assert differing(single(step, [[1, 1], [1, 1]], [a, b], o), x, tmp_path) == (0, 65536)


@pytest.mark.parametrize(("given", "out"), CODINGS)
def test_requantize(given: tuple[float, int], out: tuple[float, int], tmp_path: Path) -> None:
    c, o = coding(*given), coding(*out)
    x = ((torch.arange(-128, 128) - c.zero_point).float() * c.scale).reshape(-1, 1)
    assert differing(single(op("requantize"), [[1, 1]], [c], o), (x,), tmp_path) == (0, 256)


@pytest.mark.parametrize("side", [5, 7, 8])
@pytest.mark.parametrize(("given", "out"), CODINGS)
def test_mean(given: tuple[float, int], out: tuple[float, int], side: int, tmp_path: Path) -> None:
    c, o = coding(*given), coding(*out)
    program = single(op("global_avg_pool", layout="NHWC", squeeze=True), [[1, side, side, 4]], [c], o)
    assert differing(program, (values([64, side, side, 4], c, 3),), tmp_path) == (0, 256)


@pytest.mark.parametrize("kernel", [[2, 2], [3, 2], [4, 4]])
def test_average_pool(kernel: list[int], tmp_path: Path) -> None:
    c = coding(0.05, -3)
    step = op("avg_pool", kernel=kernel, stride=kernel, layout="NHWC")
    wrong, total = differing(
        single(step, [[1, 12, 12, 4]], [c], c), (values([8, 12, 12, 4], c, 4),), tmp_path
    )
    assert wrong == 0 and total == 8 * 4 * 144 // math.prod(kernel)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.03, 0.1, 0.7])
def test_softmax(classes: int, scale: float, tmp_path: Path) -> None:
    c, o = coding(scale, 5), coding(1 / 256, -128)
    wrong, total = differing(
        single(op("softmax"), [[1, classes]], [c], o), (values([400, classes], c, 5),), tmp_path
    )
    assert (wrong, total) == (0, 400 * classes)


def test_matmul(tmp_path: Path) -> None:
    a, b, o = coding(0.05, -3), coding(0.02, 4), coding(0.3, 1)
    x = (values([6, 16, 32], a, 6), values([6, 32, 24], b, 7))
    assert differing(single(op("matmul"), [[1, 16, 32], [1, 32, 24]], [a, b], o), x, tmp_path) == (
        0,
        6 * 16 * 24,
    )


@pytest.mark.parametrize("alpha", [0.01, 0.3])
@pytest.mark.parametrize(("given", "out"), [(0.047, 0.03), (0.09, 0.03), (0.021, 0.014)])
def test_leaky_relu(given: float, out: float, alpha: float, tmp_path: Path) -> None:
    """Scales in a ratio of small numbers, such as 3: where a tie falls is decided by how the ratio is rounded."""
    c, o = coding(given, -3), coding(out, -100)
    x = ((torch.arange(-128, 128) - c.zero_point).float() * c.scale).reshape(-1, 1)
    assert differing(single(op("leaky_relu", alpha=alpha), [[1, 1]], [c], o), (x,), tmp_path) == (0, 256)


def test_hard_swish(tmp_path: Path) -> None:
    """Its 16-bit steps are a unit off the rounded function here and there, and the program says so too."""
    rng, apart = random.Random(1), 0
    for _ in range(40):
        scale = 10 ** rng.uniform(-2.5, -0.5)
        c, o = (
            coding(scale, rng.randrange(-128, 128)),
            coding(scale * rng.uniform(0.3, 1.5), rng.randrange(-128, 100)),
        )
        x = ((torch.arange(-128, 128) - c.zero_point).float() * c.scale).reshape(-1, 1)
        program = single(op("hard_swish"), [[1, 1]], [c], o)
        assert differing(program, (x,), tmp_path) == (0, 256)
        exact = torch.nn.functional.hardswish(x.double()) / o.scale
        rounded = (torch.round(exact) + o.zero_point).clamp(-128, 127)
        apart += int((Reference(program, "q31_double").run(x)["y_codes"] != rounded).sum())
    assert apart > 0


def test_from_float_halves_go_away_from_zero(tmp_path: Path) -> None:
    c = coding(0.5, 0)
    program = single(op("requantize"), [[1, 1]], [c], c)
    x = torch.tensor([[-1.25], [-0.75], [-0.25], [0.25], [0.75], [1.25]])
    path = tmp_path / "q.tflite"
    path.write_bytes(Writer(program).file({}))
    codes = probe(path, (x,), {"x0_codes": "x0_codes"})["x0_codes"]
    assert codes.reshape(-1).tolist() == [-3, -2, -1, 1, 2, 3]
    assert Reference(program, "q31_double").run(x)["x0_codes"].reshape(-1).tolist() == [-3, -2, -1, 1, 2, 3]


@pytest.mark.parametrize("kind", ["conv", "linear", "add", "mul"])
def test_fast_kernels_stay_within_one_unit(kind: str, tmp_path: Path) -> None:
    """What LiteRT runs by default (XNNPACK) requantizes in float32: never more than one unit away."""
    c, o = coding(0.05, -3), coding(0.9, 7)
    shapes, attrs = [[1, 6, 6, 8]], {}
    if kind == "conv":
        attrs = {"stride": [1, 1], "dilation": [1, 1], "groups": 1, "pad": [], "layout": "NHWC"}
    step = op(kind, **attrs)
    if kind in ("conv", "linear"):
        step.constants = weights(16, 8, *([3, 3] if kind == "conv" else []))
    else:
        shapes, o = [[1, 6, 6, 8]] * 2, coding(0.11, 7)
    program = single(step, shapes, [c] * len(shapes), o)
    inputs = tuple(values([32, *s[1:]], c, i) for i, s in enumerate(shapes))
    path = tmp_path / "fast.tflite"
    path.write_bytes(Writer(program).file({}))
    exact, fast = Session(path, reference=True)(*inputs)[0], Session(path)(*inputs)[0]
    assert float((exact - fast).abs().max()) <= o.scale * 1.001
