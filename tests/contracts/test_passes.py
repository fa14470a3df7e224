"""Every pass keeps what it says: outputs, layer names, modes, the user's module; and twice is once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fewbit.passes
from fewbit.errors import ModelError, RecipeError
from fewbit.model.readers.torch import read
from fewbit.passes import pass_names, registry, run


class Residual(nn.Module):
    """A small ResNet: a stem, a block with identity and a block with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.conv4, self.bn4 = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12, affine=False)
        self.project, self.bn5 = nn.Conv2d(8, 12, 1, stride=2), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        y = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
        return self.head(torch.relu(y + self.bn5(self.project(x))).mean((2, 3)))


class Mobile(nn.Module):
    """Inverted residual with ReLU6, then a separable block with ReLU, pooling and a two-layer head."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.shrink, self.bn3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.separable = nn.Conv2d(6, 12, 3, groups=6)
        self.point = nn.Conv2d(12, 8, 1)
        self.fc1, self.bn4, self.fc2 = nn.Linear(8 * 9, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        x = F.relu(self.separable(self.bn3(self.shrink(x))))
        x = F.adaptive_avg_pool2d(F.max_pool2d(F.leaky_relu(self.point(x), 0.1), 2), 3)
        return self.fc2(F.dropout(F.relu(self.bn4(self.fc1(x.flatten(1)))), 0.1, self.training))


class Transposed(nn.Module):
    """Convolutions that grow the image, grouped too, zero padding and upsampling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(2, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.up1, self.bn2 = nn.ConvTranspose2d(8, 12, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(12)
        self.up2, self.bn3 = nn.ConvTranspose2d(12, 4, 2, groups=4), nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.up1(F.relu(self.bn1(self.down(x))))))
        x = F.relu(self.bn3(self.up2(F.pad(x, (1, 0, 2, 1)))))
        return self.out(F.interpolate(x, scale_factor=2.0))


class Sequences(nn.Module):
    """One-dimensional convolutions, a transpose and linear layers over (batch, length, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.conv, self.bn1 = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.fc1, self.bn2 = nn.Linear(8, 6), nn.BatchNorm1d(10)
        self.fc2, self.fc3 = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(self.norm(x)))).transpose(1, 2)
        return self.fc3(F.relu(self.fc2(self.bn2(self.fc1(x)))) * 2.0)


class Twice(nn.Module):
    """A block called twice with one batch norm, one with two, tied weights, an output read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.tied1, self.bn3, self.tied2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.tied2.weight = self.tied1.weight
        self.fork, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn(self.block(F.relu(self.bn(self.block(x))))))
        x = F.relu(self.bn2(self.other(F.relu(self.bn1(self.other(x))))))
        y = self.fork(self.tied2(F.relu(self.bn3(self.tied1(x)))))
        return y, self.bn4(y)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (4, 3, 12, 12)),
    "mobile": (Mobile, (4, 3, 12, 12)),
    "transposed": (Transposed, (3, 2, 11, 11)),
    "sequences": (Sequences, (4, 4, 10)),
    "twice": (Twice, (2, 3, 6, 6)),
}
Prepared = tuple[nn.Module, tuple[Tensor, ...], fx.GraphModule]


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network with unlike weights per channel and statistics as training leaves them; its input."""
    torch.manual_seed(seed)
    factory, shape = NETWORKS[name]
    module = factory()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.2, 3.0)
                if layer.affine:
                    layer.weight.normal_()
                    layer.bias.normal_()
            elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                sizes = torch.rand(layer.weight.shape[0]).mul(3).exp()
                layer.weight.mul_(sizes.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return module, torch.randn(shape)


@pytest.fixture(params=sorted(NETWORKS), scope="module")
def prepared(request: pytest.FixtureRequest) -> Prepared:
    module, x = network(request.param)
    return module, (x,), read(module.eval(), (x,))


def settings(name: str, reference: fx.GraphModule, gm: fx.GraphModule, x: Tensor) -> dict[str, Any]:
    """What a pass takes besides the graph; what corrects quantization gets a graph with coarse weights."""
    takes = inspect.signature(registry.module(name).apply).parameters
    found: dict[str, Any] = {"batches": [(x,), (x.flip(0) + 0.5,)]} if "batches" in takes else {}
    if "reference" in takes:
        kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        layers = [n for n, m in gm.named_modules() if isinstance(m, kinds)]
        for layer in {id(gm.get_submodule(n).weight): gm.get_submodule(n) for n in layers}.values():
            step = layer.weight.abs().max() / 3
            layer.weight.data = torch.round(layer.weight.data / step) * step
        found |= {"reference": reference, "layers": layers}
    return found


def leaves(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", pass_names())
def test_says_what_it_preserves(name: str) -> None:
    module = registry.module(name)
    assert isinstance(module.PRESERVES, str)
    assert module.PRESERVES.endswith(".")
    assert module.TOLERANCE is None or 0 < module.TOLERANCE <= 1e-3
    takes = inspect.signature(module.apply).parameters
    assert getattr(module, "READS_DATA", False) == ("batches" in takes)
    assert module.__doc__


@pytest.mark.parametrize("name", pass_names())
def test_outputs(name: str, prepared: Prepared) -> None:
    """Also on inputs and a batch size that the pass did not see."""
    module, (x,), source = prepared
    tolerance = registry.module(name).TOLERANCE
    gm = copy.deepcopy(source)
    run(name, gm, (x,), **settings(name, source, gm, x))
    if tolerance is None:
        return
    for inputs in (x, torch.randn(7, *x.shape[1:])):
        with torch.no_grad():
            for expected, actual in zip(leaves(module(inputs)), leaves(gm(inputs)), strict=True):
                assert float((expected - actual).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", pass_names())
def test_layers_modes_and_ties(name: str, prepared: Prepared) -> None:
    _, (x,), source = prepared
    gm = copy.deepcopy(source).train()
    first = next(m for m in gm.modules() if isinstance(m, nn.Conv1d | nn.Conv2d))
    first.eval()
    gm.get_parameter(next(n for n, _ in gm.named_parameters())).requires_grad_(False)
    arguments = settings(name, source, gm, x)
    before = {n: (type(m), m.training) for n, m in gm.named_modules() if not list(m.children())}
    trained = {n: p.requires_grad for n, p in gm.named_parameters(remove_duplicate=False)}
    statistics = state(gm)
    run(name, gm, (x,), **arguments)
    after = {n: (type(m), m.training) for n, m in gm.named_modules() if not list(m.children())}
    assert after.items() <= before.items()
    gone = {before[n][0] for n in before.keys() - after.keys()}
    assert gone <= ({nn.BatchNorm1d, nn.BatchNorm2d} if name == "fold_batch_norm" else set())
    for parameter, required in trained.items():
        if parameter.rpartition(".")[0] in after:
            assert gm.get_parameter(parameter).requires_grad == required
    for key, value in gm.state_dict().items():
        if "running" in key or "tracked" in key:
            assert torch.equal(value, statistics[key]), f"{key} moved: the pass ran the graph in train mode"


@pytest.mark.parametrize("name", pass_names())
def test_twice_is_once(name: str, prepared: Prepared) -> None:
    _, (x,), source = prepared
    gm = copy.deepcopy(source)
    arguments = settings(name, source, gm, x)
    run(name, gm, (x,), **arguments)
    once, nodes = state(gm), len(gm.graph.nodes)
    run(name, gm, (x,), **arguments)
    assert len(gm.graph.nodes) == nodes
    assert gm.state_dict().keys() == once.keys()
    for key, value in gm.state_dict().items():
        assert torch.equal(value, once[key]), key


@pytest.mark.parametrize("name", pass_names())
def test_leaves_other_modules_alone(name: str, prepared: Prepared) -> None:
    """The user's module and the float graph keep every bit and their modes."""
    module, (x,), source = prepared
    gm = copy.deepcopy(source)
    kept = [(m, state(m), [c.training for c in m.modules()]) for m in (module, source)]
    run(name, gm, (x,), **settings(name, source, gm, x))
    for owner, values, modes in kept:
        assert [c.training for c in owner.modules()] == modes
        assert owner.state_dict().keys() == values.keys()
        assert all(torch.equal(v, values[k]) for k, v in owner.state_dict().items())


