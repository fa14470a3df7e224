"""Formats that integers can stand for: integer kernels in every runtime, bit for bit; powers of two by shifts alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.calibrate import CalibrationWarning
from fewbit.errors import PlanError
from fewbit.model.integer_weights import accumulate_by_shifts, integer_weights, shiftable
from fewbit.model.lowering import lower
from fewbit.model.program import Coding, Op
from fewbit.model.reference import Reference
from fewbit.numerics.format import format_names, get_format
from fewbit.numerics.qtensor import QTensor
from fewbit.numerics.scheme import Scheme
from fewbit.pipeline import plan

# Multiples of one number, 64 of it at most: by definition of the formats.
GRIDS = {
    "binary", "binary_sign", "ternary", "ternary_fixed", "pow2_2", "pow2_3", "pow2_4", "exp_2", "apot_2", "apot_3",
    "apot_4", "apot_5", "float4_e2m1", "float6_e2m3",
}  # fmt: skip
SHIFTS = {
    "binary",
    "binary_sign",
    "ternary",
    "ternary_fixed",
    "pow2_2",
    "pow2_3",
    "pow2_4",
    "exp_2",
    "apot_2",
}


class Net(nn.Module):
    """A convolution, one of groups, a depthwise one, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.groups = nn.Conv2d(16, 16, 3, groups=4)
        self.deep = nn.Conv2d(16, 16, 3, groups=16)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.groups(torch.relu(self.first(x)))))
        return self.last(x.mean((2, 3)))


def quantized(weights: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return fewbit.quantize(Net().eval(), torch.randn(40, 4, 8, 8), weights=weights, **settings)


def test_which_formats_have_a_unit() -> None:
    found = {name for name in format_names() if get_format(name).unit is not None}
    whole = {name for name in found if get_format(name).integer}
    blocks = {name for name in found if get_format(name).block}
    assert {name for name in whole if name.startswith(("int", "uint"))} == {
        f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)
    }
    assert found - blocks - {n for n in whole if "int" in n} == GRIDS
    for name in GRIDS:
        spec, unit = get_format(name), get_format(name).unit
        assert unit is not None
        values = spec.decode(spec.codes()).double()
        assert (
            torch.equal(values / unit, torch.round(values / unit)) and float(values.abs().max()) <= 64 * unit
        )


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_integers_stand_for_the_values_exactly(name: str, granularity: Any) -> None:
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    if not get_format(name).scaled:
        granularity = "tensor"
    q = QTensor.quantize(w, Scheme(name, granularity, narrow=False))
    found = integer_weights("layer", q)
    assert found["weight"].dtype == torch.int8 and found["weight_scale"].shape == (6,)
    assert torch.equal(found["weight"].float() * found["weight_scale"].reshape(-1, 1, 1), q.dequantize())


@pytest.mark.parametrize("name", ["pow2_4", "apot_5", "ternary", "binary", "float4_e2m1"])
def test_onnx_multiplies_integers_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = quantized(name)
    check = fewbit.export(model, tmp_path / "m.onnx", time=False).verification
    assert check is not None and check.exact and check.whole_network == "bit for bit"
    assert all(k.integer for k in check.kernels) and check.covered("conv") == (3, 3)
    again = fewbit.verify(tmp_path / "m.onnx")
    assert len(again.layers) == len(check.layers) > 4 and again.exact


@pytest.mark.parametrize(
    ("target", "suffix"), [("litert", ".tflite"), ("executorch", ".pte"), ("openvino", ".xml")]
)
def test_other_runtimes_multiply_the_same_integers(target: str, suffix: str, tmp_path: Path) -> None:
    pytest.importorskip({"litert": "ai_edge_litert"}.get(target, target))
    model = quantized("pow2_4", target=target)
    check = fewbit.export(model, tmp_path / f"m{suffix}", time=False).verification
    assert check is not None and check.exact and check.covered("conv") == (3, 3)
    assert sum(c.differing for c in check.layers) == 0
    assert check.covered("linear") == (1, 1)


