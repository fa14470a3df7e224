"""The kernels of LiteRT's reference interpreter for 16-bit activations, operator by operator: 0 codes may differ."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from fewbit.model.program import Coding, Op, Program
from fewbit.model.reference import Reference
from fewbit.numerics.scheme import Scheme
from fewbit.targets._litert.reader import read_back
from fewbit.targets._litert.runtime import probe
from fewbit.targets._litert.writer import Writer

INT16 = Scheme("int16")
# Scales in a ratio of a power of two make ties frequent, those in a ratio of three ties that a rounded scale decides.
SCALES = [(0.0005, 0.0007), (2.0**-10, 2.0**-9), (2.0**-10, 3 * 2.0**-10), (0.0009, 0.0003), (0.0005, 0.0006)]


def coding(scale: float) -> Coding:
    return Coding(INT16, float(np.float32(scale)), 0)


def single(step: Op, shapes: list[list[int]], ins: list[Coding], out: Coding) -> Program:
    """A program that quantizes its inputs, applies one operation and dequantizes the result."""
    names = [f"x{i}" for i in range(len(shapes))]
    starts = [Op("quantize", "boundary", n, n, [n], f"{n}_codes") for n in names]
    step.inputs, step.output = [f"{n}_codes" for n in names], "y_codes"
    ops = [*starts, step, Op("dequantize", "boundary", "y", "y", ["y_codes"], "y")]
    codings = {f"{n}_codes": c for n, c in zip(names, ins, strict=True)} | {"y_codes": out}
    free: list[tuple[int | None, ...]] = [(None, *s[1:]) for s in shapes]
    return Program(names, free, ["float32"] * len(names), "y", [()], ["float32"], ops, codings)


def values(shape: list[int], c: Coding, seed: int, largest: int = 32767) -> Tensor:
    """Floats that are exactly codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float() * c.scale


def differing(program: Program, inputs: tuple[Tensor, ...], folder: Path) -> tuple[int, int]:
    """Codes of the operation that LiteRT computes differently, and all of them.

    Both the program as it was written and the one that the file says are compared.
    """
    path = folder / "one.tflite"
    path.write_bytes(Writer(program).file({}))
    codes = probe(path, inputs, {"y_codes": "y_codes"})["y_codes"]
    back = read_back(path).program
    assert back is not None
    expected = [Reference(p, "q31_double").run(*inputs)["y_codes"] for p in (program, back)]
    assert torch.equal(*expected)
    assert expected[0].abs().max() > 200  # not a test of nothing
    return int((codes != expected[0]).sum()), codes.numel()


def op(kind: str, **attrs: object) -> Op:
    return Op(kind, "integer", "y", "y", [], "y_codes", attrs)


def weights(*shape: int, widest: int = 2**22) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        "weight_scale": torch.tensor([2.0**-9, 0.003, 0.02, 0.0007])[torch.arange(shape[0]) % 4],
        "bias": torch.randint(-widest, widest, shape[:1], generator=generator),
    }


@pytest.mark.parametrize(("given", "out"), SCALES)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("widest", [2**22, 2**38])
def test_convolution(given: float, out: float, groups: int, widest: int, tmp_path: Path) -> None:
    """Biases beyond 32 bits too, where the sums are kept in 64."""
    step = op("conv", stride=[2, 1], dilation=[1, 1], groups=groups, pad=[1, 1, 0, 1], layout="NHWC")
    step.constants = weights(8, 8 // groups, 3, 3, widest=widest)
    c, o = coding(given), coding(out * 16 * (widest / 2**22) / groups)
    program = single(step, [[1, 8, 8, 8]], [c], o)
    inputs = (values([64, 8, 8, 8], c, 1),)
    assert differing(program, inputs, tmp_path) == (0, 64 * 4 * 8 * 8)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("given", "out"), [(0.000314, 0.0271), (0.000217, 0.0113), (2.0**-10, 6 * 2.0**-12)])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_one_product_many_times(kind: str, given: float, out: float, channels: int, tmp_path: Path) -> None:
    """A million codes: how scales are multiplied shows in one of thousands."""
    shape = [1, 1, 1, 16] if kind == "conv" else [1, 16]
    attrs = {"stride": [1, 1], "dilation": [1, 1], "groups": 1, "pad": [], "layout": "NHWC"}
    step = op(kind, **attrs) if kind == "conv" else op(kind, shape=[None, 16])
    step.constants = weights(channels, 16, *([1, 1] if kind == "conv" else []))
    program = single(step, [shape], [coding(given)], coding(out * (4 if channels > 1 else 1 / 8)))
    x = values([250_000, *shape[1:]], coding(given), 7)
    assert differing(program, (x,), tmp_path) == (0, 250_000 * channels)


