"""Models saved as one .fewbit file: the same bits again, every byte accounted for, only our own files replaced."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fewbit
from fewbit.cli import app
from fewbit.errors import ArtifactError, ModelError
from fewbit.evaluation.size import size_by_tensor
from fewbit.model import single_file
from fewbit.model.lowering import lower
from fewbit.model.readers.torch import read

FORMATS = ["int8", "int4", "uint8", "int12", "ternary", "binary", "codebook4", "codebook4_shared", "nf4",
           "float8_e4m3", "float16", "bfloat16", "mxfp4", "pow2_4"]  # fmt: skip


class Net(nn.Module):
    """A recurrent layer, two layers with the same weight, a constant, a buffer of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32, bias=False)
        self.out.weight = self.head.weight
        self.gain = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(self.embed(x))[0][:, -1]
        return self.out(torch.relu(self.head(self.norm(y) * self.gain)))


def linear(**settings: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return fewbit.quantize(net, torch.randn(40, 64), **settings)


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert repr(a).splitlines()[1:] == repr(b).splitlines()[1:]
    before, after = a.state_dict(), b.state_dict()
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype for k in before)
    assert all(torch.equal(bits(before[k]), bits(after[k])) for k in before)


@pytest.mark.parametrize("weights", FORMATS)
def test_every_format_comes_back(weights: str, tmp_path: Path) -> None:
    affine = {"weight_symmetric": False} if weights == "uint8" else {}
    q = linear(weights=weights, activations="float", **affine)
    again = fewbit.load(fewbit.save(q, tmp_path / "m.fewbit"))
    assert_same(q.graph, again.graph)  # type: ignore[arg-type]
    for name in q.qtensors.names():
        a, b = q.qtensors[name], again.qtensors[name]  # type: ignore[union-attr,index]
        assert (a.scheme, a.shape) == (b.scheme, b.shape)
        for part in ("codes", "scale", "zero_point", "codebook"):
            x, y = getattr(a, part), getattr(b, part)
            assert (x is None) == (y is None)
            assert x is None or torch.equal(bits(x), bits(y))
    assert q.plan == again.plan  # type: ignore[union-attr]


def test_same_answers_and_same_program(tmp_path: Path) -> None:
    q, x = linear(), torch.randn(5, 64)
    again = fewbit.load(fewbit.save(q, tmp_path / "m.fewbit"))
    assert torch.equal(q(x), again(x))
    before, after = lower(q), lower(again)  # type: ignore[arg-type]
    assert before.to_json() == after.to_json()
    assert all(torch.equal(value, after.tensors()[key]) for key, value in before.tensors().items())


@pytest.mark.parametrize("training", [False, True])
def test_float_graph_with_recurrent_and_tied_layers(training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(32, (6, 7))
    gm = read(Net().train(training), (x,))
    again = fewbit.load(fewbit.save(gm, tmp_path / "m.fewbit"))
    assert_same(gm, again)
    assert again.training == training
    assert again.get_parameter("out.weight") is again.get_parameter("head.weight")
    assert torch.equal(gm.eval()(x), again.eval()(x))


def test_quantized_recurrent_and_tied_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(32, (6, 7))
    q = fewbit.quantize(Net().eval(), example=x, weights="int8", activations="float")
    path = fewbit.save(q, tmp_path / "m.fewbit")
    again = fewbit.load(path)
    assert torch.equal(q(x), again(x))
    names = [entry.name for entry in single_file.read_layout(path.read_bytes()).entries]
    assert "head.weight:codes" in names and "out.weight:codes" not in names
    assert again.graph.get_parameter("out.weight") is again.graph.get_parameter("head.weight")  # type: ignore[operator]
    assert again.example[0].shape == x.shape and again.example[0].dtype == x.dtype  # type: ignore[union-attr]
    assert (again.example[0].min(), again.example[0].max()) == (x.min(), x.max())  # type: ignore[union-attr]


def test_sparse_float_weights_cost_what_is_left_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 100, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.where(torch.rand(100, 200) < 0.05, net[0].weight, torch.zeros(())))
    gm = read(net, (torch.randn(3, 200),))
    path = fewbit.save(gm, tmp_path / "m.fewbit")
    assert_same(gm, fewbit.load(path))
    kept = int((net[0].weight != 0).sum())
    assert (
        path.stat().st_size < 4 * kept + 20_000 * 0.29 / 8 + 900
    )  # the values, the places' entropy, the rest


