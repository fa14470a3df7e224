"""Codes moved between signed and unsigned: the program computes the same, and moving back restores it."""

import torch
from torch import Tensor, nn

import fewbit
from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.reference import Reference
from fewbit.model.signed import signed, unsigned_codes

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A clamp, a table, a constant and a sum: all that follows a move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("offset", torch.linspace(-1, 1, 4).reshape(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).clamp(-0.5, 1.0)
        return nn.functional.hardswish(x) + self.offset


def program(target: str) -> Program:
    torch.manual_seed(0)
    return lower(fewbit.quantize(Net().eval(), X, target=target, progress=False))


def test_moving_there_and_back_gives_the_same_program() -> None:
    unsigned = program("onnx")
    assert all(c.scheme.qmin == 0 for c in unsigned.codings.values())
    moved = signed(unsigned)
    assert all(c.scheme.qmin < 0 for c in moved.codings.values())
    back = unsigned_codes(moved)
    assert back.to_json() == unsigned.to_json()
    assert all(torch.equal(t, unsigned.tensors()[name]) for name, t in back.tensors().items())


def test_the_outputs_are_the_same_bits() -> None:
    for given in (program("onnx"), program("litert")):
        expected = Reference(given)(X)
        assert torch.equal(Reference(signed(given))(X), expected)
        assert torch.equal(Reference(unsigned_codes(given))(X), expected)


def test_a_coding_without_its_lowest_code_stays_signed() -> None:
    narrow = signed(program("onnx"))
    name, coding = next(iter(narrow.codings.items()))
    scheme = fewbit.Scheme("int8", narrow=True)
    narrow.codings[name] = type(coding)(scheme, coding.scale, coding.zero_point)
    assert unsigned_codes(narrow).codings[name].scheme == scheme