@pytest.mark.parametrize("settings", [{}, {"activations": "dynamic"}])
def test_few_values_are_packed_in_the_file(settings: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(50, 256)
    data = None if settings else x
    sizes = {}
    for weights in ("int8", "pow2_4", "binary"):
        q = fewbit.quantize(model, data, example=x, weights=weights, **settings)
        sizes[weights] = fewbit.export(q, tmp_path / "m.onnx", time=False).size
        assert fewbit.verify(tmp_path / "m.onnx").kernels[0].integer
    assert sizes["int8"] - sizes["pow2_4"] > 0.97 * 256 * 128
    assert sizes["int8"] - sizes["binary"] > 0.97 * 256 * 224


def by_definition(op: Op, x: Tensor, zero_point: int) -> list[int]:
    """The accumulators of a linear layer in Python's integers: a shift and a sign for each weight."""
    sums = []
    for row in (x - zero_point).tolist():
        for channel, weights in enumerate(op.constants["weight"].tolist()):
            total = int(op.constants["bias"][channel])
            for value, weight in zip(row, weights, strict=True):
                if weight:
                    shifted = value << (abs(weight).bit_length() - 1)
                    total += shifted if weight > 0 else -shifted
            sums.append(total)
    return sums


def test_shifts_and_sums_are_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    powers = torch.tensor([0, *[s << k for k in range(7) for s in (1, -1)], -128], dtype=torch.int8)
    weight = powers[torch.randint(len(powers), (5, 40), generator=generator)]
    assert shiftable(weight) and not shiftable(torch.tensor([3], dtype=torch.int8))
    constants = {"weight": weight, "bias": torch.randint(-999, 999, (5,), generator=generator).int()}
    op = Op("linear", "integer", "x", "x", [], "", {"shifts": True}, constants)
    x = torch.randint(0, 256, (7, 40), generator=generator).int()
    found = accumulate_by_shifts(op, x, Coding(Scheme("uint8", symmetric=False), 1.0, 113))
    assert found.flatten().tolist() == by_definition(op, x, 113)


@pytest.mark.parametrize("name", ["pow2_4", "apot_4", "ternary", "binary", "int8"])
def test_the_program_says_what_can_be_shifted_and_the_reference_shifts(name: str) -> None:
    program = lower(quantized(name))
    weighted = [op for op in program.integer_ops() if "weight" in op.constants]
    assert len(weighted) == 4
    assert all(bool(op.attrs.get("shifts")) == (name in SHIFTS) for op in weighted)
    x = torch.randn(9, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    multiplied, shifted = Reference(program).run(x), Reference(program, "f32_even_shifts").run(x)
    assert multiplied.keys() == shifted.keys()
    assert all(torch.equal(multiplied[key], shifted[key]) for key in multiplied)


def test_a_bias_fits_the_accumulator_of_nearly_dead_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 1e-7
        model[0].bias.fill_(3.0)
    x = torch.randn(64, 8)
    with pytest.warns(CalibrationWarning, match="dead"), torch.no_grad():
        found = fewbit.quantize(model, x, weights="pow2_4")
        assert float((found(x) - model(x)).abs().max()) < 0.3
    (layer,) = [op for op in lower(found).integer_ops() if "bias" in op.constants]
    assert (
        int(layer.constants["bias"].abs().max()) <= 2**23 + 1
    )  # more would round in requantization's float32


class TestPlans:
    """What the planner does with formats that no integer kernel multiplies."""

    net, x = Net().eval(), torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def test_their_layers_compute_in_float_and_say_why(self) -> None:
        found = plan(self.net, self.x, weights="nf4", rules=[{"match": "first", "weights": "int8"}])
        rows = {row.site: row for row in found.rows}
        assert rows["first.output"].scheme is not None and rows["first.weight"].scheme.format == "int8"
        assert rows["groups.weight"].scheme.format == "nf4" and rows["groups.output"].scheme is None
        assert rows["groups.output"].because == (
            "float: its nf4 weights are decoded to float: no integer kernel multiplies them"
        )

    @pytest.mark.parametrize("activations", ["int8", "dynamic"])
    def test_mixed_with_integer_layers_they_deploy(self, activations: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        data = torch.randn(40, 4, 8, 8) if activations == "int8" else None
        rules = [{"match": "groups", "weights": "codebook2"}, {"match": "last", "weights": "nf4"}]
        model = fewbit.quantize(
            self.net, data, example=self.x, weights="pow2_4", activations=activations, rules=rules
        )
        check = fewbit.export(model, tmp_path / "m.onnx", time=False).verification
        kind = "conv" if activations == "int8" else "dynamic_conv"
        assert check is not None and check.exact and check.covered(kind) == (2, 2)
        decoded = {k.layer: k.cause for k in check.kernels if not k.integer}
        assert "codebook2 weights, decoded" in decoded["groups"] and "nf4 weights" in decoded["last"]

    def test_groups_of_a_grid_are_decoded_too(self) -> None:
        found = plan(self.net, self.x, weights="pow2_4", rules=[{"match": "last", "group_size": 8}])
        rows = {row.site: row for row in found.rows}
        assert "no integer kernel" in rows["last.output"].because
        assert rows["groups.output"].scheme is not None

    def test_numbers_without_an_integer_kernel_stay_an_error(self) -> None:
        with pytest.raises(PlanError, match="float16 weights have no integer kernel"):
            plan(self.net, self.x, weights="float16")