def test_every_byte_is_accounted_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    zeros = nn.Sequential(nn.Linear(300, 2000, bias=False))
    nn.init.zeros_(zeros[0].weight)
    models = [
        linear(),
        linear(weights="codebook4_shared", activations="float"),
        read(Net().eval(), (torch.zeros(2, 3).long(),)),
        read(zeros, (torch.randn(3, 300),)),
    ]
    for model in models:
        path = fewbit.save(model, tmp_path / "m.fewbit")
        sizes = size_by_tensor(path)
        assert sizes.total == sizes.file == path.stat().st_size
        assert sum(each.nbytes for each in sizes.tensors) == sizes.total
        assert all(sum(each.parts.values()) == each.nbytes for each in sizes.tensors if each.parts)
    assert {"(header)", "(checksum)", "(description)", "(padding)"} <= {each.name for each in sizes.tensors}


def test_inspect_shows_where_bytes_go(tmp_path: Path) -> None:
    q = linear(weights="codebook4_shared", activations="float")
    path = fewbit.save(q, tmp_path / "m.fewbit")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    row = next(line for line in shown.output.splitlines() if line.startswith("0.weight") and "codes" in line)
    assert all(word in row for word in ("codebook4_shared [64, 64]", "tables", "codebook 3", "scale"))
    assert f"file {path.stat().st_size:,}" in shown.output.splitlines()[-1]
    described = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert described["size"]["file"] == path.stat().st_size
    assert described["rows"] == q.plan.to_json()["rows"]


def test_a_float_file_is_inspected_without_an_input(tmp_path: Path) -> None:
    path = fewbit.save(read(nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 4),)), tmp_path / "m.fewbit")
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0 and "0.bias" in shown.output


def test_commands_read_and_write_it(tmp_path: Path) -> None:
    net, q = tmp_path / "net.fewbit", tmp_path / "q.fewbit"
    fewbit.save(read(nn.Sequential(nn.Linear(8, 6)), (torch.randn(2, 8),)), net)
    command = ["quantize", str(net), "-o", str(q), "--shape", "2,8", "--set", "activations=float"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert fewbit.load(q).qtensors["0.weight"].scheme.format == "int8"  # type: ignore[union-attr,index]


def test_small_networks_have_little_beside_their_weights(tmp_path: Path) -> None:
    """LeNet-300-100 with random weights: what is no weight and no bias takes 1.5 kB at most."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    with torch.no_grad():
        for layer, share in ((net[0], 0.04), (net[2], 0.09), (net[4], 0.26)):
            keep = layer.weight.abs() >= layer.weight.abs().quantile(1 - share)
            layer.weight.copy_(torch.where(keep, layer.weight, torch.zeros(())))
    q = fewbit.quantize(
        net,
        example=torch.rand(16, 784),
        weights="codebook4_shared",
        granularity="tensor",
        activations="float",
    )
    sizes = size_by_tensor(fewbit.save(q, tmp_path / "m.fewbit"))
    numbers = ("codes", "gaps", "codebook", "scale")
    assert sizes.total - sum((each.parts or {}).get(p, 0) for each in sizes.tensors for p in numbers) < 1500
    assert sizes.total < 19_000


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    mine, folder, link = tmp_path / "a.fewbit", tmp_path / "b.fewbit", tmp_path / "c.fewbit"
    mine.write_text("keep")
    folder.mkdir()
    link.symlink_to(fewbit.save(linear(), tmp_path / "real.fewbit"))
    for path in (mine, folder, link):
        with pytest.raises(ArtifactError, match=r"is not a file that fewbit.save wrote, so it is left alone"):
            fewbit.save(linear(), path)
    with pytest.raises(ArtifactError, match=r"no/such does not exist; create it first"):
        fewbit.save(linear(), tmp_path / "no" / "such" / "a.fewbit")
    assert mine.read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.fewbit", "b.fewbit", "c.fewbit", "real.fewbit"]


def test_own_file_is_replaced_also_a_damaged_one(tmp_path: Path) -> None:
    path = fewbit.save(linear(), tmp_path / "m.fewbit")
    path.write_bytes(path.read_bytes()[:-9])
    fewbit.save(linear(weights="int4"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.fewbit"]
    assert fewbit.load(path).qtensors["0.weight"].scheme.format == "int4"  # type: ignore[union-attr,index]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fewbit.save(linear(), tmp_path / "m.fewbit")
    good = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match=r"m.fewbit: cannot be written \(No space left on device\)"):
        fewbit.save(linear(weights="int4"), path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["m.fewbit"]


def test_what_a_file_cannot_hold_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "_LONGEST_DESCRIPTION", 2**9)
    with pytest.raises(ModelError, match=r"save to a folder"):
        fewbit.save(linear(), tmp_path / "m.fewbit")
    assert not list(tmp_path.iterdir())
