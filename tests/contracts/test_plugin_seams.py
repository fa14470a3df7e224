"""One file in a folder is a plug-in: exotic ones, written here, pass the contracts of those shipped."""

import importlib
import sys
from pathlib import Path

import observer_contract
import pytest
import rounding_contract
import torch
from format_contract import CONTRACT as FORMAT_CONTRACT

from fewbit.errors import FewbitError, FormatError, RecipeError
from fewbit.numerics import QTensor, Scheme, format_names, get_format
from fewbit.observers import make_observer, observer_names
from fewbit.registry import Registry
from fewbit.rounding import round_weight, rounding_names

FLOAT4 = '''
"""Floats of 4 bits: a sign, two bits of exponent, one of mantissa; the code of -0 is not used."""

import torch

from fewbit.numerics.format import Format

PATTERN = r"tiny_float4"
EXAMPLES = ("tiny_float4",)
GRID = torch.tensor([-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CODES = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)


class TinyFloat(Format):
    name, bits, integer, qmin, qmax, code_dtype = "tiny_float4", 4, False, -6.0, 6.0, torch.uint8

    def codes(self):
        return CODES

    def encode(self, v):
        v = v.clamp(-6.0, 6.0)
        middles = (GRID[1:] + GRID[:-1]) / 2
        below, above = torch.searchsorted(middles, v), torch.searchsorted(middles, v, right=True)
        even = (CODES[below] & 1) == 0  # below and above differ at ties only
        return torch.where(even, CODES[below], CODES[above])

    def decode(self, codes):
        place = torch.empty(16, dtype=torch.long)
        place[CODES.long()] = torch.arange(15)
        return GRID[place[codes.long()]]


def make(match):
    return TinyFloat()
'''

POWERS = '''
"""Zero and signed powers of two, in steps of one octave: a family, with the number of bits in the name."""

import torch

from fewbit.numerics.format import Format

PATTERN = r"octaves(\\d)"
EXAMPLES = ("octaves3", "octaves5")


class Octaves(Format):
    integer, qmin, qmax, code_dtype = False, -1.0, 1.0, torch.int8

    def __init__(self, bits):
        self.name, self.bits, self.count = f"octaves{bits}", bits, 2 ** (bits - 1) - 1
        positive = 2.0 ** torch.arange(1 - self.count, 1)
        self.grid = torch.cat((-positive.flip(0), torch.zeros(1), positive))

    def codes(self):
        return torch.arange(-self.count, self.count + 1).to(torch.int8)

    def encode(self, v):
        index = torch.searchsorted((self.grid[1:] + self.grid[:-1]) / 2, v.clamp(-1, 1))
        return (index - self.count).to(torch.int8)

    def decode(self, codes):
        return self.grid[codes.long() + self.count]


def make(match):
    return Octaves(int(match[1]))
'''

STOCHASTIC = '''
"""Rounds up with the probability of the remainder, so that the expected error is zero."""

import torch

from fewbit.numerics import QTensor, qparams, unblocks, blocks

STATISTICS = frozenset()
RANDOM = True


def accepts(spec):
    return spec.integer


def round(weight, scheme, lo, hi, statistics):
    scale, zero_point = qparams(lo, hi, scheme)
    v = blocks(weight, scheme) / scale.reshape(-1, 1)
    noise = torch.rand(v.shape, generator=torch.Generator().manual_seed(statistics.get("seed", 0)))
    # A number within a float32 rounding error of the grid is on it.
    nearest = v.round()
    down = torch.where((v - nearest).abs() < 1e-4, nearest, (v + noise).floor())
    codes = (down + zero_point.reshape(-1, 1)).clamp(scheme.qmin, scheme.qmax)
    codes = unblocks(codes, weight.shape, scheme).to(torch.int32)
    return QTensor.from_codes(codes, scale, zero_point, scheme)
'''

