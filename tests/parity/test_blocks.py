"""Blocks, run one after the other, compute what the whole graph does, quantized and float."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fewbit
from fewbit.model.blocks import as_module, split, twin
from fewbit.model.readers.torch import read


class Residual(nn.Module):
    """Two residual blocks (one with a projection), a view by the batch's size, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.project = nn.Conv2d(4, 8, 1, 2)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.a2(torch.relu(self.a1(x))) + x)
        x = torch.relu(self.b2(torch.relu(self.b1(x))) + self.project(x))
        return self.head(x.reshape(x.size(0), -1))


class Attention(nn.Module):
    """One layer of attention and of a perceptron, each with its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(x)))


def chained(gm: GraphModule, layers: list[str], x: Tensor) -> tuple[list[list[str]], Tensor]:
    """The layers of each block, and what the blocks give in a row."""
    values = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), [x], strict=True))
    blocks = split(gm, layers, (x[:2],))
    for block in blocks:
        found = as_module(block, gm)(*(values[n] for n in block.inputs))
        values |= dict(zip(block.outputs, found, strict=True))
        values = {n: v for n, v in values.items() if n in block.outputs}  # nothing else crosses
    (result,) = values.values()
    return [[c for c in b.calls() if c in layers] for b in blocks], result


def test_a_residual_block_stays_whole() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(6, 3, 8, 8)
    gm = read(model, (x,))
    layers = [name for name, m in gm.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    found, result = chained(gm, layers, x)
    assert [sorted(block) for block in found] == [["stem"], ["a1", "a2"], ["b1", "b2", "project"], ["head"]]
    assert torch.equal(result, gm(x))


@pytest.mark.parametrize(("model", "shape"), [(Residual, (6, 3, 8, 8)), (Attention, (6, 5, 8))])
def test_quantized_blocks_and_their_float_twins(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net, x = model().eval(), torch.randn(*shape)
    quantized = fewbit.quantize(net, x.repeat(8, *[1] * (len(shape) - 1)), example=x, progress=False)
    layers = [name.rpartition(".")[0] for name in quantized.qtensors.names()]
    with torch.no_grad():
        found, result = chained(quantized.graph, layers, x)
        assert len(found) > 1 and torch.equal(result, quantized(x))
        gm = read(net, (x,))
        values: dict[str, Tensor] = {n.name: x for n in gm.graph.nodes if n.op == "placeholder"}
        for block in split(quantized.graph, layers, (x[:2],)):
            pair = twin(block, gm)
            outputs = as_module(pair, gm)(*(values[n.name] for n in pair.inputs))
            values |= {n.name: v for n, v in zip(pair.outputs, outputs, strict=True)}
        torch.testing.assert_close(outputs[0], net(x), rtol=1e-4, atol=1e-5)


def test_a_layer_can_be_replaced() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = torch.randn(4, 3)
    gm = read(model, (x,))
    block = split(gm, ["0", "2"], (x,))[0]
    (found,) = as_module(block, gm, {"0": nn.Identity()})(x)
    assert torch.equal(found, torch.relu(x))