@pytest.fixture
def more_passes(tmp_path: Path) -> Iterator[None]:
    """Two more passes in one more folder: one says that it keeps the outputs and does not, one adds a node."""
    (tmp_path / "lying.py").write_text(
        "PRESERVES = 'The outputs.'\nTOLERANCE = 1e-4\n\n\n"
        "def apply(gm, factor=1.5):\n    gm.head.weight.data.mul_(factor)\n    return ['head changed']\n"
    )
    (tmp_path / "adding.py").write_text(
        "import torch\n\nPRESERVES = 'Nothing.'\nTOLERANCE = None\n\n\n"
        "def apply(gm):\n    out = next(n for n in gm.graph.nodes if n.op == 'output')\n"
        "    with gm.graph.inserting_before(out):\n"
        "        new = gm.graph.call_function(torch.ops.aten.abs.default, (out.args[0],))\n"
        "    out.args = (new,)\n    return ['abs added']\n"
    )
    fewbit.passes.__path__.append(str(tmp_path))
    yield
    fewbit.passes.__path__.remove(str(tmp_path))


@pytest.mark.usefixtures("more_passes")
def test_a_new_node_gets_its_shape_and_is_run() -> None:
    module, x = network("residual")
    gm = read(module.eval(), (x,))
    assert run("adding", gm, (x,)) == ["abs added"]
    added = list(gm.graph.nodes)[-2]
    assert (added.meta["shape"], added.meta["dtype"]) == ((4, 5), torch.float32)
    assert gm(x).min().item() >= 0


@pytest.mark.usefixtures("more_passes")
def test_a_pass_that_lies_is_found() -> None:
    module, x = network("residual")
    gm = read(module.eval(), (x,))
    assert run("lying", gm, (x,), factor=1.0) == ["head changed"]
    gm.head.bias.data.zero_()  # type: ignore[union-attr]
    with pytest.raises(ModelError) as caught:
        run("lying", gm, (x,))
    assert str(caught.value) == (
        "pass 'lying' moved output 0 of the model by 5.0e-01 (relative, on the example): "
        "expected at most 1e-04; leave the pass out for this model (it did: head changed)"
    )


def test_unknown_pass() -> None:
    with pytest.raises(RecipeError, match=r"unknown pass 'equalise': did you mean 'equalize'\? available: "):
        registry.module("equalise")
