"""What bias correction refuses, word for word, and what it leaves as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from test_passes_obstacles import Tied, X, graph, message, plain
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fewbit.errors import CalibrationError, ModelError
from fewbit.model.readers.torch import read
from fewbit.passes import bias_correction


def rounded(gm: fx.GraphModule) -> fx.GraphModule:
    gm = copy.deepcopy(gm)
    for name in ("conv1", "conv2", "conv3"):
        layer = gm.get_submodule(name)
        layer.weight = nn.Parameter(torch.round(layer.weight.detach() * 8) / 8)
    return gm


BATCHES = [(X,), (X + 0.5,)]
LAYERS = ["conv1", "conv2", "conv3"]


def one_shot() -> Iterator[tuple[Tensor]]:
    yield from BATCHES


REFUSED = {
    "no batches": ([], LAYERS, CalibrationError, "bias correction got no batches: give calibration data"),
    "an iterator": (
        one_shot,
        LAYERS,
        CalibrationError,
        "bias correction saw 256 outputs of 'conv1' and then 0: expected the same batches on every reading; give a "
        "list, not an iterator",
    ),
    "not a layer": (
        BATCHES,
        ["conv1", "bn1"],
        ModelError,
        "bias correction: 'bn1' is not a convolution or linear layer of both graphs; they have conv1, conv2, conv3",
    ),
    "nan in the data": (
        [(X,), (torch.full_like(X, float("nan")),)],
        LAYERS,
        CalibrationError,
        "bias correction: the mean of 'conv1' is not finite in channel 0; look for NaN or infinite values in the "
        "data or the weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bias_correction_refuses(name: str) -> None:
    batches, layers, error, expected = REFUSED[name]
    gm = graph(plain)
    quantized = rounded(gm)
    kept = {k: v.clone() for k, v in quantized.state_dict().items()}
    data = batches() if callable(batches) else batches
    assert message(error, lambda: bias_correction.correct(gm, quantized, data, layers)) == expected
    assert all(torch.equal(v, kept[k]) for k, v in quantized.state_dict().items())


def test_interrupted_correction_leaves_the_biases() -> None:
    """Ctrl-C in the last reading, after the biases have been moved."""
    gm = graph(plain)
    quantized = rounded(gm)
    readings = 0

    class Interrupted:
        def __iter__(self) -> Iterator[tuple[Tensor]]:
            nonlocal readings
            readings += 1
            yield from BATCHES
            if readings == 4:
                raise KeyboardInterrupt

    kept = {k: v.clone() for k, v in quantized.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        bias_correction.correct(gm, quantized, Interrupted(), LAYERS)
    assert readings == 4
    assert all(torch.equal(v, kept[k]) for k, v in quantized.state_dict().items())


def test_correction_that_cannot_help_is_refused() -> None:
    """A layer fixed to a constant output from outside cannot be moved by its bias."""
    gm = graph(lambda m, x: m.conv2(F.relu(m.conv1(x))))
    quantized = copy.deepcopy(gm)
    quantized.conv1.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output) + 3.0)
    text = message(CalibrationError, lambda: bias_correction.correct(gm, quantized, BATCHES, ["conv1"]))
    assert re.fullmatch(
        r"bias correction cannot move the mean of 'conv1', off by \d+\.\d% of the output's root mean square, to "
        r"where it belongs; use more bits or leave the correction out", text)  # fmt: skip


def test_shared_bias_becomes_its_own() -> None:
    x = torch.randn(64, 4)
    gm = read(Tied().eval(), (x,))
    gm.b.bias = gm.a.bias
    quantized = copy.deepcopy(gm)
    quantized.a.weight.data = torch.round(quantized.a.weight.data * 3) / 3
    assert quantized.a.bias is quantized.b.bias
    kept = quantized.b.bias.detach().clone()
    bias_correction.correct(gm, quantized, [(x,)], ["a"])
    assert torch.equal(quantized.b.bias, kept)
    assert not torch.equal(quantized.a.bias, kept)
    assert quantized.a.weight is quantized.b.weight


def test_nothing_to_correct() -> None:
    gm = graph(plain)
    assert bias_correction.correct(gm, copy.deepcopy(gm), BATCHES, []) == ["no layers to correct"]
