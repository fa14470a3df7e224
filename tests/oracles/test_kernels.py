"""Every integer kernel against a slow twin: Python integers, and the float32 steps of the rule one by one."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.model.kernels import KERNELS, accumulate
from fewbit.model.program import Coding, Op
from fewbit.numerics.scheme import Scheme

f32 = np.float32
TIES = [(0.02, 0.04), (0.04, 0.02), (0.017, 0.03), (0.5, 1.0), (0.0123, 0.0456)]  # scales of input and output


def coding(scale: float, zero_point: int, fmt: str = "uint8") -> Coding:
    return Coding(Scheme(fmt, symmetric=False), float(f32(scale)), zero_point)


def codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def op(kind: str, attrs: dict | None = None, constants: dict | None = None) -> Op:
    return Op(kind, "integer", "layer", "node", ["x"], "y", attrs or {}, constants or {})


def run(o: Op, xs: list[Tensor], codings: list[Coding], out: Coding) -> list[int]:
    result = KERNELS[o.kind](o, xs, codings, out)
    return [int(v) for v in result.flatten()]


def finish(value: float, zero_point: int, lo: int = 0, hi: int = 255) -> int:
    """Rounded half to even (Python's own rounding), then shifted and clipped."""
    return min(max(round(float(value)) + zero_point, lo), hi)


def fma(a: float, b: float, c: float) -> np.float32:
    """One rounding, from the exact sum: through the nearest double, whose own rounding never matters at these sizes."""
    return f32(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def weights(*shape: int, bias: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        "weight": torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(shape[0], generator=generator) * 0.002 + 0.0005,
    }
    if bias:
        made["bias"] = torch.randint(-90000, 90000, (shape[0],), generator=generator, dtype=torch.int32)
    return made


def requantize(acc: int, channel: int, constants: dict[str, Tensor], x: Coding, out: Coding) -> int:
    multiplier = f32(f32(x.scale) * f32(constants["weight_scale"][channel])) / f32(out.scale)
    return finish(f32(acc) * multiplier, out.zero_point)


def check_conv() -> None:
    for groups, stride, dilation, pad in ((1, 2, 1, [1, 0, 2, 1]), (2, 1, 2, [1, 1, 0, 0]), (4, 1, 1, [])):
        c = weights(4, 4 // groups, 3, 2)
        attrs = {"stride": [stride] * 2, "dilation": [dilation] * 2, "groups": groups, "pad": pad}
        x, xc, yc = codes(2, 4, 7, 6), coding(0.03, 101), coding(0.09, 77)
        left, right, top, bottom = pad or [0] * 4
        high = (7 + top + bottom - dilation * 2 - 1) // stride + 1
        wide = (6 + left + right - dilation - 1) // stride + 1
        expected = []
        for n, o, i, j in itertools.product(range(2), range(4), range(high), range(wide)):
            acc = int(c["bias"][o])
            for k, a, b in itertools.product(range(4 // groups), range(3), range(2)):
                row, column = i * stride + a * dilation - top, j * stride + b * dilation - left
                if 0 <= row < 7 and 0 <= column < 6:
                    source = o // (4 // groups) * (4 // groups) + k
                    acc += (int(x[n, source, row, column]) - 101) * int(c["weight"][o, k, a, b])
            expected.append(requantize(acc, o, c, xc, yc))
        assert run(op("conv", attrs, c), [x], [xc], yc) == expected


def check_linear() -> None:
    c = weights(5, 9)
    x, xc, yc = codes(3, 9), coding(0.02, 128), coding(0.04, 3)
    expected = []
    for n, o in itertools.product(range(3), range(5)):
        acc = sum((int(x[n, k]) - 128) * int(c["weight"][o, k]) for k in range(9)) + int(c["bias"][o])
        expected.append(requantize(acc, o, c, xc, yc))
    assert run(op("linear", {}, c), [x], [xc], yc) == expected


def check_matmul() -> None:
    a, b, ac, bc, yc = codes(3, 7), codes(7, 4, seed=1), coding(0.02, 9), coding(0.004, 130), coding(0.05, 60)
    multiplier = f32(ac.scale) * f32(bc.scale) / f32(yc.scale)
    expected = [
        finish(f32(sum((int(a[i, k]) - 9) * (int(b[k, j]) - 130) for k in range(7))) * multiplier, 60)
        for i in range(3)
        for j in range(4)
    ]
    assert run(op("matmul"), [a, b], [ac, bc], yc) == expected


def check_add() -> None:
    for sa, sy in TIES:
        a, b, ac, bc, yc = codes(600), codes(600, seed=1), coding(sa, 17), coding(0.013, 120), coding(sy, 99)
        ra, rb = f32(ac.scale) / f32(yc.scale), f32(bc.scale) / f32(yc.scale)
        constant = f32(99) - fma(17, ra, rb * f32(120))
        expected = [
            finish(fma(p, ra, fma(q, rb, constant)), 0) for p, q in zip(a.tolist(), b.tolist(), strict=True)
        ]
        assert run(op("add"), [a, b], [ac, bc], yc) == expected


def check_mul() -> None:
    for sa, sy in TIES:
        a, b, ac, bc, yc = (
            codes(600),
            codes(600, seed=1),
            coding(sa, 17),
            coding(0.5, 120),
            coding(sy * 40, 99),
        )
        ratio = f32(ac.scale) * f32(bc.scale) / f32(yc.scale)
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        expected = [finish(f32(f32((p - 17) * (q - 120)) * ratio) + f32(99), 0) for p, q in pairs]
        assert run(op("mul"), [a, b], [ac, bc], yc) == expected


def value(code: int, c: Coding) -> np.float32:
    return f32(code - c.zero_point) * f32(c.scale)


def check_avg_pool() -> None:
    x, attrs = codes(1, 2, 5, 6), {"kernel": [2, 3], "stride": [2, 1]}
    for sx, sy in TIES:
        xc, yc = coding(sx, 40), coding(sy, 31)
        expected = []
        for c, i, j in itertools.product(range(2), range(2), range(4)):
            total = f32(0)
            for a, b in itertools.product(range(2), range(3)):
                total = total + value(int(x[0, c, 2 * i + a, j + b]), xc)
            expected.append(finish(total / f32(6) / f32(yc.scale) + f32(31), 0))
        assert run(op("avg_pool", attrs), [x], [xc], yc) == expected


def check_global_avg_pool() -> None:
    x = codes(40, 3, 2, 2)
    for sx, sy in TIES:
        xc, yc = coding(sx, 41), coding(sy, 30)
        scale = f32(xc.scale) / (f32(yc.scale) * f32(4))
        sums = [sum(int(v) - 41 for v in x[n, c].flatten()) for n in range(40) for c in range(3)]
        expected = [finish(f32(s) * scale, 30) for s in sums]
        assert run(op("global_avg_pool"), [x], [xc], yc) == expected
        assert KERNELS["global_avg_pool"](op("global_avg_pool", {"squeeze": True}), [x], [xc], yc).shape == (
            40,
            3,
        )


def check_concat() -> None:
    a, b = codes(2, 3), codes(2, 2, seed=1)
    for sx, sy in TIES:
        ac, bc, yc = coding(sx, 8), coding(0.011, 90), coding(sy, 30)
        expected = []
        for n in range(2):
            for part, c in ((a, ac), (b, bc)):
                expected += [finish(value(int(v), c) / f32(yc.scale), 30) for v in part[n]]
        assert run(op("concat", {"axis": 1}), [a, b], [ac, bc], yc) == expected


def check_softmax() -> None:
    for scale, out, zero_point in (
        (0.02, 1 / 256, 0),
        (0.013, 0.0021, 7),
        (0.3, 0.0007, 0),
        (0.01, 1 / 128, 0),
    ):
        x, xc, yc = codes(50, 6), coding(scale, 3), coding(out, zero_point)
        unit, steps = min((2**32 - 1) / 6, 0x7FFFFF), int(f32(1) / f32(yc.scale))
        expected = []
        for row in x.tolist():
            powers = [math.floor(unit * math.exp((v - max(row)) * float(f32(xc.scale))) + 0.5) for v in row]
            expected += [finish(f32(p * steps) / f32(sum(powers)), zero_point) for p in powers]
        assert run(op("softmax"), [x], [xc], yc) == expected


def check_table() -> None:
    table = codes(16, seed=4).to(torch.uint8)
    x = torch.arange(-8, 8, dtype=torch.int32)
    assert run(op("table", {}, {"table": table}), [x], [coding(1, 0, "int4")], coding(1, 0)) == table.tolist()


def check_clip() -> None:
    x = codes(99)
    expected = [min(max(v, 20), 77) for v in x.tolist()]
    assert run(op("clip", {"clamp": [20, 77]}), [x], [coding(1, 20)], coding(1, 20)) == expected


def check_requantize() -> None:
    x, xc, yc = codes(2, 40), coding(0.07, 100), coding(0.05, 90)
    scale = np.float32(xc.scale) / np.float32(yc.scale)
    expected = [finish(float(np.float32(int(q) - 100) * scale), 90) for q in x.reshape(-1)]
    assert run(op("requantize"), [x], [xc], yc) == expected


def check_pad() -> None:
    result = KERNELS["pad"](
        op("pad", {"pad": [1, 0, 0, 2]}), [torch.tensor([[5, 6]])], [coding(1, 9)], coding(1, 9)
    )
    assert result.tolist() == [[9, 5, 6], [9, 9, 9], [9, 9, 9]]


ORACLES: dict[str, Callable[[], None]] = {
    "conv": check_conv, "linear": check_linear, "matmul": check_matmul, "add": check_add, "mul": check_mul,
    "avg_pool": check_avg_pool, "global_avg_pool": check_global_avg_pool, "concat": check_concat,
    "softmax": check_softmax, "table": check_table, "clip": check_clip, "pad": check_pad,
    "requantize": check_requantize,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KERNELS))
def test_kernel_equals_its_definition(kind: str) -> None:
    assert kind in ORACLES, f"the kernel {kind!r} has no twin here: write one"
    ORACLES[kind]()


@pytest.mark.parametrize("terms", [518, 519, 521, 600, 4097, 70001])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_around_the_limit_of_float32_are_exact(terms: int, sign: int) -> None:
    """From 519 products on sums can pass 2**24: odd ones there (521, 600) need the wider carrier."""
    weight = torch.full((1, terms), sign * 127, dtype=torch.int8)
    weight[0, -1] = sign
    x = torch.full((2, terms), 255, dtype=torch.int32)
    x[1, 0] = 254
    o = op("linear", {}, {"weight": weight, "weight_scale": torch.ones(1)})
    whole = sign * (127 * 255 * (terms - 1) + 255)
    assert accumulate(o, x, coding(1, 0)).flatten().tolist() == [whole, whole - sign * 127]


def test_a_fused_clamp_limits_the_codes() -> None:
    c = weights(5, 9)
    o = op("linear", {"clamp": [40, 50]}, c)
    result = run(o, [codes(30, 9)], [coding(0.02, 128)], coding(0.04, 40))
    assert min(result) == 40 and max(result) == 50
