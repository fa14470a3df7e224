"""Target torch: archives that torch loads, integer kernels of oneDNN in the compiled graph, files read safely."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
import fewbit.targets.torch as target
from fewbit.errors import ArtifactError
from fewbit.model.lowering import lower
from fewbit.model.program import Program
from fewbit.model.reference import Reference

X = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Convolutions of all kinds, a sum, a padded sequence, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.line = nn.Conv1d(8, 6, 3, padding=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.point(self.depthwise(x).clamp(0, 6))
        return self.head(self.line(x.flatten(2)).transpose(1, 2))


@pytest.fixture(scope="module")
def program() -> Program:
    return target.prepare(lower(fewbit.quantize(Net().eval(), X, example=X[:4])))


@pytest.fixture(scope="module")
def file(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "model.pt2"
    target.write(program, path, {"fewbit": '{"target": "torch"}'})
    return path


def test_a_file_gives_its_program_back(program: Program, file: Path) -> None:
    described = target.describe(file)
    assert described.program is not None and described.properties == {"fewbit": '{"target": "torch"}'}
    assert described.program.to_json() == program.to_json()
    stored = described.program.tensors()
    assert stored.keys() == program.tensors().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in program.tensors().items())


def test_layers_run_in_integer_kernels_and_give_the_codes_of_the_reference(
    program: Program, file: Path
) -> None:
    kernels = target.coverage(file, program, {})
    assert {k.layer: k.integer for k in kernels if k.planned} == {
        "stem": True, "depthwise": True, "point": True, "line": True, "head": True
    }  # fmt: skip
    seen = target.probe(file, (X[:4],), target.describe(file).codes)
    reference, counted = Reference(program), 0
    for op in program.ops:
        if op.domain == "integer":
            expected = reference.step(op, [seen[name] for name in op.inputs])
            difference = (expected - seen[op.output]).abs()
            assert int(difference.max()) <= target.TOLERANCE and int((difference > 0).sum()) <= 2
            counted += 1
    assert counted == 6


def test_what_torch_loads_is_what_fewbit_runs(program: Program, file: Path) -> None:
    opened = target.open(file)
    threads = torch.get_num_threads()
    answer = opened(X[:4])[0]
    assert torch.get_num_threads() == threads and answer.shape == (4, 102, 4)
    loaded = torch.export.load(str(file)).module()
    unit = next(program.codings[op.inputs[0]].scale for op in program.ops[::-1] if op.kind == "dequantize")
    torch.testing.assert_close(answer, loaded(X[:4])[0], rtol=0, atol=1.01 * unit)
    torch.testing.assert_close(answer, Reference(program)(X[:4]), rtol=0, atol=1.01 * unit)
    assert loaded(X[:7])[0].shape == (7, 102, 4)  # the batch is free in the file


def test_linear_layers_with_ranges_taken_at_run_time_are_integer(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(8, 4, 1)).eval()

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2](self.net[1](self.net[0](x)).transpose(1, 2))

    x = torch.randn(4, 5, 6)
    program = lower(fewbit.quantize(Turned(), example=x, activations="dynamic"))
    target.write(program, tmp_path / "m.pt2", {})
    kernels = {k.kind: k for k in target.coverage(tmp_path / "m.pt2", program, {})}
    assert kernels["dynamic_linear"].integer
    assert not kernels["dynamic_conv"].integer and "linear layers only" in kernels["dynamic_conv"].cause


# ---- files of others -------------------------------------------------------------------------------------------------


def rewritten(file: Path, path: Path, change: dict[str, bytes], stored: bool = True) -> Path:
    """A copy of an archive with some entries (by the end of their names) replaced."""
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w", method) as new:
        for info in old.infolist():
            data = next((d for end, d in change.items() if info.filename.endswith(end)), old.read(info))
            new.writestr(info.filename, data)
    return path


def entry(file: Path, end: str) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(end)))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_unpickled(file: Path, tmp_path: Path) -> None:
    config = json.loads(entry(file, "model_weights_config.json"))
    name = next(iter(config["config"]))
    config["config"][name]["use_pickle"] = True
    bomb = io.BytesIO()
    torch.save(Bomb(tmp_path / "ran"), bomb)
    change = {
        "model_weights_config.json": json.dumps(config).encode(),
        f"/{config['config'][name]['path_name']}": bomb.getvalue(),
        "sample_inputs/model.pt": bomb.getvalue(),
    }
    hostile = rewritten(file, tmp_path / "hostile.pt2", change)
    with pytest.raises(ArtifactError, match="pickled"):
        target.describe(hostile)
    with pytest.raises(ArtifactError, match="pickled"):
        target.open(hostile)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "text", "flipped", "compressed", "sizes", "strides", "program"]
)
def test_a_damaged_file_is_one_clear_error(file: Path, tmp_path: Path, damage: str) -> None:
    path, data = tmp_path / "damaged.pt2", file.read_bytes()
    config = json.loads(entry(file, "model_weights_config.json"))
    meta = next(e["tensor_meta"] for e in config["config"].values() if len(e["tensor_meta"]["sizes"]) == 4)
    described = json.loads(entry(file, "fewbit.json"))
    if damage in ("sizes", "strides"):
        meta[damage][0] = {"as_int": 2**40}
    described["program"]["ops"][3]["inputs"] = ["nobody"]
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage in ("empty", "text"):
        path.write_text("" if damage == "empty" else "no archive")
    elif damage == "flipped":
        middle = data.index(entry(file, "weight_4")) + 10
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    elif damage == "compressed":
        rewritten(file, path, {}, stored=False)
    elif damage == "program":
        rewritten(file, path, {"fewbit.json": json.dumps(described).encode()})
    else:
        rewritten(file, path, {"model_weights_config.json": json.dumps(config).encode()})
    with pytest.raises(ArtifactError, match=r"damaged\.pt2|nobody"):
        target.describe(path)


def test_archives_of_others_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "other.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.randn(2),)), path)
    with pytest.raises(ArtifactError, match="only files that fewbit exported"):
        target.describe(path)
    with pytest.raises(ArtifactError, match="no such file"):
        target.describe(tmp_path / "absent.pt2")
