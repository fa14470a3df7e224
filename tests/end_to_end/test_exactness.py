"""Random networks, quantized and exported: ONNX Runtime computes the integers of the reference, on new inputs."""

from pathlib import Path

import pytest
import torch
from random_networks import draw
from torch import nn

import fewbit
from fewbit.gate import check_file
from fewbit.targets import get_target

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_is_exact_and_covered(seed: int, tmp_path: Path) -> None:
    drawn = draw(seed)
    quantized = fewbit.quantize(drawn.module, [drawn.inputs(48)], example=drawn.inputs(4, 3), **drawn.recipe)
    path = tmp_path / "m.onnx"
    fewbit.export(quantized, path, time=False)
    onnx = get_target("onnx")
    described = onnx.describe(path)
    for count, variant in ((5, 1), (16, 2)):
        result = check_file(onnx, path, described.program, described.codes, drawn.inputs(count, variant))
        assert [c for c in result.layers if c.differing] == [], (drawn.recipe, drawn.parts)
        assert result.exact, (result.whole_network, result.output_differing, result.output_error)
        if result.whole_network == "bit for bit":
            assert result.output_differing == 0
    layers = [k for k in result.kernels if k.kind in ("conv", "linear")]
    weights = [m for m in drawn.module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert len(layers) >= len(weights) and all(k.integer for k in layers)


def test_the_seeds_draw_all_kinds_and_many_parts() -> None:
    parts = {part for seed in range(200) for part in draw(seed).parts}
    for name in ("tokens", "sequence", "image", "depthwise", "grouped", "gate", "join", "halves",
                 "twice", "pad", "slice",
                 "upsample", "max", "avg", "adaptive", "shift", "pooled", "attention norm", "perceptron"):  # fmt: skip
        assert name in parts


def test_a_seed_always_draws_the_same_network() -> None:
    one, two = draw(7), draw(7)
    assert one.recipe == two.recipe and one.parts == two.parts
    states = zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)


class Tokens(nn.Module):
    """[n, t] token numbers through an embedding, an LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), (6, 6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3)),
        (6, 3, 7, 7),
    ),
    "encoder": (_encoder, (6, 5, 8)),
    "tokens": (Tokens, (6, 5)),
}


@pytest.mark.parametrize("activations", ["dynamic", "float"])
@pytest.mark.parametrize("case", CASES)
def test_recipes_without_data(case: str, activations: str, tmp_path: Path) -> None:
    make, shape = CASES[case]
    x = torch.randint(0, 11, shape) if case == "tokens" else torch.randn(shape)
    module = make().eval()
    quantized = fewbit.quantize(module, example=x, activations=activations)
    path = tmp_path / "m.onnx"
    artifact = fewbit.export(quantized, path, time=False)
    assert artifact.verification is not None and artifact.verification.exact
    if activations == "dynamic" and case in ("linear", "conv"):
        assert all(k.integer for k in artifact.verification.kernels)
    given = x[:3]
    with torch.no_grad():
        expected = quantized(given)
        change = (expected - module(given)).abs().max()
    answer = get_target("onnx").open(path)(given)[0]
    assert change > 0  # it was quantized at all
    torch.testing.assert_close(answer, expected, atol=float(expected.abs().max()) * 0.02, rtol=0)