MIDRANGE = '''
"""Nine tenths of the extremes: nobody needs it, but it is a range estimator."""

from fewbit.observers import RangeObserver


class Observer(RangeObserver):
    SATURATES = True
    ORDER_INDEPENDENT = True

    def _observe(self, rows, lo, hi):
        pass

    def _absorb(self, other):
        pass

    def _estimate(self):
        lo, hi = self.observed()
        return lo * 0.995, hi * 0.995
'''


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that adds one file to a package for the time of a test; nothing of it is left afterwards."""
    added: list[tuple[str, str]] = []

    def add(package: str, name: str, text: str) -> None:
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        found = importlib.import_module(package)
        monkeypatch.setattr(found, "__path__", [*found.__path__, str(folder)])
        added.append((package, name))

    yield add
    for package, name in added:
        sys.modules.pop(f"{package}.{name}", None)
        if hasattr(importlib.import_module(package), name):
            delattr(importlib.import_module(package), name)
    get_format.cache_clear()


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [("tiny_float", FLOAT4, ["tiny_float4"]), ("octaves", POWERS, ["octaves3", "octaves5"])],
)
def test_a_format_is_one_file(plug_in, file, text, names):
    with pytest.raises(FormatError):
        get_format(names[0])
    plug_in("fewbit.numerics.formats", file, text)
    assert set(names) <= set(format_names())
    for name in names:
        for promise in FORMAT_CONTRACT:
            promise(get_format(name))
        with pytest.raises(FormatError, match=f"format '{name}' has no zero point"):
            Scheme(name, symmetric=False)


def test_an_exotic_format_works_with_observers_and_roundings(plug_in):
    plug_in("fewbit.numerics.formats", "tiny_float", FLOAT4)
    x = torch.tensor([[-12.0, 1.1, 2.4, 0.2], [0.6, 0.26, -0.24, 0.0]])
    scheme = Scheme("tiny_float4", "channel")
    observer = make_observer("minmax", scheme)
    observer.update(x)
    q = round_weight("nearest", x, scheme, *observer.bounds())
    assert q.scale.tolist() == pytest.approx([2.0, 0.1])
    assert q.dequantize().flatten().tolist() == pytest.approx([-12, 1, 2, 0, 0.6, 0.3, -0.2, 0])
    assert q.nbytes == 4 + 8
    assert Scheme.from_json(scheme.to_json()) == scheme
    for name in observer_names():  # mse and entropy search on this format's own grid
        found = make_observer(name, Scheme("tiny_float4"))
        found.update(torch.randn(10_000))
        lo, hi = found.bounds()
        assert -6 < lo.item() < -0.5
        assert 0.5 < hi.item() < 6


def test_a_rounding_is_one_file(plug_in):
    plug_in("fewbit.rounding", "coin", STOCHASTIC)
    assert "coin" in rounding_names()
    module = Registry("fewbit.rounding", "rounding").module("coin")
    for promise in rounding_contract.CONTRACT:
        promise(module)
    w = torch.full((1, 100_000), 0.3)
    limit = torch.tensor([127.0])
    q = round_weight("coin", w, Scheme("int8"), -limit, limit)
    assert set(q.codes.flatten().tolist()) == {0, 1}
    assert q.dequantize().mean().item() == pytest.approx(0.3, abs=0.01)  # nearest would say 0


def test_an_observer_is_one_file(plug_in):
    plug_in("fewbit.observers", "midrange", MIDRANGE)
    assert "midrange" in observer_names()
    module = Registry("fewbit.observers", "observer").module("midrange")
    for promise in observer_contract.CONTRACT:
        if promise is not observer_contract.outliers_are_not_everything:
            promise(module)
    with pytest.raises(AssertionError):
        observer_contract.outliers_are_not_everything(
            module
        )  # and the contract notices that it is a poor one


SOFTENED = '''
"""Rounding whose gradient is halved everywhere; nothing else learns."""

from fewbit.training.estimators import WeightEstimator


class Weights(WeightEstimator):
    def __init__(self, weight, q):
        super().__init__(weight, q)
        self.register_buffer("scale", q.scale.reshape(-1, 1))

    def parts(self, rows):
        v = self.rounded(rows / self.scale)
        return v / 2 + (v / 2).detach(), self.scale
'''

COSINE = '''
"""One less the cosine of the angle between outputs."""

import torch.nn.functional as F


def loss(student, teacher, labels, temperature):
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean()
'''


def test_an_estimator_and_a_loss_are_one_file_each(plug_in):
    import fewbit

    plug_in("fewbit.training.estimators", "softened", SOFTENED)
    plug_in("fewbit.training.losses", "cosine", COSINE)
    x, net = torch.randn(40, 6), torch.nn.Linear(6, 4)
    q = fewbit.quantize(net, x, weights="int4", trainable=fewbit.Training(weights="softened"))
    fewbit.finetune(q, x, epochs=2, batch_size=8, teacher=net, distill="cosine")
    with torch.no_grad():
        assert torch.equal(q(x), q.convert()(x))
    with pytest.raises(RecipeError, match="'softened' makes no codebook4 weights"):
        from fewbit.training.estimators import weight_estimator

        codes = torch.zeros(4, 6, dtype=torch.uint8)
        table, zero = torch.linspace(-1, 1, 16).reshape(1, -1), torch.zeros(1, dtype=torch.int32)
        learned = QTensor(codes, torch.ones(1), zero, Scheme("codebook4"), (4, 6), table)
        weight_estimator("softened", net.weight, learned)


def test_plug_ins_leave_no_trace():
    assert not {"tiny_float4", "octaves3"} & set(format_names())
    assert "coin" not in rounding_names()
    assert "midrange" not in observer_names()
    assert not [name for name in sys.modules if name.endswith((".tiny_float", ".coin", ".midrange"))]


def test_the_contract_of_formats_refuses_broken_formats(plug_in):
    """Each promise that a fault breaks is noticed: the contract is not empty."""
    faults = {
        "ties go wrong": ("codes()", "return CODES", "return CODES.flip(0)"),
        "does not saturate": ("encode", "v = v.clamp(-6.0, 6.0)", "v = v.where(v.abs() < 8, 0 * v)"),
        "grid is off": (
            "decode",
            "return GRID[place[codes.long()]]",
            "return GRID[place[codes.long()]] + 0.01",
        ),
    }
    for i, (_, old, new) in enumerate(faults.values()):
        name = f"broken{i}"
        text = FLOAT4.replace(old, new).replace("tiny_float4", name)
        assert text != FLOAT4.replace("tiny_float4", name)
        plug_in("fewbit.numerics.formats", name, text)
        with pytest.raises(AssertionError):
            for promise in FORMAT_CONTRACT:
                promise(get_format(name))


def test_registry_names_the_nearest_and_raises_what_it_was_told():
    with pytest.raises(RecipeError, match="unknown observer 'entropi': did you mean 'entropy'"):
        Registry("fewbit.observers", "observer").module("entropi")
    with pytest.raises(FormatError, match="unknown format family 'x': available: "):
        Registry("fewbit.numerics.formats", "format family", FormatError).module("x")
    with pytest.raises(FewbitError):
        Registry("fewbit.observers", "observer").module("../errors")