@pytest.mark.parametrize(("given", "out"), SCALES)
def test_linear(given: float, out: float, tmp_path: Path) -> None:
    step = op("linear", shape=[None, 24], clamp=[0, 32767])
    step.constants = weights(12, 24)
    if given == out / 2:  # one without a bias
        del step.constants["bias"]
    c, o = coding(given), coding(out * 16)
    assert differing(single(step, [[1, 24]], [c], o), (values([4000, 24], c, 2),), tmp_path) == (0, 4000 * 12)


@pytest.mark.parametrize("kind", ["add", "mul"])
@pytest.mark.parametrize(("first", "second"), SCALES)
def test_pairs(kind: str, first: float, second: float, tmp_path: Path) -> None:
    """With a fused ReLU."""
    a, b = coding(first), coding(second)
    o = coding(first * second * 32768 if kind == "mul" else first + second)
    x = (values([200_000, 1], a, 3), values([200_000, 1], b, 4))
    program = single(op(kind, clamp=[0, 32767]), [[1, 1], [1, 1]], [a, b], o)
    assert differing(program, x, tmp_path) == (0, 200_000)


@pytest.mark.parametrize("alpha", [None, 0.01, 0.3])
@pytest.mark.parametrize(("given", "out"), SCALES)
def test_every_code(given: float, out: float, alpha: float | None, tmp_path: Path) -> None:
    """Another scale, and the leaky ReLU."""
    c, o = coding(given), coding(out)
    step = op("requantize") if alpha is None else op("leaky_relu", alpha=alpha)
    x = (torch.arange(-32768, 32768).float() * c.scale).reshape(-1, 1)
    assert differing(single(step, [[1, 1]], [c], o), (x,), tmp_path) == (0, 65536)


@pytest.mark.parametrize("clamp", [[0, 32767], [0, 6000], [-1000, 1000], [-77, 5000], [12, 32767]])
def test_clip(clamp: list[int], tmp_path: Path) -> None:
    c = coding(0.001)
    x = (torch.arange(-32768, 32768).float() * c.scale).reshape(-1, 1)
    assert differing(single(op("clip", clamp=clamp), [[1, 1]], [c], c), (x,), tmp_path) == (0, 65536)


@pytest.mark.parametrize("kind", ["conv", "linear", "add", "mul"])
@pytest.mark.parametrize("clamp", [[0, 6000], [-1000, 1000]])
def test_fused_limits(kind: str, clamp: list[int], tmp_path: Path) -> None:
    c, o = coding(0.0005), coding(0.001)
    shapes, attrs = [[1, 4, 4, 8]], {}
    if kind == "conv":
        attrs = {"stride": [1, 1], "dilation": [1, 1], "groups": 1, "pad": [], "layout": "NHWC"}
    step = op(kind, clamp=clamp, **attrs)
    if kind in ("conv", "linear"):
        step.constants = weights(8, 8, *([3, 3] if kind == "conv" else []))
    else:
        shapes = shapes * 2
    program = single(step, shapes, [c] * len(shapes), o)
    inputs = tuple(values([32, *s[1:]], c, i) for i, s in enumerate(shapes))
    assert differing(program, inputs, tmp_path)[0] == 0


