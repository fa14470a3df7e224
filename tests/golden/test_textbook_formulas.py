"""The formulas that textbooks give come out exactly."""

import pytest
import torch

from fewbit.numerics import QTensor, Scheme, encode, qparams
from fewbit.observers import make_observer


def code(x, scale, zero_point, name, **fields):
    scheme = Scheme(name, **fields)
    z = torch.tensor([zero_point], dtype=torch.int32)
    return encode(torch.tensor([x], dtype=torch.float32), torch.tensor([scale]), z, scheme).item()


def test_scale_and_zero_point():
    """q = round(x / s) + z: 3.14 at s = 0.1, z = 0 is 31, and stands for 3.1."""
    assert code(3.14, 0.1, 0, "int8") == 31
    assert code(3.14, 0.1, 10, "uint8", symmetric=False) == 41
    q = QTensor.quantize(torch.tensor([3.14]), Scheme("int8"), torch.tensor(-12.7), torch.tensor(12.7))
    assert q.codes.tolist() == [31]
    assert q.dequantize().tolist() == pytest.approx([3.1], abs=1e-6)


def test_fixed_point():
    """round(1.2345678 / 0.001) = 1235."""
    assert code(1.2345678, 0.001, 0, "int16") == 1235


@pytest.mark.parametrize("bits", range(2, 17))
def test_affine_mapping_of_a_range(bits):
    """Q(x) = round((x - x_min) / (x_max - x_min) * (2**b - 1)), for ranges whose zero is a level."""
    top = 2**bits - 1
    lo, hi = -1.0, float(top - 1)  # the step is 1, and zero is level 1
    x = torch.linspace(lo, hi, 1001, dtype=torch.float64)
    expected = torch.round((x - lo) / (hi - lo) * top).to(torch.int64)
    # Ties to even of x and of x + 1 go opposite ways; the formula leaves ties open, so they are left out.
    tie = ((x - lo) / (hi - lo) * top - expected).abs() > 0.4999
    q = QTensor.quantize(
        x.to(torch.float32), Scheme(f"uint{bits}", symmetric=False), torch.tensor(lo), torch.tensor(hi)
    )
    assert q.zero_point.item() == 1
    assert torch.equal(q.codes.to(torch.int64)[~tie], expected[~tie])
    assert q.codes[0].item() == 0
    assert q.codes[-1].item() == top
    assert int(tie.sum()) < 600


@pytest.mark.parametrize("bits", [4, 8])
def test_affine_mapping_of_a_range_from_zero(bits):
    """With x_min = 0 the mapping is exact for every number, ties included."""
    top = 2**bits - 1
    x = torch.arange(0, 4 * top + 1, dtype=torch.float32) / 4
    expected = [round(float(v) / top * top) for v in x]
    q = QTensor.quantize(x, Scheme(f"uint{bits}", symmetric=False))
    assert q.codes.tolist() == expected


@pytest.mark.parametrize("bits", range(2, 15))
def test_weights_normalised_to_one(bits):
    """W_q = round(W * 2**b) for W within [-1, 1]: the scale is 2**-b, and +1 needs a format of b + 2 bits."""
    w = torch.tensor([-1.0, -0.7071, -0.25, 0.0, 0.1, 0.333, 0.5, 0.9999, 1.0])
    expected = [round(float(v) * 2**bits) for v in w]
    scheme = Scheme(f"int{bits + 2}")
    scale, zero_point = torch.tensor([2.0**-bits]), torch.zeros(1, dtype=torch.int32)
    assert encode(w, scale, zero_point, scheme).tolist() == expected


def test_non_saturating_range():
    """scale = max|x| / 127: no number is clipped; the largest gets the last code."""
    x = torch.tensor([-2.0, -1.0, 0.5, 2.54])
    observer = make_observer("minmax", Scheme("int8"))
    observer.update(x)
    q = QTensor.quantize(x, Scheme("int8"), *observer.bounds())
    assert q.scale.item() == pytest.approx(0.02, rel=1e-6)
    assert q.codes.tolist() == [-100, -50, 25, 127]


def test_saturating_range():
    """A threshold below max|x|: what lies beyond it gets the last code."""
    x = torch.tensor([-5.0, -1.27, 0.5, 1.27, 9.0])
    q = QTensor.quantize(x, Scheme("int8", narrow=True), torch.tensor(-1.27), torch.tensor(1.27))
    assert q.codes.tolist() == [-127, -127, 50, 127, 127]
    q = QTensor.quantize(x, Scheme("int8"), torch.tensor(-1.27), torch.tensor(1.27))
    assert q.codes.tolist() == [-128, -127, 50, 127, 127]


def test_affine_range():
    """scale = (max - min) / 255, zero point = round(-min / scale): zero has a code of its own."""
    scheme = Scheme("uint8", symmetric=False)
    scale, zero_point = qparams(torch.tensor([-0.5]), torch.tensor([2.05]), scheme)
    assert scale.item() == pytest.approx(0.01, rel=1e-6)
    assert zero_point.item() == 50
    x = torch.tensor([-0.5, 0.0, 1.0, 2.05, 3.0])
    assert encode(x, scale, zero_point, scheme).tolist() == [0, 50, 150, 255, 255]
