"""Sums keep more bits than layers read: the stream forks, changes no float answer, and deploys everywhere."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.edges import narrowed
from fewbit.model.readers.torch import read
from fewbit.model.sites import place
from fewbit.pipeline import plan


class Forks(nn.Module):
    """A residual stream that a pooling passes on before a layer reads it, and a layer whose input no sum reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.second(torch.relu(self.first(x)))
        pooled = torch.max_pool2d(x, 2)
        pooled = torch.relu(pooled + self.third(pooled))
        return self.head(pooled.mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Forks().eval()


IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
FEW = {"weights": "int4", "activations": "int4", "weight_symmetric": False, "ends": "int8", "addends": "int8"}


def test_only_layers_read_few_bits() -> None:
    formats = {
        row.site: row.scheme.format for row in plan(network(), IMAGES, **FEW).rows if row.scheme is not None
    }
    few = {site for site, found in formats.items() if "4" in found and not site.endswith("weight")}
    assert few == {"relu_narrow.output", "first.output", "max_pool2d_narrow.output"}
    without = {row.site for row in plan(network(), IMAGES, weights="int4", activations="int4").rows}
    assert not any("narrow" in site for site in without)
    same = {row.site for row in plan(network(), IMAGES, **FEW | {"activations": "int8"}).rows}
    assert same == without  # nothing to narrow


def test_the_float_network_stays_the_same() -> None:
    gm = read(network(), (IMAGES[:2],))
    before = gm(IMAGES)
    placement = place(gm, lambda layer, op: "static")
    assert narrowed(gm, placement)
    assert torch.equal(gm(IMAGES), before)
    assert not narrowed(gm, place(gm, lambda layer, op: "static"))  # once is enough


def test_more_bits_in_sums_are_less_noise() -> None:
    expected = network()(IMAGES)
    noise = {
        addends: float((fewbit.quantize(network(), IMAGES, progress=False, **FEW | {"addends": addends})(IMAGES)
                        - expected).square().mean())
        for addends in ("same", "int8")
    }  # fmt: skip
    assert noise["int8"] < 0.7 * noise["same"]


@pytest.mark.parametrize("target", ["onnx", "litert", "openvino", "torch", "executorch"])
def test_it_deploys_bit_for_bit(target: str, tmp_path: Path) -> None:
    suffix = {"onnx": "onnx", "litert": "tflite", "openvino": "xml", "torch": "pt2", "executorch": "pte"}[
        target
    ]
    pytest.importorskip({"litert": "ai_edge_litert"}.get(target, target))
    quantized = fewbit.quantize(network(), IMAGES, target=target, progress=False, **FEW)
    check = fewbit.export(quantized, tmp_path / f"m.{suffix}", target=target, time=False).verification
    assert check is not None and check.exact and sum(c.differing for c in check.layers) == 0
    assert check.covered("conv") == (4, 4) and check.covered("linear") == (1, 1)
