"""Target executorch: XNNPACK's kernels, run by ExecuTorch, give the codes of the reference; files are read safely."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import ArtifactError, DataError, TargetError
from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.reference import Reference

pytest.importorskip("executorch")

import fewbit.targets.executorch as target

X = torch.randn(80, 3, 10, 10, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Convolutions of all kinds, two parts joined, a slice, a sum, a function, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([nn.functional.hardswish(self.point(self.depthwise(x).clamp(0, 6))), x[:, 4:]], 1) + x
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(
        0
    )  # weights for which one input of the sum has half the scale of its output: many exact halves
    return target.prepare(lower(fewbit.quantize(Net().eval(), X[:64], example=X[:4])))


@pytest.fixture(scope="module")
def file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    target.write(program, path, {"fewbit": '{"target": "executorch"}'})
    return path


def differing(program: Program, seen: dict[str, Tensor]) -> list[tuple[str, int, int]]:
    """Operations (kind, codes that differ from the reference on the same inputs, largest difference)."""
    reference, found = Reference(program, target.REQUANTIZATION), []
    for op in program.ops:
        if op.output in seen and all(name in seen for name in op.inputs):
            difference = (reference.step(op, [seen[name] for name in op.inputs]) - seen[op.output]).abs()
            found.append((op.kind, int((difference > 0).sum()), int(difference.max())))
    return found


def test_a_file_gives_its_program_back_and_stores_weights_once(program: Program, file: Path) -> None:
    described = target.describe(file)
    assert described.program is not None and described.properties == {"fewbit": '{"target": "executorch"}'}
    assert described.program.to_json() == program.to_json()
    stored = described.program.tensors()
    assert stored.keys() == program.tensors().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in program.tensors().items())
    weight = program.tensors()["stem.weight"].movedim(1, -1).contiguous().numpy().tobytes()
    assert file.read_bytes().count(weight) == 1


def test_xnnpack_gives_the_codes_of_the_reference(program: Program, file: Path) -> None:
    seen = target.probe(file, (X[:4],), target.describe(file).codes)
    found = differing(program, seen)
    assert {kind for kind, _, _ in found} >= {
        "conv",
        "concat",
        "table",
        "add",
        "global_avg_pool",
        "linear",
        "slice",
    }
    assert max(largest for _, _, largest in found) <= target.TOLERANCE
    assert sum(count for _, count, _ in found) <= 4
    assert all(count == 0 for kind, count, _ in found if kind == "add")


def test_integer_kernels_are_found_in_the_file(program: Program, file: Path) -> None:
    kernels = {k.layer: k for k in target.coverage(file, program, {})}
    assert all(kernels[layer].integer for layer in ("stem", "depthwise", "point", "head", "add", "mean"))
    function = next(k for k in kernels.values() if k.kind == "table")
    assert not function.integer and not function.planned and "float" in function.cause


def test_any_number_of_samples_runs_and_a_wrong_size_is_refused(program: Program, file: Path) -> None:
    opened, expected = target.open(file), Reference(program, target.REQUANTIZATION)(X)
    unit = next(program.codings[op.inputs[0]].scale for op in program.ops[::-1] if op.kind == "dequantize")
    first = opened(X[:1])[0]
    for given in (X[:5], X):  # more than fit at once, too
        torch.testing.assert_close(opened(given)[0], expected[: len(given)], rtol=0, atol=1.01 * unit)
    torch.testing.assert_close(first, expected[:1], rtol=0, atol=1.01 * unit)  # not overwritten since
    with pytest.raises(DataError, match="export again with an example of that size"):
        opened(torch.randn(1, 3, 12, 10))
    with pytest.raises(DataError, match="2 inputs given"):
        opened(X, X)


class Joined(nn.Module):
    """Two parts of very different size, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x) * 0.07], 1)


def test_a_clamp_between_two_codings_does_not_save_a_rounding(tmp_path: Path) -> None:
    """XNNPACK joins a clamp to the convolution before it, and would round once where the program rounds twice."""
    x = torch.randn(64, 2, 6, 6)
    program = target.prepare(lower(fewbit.quantize(Joined().eval(), x, example=x[:4], activations="int4")))
    target.write(program, tmp_path / "m.pte", {})
    assert torch.equal(
        target.open(tmp_path / "m.pte")(x[:16])[0], Reference(program, target.REQUANTIZATION)(x[:16])
    )


def test_layers_with_ranges_taken_at_run_time_are_integer(tmp_path: Path) -> None:
    x = torch.randn(16, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    program = target.prepare(lower(fewbit.quantize(model, example=x, activations="dynamic")))
    target.write(program, tmp_path / "m.pte", {})
    assert [k.integer for k in target.coverage(tmp_path / "m.pte", program, {})] == [True, True]
    expected = Reference(program, target.REQUANTIZATION)(x)
    error = (target.open(tmp_path / "m.pte")(x)[0] - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.03  # a range for each row instead of one for all


def test_what_has_no_kernel_is_refused_by_name(tmp_path: Path) -> None:
    x = torch.randn(4, 2, 4, 4, 4)
    program = lower(fewbit.quantize(nn.Sequential(nn.Conv3d(2, 2, 3)).eval(), example=x, activations="float"))
    with pytest.raises(TargetError, match=r"0: ExecuTorch has no three-dimensional convolution"):
        target.write(target.prepare(program), tmp_path / "m.pte", {})


# ---- files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "description", *range(8)])
def test_a_damaged_file_is_one_clear_error(file: Path, tmp_path: Path, damage: str | int) -> None:
    """A byte anywhere included: XNNPACK itself would end the process."""
    path, data = tmp_path / "damaged.pte", file.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "description":
        begin = data.index(b"c-")  # how the compressed text of any file begins
        path.write_bytes(data[: begin + 40] + b"!!!!!!!!" + data[begin + 48 :])
    elif isinstance(damage, int):
        place = (2 * damage + 1) * len(data) // 16
        path.write_bytes(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
    else:
        path.write_text("" if damage == "empty" else "no program at all " * 100)
    for function in (target.describe, target.open):
        with pytest.raises(ArtifactError, match=r"damaged\.pte"):
            function(path)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent\.pte: cannot be read"):
        target.open(tmp_path / "absent.pte")