@pytest.mark.parametrize("side", [5, 7, 8, 100])
@pytest.mark.parametrize(("given", "out"), SCALES)
def test_mean(given: float, out: float, side: int, tmp_path: Path) -> None:
    c, o = coding(given), coding(out / side)
    program = single(op("global_avg_pool", layout="NHWC", squeeze=True), [[1, side, side, 4]], [c], o)
    count = 16 if side == 100 else 512
    assert differing(program, (values([count, side, side, 4], c, 5),), tmp_path) == (0, count * 4)


@pytest.mark.parametrize("kernel", [[2, 2], [3, 2], [4, 4]])
@pytest.mark.parametrize("kind", ["avg_pool", "max_pool"])
def test_pools(kind: str, kernel: list[int], tmp_path: Path) -> None:
    c = coding(0.0005)
    step = op("avg_pool", kernel=kernel, stride=kernel, layout="NHWC")
    if kind == "max_pool":
        target = "aten.max_pool2d.default"
        attrs = {"target": target, "args": [{"$": 0}, kernel, kernel, [0, 0]], "kwargs": {}, "layout": "NHWC"}
        step = Op(target, "shares", "y", "y", [], "y_codes", attrs)
    x = values([8, 12, 12, 4], c, 6)
    assert differing(single(step, [[1, 12, 12, 4]], [c], c), (x,), tmp_path) == (
        0,
        8 * 4 * 144 // math.prod(kernel),
    )


@pytest.mark.parametrize(
    "given", [(0.0005, 0.0007, 0.05), (2.0**-4, 2.0**-4, 2.0**-5), (0.00049, 0.00022, 0.03)]
)
def test_matmul(given: tuple[float, float, float], tmp_path: Path) -> None:
    a, b, o = (coding(s) for s in given)
    largest = 60 if given[0] == 2.0**-4 else 32767  # small codes at scales of powers of two: many ties
    x = (values([6, 64, 32], a, 8, largest), values([6, 32, 64], b, 9, largest))
    program = single(op("matmul"), [[1, 64, 32], [1, 32, 64]], [a, b], o)
    assert differing(program, x, tmp_path) == (0, 6 * 64 * 64)


MOVES = {
    "aten.reshape.default": [[-1, 96]],
    "aten.permute.default": [[0, 2, 1]],
    "aten.slice.Tensor": [1, 2, 7, 1],
    "aten.select.int": [1, 3],
    "aten.repeat.default": [[1, 2, 1]],
}


@pytest.mark.parametrize("target", MOVES)
def test_moves(target: str, tmp_path: Path) -> None:
    c = coding(0.001)
    step = Op(
        target, "shares", "y", "y", [], "y_codes", {"target": target, "args": [{"$": 0}, *MOVES[target]]}
    )
    step.attrs["kwargs"] = {}
    assert differing(single(step, [[1, 8, 12]], [c], c), (values([5, 8, 12], c, 10),), tmp_path)[0] == 0


@pytest.mark.parametrize("number", [0, -32768, 77])
def test_padding(number: int, tmp_path: Path) -> None:
    c = coding(0.001)
    step = op("pad", pad=[0, 0, 1, 2, 0, 1, 0, 0], value=number)
    assert differing(single(step, [[1, 6, 6, 4]], [c], c), (values([4, 6, 6, 4], c, 11),), tmp_path)[0] == 0


def test_concatenation(tmp_path: Path) -> None:
    c = coding(0.001)
    x = (values([9, 5], c, 12), values([9, 3], c, 13))
    assert differing(single(op("concat", axis=1), [[1, 5], [1, 3]], [c, c], c), x, tmp_path) == (0, 72)


def test_from_float_halves_go_away_from_zero(tmp_path: Path) -> None:
    c = coding(2.0**-10)
    program = single(op("requantize"), [[1, 1]], [c], c)
    x = ((torch.arange(-5000, 5000) + 0.5) * c.scale).reshape(-1, 1)
    assert differing(program, (x,), tmp_path) == (0, 10_000)
    codes = Reference(program, "q31_double").run(x)["x0_codes"].reshape(-1)
    assert codes[:2].tolist() == [-5000, -4999] and codes[-1].item() == 5000
